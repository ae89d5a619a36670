"""report.html of a search: the answer, what was confirmed, fronts, maps, every decision and the cost, in one file.

It is written after each rung as things stand and once more at the end, in the look of a run's report: no script, and
nothing outside the file. Pictures lie beside it. It knows a population and a confirmation, and decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from kitout.evaluate.metrics.measure import format_value
from kitout.evaluate.metrics.registry import metric_title
from kitout.evaluate.report.charts import Chart
from kitout.evaluate.report.html import template
from kitout.format import format_bytes, format_duration, format_number
from kitout.search.confirmation import Confirmation, Confirmed
from kitout.search.pages.decisions import RungText, plan_facts, refused_rows, rung_texts
from kitout.search.pages.fronts import front_charts, last_scores
from kitout.search.pages.pictures import write_pictures
from kitout.search.pages.site_map import SiteMap, gradient_maps, training_maps
from kitout.search.plan.schema import SearchPlan
from kitout.search.population.population import Population
from kitout.search.search_folder import RECOMMENDED_FILE, REPORT_FILE, SearchFolder
from kitout.train.config.seeds import adapter_name

ADAPTERS = "confirm/adapter"  # below the folder of the search
WIKI = "wiki"  # the set whose change is limited


@dataclass(frozen=True, kw_only=True)
class SearchPage:
    """What the page shows."""

    title: str
    """The model and the data."""
    answer: str
    """In one sentence; of a search that runs, how far it is."""
    recommendation: list[str]
    """Sentences below it."""
    kind: str
    """"good" where a design beats the run's own, else empty."""
    is_finished: bool
    """Whether the designs are confirmed; before, the page loads itself anew."""
    commands: list[str] = field(default_factory=list)
    """What to type next, in the folder of the report."""
    confirmed: list[list[str]] = field(default_factory=list)
    """The table of the test split, its head first."""
    confirmed_note: str = ""
    """What is in it."""
    verdicts: list[str] = field(default_factory=list)
    """Of each against the run's own, in words."""
    adapters: Mapping[str, list[str]] = field(default_factory=dict)
    """By confirmed design: folders of its adapters below the report's."""
    charts: list[Chart] = field(default_factory=list)
    """Quality against each cost."""
    charts_note: str = ""
    """How to read them."""
    maps: list[SiteMap] = field(default_factory=list)
    """Blocks x roles."""
    rungs: list[RungText]
    """What was decided."""
    rungs_note: str
    """By which rule."""
    refused: list[list[str]]
    """What was not trained, and why."""
    cost: Mapping[str, str]
    """Of the whole search."""
    plan: Mapping[str, str]
    """What was searched."""


