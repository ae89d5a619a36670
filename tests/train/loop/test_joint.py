"""Several jobs on one base: each comes out as if it had been alone, even if others diverge."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kitout import IA3, Houlsby, Kit, LoRA, PrefixTuning, PromptTuning
from kitout.data.encode.item import EncodedExample
from kitout.train.loop.jobs import Job, cut_between_jobs
from kitout.train.loop.step import StepRunner
from kitout.train.loop.trainer import JobTrainer
from kitout.train.objectives.sequence import SequenceClassification
from train.fixtures import add, causal, job, kit_of, texts, trained, values
from zoo import D

KitAndJobs = tuple[Kit, list[Job]]
NAMES = ["low", "scale", "front", "drop"]


def jobs_of(names: Sequence[str], species: str = "llama", dtype: torch.dtype = torch.float32) -> KitAndJobs:
    """Jobs that differ in everything: method, data, batch, rate, clipping, schedule, seed and number of steps."""
    kit = kit_of(species, dtype=dtype)
    methods = {
        "low": LoRA(rank=2, targets="all-linear"), "scale": IA3(), "front": PrefixTuning(length=3),
        "drop": LoRA(rank=2, dropout=0.3), "text": PromptTuning(length=2), "serial": Houlsby(width=4),
    }  # fmt: skip
    settings: dict[str, dict[str, Any]] = {
        "low": {
            "steps": 6,
            "batch": 4,
            "lr": 3e-3,
            "max_grad_norm": 0.1,
            "lr_schedule": "cosine",
            "seed": 3,
            "warmup_ratio": 0.3,
        },
        "scale": {"steps": 4, "batch": 2, "lr": 1e-2, "max_grad_norm": 10.0, "lr_schedule": "linear", "seed": 4},
        "front": {
            "steps": 8,
            "batch": 3,
            "lr": 2e-2,
            "max_grad_norm": 0.5,
            "lr_schedule": "constant",
            "seed": 5,
            "weight_decay": 0.0,
        },
        "drop": {"steps": 5, "batch": 3, "lr": 5e-3, "seed": 6},
        "text": {"steps": 5, "batch": 2, "lr": 5e-3, "seed": 7},
        "serial": {"steps": 3, "batch": 2, "lr": 5e-3, "seed": 8},
    }
    for name in names:
        add(kit, name, methods[name], seed=len(name))
    jobs = []
    for name in names:
        items = texts(11, seed=len(name) + ord(name[0]), high=6 + settings[name]["batch"])
        jobs.append(job(name, causal(kit, list(names), items), items, **settings[name]))
    return kit, jobs


def assert_joint_equals_alone(folder: Path, names: Sequence[str], tolerance: float, **how: Any) -> None:
    kit, jobs = jobs_of(names, **how)
    runner = trained(kit, jobs, folder, micro=5).step_runner
    assert runner.sums == [[0.0, 0.0] for _ in jobs]
    for name in names:
        alone, one = jobs_of([name], **how)
        trained(alone, one, folder / name, micro=5)
        for key, value in values(alone, name).items():
            error = (value - values(kit, name)[key]).abs().max().item()
            assert error <= tolerance, f"{name}: {key} is {error:.1e} off"


def test_every_job_comes_out_as_alone(tmp_path: Path) -> None:
    assert_joint_equals_alone(tmp_path, NAMES, 1e-6)


def test_in_double_precision_to_the_last_digits(tmp_path: Path) -> None:
    assert_joint_equals_alone(tmp_path, [*NAMES, "text"], 1e-8, dtype=torch.float64)


@pytest.mark.slow
def test_with_learned_position_embeddings(tmp_path: Path) -> None:
    assert_joint_equals_alone(tmp_path, NAMES, 1e-9, species="gpt2", dtype=torch.float64)


def test_jobs_without_dropout_share_their_forwards() -> None:
    kit, jobs = jobs_of(NAMES)
    rows = [(j, i) for j, one in enumerate(jobs) for i in one.batches[0]]
    micro_batches = StepRunner(kit, jobs, 100).micro_batches(rows)
    assert [sorted({NAMES[j] for j, _ in micro_batch.rows}) for micro_batch in micro_batches] == [
        ["front", "low", "scale"],
        ["drop"],
    ]
    micro_batches = StepRunner(kit, jobs, 2).micro_batches(rows)
    assert sorted(row for micro_batch in micro_batches for row in micro_batch.rows) == sorted(rows)
    assert [micro_batch.number for micro_batch in micro_batches] == [0, 1, 2, 3, 4, 0, 1]


def test_jobs_of_like_lengths_share_their_forwards() -> None:
    kit, names = kit_of("llama"), list("abcd")
    for name in names:
        add(kit, name, LoRA(rank=2))
    items = {n: [EncodedExample((1,) * n, (1,) * n)] * 2 for n in (5, 9, 6, 8)}
    jobs = [job(name, causal(kit, names, of), of, batch=2) for name, of in zip(names, items.values(), strict=True)]
    rows = [(j, i) for j in range(4) for i in range(2)]
    cut = StepRunner(kit, jobs, 4).micro_batches(rows)
    assert [one.rows for one in cut] == [[(1, 0), (1, 1), (3, 0), (3, 1)], [(2, 0), (2, 1), (0, 0), (0, 1)]]
    assert StepRunner(kit, jobs, 8).micro_batches(rows)[0].rows == rows


@pytest.mark.parametrize(
    ("sizes", "most", "parts"),
    [
        ((4, 4, 4), 11, [4 + 4, 4]), ((4, 4, 4), 4, [4, 4, 4]), ((3, 3), 2, [2, 2, 2]), ((1, 5, 1), 4, [4, 2 + 1]),
        ((2, 1, 4), 4, [2 + 1, 4]),
    ],
)  # fmt: skip
def test_a_job_that_fits_is_not_cut(sizes: tuple[int, ...], most: int, parts: list[int]) -> None:
    rows = [(j, i) for j, size in enumerate(sizes) for i in range(size)]
    cut = list(cut_between_jobs(rows, most))
    assert [len(part) for part in cut] == parts
    assert [row for part in cut for row in part] == rows


def test_packed_jobs_and_heads_of_other_widths_do_not_share() -> None:
    kit = kit_of("bert")
    classes = {"two": 2, "three": 3, "also-three": 3}
    for name, width in classes.items():
        add(kit, name, LoRA(rank=2), heads={"classifier": nn.Linear(D, width)})
    items = [EncodedExample(item.input_ids, label=0) for item in texts(4)]
    jobs = [job(name, SequenceClassification(kit, "classification", 0), items) for name in classes]
    micro_batches = StepRunner(kit, jobs, 100).micro_batches([(j, 0) for j in range(3)])
    assert [[j for j, _ in micro_batch.rows] for micro_batch in micro_batches] == [[0], [1, 2]]
    llama = kit_of("llama")
    add(llama, "a", LoRA(rank=2))
    add(llama, "b", LoRA(rank=2))
    packed = [job(name, causal(llama, ["a", "b"], texts(4), pack=30), texts(4)) for name in ("a", "b")]
    assert len(StepRunner(llama, packed, 100).micro_batches([(0, 0), (1, 0)])) == 2


def test_one_that_diverges_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    kit, jobs = jobs_of(["low", "scale", "front"])
    with pytest.warns(RuntimeWarning, match="'scale', step 3: the grad norm is nan.*the other jobs continue"):
        loop = trained(kit, [jobs[0], poisoned_at(jobs[1], 2), jobs[2]], tmp_path / "joint")
    assert list(loop.health.diverged) == ["scale"]
    (divergence,) = json.loads((tmp_path / "joint" / "diverged.json").read_text())
    assert (divergence["job"], divergence["step"]) == ("scale", 3)
    assert set(divergence["examples"]) == {f"line {i + 1}" for i in jobs[1].batches[2]}
    last = [row for row in loop.state.log_history if "low/loss" in row][-1]
    assert "scale/loss" not in last
    for name in ("low", "front"):
        alone, one = jobs_of([name])
        trained(alone, one, tmp_path / name)
        for key, value in values(alone, name).items():
            assert (value - values(kit, name)[key]).abs().max() <= 1e-6
    assert all(value.isfinite().all() for value in values(kit, "scale").values())


def poisoned_at(one: Job, step: int) -> Job:
    """From this step on its loss is nan."""
    objective: Any = one.objective

    class Poisoned:
        batch_key = None
        rows = objective.rows
        task = objective.task
        num_tokens, num_targets, collate = objective.num_tokens, objective.num_targets, objective.collate
        num_steps = 0

        def losses(self, model: Any, batch: Any, weights: Tensor) -> Any:
            self.num_steps += torch.is_grad_enabled()
            return objective.losses(model, batch, weights * float("nan") if self.num_steps > step else weights)

    poisoned: Any = Poisoned()
    return Job(one.name, poisoned, one.examples, one.batches, one.settings)


def test_the_run_ends_when_the_last_running_job_diverges(tmp_path: Path) -> None:
    kit, jobs = jobs_of(["low", "front"])  # 6 and 8 steps
    with pytest.warns(RuntimeWarning, match="the other jobs continue"):
        loop = trained(kit, [jobs[0], poisoned_at(jobs[1], 6)], tmp_path)
    assert loop.state.global_step == 8
    assert num_logs(loop, "front/loss") == 7


def num_logs(loop: JobTrainer, name: str) -> int:
    return sum(name in row for row in loop.state.log_history)
