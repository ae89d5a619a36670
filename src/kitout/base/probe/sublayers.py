"""Where sublayers end: the value each adds to the residual stream, and the module that reads the stream before it.

Serial adapters sit on that value; parallel ones add to it and read the residual. A post- or sandwich norm, LayerScale,
dropout or drop-path between the projection and the sum belongs to the sublayer, so the site is the last module that
emitted the value. Parallel-residual blocks (attention and feed-forward summed first) have both. Knows no architecture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from kitout.base.find.module_shapes import stacked
from kitout.base.probe.tracer import Addition, Watch
from kitout.base.site import Site
from kitout.base.survey import Block, Survey

ENDS = {"attn.o": "sub.attn", "cross.o": "sub.cross", "mlp.down": "sub.mlp"}


def sublayers(found: Survey, watch: Watch) -> list[Site]:
    """One site per sublayer whose sum with the residual stream was seen."""
    ends = {s.path: ENDS[s.role] for s in found.sites if s.role in ENDS}
    by_path = {s.path: s for s in found.sites if s.path in ends}
    blocks = {b.path: b for b in found.blocks if b.whole}
    result: dict[tuple[str, str], Site] = {}
    partial: dict[tuple[str, str], str | None] = {}  # (block, role) -> emitter, where sublayers are summed first
    for add in watch.additions:
        own = {p: r for p, r in ends.items() if p.startswith(add.block + ".")}
        roles = [_roles(leaves, own) for leaves in add.leaves]
        emitters = [_once(emitters, add.block, watch) for emitters in add.emitters]
        if not any(roles):
            roles = [_roles_within(whole, own, found) for whole in add.wholes]
            emitters = list(add.wholes)
        if roles[0] and roles[1]:
            for side in (0, 1):
                for role in roles[side]:
                    partial.setdefault((add.block, role), emitters[side])
            continue
        side = 0 if roles[0] else 1
        source = add.receivers[1 - side]
        if source is None and add.operands[1 - side] in watch.taken.get(add.block, ()):
            source = add.block  # what reads the stream first reads a reshaped copy (windows)
        if not roles[side] or source is None:
            continue
        for role in roles[side]:
            key = (add.block, role)
            emitter = partial.get(key, emitters[side]) or _projection(own, role)
            if key not in result and emitter is not None:
                site = _site(found, blocks[add.block], role, emitter, source, by_path)
                result[key] = site.at(norm=_norm_after(found, watch, add))
    return list(result.values())


def _norm_after(found: Survey, watch: Watch, add: Addition) -> nn.Module | None:
    """The norm that alone takes this sum and from which the residual stream goes on, None where the sum goes on."""
    carried = watch.ends.union(*(a.operands for a in watch.additions))
    if add.out in carried:
        return None
    for site in found.sites:
        if site.kind == "norm" and site.path.startswith(add.block + ".") and add.out in watch.taken.get(site.path, ()):
            return site.module if watch.given.get(site.path, set()) & carried else None
    return None


def _once(emitters: Sequence[str], block: str, watch: Watch) -> str | None:
    """The last emitter that runs once per pass of its block: one module may close both sublayers (ViT's dropout)."""
    return next((e for e in reversed(emitters) if watch.fired[e] == watch.fired[block]), None)


def _roles(leaves: frozenset[str], own: Mapping[str, str]) -> list[str]:
    """The sublayers of this block that a value comes from, if it comes from nothing else."""
    return sorted({own[p] for p in leaves}) if leaves and leaves <= own.keys() else []


def _roles_within(whole: str | None, own: Mapping[str, str], found: Survey) -> list[str]:
    """The one sublayer a module with parts is, where its value cannot be traced back (a gated mixture of experts)."""
    if whole is None:
        return []
    roles = {role for path, role in own.items() if path.startswith(f"{whole}.")}
    if any(stacked(m) for m in found.model.get_submodule(whole).modules()):
        roles.add("sub.mlp")
    return sorted(roles) if len(roles) == 1 else []


def _projection(own: Mapping[str, str], role: str) -> str | None:
    """The closing projection itself, where no module emitted the summed value (a functional dropout, a multiplier)."""
    return next((p for p, r in own.items() if r == role), None)


def _site(
    found: Survey, block: Block, role: str, emitter: str, source: str | None, by_path: Mapping[str, Site]
) -> Site:
    return Site(
        path=emitter,
        role=role,
        tower=block.tower,
        layer=block.index,
        d_in=block.d,
        d_out=block.d,
        source=source,
        kind="linear" if emitter in by_path else "other",
        module=found.model.get_submodule(emitter),
    )
