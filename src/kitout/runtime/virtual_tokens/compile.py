"""Compiling the virtual tokens of a route: prompts, prefixes and visual prompts, stack by stack.

Around the programs of modules it puts those of attentions, of the modules that own the stacks, of tables and of blocks.
What each of them does is in `prefix_kv.py`, `positions.py`, `prompt_prefill.py`, `widen_sequence.py` and
`image_tokens.py`. It knows stacks as the probe has seen them, and no method.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from kitout.base.survey import Survey, Tower
from kitout.base.token_limit import num_positions
from kitout.delta import KeyValue
from kitout.errors import RouteError
from kitout.route import RouteEntry, Stack, adapter_names
from kitout.runtime.adapter import Adapter
from kitout.runtime.hooks.class_swap import Program, original_class
from kitout.runtime.modules.module_adapter import SiteDelta
from kitout.runtime.modules.real_positions import averaging_towers
from kitout.runtime.modules.rows import RowPlan
from kitout.runtime.routing.active import ActiveRoute, CompiledRoute
from kitout.runtime.virtual_tokens.forward_state import ForwardSlot
from kitout.runtime.virtual_tokens.image_tokens import ImageTokenBlock, ImageTokenGroup, ImageTokens
from kitout.runtime.virtual_tokens.layout import TokenKind, TokenLayout, layout_of, prefixes_then_prompts
from kitout.runtime.virtual_tokens.positions import (
    OwnPositions,
    PositionEmbeddingProgram,
    PositionIdsProgram,
    TextEntry,
    TokenEmbeddingProgram,
    parameter_names,
)
from kitout.runtime.virtual_tokens.prefix_kv import PrefixAttention
from kitout.runtime.virtual_tokens.prompt_prefill import JoinPromptGraph, PromptEntry, PromptPrefill
from kitout.runtime.virtual_tokens.widen_sequence import SequenceWidener, TrimOutput

KeyValueRecorder = dict[str, KeyValue]
CompileEntry = Callable[[RouteEntry, KeyValueRecorder], CompiledRoute]


def modules_to_hook(adapter: Adapter, survey: Survey) -> Iterator[str]:
    """Every module that an adapter's prompts and prefixes, or its averages over positions, need a hook at."""
    yield from (tower.embedder or "" for tower in averaging_towers(survey, adapter.site_deltas()))
    yield from adapter.prefixes
    yield from (s.path for s in survey.kv_sites if s.shares_kv_of in adapter.prefixes)
    for tower in survey.towers:
        prefixed = any(part.site.tower == tower.path for part in adapter.prefixes.values())
        if not prefixed and not adapter.prompts:
            continue
        if tower.embedder is not None:
            yield from (
                p
                for p in (tower.embedder, tower.token_embedding, tower.position_embedding, tower.block_runner)
                if p or p == tower.embedder
            )
            yield from _blocks_without_attention(survey, tower)
        if tower.path in adapter.prompts:
            yield from (s.path for s in survey.kv_sites if s.tower == tower.path)
            yield from (b.path for b in survey.blocks if b.tower == tower.path and b.is_one_module)


