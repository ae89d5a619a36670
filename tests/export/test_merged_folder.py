"""kitout merge: a plain transformers folder that computes what the kit does, written whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import kitout
from export.saved_adapters import saved
from kitout import IA3, AdaptFormer, Composition, LoRA, Method, Mix, PrefixTuning, Stack
from kitout.errors import ConfigError, FileError, NotMergeable, PathError
from kitout.export import merge_to_folder, merged_folder, new_folder
from kitout.export.output_difference import OutputDifference
from kitout.export.sample_batch import TEXTS
from tiny_models import both, decoder, encoder, vision


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {make.__name__: make(root / make.__name__) for make in (decoder, encoder, both, vision)}


CASES: dict[str, tuple[str, str, Method, str, int]] = {
    "causal": ("decoder", "causal_lm", LoRA(), "", 0),
    "tied embedding": ("decoder", "causal_lm", LoRA(targets="embed"), "", 0),
    "seq2seq": ("both", "seq2seq_lm", IA3(), "", 0),
    "classes of an encoder": ("encoder", "classification", LoRA(), "classifier", 5),
    "classes of a decoder": ("decoder", "classification", LoRA(), "score", 3),
    "tags": ("encoder", "token_classification", LoRA(), "classifier", 4),
    "images": ("vision", "image_classification", LoRA(), "classifier", 3),
}


@pytest.mark.parametrize("name", CASES)
def test_the_folder_computes_what_the_kit_does(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    base, task, method, head, classes = CASES[name]
    adapter = saved(tmp_path / "adapter", bases[base], task, method, head=head, classes=classes)
    result = merge_to_folder([adapter], tmp_path / "out", base=bases[base], task=task)
    assert result.difference.largest < 1e-5
    assert result.difference.effect > 1e-3
    loaded = getattr(transformers, result.auto_model).from_pretrained(tmp_path / "out")
    assert type(loaded).__module__.startswith("transformers.")
    if task == "seq2seq_lm":  # no pipeline of transformers writes with an encoder-decoder
        assert "pipeline" not in str(result)
    if classes:
        assert loaded.config.num_labels == classes
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors"} < files
    assert ("preprocessor_config.json" if task == "image_classification" else "tokenizer.json") in files
    assert ("generation_config.json" in files) is (task in ("causal_lm", "seq2seq_lm"))
    for file in (tmp_path / "out").glob("*.json"):
        assert str(tmp_path.parent) not in file.read_text(), "no path of this machine"


def test_a_composition_is_one_adapter(bases: dict[str, Path], tmp_path: Path) -> None:
    """Its parts come along in its folder; they are no adapters of the caller, but what they say of their use counts."""
    for seed, (name, head, classes) in enumerate((("first", "", 0), ("second", "classifier", 5))):
        saved(tmp_path / name, bases["encoder"], "classification", LoRA(), seed, head=head, classes=classes)
    predictor = kitout.load(tmp_path / "second", base=bases["encoder"], task="classification", dtype="float32")
    usage = predictor.usage.model_copy(update={"labels": list("vwxyz")})
    kit = predictor.kit
    for name in ("first", "second"):
        kit.load(tmp_path / name, name=name).usage = usage.model_dump()
    kit.add("both", Composition(route=Stack("first", Mix({"first": -0.5}), "second")))
    kit.save("both", tmp_path / "both")
    again = kitout.load(tmp_path / "both", base=bases["encoder"])
    assert (again.loaded, again.names) == (["both"], ["both", "first", "second"])
    assert again("Good").label in "vwxyz"
    result = merge_to_folder([tmp_path / "both"], tmp_path / "out", base=bases["encoder"])
    assert result.adapters == ("both",)
    assert result.difference.largest < 1e-5
    assert result.difference.effect > 1e-3
    assert not result.notes
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert list(loaded.config.label2id) == list("vwxyz")
    kit["first"].usage = None
    kit.save("both", tmp_path / "unknown")
    with pytest.raises(ConfigError, match="does not say what it is for"):
        kitout.load(tmp_path / "unknown", base=bases["encoder"])


def test_several_adapters_are_a_stack_in_the_order_given(bases: dict[str, Path], tmp_path: Path) -> None:
    lora = saved(tmp_path / "lora", bases["decoder"], "causal_lm", LoRA())
    ia3 = saved(tmp_path / "ia3", bases["decoder"], "causal_lm", IA3(), seed=2)
    logits = {}
    for names in ((lora, ia3), (ia3, lora)):
        predictor = kitout.load(*names, base=bases["decoder"], task="causal_lm", dtype="float32")
        result = merge_to_folder(names, tmp_path / names[0].name / "out", base=bases["decoder"], task="causal_lm")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(result.folder)
        ids = predictor.tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
        with torch.no_grad(), predictor.use(Stack(*predictor.names)):
            logits[names] = loaded(ids).logits
            assert torch.allclose(logits[names], predictor.kit(ids).logits, atol=1e-5)
    first, second = logits.values()
    assert (first - second).abs().max() > 1e-5


def test_labels_and_the_lines_that_are_printed(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = saved(tmp_path / "adapter", bases["encoder"], "classification", LoRA(), head="classifier", classes=3)
    predictor = kitout.load(adapter, base=bases["encoder"], task="classification")
    usage = predictor.usage.model_copy(update={"labels": ["a", "b", "c"]})
    predictor.usages["adapter"] = usage
    result = merged_folder.write_merged(predictor, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "a", "1": "b", "2": "c"}
    assert config["problem_type"] == "single_label_classification"
    assert predictor.kit.config.problem_type is None, "the base's own config is as before"
    printed: list[Any] = []
    exec("\n".join(result.python_lines), {"print": printed.append})  # the user's lines, as they stand
    assert printed[0][0]["label"] in ("a", "b", "c")
    assert "largest difference" in str(result)
    assert max(map(len, str(result).split("use it")[0].replace(str(tmp_path), "").split("\n"))) <= 80


def test_half_precision_and_a_dtype_of_choice(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = saved(tmp_path / "adapter", bases["decoder"], "causal_lm", LoRA())
    result = merge_to_folder([adapter], tmp_path / "out", base=bases["decoder"], task="causal_lm", dtype="bfloat16")
    assert result.dtype == "bfloat16"
    assert result.difference.largest > 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_does_not_merge_says_what_to_do(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = saved(tmp_path / "adapter", bases["decoder"], "causal_lm", PrefixTuning(length=2))
    with pytest.raises(NotMergeable, match="virtual tokens") as raised:
        merge_to_folder([adapter], tmp_path / "out", base=bases["decoder"], task="causal_lm")
    assert "kitout export" in str(raised.value)
    assert not (tmp_path / "out").exists()
    bottleneck = saved(tmp_path / "other", bases["decoder"], "causal_lm", AdaptFormer())
    with pytest.raises(NotMergeable, match="Bottleneck is not a linear map") as raised:
        merge_to_folder([bottleneck], tmp_path / "out", base=bases["decoder"], task="causal_lm")
    assert "kitout predict" in str(raised.value)
    assert "kitout export" not in str(raised.value), "PEFT has no such method"


def test_of_several_heads_the_last_one_is_said(bases: dict[str, Path], tmp_path: Path) -> None:
    folders = [
        saved(tmp_path / name, bases["encoder"], "classification", method, head="classifier", classes=n)
        for name, method, n in (("a", LoRA(), 3), ("b", IA3(), 2))
    ]
    result = merge_to_folder(folders, tmp_path / "out", base=bases["encoder"], task="classification")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").num_labels == 2
    assert any("the head of adapter is not in it" in note for note in result.notes)


def test_a_device_that_is_none(bases: dict[str, Path], tmp_path: Path, adapter: Path) -> None:
    with pytest.raises(ConfigError):
        merge_to_folder([adapter], tmp_path / "out", base=bases["decoder"], task="causal_lm", device="tpu")


def test_a_folder_that_is_not_empty_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(FileError, match=r"not empty \(it holds thesis.tex\): name a new or empty folder"):
        merge_to_folder([tmp_path / "no adapter"], tmp_path / "out")
    with pytest.raises(FileError, match="is a file"):
        merge_to_folder([tmp_path / "no adapter"], tmp_path / "out" / "thesis.tex")
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge_to_folder([], tmp_path / "new")


def test_a_run_of_several_adapters_and_one_given_twice(bases: dict[str, Path], tmp_path: Path) -> None:
    """A stack of alternatives is hardly meant."""
    run = [saved(tmp_path / "run" / "adapter" / name, bases["decoder"], "causal_lm", LoRA()) for name in ("a", "b")]
    with pytest.raises(ConfigError, match="holds several adapters: name the one to merge") as raised:
        merge_to_folder([tmp_path / "run", run[1]], tmp_path / "out", base=bases["decoder"], task="causal_lm")
    assert str(run[1]) in str(raised.value)
    with pytest.raises(ConfigError, match="is given twice"):
        merge_to_folder([run[1], run[1]], tmp_path / "out", base=bases["decoder"], task="causal_lm")


@pytest.fixture
def adapter(bases: dict[str, Path], tmp_path: Path) -> Path:
    return saved(tmp_path / "adapter", bases["decoder"], "causal_lm", LoRA())


def test_a_full_disk(bases: dict[str, Path], tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(new_folder.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(PathError, match=r"needs [0-9.]+ KiB, and 1000 B are free there"):
        merge_to_folder([adapter], tmp_path / "out", base=bases["decoder"], task="causal_lm")
    monkeypatch.undo()

    def full(self: nn.Module, folder: Path, **kwargs: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    with pytest.raises(PathError, match="No space left on device: free some space"):
        merge_to_folder([adapter], tmp_path / "out", base=bases["decoder"], task="causal_lm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_folder_that_computes_something_else_is_not_written(
    bases: dict[str, Path], tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = transformers.PreTrainedModel.save_pretrained

    def wrong(self: nn.Module, folder: Path, **kwargs: Any) -> None:
        with torch.no_grad():
            next(p for p in self.parameters() if p.ndim == 2).mul_(1.1)
        real(self, folder, **kwargs)

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", wrong)
    with pytest.raises(FileError, match="computes something else than the kit"):
        merge_to_folder([adapter], tmp_path / "out", base=bases["decoder"], task="causal_lm")
    assert not (tmp_path / "out").exists()


def test_generation_settings_are_kept_even_those_that_transformers_refuses(
    bases: dict[str, Path], tmp_path: Path, adapter: Path
) -> None:
    predictor = kitout.load(adapter, base=bases["decoder"], task="causal_lm")
    config: Any = predictor.kit.base.generation_config
    config.do_sample, config.temperature, config.max_new_tokens = False, 0.6, 7
    merged_folder.write_merged(predictor, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["max_new_tokens"] == 7
    assert written.get("do_sample") is not True


def test_images_of_another_size_say_how_the_model_is_called(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = saved(tmp_path / "a", bases["vision"], "image_classification", LoRA(), head="classifier", classes=3)
    predictor = kitout.load(adapter, base=bases["vision"], task="image_classification")
    usage = predictor.usage
    settings = transformers.ViTImageProcessorPil.from_pretrained(bases["vision"]).to_dict()
    settings = {name: value for name, value in settings.items() if name != "image_processor_type"}
    record = {"size": 16, "processor": settings}
    predictor.usages["adapter"] = type(usage).model_validate(usage.model_dump() | {"images": record})
    result = merged_folder.write_merged(predictor, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["size"]["height"] == 16
    assert any("interpolate_pos_encoding=True" in note for note in result.notes)


def test_when_a_difference_is_rounding() -> None:
    def difference(largest: float, effect: float = 1.0, dtype: str = "float32") -> OutputDifference:
        return OutputDifference(largest, 10.0, effect, 1, 1, dtype)

    assert difference(1e-4).is_rounding
    assert not difference(0.1).is_rounding
    assert difference(0.1, dtype="bfloat16").is_rounding
    assert not difference(float("inf"), dtype="bfloat16").is_rounding
    assert not list(difference(0.1, 1.0, "bfloat16").notes)
    assert "rounding in bfloat16 is as large" in next(difference(0.1, 0.15, "bfloat16").notes)
