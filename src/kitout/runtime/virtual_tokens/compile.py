"""Compiling what lies in front of the text: prompts, prefixes and visual prompts of a route, stack by stack.

Around the programs that `bind` has made it lays those of attentions, of the modules that own the stacks, of tables and
of blocks. What each of them does is in `past.py`, `stage.py`, `lead.py`, `widen.py` and `slots.py`. It knows stacks as
the probe has seen them, and no method.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from kitout.base.survey import Survey, Tower
from kitout.delta import Pair
from kitout.errors import RouteError
from kitout.runtime.adapter import Adapter
from kitout.runtime.hooks.class_swap import Program, root
from kitout.runtime.modules.module_adapter import Part
from kitout.runtime.modules.rows import Plan
from kitout.runtime.routing.active import Bound, Live
from kitout.runtime.routing.route import Entry, Stack, names
from kitout.runtime.virtual_tokens.forward_state import Here
from kitout.runtime.virtual_tokens.image_tokens import Held, Slots, Slotted
from kitout.runtime.virtual_tokens.layout import Layout, Which, joined, layout
from kitout.runtime.virtual_tokens.positions import Positions, Stage, Table
from kitout.runtime.virtual_tokens.prefix_kv import Past
from kitout.runtime.virtual_tokens.prompt_prefill import Ahead, Joint, Lead
from kitout.runtime.virtual_tokens.widen_sequence import Trim, Widening

Record = dict[str, Pair]
Compile = Callable[[Entry, Record], Bound]  # an entry whose attentions' own keys and values are recorded


def paths(adapter: Adapter, found: Survey) -> Iterator[str]:
    """Every module that an adapter's prompts and prefixes need tapped."""
    yield from adapter.pasts
    for tower in found.towers:
        prefixed = any(part.site.tower == tower.path for part in adapter.pasts.values())
        if not prefixed and not adapter.tokens:
            continue
        if tower.owner is not None:
            yield from (p for p in (tower.owner, tower.table, tower.positions, tower.body) if p or p == tower.owner)
        if tower.path in adapter.tokens:
            yield from (s.path for s in found.attentions if s.tower == tower.path)
            yield from (b.path for b in found.blocks if b.tower == tower.path and b.whole)


