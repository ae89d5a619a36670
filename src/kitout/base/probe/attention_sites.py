"""Where keys and values can be added: one site per attention call that a forward has shown, or why there is none.

Two kinds of attention let themselves be widened: those that call transformers' attention interface, and those that
call `scaled_dot_product_attention`. An attention that writes its product out has no call to widen. Heads and widths
come from the projections that feed it. It knows no architecture.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from kitout.base.probe.tracer import Attention, Watch
from kitout.base.site import Site
from kitout.base.survey import Survey

_known: dict[type[nn.Module], Mapping[str, Any] | None] = {}  # asked for at every attention call
INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # transformers' name for it in every modeling file


def interface(module: nn.Module) -> Mapping[str, Any] | None:
    """The globals of the module's own forward, where that asks transformers' attention interface; else None."""
    if getattr(getattr(module, "config", None), "_attn_implementation", None) is None:
        return None
    return _globals(type(module))


def _globals(cls: type[nn.Module]) -> Mapping[str, Any] | None:
    if cls not in _known:
        forward = inspect.unwrap(cls.forward)
        named = INTERFACE in forward.__code__.co_names and INTERFACE in forward.__globals__
        _known[cls] = forward.__globals__ if named else None
    return _known[cls]


def attentions(found: Survey, sites: Sequence[Site], watch: Watch) -> tuple[list[Site], dict[str, str]]:
    """The sites, in the order they ran, and by path why an attention has none. sites: all others, labels proven."""
    blocks = {b.path: b for b in found.blocks if b.whole}
    letters = {(s.path, s.role.rpartition(".")[2]): s for s in sites if s.role.startswith(("attn.", "cross."))}
    result: dict[str, Site] = {}
    closed: dict[str, str] = {}
    for call in watch.attentions:
        if call.block not in blocks or call.path in result or call.path in closed:
            continue
        key, value = (_feeding(call, letter, letters) for letter in "kv")
        module = found.model.get_submodule(call.path)
        reason = _reason(call, module, key, value)
        if reason or key is None:
            closed[call.path] = reason
            continue
        block = blocks[call.block]
        result[call.path] = Site(
            path=call.path,
            role="kv.cross" if key.role.startswith("cross.") else "kv.self",
            tower=block.tower,
            layer=block.index,
            d_in=block.d,
            d_out=key.d_out,
            port="kv",
            heads=key.d_out // call.tensors["q"].shape[-1],
            window=_window(module),
            scale=None if call.tensors["k"].is_meta else _scale(call),
            rows=key.rows,
            kind="other",
            module=module,
        )
    sites = [s.at(bias=_bias(s, list(result.values()))) for s in result.values()]
    biased = {call.path for call in watch.attentions if call.biased}
    closed |= {
        s.path: "its mask carries a bias by position, which added keys would lack"
        for s in sites
        if s.path in biased and s.bias is None
    }
    return [s for s in sites if s.path not in closed], closed


def _bias(site: Site, sites: Sequence[Site]) -> nn.Module | None:
    """Its own relative positions, else those of the first attention in its stack, which hands them on."""
    stack = [s for s in sites if (s.tower, s.role) == (site.tower, site.role)]
    for module in (site.module, *(s.module for s in stack)):
        has_table = any(isinstance(child, nn.Embedding) for child in module.children())
        if has_table and callable(getattr(module, "compute_bias", None)):
            return module
    return None


def _feeding(call: Attention, letter: str, letters: Mapping[tuple[str, str], Site]) -> Site | None:
    """The one projection that an operand of attention comes from."""
    paths = [p for p in call.leaves[letter] if not p.startswith("stream:")]
    return letters.get((paths[0], letter)) if len(paths) == 1 else None


def _reason(call: Attention, module: nn.Module, key: Site | None, value: Site | None) -> str:
    """Why no keys and values can be added here; "" if they can."""
    width, v = call.tensors["q"].shape[-1], call.tensors["v"]  # keys come transposed to a product
    if call.product and interface(module) is None:
        return "it writes its attention out instead of calling one (try attn_implementation='sdpa')"
    if v.ndim != 4:
        return f"its values are {list(v.shape)}, not [batch, heads, tokens, width]"
    if key is None or value is None or key.d_out != value.d_out or key.d_out % width or width != v.shape[-1]:
        return "its keys and values do not come from one projection each, of one width"
    if key.rows != "batch":
        return "it attends within windows, not over the whole sequence"
    return ""


def _window(module: nn.Module) -> int:
    """How many keys a sliding window holds, 0 where it slides over none."""
    window = getattr(module, "sliding_window", None)
    return window if isinstance(window, int) and window > 0 else 0


def _scale(call: Attention) -> tuple[float, float]:
    k, v = (call.tensors[letter].detach().float() for letter in "kv")
    return k.std(correction=0).item(), v.std(correction=0).item()  # heads may be there several times
