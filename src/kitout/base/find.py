"""Finds every place of a frozen model where an adapter can sit, by structure alone: `survey(model) -> Survey`.

Runs no forward and reads no values, so it works on the meta device; it knows no architecture. Stacks of blocks come
from `stacks.py`, roles inside a block from `roles.py`, roles outside from `outside.py`, words from `vocabulary.py`.
What structure cannot tell (channels inside a fused projection, whether a site ever fires) is left to the probe.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from kitout.base import outside, shapes, stacks
from kitout.base import roles as in_block
from kitout.base.parameters import parameter_sites
from kitout.base.site import ROLES, Site
from kitout.base.tree import Projection, Tree
from kitout.errors import Faults, NoBlocks, TargetError, suggest


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
    owner: str | None = None
    table: str = ""
    body: str = ""
    positions: str = ""
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
    d: int
    resolved: bool
    attends: bool = True
    whole: bool = True
    loose: tuple[tuple[str, int, int], ...] = ()
    name: str = ""

    @property
    def path(self) -> str:
        return f"{self.tower}.{self.name or self.index}"


@dataclass(frozen=True)
class Survey:
    """What was found, in module order.

    proven: a forward has confirmed it (`kitout.base.probe`); silent: paths of sites that did not run in it; unread:
    names of parameters that nothing in it read; order: paths of what ran, by first run; doubt: why there is no proof.
    fixed: names of the few parameters that the model itself keeps from training (tables of sines). attentions: one
    site per attention with keys and values to add to; closed: why others have none, by path.
    """

    model: nn.Module = field(repr=False, compare=False)
    sites: tuple[Site, ...]
    towers: tuple[Tower, ...]
    blocks: tuple[Block, ...]
    proven: bool = False
    silent: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()
    fixed: frozenset[str] = frozenset()
    order: tuple[str, ...] = ()
    attentions: tuple[Site, ...] = ()
    closed: Mapping[str, str] = field(default_factory=dict)
    doubt: str = ""

    def by_path(self, path: str) -> Site:
        """The physical site at a module path (not the part of a fused projection)."""
        for site in self.sites:
            if site.path == path and site.channels is None:
                return site
        raise TargetError(f"no site at {path!r}; {suggest(path, [s.path for s in self.sites])}")

    @property
    def alive(self) -> frozenset[str]:
        """Paths of the modules that run, as far as is known."""
        return frozenset(site.path for site in self.sites) - self.silent

    def without(self, *roles: str) -> list[str]:
        """Paths of fully labelled blocks in which not all of these places were seen ("sub.mlp")."""
        seen = {(s.tower, s.layer, s.role) for s in self.sites}
        whole = (b for b in self.blocks if b.resolved and self.proven)
        return [b.path for b in whole if not all((b.tower, b.index, role) in seen for role in roles)]

    def parameters(self, fixed: bool = False) -> list[Site]:
        """Every parameter the forward reads, as sites that name it; with `fixed` those too."""
        return parameter_sites(self, fixed)

    def trails(self, site: Site, pyramid: str | None = None) -> bool:
        """It first runs after the blocks have (those of one pyramid): a pooler, a head, the final norm."""
        order = {path: i for i, path in enumerate(self.order or [s.path for s in self.sites])}
        blocks = (s for s in self.sites if s.layer is not None and pyramid in (None, stages(s.tower)))
        return order.get(site.path, -1) > max((order.get(s.path, -1) for s in blocks), default=-1)

    def ends_tower(self, site: Site) -> bool:
        """It lies outside the blocks and runs after those of the tower whose path is nearest to its own."""
        own = site.path.split(".")

        def shared(tower: Tower) -> int:
            pairs = zip(own, tower.path.split("."), strict=False)
            return next((i for i, (a, b) in enumerate(pairs) if a != b), len(own))

        nearest = max(self.towers, key=shared, default=None)
        return site.layer is None and nearest is not None and self.trails(site, stages(nearest.path))

    def last_blocks(self, k: int) -> set[tuple[str, int]]:
        """(tower, index) of the last k blocks of each tower, the stages of a pyramid being one tower."""
        lines: dict[str, dict[tuple[str, int], None]] = {}
        for block in self.blocks:
            lines.setdefault(stages(block.tower), {})[block.tower, block.index] = None
        depths = {line: len(blocks) for line, blocks in lines.items()}
        if k > max(depths.values(), default=0):
            raise TargetError(f"the last {k} blocks are more than there are: {depths or 'this model has no blocks'}")
        return {place for line in lines.values() for place in list(line)[-k:]}

    def loose(self) -> list[tuple[str, int, int]]:
        """Every projection inside a block that has no role."""
        return [item for block in self.blocks for item in block.loose]


def stages(tower: str) -> str:
    """A tower's path without indices: the same for all stages of a pyramid."""
    return re.sub(r"\d+", "*", tower)


