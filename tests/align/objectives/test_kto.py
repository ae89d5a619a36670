"""KTO's point of reference: each answer's partner has another prompt, and what is evaluated has a z of its own."""

from __future__ import annotations

import time
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from kitout import LoRA
from kitout.align.config.losses import KTOLoss
from kitout.align.measure.pairs import LOSS, validation_metrics
from kitout.align.objectives.kto import KTOObjective, mismatched_rows
from kitout.data.encode.item import IGNORE_INDEX, EncodedExample, EncodedUnpaired
from train.fixtures import add, job, kit_of, texts


def judged(prompts: list[int]) -> list[EncodedUnpaired]:
    """One answer, of its own, to each prompt."""
    rows = [
        EncodedExample((prompt, 5, 6, 7 + i), (IGNORE_INDEX, IGNORE_INDEX, 6, 7 + i), prompt_length=2)
        for i, prompt in enumerate(prompts)
    ]
    return [EncodedUnpaired(row, is_desirable=i % 2 == 0) for i, row in enumerate(rows)]


@pytest.mark.parametrize("prompts", [[1, 1, 2, 2, 2, 3, 1, 1], [1, 2], [1, 1, 1, 2], [1, 2, 1, 1], [1, 2, 3]])
def test_the_partner_is_the_next_example_with_another_prompt(prompts: list[int]) -> None:
    items = judged(prompts)
    rows = mismatched_rows(items, 10)
    for i, item in enumerate(items):
        places = [(i + k) % len(items) for k in range(1, len(items))]
        partner = items[next(j for j in places if prompts[j] != prompts[i])].answer
        assert rows[item.answer].input_ids == (*item.answer.input_ids[:2], *partner.input_ids[2:])
        assert rows[item.answer].labels == (IGNORE_INDEX, IGNORE_INDEX, *partner.input_ids[2:])


def test_one_prompt_alone_has_no_partner_and_too_long_rows_are_left_out() -> None:
    assert not mismatched_rows(judged([1, 1, 1]), 10)
    assert not mismatched_rows(judged([1, 2]), 3)
    assert not mismatched_rows([], 3)


def test_behind_an_empty_prompt_the_first_token_is_no_target() -> None:
    (asked, _), answer = judged([1, 2]), EncodedExample((5, 6, 7), (IGNORE_INDEX, 6, 7))
    items = [asked, EncodedUnpaired(answer, is_desirable=True)]
    rows = mismatched_rows(items, 10)
    assert rows[asked.answer].labels == (IGNORE_INDEX, IGNORE_INDEX, 5, 6, 7)
    assert (rows[answer].input_ids, rows[answer].labels) == ((6, 7), (IGNORE_INDEX, 7))


def test_many_answers_to_one_prompt_take_no_longer() -> None:
    items = judged([1] * 20_000 + [2])
    start = time.process_time()
    assert len(mismatched_rows(items, 10)) == 20_001
    assert time.process_time() - start < 10  # looking at all of them takes a minute


def test_what_is_evaluated_has_its_own_reference_point() -> None:
    kit = kit_of("llama")
    add(kit, "job", LoRA(rank=2))
    objective = KTOObjective(kit, KTOLoss())
    trained, held_out = (
        [EncodedUnpaired(row, is_desirable=i % 2 == 0) for i, row in enumerate(texts(6, seed=seed))] for seed in (3, 4)
    )
    objective.mismatched = mismatched_rows(held_out, 40) | mismatched_rows(trained, 40)
    rows = [one.answer for one in (*trained, *held_out)] + list(objective.mismatched.values())
    objective.reference = {row: torch.full((row.num_targets,), -9.0) for row in rows}
    judged_job, run = replace(job("job", objective, trained), validation=held_out), Mock(kit=kit)
    found = []
    for before in ([], trained):
        with torch.no_grad(), kit.use("job"):
            objective.before_step(kit, before, 0)
        z = objective.z
        found.append(validation_metrics(run, judged_job)[LOSS])
        assert objective.z == z
    assert z > 0
    assert found[0] == found[1]
