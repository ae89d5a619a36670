"""Compiling a route into programs: which hook runs what.

It knows adapters only as `ModuleAdapter`s by module path, and nothing of methods, files or how a route is chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace

from kitout.base.survey import Survey, Tower
from kitout.delta import Delta, KeyValue
from kitout.errors import RouteError
from kitout.route import Average, Route, RouteEntry, adapter_names, check_entry, simplify
from kitout.runtime.adapter import Adapter, conflict_with_head, trained_and_read
from kitout.runtime.hooks.class_swap import Hook, Program, original_class
from kitout.runtime.modules.composed import ComposedTerm
from kitout.runtime.modules.fast_path import WithoutFastPath, layers_around
from kitout.runtime.modules.fused import fuse
from kitout.runtime.modules.module_adapter import InputRelay, ModuleAdapter, SiteDelta
from kitout.runtime.modules.programs import DirectDelta, RelayInput, SwapParameters, WholeBatch
from kitout.runtime.modules.real_positions import RealPositions, RecordRealPositions, averaging_tower, averaging_towers
from kitout.runtime.modules.rows import PerRow, PerRowWeights, RowPlan
from kitout.runtime.modules.shared_input import SharedInput
from kitout.runtime.modules.stacked_weights import on_top_of
from kitout.runtime.modules.terms import Single, Term, build_term
from kitout.runtime.output_width import output_width
from kitout.runtime.routing.active import ActiveRoute, CompiledRoute
from kitout.runtime.routing.expand import expand
from kitout.runtime.virtual_tokens.compile import VirtualTokenCompiler
from kitout.runtime.virtual_tokens.forward_state import ForwardSlot
from kitout.runtime.virtual_tokens.positions import parameter_names


class RouteCompiler:
    """Compiles routes for one model and the adapters it has now."""

    def __init__(
        self, adapters: Mapping[str, Adapter], hooks: Mapping[str, Hook], survey: Survey, active: ActiveRoute
    ) -> None:
        self.adapters, self.hooks, self.survey, self.active = adapters, hooks, survey, active

    def compile(self, route: Route, kv_recorder: dict[str, KeyValue] | None = None) -> CompiledRoute:
        """Programs for every module that the route's adapters sit at or read from.

        kv_recorder: takes the self-attentions' own keys and values, by path, at every forward under this route.
        """
        removed = [name for name in adapter_names(route) if name not in self.adapters]
        if removed:
            raise RouteError(
                f"{removed[0]!r} was removed after the `with` that this context took it from had ended: choose another "
                "route in this task or thread, or await it inside the `with`"
            )
        expanded, adapters = expand(route, self.adapters, self.survey)
        average = expanded if isinstance(expanded, Average) else None
        if isinstance(expanded, Average):
            expanded = tuple(part for part, _ in expanded.parts)
        compiler = RouteCompiler(adapters, self.hooks, self.survey, self.active)
        compiled = compiler.compile_expanded(expanded, kv_recorder)
        compiled.route, compiled.average = route, average
        return compiled

    def compile_expanded(self, route: Route, kv_recorder: dict[str, KeyValue] | None = None) -> CompiledRoute:
        """The same for a route whose compositions are taken apart."""
        row_plan, entries = _plan_rows(route)
        simplified = [simplify(entry) for entry in entries]
        names = dict.fromkeys(name for entry in simplified for name in adapter_names(entry))
        adapters = [self.adapters[name] for name in names]
        for entry in simplified:
            conflict = conflict_with_head([self.adapters[n] for n in dict.fromkeys(adapter_names(entry))])
            if conflict:
                raise RouteError(f"{conflict}; use them one at a time")
            if shared := trained_and_read([self.adapters[n] for n in dict.fromkeys(adapter_names(entry))]):
                raise RouteError(
                    f"{shared} is trained whole by one of {', '.join(adapter_names(entry))} and changed by another: "
                    "use them one at a time"
                )
        self.slot = slot = ForwardSlot()
        averaging = self._averaging_towers(adapters)
        media_plan = None if row_plan is None or not self.survey.media else copy(row_plan)
        programs = self._module_programs(adapters, row_plan, media_plan, simplified)
        for tower in averaging.values():
            if tower.embedder is not None:
                owner = self.survey.model.get_submodule(tower.embedder)
                arguments = parameter_names(original_class(owner).forward)
                place = arguments.index("attention_mask") if "attention_mask" in arguments else None
                inner = programs.get(tower.embedder)
                programs[tower.embedder] = RecordRealPositions(tower.path, slot, place, inner)
        num_rows = len(route) if isinstance(route, tuple) else None
        compiled = CompiledRoute(route, num_rows=num_rows, row_plan=row_plan, media_plan=media_plan)
        heads = {path: head for adapter in adapters for path, head in adapter.heads_by_path().items()}
        compiled.output_width = output_width(self.survey.model, heads) if heads else None
        if averaging:
            compiled.forward_slot = slot
        if kv_recorder is not None or any(a.prefixes or a.prompts for a in adapters):
            compiled.forward_slot = slot
            VirtualTokenCompiler(
                programs,
                entries,
                self.adapters,
                row_plan,
                media_plan,
                self.hooks,
                self.survey,
                compiled.forward_slot,
                self.active,
                self.compile_expanded,
            ).add_programs(kv_recorder)
        self._share_inputs(programs)
        for path in layers_around(self.survey.model, programs):
            programs[path] = WithoutFastPath(programs.get(path))
        compiled.programs = [(self.hooks[path], program) for path, program in programs.items()]
        return compiled

    def _module_programs(
        self,
        adapters: Sequence[Adapter],
        row_plan: RowPlan | None,
        media_plan: RowPlan | None,
        entries: Sequence[RouteEntry],
    ) -> dict[str, Program]:
        """By path, in model order: what each module does, and which leave their input for another."""
        sites = [site for adapter in adapters for site in adapter.sites]
        batch_relation = {site.path: site.batch_relation for site in sites if site.reader is None}
        programs: dict[str, Program] = {}
        for path in dict.fromkeys(path for adapter in adapters for path in adapter.by_module):
            plan = media_plan if path in self.survey.media else row_plan
            acting = {adapter.name for adapter in adapters if path in adapter.by_module}
            there = [simplify(entry, acting.__contains__) for entry in entries]
            if plan is None or len(set(there)) == 1:
                program = self._program_for_batch(there[0], path)  # all rows have the same here
            else:
                program = self._program_for_rows(plan, there, path, batch_relation.get(path, "batch"))
            if program is not None:
                programs[path] = program
        relays: dict[str, list[InputRelay]] = {}
        for adapter in adapters:
            for path, of_adapter in adapter.input_relays.items():
                relays.setdefault(path, []).extend(of_adapter)
        for path, of_module in relays.items():
            programs[path] = RelayInput(of_module, programs.get(path))
        return programs

    def _share_inputs(self, programs: Mapping[str, Program]) -> None:
        """Lets linears that are called with the same tensor compute together, where their Deltas can."""
        for paths in self.survey.shared_inputs:
            by_key: dict[object, list[tuple[str, DirectDelta | PerRow]]] = {}
            for path in paths:
                program = programs.get(path)
                if isinstance(program, DirectDelta | PerRow) and program.fusing_key is not None:
                    by_key.setdefault(program.fusing_key, []).append((path, program))
            for members in by_key.values():
                if len(members) > 1:
                    modules = [self.hooks[path].module for path, _ in members]
                    first = members[0][1]
                    shared = SharedInput(modules, first.fuse_with([program for _, program in members]))
                    for number, (_, program) in enumerate(members):
                        program.shared_input, program.number = shared, number

    def _module_adapters(self, entry: RouteEntry, path: str) -> list[ModuleAdapter]:
        return [self.adapters[name].by_module[path] for name in dict.fromkeys(adapter_names(entry))]

    def _term(self, entry: RouteEntry, path: str) -> Term | None:
        """The entry's map at one module, or None where it has nothing there."""

        def single(name: str, stacked_on: Sequence[Term]) -> Term | None:
            # A copy: the strength is that of this moment, also when activations are recomputed after it has changed.
            return Single(on_top_of(replace(self.adapters[name].by_module[path]), stacked_on))

        def combined(name: str, parts: Sequence[Term | None], _: Sequence[Term]) -> Term:
            fused = [None if part is None else fuse(part) for part in parts]
            own = replace(self.adapters[name].by_module[path])
            own.on_parts = tuple(map(self._with_real_positions, own.on_parts))
            return ComposedTerm(own, fused)

        term = build_term(entry, single, combined)
        return None if term is None else fuse(term)

    def _averaging_towers(self, adapters: Iterable[Adapter]) -> dict[str, Tower]:
        """The stacks where something is averaged over real positions, by path."""
        return {
            tower.path: tower for adapter in adapters for tower in averaging_towers(self.survey, adapter.site_deltas())
        }

    def _with_real_positions(self, part: SiteDelta) -> SiteDelta:
        tower = averaging_tower(self.survey, part.site, part.delta)
        if tower is None:
            return part
        part = copy(part)
        part.real_positions = RealPositions(self.slot, tower.path)
        return part

    def _program_for_batch(self, entry: RouteEntry, path: str) -> Program | None:
        term = self._term(entry, path)
        if term is None:
            return None
        module_adapters = self._module_adapters(entry, path)
        own, read = _own_names(module_adapters), _read_names(module_adapters)
        if not any(m.on_input or m.on_output for m in module_adapters):
            return SwapParameters(term, own, read)
        by_run = own if term.num_runs > 1 else []
        program = _program_for_values(term, module_adapters, by_run)
        return SwapParameters(term, [] if by_run else own, read, program) if read or (own and not by_run) else program

    def _program_for_rows(
        self, row_plan: RowPlan, entries: Sequence[RouteEntry], path: str, batch_relation: str
    ) -> Program | None:
        terms = [self._term(entry, path) for entry in entries]
        if all(term is None for term in terms):
            return None
        module_adapters = list(dict.fromkeys(m for entry in entries for m in self._module_adapters(entry, path)))
        whole_batch_only = sorted({m.name for m in module_adapters if m.on_parameters})
        if whole_batch_only:
            raise RouteError(
                f"{', '.join(whole_batch_only)}: rows of one batch cannot each have their own "
                f"{', '.join(_own_names(module_adapters))}, a parameter of {path or 'the model'} itself and of "
                "no linear, norm or table; use one adapter for the whole batch"
            )
        of_terms = [m for term in terms if term is not None for m in term.module_adapters]
        relays = list(dict.fromkeys(relay for m in of_terms for relay in m.relays))
        call_views = [view for m in module_adapters for view in m.call_views]
        per_row = PerRow(row_plan, terms, path, self._relation(path, batch_relation), relays, call_views)
        read = next((part.site for m in module_adapters for part in m.on_weights), None)
        if read is None:
            return per_row
        inner = per_row if any(m.on_input or m.on_output for m in module_adapters) else None
        relation = self._relation(path, read.batch_relation)
        names = _read_names(module_adapters)
        return PerRowWeights(row_plan, terms, names, path, relation, read.batch_axis, inner)

    def _relation(self, path: str, batch_relation: str) -> str:
        """A row may have several images, which one value per row does not rule out."""
        return "multiple" if batch_relation == "batch" and path in self.survey.media else batch_relation


