"""Simulated: 95 % intervals cover the truth in about 95 % of cases, grouped examples included, and equal ones agree.

Each case draws sets whose true value is known. Seeds are fixed, so the counts are the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from kitout.evaluate.compare import compare
from kitout.evaluate.intervals.bounded import bounded_interval
from kitout.evaluate.intervals.ratio import Ratio
from kitout.evaluate.intervals.resampled import bootstrap_interval, resample, resample_batches
from kitout.evaluate.intervals.studentized import ratio_difference_interval, ratio_interval
from kitout.evaluate.metrics.measure import Measure, mean, proportion, score_difference
from kitout.evaluate.metrics.registry import compute_measures
from kitout.evaluate.metrics.texts import TextSums
from work import at_most

SETS, RESAMPLES = 300, 200
Interval = tuple[float, float]


def coverage(truth: float, interval: Callable[[int], Interval], sets: int = SETS) -> float:
    intervals = [interval(i) for i in range(sets)]
    return float(np.mean([low <= truth <= high for low, high in intervals]))


def ones(n: int) -> NDArray[np.float64]:
    return np.ones(n)


def fractions(rng: np.random.Generator, n: int, zero: float = 0.4, one: float = 0.35) -> NDArray[np.float64]:
    """As token F1: many 0, many 1, the rest between."""
    place, middle = rng.random(n), rng.beta(2, 2, n)
    return np.where(place < zero, 0.0, np.where(place < zero + one, 1.0, middle))


@pytest.mark.parametrize("n", [100, 400])
def test_losses(n: int) -> None:
    rng = np.random.default_rng(n)
    covered = coverage(np.exp(0.5), lambda i: ratio_interval(Ratio(rng.lognormal(size=n), ones(n)), None, i, RESAMPLES))
    assert 0.93 <= covered <= 0.97


def test_losses_of_few_examples_are_covered_more_often_than_by_percentiles() -> None:
    rng = np.random.default_rng(0)
    sets = [rng.lognormal(size=30) for _ in range(SETS)]
    truth = np.exp(0.5)
    studentized = coverage(truth, lambda i: ratio_interval(Ratio(sets[i], ones(30)), None, i, RESAMPLES))
    percentile = coverage(truth, lambda i: bootstrap_interval(mean(sets[i]).value_fn, 30, i, RESAMPLES))
    assert studentized >= 0.91 > 0.89 >= percentile


def test_differences_of_losses() -> None:
    """Per token, paired, and with heavy tails."""
    rng = np.random.default_rng(2)

    def interval(i: int) -> Interval:
        tokens, z = rng.integers(1, 200, 100).astype(float), rng.normal(size=100)
        other = 0.8 * z + 0.6 * rng.normal(size=100)
        return ratio_difference_interval(
            Ratio(np.exp(z) * tokens, tokens), Ratio(np.exp(other - 0.1) * tokens, tokens), None, i, RESAMPLES
        )

    assert 0.93 <= coverage(np.exp(0.4) - np.exp(0.5), interval) <= 0.97


def test_equal_models_on_few_texts() -> None:
    """By percentiles, 12 % of equal models differed in bits per byte on 10 texts, and 48 % on 2."""
    rng = np.random.default_rng(0)
    for n in (2, 10):
        verdicts = []
        for _ in range(100):
            tokens = rng.integers(50, 150, n)
            base = tokens * rng.lognormal(0, 0.5, n)
            moved = rng.normal(0, 5, n)
            sums = [
                [TextSums(nll, int(t), 4 * int(t), kl) for nll, t, kl in zip(values, tokens, moved, strict=True)]
                for values in (base, base + moved)
            ]
            (measures, tuned) = (compute_measures("text", one) for one in sums)
            _, low, high = score_difference(measures["bits_per_byte"], tuned["bits_per_byte"])
            verdicts.append(low > 0 or high < 0)
            assert measures["kl"].ratio is not None
        assert np.mean(verdicts) <= 0.07


def test_means_of_fractions() -> None:
    rng = np.random.default_rng(3)
    assert 0.93 <= coverage(0.475, lambda _: bounded_interval(Ratio(fractions(rng, 100), ones(100)))) <= 0.97
    near_one = 0.9 + 0.08 / 2
    covered = coverage(near_one, lambda _: bounded_interval(Ratio(fractions(rng, 100, 0.02, 0.9), ones(100))))
    assert 0.93 <= covered <= 0.97


def test_differences_of_fractions() -> None:
    """A fifth of the examples is answered anew, no better: 5 % of these differ."""
    rng = np.random.default_rng(4)

    def interval(i: int) -> Interval:
        before = fractions(rng, 200)
        after = np.where(rng.random(200) < 0.2, fractions(rng, 200), before)
        return score_difference(mean(before), mean(after), i)[1:]

    assert 0.93 <= coverage(0, interval, 500) <= 0.97


def groups_of_ten(rng: np.random.Generator) -> tuple[NDArray[np.intp], Measure, Measure]:
    """50 passages with 10 questions each; two equal methods are right on passages of their own."""
    groups = np.repeat(np.arange(50), 10)
    shared = rng.normal(0, 1, 50)
    skills = [(shared + rng.normal(0, 3, 50))[groups] for _ in range(2)]
    first, second = (proportion(rng.random(500) < 1 / (1 + np.exp(-skill))) for skill in skills)
    return groups, first, second


def test_equal_methods_on_grouped_examples() -> None:
    rng = np.random.default_rng(5)
    false_alarms = np.zeros(2)
    for i in range(500):
        groups, first, second = groups_of_ten(rng)
        pairs = ((first, second), (first.grouped(groups), second.grouped(groups)))
        for k, (a, b) in enumerate(pairs):
            _, low, high = score_difference(a, b, i)
            false_alarms[k] += not low <= 0 <= high
    ungrouped, grouped = false_alarms / 500
    assert ungrouped > 0.3
    assert 0.02 <= grouped <= 0.07


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_share_of_grouped_examples(share: float) -> None:
    rng = np.random.default_rng(6)
    groups = np.repeat(np.arange(50), 10)

    def interval(_: int) -> Interval:
        skill = rng.beta(2 * share, 2 * (1 - share), 50)
        score = proportion(rng.random(500) < skill[groups]).grouped(groups).score()
        return score.low, score.high

    assert 0.93 <= coverage(share, interval, 150) <= 0.98


def test_groups_by_any_values_and_of_every_metric() -> None:
    rng = np.random.default_rng(7)
    names = [f"passage {i}" for i in range(20) for _ in range(5)]
    actual = np.repeat(rng.integers(0, 2, 20), 5)
    predicted = np.where(np.repeat(rng.random(20), 5) < 0.7, actual, 1 - actual)
    for measure in compute_measures("classification", predicted.tolist(), actual.tolist()).values():
        plain, grouped = measure.score(), measure.grouped(names).score()
        assert grouped.value == plain.value
        assert grouped.high - grouped.low > 1.3 * (plain.high - plain.low)
    alone = mean(rng.lognormal(size=40), is_fraction=False)
    assert alone.grouped(range(40)).score() == replace(alone.score(), num_groups=40)
    with pytest.raises(ValueError, match="3 groups for 40 examples"):
        alone.grouped([1, 2, 3])
    with pytest.raises(ValueError, match="of one group"):
        alone.grouped([1] * 40)
    with pytest.raises(ValueError, match="different groups"):
        score_difference(alone, alone.grouped(range(40)))


def test_edges() -> None:
    """All right, one example, equal losses: finite, in order, and within bounds."""
    groups = np.repeat(np.arange(5), 4)
    right, wrong = (
        proportion(np.ones(20, dtype=bool)).grouped(groups),
        proportion(np.zeros(20, dtype=bool)).grouped(groups),
    )
    score = right.score()
    assert score.high == 1
    assert score.low < 0.7  # five groups say less than twenty examples
    value, low, high = score_difference(wrong, right)
    assert (value, high) == (1, 1)
    assert 0 < low < 1
    assert mean(np.array([3.0]), is_fraction=False).score().low == 3
    assert mean(np.array([0.5])).score().high == 1
    equal = mean(np.full(10, 2.0), is_fraction=False).score()
    assert (equal.low, equal.high) == (2, 2)
    for one in (mean(np.array([3.0]), is_fraction=False), Measure(lambda _: 3.0, 1, is_fraction=False)):
        other = replace(one, value_fn=lambda _: 4.0, ratio=one.ratio and Ratio(np.array([4.0]), ones(1)))
        assert score_difference(one, other) == (1, -np.inf, np.inf)
        (change,) = compare({"loss": one}, {"loss": other}).changes
        assert change.verdict == "no verdict: one example says nothing of others; 1 test example"
    few = mean(np.array([0.0] * 29 + [1.0]), is_fraction=False).score()
    assert -1 < few.low <= few.high < 2


def test_a_loss_of_few_texts_does_not_go_below_zero() -> None:
    for shape, least in (("identity", 0.0), ("exp", 1.0)):
        low, high = ratio_interval(Ratio(np.array([0.5, 1.0, 9.0]), ones(3), shape))  # type: ignore[arg-type]
        assert low == least
        assert high > 9
    assert ratio_interval(Ratio(np.array([-0.5, 1.0, 9.0]), ones(3)))[0] < 0


def test_the_same_seed_gives_the_same_interval_and_batches_the_same_resamples() -> None:
    measure = mean(np.random.default_rng(8).lognormal(size=50), is_fraction=False)
    assert measure.score(3) == measure.score(3) != measure.score(4)
    assert (np.concatenate(list(resample_batches(50, 3, 7))) == np.stack(list(resample(50, 3, 7)))).all()
    rng = np.random.default_rng(3)  # as every version drew them, one resample after the other
    assert (next(resample(50, 3)) == np.bincount(rng.integers(0, 50, 50), minlength=50)).all()


def test_a_thousand_resamples_of_a_thousand_examples_are_a_few_products() -> None:
    """Percentiles run Python for each resample."""
    measure = mean(np.random.default_rng(9).lognormal(size=1000), is_fraction=False)
    measure.score()
    with at_most(lines=1000):
        measure.score()
