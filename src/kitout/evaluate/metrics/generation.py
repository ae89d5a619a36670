"""Scores of written answers: the same words, some of the same words, the same label.

Exact match and token-F1 are SQuAD's (Rajpurkar et al. 2016) after its normalisation; where the references are a few
labels that return, also accuracy and macro-F1 over these, by the one label an answer names: a base that answers in
a sentence is not called wrong for that. ROUGE-L, chrF and BLEU come from rouge-score and sacrebleu where they are
installed. Everything is between 0 and 1. It knows no model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from kitout.data.normalize import normalize_text
from kitout.errors import ConfigError
from kitout.evaluate.metrics.classification import class_metrics
from kitout.evaluate.metrics.measure import Measure, from_sums, mean, proportion

MAX_LABELS = 50  # different references that still are labels
MIN_REPEATS = 3  # times each of them occurs, on average
EXTRA_METRICS = {"rouge_l": "rouge_score", "chrf": "sacrebleu", "bleu": "sacrebleu"}  # metric -> the package it needs

WarnFn = Callable[[str], None]


def normalize_answer(text: str) -> str:
    """Lower case, words alone; see `normalize_text`."""
    return normalize_text(text, fold_unicode=False, words_only=True)


def token_f1(prediction: str, reference: str) -> float:
    """2 common words / (words of both), after `normalize_answer`; a word counts as often as it occurs."""
    said, true = Counter(normalize_answer(prediction).split()), Counter(normalize_answer(reference).split())
    both = said.total() + true.total()
    return 2 * (said & true).total() / both if both else 1.0


def closed_labels(references: Sequence[str]) -> list[str]:
    """The labels, normalised and most frequent first, if the references are a small set that returns; else nothing."""
    found = Counter(map(normalize_answer, references))
    few = 1 < len(found) <= MAX_LABELS and MIN_REPEATS * len(found) <= len(references)
    return [label for label, _ in found.most_common()] if few else []


def label_named(answer: str, labels: Sequence[str]) -> str | None:
    """The label that an answer is, or else the only one it names; all of them normalised."""
    if answer in labels:
        return answer
    held = [label for label in labels if f" {label} " in f" {answer} "]
    whole = [label for label in held if not any(label != other and f" {label} " in f" {other} " for other in held)]
    return whole[0] if len(whole) == 1 else None


def generation_metrics(
    predictions: Sequence[str],
    references: Sequence[str],
    names: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    on_warning: WarnFn | None = None,
) -> dict[str, Measure]:
    """Written answers. names: the labels, where it is known that all references are labels; else they are looked for.

    only: these metrics alone; one whose package is missing is then an error, and else told.
    """
    said, true = [normalize_answer(p) for p in predictions], [normalize_answer(r) for r in references]
    labels = closed_labels(references) if names is None else [normalize_answer(name) for name in names]
    found: dict[str, Measure] = {}
    if labels:
        number: dict[str | None, int] = {label: i for i, label in enumerate(dict.fromkeys([*labels, *true]))}
        found = class_metrics(
            np.array([number.get(label_named(p, labels), -1) for p in said], dtype=np.intp),
            np.array([number[r] for r in true], dtype=np.intp),
            len(number),
        )
        found.pop("balanced_accuracy")
    exact = proportion(np.array([p == r for p, r in zip(said, true, strict=True)]))
    some = mean(np.array([token_f1(p, r) for p, r in zip(predictions, references, strict=True)]))
    # the headline of free answers is what they share with the reference: hardly two are the same
    found |= {"exact_match": exact, "token_f1": some} if labels else {"token_f1": some, "exact_match": exact}
    wanted = [name for name in EXTRA_METRICS if (name in only if only is not None else not labels)]
    return found | _extra_metrics(wanted, predictions, references, only is not None, on_warning)


def _extra_metrics(
    requested: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[str],
    is_required: bool,
    on_warning: WarnFn | None,
) -> dict[str, Measure]:
    absent = [name for name in requested if find_spec(EXTRA_METRICS[name]) is None]
    if absent:
        needs = " and ".join(sorted({EXTRA_METRICS[name].replace("_", "-") for name in absent}))
        words = f"{', '.join(absent)}: {needs} not installed\n  pip install 'kitout[eval]'"
        if is_required:
            raise ConfigError(words)
        if on_warning:
            on_warning(f"left out {words}")
    makers = {"rouge_l": _rouge, "chrf": _chrf, "bleu": _bleu}
    return {name: makers[name](predictions, references) for name in requested if name not in absent}


class _WordTokenizer:
    """Words of any script; rouge-score's own tokenizer knows a to z alone."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def _rouge(predictions: Sequence[str], references: Sequence[str]) -> Measure:
    scorer = import_module("rouge_score.rouge_scorer").RougeScorer(["rougeL"], tokenizer=_WordTokenizer())
    found = [scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(predictions, references, strict=True)]
    return mean(np.array(found, dtype=np.float64))


def _chrf(predictions: Sequence[str], references: Sequence[str]) -> Measure:
    return _sacrebleu(import_module("sacrebleu.metrics").CHRF(), predictions, references)


def _bleu(predictions: Sequence[str], references: Sequence[str]) -> Measure:
    metric = import_module("sacrebleu.metrics").BLEU(force=True)  # force: no advice on tokenised text
    return _sacrebleu(metric, predictions, references)


def _sacrebleu(metric: Any, predictions: Sequence[str], references: Sequence[str]) -> Measure:
    """The corpus's score out of sums of its sentences' counts, by the two steps sacrebleu's own bootstrap takes."""
    counts = np.array(metric._extract_corpus_statistics(list(predictions), [list(references)]), dtype=np.float64)
    return from_sums(counts, lambda totals: metric._compute_score_from_stats(totals.tolist()).score / 100)
