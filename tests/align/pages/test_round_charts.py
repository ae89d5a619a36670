"""Charts of reinforcement: a panel for what was logged, rewards with their bands, nothing for what was not."""

from __future__ import annotations

from typing import Any

import pytest

from kitout.align.pages import round_charts as module
from kitout.align.pages.round_charts import panels_of, plot_rounds, round_charts
from kitout.align.pages.round_pages import rounds_section
from kitout.align.rounds import _source_metric


def rows(steps: int = 6, **more: float) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        row = {"step": step, "loss": 0.1, "reward": 0.1 * step, "reward_low": 0.05 * step, "reward_high": 0.2 * step,
               "ended": 0.5, "answer_tokens": 9.0, "ppo/entropy": 2.0, **more}  # fmt: skip
        found += [row, {"step": step, "eval_reward": 0.3}]
    return found


def test_what_is_logged_has_a_panel_and_no_more() -> None:
    titles = [panel.title for panel in panels_of(rows())]
    assert titles[0] == "reward of sampled answers, band: 95 % interval"
    assert titles[1] == "reward of greedy answers (validation)"
    assert not any("KL" in title or "clipped" in title for title in titles)
    more = [panel.title for panel in panels_of(rows(kl_to_reference=1.0, clip_fraction=0.1, explained_variance=0.3))]
    assert sum("KL" in title or "clipped" in title or "explained" in title for title in more) == 3
    assert panels_of([{"step": 1, "loss": 1.0}]) == []


def test_sources_are_lines_of_one_panel() -> None:
    panel = panels_of(rows(reward_taste=0.2, reward_length=-0.1))[0]
    assert list(panel.series) == ["weighted sum", "taste", "length"]
    assert panel.series["weighted sum"].intervals[1] == (0.1, 0.4)


def test_no_source_is_taken_for_something_else() -> None:
    names = [_source_metric(name) for name in ("rules:score_low", "high", "rules:perplexity", "runs/a")]
    series = panels_of(rows(**dict.fromkeys(names, 0.2)))[0].series
    assert list(series) == ["weighted sum", "rules:score.low", ".high", "rules:perplexity", "runs.a"]
    assert series["weighted sum"].intervals[1] == (0.1, 0.4)
    section = rounds_section(rows(**dict.fromkeys(names, 0.2)))
    assert section is not None
    assert {f"reward, {name}" for name in series if name != "weighted sum"} < {title for title, *_ in section.table}


def test_a_source_that_judged_nothing_in_the_first_round_has_its_line() -> None:
    first, *others = rows(**{"reward_gym:a": 0.2})
    del first["reward_gym:a"]
    section = rounds_section([first, *others])
    assert section is not None
    assert ("reward, gym:a", "", "0.2") in section.table


@pytest.mark.parametrize("steps", [1, 6, 40])
def test_they_are_drawn(steps: int) -> None:
    charts = round_charts(rows(steps))
    assert all(chart.svg for chart in charts)
    assert "polygon" in charts[0].svg
    ended = next(chart for chart in charts if "end by themselves" in chart.title)
    assert ended.series[0].points[0] == (1, 50.0)


@pytest.mark.parametrize("steps", [1, 6, 40])
def test_the_picture_has_a_curve_in_every_panel(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    figures: list[Any] = []
    new_figure = module.new_figure
    monkeypatch.setattr(module, "new_figure", lambda *size: figures.append(new_figure(*size)) or figures[-1])
    assert plot_rounds(rows(steps, reward_taste=0.2)).startswith(b"\x89PNG")
    used = [ax for ax in figures[0].axes if ax.axison]
    assert len(used) == len(panels_of(rows(steps)))
    assert all(ax.lines for ax in used)
    assert [text.get_text() for text in used[0].get_legend().get_texts()] == ["weighted sum", "taste"]
