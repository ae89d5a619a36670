"""Small things to train on: kits of the zoo, examples, objectives, jobs and a loop around them.

What several tests of the training loop need. It knows the zoo and the loop's public names.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

import kitout
from kitout import Kit, Method
from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.train.config.schema import TrainConfig
from kitout.train.loop.batch_plan import plan_batches
from kitout.train.loop.jobs import Job
from kitout.train.loop.step import StepRunner
from kitout.train.loop.trainer import JobTrainer
from kitout.train.objectives.causal_lm import CausalLM
from kitout.train.objectives.objective import Objective
from zoo import EXTRA, FIRST_TOKEN, VOCAB, ZOO

ALL = {**ZOO, **EXTRA}


def kit_of(species: str, attention: str = "", dtype: torch.dtype = torch.float32) -> Kit:
    model: Any = ALL[species].build().to(dtype)
    if attention:
        model.set_attn_implementation(attention)
    return kitout.attach(model).eval()


def texts(number: int, seed: int = 0, low: int = 4, high: int = 12) -> list[EncodedExample]:
    """Texts of different lengths, of which different numbers of tokens at the end are learnt."""
    dice = random.Random(seed)
    made = []
    for place in range(number):
        ids = [dice.randrange(FIRST_TOKEN, VOCAB) for _ in range(dice.randint(low, high))]
        learnt = dice.randint(1, len(ids) - 1)
        labels = [IGNORE_INDEX] * (len(ids) - learnt) + ids[-learnt:]
        made.append(
            EncodedExample(tuple(ids), tuple(labels), prompt_length=len(ids) - learnt, location=f"line {place + 1}")
        )
    return made


def add(kit: Kit, name: str, method: Method, heads: Mapping[str, nn.Module] | None = None, seed: int = 0) -> None:
    """An adapter off its start, so that no gradient is zero."""
    dtype = torch.promote_types(kit.dtype, torch.float32)
    adapter = kit.add(name, method, seed=seed, heads=heads, dtype=dtype)
    draw = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for value in adapter.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=draw).to(value.dtype))


def job(name: str, objective: Objective, items: Sequence[Any], steps: int = 4, batch: int = 4, **settings: Any) -> Job:
    settings = {"lr": 1e-2, "lr_schedule": "linear", "warmup_ratio": 0.0, "weight_decay": 0.01, "seed": 0} | settings
    chosen = TrainConfig(batch_size=batch, **settings)
    order = plan_batches([objective.num_tokens(item) for item in items], batch, steps, chosen.seed)
    return Job(name, objective, items, order, chosen)


def causal(kit: Kit, names: Sequence[str], items: Sequence[EncodedExample], pack: int = 0) -> CausalLM:
    objective = CausalLM(kit, pack)
    with kit.use(names[0]):
        objective.choose_head_loss(list(names), items)
    return objective


def loop_of(kit: Kit, jobs: Sequence[Job], folder: Path, *, micro: int | None = None, **settings: Any) -> JobTrainer:
    ours = ("watch", "callbacks", "run", "kept")
    own = {key: settings.pop(key) for key in ours if key in settings}
    settings = {"save_strategy": "no", "logging_steps": 1} | settings
    args = TrainingArguments(
        output_dir=str(folder), report_to="none", disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
        logging_nan_inf_filter=False, **settings,
    )  # fmt: skip
    return JobTrainer(kit, jobs, folder, args, micro_batch_size=micro, **own)


def trained(kit: Kit, jobs: Sequence[Job], folder: Path, **settings: Any) -> JobTrainer:
    loop = loop_of(kit, jobs, folder, **settings)
    loop.train()
    return loop


def values(kit: Kit, name: str) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in kit[name].named_parameters()}


def gradients(kit: Kit, jobs: Sequence[Job], micro: int, step: int = 0) -> dict[str, Tensor]:
    """Of one step over all jobs, cut into micro-batches."""
    for one in jobs:
        kit[one.name].zero_grad()
    work = StepRunner(kit, jobs, micro)
    rows = [(j, i) for j, one in enumerate(jobs) for i in one.batches[step]]
    work.step(kit, rows, step, Tensor.backward, nothing)
    return grads_of(kit, jobs)


def grads_of(kit: Kit, jobs: Sequence[Job]) -> dict[str, Tensor]:
    return {
        f"{one.name}/{key}": torch.zeros_like(value) if value.grad is None else value.grad.clone()
        for one in jobs
        for key, value in kit[one.name].named_parameters()
    }


def nothing(_model: nn.Module) -> Any:
    import contextlib

    return contextlib.nullcontext()


def far(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest difference, against the largest value there is."""
    assert found.keys() == wanted.keys()
    scale = max(value.abs().max().item() for value in wanted.values())
    assert scale > 0
    return max((found[key] - wanted[key]).abs().max().item() for key in wanted) / scale


def losses(loop: JobTrainer) -> list[float]:
    return [row["loss"] for row in loop.state.log_history if "loss" in row]
