"""Examples of two rows: a step cut in any way is the same, jobs with pairs beside others, and what they measure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kitout import IA3, Kit, LoRA
from kitout.train.loop import distributed
from kitout.train.loop.jobs import Job
from kitout.train.loop.step import StepRunner
from kitout.train.objectives.objective import Batch, Losses
from train.fixtures import add, causal, far, grads_of, job, kit_of, loop_of, no_sync, texts, trained, values
from train.pairs import Pairs, PairsWithBaseline, pair_job


def step_of(kit: Kit, jobs: Sequence[Job], micro: int) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    """The loss of the first step, its gradients, and the means of the metrics."""
    for one in jobs:
        kit[one.name].zero_grad()
    runner = StepRunner(kit, jobs, micro)
    rows = [(j, i) for j, one in enumerate(jobs) for i in one.batches[0]]
    loss = runner.step(kit, rows, 0, Tensor.backward, no_sync)
    return loss.item(), grads_of(kit, jobs), runner.pop_metrics()


def by_hand(kit: Kit, one: Job, scale: float = 1.0) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    """The same, pair by pair over all logits."""
    kit[one.name].zero_grad()
    losses, margins, entropies = [], [], []
    for i in one.batches[0]:
        sums = []
        for row in one.examples[i]:
            ids = torch.tensor([row.input_ids])
            with kit.use(one.name):
                log_p = kit(input_ids=ids).logits[0, :-1].log_softmax(1)
            is_target = torch.tensor(row.labels[1:]) >= 0
            sums.append(log_p.gather(1, ids[0, 1:, None]).squeeze(1)[is_target].sum())
            entropies.append(-(log_p.exp() * log_p).sum(1)[is_target].sum().item())
        margins.append(sums[0] - sums[1])
        losses.append(F.softplus(-scale * margins[-1]))
    loss = torch.stack(losses).mean()
    loss.backward()
    wins = [margin.item() for margin in margins if margin > 0]
    means = {
        "margin": sum(margin.item() for margin in margins) / len(margins),
        "chosen_entropy": sum(entropies[::2]) / len(margins),
        "wins": sum(wins) / len(wins),
    }
    return loss.item(), grads_of(kit, [one]), means


def kit_with(*names: str) -> Kit:
    kit = kit_of("llama", dtype=torch.float64)
    for number, name in enumerate(names):
        add(kit, name, IA3() if name == "scale" else LoRA(rank=2), seed=number)
    return kit


def test_a_step_of_pairs_cut_in_any_way_is_the_one_by_hand() -> None:
    kit = kit_with("low")
    one = pair_job(kit, "low")
    loss, grads, metrics = by_hand(kit, one)
    for micro in (1, 2, 7):
        found = step_of(kit, [one], micro)
        assert abs(found[0] - loss) <= 1e-6
        assert far(found[1], grads) <= 1e-6
        assert found[2] == pytest.approx(metrics, abs=1e-6)
    assert one.objective.num_rows == [2] * 7 + [4, 4, 4, 2] + [14]  # type: ignore[attr-defined]


def test_two_jobs_of_pairs_share_forwards_and_come_out_as_alone() -> None:
    kit = kit_with("low", "scale")
    jobs = [pair_job(kit, "low"), pair_job(kit, "scale", seed=5)]
    alone = [by_hand(kit, one) for one in jobs]
    for micro in (1, 3, 14):
        loss, grads, metrics = step_of(kit, jobs, micro)
        assert abs(loss - sum(one[0] for one in alone) / 2) <= 1e-6
        assert far(grads, alone[0][1] | alone[1][1]) <= 1e-6
        expected = {
            f"{one.name}/{key}": v for one, (*_, means) in zip(jobs, alone, strict=True) for key, v in means.items()
        }
        assert metrics == pytest.approx(expected, abs=1e-6)
    assert jobs[0].objective.num_rows[-1] == 28, "one forward of both"  # type: ignore[attr-defined]


def test_jobs_of_pairs_and_of_single_rows_have_forwards_of_their_own() -> None:
    kit = kit_with("low", "scale", "other")

    items = texts(7)
    single = job("scale", causal(kit, ["low", "scale"], items), items, steps=1, batch=7)

    class SameKey(Pairs):
        batch_key = single.objective.batch_key

    jobs = [pair_job(kit, "low", SameKey(kit)), single, pair_job(kit, "other", Pairs(kit, 0.1))]
    assert jobs[0].objective.batch_key == single.objective.batch_key
    runner = StepRunner(kit, jobs, 100)
    rows = [(j, i) for j, one in enumerate(jobs) for i in one.batches[0]]
    assert [{j for j, _ in micro_batch.rows} for micro_batch in runner.micro_batches(rows)] == [{0}, {1}, {2}]
    _, grads, metrics = step_of(kit, jobs, 3)
    assert far(grads, by_hand(kit, jobs[0])[1] | step_of(kit, [single], 7)[1] | by_hand(kit, jobs[2], 0.1)[1]) <= 1e-6
    assert {name.partition("/")[0] for name in metrics} == {"low", "other"}


def test_a_pair_is_never_cut_when_memory_runs_out() -> None:
    kit = kit_with("low")
    one = pair_job(kit, "low")
    expected = step_of(kit, [one], 3)

    def fail_above_two_pairs(_module: nn.Module, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[0] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = kit.base.register_forward_pre_hook(fail_above_two_pairs, with_kwargs=True)
    with pytest.warns(RuntimeWarning, match="micro_batch_size=2"):
        found = step_of(kit, [one], 4)
    handle.remove()
    assert far(found[1], expected[1]) <= 1e-6
    assert found[2] == pytest.approx(expected[2], abs=1e-6), "the step that was retried counts once"
    assert all(rows % 2 == 0 for rows in one.objective.num_rows)  # type: ignore[attr-defined]


# ---- what they measure ----------------------------------------------------------------------------------------------


def test_the_log_has_the_means_since_the_last_one_and_a_resumed_run_the_same_bits(tmp_path: Path) -> None:
    def run(folder: Path, resume: str | None = None) -> Any:
        kit = kit_with("low", "scale")
        jobs = [pair_job(kit, "low", steps=5, batch=3), pair_job(kit, "scale", seed=5, steps=5, batch=2)]
        loop = loop_of(
            kit, jobs, folder, micro=2, logging_steps=2, save_strategy="steps", save_steps=1, num_checkpoints=9
        )
        seen: list[dict[str, float]] = []
        count = loop.step_runner._count
        loop.step_runner._count = lambda result: (seen.append(result.metrics), count(result))  # type: ignore[assignment, func-returns-value]
        loop.train(resume)
        return [row for row in loop.state.log_history if "loss" in row], seen

    logged, seen = run(tmp_path)
    names = ("margin", "chosen_entropy")
    for row, steps in zip(logged, (seen[0:2], seen[2:4]), strict=False):
        for j, (job_name, batch) in enumerate((("low", 3), ("scale", 2))):
            for name in names:
                assert row[f"{job_name}/{name}"] == sum(step[j][name][0] for step in steps) / (2 * batch)
    again, _ = run(tmp_path, str(tmp_path / "checkpoint-3"))  # between two logs
    keys = {key for row in logged for key in row if key.endswith(names)}
    assert len(keys) == 4
    assert [{key: row[key] for key in keys} for row in again] == [{key: row[key] for key in keys} for row in logged]


def test_metrics_of_a_single_job_have_their_own_names_and_a_taken_name_is_refused(tmp_path: Path) -> None:
    kit = kit_with("low")
    loop = trained(kit, [pair_job(kit, "low", steps=2, batch=3)], tmp_path)
    assert {"margin", "chosen_entropy"} <= loop.state.log_history[0].keys()

    class Named(Pairs):
        name = "loss"

        def losses(self, model: Any, batch: Batch, weights: Tensor) -> Losses:
            losses = super().losses(model, batch, weights)
            metrics = {self.name: losses.per_example}
            return Losses(losses.total, losses.per_example, losses.num_correct, losses.num_targets, metrics=metrics)

    with pytest.raises(ValueError, match="loss: a log has its own"):
        trained(kit, [pair_job(kit, "low", Named(kit))], tmp_path)
    Named.name = "rewards/chosen"
    with pytest.raises(ValueError, match="rewards/chosen"):
        trained(kit, [pair_job(kit, "low", Named(kit))], tmp_path)


def test_processes_measure_their_own_examples_and_padding_counts_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    kit = kit_with("low")
    one = pair_job(kit, "low")
    expected = by_hand(kit, one)[2]
    monkeypatch.setattr(distributed, "all_gather", lambda items: items)
    runners = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    rows = [(0, i) for i in one.batches[0]]  # 4 micro-batches and 3, so one is padding
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        runners.append(StepRunner(kit, [one], 1))
        runners[-1].step(kit, rows, 0, Tensor.backward, no_sync)
    assert [runner.metrics[0]["margin"][1] for runner in runners] == [4, 3]
    monkeypatch.setattr(distributed, "all_gather", lambda _: [runner.metrics for runner in runners])
    assert runners[0].pop_metrics() == pytest.approx(expected, abs=1e-6)
    assert runners[0].metrics == [{}]


# ---- a look at the whole step ---------------------------------------------------------------------------------------


def test_before_step_sees_the_whole_step_once_in_its_jobs_route(monkeypatch: pytest.MonkeyPatch) -> None:
    kit = kit_with("low", "scale")
    jobs = [pair_job(kit, "low", PairsWithBaseline(kit)), pair_job(kit, "scale", PairsWithBaseline(kit), seed=5)]
    state = torch.get_rng_state()
    found = [step_of(kit, jobs, micro) for micro in (1, 3, 14)]
    assert torch.equal(torch.get_rng_state(), state)
    calls = [one.objective.calls for one in jobs]  # type: ignore[attr-defined]
    assert all(of_job == [(0, 7, of_job[0][2])] * 3 for of_job in calls), "the same value however the step is cut"
    assert all(far(grads, found[0][1]) <= 1e-6 for _, grads, _ in found)
    for one, of_job in zip(jobs, calls, strict=True):  # its own adapter was active, and its own number is used
        loss, grads, _ = by_hand(kit, one)
        assert 0 <= of_job[0][2] - loss < 1
        scaled = {key: of_job[0][2] * value for key, value in grads.items()}
        assert far({key: found[0][1][key] for key in grads}, scaled) <= 1e-6
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather", lambda items: items)
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        step_of(kit, jobs, 2)
        assert [of_job[-1] for of_job in calls] == [of_job[0] for of_job in calls], "every process has all of it"


def test_a_run_with_a_look_at_each_step_leaves_finite_values(tmp_path: Path) -> None:
    kit = kit_with("low")
    one = pair_job(kit, "low", PairsWithBaseline(kit), steps=3, batch=3)
    trained(kit, [one], tmp_path, micro=1)
    assert [step for step, *_ in one.objective.calls] == [0, 1, 2]  # type: ignore[attr-defined]
    assert all(value.isfinite().all() for value in values(kit, "low").values())
