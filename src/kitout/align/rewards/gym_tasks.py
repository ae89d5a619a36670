"""`gym:NAME`: a task of reasoning-gym as prompts and as their reward.

`create_dataset(name, size, seed, **settings)` makes the entries, `score_answer(answer, entry)` judges an answer: 1 for
a right one, sometimes a part of it. Prompts carry their entry as columns, so the reward needs nothing else; metadata
are there as a Python literal too: tasks compare tuples, which JSON has not. The package is optional (extra `align`) and
imported on use. It knows no model and no template: answers come without either.
Source: reasoning-gym 0.1.25.
"""

from __future__ import annotations

import ast
import math
import numbers
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from kitout.align.config.gym_name import GYM, OWN_SETTINGS, parse_gym
from kitout.align.rewards.reward import AnswerBatch
from kitout.errors import ConfigError, Errors, RewardError, suggest
from kitout.install_hint import suggest_install

ENTRY_KEYS = ("question", "answer", "metadata")
LITERAL = "metadata_literal"  # the column of the metadata as the task made them


@dataclass(frozen=True)
class GymReward:
    """The task's own judgment."""

    name: str
    """`gym:TASK`, as messages have it."""
    task: str
    """Its name in reasoning-gym."""
    dataset: Any
    """The task, of any size and seed: it judges the entries of all."""
    others: Collection[str] = ()
    """Tasks that other sources judge: their prompts are none of its business."""

    def score(self, answers: AnswerBatch) -> Sequence[float | None]:
        """The task's score of each answer, None for an entry of `others`; RewardError for a row of something else.

        An answer that the task cannot even read is wrong: 0, with a warning. (Of 106 tasks 3 raise on some texts.)
        """
        return [self._score(answers, index) for index in range(len(answers))]

    def _score(self, answers: AnswerBatch, index: int) -> float | None:
        row, task = answers.rows[index], self.task
        missing = [key for key in ENTRY_KEYS if key not in row]
        metadata = row.get("metadata")
        source = metadata.get("source_dataset", task) if isinstance(metadata, Mapping) else None
        if not missing and source in self.others:
            return None
        if missing or source != task:
            found = f"has no {', '.join(missing)}" if missing else f"is of {source!r}" if source else "has no metadata"
            raise RewardError(
                f"reward {self.name} judges prompts that the task made, and the row of {answers.describe(index)} "
                f"{found}: use --data {self.name}, or another reward"
            )
        entry = {**row, "metadata": ast.literal_eval(row[LITERAL])} if LITERAL in row else dict(row)
        try:
            return float(self.dataset.score_answer(answers.completions[index], entry))
        except Exception as error:  # of any kind, by what a model wrote
            kind = type(error).__name__  # without its text, so that Python shows each warning once
            warnings.warn(
                f"{self.name} cannot read some answers, which count as wrong: {kind}", RuntimeWarning, stacklevel=2
            )
            return 0.0


def open_gym_reward(text: str, others: Collection[str] = ()) -> GymReward:
    """text: `gym:NAME`, with the settings of its data. RewardError for a task or setting that is not there."""
    name = parse_gym(text)
    return GymReward(f"{GYM}{name.task}", name.task, _create(text, 1, 0), others)


def gym_rows(text: str, size: int, seed: int) -> list[dict[str, Any]]:
    """`size` prompts of the task, the same for a seed: the entry's columns, and its question as `prompt`.

    text: `gym:NAME`, with settings of the task or without. Read as a table they are of the format `prompts`, whose rows
    keep all columns for the reward. Prompts to be held out are split off these: many tasks make entry i from seed + i,
    so neighboring seeds have nearly the same entries.
    """
    if size < 1:
        raise ConfigError(f"{text}: size is {size}, expected at least 1 prompt")
    dataset = _create(text, size, seed)
    rows = []
    for entry in (dataset[i] for i in range(size)):
        metadata = {"source_dataset": parse_gym(text).task, **entry["metadata"]}  # some tasks do not say it
        rows.append({"prompt": entry["question"], **entry, "metadata": metadata, LITERAL: repr(_plain(metadata))})
    return rows


def _plain(value: Any) -> Any:
    """Of the types that `ast.literal_eval` reads."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    for kind in (list, tuple):
        if isinstance(value, kind):
            return kind(map(_plain, value))
    if isinstance(value, set | frozenset):
        return set(map(_plain, value))
    return str.__str__(value) if isinstance(value, str) else str(value)  # a subclass may print itself otherwise


def _create(text: str, size: int, seed: int) -> Any:
    name, settings = parse_gym(text).task, parse_gym(text).settings
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise RewardError(f"{text} needs reasoning-gym: {error}\n  {suggest_install(extra='align')}") from error
    if name not in DATASETS:
        raise RewardError(f"{text}: reasoning-gym has no task {name!r}; {suggest(name, sorted(DATASETS))}")
    known = [one.name for one in fields(DATASETS[name][1]) if one.name not in OWN_SETTINGS]
    errors = Errors(RewardError, text)
    for unknown in settings.keys() - set(known):
        errors.add(f"the task has no setting {unknown!r}; {suggest(unknown, known)}")
    errors.raise_if_any()
    try:
        return reasoning_gym.create_dataset(name, size=size, seed=seed, **settings)
    except Exception as error:  # whatever the task asks for
        what = "with these settings" if settings else "from its name alone"
        raise RewardError(f"{text} cannot be made {what}: {type(error).__name__}: {error}") from error