def write_report(
    population: Population, folder: SearchFolder, confirmation: Confirmation | None = None,
    of_run: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """report.html and its pictures. of_run: what results.json of the confirmation holds; None: it is still to come."""
    page = search_page(population, confirmation, of_run or {})
    write_pictures(page.charts, page.maps, folder.path)
    folder.write_text(REPORT_FILE, str(_load_template().render(page=page)))
    return folder.path / REPORT_FILE


@cache
def _load_template() -> Any:
    return template(files(__package__).joinpath("search.html").read_text(encoding="utf-8"))


def search_page(population: Population, confirmation: Confirmation | None, of_run: Mapping[str, Any]) -> SearchPage:
    """All values of the page."""
    plan = population.plan
    forgotten = confirmed_rises(plan, confirmation, of_run)
    answer, recommendation = _answer(population, confirmation)
    designs = () if confirmation is None else confirmation.designs
    best = next((one for one in designs if confirmation and one.name == confirmation.recommended), None)
    is_better = best is not None and best.against_default is not None and best.against_default.is_better
    limit = plan.goal.max_forgetting
    not_measured = "" if limit is not None else " With goal.max_forgetting, forgetting is measured as well."
    note = (
        "A candidate stands where the last rung that it reached has measured it on the validation split, a confirmed "
        "design at its mean over the seeds. A dashed line joins designs that no other one beats in both."
    )
    return SearchPage(
        title=f"{Path(plan.run.model.name).name} on {', '.join(Path(one.path).name for one in plan.run.data.train)}",
        answer=answer, recommendation=recommendation, kind="good" if is_better else "",
        is_finished=confirmation is not None,
        commands=[f"kitout train {RECOMMENDED_FILE}"] if confirmation is not None and confirmation.recommended else [],
        confirmed=_confirmed_rows(population, confirmation, forgotten),
        confirmed_note=_confirmed_note(plan, confirmation),
        verdicts=[f"{one.name}: {one.verdict}" for one in designs if one.verdict],
        adapters=adapters_of(plan, confirmation),
        charts=front_charts(population, confirmation, forgotten), charts_note=note + not_measured,
        maps=_maps(population), rungs=rung_texts(population),
        rungs_note=(
            "By the goal's metric on the validation split. p: paired by example, against the last of the best; those "
            "that do not differ significantly (p above 0.05) go on as well while examples are left in the budget."
        ),
        refused=refused_rows(population), cost=_cost_facts(population, of_run), plan=plan_facts(plan),
    )  # fmt: skip


def adapters_of(plan: SearchPlan, confirmation: Confirmation | None) -> dict[str, list[str]]:
    """By confirmed design the folders of its adapters, below that of the search."""
    designs = () if confirmation is None else confirmation.designs
    return {one.name: [f"{ADAPTERS}/{adapter_name(one.name, s)}" for s in plan.confirm.seeds] for one in designs}


def confirmed_rises(plan: SearchPlan, confirmation: Confirmation | None, of_run: Mapping[str, Any]) -> dict[str, float]:
    """By confirmed design: the mean rise of the bits per byte of wiki over its seeds, where it was measured."""
    measured = of_run.get("forgetting", {})
    rises: dict[str, float] = {}
    for one in confirmation.designs if confirmation else ():
        names = [adapter_name(one.name, seed) for seed in plan.confirm.seeds]
        sets = [measured[name]["sets"] for name in names if name in measured]
        own = [values[WIKI]["difference"] for values in sets if WIKI in values]
        if own and all(value is not None for value in own):
            rises[one.name] = sum(own) / len(own)
    return rises


def _answer(population: Population, confirmation: Confirmation | None) -> tuple[str, list[str]]:
    if confirmation is None:
        done, planned, going = len(population.results), len(population.rungs), population.alive
        if done == planned:
            return f"All {planned} rungs are done; the best designs are being confirmed on the test split", []
        names = ", ".join(one.name for one in going)
        return f"Rung {done} of {planned} is done; {len(going)} designs go on, and nothing is confirmed yet", [names]
    if not confirmation.recommended:
        return f"{confirmation.answer}.", []
    design = next((one for name, one in population.designs.items() if name == confirmation.recommended), None)
    if design is None:
        return f"{confirmation.answer}.", [f"Recommended: {confirmation.recommended}."]
    what = f"Recommended: {design.name}, {design.text}: {design.trainable:,} trainable parameters"
    latency = population.latency.get(design.name)
    time = "" if latency is None else f", a forward takes {latency:.2f} x the frozen model's"
    return f"{confirmation.answer}.", [f"{what}, {format_bytes(design.bytes)}{time}."]


def _confirmed_rows(
    population: Population, confirmation: Confirmation | None, forgotten: Mapping[str, float]
) -> list[list[str]]:
    if confirmation is None:
        return []
    share, title = confirmation.share, metric_title(confirmation.metric) + (" %" if confirmation.share else "")
    head = ["design", "what it is", f"{title} (95 % interval)", "by seed", "trainable", "forward"]
    rows = [[*head, *(["wiki"] if forgotten else []), "difference to the run's own"]]
    for one in confirmation.designs:
        design, latency = population.designs.get(one.name), population.latency.get(one.name)
        ends = "" if one.low is None or one.high is None else (
            f" ({format_value(one.low, share)} to {format_value(one.high, share)})"
        )  # fmt: skip
        rise = forgotten.get(one.name)
        rows.append([
            one.name, "the run's own" if design is None else design.text, f"{format_value(one.mean, share)}{ends}",
            ", ".join(format_value(value, share) for value in one.by_seed),
            "" if design is None else f"{design.trainable:,}", "" if latency is None else f"{latency:.2f} x",
            *([("" if rise is None else format_number(rise, sign=True))] if forgotten else []), _difference(one),
        ])  # fmt: skip
    return rows


def _difference(one: Confirmed) -> str:
    """With its interval and the p-value after Holm's correction."""
    against = one.against_default
    if against is None:
        return ""
    ends = (against.difference, against.low, against.high)
    value, low, high = (format_value(end, against.share, sign=True) for end in ends)
    return f"{value} ({low} to {high}), " + ("no verdict" if against.adjusted is None else f"p {against.adjusted:.2g}")


def _confirmed_note(plan: SearchPlan, confirmation: Confirmation | None) -> str:
    if confirmation is None:
        return ""
    seeds = ", ".join(map(str, plan.confirm.seeds))
    return (
        f"Trained anew with the seeds {seeds}, for the whole length, and judged on test examples that no rung saw. "
        "Intervals of a mean are over the test examples, of a difference over seeds and examples; p after Holm's "
        "correction."
    )


def _maps(population: Population) -> list[SiteMap]:
    steps = population.length.steps
    reached = {name: population.ends[one.rung] / steps for name, one in last_scores(population).items()}
    places: dict[str, Any] = {}
    energies: list[Any] = []
    for generation in population.generations:
        places |= {name: [tuple(place) for place in own] for name, own in generation.places.items() if name in reached}
        energies += [tuple(one) for one in generation.energies]
    return [*training_maps(places, reached), *gradient_maps(energies)]


def _cost_facts(population: Population, of_run: Mapping[str, Any]) -> dict[str, str]:
    cost = population.cost()
    facts = {
        "trainings of one design": f"{cost['trainings']:.2f}",
        "examples": f"{cost['examples']:,.0f} of {population.max_examples:,}",
        "time of the rungs, measuring included": format_duration(cost["seconds"]),
        "of which training": format_duration(cost["training_seconds"]),
        "peak memory": format_bytes(cost["memory"]) if cost["memory"] else "not measured",
    }
    if "seconds" in of_run:
        facts["training of the confirmation"] = format_duration(float(of_run["seconds"]))
    return facts
