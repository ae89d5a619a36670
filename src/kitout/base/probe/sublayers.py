"""Where sublayers end: the value each adds to the residual stream, and the module that reads the stream before it.

Serial adapters sit on that value; parallel ones add to it and read the residual. A post- or sandwich norm, LayerScale,
dropout or drop-path between the projection and the sum belongs to the sublayer, so the site is the last module that
returned the value. A block may also sum its sublayers first (parallel residual). It knows no architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from kitout.base.find.module_shapes import has_stacked_experts
from kitout.base.probe.trace_records import ResidualSum, SumOperand
from kitout.base.probe.tracer import ForwardTracer
from kitout.base.site import Site
from kitout.base.survey import Survey

SUBLAYER_OF_PROJECTION = {"attn.o": "sub.attn", "cross.o": "sub.cross", "mlp.down": "sub.mlp"}


class SublayerOutput(NamedTuple):
    """What a sum shows of one operand: the sublayers it is the output of, and the module that returns it."""

    roles: list[str]
    """Of "sub.attn", "sub.cross", "sub.mlp": several where a block sums its sublayers first, none for the stream."""
    emitter: str | None
    """Path of the module that returns it; None where no module does."""


def sublayer_sites(survey: Survey, tracer: ForwardTracer) -> list[Site]:
    """One site per sublayer whose sum with the residual stream was traced."""
    closing = {s.path: SUBLAYER_OF_PROJECTION[s.role] for s in survey.sites if s.role in SUBLAYER_OF_PROJECTION}
    blocks = {b.path: b for b in survey.blocks if b.is_one_module}
    sites: dict[tuple[str, str], Site] = {}  # (block, role) -> site
    summed_first: dict[tuple[str, str], str | None] = {}  # (block, role) -> emitter, before the sum with the stream
    roles_of: dict[str, dict[str, str]] = {}  # block -> closing projection in it -> sublayer
    for residual_sum in tracer.residual_sums:
        block = blocks[residual_sum.block]
        if block.path not in roles_of:
            roles_of[block.path] = {p: role for p, role in closing.items() if p.startswith(f"{block.path}.")}
        role_of = roles_of[block.path]
        left, right = _sublayer_outputs(residual_sum, role_of, survey, tracer)
        if left.roles and right.roles:
            for output in (left, right):
                for role in output.roles:
                    summed_first.setdefault((block.path, role), output.emitter)
            continue
        output, stream = (left, residual_sum.operands[1]) if left.roles else (right, residual_sum.operands[0])
        reader = stream.receiver
        if reader is None and stream.value in tracer.inputs_of.get(block.path, ()):
            reader = block.path  # the first module that reads the stream takes a reshaped copy (windows)
        if reader is None:
            continue
        for role in output.roles:
            emitter = summed_first.get((block.path, role), output.emitter)
            if emitter is None:  # a functional dropout or a multiplier returned it: take the closing projection
                emitter = next((path for path, r in role_of.items() if r == role), None)
            if emitter is None or (block.path, role) in sites:
                continue
            shape = tracer.output_shapes.get(emitter, ())
            channels_first = len(shape) > 2 and shape[1] == block.width != shape[-1]
            if not channels_first and shape and shape[-1] != block.width:
                continue  # reshaped before it is added
            sites[block.path, role] = Site(
                path=emitter,
                role=role,
                tower=block.tower,
                layer=block.index,
                d_in=block.width,
                d_out=block.width,
                input_from=reader,
                kind="linear" if emitter in closing else "other",
                channels_first=channels_first,
                post_norm=_post_norm(survey, tracer, residual_sum),
                module=survey.model.get_submodule(emitter),
            )
    return list(sites.values())


def _sublayer_outputs(
    residual_sum: ResidualSum, role_of: Mapping[str, str], survey: Survey, tracer: ForwardTracer
) -> list[SublayerOutput]:
    """Both operands of the sum. role_of: closing projection of the block -> sublayer."""
    outputs = [
        SublayerOutput(_traced_roles(operand, role_of), _last_emitter(operand, residual_sum.block, tracer))
        for operand in residual_sum.operands
    ]
    if any(output.roles for output in outputs):
        return outputs
    return [
        SublayerOutput(_roles_within(operand.composite, role_of, survey), operand.composite)
        for operand in residual_sum.operands
    ]


def _traced_roles(operand: SumOperand, role_of: Mapping[str, str]) -> list[str]:
    """The sublayers that a value comes from, if it comes from nothing but their closing projections."""
    if not operand.leaves or not operand.leaves <= role_of.keys():
        return []
    return sorted({role_of[path] for path in operand.leaves})


def _last_emitter(operand: SumOperand, block: str, tracer: ForwardTracer) -> str | None:
    """The last emitter that runs once per pass of its block: one module may close both sublayers (ViT's dropout)."""
    counts = tracer.call_counts
    return next((path for path in reversed(operand.emitters) if counts[path] == counts[block]), None)


def _roles_within(composite: str | None, role_of: Mapping[str, str], survey: Survey) -> list[str]:
    """The one sublayer that a module with parts is, where its value cannot be traced (a gated mixture of experts)."""
    if composite is None:
        return []
    roles = {role for path, role in role_of.items() if path.startswith(f"{composite}.")}
    if any(has_stacked_experts(m) for m in survey.model.get_submodule(composite).modules()):
        roles.add("sub.mlp")
    return sorted(roles) if len(roles) == 1 else []


def _post_norm(survey: Survey, tracer: ForwardTracer, residual_sum: ResidualSum) -> nn.Module | None:
    """The norm that alone reads this sum and whose output is the residual stream; None where the sum is the stream."""
    stream = tracer.block_outputs | {operand.value for s in tracer.residual_sums for operand in s.operands}
    if residual_sum.out in stream:
        return None
    for site in survey.sites:
        in_block = site.path.startswith(f"{residual_sum.block}.")
        if site.kind == "norm" and in_block and residual_sum.out in tracer.inputs_of.get(site.path, ()):
            return site.module if tracer.outputs_of.get(site.path, set()) & stream else None
    return None
