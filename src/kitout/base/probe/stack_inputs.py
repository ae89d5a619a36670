"""What feeds each stack of blocks: who embeds its tokens, where positions are added, whether it is causal.

All of it is read from one traced forward: which module was running when the token table was looked up and the first
block entered, which table was looked up at consecutive rows, what the first block's output depends on.
It knows module paths and tensors, no architecture.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kitout.base.probe.trace_records import BlockEntry, EmbeddingLookup
from kitout.base.probe.tracer import ForwardTracer
from kitout.base.survey import Survey, Tower


def complete_towers(survey: Survey, tracer: ForwardTracer) -> list[Tower]:
    """The towers with the fields that a forward shows."""
    token_tables = {s.path for s in survey.sites if s.role == "embed"}
    towers = []
    for tower in survey.towers:
        if first_block := _first_attending_block(survey, tower, tracer):
            tower = replace(tower, causal=_is_causal(first_block, tracer))
            if not survey.is_media_tower(tower):  # images may have as many tokens as the text
                tower = _with_inputs(tower, first_block, token_tables, tracer)
            last_exit = max(n for b, n in tracer.last_exits.items() if b.startswith(f"{tower.path}."))
            reads = [r for r in tracer.input_reads if tower.embedder in r.inside and r.num_exits >= last_exit]
            tower = replace(tower, reads_inputs_again=bool(reads))
        towers.append(tower)
    return towers


def _first_attending_block(survey: Survey, tower: Tower, tracer: ForwardTracer) -> str | None:
    """The tower's first block with attention in it that ran."""
    paths = [b.path for b in survey.blocks if b.tower == tower.path and b.has_attention and b.is_one_module]
    return next((p for p in paths if p in tracer.block_entries), None)


def _is_causal(block: str, tracer: ForwardTracer) -> bool | None:
    """True if its attention's output at the first position depends on no later one; None where unknown."""
    call = next((c for c in tracer.attention_calls if c.block == block), None)
    if call is None or call.out is None or call.out.is_meta or call.out.ndim < 3 or call.tensors["v"].shape[-2] < 2:
        return None
    first_position = call.out[..., 0, :]
    if not first_position.requires_grad:
        return None
    weight = torch.randn(first_position.shape, generator=torch.Generator().manual_seed(0)).to(first_position)
    (grad,) = torch.autograd.grad(
        (first_position * weight).sum(), call.tensors["v"], retain_graph=True, allow_unused=True
    )
    return None if grad is None else not bool(grad[..., 1:, :].any())


def _with_inputs(tower: Tower, block: str, token_tables: set[str], tracer: ForwardTracer) -> Tower:
    """The tower with embedder, tables and block runner, as far as its first block is fed from a token table."""
    entry = tracer.block_entries[block]
    stream = tracer.leaves.get(f"stream:{block}")
    if stream is None or stream[0].ndim < 3:
        return tower
    tower = replace(tower, takes_tokens=stream[0].ndim == 3)
    num_tokens = stream[0].shape[-2]  # some blocks take several streams, [streams, batch, tokens, width]
    lookups = [k for k in tracer.lookups[: entry.num_lookups] if k.indices.ndim and k.indices.shape[-1] == num_tokens]
    token_lookups = [k for k in lookups if k.table in token_tables and k.indices.ndim == 2]
    if not token_lookups:
        return tower
    embedder = _common_module(token_lookups[-1], entry)
    child = entry.inside[entry.inside.index(embedder) + 1]
    token_lookup = next(k for k in token_lookups if _common_module(k, entry) == embedder)
    tower = replace(
        tower,
        embedder=embedder,
        token_embedding=token_lookup.table,
        block_runner="" if child == block else child,
        reads_ids=any(
            k.table != token_lookup.table and _are_same_ids(k.indices, token_lookup.indices) for k in lookups
        ),
    )
    position_lookups = [
        k for k in lookups if k.table not in token_tables and _is_consecutive(k.indices) and embedder in k.inside
    ]
    if not position_lookups:
        return tower
    last = position_lookups[-1]
    return replace(tower, position_embedding=last.table, offset=int(last.indices.reshape(-1)[0]))


def _common_module(lookup: EmbeddingLookup, entry: BlockEntry) -> str:
    """The innermost module that was running both at the lookup and at the entry."""
    return [a for a, b in zip(lookup.inside[:-1], entry.inside[:-1], strict=False) if a == b][-1]


def _are_same_ids(a: Tensor, b: Tensor) -> bool:
    return not a.is_meta and a.shape == b.shape and bool((a == b).all())


def _is_consecutive(indices: Tensor) -> bool:
    if indices.is_meta:  # no values to compare
        return False
    rows = indices.reshape(-1, indices.shape[-1])
    return rows.shape[1] > 1 and bool((rows == rows[0, 0] + torch.arange(rows.shape[1], device=rows.device)).all())
