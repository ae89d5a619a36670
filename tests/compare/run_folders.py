"""Folders of finished runs without any training: what `kitout train` writes of them, with scores of one's choice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kitout.train.config import yaml_file
from kitout.train.config.load import load
from kitout.train.run_folder import HEADER


def score(value: float, n: int = 100, share: bool = True, higher: bool = True) -> dict[str, Any]:
    low, high = value - 0.05, value + 0.05
    return {"value": value, "low": low, "high": high, "n": n, "higher_is_better": higher, "share": share}


def finished(
    folder: Path, metrics: dict[str, float], *, seed: int = 0, method: Any = "LoRA", jobs: tuple[str, ...] = (),
    model: str = "tiny", n: int = 100, **results: Any,
) -> Path:  # fmt: skip
    """A run with these metrics on its test split, the same for each job."""
    folder.mkdir(parents=True)
    values: dict[str, Any] = {
        "model": model, "data": "data.csv", "method": method, "train": {"seed": seed},
        "output": {"folder": str(folder)},
    }  # fmt: skip
    if jobs:
        values["jobs"] = [{"name": name} for name in jobs]
    config = load(values)
    (folder / "run.yaml").write_text(f"{HEADER}\n{yaml_file.to_yaml(config.to_dict())}", encoding="utf-8")
    names = jobs or ("adapter",)
    changes = [
        {"name": name, "base": score(value / 2, n), "tuned": score(value, n), "difference": value / 2, "low": 0.0,
         "high": 1.0, "baseline": "majority class"}
        for name, value in metrics.items()
    ]  # fmt: skip
    whole: dict[str, Any] = {
        "data": dict.fromkeys(names, "all"), "test_data": dict.fromkeys(names, "test"),
        "trainable": dict.fromkeys(names, 1234), "percent": dict.fromkeys(names, 0.5), "seconds": 12.5,
        "memory": 2**30, "machine": {"device": "cpu: x", "dtype": "float32"}, "stopped": {},
        "comparisons": dict.fromkeys(names, changes) if changes else {},
        "adapters": [{"name": name, "method": "LoRA", "seconds": 5.0} for name in names],
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(whole | results), encoding="utf-8")
    return folder
