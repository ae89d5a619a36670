"""What tests run in processes of their own: whole runs from the start, so that each process has all it needs.

It knows the zoo and the loop.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import time
import warnings
from functools import partial
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
from kitout.train.loop import compiled_steps, distributed, fsdp
from kitout.train.loop.jobs import Job
from kitout.train.measure.predict import predict
from train.fixtures import add, causal, far, gradients, job, kit_of, loop_of, losses, texts, values
from train.pairs import Pairs, PairsWithBaseline, pair_job

torch.set_num_threads(1)
RunSummary = dict[str, Any]


def train_out_of_memory() -> float:
    """How far a step's gradients after a real allocation failure are from those of single rows."""
    import resource

    kit, items = kit_of("llama", "eager"), texts(16, low=400, high=400)
    add(kit, "low", LoRA(rank=2))
    one = job("low", causal(kit, ["low"], items), items, steps=1, batch=16)
    references = gradients(kit, [one], 1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 40 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = gradients(kit, [one], 16)
    assert any("out of memory" in str(warning.message) for warning in caught), caught
    return far(results, references)


def train_until_killed(config: dict[str, Any], at_operation: int, after_seconds: float = 0.0) -> int:
    """A whole run that is killed before its n-th operation on a file of its folder, or after so many seconds.

    The number of operations where it is killed by neither (0). A config of stages is `kitout.align`'s, one with a space
    `kitout.search`'s.
    """
    import signal
    import sys
    import threading

    import kitout

    folder, count = str(config["out"] if "space" in config else config["output"]["folder"]), 0

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def on_event(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not writes and event not in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
            return
        if str(args[0]).startswith(folder):
            count += 1
            if count == at_operation:
                kill()

    sys.addaudithook(on_event)
    if after_seconds:
        timer = threading.Timer(after_seconds, kill)
        timer.daemon = True
        timer.start()
    start: Any = kitout.search.run if "space" in config else kitout.align if "stages" in config else kitout.train
    start(config, log=lambda _: None)
    return count


def train_with_trunk_until_killed(config: dict[str, Any], at_operation: int, after_seconds: float = 0.0) -> int:
    """The same of a run that keeps its frozen trunk in the file alone, whatever a clock says of it."""
    from kitout.train.trunk import choose

    choose.MAX_RATIO, choose.MEMORY_SHARE = float("inf"), 0.0
    return train_until_killed(config, at_operation, after_seconds)


class SleepAfterStep(TrainerCallback):
    """Time to be killed in."""

    def on_step_end(self, *_: Any, **__: Any) -> None:
        time.sleep(0.01)


def text_jobs(kit: Kit) -> list[Job]:
    """Two jobs, one of which has dropout."""
    add(kit, "low", LoRA(rank=2, dropout=0.2))
    add(kit, "scale", IA3(), seed=1)
    names = ["low", "scale"]
    datasets = [texts(20, 0), texts(12, 1)]
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
        for name, items, batch in zip(names, datasets, (4, 3), strict=True)
    ]


def image_jobs(kit: Kit) -> list[Job]:
    """Two jobs over images: one has dropout, the other caches features; a BatchNorm head each."""
    from kitout.train.objectives.image_classification import ImageClassification
    from kitout.train.setup.heads import build_heads, copy_heads
    from kitout.train.trunk.image_features import keep_features
    from tiny_vision import CLASSES, images, pixels

    dataset = images(4)
    methods = {"dropout": AdaptFormer(width=8), "cached": PartialFineTuning(last=1)}
    jobs = []
    for name, method in methods.items():
        add(kit, name, method, build_heads(copy_heads(kit, (), is_language_model=False), (), CLASSES, 0, "batchnorm"))
        objective = ImageClassification(kit, dataset, pixels())
        trunk = "auto" if name == "cached" else "off"
        jobs.append(
            job(name, objective, range(len(dataset)), steps=10, batch=6, seed=3, trunk=trunk, head="batchnorm")
        )  # fmt: skip
    assert list(keep_features(kit, jobs)[0]) == ["cached"]
    return jobs


def resume_run(folder: Path, kind: str = "texts") -> RunSummary:
    """A run of two jobs that resumes from the last checkpoint of this folder."""
    kit = kit_of("llama" if kind == "texts" else "dinov2")
    jobs = text_jobs(kit) if kind == "texts" else image_jobs(kit)
    loop = loop_of(
        kit, jobs, folder, run_id="one", save_strategy="steps", save_steps=1, logging_steps=2,
        callbacks=[SleepAfterStep()],
    )  # fmt: skip
    last = next(reversed(checkpoints.list_checkpoints(folder)), None)
    loop.train(str(last) if last else None)
    weights = {key: value.tolist() for key, value in loop.trained_tensors().items()}  # running statistics of heads too
    return {"losses": losses(loop), "weights": weights, "from": str(last), "job_seconds": loop.step_runner.job_seconds}


def train_with_limited_files(folder: Path) -> list[int]:
    """The checkpoints of a run in which no file may grow beyond a few bytes after the first checkpoint."""
    import resource
    import signal

    kit, items = kit_of("llama"), texts(12)
    add(kit, "low", LoRA(rank=2))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    class LimitFileSize(TrainerCallback):
        def on_save(self, *_: Any, **__: Any) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

    one = job("low", causal(kit, ["low"], items), items, steps=3)
    loop = loop_of(kit, [one], folder, save_strategy="steps", save_steps=1, callbacks=[LimitFileSize()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop.train()
    assert sum("no checkpoint of step" in str(warning.message) for warning in caught) == 2, caught
    return [checkpoints.step_of(path) for path in checkpoints.list_checkpoints(folder)]


def train_whole(config: dict[str, Any]) -> int:
    """A run from its config to its report, in all processes of the group; their number."""
    import kitout

    kitout.train(config, log=lambda _: None)
    return distributed.world_size()


class InterruptAfter(TrainerCallback):
    """As a kill would: what is not saved is lost."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def train_pairs_in_group(folder: Path, is_sharded: bool) -> RunSummary:
    """Jobs of pairs in all processes of the group, with values of the whole step and of each example."""
    PartialState(cpu=True)
    kit = kit_of("llama", dtype=torch.float64)
    fsdp_on = is_sharded and distributed.world_size() > 1
    objectives = {"low": PairsWithBaseline(kit), "shift": Pairs(kit)}
    for name, method in {"low": LoRA(rank=2, targets="all-linear"), "shift": BitFit()}.items():
        add(kit, name, method, seed=1)
    jobs = [pair_job(kit, name, one, steps=4, batch=3, fsdp=fsdp_on) for name, one in objectives.items()]
    loop = loop_of(kit, jobs, folder, micro=1, logging_steps=2)
    loop.train()
    weights = {f"{one.name}/{key}": value.tolist() for one in jobs for key, value in values(kit, one.name).items()}
    logged = [{key: row[key] for key in ("loss", "low/margin", "shift/wins")} for row in loop.state.log_history[:2]]
    return {"weights": weights, "logged": logged, "baselines": [call[2] for call in objectives["low"].calls]}


def train_in_group(folder: Path, kind: str, stop: int | None = None) -> RunSummary:
    """A run in all processes of the group.

    joint: jobs with too few rows for every process; sharded: FSDP2; compiled: by block, where there are several.
    """
    PartialState(cpu=True)  # joins the group, as a run does first
    mode = "blocks" if kind == "compiled" and distributed.world_size() > 1 else "off"
    compiled_steps.compile_kit = partial(compiled_steps.compile_kit, backend="eager")
    kit = kit_of("llama", dtype=torch.float32 if kind == "single" else torch.float64)
    add(kit, "low", LoRA(rank=2, targets="all-linear"))
    names = ["low"]
    if kind != "single":
        add(kit, "shift", BitFit(), seed=1)
        add(kit, "front", PrefixTuning(length=3), seed=2)
        names += ["shift", "front"]
    fsdp_on = kind == "sharded" and distributed.world_size() > 1
    jobs = [
        job(
            name,
            causal(kit, names, items),
            items,
            steps=steps,
            batch=batch,
            seed=batch,
            fsdp=fsdp_on,
            compile=mode,
        )
        for name, items, steps, batch in zip(
            names, [texts(20, 0), texts(12, 1), texts(9, 2)], (6, 4, 5), (5, 1, 3), strict=False
        )
    ]
    eval_losses: dict[str, float] = {}

    def evaluate() -> dict[str, float]:
        for one in jobs:
            with kit.use(one.name):
                eval_losses[one.name] = predict(kit, one.objective, texts(7, 9)).mean_loss
        return {"eval_loss": sum(eval_losses.values())}

    loop = loop_of(
        kit, jobs, folder, micro=2, evaluate_fn=evaluate, eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2, logging_steps=3, callbacks=[InterruptAfter(stop)],
    )  # fmt: skip
    last = next(reversed(checkpoints.list_checkpoints(folder)), None) if stop is None else None
    distributed.barrier()
    try:
        loop.train(str(last) if last else None)
    except KeyboardInterrupt:
        return {}
    saved_fingerprint = ""
    if kind == "sharded":
        with fsdp.unsharded(kit):
            if distributed.rank() == 0:
                kit.save("low", folder / "adapter")
                loaded = kit_of("llama", dtype=kit.dtype)
                loaded.load(folder / "adapter")
                saved_fingerprint = fingerprint(kit.state, ()).model_dump_json()
            distributed.barrier()
    base_size = sum(local_part(value).numel() for value in kit.base.parameters())
    weights = {f"{one.name}/{key}": value.tolist() for one in jobs for key, value in values(kit, one.name).items()}
    return {
        "weights": weights,
        "losses": losses(loop),
        "eval_losses": eval_losses,
        "base_size": base_size,
        "fingerprint": saved_fingerprint,
        "compiled": loop.step_runner.compiled.report is not None,
        "tokens": sum(distributed.all_gather([loop.step_runner.tokens])),
        "from": checkpoints.step_of(last) if last else 0,
    }


def local_part(value: Any) -> Any:
    """A parameter, or the shard of it in this process."""
    return value.to_local() if hasattr(value, "to_local") else value


def shard_refusals() -> list[str]:
    """The errors of sharding a base under adapters that do not allow it, and a second time."""
    PartialState(cpu=True)
    messages = []
    methods = {"text": PromptTuning(length=2), "deep": PrefixTuning(length=2)}
    for species, name in (("llama", "text"), ("t5", "deep"), ("vit", "copies")):
        kit = kit_of(species)
        add(kit, name, methods.get(name, FullFineTuning()))
        try:
            fsdp.shard(kit)
        except ConfigError as error:
            messages.append(str(error))
    kit = kit_of("llama")
    add(kit, "low", LoRA(rank=2))
    fsdp.shard(kit)
    assert all(value.grad is None for value in kit["low"].parameters())
    try:
        fsdp.shard(kit)
    except ConfigError as error:
        messages.append(str(error))
    return messages