def _plan_rows(route: Route) -> tuple[RowPlan | None, list[RouteEntry]]:
    """The distinct entries, and which row has which; no plan where all rows have the same."""
    if not isinstance(route, tuple):
        return None, [check_entry(route)]
    distinct = list(dict.fromkeys(route))
    if len(distinct) == 1:
        return None, distinct
    return RowPlan([distinct.index(entry) for entry in route], len(distinct)), distinct


def _program_for_values(term: Term, module_adapters: Sequence[ModuleAdapter], names: Sequence[str]) -> Program:
    """The program of a module's input and output. names: of its own parameters that differ between its runs."""
    site = module_adapters[0].site
    if isinstance(term, Single):
        single = term.module_adapter
        part = single.on_output[0] if len(single.on_output) == 1 and not single.on_input else None
        if part and part.is_direct and single.strength == 1.0 and site.kind == "linear":
            delta = part.delta
            is_fusable = type(delta).fused_linear is not Delta.fused_linear
            if not delta.replaces_module and (is_fusable or not delta.reads_weight):
                return DirectDelta(delta, part.frozen)
        return WholeBatch(term, single.replaces_module, site.kind == "linear", single.relays, single.call_views)
    relays = list(dict.fromkeys(relay for m in term.module_adapters for relay in m.relays))
    call_views = [view for m in module_adapters for view in m.call_views]
    return WholeBatch(term, False, site.kind == "linear", relays, call_views, names)


def _own_names(module_adapters: Iterable[ModuleAdapter]) -> list[str]:
    names = (name for m in module_adapters for part in m.on_parameters for name in part.site.parameter_names)
    return list(dict.fromkeys(names))


def _read_names(module_adapters: Iterable[ModuleAdapter]) -> list[str]:
    return list(dict.fromkeys(name for m in module_adapters for part in m.on_weights for name in part.read_names))
