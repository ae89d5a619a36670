"""A training run in one file, so that one rename makes it whole: values, optimiser state, random state and progress.

safetensors with the progress as JSON in its header; no pickle. A file of another run (other data, settings, model or
versions) is not continued. It knows no model and no data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def save(
    file: Path, run: str, values: Mapping[str, Tensor], optimiser: torch.optim.Optimizer, progress: dict[str, Any]
) -> None:
    """Written beside its place and renamed: a kill leaves the former checkpoint."""
    tensors = {f"value.{name}": value.detach().contiguous() for name, value in values.items()}
    for number, state in optimiser.state_dict()["state"].items():
        tensors |= {f"state.{number}.{key}": part.contiguous() for key, part in state.items()}
    tensors["random"] = torch.get_rng_state()
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    save_file(tensors, fresh, metadata={"run": run, "progress": json.dumps(progress)})
    os.replace(fresh, file)


def load(file: Path, run: str, values: Mapping[str, Tensor], optimiser: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Puts a checkpoint of this run back and returns its progress; None if there is none."""
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as held:
            notes = held.metadata()
            if notes.get("run") != run:
                return None
            tensors = {key: held.get_tensor(key) for key in held.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError:
        return None  # a damaged file is no checkpoint: the run begins again
    with torch.no_grad():
        for name, value in values.items():
            value.copy_(tensors[f"value.{name}"])
    states: dict[int, dict[str, Tensor]] = {}
    for key, part in tensors.items():
        if key.startswith("state."):
            _, number, what = key.split(".")
            states.setdefault(int(number), {})[what] = part
    optimiser.load_state_dict({**optimiser.state_dict(), "state": states})
    torch.set_rng_state(tensors["random"])
    progress: dict[str, Any] = json.loads(notes["progress"])
    return progress
