"""Prefixes at one attention: the keys and values of every row, put together for the call in progress.

Rows with shorter prefixes than others, or none, have columns they do not see. Strengths and Mix weights become the
logarithm of a weight on the scores. Keys of prompts (`prompt_prefill.py`) come in here too. It knows items, entries
and rows; how a call is extended is in `attention_call.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kitout import fast
from kitout.base.site import Site
from kitout.delta import KeyValue
from kitout.errors import RouteError
from kitout.runtime.hooks.class_swap import ForwardFn, Program, first_tensor
from kitout.runtime.modules.module_adapter import SiteDelta
from kitout.runtime.modules.rows import RowPlan, scatter
from kitout.runtime.virtual_tokens.attention_call import ExtraKeys, extra_keys_in, register_attention
from kitout.runtime.virtual_tokens.forward_state import ForwardSlot
from kitout.runtime.virtual_tokens.image_tokens import ImageTokens
from kitout.runtime.virtual_tokens.layout import TokenLayout
from kitout.tensor_version import tensor_version


@dataclass
class ItemKeys:
    """Keys and values of one prefix or prompt in one entry."""

    k: Tensor
    """[b or 1, H, P, d]."""
    v: Tensor
    """Likewise."""
    log_weight: float
    """Logarithm of the weight of all its keys."""
    offset: int
    """Of its first position, from the start of all virtual tokens of the entry."""
    after_first_token: bool
    """The text's first token does not see it."""

    @property
    def length(self) -> int:
        return self.k.shape[2]


@dataclass
class RowKeys:
    """Keys and values of the rows of one entry, with what belongs to each key."""

    k: Tensor
    """[b, H, P, d]."""
    v: Tensor
    """Likewise."""
    visible: Tensor
    """[b, 1, Tq or 1, P]: which queries see it."""
    log_weight: Tensor
    """[b, 1, 1, P]."""
    distance: Tensor
    """[b, P]: its position, counted from the text's first token (negative)."""

    def pad_left(self, length: int) -> RowKeys:
        """With keys that nobody sees before its own, up to a length."""
        room = length - self.k.shape[2]
        keys = [F.pad(t, (0, 0, room, 0)) for t in (self.k, self.v)]
        return RowKeys(*keys, *(F.pad(t, (room, 0)) for t in (self.visible, self.log_weight, self.distance)))

    @classmethod
    def gather(cls, entries: Sequence[RowKeys], index: Sequence[Tensor]) -> RowKeys:
        """All rows of a batch in order: those of entries[i] belong at index[i]."""
        columns = zip(*(vars(e).values() for e in entries), strict=True)
        return cls(*(scatter(column, index) for column in columns))


