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
from kitout.delta import Pair
from kitout.errors import RouteError
from kitout.runtime.hooks.class_swap import Forward, Program, first_tensor
from kitout.runtime.modules.module_adapter import Part
from kitout.runtime.modules.rows import Plan
from kitout.runtime.virtual_tokens.attention_call import Extra, attending
from kitout.runtime.virtual_tokens.forward_state import Here
from kitout.runtime.virtual_tokens.image_tokens import Slots
from kitout.runtime.virtual_tokens.layout import Layout


@dataclass
class Piece:
    """Keys and values of one item for the rows of one entry, and their places. k, v [b or 1, H, P, d]."""

    k: Tensor
    v: Tensor
    log: float
    offset: int
    after: bool


class Past:
    """The program of an attention module. parts: by entry, each item's Part here, None where it has none.

    record: takes the attention's own keys and values, under its path. slots: an image's tokens that some rows lack.
    """

    def __init__(
        self,
        site: Site,
        layouts: Sequence[Layout],
        parts: Sequence[Sequence[Part | None]],
        plan: Plan | None,
        here: Here,
        then: Program | None,
        record: dict[str, Pair] | None = None,
        slots: Slots | None = None,
    ) -> None:
        self.site, self.layouts, self.plan, self.here, self.then = site, layouts, plan, here, then
        self.parts, self.record, self.slots = parts, record, slots
        self.relative = site.bias is not None and site.role == "kv.self"

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        extra = self._extra(first_tensor(args, kwargs))
        with attending(module, extra, self.site.path):
            return forward(module, *args, **kwargs) if self.then is None else self.then(module, forward, args, kwargs)

    def _extra(self, x: Tensor) -> Extra:
        """What this call gets, for x [B, T, d]."""
        index = None if self.plan is None else self.plan.index(x.shape[0], x.device)
        pieces = [self._pieces(e) for e in range(len(self.layouts))]
        longest = max(sum(p.k.shape[2] for p in each) for each in pieces)
        if not longest:
            extra = Extra()
        elif index is None:
            extra = self._one(pieces[0], self.layouts[0], x)
        else:
            extra = self._rows(pieces, index, longest, x)
        if self.record is not None:
            extra.note = self._note
        if self.slots is not None and self.site.layer is not None and self.slots.hides(self.site.layer):
            extra.hidden = self.slots.hidden(x, self.site.layer)
        return extra

    def _note(self, k: Tensor, v: Tensor) -> None:
        assert self.record is not None
        each = k.shape[1] // self.site.heads  # repeated for groups of queries
        self.record[self.site.path] = k[:, ::each], v[:, ::each]

    def _pieces(self, entry: int) -> list[Piece]:
        call = self.here.call
        leads = call.leaves if call.cut and torch.is_grad_enabled() else call.leads
        result = []
        for item, part in zip(self.layouts[entry].items, self.parts[entry], strict=True):
            if part is None and not item.tokens:
                continue
            if part is not None:
                k, v = (t.unsqueeze(0) for t in part.delta.past())
            else:
                lead = leads.get(self.site.path)
                if lead is None:
                    raise RouteError(f"{self.site.path}: {item.name!r} has no keys here yet: call the model as a whole")
                pair = lead[entry]
                assert pair is not None
                k, v = pair
                start = item.offset - self.layouts[entry].prompts[0].offset
                k, v = k[:, :, start : start + item.length], v[:, :, start : start + item.length]
            result.append(Piece(k, v, math.log(item.weight), item.offset, item.after))
        return result

    def _one(self, pieces: Sequence[Piece], laid: Layout, x: Tensor) -> Extra:
        k, v, log = pieces[0].k, pieces[0].v, None
        if len(pieces) > 1:
            k, v = torch.cat([p.k for p in pieces], 2), torch.cat([p.v for p in pieces], 2)
        if any(p.log for p in pieces):
            log = torch.cat([torch.full((p.k.shape[2],), p.log, device=x.device) for p in pieces])[None, None, None]
        bias = None
        if self.relative:
            spots = torch.cat([torch.arange(p.k.shape[2], device=x.device) + p.offset for p in pieces])[None]
            bias = partial(self._bias, spots - laid.length)
        return Extra(k, v, self._after(pieces), log, bias)

    def _after(self, pieces: Sequence[Piece]) -> Tensor | None:
        """The first token of the text does not see a prompt that comes after it."""
        if not any(p.after for p in pieces):
            return None
        past_first = self.here.call.places[self.site.tower][:, None, :, None] > 0  # [B or 1, 1, Tq, 1]
        return torch.cat([past_first.expand(-1, -1, -1, p.k.shape[2]) | (not p.after) for p in pieces], -1)

    def _rows(self, pieces: Sequence[Sequence[Piece]], index: Sequence[Tensor], longest: int, x: Tensor) -> Extra:
        some = next(p for each in pieces for p in each)
        heads, width = some.k.shape[1], some.k.shape[3]
        dtype = some.k.dtype
        extras: list[Extra] = []
        distances = []
        queries = self.here.call.places[self.site.tower].shape[1] if any(p.after for e in pieces for p in e) else 1
        for laid, each, rows in zip(self.layouts, pieces, index, strict=True):
            n, length = len(rows), sum(p.k.shape[2] for p in each)
            room = longest - length
            k = v = torch.zeros(n, heads, room, width, dtype=dtype, device=x.device)
            k = torch.cat([k, *(p.k.to(dtype).expand(n, -1, -1, -1) for p in each)], 2)
            v = torch.cat([v, *(p.v.to(dtype).expand(n, -1, -1, -1) for p in each)], 2)
            keep = torch.zeros(n, 1, queries, room, dtype=torch.bool, device=x.device)
            seen = [self._seen(p, rows, queries, x) for p in each]
            keep = torch.cat([keep, *seen], -1)
            logs = [torch.zeros(room), *(torch.full((p.k.shape[2],), p.log) for p in each)]
            log = torch.cat(logs).to(x.device).expand(n, 1, 1, -1)
            spots = [torch.zeros(room), *(torch.arange(p.k.shape[2]) + p.offset - laid.length for p in each)]
            distances.append(torch.cat(spots).long().to(x.device).expand(n, -1))
            extras.append(Extra(k, v, keep, log))
        order = torch.cat(tuple(index)).argsort()

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(e, name) for e in extras]).index_select(0, order)

        keep, log = joined("keep"), joined("log")
        uneven = any(p.after for e in pieces for p in e) or len({sum(p.k.shape[2] for p in e) for e in pieces}) > 1
        spots_of_rows = torch.cat(distances).index_select(0, order)
        return Extra(
            joined("k"),
            joined("v"),
            keep if uneven else None,
            log if any(p.log for each in pieces for p in each) else None,
            partial(self._bias, spots_of_rows) if self.relative else None,
        )

    def _seen(self, piece: Piece, rows: Tensor, queries: int, x: Tensor) -> Tensor:
        n, length = len(rows), piece.k.shape[2]
        if not piece.after:
            return torch.ones(n, 1, queries, length, dtype=torch.bool, device=x.device)
        places = self.here.call.places[self.site.tower].expand(x.shape[0], -1)[rows]
        return (places[:, None, :, None] > 0).expand(-1, -1, -1, length)

    def _bias(self, spots: Tensor) -> Tensor:
        """The relative bias of keys at `spots` [B or 1, P], counted from the text's first token (negative)."""
        places = self.here.call.places[self.site.tower]
        distance = spots[:, None, :] - places[:, :, None]  # [B or 1, Tq, P]
        farthest = int(-distance.min())
        compute: Any = getattr(self.site.bias, "compute_bias")  # noqa: B009 - nn.Module hides its type
        table = compute(1, farthest + 1, device=spots.device, past_seen_tokens=farthest)
        biases: Tensor = table[0, :, 0][:, distance + farthest].transpose(0, 1)  # [B or 1, H, Tq, P]
        return biases
