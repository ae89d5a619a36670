"""Data of reasoning-gym as files of a stage: how many prompts, which columns, and sources that are files already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kitout.align import gym_data
from kitout.align.config.load import load_align
from kitout.align.config.schema import StageRun
from kitout.errors import ConfigError


@pytest.fixture(autouse=True)
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def gym_rows(text: str, size: int, seed: int) -> list[dict[str, Any]]:
        return [{"prompt": f"{text} {seed}", "question": "q", "answer": str(i), "metadata": {}} for i in range(size)]

    monkeypatch.setattr(gym_data, "gym_rows", gym_rows)


def grpo(train: Any) -> StageRun:
    config = load_align(
        {
            "model": "m", "output": "o",
            "stages": [{"kind": "grpo", "data": {"train": train, "seed": 4}, "reward": "gym:x:a=1"}],
        }
    )  # fmt: skip
    return next(config.runs())


def read(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("source", "size"),
    [
        ("gym:x:a=1", gym_data.GYM_PROMPTS),
        ({"path": "gym:x:a=1", "limit": 5}, 5),
        ({"path": "gym:x:a=1#7", "limit": 5}, 7),  # of which the limit takes 5
    ],
)
def test_as_many_prompts_as_are_named(source: Any, size: int, tmp_path: Path) -> None:
    (made,) = gym_data.with_gym_data(grpo(source), tmp_path).data.train
    assert Path(made.path).parent == tmp_path
    found = read(made.path)
    assert len(found) == size
    assert found[0] == {
        "prompt": f"{'gym:x:a=1#7' if size == 7 else 'gym:x:a=1'} 4",
        "question": "q",
        "answer": "0",
        "metadata": {},
    }
    assert made.limit == (None if isinstance(source, str) else 5)


def test_answers_alone_for_stages_that_train_on_them(tmp_path: Path) -> None:
    (made,) = gym_data.with_gym_data(grpo("gym:x:a=1#1"), tmp_path, with_answers=True).data.train
    assert read(made.path) == [{"prompt": "gym:x:a=1#1 4", "response": "0"}]


def test_a_task_without_right_answers_trains_no_sft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gym_data, "gym_rows", lambda *_: [{"prompt": "p", "question": "q", "answer": None}])
    with pytest.raises(ConfigError, match="gym:x:a=1: the task checks answers and names no right one"):
        gym_data.with_gym_data(grpo("gym:x:a=1"), tmp_path, with_answers=True)


def test_other_sources_stay(tmp_path: Path) -> None:
    first, second = gym_data.with_gym_data(grpo(["a.jsonl", "gym:x:a=1#2"]), tmp_path).data.train
    assert (first.path, Path(second.path).name) == ("a.jsonl", "prompts-1.jsonl")
    config = grpo("a.jsonl")
    assert gym_data.with_gym_data(config, tmp_path) is config


def test_equal_questions_are_one_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries count themselves, so no two rows are the same; a held-out prompt that is trained on too would be."""
    rows = [
        {"prompt": f"p{i % 3}", "question": "q", "answer": i % 2, "metadata": {"source_index": i}} for i in range(9)
    ]
    monkeypatch.setattr(gym_data, "gym_rows", lambda *_: rows)
    (made,) = gym_data.with_gym_data(grpo("gym:x:a=1#9"), tmp_path).data.train
    assert read(made.path) == rows[:6]
