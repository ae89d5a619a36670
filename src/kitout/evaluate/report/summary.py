"""What a finished run tells: everything the report and the card show, as plain values.

The one who ran it fills it; what is left empty is left out. Texts may come from anywhere (data, models, users): those
who write pages escape them. It knows no page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from kitout.evaluate.compare import Comparison
from kitout.evaluate.report.adapter_table import AdapterRow, verdict
from kitout.format import format_number

FactTable: TypeAlias = Mapping[str, Any]  # what -> a value in words, or a number


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """title: of the page. model: the base by the name or folder it was asked for. method: in words. adapter: its name.

    comparisons: by adapter, on the held-out set. data, preflight, cost: what -> value (preflight: what was known
    before training; cost: seconds, tokens a second, peak memory, trainable values, percent of the base).
    checked: adapter -> the proof that it merges, in words.
    estimates: what -> (expected, measured). notes: caveats and warnings, one sentence each. config: the run's YAML.
    plots: title -> PNG. files: name -> what it holds. data_name, data_hash: of all examples. licence: of the base, as
    it states one. task: as `metrics.Task` has it. loader: transformers' class that opens the base, default by the task;
    opened: what it is given, default `model`; opening: its settings. chat: whether it learnt by the chat template.
    labels: of a classifier, in order. made: when, and by which version. adapters: side by side, where there are
    several; same_test: measured on the same examples; majority: the share of the most frequent class. result_plots: as
    plots, of what was reached.
    """

    title: str
    model: str
    method: str
    adapter: str = "adapter"
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)
    data: FactTable = field(default_factory=dict)
    preflight: FactTable = field(default_factory=dict)
    estimates: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    cost: FactTable = field(default_factory=dict)
    checked: FactTable = field(default_factory=dict)
    notes: Sequence[str] = ()
    config: str = ""
    plots: Mapping[str, bytes] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    data_name: str = ""
    data_hash: str = ""
    license: str = ""
    task: str = ""
    loader: str = ""
    base_path: str = ""
    chat: bool = False
    from_pretrained_kwargs: FactTable = field(default_factory=dict)
    labels: Sequence[str] = ()
    created: str = ""
    adapters: Sequence[AdapterRow] = ()
    majority: float | None = None
    same_test: bool = True
    result_plots: Mapping[str, bytes] = field(default_factory=dict)
    hub_task: str = ""
    """The run's task by the name that the hub gives it."""

    @property
    def best(self) -> str:
        """Which adapter is best, and which ones the test examples do not tell from it."""
        return verdict(self.adapters, self.same_test)


def format_fact(value: Any) -> str:
    """A fact's value: numbers with separators and four figures, all else as it is."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return format_number(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(format_fact, value))
    return "none" if value is None else str(value)
