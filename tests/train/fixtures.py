"""Small things to train on: kits of the zoo, examples, objectives, jobs and a trainer around them.

What several tests of the training loop need. It knows the zoo and the loop's public names.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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
OWN_SETTINGS = (
    "evaluate_fn",
    "callbacks",
    "run_id",
    "num_checkpoints",
    "step_data",
)  # of JobTrainer; others are Trainer's


def kit_of(species: str, attention: str = "", dtype: torch.dtype = torch.float32) -> Kit:
    model: Any = ALL[species].build().to(dtype)
    if attention:
        model.set_attn_implementation(attention)
    return kitout.attach(model).eval()


def texts(number: int, seed: int = 0, low: int = 4, high: int = 12) -> list[EncodedExample]:
    """Texts of different lengths, of which different numbers of tokens at the end are trained on."""
    rng = random.Random(seed)
    examples = []
    for line in range(1, number + 1):
        ids = [rng.randrange(FIRST_TOKEN, VOCAB) for _ in range(rng.randint(low, high))]
        num_targets = rng.randint(1, len(ids) - 1)
        prompt_length = len(ids) - num_targets
        labels = [IGNORE_INDEX] * prompt_length + ids[-num_targets:]
        examples.append(
            EncodedExample(tuple(ids), tuple(labels), prompt_length=prompt_length, location=f"line {line}")
        )  # fmt: skip
    return examples


def add(kit: Kit, name: str, method: Method, heads: Mapping[str, nn.Module] | None = None, seed: int = 0) -> None:
    """Adds an adapter and moves it off its start, so that no gradient is zero."""
    dtype = torch.promote_types(kit.dtype, torch.float32)
    adapter = kit.add(name, method, seed=seed, heads=heads, dtype=dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for value in adapter.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=generator).to(value))


def job(name: str, objective: Objective, items: Sequence[Any], steps: int = 4, batch: int = 4, **settings: Any) -> Job:
    settings = {"lr": 1e-2, "lr_schedule": "linear", "warmup_ratio": 0.0, "weight_decay": 0.01, "seed": 0} | settings
    config = TrainConfig(batch_size=batch, **settings)
    batches = plan_batches([objective.num_tokens(item) for item in items], batch, steps, config.seed)
    return Job(name, objective, items, batches, config)


def causal(kit: Kit, names: Sequence[str], items: Sequence[EncodedExample], pack: int = 0) -> CausalLM:
    objective = CausalLM(kit, pack)
    with kit.use(names[0]):
        objective.choose_head_loss(list(names), items)
    return objective


def loop_of(kit: Kit, jobs: Sequence[Job], folder: Path, *, micro: int | None = None, **settings: Any) -> JobTrainer:
    own = {key: settings.pop(key) for key in OWN_SETTINGS if key in settings}
    settings = {"save_strategy": "no", "logging_steps": 1} | settings
    args = TrainingArguments(
        output_dir=str(folder), report_to="none", disable_tqdm=True, use_cpu=kit.device.type == "cpu",
        remove_unused_columns=False, logging_nan_inf_filter=False, **settings,
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
    rows = [(j, i) for j, one in enumerate(jobs) for i in one.batches[step]]
    StepRunner(kit, jobs, micro).step(kit, rows, step, Tensor.backward, no_sync)
    return grads_of(kit, jobs)


def grads_of(kit: Kit, jobs: Sequence[Job]) -> dict[str, Tensor]:
    return {
        f"{one.name}/{key}": torch.zeros_like(value) if value.grad is None else value.grad.clone()
        for one in jobs
        for key, value in kit[one.name].named_parameters()
    }


def no_sync(_model: nn.Module) -> Any:
    """One process has no gradients to synchronize."""
    return contextlib.nullcontext()


def far(results: Mapping[str, Tensor], references: Mapping[str, Tensor]) -> float:
    """The largest difference, relative to the largest value."""
    assert results.keys() == references.keys()
    scale = max(value.abs().max().item() for value in references.values())
    assert scale > 0
    return max((results[key] - references[key]).abs().max().item() for key in references) / scale


def losses(loop: JobTrainer) -> list[float]:
    return [row["loss"] for row in loop.state.log_history if "loss" in row]


class LargestTensor(TorchDispatchMode):
    """The size of the largest tensor that forward and backward allocate; parameters do not count."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.max_size = 0
        self.parameters = {value.untyped_storage().data_ptr() for value in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.parameters:
                self.max_size = max(self.max_size, tensor.untyped_storage().nbytes() // tensor.element_size())
        return output
