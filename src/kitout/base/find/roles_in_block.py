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
from kitout.base.find.block_stacks import Element
from kitout.base.find.module_tree import Projection, Tree, ancestors
from kitout.base.find.vocabulary import CROSS, DOWN, GATE, OUTPUT

BOTTLENECK = 16  # a pair d -> f -> d with f below d / 16 is an adapter-like side path, not the feed-forward


@dataclass
class Labels:
    """What is known of one block. roles: path -> role. loose: projections without one."""

    d: int
    roles: dict[str, str] = field(default_factory=dict)
    loose: list[Projection] = field(default_factory=list)
    outputs: set[str] = field(default_factory=set)  # homes of the attentions whose output is found
    attends: bool = False
    resolved: bool = False

    def feeds(self) -> bool:
        """A feed-forward has been found."""
        return "mlp.down" in self.roles.values()


@dataclass(frozen=True)
class Attention:
    """One attention: the module that holds its projections, and which part each is."""

    home: str
    parts: dict[str, str]
    kind: str  # "attn" | "cross"


def label(tree: Tree, block: Element) -> Labels:
    """The roles of one block."""
    projections = tree.within(block.members)
    attentions = _attentions(tree, block, projections)
    labels = Labels(d=_width(tree, block, projections, attentions))
    for attention in attentions:
        labels.roles |= {path: f"{attention.kind}.{part}" for path, part in attention.parts.items()}
    for path in _torch_attentions(tree, block):
        labels.roles[f"{path}.out_proj"] = "cross.o" if CROSS.search(path[len(_root(block, path)) :]) else "attn.o"
    linears = [p for p in projections if not p.conv]
    for pool in (linears, projections):  # convolutions over one position stand in only where no linear took the role
        for attention in attentions:
            _output(labels, block, attention, attentions, pool)
        _feed_forwards(tree, labels, block, attentions, pool)
    experts = _stacked_experts(tree, block, labels, attentions)
    if not experts:
        _feed_forwards(tree, labels, block, attentions, tree.within(block.members, wide=True))
    labels.loose = [p for p in projections if p.path not in labels.roles]
    labels.attends = bool(attentions or _torch_attentions(tree, block))
    labels.resolved = _resolved(tree, block, set(labels.roles.values()), experts)
    return labels


def _width(tree: Tree, block: Element, projections: Iterable[Projection], attentions: list[Attention]) -> int:
    """The width of the residual stream: the one most norms and ends of projections share (tied: the outermost's)."""
    norms = [p for p, leaf in tree.leaves.items() if leaf.kind == "norm" and tree.under_any(p, block.members)]
    norms = [p for p in norms if not tree.under_any(p, (a.home for a in attentions if a.home not in block.members))]
    votes = Counter(tree.leaves[p].d_out for p in sorted(norms, key=lambda p: p.count(".")))
    votes.update(width for p in projections for width in (p.d_in, p.d_out))
    return votes.most_common(1)[0][0] if votes else 0


def _attentions(tree: Tree, block: Element, projections: list[Projection]) -> list[Attention]:
    """Seeds grouped by the module that holds them, without those that only look like attention."""
    groups: dict[str, dict[str, str]] = {}
    for p in projections:
        if part := tree.seeds.get(p.path):
            groups.setdefault(p.home, {})[p.path] = part
    found = []
    for home, parts in groups.items():
        nested = any(home != other and tree.under(home, other) and other not in block.members for other in groups)
        if not nested and not _chained(tree, parts):
            found.append(Attention(home, parts, "cross" if _crosses(block, home, parts) else "attn"))
    return found


def _chained(tree: Tree, parts: dict[str, str]) -> bool:
    """A "key" that feeds a "value" is a feed-forward with attention's names."""
    at = {part: tree.projections[path] for path, part in parts.items()}
    if "k" not in at or "v" not in at:
        return False
    return at["k"].d_out == at["v"].d_in != at["k"].d_in


def _crosses(block: Element, home: str, parts: dict[str, str]) -> bool:
    """Cross-attention by name, looking no higher than the block (a list of bare attentions: than the list)."""
    root = _root(block, home)
    inside = [path[len(root) :] for path in parts]
    above = root.split(".")[-2] if root == home and "." in root else ""
    return bool(CROSS.search(above)) or any(CROSS.search(path) for path in inside)


def _root(block: Element, path: str) -> str:
    return next(m for m in block.members if Tree.under(path, m))


def _output(
    labels: Labels, block: Element, attention: Attention, others: list[Attention], pool: list[Projection]
) -> None:
    """Find what an attention writes back to the residual stream with: in its own module, else in the modules around."""
    if attention.home in labels.outputs:
        return
    inner = _inner_widths(attention, pool)
    elsewhere = [o.home for o in others if not Tree.under(attention.home, o.home)]
    free = [p for p in pool if p.path not in labels.roles and not Tree.under_any(p.path, elsewhere)]
    for root in (attention.home, *ancestors(attention.home)):
        writers = [p for p in free if Tree.under(p.path, root) and p.d_out == labels.d]
        if root == attention.home:
            writers = [p for p in writers if p.home == root] or [p for p in writers if _named(p, OUTPUT)]
        else:  # the first whose width agrees, or a feed-forward's would be taken
            inside = root and root not in block.members
            writers = [p for p in writers if p.d_in in inner or (inside and not _widened(p, free))][:1]
        if writers:
            named = [p for p in writers if _named(p, OUTPUT)]
            fitting = [p for p in writers if p.d_in in inner] or writers
            labels.roles |= dict.fromkeys((p.path for p in named or fitting[-1:]), f"{attention.kind}.o")
            labels.outputs.add(attention.home)
            return