class PrefixAttention:
    """The program of an attention module.

    parts: by entry, each item's part here, None where it has none. kv_recorder: takes the attention's own keys and
    values, under its path. image_tokens: the added image tokens, which some rows may lack.
    """

    def __init__(
        self,
        site: Site,
        layouts: Sequence[TokenLayout],
        parts: Sequence[Sequence[SiteDelta | None]],
        row_plan: RowPlan | None,
        forward_slot: ForwardSlot,
        inner: Program | None,
        kv_recorder: dict[str, KeyValue] | None = None,
        image_tokens: ImageTokens | None = None,
    ) -> None:
        self.site, self.layouts, self.row_plan, self.forward_slot = site, layouts, row_plan, forward_slot
        self.inner = inner
        register_attention(site.module)
        self.parts, self.kv_recorder, self.image_tokens = parts, kv_recorder, image_tokens
        self.has_relative_bias = site.relative_bias is not None and site.role == "kv.self"
        after_first = any(item.after_first_token for layout in layouts for item in layout.items)
        self.is_steady = not (
            row_plan or kv_recorder is not None or image_tokens or self.has_relative_bias or after_first
        )
        self._kept: tuple[tuple[Any, ...], Any, ExtraKeys] | None = None

    def __getstate__(self) -> dict[str, Any]:  # keys of a text in progress are not copied
        return {**self.__dict__, "_kept": None}

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = first_tensor(args, kwargs)
        extra = self._kept_extra(x) if self.is_steady and not torch.is_grad_enabled() and fast.enabled() else None
        if extra is None:
            extra = self._extra(x)
        with extra_keys_in(module, extra, self.site.path, self.forward_slot.state.kernels):
            return forward(module, *args, **kwargs) if self.inner is None else self.inner(module, forward, args, kwargs)

    def _kept_extra(self, x: Tensor) -> ExtraKeys | None:
        """The same without a gradient: put together once for all tokens of a generation. None where it may change."""
        deltas = [part.delta for part in self.parts[0] if part is not None]
        if torch.compiler.is_compiling() or any(delta.training for delta in deltas):
            return None
        prompt = self.forward_slot.state.prompt_kv.get(self.site.path)
        stamp = (x.shape[0], x.dtype, *(tensor_version(t) for delta in deltas for t in delta.key_value_sources()))
        if self._kept is not None and self._kept[0] == stamp and self._kept[1] is prompt:
            return self._kept[2]
        extra = self._extra(x)
        if extra.k is not None and extra.v is not None:
            k, v = (t.to(x.dtype).contiguous().expand(x.shape[0], -1, -1, -1) for t in (extra.k, extra.v))
            extra = replace(extra, k=k, v=v)
        self._kept = stamp, prompt, extra
        return extra

    def _extra(self, x: Tensor) -> ExtraKeys:
        """What this call gets, for x [B, T, d]."""
        items = [self._item_keys(e) for e in range(len(self.layouts))]
        if not any(item.length for of_entry in items for item in of_entry):
            extra = ExtraKeys()
        elif self.row_plan is None:
            extra = self._for_batch(items[0], self.layouts[0], x)
        else:
            extra = self._for_rows(items, self.row_plan.index(x.shape[0], x.device), x)
        if self.kv_recorder is not None:
            extra.on_key_value = self._record_key_value
        layer = self.site.layer
        if self.image_tokens is not None and layer is not None and self.image_tokens.hides_at(layer):
            extra.masked_own_keys = self.image_tokens.hidden_columns(x, layer)
        return extra

    def _record_key_value(self, k: Tensor, v: Tensor) -> None:
        assert self.kv_recorder is not None
        repeats = k.shape[1] // self.site.num_kv_heads  # for groups of queries
        self.kv_recorder[self.site.path] = k[:, ::repeats], v[:, ::repeats]

    def _item_keys(self, entry: int) -> list[ItemKeys]:
        state = self.forward_slot.state
        prompt_kv = state.prompt_kv_leaves if state.reentrant and torch.is_grad_enabled() else state.prompt_kv
        result = []
        for item, part in zip(self.layouts[entry].items, self.parts[entry], strict=True):
            if part is not None:
                k, v = (t.unsqueeze(0) for t in part.delta.key_values())
            elif item.is_prompt:
                by_entry = prompt_kv.get(self.site.path)
                if by_entry is None:
                    raise RouteError(f"{self.site.path}: {item.name!r} has no keys here yet: call the model as a whole")
                pair = by_entry[entry]
                assert pair is not None
                start = item.offset - self.layouts[entry].prompts[0].offset
                k, v = (t[:, :, start : start + item.num_tokens] for t in pair)
            else:
                continue
            result.append(ItemKeys(k, v, math.log(item.weight), item.offset, item.after_first_token))
        return result

    def _for_batch(self, items: Sequence[ItemKeys], layout: TokenLayout, x: Tensor) -> ExtraKeys:
        k, v, log_weight = items[0].k, items[0].v, None
        if len(items) > 1:
            k, v = torch.cat([i.k for i in items], 2), torch.cat([i.v for i in items], 2)
        if any(i.log_weight for i in items):
            log_weight = torch.cat([torch.full((i.length,), i.log_weight, device=x.device) for i in items])
            log_weight = log_weight[None, None, None]
        relative_bias = None
        if self.has_relative_bias:
            positions = torch.cat([torch.arange(i.length, device=x.device) + i.offset for i in items])[None]
            relative_bias = partial(self._relative_bias, positions - layout.length)
        return ExtraKeys(k, v, self._visible_to_queries(items), log_weight, relative_bias)

    def _visible_to_queries(self, items: Sequence[ItemKeys]) -> Tensor | None:
        """The first token of the text does not see a prompt that comes after it."""
        if not any(i.after_first_token for i in items):
            return None
        past_first = self.forward_slot.state.token_index[self.site.tower][:, None, :, None] > 0  # [B or 1, 1, Tq, 1]
        return torch.cat([past_first.expand(-1, -1, -1, i.length) | (not i.after_first_token) for i in items], -1)

    def _for_rows(self, items: Sequence[Sequence[ItemKeys]], index: Sequence[Tensor], x: Tensor) -> ExtraKeys:
        lengths = [sum(i.length for i in of_entry) for of_entry in items]
        of_all = [i for of_entry in items for i in of_entry]
        entries = [
            self._row_keys(of_entry, of_all[0], layout, rows, x).pad_left(max(lengths))
            for of_entry, layout, rows in zip(items, self.layouts, index, strict=True)
        ]
        if any(i.after_first_token for i in of_all):  # of entries with no such item, all queries see the same
            queries = max(e.visible.shape[2] for e in entries)
            for e in entries:
                e.visible = e.visible.expand(-1, -1, queries, -1)
        rows = RowKeys.gather(entries, index)
        is_uneven = any(i.after_first_token for i in of_all) or len(set(lengths)) > 1
        return ExtraKeys(
            rows.k,
            rows.v,
            rows.visible if is_uneven else None,
            rows.log_weight if any(i.log_weight for i in of_all) else None,
            partial(self._relative_bias, rows.distance) if self.has_relative_bias else None,
        )

    def _row_keys(
        self, items: Sequence[ItemKeys], like: ItemKeys, layout: TokenLayout, rows: Tensor, x: Tensor
    ) -> RowKeys:
        """The items of one entry for its rows, one after the other. like: what an entry without any looks like."""
        n, device = len(rows), x.device
        none = torch.zeros(n, like.k.shape[1], 0, like.k.shape[3], dtype=like.k.dtype, device=device)
        visible = [self._visible_to_rows(i, rows, x) for i in items]
        queries = max([1, *(v.shape[2] for v in visible)])  # Dynamo knows no default
        log_weight = [torch.full((i.length,), i.log_weight, device=device) for i in items]
        positions = [torch.arange(i.length, device=device) + i.offset - layout.length for i in items]
        return RowKeys(
            torch.cat([none, *(i.k.to(none.dtype).expand(n, -1, -1, -1) for i in items)], 2),
            torch.cat([none, *(i.v.to(none.dtype).expand(n, -1, -1, -1) for i in items)], 2),
            torch.cat(
                [
                    torch.zeros(n, 1, queries, 0, dtype=torch.bool, device=device),
                    *(v.expand(-1, -1, queries, -1) for v in visible),
                ],
                -1,
            ),
            torch.cat([torch.zeros(0, device=device), *log_weight]).expand(n, 1, 1, -1),
            torch.cat([torch.zeros(0, dtype=torch.long, device=device), *positions]).expand(n, -1),
        )

    def _visible_to_rows(self, item: ItemKeys, rows: Tensor, x: Tensor) -> Tensor:
        """[b, 1, Tq or 1, P]: which queries of these rows see an item."""
        if not item.after_first_token:
            return torch.ones(len(rows), 1, 1, item.length, dtype=torch.bool, device=x.device)
        token_index = self.forward_slot.state.token_index[self.site.tower].expand(x.shape[0], -1)[rows]
        return (token_index[:, None, :, None] > 0).expand(-1, -1, -1, item.length)

    def _relative_bias(self, key_positions: Tensor) -> Tensor:
        """The relative bias of keys at positions [B or 1, P], counted from the text's first token (negative)."""
        token_index = self.forward_slot.state.token_index[self.site.tower]
        distance = key_positions[:, None, :] - token_index[:, :, None]  # [B or 1, Tq, P]
        num_tokens = self.forward_slot.state.num_tokens.get(self.site.tower)
        if num_tokens is None or not fast.enabled():
            farthest = int(-distance.min())
        else:  # no less, and known without waiting for the device
            farthest = num_tokens - 1 + max(layout.length for layout in self.layouts)
        compute: Any = getattr(self.site.relative_bias, "compute_bias")  # noqa: B009 - nn.Module hides its type
        table = compute(1, farthest + 1, device=key_positions.device, past_seen_tokens=farthest)
        biases: Tensor = table[0, :, 0][:, distance + farthest].transpose(0, 1)  # [B or 1, H, Tq, P]
        return biases
