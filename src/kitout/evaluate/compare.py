"""Base against tuned on the same examples: each metric with both intervals and that of the difference, and answers.

The verdict is what the interval of the difference allows to say, no more. Examples are chosen by rule: the first of
each label in turn, then the first that changed between right and wrong, either way; nobody picked them. It knows
measures and texts, no model.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from kitout.evaluate.metrics.generation import closed_labels, label_named, normalize_answer
from kitout.evaluate.metrics.measure import Measure, Score, score_difference
from kitout.evaluate.metrics.registry import TITLES
from kitout.format import format_number

SHORT_ANSWER_WORDS = 4  # words; an answer to a longer reference is neither right nor wrong


@dataclass(frozen=True)
class MetricChange:
    """One metric. difference: tuned less base, and its 95 % interval."""

    name: str
    base: Score
    tuned: Score
    difference: float
    low: float
    high: float

    @property
    def title(self) -> str:
        return TITLES.get(self.name, self.name)

    @property
    def is_better(self) -> bool | None:
        """Whether the tuned model is; None where the examples do not tell."""
        if self.low <= 0 <= self.high:
            return None
        return (self.low > 0) == self.base.higher_is_better

    @property
    def verdict(self) -> str:
        """better by 26.5 points (22.1 to 31.0); 600 held-out examples"""
        n = self.base.n
        if self.is_better is None:
            return (
                f"no difference that {'these' if n > 1 else 'this'} {n:,} held-out example{'s' if n > 1 else ''} can "
                f"show ({self.format_value(self.low, sign=True)} to "
                f"{self.format_value(self.high, sign=True)}{self._unit})"
            )
        ends = sorted((abs(self.low), abs(self.high)))
        reach = " to ".join(self.format_value(end) for end in ends)
        word = "better" if self.is_better else "worse"
        return f"{word} by {self.format_value(abs(self.difference))}{self._unit} ({reach}); {n:,} held-out examples"

    @property
    def _unit(self) -> str:
        return " points" if self.base.share else ""

    def format_value(self, value: float, sign: bool = False) -> str:
        """A value of this metric in words: shares in percent."""
        return format_value(value, self.base.share, sign)


@dataclass(frozen=True)
class ComparedExample:
    """One example with what both said. right: (base, tuned), where that can be told. why: it is shown."""

    prompt: str
    reference: str
    base: str
    tuned: str
    right: tuple[bool, bool] | None = None
    why: str = ""


@dataclass(frozen=True)
class Comparison:
    """The first change is the headline."""

    changes: tuple[MetricChange, ...]
    examples: tuple[ComparedExample, ...] = ()

    @property
    def verdict(self) -> str:
        first = self.changes[0]
        return f"{first.title}: {first.verdict}"


def compare(
    base: Mapping[str, Measure], tuned: Mapping[str, Measure], examples: Sequence[ComparedExample] = (), seed: int = 0
) -> Comparison:
    """Both from `metrics.measures` over the same examples, in the same order."""
    changes = tuple(
        MetricChange(
            name, base[name].score(seed), tuned[name].score(seed), *score_difference(base[name], tuned[name], seed)
        )
        for name in tuned
        if name in base
    )
    if not changes:
        raise ValueError(f"base has {', '.join(base)}, tuned {', '.join(tuned)}: no metric in common")
    return Comparison(changes, tuple(examples))


def pick_examples(
    prompts: Sequence[str],
    references: Sequence[str],
    base: Sequence[str],
    tuned: Sequence[str],
    max_examples: int = 8,
) -> tuple[ComparedExample, ...]:
    """Half of them the first of each label in turn, half the first whose answer changed.

    Nobody is right or wrong where the references are whole sentences.
    """
    why = select(references, base, tuned, max_examples)
    labels = closed_labels(references)
    judged = bool(labels) or all(len(normalize_answer(r).split()) <= SHORT_ANSWER_WORDS for r in references)
    asked, true, before, after = ([texts[i] for i in why] for texts in (prompts, references, base, tuned))
    return beside(asked, true, before, after, list(why.values()), labels, judged)


def beside(
    prompts: Sequence[str], references: Sequence[str], base: Sequence[str], tuned: Sequence[str], why: Sequence[str],
    labels: Sequence[str] = (), judged: bool = True,
) -> tuple[ComparedExample, ...]:  # fmt: skip
    """Examples that are chosen already, with what both wrote. labels: of a closed set; judged: right or wrong."""
    names = [normalize_answer(label) for label in labels]
    rows = zip(prompts, references, base, tuned, why, strict=True)
    shown = []
    for prompt, reference, before, after, reason in rows:
        true = normalize_answer(reference)
        right = (_is_correct(before, true, names), _is_correct(after, true, names)) if judged else None
        shown.append(ComparedExample(prompt, reference, before, after, right, reason))
    return tuple(shown)


def select(references: Sequence[str], base: Sequence[str], tuned: Sequence[str], most: int = 8) -> dict[int, str]:
    """Which examples to show, and why: half the first of each label in turn, half the first whose answer changed."""
    labels, true = closed_labels(references), [normalize_answer(r) for r in references]
    right = [(_is_correct(b, r, labels), _is_correct(t, r, labels)) for b, t, r in zip(base, tuned, true, strict=True)]
    turns = _round_robin(true)
    chosen = dict.fromkeys(turns[: (most + 1) // 2], "first of its kind")
    for i in _order_changed(
        right, [normalize_answer(b) != normalize_answer(t) for b, t in zip(base, tuned, strict=True)]
    ):
        if len(chosen) < most:
            chosen.setdefault(i, "the answers differ")
    for i in turns:
        if len(chosen) < most:
            chosen.setdefault(i, "first of its kind")
    return chosen


def _round_robin(labels: Sequence[Hashable]) -> list[int]:
    """Label by label in turn, each label's examples in the order of the data."""
    held: dict[Hashable, list[int]] = {}
    for i, label in enumerate(labels):
        held.setdefault(label, []).append(i)
    rounds = max(map(len, held.values()), default=0)
    return [places[turn] for turn in range(rounds) for places in held.values() if turn < len(places)]


def _order_changed(right: Sequence[tuple[bool, bool]], is_different: Sequence[bool]) -> list[int]:
    """Gained and lost ones in turn, then those that changed from wrong to wrong."""
    gained = [i for i, (b, t) in enumerate(right) if t and not b]
    lost = [i for i, (b, t) in enumerate(right) if b and not t]
    turned = {i: right[i] for i in sorted(gained + lost)}
    return _alternate(turned) + [i for i, other in enumerate(is_different) if other and i not in turned]


def _alternate(changed: Mapping[int, tuple[bool, bool]]) -> list[int]:
    places, kinds = list(changed), list(changed.values())
    return [places[i] for i in _round_robin(kinds)]


def _is_correct(answer: str, reference: str, labels: Sequence[str]) -> bool:
    """As `answered` counts it: the reference itself, or, where that is a label, the only label it names."""
    return normalize_answer(answer) == reference or label_named(normalize_answer(answer), labels) == reference


def format_value(value: float, share: bool, sign: bool = False) -> str:
    """26.5 of a share of 0.265; else four figures."""
    text = f"{100 * value:{'+' if sign else ''}.1f}" if share else format_number(value, sign)
    return text if any(c in "123456789" for c in text) else text.lstrip("+-")
