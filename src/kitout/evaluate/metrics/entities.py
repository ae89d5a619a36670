"""Scores of tagged tokens: whole entities where tags say where one begins (B-, I-), else tag by tag.

An entity is right when its kind, its first and its last token are. Intervals draw whole examples, since the tokens of
one sentence are not independent. It knows no tokenizer: tags come one per token that counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kitout.errors import ConfigError, Errors
from kitout.evaluate.metrics.measure import Measure, from_sums, nan_mean, safe_divide

MAX_SHOWN_ERRORS = 3  # faults told in full


def tag_metrics(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, Measure]:
    """One tag per token of each example."""
    faults = Errors(ConfigError, "tags")
    uneven = [i for i, (a, b) in enumerate(zip(predictions, references, strict=True)) if len(a) != len(b)]
    for i in uneven[:MAX_SHOWN_ERRORS]:
        faults.add(f"example {i} has {len(predictions[i])} predicted tags for {len(references[i])} tokens")
    faults.raise_if_any()
    pairs = list(zip(predictions, references, strict=True))
    right = [[sum(a == b for a, b in zip(said, true, strict=True)), len(true)] for said, true in pairs]
    accuracy = from_sums(np.array(right, dtype=np.float64), lambda totals: safe_divide(totals[0], totals[1]))
    if any(tag.startswith(("B-", "I-")) for tags in references for tag in tags):
        return {**_entity_metrics(pairs), "token_accuracy": accuracy}
    return {"macro_f1": _macro_f1(pairs), "token_accuracy": accuracy}


def _entity_metrics(pairs: Sequence[tuple[Sequence[str], Sequence[str]]]) -> dict[str, Measure]:
    rows = []
    for said, true in pairs:
        ours, theirs = entity_spans(said), entity_spans(true)
        rows.append([len(ours & theirs), len(ours), len(theirs)])
    sums = np.array(rows, dtype=np.float64)
    return {
        "f1": from_sums(sums, lambda totals: safe_divide(2 * totals[0], totals[1] + totals[2])),
        "precision": from_sums(sums, lambda totals: safe_divide(totals[0], totals[1])),
        "recall": from_sums(sums, lambda totals: safe_divide(totals[0], totals[2])),
    }


def entity_spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Kind, first and last token of each entity; an I- after another kind, or after none, begins one too."""
    found, kind, first = set(), "", 0
    for place, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        goes_on = mark == "I" and name == kind
        if kind and not goes_on:
            found.add((kind, first, place - 1))
            kind = ""
        if mark in ("B", "I") and name and not goes_on:
            kind, first = name, place
    return found


def _macro_f1(pairs: Sequence[tuple[Sequence[str], Sequence[str]]]) -> Measure:
    names = sorted({tag for pair in pairs for tags in pair for tag in tags})
    number = {name: i for i, name in enumerate(names)}
    sums = np.zeros((len(pairs), 3, len(names)))
    for row, (said, true) in zip(sums, pairs, strict=True):
        for ours, theirs in zip(said, true, strict=True):
            row[0, number[ours]] += ours == theirs
            row[1, number[ours]] += 1
            row[2, number[theirs]] += 1

    def formula(totals: NDArray[np.float64]) -> float:
        hits, saids, trues = np.split(totals, 3)
        both = saids + trues
        return nan_mean(np.divide(2 * hits, both, out=np.full_like(hits, np.nan), where=both > 0))

    return from_sums(sums.reshape(len(pairs), -1), formula)
