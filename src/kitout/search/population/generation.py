"""The designs of one generation: the run's own, those of the sites' ranking and of earlier runs first, then proposals.

Each is counted before it is built, so none is over the budget, and none is tried twice. Candidates come in two
generations: what the first has shown after the first rung is known when the second is proposed. It knows designs and
what was measured of earlier ones, and trains nothing.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kitout.errors import ConfigError, KitoutError
from kitout.method import Method
from kitout.methods.lora import LoRA
from kitout.search.allocation import Criterion, allocate
from kitout.search.plan.schema import SearchPlan
from kitout.search.population.design import Design, count_design, identity
from kitout.search.population.look import Look
from kitout.search.population.proposals import params_of, propose
from kitout.signals.site_signals import Signals
from kitout.train.config.method_field import method_to_dict, parse_method
from kitout.train.measure.run_history import history_file, read_rows
from kitout.train.objectives.signals_of_items import NUM_ITEMS, first_items, signals_of_items

MIN_FOR_TWO = 8  # candidates, for two generations
TRIAL = "trial"  # the name of a design that is attached to see whether it can be
RANKED_BY: tuple[Criterion, ...] = ("gradient", "eva")
MAX_WARM = 0.25  # of the candidates
MIN_PROBED = 32  # examples that sites are ranked by, where the first rung has fewer
DEFAULT_RANK = 8  # whose parameters the ranking divides where the plan has no limit


@dataclass(frozen=True)
class Generation:
    """What was proposed together. (The names are keys of proposals.json.)"""

    designs: tuple[Design, ...]
    """Those that are trained."""
    refused: tuple[dict[str, Any], ...]
    """Designs that are not, each with its reason."""
    places: dict[str, list[list[Any]]] = field(default_factory=dict)
    """By design where it acts, as (tower, block, role), each once; outside the blocks at none."""
    energies: list[list[Any]] = field(default_factory=list)
    """What the sites' ranking has found, as (tower, block, role, gradient energy); empty where nothing was ranked."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        own = {"places": self.places, "energies": self.energies}
        return {"designs": [one.to_dict() for one in self.designs], "refused": list(self.refused), **own}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Generation:
        """What `to_dict` gave."""
        designs, refused = tuple(map(Design.from_dict, values["designs"])), tuple(values["refused"])
        return cls(designs, refused, values["places"], values["energies"])


def generation_sizes(plan: SearchPlan) -> list[int]:
    """How many candidates each generation has."""
    is_single = plan.candidates < MIN_FOR_TWO or plan.halving.first >= 1
    first = plan.candidates if is_single else (plan.candidates + 1) // 2
    return [first, plan.candidates - first] if plan.candidates > first else [first]


def propose_generation(
    plan: SearchPlan, look: Look, number: int, size: int, earlier: Sequence[Design],
    results: Sequence[tuple[Mapping[str, Any], Sequence[float]]], log: Callable[[str], None],
) -> Generation:  # fmt: skip
    """Designs that are new and within the budget; fewer than `size` where the space has no more.

    earlier: of the generations before. results: of those, their params and values.
    """
    known = {identity(one.method, one.lr, look.survey) for one in earlier}
    designs: list[Design] = []
    refused: list[dict[str, Any]] = []
    if number == 0 and look.default.over_budget:  # trained in the confirmation alone
        known.add(identity(look.default.method, look.default.lr, look.survey))
    found = _rank_sites(plan, look, log) if number == 0 else None
    for params, method, lr, origin in _candidates(plan, look, number, size, found, results, log):
        if len(designs) == size:
            break
        cost = count_design(method, look.survey, look.head_parameters)
        reason = cost.problem or cost.over(plan.budget)
        if reason:
            shown = {"method": method_to_dict(method), "lr": lr, "origin": origin, "reason": reason}
            if shown["method"] not in [one["method"] for one in refused]:
                refused.append(shown)
            continue
        key = identity(method, lr, look.survey)
        if key in known:
            continue
        known.add(key)
        if problem := _problem_attached(method, look):
            refused.append({"method": method_to_dict(method), "lr": lr, "origin": origin, "reason": problem})
            continue
        is_default = origin == look.default.origin
        name = look.default.name if is_default else f"{type(method).__name__.lower()}-{len(earlier) + len(designs):02d}"
        designs.append(Design(name, method, lr, origin, params, cost.trainable, cost.bytes))
    if not designs and number == 0:
        reasons = "; ".join(sorted({str(one["reason"]) for one in refused})[:3])
        raise ConfigError(f"no design of the space can be trained within the budget: {reasons}")
    energies = [[one.tower, one.layer, one.role, one.gradient_energy] for one in (found or {}).values()]
    return Generation(tuple(designs), tuple(refused), {one.name: _places(one, look) for one in designs}, energies)


