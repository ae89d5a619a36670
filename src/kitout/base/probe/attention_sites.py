"""Where keys and values can be added: one site per attention call of a traced forward, or why there is none.

Keys can be added to two kinds of attention: those that call transformers' attention interface, and those that call
`scaled_dot_product_attention`. An attention that writes its product out has no call to add to. Heads and widths come
from the projections that feed it. It knows no architecture.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from kitout.base.loaded_classes import pretrained_model
from kitout.base.probe.trace_records import AttentionCall
from kitout.base.probe.tracer import ForwardTracer
from kitout.base.site import Site
from kitout.base.survey import Survey

_interface_cache: dict[type[nn.Module], Mapping[str, Any] | None] = {}  # looked up at every attention call
WRITTEN_OUT = "it writes its attention out instead of calling one"
INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # transformers' name for it in every modeling file


def attention_interface(module: nn.Module) -> Mapping[str, Any] | None:
    """The globals of the module's own forward, if that calls transformers' attention interface; else None."""
    if getattr(getattr(module, "config", None), "_attn_implementation", None) is None:
        return None
    return interface_globals(type(module))


def interface_globals(cls: type[nn.Module]) -> Mapping[str, Any] | None:
    """The globals of a class's forward, if that calls the interface; else None."""
    if cls not in _interface_cache:
        forward = inspect.unwrap(cls.forward)
        uses_interface = INTERFACE in forward.__code__.co_names and INTERFACE in forward.__globals__
        _interface_cache[cls] = forward.__globals__ if uses_interface else None
    return _interface_cache[cls]


def kv_sites(survey: Survey, sites: Sequence[Site], tracer: ForwardTracer) -> tuple[list[Site], dict[str, str]]:
    """The sites, in the order they ran, and path -> why an attention has none. sites: all others, roles proven."""
    blocks = {b.path: b for b in survey.blocks if b.is_one_module}
    projections = {(s.path, s.role.rpartition(".")[2]): s for s in sites if s.role.startswith(("attn.", "cross."))}
    attentions: dict[str, Site] = {}
    owners: dict[str, str] = {}  # projection of keys -> the first attention that reads them
    refusals: dict[str, str] = {}
    for call in tracer.attention_calls:
        if call.block not in blocks or call.path in attentions or call.path in refusals:
            continue
        key, value = (_feeding_projection(call, operand, projections) for operand in "kv")
        module = survey.model.get_submodule(call.path)
        reason = _refusal_reason(call, module, key, value)
        if reason == WRITTEN_OUT and _has_another_kernel(survey.model, call.path):
            reason += " (attn_implementation='sdpa' calls one)"
        if reason or key is None:
            refusals[call.path] = reason
            continue
        block = blocks[call.block]
        attentions[call.path] = Site(
            path=call.path,
            role="kv.cross" if key.role.startswith("cross.") else "kv.self",
            tower=block.tower,
            layer=block.index,
            d_in=block.width,
            d_out=key.d_out,
            port="kv",
            num_kv_heads=key.d_out // call.tensors["q"].shape[-1],
            sliding_window=_sliding_window(module),
            shares_kv_of="" if (owner := owners.setdefault(key.path, call.path)) == call.path else owner,
            probe_std=None if call.tensors["k"].is_meta else _probe_std(call),
            batch_relation=key.batch_relation,
            kind="other",
            module=module,
        )
    complete = [s.replace(relative_bias=_relative_bias(s, list(attentions.values()))) for s in attentions.values()]
    biased = {call.path for call in tracer.attention_calls if call.has_mask_bias}
    refusals |= {
        s.path: "its mask carries a bias by position, which added keys would lack"
        for s in complete
        if s.path in biased and s.relative_bias is None
    }
    return [s for s in complete if s.path not in refusals], refusals


def _relative_bias(site: Site, sites: Sequence[Site]) -> nn.Module | None:
    """The module with its relative position table: itself, else the first attention of its stack that has one."""
    stack = [s for s in sites if (s.tower, s.role) == (site.tower, site.role)]
    for module in (site.module, *(s.module for s in stack)):
        has_table = any(isinstance(child, nn.Embedding) for child in module.children())
        if has_table and callable(getattr(module, "compute_bias", None)):
            return module
    return None


def _feeding_projection(call: AttentionCall, operand: str, projections: Mapping[tuple[str, str], Site]) -> Site | None:
    """The one projection that an operand of attention comes from."""
    paths = [p for p in call.leaves[operand] if not p.startswith("stream:")]
    return projections.get((paths[0], operand)) if len(paths) == 1 else None


def _refusal_reason(call: AttentionCall, module: nn.Module, key: Site | None, value: Site | None) -> str:
    """Why no keys and values can be added here; "" if they can."""
    width, v = call.tensors["q"].shape[-1], call.tensors["v"]  # of q: k is transposed in a product
    if call.written_out and attention_interface(module) is None:
        return WRITTEN_OUT
    if v.ndim != 4:
        return f"its values are {list(v.shape)}, not [batch, heads, tokens, width]"
    if key is None or value is None or key.d_out != value.d_out or key.d_out % width or width != v.shape[-1]:
        return "its keys and values do not come from one projection each, of one width"
    if key.batch_relation != "batch":
        return "it attends within windows, not over the whole sequence"
    return ""


def _has_another_kernel(model: nn.Module, path: str) -> bool:
    """The transformers model that this attention belongs to could run it by sdpa, and does not now."""
    modules = [model, *(model.get_submodule(path[:i]) for i, c in enumerate(path) if c == ".")]
    owners: list[Any] = [m for m in modules if isinstance(m, pretrained_model())]
    return bool(owners) and owners[-1]._supports_sdpa and owners[-1].config._attn_implementation != "sdpa"


def _sliding_window(module: nn.Module) -> int:
    """How many keys its sliding window holds; 0 without a window."""
    window = getattr(module, "sliding_window", None)
    return window if isinstance(window, int) and window > 0 else 0


def _probe_std(call: AttentionCall) -> tuple[float, float]:
    k, v = (call.tensors[operand].detach().float() for operand in "kv")
    return k.std(correction=0).item(), v.std(correction=0).item()  # population: heads may be repeated
