"""Checkpoints of a run: one folder each, whole or not there; no pickle.

A folder is written beside its place, flushed to the disk and renamed, so a kill or a full disk leaves the former ones
as they are. Not by `replace_folder`: names with the step let the next start finish or clear what a kill cut short.
It holds the trained values and the optimiser's state as safetensors and the progress as json. What a run draws at
random follows from its seed and step, so no generator's state is needed. It knows no model and no data.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kitout.errors import FileError
from kitout.files.atomic import flush

PREFIX = "checkpoint-"
TENSORS, PROGRESS, STATE = "state.safetensors", "progress.json", "trainer_state.json"


def save(
    folder: Path, step: int, values: Mapping[str, Tensor], optimizer: torch.optim.Optimizer,
    progress: Mapping[str, Any], trainer_state: str,
) -> Path:  # fmt: skip
    """checkpoint-<step> below `folder`, replacing one of that step. OSError: the former ones are untouched."""
    final, fresh = folder / f"{PREFIX}{step}", folder / f".{PREFIX}{step}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        tensors = {f"value.{name}": value.detach().cpu().contiguous() for name, value in values.items()}
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"state.{number}.{key}": part.cpu().contiguous() for key, part in state.items()}
        _save_tensors(tensors, fresh / TENSORS)
        (fresh / PROGRESS).write_text(json.dumps(dict(progress)), encoding="utf-8")
        (fresh / STATE).write_text(trainer_state, encoding="utf-8")
        for part in fresh.iterdir():
            flush(part)
        flush(fresh)
        old = folder / f".{PREFIX}{step}.old"
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            os.replace(final, old)
        os.replace(fresh, final)
        flush(folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return final


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as wrong:  # it hides the system's error in its words: "... (os error 28)"
        number = re.search(r"os error (\d+)", str(wrong))
        raise OSError(int(number[1]) if number else errno.EIO, str(wrong)) from wrong


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a folder, oldest first; what a kill left half done is cleared away."""
    if not folder.is_dir():
        return []
    for left in folder.glob(f".{PREFIX}*.old"):
        step = left.name[1:].removesuffix(".old")
        if not (folder / step).exists():  # killed between the two renames: the old one is the good one
            os.replace(left, folder / step)
    for left in [*folder.glob(f".{PREFIX}*.new"), *folder.glob(f".{PREFIX}*.old")]:
        shutil.rmtree(left, ignore_errors=True)
    whole = [path for path in folder.glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdigit()]
    return sorted((path for path in whole if (path / STATE).exists()), key=step_of)


def step_of(path: Path) -> int:
    return int(path.name[len(PREFIX) :])


def read_progress(path: Path) -> dict[str, Any]:
    """What a checkpoint says of its run. FileError where it is damaged."""
    held: dict[str, Any] = _read_json(path / PROGRESS)
    _read_json(path / STATE)  # transformers reads it by itself, and would not say which file it was
    return held


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as wrong:
        raise _damaged_error(path.parent, wrong) from wrong


def _damaged_error(path: Path, error: object) -> FileError:
    return FileError(f"{path} is damaged ({error}): delete it, and the run goes on from the one before")


def load_values(path: Path, values: Mapping[str, Tensor]) -> None:
    """Puts the trained values back."""
    tensors = _read_tensors(path, "value.")
    missing, strange = sorted(set(values) - set(tensors)), sorted(set(tensors) - set(values))
    if missing or strange:
        raise FileError(f"{path} holds another adapter: without {missing[:3]}, with {strange[:3]}")
    shapes = [name for name, value in values.items() if value.shape != tensors[name].shape]
    if shapes:
        raise FileError(f"{path} holds another adapter: {shapes[0]} is {tuple(tensors[shapes[0]].shape)} there")
    with torch.no_grad():
        for name, value in values.items():
            value.copy_(tensors[name])


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Puts the optimiser's state back."""
    states: dict[int, dict[str, Tensor]] = {}
    for key, part in _read_tensors(path, "state.").items():
        number, what = key.split(".")
        states.setdefault(int(number), {})[what] = part
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})


def _read_tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    try:
        with safe_open(path / TENSORS, framework="pt") as held:
            keys = [key for key in held.keys() if key.startswith(prefix)]  # noqa: SIM118 - not a mapping
            return {key.removeprefix(prefix): held.get_tensor(key) for key in keys}
    except (SafetensorError, OSError) as wrong:
        raise _damaged_error(path, wrong) from wrong


def prune(folder: Path, num_kept: int, best: int | None) -> None:
    """The newest `keep` stay, and the best."""
    for path in list_checkpoints(folder)[:-num_kept]:
        if step_of(path) != best:
            shutil.rmtree(path, ignore_errors=True)
