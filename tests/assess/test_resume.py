"""`kitout eval --out`: after a kill -9 the same command goes on, and ends with the same bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import kitout
from kitout import IA3, LoRA
from kitout.assess.example_set import ExampleSet
from kitout.cli import app
from kitout.evaluate.sets.text_set import TextSet
from tiny_models import decoder, jsonl, reviews

KILLED = """
import os, signal, sys
from kitout.evaluate.sets import kept_answers
from kitout.cli import app
write, left = kept_answers.write_text, [int(sys.argv[1])]
def write_some(*args):
    write(*args)
    left[0] -= "answers" in args[0].parts
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
kept_answers.write_text = write_some
app(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kills by a signal")
def test_a_killed_evaluation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KITOUT_CACHE", str(tmp_path / "cache"))
    model = decoder(tmp_path / "m")
    kit = kitout.load(base=str(model)).kit
    for number, (name, method) in enumerate({"a": LoRA(), "b": IA3()}.items()):
        kit.add(name, method, seed=number)
        with torch.no_grad():
            for value in kit[name].parameters():
                value.add_(torch.randn_like(value), alpha=0.3)
        kit.save(name, tmp_path / name)
    labels = [{"instruction": "good?", "input": r["text"], "output": r["label"]} for r in reviews(12)]
    sources = [
        str(jsonl(tmp_path / "t.jsonl", [{"text": r["text"]} for r in reviews(8)])),
        str(jsonl(tmp_path / "l.jsonl", labels)),
    ]
    command = ["eval", str(tmp_path / "a"), str(tmp_path / "b"), "--model", str(model), "--task", "causal_lm"]
    command += [argument for source in sources for argument in ("--data", source)]
    out = [*command, "--out", str(tmp_path / "out")]
    killed = subprocess.run([sys.executable, "-c", KILLED, "3", *out], capture_output=True, text=True, timeout=120)
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "out" / "results.json").exists()
    assert len(list((tmp_path / "out" / "answers").iterdir())) == 3, "both on the texts, one on the labels"
    asked: list[Any] = []
    for kind in (TextSet, ExampleSet):
        ask = kind.ask
        monkeypatch.setattr(kind, "ask", lambda self, a, r, p, ask=ask: (asked.extend(r), ask(self, a, r, p))[1])
    result = CliRunner().invoke(app, out)
    assert result.exit_code == 0, result.output
    assert "answers of a, b are taken from" in result.output
    assert "answers of a are taken from" in result.output
    assert asked == ["b"], "only what was not finished: the base's answers are in the cache"
    asked.clear()
    whole = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "whole"), "--fresh"])
    assert whole.exit_code == 0, whole.output
    assert asked == [None, "a", "b", None, "a", "b"]
    assert not (tmp_path / "whole" / "answers").exists()
    for name in ("results.json", "results.txt", "report.html"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
