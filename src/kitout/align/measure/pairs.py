"""Held-out pairs and judged answers: which answer is likelier or scores higher, before and after.

A language model is compared with itself without the adapter: how often the better answer is the likelier one, by the
mean log-probability of its tokens. A reward model has nothing before it; it is compared with always taking the longer
answer, which a reward model often learns instead. It knows prepared runs and metrics, and nothing of pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from kitout.align.measure.reward_figures import (
    AUC,
    PAIR_ACCURACY,
    PairScores,
    RewardFigures,
    answer_figures,
    auc,
    pair_figures,
)
from kitout.align.objectives.kto import KTOObjective
from kitout.align.objectives.preference_objective import PreferenceObjective
from kitout.align.objectives.reward_objective import RewardObjective
from kitout.align.objectives.scored_answers import AnswerScorer
from kitout.align.reference import STARTING, score_rows
from kitout.data.encode.item import EncodedPair, EncodedUnpaired
from kitout.evaluate.compare import BASE, compare
from kitout.evaluate.metrics.measure import Measure, proportion
from kitout.train.config.schema import EvaluateConfig
from kitout.train.loop.jobs import Job
from kitout.train.measure.evaluate import JobOutcome, groups_of, in_groups
from kitout.train.measure.predict import ProgressFn, predict
from kitout.train.setup.prepare import PreparedRun

LONGER = "longer answer"
LOSS = "loss"


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
    run: PreparedRun, job: Job, items: Sequence[Any], config: EvaluateConfig, start: str | None,
    on_progress: ProgressFn | None = None,
) -> tuple[JobOutcome, RewardFigures]:  # fmt: skip
    """A stage on its test split, and what the reward of its loss says of it: of a policy its implicit reward.

    start: the adapter that the policy started from; None: the base.
    """
    items = list(items)[: config.max_test_examples]
    objective, groups = job.objective, groups_of(items)
    if isinstance(objective, KTOObjective):
        with run.kit.use(job.name):
            rewards = predict(run.kit, objective, items, on_progress).predictions
        tokens = np.array([item.num_targets for item in items])
        figures = answer_figures(np.array(rewards), np.array([item.is_desirable for item in items]), tokens, groups)
    else:
        scores, _ = score_pairs(run, job, items, on_progress)
        figures = pair_figures(scores, groups)
    if isinstance(objective, RewardObjective):
        base = {PAIR_ACCURACY: proportion(scores.chosen_tokens > scores.rejected_tokens)}
        tuned = {PAIR_ACCURACY: proportion(scores.chosen > scores.rejected)}
        baseline = LONGER
    else:
        assert isinstance(objective, PreferenceObjective | KTOObjective), "of a stage that trains on answers"
        before, after = (
            likelihood_measures(run, objective.scorer, items, adapter, on_progress) for adapter in (start, job.name)
        )
        base, tuned, baseline = before, after, BASE if start is None else STARTING
    base, tuned = in_groups(base, items), in_groups(tuned, items)
    comparison = compare(base, tuned, (), baseline=baseline)
    scores_by_name = {change.name: change.tuned for change in comparison.changes}
    return JobOutcome(scores_by_name, comparison, items=items, measures=tuned, base_measures=base), figures


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


def validation_metrics(run: PreparedRun, job: Job) -> dict[str, float]:
    """During training: the loss and how often the objective's reward is higher for the better answer."""
    objective = job.objective
    with run.kit.use(job.name), ExitStack() as own:
        if isinstance(objective, KTOObjective):
            own.enter_context(objective.reference_point_of(run.kit, job.validation))
        predicted = predict(run.kit, objective, job.validation)
    metrics = {LOSS: predicted.mean_loss}
    if isinstance(job.validation[0], EncodedPair):
        rewards = np.array(predicted.predictions, dtype=np.float64)
        metrics[PAIR_ACCURACY] = float((rewards[:, 0] > rewards[:, 1]).mean())
    else:
        desirable = np.array([item.is_desirable for item in job.validation])
        metrics[AUC] = auc(np.array(predicted.predictions, dtype=np.float64), desirable).value
    return metrics
