"""What a source of rewards is given and gives, and how several become one number per answer.

A source gives one number per answer, or None where it does not judge it. Sums follow TRL: weights times values over the
sources that judged (nansum); an answer that none judged has no reward and leaves the batch. Unlike there, nan and inf
stop the run with the source and the answer, since a None is written, and a nan is a fault. It knows no source.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from kitout.align.rollout import Rollout
from kitout.data.encode.item import EncodedExample
from kitout.errors import RewardError

PromptText: TypeAlias = "str | Sequence[Mapping[str, Any]]"  # raw text, or messages as a chat template takes them
LARGEST = float(np.finfo(np.float32).max)  # rewards are float32 in losses
SHOWN_CHARS = 80  # of a prompt or an answer in a message


@dataclass(frozen=True)
class AnswerBatch:
    """Answers to be judged, and all that a source may know of each; every field has one entry per answer."""

    prompts: Sequence[PromptText]
    """As the data have them."""
    completions: Sequence[str]
    """The answers, without special tokens and surrounding white space."""
    rows: Sequence[Mapping[str, Any]]
    """All columns of the prompt's row."""
    encoded: Sequence[EncodedExample]
    """Prompt and answer as token ids, the end token included."""

    @classmethod
    def of(
        cls,
        rollouts: Sequence[Rollout],
        prompts: Sequence[PromptText],
        rows: Sequence[Mapping[str, Any]],
        locations: Sequence[str] | None = None,
    ) -> AnswerBatch:
        """prompts, rows, locations: by prompt, as `Rollout.prompt_index` counts them."""
        indices = [rollout.prompt_index for rollout in rollouts]
        return cls(
            [prompts[i] for i in indices],
            [rollout.text for rollout in rollouts],
            [rows[i] for i in indices],
            [r.encode("" if locations is None else locations[r.prompt_index]) for r in rollouts],
        )

    def __len__(self) -> int:
        return len(self.completions)

    def describe(self, index: int) -> str:
        """Which answer this is, for messages: its number, where its prompt was read, and both in brief."""
        prompt = self.prompts[index]
        text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content")) if prompt else ""
        location = f" ({self.encoded[index].location})" if self.encoded[index].location else ""
        return (
            f"answer {index} of {len(self)}{location}: prompt {_brief(text)}, answer {_brief(self.completions[index])}"
        )


class Reward(Protocol):
    """A source of rewards. It is frozen: the same answers have the same values, at any time and in any batch."""

    @property
    def name(self) -> str:
        """Its name in messages, logs and files."""

    def score(self, answers: AnswerBatch) -> Sequence[float | None]:
        """One value per answer, in order; None: this source does not judge it."""


@dataclass(frozen=True)
class RewardValues:
    """The rewards of a batch of answers."""

    names: tuple[str, ...]
    """The sources."""
    by_source: tuple[tuple[float | None, ...], ...]
    """[answers][sources], before weights."""
    totals: tuple[float | None, ...]
    """By answer the weighted sum over the sources that judged it; None: no source did, so it is left out."""

    def to_tensors(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """(rewards [answers] of float32, 0 where there is none; which answers have one, [answers] of bool)."""
        rewards = torch.tensor([total or 0.0 for total in self.totals], device=device)
        return rewards, torch.tensor([total is not None for total in self.totals], device=device)

    def means(self) -> dict[str, float]:
        """By source the mean over the answers it judged; a source that judged none is left out."""
        found = {}
        for name, column in zip(self.names, zip(*self.by_source, strict=True), strict=False):
            values = [value for value in column if value is not None]
            if values:
                found[name] = math.fsum(values) / len(values)
        return found


@dataclass(frozen=True)
class WeightedRewards:
    """Several sources and their weights as one reward."""

    rewards: tuple[Reward, ...]
    """The sources."""
    weights: tuple[float, ...]
    """One per source."""

    def score(self, answers: AnswerBatch) -> RewardValues:
        """RewardError for a source that gives another number of values than answers, no number, or nan or inf."""
        columns = [check_values(reward.name, reward.score(answers), answers) for reward in self.rewards]
        by_source = tuple(zip(*columns, strict=True))
        totals = []
        for values in by_source:
            judged = [(w, v) for w, v in zip(self.weights, values, strict=True) if v is not None]
            totals.append(math.fsum(weight * value for weight, value in judged) if judged else None)
        return RewardValues(tuple(reward.name for reward in self.rewards), by_source, tuple(totals))


def check_values(name: str, values: object, answers: AnswerBatch) -> list[float | None]:
    """What a source gave, as floats and None; RewardError says what it gave, for which answer, and what to return."""
    expected = f"return a list of {len(answers)} numbers or None, one per answer in order"
    if isinstance(values, Tensor | np.ndarray):
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise RewardError(f"reward {name} returned {_brief(values)} ({type(values).__name__}): {expected}")
    if len(values) != len(answers):
        raise RewardError(f"reward {name} returned {len(values)} values for {len(answers)} answers: {expected}")
    checked: list[float | None] = []
    for index, value in enumerate(values):
        number = value.item() if isinstance(value, np.generic) or _is_scalar(value) else value
        if number is None:
            checked.append(None)
            continue
        found = f"reward {name} returned {_brief(value)} ({type(value).__name__}) for {answers.describe(index)}"
        if not isinstance(number, numbers.Real):
            raise RewardError(f"{found}: {expected}")
        if not abs(number) <= LARGEST:  # type: ignore[operator]  # nan compares as False
            raise RewardError(f"{found}: return a finite number, or None to leave the answer out")
        checked.append(float(number))
    return checked


def _is_scalar(value: object) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "..."
