"""What a finished run shows: everything in the report and the model card, as plain values.

Whoever ran it fills it in; what is empty is not shown. Texts may come from anywhere (data, models, users): whoever
writes a page escapes them. It knows no page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from kitout.evaluate.compare import Comparison
from kitout.evaluate.metrics.confusion import Confusion
from kitout.evaluate.metrics.per_class import ClassScore
from kitout.evaluate.report.adapter_table import AdapterRow, caption, comparable
from kitout.evaluate.report.charts import Chart
from kitout.evaluate.report.next_steps import NextSteps
from kitout.evaluate.report.run_charts import adapters_chart
from kitout.evaluate.report.section import Section
from kitout.evaluate.report.thumbnails import PredictedImages
from kitout.evaluate.sets.forgetting import SetChange
from kitout.evaluate.significance.by_method import MetricByMethod
from kitout.evaluate.significance.power import SmallestDifference
from kitout.format import format_number

FactTable: TypeAlias = Mapping[str, Any]  # name -> a text or a number


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One run, or one adapter of it."""

    title: str
    """Of the page."""
    model: str
    """The base, by the name or folder of the config."""
    method: str
    """The method with its settings."""
    adapter: str = "adapter"
    """The adapter's name."""
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)
    """Base vs. fine-tuned on the test split, by adapter."""
    data: FactTable = field(default_factory=dict)
    """About the data."""
    preflight: FactTable = field(default_factory=dict)
    """What was known before training."""
    estimates: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """Quantity -> (estimated, measured)."""
    cost: FactTable = field(default_factory=dict)
    """Time, memory, trainable parameters."""
    checked: FactTable = field(default_factory=dict)
    """Adapter -> the proof that it merges, as text."""
    notes: Sequence[str] = ()
    """Warnings and caveats, one sentence each."""
    config: str = ""
    """The run's YAML."""
    charts: Sequence[Chart] = ()
    """Of training and of the data."""
    files: Mapping[str, str] = field(default_factory=dict)
    """File name -> what it contains."""
    data_name: str = ""
    """The first source of the data."""
    data_hash: str = ""
    """SHA-256 of all examples."""
    license: str = ""
    """Of the base, as it states it."""
    task: str = ""
    """As in `metrics.registry.Task`."""
    next_steps: Mapping[str, NextSteps] = field(default_factory=dict)
    """What one types next, by adapter."""
    servers: Sequence[str] = ()
    """Which well-known servers take the adapter, one sentence each."""
    labels: Sequence[str] = ()
    """Of a classifier, in order."""
    created: str = ""
    """The date, and the version of kitout."""
    adapters: Sequence[AdapterRow] = ()
    """Every adapter with its result and its cost."""
    majority: float | None = None
    """Accuracy of always predicting the majority class."""
    same_test: bool = True
    """Whether all adapters have the same test examples."""
    smallest: SmallestDifference | None = None
    """What the test examples can show of any two adapters."""
    by_method: Sequence[MetricByMethod] = ()
    """Of a run with several seeds: each metric with its means over seeds, and the methods against each other."""
    method_name: str = ""
    """Of one adapter of such a run: the method that it is one seed of."""
    forgetting: Mapping[str, Sequence[SetChange]] = field(default_factory=dict)
    """What each adapter changed on sets that it was not trained for."""
    per_class: Mapping[str, Sequence[ClassScore]] = field(default_factory=dict)
    """Of a classification, by adapter: its classes one by one."""
    predicted_images: Mapping[str, PredictedImages] = field(default_factory=dict)
    """Of a classification of images, by adapter: test images, right and wrong."""
    misclassified: Mapping[str, PredictedImages] = field(default_factory=dict)
    """Of the same, those that are wrong."""
    confusions: Mapping[str, Confusion] = field(default_factory=dict)
    """Of a classification with one class per example, or of tagged words, by adapter."""
    sections: Sequence[Section] = ()
    """What its kind of run adds."""
    hub_name: str = ""
    """The base by its name on the hub; empty: it is built in or in a folder."""
    hub_task: str = ""
    """The run's task by the name that the hub gives it."""

    @property
    def baselines(self) -> list[str]:
        """What the adapters are compared with, each once."""
        return list(dict.fromkeys(one.baseline for one in self.comparisons.values()))

    @property
    def adapters_caption(self) -> str:
        """What the adapters side by side show, and what not."""
        return caption(self.adapters, self.same_test, self.smallest, bool(self.by_method))

    @property
    def are_comparable(self) -> bool:
        """Whether several adapters have one metric, and may stand in one chart."""
        return len(self.adapters) > 1 and comparable(self.adapters)

    @property
    def adapters_chart(self) -> Chart | None:
        """The adapters by their size, on the same test examples."""
        return adapters_chart(self.adapters) if self.are_comparable and self.same_test else None


def format_fact(value: Any) -> str:
    """A value of a `FactTable`: numbers with separators and four significant digits, all else as it is."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return format_number(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(format_fact, value))
    return "none" if value is None else str(value)
