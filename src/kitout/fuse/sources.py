"""Sources of fusion: adapters of a kit, or compositions of them, each as one change of the base.

A composition is its route taken apart, as merging has it. Where all that acts at a module are low-rank products that
add up, a source's change there is their weighted sum, in the factors; elsewhere it is the difference that the fold
makes, one module at a time, in fp32 or better. It knows routes and folds, and neither rules nor what a result may hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kitout.base.weights import parameter_at
from kitout.errors import Errors, NotMergeable, RouteError
from kitout.fuse.changes import Change, Place, Places, add_scaled, product_changes
from kitout.method import Method
from kitout.route import Composed, Mix, RouteEntry, Stack
from kitout.runtime.adapter import Adapter
from kitout.runtime.merge.fold import ModuleFolder
from kitout.runtime.merge.foldable import check_foldable, expand_foldable
from kitout.runtime.merge.pairs import working_dtype
from kitout.runtime.modules.composed import mixing_weights
from kitout.runtime.modules.module_adapter import ModuleAdapter
from kitout.runtime.state import KitState


@dataclass
class Source:
    """One adapter, or a composition, as something that changes the base."""

    adapter: Adapter
    """What was named."""
    entry: RouteEntry
    """What it stands for, compositions taken apart."""
    adapters: Sequence[Adapter]
    """Those in the entry: itself, or what it is made of."""

    def __post_init__(self) -> None:
        self._by_name = {adapter.name: adapter for adapter in self.adapters}
        self.folder = ModuleFolder(self.adapters, self.entry)
        self.head_paths = {path for adapter in self.adapters for path in adapter.heads_by_path()}

    @property
    def name(self) -> str:
        """The adapter's."""
        return self.adapter.name

    @property
    def methods(self) -> list[Method]:
        """Of the adapters in it."""
        return [adapter.method for adapter in self.adapters]

    @property
    def usages(self) -> list[dict[str, Any] | None]:
        """How it is used, as it says itself, else as its parts say."""
        own = self.adapter.usage
        return [own] if own is not None else [each.usage for each in self.adapters if not each.method.part_names()]

    def head_at(self, path: str) -> Adapter | None:
        """The adapter whose head, as it is, takes this module's place; None where heads are blended or changed."""
        head = self.folder.replacing_head(path)
        return next((a for a in self.adapters if head is not None and a.heads_by_path().get(path) is head), None)

    def addends(self, path: str) -> dict[ModuleAdapter, float] | None:
        """What acts at a module with its weight, where the source is their sum if each of them only adds to the output;
        None where one acts on the input after another has changed the module.
        """
        return self._addends(self.entry, path)

    def _addends(self, entry: RouteEntry, path: str) -> dict[ModuleAdapter, float] | None:
        if entry is None:
            return {}
        if isinstance(entry, str):
            own = self._by_name[entry].by_module.get(path)
            return {} if own is None else {own: 1.0}
        if isinstance(entry, Composed):
            own = self._by_name[entry.name].by_module.get(path)
            if own is None:
                return {}
            weighted = [(part, float(w)) for part, w in zip(entry.parts, mixing_weights(own), strict=True)]
        else:
            assert isinstance(entry, (Stack, Mix))
            weighted = list(entry.parts) if isinstance(entry, Mix) else [(part, 1.0) for part in entry.parts]
        found: dict[ModuleAdapter, float] = {}
        for part, weight in weighted:
            of_part = self._addends(part, path)
            if of_part is None or (isinstance(entry, Stack) and found and any(m.on_input for m in of_part)):
                return None
            for m, w in of_part.items():
                found[m] = found.get(m, 0.0) + weight * w
        return found

    def products(self, path: str, places: Places) -> dict[str, Change] | None:
        """The changes at a module by products alone; None where they are not."""
        addends = self.addends(path)
        total: dict[str, Change] = {}
        for m, weight in ({} if addends is None else addends).items():
            changes = product_changes(m, places)
            if changes is None:
                return None
            for name, change in changes.items():
                total[name] = add_scaled(total.get(name), change, weight)
        return None if addends is None else total


