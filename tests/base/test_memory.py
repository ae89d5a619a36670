"""is_out_of_memory knows the error of every system, and no other error; what nothing holds is given back."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from kitout.base import memory
from kitout.base.memory import is_out_of_memory


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried ..."), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("not enough memory"), False),
    ],
)
def test_which_errors_mean_out_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the C library gives it back itself")
def test_what_nothing_holds_is_given_back() -> None:
    cycle: list[Any] = [torch.ones(2_000) for _ in range(20_000)]  # 160 MB in pieces that the C library would keep
    cycle.append(cycle)
    kept = torch.ones(1)  # behind them, so that the heap cannot shrink from its end alone
    held = memory.current(torch.device("cpu"))
    del cycle
    memory.release()
    assert memory.current(torch.device("cpu")) < held - 100 * 2**20
    assert kept.item() == 1
