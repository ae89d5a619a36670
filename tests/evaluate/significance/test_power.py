"""The smallest difference equals the published figures, and is found about as often as it says."""

from __future__ import annotations

import numpy as np
import pytest

from kitout.evaluate.metrics.measure import mean, proportion, score_difference
from kitout.evaluate.metrics.registry import compute_measures
from kitout.evaluate.significance.power import (
    smallest_difference,
    smallest_of_measures,
    smallest_share_difference,
    smallest_text,
)


@pytest.mark.parametrize(("n", "points"), [(400, 7.7), (1000, 4.8), (2000, 3.4)])
def test_thirty_percent_discordant(n: int, points: float) -> None:
    smallest = smallest_share_difference(0.3, n)
    assert smallest.value == pytest.approx(points / 100, abs=6e-4)
    assert smallest.text == f"{smallest.amount} on {n:,} test examples"


def test_of_means_and_of_agreement() -> None:
    assert smallest_difference(0.1, 50, share=False).value == pytest.approx(0.28016, abs=1e-5)
    assert smallest_difference(0.1, 50, share=False).text == "0.2802 on 50 test examples"
    assert smallest_share_difference(0, 100).value == pytest.approx(0.028, abs=1e-3)


def test_of_measures() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(400) < 0.6, rng.random(400) < 0.6
    shares = smallest_of_measures(proportion(a), proportion(b), (0, 0))
    assert shares.value == pytest.approx(2.8016 * np.sqrt((a != b).mean() / 400), rel=1e-4)
    before, after = rng.lognormal(size=400), rng.lognormal(size=400)
    losses = smallest_of_measures(mean(before, is_fraction=False), mean(after, is_fraction=False), (0, 0))
    assert losses.value == pytest.approx(2.8016 * (after - before).std(ddof=1) / 20, rel=1e-4)
    assert not losses.share
    f1 = [compute_measures("classification", list(x), [True] * 200 + [False] * 200)["macro_f1"] for x in (a, b)]
    _, low, high = score_difference(f1[0], f1[1])
    assert smallest_of_measures(f1[0], f1[1], (low, high)).value == pytest.approx(
        (high - low) / 2 / 1.96 * 2.8016, rel=5e-3
    )
    groups = np.repeat(np.arange(40), 10)
    grouped = smallest_of_measures(proportion(a).grouped(groups), proportion(b).grouped(groups), (0, 0))
    assert grouped.value == pytest.approx(shares.value, rel=0.4)
    same = smallest_of_measures(mean(np.full(100, 0.5)), mean(np.full(100, 0.5)), (0, 0))
    assert same.value == pytest.approx(0.028, abs=1e-3)


def test_it_is_found_in_four_of_five_cases() -> None:
    rng, n, found = np.random.default_rng(1), 500, 0
    size = smallest_share_difference(0.3, n).value
    for _ in range(400):
        place = rng.random(n)
        before, after = place < 0.5 + 0.15 - size / 2, (place < 0.5) | (place > 0.85 - size / 2)
        found += score_difference(proportion(before), proportion(after))[1] > 0
    assert 0.74 <= found / 400 <= 0.86


def test_the_line_below_a_table() -> None:
    found = [("accuracy", smallest_share_difference(0.3, 1000)), ("loss", smallest_difference(0.01, 1000, share=False))]
    assert smallest_text(found) == (
        "smallest difference that 1,000 test examples can show (80 % power): accuracy 4.9 points, loss 0.02802; a "
        "smaller one is often missed"
    )
    assert smallest_text([]) == ""
    assert smallest_text([("loss", smallest_difference(float("nan"), 9)), ("mae", smallest_difference(0.0, 9))]) == ""
    few = [("acc", smallest_share_difference(1, 2)), ("loss", smallest_difference(0.1, 2, share=False))]
    none = "2 test examples can show no difference in acc: it would have to exceed 100 points"
    assert smallest_text(few[:1]) == none
    assert smallest_text(few) == (
        "smallest difference that 2 test examples can show (80 % power): loss 0.2802; a smaller one is often missed; "
        f"{none}"
    )
    assert few[0][1].text == "none on 2 test examples"