def _problem_attached(method: Method, look: Look) -> str:
    """Why the model does not take this method, which some say only when they are built; "" where it does."""
    kit = look.prepared.kit
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again where it is trained
            kit.add(TRIAL, method.without_start())
    except KitoutError as error:
        return str(error)
    kit.remove(TRIAL)
    return ""


def _places(design: Design, look: Look) -> list[list[Any]]:
    sites = [site for site in design.method.sites(look.survey) if site.layer is not None]
    return [list(place) for place in dict.fromkeys((site.tower, site.layer, site.role) for site in sites)]


def _candidates(
    plan: SearchPlan, look: Look, number: int, size: int, found: Signals | None,
    results: Sequence[tuple[Mapping[str, Any], Sequence[float]]], log: Callable[[str], None],
) -> Iterator[tuple[Mapping[str, Any], Method, float, str]]:  # fmt: skip
    """(params, method, learning rate, origin), in the order in which they are tried."""
    if number == 0:
        own = look.default
        if not own.over_budget:
            yield own.params, own.method, own.lr, own.origin
        for method, origin in _ranked(plan, look, found, log):
            lr = own.lr if type(method) is type(own.method) else method.training_defaults().lr
            yield {}, method, lr, origin
        for method, lr in _from_history(plan, look, log) if plan.warm else ():
            yield params_of(method, lr, plan.space), method, lr, "an earlier run"
    for params, method, lr in propose(plan, number, results, size):
        yield params, method, lr, "proposed"


def _rank_sites(plan: SearchPlan, look: Look, log: Callable[[str], None]) -> Signals | None:
    """One pass over the data, where the space has LoRA."""
    if not any(isinstance(plan.space.build(name, {}), LoRA) for name in plan.space.method):
        return None
    kit, job = look.prepared.kit, look.prepared.jobs[0]
    # no more than the first rung trains on: a pass costs as much
    first = round(plan.halving.first * look.length.steps * look.length.batch_size)
    items = first_items(job.examples, job.batches, min(NUM_ITEMS, max(MIN_PROBED, first)))
    log(f"probing the sites, one pass over the first {len(items)} examples ...")
    heads = kit[job.name].heads_by_path()
    return signals_of_items(kit, job.objective, items, heads=heads, seed=job.settings.seed)


def _ranked(
    plan: SearchPlan, look: Look, found: Signals | None, log: Callable[[str], None]
) -> Iterator[tuple[Method, str]]:
    """LoRA with the ranks that follow from what was found."""
    if found is None:
        return
    most = plan.budget.max_trainable_parameters
    whole = sum(min(DEFAULT_RANK, site.max_rank) * site.cost for site in found.values())
    budget = whole if most is None else min(whole, most - look.head_parameters)
    for by in RANKED_BY:
        try:
            yield allocate(found, budget, by), f"ranks by {by}"
        except ConfigError as error:
            log(f"no ranks by {by}: {error}")


def _from_history(plan: SearchPlan, look: Look, log: Callable[[str], None]) -> Iterator[tuple[Method, float]]:
    """Designs of the nearest finished runs whose method the space has, the nearest first."""
    from kitout.runtime.count import num_base_parameters
    from kitout.search.advise import PlannedRun, advise_from
    from kitout.train.measure.run_history import ModelShape

    file = history_file()
    rows = [] if file is None else read_rows(file)
    kit, prepared = look.prepared.kit, look.prepared
    shape = ModelShape.of(kit.survey.towers, getattr(kit.base, "config", None), num_base_parameters(kit.base))
    planned = PlannedRun(shape, prepared.objective, len(prepared.first_dataset.train))
    known = {type(plan.space.build(name, {})).__name__ for name in plan.space.method}
    advice = advise_from(rows, planned, limit=plan.candidates)
    designs: dict[str, tuple[Method, float]] = {}
    gained = sorted((one for one in advice.nearest if one.gain is not None), key=lambda one: one.distance)
    for one in gained:
        design = one.design
        if design["method"] in known:
            method = parse_method({"name": design["method"], **design["settings"]})
            designs.setdefault(json.dumps(design, sort_keys=True), (method, design["lr"]))
    most = max(1, round(MAX_WARM * plan.candidates))
    log(str(advice) if not designs else f"{min(most, len(designs))} designs of earlier runs are tried first")
    yield from list(designs.values())[:most]
