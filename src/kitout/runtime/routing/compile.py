"""Compiling a route into programs: which tap runs what.

It knows adapters only as `Local`s by module path, and nothing of methods, files or how a route is chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from kitout.base.survey import Survey
from kitout.delta import Pair
from kitout.errors import RouteError
from kitout.runtime.adapter import Adapter, hidden
from kitout.runtime.hooks.class_swap import Program, Tap
from kitout.runtime.modules.module_adapter import Local, Source
from kitout.runtime.modules.programs import Blend, Chain, Direct, Exchange, Note, One, Term, Whole
from kitout.runtime.modules.rows import Plan, Rows
from kitout.runtime.modules.stacked_weights import raised
from kitout.runtime.routing.active import Bound, Live
from kitout.runtime.routing.route import Entry, Mix, Route, names
from kitout.runtime.virtual_tokens.compile import Front
from kitout.runtime.virtual_tokens.forward_state import Here


def bind(
    route: Route,
    adapters: Mapping[str, Adapter],
    taps: Mapping[str, Tap],
    found: Survey,
    live: Live,
    record: dict[str, Pair] | None = None,
) -> Bound:
    """Programs for every module that the route's adapters sit at or read from.

    record: takes the self-attentions' own keys and values, by path, at every forward under this route.
    """
    rows = {s.path: s.rows for n in names(route) for s in adapters[n].sites}
    bound = Bound(route, rows=len(route) if isinstance(route, tuple) else None)
    worn = [adapters[n] for n in dict.fromkeys(names(route))]
    programs: dict[str, Program] = {}
    plan, entries = _plan(route)
    bound.plan = plan
    for entry in entries:
        _check_heads([adapters[n] for n in dict.fromkeys(names(entry))])
    for path in dict.fromkeys(p for a in worn for p in a.locals):
        program = (
            _whole(entries[0], adapters, path)
            if plan is None
            else _rows(plan, entries, adapters, path, rows.get(path, "batch"))
        )
        if program is not None:
            programs[path] = program
    notes: dict[str, list[Source]] = {}
    for adapter in worn:
        for path, sources in adapter.notes.items():
            notes.setdefault(path, []).extend(sources)
    for path, sources in notes.items():
        programs[path] = Note(sources, programs.get(path))
    if record is not None or any(a.pasts or a.tokens for a in worn):
        bound.here = Here()
        compiled = partial(bind, adapters=adapters, taps=taps, found=found, live=live)
        Front(
            programs, entries, adapters, plan, taps, found, bound.here, live, lambda e, keys: compiled(e, record=keys)
        ).lay(record)
    bound.items = [(taps[path], program) for path, program in programs.items()]
    return bound


def _check_heads(worn: Sequence[Adapter]) -> None:
    """RouteError where one adapter's head takes the place of a module in which another one sits."""
    found = hidden(worn)
    if found:
        raise RouteError(f"{found}; wear them one at a time")


def _plan(route: Route) -> tuple[Plan | None, list[Entry]]:
    """The distinct entries, and which row wears which; no plan where all rows wear the same."""
    if not isinstance(route, tuple):
        return None, [route]
    distinct = list(dict.fromkeys(route))
    if len(distinct) == 1:
        return None, distinct
    return Plan([distinct.index(e) for e in route], len(distinct)), distinct


def _locals(entry: Entry, adapters: Mapping[str, Adapter], path: str) -> Iterable[Local]:
    for name in dict.fromkeys(names(entry)):
        if path in adapters[name].locals:
            yield adapters[name].locals[path]


def _term(entry: Entry, adapters: Mapping[str, Adapter], path: str, below: Sequence[Term] = ()) -> Term | None:
    """The entry's map at one module, or None where it has nothing there. below: what it is stacked on."""
    if entry is None:
        return None
    if isinstance(entry, str):
        local = adapters[entry].locals.get(path)
        # A copy: the strength is that of this moment, also when activations are recomputed after it has changed.
        return None if local is None else One(raised(replace(local), below))
    if isinstance(entry, Mix):
        weighted = [(_term(part, adapters, path, below), w) for part, w in entry.parts]
        present = [(t, w) for t, w in weighted if t is not None]
        return Blend(present) if present else None
    terms: list[Term] = []
    for part in entry.parts:
        term = _term(part, adapters, path, [*below, *terms])
        if term is not None:
            terms.append(term)
    return terms[0] if len(terms) == 1 else Chain(terms) if terms else None


def _whole(entry: Entry, adapters: Mapping[str, Adapter], path: str) -> Program | None:
    term = _term(entry, adapters, path)
    if term is None:
        return None
    locals_ = list(_locals(entry, adapters, path))
    names_held = dict.fromkeys(n for loc in locals_ for part in loc.params for n in part.site.names)
    if not any(loc.ins or loc.outs for loc in locals_):
        return Exchange(term, list(names_held))
    program = _on_values(term, locals_)
    return Exchange(term, list(names_held), program) if names_held else program


def _on_values(term: Term, locals_: list[Local]) -> Program:
    """The program of a module's input and output."""
    site = locals_[0].site
    if isinstance(term, One):
        local = term.local
        part = local.outs[0] if len(local.outs) == 1 and not local.ins else None
        if part and part.simple and local.strength == 1.0 and site.kind == "linear":
            delta = part.delta
            if not (delta.reads_weight or delta.replaces):
                return Direct(delta)
        return Whole(term, local.replaces, site.kind == "linear", local.sources, local.calls)
    sources, calls = [s for loc in locals_ for s in loc.sources], [c for loc in locals_ for c in loc.calls]
    return Whole(term, False, site.kind == "linear", sources, calls)


def _rows(
    plan: Plan, entries: Iterable[Entry], adapters: Mapping[str, Adapter], path: str, rows: str
) -> Program | None:
    entries = list(entries)
    terms = [_term(e, adapters, path) for e in entries]
    if all(t is None for t in terms):
        return None
    locals_ = dict.fromkeys(loc for e in entries for loc in _locals(e, adapters, path))
    held = sorted({loc.name for loc in locals_ if loc.params})
    if held:
        raise RouteError(
            f"{', '.join(held)}: rows of one batch cannot each have their own {_shown(locals_)}, a parameter of "
            f"{path or 'the model'} itself and of no linear, norm or table; use one adapter for the whole batch"
        )
    sources, calls = [s for loc in locals_ for s in loc.sources], [c for loc in locals_ for c in loc.calls]
    return Rows(plan, terms, path, rows, sources, calls)


def _shown(locals_: Iterable[Local]) -> str:
    return ", ".join(dict.fromkeys(n for loc in locals_ for part in loc.params for n in part.site.names))