@dataclass
class VirtualTokenCompiler:
    """Compiles the virtual tokens of one route."""

    programs: dict[str, Program]
    """The route's programs so far, by module path; more are added, around these."""
    entries: Sequence[RouteEntry]
    """The route's distinct entries."""
    adapters: Mapping[str, Adapter]
    """All adapters, by name."""
    row_plan: RowPlan | None
    """Which row has which entry; None: one for the whole batch."""
    media_plan: RowPlan | None
    """The same for stacks that see images or sounds beside a text."""
    hooks: Container[str]
    """Paths of modules with a hook."""
    survey: Survey
    """The base's towers, blocks and sites."""
    forward_slot: ForwardSlot
    """Where the programs find the state of the forward in progress."""
    active: ActiveRoute
    """What is installed on the model."""
    compile_entry: CompileEntry
    """Compiles an entry so that its attentions' own keys and values are recorded."""

    def add_programs(self, kv_recorder: KeyValueRecorder | None) -> None:
        """Adds the programs. kv_recorder: takes the attentions' own keys and values where there is a hook."""
        across: SequenceWidener | None = None
        for tower in self.survey.towers:
            if tower.embedder is None:
                self._add_image_tower(tower, kv_recorder)
            else:
                across = self._add_text_tower(tower, across, kv_recorder) or across

    def _row_plan(self, tower: Tower) -> RowPlan | None:
        return self.media_plan if self.survey.is_media_tower(tower) else self.row_plan

    def _layouts(self, tower: Tower, kind: TokenKind, role: str = "kv.self") -> list[TokenLayout]:
        return [layout_of(e, self.adapters, tower.path, kind, role) for e in self.entries]

    def _add_attentions(
        self,
        tower: Tower,
        layouts: Sequence[TokenLayout],
        kv_recorder: KeyValueRecorder | None,
        image_tokens: ImageTokens | None = None,
    ) -> None:
        """The programs of a stack's attentions."""
        cross = self._layouts(tower, "prefix", "kv.cross")
        prefixes = {name: self.adapters[name].prefixes for e in self.entries for name in adapter_names(e)}
        for site in self.survey.kv_sites:
            if site.tower != tower.path:
                continue
            site_layouts = cross if site.role == "kv.cross" else layouts
            owner = site.shares_kv_of or site.path  # the attention whose keys, and so whose prefix, it sees
            parts = [[prefixes[i.name].get(owner) for i in each.items] for each in site_layouts]
            reached = any(p is not None or i.is_prompt for each, ps in zip(site_layouts, parts, strict=True)
                          for i, p in zip(each.items, ps, strict=True))  # fmt: skip
            recorder = kv_recorder if site.path in self.hooks else None
            hides = image_tokens is not None and site.layer is not None and image_tokens.hides_at(site.layer)
            if reached or recorder is not None or hides:
                inner = self.programs.get(site.path)
                self.programs[site.path] = PrefixAttention(
                    site,
                    site_layouts,
                    parts,
                    self._row_plan(tower),
                    self.forward_slot,
                    inner,
                    recorder,
                    image_tokens,
                )

    # ---- text --------------------------------------------------------------------------------------------------

    def _add_text_tower(
        self, tower: Tower, cross_widening: SequenceWidener | None, kv_recorder: KeyValueRecorder | None
    ) -> SequenceWidener | None:
        """The programs of a stack fed from a token table; its widening, if it has one and another stack reads it."""
        prompts = self._layouts(tower, "prompt")
        for each in prompts:
            if len({i.after_first_token for i in each.items}) > 1:
                raise RouteError(
                    "this Stack has prompts before the text and after its first token: choose one place for all"
                )
        prompted = any(each.items for each in prompts)
        own = self._layouts(tower, "prefix")
        if tower.causal:
            own = [prefixes_then_prompts(past, each) for past, each in zip(own, prompts, strict=True)]
        prefill = widening = None
        if prompted and tower.causal:
            prefill = self._prefill(tower, prompts, own)
        elif prompted:
            widening = self._widening(tower, prompts)
        self._add_attentions(tower, own, kv_recorder)
        assert tower.embedder is not None
        crossing = cross_widening if self._has_cross_attention(tower) else None
        if any(each.length for each in own) or prompted or crossing is not None:
            if tower.position_embedding:
                self._check_table(tower, [max(a.length, b.length) for a, b in zip(own, prompts, strict=True)])
                self._wrap(tower.position_embedding, PositionEmbeddingProgram)
            for path in _blocks_without_attention(self.survey, tower):
                self.programs[path] = OwnPositions(tower.path, self.forward_slot, self.programs.get(path))
            if widening is not None:
                self._wrap(tower.token_embedding, TokenEmbeddingProgram)
            passes_on = self._passes_positions_on(tower)
            if passes_on and not tower.position_embedding:
                self._wrap(tower.block_runner, PositionIdsProgram)
            inner = self.programs.get(tower.embedder)
            relative = any(s.relative_bias is not None for s in self.survey.kv_sites if s.tower == tower.path)
            self.programs[tower.embedder] = TextEntry(
                tower, own, self.row_plan, self.forward_slot, self.active, prefill, widening, crossing, inner,
                relative, passes_on, num_positions(self.survey.model, tower),
            )  # fmt: skip
        return widening if widening is not None and widening.read_by_decoder else None

    def _wrap(
        self, path: str, kind: type[TokenEmbeddingProgram | PositionEmbeddingProgram | PositionIdsProgram]
    ) -> None:
        self.programs[path] = kind(path, self.forward_slot, self.programs.get(path))

    def _check_table(self, tower: Tower, lengths: Sequence[int]) -> None:
        """RouteError where an entry has its own table of positions, whose rows are not asked for from outside."""
        if original_class(self.survey.model.get_submodule(tower.position_embedding)).forward is nn.Embedding.forward:
            return
        for entry, length in zip(self.entries, lengths, strict=True):
            conflicting = [n for n in adapter_names(entry) if tower.position_embedding in self.adapters[n].by_module]
            if length and conflicting:
                raise RouteError(
                    f"{conflicting[0]!r} changes {tower.position_embedding}, which counts positions for itself: it "
                    "cannot be stacked with a prompt or a prefix, whose text has other positions"
                )

    def _has_cross_attention(self, tower: Tower) -> bool:
        """Whether the stack has cross-attention."""
        return any(s.role.startswith("cross.") and s.tower == tower.path for s in self.survey.sites)

    def _parts(self, tower: Tower, layout: TokenLayout) -> list[SiteDelta]:
        return [part for item in layout.items for part in self.adapters[item.name].prompts[tower.path]]

    def _widening(self, tower: Tower, prompts: Sequence[TokenLayout]) -> SequenceWidener:
        crossed = not self._has_cross_attention(tower) and any(self._has_cross_attention(t) for t in self.survey.towers)
        widening = SequenceWidener(
            tower.path, tower.token_embedding, [self._parts(tower, t) for t in prompts], self.row_plan, crossed
        )
        if tower.padding_leaks and len(set(widening.lengths)) > 1:
            raise RouteError(
                f"rows with prompts of {sorted(set(widening.lengths))} tokens: the shorter ones get padding, which "
                f"changes a text in {tower.path} although it is masked; give all rows prompts of one length, or call "
                "them apart"
            )
        if not crossed:
            end = tower.block_runner or [b.path for b in self.survey.blocks if b.tower == tower.path][-1]
            self.programs[end] = TrimOutput(tower.path, self.forward_slot, self.programs.get(end))
        return widening

    def _prefill(self, tower: Tower, prompts: Sequence[TokenLayout], own: Sequence[TokenLayout]) -> PromptPrefill:
        """own: by entry, prefixes and prompts together."""
        prompt_entries: list[PromptEntry | None] = []
        for entry, layout, whole in zip(self.entries, prompts, own, strict=True):
            if not layout.items:
                prompt_entries.append(None)
                continue
            keys: KeyValueRecorder = {}
            rest = _without(entry, {i.name for i in layout.items})
            start = whole.length - layout.length
            prompt_entries.append(PromptEntry(self._parts(tower, layout), self.compile_entry(rest, keys), keys, start))
        attentions = [s.path for s in self.survey.kv_sites if s.tower == tower.path and s.role == "kv.self"]
        blocks = [b.path for b in self.survey.blocks if b.tower == tower.path and b.is_one_module]
        for first in blocks[:1]:
            self.programs[first] = JoinPromptGraph(attentions, self.forward_slot, self.programs.get(first))
        module = self.survey.model.get_submodule
        return PromptPrefill(
            tower.path,
            module(tower.token_embedding),
            [module(b) for b in blocks],
            prompt_entries,
            self.row_plan,
            self.forward_slot,
            self.active,
            module(tower.block_runner) if self._passes_positions_on(tower) else None,
            tower.reads_ids,
        )

    def _passes_positions_on(self, tower: Tower) -> bool:
        """Whether a model of its own in the embedder runs the blocks, from vectors and positions (image and text)."""
        if not tower.block_runner:
            return False
        runner = self.survey.model.get_submodule(tower.block_runner)
        return {"inputs_embeds", "position_ids"} <= set(parameter_names(type(runner).forward))

    # ---- images ------------------------------------------------------------------------------------------------

    def _add_image_tower(self, tower: Tower, kv_recorder: KeyValueRecorder | None) -> None:
        prompts = self._layouts(tower, "prompt")
        image_tokens = None
        if any(each.items for each in prompts):
            image_tokens = ImageTokens(
                [[self._image_token_group(tower, i.name, i.offset, i.num_tokens) for i in t.items] for t in prompts],
                self._row_plan(tower),
                self.forward_slot,
            )
            blocks = [b for b in self.survey.blocks if b.tower == tower.path]
            acting = [self.adapters[name] for entry in self.entries for name in adapter_names(entry)]
            averages = any(tower in averaging_towers(self.survey, a.site_deltas()) for a in acting)
            for path, reason in self.survey.kv_refusals.items():
                if path.startswith(f"{tower.path}.") and any(image_tokens.hides_at(b.index) for b in blocks):
                    raise RouteError(
                        f"rows with different numbers of visual prompts: {path} cannot leave any of them out: {reason}"
                    )
            for block in blocks:
                last = block is blocks[-1]
                own_mask = tower.path if averages and image_tokens.hides_at(block.index) else None
                if image_tokens.changes_at(block.index) or last or own_mask is not None:
                    inner = self.programs.get(block.path)
                    self.programs[block.path] = ImageTokenBlock(image_tokens, block.index, last, inner, own_mask)
        self._add_attentions(tower, self._layouts(tower, "prefix"), kv_recorder, image_tokens)

    def _image_token_group(self, tower: Tower, name: str, offset: int, length: int) -> ImageTokenGroup:
        parts = {p.site.layer: p for p in self.adapters[name].prompts[tower.path] if p.site.layer is not None}
        return ImageTokenGroup(offset, length, parts)


def _blocks_without_attention(survey: Survey, tower: Tower) -> list[str]:
    return [b.path for b in survey.blocks if b.tower == tower.path and b.is_one_module and not b.has_attention]


def _without(entry: RouteEntry, excluded: set[str]) -> RouteEntry:
    """The entry without some adapters, which stand in it by themselves or in Stacks."""
    if isinstance(entry, str):
        return None if entry in excluded else entry
    if isinstance(entry, Stack):
        return Stack(*(_without(part, excluded) for part in entry.parts))
    return entry
