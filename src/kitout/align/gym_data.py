"""Data `gym:NAME` of a stage as files of its folder: prompts with their entries, or for sft prompts and right answers.

The tasks make them by the seed of the data, so a resumed stage writes the same file. What is held out is split off as
of any other data, without duplicates. It knows configs and the table that a kind reads, and nothing of rewards.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from kitout.align.config.gym_name import is_gym, parse_gym
from kitout.align.rewards.gym_tasks import gym_rows
from kitout.errors import ConfigError
from kitout.files.atomic import write_text
from kitout.train.config.schema import RunConfig
from kitout.train.metrics_log import to_json_value

ConfigT = TypeVar("ConfigT", bound=RunConfig)
GYM_PROMPTS = 2000  # prompts made where the data names no limit


def with_gym_data(config: ConfigT, folder: Path, *, with_answers: bool = False) -> ConfigT:
    """The stage with a file in place of each `gym:NAME`; itself where it has none.

    with_answers: prompts and right answers, to train on; else prompts with all that the reward needs.
    """
    if not any(is_gym(source.path) for source in config.data.train):
        return config
    sources = []
    for number, source in enumerate(config.data.train):
        if is_gym(source.path):
            size = parse_gym(source.path).size or source.limit or GYM_PROMPTS
            rows = _without_equal(gym_rows(source.path, size, config.data.seed))
            if with_answers:  # a table of nothing else
                if any(row["answer"] is None for row in rows):
                    raise ConfigError(
                        f"{source.path}: the task checks answers and names no right one, and a stage of kind sft "
                        "trains on right answers: take it for grpo, rloo or ppo, and another task here"
                    )
                rows = [{"prompt": row["prompt"], "response": row["answer"]} for row in rows]
            file = folder / f"prompts-{number}.jsonl"
            write_text(file, "".join(json.dumps(to_json_value(row), ensure_ascii=False) + "\n" for row in rows))
            source = source.model_copy(update={"path": str(file)})
        sources.append(source)
    return config.model_copy(update={"data": config.data.model_copy(update={"train": tuple(sources)})})


def _without_equal(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first of those with the same question and answer: their other columns count the entries."""
    distinct: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        distinct.setdefault((row["prompt"], str(row["answer"])), row)
    return list(distinct.values())
