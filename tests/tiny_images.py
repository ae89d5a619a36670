"""Small real image files for tests: squares of one color per class, with noise so that no two are the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 210)}


def picture(kind: str, seed: int, size: int = 24) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-30, 31, (size, size, 3))
    return Image.fromarray(np.clip(np.array(COLOURS[kind]) + noise, 0, 255).astype(np.uint8))


def folder(root: Path, each: int = 4, kinds: tuple[str, ...] = tuple(COLOURS), first: int = 0) -> Path:
    """root/kind/i.png; seeds count up from `first`."""
    for number, kind in enumerate(kinds):
        (root / kind).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            picture(kind, first + 1000 * number + i).save(root / kind / f"{i}.png")
    return root
