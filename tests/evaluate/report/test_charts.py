"""Charts are well-formed SVG that takes the page's colors, whatever numbers and names are in them."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from kitout.evaluate.metrics.measure import Score
from kitout.evaluate.report.adapter_table import AdapterRow
from kitout.evaluate.report.charts import MAX_POINTS, WIDTH, Chart, Series
from kitout.evaluate.report.run_charts import adapters_chart, lengths_chart, training_charts


def places(chart: Chart) -> list[tuple[float, float]]:
    """Where the points of its lines are."""
    lines = ElementTree.fromstring(chart.svg).iter("polyline")
    return [tuple(map(float, pair.split(","))) for line in lines for pair in line.attrib["points"].split()]  # type: ignore[misc]


@pytest.mark.parametrize("points", [
    [(0, 0)], [(5, 3), (5, 3)], [(0, -1e9), (1, 1e9)], [(1, 1e-12), (2, 2e-12)], [(0, 1), (1e7, 1)], [(1, 0), (2, 0)],
])  # fmt: skip
def test_any_numbers_are_drawn_inside(points: list[tuple[float, float]]) -> None:
    chart = Chart(title='<b>&"', x_label="</svg>", series=[Series(name="<i>", points=points, has_markers=True)])
    root = ElementTree.fromstring(chart.svg)
    assert root.attrib["aria-label"] == '<b>&"'
    assert any(text.text == "</svg>" for text in root.iter("text"))
    assert len(list(root.iter("circle"))) == len(points)
    assert all(0 <= x <= WIDTH and 0 <= y <= 220 for x, y in places(chart))
    assert all(tag.attrib.get("stroke", "var(").startswith("var(") for tag in root.iter("polyline"))


def test_y_grows_upwards_and_long_lines_are_thinned() -> None:
    chart = Chart(title="t", x_label="x", series=[Series(points=[(x, x) for x in range(5000)])])
    found = places(chart)
    assert found == sorted(found, key=lambda place: (place[0], -place[1]))
    assert MAX_POINTS / 2 < len(found) <= MAX_POINTS + 1
    assert not Chart(title="t", x_label="x", series=[]).svg


def test_the_charts_of_a_run() -> None:
    rows = [{"step": k, "loss": 3.0 / k, "eval_loss": 2.0 / k, "eval_accuracy": 0.5, "eval_accuracy_low": 0.4,
             "eval_accuracy_high": 0.6} for k in range(1, 9)]  # fmt: skip
    loss, accuracy = training_charts(rows)
    assert (loss.title, accuracy.title) == ("loss", "accuracy (validation)")
    assert [name for _, name in loss.legend] == ["training", "validation"]
    assert accuracy.series[0].intervals == [(0.4, 0.6)] * 8
    assert "<polygon" in accuracy.svg
    assert training_charts([]) == []
    lengths = lengths_chart({"train": [3, 3, 9], "test": [4]})
    assert lengths is not None
    assert lengths.legend == [(0, "train: 3 examples, 15 tokens"), (1, "test: 1 examples, 4 tokens")]
    assert max(y for _, y in lengths.series[0].points) == pytest.approx(200 / 3)
    assert lengths_chart({"train": []}) is None


def test_adapters_by_their_size() -> None:
    scores = [Score(value, value - 0.1, value + 0.1, 100, True, True) for value in (0.5, 0.9)]
    rows = [AdapterRow(name, "LoRA", "accuracy", score, size, 1.0, 8, 1.0, 1.0, 16 * size)
            for name, score, size in zip("ab", scores, (900, 20_000), strict=True)]  # fmt: skip
    root = ElementTree.fromstring(adapters_chart(rows).svg)
    assert {"100", "1000", "10k", "100k"} <= {text.text for text in root.iter("text")}
    (left, low), (right, high) = ((float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.iter("circle"))
    assert left < right
    assert low > high