def source_of(state: KitState, adapter: Adapter) -> Source:
    """An adapter of the kit as a source. NotMergeable for a composition that has no form in weights."""
    by_name = {name: state[name] for name in state.names}
    try:
        return Source(adapter, *expand_foldable(adapter.name, by_name, state.survey))
    except RouteError as reason:
        message = str(reason)
        raise NotMergeable(message if repr(adapter.name) in message else f"{adapter.name!r}: {message}") from None


def sources_of(state: KitState, adapters: Sequence[Adapter]) -> list[Source]:
    """Adapters as sources. NotMergeable that names each that has no form in weights, the part that is in the way, and
    what to write.
    """
    errors = Errors(NotMergeable, "these changes are no sum of weights")
    sources: list[Source] = []
    for adapter in adapters:
        try:
            source = source_of(state, adapter)
        except NotMergeable as reason:
            errors.add(str(reason))
            continue
        sources.append(source)
        unfit = [a for a in source.adapters if not a.method.mergeable and not a.method.part_names()]
        for part in unfit:
            kind = type(part.method).__name__
            if part is adapter:
                errors.add(
                    f"{adapter.name!r} is a {kind}, which no weights of the base can hold; how='parameters' averages "
                    "adapters of one config"
                )
                continue
            rest = ", ".join(repr(a.name) for a in source.adapters if a not in unfit and not a.method.part_names())
            errors.add(
                f"{adapter.name!r} has the part {part.name!r}, a {kind}, which no weights of the base can hold: "
                + (f"combine the others by their names: {rest}" if rest else "use it as it is, beside the base")
            )
        inside = Errors(NotMergeable, "")
        if not unfit:
            check_foldable(source.adapters, inside)
        for message in inside.messages:
            is_named = source.adapters == [adapter] or message.startswith(repr(adapter.name))
            errors.add(message if is_named else f"{adapter.name!r}: {message}")
    errors.raise_if_any()
    return sources


@torch.no_grad()
def read_changes(
    state: KitState, places: Places, sources: Sequence[Source]
) -> Iterator[tuple[Place, list[Change | None]]]:
    """Every place that any of the sources changes, with the change of each (None: it does not). Heads are left out."""
    folders = [ModuleFolder(source.adapters, source.entry) for source in sources]
    by_path = dict.fromkeys(path for folder in folders for path in folder.paths)
    # What changes parameters of other modules comes first, and is kept until those modules had their turn.
    from_outside = [p for p in by_path if any(p in f.paths and not f.acts_on_values(p) for f in folders)]
    kept: dict[str, list[Change | None]] = {}
    for path in [*from_outside, *(p for p in by_path if p not in from_outside)]:
        here: dict[str, list[Change | None]] = {}
        for i, (source, folder) in enumerate(zip(sources, folders, strict=True)):
            if path not in folder.paths or path in source.head_paths:
                continue
            changes = None
            if len(source.adapters) == 1 or not (path in from_outside or folder.changed_from_outside(path)):
                changes = source.products(path, places)
            if changes is None:
                changes = _folded(state, folder, path, places)
            for name, change in changes.items():
                here.setdefault(name, [None] * len(sources))[i] = change
        if path in from_outside:
            for name, by_source in here.items():
                _overlay(kept.setdefault(name, [None] * len(sources)), by_source)
            continue
        for name, by_source in here.items():
            merged = kept.pop(name, [None] * len(sources))
            _overlay(merged, by_source)
            yield places[name], merged
    for name in list(kept):
        yield places[name], kept.pop(name)


def _overlay(into: list[Change | None], later: Sequence[Change | None]) -> None:
    for i, change in enumerate(later):
        if change is not None:
            into[i] = change


def _folded(state: KitState, folder: ModuleFolder, path: str, places: Places) -> dict[str, Change]:
    """The differences of the module's folded parameters from the frozen ones."""
    try:
        new = folder.fold(path)
    except NotMergeable as reason:
        raise NotMergeable(f"{path} ({', '.join(folder.module_adapters(path))}): {reason}") from None
    module, inside = state.base.get_submodule(path), f"{path}." if path else ""
    changes: dict[str, Change] = {}
    for name, value in new.parameters.items():
        old = parameter_at(module, name)
        dtype = working_dtype(value)
        difference = value.to(dtype) if old is None else value.to(dtype) - old.to(dtype)
        changes[inside + name] = places[inside + name].from_stored(difference)
    return changes
