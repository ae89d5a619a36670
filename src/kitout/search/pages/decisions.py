"""What every rung decided, and why, as tables of text: a candidate's value, its test against the last survivor.

It knows a population, and no page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kitout.evaluate.metrics.measure import format_value
from kitout.evaluate.significance.seeds import LEVEL
from kitout.format import format_number
from kitout.search.plan.schema import SearchPlan
from kitout.search.population.design import method_text
from kitout.search.population.population import Population
from kitout.search.population.survivors import DIVERGED, FORGETS, PROMOTED, TIED, Decision
from kitout.train.config.method_field import parse_method


@dataclass(frozen=True)
class RungText:
    """One rung."""

    title: str
    """Which, and how many stayed."""
    rows: list[list[str]]
    """The table, its head first."""
    lines: list[str]
    """Sentences before it."""


def rung_texts(population: Population) -> list[RungText]:
    """The rungs that are finished."""
    texts, ends = [], population.ends
    for number, decisions in enumerate(population.decisions):
        begin, done = (ends[number - 1] if number else 0), population.results[number]
        stay = sum(one.stays for one in decisions)
        seconds = sum(one.seconds for one in done)
        title = (
            f"Rung {number + 1} of {len(population.rungs)}: {len(decisions)} designs, steps {begin + 1:,} to "
            f"{ends[number]:,}; {stay} {'stay' if stay != 1 else 'stays'}"
        )
        line = f"{sum(one.examples for one in done):,} examples, {seconds:,.0f} s, measuring included"
        texts.append(RungText(title, _rows(population, number, decisions), [line]))
    return texts


def _rows(population: Population, number: int, decisions: Sequence[Decision]) -> list[list[str]]:
    done = population.results[number]
    has_rises = any(one.forgetting is not None for one in decisions)
    metric = population.metric.replace("_", " ")
    rows = [["design", "what it is", f"{metric} (95 % interval)", "p", *(["wiki"] if has_rises else []), "decision"]]
    for place, one in enumerate(decisions):
        score = next(result.scores[one.name] for result in done if one.name in result.names).measure.score()
        low, high = (format_value(end, score.share) for end in (score.low, score.high))
        p_value = "" if one.p_value is None else f"{one.p_value:.2g}"
        rise = [] if not has_rises else ["" if one.forgetting is None else format_number(one.forgetting, sign=True)]
        value = f"{format_value(score.value, score.share)} ({low} to {high})"
        design = population.designs[one.name]
        what = f"{design.text}; {design.origin}" if number == 0 else design.text
        rows.append([one.name, what, value, p_value, *rise, _reason(population, number, decisions, place)])
    return rows


def _reason(population: Population, number: int, decisions: Sequence[Decision], place: int) -> str:
    """What became of one candidate, and why."""
    one, is_last = decisions[place], number + 1 == len(population.rungs)
    last = next((other.name for other in reversed(decisions) if other.what == PROMOTED), "")
    goes_on = "stayed to the end" if is_last else "goes on"
    if one.what == PROMOTED:
        best = sum(other.what == PROMOTED for other in decisions)
        return f"{goes_on}: among the best {best}" if best > 1 else f"{goes_on}: the best"
    if one.what == TIED:
        return f"{goes_on}: does not differ significantly from {last}"
    if one.what == DIVERGED:
        return f"diverged: {next(r.diverged[one.name] for r in population.results[number] if one.name in r.diverged)}"
    if one.what == FORGETS:
        most = population.plan.goal.max_forgetting
        return f"forgets: wiki rose by {format_number(one.forgetting)} bits per byte, of {most:g}"
    if one.p_value is not None and one.p_value <= LEVEL:
        return f"dropped: differs significantly from {last}"
    if any(other.p_value is not None and other.p_value <= LEVEL for other in decisions[:place]):
        return "dropped: behind one that differs significantly"
    return "dropped: no examples are left for it in the budget"


def refused_rows(population: Population) -> list[list[str]]:
    """Designs that were not trained, each with its reason; the head first. Empty: there are none."""
    rows = [
        [_design_text(one["method"], one["lr"]), str(one["origin"]), str(one["reason"])]
        for generation in population.generations
        for one in generation.refused
    ]
    trained = {name for results in population.results for result in results for name in result.names}
    if population.results:
        for name, design in population.designs.items():
            if name not in trained:
                rows.append([f"{name}: {design.text}", design.origin, why_not_trained(population, name)])
    return [["design", "origin", "why it was not trained"], *rows] if rows else []


def why_not_trained(population: Population, name: str) -> str:
    """Of a candidate that was attached."""
    if name in population.failed:
        return population.failed[name]
    most = population.plan.budget.max_latency
    latency = population.latency.get(name)
    if most is not None and latency is not None and latency > most:
        return f"a forward takes {latency:.2f} x the frozen model's, of {most:g}"
    return ""


def _design_text(method: Any, lr: float) -> str:
    return f"{method_text(parse_method(method))}, lr {lr:g}"


def plan_facts(plan: SearchPlan) -> dict[str, str]:
    """What was searched, in a few words."""
    budget = plan.budget
    limits = {
        "trainable parameters, at most": budget.max_trainable_parameters,
        "bytes, at most": budget.max_bytes,
    }
    facts = {"methods": ", ".join(plan.space.method), "candidates": str(plan.candidates)}
    facts |= {name: f"{value:,}" for name, value in limits.items() if value is not None}
    if budget.max_latency is not None:
        facts["a forward's time, at most"] = f"{budget.max_latency:g} x the frozen model's"
    if plan.goal.max_forgetting is not None:
        facts["wiki may rise by"] = f"{plan.goal.max_forgetting:g} bits per byte"
    if plan.goal.against:
        facts["traded against"] = ", ".join(plan.goal.against).replace("_", " ")
    low, high = plan.space.lr.ends
    return {**facts, "learning rates": f"{low:g} to {high:g} x the method's own", "seed": str(plan.seed)}
