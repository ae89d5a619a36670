"""The critical-difference diagram: every name, a bar per group, well-formed whatever the names."""

from __future__ import annotations

from xml.etree import ElementTree

from kitout.evaluate.report.rank_diagram import RankDiagram
from kitout.evaluate.significance.tasks import rank_over_tasks

SCORES = {
    "LoRA(rank=8)": [0.9, 0.8, 0.85, 0.7, 0.95, 0.9],
    "<IA3> & friends with a name that is long": [0.8, 0.7, 0.8, 0.6, 0.9, 0.8],
    "BitFit": [0.5, 0.4, 0.45, 0.3, 0.6, 0.5],
}


def test_it_has_every_name_and_group() -> None:
    ranking = rank_over_tasks(SCORES)
    drawing = RankDiagram(ranking)
    root = ElementTree.fromstring(drawing.svg)
    texts = ["".join(text.itertext()) for text in root.iter("text")]
    assert {"LoRA(rank=8)", "1.00", "2.00", "3.00"} <= set(texts)
    assert "<IA3> & friends with a n…" in texts
    assert f"critical difference {ranking.critical_difference:.2f}" in texts
    bars = [path for path in root.iter("path") if path.get("stroke-width") == "4"]
    assert len(bars) == len(ranking.groups)
    width = float(root.attrib["viewBox"].split()[2])
    assert all(0 <= float(text.attrib["x"]) <= width for text in root.iter("text"))
    assert "6 test sets" in drawing.title
