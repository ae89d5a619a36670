"""find_sites: every place of a frozen model where an adapter can sit, by structure alone.

It runs no forward and reads no values, so it works on the meta device; it knows no architecture. Stacks of blocks come
from `block_stacks.py`, roles inside a block from `roles_in_block.py`, roles outside from `roles_outside.py`, words from
`vocabulary.py`. What structure does not show (channels inside a fused projection, whether a module ever runs) is left
to the probe.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from torch import nn

from kitout.base.find.block_stacks import BlockCandidate, find_blocks
from kitout.base.find.experts import alternatives, fused_experts, routers
from kitout.base.find.module_shapes import CHANNELS_FIRST_NORMS, LeafShape
from kitout.base.find.module_tree import ModuleTree, Projection
from kitout.base.find.roles_in_block import label_block
from kitout.base.find.roles_outside import label_outside_blocks
from kitout.base.find.torch_attention import torch_attention_sites
from kitout.base.site import ROLES, Site
from kitout.base.survey import Block, Survey, Tower
from kitout.errors import Errors, NoBlocksFound, TargetError, suggest


def find_sites(model: nn.Module, roles: Mapping[str, str] | None = None) -> Survey:
    """Every site of the model. roles: regex searched on the module path -> role, overriding what was inferred."""
    tree = ModuleTree.from_model(model, {})
    requested = _requested_roles(tree, roles or {})
    if requested:
        tree = ModuleTree.from_model(model, requested)
    candidates = find_blocks(tree)
    if not candidates and not requested:
        raise NoBlocksFound(_no_blocks_message(tree))
    role_of: dict[str, str] = {}
    location_of: dict[str, tuple[str, int]] = {}
    blocks = [_label_block(tree, candidate, role_of, location_of) for candidate in candidates]
    role_of |= label_outside_blocks(tree, location_of, [b.width for b in blocks])
    inside, widths = {member for c in candidates for member in c.members}, {b.width for b in blocks}
    experts, lists = fused_experts(tree, inside, widths), alternatives(tree, inside)
    holders = dict.fromkeys(name.rpartition(".")[0] for name in experts)
    free = [path for path in location_of if path not in role_of]
    router_paths = set(routers(tree, holders, lists, free))
    role_of |= requested
    sites = _make_sites(tree, role_of, location_of, blocks, router_paths)
    return Survey(
        model=model,
        sites=tuple(torch_attention_sites(tree, sites, role_of)),
        towers=tuple(_make_towers(blocks)),
        blocks=tuple(blocks),
        non_trainable=frozenset(_non_trainable(model)),
        fused_experts=tuple(experts),
        alternatives=tuple(lists),
    )


def _non_trainable(model: nn.Module) -> Iterable[str]:
    """Parameters without a gradient in a model that is trainable as a whole; in one frozen by its user, none."""
    parameters = [(n, p) for n, p in model.named_parameters(remove_duplicate=False) if p.is_floating_point()]
    num_trainable = sum(p.numel() for _, p in parameters if p.requires_grad)
    if 2 * num_trainable > sum(p.numel() for _, p in parameters):
        yield from (n for n, p in parameters if not p.requires_grad)


def _requested_roles(tree: ModuleTree, roles: Mapping[str, str]) -> dict[str, str]:
    """Module path -> role that the user gave by pattern. All errors of the request are raised at once."""
    errors = Errors(TargetError, "roles")
    requested: dict[str, str] = {}
    for pattern, role in roles.items():
        try:
            matches = [path for path in tree.leaves if re.search(pattern, path)]
        except re.error as error:
            errors.add(f"{pattern!r} is not a regular expression: {error}")
            continue
        if role not in ROLES:
            errors.add(f"{role!r} (for {pattern!r}) is not a role; {suggest(role, ROLES, max_shown=len(ROLES))}")
        if not matches:
            errors.add(f"{pattern!r} matches no module; projections: {_list_projections(tree.projections.values())}")
        requested |= dict.fromkeys(matches, role)
    errors.raise_if_any()
    return requested


def _label_block(
    tree: ModuleTree,
    candidate: BlockCandidate,
    role_of: dict[str, str],
    location_of: dict[str, tuple[str, int]],
) -> Block:
    """One block. The roles of its projections go into `role_of`, (tower, index) of its leaves into `location_of`."""
    label = label_block(tree, candidate)
    role_of |= label.roles
    leaves = (p for root in candidate.members for p in tree.paths_in([root]) if p in tree.leaves)
    location_of |= dict.fromkeys(leaves, (candidate.tower, candidate.index))
    name = candidate.members[0].removeprefix(f"{candidate.tower}.")
    return Block(
        tower=candidate.tower,
        index=candidate.index,
        width=label.width,
        resolved=label.resolved,
        has_attention=label.has_attention,
        is_one_module=candidate.is_one_module,
        unlabeled=tuple((p.path, p.d_in, p.d_out) for p in label.unlabeled),
        name="" if name == str(candidate.index) else name,
    )


def _make_sites(
    tree: ModuleTree,
    role_of: Mapping[str, str],
    location_of: Mapping[str, tuple[str, int]],
    blocks: Iterable[Block],
    router_paths: Collection[str],
) -> Iterable[Site]:
    """One Site per leaf and one per block, in module order."""
    block_at = {b.path: b for b in blocks if b.is_one_module}
    for path, module in tree.modules.items():
        if block := block_at.get(path):
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
        leaf, (tower, layer) = tree.leaves[path], location_of.get(path, ("", None))
        yield Site(
            path=path,
            role=role_of.get(path) or _default_role(leaf, module),
            tower=tower,
            layer=layer,
            d_in=leaf.d_in,
            d_out=leaf.d_out,
            kind=leaf.kind,
            channels_first=leaf.channels_first,
            is_router=path in router_paths and path not in role_of,
            module=module,
        )


def _default_role(leaf: LeafShape, module: nn.Module) -> str:
    """Role of an unlabeled leaf: norms are norms (not those over the batch or over groups), the rest is other."""
    return "norm" if leaf.kind == "norm" and not isinstance(module, CHANNELS_FIRST_NORMS) else "other"


def _make_towers(blocks: Iterable[Block]) -> Iterable[Tower]:
    widths: dict[str, list[int]] = {}
    for block in blocks:
        widths.setdefault(block.tower, []).append(block.width)
    for path, block_widths in widths.items():
        yield Tower(path, depth=len(block_widths), width=Counter(block_widths).most_common(1)[0][0])


def _no_blocks_message(tree: ModuleTree) -> str:
    return (
        "no stack of transformer blocks was found: no module list whose elements hold query, key and value "
        f"projections by name.\n  projections: {_list_projections(tree.projections.values())}\n  Give "
        "their roles, for example\n"
        '      kitout.attach(model, roles={r"mixer\\.in_proj$": "attn.qkv"})\n'
        f"  (regular expressions over module paths; roles: {', '.join(r for r in ROLES if not r.startswith('sub.'))})"
    )


def _list_projections(projections: Iterable[Projection], max_shown: int = 12) -> str:
    """Projections with shapes; layers that differ only in their index are shown once."""
    lines = Counter(f"{re.sub(r'[0-9]+', '*', p.path)} [{p.d_in} -> {p.d_out}]" for p in projections)
    shown = ", ".join(f"{line} x{n}" if n > 1 else line for line, n in list(lines.items())[:max_shown])
    return shown + (", ..." if len(lines) > max_shown else "") if lines else "none"
