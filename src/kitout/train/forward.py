"""One call of an image classifier: pixels in, logits out, whichever library the model comes from.

transformers returns an object with logits, timm a tensor; a vision transformer built for another size has to be asked
to stretch its positions. It knows calls and nothing of adapters or labels.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from kitout.kit import Kit

STRETCH = "interpolate_pos_encoding"


def logits(kit: Kit, pixels: Tensor, model: Any = None) -> Tensor:
    """pixels [B, 3, H, W] -> [B, classes], wearing what the kit wears. model: who is called; default the kit."""
    asked = {STRETCH: True} if _stretched(kit, pixels) else {}
    out = (model or kit)(pixels, **asked)
    found: Tensor = out if isinstance(out, Tensor) else out.logits
    return found


def _stretched(kit: Kit, pixels: Tensor) -> bool:
    if STRETCH not in inspect.signature(kit.forward).parameters:
        return False
    built = kit.config.image_size
    return tuple(pixels.shape[2:]) != (tuple(built) if isinstance(built, list | tuple) else (built, built))
