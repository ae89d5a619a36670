"""Held-out prompts: the reward of the policy's answers, and of those of what it started from.

Both answer greedily, so the figure has no luck in it, and the same sources judge. It knows rewards and metrics, and
nothing of pages.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from kitout.align.reference import STARTING
from kitout.align.rewards.mean_reward import reward_measure
from kitout.align.rewards.random_state import fixed_random_state
from kitout.align.rewards.reward import AnswerBatch, RewardValues, WeightedRewards
from kitout.align.rollout import Rollout, SamplingSettings, sample_answers
from kitout.data.encode.item import EncodedPrompt
from kitout.evaluate.ask.batches import ProgressFn
from kitout.evaluate.compare import BASE, SHORT_ANSWER_WORDS, ComparedExample, compare
from kitout.evaluate.metrics.generation import normalize_answer
from kitout.evaluate.metrics.measure import proportion
from kitout.train.config.schema import EvaluateConfig
from kitout.train.measure.evaluate import JobOutcome, groups_of, in_groups
from kitout.train.setup.prepare import PreparedRun

REWARD, MAX_TEXT = "reward", 2000


@dataclass(frozen=True)
class JudgedAnswers:
    """Greedy answers to prompts, and their rewards."""

    rollouts: Sequence[Rollout]
    """One per prompt."""
    values: RewardValues
    """Of each."""


def judge(
    run: PreparedRun, prompts: Sequence[EncodedPrompt], adapter: str | None, sampling: SamplingSettings,
    rewards: WeightedRewards, on_progress: ProgressFn | None = None,
) -> JudgedAnswers:  # fmt: skip
    """adapter: whose answers; None: the base's."""
    with run.kit.use(adapter):
        ids = [prompt.input_ids for prompt in prompts]
        greedy = SamplingSettings(top_k=1, max_new_tokens=sampling.max_new_tokens, stop_ids=sampling.stop_ids)
        rollouts = sample_answers(run.kit, run.tokenizer, ids, greedy, seed=0, step=0, on_progress=on_progress)
    answers = AnswerBatch.of(
        rollouts, [p.prompt for p in prompts], [p.row for p in prompts], [p.location for p in prompts]
    )
    with fixed_random_state(0):
        return JudgedAnswers(rollouts, rewards.score(answers))


def measure_policy(
    run: PreparedRun, name: str, prompts: Sequence[EncodedPrompt], config: EvaluateConfig, start: str | None,
    sampling: SamplingSettings, rewards: WeightedRewards, seen: Collection[float],
    on_progress: ProgressFn | None = None,
) -> JobOutcome | None:  # fmt: skip
    """The policy against what it started from, on its test split. start: an adapter; None: the base.

    seen: rewards of sampled answers; where these and all here are 0 or 1, the mean is a share.

    Prompts of which one of the two answers has no reward are left out of both; None where none is left, or one group
    (`data.group`). Where the data have short answers, exact match with them is measured too.
    """
    prompts = list(prompts)[: config.max_test_examples]
    before, after = (judge(run, prompts, adapter, sampling, rewards, on_progress) for adapter in (start, name))
    judged = [i for i in range(len(prompts))
              if before.values.totals[i] is not None and after.values.totals[i] is not None]  # fmt: skip
    of_judged = [prompts[i] for i in judged]
    if not judged or len(set(groups_of(of_judged)) or (0, 1)) < 2:
        return None
    both = [[float(one.values.totals[i] or 0.0) for i in judged] for one in (before, after)]
    is_share = {*seen, *both[0], *both[1]} <= {0.0, 1.0}
    base, tuned = ({REWARD: reward_measure(values, is_share)} for values in both)
    expected = [normalize_answer(_expected(prompts[i])) for i in judged]
    if all(0 < len(one.split()) <= SHORT_ANSWER_WORDS for one in expected):  # a reward may give a part for a wrong one
        for measures, found in ((base, before), (tuned, after)):
            answers = [normalize_answer(found.rollouts[i].text) for i in judged]
            measures["exact_match"] = proportion(np.array(answers) == np.array(expected))
    shown = [
        ComparedExample(
            _text(prompts[i]), _expected(prompts[i]), before.rollouts[i].text[:MAX_TEXT],
            after.rollouts[i].text[:MAX_TEXT], why="first of the test split",
        )
        for i in judged[: config.show_examples]
    ]  # fmt: skip
    base, tuned = in_groups(base, of_judged), in_groups(tuned, of_judged)
    comparison = compare(base, tuned, shown, baseline=BASE if start is None else STARTING)
    scores = {change.name: change.tuned for change in comparison.changes}
    return JobOutcome(scores, comparison, items=prompts, measures=tuned, base_measures=base)


def _text(prompt: EncodedPrompt) -> str:
    if isinstance(prompt.prompt, str):
        return prompt.prompt
    return str(prompt.prompt[-1].get("content", "")) if prompt.prompt else ""


def _expected(prompt: EncodedPrompt) -> str:
    """The answer that the data have, if they have one."""
    found = (prompt.row.get(name) for name in ("answer", "response"))
    return next((str(value) for value in found if value is not None), "")
