"""Compiling a route into programs: which tap runs what.

It knows adapters only as `Local`s by module path, and nothing of methods, files or how a route is chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from kitout.base.survey import Survey
from kitout.delta import KeyValue
from kitout.errors import RouteError
from kitout.runtime.adapter import Adapter, conflict_with_head
from kitout.runtime.hooks.class_swap import Hook, Program
from kitout.runtime.modules.module_adapter import InputRelay, ModuleAdapter
from kitout.runtime.modules.programs import (
    DirectDelta,
    RelayInput,
    Single,
    SwapParameters,
    Term,
    TermSequence,
    WeightedSum,
    WholeBatch,
)
from kitout.runtime.modules.rows import PerRow, RowPlan
from kitout.runtime.modules.stacked_weights import on_top_of
from kitout.runtime.routing.active import ActiveRoute, CompiledRoute
from kitout.runtime.routing.route import Mix, Route, RouteEntry, adapter_names
from kitout.runtime.virtual_tokens.compile import VirtualTokenCompiler
from kitout.runtime.virtual_tokens.forward_state import ForwardSlot


def compile_route(
    route: Route,
    adapters: Mapping[str, Adapter],
    hooks: Mapping[str, Hook],
    survey: Survey,
    active: ActiveRoute,
    kv_recorder: dict[str, KeyValue] | None = None,
) -> CompiledRoute:
    """Programs for every module that the route's adapters sit at or read from.

    record: takes the self-attentions' own keys and values, by path, at every forward under this route.
    """
    rows = {s.path: s.batch_relation for n in adapter_names(route) for s in adapters[n].sites}
    bound = CompiledRoute(route, num_rows=len(route) if isinstance(route, tuple) else None)
    worn = [adapters[n] for n in dict.fromkeys(adapter_names(route))]
    programs: dict[str, Program] = {}
    plan, entries = _plan_rows(route)
    bound.row_plan = plan
    for entry in entries:
        _check_heads([adapters[n] for n in dict.fromkeys(adapter_names(entry))])
    for path in dict.fromkeys(p for a in worn for p in a.by_module):
        program = (
            _program_for_batch(entries[0], adapters, path)
            if plan is None
            else _program_for_rows(plan, entries, adapters, path, rows.get(path, "batch"))
        )
        if program is not None:
            programs[path] = program
    notes: dict[str, list[InputRelay]] = {}
    for adapter in worn:
        for path, sources in adapter.input_relays.items():
            notes.setdefault(path, []).extend(sources)
    for path, sources in notes.items():
        programs[path] = RelayInput(sources, programs.get(path))
    if kv_recorder is not None or any(a.prefixes or a.prompts for a in worn):
        bound.forward_slot = ForwardSlot()
        compiled = partial(compile_route, adapters=adapters, hooks=hooks, survey=survey, active=active)
        VirtualTokenCompiler(
            programs,
            entries,
            adapters,
            plan,
            hooks,
            survey,
            bound.forward_slot,
            active,
            lambda e, keys: compiled(e, kv_recorder=keys),
        ).add_programs(kv_recorder)
    bound.programs = [(hooks[path], program) for path, program in programs.items()]
    return bound


def _check_heads(adapters: Sequence[Adapter]) -> None:
    """RouteError where one adapter's head takes the place of a module in which another one sits."""
    found = conflict_with_head(adapters)
    if found:
        raise RouteError(f"{found}; wear them one at a time")


def _plan_rows(route: Route) -> tuple[RowPlan | None, list[RouteEntry]]:
    """The distinct entries, and which row wears which; no plan where all rows wear the same."""
    if not isinstance(route, tuple):
        return None, [route]
    distinct = list(dict.fromkeys(route))
    if len(distinct) == 1:
        return None, distinct
    return RowPlan([distinct.index(e) for e in route], len(distinct)), distinct


def _module_adapters(entry: RouteEntry, adapters: Mapping[str, Adapter], path: str) -> Iterable[ModuleAdapter]:
    for name in dict.fromkeys(adapter_names(entry)):
        if path in adapters[name].by_module:
            yield adapters[name].by_module[path]


def _term(
    entry: RouteEntry, adapters: Mapping[str, Adapter], path: str, stacked_on: Sequence[Term] = ()
) -> Term | None:
    """The entry's map at one module, or None where it has nothing there. below: what it is stacked on."""
    if entry is None:
        return None
    if isinstance(entry, str):
        local = adapters[entry].by_module.get(path)
        # A copy: the strength is that of this moment, also when activations are recomputed after it has changed.
        return None if local is None else Single(on_top_of(replace(local), stacked_on))
    if isinstance(entry, Mix):
        weighted = [(_term(part, adapters, path, stacked_on), w) for part, w in entry.parts]
        present = [(t, w) for t, w in weighted if t is not None]
        return WeightedSum(present) if present else None
    terms: list[Term] = []
    for part in entry.parts:
        term = _term(part, adapters, path, [*stacked_on, *terms])
        if term is not None:
            terms.append(term)
    return terms[0] if len(terms) == 1 else TermSequence(terms) if terms else None


def _program_for_batch(entry: RouteEntry, adapters: Mapping[str, Adapter], path: str) -> Program | None:
    term = _term(entry, adapters, path)
    if term is None:
        return None
    locals_ = list(_module_adapters(entry, adapters, path))
    names_held = dict.fromkeys(n for loc in locals_ for part in loc.on_parameters for n in part.site.parameter_names)
    if not any(loc.on_input or loc.on_output for loc in locals_):
        return SwapParameters(term, list(names_held))
    program = _program_for_values(term, locals_)
    return SwapParameters(term, list(names_held), program) if names_held else program


def _program_for_values(term: Term, module_adapters: list[ModuleAdapter]) -> Program:
    """The program of a module's input and output."""
    site = module_adapters[0].site
    if isinstance(term, Single):
        local = term.module_adapter
        part = local.on_output[0] if len(local.on_output) == 1 and not local.on_input else None
        if part and part.is_direct and local.strength == 1.0 and site.kind == "linear":
            delta = part.delta
            if not (delta.reads_weight or delta.replaces_module):
                return DirectDelta(delta)
        return WholeBatch(term, local.replaces_module, site.kind == "linear", local.relays, local.call_views)
    sources, calls = (
        [s for loc in module_adapters for s in loc.relays],
        [c for loc in module_adapters for c in loc.call_views],
    )
    return WholeBatch(term, False, site.kind == "linear", sources, calls)


def _program_for_rows(
    row_plan: RowPlan, entries: Iterable[RouteEntry], adapters: Mapping[str, Adapter], path: str, rows: str
) -> Program | None:
    entries = list(entries)
    terms = [_term(e, adapters, path) for e in entries]
    if all(t is None for t in terms):
        return None
    locals_ = dict.fromkeys(loc for e in entries for loc in _module_adapters(e, adapters, path))
    held = sorted({loc.name for loc in locals_ if loc.on_parameters})
    if held:
        raise RouteError(
            f"{', '.join(held)}: rows of one batch cannot each have their own {_parameter_names(locals_)}, a "
            "parameter of "
            f"{path or 'the model'} itself and of no linear, norm or table; use one adapter for the whole batch"
        )
    sources, calls = [s for loc in locals_ for s in loc.relays], [c for loc in locals_ for c in loc.call_views]
    return PerRow(row_plan, terms, path, rows, sources, calls)


def _parameter_names(module_adapters: Iterable[ModuleAdapter]) -> str:
    return ", ".join(
        dict.fromkeys(n for loc in module_adapters for part in loc.on_parameters for n in part.site.parameter_names)
    )
