"""Prefixes at one attention: the keys and values of every row, put together for the call in progress.

Rows with shorter prefixes than others, or none, have columns they do not see. Strengths and Mix shares become the
logarithm of a weight on the scores. Keys of prompts (`lead.py`) come in here too. It knows parts, entries and rows;
how a call is widened is in `attend.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kitout.base.site import Site
from kitout.delta import KeyValue
from kitout.errors import RouteError
from kitout.runtime.hooks.class_swap import ForwardFn, Program, first_tensor
from kitout.runtime.modules.module_adapter import SiteDelta
from kitout.runtime.modules.rows import RowPlan
from kitout.runtime.virtual_tokens.attention_call import ExtraKeys, extra_keys_in
from kitout.runtime.virtual_tokens.forward_state import ForwardSlot
from kitout.runtime.virtual_tokens.image_tokens import ImageTokens
from kitout.runtime.virtual_tokens.layout import TokenLayout


@dataclass
class RowKeys:
    """Keys and values of one item for the rows of one entry, and their places. k, v [b or 1, H, P, d]."""

    k: Tensor
    v: Tensor
    log_weight: float
    offset: int
    after_first_token: bool


class PrefixAttention:
    """The program of an attention module. parts: by entry, each item's Part here, None where it has none.

    record: takes the attention's own keys and values, under its path. slots: an image's tokens that some rows lack.
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
        self.site, self.layouts, self.row_plan, self.forward_slot, self.inner = (
            site,
            layouts,
            row_plan,
            forward_slot,
            inner,
        )
        self.parts, self.kv_recorder, self.image_tokens = parts, kv_recorder, image_tokens
        self.has_relative_bias = site.relative_bias is not None and site.role == "kv.self"

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        extra = self._extra(first_tensor(args, kwargs))
        with extra_keys_in(module, extra, self.site.path):
            return forward(module, *args, **kwargs) if self.inner is None else self.inner(module, forward, args, kwargs)

    def _extra(self, x: Tensor) -> ExtraKeys:
        """What this call gets, for x [B, T, d]."""
        index = None if self.row_plan is None else self.row_plan.index(x.shape[0], x.device)
        pieces = [self._row_keys(e) for e in range(len(self.layouts))]
        longest = max(sum(p.k.shape[2] for p in each) for each in pieces)
        if not longest:
            extra = ExtraKeys()
        elif index is None:
            extra = self._for_batch(pieces[0], self.layouts[0], x)
        else:
            extra = self._for_rows(pieces, index, longest, x)
        if self.kv_recorder is not None:
            extra.on_key_value = self._record_key_value
        if (
            self.image_tokens is not None
            and self.site.layer is not None
            and self.image_tokens.hides_at(self.site.layer)
        ):
            extra.masked_own_keys = self.image_tokens.hidden_columns(x, self.site.layer)
        return extra

    def _record_key_value(self, k: Tensor, v: Tensor) -> None:
        assert self.kv_recorder is not None
        each = k.shape[1] // self.site.num_kv_heads  # repeated for groups of queries
        self.kv_recorder[self.site.path] = k[:, ::each], v[:, ::each]

    def _row_keys(self, entry: int) -> list[RowKeys]:
        call = self.forward_slot.state
        leads = call.prompt_kv_leaves if call.reentrant and torch.is_grad_enabled() else call.prompt_kv
        result = []
        for item, part in zip(self.layouts[entry].items, self.parts[entry], strict=True):
            if part is None and not item.is_prompt:
                continue
            if part is not None:
                k, v = (t.unsqueeze(0) for t in part.delta.key_values())
            else:
                lead = leads.get(self.site.path)
                if lead is None:
                    raise RouteError(f"{self.site.path}: {item.name!r} has no keys here yet: call the model as a whole")
                pair = lead[entry]
                assert pair is not None
                k, v = pair
                start = item.offset - self.layouts[entry].prompts[0].offset
                k, v = k[:, :, start : start + item.num_tokens], v[:, :, start : start + item.num_tokens]
            result.append(RowKeys(k, v, math.log(item.weight), item.offset, item.after_first_token))
        return result

    def _for_batch(self, pieces: Sequence[RowKeys], layout: TokenLayout, x: Tensor) -> ExtraKeys:
        k, v, log = pieces[0].k, pieces[0].v, None
        if len(pieces) > 1:
            k, v = torch.cat([p.k for p in pieces], 2), torch.cat([p.v for p in pieces], 2)
        if any(p.log_weight for p in pieces):
            log = torch.cat([torch.full((p.k.shape[2],), p.log_weight, device=x.device) for p in pieces])[
                None, None, None
            ]
        bias = None
        if self.has_relative_bias:
            spots = torch.cat([torch.arange(p.k.shape[2], device=x.device) + p.offset for p in pieces])[None]
            bias = partial(self._relative_bias, spots - layout.length)
        return ExtraKeys(k, v, self._visible_to_queries(pieces), log, bias)

    def _visible_to_queries(self, pieces: Sequence[RowKeys]) -> Tensor | None:
        """The first token of the text does not see a prompt that comes after it."""
        if not any(p.after_first_token for p in pieces):
            return None
        past_first = self.forward_slot.state.token_index[self.site.tower][:, None, :, None] > 0  # [B or 1, 1, Tq, 1]
        return torch.cat([past_first.expand(-1, -1, -1, p.k.shape[2]) | (not p.after_first_token) for p in pieces], -1)

    def _for_rows(
        self, pieces: Sequence[Sequence[RowKeys]], index: Sequence[Tensor], longest: int, x: Tensor
    ) -> ExtraKeys:
        some = next(p for each in pieces for p in each)
        heads, width = some.k.shape[1], some.k.shape[3]
        dtype = some.k.dtype
        extras: list[ExtraKeys] = []
        distances = []
        queries = (
            self.forward_slot.state.token_index[self.site.tower].shape[1]
            if any(p.after_first_token for e in pieces for p in e)
            else 1
        )
        for laid, each, rows in zip(self.layouts, pieces, index, strict=True):
            n, length = len(rows), sum(p.k.shape[2] for p in each)
            room = longest - length
            k = v = torch.zeros(n, heads, room, width, dtype=dtype, device=x.device)
            k = torch.cat([k, *(p.k.to(dtype).expand(n, -1, -1, -1) for p in each)], 2)
            v = torch.cat([v, *(p.v.to(dtype).expand(n, -1, -1, -1) for p in each)], 2)
            keep = torch.zeros(n, 1, queries, room, dtype=torch.bool, device=x.device)
            seen = [self._visible_of(p, rows, queries, x) for p in each]
            keep = torch.cat([keep, *seen], -1)
            logs = [torch.zeros(room), *(torch.full((p.k.shape[2],), p.log_weight) for p in each)]
            log = torch.cat(logs).to(x.device).expand(n, 1, 1, -1)
            spots = [torch.zeros(room), *(torch.arange(p.k.shape[2]) + p.offset - laid.length for p in each)]
            distances.append(torch.cat(spots).long().to(x.device).expand(n, -1))
            extras.append(ExtraKeys(k, v, keep, log))
        order = torch.cat(tuple(index)).argsort()

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(e, name) for e in extras]).index_select(0, order)

        keep, log = joined("visible"), joined("log_weight")
        uneven = (
            any(p.after_first_token for e in pieces for p in e)
            or len({sum(p.k.shape[2] for p in e) for e in pieces}) > 1
        )
        spots_of_rows = torch.cat(distances).index_select(0, order)
        return ExtraKeys(
            joined("k"),
            joined("v"),
            keep if uneven else None,
            log if any(p.log_weight for each in pieces for p in each) else None,
            partial(self._relative_bias, spots_of_rows) if self.has_relative_bias else None,
        )

    def _visible_of(self, row_keys: RowKeys, rows: Tensor, queries: int, x: Tensor) -> Tensor:
        n, length = len(rows), row_keys.k.shape[2]
        if not row_keys.after_first_token:
            return torch.ones(n, 1, queries, length, dtype=torch.bool, device=x.device)
        places = self.forward_slot.state.token_index[self.site.tower].expand(x.shape[0], -1)[rows]
        return (places[:, None, :, None] > 0).expand(-1, -1, -1, length)

    def _relative_bias(self, key_positions: Tensor) -> Tensor:
        """The relative bias of keys at `spots` [B or 1, P], counted from the text's first token (negative)."""
        places = self.forward_slot.state.token_index[self.site.tower]
        distance = key_positions[:, None, :] - places[:, :, None]  # [B or 1, Tq, P]
        farthest = int(-distance.min())
        compute: Any = getattr(self.site.relative_bias, "compute_bias")  # noqa: B009 - nn.Module hides its type
        table = compute(1, farthest + 1, device=key_positions.device, past_seen_tokens=farthest)
        biases: Tensor = table[0, :, 0][:, distance + farthest].transpose(0, 1)  # [B or 1, H, Tq, P]
        return biases
