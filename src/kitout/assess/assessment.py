"""What an assessment found, as values: printed as tables, written as a page, or as what json holds.

Each part is a title, rows and sentences, whatever shows them. It knows results, and nothing of models and asking.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from kitout.assess.cost import AdapterCost, cost_notes
from kitout.assess.harness import HarnessOutcome
from kitout.assess.spectrum import Spectrum
from kitout.evaluate.compare import BASE
from kitout.evaluate.report.tables_page import TableSection, render_tables
from kitout.evaluate.sets.forgetting import (
    SMALLEST,
    SetChange,
    forgetting_line,
    forgetting_rows,
    forgetting_to_dict,
)
from kitout.evaluate.sets.outcome import SetOutcome
from kitout.format import align_columns
from kitout.train.metrics_log import to_json_value

SMALLEST_LINE = f"{SMALLEST}: the difference that a set shows in 80 % of cases; a smaller one is often missed"


@dataclass(frozen=True)
class Assessment:
    """What was measured. `print(assessment)` is a table; `to_dict()` is what json holds."""

    sets: tuple[SetOutcome, ...]
    """Those of the sources, in their order."""
    suite: str = "none"
    """The suite of forgetting."""
    suite_sets: tuple[SetOutcome, ...] = ()
    """Those of the suite."""
    forgetting: Mapping[str, tuple[SetChange, ...]] = field(default_factory=dict)
    """By adapter, set by set."""
    costs: Mapping[str, AdapterCost] = field(default_factory=dict)
    """By adapter, and of the base; empty if it was not measured."""
    spectra: Mapping[str, Spectrum] = field(default_factory=dict)
    """By adapter its intruder dimensions; empty if they were not counted."""
    harness: tuple[HarnessOutcome, ...] = ()
    """Tasks of lm-evaluation-harness."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them: null for what is not finite."""
        values = {
            "sets": [one.to_dict() for one in self.sets],
            "suite": self.suite,
            "suite_sets": [one.to_dict() for one in self.suite_sets],
            "forgetting": {name: forgetting_to_dict(changes) for name, changes in self.forgetting.items()},
            "costs": {name: asdict(cost) for name, cost in self.costs.items()},
            "harness": [one.to_dict() for one in self.harness],
            "spectra": {name: spectrum.to_dict() for name, spectrum in self.spectra.items()},
        }  # fmt: skip
        plain: dict[str, Any] = to_json_value(values)
        return plain

    def sections(self) -> list[TableSection]:
        """Its parts, in order."""
        sets = self.sets if self.forgetting else (*self.sets, *self.suite_sets)  # of the base alone: it forgets nothing
        found = [TableSection(one.title, one.rows(), one.verdicts()) for one in (*sets, *self.harness)]
        for name, changes in self.forgetting.items():
            title = f"forgetting of {name}, {self.suite} suite"
            found.append(TableSection(title, forgetting_rows(changes), [forgetting_line(changes), SMALLEST_LINE]))
        if self.costs:
            rows = [self.costs[BASE].head(), *(cost.row(name) for name, cost in self.costs.items())]
            found.append(TableSection("cost", rows, cost_notes(self.costs)))
        for name, one in self.spectra.items():
            found.append(TableSection(f"intruder dimensions of {name}", one.rows(), [one.line()]))
        return found

    def to_html(self) -> str:
        """One page that opens anywhere, with every table."""
        names = dict.fromkeys(name for one in (*self.sets, *self.harness) for name in one.changes)
        names |= dict.fromkeys((*self.forgetting, *self.spectra, *(name for name in self.costs if name != BASE)))
        return render_tables(f"{', '.join(names)} against the base" if names else "the base", self.sections())

    def __str__(self) -> str:
        parts = []
        for part in self.sections():
            table = align_columns([tuple(row) for row in part.rows]) if part.rows else []
            parts.append("\n".join([part.title, *table, *part.lines]))
        return "\n\n".join(parts)
