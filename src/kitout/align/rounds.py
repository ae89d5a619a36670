"""Rounds of reinforcement: prompts are answered by the policy, judged, scored and weighed; then steps train on them.

A round is a function of the seed, its number and the values of the adapters: the same run writes the same answers, and a
resume in the middle of a round takes it from the checkpoint. Everything is kept as plain tensors by answer. It knows the
order of this work; sampling, rewards, advantages and losses are the modules' beside it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kitout.align.completions_log import completion_lines, write_completions
from kitout.align.config.losses import GRPOLoss, PPOLoss, RLOOLoss
from kitout.align.losses import advantages as estimates
from kitout.align.losses.divergence import AdaptiveKL, k1
from kitout.align.objectives.policy import SampledAnswer
from kitout.align.objectives.scored_answers import AnswerScorer
from kitout.align.reference import score_rows
from kitout.align.rewards.reward import AnswerBatch, RewardValues, WeightedRewards
from kitout.align.rollout import Rollout, SamplingSettings, sample_answers
from kitout.align.scalar_head import scalars
from kitout.base.eval_mode import eval_mode
from kitout.data.encode.item import IGNORE_INDEX, EncodedExample, EncodedPrompt
from kitout.errors import ConfigError
from kitout.kit import Kit
from kitout.train.measure.predict import plan_lengths
from kitout.train.metrics_log import MetricsLog
from kitout.train.objectives.answer_rows import collate_rows

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

    @property
    def steps_per_round(self) -> int:
        """Optimizer steps on the same answers."""
        return len(self.batches) // len(self.prompts)


def plan_steps(num_rounds: int, answers: int, passes: int, parts: int, seed: int) -> list[list[int]]:
    """Of every step its answers: each pass over a round is shuffled by the seed and cut into so many parts."""
    rng = random.Random(seed)
    steps = []
    for _ in range(num_rounds * passes):
        order = list(range(answers))
        if parts > 1:
            rng.shuffle(order)
        size = answers // parts
        steps += [sorted(order[start : start + size]) for start in range(0, size * parts, size)]
    return steps


@dataclass(frozen=True, eq=False)
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
    """SampledAnswer of the round in progress."""
    kl_state: AdaptiveKL | None
    """Steers beta to a target; None: beta stays as it is set."""
    last: dict[str, float]
    """Metrics of the last round."""
    on_round: Callable[[int, Mapping[str, float]], None] | None
    """Called after each round with its step and metrics."""

    def __init__(
        self, kit: Kit, tokenizer: Any, roles: Roles, prompts: Sequence[EncodedPrompt], plan: RoundPlan,
        loss: GRPOLoss | RLOOLoss | PPOLoss, sampling: SamplingSettings, rewards: WeightedRewards, scorer: AnswerScorer,
        seed: int, log: MetricsLog | None = None,
    ) -> None:  # fmt: skip
        self.kit, self.tokenizer, self.roles, self.prompts, self.plan = kit, tokenizer, roles, prompts, plan
        self.loss, self.sampling, self.rewards, self.scorer, self.seed = loss, sampling, rewards, scorer, seed
        self.log, self.answers, self.last, self.on_round = log, [], {}, None
        self._explained = math.nan
        target = loss.kl_target if isinstance(loss, PPOLoss) else None
        self.kl_state = None
        if isinstance(loss, PPOLoss) and target is not None:
            self.kl_state = AdaptiveKL(loss.beta, target, loss.kl_horizon)

    @property
    def beta(self) -> float:
        """The weight of the distance to the reference, now."""
        return self.loss.beta if self.kl_state is None else self.kl_state.beta

    # ---- what the loop calls -------------------------------------------------------------------------------------

    def before_step(self, step: int) -> None:
        number, within = divmod(step, self.plan.steps_per_round)
        if within:
            return
        with eval_mode(self.kit.base, self.kit):
            self._make_round(number, step)
        if self.on_round is not None:
            self.on_round(step, self.last)

    def metrics(self) -> dict[str, float]:
        return dict(self.last)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors = {
            f"{i}.{name}": value
            for i, answer in enumerate(self.answers)
            for name in TENSORS
            if (value := getattr(answer, name)) is not None
        }
        rows = [(list(a.row.input_ids), a.row.prompt_length, a.row.num_targets > 0) for a in self.answers]
        kl_state = None if self.kl_state is None else self.kl_state.beta
        return {"rows": rows, "metrics": self.last, "beta": kl_state}, tensors

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.answers[:] = [
            SampledAnswer(
                answer_row(tuple(ids), prompt_length, is_trained), **{name: tensors.get(f"{i}.{name}") for name in TENSORS}
            )
            for i, (ids, prompt_length, is_trained) in enumerate(values["rows"])
        ]
        self.last = values["metrics"]
        if self.kl_state is not None:
            self.kl_state = replace(self.kl_state, beta=values["beta"])

    # ---- one round -----------------------------------------------------------------------------------------------

    def _make_round(self, number: int, step: int) -> None:
        indices = self.plan.prompts[number]
        prompts = [self.prompts[i] for i in indices]
        with self.kit.use(self.roles.policy):
            rollouts = sample_answers(
                self.kit, self.tokenizer, [prompt.input_ids for prompt in prompts], self.sampling,
                seed=self.seed, step=number, samples=self.plan.samples,
            )  # fmt: skip
        answers = AnswerBatch.of(
            rollouts, [p.prompt for p in prompts], [p.row for p in prompts], [p.location for p in prompts]
        )
        values = self.rewards.score(answers)
        if all(total is None for total in values.totals):
            raise ConfigError(
                f"step {step + 1}: no reward source judged any of the {len(values.totals)} answers (all None): look at "
                f"what {', '.join(values.names)} returns"
            )
        self.answers[:] = self._weigh(rollouts, answers, values)
        self.last = self._round_metrics(rollouts, values)
        if self.log is not None:
            weights = [float(answer.advantages.mean()) for answer in self.answers]
            write_completions(self.log, completion_lines(step + 1, rollouts, answers, values, weights))

    def _weigh(self, rollouts: Sequence[Rollout], answers: AnswerBatch, values: RewardValues) -> list[SampledAnswer]:
        """The answers with everything that the losses need of them."""
        loss, rows = self.loss, list(answers.encoded)
        if isinstance(loss, GRPOLoss) and loss.mask_truncated:
            rows = [
                row if r.ended else answer_row(row.input_ids, row.prompt_length, False)
                for row, r in zip(rows, rollouts, strict=True)
            ]
        scores = estimates.score_tensor(values.totals)
        reference = score_rows(self.kit, self.scorer, rows, self.roles.reference) if self.beta > 0 else None
        repeats = self.plan.steps_per_round > 1 or not isinstance(loss, GRPOLoss)
        old = score_rows(self.kit, self.scorer, rows, self.roles.policy) if repeats else None
        if isinstance(loss, PPOLoss):
            return self._weigh_tokens(rollouts, rows, scores, old, reference)
        if isinstance(loss, RLOOLoss):
            kl = None
            if reference is not None and old is not None:
                kl = torch.stack([k1(o, q).sum() for o, q in zip(old, reference, strict=True)])
            weights = estimates.rloo_advantages(scores, self.plan.samples, kl=kl, beta=self.beta)
        else:
            weights = estimates.group_advantages(scores, self.plan.samples, loss.scale)
        old = old if self.plan.steps_per_round > 1 else None
        return [
            SampledAnswer(row, weights[i : i + 1].float(), _at(old, i), _at(reference, i)) for i, row in enumerate(rows)
        ]

    def _weigh_tokens(
        self, rollouts: Sequence[Rollout], rows: Sequence[EncodedExample], scores: Tensor,
        old: list[Tensor] | None, reference: list[Tensor] | None,
    ) -> list[SampledAnswer]:  # fmt: skip
        """PPO: an advantage and a return for every token. Answers without a score are left untrained."""
        loss = self.loss
        assert isinstance(loss, PPOLoss) and old is not None and self.roles.value is not None, "a stage of kind ppo"
        rows = [row if not math.isnan(s) else answer_row(row.input_ids, row.prompt_length, False)
                for row, s in zip(rows, scores.tolist(), strict=True)]  # fmt: skip
        has_end = torch.tensor([one.ended for one in rollouts])
        scores = estimates.scores_without_end(scores, has_end, penalty=loss.missing_end_penalty or 0.0).nan_to_num(0.0)
        if loss.whiten_rewards:
            scores = estimates.whiten(scores, shift_mean=False)
        counts = [row.num_targets for row in rows]
        old = [one[:count] for one, count in zip(old, counts, strict=True)]
        values = self._values(rows)
        owners = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts))
        flat_old, flat_values = torch.cat(old), torch.cat(values)
        flat_reference = flat_old if reference is None else torch.cat(
            [one[:count] for one, count in zip(reference, counts, strict=True)]
        )  # fmt: skip
        rewards = estimates.token_rewards(scores, flat_old, flat_reference, owners, len(rows), beta=self.beta)
        flat, returns = estimates.gae(rewards, flat_values, owners, len(rows), gamma=loss.gamma, lam=loss.lambda_)
        self._explained = estimates.explained_variance(flat_values, returns)
        weights, kept = estimates.whiten(flat).float().split(counts), returns.float().split(counts)
        references = [None] * len(rows) if reference is None else list(flat_reference.split(counts))
        return [SampledAnswer(row, weights[i], old[i], references[i], values[i], kept[i]) for i, row in enumerate(rows)]

    def _values(self, rows: Sequence[EncodedExample]) -> list[Tensor]:
        """What the value adapter says before every token of each answer."""
        found: list[tuple[int, Tensor]] = []
        with self.kit.use(self.roles.value):
            for indices in plan_lengths([row.length for row in rows]):
                batch = collate_rows([rows[i] for i in indices], self.kit.device)
                values = scalars(lambda inputs=batch.inputs: self.kit(**inputs), self.kit)  # type: ignore[misc]
                counts = [rows[i].num_targets for i in indices]
                at_targets = values.reshape(-1)[batch.targets["positions"]].float().cpu()
                found += zip(indices, at_targets.split(counts), strict=True)
        return [values for _, values in sorted(found, key=lambda pair: pair[0])]

    def _round_metrics(self, rollouts: Sequence[Rollout], values: RewardValues) -> dict[str, float]:
        judged = [total for total in values.totals if total is not None]
        lengths = [len(one.answer_ids) for one in rollouts]
        metrics = {"reward": math.fsum(judged) / len(judged)}
        if len(values.names) > 1:
            metrics |= {f"reward_{name}": value for name, value in values.means().items()}
        if self.plan.samples > 1:
            spread = estimates.has_spread(estimates.score_tensor(values.totals), self.plan.samples)
            metrics["groups_without_spread"] = 1.0 - spread.float().mean().item()
        metrics |= {
            "answer_tokens": sum(lengths) / len(lengths),
            "ended": sum(one.ended for one in rollouts) / len(rollouts),
            "unjudged": 1.0 - len(judged) / len(rollouts),
        }
        with_reference = [a for a in self.answers if a.reference is not None and a.old is not None]
        if with_reference:
            kl = sum(float(k1(a.old, a.reference).sum()) for a in with_reference) / len(with_reference)
            metrics["kl_to_reference"] = kl
            if self.kl_state is not None:
                self.kl_state = self.kl_state.update(kl, len(with_reference))
                metrics["beta"] = self.kl_state.beta
        if isinstance(self.loss, PPOLoss):
            metrics["explained_variance"] = self._explained
        return metrics


def answer_row(ids: tuple[int, ...], prompt_length: int, is_trained: bool = True) -> EncodedExample:
    """Prompt and answer; one that is not trained on has no target."""
    labels = (IGNORE_INDEX,) * prompt_length + ids[prompt_length:]
    return EncodedExample(ids, labels if is_trained else (IGNORE_INDEX,) * len(ids), prompt_length=prompt_length)


def _at(values: Sequence[Tensor] | None, index: int) -> Tensor | None:
    return None if values is None else values[index]
