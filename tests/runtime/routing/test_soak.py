"""The soak: a short one each time, the long one by `make test-slow`. What it does is in tests/soak.py."""

from __future__ import annotations

import pytest

from soak import CALLS, Soak


@pytest.mark.parametrize("num_calls", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_every_answer_is_its_own(num_calls: int) -> None:
    soak = Soak(num_calls).run()
    assert not soak.wrong, f"{len(soak.wrong)} wrong: {soak.wrong[:5]}"
    assert sum(soak.right.values()) == num_calls
    assert set(soak.right) == set(CALLS)
