"""Adding keys and values to one module's attention call, whichever way it makes it.

transformers' attention interface is met under a name of our own: while the module runs it sees a view of its config
that asks for it. A direct `scaled_dot_product_attention` is met by a function mode. Either way masks widen with the
keys, an implied causal mask becomes an explicit one, and grouped heads are repeated where the call has them repeated.
It knows tensors and calls, and nothing of adapters, rows or where the keys come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kitout import fast
from kitout.base.probe.attention_sites import INTERFACE, attention_interface, interface_globals
from kitout.errors import RouteError

ATTENTION_NAME = "kitout"  # of our function in transformers' attention interface
SDPA = ("transformers.integrations.sdpa_attention", "sdpa_attention_forward")
MASKED_KERNELS = ("eager", "sdpa")  # kernels that take a mask of any shape
_KERNELS_WITHOUT_MASK: set[str] = set()  # that take keys in front of the text's own, which every query sees


@dataclass
class ExtraKeys:
    """What one attention call gets, in front of its own keys."""

    k: Tensor | None = None
    """[B or 1, H_kv, P, d_h]; None: no keys are added."""
    v: Tensor | None = None
    """Likewise."""
    visible: Tensor | None = None
    """[B or 1, 1, Tq or 1, P]: which of the added keys a query sees; None: all."""
    log_weight: Tensor | None = None
    """[B or 1, 1, Tq or 1, P]: logarithm of the weight of each added key; None: 0."""
    relative_bias: Callable[[], Tensor] | None = None
    """Computes the relative bias of the added keys [B or 1, H, Tq, P]; None: 0."""
    masked_own_keys: Tensor | None = None
    """[B or 1, Tk]: the call's own keys that no query sees; None: none."""
    on_key_value: Callable[[Tensor, Tensor], None] | None = None
    """Is given the call's own keys and values."""

    @property
    def length(self) -> int:
        return 0 if self.k is None else self.k.shape[2]


