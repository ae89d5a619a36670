"""What `save_pretrained` leaves of a kit, which transformers.Trainer calls for its checkpoints and its final model.

An adapter folder as `save_adapter` writes it, in a folder that may hold other files, and beside it model.safetensors:
the state by name, which Trainer reads again when it resumes and when it loads its best model. It knows no Trainer.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from torch import Tensor

from kitout.errors import ConfigError
from kitout.files.adapter_folder import FILES, save_adapter
from kitout.files.atomic import replacing
from kitout.files.part_folders import PARTS
from kitout.files.safetensors_reader import write_tensors
from kitout.files.system_errors import as_path, as_path_error
from kitout.route import adapter_names
from kitout.runtime.state import KitState

STATE = "model.safetensors"


def save_pretrained(state: KitState, folder: str | PathLike[str], values: Mapping[str, Tensor]) -> None:
    """Writes the adapter in use into `folder`; several each into a folder of their name in it. values: the kit's state.

    In use: active, else requiring a gradient, else every adapter. ConfigError where there is none.
    """
    trained = [a.name for a in state.adapters if any(p.requires_grad for p in a.parameters())]
    names = list(dict.fromkeys(adapter_names(state.route))) or trained or state.names
    if not names:
        raise ConfigError("this kit has no adapter, and its base is not saved: kit.add(name, LoRA()) first")
    target = as_path(folder)
    for name in names:
        _save_into(state, name, target if len(names) == 1 else target / name)
    with as_path_error("written", target), replacing(target / STATE) as temp_path:
        write_tensors(temp_path, values, {"format": "pt"})


def _save_into(state: KitState, name: str, target: Path) -> None:
    """The files of an adapter folder, in a folder that keeps whatever else it holds.

    The record goes last: its digest would not fit the tensors of another save, so a killed process is noticed.
    """
    with as_path_error("written", target):
        target.mkdir(parents=True, exist_ok=True)
        temp_path = target / f".kitout-{uuid.uuid4().hex}"
        try:
            save_adapter(state, name, temp_path)
            for part in (temp_path / PARTS).glob("*"):
                (target / PARTS).mkdir(exist_ok=True)
                shutil.rmtree(target / PARTS / part.name, ignore_errors=True)
                os.replace(part, target / PARTS / part.name)
            for file in reversed(FILES):
                os.replace(temp_path / file, target / file)
        finally:
            shutil.rmtree(temp_path, ignore_errors=True)
