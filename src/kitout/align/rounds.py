"""Rounds of reinforcement: prompts are answered by the policy, judged, scored and weighed; then steps train on them.

A round is a function of the seed, its number and the values of the adapters: the same run writes the same answers, and
a resume in the middle of a round takes it from the checkpoint. It knows the order of this work; sampling, rewards,
roles, advantages and losses are the modules' beside it.
"""

from __future__ import annotations

import math
import random
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kitout.align.completions_log import completion_lines, write_completions
from kitout.align.config.losses import GRPOLoss, PPOLoss, RLOOLoss
from kitout.align.losses import advantages as estimates
from kitout.align.losses.divergence import AdaptiveKL, k1
from kitout.align.objectives.answer_order import order_answers
from kitout.align.objectives.policy import SampledAnswer
from kitout.align.objectives.scored_answers import AnswerScorer, SharedBatch
from kitout.align.rewards.mean_reward import reward_measure
from kitout.align.rewards.random_state import fixed_random_state
from kitout.align.rewards.reward import AnswerBatch, RewardValues, WeightedRewards
from kitout.align.roles import Answer, roles
from kitout.align.rollout import Rollout, SamplingSettings, sample_answers
from kitout.base.eval_mode import eval_mode
from kitout.data.encode.item import IGNORE_INDEX, EncodedExample, EncodedPrompt
from kitout.errors import ConfigError
from kitout.kit import Kit
from kitout.route import RouteEntry
from kitout.train.loop.step import combine_seeds
from kitout.train.measure.predict import plan_lengths
from kitout.train.metrics_log import MetricsLog
from kitout.train.objectives.answer_rows import collate_rows
from kitout.train.objectives.objective import Batch

TENSORS = ("advantages", "old", "reference", "values", "returns")  # of a SampledAnswer


@dataclass(frozen=True)
class RoundPlan:
    """Which prompts every round answers, and which of its answers every step trains on; fixed before the first step."""

    prompts: Sequence[Sequence[int]]
    """By round, indices of prompts."""
    samples: int
    """Answers to each."""
    batches: Sequence[Sequence[int]]
    """By step of the run, indices of the answers of its round."""

    steps_per_round: int
    """Optimizer steps on the same answers."""

    @classmethod
    def of(
        cls, prompts: Sequence[Sequence[int]], samples: int, passes: int, parts: int, steps: int | None, seed: int
    ) -> RoundPlan:  # fmt: skip
        """Each pass over a round is shuffled by the seed and cut into so many parts, one for a step.

        steps: of the run at most; None: of all these prompts.
        """
        rng = random.Random(seed)
        per_round = passes * parts
        steps = len(prompts) * per_round if steps is None else min(steps, len(prompts) * per_round)
        rounds = prompts[: math.ceil(steps / per_round)]
        batches: list[list[int]] = []
        for of_round in rounds:
            for _ in range(passes):
                order = list(range(len(of_round) * samples))
                rng.shuffle(order)
                size = len(order) // parts
                batches += [sorted(order[start : start + size]) for start in range(0, size * parts, size)]
        return cls(rounds, samples, batches[:steps], per_round)


@dataclass(frozen=True)
class Roles:
    """Who takes part, each by the name of its adapter."""

    policy: str
    """Writes the answers and is trained."""
    reference: str | None = None
    """The distance to it is penalized; None: the base."""
    value: str | None = None
    """Says what is still to come, and is trained; None: no role in this loss."""


