"""Adapters share a batch where a trial found that faster; either way they score the same, and a trial is made once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kitout
from kitout import IA3, Kit, LoRA
from kitout.evaluate.ask import joined_rows
from kitout.evaluate.ask.joined_rows import joins, try_both
from kitout.evaluate.ask.text_likelihood import text_likelihoods
from zoo import ZOO, tokenizer_of

ROUTES = (None, "a", "b")


@pytest.fixture(autouse=True)
def trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(joined_rows.VARIABLE)
    monkeypatch.setenv("KITOUT_CACHE", str(tmp_path))
    return tmp_path / joined_rows.FILE


def build() -> tuple[Kit, Any]:
    torch.manual_seed(0)
    kit = kitout.attach(ZOO["llama"].build().double()).eval()
    for name, method in (("a", LoRA(rank=2)), ("b", IA3())):
        for value in kit.add(name, method, dtype=torch.float64).parameters():
            with torch.no_grad():
                value.add_(0.3 * torch.randn_like(value))
    return kit, tokenizer_of(ZOO["llama"])


def sleep(seconds: float, calls: list[float]) -> Callable[[], None]:
    def call() -> None:
        calls.append(seconds)
        time.sleep(seconds)

    return call


@pytest.mark.parametrize(("joined", "apart", "rounds"), [(0.005, 0.1, 1), (0.1, 0.005, 1), (0.03, 0.033, 2)])
def test_the_faster_way_is_kept(joined: float, apart: float, rounds: int, trials: Path) -> None:
    kit, calls = build()[0], []
    assert joins(kit, ROUTES, 100) is None
    found = try_both(kit, ROUTES, 100, sleep(joined, calls), sleep(apart, calls))
    assert len(calls) <= 2 * rounds
    if rounds == 1:
        assert found == (joined < apart)
    assert joins(kit, ROUTES, 100) is joins(kit, ROUTES, 127) is found
    assert joins(kit, ROUTES, 128) is joins(kit, ROUTES[:2], 100) is None, "other classes"
    joined_rows._found.clear()  # another process
    assert joins(kit, ROUTES, 100) is found
    assert list(json.loads(trials.read_text()).values()) == [found]
    for broken in ("", "[]", '{"x": 1}'):
        trials.write_text(broken)
        joined_rows._found.clear()
        assert joins(kit, ROUTES, 100) is None


def test_what_needs_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    kit, _ = build()
    assert joins(kit, ROUTES, joined_rows.SURE_TOKENS) is True
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert joins(kit, ROUTES, 64) is True
    assert joins(kit, ROUTES, 65) is False, "a clock would let processes go different ways"
    monkeypatch.setenv(joined_rows.VARIABLE, "100")
    assert joins(kit, ROUTES, 100) is True
    assert joins(kit, ROUTES, 101) is False


def test_a_trial_changes_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    kit, tokenizer = build()
    texts = ["It rained. " * 3, "Hello, world", "x"]
    tried: list[int] = []

    def slow(kit: Kit, routes: Any, num_tokens: int, joined: Callable[[], object], apart: Callable[[], object]) -> bool:
        tried.append(num_tokens)
        apart()
        joined()
        return is_joined

    monkeypatch.setattr(joined_rows, "try_both", slow)
    for is_joined in (True, False):
        found = text_likelihoods(kit, tokenizer, texts, ROUTES, divergence=True)
        monkeypatch.setenv(joined_rows.VARIABLE, "1000000" if is_joined else "0")
        assert text_likelihoods(kit, tokenizer, texts, ROUTES, divergence=True) == found, "to the bit"
        assert all(one.divergence == 0 for one in found[0])
        monkeypatch.delenv(joined_rows.VARIABLE)
    assert min(tried) > joined_rows.SURE_TOKENS
