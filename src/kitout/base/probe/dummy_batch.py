"""A small batch for a model to be probed with, made up from its forward's signature and its config.

Random ids and pixels, a few tokens long, from a generator of its own. It knows the names that transformers gives to
model inputs and timm's default config, no architecture; None where it cannot tell what the model takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

NUM_TOKENS = 6


def dummy_batch(model: nn.Module, batch_size: int) -> dict[str, Any] | None:
    """Keyword arguments for one forward of `rows` rows, or None."""
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
    if config.is_encoder_decoder and "decoder_input_ids" in accepted:
        batch["decoder_input_ids"] = _random_ids(model, config, batch_size, generator)
    if batch and "use_cache" in accepted:
        batch["use_cache"] = False
    return batch or None


def with_extra_row(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with its first row once more at the end."""
    rows = next((v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim > 1), None)
    return {
        k: torch.cat((v, v[:1])) if isinstance(v, Tensor) and v.ndim and v.shape[0] == rows else v
        for k, v in batch.items()
    }


def _random_ids(model: nn.Module, config: Any, batch_size: int, generator: torch.Generator) -> Tensor:
    """Ordinary ids with the end-of-sequence id last (some classifiers pool there), none of them special before it."""
    text = config.get_text_config()
    vocabulary = int(text.vocab_size)
    # T5 has no bos, Llama 3 a list of eos.
    named = (getattr(text, f"{n}_token_id", None) for n in ("pad", "bos", "eos"))
    special = [{t} if isinstance(t, int) else set(t or ()) for t in named]
    ordinary = torch.tensor([i for i in range(min(vocabulary, 512)) if i not in set().union(*special)])
    ids = ordinary[torch.randint(len(ordinary), (batch_size, NUM_TOKENS), generator=generator)]
    if special[-1] and 0 <= (last := min(special[-1])) < vocabulary:
        ids[:, -1] = last
    return ids.to(_first_float_parameter(model).device)


def _image_shape(config: Any) -> tuple[int, int, int] | None:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return getattr(vision, "num_channels", 3), height, width


def _declared_image_size(model: nn.Module) -> tuple[int, int, int] | None:
    """(channels, height, width) of an image model outside transformers: its patch embedding's own size and channels."""
    for module in model.modules():
        size = module.__dict__.get("img_size")
        if isinstance(size, (tuple, list)) and len(size) == 2:
            convolution = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
            return (3 if convolution is None else convolution.in_channels), size[0], size[1]
    return None


def _to_model(model: nn.Module, value: Tensor) -> Tensor:
    anchor = _first_float_parameter(model)
    return value.to(anchor.device, anchor.dtype)


def _first_float_parameter(model: nn.Module) -> Tensor:
    return next(p for p in model.parameters() if p.is_floating_point())
