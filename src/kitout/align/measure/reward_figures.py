"""What held-out answers say of a reward: accuracy, calibration, margins, and whether it is length that is rewarded.

Of pairs the probability that the chosen answer is the better one is sigmoid(margin), as Bradley-Terry has it; so the
confidence in the preferred answer is sigmoid(|margin|), from 0.5 to 1, in 10 bins. Of judged answers it is
sigmoid(reward), from 0 to 1. Every figure has its 95 % interval; both answers of a pair are resampled together. It
knows scores and lengths, no model and no page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kitout.evaluate.metrics.calibration import CalibrationBin, calibration_bins, calibration_error
from kitout.evaluate.metrics.measure import Measure, Score, mean, proportion
from kitout.evaluate.metrics.registry import compute_measures

PAIR_ACCURACY, AUC = "pair_accuracy", "auc"
NUM_BINS = 10
QUANTILES = (5, 25, 50, 75, 95)  # % of margins
LONGER, SHORTER, SAME = "chosen longer", "chosen shorter", "same length"

Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class PairScores:
    """What an objective makes of held-out pairs, pair by pair."""

    chosen: NDArray[np.float64]
    """Reward of the chosen answer, as the loss has it."""
    rejected: NDArray[np.float64]
    """Reward of the rejected answer."""
    chosen_tokens: NDArray[np.int64]
    """Tokens of the chosen answer."""
    rejected_tokens: NDArray[np.int64]
    """Tokens of the rejected answer."""


@dataclass(frozen=True, eq=False)
class RewardFigures:
    """The figures of one set of held-out answers."""

    scores: Mapping[str, Score]
    """By name: the headline, ece, the margin, and the correlation with length where it is defined."""
    by_length: Mapping[str, Score]
    """Of pairs, the accuracy by which answer is longer; kinds without a pair, or of one group, are left out."""
    bins: Sequence[CalibrationBin]
    """Confidence and how often it was right."""
    values: Mapping[str, Values]
    """What is drawn as a histogram: margins, or rewards of desirable and undesirable answers."""

    def to_dict(self) -> dict[str, Any]:
        """What results.json holds."""
        return {
            "scores": {name: asdict(one) for name, one in self.scores.items()},
            "by_length": {name: asdict(one) for name, one in self.by_length.items()},
            "calibration": [asdict(one) for one in self.bins],
            "quantiles": {
                name: {str(q): float(np.percentile(values, q)) for q in QUANTILES}
                for name, values in self.values.items()
                if len(values)
            },
        }


def pair_figures(pairs: PairScores, groups: Sequence[str] = ()) -> RewardFigures:
    """Of pairs; one at least. groups: of each pair, where several are about one thing (`data.group`)."""
    margins = pairs.chosen - pairs.rejected
    is_right, confidence = margins > 0, _sigmoid(np.abs(margins))
    longer = np.sign(pairs.chosen_tokens - pairs.rejected_tokens)
    scores = {
        PAIR_ACCURACY: _score(proportion(is_right), groups),
        "ece": _score(calibration_error(confidence, is_right, NUM_BINS, 0.5), groups),
        "margin": _score(mean(margins, is_fraction=False), groups),
        **_length_correlation(
            np.concatenate([pairs.chosen, pairs.rejected]),
            np.concatenate([pairs.chosen_tokens, pairs.rejected_tokens]),
            np.tile(groups or np.arange(len(margins)), 2),
        ),
    }
    by_length = {
        name: _score(proportion(is_right[longer == sign]), _some(groups, longer == sign))
        for name, sign in ((LONGER, 1), (SHORTER, -1), (SAME, 0))
        if _is_enough(groups, longer == sign)
    }
    return RewardFigures(
        scores, by_length, calibration_bins(confidence, is_right, NUM_BINS, 0.5), {"margin": margins}
    )  # fmt: skip


def answer_figures(
    rewards: Values, is_desirable: NDArray[np.bool_], tokens: NDArray[np.int64], groups: Sequence[str] = ()
) -> RewardFigures:  # fmt: skip
    """Of judged answers; one at least. groups: as of pairs."""
    probability = _sigmoid(rewards)
    of_kind = {"desirable": is_desirable, "undesirable": ~is_desirable}
    kinds = {name: rewards[chosen] for name, chosen in of_kind.items()}
    scores = {
        AUC: _score(auc(rewards, is_desirable), groups),
        "ece": _score(calibration_error(probability, is_desirable, NUM_BINS), groups),
        **{
            f"{name}_reward": _score(mean(kinds[name], is_fraction=False), _some(groups, chosen))
            for name, chosen in of_kind.items()
            if _is_enough(groups, chosen)
        },
        **_length_correlation(rewards, tokens, np.array(groups or np.arange(len(rewards)))),
    }
    bins = calibration_bins(probability, is_desirable, NUM_BINS)
    return RewardFigures(scores, {}, bins, {f"{name} answers": values for name, values in kinds.items()})


def auc(scores: NDArray[np.float64], is_positive: NDArray[np.bool_]) -> Measure:
    """The share of (positive, negative) pairs in which the positive scores higher; a tie counts half."""

    def value(weights: NDArray[np.float64]) -> float:
        order = np.argsort(scores, kind="stable")
        ranked, positive = scores[order], np.where(is_positive, weights, 0.0)[order]
        negative = np.where(is_positive, 0.0, weights)[order]
        _, group = np.unique(ranked, return_inverse=True)
        positive_of, negative_of = np.bincount(group, positive), np.bincount(group, negative)
        below = np.cumsum(negative_of) - negative_of
        total = positive_of.sum() * negative_of.sum()
        return float((positive_of * (below + negative_of / 2)).sum() / total) if total else 0.5

    return Measure(value, len(scores))


def _score(measure: Measure, groups: Sequence[str]) -> Score:
    return (measure.grouped(groups) if groups else measure).score()


def _some(groups: Sequence[str], chosen: NDArray[np.bool_]) -> list[str]:
    return [group for group, is_one in zip(groups, chosen, strict=True) if is_one] if groups else []


def _is_enough(groups: Sequence[str], chosen: NDArray[np.bool_]) -> bool:
    """Whether these have an interval: one of them, or two groups where there are groups."""
    return len(set(_some(groups, chosen))) > 1 if groups else bool(chosen.any())


def _sigmoid(values: Values) -> Values:
    return np.asarray(0.5 * (1.0 + np.tanh(values / 2)), dtype=np.float64)


def _length_correlation(scores: Values, tokens: NDArray[np.int64], groups: NDArray[Any]) -> dict[str, Score]:
    """Spearman's, of score and tokens; nothing where one of both is constant or there is one group."""
    if len(set(groups.tolist())) < 2 or len(set(tokens.tolist())) < 2 or len(set(scores.tolist())) < 2:
        return {}
    measures = compute_measures("regression", scores.tolist(), tokens.astype(np.float64).tolist(), only=["spearman"])
    correlation: Measure = measures["spearman"]
    score = correlation.grouped(groups).score()
    # resamples of a few answers have more ties than the answers, which moves all of them to one side
    return {"length_correlation": replace(score, low=min(score.low, score.value), high=max(score.high, score.value))}
