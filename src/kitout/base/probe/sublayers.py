"""Where sublayers end: the value each adds to the residual stream, and the module that reads the stream before it.

Serial adapters sit on that value; parallel ones add to it and read the residual. A post- or sandwich norm, LayerScale,
dropout or drop-path between the projection and the sum belongs to the sublayer, so the site is the last module that
emitted the value. Parallel-residual blocks (attention and feed-forward summed first) have both. Knows no architecture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from kitout.base.find.module_shapes import has_stacked_experts
from kitout.base.probe.tracer import ForwardTracer, ResidualSum
from kitout.base.site import Site
from kitout.base.survey import Block, Survey

SUBLAYER_OF_PROJECTION = {"attn.o": "sub.attn", "cross.o": "sub.cross", "mlp.down": "sub.mlp"}


def sublayer_sites(survey: Survey, tracer: ForwardTracer) -> list[Site]:
    """One site per sublayer whose sum with the residual stream was seen."""
    ends = {s.path: SUBLAYER_OF_PROJECTION[s.role] for s in survey.sites if s.role in SUBLAYER_OF_PROJECTION}
    by_path = {s.path: s for s in survey.sites if s.path in ends}
    blocks = {b.path: b for b in survey.blocks if b.is_one_module}
    result: dict[tuple[str, str], Site] = {}
    partial: dict[tuple[str, str], str | None] = {}  # (block, role) -> emitter, where sublayers are summed first
    for add in tracer.residual_sums:
        own = {p: r for p, r in ends.items() if p.startswith(add.block + ".")}
        roles = [_sublayers_of(leaves, own) for leaves in add.leaves]
        emitters = [_last_single_emitter(emitters, add.block, tracer) for emitters in add.emitters]
        if not any(roles):
            roles = [_sublayers_within(whole, own, survey) for whole in add.composites]
            emitters = list(add.composites)
        if roles[0] and roles[1]:
            for side in (0, 1):
                for role in roles[side]:
                    partial.setdefault((add.block, role), emitters[side])
            continue
        side = 0 if roles[0] else 1
        source = add.receivers[1 - side]
        if source is None and add.operands[1 - side] in tracer.inputs_of.get(add.block, ()):
            source = add.block  # what reads the stream first reads a reshaped copy (windows)
        if not roles[side] or source is None:
            continue
        for role in roles[side]:
            key = (add.block, role)
            emitter = partial.get(key, emitters[side]) or _closing_projection(own, role)
            if key not in result and emitter is not None:
                site = _make_site(survey, blocks[add.block], role, emitter, source, by_path)
                result[key] = site.replace(post_norm=_post_norm(survey, tracer, add))
    return list(result.values())


def _post_norm(survey: Survey, tracer: ForwardTracer, residual_sum: ResidualSum) -> nn.Module | None:
    """The norm that alone takes this sum and from which the residual stream goes on, None where the sum goes on."""
    carried = tracer.block_outputs.union(*(a.operands for a in tracer.residual_sums))
    if residual_sum.out in carried:
        return None
    for site in survey.sites:
        if (
            site.kind == "norm"
            and site.path.startswith(residual_sum.block + ".")
            and residual_sum.out in tracer.inputs_of.get(site.path, ())
        ):
            return site.module if tracer.outputs_of.get(site.path, set()) & carried else None
    return None


def _last_single_emitter(emitters: Sequence[str], block: str, tracer: ForwardTracer) -> str | None:
    """The last emitter that runs once per pass of its block: one module may close both sublayers (ViT's dropout)."""
    return next((e for e in reversed(emitters) if tracer.call_counts[e] == tracer.call_counts[block]), None)


def _sublayers_of(leaves: frozenset[str], sublayer_of: Mapping[str, str]) -> list[str]:
    """The sublayers of this block that a value comes from, if it comes from nothing else."""
    return sorted({sublayer_of[p] for p in leaves}) if leaves and leaves <= sublayer_of.keys() else []


def _sublayers_within(composite: str | None, sublayer_of: Mapping[str, str], survey: Survey) -> list[str]:
    """The one sublayer a module with parts is, where its value cannot be traced back (a gated mixture of experts)."""
    if composite is None:
        return []
    roles = {role for path, role in sublayer_of.items() if path.startswith(f"{composite}.")}
    if any(has_stacked_experts(m) for m in survey.model.get_submodule(composite).modules()):
        roles.add("sub.mlp")
    return sorted(roles) if len(roles) == 1 else []


def _closing_projection(sublayer_of: Mapping[str, str], role: str) -> str | None:
    """The closing projection itself, where no module emitted the summed value (a functional dropout, a multiplier)."""
    return next((p for p, r in sublayer_of.items() if r == role), None)


def _make_site(
    survey: Survey, block: Block, role: str, emitter: str, input_from: str | None, by_path: Mapping[str, Site]
) -> Site:
    return Site(
        path=emitter,
        role=role,
        tower=block.tower,
        layer=block.index,
        d_in=block.width,
        d_out=block.width,
        input_from=input_from,
        kind="linear" if emitter in by_path else "other",
        module=survey.model.get_submodule(emitter),
    )