def survey(model: nn.Module, roles: Mapping[str, str] | None = None) -> Survey:
    """Every site of the model. roles: regex searched on the module path -> role, overriding what was inferred."""
    tree = Tree.of(model, {})
    given = _given(tree, roles or {})
    tree = Tree.of(model, given)
    found = stacks.find(tree)
    if not found and not given:
        raise NoBlocks(_no_blocks(tree))
    named: dict[str, str] = {}
    place: dict[str, tuple[str, int]] = {}
    blocks = [_block(tree, stack, named, place) for stack in found]
    named |= outside.label(tree, place, [b.d for b in blocks])
    named |= given
    return Survey(
        model=model,
        sites=tuple(_sites(tree, named, place, blocks)),
        towers=tuple(_towers(blocks)),
        blocks=tuple(blocks),
        fixed=frozenset(_fixed(model)),
    )


def _fixed(model: nn.Module) -> Iterable[str]:
    """Parameters without a gradient in a model that is trainable as a whole (one frozen by its user tells nothing)."""
    named = [(n, p) for n, p in model.named_parameters(remove_duplicate=False) if p.is_floating_point()]
    trainable = sum(p.numel() for _, p in named if p.requires_grad)
    if 2 * trainable > sum(p.numel() for _, p in named):
        yield from (n for n, p in named if not p.requires_grad)


def _given(tree: Tree, wanted: Mapping[str, str]) -> dict[str, str]:
    """Module path -> role the user asked for. Every fault of the request is reported at once."""
    faults = Faults(TargetError, "roles")
    given: dict[str, str] = {}
    for pattern, role in wanted.items():
        try:
            hits = [path for path in tree.leaves if re.search(pattern, path)]
        except re.error as error:
            faults.add(f"{pattern!r} is not a regular expression: {error}")
            continue
        if role not in ROLES:
            faults.add(f"{role!r} (for {pattern!r}) is no role; {suggest(role, ROLES, most=len(ROLES))}")
        if not hits:
            faults.add(f"{pattern!r} matches no module; loose projections: {_shown(tree.projections.values())}")
        given |= dict.fromkeys(hits, role)
    faults.raise_if_any()
    return given


def _block(tree: Tree, stack: stacks.Element, named: dict[str, str], place: dict[str, tuple[str, int]]) -> Block:
    """Label one block's projections; record in `named` and `place` what was learnt."""
    label = in_block.label(tree, stack)
    named |= label.roles
    for root in stack.members:
        place |= dict.fromkeys((p for p in tree.leaves if tree.under(p, root)), (stack.tower, stack.index))
    loose = tuple((p.path, p.d_in, p.d_out) for p in label.loose)
    name = stack.members[0].removeprefix(f"{stack.tower}.")
    return Block(
        tower=stack.tower,
        index=stack.index,
        d=label.d,
        resolved=label.resolved,
        attends=label.attends,
        whole=stack.whole,
        loose=loose,
        name="" if name == str(stack.index) else name,
    )


def _sites(
    tree: Tree, named: Mapping[str, str], place: Mapping[str, tuple[str, int]], blocks: Iterable[Block]
) -> Iterable[Site]:
    """One Site per leaf and one per block, in module order."""
    by_path = {b.path: b for b in blocks if b.whole}
    for path, module in tree.modules.items():
        if block := by_path.get(path):
            yield Site(
                path=path,
                role="block",
                tower=block.tower,
                layer=block.index,
                d_in=block.d,
                d_out=block.d,
                kind="other",
                module=module,
            )
        if path not in tree.leaves:
            continue
        leaf, (tower, layer) = tree.leaves[path], place.get(path, ("", None))
        yield Site(
            path=path,
            role=named.get(path) or _plain_role(leaf, module),
            tower=tower,
            layer=layer,
            d_in=leaf.d_in,
            d_out=leaf.d_out,
            kind=leaf.kind,
            channels_first=leaf.channels_first,
            module=module,
        )


def _plain_role(leaf: shapes.Leaf, module: nn.Module) -> str:
    """Role of a leaf nobody claimed: norms are norms (not those over the batch or over groups), the rest is other."""
    return "norm" if leaf.kind == "norm" and not isinstance(module, shapes.CHANNELS_FIRST_NORMS) else "other"


def _towers(blocks: Iterable[Block]) -> Iterable[Tower]:
    widths: dict[str, list[int]] = {}
    for block in blocks:
        widths.setdefault(block.tower, []).append(block.d)
    for path, ds in widths.items():
        yield Tower(path, len(ds), Counter(ds).most_common(1)[0][0])


def _no_blocks(tree: Tree) -> str:
    return (
        "no stack of transformer blocks was found: no module list whose elements hold query, key and value "
        f"projections by name.\n  projections: {_shown(tree.projections.values())}\n  Say which is which, for example\n"
        '      kitout.attach(model, roles={r"mixer\\.in_proj$": "attn.qkv"})\n'
        f"  (regular expressions over module paths; roles: {', '.join(r for r in ROLES if not r.startswith('sub.'))})"
    )


def _shown(projections: Iterable[Projection], most: int = 12) -> str:
    """Projections with shapes; layers that differ only in their index are shown once."""
    lines = Counter(f"{re.sub(r'[0-9]+', '*', p.path)} [{p.d_in} -> {p.d_out}]" for p in projections)
    shown = ", ".join(f"{line} x{n}" if n > 1 else line for line, n in list(lines.items())[:most])
    return shown + (", ..." if len(lines) > most else "") if lines else "none"
