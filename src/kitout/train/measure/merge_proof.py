"""The proof that an adapter can be merged: merge it, predict again, unmerge it, and compare the base bit by bit.

It is computed in float32 where the base is small enough: half-precision weights are rounded once more by a merge, which
may turn a close answer. The base's own tensors are restored afterwards. It knows prepared runs, and nothing of files.
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

FP32_MERGE_MAX_PARAMETERS = 1_000_000_000  # a larger base is merged in its own dtype
PROOF_EXAMPLES, PROOF_ANSWERS = 32, 6  # test examples that are predicted, and that an answer is generated for
TOLERANCE = 1e-3  # of two numbers: relative, or absolute where they are below 1


@dataclass(frozen=True)
class MergeProof:
    """The result of merging and unmerging one adapter."""

    dtype: str
    """Of the merged base."""
    asked: int
    """How many answers are compared: labels, values, or generated texts."""
    same: int
    """How many are the same with the merged base as with the active adapter."""
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
    errors = Errors(ConfigError, "evaluate.prove_merge")
    for job in run.jobs:
        try:
            run.kit.merge(job.name)
        except NotMergeable as error:
            errors.add(f"{job.name}: {error}; leave it out, or choose a method that merges (`kitout methods`)")
        else:
            run.kit.unmerge()
    errors.raise_if_any()


def prove_merge(run: PreparedRun, job_index: int, config: EvaluateConfig) -> MergeProof:
    """Of one job, on its test examples, or on those of another split where it has no test split."""
    kit, name = run.kit, run.jobs[job_index].name
    with _in_float32(kit):
        digests = _weight_digests(kit)
        with kit.use(name):
            active = _answers(run, job_index, config)
        kit.merge(name)
        try:
            merged = _answers(run, job_index, config)
        finally:
            kit.unmerge()
        is_restored = _weight_digests(kit) == digests
        num_same = sum(_equal_within_tolerance(a, b) for a, b in zip(active, merged, strict=True))
        return MergeProof(str(kit.dtype)[6:], len(active), num_same, is_restored)


def _answers(run: PreparedRun, job_index: int, config: EvaluateConfig) -> list[Any]:
    """What the kit answers in its present state: generated texts and labels, or what the objective predicts."""
    kit, job, dataset = run.kit, run.jobs[job_index], run.datasets[job_index]
    examples = list((dataset.test or dataset.validation or dataset.preview or dataset.train)[:PROOF_EXAMPLES])
    if job.objective.task != "generation":
        return predict(kit, job.objective, examples).predictions
    answered = [example for example in examples if example.reference]
    if not answered:  # plain text has no answers: its losses are compared
        return [sums.loss for sums in predict(kit, job.objective, examples).losses]
    likeliest = choose_answers(kit, dataset.answers, answered) if dataset.answers is not None else []
    generated = generate_answers(kit, run.tokenizer, answered[:PROOF_ANSWERS], config.max_new_tokens)
    return [*generated, *likeliest]


def _equal_within_tolerance(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    if isinstance(one, Sequence) and not isinstance(one, str):
        return len(one) == len(other) and all(map(_equal_within_tolerance, one, other))
    return bool(one == other)


def _weight_digests(kit: Kit) -> dict[str, tuple[str, bytes]]:
    """Dtype and hash of every tensor of the base: a second copy of a large base may not fit beside it."""
    digests = {}
    for key, value in kit.base.state_dict().items():
        as_bytes = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digests[key] = str(value.dtype), hashlib.blake2b(as_bytes.numpy().data).digest()
    return digests


@contextmanager
def _in_float32(kit: Kit) -> Iterator[None]:
    """Casts the kit to float32 if its base is small and in half precision; restores the very tensors afterwards."""
    is_small = sum(value.numel() for value in kit.base.parameters()) < FP32_MERGE_MAX_PARAMETERS
    if not is_small or kit.dtype not in (torch.bfloat16, torch.float16):
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
        for module, own_buffers in buffers:
            module._buffers.update(own_buffers)
