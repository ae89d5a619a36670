"""The critical difference diagram is a PNG for few and many methods, and shows what the ranking says."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from kitout.evaluate.report.rank_plots import plot_critical_difference
from kitout.evaluate.significance.tasks import rank_over_tasks

pytestmark = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")


@pytest.mark.parametrize("num_methods", [2, 7])
def test_a_diagram(num_methods: int) -> None:
    rng = np.random.default_rng(num_methods)
    ranking = rank_over_tasks({f"method {k}": rng.normal(k, 1, 6) for k in range(num_methods)})
    png = plot_critical_difference(ranking, "accuracy over 6 tasks")
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert int.from_bytes(png[16:20], "big") > 900
    assert plot_critical_difference(ranking) != png
