"""completions.jsonl: every sampled answer with its rewards, one JSON object a line, appended as metrics.jsonl is.

A resumed run removes the lines after its checkpoint's step, so no answer is there twice and a kill costs at most an
incomplete last line (`MetricsLog`). It knows no model, no loss and no screen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kitout.align.rewards.reward import AnswerBatch, PromptText, RewardValues
from kitout.align.rollout import Rollout
from kitout.train.metrics_log import MetricsLog

COMPLETIONS_FILE = "completions.jsonl"


@dataclass(frozen=True)
class CompletionLine:
    """One line of the file."""

    step: int
    """The optimizer steps done before the answer was sampled, plus 1: the step that it is trained on in."""
    prompt: PromptText
    """As the data have it."""
    completion: str
    """The answer as reward functions took it."""
    rewards: Mapping[str, float | None]
    """By source, before weights; None: the source did not judge it."""
    total: float | None
    """The weighted sum; None: the answer was left out."""
    advantage: float | None
    """What its tokens were weighted by; None: left out, or not computed for whole answers."""
    tokens: int
    """Of the answer, its end token included."""
    ended: bool
    """False: it was cut at the longest allowed length."""


def completion_lines(
    step: int,
    rollouts: Sequence[Rollout],
    answers: AnswerBatch,
    values: RewardValues,
    advantages: Sequence[float | None] | None = None,
) -> list[CompletionLine]:
    """One line per answer, in order."""
    return [
        CompletionLine(
            step, answers.prompts[i], answers.completions[i],
            dict(zip(values.names, values.by_source[i], strict=True)), values.totals[i],
            None if advantages is None else advantages[i], len(rollout.answer_ids), rollout.ended,
        )
        for i, rollout in enumerate(rollouts)
    ]  # fmt: skip


def write_completions(log: MetricsLog, lines: Sequence[CompletionLine]) -> None:
    """Appends the lines. log: of COMPLETIONS_FILE in the run's folder; its `resume_at` cuts it back to a step."""
    for line in lines:
        values: dict[str, Any] = asdict(line)
        log.write(values.pop("step"), values)
