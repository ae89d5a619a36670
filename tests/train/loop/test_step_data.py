"""Examples that are made while training: filled before their steps, kept by a checkpoint in the middle of a round."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kitout import LoRA
from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.errors import TrainingDiverged
from kitout.train.loop.jobs import Job
from train.fixtures import add, causal, job, kit_of, loop_of, texts, values

ROUND = 2  # steps that train on the same examples


class NewTexts:
    """Other texts in every round; a resumed run gets those of the round in progress from its checkpoint."""

    def __init__(self, examples: list[Any], without_targets: int = 0) -> None:
        self.examples, self.without_targets, self.made = examples, without_targets, 0

    def before_step(self, step: int) -> None:
        if step % ROUND == 0:
            self.made += 1
            self.examples[:] = texts(8, seed=100 + step)
            if step < self.without_targets:
                self.examples[:] = [
                    EncodedExample(one.input_ids, (IGNORE_INDEX,) * len(one.input_ids)) for one in self.examples
                ]

    def metrics(self) -> dict[str, float]:
        return {"made": float(self.made)}

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors = {}
        for i, one in enumerate(self.examples):
            tensors |= {f"{i}.ids": torch.tensor(one.input_ids), f"{i}.labels": torch.tensor(one.labels)}
        return {"made": self.made}, tensors

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.made = values["made"]
        self.examples[:] = [
            EncodedExample(tuple(tensors[f"{i}.ids"].tolist()), tuple(tensors[f"{i}.labels"].tolist()))
            for i in range(len(tensors) // 2)
        ]


def run(folder: Path, resume: str | None = None, without_targets: int = 0) -> tuple[Any, dict[str, Tensor], NewTexts]:
    kit = kit_of("llama")
    add(kit, "low", LoRA(rank=2))
    examples: list[Any] = texts(8)
    one: Job = job("low", causal(kit, ["low"], examples), examples, steps=6)
    data = NewTexts(examples, without_targets)
    loop = loop_of(kit, [one], folder, step_data=data, save_strategy="steps", save_steps=3, num_checkpoints=9)
    loop.train(resume)
    return loop, values(kit, "low"), data


def test_a_resume_in_the_middle_of_a_round_ends_in_the_same_bits(tmp_path: Path) -> None:
    loop, whole, data = run(tmp_path)
    assert data.made == 3
    assert [row["made"] for row in loop.state.log_history if "made" in row] == [1, 1, 2, 2, 3, 3]
    _, resumed, after = run(
        tmp_path / "other", resume=str(tmp_path / "checkpoint-3")
    )  # after the first step of round 2
    assert after.made == 3
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_first_rounds_that_teach_nothing_are_waited_for(tmp_path: Path) -> None:
    _, after, _ = run(tmp_path, without_targets=3)
    kit = kit_of("llama")
    add(kit, "low", LoRA(rank=2))
    assert any(not torch.equal(after[key], value) for key, value in values(kit, "low").items())


def test_jobs_that_train_on_made_examples_stop_together(tmp_path: Path) -> None:
    kit = kit_of("llama")
    add(kit, "low", LoRA(rank=2))
    add(kit, "value", LoRA(rank=2), seed=1)
    examples: list[Any] = texts(8)
    jobs = [job(name, causal(kit, [name], examples), examples, steps=6) for name in ("low", "value")]
    with torch.no_grad():
        next(kit["value"].parameters()).fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="'value', step 1: the grad norm is nan"):
        loop_of(kit, jobs, tmp_path, step_data=NewTexts(examples)).train()


def test_making_examples_counts_as_time_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = NewTexts.before_step

    def slowly(self: NewTexts, step: int) -> None:
        time.sleep(0.05)
        make(self, step)

    monkeypatch.setattr(NewTexts, "before_step", slowly)
    loop, _, _ = run(tmp_path)
    assert loop.step_runner.seconds >= 6 * 0.05
    assert loop.step_runner.job_seconds[0][0] >= 6 * 0.05
