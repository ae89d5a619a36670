"""Roles outside the blocks: token tables, patch embeddings, output heads.

What a model declares itself (transformers' input and output embeddings) is taken first; what it does not declare is
told by kind, by width (does it write the width of a tower?) and, last, by a few words. Knows nothing of blocks but
their widths and places.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn
from transformers import PreTrainedModel

from kitout.base.tree import Tree
from kitout.base.vocabulary import HEAD, NOT_TOKENS, PATCH


def label(tree: Tree, inside: Collection[str], widths: Collection[int]) -> dict[str, str]:
    """Path -> role of the leaves outside the blocks that have one."""
    free = [path for path in tree.leaves if path not in inside]
    declared_in, declared_out = _declared(tree)
    roles = dict.fromkeys(_tables(tree, free, declared_in), "embed")
    roles |= dict.fromkeys(_patches(tree, free, set(widths)), "patch")
    roles |= dict.fromkeys(_heads(tree, free, inside, declared_out), "head")
    return roles


def _declared(tree: Tree) -> tuple[nn.Module | None, nn.Module | None]:
    """Input and output embeddings as a transformers model names them; None where it has or knows none."""
    model = tree.modules[""]
    if not isinstance(model, PreTrainedModel):
        return None, None
    try:
        source = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # a model without token tables; several raise on access
        source = None
    try:
        target = model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        target = None
    return source, target


def _tables(tree: Tree, free: Iterable[str], declared: nn.Module | None) -> list[str]:
    """The token table, and the tables of other towers with as many rows (an encoder's and a decoder's)."""
    tables = {p: tree.modules[p] for p in free if tree.leaves[p].kind == "embedding"}
    if declared in tables.values():
        rows = tree.leaves[next(p for p, m in tables.items() if m is declared)].d_in
    else:
        named = [p for p in tables if not NOT_TOKENS.search(p.rpartition(".")[2])]
        rows = max((tree.leaves[p].d_in for p in named), default=0)
        tables = {p: tables[p] for p in named}
    return [p for p in tables if tree.leaves[p].d_in == rows]


def _patches(tree: Tree, free: Iterable[str], widths: set[int]) -> list[str]:
    """Strided 2-D or 3-D convolutions, and linears called patch, that write the width of a tower."""

    def cuts(path: str) -> bool:
        module = tree.modules[path]
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            return max(module.stride) > 1
        return tree.leaves[path].kind == "linear" and bool(PATCH.search(path))

    return [p for p in free if tree.leaves[p].d_out in widths and cuts(p)]


def _heads(tree: Tree, free: Iterable[str], inside: Collection[str], declared: nn.Module | None) -> list[str]:
    """The declared output head, and the linears called head or classifier that come after the last block."""
    order = {path: i for i, path in enumerate(tree.leaves)}
    last = max((order[p] for p in inside), default=-1)
    named = [
        p
        for p in free
        if tree.leaves[p].kind == "linear" and order[p] > last and any(HEAD.fullmatch(part) for part in p.split("."))
    ]
    said = [p for p in free if declared is not None and tree.modules[p] is declared]
    return list(dict.fromkeys([*said, *named]))
