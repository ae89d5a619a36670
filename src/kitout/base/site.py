"""A Site: one place in the frozen model where a value passes and a Delta can act on it.

A Site says where (path, role, layer, tower), how wide (d_in, d_out, channels) and through which port. It knows
nothing of adapters, methods, routes or files; it holds the frozen module only so that a Delta can be shaped by it.
Layout rule: at every site values are channels-last, [..., d], whatever the module's own layout (`channels_first`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

Port = Literal["out", "in", "kv", "tokens", "param"]
BatchRelation = Literal["batch", "multiple", "one", "none", "unknown"]
Kind = Literal["linear", "embedding", "conv", "norm", "other"]

# Every role the finder hands out. "attn.q" is self-attention, "cross.q" cross-attention; a fused projection has the
# role of the whole ("attn.qkv") and, once the probe has seen its channels, one more site per part ("attn.q", ...).
PROJECTIONS = ("q", "k", "v", "o", "qkv")
ROLES = (
    *(f"{kind}.{p}" for kind in ("attn", "cross") for p in PROJECTIONS),
    "mlp.up",
    "mlp.gate",
    "mlp.down",
    "norm",  # any LayerNorm or RMSNorm with a gain; `layer` is None for the final one
    "embed",  # token embedding tables
    "patch",  # patch-embedding convolution or linear
    "head",  # output head or classifier
    "other",  # a leaf module with parameters that is none of the above
    "sub.attn",  # what the self-attention sublayer adds to the residual stream
    "sub.cross",  # likewise cross-attention
    "sub.mlp",  # likewise the feed-forward sublayer
    "block",  # the output of a whole block
    "kv.self",  # the keys and values a self-attention has after rotation and cache (port "kv")
    "kv.cross",  # likewise cross-attention
)


@dataclass(frozen=True, kw_only=True)
class Site:
    """One tappable place.

    path: module path inside the model. role: one of `ROLES`. tower: path of the block stack ("model.layers"), ""
    outside blocks. layer: index in the tower, None outside blocks. d_in, d_out: widths of input and output (d_out is
    the number of `channels` where those are given). port: "out" acts on the module's output, "in" on its input,
    "param" on a bare parameter of it. source: path of the module whose *input* is handed over as x instead of this
    module's own. channels: sorted channel indices of a fused projection, None = all. kind: which linear map the module
    is. channels_first: the module's output is [B, C, ...] (convolutions, BatchNorm-like), so the tap moves C last.
    rows: how dim 0 of the value relates to the batch: it is the batch, a multiple of it ("multiple"), always 1 (a
    position table looked up once for all rows) or nothing of the kind ("none"). norm: at a sublayer, the norm that
    takes its sum with the residual where the stream goes on from there (post-norm blocks). names: parameters of the module,
    relative to it, that an adapter holds its own values of; keys: the same for those that are one parameter (tied tables).
    heads: of keys and values at an attention; scale: the standard deviations its keys and values had in the probe;
    window: how far it looks, 0 = everywhere;
    bias: the attention whose `compute_bias` gives the bias of relative positions that this one adds, None without.
    """

    path: str
    role: str
    tower: str = ""
    layer: int | None = None
    d_in: int
    d_out: int
    port: Port = "out"
    input_from: str | None = None
    channels: tuple[int, ...] | None = None
    batch_relation: BatchRelation = "unknown"
    kind: Kind = "linear"
    channels_first: bool = False
    parameter_names: tuple[str, ...] = ()
    tied_keys: tuple[str, ...] = ()
    num_kv_heads: int = 0
    probe_std: tuple[float, float] | None = field(default=None, compare=False)
    sliding_window: int = 0
    relative_bias: nn.Module | None = field(default=None, compare=False, repr=False)
    post_norm: nn.Module | None = field(default=None, compare=False, repr=False)
    module: nn.Module = field(compare=False, repr=False)

    @cached_property
    def key(self) -> str:
        """A name without dots, unique in a model: the adapter's module key and the stem of its tensors in a file."""
        shared = self.channels is not None or self.role.startswith("sub.")  # another site may have the same path
        last = self.role.split(".")[-1] if shared else ""
        tail = last if self.port == "out" else self.port
        return self.path.replace(".", "/") + ("@" + tail if tail else "")

    @cached_property
    def channel_index(self) -> slice | Tensor | None:
        """The channels as a slice where contiguous, as an index tensor where not, None for all of them."""
        if self.channels is None:
            return None
        first, last = self.channels[0], self.channels[-1]
        if last - first + 1 == len(self.channels):
            return slice(first, last + 1)
        return torch.tensor(self.channels)

    def replace(self, **changes: Any) -> Site:
        """The same place seen differently, e.g. `site.at(port="in", d_out=site.d_in)`."""
        return replace(self, **changes)
