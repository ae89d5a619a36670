"""Values of several sources as one reward per answer, and everything a source can give that is none."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from kitout.align.rewards.reward import AnswerBatch, WeightedRewards, check_values
from kitout.align.rollout import Rollout
from kitout.errors import RewardError

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two and two?"}]


def answers() -> AnswerBatch:
    rollouts = [
        Rollout(0, (7, 8, 9, 2), 2, True, "four"),
        Rollout(0, (7, 8, 10), 2, False, "five"),
        Rollout(1, (5, 6, 2), 1, True, "x" * 200),
    ]
    return AnswerBatch.of(
        rollouts, [CHAT, "raw text"], [{"answer": "four"}, {"answer": "x"}], ["p.jsonl:1", "p.jsonl:2"]
    )


@dataclass(frozen=True)
class Given:
    name: str
    values: Any

    def score(self, batch: AnswerBatch) -> Any:
        return self.values


def test_a_batch_has_one_entry_per_answer() -> None:
    batch = answers()
    assert batch.prompts == [CHAT, CHAT, "raw text"]
    assert batch.completions[:2] == ["four", "five"]
    assert [row["answer"] for row in batch.rows] == ["four", "four", "x"]
    assert [(e.num_targets, e.location) for e in batch.encoded] == [
        (2, "p.jsonl:1"),
        (1, "p.jsonl:1"),
        (2, "p.jsonl:2"),
    ]
    assert batch.describe(1) == "answer 1 of 3 (p.jsonl:1): prompt 'Two and two?', answer 'five'"
    assert len(batch.describe(2)) < 200


def test_a_weighted_sum_is_over_the_sources_that_judged() -> None:
    rewards = WeightedRewards((Given("a", [1.0, None, None]), Given("b", [0.5, 4, None])), (2.0, -1.0))
    values = rewards.score(answers())
    assert values.names == ("a", "b")
    assert values.by_source == ((1.0, 0.5), (None, 4.0), (None, None))
    assert values.totals == (1.5, -4.0, None)
    assert values.means() == {"a": 1.0, "b": 2.25}
    table = torch.tensor([[1.0, 0.5], [math.nan, 4.0], [math.nan, math.nan]])
    as_trl = (table * torch.tensor([2.0, -1.0])).nansum(dim=1)
    totals, has_reward = values.to_tensors()
    assert torch.equal(totals, as_trl)
    assert has_reward.tolist() == [True, True, False]
    assert totals.dtype == torch.float32
    assert WeightedRewards((Given("a", [None] * 3),), (1.0,)).score(answers()).means() == {}


@pytest.mark.parametrize(
    "values",
    [
        [1, 0.5, True],
        (1, 0.5, 1),
        torch.tensor([1.0, 0.5, 1.0]),
        np.array([1.0, 0.5, 1.0], dtype=np.float32),
        [np.float32(1), torch.tensor(0.5), np.bool_(True)],
    ],
    ids=["list", "tuple", "tensor", "array", "scalars"],
)
def test_numbers_of_every_kind_are_taken(values: Any) -> None:
    checked = check_values("f", values, answers())
    assert checked == [1.0, 0.5, 1.0]
    assert {type(value) for value in checked} == {float}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (0.5, "reward f returned 0.5 (float): return a list of 3 numbers or None, one per answer in order"),
        (None, "reward f returned None (NoneType): return a list of 3 numbers"),
        ("abc", "reward f returned 'abc' (str)"),
        ({"a": 1}, "(dict): return a list"),
        ((x for x in [1, 2, 3]), "(generator): return a list"),
        (torch.tensor(1.0), "reward f returned 1.0 (float)"),
        ([1.0, 2.0], "reward f returned 2 values for 3 answers: return a list of 3 numbers"),
        ([], "reward f returned 0 values for 3 answers"),
        ([1.0, "good", 2.0], "reward f returned 'good' (str) for answer 1 of 3 (p.jsonl:1): prompt 'Two and two?'"),
        (torch.ones(3, 1), "reward f returned [1.0] (list) for answer 0 of 3"),
        ([1.0, 2j, 1.0], "reward f returned 2j (complex) for answer 1"),
        ([1.0, 2.0, math.nan], "reward f returned nan (float) for answer 2 of 3 (p.jsonl:2): prompt 'raw text'"),
        ([math.inf, math.nan, 1.0], "reward f returned inf (float) for answer 0 of 3"),
        ([1.0, torch.tensor(math.nan), 1.0], "for answer 1 of 3 (p.jsonl:1): prompt 'Two and two?', answer 'five'"),
        ([1.0, 10**400, 1.0], "return a finite number, or None to leave the answer out"),
    ],
)
def test_everything_else_is_an_error_that_names_the_function(values: Any, message: str) -> None:
    with pytest.raises(RewardError) as found:
        WeightedRewards((Given("f", values),), (1.0,)).score(answers())
    assert message in str(found.value)
    assert isinstance(found.value, ValueError)
    assert len(str(found.value)) < 400
