"""Methods over several tasks: Friedman's test of their ranks, and Nemenyi's critical difference of two mean ranks.

Scores of different tasks have no common unit, so each task gives ranks alone (Demsar 2006, "Statistical Comparisons of
Classifiers over Multiple Data Sets"). With few tasks the chi-squared distribution of Friedman's statistic is not exact,
so its p-value is over permutations of the ranks within tasks. It knows one score per method and task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kitout.errors import ConfigError
from kitout.evaluate.intervals.distributions import chi2_tail, range_quantile
from kitout.evaluate.significance.seeds import LEVEL

MIN_TASKS = 5
NUM_PERMUTATIONS = 9999


@dataclass(frozen=True)
class TaskRanking:
    """Methods by their mean rank over tasks. (The names are keys of results.json.)"""

    names: tuple[str, ...]
    """Best first."""
    mean_ranks: tuple[float, ...]
    """Of each, over tasks; 1 is the best, ties share their mean rank."""
    num_tasks: int
    """How many tasks."""
    statistic: float
    """Friedman's, corrected for ties."""
    p_value: float
    """Of Friedman's test, over permutations of each task's ranks."""
    p_chi2: float
    """The same by the chi-squared distribution, as scipy.stats.friedmanchisquare has it."""
    critical_difference: float
    """Nemenyi's at the 5 % level: mean ranks that lie closer do not differ significantly."""
    groups: tuple[tuple[str, ...], ...]
    """The largest runs of methods without a significant difference, two methods or more each."""

    @property
    def is_significant(self) -> bool:
        """Whether the methods differ at all."""
        return self.p_value <= LEVEL

    @property
    def verdict(self) -> str:
        """lora, dora and ia3 do not differ significantly; ..."""
        test = f"Friedman over {self.num_tasks} tasks: p {self.p_value:.2g}"
        if not self.is_significant:
            return f"no significant difference between the {len(self.names)} methods ({test})"
        apart = f"mean ranks {self.critical_difference:.2f} apart differ significantly (Nemenyi)"
        groups = "; ".join(f"no significant difference between {' and '.join(group)}" for group in self.groups)
        return f"the methods differ ({test}); {apart}{f'; {groups}' if groups else ''}"


def rank_over_tasks(
    scores: Mapping[str, Sequence[float]], *, higher_is_better: bool = True, seed: int = 0
) -> TaskRanking:  # fmt: skip
    """Mean ranks of the methods, and which of them differ. At least 2 methods and 5 tasks.

    scores: method -> its score on each task, in one order (the mean over seeds). seed: of the permutations.
    """
    names, sizes = list(scores), {len(row) for row in scores.values()}
    if len(names) < 2 or len(sizes) != 1:
        found = ", ".join(f"{name} {len(row)}" for name, row in scores.items())
        raise ConfigError(f"expected 2 or more methods with a score on each task, found scores by method: {found}")
    if (num_tasks := sizes.pop()) < MIN_TASKS:
        raise ConfigError(f"ranks over {num_tasks} tasks say too little: expected at least {MIN_TASKS}")
    table = np.array([scores[name] for name in names], dtype=np.float64).T
    if not np.isfinite(table).all():
        raise ConfigError(f"scores of tasks: found {table[~np.isfinite(table)][0]}, expected finite numbers")
    ranks = np.array([_ranks(-row if higher_is_better else row) for row in table])
    means, k = ranks.mean(axis=0), len(names)
    statistic = float(friedman_statistic(ranks))
    p_value = _permutation_p(ranks, statistic, seed)
    distance = critical_difference(k, num_tasks)
    order = sorted(range(k), key=lambda i: float(means[i]))
    sorted_means = [float(means[i]) for i in order]
    limit = distance if p_value <= LEVEL else math.inf
    groups = tuple(tuple(names[order[i]] for i in run) for run in _runs(sorted_means, limit))
    return TaskRanking(
        tuple(names[i] for i in order), tuple(sorted_means), num_tasks, statistic, p_value,
        chi2_tail(statistic, k - 1), distance, groups,
    )  # fmt: skip


def critical_difference(num_methods: int, num_tasks: int) -> float:
    """Nemenyi's, of mean ranks at the 5 % level: q sqrt(k (k + 1) / (6 N)), q of the studentized range / sqrt 2."""
    q = range_quantile(1 - LEVEL, num_methods) / math.sqrt(2)
    return q * math.sqrt(num_methods * (num_methods + 1) / (6 * num_tasks))


def friedman_statistic(ranks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of ranks [..., tasks, methods], corrected for ties; 0 where all methods are equal on every task."""
    n, k = ranks.shape[-2:]
    center = (k + 1) / 2
    between = n**2 * ((ranks.mean(axis=-2) - center) ** 2).sum(axis=-1)
    within = ((ranks - center) ** 2).sum(axis=(-2, -1)) / (k - 1)
    return np.divide(between, within, out=np.zeros_like(between), where=within > 0)


def _permutation_p(ranks: NDArray[np.float64], statistic: float, seed: int) -> float:
    """How often ranks that are permuted within each task give a statistic as large; the ranks themselves count once."""
    rng, larger = np.random.default_rng(seed), 0
    size = max(1, 500_000 // ranks.size)
    for start in range(0, NUM_PERMUTATIONS, size):
        rows = min(size, NUM_PERMUTATIONS - start)
        permuted = rng.permuted(np.broadcast_to(ranks, (rows, *ranks.shape)), axis=-1)
        larger += int((friedman_statistic(permuted) >= statistic * (1 - 1e-9)).sum())
    return (1 + larger) / (1 + NUM_PERMUTATIONS)


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """From 1, the smallest first; ties share their mean rank."""
    _, ids, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[ids], dtype=np.float64)


def _runs(means: Sequence[float], limit: float) -> list[range]:
    """The longest runs of sorted mean ranks whose ends are closer than the limit."""
    runs: list[range] = []
    for start in range(len(means)):
        end = max(i for i in range(start, len(means)) if means[i] - means[start] < limit or i == start)
        if end > start and not (runs and end < runs[-1].stop):
            runs.append(range(start, end + 1))
    return runs
