"""The dtype of a base's own files, in which a merged model is written: training may have held the base in another.

It reads configs and adapter folders, and loads no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

from torch import nn

from kitout.predict.load import find_base
from kitout.predict.saved_adapters import read_folders
from kitout.train.config.schema import ModelConfig
from kitout.train.setup import base_model, device

WRITABLE = ("float32", "bfloat16", "float16")


def stored_dtype(
    folders: Sequence[str | PathLike[str]], base: str | PathLike[str] | nn.Module | None, on_device: str, verify: bool
) -> str | None:
    """What `kitout.load` takes as dtype; None: as in training, where the files do not say or it cannot be computed."""
    if isinstance(base, nn.Module):
        return None
    saved = read_folders(folders, verify)
    name = find_base(saved, base)
    usage = next((one.usage for one in saved if one.usage is not None), None)
    if usage is not None and usage.base.quantization != "none":
        return None
    revision = usage.base.revision if usage is not None and usage.base.name == name else None
    stored = str(base_model.load_config(ModelConfig(name=name, revision=revision)).dtype).removeprefix("torch.")
    used = device.default_device().type if on_device == "auto" else on_device
    if stored == "float16" and used == "cpu":
        stored = ""  # overflows there
    if stored in WRITABLE:
        return stored
    return None if usage is not None else "float32"
