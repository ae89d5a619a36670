"""The adapters of a finished training, in their folders: saved before anything is measured.

An error in measuring then loses nothing, and a later run that continues an adapter reads here what it was trained on.
It knows a run's kit and folder, and nothing of results or reports.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from kitout.errors import ConfigError
from kitout.files.portable_name import portable_name
from kitout.fuse.lora.final_form import to_final_form
from kitout.train.config.schema import RunConfig
from kitout.train.run_folder import RunFolder
from kitout.train.setup.prepare import PreparedRun
from kitout.train.usage import usage_of


def settle_adapters(run: PreparedRun, num_steps_done: int) -> None:
    """Gives every trained adapter the size and the form that it is saved with; in all processes alike."""
    for job in run.jobs:
        adapter, num_steps = run.kit[job.name], len(job.batches)
        if num_steps_done < adapter.method.settled_after(num_steps):
            run.warnings.append(
                f"{job.name!r} stopped after step {num_steps_done} of {num_steps}, before its ranks were final: they "
                "were cut to the budget at once, and nothing was trained after that"
            )
        if num_steps_done:
            adapter.after_step(num_steps - 1, num_steps)
        to_final_form(run.kit.state, job.name)


def save_adapters(run: PreparedRun, config: RunConfig, run_folder: RunFolder, log: Callable[[str], None]) -> None:
    """Saves what was trained before anything is measured: an error in measuring loses nothing."""
    names = [job.name for job in run.jobs]
    try:
        for job, folder in adapter_folders(run, run_folder).items():
            (folder / "README.md").unlink(missing_ok=True)  # of a run that was killed before it was finished
            run.kit[job].usage = usage_of(run, config, names.index(job)).model_dump()
            run.kit.save(job, folder, metadata=_note_of(run, config, job))
            log(f"saved    {folder}")
    except (OSError, SafetensorError) as error:
        raise not_written_error(run_folder, error) from error


def adapter_folders(run: PreparedRun, run_folder: RunFolder) -> dict[str, Path]:
    """Where each adapter goes: `adapter` alone, below it by name if there are several."""
    names = [job.name for job in run.jobs]
    return {name: run_folder.adapter if len(names) == 1 else run_folder.adapter / name for name in names}


def _note_of(run: PreparedRun, config: RunConfig, job: str) -> dict[str, Any]:
    """What adapter.json says of where the adapter comes from, for a run that continues it."""
    dataset = next(one for own, one in zip(run.jobs, run.datasets, strict=True) if own.name == job)
    note: dict[str, Any] = {"trained by": "kitout train", "base": portable_name(config.model.name)}
    note |= {"data_sha256": data_hash({job: dataset.digest}), "labels": list(dataset.label_names)}
    if parent := run.parents.get(job):
        note["from"] = parent.facts()
    return note


def data_hash(digests: Mapping[str, str]) -> str:
    """SHA-256 of the examples of these jobs, by name."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def not_written_error(run_folder: RunFolder, error: Exception) -> ConfigError:
    return ConfigError(
        f"{run_folder.path} cannot be written ({error}): the trained parameters are kept in its checkpoints; "
        "make room, and the same command finishes the run"
    )
