"""Which layers: the small grammar behind `layers="last:4"`, per tower.

"all" | "last:4" | "0,3,5" | "2-5" | "decoder/last:4"; several separated by ";". Counts from the end of each tower on
its own, so an encoder-decoder's "last:4" is four of each. It knows the towers and indices of the given sites, nothing
else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from kitout.base.site import Site
from kitout.errors import Errors, suggest

LayersByTower = dict[str, list[int]]


def layer_filter(text: str, sites: Sequence[Site], errors: Errors) -> Callable[[Site], bool]:
    """A test on sites. Sites outside the blocks pass only with "all". Mistakes in `text` are added to `errors`."""
    if text.strip() == "all":
        return lambda _: True
    towers = _layers_by_tower(sites)
    allowed: set[tuple[str, int]] = set()
    for part in text.split(";"):
        name, slash, expression = part.strip().rpartition("/")
        selected = {tower: layers for tower, layers in towers.items() if name in tower}
        if slash and not selected:
            errors.add(f"no tower's path contains {name!r}; {suggest(name, towers)}")
        elif not towers:
            errors.add(f"{part!r} names layers, but this model has no blocks; write layers='all'")
        else:
            allowed |= _select_layers(expression.strip(), selected, errors)
    return lambda site: site.layer is not None and (site.tower, site.layer) in allowed


def _layers_by_tower(sites: Sequence[Site]) -> LayersByTower:
    towers: dict[str, set[int]] = {}
    for site in sites:
        if site.layer is not None:
            towers.setdefault(site.tower, set()).add(site.layer)
    return {tower: sorted(layers) for tower, layers in towers.items()}


def _select_layers(expression: str, towers: LayersByTower, errors: Errors) -> set[tuple[str, int]]:
    """(tower, layer) pairs of one expression."""
    if expression == "all":
        return {(tower, layer) for tower, layers in towers.items() for layer in layers}
    depths = ", ".join(f"{tower} has {len(layers)}" for tower, layers in towers.items())
    if last := re.fullmatch(r"last:(\d+)", expression):
        n = int(last[1])
        if not 1 <= n <= max(map(len, towers.values())):
            errors.add(f"{expression!r} asks for {n} layers; {depths}")
        return {(tower, layer) for tower, layers in towers.items() for layer in layers[-n:]} if n else set()
    indices = _parse_indices(expression)
    if indices is None:
        errors.add(
            f"{expression!r} is not a valid choice of layers; write 'all', 'last:4', '0,3,5', '2-5' or 'decoder/last:4'"
        )
        return set()
    known = {layer for layers in towers.values() for layer in layers}
    if missing := [i for i in indices if i not in known]:
        errors.add(f"no layer {', '.join(map(str, missing))}; {depths} (counted from 0)")
    return {(tower, layer) for tower, layers in towers.items() for layer in layers if layer in indices}


def _parse_indices(expression: str) -> list[int] | None:
    """[0, 3, 5, 6, 7] for "0,3,5-7"; None if the expression is not of this form."""
    indices: list[int] = []
    for piece in expression.split(","):
        span = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", piece)
        if not span or (span[2] is not None and int(span[2]) < int(span[1])):
            return None
        indices += range(int(span[1]), int(span[2] or span[1]) + 1)
    return indices
