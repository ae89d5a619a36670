"""A whole search: a plan in, a design out that was judged on test data it had not seen. The same call resumes it.

Look at the run, propose, train a rung, measure, decide, and again; then confirm and write. What each of these is stands
in the modules beside. It knows the order of the work.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from kitout.assess.cost import measure_prefill
from kitout.search.confirmation import Confirmation, confirm
from kitout.search.outputs import show_finished, write_outputs
from kitout.search.pages.report import write_report
from kitout.search.plan.load import load_plan, read_values
from kitout.search.plan.rungs import plan_rungs
from kitout.search.plan.schema import SearchPlan
from kitout.search.population.design import Design
from kitout.search.population.forgetting import wiki_rises
from kitout.search.population.generation import Generation, generation_sizes, propose_generation
from kitout.search.population.look import Look, look_at
from kitout.search.population.population import Population
from kitout.search.population.proposals import check_optuna
from kitout.search.population.rung import Length, RungResult, train_rung
from kitout.search.preflight import preflight_text
from kitout.search.ray_tune import check_ray, train_by_ray
from kitout.search.search_folder import SearchFolder, open_search_folder
from kitout.train.loop.stop_on_signal import interrupt_on_sigterm
from kitout.train.setup.find_inputs import check_inputs
from kitout.train.setup.prepare import PreparedRun

LogFn = Callable[[str], None]


@dataclass(frozen=True)
class SearchResult:
    """What a search came to."""

    folder: Path
    """Of the search."""
    confirmation: Confirmation | None = None
    """The verdicts; None of a dry run, and of a search that was finished before."""
    recommended: Mapping[str, Any] = field(default_factory=dict)
    """The run that is recommended, as recommended.yaml has it; empty where no design keeps the budget."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """What search.json holds."""


def run(
    plan: SearchPlan | Mapping[str, Any] | str | PathLike[str], *, dry_run: bool = False, log: LogFn = print
) -> SearchResult:
    """Searches what a plan, a mapping or a plan.yaml describes; the same call resumes a search that was stopped.

    dry_run: stops before the first rung. log: gets the lines to print. ConfigError before anything expensive if
    something is wrong.
    """
    if not isinstance(plan, SearchPlan):
        plan = load_plan(read_values(plan), log)
    check_optuna()
    if plan.engine == "ray":
        check_ray()
    check_inputs(plan.run)
    with interrupt_on_sigterm(), open_search_folder(plan) as folder:
        if folder.results.is_file():
            figures = show_finished(folder, log)
            return SearchResult(folder.path, None, figures["recommended_run"], figures)
        population, start = prepare_population(plan, folder, log)
        if dry_run:
            return SearchResult(folder.path)
        train_rungs(population, folder, log)
        default = Design.from_dict(start["default"])
        front = population.front(but=default.name)[: plan.confirm.designs]
        finalists = [population.with_limits(one) for one in (default, *front)]
        names, seeds = (", ".join(map(str, each)) for each in ([one.name for one in finalists], plan.confirm.seeds))
        log(f"\nconfirming {names} on the test split, with the seeds {seeds} ...")
        confirmation, of_run = confirm(plan, population.length, finalists, folder.confirmation, population.metric, log)
        figures = write_outputs(population, finalists, confirmation, of_run, folder, log)
        return SearchResult(folder.path, confirmation, figures["recommended_run"], figures)


def prepare_population(plan: SearchPlan, folder: SearchFolder, log: LogFn) -> tuple[Population, dict[str, Any]]:
    """A population without a candidate, and what the first look at the run has found; both are shown."""
    start, look = _look(plan, folder, log)
    rungs = plan_rungs(plan.candidates, plan.halving.factor, plan.halving.first)
    population = Population(plan, Length(**start["length"]), rungs, start["max_examples"], look)
    log(preflight_text(population, start))
    return population, start


def train_rungs(population: Population, folder: SearchFolder, log: LogFn) -> None:
    """Proposes, trains, measures and decides, rung by rung."""
    _first_rung(population, folder, log)
    for _ in population.rungs[1:]:
        if population.alive:
            _next_rung(population, folder, log)


def _look(plan: SearchPlan, folder: SearchFolder, log: LogFn) -> tuple[dict[str, Any], Look | None]:
    """What is kept of the first look at the run, and the look itself where designs are still to be proposed."""
    start = folder.read("start")
    if start is not None and folder.read(f"proposals-{len(generation_sizes(plan)) - 1}") is not None:
        return start, None
    look = look_at(plan, None if start is None else Length(**start["length"]), log)
    if start is None:
        start = {
            "length": asdict(look.length), "default": look.default.to_dict(), "max_examples": look.max_examples,
            "head_parameters": look.head_parameters, "seconds": look.seconds, "validation": look.num_validation,
        }  # fmt: skip
        folder.write("start", start)
    return start, look


def _first_rung(population: Population, folder: SearchFolder, log: LogFn) -> None:
    """Proposes each generation, knowing what the one before has shown, and trains it for the first rung."""
    plan, rungs = population.plan, population.rungs
    results: list[RungResult] = []
    for number, size in enumerate(generation_sizes(plan)):
        generation = _propose(population, folder, number, size, results, log)
        population.generations.append(generation)
        population.designs |= {one.name: one for one in generation.designs}
        if not generation.designs:
            continue
        log(f"\nrung 1 of {len(rungs)}: {len(generation.designs)} designs, steps 1 to {population.ends[0]}")
        choose = partial(_choose_fast, plan, folder, number, log)
        results += _train(population, generation.designs, folder.rung(0, number), {}, log, choose)
        population.latency |= folder.read(f"latency-{number}") or {}
    _decide(population, results, folder, log)


def _propose(
    population: Population, folder: SearchFolder, number: int, size: int, results: Sequence[RungResult], log: LogFn
) -> Generation:
    """Designs, or those that were proposed at an earlier start. The look's base is not kept beside a rung's."""
    kept = folder.read(f"proposals-{number}")
    if kept is not None:
        population.look = None
        return Generation.from_dict(kept)
    look = population.look or look_at(population.plan, population.length, log)
    earlier = list(population.designs.values())
    shown = population.shown(results)
    generation = propose_generation(population.plan, look, number, size, earlier, shown, log)
    folder.write(f"proposals-{number}", generation.to_dict())
    look.prepared.kit.detach()
    population.look = None
    return generation


def _next_rung(population: Population, folder: SearchFolder, log: LogFn) -> None:
    """The survivors of the rung before go on from where they stopped."""
    number, ends, designs = len(population.results), population.ends, population.alive
    log(
        f"\nrung {number + 1} of {len(population.rungs)}: {len(designs)} designs, steps {ends[number - 1] + 1} to "
        f"{ends[number]}"
    )
    before = {design.name: population.checkpoints[design.name] for design in designs}
    results = _train(population, designs, folder.rung(number), before, log)
    _decide(population, results, folder, log)


def _train(
    population: Population, designs: Sequence[Design], folder: Path, before: Mapping[str, Path], log: LogFn,
    choose: Callable[[PreparedRun], Collection[str]] | None = None,
) -> list[RungResult]:  # fmt: skip
    """Trains designs for the rung that comes next, by the plan's engine, and takes over what they have come to."""
    plan, length, number = population.plan, population.length, len(population.results)
    end, is_limited = population.ends[number], plan.goal.max_forgetting is not None
    asks = is_limited and (number > 0 or len(population.rungs) == 1)  # a short first rung says little of forgetting
    if plan.engine == "ray":
        found = train_by_ray(plan, length, designs, folder, end, before, log, choose=choose, measures_rises=asks)
        if asks:  # each trial has measured all of its own; no more is known of them than where rungs are trained here
            measured = {name: rise for result, _ in found for name, rise in result.rises.items()}
            asked = _rises(population, [result for result, _ in found], measured.__getitem__)
            found = [
                (replace(result, rises={name: asked[name] for name in result.names if name in asked}), place)
                for result, place in found
            ]
    else:

        def measure_rises(run: PreparedRun, result: RungResult) -> dict[str, float]:
            return _rises(population, [result], lambda name: wiki_rises(run, [name], plan.seed, log)[name])

        measure = measure_rises if asks else None
        found = [
            (train_rung(plan, length, designs, folder, end, before, log, choose=choose, measure_rises=measure), folder)
        ]
    for result, place in found:
        population.add(result, place)
    return [result for result, _ in found]


