"""Fine-tuned vs. the base on the same examples: each metric with both intervals, that of the difference, and answers.

Where the base has no trained head for the task, another baseline takes its place. The verdict says no more than the
interval of the difference allows. Examples to show are selected by a rule: the first of each label in turn, then the
first that changed between correct and incorrect, either way. It knows measures and texts, no model.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from kitout.evaluate.metrics.generation import closed_labels, label_named, normalize_answer
from kitout.evaluate.metrics.measure import Measure, Score, score_difference
from kitout.evaluate.metrics.measure import format_value as format_value
from kitout.evaluate.metrics.registry import metric_title
from kitout.evaluate.significance.power import SmallestDifference, smallest_of_measures, smallest_text

BASE, PROBE = "base", "linear probe"
SHORT_ANSWER_WORDS = 4  # words; an answer to a longer reference is neither correct nor incorrect


@dataclass(frozen=True)
class MetricChange:
    """One metric of the base and of the fine-tuned model."""

    name: str
    """Its key in `TITLES`."""
    base: Score
    """Without the adapter."""
    tuned: Score
    """With the adapter."""
    difference: float
    """tuned minus base."""
    low: float
    """Lower end of the difference's 95 % interval."""
    high: float
    """Upper end of it."""
    baseline: str = BASE
    """What `base` is of: the frozen base, or what is fair where that has an untrained head."""
    smallest: SmallestDifference | None = None
    """The smallest difference that these examples can show with a power of 80 %."""

    @property
    def title(self) -> str:
        """The metric's name for readers."""
        return metric_title(self.name, self.tuned.note)

    @property
    def is_better(self) -> bool | None:
        """Whether the fine-tuned model is better; None if the difference is not significant."""
        if not (self.low > 0 or self.high < 0):  # values that are not finite have no verdict
            return None
        return (self.low > 0) == self.base.higher_is_better

    @property
    def verdict(self) -> str:
        """better by 26.5 points (22.1 to 31.0); 600 test examples"""
        unit = " points" if self.base.share else ""
        examples = self.base.size
        other = "" if self.baseline == BASE else f"the {self.baseline} "
        if not math.isfinite(self.low + self.high):
            is_one = self.base.n < 2 and math.isfinite(self.difference)
            reason = "one example says nothing of others" if is_one else "a value is not finite"
            return f"no verdict: {reason}; {examples}"
        if self.is_better is None:
            low, high = self.format_value(self.low, sign=True), self.format_value(self.high, sign=True)
            difference = f"no significant difference {f'to {other}' if other else ''}"
            return f"{difference}({low} to {high}{unit}); {examples}"
        interval = " to ".join(self.format_value(end) for end in sorted((abs(self.low), abs(self.high))))
        direction = f"{'better' if self.is_better else 'worse'}{f' than {other}' if other else ' '}"
        return f"{direction}by {self.format_value(abs(self.difference))}{unit} ({interval}); {examples}"

    def format_value(self, value: float, sign: bool = False) -> str:
        """A value of this metric as text; fractions in percent."""
        return format_value(value, self.base.share, sign)


@dataclass(frozen=True)
class ComparedExample:
    """One example with the predictions of both models. (The names are keys of results.json.)"""

    prompt: str
    """What both were asked."""
    reference: str
    """The expected answer."""
    base: str
    """The base's prediction."""
    tuned: str
    """The fine-tuned model's prediction."""
    right: tuple[bool, bool] | None = None
    """Whether base and fine-tuned are correct; None for free text."""
    why: str = ""
    """The rule that selected it."""


@dataclass(frozen=True)
class Comparison:
    """Base vs. fine-tuned over all metrics."""

    changes: tuple[MetricChange, ...]
    """One per metric; the first is the headline."""
    examples: tuple[ComparedExample, ...] = ()
    """A few examples to show."""
    probe: MetricChange | None = None
    """The headline metric against a linear probe of the frozen features, where there is one."""

    @property
    def baseline(self) -> str:
        """What the fine-tuned model is compared with."""
        return self.changes[0].baseline

    @property
    def verdict(self) -> str:
        """The headline metric and how it compares."""
        first = self.changes[0]
        probe = "" if self.probe is None else f"; {self.probe.verdict.partition(';')[0]}"
        return f"{first.title}: {first.verdict}{probe}"

    @property
    def smallest_text(self) -> str:
        """The smallest difference that these examples can show, by metric; empty where it is not known."""
        return smallest_text([(one.title, one.smallest) for one in self.changes if one.smallest is not None])

    @property
    def is_better(self) -> bool | None:
        """Whether the fine-tuned model is better than its baseline, and not merely as good as a linear probe."""
        first = self.changes[0].is_better
        return None if first and self.probe is not None and not self.probe.is_better else first


