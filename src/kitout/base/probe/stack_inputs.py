"""What feeds each stack of blocks: who turns tokens into its stream, where positions enter, whether it looks ahead.

All of it is read off one watched forward: which module was in progress when the token table was asked and the first
block entered, which table was asked for consecutive rows, what the first block's output depends on.
It knows module paths and tensors, no architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kitout.base.probe.tracer import Entry, Lookup, Watch
from kitout.base.site import Site
from kitout.base.survey import Survey, Tower


def towers(found: Survey, sites: Sequence[Site], watch: Watch) -> list[Tower]:
    """The towers with what the forward showed of them."""
    tables = {s.path for s in sites if s.role == "embed"}
    result = []
    for tower in found.towers:
        first = _first(found, tower, watch)
        result.append(
            tower if first is None else _fed(replace(tower, causal=_causal(first, watch)), first, tables, watch)
        )
    return result


def _first(found: Survey, tower: Tower, watch: Watch) -> str | None:
    """The tower's first block with attention in it that ran."""
    paths = [b.path for b in found.blocks if b.tower == tower.path and b.attends and b.whole]
    return next((p for p in paths if p in watch.entries), None)


def _causal(block: str, watch: Watch) -> bool | None:
    """Whether what its attention makes of the first position is free of the last; None where that cannot be told."""
    call = next((c for c in watch.attentions if c.block == block), None)
    if call is None or call.out is None or call.out.is_meta or call.out.ndim < 3 or call.tensors["v"].shape[-2] < 2:
        return None
    first = call.out[..., 0, :]
    weight = torch.randn(first.shape, generator=torch.Generator().manual_seed(0)).to(first)
    (grad,) = torch.autograd.grad((first * weight).sum(), call.tensors["v"], retain_graph=True, allow_unused=True)
    return None if grad is None else not bool(grad[..., -1, :].any())


def _fed(tower: Tower, block: str, tables: set[str], watch: Watch) -> Tower:
    entry = watch.entries[block]
    stream = watch.leaf.get(f"stream:{block}")
    if stream is None or stream[0].ndim != 3:
        return tower
    tokens = stream[0].shape[1]
    before = [k for k in watch.lookups[: entry.lookups] if k.indices.ndim and k.indices.shape[-1] == tokens]
    asked = [k for k in before if k.inside[-1] in tables and k.indices.ndim == 2]
    if not asked:
        return tower
    owner = _common(asked[-1], entry)
    ordered = [k for k in before if k.inside[-1] not in tables and _consecutive(k.indices) and owner in k.inside]
    below = entry.inside[entry.inside.index(owner) + 1]
    tower = replace(tower, owner=owner, table=asked[-1].inside[-1], body="" if below == block else below)
    if not ordered:
        return tower
    return replace(tower, positions=ordered[-1].inside[-1], offset=int(ordered[-1].indices.reshape(-1)[0]))


def _common(lookup: Lookup, entry: Entry) -> str:
    """The innermost module that was in progress both times."""
    both = [a for a, b in zip(lookup.inside[:-1], entry.inside[:-1], strict=False) if a == b]
    return both[-1]


def _consecutive(indices: Tensor) -> bool:
    if indices.is_meta:  # no values to tell by
        return False
    rows = indices.reshape(-1, indices.shape[-1])
    return rows.shape[1] > 1 and bool((rows == rows[0, 0] + torch.arange(rows.shape[1], device=rows.device)).all())
