"""`kitout compare RUN RUN...`: the table, JSON and CSV; an error is one line and exit status 1."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kitout
from compare.run_folders import finished
from kitout.cli import app
from tiny_models import encoder, jsonl, reviews


def test_it_prints_the_table_as_text_or_json(tmp_path: Path) -> None:
    runs = [str(finished(tmp_path / name, {"accuracy": 0.8}, method=name)) for name in ("LoRA", "IA3")]
    text = CliRunner().invoke(app, ["compare", *runs, "--out", str(tmp_path / "t.csv")], env={"COLUMNS": "80"})
    assert text.exit_code == 0, text.output
    assert "80.0 (75.0 to 85.0)" in text.stdout
    assert (tmp_path / "t.csv").is_file()
    as_json = CliRunner().invoke(app, ["compare", *runs, "--json"])
    assert [row["label"] for row in json.loads(as_json.stdout)["rows"]] == ["LoRA", "IA3"]


def test_an_error_ends_with_1(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["compare", str(tmp_path / "no"), str(tmp_path / "nor")])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: cannot compare: 2 errors")


@pytest.mark.slow
def test_real_runs_end_to_end(tmp_path: Path) -> None:
    """Two seeds, and another method with another tokenizer's base: all on one test split."""
    pytest.importorskip("accelerate")
    data = jsonl(tmp_path / "train.jsonl", reviews(80))
    for name, method, seed in (("lora-0", "LoRA", 0), ("lora-1", "LoRA", 1), ("bitfit", "BitFit", 0)):
        kitout.train(
            {
                "model": {"name": str(encoder(tmp_path / f"model-{method}")), "dtype": "float32"}, "method": method,
                "data": {"train": str(data), "validation": 0, "test": 20}, "objective": "classification",
                "train": {"steps": 2, "batch_size": 8, "seed": seed}, "output": {"folder": str(tmp_path / name)},
            },
            log=lambda _line: None,
        )  # fmt: skip
    command = [sys.executable, "-m", "kitout", "compare", "lora-0", "lora-1", "bitfit", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    table = json.loads(done.stdout)
    assert table["same_test"] is True
    assert [row["num_seeds"] for row in table["rows"]] == [2, 1]
    assert table["rows"][0]["metrics"]["accuracy"]["num_test"] == 20
