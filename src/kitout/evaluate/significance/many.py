"""Many methods at once: all pairs, or all against one, with Holm's correction; and a ranking as groups.

Of twelve equal methods one differs from a default at p < 0.05 in a third of cases; after Holm (1979) in at most 5 %. A
ranking gives letters (Piepho 2004): two methods that share one do not differ significantly, so nothing is called the
best that was not shown to be. It knows arrays of scores, and no training.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kitout.errors import ConfigError, suggest
from kitout.evaluate.metrics.measure import format_value, size_text
from kitout.evaluate.significance.power import SmallestDifference
from kitout.evaluate.significance.seeds import MIN_SEEDS, MethodDifference, check_scores, compare_methods

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values in the same order: those of at most 0.05 hold together at the 5 % level."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for step, i in enumerate(sorted(range(len(p_values)), key=lambda k: p_values[k])):
        highest = max(highest, min(1.0, (len(p_values) - step) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def compare_pairs(
    scores: Mapping[str, ArrayLike], default: str | None = None, *,
    groups: Sequence[Hashable] | NDArray[Any] | None = None, weights: ArrayLike | None = None,
    higher_is_better: bool = True, share: bool = True, linearized: bool = False, seed: int = 0,
) -> tuple[MethodDifference, ...]:  # fmt: skip
    """Every pair of methods, or every other method against `default`; p-values are corrected where all pairs have one.

    scores: method -> [seeds, examples], as `compare_methods` takes them with all the rest.
    """
    names = list(scores)
    if len(names) < 2:
        raise ConfigError(f"expected at least 2 methods to compare, found {len(names)}: {', '.join(names)}")
    if default is not None and default not in scores:
        raise ConfigError(f"there is no method {default!r} here: {suggest(default, names)}")
    pairs = list(combinations(names, 2)) if default is None else [(one, default) for one in names if one != default]
    options: dict[str, Any] = {
        "groups": groups, "weights": weights, "higher_is_better": higher_is_better, "share": share,
        "linearized": linearized, "seed": seed,
    }  # fmt: skip
    found = [compare_methods(scores[a], scores[b], names=(a, b), **options) for a, b in pairs]
    tested = [i for i, one in enumerate(found) if one.p_value is not None]
    adjusted = holm([p for one in found if (p := one.p_value) is not None])
    for i, value in zip(tested, adjusted, strict=True):
        found[i] = replace(found[i], adjusted=value, num_pairs=len(tested))
    return tuple(found)


@dataclass(frozen=True)
class MethodRanking:
    """Methods in order of their mean, as groups without a significant difference. (Names are keys of results.json.)"""

    names: tuple[str, ...]
    """Best first."""
    means: tuple[float, ...]
    """Mean score of each, over seeds and examples."""
    letters: tuple[str, ...]
    """Of each: two methods that share a letter do not differ significantly. Empty texts without a verdict."""
    pairs: tuple[MethodDifference, ...]
    """Every pair of methods."""
    smallest: SmallestDifference
    """The smallest difference that can be shown of every pair, before the correction for many pairs."""

    @property
    def has_verdict(self) -> bool:
        """Whether there are enough seeds of every method."""
        return all(self.letters)

    @property
    def caption(self) -> str:
        """What the order says, and what not."""
        first = self.pairs[0]
        seeds = sorted({s for pair in self.pairs for s in pair.num_seeds})
        size = f"{' to '.join(str(s) for s in dict.fromkeys((seeds[0], seeds[-1])))} seed{'s' if seeds != [1] else ''}"
        shown = f"smallest difference that one pair can show (80 % power): {self.smallest.text}"
        if not self.has_verdict:
            return f"no ranking: {size}, and {MIN_SEEDS} of every method are needed, because seeds differ too; {shown}"
        examples = size_text(first.n, first.num_groups)
        return (
            f"methods that share a letter do not differ significantly ({size} of each, {examples}, "
            f"Holm over {len(self.pairs)} pair{'s' if len(self.pairs) > 1 else ''}); {shown}"
        )

    @property
    def text(self) -> str:
        """The ranking as aligned lines, its caption below."""
        share = self.pairs[0].share
        rows = [
            (name, format_value(value, share), letters)
            for name, value, letters in zip(self.names, self.means, self.letters, strict=True)
        ]
        widths = [max(len(row[k]) for row in rows) for k in (0, 1)]
        lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in rows]
        return "\n".join([*lines, "", self.caption])


def rank_methods(
    scores: Mapping[str, ArrayLike], *, groups: Sequence[Hashable] | NDArray[Any] | None = None,
    weights: ArrayLike | None = None, higher_is_better: bool = True, share: bool = True, linearized: bool = False,
    seed: int = 0,
) -> MethodRanking:  # fmt: skip
    """All methods in order, with a verdict on every pair. Arguments as `compare_pairs` takes them."""
    pairs = compare_pairs(
        scores, groups=groups, weights=weights, higher_is_better=higher_is_better, share=share, linearized=linearized,
        seed=seed,
    )  # fmt: skip
    w = None if weights is None else np.asarray(weights, dtype=np.float64)
    means = {
        name: float(np.average(check_scores(name, one, share and not linearized), axis=1, weights=w).mean())
        for name, one in scores.items()
    }
    names = sorted(means, key=lambda name: -means[name] if higher_is_better else means[name])
    different = {frozenset((one.name, one.other)) for one in pairs if one.is_better is not None}
    has_verdict = all(one.p_value is not None for one in pairs)
    letters = compact_letters(names, different) if has_verdict else ("",) * len(names)
    smallest = max((one.smallest for one in pairs), key=lambda one: one.value)
    return MethodRanking(tuple(names), tuple(means[name] for name in names), letters, pairs, smallest)


def compact_letters(names: Sequence[str], different: Collection[frozenset[str]]) -> tuple[str, ...]:
    """The letters of each name: two share one exactly if they are not among the different pairs.

    Insert and absorb (Piepho 2004): one group of all is divided at each different pair; groups inside others go.
    """
    groups = [frozenset(names)]
    for pair in different:
        divided: list[frozenset[str]] = []
        for group in groups:
            divided += [group - {one} for one in pair] if pair <= group else [group]
        distinct = list(dict.fromkeys(divided))
        groups = [group for group in distinct if not any(group < other for other in distinct)]
    place = {name: i for i, name in enumerate(names)}
    groups.sort(key=lambda group: sorted(place[name] for name in group))
    return tuple("".join(_letter(i) for i, group in enumerate(groups) if name in group) for name in names)


def _letter(number: int) -> str:
    """a to z, then a1, b1, ..."""
    return ALPHABET[number % 26] + (str(number // 26) if number >= 26 else "")
