"""The order of a round's answers: by prompt where a step's forwards then work through fewer tokens, else by length."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from kitout.align.objectives.answer_order import order_answers
from kitout.align.objectives.policy import SampledAnswer
from kitout.align.objectives.shared_prompts import SharedPrompts, forward_tokens
from kitout.align.rounds import answer_row

SAMPLES = 4


def answers(prompt_tokens: int, prompts: int = 6, longest: int = 20) -> list[SampledAnswer]:
    draw = random.Random(0)
    found = []
    for number in range(prompts):
        prompt = tuple(draw.randrange(5, 90) for _ in range(prompt_tokens + number % 3))
        for _ in range(SAMPLES):
            ids = (*prompt, *(draw.randrange(5, 90) for _ in range(draw.randint(2, longest))))
            found.append(SampledAnswer(answer_row(ids, len(prompt)), torch.zeros(1)))
    return found


def tokens(order: list[SampledAnswer], size: int) -> int:
    return sum(forward_tokens([one.row for one in order[i : i + size]]) for i in range(0, len(order), size))


@pytest.mark.parametrize(("size", "ratio"), [(2, 0.7), (4, 0.55), (6, 0.6), (8, 0.6)])
def test_prompts_stay_together_where_that_is_fewer_tokens(size: int, ratio: float) -> None:
    given = answers(40)
    by_length = order_answers(given, SAMPLES, size, shares_prompts=False)
    assert [one.length for one in by_length] == sorted((one.length for one in given), reverse=True)
    order = order_answers(given, SAMPLES, size, shares_prompts=True)
    assert sorted(map(id, order)) == sorted(map(id, given))
    assert tokens(order, size) < ratio * tokens(by_length, size)
    prompts = [one.row.input_ids[: one.row.prompt_length] for one in order]
    assert len(set(prompts)) == sum(a != b for a, b in pairwise(prompts)) + 1
    firsts = [order[i].length for i in range(0, len(order), SAMPLES)]
    assert firsts == sorted(firsts, reverse=True), "the longest first, so that a lack of memory shows early"


@pytest.mark.parametrize(("prompt_tokens", "size"), [(2, 4), (40, 1), (40, 3), (40, 24), (40, 100)])
def test_by_length_where_sharing_saves_nothing(prompt_tokens: int, size: int) -> None:
    """Short prompts, rows of their own, and all of a step in one forward, whose order is of no matter."""
    given = answers(prompt_tokens, longest=60)
    lengths = [one.length for one in order_answers(given, SAMPLES, size, shares_prompts=True)]
    assert lengths == sorted(lengths, reverse=True)


def test_the_tokens_are_those_of_the_forward() -> None:
    rows = [one.row for one in answers(12)]
    shared = SharedPrompts.of(rows, torch.device("cpu"))
    assert shared is not None
    assert forward_tokens(rows) == shared.prompts["input_ids"].numel() + shared.answers["input_ids"].numel()
    assert forward_tokens(rows[::SAMPLES]) == len(rows[::SAMPLES]) * max(row.length for row in rows[::SAMPLES])
    assert forward_tokens([]) == 0
