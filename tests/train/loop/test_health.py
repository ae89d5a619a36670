"""Health checks: missing gradients, parameters that do not move, adapters without an effect, nan losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

import kitout
from kitout import IA3, BitFit, Kit, LoRA
from kitout.errors import ConfigError, TrainingDiverged, UnusedSite
from kitout.train.loop.jobs import Job
from kitout.train.loop.trainer import JobTrainer
from train.fixtures import add, causal, job, kit_of, loop_of, losses, texts, trained, values
from zoo import ZOO


def one_job(kit: Kit, **settings: Any) -> Job:
    items = texts(8)
    return job("low", causal(kit, ["low"], items), items, **{"steps": 4} | settings)


def test_a_trained_tensor_without_a_gradient_is_named(tmp_path: Path) -> None:
    kit = kit_of("llama")
    add(kit, "low", LoRA(rank=2))
    kit["low"].register_parameter("forgotten", nn.Parameter(torch.zeros(3)))
    with pytest.raises(UnusedSite, match=r"1 trained tensors have no gradient .*low: forgotten"):
        trained(kit, [one_job(kit)], tmp_path)


def test_gradients_that_are_all_zero_are_an_error(tmp_path: Path) -> None:
    kit = kit_of("llama")
    add(kit, "low", LoRA(rank=2, targets="attn.o"))
    with torch.no_grad():
        for value in kit["low"].parameters():
            value.zero_()  # A and B: neither reaches the other
    with pytest.raises(UnusedSite, match=r"low: all of them are zero"):
        trained(kit, [one_job(kit)], tmp_path)


def test_a_rate_at_which_nothing_moves_is_an_error(tmp_path: Path) -> None:
    kit = kit_of("llama")
    add(kit, "low", LoRA(rank=2))
    with pytest.raises(UnusedSite, match="'low' after 2 steps: none of its parameters has changed"):
        trained(kit, [one_job(kit, lr=1e-30, weight_decay=0.0)], tmp_path)


def test_a_rate_without_an_effect_is_an_error(tmp_path: Path) -> None:
    kit = kit_of("llama")
    kit.add("low", LoRA(rank=2), seed=0)  # B starts at zero: any step moves it, and no step shows
    with pytest.raises(UnusedSite, match="'low' after 4 steps: the model's output is the same without it"):
        trained(kit, [one_job(kit, lr=1e-20, weight_decay=0.0)], tmp_path)


def test_a_first_step_too_small_for_half_precision_is_waited_for(tmp_path: Path) -> None:
    kit = kitout.attach(ZOO["llama"].build().bfloat16()).eval()
    kit.add("low", BitFit(), seed=0)
    one = one_job(kit, steps=12, lr=3e-3, warmup_ratio=0.9, lr_schedule="constant")
    loop = loop_of(kit, [one], tmp_path)
    without_effect = []
    check = loop.health._without_visible_effect
    loop.health._without_visible_effect = lambda jobs: without_effect.append(check(jobs)) or without_effect[-1]  # type: ignore[method-assign]
    shrink_first_steps(loop, 1e-4)
    loop.train()
    assert without_effect[0], "after two small steps bfloat16 shows nothing"
    assert not without_effect[-1]


def shrink_first_steps(loop: JobTrainer, factor: float) -> None:
    """The first two steps hardly move."""
    create = loop.create_scheduler

    def create_smaller(num_training_steps: int, optimizer: Any = None) -> Any:
        scheduler = create(num_training_steps, optimizer)
        scheduler.lr_lambdas = [lambda step: factor if step < 2 else 1.0 for _ in scheduler.lr_lambdas]
        for group in loop.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        return scheduler

    loop.create_scheduler = create_smaller  # type: ignore[method-assign]


def test_nan_stops_a_run_and_names_its_examples(tmp_path: Path) -> None:
    kit = kit_of("llama")
    add(kit, "low", LoRA(rank=2))
    one = one_job(kit, lr=1e-3)
    with torch.no_grad():
        kit.base.get_submodule("model.layers.1.mlp.down_proj").weight[3, 5] = float("nan")
    start_values = values(kit, "low")
    with pytest.raises(
        TrainingDiverged, match=r"'low', step 1: the grad norm is nan; try a lower train.lr than 0.001"
    ) as caught:
        trained(kit, [one], tmp_path)
    (divergence,) = json.loads((tmp_path / "diverged.json").read_text())
    locations = [one.examples[i].location for i in one.batches[0]]
    assert divergence == {"job": "low", "step": 1, "norm": "nan", "lr": 0.001, "examples": locations}
    assert locations[0] in str(caught.value)
    assert all(torch.equal(value, start_values[name]) for name, value in values(kit, "low").items()), (
        "it was not stepped"
    )


def test_each_job_is_clipped_by_its_own_norm(tmp_path: Path) -> None:
    kit = kit_of("llama")
    add(kit, "low", LoRA(rank=2))
    add(kit, "scale", IA3())
    items = texts(8)
    jobs = [
        job(name, causal(kit, ["low", "scale"], items), items, max_grad_norm=clip, steps=1)
        for name, clip in (("low", 1e-3), ("scale", 1e6))
    ]
    loop = loop_of(kit, jobs, tmp_path)
    norms = {}

    def record_norms(*_: Any, **__: Any) -> None:
        for one in jobs:
            norms[one.name] = torch.nn.utils.get_total_norm(
                [value.grad for value in kit[one.name].parameters() if value.grad is not None]
            ).item()

    loop.create_optimizer().register_step_pre_hook(record_norms)
    loop.create_optimizer = lambda model=None: loop.optimizer  # type: ignore[method-assign]
    loop.train()
    assert norms["low"] == pytest.approx(1e-3, rel=1e-2)
    assert norms["scale"] > 1e-2
    assert loop.state.log_history[0]["grad_norm"] >= norms["scale"]


def test_master_weights_are_float32_over_a_half_base_and_keep_small_steps(tmp_path: Path) -> None:
    kit = kitout.attach(ZOO["llama"].build().bfloat16()).eval()
    kit.add("low", LoRA(rank=2), seed=0)
    one = one_job(kit, steps=8, lr=1e-5, lr_schedule="constant", weight_decay=0.0)
    before = values(kit, "low")
    loop = trained(kit, [one], tmp_path)
    after = values(kit, "low")
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert {value.dtype for state in loop.optimizer.state.values() for value in state.values()} == {torch.float32}
    a = next(name for name in after if name.endswith("q_proj.a"))
    moved = (after[a] - before[a]).abs()
    assert 0 < moved.max() < 1e-4
    assert (moved > 0).float().mean() > 0.9
    rounded = (before[a].bfloat16() + 1e-5).bfloat16() == before[a].bfloat16()
    assert rounded.float().mean() > 0.9, "in bfloat16 most of these steps would have been nothing"
    assert kit.dtype == torch.bfloat16


def test_training_lowers_the_loss_and_keeps_the_base(tmp_path: Path) -> None:
    kit = kit_of("llama")
    bits = {name: value.clone() for name, value in kit.base.state_dict().items()}
    kit.add("low", LoRA(rank=8, targets="all-linear"), seed=0)
    loop = trained(kit, [one_job(kit, steps=40, batch=8)], tmp_path)
    assert losses(loop)[-1] < losses(loop)[0] / 3
    assert all(torch.equal(value, bits[name]) for name, value in kit.base.state_dict().items())
    assert "use_cache" not in kit.config.__dict__ or kit.config.use_cache


def test_settings_that_trainer_must_leave_to_us_are_refused_together(tmp_path: Path) -> None:
    kit = kit_of("llama")
    add(kit, "low", LoRA(rank=2))
    args = TrainingArguments(
        output_dir=str(tmp_path), gradient_accumulation_steps=2, bf16=True, use_cpu=True, report_to="none"
    )
    with pytest.raises(ConfigError, match=r"(?s)gradient_accumulation_steps.*fp16, bf16"):
        JobTrainer(kit, [one_job(kit)], tmp_path, args)
