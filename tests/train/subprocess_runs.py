"""What tests run in processes of their own: whole runs from nothing, so that each process has all it needs.

It knows the zoo and the loop.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import time
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback

from kitout import (
    IA3,
    AdaptFormer,
    BitFit,
    FullFineTuning,
    Kit,
    LoRA,
    PartialFineTuning,
    PrefixTuning,
    PromptTuning,
)
from kitout.errors import ConfigError
from kitout.files.base_fingerprint import fingerprint
from kitout.train import checkpoints
from kitout.train.loop import distributed, fsdp
from kitout.train.loop.jobs import Job
from kitout.train.measure.predict import predict
from train.fixtures import add, causal, far, gradients, job, kit_of, loop_of, losses, texts, values

torch.set_num_threads(1)
Figures = dict[str, Any]


def out_of_memory() -> float:
    """A step's gradients after the allocator itself gave up, against those of single rows."""
    import resource

    kit, items = kit_of("llama", "eager"), texts(16, low=400, high=400)
    add(kit, "low", LoRA(rank=2))
    one = job("low", causal(kit, ["low"], items), items, steps=1, batch=16)
    wanted = gradients(kit, [one], 1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 30 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = gradients(kit, [one], 16)
    assert any("memory ran out" in str(warning.message) for warning in told), told
    return far(found, wanted)


class Slow(TrainerCallback):
    """Time to be killed in."""

    def on_step_end(self, *_: Any, **__: Any) -> None:
        time.sleep(0.01)


def pair(kit: Kit) -> list[Job]:
    """Two jobs, one of which draws dropout."""
    add(kit, "low", LoRA(rank=2, dropout=0.2))
    add(kit, "scale", IA3(), seed=1)
    names = ["low", "scale"]
    sets = [texts(20, 0), texts(12, 1)]
    return [
        job(
            name,
            causal(kit, names, items),
            items,
            steps=10,
            batch=batch,
            seed=batch,
            lr_schedule="cosine",
            warmup_ratio=0.2,
        )
        for name, items, batch in zip(names, sets, (4, 3), strict=True)
    ]


def pictured(kit: Kit) -> list[Job]:
    """Two jobs over images: one draws dropout, the other keeps features; a BatchNorm head each."""
    from kitout.train.loop.frozen_trunk import keep_features
    from kitout.train.objectives.image_classification import ImageClassification
    from kitout.train.setup.heads import build_heads, copy_heads
    from tiny_vision import CLASSES, images, pixels

    whole = images(4)
    methods = {"drawn": AdaptFormer(width=8), "kept": PartialFineTuning(last=1)}
    jobs = []
    for name, method in methods.items():
        add(kit, name, method, build_heads(copy_heads(kit, (), is_language_model=False), (), CLASSES, 0, "batchnorm"))
        objective = ImageClassification(kit, whole, pixels())
        jobs.append(
            job(
                name,
                objective,
                range(len(whole)),
                steps=10,
                batch=6,
                seed=3,
                trunk="auto" if name == "kept" else "off",
                head="batchnorm",
            )
        )
    assert list(keep_features(kit, jobs)[0]) == ["kept"]
    return jobs


def resumed(folder: Path, kind: str = "texts", run: str = "one") -> Figures:
    """A run of two jobs that goes on from wherever this folder stands."""
    kit = kit_of("llama" if kind == "texts" else "dinov2")
    jobs = pair(kit) if kind == "texts" else pictured(kit)
    loop = loop_of(
        kit, jobs, folder, run=run, save_strategy="steps", save_steps=1, logging_steps=2, callbacks=[Slow()]
    )  # fmt: skip
    last = next(reversed(checkpoints.list_checkpoints(folder)), None)
    loop.train(str(last) if last else None)
    weights = {key: value.tolist() for key, value in loop.trained_tensors().items()}  # running statistics of heads too
    return {"losses": losses(loop), "weights": weights, "from": str(last), "spent": loop.step_runner.job_seconds}


def limited(folder: Path) -> list[int]:
    """The checkpoints of a run after whose first no file may grow beyond a few bytes."""
    import resource
    import signal

    kit, items = kit_of("llama"), texts(12)
    add(kit, "low", LoRA(rank=2))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    class Limit(TrainerCallback):
        def on_save(self, *_: Any, **__: Any) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

    one = job("low", causal(kit, ["low"], items), items, steps=3)
    loop = loop_of(kit, [one], folder, save_strategy="steps", save_steps=1, callbacks=[Limit()])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loop.train()
    assert sum("no checkpoint of step" in str(warning.message) for warning in told) == 2, told
    return [checkpoints.step_of(path) for path in checkpoints.list_checkpoints(folder)]


class Stop(TrainerCallback):
    """As good as a kill in between: what is not saved is lost."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def shared(folder: Path, kind: str, stop: int | None = None) -> Figures:
    """A run in as many processes as there are. joint: jobs with too few rows for every process; parted: FSDP2."""
    PartialState(cpu=True)  # joins the others, as a run does first of all
    kit = kit_of("llama", dtype=torch.float32 if kind == "single" else torch.float64)
    add(kit, "low", LoRA(rank=2, targets="all-linear"))
    names = ["low"]
    if kind != "single":
        add(kit, "shift", BitFit(), seed=1)
        add(kit, "front", PrefixTuning(length=3), seed=2)
        names += ["shift", "front"]
    parted = kind == "parted" and distributed.world_size() > 1
    jobs = [
        job(name, causal(kit, names, items), items, steps=steps, batch=batch, seed=batch, fsdp=parted)
        for name, items, steps, batch in zip(
            names, [texts(20, 0), texts(12, 1), texts(9, 2)], (6, 4, 5), (5, 1, 3), strict=False
        )
    ]
    seen: dict[str, float] = {}

    def watch() -> dict[str, float]:
        for one in jobs:
            with kit.use(one.name):
                seen[one.name] = predict(kit, one.objective, texts(7, 9)).mean_loss
        return {"eval_loss": sum(seen.values())}

    loop = loop_of(
        kit, jobs, folder, micro=2, watch=watch, eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2, logging_steps=3, callbacks=[Stop(stop)],
    )  # fmt: skip
    last = next(reversed(checkpoints.list_checkpoints(folder)), None) if stop is None else None
    distributed.barrier()
    try:
        loop.train(str(last) if last else None)
    except KeyboardInterrupt:
        return {}
    saved = ""
    if kind == "parted":
        with fsdp.unsharded(kit):
            if distributed.rank() == 0:
                kit.save("low", folder / "adapter")
                fresh = kit_of("llama", dtype=kit.dtype)
                fresh.load(folder / "adapter")
                saved = fingerprint(kit.state, ()).model_dump_json()
            distributed.barrier()
    held = sum(own(value).numel() for value in kit.base.parameters())
    weights = {f"{one.name}/{key}": value.tolist() for one in jobs for key, value in values(kit, one.name).items()}
    return {
        "weights": weights,
        "losses": losses(loop),
        "seen": seen,
        "held": held,
        "saved": saved,
        "tokens": sum(distributed.all_gather([loop.step_runner.tokens])),
        "from": checkpoints.step_of(last) if last else 0,
    }


def own(value: Any) -> Any:
    """This process's part of a parameter."""
    return value.to_local() if hasattr(value, "to_local") else value


def proven() -> list[str]:
    """What parting the base says to adapters it is not for, and to a second time."""
    PartialState(cpu=True)
    told = []
    methods = {"text": PromptTuning(length=2), "deep": PrefixTuning(length=2)}
    for species, name in (("llama", "text"), ("t5", "deep"), ("vit", "copies")):
        kit = kit_of(species)
        add(kit, name, methods.get(name, FullFineTuning()))
        try:
            fsdp.shard(kit)
        except ConfigError as wrong:
            told.append(str(wrong))
    kit = kit_of("llama")
    add(kit, "low", LoRA(rank=2))
    fsdp.shard(kit)
    assert all(value.grad is None for value in kit["low"].parameters())
    try:
        fsdp.shard(kit)
    except ConfigError as wrong:
        told.append(str(wrong))
    return told
