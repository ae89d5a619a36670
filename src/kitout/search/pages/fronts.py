"""Quality against trainable parameters, latency and forgetting: every candidate, and the front of those that lasted.

A candidate stands where the last rung that it reached has measured it, in the color of that rung; a confirmed design
stands at its mean on the test split besides. A dashed line joins the designs that no other one beats in both. It knows
a population and a confirmation, and draws nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kitout.evaluate.metrics.measure import Score
from kitout.evaluate.metrics.registry import metric_title
from kitout.evaluate.report.charts import Chart, Point, Series
from kitout.search.confirmation import Confirmation
from kitout.search.population.population import Population
from kitout.search.population.survivors import DIVERGED, pareto_fronts

TEST_COLOR = 6  # the page's own ink


@dataclass(frozen=True)
class LastScore:
    """A candidate as the last rung that it reached has measured it."""

    rung: int
    """Its number, from 0."""
    score: Score
    """The goal's metric on the validation split, with its interval."""


def last_scores(population: Population) -> dict[str, LastScore]:
    """By candidate, in the order in which they were proposed."""
    found: dict[str, LastScore] = {}
    for rung, results in enumerate(population.results):
        for result in results:
            found |= {name: LastScore(rung, result.scores[name].measure.score()) for name in result.names}
    return {name: found[name] for name in population.designs if name in found}


def front_charts(
    population: Population, confirmation: Confirmation | None, forgotten: Mapping[str, float]
) -> list[Chart]:
    """One chart for each cost that was measured. forgotten: of confirmed designs, on their own."""
    trainable = {name: float(one.trainable) for name, one in population.designs.items()}
    costs: list[tuple[str, str, Mapping[str, float], Mapping[str, float], bool]] = [
        ("trainable parameters", "trainable parameters, head included", trainable, trainable, True),
        ("latency", "a forward's time, times the frozen model's", population.latency, population.latency, False),
        ("forgetting", "rise of the bits per byte of wiki", population.rises, forgotten, False),
    ]
    charts = []
    for title, label, of_candidates, of_confirmed, is_log in costs:
        chart = _front_chart(population, confirmation, title, label, of_candidates, of_confirmed, is_log)
        if chart.series:
            charts.append(chart)
    return charts


def _front_chart(
    population: Population, confirmation: Confirmation | None, title: str, label: str,
    of_candidates: Mapping[str, float], of_confirmed: Mapping[str, float], is_log: bool,
) -> Chart:  # fmt: skip
    gone = {one.name for decisions in population.decisions for one in decisions if one.what == DIVERGED}
    scores = {
        name: one
        for name, one in last_scores(population).items()
        if name not in gone and _is_drawn(one.score, of_candidates, name)
    }
    share = any(one.score.share for one in scores.values())
    factor = 100 if share else 1
    series: list[Series] = []
    for rung in range(len(population.results)):
        own = {name: one.score for name, one in scores.items() if one.rung == rung}
        series.append(Series(
            name=f"validation, after rung {rung + 1}", color=rung % TEST_COLOR, has_line=False,
            points=[(of_candidates[name], factor * one.value) for name, one in own.items()],
            intervals=[(factor * one.low, factor * one.high) for one in own.values()],
        ))  # fmt: skip
    last = max((one.rung for one in scores.values()), default=0)
    reached = [(of_candidates[name], factor * one.score.value) for name, one in scores.items() if one.rung == last]
    series.append(_front(reached, population.higher_is_better, last % TEST_COLOR))
    tested = [
        (of_confirmed[one.name], one)
        for one in (confirmation.designs if confirmation else ())
        if one.name in of_confirmed and one.low is not None and one.high is not None and math.isfinite(one.mean)
    ]
    points = [(x, factor * one.mean) for x, one in tested]
    series.append(Series(
        name="confirmed, on the test split", color=TEST_COLOR, has_line=False, points=points,
        intervals=[(factor * (one.low or 0.0), factor * (one.high or 0.0)) for _, one in tested],
    ))  # fmt: skip
    series.append(_front(points, population.higher_is_better, TEST_COLOR))
    unit = " %" if share else ""
    return Chart(
        title=f"{metric_title(population.metric)}{unit} against {title}; bars: 95 % interval",
        x_label=label, series=[one for one in series if one.points], is_log=is_log, is_whole=False,
    )  # fmt: skip


def _is_drawn(score: Score, costs: Mapping[str, float], name: str) -> bool:
    return name in costs and all(map(math.isfinite, (score.value, score.low, score.high, costs[name])))


def _front(points: Sequence[Point], higher_is_better: bool, color: int) -> Series:
    """A dashed line through the points that no other one beats in both."""
    sign = -1.0 if higher_is_better else 1.0
    fronts = pareto_fronts([(x, sign * y) for x, y in points])
    shown = sorted({point for point, front in zip(points, fronts, strict=True) if front == 0})
    return Series(color=color, points=shown if len(shown) > 1 else (), is_dashed=True)
