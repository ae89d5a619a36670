"""What held-out prompts are measured by besides their reward: the answers that the data have, where they have them."""

from __future__ import annotations

from typing import Any

import pytest

from kitout.align.measure.prompts import _expected
from kitout.data.encode.item import EncodedPrompt


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"answer": "7"}, "7"),
        ({"answer": 7}, "7"),
        ({"response": "7"}, "7"),
        ({"answer": None}, ""),
        ({"response": None}, ""),
        ({"answer": None, "response": "7"}, "7"),
        ({}, ""),
    ],
)
def test_an_empty_cell_is_no_expected_answer(row: dict[str, Any], expected: str) -> None:
    assert _expected(EncodedPrompt((1,), "", row)) == expected
