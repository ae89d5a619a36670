"""The vision demo: a preset of `kitout train` that trains eight methods on the same images, in one run.

Settings come from the papers where they fit a small model; learning rates were found with benchmarks/vision_search.py
on a validation part of MNIST-5k, never on the test images, at the demo's own budget. It trains and draws nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kitout.assets.catalog import ASSETS
from kitout.errors import ConfigError, Errors, suggest
from kitout.method import Method
from kitout.methods import SSF, VPT, AdaptFormer, BitFit, FullFineTuning, LoRA, PartialFineTuning
from kitout.train.config.load import load
from kitout.train.config.schema import JobConfig, RunConfig, TrainConfig
from kitout.train.run import LogFn, Result, run

MODEL, DATA, SIZE = "dinov2-small", "mnist-5k", 112
BATCH = 16


def _job(name: str, method: Method, lr: float, **settings: Any) -> JobConfig:
    return JobConfig(name=name, method=method, train=TrainConfig(lr=lr, **settings))


JOBS: dict[str, JobConfig] = {
    job.name: job
    for job in (
        _job("linear", PartialFineTuning(part="head"), 3e-3),
        _job("bitfit", BitFit(), 3e-3, weight_decay=0.0),
        _job("vpt-shallow", VPT(length=10), 3e-2),
        _job("vpt-deep", VPT(length=10, deep=True), 1e-2),
        _job("ssf", SSF(), 3e-3, weight_decay=0.0),
        _job("lora", LoRA(rank=8), 1e-3),
        _job("adaptformer", AdaptFormer(), 1e-2, head="batchnorm"),
        _job("full", FullFineTuning(), 1e-5),
    )
}


def config(
    *, model: Path | None = None, data: Path | None = None, image: str | None = None, label: str | None = None,
    methods: Sequence[str] = (), out: Path = Path("runs/vision"), size: int | None = None, train: int = 500,
    test: int = 1000, budget: int = 1500, seed: int = 0,
) -> RunConfig:  # fmt: skip
    """The run. model, data None: the embedded ones. methods: names of JOBS, none: all. size: None: 112 for the
    embedded model, else the model's own. budget: training images shown to each method, repeats counted.
    """
    faults = Errors(ConfigError, "--methods")
    for name in methods:
        if name not in JOBS:
            faults.add(f"{name!r}; {suggest(name, JOBS)}")
    faults.raise_if_any()
    columns = {what: name for what, name in (("image", image), ("label", label)) if name is not None}
    return load(
        {
            "model": {"name": str(model or MODEL), "dtype": "float32"},
            "data": {
                "train": [{"path": str(data or DATA), "limit": train, "columns": columns}],
                "validation": 0,
                "test": test,
                "seed": seed,
                "image_size": size or (SIZE if model is None else None),
            },
            "objective": "image_classification",
            "train": {
                "head_lr": 3e-3,
                "weight_decay": 1e-4,
                "batch_size": BATCH,
                "steps": max(1, round(budget / BATCH)),
                "warmup_ratio": 0.1,
                "trunk": "auto",
                "seed": seed,
            },
            "evaluate": {"max_test_examples": test},
            "output": {"folder": str(out)},
            "jobs": [job for name, job in JOBS.items() if not methods or name in methods],
        }
    )


def demo(chosen: RunConfig, say: LogFn) -> Result:
    """Trains and compares; a run that was interrupted goes on when it is called again."""
    result = run(chosen, log=say)
    if chosen.model.name in ASSETS and ASSETS[chosen.model.name].caveat:
        say(f"note: {chosen.model.name}: {ASSETS[chosen.model.name].caveat}")
    say("on your own images: kitout demo vision --data FOLDER_OF_CLASS_FOLDERS --model MODEL_FOLDER --out FOLDER")
    return result
