"""How many rows one forward has where nothing is set."""

from __future__ import annotations

import pytest
import torch

from kitout import LoRA
from kitout.data.encode.item import EncodedExample
from kitout.train.preflight.cost_estimate import default_micro_batch
from train.fixtures import add, causal, job, kit_of


@pytest.mark.parametrize(
    ("jobs", "rows", "tokens", "expected"),
    [
        (1, 8, 60, 8), (1, 32, 64, 16), (1, 8, 1100, 1), (8, 4, 60, 16), (5, 4, 60, 12), (8, 1, 60, 8),
        (4, 32, 64, 16),
    ],
)  # fmt: skip
def test_on_a_cpu_forwards_have_about_1024_tokens_of_whole_jobs(
    jobs: int, rows: int, tokens: int, expected: int
) -> None:
    kit = kit_of("llama")
    names = [f"a{j}" for j in range(jobs)]
    items = [EncodedExample((1,) * tokens, (1,) * tokens)] * rows
    for name in names:
        add(kit, name, LoRA(rank=1))
    few = [EncodedExample((1,) * 5, (1,) * 5)] * 2
    made = [job(name, causal(kit, [name], few), items, steps=1, batch=rows) for name in names]
    step = [(j, i) for j in range(jobs) for i in range(rows)]
    assert default_micro_batch(torch.device("cpu"), made, step) == expected
    assert default_micro_batch(torch.device("cuda"), made, step) == len(step)