def compare(
    base: Mapping[str, Measure], tuned: Mapping[str, Measure], examples: Sequence[ComparedExample] = (), seed: int = 0,
    baseline: str = BASE, probe: Mapping[str, Measure] | None = None,
) -> Comparison:  # fmt: skip
    """All from `compute_measures` over the same examples, in the same order. baseline: what `base` is of.

    probe: of a linear probe of the frozen features.
    """
    changes = _compare_measures(base, tuned, seed, baseline)
    if not changes:
        raise ValueError(f"base has {', '.join(base)}, fine-tuned {', '.join(tuned)}: no metric in common")
    probes = _compare_measures(probe or {}, tuned, seed, PROBE)
    return Comparison(changes, tuple(examples), probes[0] if probes else None)


def _compare_measures(
    base: Mapping[str, Measure], tuned: Mapping[str, Measure], seed: int, baseline: str
) -> tuple[MetricChange, ...]:
    changes = []
    for name in tuned:
        if name in base:
            before, after = base[name], tuned[name]
            difference, low, high = score_difference(before, after, seed)
            smallest = smallest_of_measures(before, after, (low, high))
            scores = before.score(seed), after.score(seed)
            changes.append(MetricChange(name, *scores, difference, low, high, baseline, smallest))
    return tuple(changes)


def pick_examples(
    prompts: Sequence[str],
    references: Sequence[str],
    base: Sequence[str],
    tuned: Sequence[str],
    max_examples: int = 8,
) -> tuple[ComparedExample, ...]:
    """Half of them the first of each label in turn, half the first whose prediction changed.

    Where the references are whole sentences, no answer is marked correct or incorrect.
    """
    reasons = select(references, base, tuned, max_examples)
    labels = closed_labels(references)
    judged = bool(labels) or all(len(normalize_answer(r).split()) <= SHORT_ANSWER_WORDS for r in references)
    columns = [[texts[i] for i in reasons] for texts in (prompts, references, base, tuned)]
    return beside(columns[0], columns[1], columns[2], columns[3], list(reasons.values()), labels, judged)


def beside(
    prompts: Sequence[str], references: Sequence[str], base: Sequence[str], tuned: Sequence[str], why: Sequence[str],
    labels: Sequence[str] = (), judged: bool = True,
) -> tuple[ComparedExample, ...]:  # fmt: skip
    """Examples that are selected already. labels: of a closed set. judged: mark answers as correct or incorrect."""
    names = [normalize_answer(label) for label in labels]
    examples = []
    for prompt, reference, before, after, reason in zip(prompts, references, base, tuned, why, strict=True):
        target = normalize_answer(reference)
        correct = (_is_correct(before, target, names), _is_correct(after, target, names)) if judged else None
        examples.append(ComparedExample(prompt, reference, before, after, correct, reason))
    return tuple(examples)


def select(
    references: Sequence[str], base: Sequence[str], tuned: Sequence[str], max_examples: int = 8
) -> dict[int, str]:
    """Which examples to show, and why: half the first of each label, half the first whose prediction changed."""
    labels, targets = closed_labels(references), [normalize_answer(r) for r in references]
    rows = list(zip(base, tuned, targets, strict=True))
    correct = [(_is_correct(b, target, labels), _is_correct(t, target, labels)) for b, t, target in rows]
    differs = [normalize_answer(b) != normalize_answer(t) for b, t, _ in rows]
    by_label = _round_robin(targets)
    reasons = dict.fromkeys(by_label[: (max_examples + 1) // 2], "first of its label")
    for i in _order_changed(correct, differs):
        if len(reasons) < max_examples:
            reasons.setdefault(i, "the predictions differ")
    for i in by_label:
        if len(reasons) < max_examples:
            reasons.setdefault(i, "first of its label")
    return reasons


def _round_robin(labels: Sequence[Hashable]) -> list[int]:
    """Label by label in turn, each label's examples in the order of the data."""
    by_label: dict[Hashable, list[int]] = {}
    for i, label in enumerate(labels):
        by_label.setdefault(label, []).append(i)
    rounds = max(map(len, by_label.values()), default=0)
    return [indices[k] for k in range(rounds) for indices in by_label.values() if k < len(indices)]


def _order_changed(correct: Sequence[tuple[bool, bool]], differs: Sequence[bool]) -> list[int]:
    """Improved and worsened ones in turn, then those that are incorrect in another way."""
    changed = [i for i, (base, tuned) in enumerate(correct) if base != tuned]
    alternating = [changed[k] for k in _round_robin([correct[i] for i in changed])]
    return alternating + [i for i, different in enumerate(differs) if different and correct[i][0] == correct[i][1]]


def _is_correct(answer: str, reference: str, labels: Sequence[str]) -> bool:
    """As `generation_metrics` counts it: the reference itself or, where that is a label, the only label it names."""
    return normalize_answer(answer) == reference or label_named(normalize_answer(answer), labels) == reference
