"""A batch on which a kit and what was written of it are compared: real texts of several lengths, or images.

Each side reads them with its own tokenizer or image processor, so a wrong one is a difference too. It knows tasks and
tokenizers, and no file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kitout.data.padding import pad
from kitout.errors import ConfigError

TEXTS = (
    "The parcel never came.",
    "I ordered it on Monday, and the shop wrote that it would take 3 days; today is Friday, and nobody answers.",
    "Très bien, merci!",
    "Question: which of the two is older, 1799 or 1815? Answer:",
)
IMAGE_SIZES = ((64, 48), (48, 64), (96, 96))  # width and height
MAX_TOKENS = 64  # of a text


def sample_images() -> list[Any]:
    """Gradients with noise, always the same."""
    from PIL import Image

    rng, images = np.random.default_rng(0), []
    for width, height in IMAGE_SIZES:
        ramp = np.linspace(0, 200, width)[None, :, None] * np.linspace(0.3, 1, height)[:, None, None]
        pixels = ramp * rng.uniform(0.5, 1, 3) + rng.integers(0, 55, (height, width, 3))
        images.append(Image.fromarray(pixels.astype(np.uint8)))
    return images


def text_batch(model: Any, tokenizer: Any, pad_token_id: int | None) -> dict[str, Tensor]:
    """What the model takes for TEXTS; an encoder-decoder also gets the texts as what it has written so far."""
    rows = [list(tokenizer(text)["input_ids"])[:MAX_TOKENS] for text in TEXTS]
    if not all(rows):
        raise ConfigError(f"{type(tokenizer).__name__} makes no tokens of {TEXTS[0]!r}: it is not the model's own")
    ids, mask = pad(rows, pad_token_id or 0, "right", model.device)
    batch = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids[:, : min(map(len, rows))]
    return batch


def image_batch(model: Any, processor: Any) -> dict[str, Any]:
    """What the model takes for the images, read by an image processor of transformers."""
    from kitout.train.objectives.image_classification import interpolation_kwargs  # images need pillow

    pixels = processor(sample_images(), return_tensors="pt")["pixel_values"]
    pixels = pixels.to(model.device, model.dtype)
    return {"pixel_values": pixels, **interpolation_kwargs(model, pixels)}


@torch.no_grad()
def logits_of(model: Any, batch: dict[str, Any]) -> Tensor:
    """The logits at every position that is no padding, in fp32 on the CPU: [positions, outputs]."""
    logits: Tensor = model(**batch).logits.float().cpu()
    mask = batch.get("attention_mask")
    if logits.ndim == 3 and mask is not None and "decoder_input_ids" not in batch:
        return logits[:, -mask.shape[1] :][mask.bool().cpu()]  # PEFT's prompts have logits of their own in front
    return logits.flatten(0, -2)
