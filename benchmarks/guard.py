"""The guard: every line of a run against its bound in bounds.toml, and the exit code.

A line is worse than its bound where its best and its median both are: one of them alone may be noise. A line without a
bound, a bound without its line and a line without a figure are errors, so nothing drops out unseen. It knows lines and
bounds, and runs no benchmark.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Line

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BOUNDS = Path(__file__).parent / "bounds.toml"
OK, WORSE, BROKEN = 0, 1, 2  # exit codes
FIGURE = re.compile(r"(?:at most )?([+-]?\d[\d.]*(?:e[+-]?\d+)?)")
MEDIAN = re.compile(r"median of rounds (\d[\d.]*)")
KEYS = {"at_most", "at_least", "target", "reason", "full_only"}


class BoundsError(ValueError):
    """What is wrong with the bounds, or with a line that none fits."""


@dataclass(frozen=True)
class Bound:
    """One entry of bounds.toml."""

    limit: float
    """The worst value that passes."""
    is_least: bool = False
    """More is better."""
    target: str = ""
    """What is asked for, where that is more than the bound."""
    reason: str = ""
    """Why the bound was loosened."""
    full_only: bool = False
    """The short form has no such line."""

    def is_worse(self, value: float) -> bool:
        return not (value >= self.limit if self.is_least else value <= self.limit)  # nan is

    def __str__(self) -> str:
        return f"{'>=' if self.is_least else '<='} {self.limit:g}"


def read_bounds(path: Path = BOUNDS) -> dict[str, dict[str, Bound]]:
    """By benchmark and metric."""
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    return {name: {metric: _bound(metric, entry) for metric, entry in part.items()} for name, part in content.items()}


def _bound(metric: str, entry: Any) -> Bound:
    limits = {"at_most", "at_least"} & set(entry) if isinstance(entry, dict) else set()
    if len(limits) != 1 or not set(entry) <= KEYS:
        raise BoundsError(f"{metric!r}: write {{at_most = 1.1}} or {{at_least = 2.0}}, with {', '.join(sorted(KEYS))}")
    (limit,) = limits
    value = entry[limit]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BoundsError(f"{metric!r}: {limit} is a number, found {value!r}")
    rest = {key: entry[key] for key in ("target", "reason", "full_only") if key in entry}
    return Bound(float(value), limit == "at_least", **rest)


def figures(line: Line) -> tuple[float, float]:
    """The best and the median of a line: given, or read from what it says."""
    found = FIGURE.match(line.measured)
    best = line.value if line.value is not None else float(found[1]) if found else None
    if best is None:
        raise BoundsError(f"{line.metric!r}: no figure in {line.measured!r}")
    median = MEDIAN.search(line.measured)
    if line.median is not None:
        return best, line.median
    return best, float(median[1]) if median else best


def judge(
    measured: Mapping[str, Iterable[Line]], bounds: Mapping[str, Mapping[str, Bound]], full: bool
) -> tuple[int, list[str]]:
    """The exit code, and what to say: lines worse than their bounds, and whatever lacks its counterpart."""
    worse, errors = [], []
    for name, lines in measured.items():
        own, seen = bounds.get(name, {}), set()
        for line in lines:
            if line.metric in seen:
                errors.append(f"{name}: {line.metric!r} comes twice")
            seen.add(line.metric)
            bound = own.get(line.metric)
            if bound is None:
                errors.append(f"{name}: no bound for {line.metric!r}: add it to {BOUNDS.name}")
                continue
            try:
                best, median = figures(line)
            except BoundsError as error:
                errors.append(f"{name}: {error}")
                continue
            if bound.is_worse(best) and bound.is_worse(median):
                worse.append(f"{name}: {line.metric}: {line.measured}, bound {bound}")
        absent = [metric for metric, bound in own.items() if metric not in seen and (full or not bound.full_only)]
        errors += [f"{name}: {metric!r} has a bound and was not measured" for metric in absent]
    return (BROKEN if errors else WORSE if worse else OK), [
        *(f"WORSE {w}" for w in worse),
        *(f"ERROR {e}" for e in errors),
    ]
