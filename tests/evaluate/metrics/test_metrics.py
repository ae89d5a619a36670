"""Every metric is what the field's own packages say it is, on data with every kind of gap."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kitout.errors import ConfigError
from kitout.evaluate.metrics import generation
from kitout.evaluate.metrics.entities import entity_spans
from kitout.evaluate.metrics.generation import closed_labels, label_named, normalize_answer, token_f1
from kitout.evaluate.metrics.language import LossSums
from kitout.evaluate.metrics.measure import Score
from kitout.evaluate.metrics.registry import TITLES, compute_measures
from kitout.install_hint import suggest_install

RNG = np.random.default_rng(0)
ACTUAL = RNG.integers(0, 4, 300).tolist()
PREDICTED = [label if RNG.random() < 0.6 else int(RNG.integers(0, 5)) for label in ACTUAL]  # 4 is never the reference

needs_sklearn = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed")
needs_scipy = pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="scipy is not installed")
needs_rouge = pytest.mark.skipif(importlib.util.find_spec("rouge_score") is None, reason="rouge-score is not installed")
needs_bleu = pytest.mark.skipif(importlib.util.find_spec("sacrebleu") is None, reason="sacrebleu is not installed")


def score(task: Any, predictions: Sequence[Any], references: Sequence[Any] = (), **options: Any) -> dict[str, Score]:
    """Every metric with its interval."""
    measures = compute_measures(task, predictions, references, **options)
    return {name: measure.score() for name, measure in measures.items()}


def check_intervals(scores: dict[str, Score]) -> None:
    for name, s in scores.items():
        assert s.low <= s.value <= s.high, name
        assert all(math.isfinite(v) for v in (s.low, s.value, s.high)), name
        assert name in TITLES


@needs_sklearn
def test_labels_as_scikit_learn_scores_them() -> None:
    from sklearn.metrics import accuracy_score, f1_score, recall_score

    scores = score("classification", PREDICTED, ACTUAL)
    check_intervals(scores)
    assert next(iter(scores)) == "accuracy"
    assert scores["accuracy"].value == pytest.approx(accuracy_score(ACTUAL, PREDICTED))
    assert scores["macro_f1"].value == pytest.approx(f1_score(ACTUAL, PREDICTED, average="macro"))
    recalls = recall_score(ACTUAL, PREDICTED, average="macro", labels=[0, 1, 2, 3])
    assert scores["balanced_accuracy"].value == pytest.approx(recalls)
    named = score("classification", [f"l{s}" for s in PREDICTED], [f"l{t}" for t in ACTUAL])
    assert named == scores


@needs_sklearn
def test_multilabel_as_scikit_learn_scores_it() -> None:
    from sklearn.metrics import f1_score

    actual = (RNG.random((100, 5)) < 0.3).astype(int)
    predicted = np.where(RNG.random((100, 5)) < 0.8, actual, 1 - actual)
    actual[:, 4] = predicted[:, 4] = 0  # a label that no example has
    scores = score("multilabel", predicted.tolist(), actual.tolist())
    check_intervals(scores)
    assert scores["micro_f1"].value == pytest.approx(f1_score(actual, predicted, average="micro"))
    assert scores["macro_f1"].value == pytest.approx(f1_score(actual, predicted, average="macro", zero_division=np.nan))
    assert scores["exact_match"].value == pytest.approx((actual == predicted).all(1).mean())


def test_multilabel_refuses_what_is_not_a_vector() -> None:
    with pytest.raises(ConfigError, match=r"example 1 is \[0.7, 1\], expected 2 values 0 or 1"):
        score("multilabel", [[0, 1], [0.7, 1]], [[0, 1], [0, 1]])
    with pytest.raises(ConfigError, match="predictions have 2 labels per example, references 3"):
        score("multilabel", [[0, 1]], [[0, 1, 1]])


@needs_scipy
def test_regression_as_scipy_scores_it() -> None:
    from scipy.stats import pearsonr, spearmanr

    actual = np.round(RNG.normal(0, 1, 200), 1)  # ties
    predicted = np.round(actual + RNG.normal(0, 1, 200), 1)
    scores = score("regression", predicted.tolist(), actual.tolist())
    check_intervals(scores)
    assert scores["mae"].value == pytest.approx(np.abs(actual - predicted).mean())
    assert scores["rmse"].value == pytest.approx(np.sqrt(((actual - predicted) ** 2).mean()))
    assert scores["pearson"].value == pytest.approx(pearsonr(predicted, actual).statistic)
    assert scores["spearman"].value == pytest.approx(spearmanr(predicted, actual).statistic)
    assert (scores["mae"].higher_is_better, scores["mae"].share) == (False, False)
    assert scores["pearson"].higher_is_better


@needs_scipy
def test_the_ranks_of_a_resample_are_its_own() -> None:
    from scipy.stats import spearmanr

    from kitout.evaluate.metrics.regression import regression_metrics

    actual, predicted, weights = RNG.integers(0, 6, 40), RNG.integers(0, 6, 40), RNG.integers(0, 4, 40)
    expected = spearmanr(np.repeat(predicted, weights), np.repeat(actual, weights)).statistic
    spearman = regression_metrics(predicted.tolist(), actual.tolist())["spearman"].value_fn
    assert spearman(weights.astype(float)) == pytest.approx(expected)


def test_a_constant_prediction_has_correlation_0() -> None:
    scores = score("regression", [1.0, 1.0, 1.0], [1.0, 2.0, 3.0])
    assert (scores["pearson"].value, scores["spearman"].value) == (0.0, 0.0)
    with pytest.raises(ConfigError, match="example 1 is nan"):
        score("regression", [1.0, math.nan], [1.0, 2.0])


TAGS = [["B-per", "I-per", "O", "B-loc"], ["O", "I-org", "I-org", "I-per"], ["O", "O"], ["B-loc", "B-loc", "I-loc"]]


def test_a_span_begins_where_its_type_does() -> None:
    assert entity_spans(TAGS[0]) == {("per", 0, 1), ("loc", 3, 3)}
    assert entity_spans(TAGS[1]) == {("org", 1, 2), ("per", 3, 3)}  # no B-, and still two entities
    assert entity_spans(TAGS[2]) == set()
    assert entity_spans(TAGS[3]) == {("loc", 0, 0), ("loc", 1, 2)}
    assert entity_spans(["B", "I", "x-y"]) == set()


def test_entities_are_correct_as_a_whole() -> None:
    predicted = [["B-per", "O", "O", "B-loc"], ["O", "I-org", "I-org", "O"], ["B-loc", "O"], TAGS[3]]
    scores = score("tokens", predicted, TAGS)
    check_intervals(scores)
    assert next(iter(scores)) == "f1"
    assert scores["precision"].value == pytest.approx(4 / 6)  # loc, org, loc, loc; per is too short, one loc is wrong
    assert scores["recall"].value == pytest.approx(4 / 6)
    assert scores["f1"].value == pytest.approx(4 / 6)
    assert scores["token_accuracy"].value == pytest.approx(10 / 13)
    names = sorted({tag for tags in [*predicted, *TAGS] for tag in tags})
    ids = [[[names.index(tag) for tag in tags] for tags in rows] for rows in (predicted, TAGS)]
    assert score("tokens", *ids, names=names) == scores


@needs_sklearn
def test_tags_without_entities() -> None:
    from sklearn.metrics import f1_score

    actual = [["noun", "verb"], ["noun", "det", "noun"], ["verb"]]
    predicted = [["noun", "noun"], ["noun", "det", "verb"], ["adj"]]
    scores = score("tokens", predicted, actual)
    check_intervals(scores)
    expected = f1_score([*chain(*actual)], [*chain(*predicted)], average="macro")
    assert scores["macro_f1"].value == pytest.approx(expected)
    with pytest.raises(ConfigError, match="example 1 has 1 predicted tags for 3 tokens"):
        score("tokens", [["noun", "verb"], ["noun"], ["verb"]], actual)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat, sat on a mat!", "cat sat on mat"),
        ("Positive.", "positive"),
        ("well-known (U.S.) fact", "wellknown us fact"),
        ("-5", "-5"),
        ("(-5)", "-5"),
        ("1,000.50 dollars.", "1000.50 dollars"),
        ("3-5", "35"),
        ("A", "a"),
        ("the", "the"),
        ("+", "+"),
        ("!!!", "!!!"),
        ("Müller's Straße", "müllers straße"),
        ("", ""),
    ],
)
def test_normalize_answer(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


def test_token_f1_counts_words_as_often_as_they_occur() -> None:
    assert token_f1("the cat sat", "cat sat down") == pytest.approx(2 * 2 / 5)
    assert token_f1("cat cat cat", "cat") == pytest.approx(2 / 4)
    assert (token_f1("", ""), token_f1("", "x"), token_f1("x", "x")) == (1.0, 0.0, 1.0)


def test_closed_labels_are_repeated() -> None:
    assert closed_labels(["Yes", "no", "yes.", "No", "yes", "no", "yes"]) == ["yes", "no"]
    assert closed_labels(["A", "B", "A", "C", "B", "C", "A", "C", "B"]) == ["a", "b", "c"]
    assert closed_labels(["yes"] * 9) == []  # one label alone
    assert closed_labels([f"answer {i}" for i in range(30)]) == []
    assert closed_labels([f"answer {i % 60}" for i in range(300)]) == []


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("positive", "positive"),
        ("the sentiment of this tweet is positive", "positive"),
        ("it is very positive indeed", "very positive"),  # the longer label names the shorter too
        ("positive or negative", None),
        ("unpositive", None),
        ("", None),
        ("i do not know", None),
    ],
)
def test_an_answer_is_read_as_the_only_label_it_names(answer: str, label: str | None) -> None:
    assert label_named(answer, ["positive", "negative", "very positive"]) == label


@needs_sklearn
def test_answers_from_a_closed_set_are_labels_too() -> None:
    from sklearn.metrics import f1_score

    names = ["negative", "neutral", "positive", "mixed"]
    actual = [names[t] for t in ACTUAL]
    predicted = [f"It is {names[s]}." if s < 4 else "The sentiment is unclear" for s in PREDICTED]
    scores = score("generation", predicted, actual)
    check_intervals(scores)
    assert list(scores) == ["accuracy", "macro_f1", "exact_match", "token_f1"]
    assert scores["accuracy"].value == pytest.approx(np.mean(np.equal(PREDICTED, ACTUAL)))
    assert scores["exact_match"].value == 0
    expected = f1_score(ACTUAL, PREDICTED, average="macro", labels=[0, 1, 2, 3])
    assert scores["macro_f1"].value == pytest.approx(expected)
    assert scores["token_f1"].value > scores["exact_match"].value


def test_labels_that_are_known_need_not_be_repeated() -> None:
    scores = score("generation", ["Red", "blue"], ["red", "green"], names=["red", "green", "blue"])
    assert scores["accuracy"].value == 0.5
    assert scores["macro_f1"].value == pytest.approx(1 / 3)  # red 1, green 0, and blue, which was predicted, 0
    assert "accuracy" not in score("generation", ["Red", "blue"], ["red", "green"])


OPEN_ACTUAL = [f"The {word} went to the market, and bought number {i}." for i, word in enumerate("abcdefgh")]
OPEN_PREDICTED = ["The A went home", *OPEN_ACTUAL[1:4], "", "Un marché à Zürich", *OPEN_ACTUAL[6:]]


@needs_rouge
def test_rouge_as_rouge_score_has_it() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    scores = score("generation", OPEN_PREDICTED, OPEN_ACTUAL, only=["rouge_l"])
    check_intervals(scores)
    plain = RougeScorer(["rougeL"])
    expected = np.mean([plain.score(r, p)["rougeL"].fmeasure for p, r in zip(OPEN_PREDICTED, OPEN_ACTUAL, strict=True)])
    assert scores["rouge_l"].value == pytest.approx(expected)
    cyrillic = score("generation", ["кот сидел дома", "да"], ["кот сидел дома", "да"], only=["rouge_l"])
    assert cyrillic["rouge_l"].value == 1.0


@needs_bleu
def test_chrf_and_bleu_as_sacrebleu_has_them() -> None:
    from sacrebleu.metrics import BLEU, CHRF

    scores = score("generation", OPEN_PREDICTED, OPEN_ACTUAL, only=["bleu", "chrf"])
    check_intervals(scores)
    assert scores["chrf"].value == pytest.approx(CHRF().corpus_score(OPEN_PREDICTED, [OPEN_ACTUAL]).score / 100)
    assert scores["bleu"].value == pytest.approx(BLEU().corpus_score(OPEN_PREDICTED, [OPEN_ACTUAL]).score / 100)


def test_a_missing_package_is_a_warning_and_an_error_only_if_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "find_spec", lambda name: None)
    messages: list[str] = []
    scores = score("generation", OPEN_PREDICTED, OPEN_ACTUAL, on_warning=messages.append)
    assert list(scores) == ["token_f1", "exact_match"]
    assert messages == [
        f"skipped rouge_l, chrf, bleu: rouge-score and sacrebleu not installed\n  {suggest_install(extra='eval')}"
    ]
    assert score("generation", OPEN_PREDICTED, OPEN_ACTUAL) == scores
    with pytest.raises(ConfigError, match=r"chrf: sacrebleu not installed\n  .*\[eval\]'"):
        score("generation", OPEN_PREDICTED, OPEN_ACTUAL, only=["chrf"])


def test_a_language_model_is_scored_by_loss_sums(tiny_llama: torch.nn.Module) -> None:
    ids = torch.randint(5, 99, (3, 9))
    labels = ids.clone()
    labels[0, :4] = labels[2] = -100  # the last example has no trained token
    with torch.no_grad():
        logits = tiny_llama(input_ids=ids).logits
    flat, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    losses = F.cross_entropy(flat, targets, ignore_index=-100, reduction="none").view(3, 8).sum(1).tolist()
    hits = (flat.argmax(-1) == targets).view(3, 8).sum(1).tolist()
    sums = [LossSums(*row) for row in zip(losses, [5, 8, 0], hits, strict=True)]
    expected = F.cross_entropy(flat, targets, ignore_index=-100)
    scores = score("language", sums)
    check_intervals(scores)
    assert scores["loss"].value == pytest.approx(float(expected), rel=1e-6)
    assert scores["perplexity"].value == pytest.approx(math.exp(float(expected)), rel=1e-6)
    accuracy = (flat.argmax(-1) == targets).sum() / (targets != -100).sum()
    assert scores["token_accuracy"].value == pytest.approx(float(accuracy))
    total = LossSums(sum(s.loss for s in sums), 13, sum(s.num_correct for s in sums))
    assert score("language", [total])["loss"].value == pytest.approx(scores["loss"].value)


def test_what_cannot_be_scored_is_an_error() -> None:
    with pytest.raises(ConfigError, match="there is no task 'classify': did you mean 'classification'"):
        score("classify", [1], [1])
    with pytest.raises(ConfigError, match="there are no predictions"):
        score("classification", [], [])
    with pytest.raises(ConfigError, match="2 predictions for 1 references"):
        score("classification", [1, 2], [1])
    with pytest.raises(ConfigError, match=r"classification has no metric 'acuracy' here: did you mean 'accuracy'"):
        score("classification", [1], [1], only=["acuracy"])
    with pytest.raises(ConfigError, match="none of the 1 examples has a trained token"):
        score("language", [LossSums(0.0, 0, 0)])


def test_only_selects_in_the_requested_order() -> None:
    assert list(score("classification", PREDICTED, ACTUAL, only=["macro_f1", "accuracy"])) == ["macro_f1", "accuracy"]
