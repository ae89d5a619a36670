"""What a single module is, by its own parameters: its kind, its two widths, its memory layout.

Everything here looks at one module at a time and at nothing but shapes and torch's base classes, so it works on the
meta device. It knows nothing of blocks, roles or names. The one concession: the linear stored transposed is recognized
by transformers' own class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from kitout.base.loaded_classes import transposed_linear
from kitout.base.site import Kind
from kitout.base.weights import is_matrix_product

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CHANNELS_FIRST_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


class LeafShape(NamedTuple):
    """A module without parts: what it is and how wide."""

    kind: Kind
    """Which map it computes."""
    d_in: int
    """Width of its input."""
    d_out: int
    """Width of its output."""
    channels_first: bool
    """Its output is [B, C, ...]."""


def linear_widths(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear projection, None for anything else.

    Three forms exist: torch's linear and its subclasses (bitsandbytes), the transposed one storing [d_in, d_out], and
    quantized linears that only state their features (GPTQ, AWQ, HQQ keep packed buffers instead of a weight). One with
    a forward of its own that is another map (block-diagonal, grouped, a router that returns a choice) is none of them.
    """
    if isinstance(module, nn.Linear):
        return (module.in_features, module.out_features) if is_matrix_product(module) else None
    if isinstance(module, transposed_linear()):
        d_in, d_out = module.get_parameter("weight").shape
        return (int(d_in), int(d_out)) if is_matrix_product(module) else None
    widths = module.__dict__.get("in_features"), module.__dict__.get("out_features")
    if isinstance(widths[0], int) and isinstance(widths[1], int) and not has_stacked_experts(module):
        return (widths[0], widths[1]) if is_matrix_product(module) else None
    return None


def is_pointwise(module: nn.Conv1d | nn.Conv2d) -> bool:
    """It sees one position at a time: a linear map in another layout."""
    return all(k == 1 for k in module.kernel_size) and all(s == 1 for s in module.stride)


def has_stacked_experts(module: nn.Module) -> bool:
    """Experts kept as one parameter with a leading expert axis: [E, f, d]."""
    return any(p.ndim >= 3 for p in module.parameters(recurse=False)) and not isinstance(module, CONVS)


def norm_width(module: nn.Module) -> int | None:
    """Width of a norm with a gain, None for anything else: by its parameters and by "norm" in its class name."""
    parameters = dict(module.named_parameters(recurse=False))
    gain = parameters.pop("weight", None)
    if gain is None or gain.ndim != 1 or any(p.ndim != 1 for p in parameters.values()) or len(parameters) > 1:
        return None
    torch_norm = isinstance(module, (nn.LayerNorm, nn.RMSNorm, *CHANNELS_FIRST_NORMS))
    return gain.numel() if torch_norm or "norm" in type(module).__name__.lower() else None


def leaf_shape(module: nn.Module) -> LeafShape | None:
    """What this module is if it is a leaf with parameters (or a quantized linear), else None.

    Experts stacked in one parameter are no leaf: no value of theirs passes at one place.
    """
    if widths := linear_widths(module):
        return LeafShape("linear", *widths, False)
    if isinstance(module, CONVS):
        return LeafShape("conv", module.in_channels, module.out_channels, True)
    parameters = dict(module.named_parameters(recurse=False))
    has_parts = any(True for child in module.children() for _ in child.parameters())
    if not parameters or has_stacked_experts(module) or has_parts:
        return None
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return LeafShape("embedding", module.num_embeddings, module.embedding_dim, False)
    if width := norm_width(module):
        channels_first = isinstance(module, CHANNELS_FIRST_NORMS) or type(module).__name__.endswith("2d")
        return LeafShape("norm", width, width, channels_first)
    return LeafShape("other", *_custom_widths(parameters), False)


def _custom_widths(parameters: Mapping[str, Tensor]) -> tuple[int, int]:
    """(d_in, d_out) of a custom module: a 2-D weight is a linear map [d_out, d_in], all else keeps its last width."""
    if "weight" in parameters and parameters["weight"].ndim == 2:
        d_out, d_in = parameters["weight"].shape
        return int(d_in), int(d_out)
    first = next(iter(parameters.values()))
    width = int(first.shape[-1]) if first.ndim else 1
    return width, width
