"""Figures of a reward on known scores: accuracy, calibration, margins, lengths, and their section and picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kitout.align.measure.reward_figures import (
    LONGER,
    SAME,
    SHORTER,
    PairScores,
    answer_figures,
    auc,
    pair_figures,
)
from kitout.align.pages.reward_pages import reward_picture, reward_section

RNG = np.random.default_rng(0)


def scores(n: int = 4000, length_weight: float = 0.0) -> PairScores:
    """Pairs whose chosen answer is better with the probability that sigmoid(margin) says."""
    margins = RNG.normal(0, 1.5, n)
    is_right = RNG.random(n) < 1 / (1 + np.exp(-np.abs(margins)))
    margins = np.where(is_right, np.abs(margins), -np.abs(margins))
    tokens = RNG.integers(1, 50, (n, 2))
    rejected = RNG.normal(0, 1, n)
    return PairScores(
        rejected + margins + length_weight * tokens[:, 0], rejected + length_weight * tokens[:, 1], *tokens.T
    )


def test_a_calibrated_reward_has_no_calibration_error() -> None:
    pairs = scores()
    figures = pair_figures(pairs)
    margins = pairs.chosen - pairs.rejected
    assert figures.scores["pair_accuracy"].value == (margins > 0).mean()
    assert figures.scores["margin"].value == pytest.approx(margins.mean())
    assert figures.scores["ece"].value < 0.03
    assert len(figures.bins) == 10
    assert sum(one.n for one in figures.bins) == len(margins)
    for one in figures.bins:
        inside = (1 / (1 + np.exp(-np.abs(margins))) > one.low) & (1 / (1 + np.exp(-np.abs(margins))) <= one.high)
        assert one.n == inside.sum()
        assert one.correct == pytest.approx((margins[inside] > 0).mean())
        assert one.correct_low <= one.correct <= one.correct_high
    sure = PairScores(10 * pairs.chosen, 10 * pairs.rejected, pairs.chosen_tokens, pairs.rejected_tokens)
    assert pair_figures(sure).scores["ece"].value > 0.15


def ranks(values: Any) -> Any:
    """Equal values share their mean rank."""
    return [(np.sum(values < one) + np.sum(values <= one)) / 2 for one in values]


def test_length_that_is_rewarded_is_seen() -> None:
    pairs = scores(400, length_weight=0.1)
    figures = pair_figures(pairs)
    found = figures.scores["length_correlation"]
    all_scores = np.concatenate([pairs.chosen, pairs.rejected])
    all_tokens = np.concatenate([pairs.chosen_tokens, pairs.rejected_tokens])
    assert found.value == pytest.approx(np.corrcoef(ranks(all_scores), ranks(all_tokens))[0, 1], abs=1e-9)
    assert 0 < found.low <= found.value <= found.high
    assert figures.by_length[LONGER].value > figures.by_length[SHORTER].value
    assert sum(one.n for one in figures.by_length.values()) == 400
    assert pair_figures(scores(400)).scores["length_correlation"].low < 0.1


@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_pairs_and_equal_ones_have_figures(n: int) -> None:
    ones = np.ones(n, dtype=np.int64)
    pairs = PairScores(np.zeros(n), np.zeros(n), ones, ones)
    figures = pair_figures(pairs)
    assert figures.scores["pair_accuracy"].value == 0.0  # a tie is no preference
    assert list(figures.by_length) == [SAME]
    assert "length_correlation" not in figures.scores
    assert figures.to_dict()["calibration"][0]["low"] == 0.5
    assert reward_section(figures).table[1][0] == "pair accuracy"


def test_judged_answers_have_their_own_figures() -> None:
    is_desirable = np.array([True, False] * 50)
    rewards = np.where(is_desirable, 1.0, -1.0) + RNG.normal(0, 1, 100)
    figures = answer_figures(rewards, is_desirable, RNG.integers(1, 9, 100))
    assert figures.scores["auc"].value == auc(rewards, is_desirable).value > 0.8
    assert figures.scores["desirable_reward"].value == pytest.approx(rewards[is_desirable].mean())
    assert {"ece", "undesirable_reward", "length_correlation"} <= figures.scores.keys()
    one_kind = answer_figures(rewards[::2], is_desirable[::2], RNG.integers(1, 9, 50))
    assert "undesirable_reward" not in one_kind.scores
    assert len(reward_section(one_kind).charts) == 2


def test_the_section_and_the_picture_show_them() -> None:
    figures = pair_figures(scores(100))
    section = reward_section(figures)
    text = "\n".join(" | ".join(row) for row in section.table)
    for part in ("pair accuracy", "calibration error", "mean margin", "length", "chosen longer", "chosen shorter"):
        assert part in text
    assert all(chart.svg for chart in section.charts)
    assert "sigmoid(margin)" in section.caption
    pytest.importorskip("matplotlib")
    assert reward_picture(figures).startswith(b"\x89PNG")


def test_pairs_about_one_thing_are_resampled_together() -> None:
    """Five copies of each pair are no more evidence than one: intervals are those of the pairs, not of the copies."""
    once = scores(40)
    copies = PairScores(*(np.repeat(values, 5) for values in (once.chosen, once.rejected, once.chosen_tokens,
                                                               once.rejected_tokens)))  # fmt: skip
    groups = [f"passage {i // 5}" for i in range(200)]
    alone, together, of_copies = pair_figures(once), pair_figures(copies, groups), pair_figures(copies)
    assert together.scores.keys() == alone.scores.keys()
    for name, one in together.scores.items():
        assert one.value == pytest.approx(alone.scores[name].value)
        assert one.num_groups == 40
        width = one.high - one.low
        assert width > 1.5 * (of_copies.scores[name].high - of_copies.scores[name].low) or name == "length_correlation"
    for name, one in together.by_length.items():
        assert one.num_groups == one.n / 5
        assert one.value == pytest.approx(alone.by_length[name].value)

    longer = once.chosen_tokens > once.rejected_tokens
    of_one = ["only" if is_longer else str(i) for i, is_longer in enumerate(longer)]
    assert LONGER not in pair_figures(once, of_one).by_length, "one group has no interval"

    rewards, is_desirable = RNG.normal(0, 1, 60), np.arange(60) % 2 == 0
    figures = answer_figures(rewards, is_desirable, RNG.integers(1, 9, 60), [str(i // 4) for i in range(60)])
    assert {one.num_groups for one in figures.scores.values()} == {15}
