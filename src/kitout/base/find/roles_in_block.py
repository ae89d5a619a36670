"""Gives every projection of one block its role, from names for query/key/value and from widths for everything else.

The residual width d is the width most values of the block share. An attention's output is what its container writes
back to d; a feed-forward is a pair f -> d after d -> f (or d -> 2f, gated in one) in the smallest container that holds
both. Knows nothing of where blocks are. Names break ties between structurally equal candidates, nothing more.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from kitout.base.find import module_shapes
from kitout.base.find.block_stacks import BlockCandidate
from kitout.base.find.module_tree import ModuleTree, Projection, ancestors
from kitout.base.find.vocabulary import CROSS, DOWN, GATE, OUTPUT

BOTTLENECK = 16  # a pair d -> f -> d with f below d / 16 is an adapter-like side path, not the feed-forward


@dataclass
class BlockRoles:
    """What is known of one block. roles: path -> role. loose: projections without one."""

    width: int
    roles: dict[str, str] = field(default_factory=dict)
    unlabeled: list[Projection] = field(default_factory=list)
    with_output: set[str] = field(default_factory=set)  # homes of the attentions whose output is found
    has_attention: bool = False
    resolved: bool = False

    def has_feed_forward(self) -> bool:
        """A feed-forward has been found."""
        return "mlp.down" in self.roles.values()


@dataclass(frozen=True)
class AttentionModule:
    """One attention: the module that holds its projections, and which part each is."""

    container: str
    parts: dict[str, str]
    kind: str  # "attn" | "cross"


def label_block(tree: ModuleTree, block: BlockCandidate) -> BlockRoles:
    """The roles of one block."""
    projections = tree.projections_in(block.members)
    attentions = _find_attentions(tree, block, projections)
    labels = BlockRoles(width=_residual_width(tree, block, projections, attentions))
    for attention in attentions:
        labels.roles |= {path: f"{attention.kind}.{part}" for path, part in attention.parts.items()}
    for path in _torch_attentions(tree, block):
        labels.roles[f"{path}.out_proj"] = (
            "cross.o" if CROSS.search(path[len(_member_holding(block, path)) :]) else "attn.o"
        )
    linears = [p for p in projections if not p.is_conv]
    for pool in (linears, projections):  # convolutions over one position stand in only where no linear took the role
        for attention in attentions:
            _label_output(labels, block, attention, attentions, pool)
        _label_feed_forwards(tree, labels, block, attentions, pool)
    experts = _holds_stacked_experts(tree, block, labels, attentions)
    if not experts:
        _label_feed_forwards(tree, labels, block, attentions, tree.projections_in(block.members, spans_positions=True))
    labels.unlabeled = [p for p in projections if p.path not in labels.roles]
    labels.has_attention = bool(attentions or _torch_attentions(tree, block))
    labels.resolved = _is_resolved(tree, block, set(labels.roles.values()), experts)
    return labels


def _residual_width(
    tree: ModuleTree, block: BlockCandidate, projections: Iterable[Projection], attentions: list[AttentionModule]
) -> int:
    """The width of the residual stream: the one most norms and ends of projections share (tied: the outermost's)."""
    norms = [p for p, leaf in tree.leaves.items() if leaf.kind == "norm" and tree.is_inside_any(p, block.members)]
    norms = [
        p
        for p in norms
        if not tree.is_inside_any(p, (a.container for a in attentions if a.container not in block.members))
    ]
    votes = Counter(tree.leaves[p].d_out for p in sorted(norms, key=lambda p: p.count(".")))
    votes.update(width for p in projections for width in (p.d_in, p.d_out))
    return votes.most_common(1)[0][0] if votes else 0


def _find_attentions(tree: ModuleTree, block: BlockCandidate, projections: list[Projection]) -> list[AttentionModule]:
    """Seeds grouped by the module that holds them, without those that only look like attention."""
    groups: dict[str, dict[str, str]] = {}
    for p in projections:
        if part := tree.qkv_named.get(p.path):
            groups.setdefault(p.container, {})[p.path] = part
    found = []
    for home, parts in groups.items():
        nested = any(home != other and tree.is_inside(home, other) and other not in block.members for other in groups)
        if not nested and not _is_chained(tree, parts):
            found.append(AttentionModule(home, parts, "cross" if _is_cross_attention(block, home, parts) else "attn"))
    return found


def _is_chained(tree: ModuleTree, parts: dict[str, str]) -> bool:
    """A "key" that feeds a "value" is a feed-forward with attention's names."""
    at = {part: tree.projections[path] for path, part in parts.items()}
    if "k" not in at or "v" not in at:
        return False
    return at["k"].d_out == at["v"].d_in != at["k"].d_in


def _is_cross_attention(block: BlockCandidate, container: str, parts: dict[str, str]) -> bool:
    """Cross-attention by name, looking no higher than the block (a list of bare attentions: than the list)."""
    root = _member_holding(block, container)
    inside = [path[len(root) :] for path in parts]
    above = root.split(".")[-2] if root == container and "." in root else ""
    return bool(CROSS.search(above)) or any(CROSS.search(path) for path in inside)


def _member_holding(block: BlockCandidate, path: str) -> str:
    return next(m for m in block.members if ModuleTree.is_inside(path, m))


def _label_output(
    labels: BlockRoles,
    block: BlockCandidate,
    attention: AttentionModule,
    attentions: list[AttentionModule],
    pool: list[Projection],
) -> None:
    """Find what an attention writes back to the residual stream with: in its own module, else in the modules around."""
    if attention.container in labels.with_output:
        return
    inner = _inner_widths(attention, pool)
    elsewhere = [o.container for o in attentions if not ModuleTree.is_inside(attention.container, o.container)]
    free = [p for p in pool if p.path not in labels.roles and not ModuleTree.is_inside_any(p.path, elsewhere)]
    for root in (attention.container, *ancestors(attention.container)):
        writers = [p for p in free if ModuleTree.is_inside(p.path, root) and p.d_out == labels.width]
        if root == attention.container:
            writers = [p for p in writers if p.container == root] or [p for p in writers if _has_name(p, OUTPUT)]
        else:  # the first whose width agrees, or a feed-forward's would be taken
            inside = root and root not in block.members
            writers = [p for p in writers if p.d_in in inner or (inside and not _possible_feeders(p, free))][:1]
        if writers:
            named = [p for p in writers if _has_name(p, OUTPUT)]
            fitting = [p for p in writers if p.d_in in inner] or writers
            labels.roles |= dict.fromkeys((p.path for p in named or fitting[-1:]), f"{attention.kind}.o")
            labels.with_output.add(attention.container)
            return


def _inner_widths(attention: AttentionModule, pool: list[Projection]) -> set[int]:
    """Widths the attention's result can have before its output projection."""
    widths: set[int] = set()
    for p in pool:
        part = attention.parts.get(p.path)
        if part in ("q", "v"):
            widths.add(p.d_out)
        elif part == "qkv":
            widths |= {p.d_out // 3, p.d_out // 2, p.d_out}
    return widths


def _label_feed_forwards(
    tree: ModuleTree,
    labels: BlockRoles,
    block: BlockCandidate,
    attentions: list[AttentionModule],
    pool: list[Projection],
) -> None:
    """Pair what widens with what narrows, in the smallest module that holds both."""
    if labels.has_feed_forward():
        return
    closed = {a.container for a in attentions if a.container not in block.members}
    closed |= {m for m in tree.conv_mixers if m not in block.members and tree.is_inside_any(m, block.members)}
    free = [p for p in pool if p.path not in labels.roles and not tree.is_inside_any(p.path, closed)]
    roots = {a: None for p in free for a in ancestors(p.path) if tree.is_inside_any(a, block.members)}
    if len(block.members) > 1:
        roots[""] = None
    outermost = [r for r in roots if r in ("", *block.members)]
    for root in sorted(set(roots) - set(outermost), key=lambda r: (-r.count("."), r)):
        _label_pairs(labels, [p for p in free if tree.is_inside(p.path, root)])
    inner = max((p.d_in for p in free if labels.roles.get(p.path) == "mlp.down"), default=0)
    for root in outermost:  # loose in the block itself: its feed-forward, if wider than what its modules hold
        _label_pairs(labels, [p for p in free if tree.is_inside(p.path, root)], inner)


def _label_pairs(labels: BlockRoles, pool: list[Projection], above_width: int = 0) -> None:
    """Label the feed-forwards among these projections, (up | gate)+ then down, whose inner width f is above a bound."""
    pool = [p for p in pool if p.path not in labels.roles]
    d, fed = labels.width, [p for i, p in enumerate(pool) if _possible_feeders(p, pool[:i])]
    downs = [p for p in fed if p.d_out == d and p.d_in * BOTTLENECK >= d and p.d_in > above_width]
    if square := [p for p in downs if p.d_in == d]:
        downs = [p for p in downs if p.d_in != d] or ([p for p in square if _has_name(p, DOWN)] or square)[-1:]
    for f in dict.fromkeys(p.d_in for p in downs):
        narrow = [p for p in downs if p.d_in == f]
        ups = [p for p in _possible_feeders(narrow[0], pool) if p not in narrow and p.d_in * BOTTLENECK >= d]
        if not ups or len(ups) > 2 * len(narrow):  # more than two feed one: an attention between two streams
            continue
        labels.roles |= dict.fromkeys((p.path for p in narrow), "mlp.down")
        for up in ups:
            labels.roles[up.path] = "mlp.gate" if len(ups) > len(narrow) and _has_name(up, GATE) else "mlp.up"


def _has_name(projection: Projection, words: re.Pattern[str]) -> bool:
    return any(words.fullmatch(name) for name in projection.name_candidates)


def _possible_feeders(down: Projection, pool: Iterable[Projection]) -> list[Projection]:
    """What could feed this projection: as wide as its input, or twice (a gate and its partner in one)."""
    return [p for p in pool if p is not down and p.d_out in (down.d_in, 2 * down.d_in)]


def _torch_attentions(tree: ModuleTree, block: BlockCandidate) -> list[str]:
    """torch's own attention keeps query, key and value in one bare parameter: nothing to tap but its output."""
    return [
        path
        for path, m in tree.modules.items()
        if isinstance(m, nn.MultiheadAttention) and tree.is_inside_any(path, block.members)
    ]


def _is_resolved(tree: ModuleTree, block: BlockCandidate, roles: set[str], experts: bool) -> bool:
    """Attention in and out, and a feed-forward: as projections, or as experts stacked in 3-D parameters."""

    def has(kind: str) -> bool:
        return f"{kind}.qkv" in roles or {f"{kind}.q", f"{kind}.k"} <= roles

    reads = has("attn") or has("cross") or bool(_torch_attentions(tree, block))
    writes = bool({"attn.o", "cross.o"} & roles)
    feeds = "mlp.down" in roles and bool({"mlp.up", "mlp.gate"} & roles)
    return reads and writes and (feeds or experts)


def _holds_stacked_experts(
    tree: ModuleTree, block: BlockCandidate, labels: BlockRoles, attentions: list[AttentionModule]
) -> bool:
    """Experts kept in 3-D parameters that read or write the residual width, outside any attention."""
    closed = [a.container for a in attentions if a.container not in block.members]
    return any(
        p.ndim == 3 and labels.width in p.shape[1:]
        for path, module in tree.modules.items()
        if tree.is_inside_any(path, block.members)
        and not tree.is_inside_any(path, closed)
        and module_shapes.has_stacked_experts(module)
        for p in module.parameters(recurse=False)
    )
