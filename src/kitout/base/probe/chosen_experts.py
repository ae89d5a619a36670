"""Modules among which the data chooses: experts that a traced forward did not reach are alive, and follow no batch.

What the data decides differs between batches of one shape: which of the modules built alike run, and on how many rows.
A third forward, whose tokens are all the same, shows it. It knows paths and traces, no architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kitout.base.probe.shape_tracer import ShapeTracer
from kitout.base.site import BatchRelation
from kitout.base.survey import Survey


@dataclass
class ExpertChoice:
    """What the traces show of modules among which the data chooses."""

    relations: dict[str, BatchRelation] = field(default_factory=dict)
    """By site path."""
    unreached: frozenset[str] = frozenset()
    """Paths of sites that no forward reached, while the same place ran in another module of their list."""


def trace_choice(
    survey: Survey,
    batch: Mapping[str, Any],
    tracer: ShapeTracer,
    wider: ShapeTracer,
    trace: Callable[[Survey, Mapping[str, Any]], ShapeTracer],
) -> ExpertChoice:
    """trace: runs one forward."""
    choice, unreached = ExpertChoice(), set[str]()
    if not survey.alternatives:
        return choice
    traces = [tracer, wider]
    with suppress(Exception):  # a batch that no user would make: where it fails, the two others decide
        traces.append(trace(survey, _uniform(batch)))
    for elements in survey.alternatives:
        inside = {e: [s.path for s in survey.sites if s.path.startswith(f"{e}.")] for e in elements}
        reached = [{e for e in elements if any(p in t.call_counts for p in inside[e])} for t in traces]
        ever = {p[len(e) :] for t in traces for e in elements for p in inside[e] if p in t.call_counts}
        same_rows = all(
            traces[0].first_dims.get(p) == t.first_dims.get(p) for t in traces[2:] for e in elements for p in inside[e]
        )
        if all(r == set(elements) for r in reached) and same_rows:
            continue  # all of them run, one after the other or side by side
        choice.relations |= {p: "none" for e in elements for p in inside[e]}
        for e in set(elements) - reached[0]:
            unreached |= {p for p in inside[e] if p[len(e) :] in ever}
    choice.unreached = frozenset(unreached)
    return choice


def _uniform(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with the first value of every tensor everywhere: all tokens and all pixels are the same."""
    return {
        k: v.reshape(-1)[0].expand_as(v).clone() if isinstance(v, Tensor) and v.ndim > 1 else v
        for k, v in batch.items()
    }
