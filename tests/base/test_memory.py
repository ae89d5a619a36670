"""is_out_of_memory knows the error of every system, and no other error."""

from __future__ import annotations

import pytest
import torch

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
