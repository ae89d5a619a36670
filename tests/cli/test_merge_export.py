"""`kitout merge` and `kitout export`: from a trained run to a folder; errors are one line and exit status 1."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kitout
from export.saved_adapters import saved
from kitout.cli import app
from kitout.methods import LoRA
from tiny_models import decoder, encoder, jsonl, reviews


def test_merge_and_export(tmp_path: Path) -> None:
    base = decoder(tmp_path / "base")
    adapter = str(saved(tmp_path / "adapter", base, "causal_lm", LoRA()))
    options = ["--model", str(base), "--task", "causal_lm"]
    merged = CliRunner().invoke(app, ["merge", adapter, "--out", str(tmp_path / "merged"), *options])
    assert merged.exit_code == 0, merged.output
    assert "largest difference" in merged.stdout
    assert "AutoModelForCausalLM" in merged.stdout or "pipeline('text-generation'" in merged.stdout
    assert "loading the base" in merged.stderr
    again = CliRunner().invoke(app, ["merge", adapter, "--out", str(tmp_path / "merged"), *options])
    assert again.exit_code == 1
    assert "is not empty" in again.stderr
    exported = CliRunner().invoke(app, ["export", adapter, "--out", str(tmp_path / "peft"), *options])
    assert exported.exit_code == 0, exported.output
    assert (tmp_path / "peft" / "adapter_config.json").is_file()


@pytest.mark.slow
def test_end_to_end(tmp_path: Path) -> None:
    """A run, the two commands, and the printed lines in a process that never imports kitout."""
    pytest.importorskip("accelerate")
    kitout.train(
        {
            "model": {"name": str(encoder(tmp_path / "base")), "dtype": "bfloat16"},
            "data": {"train": str(jsonl(tmp_path / "d.jsonl", reviews(60))), "validation": 0},
            "objective": "classification", "train": {"steps": 3, "batch_size": 8},
            "output": {"folder": str(tmp_path / "run")},
        },
        log=lambda _line: None,
    )  # fmt: skip

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    printed = run("-m", "kitout", "merge", "run/adapter", "--out", "merged")
    assert "float32" in printed, "as the base's own files"
    lines = [line.strip() for line in printed.partition("use it:\n")[2].splitlines()]
    answer = run("-c", "\n".join([*lines, "import sys", "assert 'kitout' not in sys.modules"]))
    assert "'label': 'good'" in answer or "'label': 'bad'" in answer
    assert "largest difference" in run("-m", "kitout", "export", "run/adapter", "--to", "peft", "--out", "peft")
