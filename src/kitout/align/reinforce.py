"""A stage that learns from its own answers: grpo, rloo, ppo. Roles, rounds, jobs and what is measured.

The policy is trained; its reference is what it started from; PPO trains a value adapter beside it, as a job of its own
on the same answers. It knows a prepared run and its stage; sampling, losses and how pages look are the modules' beside.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from kitout.align.alarm_display import AlarmDisplay
from kitout.align.alarms import AlarmWatch, find_alarms
from kitout.align.completions_log import COMPLETIONS_FILE
from kitout.align.config.kinds import KINDS, default_lr
from kitout.align.config.losses import GRPOLoss, PPOLoss, RLOOLoss
from kitout.align.config.schema import StageRun
from kitout.align.measure.prompts import REWARD, judge, measure_policy
from kitout.align.objectives.policy import PolicyObjective, SampledAnswer
from kitout.align.objectives.value import ValueObjective
from kitout.align.pages.answers_over_time import answers_section
from kitout.align.pages.round_charts import plot_rounds
from kitout.align.pages.round_pages import rounds_section
from kitout.align.pages.stage_section import stage_section
from kitout.align.reference import load_start
from kitout.align.rewards.mean_reward import reward_measure
from kitout.align.rewards.open_rewards import open_rewards
from kitout.align.rewards.reward import Reward, WeightedRewards
from kitout.align.rewards.reward_model import load_reward_model
from kitout.align.rewards.specs import RewardSpec, parse_rewards
from kitout.align.rollout import SamplingSettings, sample_answers
from kitout.align.rounds import Roles, RoundPlan, Rounds, answer_row
from kitout.align.scalar_head import head_path, scalar_head
from kitout.base import memory
from kitout.data.encode.item import EncodedPrompt
from kitout.data.encode.prompts import PromptEncoder
from kitout.errors import ConfigError, Errors
from kitout.evaluate.ask.text_limit import check_prompts
from kitout.evaluate.report import plots
from kitout.evaluate.report.section import RunDetails
from kitout.files.atomic import write_text
from kitout.train.checkpoints import step_of
from kitout.train.config.schema import TrainConfig
from kitout.train.loop.jobs import Job
from kitout.train.measure.evaluate import JobOutcome
from kitout.train.metrics_log import METRICS_FILE, MetricsLog, read_metrics
from kitout.train.preflight.cost_estimate import CostEstimate
from kitout.train.preflight.render import PreflightPage
from kitout.train.run import LogFn, find_estimate, new_trainer, progress_fn
from kitout.train.run_folder import RunFolder
from kitout.train.setup.parent import load_parts, read_parent
from kitout.train.setup.prepare import PreparedRun

TRIED_TOKENS = 8  # of the answers that are sampled to see how long a round takes
VALUE = "value"  # the adapter of PPO's second job, and its folder


class Reinforcement:
    """One stage of reinforcement, prepared."""

    is_reward_model = False
    rounds: Rounds
    """What the loop trains on."""

    def __init__(self, config: StageRun, prepared: PreparedRun, folder: RunFolder, log: LogFn) -> None:
        self.config, self.prepared, self.folder, self.log = config, prepared, folder, log
        assert config.rollout is not None, "a stage that samples answers"
        self.start = load_start(config, prepared)
        self.rewards = self._open_rewards()
        rollout, loss = config.rollout, self.loss
        turn_ends = PromptEncoder(prepared.tokenizer, config.data.chat_template_kwargs).turn_end_ids
        self.sampling = SamplingSettings(
            rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_new_tokens, turn_ends
        )
        policy, seed = prepared.jobs[0], config.train.seed
        parts = loss.minibatches if isinstance(loss, PPOLoss) else 1
        self.plan = RoundPlan.of(policy.batches, rollout.samples, self.num_passes, parts, config.train.steps, seed)
        self.value = self._add_value() if isinstance(loss, PPOLoss) else None
        self._check_adapters()
        assert isinstance(policy.objective, PolicyObjective), "the task's own"
        self.rounds = Rounds(
            prepared.kit, prepared.tokenizer, Roles(policy.name, self.start, self.value), policy.examples,
            self.plan, loss, self.sampling, self.rewards, seed, MetricsLog(folder.path / COMPLETIONS_FILE),
            policy.objective.scorer,
        )  # fmt: skip
        self.jobs = self._jobs(policy)

    @property
    def loss(self) -> GRPOLoss | RLOOLoss | PPOLoss:
        loss = self.config.loss
        assert isinstance(loss, GRPOLoss | RLOOLoss | PPOLoss), "of a stage that samples answers"
        return loss

    @property
    def num_passes(self) -> int:
        """Over the answers of one round."""
        if isinstance(self.loss, PPOLoss):
            return self.loss.epochs
        return self.loss.iterations if isinstance(self.loss, GRPOLoss) else 1

    # ---- what takes part ------------------------------------------------------------------------------------------

    def _open_rewards(self) -> WeightedRewards:
        kit, loaded = self.prepared.kit, dict[str, str]()

        def open_model(spec: RewardSpec) -> Reward:
            name = f"reward-{len(loaded)}"
            loaded[spec.text] = name
            return load_reward_model(kit, Path(spec.text).expanduser(), name, spec.name)

        weights = {one.source: one.weight for one in self.config.reward}
        rewards = open_rewards(parse_rewards(weights), open_model)
        self.reward_adapters = loaded
        return rewards

    def _add_value(self) -> str:
        """From the reward adapter, head included, where there is exactly one; else new, by the seed."""
        kit, seed = self.prepared.kit, self.config.train.seed
        sources = list(self.reward_adapters)
        if len(sources) == 1:
            load_parts(kit, {VALUE: read_parent(sources[0], "reward")})
            kit[VALUE].requires_grad_(True)
            kit[VALUE].to(dtype=torch.promote_types(kit.dtype, torch.float32))
        else:
            heads = {head_path(kit): scalar_head(kit, seed)}
            dtype = torch.promote_types(kit.dtype, torch.float32)
            kit.add(VALUE, self.config.method, seed=seed, heads=heads, dtype=dtype)
        return VALUE

    def _check_adapters(self) -> None:
        """ConfigError for dropout in what is trained, and for an adapter that does not read the longest answer."""
        kit, policy = self.prepared.kit, self.prepared.jobs[0]
        started = {policy.name: f"from={self.config.train.from_}"}
        if self.value is not None:
            started[self.value] = "reward=" + ", ".join(self.reward_adapters)
        errors = Errors(ConfigError, f"kind={self.config.kind}")
        for name, source in started.items():
            if dropout := kit[name].method.model_dump().get("dropout", 0.0):
                errors.add(
                    f"{source}: its method has dropout={dropout:g}, with which it gives an answer another value each "
                    "time: train it with method.dropout=0"
                )
        prompts = [item.input_ids for item in (*policy.examples, *policy.validation, *self.prepared.first_dataset.test)]
        for name in filter(None, (self.start, self.value, *self.reward_adapters.values())):
            with kit.use(name):
                try:
                    check_prompts(kit, prompts, self.sampling.max_new_tokens)
                except ConfigError as error:
                    errors.add(f"{name}: {error}, or write fewer new tokens (rollout.max_new_tokens)")
        errors.raise_if_any()

    def _jobs(self, policy: Job) -> list[Job]:
        answers, batches = self.rounds.answers, self.plan.batches
        jobs = [replace(policy, examples=answers, batches=batches)]
        if self.value is not None:
            assert isinstance(self.loss, PPOLoss), "which has a value"
            objective = ValueObjective(self.prepared.kit, self.loss)
            jobs.append(Job(self.value, objective, answers, batches, self._value_settings(policy.settings)))
        return jobs

    def _value_settings(self, settings: TrainConfig) -> TrainConfig:
        """As the policy's. Rates that nobody set are those of the value's own method, by the factor of the stage."""
        kind, method = self.config.kind, self.prepared.kit[VALUE].method
        rates = {"lr": settings.lr, "head_lr": settings.head_lr}
        if settings.lr == default_lr(kind, self.config.method):
            rates["lr"] = default_lr(kind, method)
        if settings.head_lr is None:
            rates["head_lr"] = method.training_defaults().head_lr * KINDS[kind].lr_factor
        return settings.model_copy(update=rates)

    # ---- the order of the run ---------------------------------------------------------------------------------------

    @property
    def metric_names(self) -> list[str]:
        """What an evaluation during training reports."""
        return [REWARD]

    def prepare(self, signature: str, dry_run: bool) -> None:
        """Nothing: the reference scores answers when they are there."""

    def build_trainer(self, last_checkpoint: Path | None, signature: str) -> tuple[Any, CostEstimate]:
        self.rounds.answers[:] = self._trial_answers()
        planned = [[(j, i) for j in range(len(self.jobs)) for i in self.plan.batches[0]]]
        estimate = find_estimate(
            self.prepared.kit, self.jobs, planned, len(self.plan.batches), self.config, self.folder, last_checkpoint
        )
        self.rounds.answers[:] = []
        if last_checkpoint is None:
            estimate = replace(estimate, seconds=estimate.seconds + self._seconds_of_rollouts())
            write_text(self.folder.estimate, json.dumps(estimate.__dict__))  # a resumed run reads it there
        self.rounds.log.resume_at(0 if last_checkpoint is None else step_of(last_checkpoint))
        evaluate = self.config.evaluate
        by_reward = evaluate.model_copy(update={"best_metric": evaluate.best_metric or REWARD})
        config = self.config.model_copy(update={"evaluate": by_reward})
        trainer = new_trainer(
            self.prepared.kit, self.jobs, config, self.folder, estimate, signature, self._validate,
            step_data=self.rounds,
        )  # fmt: skip
        self.rounds.rows_of_forward = lambda: trainer.step_runner.micro_batch_size
        watch = AlarmWatch(self.config, self.plan.steps_per_round)
        trainer.add_callback(AlarmDisplay(watch, self.log, lambda: read_metrics(self.folder.metrics)))
        return trainer, estimate

    def _seconds_of_rollouts(self) -> float:
        """Of all rounds, by a few tokens of the first one's answers: at most, since answers may end earlier."""
        prompts = [self.prepared.jobs[0].examples[i].input_ids for i in self.plan.prompts[0]]
        tried = replace(self.sampling, max_new_tokens=min(TRIED_TOKENS, self.sampling.max_new_tokens))
        kit, samples, start = self.prepared.kit, self.plan.samples, time.perf_counter()
        with kit.use(self.prepared.jobs[0].name):
            sample_answers(kit, self.prepared.tokenizer, prompts, tried, seed=0, step=0, samples=samples)
        per_token = (time.perf_counter() - start) / tried.max_new_tokens
        return per_token * self.sampling.max_new_tokens * len(self.plan.prompts)

    def as_page(self, page: PreflightPage) -> PreflightPage:
        """The pre-flight in rounds and answers; what it is made of counts prompts."""
        prompts, per_round = len(self.plan.prompts[0]), self.plan.steps_per_round
        answers, lr = len(self.plan.batches[0]), self.config.train.lr
        at_once = min(self.rounds.rows_of_forward(), answers)
        texts = {
            "schedule": (
                f"{len(self.plan.batches)} steps: {len(self.plan.prompts)} rounds of {prompts} prompts with "
                f"{self.plan.samples} answers each, {per_round} optimizer step{'s' if per_round > 1 else ''} a round"
            ),
            "batch": f"{answers} answers a step, at most {at_once} in one forward; learning rate {lr:g}",
        }
        return replace(page, settings={**page.settings, **texts}, steps=len(self.plan.batches))

    def _trial_answers(self) -> list[SampledAnswer]:
        """As many answers as a round has, each as long as it may be, to as many prompts, the longest ones.

        Answers to one prompt share it: behind one for all a step would take less time and memory than in a round.
        """
        prompts: Sequence[EncodedPrompt] = self.prepared.jobs[0].examples
        longest = sorted(prompts, key=lambda prompt: prompt.length, reverse=True)
        new = self.sampling.max_new_tokens
        zeros, is_ppo = torch.zeros(new), isinstance(self.loss, PPOLoss)
        answers: list[SampledAnswer] = []
        for prompt in islice(cycle(longest), len(self.plan.prompts[0])):
            row = answer_row((*prompt.input_ids, *(prompt.input_ids * new)[:new]), prompt.length)
            answer = SampledAnswer(row, zeros if is_ppo else zeros[:1], zeros, zeros, zeros, zeros)
            answers += [answer] * self.plan.samples
        return answers

    def _validate(self) -> dict[str, float]:
        """The mean reward of greedy answers to the validation prompts."""
        job = self.prepared.jobs[0]
        prompts = list(job.validation)[: self.config.evaluate.generate_examples or None]
        if not prompts:
            return {}
        judged = judge(self.prepared, prompts, job.name, self.sampling, self.rewards)
        values = [total for total in judged.values.totals if total is not None]
        memory.reset_peak(self.prepared.kit.device)
        if not values:  # the best checkpoint is chosen by this, so a number there has to be
            warnings.warn(
                "no reward source judged any answer to the validation prompts (all None): this evaluation counts as "
                "the worst", RuntimeWarning, stacklevel=2,
            )  # fmt: skip
            return {"eval_reward": -math.inf}
        return {"eval_reward": reward_measure(values).value}

    def measure(self) -> dict[str, JobOutcome]:
        """The policy against what it started from; the value adapter is kept beside it."""
        if self.value is not None:
            self.prepared.kit.save(self.value, self.folder.path / VALUE)
        name, test = self.prepared.jobs[0].name, self.prepared.first_dataset.test
        if not test:
            return {}
        lines = read_metrics(self.folder.path / COMPLETIONS_FILE)
        seen = {line["total"] for line in lines if line["total"] is not None}
        outcome = measure_policy(
            self.prepared, name, test, self.config.evaluate, self.start, self.sampling, self.rewards, seen,
            progress_fn(name, self.log),
        )  # fmt: skip
        return {} if outcome is None else {name: outcome}

    def details(self) -> RunDetails:
        """What pages and results.json have of this kind of stage."""
        reference = (self.start or "base") if self.config.has_reference else None
        names = [one.name for one in self.rewards.rewards]
        values = {
            "kind": self.config.kind,
            **({} if reference is None else {"reference": reference}),
            "rewards": names,
            "rounds": len(self.plan.prompts),
            "last_round": self.rounds.last,
        }
        rows, answers = (read_metrics(self.folder.path / file) for file in (METRICS_FILE, COMPLETIONS_FILE))
        rewards = list(zip(names, self.rewards.weights, strict=True))
        stage = stage_section(self.config, reference, rewards)
        found = (rounds_section(rows), answers_section(answers), stage)
        return RunDetails(
            values=values,
            sections=[section for section in found if section is not None],
            pictures={"training": plot_rounds(rows)} if plots.has_matplotlib() and found[0] is not None else {},
            alarms=[str(alarm) for alarm in find_alarms(self.config, self.plan.steps_per_round, rows)],
        )
