"""`train.from`: a run starts from an adapter's values, at the same sites, and says which adapter that was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import kitout
from kitout.errors import ConfigError, KitoutError
from kitout.train.config import overrides
from kitout.train.config.load import load
from tiny_images import folder as pictures
from tiny_models import decoder, encoder, jsonl, reviews, vision

pytest.importorskip("accelerate")

LOW_RANK = {"name": "LoRA", "rank": 3, "targets": "attn.q"}


def instructions(number: int, seed: int = 0) -> list[dict[str, str]]:
    return [{"instruction": "good or bad?", "input": r["text"], "output": r["label"]} for r in reviews(number, seed)]


def train(model: Path, data: Any, out: Path, parent: Path | None = None, **more: Any) -> Any:
    settings = {"steps": 2, "batch_size": 4, "lr": 1e-2, **({"from": str(parent)} if parent else {})}
    sections = {
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"train": str(data), "test": 8, "validation": 0},
        "train": settings | more.pop("train", {}), "output": {"folder": str(out)},
    }  # fmt: skip
    return kitout.train(sections | more, log=lambda _: None)


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter.safetensors")


@pytest.mark.parametrize("kind", ["language model", "classifier", "images"])
def test_values_go_on_and_the_card_names_the_parent(tmp_path: Path, kind: str) -> None:
    make = {"language model": decoder, "classifier": encoder, "images": vision}[kind]
    if kind == "images":
        first, second = pictures(tmp_path / "a", each=8), pictures(tmp_path / "b", each=8, first=500)
    else:
        rows = instructions if kind == "language model" else reviews
        first = jsonl(tmp_path / "a.jsonl", rows(40))
        # without one of the labels: their order is the parent's
        update = rows(80, 1)[::2] if kind == "classifier" else rows(40, 1)
        second = jsonl(tmp_path / "b.jsonl", update)
    model, method = make(tmp_path / "m"), LOW_RANK if kind != "images" else {"name": "LoRA", "rank": 3}
    train(model, first, tmp_path / "one", method=method)
    tiny = {"lr": 1e-6, "head_lr": 1e-6, "weight_decay": 0.0}
    result = train(model, second, tmp_path / "two", tmp_path / "one" / "adapter", train=tiny)
    old, new = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert old.keys() == new.keys()
    assert all(torch.allclose(old[name], new[name], atol=1e-5) for name in old)
    records = [json.loads((tmp_path / name / "adapter" / "adapter.json").read_text()) for name in ("one", "two")]
    assert records[0]["settings"] == records[1]["settings"]
    assert records[1]["note"]["from"] == {
        "adapter": "one", "sha256": records[0]["tensors"]["sha256"],
        "data_sha256": records[0]["note"]["data_sha256"],
    }  # fmt: skip
    card = (tmp_path / "two" / "adapter" / "README.md").read_text()
    assert f"| continues the adapter | one (sha256 {records[0]['tensors']['sha256']}) |" in card
    assert str(tmp_path) not in card
    assert str(tmp_path) not in json.dumps(records)
    assert all(record["note"]["data_sha256"] in card for record in records)
    assert records[0]["note"]["data_sha256"] != records[1]["note"]["data_sha256"]
    assert "continues" in json.loads((result.folder / "preflight.json").read_text())["settings"]
    again = train(model, second, tmp_path / "two", tmp_path / "one" / "adapter", train=tiny)
    assert again.figures["steps"] == 2  # the same run, found again


def test_a_run_that_continues_is_as_reproducible_as_any(tmp_path: Path) -> None:
    model, data = decoder(tmp_path / "m"), jsonl(tmp_path / "a.jsonl", instructions(40))
    train(model, data, tmp_path / "one", method=LOW_RANK)
    for name in ("two", "three"):
        train(model, data, tmp_path / name, tmp_path / "one" / "adapter")
    one, two, three = (tensors(tmp_path / name) for name in ("one", "two", "three"))
    assert all(torch.equal(two[name], three[name]) for name in two)
    assert not all(torch.equal(one[name], two[name]) for name in two)


def test_a_folder_of_peft_goes_on_too(tmp_path: Path) -> None:
    model, data = decoder(tmp_path / "m"), jsonl(tmp_path / "a.jsonl", instructions(40))
    kit = kitout.attach(transformers.AutoModelForCausalLM.from_pretrained(model).eval())
    kit.add("mine", kitout.LoRA(rank=3, targets="attn.q attn.v"))
    kitout.save_peft(kit, "mine", tmp_path / "peft")
    train(model, data, tmp_path / "out", tmp_path / "peft")
    record = json.loads((tmp_path / "out" / "adapter" / "adapter.json").read_text())
    assert record["settings"]["rank"] == 3
    assert {site["role"] for site in record["sites"]} == {"attn.q", "attn.v"}
    with pytest.raises(ConfigError, match="rank=3, found rank=5"):
        train(model, data, tmp_path / "no", tmp_path / "peft", method={"name": "LoRA", "rank": 5})


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"method": "IA3"}, "was trained with method=.*rank.*leave method out"),
        ({"method": {"name": "LoRA", "rank": 3}}, "leave method out"),
        ({"train": {"from": "nowhere"}}, "train.from=nowhere: no adapter is there"),
        ({"train": {"from": "RUN"}}, "write train.from=.*adapter"),
        ({"data": "OTHER"}, "'neutral'"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    model, data = encoder(tmp_path / "m"), jsonl(tmp_path / "a.jsonl", reviews(40))
    train(model, data, tmp_path / "one", method=LOW_RANK)
    if more.get("data"):
        more, data = {}, jsonl(tmp_path / "b.jsonl", [row | {"label": "neutral"} for row in reviews(9)] + reviews(40))
    if more.get("train", {}).get("from") == "RUN":
        more = {"train": {"from": str(tmp_path / "one")}}
    with pytest.raises(KitoutError, match=words):
        train(model, data, tmp_path / "two", tmp_path / "one" / "adapter", **more)


def test_each_job_has_its_own_parent(tmp_path: Path) -> None:
    model, data = decoder(tmp_path / "m"), jsonl(tmp_path / "a.jsonl", instructions(40))
    train(model, data, tmp_path / "one", method=LOW_RANK)
    jobs = [{"name": "new"}, {"name": "on", "train": {"from": str(tmp_path / "one" / "adapter")}}]
    train(model, data, tmp_path / "two", jobs=jobs)
    settings = {name: json.loads((tmp_path / "two" / "adapter" / name / "adapter.json").read_text())["settings"]
                for name in ("new", "on")}  # fmt: skip
    assert (settings["new"]["rank"], settings["on"]["rank"]) == (8, 3)


def test_the_key_is_written_and_read_back() -> None:
    config = overrides.build_config(None, ["model=m", "data=d", "train.from=old/adapter"])
    assert config.train.from_ == "old/adapter"
    assert config.to_dict()["train"]["from"] == "old/adapter"
    assert load(config.to_dict()) == config
