"""reasoning-gym as prompts and reward: right and wrong answers, and rows of something else."""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import pytest

from kitout.align.rewards.gym_tasks import gym_rows, open_gym_reward
from kitout.align.rewards.open_rewards import open_rewards
from kitout.align.rewards.reward import AnswerBatch
from kitout.align.rewards.specs import parse_rewards
from kitout.data.encode.item import EncodedExample
from kitout.errors import ConfigError, RewardError
from kitout.train.metrics_log import to_json_value


@pytest.fixture
def gym() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a package that it imports leaves a file open
        return pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed (extra align)")


def batch(rows: list[dict[str, Any]], completions: list[str]) -> AnswerBatch:
    return AnswerBatch([row.get("prompt", "") for row in rows], completions, rows, [EncodedExample((5,))] * len(rows))


def test_right_and_wrong_answers(gym: Any) -> None:
    rows = gym_rows("gym:chain_sum", 3, seed=1)
    assert rows == gym_rows("gym:chain_sum", 3, seed=1)
    assert rows != gym_rows("gym:chain_sum", 3, seed=2)
    assert rows[1]["prompt"] == "State the final answer to the following arithmetic problem: 1 + 5 ="
    reward = open_gym_reward("gym:chain_sum")
    assert reward.name == "gym:chain_sum"
    assert reward.score(batch(rows, [row["answer"] for row in rows])) == [1.0, 1.0, 1.0]
    scores = reward.score(batch(rows, ["", "7", "The sum is 214"]))
    assert scores[:2] == [0.0, 0.0]
    assert 0 < scores[2] < 1
    read_again = json.loads(json.dumps(rows))  # as a file of prompts holds them
    assert reward.score(batch(read_again, ["-4", "6", "214"])) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("task", ["rearc", "knights_knaves", "graph_color", "chain_sum"])
def test_entries_of_a_file_are_those_of_the_task(task: str, gym: Any) -> None:
    """JSON makes lists of tuples and texts of keys: the right answer of rearc would be wrong."""
    (row,) = gym_rows(f"gym:{task}", 1, seed=3)
    read_again = json.loads(json.dumps(to_json_value(row)))
    reward = open_gym_reward(f"gym:{task}")
    seen: list[Any] = []

    def score_answer(answer: str, entry: Any) -> float:
        seen.append(entry["metadata"])
        return 1.0

    right = "" if row["answer"] is None else row["answer"]
    expected = reward.dataset.score_answer(right, row)
    assert reward.score(batch([read_again], [right])) == [expected]
    reward.dataset.score_answer = score_answer
    reward.score(batch([read_again], [""]))
    assert seen == [row["metadata"]]


def test_several_tasks_judge_their_own_questions(gym: Any) -> None:
    texts = ["gym:chain_sum:max_terms=2", "gym:gcd"]
    rows = [row for text in texts for row in gym_rows(text, 1, seed=0)]
    rewards = open_rewards(parse_rewards(texts), lambda spec: pytest.fail(spec.text))
    values = rewards.score(batch(rows, [row["answer"] for row in rows]))
    assert values.by_source == ((1.0, None), (None, 1.0))
    assert values.totals == (1.0, 1.0)


def test_an_answer_that_the_task_cannot_read_is_wrong(gym: Any) -> None:
    rows = gym_rows("gym:prime_factorization", 1, seed=0)
    with pytest.warns(
        RuntimeWarning, match="gym:prime_factorization cannot read some answers, which count as wrong: ValueError"
    ):
        assert open_gym_reward("gym:prime_factorization").score(batch(rows, ["no idea"])) == [0.0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "1 + 1"}, "has no question, answer, metadata: use --data gym:chain_sum, or another reward"),
        ({"question": "", "answer": "", "metadata": None}, "has no metadata"),
        ({"question": "", "answer": "", "metadata": {"source_dataset": "gcd"}}, "is of 'gcd'"),
    ],
)
def test_rows_of_something_else_are_refused(gym: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match="reward gym:chain_sum judges prompts that the task made") as found:
        open_gym_reward("gym:chain_sum").score(batch([row], ["2"]))
    assert message in str(found.value)


def test_tasks_that_cannot_be_made(gym: Any) -> None:
    with pytest.raises(RewardError, match="reasoning-gym has no task 'chain_sums'; did you mean 'chain_sum'"):
        open_gym_reward("gym:chain_sums")
    with pytest.raises(RewardError, match=r"gym:composite cannot be made from its name alone: .*at least one dataset"):
        open_gym_reward("gym:composite")
    with pytest.raises(ConfigError, match="gym:chain_sum: size is 0, expected at least 1"):
        gym_rows("gym:chain_sum", 0, seed=0)


def test_settings_of_a_task(gym: Any) -> None:
    text = "gym:chain_sum:max_terms=2:min_digits=2:max_digits=2"
    rows = gym_rows(text, 20, seed=0)
    assert {row["metadata"]["num_terms"] for row in rows} == {row["metadata"]["num_digits"] for row in rows} == {2}
    reward = open_gym_reward(text)
    assert reward.name == "gym:chain_sum"
    assert reward.score(batch(rows, [row["answer"] for row in rows])) == [1.0] * 20
    with pytest.raises(RewardError, match="has no setting 'max_term'; did you mean 'max_terms'"):
        open_gym_reward("gym:chain_sum:max_term=2")
    with pytest.raises(RewardError, match="cannot be made with these settings: AssertionError"):
        open_gym_reward("gym:chain_sum:max_terms=1")


def test_without_the_package_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(RewardError, match=r"gym:chain_sum needs reasoning-gym: .*\n.*\[align\]"):
        open_gym_reward("gym:chain_sum")
