"""The proof that an adapter can be merged: merge it, ask again, unmerge it, and compare the base bit by bit.

It is computed in float32 where the base is small enough, since merged weights of fewer bits are rounded once more and a
close call may turn. The base's own numbers are put back afterwards. It knows prepared runs, and nothing of files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from kitout.errors import ConfigError, Errors, NotMergeable
from kitout.kit import Kit
from kitout.train.config.schema import EvaluateConfig
from kitout.train.measure.predict import choose_answers, generate_answers, predict
from kitout.train.setup.prepare import PreparedRun

FP32_MERGE_MAX_PARAMETERS = 1_000_000_000  # parameters of a base that is asked in float32
PROOF_PROMPTS, PROOF_ANSWERS = 32, 6  # test examples asked for their label or value, and for a written answer
TOLERANCE = 1e-3  # of two numbers: relative, and below 1 absolute


@dataclass(frozen=True)
class MergeProof:
    """What came of merging one adapter."""

    dtype: str
    """Of the base while it was merged."""
    asked: int
    """Answers compared: labels, values, or written texts."""
    same: int
    """Answers that are the same merged as with the active adapter."""
    restored_bit_for_bit: bool
    """Whether the unmerged base is bit-identical to what it was."""

    def __str__(self) -> str:
        restored = "bit-identical" if self.restored_bit_for_bit else "NOT bit-identical: please report this"
        return (
            f"merged into the weights ({self.dtype}): {self.same} of {self.asked} answers are the same; "
            f"unmerged, the base is {restored}"
        )


def check_mergeable(run: PreparedRun) -> None:
    """ConfigError, before anything is trained, if an adapter of the run cannot be merged."""
    faults = Errors(ConfigError, "evaluate.prove_merge")
    for job in run.jobs:
        try:
            run.kit.merge(job.name)
        except NotMergeable as wrong:
            faults.add(f"{job.name}: {wrong}; leave it out, or choose a method that merges (`kitout methods`)")
        else:
            run.kit.unmerge()
    faults.raise_if_any()


def prove_merge(run: PreparedRun, job_index: int, config: EvaluateConfig) -> MergeProof:
    """Of job `number`, on its test examples, or on those of another split where it has no test split."""
    kit, name = run.kit, run.jobs[job_index].name
    with _in_float32(kit):
        held = _weight_digests(kit)
        with kit.use(name):
            before = _ask_model(run, job_index, config)
        kit.merge(name)
        try:
            after = _ask_model(run, job_index, config)
        finally:
            kit.unmerge()
        restored = _weight_digests(kit) == held
        same = sum(_equal_within_tolerance(b, a) for b, a in zip(before, after, strict=True))
        return MergeProof(str(kit.dtype)[6:], len(before), same, restored)


def _ask_model(run: PreparedRun, job_index: int, config: EvaluateConfig) -> list[Any]:
    """What the kit answers as it is now: written texts and labels, or whatever the objective predicts."""
    kit, job, held = run.kit, run.jobs[job_index], run.datasets[job_index]
    items = list((held.test or held.validation or held.preview or held.train)[:PROOF_PROMPTS])
    if job.objective.task != "generation":
        return predict(kit, job.objective, items).predictions
    answered = [item for item in items if item.reference]
    chosen = choose_answers(kit, held.answers, answered) if held.answers is not None else []
    written = generate_answers(kit, run.tokenizer, answered[:PROOF_ANSWERS], config.max_new_tokens) if answered else []
    if not answered:  # plain text has no answers: how well it is foreseen is compared
        return [summed.loss for summed in predict(kit, job.objective, items).losses]
    return [*written, *chosen]


def _equal_within_tolerance(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    if isinstance(one, Sequence) and not isinstance(one, str):
        return len(one) == len(other) and all(map(_equal_within_tolerance, one, other))
    return bool(one == other)


def _weight_digests(kit: Kit) -> dict[str, tuple[str, bytes]]:
    """Dtype and hash of every tensor of the base: a second copy of a large base may not fit beside it."""
    found = {}
    for key, value in kit.base.state_dict().items():
        octets = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found[key] = str(value.dtype), hashlib.blake2b(octets.numpy().data).digest()
    return found


@contextmanager
def _in_float32(kit: Kit) -> Iterator[None]:
    """The kit in float32, where its base is small and of fewer bits; afterwards the very tensors it had before."""
    small = sum(value.numel() for value in kit.base.parameters()) < FP32_MERGE_MAX_PARAMETERS
    if not small or kit.dtype not in (torch.bfloat16, torch.float16):
        yield
        return
    values = [(value, value.data) for value in chain(kit.base.parameters(), kit.parameters())]
    modules = list(chain(kit.base.modules(), kit.modules()))
    buffers = [(module, dict(module._buffers)) for module in modules]
    try:
        kit.float()
        yield
    finally:
        for value, data in values:
            value.data = data
        for module, held in buffers:
            module._buffers.update(held)
