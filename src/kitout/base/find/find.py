"""Finds every place of a frozen model where an adapter can sit, by structure alone: `survey(model) -> Survey`.

Runs no forward and reads no values, so it works on the meta device; it knows no architecture. Stacks of blocks come
from `block_stacks.py`, roles inside a block from `roles_in_block.py`, roles outside from `roles_outside.py`, words
from `vocabulary.py`.
What structure cannot tell (channels inside a fused projection, whether a site ever fires) is left to the probe.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

from kitout.base.find import block_stacks, module_shapes, roles_outside
from kitout.base.find import roles_in_block as in_block
from kitout.base.find.module_tree import ModuleTree, Projection
from kitout.base.site import ROLES, Site
from kitout.base.survey import Block, Survey, Tower
from kitout.errors import Errors, NoBlocksFound, TargetError, suggest


def find_sites(model: nn.Module, roles: Mapping[str, str] | None = None) -> Survey:
    """Every site of the model. roles: regex searched on the module path -> role, overriding what was inferred."""
    tree = ModuleTree.from_model(model, {})
    given = _requested_roles(tree, roles or {})
    tree = ModuleTree.from_model(model, given)
    found = block_stacks.find_blocks(tree)
    if not found and not given:
        raise NoBlocksFound(_no_blocks_message(tree))
    named: dict[str, str] = {}
    place: dict[str, tuple[str, int]] = {}
    blocks = [_label_block(tree, stack, named, place) for stack in found]
    named |= roles_outside.label_outside_blocks(tree, place, [b.width for b in blocks])
    named |= given
    return Survey(
        model=model,
        sites=tuple(_make_sites(tree, named, place, blocks)),
        towers=tuple(_make_towers(blocks)),
        blocks=tuple(blocks),
        non_trainable=frozenset(_non_trainable(model)),
    )


def _non_trainable(model: nn.Module) -> Iterable[str]:
    """Parameters without a gradient in a model that is trainable as a whole (one frozen by its user tells nothing)."""
    named = [(n, p) for n, p in model.named_parameters(remove_duplicate=False) if p.is_floating_point()]
    trainable = sum(p.numel() for _, p in named if p.requires_grad)
    if 2 * trainable > sum(p.numel() for _, p in named):
        yield from (n for n, p in named if not p.requires_grad)


def _requested_roles(tree: ModuleTree, requested: Mapping[str, str]) -> dict[str, str]:
    """Module path -> role the user asked for. Every fault of the request is reported at once."""
    faults = Errors(TargetError, "roles")
    given: dict[str, str] = {}
    for pattern, role in requested.items():
        try:
            hits = [path for path in tree.leaves if re.search(pattern, path)]
        except re.error as error:
            faults.add(f"{pattern!r} is not a regular expression: {error}")
            continue
        if role not in ROLES:
            faults.add(f"{role!r} (for {pattern!r}) is no role; {suggest(role, ROLES, max_shown=len(ROLES))}")
        if not hits:
            faults.add(
                f"{pattern!r} matches no module; loose projections: {_list_projections(tree.projections.values())}"
            )
        given |= dict.fromkeys(hits, role)
    faults.raise_if_any()
    return given


def _label_block(
    tree: ModuleTree,
    candidate: block_stacks.BlockCandidate,
    roles: dict[str, str],
    locations: dict[str, tuple[str, int]],
) -> Block:
    """Label one block's projections; record in `named` and `place` what was learnt."""
    label = in_block.label_block(tree, candidate)
    roles |= label.roles
    for root in candidate.members:
        locations |= dict.fromkeys(
            (p for p in tree.leaves if tree.is_inside(p, root)), (candidate.tower, candidate.index)
        )
    loose = tuple((p.path, p.d_in, p.d_out) for p in label.unlabeled)
    name = candidate.members[0].removeprefix(f"{candidate.tower}.")
    return Block(
        tower=candidate.tower,
        index=candidate.index,
        width=label.width,
        resolved=label.resolved,
        has_attention=label.has_attention,
        is_one_module=candidate.is_one_module,
        unlabeled=loose,
        name="" if name == str(candidate.index) else name,
    )


def _make_sites(
    tree: ModuleTree, roles: Mapping[str, str], locations: Mapping[str, tuple[str, int]], blocks: Iterable[Block]
) -> Iterable[Site]:
    """One Site per leaf and one per block, in module order."""
    by_path = {b.path: b for b in blocks if b.is_one_module}
    for path, module in tree.modules.items():
        if block := by_path.get(path):
            yield Site(
                path=path,
                role="block",
                tower=block.tower,
                layer=block.index,
                d_in=block.width,
                d_out=block.width,
                kind="other",
                module=module,
            )
        if path not in tree.leaves:
            continue
        leaf, (tower, layer) = tree.leaves[path], locations.get(path, ("", None))
        yield Site(
            path=path,
            role=roles.get(path) or _default_role(leaf, module),
            tower=tower,
            layer=layer,
            d_in=leaf.d_in,
            d_out=leaf.d_out,
            kind=leaf.kind,
            channels_first=leaf.channels_first,
            module=module,
        )


def _default_role(leaf: module_shapes.LeafShape, module: nn.Module) -> str:
    """Role of a leaf nobody claimed: norms are norms (not those over the batch or over groups), the rest is other."""
    return "norm" if leaf.kind == "norm" and not isinstance(module, module_shapes.CHANNELS_FIRST_NORMS) else "other"


def _make_towers(blocks: Iterable[Block]) -> Iterable[Tower]:
    widths: dict[str, list[int]] = {}
    for block in blocks:
        widths.setdefault(block.tower, []).append(block.width)
    for path, ds in widths.items():
        yield Tower(path, len(ds), Counter(ds).most_common(1)[0][0])


def _no_blocks_message(tree: ModuleTree) -> str:
    return (
        "no stack of transformer blocks was found: no module list whose elements hold query, key and value "
        f"projections by name.\n  projections: {_list_projections(tree.projections.values())}\n  Say which is "
        "which, for example\n"
        '      kitout.attach(model, roles={r"mixer\\.in_proj$": "attn.qkv"})\n'
        f"  (regular expressions over module paths; roles: {', '.join(r for r in ROLES if not r.startswith('sub.'))})"
    )


def _list_projections(projections: Iterable[Projection], max_shown: int = 12) -> str:
    """Projections with shapes; layers that differ only in their index are shown once."""
    lines = Counter(f"{re.sub(r'[0-9]+', '*', p.path)} [{p.d_in} -> {p.d_out}]" for p in projections)
    shown = ", ".join(f"{line} x{n}" if n > 1 else line for line, n in list(lines.items())[:max_shown])
    return shown + (", ..." if len(lines) > max_shown else "") if lines else "none"
