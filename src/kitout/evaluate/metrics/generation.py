"""Metrics of generated answers: exact match, token F1, the label an answer names, ROUGE-L, chrF and BLEU.

Exact match and token F1 are SQuAD's (Rajpurkar et al. 2016), after its normalization, and without the punctuation of
any script, as MLQA's (Lewis et al. 2020). Where the references are a few repeated labels, accuracy and macro-F1 count
the one label that an answer names, so that an answer in a sentence is not incorrect for that. ROUGE-L, chrF and BLEU
come from rouge-score and sacrebleu where they are installed. All values are between 0 and 1. It knows no model.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from kitout.data.normalize import normalize_text
from kitout.errors import ConfigError
from kitout.evaluate.metrics.classification import class_metrics
from kitout.evaluate.metrics.measure import Measure, from_sums, mean, proportion
from kitout.evaluate.metrics.scripts import bleu_tokenizer, lacks_spaces, split_units
from kitout.install_hint import suggest_install

MAX_LABELS = 50  # distinct references that still count as labels
CLOSED_METRICS = ("accuracy", "macro_f1")  # of labels that a language model writes, unless others are requested
MIN_REPEATS = 3  # occurrences of each of them, on average
EXTRA_METRICS = {"rouge_l": "rouge_score", "chrf": "sacrebleu", "bleu": "sacrebleu"}  # metric -> the package it needs

WarnFn = Callable[[str], None]


def normalize_answer(text: str) -> str:
    """Lower case, words only; see `normalize_text`."""
    return normalize_text(text, fold_unicode=False, words_only=True)


def token_f1(prediction: str, reference: str, by_character: bool | None = None) -> float:
    """2 common words / (words of both), after `normalize_answer`; a word counts as often as it occurs.

    by_character: characters in place of words, as `split_units` has them; None: where the reference lacks spaces.
    """
    split = split_units if (lacks_spaces([reference])[0] if by_character is None else by_character) else str.split
    predicted, actual = Counter(split(normalize_answer(prediction))), Counter(split(normalize_answer(reference)))
    total = predicted.total() + actual.total()
    return 2 * (predicted & actual).total() / total if total else 1.0


def closed_labels(references: Sequence[str]) -> list[str]:
    """The labels, normalized and most frequent first, if the references repeat a small set; else nothing."""
    counts = Counter(map(normalize_answer, references))
    is_closed = 1 < len(counts) <= MAX_LABELS and MIN_REPEATS * len(counts) <= len(references)
    return [label for label, _ in counts.most_common()] if is_closed else []


def label_named(answer: str, labels: Sequence[str]) -> str | None:
    """The label that an answer is, or else the only one it names; all of them normalized."""
    if answer in labels:
        return answer
    named = [label for label in labels if _contains(answer, label)]
    longest = [label for label in named if not any(label != other and _contains(other, label) for other in named)]
    return longest[0] if len(longest) == 1 else None


def _contains(text: str, label: str) -> bool:
    """As whole words, where its script has spaces between them."""
    return label in text and (f" {label} " in f" {text} " or lacks_spaces([label])[0])


def generation_metrics(
    predictions: Sequence[str],
    references: Sequence[str],
    names: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    on_warning: WarnFn | None = None,
) -> dict[str, Measure]:
    """Generated answers. names: the labels, if all references are known to be labels; else they are detected.

    only: the metrics requested; a missing package is then an error, and else a warning.
    """
    predicted, actual = [normalize_answer(p) for p in predictions], [normalize_answer(r) for r in references]
    labels = closed_labels(references) if names is None else [normalize_answer(name) for name in names]
    measures: dict[str, Measure] = {}
    if labels:
        ids: dict[str | None, int] = {label: i for i, label in enumerate(dict.fromkeys([*labels, *actual]))}
        measures = class_metrics(
            np.array([ids.get(label_named(p, labels), -1) for p in predicted], dtype=np.intp),
            np.array([ids[r] for r in actual], dtype=np.intp),
            len(ids),
        )
        measures = {name: m for name, m in measures.items() if name in CLOSED_METRICS or name in (only or ())}
    exact_match = proportion(np.array([p == r for p, r in zip(predicted, actual, strict=True)]))
    by_character = lacks_spaces(references)
    f1 = mean(np.array([token_f1(*row) for row in zip(predictions, references, by_character, strict=True)]))
    f1 = replace(f1, note=_unit_note(by_character))
    # the headline of free answers is token F1: hardly any of them match exactly
    measures |= {"exact_match": exact_match, "token_f1": f1} if labels else {"token_f1": f1, "exact_match": exact_match}
    requested = [name for name in EXTRA_METRICS if (name in only if only is not None else not labels)]
    return measures | _extra_metrics(requested, predictions, references, only is not None, on_warning)


def _extra_metrics(
    requested: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[str],
    is_required: bool,
    on_warning: WarnFn | None,
) -> dict[str, Measure]:
    missing = [name for name in requested if find_spec(EXTRA_METRICS[name]) is None]
    if missing:
        packages = " and ".join(sorted({EXTRA_METRICS[name].replace("_", "-") for name in missing}))
        message = f"{', '.join(missing)}: {packages} not installed\n  {suggest_install(extra='eval')}"
        if is_required:
            raise ConfigError(message)
        if on_warning:
            on_warning(f"skipped {message}")
    compute = {"rouge_l": _rouge, "chrf": _chrf, "bleu": _bleu}
    return {name: compute[name](predictions, references) for name in requested if name not in missing}


class _WordTokenizer:
    """Words of any script; rouge-score's own tokenizer knows only a to z."""

    def tokenize(self, text: str) -> list[str]:
        # a vowel sign (Hindi, Tamil, Arabic) is a mark, no letter, and belongs to its word all the same
        kept = (c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text.lower())
        return [word for word in "".join(kept).split() if any(map(str.isalnum, word))]


