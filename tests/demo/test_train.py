"""Training teaches, a kill costs nothing, and the loss is the model's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kitout
from kitout import Kit, LoRA
from kitout.demo.task import Task
from kitout.demo.train import Diverged, Pair, Progress, Settings, answer_loss, train
from kitout.train.schedule import rise_and_fall

from .tiny import model, tokenizer

SETTINGS = Settings(rank=4, lr=1e-2, batch=4, save_every=3)


@pytest.fixture
def kit() -> Kit:
    return fresh()


def fresh() -> Kit:
    kit = kitout.attach(model())
    kit.add("a", LoRA(rank=4, targets="all-linear"), seed=0)
    kit.use("a")
    return kit


@pytest.fixture
def pairs() -> list[Pair]:
    task = Task(tokenizer(), ["good", "bad"], "?")
    texts = [f"{'plus' if i % 2 else 'minus'} {i * i}" for i in range(40)]
    return [(task.encode(t), [*task.answers[i % 2], task.end]) for i, t in enumerate(texts)]


class Killed(Exception):
    pass


def go(kit: Kit, pairs: list[Pair], file: Path, run: str = "r", kill_at: int = -1, **changes: object) -> Progress:
    def tell(done: Progress) -> None:
        if done.step == kill_at:
            raise Killed

    return train(kit, "a", pairs, 0, Settings(**(vars(SETTINGS) | changes)), file, run, tell)  # type: ignore[arg-type]


def test_the_loss_is_the_models_own_over_the_answers(kit: Kit, pairs: list[Pair]) -> None:
    some = pairs[:3]
    losses = []
    for prompt, answer in some:
        ids = torch.tensor([prompt + answer])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        losses += [kit(input_ids=ids, labels=labels).loss * len(answer)]
    expected = sum(losses) / sum(len(a) for _, a in some)
    torch.testing.assert_close(answer_loss(kit, some, 0), expected, atol=1e-5, rtol=1e-5)


def test_training_lowers_the_loss_and_leaves_the_base_alone(kit: Kit, pairs: list[Pair], tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in kit.base.state_dict().items()}
    done = go(kit, pairs, tmp_path / "c.safetensors", epochs=4)
    assert sum(done.losses[-5:]) < 0.5 * sum(done.losses[:5])
    assert all(torch.equal(value, before[name]) for name, value in kit.base.state_dict().items())
    assert done.tokens == 4 * sum(len(p) + len(a) for p, a in pairs)
    assert not kit.training


@pytest.mark.parametrize("kill_at", [1, 3, 8])
def test_a_killed_run_ends_exactly_as_one_that_was_not(pairs: list[Pair], tmp_path: Path, kill_at: int) -> None:
    whole, cut = fresh(), fresh()
    expected = go(whole, pairs, tmp_path / "whole.safetensors")
    with pytest.raises(Killed):
        go(cut, pairs, tmp_path / "cut.safetensors", kill_at=kill_at)
    again = fresh()
    done = go(again, pairs, tmp_path / "cut.safetensors")
    assert done.losses == expected.losses
    assert done.resumed_at == ([kill_at // 3 * 3] if kill_at >= 3 else [])
    for name, value in again["a"].named_parameters():
        assert torch.equal(value, dict(whole["a"].named_parameters())[name])


def test_another_run_or_a_damaged_file_is_not_continued(pairs: list[Pair], tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    with pytest.raises(Killed):
        go(fresh(), pairs, file, kill_at=6)
    assert go(fresh(), pairs, file, run="other data").resumed_at == []
    file.write_bytes(b"cut short")
    assert go(fresh(), pairs, file).resumed_at == []
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]  # no half file beside it


def test_a_loss_that_is_no_number_stops_with_advice(kit: Kit, pairs: list[Pair], tmp_path: Path) -> None:
    with torch.no_grad():
        next(iter(kit["a"].parameters())).fill_(float("nan"))
    with pytest.raises(Diverged, match="lower --lr"):
        go(kit, pairs, tmp_path / "c.safetensors")


def test_the_rate_rises_then_falls_to_nothing() -> None:
    rates = [rise_and_fall(step, 100, 0.1) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.0)
