"""After training: an adapter whose ranks followed from training becomes the plain LoRA that it then is, in place.

Its config has ranks by path, in words that select exactly the sites that are left; triplets that were cut are gone, and
what is left computes the same. It knows LoRA's settings, and nothing of how or when triplets are cut.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kitout.base.site import Site
from kitout.files.adapter_tensors import build_empty
from kitout.fuse.lora.targets import selected, with_ranks, words_for
from kitout.methods.deltas.adaptive_rank import triplets_of
from kitout.methods.deltas.low_rank import LowRankDelta
from kitout.methods.lora import LoRA
from kitout.runtime.build_adapter import head_site
from kitout.runtime.state import KitState


@torch.no_grad()
def to_final_form(state: KitState, name: str) -> None:
    """The adapter of this name without what only its training needed; left as it is where that is nothing."""
    adapter = state[name]
    if not isinstance(adapter.method, LoRA) or not adapter.method.adaptive:
        return
    kept: dict[str, tuple[Tensor, Tensor]] = {}  # by site: A, scale * B
    shifts: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for site, delta in adapter.site_deltas():
        shifts |= {f"{site.key}.{n}": value for n, value in delta.named_parameters(recurse=False) if n == "shift"}
        if isinstance(delta, LowRankDelta):
            alive = triplets_of(delta).alive.to(delta.a.device)
            kept[site.key] = delta.a[alive], delta.scale * delta.b[:, alive]
            ranks[site.path] = max(ranks.get(site.path, 0), int(alive.sum()))
    method, sites = _plain_lora(state, adapter.method, adapter.sites, ranks, [*adapter.heads_by_path()])
    new, slots = build_empty(state, name, method, sites, {})
    for site in sites:
        if site.key not in kept:
            continue
        scale, (a, b) = method.scale_at(site), kept[site.key]
        for letter, value, axis in (("a", a, 0), ("b", b / scale, 1)):
            slot = slots[f"{site.key}.{letter}"]
            filled = torch.zeros(slot.tensor.shape, dtype=value.dtype, device=value.device)
            filled.narrow(axis, 0, value.shape[axis]).copy_(value)
            slot.set(filled)
    for key, value in shifts.items():
        slots[key].set(value.detach().clone())
    adapter.method, adapter.sites, adapter.deltas = method, new.sites, new.deltas
    adapter.group_by_module([head_site(state, path.replace("/", ".")) for path in adapter.heads])
    adapter.strength = adapter.strength
    adapter.train(adapter.training)
    state.forget_routes(name)


def _plain_lora(
    state: KitState, method: LoRA, sites: tuple[Site, ...], ranks: Mapping[str, int], heads: list[str]
) -> tuple[LoRA, list[Site]]:
    """The config with these ranks and its sites: without the modules whose rank is 0, where words select the others."""
    settings = method.model_dump(exclude={"adaptive", "start"}, exclude_unset=True)
    plain = LoRA(**{**settings, "targets": method.selection()})  # ranks by path select nothing
    left = [s for s in sites if ranks.get(s.path, 1) > 0 or method.trains_bias_at(s)]
    if len(left) < len(sites):
        words = words_for(
            state, left, [plain], heads,
            lambda targets, layers: plain.model_copy(update={"targets": targets, "layers": layers, "rank": 1}),
        )  # fmt: skip
        if words is None:
            left = list(sites)
        else:
            plain = LoRA(**{**plain.model_dump(exclude_unset=True), "targets": words[0], "layers": words[1]})
    by_path = {site.path: max(1, ranks[site.path]) for site in left if site.path in ranks}
    final = with_ranks(state, plain, left, by_path)
    return final, selected(state, final, heads)
