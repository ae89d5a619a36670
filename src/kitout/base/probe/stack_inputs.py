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

from kitout.base.probe.tracer import BlockEntry, EmbeddingLookup, ForwardTracer
from kitout.base.site import Site
from kitout.base.survey import Survey, Tower


def complete_towers(survey: Survey, sites: Sequence[Site], tracer: ForwardTracer) -> list[Tower]:
    """The towers with what the forward showed of them."""
    tables = {s.path for s in sites if s.role == "embed"}
    result = []
    for tower in survey.towers:
        first = _first_attending_block(survey, tower, tracer)
        result.append(
            tower
            if first is None
            else _with_inputs(replace(tower, causal=_is_causal(first, tracer)), first, tables, tracer)
        )
    return result


def _first_attending_block(survey: Survey, tower: Tower, tracer: ForwardTracer) -> str | None:
    """The tower's first block with attention in it that ran."""
    paths = [b.path for b in survey.blocks if b.tower == tower.path and b.has_attention and b.is_one_module]
    return next((p for p in paths if p in tracer.block_entries), None)


def _is_causal(block: str, tracer: ForwardTracer) -> bool | None:
    """Whether what its attention makes of the first position is free of the last; None where that cannot be told."""
    call = next((c for c in tracer.attention_calls if c.block == block), None)
    if call is None or call.out is None or call.out.is_meta or call.out.ndim < 3 or call.tensors["v"].shape[-2] < 2:
        return None
    first = call.out[..., 0, :]
    weight = torch.randn(first.shape, generator=torch.Generator().manual_seed(0)).to(first)
    (grad,) = torch.autograd.grad((first * weight).sum(), call.tensors["v"], retain_graph=True, allow_unused=True)
    return None if grad is None else not bool(grad[..., -1, :].any())


def _with_inputs(tower: Tower, block: str, tables: set[str], tracer: ForwardTracer) -> Tower:
    entry = tracer.block_entries[block]
    stream = tracer.leaves.get(f"stream:{block}")
    if stream is None or stream[0].ndim != 3:
        return tower
    tokens = stream[0].shape[1]
    before = [k for k in tracer.lookups[: entry.num_lookups] if k.indices.ndim and k.indices.shape[-1] == tokens]
    asked = [k for k in before if k.inside[-1] in tables and k.indices.ndim == 2]
    if not asked:
        return tower
    owner = _common_module(asked[-1], entry)
    ordered = [k for k in before if k.inside[-1] not in tables and _is_consecutive(k.indices) and owner in k.inside]
    below = entry.inside[entry.inside.index(owner) + 1]
    tower = replace(
        tower, embedder=owner, token_embedding=asked[-1].inside[-1], block_runner="" if below == block else below
    )
    if not ordered:
        return tower
    return replace(tower, position_embedding=ordered[-1].inside[-1], offset=int(ordered[-1].indices.reshape(-1)[0]))


def _common_module(lookup: EmbeddingLookup, entry: BlockEntry) -> str:
    """The innermost module that was in progress both times."""
    both = [a for a, b in zip(lookup.inside[:-1], entry.inside[:-1], strict=False) if a == b]
    return both[-1]


def _is_consecutive(indices: Tensor) -> bool:
    if indices.is_meta:  # no values to tell by
        return False
    rows = indices.reshape(-1, indices.shape[-1])
    return rows.shape[1] > 1 and bool((rows == rows[0, 0] + torch.arange(rows.shape[1], device=rows.device)).all())
