"""Metrics equal those of scikit-learn, scipy, sacrebleu and rouge-score to 1e-9, also on weighted examples."""

from __future__ import annotations

import importlib.util
import itertools

import numpy as np
import pytest

from kitout.errors import ConfigError
from kitout.evaluate.metrics.calibration import calibration_error
from kitout.evaluate.metrics.registry import compute_measures

RNG = np.random.default_rng(1)
ACTUAL = RNG.integers(0, 4, 200)
PREDICTED = np.where(RNG.random(200) < 0.6, ACTUAL, RNG.integers(0, 5, 200))
needs_sklearn = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed")
needs_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("sacrebleu", "rouge_score")), reason="extra eval"
)


@needs_sklearn
def test_classes_as_scikit_learn_to_1e9() -> None:
    from sklearn import metrics

    measures = compute_measures("classification", PREDICTED.tolist(), ACTUAL.tolist())
    weights = RNG.integers(0, 4, 200).astype(float)
    expected = {
        "accuracy": lambda w: metrics.accuracy_score(ACTUAL, PREDICTED, sample_weight=w),
        "macro_f1": lambda w: metrics.f1_score(ACTUAL, PREDICTED, average="macro", sample_weight=w),
        "balanced_accuracy": lambda w: metrics.recall_score(
            ACTUAL, PREDICTED, labels=[0, 1, 2, 3], average="macro", sample_weight=w
        ),
        "mcc": lambda w: metrics.matthews_corrcoef(ACTUAL, PREDICTED, sample_weight=w),
    }
    assert list(measures) == list(expected)
    for name, formula in expected.items():
        assert measures[name].value == pytest.approx(formula(None), abs=1e-9), name
        assert measures[name].value_fn(weights) == pytest.approx(formula(weights), abs=1e-9), name


@needs_sklearn
def test_numbers_and_labels_as_scikit_learn_to_1e9() -> None:
    from sklearn import metrics

    actual = RNG.normal(size=80)
    predicted = actual + RNG.normal(size=80)
    scores = {k: m.value for k, m in compute_measures("regression", predicted.tolist(), actual.tolist()).items()}
    assert scores["mae"] == pytest.approx(metrics.mean_absolute_error(actual, predicted), abs=1e-9)
    assert scores["rmse"] == pytest.approx(metrics.root_mean_squared_error(actual, predicted), abs=1e-9)
    assert scores["pearson"] == pytest.approx(np.corrcoef(actual, predicted)[0, 1], abs=1e-9)
    sets, found = (RNG.integers(0, 2, (60, 4)) for _ in range(2))
    several = {k: m.value for k, m in compute_measures("multilabel", found.tolist(), sets.tolist()).items()}
    assert several["micro_f1"] == pytest.approx(metrics.f1_score(sets, found, average="micro"), abs=1e-9)
    assert several["macro_f1"] == pytest.approx(metrics.f1_score(sets, found, average="macro"), abs=1e-9)


@needs_packages
def test_texts_as_sacrebleu_and_rouge_score_to_1e9() -> None:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF

    references = [f"the cat number {i} sat on the mat near door {i * 7 % 11}" for i in range(20)]
    answers = [" ".join(r.split()[i % 3 :] + ["today"] * (i % 2)) for i, r in enumerate(references)]
    scores = {k: m.value for k, m in compute_measures("generation", answers, references).items()}
    assert scores["bleu"] == pytest.approx(BLEU().corpus_score(answers, [references]).score / 100, abs=1e-9)
    assert scores["chrf"] == pytest.approx(CHRF().corpus_score(answers, [references]).score / 100, abs=1e-9)
    rouge = [RougeScorer(["rougeL"]).score(r, p)["rougeL"].fmeasure for p, r in zip(answers, references, strict=True)]
    assert scores["rouge_l"] == pytest.approx(np.mean(rouge), abs=1e-9)


def test_matthews_correlation_by_hand() -> None:
    # 4 true positives, 1 false positive, 2 false negatives, 3 true negatives
    actual = [1] * 6 + [0] * 4
    predicted = [1, 1, 1, 1, 0, 0, 1, 0, 0, 0]
    value = compute_measures("classification", predicted, actual)["mcc"].value
    assert value == pytest.approx((4 * 3 - 1 * 2) / (5 * 6 * 4 * 5) ** 0.5, abs=1e-12)
    assert compute_measures("classification", [1, 1], [0, 1])["mcc"].value == 0.0
    score = compute_measures("classification", predicted, actual)["mcc"].score()
    assert -1 <= score.low <= score.value <= score.high <= 1
    assert not score.share


def test_calibration_error_by_a_loop() -> None:
    confidences, correct = RNG.random(500), RNG.random(500) < 0.6
    confidences[:4] = 0.0, 1.0, 1 / 15, 2 / 15
    edges, expected = np.linspace(0, 1, 16), 0.0
    for low, high in itertools.pairwise(edges):
        inside = (confidences > low) & (confidences <= high) | ((low == 0) & (confidences == 0))
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidences[inside].mean())
    measure = calibration_error(confidences, correct)
    assert measure.value == pytest.approx(expected, abs=1e-12)
    assert not measure.higher_is_better
    measures = compute_measures("classification", [1, 0, 1], [1, 1, 1], confidences=[0.9, 0.8, 1.0])
    assert measures["ece"].value == pytest.approx((0.1 + 0.8 + 0.0) / 3)
    with pytest.raises(ConfigError, match=r"example 1 is 1.5, expected a probability"):
        calibration_error(np.array([0.5, 1.5]), np.array([True, True]))


def test_pairs_count_the_better_one_above_the_worse() -> None:
    measure = compute_measures("pairs", [(-1.0, -2.0), (-3.0, -2.0), (-1.0, -1.0), (0.0, -9.0)])["pair_accuracy"]
    assert measure.value == 0.5  # equals are no preference
    assert measure.score().low > 0.1
    with pytest.raises(ConfigError, match="example 0 is"):
        compute_measures("pairs", [(float("nan"), 0.0)])