class _CharacterTokenizer:
    """The units of texts without spaces."""

    def tokenize(self, text: str) -> list[str]:
        return split_units(text.lower())


def _unit_note(by_character: Sequence[bool]) -> str:
    """What the report says of the units of F1 and ROUGE."""
    number, total = sum(by_character), len(by_character)
    if not number:
        return ""
    return "by character" if number == total else f"{number:,} of {total:,} by character"


def _rouge(predictions: Sequence[str], references: Sequence[str]) -> Measure:
    make = partial(import_module("rouge_score.rouge_scorer").RougeScorer, ["rougeL"])
    scorers = [make(tokenizer=_WordTokenizer()), make(tokenizer=_CharacterTokenizer())]
    by_character = lacks_spaces(references)
    rows = zip(predictions, references, by_character, strict=True)
    scores = [scorers[chars].score(r, p)["rougeL"].fmeasure for p, r, chars in rows]
    return replace(mean(np.array(scores, dtype=np.float64)), note=_unit_note(by_character))


def _chrf(predictions: Sequence[str], references: Sequence[str]) -> Measure:
    return _sacrebleu(import_module("sacrebleu.metrics").CHRF(), predictions, references)


def _bleu(predictions: Sequence[str], references: Sequence[str]) -> Measure:
    tokenizer = bleu_tokenizer(references)
    metric = import_module("sacrebleu.metrics").BLEU(
        force=True, tokenize=tokenizer
    )  # force: no advice on tokenized text
    measure = _sacrebleu(metric, predictions, references)
    return measure if tokenizer == "13a" else replace(measure, note=f"tokenizer {tokenizer}")


def _sacrebleu(metric: Any, predictions: Sequence[str], references: Sequence[str]) -> Measure:
    """The corpus score from sums of the sentences' counts, by the two steps of sacrebleu's own bootstrap."""
    counts = np.array(metric._extract_corpus_statistics(list(predictions), [list(references)]), dtype=np.float64)
    return from_sums(counts, lambda totals: metric._compute_score_from_stats(totals.tolist()).score / 100)