def _inner_widths(attention: Attention, pool: list[Projection]) -> set[int]:
    """Widths the attention's result can have before its output projection."""
    widths: set[int] = set()
    for p in pool:
        part = attention.parts.get(p.path)
        if part in ("q", "v"):
            widths.add(p.d_out)
        elif part == "qkv":
            widths |= {p.d_out // 3, p.d_out // 2, p.d_out}
    return widths


def _feed_forwards(
    tree: Tree, labels: Labels, block: Element, attentions: list[Attention], pool: list[Projection]
) -> None:
    """Pair what widens with what narrows, in the smallest module that holds both."""
    if labels.feeds():
        return
    closed = {a.home for a in attentions if a.home not in block.members}
    closed |= {m for m in tree.mixers if m not in block.members and tree.under_any(m, block.members)}
    free = [p for p in pool if p.path not in labels.roles and not tree.under_any(p.path, closed)]
    roots = {a: None for p in free for a in ancestors(p.path) if tree.under_any(a, block.members)}
    if len(block.members) > 1:
        roots[""] = None
    outermost = [r for r in roots if r in ("", *block.members)]
    for root in sorted(set(roots) - set(outermost), key=lambda r: (-r.count("."), r)):
        _pair(labels, [p for p in free if tree.under(p.path, root)])
    inner = max((p.d_in for p in free if labels.roles.get(p.path) == "mlp.down"), default=0)
    for root in outermost:  # loose in the block itself: its feed-forward, if wider than what its modules hold
        _pair(labels, [p for p in free if tree.under(p.path, root)], inner)


def _pair(labels: Labels, pool: list[Projection], above: int = 0) -> None:
    """Label the feed-forwards among these projections, (up | gate)+ then down, whose inner width f is above a bound."""
    pool = [p for p in pool if p.path not in labels.roles]
    d, fed = labels.d, [p for i, p in enumerate(pool) if _widened(p, pool[:i])]
    downs = [p for p in fed if p.d_out == d and p.d_in * BOTTLENECK >= d and p.d_in > above]
    if square := [p for p in downs if p.d_in == d]:
        downs = [p for p in downs if p.d_in != d] or ([p for p in square if _named(p, DOWN)] or square)[-1:]
    for f in dict.fromkeys(p.d_in for p in downs):
        narrow = [p for p in downs if p.d_in == f]
        ups = [p for p in _widened(narrow[0], pool) if p not in narrow and p.d_in * BOTTLENECK >= d]
        if not ups or len(ups) > 2 * len(narrow):  # more than two feed one: an attention between two streams
            continue
        labels.roles |= dict.fromkeys((p.path for p in narrow), "mlp.down")
        for up in ups:
            labels.roles[up.path] = "mlp.gate" if len(ups) > len(narrow) and _named(up, GATE) else "mlp.up"


def _named(projection: Projection, words: re.Pattern[str]) -> bool:
    return any(words.fullmatch(name) for name in projection.names)


def _widened(down: Projection, pool: Iterable[Projection]) -> list[Projection]:
    """What could feed this projection: as wide as its input, or twice (a gate and its partner in one)."""
    return [p for p in pool if p is not down and p.d_out in (down.d_in, 2 * down.d_in)]


def _torch_attentions(tree: Tree, block: Element) -> list[str]:
    """torch's own attention keeps query, key and value in one bare parameter: nothing to tap but its output."""
    return [
        path
        for path, m in tree.modules.items()
        if isinstance(m, nn.MultiheadAttention) and tree.under_any(path, block.members)
    ]


def _resolved(tree: Tree, block: Element, roles: set[str], experts: bool) -> bool:
    """Attention in and out, and a feed-forward: as projections, or as experts stacked in 3-D parameters."""

    def has(kind: str) -> bool:
        return f"{kind}.qkv" in roles or {f"{kind}.q", f"{kind}.k"} <= roles

    reads = has("attn") or has("cross") or bool(_torch_attentions(tree, block))
    writes = bool({"attn.o", "cross.o"} & roles)
    feeds = "mlp.down" in roles and bool({"mlp.up", "mlp.gate"} & roles)
    return reads and writes and (feeds or experts)


def _stacked_experts(tree: Tree, block: Element, labels: Labels, attentions: list[Attention]) -> bool:
    """Experts kept in 3-D parameters that read or write the residual width, outside any attention."""
    closed = [a.home for a in attentions if a.home not in block.members]
    return any(
        p.ndim == 3 and labels.d in p.shape[1:]
        for path, module in tree.modules.items()
        if tree.under_any(path, block.members) and not tree.under_any(path, closed) and module_shapes.stacked(module)
        for p in module.parameters(recurse=False)
    )
