"""kitout export: PEFT loads what is written and computes the same; what PEFT cannot hold is refused with the reason."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from export.saved_adapters import saved
from kitout import IA3, AdaptFormer, LoRA, Method, PrefixTuning, PromptTuning
from kitout.errors import ConfigError, FileError
from kitout.export import export_adapter, exported_adapter
from kitout.export.formats import FORMATS
from kitout.export.formats.format import AdapterFormat
from tiny_models import decoder, encoder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {make.__name__: make(root / make.__name__) for make in (decoder, encoder)}


@pytest.mark.parametrize(
    "method", [LoRA(dora=True), IA3(), PromptTuning(length=3), PrefixTuning(length=3)], ids=lambda m: type(m).__name__
)
def test_peft_computes_what_the_kit_does(bases: dict[str, Path], tmp_path: Path, method: Method) -> None:
    pytest.importorskip("peft")
    adapter = saved(tmp_path / "adapter", bases["decoder"], "causal_lm", method)
    result = export_adapter(adapter, tmp_path / "out", base=bases["decoder"], task="causal_lm")
    assert result.difference is not None
    assert result.difference.largest < 1e-5
    assert result.difference.effect > 1e-3
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    assert "PeftModel.from_pretrained" in str(result)
    assert "vLLM cannot serve it" in str(result)


def test_a_head_goes_with_it(bases: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    adapter = saved(tmp_path / "adapter", bases["encoder"], "classification", LoRA(), head="classifier", classes=2)
    result = export_adapter(adapter, tmp_path / "out", base=bases["encoder"], task="classification")
    assert result.difference is not None
    assert result.difference.largest < 1e-5


def test_what_peft_cannot_hold_is_refused_with_the_reason(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = saved(tmp_path / "adapter", bases["decoder"], "causal_lm", AdaptFormer())
    with pytest.raises(FileError, match="has no equivalent in PEFT") as raised:
        export_adapter(adapter, tmp_path / "out", base=bases["decoder"], task="causal_lm")
    assert "AdaptFormer" in str(raised.value)
    assert "kitout predict" in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_without_peft_it_is_written_and_says_that_nothing_compared_it(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        exported_adapter.importlib.util, "find_spec", lambda name: None if name == "peft" else real(name)
    )
    adapter = saved(tmp_path / "adapter", bases["decoder"], "causal_lm", LoRA())
    result = export_adapter(adapter, tmp_path / "out", base=bases["decoder"], task="causal_lm")
    assert result.difference is None
    assert "not compared: peft is not installed here" in str(result)
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_a_file_that_the_library_reads_differently_is_not_written(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr(type(FORMATS["peft"]), "load", lambda self, model, folder: model)
    adapter = saved(tmp_path / "adapter", bases["decoder"], "causal_lm", LoRA())
    with pytest.raises(FileError, match="computes something else"):
        export_adapter(adapter, tmp_path / "out", base=bases["decoder"], task="causal_lm")
    assert not (tmp_path / "out").exists()


def test_several_adapters_and_unknown_formats(bases: dict[str, Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        saved(tmp_path / "run" / "adapter" / name, bases["decoder"], "causal_lm", LoRA())
    with pytest.raises(ConfigError, match="holds several adapters"):
        export_adapter(tmp_path / "run", tmp_path / "out", base=bases["decoder"], task="causal_lm")
    with pytest.raises(ConfigError, match="there is no format 'pefd': did you mean 'peft'"):
        export_adapter(tmp_path / "run", tmp_path / "out", to="pefd")


def test_a_format_is_one_entry() -> None:
    assert all(isinstance(entry, AdapterFormat) and entry.name == name for name, entry in FORMATS.items())