@dataclass
class Front:
    """What lies in front of one route's rows. compile: makes a route's programs with its keys recorded."""

    programs: dict[str, Program]
    entries: Sequence[Entry]
    adapters: Mapping[str, Adapter]
    plan: Plan | None
    taps: Container[str]
    found: Survey
    here: Here
    live: Live
    compile: Compile

    def lay(self, record: Record | None) -> None:
        """Adds the programs. record: takes the attentions' own keys and values of every stack that is tapped."""
        across: Widening | None = None
        for tower in self.found.towers:
            if tower.owner is None:
                self._image(tower, record)
            else:
                across = self._text(tower, across, record) or across

    def _laid(self, tower: Tower, which: Which, role: str = "kv.self") -> list[Layout]:
        return [layout(e, self.adapters, tower.path, which, role) for e in self.entries]

    def _attend(self, tower: Tower, own: Sequence[Layout], record: Record | None, slots: Slots | None = None) -> None:
        """The programs of a stack's attentions."""
        cross = self._laid(tower, "past", "kv.cross")
        pasts = {name: self.adapters[name].pasts for e in self.entries for name in names(e)}
        for site in self.found.attentions:
            if site.tower != tower.path:
                continue
            laid = cross if site.role == "kv.cross" else own
            parts = [[pasts[i.name].get(site.path) for i in each.items] for each in laid]
            reached = any(p is not None or i.tokens for each, ps in zip(laid, parts, strict=True)
                          for i, p in zip(each.items, ps, strict=True))  # fmt: skip
            noted = record if site.path in self.taps else None
            hides = slots is not None and site.layer is not None and slots.hides(site.layer)
            if reached or noted is not None or hides:
                then = self.programs.get(site.path)
                self.programs[site.path] = Past(site, laid, parts, self.plan, self.here, then, noted, slots)

    # ---- text --------------------------------------------------------------------------------------------------

    def _text(self, tower: Tower, across: Widening | None, record: Record | None) -> Widening | None:
        """The programs of a stack fed from a token table; its widening, if it has one and another stack reads it."""
        tokens = self._laid(tower, "tokens")
        for each in tokens:
            if len({i.after for i in each.items}) > 1:
                raise RouteError("a Stack of prompts before the text and after its first token: choose one place")
        prompted = any(each.items for each in tokens)
        own = self._laid(tower, "past")
        if tower.causal:
            own = [joined(past, each) for past, each in zip(own, tokens, strict=True)]
        leads = widening = None
        if prompted and tower.causal:
            leads = self._leads(tower, tokens)
        elif prompted:
            widening = self._widening(tower, tokens)
        self._attend(tower, own, record)
        assert tower.owner is not None
        crossing = across if self._reads(tower) else None
        if any(each.length for each in own) or prompted or crossing is not None:
            if tower.positions:
                self._check_table(tower, [max(a.length, b.length) for a, b in zip(own, tokens, strict=True)])
                self._wrap(tower.positions, Positions)
            if widening is not None:
                self._wrap(tower.table, Table)
            then = self.programs.get(tower.owner)
            relative = any(s.bias is not None for s in self.found.attentions if s.tower == tower.path)
            self.programs[tower.owner] = Stage(
                tower, own, self.plan, self.here, self.live, leads, widening, crossing, then, relative
            )
        return widening if widening is not None and widening.crossed else None

    def _wrap(self, path: str, kind: type[Table | Positions]) -> None:
        self.programs[path] = kind(path, self.here, self.programs.get(path))

    def _check_table(self, tower: Tower, lengths: Sequence[int]) -> None:
        """RouteError where an entry has its own table of positions, whose rows are not asked for from outside."""
        if root(self.found.model.get_submodule(tower.positions)).forward is nn.Embedding.forward:
            return
        for entry, length in zip(self.entries, lengths, strict=True):
            held = [n for n in names(entry) if tower.positions in self.adapters[n].locals]
            if length and held:
                raise RouteError(
                    f"{held[0]!r} changes {tower.positions}, which counts positions for itself: it cannot be stacked "
                    "with a prompt or a prefix, whose text has other positions"
                )

    def _reads(self, tower: Tower) -> bool:
        """Whether the stack has cross-attention."""
        return any(s.role.startswith("cross.") and s.tower == tower.path for s in self.found.sites)

    def _parts(self, tower: Tower, laid: Layout) -> list[Part]:
        return [part for item in laid.items for part in self.adapters[item.name].tokens[tower.path]]

    def _widening(self, tower: Tower, tokens: Sequence[Layout]) -> Widening:
        crossed = not self._reads(tower) and any(self._reads(t) for t in self.found.towers)
        widening = Widening(tower.path, tower.table, [self._parts(tower, t) for t in tokens], self.plan, crossed)
        if not crossed:
            end = tower.body or [b.path for b in self.found.blocks if b.tower == tower.path][-1]
            self.programs[end] = Trim(tower.path, self.here, self.programs.get(end))
        return widening

    def _leads(self, tower: Tower, tokens: Sequence[Layout]) -> Lead:
        ahead: list[Ahead | None] = []
        for entry, laid in zip(self.entries, tokens, strict=True):
            if not laid.items:
                ahead.append(None)
                continue
            keys: Record = {}
            rest = _without(entry, {i.name for i in laid.items})
            ahead.append(Ahead(self._parts(tower, laid), self.compile(rest, keys), keys))
        attentions = [s.path for s in self.found.attentions if s.tower == tower.path and s.role == "kv.self"]
        whole = [b.path for b in self.found.blocks if b.tower == tower.path and b.whole]
        for first in whole[:1]:
            self.programs[first] = Joint(attentions, self.here, self.programs.get(first))
        module = self.found.model.get_submodule
        blocks = [module(path) for path in whole]
        return Lead(tower.path, module(tower.table), blocks, ahead, self.plan, self.here, self.live)

    # ---- images ------------------------------------------------------------------------------------------------

    def _image(self, tower: Tower, record: Record | None) -> None:
        tokens = self._laid(tower, "tokens")
        slots = None
        if any(each.items for each in tokens):
            slots = Slots(
                [[self._held(tower, i.name, i.offset, i.length) for i in t.items] for t in tokens], self.plan, self.here
            )
            blocks = [b for b in self.found.blocks if b.tower == tower.path]
            for path, why in self.found.closed.items():
                if path.startswith(f"{tower.path}.") and any(slots.hides(b.index) for b in blocks):
                    raise RouteError(
                        f"rows with different numbers of visual prompts: {path} cannot leave any of them out: {why}"
                    )
            for block in blocks:
                last = block is blocks[-1]
                if slots.touches(block.index) or last:
                    then = self.programs.get(block.path)
                    self.programs[block.path] = Slotted(slots, block.index, last, then)
        self._attend(tower, self._laid(tower, "past"), record, slots)

    def _held(self, tower: Tower, name: str, offset: int, length: int) -> Held:
        parts = {p.site.layer: p for p in self.adapters[name].tokens[tower.path] if p.site.layer is not None}
        return Held(offset, length, parts)


def _without(entry: Entry, gone: set[str]) -> Entry:
    """The entry without some adapters, which stand in it by themselves or in Stacks."""
    if isinstance(entry, str):
        return None if entry in gone else entry
    if isinstance(entry, Stack):
        return Stack(*(_without(part, gone) for part in entry.parts))
    return entry
