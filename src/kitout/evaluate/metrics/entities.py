"""Metrics of tagged tokens: of whole entities where the tags are BIO tags (B-, I-), else of single tags.

An entity is correct when its type, its first and its last token are. Intervals resample whole examples, because the
tokens of one sentence are not independent. It knows no tokenizer: there is one tag per trained token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kitout.errors import ConfigError, Errors
from kitout.evaluate.intervals.ratio import Ratio
from kitout.evaluate.metrics.classification import macro_f1_of_counts
from kitout.evaluate.metrics.measure import Measure, from_sums, safe_divide

MAX_SHOWN_ERRORS = 3  # reported one by one


def tag_metrics(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, Measure]:
    """One tag per token of each example."""
    errors = Errors(ConfigError, "tags")
    mismatched = [i for i, (a, b) in enumerate(zip(predictions, references, strict=True)) if len(a) != len(b)]
    for i in mismatched:
        errors.add(f"example {i} has {len(predictions[i])} predicted tags for {len(references[i])} tokens")
    errors.shorten(MAX_SHOWN_ERRORS, "examples")
    errors.raise_if_any()
    pairs = list(zip(predictions, references, strict=True))
    correct = [
        [sum(a == b for a, b in zip(predicted, actual, strict=True)), len(actual)] for predicted, actual in pairs
    ]
    counts = np.array(correct, dtype=np.float64)
    accuracy = from_sums(
        counts, lambda totals: safe_divide(totals[0], totals[1]), ratio=Ratio(counts[:, 0], counts[:, 1])
    )
    if any(tag.startswith(("B-", "I-")) for tags in references for tag in tags):
        return {**_entity_metrics(pairs), "token_accuracy": accuracy}
    return {"macro_f1": _macro_f1(pairs), "token_accuracy": accuracy}


def _entity_metrics(pairs: Sequence[tuple[Sequence[str], Sequence[str]]]) -> dict[str, Measure]:
    rows = []
    for predictions, references in pairs:
        predicted, actual = entity_spans(predictions), entity_spans(references)
        rows.append([len(predicted & actual), len(predicted), len(actual)])
    sums = np.array(rows, dtype=np.float64)
    return {
        "f1": from_sums(
            sums, lambda totals: safe_divide(2 * totals[0], totals[1] + totals[2]),
            ratio=Ratio(2 * sums[:, 0], sums[:, 1] + sums[:, 2]),
        ),
        "precision": from_sums(
            sums, lambda totals: safe_divide(totals[0], totals[1]), ratio=Ratio(sums[:, 0], sums[:, 1])
        ),
        "recall": from_sums(
            sums, lambda totals: safe_divide(totals[0], totals[2]), ratio=Ratio(sums[:, 0], sums[:, 2])
        ),
    }  # fmt: skip


def entity_spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Type, first and last token of each entity; an I- that continues no entity of its type begins one."""
    spans, entity_type, first = set(), "", 0
    for position, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        continues = prefix == "I" and name == entity_type
        if entity_type and not continues:
            spans.add((entity_type, first, position - 1))
            entity_type = ""
        if prefix in ("B", "I") and name and not continues:
            entity_type, first = name, position
    return spans


def _macro_f1(pairs: Sequence[tuple[Sequence[str], Sequence[str]]]) -> Measure:
    names = sorted({tag for pair in pairs for tags in pair for tag in tags})
    ids = {name: i for i, name in enumerate(names)}
    sums = np.zeros((len(pairs), 3, len(names)))
    for row, (predictions, references) in zip(sums, pairs, strict=True):
        for predicted, actual in zip(predictions, references, strict=True):
            row[0, ids[predicted]] += predicted == actual
            row[1, ids[predicted]] += 1
            row[2, ids[actual]] += 1
    return macro_f1_of_counts(*np.moveaxis(sums, 1, 0))
