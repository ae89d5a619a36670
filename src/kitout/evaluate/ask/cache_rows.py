"""A prompt's cache used more than once: rows of keys and values selected anew, for several answers to one prompt.

Whoever scores or samples several answers runs the prompt once. It knows caches of transformers and which adapters are
in the way, no tokens and no scores.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kitout import fast
from kitout.kit import Kit
from kitout.route import Route, adapter_names


def can_share_prompts(kit: Kit, routes: Iterable[Route]) -> bool:
    """Whether a prompt's cache may be selected anew: not behind virtual tokens that come after a first token."""
    names = kit.state.names_with_parts(name for route in routes for name in adapter_names(route))
    prompts = [part for name in names for parts in kit[name].prompts.values() for part in parts]
    return fast.enabled() and not any(part.delta.after_first_token for part in prompts)


def can_select_rows(cache: Any) -> bool:
    """Whether rows of a cache can be selected and go on with tokens of another number: recurrent states cannot."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = getattr(cache, "layers", ())
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def select_rows(cache: Any, index: Tensor, num_rows: int) -> Any:
    """A cache of these rows; the given one stays as it is. Under an Average it has several copies of all rows."""
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in new.layers:
        if layer.get_seq_length():
            starts = range(0, layer.keys.shape[0], num_rows)
            layer.reorder_cache(torch.cat([index + start for start in starts]))
    return new
