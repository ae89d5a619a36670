"""What metrics are made of, example by example, kept in one file: every test can be done again without a model.

Of each metric that is a ratio of two sums over the examples (a share of correct ones, a mean, a loss per token, an F1)
the file has both summands of each example, and the example's group where it has one. Of means of such ratios (macro-F1)
it has linearized values, of others (BLEU) nothing. Written as safetensors with one JSON in the metadata, the same bytes
for the same scores. It knows measures and files, and neither runs nor seeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from kitout.errors import FileError
from kitout.evaluate.intervals.ratio import Groups, Ratio, Values
from kitout.evaluate.metrics.measure import Measure, number_groups, of_ratio
from kitout.files.atomic import write_bytes

Shape = Literal["identity", "exp", "sqrt"]
METADATA = "kitout.scores"
TUNED, BASE, DENOMINATORS, GROUPS = "tuned", "base", "denominators", "groups"  # parts of the names of tensors


@dataclass(frozen=True, eq=False)
class ExampleScores:
    """One metric of one model, example by example."""

    ratio: Ratio
    """Both summands of each example, [n] each."""
    higher_is_better: bool = True
    """False for a loss or an error."""
    share: bool = True
    """A fraction, printed in percent."""
    is_correct: bool = False
    """Whether each example is right or wrong, 1 or 0."""
    note: str = ""
    """How it was measured, where that is not the usual way."""
    groups: Groups | None = None
    """[n]: the group of each example, from 0; None: each stands for itself."""
    is_linearized: bool = False
    """Whether the examples' values are those of a linearization: of macro-F1 and balanced accuracy. Their mean is the
    metric and their spread its standard error; a single one is no score, and may lie outside 0 and 1."""

    @classmethod
    def of(cls, measure: Measure) -> ExampleScores | None:
        """None for a metric that is no ratio of sums, and no mean of such ratios."""
        if measure.ratio is None and measure.influence_fn is not None:
            values = measure.value + measure.n * measure.influence_fn()
            return cls(
                Ratio(values, np.ones(measure.n)), measure.higher_is_better, measure.is_fraction, note=measure.note,
                groups=measure.groups, is_linearized=True,
            )  # fmt: skip
        if measure.ratio is None:
            return None
        return cls(
            measure.ratio, measure.higher_is_better, measure.is_fraction, measure.correct is not None, measure.note,
            measure.groups,
        )  # fmt: skip

    @property
    def n(self) -> int:
        """Number of examples."""
        return len(self.ratio.numerators)

    @property
    def is_mean(self) -> bool:
        """Whether the metric is the plain mean of its numerators."""
        return self.ratio.shape == "identity" and bool((self.ratio.denominators == 1).all())

    @property
    def is_finite(self) -> bool:
        """Whether every value is a finite number."""
        return bool(np.isfinite(self.ratio.numerators).all() and np.isfinite(self.ratio.denominators).all())

    @property
    def per_example(self) -> Values:
        """[n], with the metric as their plain mean: of a mean its values, else the ratio linearized."""
        if self.is_mean:
            return self.ratio.numerators
        value = float(self.ratio.apply(np.array([self.ratio.quotient]))[0])
        return np.asarray(value + self.n * self.ratio.influence())

    @property
    def measure(self) -> Measure:
        """The metric again, with its intervals; of a linearized one with those of a mean."""
        return of_ratio(
            self.ratio, higher_is_better=self.higher_is_better, is_fraction=self.share,
            correct=self.ratio.numerators == 1 if self.is_correct else None, groups=self.groups, note=self.note,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class AdapterScores:
    """All that is kept of one adapter."""

    test_data: str
    """The fingerprint of its test split."""
    baseline: str
    """What `base` is of."""
    tuned: Mapping[str, ExampleScores] = field(default_factory=dict)
    """By metric, the headline first."""
    base: Mapping[str, ExampleScores] = field(default_factory=dict)
    """The same of what it is compared with."""


def keep_ratios(measures: Mapping[str, Measure]) -> dict[str, ExampleScores]:
    """Those of the metrics that have values of single examples."""
    return {name: scores for name, one in measures.items() if (scores := ExampleScores.of(one)) is not None}


def save_scores(file: Path, scores: Mapping[str, AdapterScores]) -> None:
    """scores: by adapter. Replaces the file."""
    tensors: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    for adapter, one in scores.items():
        facts[adapter] = {"test_data": one.test_data, "baseline": one.baseline, TUNED: {}, BASE: {}}
        for part, metrics in ((TUNED, one.tuned), (BASE, one.base)):
            for metric, own in metrics.items():
                name, ratio = f"{part}/{adapter}/{metric}", own.ratio
                tensors[name] = ratio.numerators.astype(bool if own.is_correct else np.float64)
                if not (ratio.denominators == 1).all():
                    tensors[f"{name}/{DENOMINATORS}"] = ratio.denominators.astype(np.float64)
                if own.groups is not None:
                    tensors[f"{name}/{GROUPS}"] = own.groups.astype(np.int64)
                facts[adapter][part][metric] = {
                    "higher_is_better": own.higher_is_better, "share": own.share, "shape": ratio.shape,
                    "note": own.note, **({"linearized": True} if own.is_linearized else {}),
                }  # fmt: skip
    write_bytes(file, save(tensors, {METADATA: json.dumps(facts)}))


def load_scores(file: Path) -> dict[str, AdapterScores]:
    """By adapter. FileError for a file that cannot be read or is damaged."""
    try:
        with safe_open(file, framework="numpy") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
            facts = json.loads(opened.metadata()[METADATA])
        return {
            adapter: AdapterScores(
                str(one["test_data"]), str(one["baseline"]),
                *(
                    {metric: _read(tensors, f"{part}/{adapter}/{metric}", fact) for metric, fact in one[part].items()}
                    for part in (TUNED, BASE)
                ),
            )
            for adapter, one in facts.items()
        }  # fmt: skip
    except OSError as error:
        raise FileError(f"{file} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(f"{file} is damaged: {type(error).__name__} {str(error)[:100]}") from error


def _read(tensors: Mapping[str, Any], name: str, fact: Mapping[str, Any]) -> ExampleScores:
    stored = tensors[name]
    numerators = stored.astype(np.float64)
    denominators = tensors.get(f"{name}/{DENOMINATORS}", np.ones(len(numerators))).astype(np.float64)
    if numerators.ndim != 1 or numerators.shape != denominators.shape or fact["shape"] not in get_args(Shape):
        raise ValueError(f"{name}: {numerators.shape} and {denominators.shape}, {fact['shape']}")
    ratio, groups = Ratio(numerators, denominators, fact["shape"]), tensors.get(f"{name}/{GROUPS}")
    return ExampleScores(
        ratio, bool(fact["higher_is_better"]), bool(fact["share"]), stored.dtype == np.bool_, str(fact["note"]),
        None if groups is None else number_groups(groups, len(numerators)), bool(fact.get("linearized", False)),
    )  # fmt: skip
