"""`kitout.align(...)`: what it takes, what it checks first, and a stage that is a run of `kitout train`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

import kitout
import tiny_models
from kitout.align.config.schema import AlignConfig
from kitout.errors import ConfigError
from kitout.train.config import yaml_file
from kitout.train.run import Result


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[AlignConfig]:
    """What would be run."""
    importlib.import_module("kitout.align.run")
    found: list[AlignConfig] = []

    def run(config: AlignConfig, *, dry_run: bool, log: Any) -> Result:
        found.append(config)
        return Result(config.output.folder)

    monkeypatch.setattr(sys.modules["kitout.align.run"], "run", run)
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "adapter.json").write_text("{}")
    (tmp_path / "d.jsonl").write_text("{}\n")
    return tmp_path


def test_forms_of_a_call(calls: list[AlignConfig], folder: Path) -> None:
    values = {"model": "base", "stages": [{"kind": "dpo", "data": "d.jsonl", "from": "old", "loss": {"beta": 0.2}}]}
    file = folder / "run.yaml"
    file.write_text(yaml_file.to_yaml(values))
    silent = {"log": lambda line: None}
    result = kitout.align(str(file), **silent)
    kitout.align(file, **silent)
    kitout.align(values, **silent)
    kitout.align(calls[0], **silent)
    kitout.align(stage="dpo", model="base", data="d.jsonl", from_="old", loss={"beta": 0.2}, **silent)
    kitout.align(stage="dpo", model="base", data="d.jsonl", loss={"beta": 0.2}, **{"from": "old"}, **silent)
    assert isinstance(result, Result)
    assert len(calls) == 6
    assert all(config == calls[0] for config in calls)
    kitout.align(file, output="elsewhere", **silent)
    assert calls[-1].output.folder == Path("elsewhere")


def test_remarks_are_printed_and_wrong_names_stop(calls: list[AlignConfig], folder: Path) -> None:
    lines: list[str] = []
    settings: dict[str, Any] = {"model": "base", "data": "d.jsonl", "log": lines.append}
    kitout.align(stage="grpo", reward="old", **settings)
    assert "note: loss.beta=0: the reference is off, no KL is computed" in lines
    with pytest.raises(ConfigError, match="there is no kind 'dop': did you mean 'dpo'"):
        kitout.align(stage="dop", **settings)
    with pytest.raises(ConfigError, match="from='nowhere': no adapter is there"):
        kitout.align(stage="dpo", from_="nowhere", **settings)
    assert len(calls) == 1


def test_what_a_finished_stage_was_made_of_may_be_gone(calls: list[AlignConfig], folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "results.json").write_text("{}")
    kitout.align(stage="dpo", model="gone/", data="gone.csv", output="out", log=lambda line: None)
    assert len(calls) == 1


def test_a_stage_of_answers_is_a_run(tmp_path: Path) -> None:
    data = tiny_models.jsonl(tmp_path / "d.jsonl", [{"prompt": f"n {i}", "completion": f"m {i}"} for i in range(40)])
    settings: dict[str, Any] = {
        "model": {"name": str(tiny_models.decoder(tmp_path / "base")), "dtype": "float32", "device": "cpu"},
        "data": str(data),
        "train": {"steps": 2, "batch_size": 4},
        "evaluate": {"generate_examples": 0, "show_examples": 0, "max_test_examples": 2, "max_new_tokens": 2},
        "output": tmp_path / "run",
    }
    lines: list[str] = []
    result = kitout.align(stage="sft", log=lines.append, **settings)
    assert (result.folder / "adapter" / "adapter.json").is_file()
    assert yaml_file.read_yaml(result.folder / "run.yaml")["kind"] == "sft"
    again = kitout.align(result.folder / "run.yaml", log=lines.append)
    assert again.folder == result.folder
    assert any("holds this run, finished" in line for line in lines)
    with pytest.raises(ConfigError, match="holds a run of other settings"):
        kitout.align(stage="sft", log=lines.append, **settings | {"train": {"steps": 3, "batch_size": 4}})
