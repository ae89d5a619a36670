"""Plots and tables of results: correct counts, a fixed order, and a verdict that respects the intervals."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from kitout.evaluate.metrics.confusion import Confusion
from kitout.evaluate.metrics.measure import Score
from kitout.evaluate.report import adapter_table, class_plots
from kitout.evaluate.report.adapter_table import AdapterRow
from kitout.evaluate.significance.power import smallest_share_difference


def row(name: str, value: float, trainable: int, half: float = 0.02, metric: str = "accuracy") -> AdapterRow:
    score = Score(value, value - half, value + half, 100, metric != "loss", metric != "loss")
    return AdapterRow(name, "LoRA(rank=8)", metric, score, trainable, 1.234, 48, 12.0, 20.0, 2048)


def test_the_order_of_errors() -> None:
    truth = [0] * 6 + [1] * 4
    predictions = [1 - t if i in (3, 5, 7, 9) else t for i, t in enumerate(truth)]
    assert class_plots.misclassified(predictions, truth) == [3, 7, 5, 9]


def test_plots_of_a_perfect_adapter_and_of_many_classes() -> None:
    names = [f"a class with a long name {i}" for i in range(30)]
    truth = list(range(30))
    plots = [
        class_plots.confusion("x", Confusion(tuple(names), tuple(tuple(int(i == k) for k in truth) for i in truth))),
        class_plots.errors("x", [], [], [], 0),
        class_plots.errors("x", [np.zeros((8, 8, 3), np.uint8)] * 3, names[:3], names[3:6], 40),
        class_plots.comparison([row("a", 0.5, 0), row("b", 1.0, 9000)], 0.1, "two"),
        class_plots.comparison([row("a", 2.5, 10, metric="loss"), row("b", 1.0, 9000, metric="loss")], None, "two"),
    ]
    for png_bytes in plots:
        with Image.open(io.BytesIO(png_bytes)) as image:
            assert min(image.size) > 150


def test_one_seed_gives_no_order() -> None:
    rows = [row("a", 0.5, 1), row("b", 0.9, 30), row("c", 0.99, 20)]
    said = adapter_table.caption(rows)
    assert said.startswith("accuracy 50.0 to 99.0 on 100 test examples, one seed each")
    assert "best" not in adapter_table.text(rows, 0.1)
    assert "other seeds" in said
    smallest = smallest_share_difference(0.3, 100)
    assert "smallest difference" not in said
    assert "smallest difference that 100 test examples can show (80 % power): accuracy 15.3 points" in (
        adapter_table.text(rows, 0.1, smallest=smallest)
    )
    assert adapter_table.caption(rows[:1]) == "a: accuracy 50.0 (48.0 to 52.0)"


def test_the_table_as_text() -> None:
    lines = adapter_table.text([row("lora", 0.936, 155_146), row("full", 0.5, 22_063_882)], 0.1).splitlines()
    assert lines[0].split("  ")[0] == "adapter"
    assert "accuracy %, 95 % interval" in lines[0]
    assert "155,146" in lines[1]
    assert "93.6 (91.6 to 95.6)" in lines[1]
    assert lines[1].endswith("0.250  2.0 KiB")
    assert lines[3].startswith("majority class")
    assert lines[-1].startswith("accuracy 50.0 to 93.6")


def test_different_metrics_are_not_compared() -> None:
    assert adapter_table.comparable([row("a", 0.5, 1)])
    assert not adapter_table.comparable([row("a", 0.5, 1), row("b", 1.0, 1, metric="loss")])
