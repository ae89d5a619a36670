"""The checkpoint of some candidates, made of those of the rungs before: each goes on exactly where it stopped.

A rung's checkpoint holds all of its candidates: values by name, the optimizer's state by number, counts in their order.
Here the parts of those that go on are put together in a new order. It knows the files of `train.checkpoints`, and
nothing of what they are of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kitout.errors import FileError
from kitout.files.atomic import flush, write_text
from kitout.runtime.adapter import Adapter
from kitout.train.checkpoints import FILES, PROGRESS, STATE, TENSORS, read_progress
from kitout.train.loop.jobs import Job, build_optimizer

JOBS_FILE = "jobs.json"
BY_JOB = ("sums", "metrics")  # of each process's counts


@dataclass(frozen=True)
class JobSize:
    """How much of a checkpoint is one job's."""

    groups: int
    """Groups of the optimizer."""
    parameters: int
    """Parameters in these groups."""


def write_job_sizes(folder: Path, jobs: Sequence[Job], adapters: Sequence[Adapter]) -> None:
    """Keeps what `carry_over` has to know of a rung beside its checkpoints."""
    sizes = {job.name: {"groups": 0, "parameters": 0} for job in jobs}
    for group in build_optimizer(jobs, adapters).param_groups:
        sizes[group["job"]]["groups"] += 1
        sizes[group["job"]]["parameters"] += len(group["params"])
    write_text(folder / JOBS_FILE, json.dumps(sizes))


def carry_over(sources: Mapping[str, Path], target: Path, run_id: str) -> Path:
    """Writes `target`/checkpoint-<step> with these candidates, in this order.

    sources: by candidate the checkpoint of a rung that trained it, all of one step. run_id: of the run that goes on.
    """
    steps = {path.name for path in sources.values()}
    if len(steps) != 1:
        raise FileError(f"candidates of different steps cannot go on together: {', '.join(sorted(steps))}")
    tensors: dict[str, torch.Tensor] = {}
    progress: dict[str, Any] = {}
    next_number = 0
    for name, path in sources.items():
        part = _PartOfCheckpoint.of(path, name)
        tensors |= part.values
        tensors |= {f"state.{next_number + number}.{key}": value for (number, key), value in part.states.items()}
        next_number += part.num_parameters
        progress = part.progress if not progress else _joined(progress, part.progress)
    progress["run"] = run_id
    final, (step_name,) = target / next(iter(steps)), steps
    new = target / f".{step_name}.new"
    new.mkdir(parents=True, exist_ok=True)
    save_file(tensors, new / TENSORS)
    (new / PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
    (new / STATE).write_bytes((next(iter(sources.values())) / STATE).read_bytes())
    for file in FILES:
        flush(new / file)
    new.replace(final)
    flush(target)
    return final


@dataclass(frozen=True)
class _PartOfCheckpoint:
    """What a checkpoint holds of one job."""

    values: dict[str, torch.Tensor]
    """As the file names them."""
    states: dict[tuple[int, str], torch.Tensor]
    """Of the optimizer, by the parameter's number among the job's own."""
    num_parameters: int
    """In the optimizer."""
    progress: dict[str, Any]
    """progress.json as if the job had been alone."""

    @classmethod
    def of(cls, path: Path, name: str) -> _PartOfCheckpoint:
        sizes = {
            job: JobSize(**size)
            for job, size in json.loads((path.parent / JOBS_FILE).read_text(encoding="utf-8")).items()
        }
        names = list(sizes)
        place = names.index(name)
        first = sum(sizes[job].parameters for job in names[:place])
        first_group = sum(sizes[job].groups for job in names[:place])
        own = sizes[name]
        values, states = {}, {}
        with safe_open(path / TENSORS, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                if key.startswith(f"value.{name}/"):
                    values[key] = file.get_tensor(key)
                elif key.startswith("state."):
                    _, number, what = key.split(".")
                    if first <= int(number) < first + own.parameters:
                        states[int(number) - first, what] = file.get_tensor(key)
        progress = _part_of_progress(read_progress(path), name, place, slice(first_group, first_group + own.groups))
        return cls(values, states, own.parameters, progress)


def _part_of_progress(progress: Mapping[str, Any], name: str, place: int, groups: slice) -> dict[str, Any]:
    counts = [
        {key: [value[place]] if key in BY_JOB else value for key, value in own.items()} for own in progress["counts"]
    ]
    scheduler = {
        key: value[groups] if isinstance(value, list) else value for key, value in progress["scheduler"].items()
    }
    return {
        **progress,
        "counts": counts,
        "spent": [progress["spent"][place]],
        "scheduler": scheduler,
        "stopped": {job: text for job, text in progress["stopped"].items() if job == name},
    }


def _joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Of two parts. Counts of the whole run (tokens, seconds) are the larger: its parts were trained side by side."""
    counts = [
        {key: own[key] + other[key] if key in BY_JOB else max(own[key], other[key]) for key in own}
        for own, other in zip(first["counts"], second["counts"], strict=True)
    ]
    scheduler = {
        key: value + second["scheduler"][key] if isinstance(value, list) else value
        for key, value in first["scheduler"].items()
    }
    return {
        **first,
        "micro": min(first["micro"], second["micro"]),
        "counts": counts,
        "seconds": max(first["seconds"], second["seconds"]),
        "spent": first["spent"] + second["spent"],
        "scheduler": scheduler,
        "stopped": {**first["stopped"], **second["stopped"]},
    }
