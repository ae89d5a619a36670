"""How much a composition makes of each of its parts: the weights of one forward, by part, layer and position.

They are the attention of Fusion, the gates of Gated and the weights of Mixture, recorded where the composition combines
what its parts make of a module (`Delta.part_weights`). It knows kits and Deltas, and no method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kitout.base.eval_mode import eval_mode
from kitout.delta import Delta
from kitout.errors import ConfigError
from kitout.kit import Kit

OUTSIDE = "outside"  # the label of what is in no block


@dataclass(frozen=True)
class PartWeights:
    """The weights of one forward."""

    parts: tuple[str, ...]
    """The parts, by name."""
    layers: tuple[str, ...]
    """The blocks, by number (with the stack's path where there are several), and "outside" for what is in none."""
    weights: Tensor
    """[parts, layers, rows, positions], averaged over the sites of a layer that have such a position; NaN where none
    has. A weight without positions counts at all of its layer's."""
    by_site: dict[str, Tensor]
    """Key of a site -> [rows, positions, parts]. A value without positions (a pooled one) has one."""


def attention(kit: Kit, name: str, batch: Mapping[str, Any] | Tensor) -> PartWeights:
    """The weights that a composition gives its parts on one batch: `kitout.attention(kit, "both", batch)`.

    Runs in eval mode and without gradients. ConfigError for an adapter without weights by part, or without values that
    it weighs (its parts change parameters alone).
    """
    adapter = kit[name]
    parts = adapter.method.part_names()
    if not parts or adapter.method.fixed_route() is not None:
        raise ConfigError(
            f"{name!r} ({type(adapter.method).__name__}) gives its parts no weights that depend on training or input: "
            "Mixture, Fusion and Gated do"
        )
    recorded: dict[str, Tensor] = {}
    state = kit.state
    with state.active.lock, eval_mode(kit.base, kit):
        deltas = adapter.site_deltas()
        try:
            for site, delta in deltas:
                delta.__dict__["combine"] = _recorded(delta, site.key, recorded)
                delta.is_watched = True
            state.forget_routes(name)  # they are compiled anew, with every value that it combines
            with kit.use(name):
                kit(batch) if isinstance(batch, Tensor) else kit(**batch)
        finally:
            for _, delta in deltas:
                delta.__dict__.pop("combine", None)
                delta.is_watched = False
            state.forget_routes(name)
    towers = {site.tower for site, _ in deltas if site.layer is not None}
    by_layer: dict[str, list[Tensor]] = {}
    for site, _ in deltas:
        label = OUTSIDE if site.layer is None else f"{site.tower}/{site.layer}" if len(towers) > 1 else str(site.layer)
        if site.key in recorded:
            by_layer.setdefault(label, []).append(recorded[site.key])
    if not recorded:
        raise ConfigError(
            f"{name!r} weighs parameters of its parts, which are the same for every input: see kit[{name!r}]"
        )
    labels = sorted(by_layer, key=lambda label: label == OUTSIDE)
    rows, positions = (max(value.shape[i] for value in recorded.values()) for i in (0, 1))
    weights = torch.full((len(parts), len(labels), rows, positions), float("nan"))
    for number, label in enumerate(labels):
        most = tuple(max(value.shape[i] for value in by_layer[label]) for i in (0, 1))
        each = torch.full((len(by_layer[label]), *most, len(parts)), float("nan"))
        for value, own in zip(by_layer[label], each, strict=True):
            own[: value.shape[0], : most[1] if value.shape[1] == 1 else value.shape[1]] = value
        weights[:, number, : most[0], : most[1]] = each.nanmean(0).movedim(-1, 0)
    return PartWeights(parts, tuple(labels), weights, recorded)


def _recorded(delta: Delta, key: str, recorded: dict[str, Tensor]) -> Callable[..., Tensor]:
    """`delta.combine`, which also leaves its weights, the parts last: [rows, positions, parts]."""
    combine = delta.combine

    def recording(x: Tensor, y: Tensor, values: Sequence[Tensor], real: Tensor | None = None) -> Tensor:
        weights = delta.part_weights(x, y, values, real)
        weights = weights.expand(*y.shape[:-1], weights.shape[-1])
        recorded[key] = weights.reshape(weights.shape[0], -1, weights.shape[-1]).detach().float().cpu().clone()
        return combine(x, y, values, real)

    return recording
