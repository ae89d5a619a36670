"""Held-out pairs and judged answers: which answer is likelier or scores higher, before and after.

A language model is compared with itself without the adapter: how often the better answer is the likelier one, by the
mean log-probability of its tokens. A reward model has nothing before it; it is compared with always taking the longer
answer, which a reward model often learns instead. It knows prepared runs and metrics, and nothing of pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kitout.align.objectives.kto import KTOObjective
from kitout.align.objectives.preference_objective import PreferenceObjective
from kitout.align.objectives.reward_objective import RewardObjective
from kitout.align.objectives.scored_answers import AnswerScorer
from kitout.align.reference import score_rows
from kitout.data.encode.item import EncodedPair, EncodedUnpaired
from kitout.evaluate.compare import BASE, compare
from kitout.evaluate.metrics.measure import Measure, proportion
from kitout.train.config.schema import EvaluateConfig
from kitout.train.loop.jobs import Job
from kitout.train.measure.evaluate import JobOutcome
from kitout.train.measure.predict import ProgressFn, predict
from kitout.train.setup.prepare import PreparedRun

LONGER = "longer answer"
PAIR_ACCURACY, AUC, LOSS = "pair_accuracy", "auc", "loss"


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


def score_pairs(
    run: PreparedRun, job: Job, pairs: Sequence[EncodedPair], on_progress: ProgressFn | None = None
) -> tuple[PairScores, list[float]]:
    """Under the job's adapter; also the loss of each pair."""
    with run.kit.use(job.name):
        predicted = predict(run.kit, job.objective, pairs, on_progress)
    rewards = np.array(predicted.predictions, dtype=np.float64).reshape(-1, 2)
    tokens = np.array([(pair.chosen.num_targets, pair.rejected.num_targets) for pair in pairs]).reshape(-1, 2)
    scores = PairScores(rewards[:, 0], rewards[:, 1], tokens[:, 0], tokens[:, 1])
    return scores, [sums.loss for sums in predicted.losses]


def measure_answers(
    run: PreparedRun, job: Job, items: Sequence[Any], config: EvaluateConfig, reference: str | None,
    on_progress: ProgressFn | None = None,
) -> JobOutcome:  # fmt: skip
    """A stage on its test split. reference: the adapter that the policy started from; None: the base."""
    items = list(items)[: config.max_test_examples]
    objective = job.objective
    if isinstance(objective, RewardObjective):
        scores, _ = score_pairs(run, job, items, on_progress)
        base = {PAIR_ACCURACY: proportion(scores.chosen_tokens > scores.rejected_tokens)}
        tuned = {PAIR_ACCURACY: proportion(scores.chosen > scores.rejected)}
        baseline = LONGER
    else:
        assert isinstance(objective, PreferenceObjective | KTOObjective), "of a stage that trains on answers"
        before, after = (
            likelihood_measures(run, objective.scorer, items, adapter, on_progress) for adapter in (reference, job.name)
        )
        base, tuned, baseline = before, after, BASE if reference is None else reference
    comparison = compare(base, tuned, (), baseline=baseline)
    scores_by_name = {change.name: change.tuned for change in comparison.changes}
    return JobOutcome(scores_by_name, comparison, items=items, measures=tuned, base_measures=base)


def likelihood_measures(
    run: PreparedRun, scorer: AnswerScorer, items: Sequence[EncodedPair | EncodedUnpaired], adapter: str | None,
    on_progress: ProgressFn | None = None,
) -> dict[str, Measure]:  # fmt: skip
    """How well the likelihood of answers tells better from worse. adapter: under which; None: the base."""
    rows = [row for item in items for row in item.rows]
    means = np.array([one.mean().item() for one in score_rows(run.kit, scorer, rows, adapter, on_progress)])
    if isinstance(items[0], EncodedPair):
        chosen, rejected = means.reshape(-1, 2).T
        return {PAIR_ACCURACY: proportion(chosen > rejected)}
    desirable = np.array([item.is_desirable for item in items if isinstance(item, EncodedUnpaired)])
    return {AUC: auc(means, desirable)}


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


def validation_metrics(run: PreparedRun, job: Job) -> dict[str, float]:
    """During training: the loss and how often the objective's reward is higher for the better answer."""
    with run.kit.use(job.name):
        predicted = predict(run.kit, job.objective, job.validation)
    metrics = {LOSS: predicted.mean_loss}
    if isinstance(job.validation[0], EncodedPair):
        rewards = np.array(predicted.predictions, dtype=np.float64)
        metrics[PAIR_ACCURACY] = float((rewards[:, 0] > rewards[:, 1]).mean())
    else:
        desirable = np.array([item.is_desirable for item in job.validation])
        metrics[AUC] = auc(np.array(predicted.predictions, dtype=np.float64), desirable).value
    return metrics
