"""Base and adapters on sets of examples: each set is asked of the base once and of every adapter, and compared.

Used by `kitout.assess` and, for its suite of forgetting, by `kitout train`. Where adapters bring the head that a set
needs, the base has none that was trained: a constant answer takes its place. It knows sets and scores, and no source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kitout.evaluate.ask.batches import ProgressFn
from kitout.evaluate.compare import BASE, MetricChange, compare
from kitout.evaluate.metrics.measure import Measure
from kitout.evaluate.metrics.registry import metric_title
from kitout.evaluate.sets.base_answers import base_answers
from kitout.evaluate.sets.evaluation_set import Asked, EvaluationSet
from kitout.evaluate.sets.forgetting import SetChange, set_changes
from kitout.evaluate.sets.kept_answers import route_answers
from kitout.evaluate.significance.power import smallest_lines
from kitout.format import align_columns
from kitout.route import RouteEntry, adapter_names

SetProgressFn = Callable[[str, int, int], None]  # (set, examples done, examples in all)


@dataclass(frozen=True)
class SetOutcome:
    """One set of examples."""

    name: str
    """As the source names it."""
    kind: str
    """choice, text, or the name of a task."""
    n: int
    """Examples."""
    baseline: str
    """What adapters are compared with: the base, or a constant answer where the base has no trained head."""
    measures: Mapping[str, Mapping[str, Measure]]
    """By adapter (and by the baseline's name): every metric, which gives its value and interval."""
    changes: Mapping[str, tuple[MetricChange, ...]]
    """By adapter: every metric against the baseline."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "kind": self.kind,
            "n": self.n,
            "baseline": self.baseline,
            "scores": {
                name: {metric: asdict(measure.score()) for metric, measure in measures.items()}
                for name, measures in self.measures.items()
            },
            "differences": {
                name: {
                    c.name: {
                        "difference": c.difference,
                        "low": c.low,
                        "high": c.high,
                        "smallest": None if c.smallest is None else c.smallest.value,
                    }
                    for c in changes
                }
                for name, changes in self.changes.items()
            },
        }

    @property
    def title(self) -> str:
        """What it is of."""
        return f"{self.name}: {self.kind}, {self.n:,} examples"

    def rows(self) -> list[tuple[str, ...]]:
        """A table of every metric with its interval, its head first."""
        names = list(dict.fromkeys(metric for measures in self.measures.values() for metric in measures))
        notes = {
            metric: one.note for measures in self.measures.values() for metric, one in measures.items() if one.note
        }
        rows: list[tuple[str, ...]] = [("", *(metric_title(name, notes.get(name, "")) for name in names))]
        for adapter, measures in self.measures.items():
            cells = []
            for name in names:
                if name not in measures:
                    cells.append("")
                    continue
                score = measures[name].score()
                value = MetricChange(name, score, score, 0.0, 0.0, 0.0)
                low, high = value.format_value(score.low), value.format_value(score.high)
                cells.append(f"{value.format_value(score.value)} ({low} to {high})")
            rows.append((adapter, *cells))
        return rows

    def verdicts(self) -> list[str]:
        """A sentence for each adapter: its headline metric against the baseline; and what the examples can show."""
        said = [f"{name}: {changes[0].title} {changes[0].verdict}" for name, changes in self.changes.items() if changes]
        return [*said, *smallest_lines([
            (c.title, c.smallest) for changes in self.changes.values() for c in changes if c.smallest is not None
        ])]  # fmt: skip

    def __str__(self) -> str:
        return "\n".join([self.title, *align_columns(self.rows()), *self.verdicts()])


def measure_set(
    asked: Asked, what: EvaluationSet, routes: Mapping[str, RouteEntry], seed: int = 0, keep_base: bool = True,
    on_progress: SetProgressFn | None = None, folder: Path | None = None,
    log: Callable[[str], None] = lambda _line: None,
) -> SetOutcome:  # fmt: skip
    """One set, of the base and under every route. keep_base: the base's answers are kept, and taken if they are.

    folder: where the answers under each route are kept, and taken from if they are; None: nowhere. log: gets a line
    about those that are.
    """
    report: ProgressFn | None = (
        None
        if on_progress is None
        else lambda done, total: on_progress(
            what.name,
            len(what) * done // max(1, total),
            len(what),  # one text may be several windows
        )
    )
    has_heads = any(asked.kit[name].heads for route in routes.values() for name in adapter_names(route))
    constant = what.constant() if has_heads else None
    baseline, of_base = constant or (BASE, base_answers(asked, what, report, keep_base))
    measures = {baseline: what.measures(of_base)}
    answers = route_answers(asked, what, routes, folder, report, log)
    measures |= {name: what.measures(one) for name, one in zip(routes, answers, strict=True)}
    changes = {
        name: compare(measures[baseline], measures[name], seed=seed, baseline=baseline).changes for name in routes
    }
    return SetOutcome(what.name, what.kind, len(what), baseline, measures, changes)


def forgetting_of(outcomes: list[SetOutcome], name: str) -> tuple[SetChange, ...]:
    """What one adapter changed, set by set."""
    return set_changes(
        {one.name: one.measures[BASE] for one in outcomes},
        {one.name: one.measures[name] for one in outcomes},
        {one.name: one.changes[name] for one in outcomes},
    )
