"""`kitout demo vision`: a preset of `kitout train` that compares eight methods on the same images, in one run.

Settings come from the papers where they fit a small model. Learning rates were found with benchmarks/vision_search.py
on validation images of MNIST-5k, never on the test images, at the demo's own budget. It trains and draws nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kitout.assets.catalog import ASSETS
from kitout.errors import ConfigError, Errors, suggest
from kitout.method import Method
from kitout.methods import SSF, VPT, AdaptFormer, BitFit, FullFineTuning, LoRA, PartialFineTuning
from kitout.train.config.load import load
from kitout.train.config.method_field import fold_name
from kitout.train.config.schema import JobConfig, RunConfig, TrainConfig
from kitout.train.run import LogFn, Result, run

MODEL, DATA, IMAGE_SIZE = "dinov2-small", "mnist-5k", 112
BATCH_SIZE = 16


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


@dataclass(frozen=True, kw_only=True)
class VisionDemo:
    """The options of the command line."""

    model: Path | None = None
    """A model folder; None: the built-in one."""
    data: Path | None = None
    """A folder of class folders, a table of image paths or an .npz; None: the built-in digits."""
    image: str | None = None
    """The column of the image paths, if it is not obvious."""
    label: str | None = None
    """The column of the labels, if it is not obvious."""
    methods: tuple[str, ...] = ()
    """Names of `JOBS`; none: all of them."""
    out: Path = Path("runs/vision")
    """The run folder."""
    size: int | None = None
    """Height and width of the model's input; None: 112 pixels for the built-in model, else the model's own."""
    train: int = 500
    """Training images, at most."""
    test: int = 1000
    """Test images, at most."""
    budget: int = 1500
    """Training images shown to each method, repeats counted."""
    seed: int = 0
    """Of the split, the initial values and the order of images."""


def preset(options: VisionDemo) -> RunConfig:
    """The run that the options describe."""
    errors = Errors(ConfigError, "--methods")
    known = {fold_name(name): name for name in JOBS}  # LoRA, VPT_deep
    methods = [known.get(fold_name(name), name) for name in options.methods]
    for name in methods:
        if name not in JOBS:
            errors.add(f"{name!r}; {suggest(name, JOBS)}")
    errors.raise_if_any()
    columns = {role: name for role, name in (("image", options.image), ("label", options.label)) if name is not None}
    return load(
        {
            "model": {"name": str(options.model or MODEL), "dtype": "float32"},
            "data": {
                "train": [{"path": str(options.data or DATA), "limit": options.train, "columns": columns}],
                "validation": 0,
                "test": options.test,
                "seed": options.seed,
                "image_size": options.size or (IMAGE_SIZE if options.model is None else None),
            },
            "objective": "image_classification",
            "train": {
                "head_lr": 3e-3,
                "weight_decay": 1e-4,
                "batch_size": BATCH_SIZE,
                "steps": max(1, round(options.budget / BATCH_SIZE)),
                "warmup_ratio": 0.1,
                "trunk": "auto",
                "seed": options.seed,
            },
            "evaluate": {"max_test_examples": options.test},
            "output": {"folder": str(options.out)},
            "jobs": [job for name, job in JOBS.items() if not methods or name in methods],
        }
    )


def demo(options: VisionDemo, log: LogFn = print) -> Result:
    """Trains and compares the methods; an interrupted run resumes when it is called again."""
    result = run(preset(options), log=log)
    name = str(options.model or MODEL)
    if name in ASSETS and ASSETS[name].caveat:
        log(f"note: {name}: {ASSETS[name].caveat}")
    log("on your own images: kitout demo vision --data FOLDER_OF_CLASS_FOLDERS --model MODEL_FOLDER --out FOLDER")
    return result
