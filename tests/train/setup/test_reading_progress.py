"""A large data set says how far it is, and is refused while it is read if memory will not hold it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kitout.base import memory
from kitout.data.read import tables
from kitout.data.read.sources import load_examples
from kitout.errors import DataError
from kitout.train.config.schema import DataConfig
from kitout.train.setup import datasets, reading_progress
from kitout.train.setup.reading_progress import ReadingProgress
from tiny_models import jsonl, reviews, tokenizer


def test_every_stage_prints_a_line_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((tables, "TICK_ROWS"), (datasets, "ENCODE_CHUNK")):
        monkeypatch.setattr(module, name, 10)
    for name in ("FIRST_LINE_SECONDS", "LINE_SECONDS", "HINT_SECONDS"):
        monkeypatch.setattr(reading_progress, name, 0.0)
    data, lines = jsonl(tmp_path / "d.jsonl", reviews(50)), []
    config = DataConfig(train=str(data))
    chunked = datasets.load_datasets(config, "classification", tokenizer(template=False), False, log=lines.append)
    for stage in ("reading d.jsonl: 10 rows", "converting d.jsonl: 10 rows", "encoding: 10 of 4"):
        assert any(line.startswith(stage) for line in lines)
    assert "data.streaming=true" in lines[-1]
    monkeypatch.undo()
    quiet: list[str] = []
    whole = datasets.load_datasets(config, "classification", tokenizer(template=False), False, log=quiet.append)
    assert whole.digest == chunked.digest
    assert not quiet


def test_a_set_that_memory_will_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "TICK_ROWS", 10)
    progress = ReadingProgress(print)
    monkeypatch.setattr(memory, "current", lambda _: progress._start_bytes + 2**30)
    monkeypatch.setattr(memory, "available", lambda _: 2**31)
    with pytest.raises(DataError, match=r"reading d.jsonl: too large .* 10 rows take 1\.0 GiB.*data\.streaming=true"):
        load_examples(jsonl(tmp_path / "d.jsonl", reviews(50)), tick=progress)


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.json", "d.txt"])
def test_a_row_that_is_too_long_is_named_at_once(tmp_path: Path, name: str) -> None:
    long = "word " * (tables.MAX_ROW_CHARS // 5 + 1)
    row = {"d.csv": f"text\n{long}\n", "d.txt": long}.get(name, json.dumps({"text": long}))
    (tmp_path / name).write_text(f"[{row}]" if name == "d.json" else row)
    with pytest.raises(DataError, match=r"(line|object) \d: .*characters.*: write it as several rows") as raised:
        load_examples(tmp_path / name)
    assert "quote" not in str(raised.value)


def test_a_stream_of_which_nothing_is_left(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "d.jsonl", reviews(4))
    settings = {"streaming": True, "validation": 2, "test": 2, "labels": ("good", "bad")}
    config = DataConfig(train=str(data), **settings)
    with pytest.raises(DataError, match="nothing is left to train on"):
        datasets.load_datasets(config, "classification", tokenizer(template=False), False, log=print)
