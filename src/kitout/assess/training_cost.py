"""What training an adapter took, as its run wrote it into results.json: seconds, tokens or images, peak memory.

An adapter folder of `kitout train` lies in its run's folder, alone as `adapter` or by name below it. Of adapters that
were trained together, seconds and tokens are each one's own share, and the memory is the whole run's. It knows folders
and numbers, and nothing of models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kitout.train.run_folder import RESULTS_FILE, RUN_FILE

UNITS = ("tokens", "images")


@dataclass(frozen=True)
class TrainingCost:
    """Of one adapter. (The names are keys of results.json.)"""

    seconds: float | None = None
    """Wall-clock seconds of its training; its own share where several were trained together."""
    amount: int | None = None
    """Tokens without padding, or images, that it was trained on, repeats counted."""
    unit: str = "tokens"
    """tokens, or images."""
    memory: int | None = None
    """Peak bytes of the run."""
    num_adapters: int = 1
    """How many adapters the run trained together."""
    unknown: str = ""
    """Why nothing is known of it; else empty."""


def folder_bytes(folder: Path) -> int:
    """Of all files in it."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def read_training_cost(folder: Path | None) -> TrainingCost:
    """Of the adapter in this folder. What its run did not keep stays None; `unknown` says why there is nothing."""
    if folder is None:
        return TrainingCost(unknown="it was not loaded from a folder")
    own = folder.resolve()
    run = next((parent for parent in own.parents[:2] if (parent / RUN_FILE).is_file()), None)
    if run is None:
        return TrainingCost(unknown=f"{folder} does not lie in the folder of a run")
    try:
        results = json.loads((run / RESULTS_FILE).read_text(encoding="utf-8"))
        names = list(results["trainable"])
        name = names[0] if len(names) == 1 else own.name
        if name not in names:
            return TrainingCost(unknown=f"the run in {run} trained {', '.join(names)}, and not {own.name}")
        return _of_adapter(results, name, len(names))
    except FileNotFoundError:
        return TrainingCost(unknown=f"the run in {run} is not finished: it has no {RESULTS_FILE}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return TrainingCost(unknown=f"{run / RESULTS_FILE} cannot be read: {type(error).__name__} {str(error)[:80]}")


def _of_adapter(results: Mapping[str, Any], name: str, num_adapters: int) -> TrainingCost:
    row: Mapping[str, Any] = next((row for row in results.get("adapters") or () if row["name"] == name), {})
    unit = next((unit for unit in UNITS if unit in results), UNITS[0])
    is_alone = num_adapters == 1
    seconds = results["seconds"] if is_alone else row.get("seconds")
    amount = results.get(unit) if is_alone else row.get("tokens")
    memory = results.get("memory")
    return TrainingCost(
        None if seconds is None else float(seconds),
        None if amount is None else int(amount),
        unit,
        int(memory) if memory else None,  # 0: it was not measured
        num_adapters,
    )
