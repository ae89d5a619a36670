"""`model.adapters`: a run trains a composition over frozen adapters from folders, which travel with it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import kitout
from kitout.errors import ConfigError, KitoutError
from kitout.train.config.load import load
from tiny_images import folder as pictures
from tiny_models import decoder, encoder, jsonl, reviews, vision

pytest.importorskip("accelerate")

QUERY = {"name": "LoRA", "rank": 2, "targets": "attn.q attn.o"}
SCALES = {"name": "BitFit", "targets": "attn.o"}
COMPOSITIONS = [
    {"name": "Mixture", "of": ["a", "b"], "per": "layer"},
    {"name": "Fusion", "of": ["a", "b"]},
    {"name": "Gated", "of": ["a", "b"]},
]


def instructions(number: int) -> list[dict[str, str]]:
    return [{"instruction": "good or bad?", "input": r["text"], "output": r["label"]} for r in reviews(number)]


def run(model: Path, data: Path, out: Path, method: Any, adapters: dict[str, str] | None = None, **more: Any) -> Any:
    sections = {
        "model": {"name": str(model), "dtype": "float32", "adapters": adapters or {}},
        "data": {"train": str(data), "test": 8, "validation": 0},
        "train": {"steps": 2, "batch_size": 4, "lr": 1e-2} | more,
        "output": {"folder": str(out)},
        "method": method,
    }  # fmt: skip
    return kitout.train(sections, log=lambda _: None)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, str]]:
    return parts_of(tmp_path_factory.mktemp("parts"), "language model")


def parts_of(tmp_path: Path, kind: str) -> tuple[Path, Path, dict[str, str]]:
    """A model, a table and two trained adapters."""
    model = {"language model": decoder, "classifier": encoder, "images": vision}[kind](tmp_path / "m")
    if kind == "images":
        data = pictures(tmp_path / "images", each=8)
    else:
        data = jsonl(tmp_path / "a.jsonl", (instructions if kind == "language model" else reviews)(40))
    second = SCALES if kind != "language model" else {"name": "IA3", "targets": "attn.o mlp.down"}
    for name, method in (("a", QUERY), ("b", second)):
        run(model, data, tmp_path / name, method)
    return model, data, {name: str(tmp_path / name / "adapter") for name in "ab"}


@pytest.mark.parametrize("kind", ["language model", "classifier", "images"])
def test_a_composition_is_trained_over_frozen_adapters(tmp_path: Path, texts: Any, kind: str) -> None:
    model, data, adapters = texts if kind == "language model" else parts_of(tmp_path, kind)
    before = {name: load_file(Path(folder) / "adapter.safetensors") for name, folder in adapters.items()}
    for method in COMPOSITIONS if kind == "language model" else COMPOSITIONS[1:2]:
        out = tmp_path / method["name"]
        run(model, data, out, method, adapters)
        for name, old in before.items():
            for folder in (Path(adapters[name]), out / "adapter" / "parts" / name):
                new = load_file(folder / "adapter.safetensors")
                assert old.keys() == new.keys()
                assert all(torch.equal(old[key], new[key]) for key in old)
        card = (out / "adapter" / "README.md").read_text(encoding="utf-8")
        assert "made of a" in card
        assert str(tmp_path) not in card
        predictor = kitout.load(out / "adapter", base=str(model))
        assert predictor.kit.state.names_with_parts(["adapter"]) == ["adapter", "a", "b"]


def test_what_is_trained_is_the_composition_alone(tmp_path: Path, texts: Any) -> None:
    """Its weights leave their start, 1/2, and a second run ends in the same bits."""
    model, data, adapters = texts
    ends = []
    for out in (tmp_path / "one", tmp_path / "two"):
        run(model, data, out, COMPOSITIONS[0], adapters)
        ends.append(load_file(out / "adapter" / "adapter.safetensors"))
    assert all(not torch.equal(value, torch.full_like(value, 0.5)) for value in ends[0].values())
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_another_part_under_the_name_is_another_run(tmp_path: Path, texts: Any) -> None:
    """A run that was stopped does not go on over parts that have changed since."""
    model, data, original = texts
    adapters = {name: str(shutil.copytree(folder, tmp_path / name)) for name, folder in original.items()}
    out = tmp_path / "out"
    run(model, data, out, COMPOSITIONS[0], adapters, save_steps=1)
    (out / "results.json").unlink()
    run(model, data, out, COMPOSITIONS[0], adapters, save_steps=1)  # goes on
    (out / "results.json").unlink()
    kit = kitout.attach(transformers.AutoModelForCausalLM.from_pretrained(model))
    kit.load(adapters["a"], name="a").strength = 0.5
    shutil.rmtree(adapters["a"])
    kit.save("a", adapters["a"])
    with pytest.raises(KitoutError, match="belongs to another run"):
        run(model, data, out, COMPOSITIONS[0], adapters, save_steps=1)


@pytest.mark.parametrize(
    ("method", "adapters", "message"),
    [
        (COMPOSITIONS[0], {"a": "runs/a"}, r"made of b, which model.adapters does not name"),
        ("LoRA", {"a": "runs/a"}, r"model.adapters names a, and no method is made of it"),
        (COMPOSITIONS[0], {"a": "x", "b": "y", "c": "z"}, r"model.adapters names c, and no method"),
        (
            COMPOSITIONS[0] | {"of": ["a", "adapter"]},
            {"a": "x", "adapter": "y"},
            r"output.name=adapter is also the name",
        ),
    ],
)
def test_settings_that_contradict_each_other(method: Any, adapters: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load({"model": {"name": "m", "adapters": adapters}, "data": "d.jsonl", "method": method})


def test_folders_without_an_adapter_are_named_together(tmp_path: Path, texts: Any) -> None:
    model, data, adapters = texts
    inner = Path(adapters["a"])
    wrong = {"a": str(inner.parent), "b": str(tmp_path / "nowhere")}
    with pytest.raises(ConfigError) as error:
        run(model, data, tmp_path / "out", COMPOSITIONS[0], wrong)
    assert f"write model.adapters.a={inner}" in str(error.value)
    assert "model.adapters.b=" in str(error.value)
    other = encoder(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"model\.adapters\.a="):
        run(other, jsonl(tmp_path / "r.jsonl", reviews(40)), tmp_path / "out", COMPOSITIONS[0], adapters)
