"""dummy_batch: a small random batch for the probe, built from the signature of a model's forward and its config.

Random ids and pixels, a few tokens long, from a generator of its own. It knows the names that transformers gives to
model inputs and the image size that timm models declare, no architecture.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kitout.errors import ConfigError

NUM_TOKENS = 6


def dummy_batch(model: nn.Module, batch_size: int) -> dict[str, Any] | None:
    """Keyword arguments for one forward of `batch_size` rows; None where it is not known what the model takes."""
    accepted = inspect.signature(model.forward).parameters
    config = getattr(model, "config", None)
    generator = torch.Generator().manual_seed(0)
    batch: dict[str, Any] = {}
    if config is None or not hasattr(config, "model_type"):
        size = _declared_image_size(model)
        if size is None or not accepted:
            return None
        pixels = torch.randn(batch_size, *size, generator=generator)
        return {next(iter(accepted)): _to_model(model, pixels)}
    if "pixel_values" in accepted:
        shape = _image_shape(config)
        if shape is None:
            return None
        batch["pixel_values"] = _to_model(model, torch.randn(batch_size, *shape, generator=generator))
    if "input_ids" in accepted:
        batch["input_ids"] = _random_ids(model, config, batch_size, generator)
    if "input_values" in accepted and (samples := _num_samples(config)) is not None:
        batch["input_values"] = _to_model(model, torch.randn(batch_size, samples, generator=generator))
    if config.is_encoder_decoder and "decoder_input_ids" in accepted:
        batch["decoder_input_ids"] = _random_ids(model, config, batch_size, generator)
    if batch and "use_cache" in accepted:
        batch["use_cache"] = False
    return batch or None


def text_batch(model: nn.Module) -> dict[str, Any] | None:
    """Keyword arguments for one forward of text alone; None for a model that takes nothing else, or no text."""
    accepted = inspect.signature(model.forward).parameters
    config = getattr(model, "config", None)
    if "input_ids" not in accepted or not getattr(config, "sub_configs", None):
        return None
    generator = torch.Generator().manual_seed(0)
    names = [n for n in ("input_ids", "decoder_input_ids") if n in accepted]
    batch: dict[str, Any] = {n: _random_ids(model, config, 1, generator) for n in names}
    return batch | ({"use_cache": False} if "use_cache" in accepted else {})


def num_rows(batch: Mapping[str, Any]) -> int:
    """Rows of a batch: those of its tokens, else of the first tensor in it."""
    named = (batch.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
    rows = next((int(v.shape[0]) for v in (*named, *batch.values()) if isinstance(v, Tensor) and v.ndim > 1), None)
    if rows is None:
        raise ConfigError(f"example_batch has no tensor of rows: it holds {', '.join(map(str, batch)) or 'nothing'}")
    return rows


def with_more_rows(batch: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The batch with more rows, and how many it has then.

    Its first row once more; or every row once more where something has other rows than the text (patches of all images
    one after the other, a list of images), which then comes twice as well.
    """
    rows = num_rows(batch)
    tensors = [v for v in batch.values() if isinstance(v, Tensor) and v.ndim]
    if all(v.shape[0] == rows for v in tensors) and not any(isinstance(v, (list, tuple)) for v in batch.values()):
        return {k: torch.cat((v, v[:1])) if isinstance(v, Tensor) and v.ndim else v for k, v in batch.items()}, rows + 1
    return {k: _twice(v, rows) for k, v in batch.items()}, 2 * rows


def _twice(value: Any, rows: int) -> Any:
    if isinstance(value, (list, tuple)):
        return [*value, *value]
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    has_axes = value.ndim == 3 and value.shape[0] != rows and value.shape[1] == rows  # positions [axes, batch, tokens]
    return torch.cat((value, value), 1 if has_axes and not value.is_floating_point() else 0)


def _random_ids(model: nn.Module, config: Any, batch_size: int, generator: torch.Generator) -> Tensor:
    """Ordinary ids with the end-of-sequence id last (some classifiers pool there), none of them special before it."""
    text_config = config.get_text_config()
    vocab_size = int(getattr(text_config, "vocab_size", 128))  # a model of characters has no vocabulary
    values = (getattr(text_config, f"{name}_token_id", None) for name in ("pad", "bos", "eos"))
    pad, bos, eos = ({v} if isinstance(v, int) else set(v or ()) for v in values)  # none, one or a list of each
    ordinary = torch.tensor([i for i in range(min(vocab_size, 512)) if i not in pad | bos | eos])
    ids = ordinary[torch.randint(len(ordinary), (batch_size, NUM_TOKENS), generator=generator)]
    if eos and 0 <= (last := min(eos)) < vocab_size:
        ids[:, -1] = last
    return ids.to(_first_float_parameter(model).device)


def _image_shape(config: Any) -> tuple[int, int, int] | None:
    """(channels, height, width) of a transformers model's images, None where its config has no size."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return getattr(vision, "num_channels", 3), height, width


def _num_samples(config: Any) -> int | None:
    """Samples of sound that the model's convolutions cut into NUM_TOKENS frames; None where it has none."""
    kernels, strides = getattr(config, "conv_kernel", None), getattr(config, "conv_stride", None)
    if not isinstance(kernels, (list, tuple)) or not isinstance(strides, (list, tuple)):
        return None
    samples = NUM_TOKENS
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples


def _declared_image_size(model: nn.Module) -> tuple[int, int, int] | None:
    """(channels, height, width) of an image model outside transformers: its patch embedding's own size and channels."""
    for module in model.modules():
        size = module.__dict__.get("img_size")
        if isinstance(size, (tuple, list)) and len(size) == 2:
            convolution = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
            return (3 if convolution is None else convolution.in_channels), size[0], size[1]
    return None


def _to_model(model: nn.Module, value: Tensor) -> Tensor:
    parameter = _first_float_parameter(model)
    return value.to(parameter.device, parameter.dtype)


def _first_float_parameter(model: nn.Module) -> Tensor:
    return next(p for p in model.parameters() if p.is_floating_point())
