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

from kitout.device_constants import on_device

Port = Literal["out", "in", "kv", "tokens", "param", "weight", "parts"]
BatchRelation = Literal["batch", "multiple", "one", "none", "unknown"]
Kind = Literal["linear", "embedding", "conv", "norm", "other"]

# Every role that `find_sites` gives. "attn.q" is self-attention, "cross.q" cross-attention; a fused projection has the
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
    """One place of the frozen model where a Delta can act. A field "seen by the probe" needs a forward."""

    path: str
    """Module path inside the model."""
    role: str
    """One of `ROLES`."""
    tower: str = ""
    """Path of the block stack ("model.layers"); "" outside the blocks."""
    layer: int | None = None
    """Index of the block in its tower; None outside the blocks."""
    d_in: int
    """Width of the input."""
    d_out: int
    """Width of the output; the number of `channels` where those are given."""
    port: Port = "out"
    """Where the Delta acts: output, input, keys and values, token sequence, a bare parameter of the module, or a weight
    and bias that no module multiplies by: `reader` does, from the parameters ("weight"). "parts": the output, as each
    of several adapters leaves it."""
    reader: str | None = None
    """Port "weight" (or "in" made of it): path of the module whose forward reads the weight."""
    weight_name: str = "weight"
    """The parameter of `module` that is the weight."""
    bias_name: str = "bias"
    """The parameter of `module` that is the bias; "" where a bias would not be read."""
    input_from: str | None = None
    """Seen by the probe: path of the module whose input the Delta gets as x; None: this module's own input."""
    channels: tuple[int, ...] | None = None
    """Seen by the probe: sorted output channels of one part of a fused projection; None: all channels."""
    batch_relation: BatchRelation = "unknown"
    """Seen by the probe. How dim 0 of the value relates to the batch: equal to it ("batch"), a multiple of it (windows:
    "multiple"), always 1 (a position table looked up once for all rows: "one") or unrelated ("none")."""
    kind: Kind = "linear"
    """Which map the module computes."""
    batch_axis: int = 0
    """Port "weight": the axis of the reader's first output that follows the batch."""
    is_router: bool = False
    """It chooses among the experts of a mixture: all-linear leaves it out."""
    channels_first: bool = False
    """The module's output is [B, C, ...] (convolution, BatchNorm): it is moved to channels-last for the Delta."""
    parameter_names: tuple[str, ...] = ()
    """Parameters that an adapter has its own values of, relative to the module."""
    tied_keys: tuple[str, ...] = ()
    """One key per parameter name, the same wherever a tied parameter is used."""
    num_kv_heads: int = 0
    """Seen by the probe, attention only: heads of the keys and values."""
    probe_std: tuple[float, float] | None = field(default=None, compare=False)
    """Seen by the probe, attention only: standard deviations of its keys and of its values."""
    sliding_window: int = 0
    """Seen by the probe, attention only: how many keys its window holds; 0: no window."""
    relative_bias: nn.Module | None = field(default=None, compare=False, repr=False)
    """Seen by the probe, attention only: the attention whose `compute_bias` gives the relative position bias."""
    shares_kv_of: str = ""
    """Seen by the probe, attention only: path of the attention whose keys and values it attends to; "": its own."""
    post_norm: nn.Module | None = field(default=None, compare=False, repr=False)
    """Seen by the probe, sublayers only: the norm after its sum with the residual stream (post-norm blocks)."""
    module: nn.Module = field(compare=False, repr=False)
    """The frozen module itself."""

    @cached_property
    def key(self) -> str:
        """A name without dots, unique in a model: the adapter's module key and the stem of its tensors in a file."""
        shared = self.channels is not None or self.role.startswith("sub.")  # another site may have the same path
        last = self.role.split(".")[-1] if shared else ""
        tail = last if self.port in ("out", "weight", "parts") else self.port
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

    def channels_on(self, device: torch.device) -> slice | Tensor | None:
        """`channel_index`, an index tensor on a device."""
        index = self.channel_index
        return on_device(index, device) if isinstance(index, Tensor) else index

    @cached_property
    def read_names(self) -> tuple[str, str]:
        """Port "weight": the names of weight and bias as `reader` has them; "" where a bias would not be read."""
        assert self.reader is not None
        inner = self.path[len(self.reader) :].lstrip(".")
        weight, b = (f"{inner}.{name}" if inner and name else name for name in (self.weight_name, self.bias_name))
        return weight, b

    def replace(self, **changes: Any) -> Site:
        """The same place with other fields, e.g. `site.replace(port="in", d_out=site.d_in)`."""
        return replace(self, **changes)
