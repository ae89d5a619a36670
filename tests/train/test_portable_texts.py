"""A card has no path of the machine that trained, and texts that are not about files are as they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from kitout.evaluate.report.summary import RunSummary
from kitout.train.config.load import load
from kitout.train.portable_texts import portable_summary, portable_text_fn


def config_of(root: Path, **more: str) -> object:
    return load({
        "model": {"name": f"{root}/models/tiny"},
        "data": {"train": f"{root}/data/reviews.csv#50", "test": f"{root}/data/test.csv", "labels": ["a/b", "/r/c"]},
        "output": {"folder": f"{root}/runs/one"}, **more,
    })  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("models/tiny", "data", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("data/reviews.csv", "data/test.csv", "elsewhere/x.png"):
        (tmp_path / name).write_text("")
    return tmp_path


def test_paths_become_names_and_everything_else_stays(root: Path) -> None:
    shorten = portable_text_fn(config_of(root))  # type: ignore[arg-type]
    for text, expected in {
        f"{root}/data/reviews.csv:12: no label": "reviews.csv:12: no label",
        f"label={root}/models/tiny, {root}/data/test.csv; {root}/data": "label=tiny, test.csv; data",
        f"it says {root}/elsewhere/x.png, twice": "it says x.png, twice",  # not a setting, but it is there
        f"{root}/models/tiny-2 is another": f"{root}/models/tiny-2 is another",  # not there: not of this machine
        "yes/no, and/or, /r/python, 1/2, a/b": "yes/no, and/or, /r/python, 1/2, a/b",
        "org/name": "org/name",
    }.items():
        assert shorten(text) == expected


def test_relative_paths_too(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setenv("HOME", str(root))
    config = load({"model": {"name": "models/tiny"}, "data": "data/reviews.csv", "output": {"folder": "~/runs/one"}})
    shorten = portable_text_fn(config)
    text = f"models/tiny, data/reviews.csv, {root}/data/test.csv, ~/runs/one"
    assert shorten(text) == "tiny, reviews.csv, test.csv, one"


def test_the_settings_of_a_card(root: Path) -> None:
    summary = RunSummary(
        title=f"LoRA on {root}/models/tiny", model=f"{root}/models/tiny", method="LoRA", labels=["a/b", "/r/c"],
        data={"sources": f"{root}/data/reviews.csv#50"}, data_name=f"{root}/data/reviews.csv#50",
        notes=[f"{root}/data/reviews.csv:3: cut"],
    )  # fmt: skip
    card = portable_summary(summary, config_of(root))  # type: ignore[arg-type]
    assert (card.title, card.model, card.data_name) == ("LoRA on tiny", "tiny", "reviews.csv#50")
    assert (card.data, card.notes) == ({"sources": "reviews.csv#50"}, ["reviews.csv:3: cut"])
    assert str(root) not in card.config
    assert "name: tiny" in card.config
    assert "path: reviews.csv#50" in card.config
    assert "folder: one" in card.config
    assert "- a/b" in card.config
    assert "- /r/c" in card.config