class Rounds:
    """The `StepData` of a run of reinforcement: fills `answers`, which all its jobs train on."""

    answers: list[Any]
    """SampledAnswer of the round in progress, the longest first. In the first of its steps the policy is still what
    wrote them, so there `old` is not set: the ratio is 1 exactly, whatever the rounding of another pass."""
    kl_state: AdaptiveKL | None
    """Steers beta to a target; None: beta stays as it is set."""
    last: dict[str, float]
    """Metrics of the last round."""
    rows_of_forward: Callable[[], int]
    """How many answers a forward of a step takes at most; the loop may halve it. All of them until it is set."""

    def __init__(
        self, kit: Kit, tokenizer: Any, who: Roles, prompts: Sequence[EncodedPrompt], plan: RoundPlan,
        loss: GRPOLoss | RLOOLoss | PPOLoss, sampling: SamplingSettings, rewards: WeightedRewards, seed: int,
        log: MetricsLog, scorer: AnswerScorer | None = None,
    ) -> None:  # fmt: skip
        self.kit, self.tokenizer, self.who, self.prompts, self.plan = kit, tokenizer, who, prompts, plan
        self.loss, self.sampling, self.rewards, self.seed, self.log = loss, sampling, rewards, seed, log
        self.scorer = scorer
        self.answers, self._round, self.last, self.kl_state = [], list[SampledAnswer](), {}, None
        self.rows_of_forward = lambda: len(plan.prompts[0]) * plan.samples
        self._kl: float | None = None
        self._explained = math.nan
        if isinstance(loss, PPOLoss) and loss.kl_target is not None:
            self.kl_state = AdaptiveKL(loss.beta, loss.kl_target, loss.kl_horizon)

    @property
    def beta(self) -> float:
        """The weight of the distance to the reference, now."""
        return self.loss.beta if self.kl_state is None else self.kl_state.beta

    # ---- what the loop calls -------------------------------------------------------------------------------------

    def before_step(self, step: int) -> None:
        number, within = divmod(step, self.plan.steps_per_round)
        if not within:
            with eval_mode(self.kit.base, self.kit):
                self._round = self._make_round(number, step)
        self.answers[:] = self._round if within else [replace(answer, old=None) for answer in self._round]

    def metrics(self) -> dict[str, float]:
        return dict(self.last)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        named = [(f"{i}.{name}", getattr(a, name)) for i, a in enumerate(self._round) for name in TENSORS]
        rows = [(a.row.input_ids, a.row.prompt_length, a.row.location, a.row.num_targets > 0) for a in self._round]
        values = {"rows": rows, "metrics": self.last, "beta": None if self.kl_state is None else self.kl_state.beta}
        return values, {name: value for name, value in named if value is not None}

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._round = [
            SampledAnswer(
                answer_row(tuple(ids), prompt_length, location, is_trained),
                tensors[f"{i}.advantages"],
                **{name: tensors.get(f"{i}.{name}") for name in TENSORS[1:]},
            )
            for i, (ids, prompt_length, location, is_trained) in enumerate(values["rows"])
        ]
        self.last = values["metrics"]
        if self.kl_state is not None:
            self.kl_state = replace(self.kl_state, beta=values["beta"])

    # ---- one round -----------------------------------------------------------------------------------------------

    def _make_round(self, number: int, step: int) -> list[SampledAnswer]:
        prompts = [self.prompts[i] for i in self.plan.prompts[number]]
        with self.kit.use(self.who.policy):
            rollouts = sample_answers(
                self.kit, self.tokenizer, [prompt.input_ids for prompt in prompts], self.sampling,
                seed=self.seed, step=number, samples=self.plan.samples,
            )  # fmt: skip
        answers = AnswerBatch.of(
            rollouts, [p.prompt for p in prompts], [p.row for p in prompts], [p.location for p in prompts]
        )
        with fixed_random_state(combine_seeds(self.seed, number)):
            values = self.rewards.score(answers)
        if all(total is None for total in values.totals):
            found = f"no reward source judged any of the {len(values.totals)} answers (all None)"
            advice = f"look at what {', '.join(values.names)} returns"
            if not self.last:  # of the first round
                raise ConfigError(f"step {step + 1}: {found}: {advice}")
            warnings.warn(f"in some rounds {found}, so nothing was trained: {advice}", RuntimeWarning, stacklevel=2)
        weighed = self._weigh(rollouts, answers, values)
        self.last = self._round_metrics(rollouts, values)
        weights = [float(one.advantages.mean()) if len(one.advantages) else None for one in weighed]
        write_completions(self.log, completion_lines(step + 1, rollouts, answers, values, weights))
        shares = self.scorer is not None and self.scorer.shares_prompts
        return order_answers(weighed, self.plan.samples, self.rows_of_forward(), shares)

    def _weigh(
        self, rollouts: Sequence[Rollout], answers: AnswerBatch, values: RewardValues
    ) -> list[SampledAnswer]:  # fmt: skip
        """The answers with everything that the losses need of them."""
        loss, scores = self.loss, estimates.score_tensor(values.totals)
        is_left_out = [False] * len(rollouts)
        if isinstance(loss, PPOLoss):
            is_left_out = scores.isnan().tolist()
        elif isinstance(loss, GRPOLoss) and loss.mask_truncated:
            is_left_out = [not one.ended for one in rollouts]
        rows = [
            answer_row(row.input_ids, row.prompt_length, row.location, not left_out)
            for row, left_out in zip(answers.encoded, is_left_out, strict=True)
        ]
        repeats = self.plan.steps_per_round > 1
        wanted: dict[RouteEntry, Answer] = {}
        if repeats or not isinstance(loss, GRPOLoss):
            wanted[self.who.policy] = "tokens"
        if self.beta > 0:
            wanted[self.who.reference] = "tokens"
        if self.who.value is not None:
            wanted[self.who.value] = "all"
        said = self._ask(rows, wanted)
        old, reference = said.get(self.who.policy), said.get(self.who.reference)
        self._kl = _mean_kl(old, reference)
        if isinstance(loss, PPOLoss):
            assert old is not None, "ppo asks the policy"
            return self._weigh_tokens(rollouts, rows, scores, old, reference, said[self.who.value])
        if isinstance(loss, RLOOLoss):
            kl = None
            if old is not None and reference is not None:
                kl = torch.stack([k1(o, q).sum() for o, q in zip(old, reference, strict=True)])
            weights = estimates.rloo_advantages(scores, self.plan.samples, kl=kl, beta=self.beta)
        else:
            weights = estimates.group_advantages(scores, self.plan.samples, loss.scale)
        return [
            SampledAnswer(row, weights[i : i + 1].float(), _at(old if repeats else None, i), _at(reference, i))
            for i, row in enumerate(rows)
        ]

    def _weigh_tokens(
        self, rollouts: Sequence[Rollout], rows: Sequence[EncodedExample], scores: Tensor, old: Sequence[Tensor],
        reference: Sequence[Tensor] | None, values: Sequence[Tensor],
    ) -> list[SampledAnswer]:  # fmt: skip
        """PPO: an advantage and a return for every token."""
        loss = self.loss
        assert isinstance(loss, PPOLoss), "which weighs tokens"
        has_end = torch.tensor([one.ended for one in rollouts])
        scores = estimates.scores_without_end(scores, has_end, penalty=loss.missing_end_penalty or 0.0)
        if loss.whiten_rewards:
            scores = torch.where(scores.isnan(), scores, estimates.whiten(scores, ~scores.isnan(), shift_mean=False))
        counts = [row.num_targets for row in rows]
        owners = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts))
        flat_old, flat_values = torch.cat(list(old)), torch.cat(list(values))
        flat_reference = flat_old if reference is None else torch.cat(list(reference))
        rewards = estimates.token_rewards(
            scores.nan_to_num(0.0), flat_old, flat_reference, owners, len(rows), beta=self.beta
        )
        weights, returns = estimates.gae(rewards, flat_values, owners, len(rows), gamma=loss.gamma, lam=loss.lambda_)
        self._explained = estimates.explained_variance(flat_values, returns)
        weights_of, returns_of = estimates.whiten(weights).float().split(counts), returns.float().split(counts)
        return [
            SampledAnswer(row, weights_of[i], old[i], _at(reference, i), values[i], returns_of[i])
            for i, row in enumerate(rows)
        ]

    def _ask(
        self, rows: Sequence[EncodedExample], wanted: Mapping[RouteEntry, Answer]
    ) -> dict[RouteEntry, list[Tensor]]:  # fmt: skip
        """What each role says of every token of each answer, [T] of float32."""
        found: dict[RouteEntry, dict[int, Tensor]] = {role: {} for role in wanted}
        for indices in plan_lengths([row.length for row in rows]) if wanted else ():
            counts = [rows[i].num_targets for i in indices]
            for role, values in self._ask_batch([rows[i] for i in indices], wanted).items():
                found[role] |= zip(indices, values.float().cpu().split(counts), strict=True)
        return {role: [by_row[i] for i in range(len(rows))] for role, by_row in found.items()}

    def _ask_batch(
        self, rows: Sequence[EncodedExample], wanted: Mapping[RouteEntry, Answer]
    ) -> dict[RouteEntry, Tensor]:  # fmt: skip
        """One batch. Log-probabilities are taken as the steps take them where a prompt of several rows runs once."""
        batch: Batch = collate_rows(rows, self.kit.device) if self.scorer is None else self.scorer.collate(rows)
        if self.scorer is None or not (isinstance(batch, SharedBatch) and batch.shared is not None):
            return roles(self.kit, batch, wanted, temperature=self.sampling.temperature)
        found: dict[RouteEntry, Tensor] = {}
        for role, answer in wanted.items():
            if answer == "tokens":
                with self.kit.use(role):
                    found[role] = self.scorer(self.kit, batch)[0]
            else:
                found |= roles(self.kit, batch, {role: answer})
        return found

    def _round_metrics(self, rollouts: Sequence[Rollout], values: RewardValues) -> dict[str, float]:
        judged = [total for total in values.totals if total is not None]
        metrics = _reward_metrics("reward", values.totals, self.plan.samples)
        if len(values.names) > 1:
            for name, column in zip(values.names, zip(*values.by_source, strict=True), strict=True):
                metrics |= _reward_metrics(_source_metric(name), column, self.plan.samples)
        if self.plan.samples > 1:
            spread = estimates.has_spread(estimates.score_tensor(values.totals), self.plan.samples)
            metrics["groups_without_spread"] = 1.0 - spread.float().mean().item()
        metrics |= {
            "answer_tokens": sum(len(one.answer_ids) for one in rollouts) / len(rollouts),
            "ended": sum(one.ended for one in rollouts) / len(rollouts),
            "unjudged": 1.0 - len(judged) / len(rollouts),
        }
        if self._kl is not None:
            metrics["kl_to_reference"] = self._kl
            if self.kl_state is not None:
                self.kl_state = self.kl_state.update(self._kl, len(rollouts))
                metrics["beta"] = self.kl_state.beta
        if isinstance(self.loss, PPOLoss):
            metrics["explained_variance"] = self._explained
        return metrics


