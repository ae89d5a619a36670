"""A run whose template prints the date keeps its first day, so that it resumes on another one."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import kitout
from kitout.errors import ConfigError
from kitout.train import run_folder
from kitout.train.config import yaml_file
from tiny_models import CHATML, decoder, jsonl, reviews

pytest.importorskip("accelerate")


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    model = decoder(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') + '\n' }}" + CHATML
    tokenizer.save_pretrained(model)
    rows = [{"instruction": "good or bad?", "input": r["text"], "output": r["label"]} for r in reviews(40)]
    return {
        "model": {"name": str(model), "dtype": "float32", "device": "cpu"},
        "data": {"train": str(jsonl(tmp_path / "x.jsonl", rows)), "test": 0, "validation": 0},
        "train": {"steps": 4, "save_steps": 2, "batch_size": 2},
        "output": {"folder": str(tmp_path / "out")},
    }


def on(day: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Day(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:  # type: ignore[override]
            return datetime.date.fromisoformat(day)

    monkeypatch.setattr(run_folder, "date", Day)


def test_a_run_keeps_its_first_day(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(settings["output"]["folder"])
    on("2024-03-05", monkeypatch)
    kitout.train(settings, dry_run=True, log=lambda _line: None)
    assert "2024-03-05" in (folder / "preflight.txt").read_text()
    assert yaml_file.read_yaml(folder / "run.yaml")["data"]["template_date"] == "2024-03-05"
    on("2024-03-06", monkeypatch)
    kitout.train(settings, dry_run=True, log=lambda _line: None)  # the same run, one day later
    assert "2024-03-05" in (folder / "preflight.txt").read_text()


def test_another_day_is_another_run(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    on("2024-03-05", monkeypatch)
    kitout.train(settings, log=lambda _line: None)
    on("2024-03-06", monkeypatch)
    lines: list[str] = []
    kitout.train(settings, log=lines.append)
    assert any("finished" in line for line in lines)
    other = settings | {"data": settings["data"] | {"template_date": "2024-03-07"}}
    with pytest.raises(ConfigError, match=r"data\.template_date: 2024-03-05 there, 2024-03-07 requested"):
        kitout.train(other, log=lambda _line: None)
    with pytest.raises(ConfigError, match="expected a day as YYYY-MM-DD, found 'yesterday'"):
        kitout.train(settings | {"data": settings["data"] | {"template_date": "yesterday"}})
