"""Plans that tests begin from."""

from __future__ import annotations

from typing import Any

PLAN: dict[str, Any] = {
    "run": {"model": "smollm2-135m", "data": {"train": "tweets"}},
    "space": {
        "method": ["LoRA", "IA3", "Houlsby", "AdaptFormer", "PrefixTuning"],
        "LoRA": {
            "rank": [2, 4, 8, 16],
            "targets": ["attn.q attn.v", "all-linear", "mlp.*"],
            "layers": ["all", "last:8"],
        },
        "lr": {"multipliers": [0.3, 3.0]},
    },
    "budget": {"max_trainable_parameters": 1_000_000, "max_bytes": None, "max_latency": 1.10, "examples": 20_000},
    "goal": {"metric": "accuracy", "max_forgetting": 0.02},
    "candidates": 16,
    "halving": {"factor": 4, "first": 0.0625},
    "confirm": {"seeds": [0, 1, 2]},
    "seed": 0,
    "out": "runs/search",
}