def answer_row(
    ids: tuple[int, ...], prompt_length: int, location: str = "", is_trained: bool = True
) -> EncodedExample:  # fmt: skip
    """Prompt and answer; one that is not trained on has no target."""
    labels = (IGNORE_INDEX,) * prompt_length + ids[prompt_length:]
    if not is_trained:
        labels = (IGNORE_INDEX,) * len(ids)
    return EncodedExample(ids, labels, prompt_length=prompt_length, location=location)


def _at(values: Sequence[Tensor] | None, index: int) -> Tensor | None:
    return None if values is None else values[index]


def _source_metric(name: str) -> str:
    """What the rewards of a source are logged as: no other adapter's metric (/), and no end of an interval."""
    unambiguous = re.sub("(^|_)(low|high)$", r".\2", name.replace("/", "."))
    return f"reward_{unambiguous}"


def _reward_metrics(name: str, values: Sequence[float | None], samples: int) -> dict[str, float]:
    """The mean over a round's answers, with its 95 % interval where there are two prompts: their answers are alike."""
    judged = [(i // samples, value) for i, value in enumerate(values) if value is not None]
    if not judged:
        return {}
    groups, rewards = zip(*judged, strict=True)
    measure = reward_measure(rewards)
    if len(set(groups)) < 2:
        return {name: measure.value}
    score = measure.grouped(groups).score()
    return {name: score.value, f"{name}_low": score.low, f"{name}_high": score.high}


def _mean_kl(old: Sequence[Tensor] | None, reference: Sequence[Tensor] | None) -> float | None:
    """Nats per answer by k1, of the policy that wrote them; None where one of both is not known."""
    if old is None or reference is None:
        return None
    scored = [float(k1(o, q).sum()) for o, q in zip(old, reference, strict=True) if len(o)]
    return math.fsum(scored) / len(scored) if scored else None
