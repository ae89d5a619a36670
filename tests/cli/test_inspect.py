"""`kitout inspect MODEL --check` runs kitout.check on a folder's own weights and ends with its verdict."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kitout import LoRA
from kitout.cli import app, inspect
from kitout.install_hint import suggest_install
from kitout.methods.deltas.low_rank import LowRankDelta
from kitout.model_check import check as model_check
from laws.activate import fresh_model
from zoo import ZOO


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder; one method is tried on it, which is enough here."""
    monkeypatch.setattr(model_check, "default_methods", lambda model: [LoRA(rank=2)])
    fresh_model(ZOO["bert"]).save_pretrained(tmp_path)
    return tmp_path


def test_check_shows_cells_as_they_are_known_then_the_table(folder: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(folder), "--check"])
    assert result.exit_code == 0, result.output
    assert "tower bert.encoder.layer: 3 blocks" in result.stdout
    assert "LoRA, effect: ok" in result.stderr
    assert "BertForSequenceClassification\n  method " in result.stdout


def test_check_ends_with_1_if_a_cell_is_wrong(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LowRankDelta, "fold", lambda self, w, b: (w, b))
    result = CliRunner().invoke(app, ["inspect", str(folder), "--check"])
    assert result.exit_code == 1
    assert "LoRA, merge: wrong: the merged model differs by" in result.stdout


def test_a_model_that_does_not_fit_into_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect.memory, "available", lambda device: 1000)
    result = CliRunner().invoke(app, ["inspect", "bert", "--check"])
    assert result.exit_code == 1
    assert "check a smaller config of the same type" in result.stderr


def test_without_timm_an_unknown_name_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    result = CliRunner().invoke(app, ["inspect", "no_such_model"])
    assert result.exit_code == 1
    assert suggest_install("timm") in result.stderr
