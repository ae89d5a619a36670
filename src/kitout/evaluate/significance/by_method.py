"""One metric of several methods with seeds: the mean of each, every seed's difference to the base, and the ranking.

Scores that are no plain means (a loss per token, an F1) are linearized: values of single examples whose mean is the
metric and whose spread is its standard error. From three seeds a method is in the ranking; where fewer than two
methods are, all are set side by side without a verdict. It knows scores by method, and no run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from kitout.evaluate.example_scores import ExampleScores
from kitout.evaluate.metrics.measure import format_value
from kitout.evaluate.metrics.registry import metric_title
from kitout.evaluate.significance.many import MethodRanking, rank_methods
from kitout.evaluate.significance.seeds import MIN_SEEDS

PER_TOKEN = {"loss", "perplexity", "token_accuracy"}  # means over tokens of the model's own tokenizer
OTHER_TOKENS = (
    "no verdict, and values are not comparable: the examples are different tokens to these models (another tokenizer, "
    "or cut elsewhere); bits per byte of plain texts are comparable (kitout eval), and so are written answers"
)


@dataclass(frozen=True)
class SeedScore:
    """One seed of a method. (The names are keys of results.json.)"""

    adapter: str
    """Its adapter."""
    seed: int
    """The seed."""
    value: float
    """The metric on the test split."""
    difference: float
    """To the base, on the same examples."""
    low: float
    """Lower end of that difference's 95 % interval, paired by example."""
    high: float
    """Upper end of it."""


@dataclass(frozen=True)
class MethodScore:
    """One method. (The names are keys of results.json.)"""

    name: str
    """As the run calls it."""
    mean: float
    """Over its seeds."""
    seeds: tuple[SeedScore, ...]
    """Each of them."""


@dataclass(frozen=True)
class MetricByMethod:
    """One metric of all methods. (The names are keys of results.json.)"""

    metric: str
    """Its key in `TITLES`."""
    share: bool
    """A fraction, printed in percent."""
    baseline: str
    """What the differences are to."""
    methods: tuple[MethodScore, ...]
    """In the order of the run."""
    ranking: MethodRanking | None
    """Of the methods against each other."""
    note: str = ""
    """Who is not in the ranking, or why there is none."""
    measured: str = ""
    """How the metric was measured, where that is not the usual way: "by character"."""

    @property
    def title(self) -> str:
        """The metric's name for readers."""
        return metric_title(self.metric, self.measured) + (" %" if self.share else "")

    @property
    def letters(self) -> dict[str, str]:
        """Of each method in the ranking: two that share a letter do not differ significantly."""
        return {} if self.ranking is None else dict(zip(self.ranking.names, self.ranking.letters, strict=True))

    @property
    def caption(self) -> str:
        """What may be said of the methods, and what not."""
        return "; ".join(text for text in ("" if self.ranking is None else self.ranking.caption, self.note) if text)

    def format_value(self, value: float, sign: bool = False) -> str:
        """A value of this metric as text; fractions in percent."""
        return format_value(value, self.share, sign) if math.isfinite(value) else "not finite"

    def difference_text(self, one: SeedScore) -> str:
        """+12.1 (8.0 to 16.2)"""
        if not math.isfinite(one.difference):
            return "not finite"
        ends = " to ".join(self.format_value(end, sign=True) for end in (one.low, one.high))
        return f"{self.format_value(one.difference, sign=True)} ({ends})"

    def verdicts_of(self, method: str) -> list[str]:
        """Each other method against this one, in a sentence."""
        if self.ranking is None:
            return []
        pairs = [pair if pair.name == method else pair.reversed() for pair in self.ranking.pairs
                 if method in (pair.name, pair.other)]  # fmt: skip
        return [pair.verdict for pair in pairs]

    @property
    def text(self) -> str:
        """The table as aligned lines, the caption below."""
        unit = ", points" if self.share else ""
        rows = [["method", f"mean {self.title}", "seed", "value", f"to the {self.baseline}{unit}", "group"]]
        letters = self.letters
        for method in self.methods:
            for number, one in enumerate(method.seeds):
                own = [method.name, self.format_value(method.mean)] if number == 0 else ["", ""]
                group = letters.get(method.name, "") if number == 0 else ""
                rows.append([*own, str(one.seed), self.format_value(one.value), self.difference_text(one), group])
        columns = [k for k in range(len(rows[0])) if any(row[k] for row in rows[1:])]
        widths = {k: max(len(row[k]) for row in rows) for k in columns}
        lines = [
            "  ".join(row[k].rjust(widths[k]) if k in (1, 2, 3) else row[k].ljust(widths[k]) for k in columns).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, *(["", self.caption] if self.caption else [])])


def compare_by_method(
    metric: str, seeds: Mapping[str, Sequence[SeedScore]], scores: Mapping[str, Sequence[ExampleScores]],
    *, share: bool, baseline: str, why_not: str = "", measured: str = "",
) -> MetricByMethod:  # fmt: skip
    """seeds: by method. scores: of the same, as many; empty where the metric has none of single examples.

    why_not: why methods are not compared at all. measured: how the metric was measured (`Score.note`).
    """
    ranking, note = (None, why_not) if why_not else rank_scores(scores, metric)
    methods = tuple(MethodScore(name, fmean(one.value for one in own), tuple(own)) for name, own in seeds.items())
    return MetricByMethod(metric, share, baseline, methods, ranking, note, measured)


def have_same_units(metric: str, scores: Sequence[ExampleScores]) -> bool:
    """Whether a metric per token is over the same tokens in all of these; true of any other metric."""
    tokens = [one.ratio.denominators for one in scores]
    return metric not in PER_TOKEN or all(np.array_equal(own, tokens[0]) for own in tokens)


def rank_scores(
    scores: Mapping[str, Sequence[ExampleScores]], metric: str = ""
) -> tuple[MethodRanking | None, str]:  # fmt: skip
    """The ranking of methods by the scores of their seeds over the same examples; and who is not in it, or why none.

    metric: its key in `TITLES`; of one per token all have to be over the same tokens.
    """
    if len(scores) < 2:
        return None, ""
    if not all(len(own) for own in scores.values()):
        return None, "no verdict: this metric is no mean over examples, nor of such means, so there is no test of it"
    finite = {name: own for name, own in scores.items() if all(one.is_finite for one in own)}
    left_out = [f"{name} has values that are not finite" for name in scores if name not in finite]
    enough = {name: own for name, own in finite.items() if len(own) >= MIN_SEEDS}
    ranked = enough if len(enough) > 1 else finite
    left_out += [f"{name} has fewer than {MIN_SEEDS} seeds" for name in finite if name not in ranked]
    note = f"not in the ranking: {', '.join(left_out)}" if left_out else ""
    if len(ranked) < 2:
        return None, note
    every = [one for own in ranked.values() for one in own]
    if len({one.n for one in every}) > 1:
        return None, f"no verdict: {', '.join(sorted({f'{one.n:,}' for one in every}))} examples have this metric"
    if not have_same_units(metric, every):
        return None, OTHER_TOKENS
    groups = [one.groups for one in every if one.groups is not None]
    if any((own != groups[0]).any() for own in groups):
        return None, "no verdict: the same examples are in different groups"
    is_mean, first = all(one.is_mean and not one.is_linearized for one in every), every[0]
    table = {name: np.stack([one.per_example for one in own]) for name, own in ranked.items()}
    ranking = rank_methods(
        table, groups=groups[0] if groups else None, higher_is_better=first.higher_is_better,
        share=first.share, linearized=not is_mean,
    )  # fmt: skip
    return ranking, note
