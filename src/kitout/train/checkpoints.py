"""Checkpoints of a run: one folder each, complete or not there; no pickle.

A folder is written beside its final path, flushed to the disk and renamed, so a kill or a full disk leaves the earlier
ones as they are. Not by `replace_folder`: names with the step let the next start finish or clear what a kill cut short.
It holds the trained values and the optimizer's state as safetensors and the progress as JSON. Random draws follow from
the seed and the step, so no generator's state is needed. It knows no model and no data.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kitout.errors import FileError
from kitout.files.atomic import flush
from kitout.files.system_errors import os_error_of

PREFIX = "checkpoint-"
TENSORS, PROGRESS, STATE = FILES = ("state.safetensors", "progress.json", "trainer_state.json")
# Beside a checkpoint: one being written, one being replaced, one being deleted.
NEW, OLD, DELETED = ".new", ".old", ".deleted"


def save(
    folder: Path, step: int, values: Mapping[str, Tensor], optimizer: torch.optim.Optimizer,
    progress: Mapping[str, Any], trainer_state: str, step_data: Mapping[str, Tensor] | None = None,
) -> Path:  # fmt: skip
    """Writes `folder`/checkpoint-<step>, replacing one of that step. OSError: the earlier ones are untouched.

    step_data: what the next steps train on, where no file holds it (`read_step_data`).
    """
    final_path, new_path = folder / f"{PREFIX}{step}", folder / f".{PREFIX}{step}{NEW}"
    shutil.rmtree(new_path, ignore_errors=True)
    try:
        new_path.mkdir(parents=True)
        tensors = {f"value.{name}": value.detach().cpu().contiguous() for name, value in values.items()}
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"state.{number}.{key}": value.cpu().contiguous() for key, value in state.items()}
        tensors |= {f"data.{name}": value.cpu().contiguous() for name, value in (step_data or {}).items()}
        _save_tensors(tensors, new_path / TENSORS)
        (new_path / PROGRESS).write_text(json.dumps(dict(progress)), encoding="utf-8")
        (new_path / STATE).write_text(trainer_state, encoding="utf-8")
        for file in new_path.iterdir():
            flush(file)
        flush(new_path)
        old_path = folder / f".{PREFIX}{step}{OLD}"
        shutil.rmtree(old_path, ignore_errors=True)
        if final_path.exists():
            os.replace(final_path, old_path)
        os.replace(new_path, final_path)
        flush(folder)
        shutil.rmtree(old_path, ignore_errors=True)
    except BaseException:
        shutil.rmtree(new_path, ignore_errors=True)
        raise
    return final_path


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise os_error_of(error) from error


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a folder, oldest first; what a kill left incomplete is finished or deleted.

    One with a damaged file does not count either, and is warned of.
    """
    if not folder.is_dir():
        return []
    _remove_leftovers(folder)
    numbered = [path for path in folder.glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdigit()]
    return [path for path in sorted(numbered, key=step_of) if _is_whole(path)]


def _is_whole(path: Path) -> bool:
    """Whether every file is there and reads to its end."""
    if not all((path / name).is_file() for name in FILES):
        return False
    try:
        read_progress(path)
        with (path / TENSORS).open("rb") as file:
            (header_size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_size))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        is_whole = (path / TENSORS).stat().st_size == 8 + header_size + max(ends, default=0)
    except (FileError, OSError, ValueError, struct.error, OverflowError, MemoryError):
        is_whole = False
    if not is_whole:
        warnings.warn(f"{path} is damaged and not used: delete it", stacklevel=3)
    return is_whole


def _remove_leftovers(folder: Path) -> None:
    for old_path in folder.glob(f".{PREFIX}*{OLD}"):
        final_path = folder / old_path.name[1:].removesuffix(OLD)
        if not final_path.exists():  # killed between the two renames: the old one is complete
            os.replace(old_path, final_path)
    leftovers = [path for suffix in (NEW, OLD, DELETED) for path in folder.glob(f".{PREFIX}*{suffix}")]
    for path in folder.glob(f"{PREFIX}*"):
        if path.is_dir() and path.name[len(PREFIX) :].isdigit():
            names = {entry.name for entry in path.iterdir()}
            if names < set(FILES):  # an earlier version deleted it file by file
                leftovers.append(path)
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)


def step_of(path: Path) -> int:
    return int(path.name[len(PREFIX) :])


def read_progress(path: Path) -> dict[str, Any]:
    """The progress.json of a checkpoint. FileError where it is damaged."""
    progress: dict[str, Any] = _read_json(path / PROGRESS)
    _read_json(path / STATE)  # transformers reads it itself, and its error would not name the file
    return progress


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged_error(path.parent, error) from error


def _damaged_error(path: Path, error: object) -> FileError:
    return FileError(f"{path} is damaged ({error}): delete it, and the run resumes from the one before")


def load_values(path: Path, values: Mapping[str, Tensor]) -> None:
    """Copies the checkpoint's values into these tensors."""
    tensors = _read_tensors(path, "value.")
    missing, unexpected = sorted(set(values) - set(tensors)), sorted(set(tensors) - set(values))
    if missing or unexpected:
        raise FileError(f"{path} holds another adapter: missing {missing[:3]}, unexpected {unexpected[:3]}")
    reshaped = [name for name, value in values.items() if value.shape != tensors[name].shape]
    if reshaped:
        shape = tuple(tensors[reshaped[0]].shape)
        raise FileError(f"{path} holds another adapter: its {reshaped[0]} has the shape {shape}")
    with torch.no_grad():
        for name, value in values.items():
            value.copy_(tensors[name])


def read_step_data(path: Path) -> dict[str, Tensor]:
    """What `save` had as step_data."""
    return _read_tensors(path, "data.")


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Loads the checkpoint's optimizer state."""
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in _read_tensors(path, "state.").items():
        number, name = key.split(".")
        states.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})


def _read_tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    try:
        with safe_open(path / TENSORS, framework="pt") as file:
            keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118 - not a mapping
            return {key.removeprefix(prefix): file.get_tensor(key) for key in keys}
    except (SafetensorError, OSError) as error:
        raise _damaged_error(path, error) from error


def prune(folder: Path, num_kept: int, best: int | None) -> None:
    """Deletes all but the newest `num_kept` and the best. A kill in between leaves no half of one under its name."""
    for path in list_checkpoints(folder)[:-num_kept]:
        if step_of(path) != best:
            deleted_path = folder / f".{path.name}{DELETED}"
            os.replace(path, deleted_path)
            shutil.rmtree(deleted_path, ignore_errors=True)
