"""Survey: what is known of a frozen model. Towers, blocks and sites, and what a forward has proven of them.

Data only: `find_sites` makes it from structure, `prove_sites` completes it by one forward, methods choose their sites
from it. It knows paths and widths, and runs nothing.
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
    """One stack of blocks. All fields after `width` are seen by the probe."""

    path: str
    """Path of the module list ("model.layers", "encoder.block")."""
    depth: int
    """Number of blocks."""
    width: int
    """Width of the residual stream."""
    causal: bool | None = None
    """True where no position sees a later one; None where unknown."""
    embedder: str | None = None
    """Path of the module that turns tokens into the input of the first block; None where there are no tokens."""
    token_embedding: str = ""
    """Path of the token table that the embedder looks up."""
    block_runner: str = ""
    """Path of the module in the embedder that runs the blocks; "" where the embedder runs them itself."""
    position_embedding: str = ""
    """Path of the learned position table; "" without one."""
    offset: int = 0
    """The row of the position table that is position 0."""
    padding_leaks: bool = False
    """Masked columns behind a text change it."""
    reads_ids: bool = False
    """Its embedder looks token ids up in another table too, so that it cannot be run from vectors alone."""
    reads_inputs_again: bool = False
    """Its embedder reads ids or mask once more after the blocks (a pooling), in the columns it was called with."""
    takes_tokens: bool = True
    """Its blocks take [batch, tokens, width], not an image as [batch, height, width, channels]."""


@dataclass(frozen=True)
class Block:
    """One block of a tower."""

    tower: str
    """Path of its tower."""
    index: int
    """Its index in the tower."""
    width: int
    """Width of the residual stream."""
    resolved: bool
    """Attention (in and out) and feed-forward all have their roles."""
    has_attention: bool = True
    """It holds attention-like projections. A convolution or state-space block of a hybrid stack does not."""
    is_one_module: bool = True
    """False where parallel lists ("attentions", "ffns") hold the parts of one block."""
    unlabeled: tuple[tuple[str, int, int], ...] = ()
    """Projections without a role: (path, d_in, d_out)."""
    name: str = ""
    """Its key in the module list, where that is not its index."""

    @property
    def path(self) -> str:
        return f"{self.tower}.{self.name or self.index}"


@dataclass(frozen=True)
class Survey:
    """What is known of one model. `sites`, `towers` and `blocks` are in module order."""

    model: nn.Module = field(repr=False, compare=False)
    """The frozen model."""
    sites: tuple[Site, ...]
    """Every place where a value passes, but for the attentions in `kv_sites`."""
    towers: tuple[Tower, ...]
    """The stacks of blocks."""
    blocks: tuple[Block, ...]
    """The blocks of all towers."""
    proven: bool = False
    """A forward has confirmed the sites (`prove_sites`)."""
    unused: frozenset[str] = frozenset()
    """Seen by the probe: paths of sites that did not run."""
    unread_parameters: frozenset[str] = frozenset()
    """Seen by the probe: names of parameters that no operation read."""
    non_trainable: frozenset[str] = frozenset()
    """Names of the few parameters that the model itself never trains (sinusoidal tables)."""
    shared_inputs: tuple[tuple[str, ...], ...] = ()
    """Seen by the probe: paths of linears in one module that are called with the same tensor, in that order."""
    execution_order: tuple[str, ...] = ()
    """Seen by the probe: paths of modules in the order of their first run."""
    kv_sites: tuple[Site, ...] = ()
    """Seen by the probe: one site per attention that keys and values can be added to."""
    kv_refusals: Mapping[str, str] = field(default_factory=dict)
    """Seen by the probe: path of every other attention -> why it has no such site."""
    media: frozenset[str] = frozenset()
    """Seen by the probe: paths of modules that a forward of text alone does not run: they see images or sounds."""
    biased_attentions: frozenset[str] = frozenset()
    """Seen by the probe: paths of attentions whose mask carries a bias by position."""
    unproven_reason: str = ""
    """Why no forward has confirmed the sites."""
    fused_experts: tuple[str, ...] = ()
    """Names of the parameters that hold the experts of a mixture, all of a block in one: no site is there."""
    alternatives: tuple[tuple[str, ...], ...] = ()
    """Lists of modules inside a block that are built alike, each as paths: experts of which the data chooses some."""
    unreached: frozenset[str] = frozenset()
    """Seen by the probe: paths of sites that the probe's data did not choose, in modules whose alternatives ran."""

    def by_path(self, path: str) -> Site:
        """The site of the whole module at a path, not of one part of a fused projection."""
        for site in self.sites:
            if site.path == path and site.channels is None:
                return site
        raise TargetError(f"no site at {path!r}; {suggest(path, [s.path for s in self.sites])}")

    def is_media_tower(self, tower: Tower) -> bool:
        """Whether its blocks see images or sounds beside a text."""
        return any(b.path in self.media for b in self.blocks if b.tower == tower.path)

    @property
    def used_paths(self) -> frozenset[str]:
        """Paths of the modules that run, as far as the probe has shown."""
        return frozenset(site.path for site in self.sites) - self.unused

    def blocks_missing(self, *roles: str) -> list[str]:
        """Paths of resolved blocks that lack a site of these roles ("sub.mlp"); empty before a proof."""
        present = {(s.tower, s.layer, s.role) for s in self.sites}
        blocks = (b for b in self.blocks if b.resolved and self.proven)
        return [b.path for b in blocks if not all((b.tower, b.index, role) in present for role in roles)]

    def runs_after_blocks(self, site: Site, pyramid: str | None = None) -> bool:
        """It first runs after the blocks (those of one pyramid): a pooler, a head, the final norm."""
        order = {path: i for i, path in enumerate(self.execution_order or [s.path for s in self.sites])}
        blocks = (s for s in self.sites if s.layer is not None and pyramid in (None, pyramid_key(s.tower)))
        return order.get(site.path, -1) > max((order.get(s.path, -1) for s in blocks), default=-1)

    def closes_tower(self, site: Site) -> bool:
        """It lies outside the blocks and runs after those of the tower whose path is nearest to its own."""
        own = site.path.split(".")

        def common_length(tower: Tower) -> int:
            pairs = zip(own, tower.path.split("."), strict=False)
            return next((i for i, (a, b) in enumerate(pairs) if a != b), len(own))

        nearest = max(self.towers, key=common_length, default=None)
        return site.layer is None and nearest is not None and self.runs_after_blocks(site, pyramid_key(nearest.path))

    def last_blocks(self, k: int) -> set[tuple[str, int]]:
        """(tower, index) of the last k blocks of each tower, the stages of a pyramid being one tower."""
        pyramids: dict[str, dict[tuple[str, int], None]] = {}
        for block in self.blocks:
            pyramids.setdefault(pyramid_key(block.tower), {})[block.tower, block.index] = None
        depths = {pyramid: len(blocks) for pyramid, blocks in pyramids.items()}
        if k > max(depths.values(), default=0):
            raise TargetError(f"the last {k} blocks are more than there are: {depths or 'this model has no blocks'}")
        return {location for blocks in pyramids.values() for location in list(blocks)[-k:]}

    def unlabeled_projections(self) -> list[tuple[str, int, int]]:
        """Every projection inside a block that has no role."""
        return [item for block in self.blocks for item in block.unlabeled]


def pyramid_key(tower: str) -> str:
    """A tower's path without indices: the same for all stages of a pyramid."""
    return re.sub(r"\d+", "*", tower)
