"""Names of the base and of the data: wrong ones are reported together, a near miss says what may be meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kitout
from kitout.errors import ConfigError, DataError, KitoutError
from kitout.train.config.load import load
from kitout.train.setup.find_inputs import check_inputs, find_inputs, hint_of_names


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reviews.csv").write_text("text,label\na,b\n")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter.json").write_text("{}")
    return tmp_path


def message(model: str, data: Any, **sections: Any) -> str:
    with pytest.raises(KitoutError) as error:
        check_inputs(load({"model": model, "data": data, **sections}))
    return str(error.value)


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("smollm2-135", ["model.name='smollm2-135': no model is there", "did you mean the built-in 'smollm2-135m'?"]),
        ("SmolLM2_135M", ["'smollm2-135m'"]),
        ("./models/smollm2-135m", ["'smollm2-135m'"]),
        ("/nowhere/dinov2_small/", ["'dinov2-small'"]),
        ("./bas", ["did you mean 'base'?"]),
        ("a/b/c", ["no model is there"]),
        ("reviews.csv", ["is a file"]),
        ("adapter", ["is an adapter's folder", "train.from=adapter"]),
        ("tweets", ["is a built-in data set", "minilm"]),
    ],
)
def test_a_wrong_model_and_wrong_data_are_one_error(model: str, parts: list[str]) -> None:
    found = message(model, {"train": ["reviws.csv"], "validation": "./tweet", "test": "nothing.jsonl#5"})
    assert all(part in found for part in parts)
    assert "4 errors" in found
    assert "there is no file reviws.csv; did you mean 'reviews.csv'?" in found
    assert "there is no file ./tweet; did you mean the built-in 'tweets'?" in found
    assert "there is no file nothing.jsonl; beside it: reviews.csv" in found


def test_one_error_is_of_its_own_kind() -> None:
    for model, data, kind in (("a/b/c", "reviews.csv", ConfigError), ("base", "mnist-5.npz", DataError)):
        with pytest.raises(kind, match="there"):
            check_inputs(load({"model": model, "data": data}))
    assert "minilm is a built-in model" in message("base", "minilm")


def test_data_of_jobs_are_names_too() -> None:
    jobs = [{"name": "a", "data": "a.csv"}, {"name": "b", "data": "reviews.csv"}, {"name": "c", "data": "c.csv"}]
    assert "3 errors" in message("a/b/c", "reviews.csv", jobs=jobs)


@pytest.mark.parametrize("model", ["base", "gpt2", "owner/name", "smollm2-135m"])
@pytest.mark.parametrize("data", ["reviews.csv", "reviews.csv#1", "tweets", "tweets#20", "imdb", "owner/set:en#train"])
def test_what_may_be_right_passes(model: str, data: str) -> None:
    check_inputs(load({"model": model, "data": data}))


def test_a_name_of_the_hub_leaves_the_others_in_doubt() -> None:
    found = find_inputs(load({"model": "owner/name", "data": "nope.csv"}))
    assert found.in_doubt
    assert len(found.errors) == 1
    assert not find_inputs(load({"model": "a/b/c", "data": "nope.csv"})).in_doubt


@pytest.mark.parametrize("name", ["x" * 5000, "\0", "~nobody-here/x", "~", "", "#3", "//"])
def test_no_name_is_a_raw_error(name: str) -> None:
    find_inputs(load({"model": name, "data": name}))


def test_from_python_and_as_the_loader_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "transformers.AutoConfig.from_pretrained", lambda *_, **__: (_ for _ in ()).throw(OSError("404"))
    )
    for model, said in (("adapter", "no model is there: name its base"), ("owner/name", "no model is there: 404")):
        with pytest.raises(ConfigError, match=rf"(?s)2 errors.*{said}.*there is no file nope.csv"):
            kitout.train(model=model, data="nope.csv", log=lambda _line: None)


def test_a_set_that_the_hub_does_not_have_may_be_built_in() -> None:
    assert "'tweets'" in hint_of_names(load({"model": "m", "data": "data/tweet"}).data)
    assert not hint_of_names(load({"model": "m", "data": ["tweets#3", "reviews.csv", "owner/x"]}).data)