def extend_keys(
    extra: ExtraKeys, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, is_added: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and mask of the call with the extra ones in front.

    causal: what no mask would have meant. is_added: the kernel adds its mask to the scores, whatever its dtype.
    """
    if extra.on_key_value is not None:
        extra.on_key_value(k, v)
    if extra.visible is not None and extra.visible.shape[-2] not in (1, q.shape[-2]):
        extra = replace(extra, visible=_visible_to_some(extra.visible, q, k, mask))
    causal = causal and mask is None and q.shape[-2] > 1
    if mask is not None or causal or not _sees_everything(extra):
        is_new, mask = mask is None, explicit_mask(mask, q, k, causal)
        if is_new and is_added:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
        mask = hide_own_keys(mask, extra.masked_own_keys)
        mask = prepend_columns(mask, extra, q.dtype)
    if extra.k is None or extra.v is None:
        return k, v, mask
    return torch.cat((_match_heads(extra.k, k), k), 2), torch.cat((_match_heads(extra.v, v), v), 2), mask


def _visible_to_some(visible: Tensor, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """[B or 1, 1, T, P] -> [B, 1, Tq, P]: where a layer is given only the queries whose logits are kept (Gemma 4).

    Which of the text they are is in the causal mask: a query's last visible key is its own.
    """
    queries, keys, tokens = q.shape[-2], k.shape[-2], visible.shape[-2]
    if mask is None:
        return visible[..., -queries:, :]
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    own = keys - 1 - seen[:, :1, :, :keys].flip(-1).long().argmax(-1)  # [B or 1, 1, Tq]
    rows = max(visible.shape[0], own.shape[0])
    index = (own - (keys - tokens)).clamp_min(0).expand(rows, -1, -1)[..., None].expand(-1, -1, -1, visible.shape[-1])
    return visible.expand(rows, -1, -1, -1).gather(2, index)


def _sees_everything(extra: ExtraKeys) -> bool:
    return extra.visible is None and extra.log_weight is None and extra.masked_own_keys is None


def _match_heads(new: Tensor, like: Tensor) -> Tensor:
    """New keys as the call has its own: dtype, rows, and heads repeated where it has repeated them."""
    if new.shape[:2] == like.shape[:2] and new.dtype == like.dtype:
        return new
    new = new.to(like.dtype)
    if new.shape[1] != like.shape[1]:
        new = new.repeat_interleave(like.shape[1] // new.shape[1], 1)
    return new.expand(like.shape[0], -1, -1, -1)


def explicit_mask(mask: Tensor | None, q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """[B or 1, H or 1, Tq or 1, Tk]: the call's mask, or the one that its absence means."""
    queries, keys = q.shape[-2], k.shape[-2]
    if mask is None:
        mask = torch.ones(1, 1, queries if causal else 1, keys, dtype=torch.bool, device=q.device)
        mask = mask.tril() if causal else mask
    return mask[..., :keys]  # the whole of a static cache may be masked


def hide_own_keys(mask: Tensor, masked_own_keys: Tensor | None) -> Tensor:
    """[..., Tq, Tk] -> [..., Tq, Tk]: nobody sees these keys of the call [B or 1, Tk]."""
    if masked_own_keys is None:
        return mask
    hidden = masked_own_keys[:, None, None, :]
    return mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def prepend_columns(mask: Tensor, extra: ExtraKeys, dtype: torch.dtype) -> Tensor:
    """[..., Tq, Tk] -> [..., Tq, P + Tk]: with columns for the added keys. dtype: of a mask that holds weights."""
    if not extra.length:
        return mask
    shape = (1, 1, 1, extra.length)
    if mask.dtype == torch.bool and extra.log_weight is None:
        visible = torch.ones(shape, dtype=torch.bool, device=mask.device) if extra.visible is None else extra.visible
        return _side_by_side(visible, mask)
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    log_weight = extra.log_weight
    added = (
        torch.zeros(shape, dtype=mask.dtype, device=mask.device) if log_weight is None else log_weight.to(mask.dtype)
    )
    if extra.visible is not None:  # -inf is less than a query's own masked keys have, where it sees nothing at all
        added = added.masked_fill(~extra.visible, -torch.inf)
    return _side_by_side(added, mask)


def _side_by_side(a: Tensor, b: Tensor) -> Tensor:
    rows = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    return torch.cat((a.expand(*rows, -1), b.expand(*rows, -1)), -1)


class _ConfigView:
    """A module's config while it attends: the same in all but the name of its attention."""

    _attn_implementation = ATTENTION_NAME

    def __init__(self, config: Any, extra: ExtraKeys, kernel: str, real: Callable[..., Any]) -> None:
        self.__dict__.update(_config=config, extra=extra, kernel=kernel, real=real, calls=0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_config"], name)


def take_keys_without_mask(kernel: str) -> None:
    """An implementation of attention that masks by itself: it is given added keys in front, and no mask for them."""
    _KERNELS_WITHOUT_MASK.add(kernel)


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **more: Any) -> Any:
    """Our entry in transformers' interface: the module's own function over more keys."""
    view: Any = module.config
    extra: ExtraKeys = view.extra
    view.__dict__["calls"] += 1
    kernel = view.kernel
    if kernel in _KERNELS_WITHOUT_MASK:
        if not _sees_everything(extra) or attention_mask is not None:
            raise RouteError(
                f"the attention kernel {kernel!r} takes no mask, and some queries do not see all added keys"
            )
        key, value, _ = extend_keys(extra, query, key, value, None, False)
        return view.real(module, query, key, value, None, **more)
    mapped = more.get("is_causal")
    causal = (getattr(module, "is_causal", True) if mapped is None else mapped) and kernel != "eager"
    _check_window(extra, key, more.get("sliding_window"))
    position = more.get("position_bias")
    if position is not None and extra.length:
        added = (
            extra.relative_bias().to(position.dtype)
            if extra.relative_bias
            else position.new_zeros(1, 1, 1, extra.length)
        )
        heads = torch.broadcast_shapes(added.shape[:-1], position.shape[:-1])
        more["position_bias"] = torch.cat((added.expand(*heads, -1), position.expand(*heads, -1)), -1)
    key, value, mask = extend_keys(extra, query, key, value, attention_mask, bool(causal), kernel == "eager")
    if _takes_groups(view.real, query, key, value, mask, more):
        dropout, scale = more.get("dropout", 0.0), more.get("scaling")
        out = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None
    return view.real(module, query, key, value, mask, **more)


def _takes_groups(real: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, more: dict[str, Any]) -> bool:
    """torch's kernel reads grouped keys as they are. transformers repeats them where there is a mask, because other
    devices' kernels need it; on CPUs that takes as long as the attention itself.
    """
    if mask is None or q.shape[-2] == 1 or q.shape[1] == k.shape[1] or k.shape[-1] != v.shape[-1]:
        return False
    is_sdpa = getattr(real, "__module__", "") == SDPA[0] and getattr(real, "__name__", "") == SDPA[1]
    if not (is_sdpa and q.device.type == "cpu" and fast.enabled()) or torch.compiler.is_compiling():
        return False
    return all(more.get(name) is None for name in ("softcap", "position_bias", "cache")) and q.dtype == v.dtype


def register_attention(module: nn.Module) -> None:
    """Makes our function known to the attention interface that this module asks; not while a graph is traced."""
    interface = interface_globals(type(module))
    if interface is not None:
        interface[INTERFACE].register(ATTENTION_NAME, _attention)


class _SdpaMode(TorchFunctionMode):
    """Meets `scaled_dot_product_attention` itself."""

    def __init__(self, extra: ExtraKeys) -> None:
        super().__init__()
        self.extra, self.calls = extra, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.calls += 1
        named = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
        q, causal = named["query"], named.pop("is_causal", False)
        k, v, mask = extend_keys(self.extra, q, named["key"], named["value"], named.get("attn_mask"), causal)
        return func(**{**named, "key": k, "value": v, "attn_mask": mask})


def _check_window(extra: ExtraKeys, key: Tensor, window: int | None) -> None:
    if window and extra.length and key.shape[-2] + extra.length > window:
        raise RouteError(
            f"{extra.length} added keys before {key.shape[-2]} of the text leave this attention's sliding window of "
            f"{window}: it would drop the prefix; keep both within the window"
        )


KernelsInUse = dict[tuple[int, type], tuple[str, Callable[..., Any]]]  # by config and class of the attention


@contextmanager
def extra_keys_in(module: nn.Module, extra: ExtraKeys, path: str, kernels: KernelsInUse) -> Iterator[None]:
    """While this lasts, the module's attention call gets the extra keys and values.

    kernels: what has been looked up in this forward; configs compute each of their attributes.
    """
    config: Any = module.__dict__.get("config")
    known = None if torch.compiler.is_compiling() else kernels.get((id(config), type(module)))
    interface = attention_interface(module) if known is None else {}
    if interface is None:
        mode = _SdpaMode(extra)
        with mode:
            yield
        calls = mode.calls
    else:
        if known is None:
            config = module.config
            kernel = config._attn_implementation
            if kernel not in MASKED_KERNELS and kernel not in _KERNELS_WITHOUT_MASK:
                raise RouteError(
                    f"{path}: the attention kernel {kernel!r} takes no mask for added keys: use "
                    "model.set_attn_implementation('eager'), or 'sdpa' where the model has it"
                )
            real = interface[INTERFACE].get_interface(kernel, interface.get("eager_attention_forward"))
            known = kernel, real
            if not torch.compiler.is_compiling():
                kernels[id(config), type(module)] = known
        view = _ConfigView(config, extra, *known)
        module.__dict__["config"] = view
        try:
            yield
        finally:
            module.__dict__["config"] = config
        calls = view.calls
    if not calls:
        raise RouteError(
            f"{path} made no attention call that keys could be added to: its kernel is none that kitout supports"
        )
