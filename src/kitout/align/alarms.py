"""Alarms of a stage of reinforcement: what goes wrong while it trains, each once, with what to write.

A pure function of what was logged, step by step, so a resumed run has the alarms of one that was not stopped. Compared
are means over the last rounds with the first round's. It knows metrics by name, and no trainer and no screen.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kitout.align.config.losses import GRPOLoss, PPOLoss
from kitout.align.config.schema import StageRun
from kitout.format import format_number

LAST_ROUNDS = 5  # whose mean is looked at
FEWEST_ROUNDS = 3  # before anything is said
USUAL_KL = 6.0  # nats per answer, where loss.kl_target says nothing (Ziegler et al. 2019)
KL_FACTOR, LENGTH_FACTOR, ENTROPY_SHARE = 3.0, 2.0, 0.1
MOST_EQUAL, MOST_CUT = 0.8, 0.8  # of groups, of answers
FEWEST_TOKENS = 8  # answers as short as that may grow


@dataclass(frozen=True)
class Alarm:
    """One thing that goes wrong."""

    name: str
    """What it is of; each is raised once."""
    step: int
    """The step at which it was seen."""
    text: str
    """What was found, and what to write."""

    def __str__(self) -> str:
        return f"step {self.step:,}: {self.text}"


class AlarmWatch:
    """`watch.update(step, logged values)` gives the alarms that are new."""

    def __init__(self, config: StageRun, steps_per_round: int) -> None:
        self.config, self.steps_per_round = config, steps_per_round
        self.raised: list[Alarm] = []
        self._round = -1
        self._start: dict[str, float] = {}
        self._last: deque[dict[str, float]] = deque(maxlen=LAST_ROUNDS)

    def update(self, step: int, values: Mapping[str, Any]) -> list[Alarm]:
        """values: as metrics.jsonl has them; those of another kind say nothing."""
        if not isinstance(values.get("reward"), int | float) or not isinstance(
            values.get("answer_tokens"), int | float
        ):
            return []
        number = (step - 1) // self.steps_per_round
        if number == self._round:
            return []
        self._round = number
        row = {
            key.rpartition("/")[2]: float(value)
            for key, value in values.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        self._start = {**row, **self._start}
        self._last.append(row)
        new = [one for one in self._find(step) if one.name not in {known.name for known in self.raised}]
        self.raised += new
        return new

    def _mean(self, name: str) -> float:
        """Over the last rounds; nan where they are few, or do not have it."""
        found = [row[name] for row in self._last if name in row]
        return math.fsum(found) / len(found) if len(found) >= FEWEST_ROUNDS else math.nan

    def _find(self, step: int) -> Iterable[Alarm]:
        loss, rollout = self.config.loss, self.config.rollout
        assert rollout is not None, "of a stage that samples answers"
        target = (loss.kl_target if isinstance(loss, PPOLoss) else None) or USUAL_KL
        beta = getattr(loss, "beta", 0.0)
        kl, tokens, entropy = self._mean("kl_to_reference"), self._mean("answer_tokens"), self._mean("entropy")
        kl = self._mean("kl") if math.isnan(kl) else kl  # what a penalty measures, where log-ratios are not taken
        first_tokens, first_entropy = self._start.get("answer_tokens", math.nan), self._start.get("entropy", math.nan)
        if kl > KL_FACTOR * target:
            advice = f"raise loss.beta ({format_number(beta)} now) or lower train.lr"
            if isinstance(loss, PPOLoss) and loss.kl_target is None:
                advice += f", or loss.kl_target={format_number(USUAL_KL)}, which steers it"
            yield Alarm("kl", step, (
                f"KL to the reference is {format_number(kl)} nats per answer, over {format_number(KL_FACTOR)} x "
                f"{format_number(target)}: the policy is far from what it started from: {advice}"
            ))  # fmt: skip
        if tokens > LENGTH_FACTOR * first_tokens and tokens > FEWEST_TOKENS:
            variant = "loss.variant=dr_grpo, " if isinstance(loss, GRPOLoss) and loss.variant != "dr_grpo" else ""
            yield Alarm("length", step, (
                f"answers have {format_number(tokens)} tokens, over twice the {format_number(first_tokens)} of the "
                "first round: look at completions.jsonl whether length is what is rewarded: "
                f"{variant}a reward that takes length into account, or a smaller rollout.max_new_tokens"
            ))  # fmt: skip
        if first_entropy > 0 and entropy < ENTROPY_SHARE * first_entropy:
            clip = ", loss.clip_high=0.28" if isinstance(loss, GRPOLoss) and loss.clip_high is None else ""
            yield Alarm("entropy", step, (
                f"entropy is {format_number(entropy)} nats per token, under a tenth of the first round's "
                f"{format_number(first_entropy)}: answers repeat each other: lower train.lr{clip}, or raise loss.beta"
            ))  # fmt: skip
        if self._mean("groups_without_spread") > MOST_EQUAL:
            yield Alarm("spread", step, (
                f"in {self._mean('groups_without_spread'):.0%} of the groups all answers have one reward, which trains "
                "nothing: prompts that are neither too easy nor too hard, a finer reward, or more rollout.samples "
                f"({rollout.samples} now)"
            ))  # fmt: skip
        if 1 - self._mean("ended") > MOST_CUT:
            other = "loss.mask_truncated=true" if isinstance(loss, GRPOLoss) else "a reward for short answers"
            other = "loss.missing_end_penalty=1" if isinstance(loss, PPOLoss) else other
            yield Alarm("cut", step, (
                f"{1 - self._mean('ended'):.0%} of the answers are cut at rollout.max_new_tokens="
                f"{rollout.max_new_tokens} before they end: raise it, or {other}"
            ))  # fmt: skip


def find_alarms(config: StageRun, steps_per_round: int, rows: Iterable[Mapping[str, Any]]) -> list[Alarm]:
    """All alarms of a history. rows: those of metrics.jsonl."""
    watch = AlarmWatch(config, steps_per_round)
    for row in rows:
        watch.update(int(row.get("step", 0)), row)
    return watch.raised
