"""label_block: the role of every projection of one block, from names for query/key/value and widths for all else.

The residual width d is the width that most values of the block share. An attention's output is what its container
writes back to d. A feed-forward is d -> f (or d -> 2f, gated in one) and then f -> d, in the smallest container that
holds both. Names break ties between structurally equal candidates. It knows nothing of where blocks are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from kitout.base.find.block_stacks import BlockCandidate
from kitout.base.find.module_shapes import has_stacked_experts
from kitout.base.find.module_tree import ModuleTree, Projection, ancestors
from kitout.base.find.vocabulary import CROSS, DOWN, GATE, OUTPUT

BOTTLENECK = 16  # a pair d -> f -> d with f below d / 16 is an adapter-like side path, not the feed-forward


@dataclass(frozen=True)
class BlockRoles:
    """The roles of one block."""

    width: int
    """Width of the residual stream."""
    roles: dict[str, str]
    """Path -> role."""
    unlabeled: list[Projection]
    """Projections without a role."""
    has_attention: bool
    """It holds an attention."""
    resolved: bool
    """Attention (in and out) and feed-forward all have their roles."""


@dataclass(frozen=True)
class AttentionModule:
    """One attention."""

    container: str
    """Path of the module that holds its projections."""
    parts: dict[str, str]
    """Path -> "q", "k", "v" or "qkv"."""
    kind: str
    """Either "attn" or "cross"."""


def label_block(tree: ModuleTree, block: BlockCandidate) -> BlockRoles:
    """The roles of one block."""
    return _BlockLabeler(tree, block).label()


class _BlockLabeler:
    """Fills `roles` step by step: attentions, their outputs, feed-forwards. No step changes an earlier role."""

    def __init__(self, tree: ModuleTree, block: BlockCandidate) -> None:
        self.tree, self.members = tree, block.members
        self.projections = tree.projections_in(block.members)
        self.attentions = self._find_attentions()
        self.torch_attentions = [  # torch's own keeps query, key and value in one bare parameter: no projections
            path for path in tree.paths_in(self.members) if isinstance(tree.modules[path], nn.MultiheadAttention)
        ]
        self.closed = [a.container for a in self.attentions if a.container not in self.members]
        self.width = self._residual_width()
        self.roles: dict[str, str] = {}

    def label(self) -> BlockRoles:
        for attention in self.attentions:
            self.roles |= {path: f"{attention.kind}.{part}" for path, part in attention.parts.items()}
        for path in self.torch_attentions:
            is_cross = CROSS.search(path[len(self._member_holding(path)) :])
            self.roles[f"{path}.out_proj"] = "cross.o" if is_cross else "attn.o"
        with_output: set[str] = set()  # containers of the attentions whose output is labeled
        linears = [p for p in self.projections if not p.is_conv]
        for pool in (linears, self.projections):  # pointwise convolutions stand in where no linear took the role
            for attention in self.attentions:
                if attention.container not in with_output and self._label_output(attention, pool):
                    with_output.add(attention.container)
            self._label_feed_forwards(pool)
        has_experts = self._holds_stacked_experts()
        if not has_experts:
            self._label_feed_forwards(self.tree.projections_in(self.members, spans_positions=True))
        return BlockRoles(
            width=self.width,
            roles=self.roles,
            unlabeled=self._unlabeled(self.projections),
            has_attention=bool(self.attentions or self.torch_attentions),
            resolved=self._is_resolved(has_experts),
        )

    # ---- attention ---------------------------------------------------------------------------------------------

    def _find_attentions(self) -> list[AttentionModule]:
        """Projections named query, key or value, by container, without those that only look like attention."""
        groups: dict[str, dict[str, str]] = {}
        for p in self.projections:
            if part := self.tree.qkv_named.get(p.path):
                groups.setdefault(p.container, {})[p.path] = part
        outer = [container for container in groups if container not in self.members]
        return [
            AttentionModule(container, parts, "cross" if self._is_cross_attention(container, parts) else "attn")
            for container, parts in groups.items()
            if not any(container != other and self.tree.is_inside(container, other) for other in outer)
            and not self._is_chained(parts)
        ]

    def _is_chained(self, parts: dict[str, str]) -> bool:
        """A "key" that feeds a "value" is a feed-forward with attention's names."""
        by_part = {part: self.tree.projections[path] for path, part in parts.items()}
        if "k" not in by_part or "v" not in by_part:
            return False
        return by_part["k"].d_out == by_part["v"].d_in != by_part["k"].d_in

    def _is_cross_attention(self, container: str, parts: dict[str, str]) -> bool:
        """Cross-attention by name: of a path inside the block or, for a list of bare attentions, of the list."""
        root = self._member_holding(container)
        list_name = root.split(".")[-2] if root == container and "." in root else ""
        return bool(CROSS.search(list_name)) or any(CROSS.search(path[len(root) :]) for path in parts)

    def _member_holding(self, path: str) -> str:
        return next(m for m in self.members if self.tree.is_inside(path, m))

    def _label_output(self, attention: AttentionModule, pool: list[Projection]) -> bool:
        """Label what writes the attention back to the residual stream: in its container, else in the modules around.

        True if something was labeled.
        """
        inner_widths = _inner_widths(attention, pool)
        others = [a.container for a in self.attentions if not self.tree.is_inside(attention.container, a.container)]
        free = [p for p in self._unlabeled(pool) if not self.tree.is_inside_any(p.path, others)]
        for root in (attention.container, *ancestors(attention.container)):
            writers = [p for p in free if self.tree.is_inside(p.path, root) and p.d_out == self.width]
            if root == attention.container:
                writers = [p for p in writers if p.container == root] or [p for p in writers if _has_name(p, OUTPUT)]
            else:  # the first whose input fits, or a feed-forward's would be taken
                below_block = root and root not in self.members
                writers = [
                    p for p in writers if p.d_in in inner_widths or (below_block and not _possible_feeders(p, free))
                ][:1]
            if writers:
                named = [p for p in writers if _has_name(p, OUTPUT)]
                fitting = [p for p in writers if p.d_in in inner_widths] or writers
                self.roles |= dict.fromkeys((p.path for p in named or fitting[-1:]), f"{attention.kind}.o")
                return True
        return False

    # ---- feed-forward ------------------------------------------------------------------------------------------

    def _label_feed_forwards(self, pool: list[Projection]) -> None:
        """Pair what widens with what narrows, in the smallest module that holds both; not if there already is one."""
        if "mlp.down" in self.roles.values():
            return
        tree, members = self.tree, self.members
        mixers = [m for m in tree.conv_mixers if m not in members and tree.is_inside_any(m, members)]
        free = [p for p in self._unlabeled(pool) if not tree.is_inside_any(p.path, (*self.closed, *mixers))]
        roots = dict.fromkeys(a for p in free for a in ancestors(p.path) if tree.is_inside_any(a, members))
        outermost = [root for root in roots if root in members]
        if len(members) > 1:
            outermost.append("")  # a pair may have its halves in two members
        for root in sorted(set(roots) - set(outermost), key=lambda r: (-r.count("."), r)):
            self._label_pairs([p for p in free if tree.is_inside(p.path, root)])
        inner_width = max((p.d_in for p in free if self.roles.get(p.path) == "mlp.down"), default=0)
        for root in outermost:  # loose in the block itself: its feed-forward, if wider than what its modules hold
            self._label_pairs([p for p in free if tree.is_inside(p.path, root)], inner_width)

    def _label_pairs(self, pool: list[Projection], above_width: int = 0) -> None:
        """Label the feed-forwards among these projections, (up | gate)+ then down, of an inner width above a bound."""
        pool, d = self._unlabeled(pool), self.width
        fed = [p for i, p in enumerate(pool) if _possible_feeders(p, pool[:i])]
        downs = [p for p in fed if p.d_out == d and p.d_in * BOTTLENECK >= d and p.d_in > above_width]
        if square := [p for p in downs if p.d_in == d]:  # a square one counts only where no other does
            narrowing = [p for p in downs if p.d_in != d]
            named = [p for p in square if _has_name(p, DOWN)]
            downs = narrowing or (named or square)[-1:]
        for f in dict.fromkeys(p.d_in for p in downs):
            same_width = [p for p in downs if p.d_in == f]
            ups = [
                p for p in _possible_feeders(same_width[0], pool) if p not in same_width and p.d_in * BOTTLENECK >= d
            ]
            if not ups or len(ups) > 2 * len(same_width):  # more than two feed one: an attention between two streams
                continue
            self.roles |= dict.fromkeys((p.path for p in same_width), "mlp.down")
            has_gate = len(ups) > len(same_width)
            self.roles |= {p.path: "mlp.gate" if has_gate and _has_name(p, GATE) else "mlp.up" for p in ups}

    # ---- the whole block ---------------------------------------------------------------------------------------

    def _residual_width(self) -> int:
        """The width that most norms and ends of projections share; where two are equally frequent, the outermost."""
        tree = self.tree
        norms = [
            path
            for path in tree.paths_in(self.members)
            if path in tree.leaves and tree.leaves[path].kind == "norm" and not tree.is_inside_any(path, self.closed)
        ]
        votes = Counter(tree.leaves[path].d_out for path in sorted(norms, key=lambda path: path.count(".")))
        votes.update(width for p in self.projections for width in (p.d_in, p.d_out))
        return votes.most_common(1)[0][0] if votes else 0

    def _unlabeled(self, pool: Iterable[Projection]) -> list[Projection]:
        return [p for p in pool if p.path not in self.roles]

    def _holds_stacked_experts(self) -> bool:
        """Experts kept in 3-D parameters that read or write the residual width, outside any attention."""
        return any(
            p.ndim == 3 and self.width in p.shape[1:]
            for path in self.tree.paths_in(self.members)
            if not self.tree.is_inside_any(path, self.closed) and has_stacked_experts(self.tree.modules[path])
            for p in self.tree.modules[path].parameters(recurse=False)
        )

    def _is_resolved(self, has_experts: bool) -> bool:
        """Attention in and out, and a feed-forward: as projections, or as experts stacked in 3-D parameters."""
        roles = set(self.roles.values())
        has_input = bool(self.torch_attentions) or any(
            f"{kind}.qkv" in roles or {f"{kind}.q", f"{kind}.k"} <= roles for kind in ("attn", "cross")
        )
        has_output = bool({"attn.o", "cross.o"} & roles)
        has_feed_forward = "mlp.down" in roles and bool({"mlp.up", "mlp.gate"} & roles)
        return has_input and has_output and (has_feed_forward or has_experts)


def _inner_widths(attention: AttentionModule, pool: list[Projection]) -> set[int]:
    """Widths that the attention's result can have before its output projection."""
    widths: set[int] = set()
    for p in pool:
        part = attention.parts.get(p.path)
        if part in ("q", "v"):
            widths.add(p.d_out)
        elif part == "qkv":
            widths |= {p.d_out // 3, p.d_out // 2, p.d_out}
    return widths


def _has_name(projection: Projection, words: re.Pattern[str]) -> bool:
    return any(words.fullmatch(name) for name in projection.name_candidates)


def _possible_feeders(down: Projection, pool: Iterable[Projection]) -> list[Projection]:
    """What could feed this projection: as wide as its input, or twice (a gate and its partner in one)."""
    return [p for p in pool if p is not down and p.d_out in (down.d_in, 2 * down.d_in)]
