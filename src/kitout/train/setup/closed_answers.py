"""The closed set of answers of a language-model run: which answers there are, and their tokens.

Where a run's answers are a few short ones that repeat (labels), a model is measured by the likeliest of them, not by
what it happens to write. The tokens of an answer are those that training examples have after their prompt, so they
are what is trained on. It knows items, no model and no metric.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kitout.data.encode.item import EncodedExample
from kitout.data.read.tables import DataError
from kitout.errors import Errors, suggest
from kitout.evaluate.metrics.generation import MAX_LABELS, MIN_REPEATS

MAX_LABEL_TOKENS = 16  # of an answer that is a label, not a sentence


@dataclass(frozen=True)
class ClosedAnswers:
    """Every answer that there is, in the order of `data.labels` or by how often it is trained on."""

    names: tuple[str, ...]
    """The answers as the data has them."""
    token_ids: tuple[tuple[int, ...], ...]
    """Of each answer: its tokens after a prompt, without the end token."""
    end_token_id: int
    """The token that ends an answer."""


def find_closed_answers(
    train: Sequence[EncodedExample], evaluated: Iterable[EncodedExample], requested: Sequence[str] | None = None
) -> ClosedAnswers | None:
    """The closed set of these items' answers, or None where they are no such set.

    They are one if the train split has 2 to MAX_LABELS different answers, each MIN_REPEATS times on average and of at
    most MAX_LABEL_TOKENS tokens, and if the other splits have no further one. requested: the set itself
    (`data.labels`): DataError where an answer is not in it.
    """
    counts = Counter(item.reference for item in train)
    names = tuple(requested) if requested is not None else tuple(name for name, _ in counts.most_common())
    if requested is None and not (2 <= len(names) <= MAX_LABELS and MIN_REPEATS * len(names) <= len(train)):
        return None
    unknown = [item for item in (*train, *evaluated) if item.reference not in names]
    tokens = _answer_tokens(train, names)
    missing = [name for name in names if name not in tokens]
    end_tokens = {ids[-1] for ids in tokens.values()}
    answer_tokens = {name: ids[:-1] for name, ids in tokens.items()}
    is_ambiguous = len(set(answer_tokens.values())) < len(answer_tokens) or not all(answer_tokens.values())
    is_long = any(len(ids) > MAX_LABEL_TOKENS for ids in answer_tokens.values())
    if requested is not None:
        errors = Errors(DataError, f"data.labels={list(requested)}")
        for item in unknown[:3]:
            errors.add(
                f"{item.location}: the answer {item.reference!r} is not one of them; {suggest(item.reference, names)}"
            )
        if missing:
            errors.add(f"no training example answers {', '.join(map(repr, missing))}: leave it out, or add examples")
        errors.raise_if_any()
    if "" in names or unknown or missing or len(end_tokens) != 1 or is_ambiguous or (is_long and requested is None):
        return None
    return ClosedAnswers(names, tuple(answer_tokens[name] for name in names), end_tokens.pop())


def prompt_ids(item: EncodedExample) -> tuple[int, ...]:
    """What an answer is generated from: the text before it, or the source of an encoder-decoder."""
    return item.input_ids[: item.prompt_length] if item.labels else item.input_ids


def _answer_tokens(train: Sequence[EncodedExample], answers: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Of each answer the tokens that most examples have for it; truncated ones do not count."""
    counts: dict[str, Counter[tuple[int, ...]]] = {name: Counter() for name in answers}
    for item in train:
        if item.reference in counts and not item.num_truncated_targets:
            counts[item.reference][item.input_ids[item.prompt_length :] if item.labels else item.target_ids] += 1
    return {name: variants.most_common(1)[0][0] for name, variants in counts.items() if variants}
