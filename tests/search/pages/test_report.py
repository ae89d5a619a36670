"""report.html of a search: what is in it, also while it runs, and the pictures beside it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kitout.search.pages.report import search_page, write_report
from kitout.search.search_folder import SearchFolder
from search.pages.made_up import confirmation, population

pytest.importorskip("matplotlib")


def test_the_page_of_a_finished_search(tmp_path: Path) -> None:
    found = population(goal={"max_forgetting": 0.02}, budget={"max_latency": 1.2})
    confirmed = confirmation(found)
    of_run = {
        "seconds": 50.0,
        "forgetting": {
            f"{one.name}-s{seed}": {"sets": {"wiki": {"difference": 0.01}}}
            for one in confirmed.designs
            for seed in (0, 1, 2)
        },
    }
    text = write_report(found, SearchFolder(tmp_path), confirmed, of_run).read_text(encoding="utf-8")
    assert text.index(confirmed.answer) < text.index("Recommended: ") < text.index("kitout train recommended.yaml")
    for expected in (
        "rung 1", "among the best", "does not differ significantly from", "the grad norm is nan",
        "1.21 x the frozen model&#39;s, of 1.2", "LoRA(rank=64)", "9 of 8", "confirm/adapter/default-s0", "peak memory",
        "forgets: wiki rose by", "by seed", "against trainable parameters", "against latency", "against forgetting",
        "gradient energy", "where the candidates were trained",
    ):  # fmt: skip
        assert expected in text, expected
    assert 'http-equiv="refresh"' not in text
    assert not re.search(r"<script|https?://|src=\"(?!data:)", text)
    assert {"fronts.png", "fronts.svg", "sites.png", "sites.svg"} <= {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "fronts.png").read_bytes().startswith(b"\x89PNG")
    assert write_report(found, SearchFolder(tmp_path), confirmed, of_run).read_text(encoding="utf-8") == text


def test_the_page_while_it_runs(tmp_path: Path) -> None:
    text = write_report(population(1), SearchFolder(tmp_path)).read_text(encoding="utf-8")
    assert "Rung 1 of 3 is done; 5 designs go on, and nothing is confirmed yet" in text
    assert 'http-equiv="refresh"' in text
    assert "Confirmed" not in text
    assert "forgetting is" not in text
    assert "With goal.max_forgetting, forgetting is measured" in write_report(
        population(1, goal={}), SearchFolder(tmp_path)
    ).read_text(encoding="utf-8")


def test_a_front_holds_what_nothing_beats_in_both() -> None:
    found = population()
    size, latency = search_page(found, confirmation(found), {}).charts[:2]
    assert size.is_log
    assert not latency.is_log
    for chart in (size, latency):
        for front in (one for one in chart.series if one.is_dashed):
            assert [x for x, _ in front.points] == sorted(x for x, _ in front.points)
            assert [y for _, y in front.points] == sorted(y for _, y in front.points), "more has to be better"
        for one in (one for one in chart.series if not one.is_dashed):
            assert all(low <= y <= high for (_, y), (low, high) in zip(one.points, one.intervals, strict=True))


def test_a_map_weighs_a_candidate_by_how_far_it_came() -> None:
    page = search_page(population(), None, {})
    trained, gradient = page.maps
    assert trained.depth == gradient.depth == 6
    assert trained.roles[0] == "attn.q"
    assert trained.cells[0, "attn.q"] == pytest.approx(1.0), "every candidate trains there"
    assert 0 < trained.cells[0, "mlp.down"] < trained.cells[0, "attn.v"] < 1
    assert gradient.cells[0, "attn.q"] == pytest.approx(1.0)
    assert gradient.cells[0, "attn.q"] > gradient.cells[3, "attn.q"] > gradient.cells[5, "mlp.down"]
