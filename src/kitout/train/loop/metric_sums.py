"""Sums of what an objective measures of each example (`Losses.metrics`), by job, until a log takes their means.

Plain numbers, so that a checkpoint keeps them to the bit and processes can exchange them. It knows names and values,
and nothing of what they mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from torch import Tensor

MetricSums: TypeAlias = list[dict[str, list[float]]]  # per job, by name: [sum, number of examples with a value]


def add_examples(sums: MetricSums, jobs: Sequence[int], metrics: Mapping[str, Tensor]) -> None:
    """Adds the values [B] of examples of these jobs. nan is no value. ValueError for a name with another meaning."""
    for name, values in metrics.items():
        if "/" in name or name.startswith("eval_"):
            raise ValueError(f'an objective measures {name!r}: "/" stands after a job, and "eval_" before a validation')
        for job, value in zip(jobs, values.tolist(), strict=True):
            if not math.isnan(value):
                _add(sums[job], name, value, 1)


def add_sums(sums: MetricSums, others: MetricSums) -> None:
    """Adds the sums of other examples."""
    for own, other in zip(sums, others, strict=True):
        for name, (value, count) in other.items():
            _add(own, name, value, count)


def _add(sums: dict[str, list[float]], name: str, value: float, count: float) -> None:
    entry = sums.setdefault(name, [0.0, 0])
    entry[0] += value
    entry[1] += count


def total(per_process: Sequence[MetricSums], num_jobs: int) -> MetricSums:
    """The sums over all processes."""
    sums: MetricSums = [{} for _ in range(num_jobs)]
    for others in per_process:
        add_sums(sums, others)
    return sums
