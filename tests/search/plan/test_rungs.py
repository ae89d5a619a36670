"""Successive halving: rungs, their cost in whole trainings, and the steps at which they end."""

from __future__ import annotations

from itertools import pairwise

import pytest

from kitout.search.plan.rungs import cost, plan_rungs, rung_steps


@pytest.mark.parametrize(
    ("candidates", "factor", "first", "expected"),
    [(16, 4, 1 / 16, 2.50), (16, 4, 1 / 8, 4.00), (16, 2, 1 / 8, 5.00), (27, 3, 1 / 27, 3.00), (5, 4, 1.0, 5.00)],
)
def test_cost_in_whole_trainings(candidates: int, factor: int, first: float, expected: float) -> None:
    assert cost(plan_rungs(candidates, factor, first)) == pytest.approx(expected)


def test_every_rung_has_a_candidate_and_a_step_of_its_own() -> None:
    rungs = plan_rungs(3, 4, 1 / 64)
    assert [rung.candidates for rung in rungs] == [3, 1, 1, 1]
    for num_steps in (4, 5, 80, 1000):
        ends = rung_steps(rungs, num_steps)
        assert ends[-1] == num_steps
        assert all(first < second for first, second in pairwise(ends))
        assert ends[0] >= 1
    assert rung_steps(plan_rungs(16, 4, 1 / 16), 80) == [5, 20, 80]
