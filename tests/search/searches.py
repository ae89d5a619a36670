"""A small plan on a tiny model, and whole searches in processes of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kitout.search.plan.load import load_plan
from kitout.search.plan.schema import SearchPlan
from tiny_models import encoder, jsonl, reviews


def tiny_plan(root: Path, **sections: Any) -> dict[str, Any]:
    """Eight designs of three methods on a tiny encoder, three rungs, three seeds."""
    model = root / "model"
    return {
        "run": {
            "model": {"name": str(model if model.exists() else encoder(model)), "dtype": "float32"},
            "data": {"train": str(jsonl(root / "d.jsonl", reviews(120))), "test": 40, "validation": 30},
            "train": {"batch_size": 4, "steps": 8},
        },
        "space": {"method": ["LoRA", "IA3", "Houlsby"], "LoRA": {"rank": [1, 2, 4]}, "Houlsby": {"width": [2, 4]}},
        "candidates": 8,
        "halving": {"factor": 2, "first": 0.25},
        "confirm": {"designs": 2},
        "out": str(root / "out"),
        **sections,
    }  # fmt: skip


def loaded(root: Path, **sections: Any) -> SearchPlan:
    """The same, checked."""
    return load_plan(tiny_plan(root, **sections))