def _choose_fast(
    plan: SearchPlan, folder: SearchFolder, generation: int, log: LogFn, run: PreparedRun
) -> Collection[str]:
    """The candidates within the limit of latency, timed once and kept, so that a resumed search decides alike."""
    names = [job.name for job in run.jobs]
    kept = folder.read(f"latency-{generation}")
    if kept is None:
        log(f"timing a forward with each of {len(names)} designs ...")
        kept = measure_prefill(run.kit, {name: name for name in names})
        folder.write(f"latency-{generation}", kept)
    most = plan.budget.max_latency
    slow = [name for name in names if most is not None and kept.get(name, 1.0) > most]
    for name in slow:
        log(f"{name} takes {kept[name]:.2f} x the frozen model's forward, of {most:g}: not trained")
    if len(slow) == len(names):
        fastest = min(names, key=lambda name: kept[name])
        log(f"every design is over budget.max_latency={most:g}; {fastest}, the fastest, is trained all the same")
        slow.remove(fastest)
    return [name for name in names if name not in slow]


def _rises(population: Population, results: Sequence[RungResult], measure: Callable[[str], float]) -> dict[str, float]:
    """What those that would stay have made the model forget, asked one by one until enough keep the limit.

    All are asked where who stays depends on it in the first place.
    """
    measured: dict[str, float] = {}

    def ask(name: str) -> float:
        if name not in measured:
            measured[name] = measure(name)
        return measured[name]

    if "forgetting" in population.plan.goal.against:
        for result in results:
            for name in result.names:
                if name not in result.diverged:
                    ask(name)
    else:
        population.decide(results, ask)
    return measured


def _decide(population: Population, results: Sequence[RungResult], folder: SearchFolder, log: LogFn) -> None:
    """Keeps what became of each candidate, and says it; the report has it as well."""
    decisions = population.finish_rung(results)
    write_report(population, folder)
    stay = [one.name for one in decisions if one.stays]
    tied = sum(one.what == "tied" for one in decisions)
    more = f", {tied} of them because they do not differ significantly from the last of the best" if tied else ""
    log(f"after rung {len(population.results)}: {len(stay)} of {len(decisions)} stay{more}: {', '.join(stay)}")
