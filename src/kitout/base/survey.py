"""What is known of a frozen model: towers, blocks and sites, and what a forward has proven of them. Data only.

Made by `find.survey` from structure and completed by the probe. It knows paths and widths, and runs nothing.
It is what methods choose their sites from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from kitout.base.site import Site
from kitout.errors import TargetError, suggest


@dataclass(frozen=True)
class Tower:
    """A stack of blocks. path: of the module list ("model.layers", "encoder.block"). width: of its residual stream.

    What a probe adds: causal: no position sees a later one; None where unknown. owner: path of the module that turns
    tokens into the stack's first stream, None where there are no tokens; table: of the token table it asks; body: of
    the module in it that runs the blocks, "" where it runs them itself.
    positions: path of a learned position table, whose row `offset` is position 0.
    """

    path: str
    depth: int
    width: int
    causal: bool | None = None
    embedder: str | None = None
    token_embedding: str = ""
    block_runner: str = ""
    position_embedding: str = ""
    offset: int = 0


@dataclass(frozen=True)
class Block:
    """One block of a tower. resolved: attention (in and out) and feed-forward are all labelled.

    name: its key in the module list, where that is not its index.
    attends: it holds attention-like projections at all (a convolution or state-space block of a hybrid does not).
    whole: it is one module; False where parallel lists ("attentions", "ffns") share out one block's parts.
    loose: projections without a role, as (path, d_in, d_out).
    """

    tower: str
    index: int
    width: int
    resolved: bool
    has_attention: bool = True
    is_one_module: bool = True
    unlabeled: tuple[tuple[str, int, int], ...] = ()
    name: str = ""

    @property
    def path(self) -> str:
        return f"{self.tower}.{self.name or self.index}"


@dataclass(frozen=True)
class Survey:
    """What was found, in module order.

    proven: a forward has confirmed it (`base.probe`); silent: paths of sites that did not run in it; unread:
    names of parameters that nothing in it read; order: paths of what ran, by first run; doubt: why there is no proof.
    fixed: names of the few parameters that the model itself keeps from training (tables of sines). attentions: one
    site per attention with keys and values to add to; closed: why others have none, by path.
    """

    model: nn.Module = field(repr=False, compare=False)
    sites: tuple[Site, ...]
    towers: tuple[Tower, ...]
    blocks: tuple[Block, ...]
    proven: bool = False
    unused: frozenset[str] = frozenset()
    unread_parameters: frozenset[str] = frozenset()
    non_trainable: frozenset[str] = frozenset()
    execution_order: tuple[str, ...] = ()
    kv_sites: tuple[Site, ...] = ()
    kv_refusals: Mapping[str, str] = field(default_factory=dict)
    unproven_reason: str = ""

    def by_path(self, path: str) -> Site:
        """The physical site at a module path (not the part of a fused projection)."""
        for site in self.sites:
            if site.path == path and site.channels is None:
                return site
        raise TargetError(f"no site at {path!r}; {suggest(path, [s.path for s in self.sites])}")

    @property
    def used_paths(self) -> frozenset[str]:
        """Paths of the modules that run, as far as is known."""
        return frozenset(site.path for site in self.sites) - self.unused

    def blocks_missing(self, *roles: str) -> list[str]:
        """Paths of fully labelled blocks in which not all of these places were seen ("sub.mlp")."""
        seen = {(s.tower, s.layer, s.role) for s in self.sites}
        whole = (b for b in self.blocks if b.resolved and self.proven)
        return [b.path for b in whole if not all((b.tower, b.index, role) in seen for role in roles)]

    def runs_after_blocks(self, site: Site, pyramid: str | None = None) -> bool:
        """It first runs after the blocks have (those of one pyramid): a pooler, a head, the final norm."""
        order = {path: i for i, path in enumerate(self.execution_order or [s.path for s in self.sites])}
        blocks = (s for s in self.sites if s.layer is not None and pyramid in (None, pyramid_key(s.tower)))
        return order.get(site.path, -1) > max((order.get(s.path, -1) for s in blocks), default=-1)

    def closes_tower(self, site: Site) -> bool:
        """It lies outside the blocks and runs after those of the tower whose path is nearest to its own."""
        own = site.path.split(".")

        def shared(tower: Tower) -> int:
            pairs = zip(own, tower.path.split("."), strict=False)
            return next((i for i, (a, b) in enumerate(pairs) if a != b), len(own))

        nearest = max(self.towers, key=shared, default=None)
        return site.layer is None and nearest is not None and self.runs_after_blocks(site, pyramid_key(nearest.path))

    def last_blocks(self, k: int) -> set[tuple[str, int]]:
        """(tower, index) of the last k blocks of each tower, the stages of a pyramid being one tower."""
        lines: dict[str, dict[tuple[str, int], None]] = {}
        for block in self.blocks:
            lines.setdefault(pyramid_key(block.tower), {})[block.tower, block.index] = None
        depths = {line: len(blocks) for line, blocks in lines.items()}
        if k > max(depths.values(), default=0):
            raise TargetError(f"the last {k} blocks are more than there are: {depths or 'this model has no blocks'}")
        return {place for line in lines.values() for place in list(line)[-k:]}

    def unlabeled_projections(self) -> list[tuple[str, int, int]]:
        """Every projection inside a block that has no role."""
        return [item for block in self.blocks for item in block.unlabeled]


def pyramid_key(tower: str) -> str:
    """A tower's path without indices: the same for all stages of a pyramid."""
    return re.sub(r"\d+", "*", tower)
