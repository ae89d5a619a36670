"""A whole run: config in, tested adapter out, in one folder that a kill cannot ruin.

Pre-flight, training, comparison, report, in this order; how each is done is in the modules beside it. The same call
goes on where a former one stopped. It knows the order of the work.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from kitout.base import memory
from kitout.errors import ConfigError, suggest
from kitout.evaluate.compare import Comparison
from kitout.files.atomic import write_text
from kitout.files.base_fingerprint import fingerprint
from kitout.format import seconds
from kitout.train import checkpoints, run_folder
from kitout.train.closing import closing
from kitout.train.config import conflicts
from kitout.train.config.schema import RunConfig
from kitout.train.loop import distributed, fsdp
from kitout.train.measure.evaluate import outcomes, watched_names, watching
from kitout.train.measure.merge_proof import check_mergeable, prove_merge
from kitout.train.preflight import render
from kitout.train.preflight.collect import pages, told
from kitout.train.preflight.cost_estimate import Estimate, estimate
from kitout.train.run_folder import RunFolder
from kitout.train.setup.prepare import Prepared, prepare
from kitout.version import __version__

Say = Callable[[str], None]
MOST_LOGS = 2000
EVALUATIONS, SAVES = 5, 10  # in a run, unless said otherwise
PARTS = 4  # lines of one measurement


@dataclass(frozen=True)
class Result:
    """folder: of the run. comparisons: by adapter; none of a dry run. figures: what results.json holds."""

    folder: Path
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)


def run(config: RunConfig, *, dry_run: bool = False, say: Say = print) -> Result:
    """Trains what the config says. dry_run: stops before the first step. say: hears what is worth telling."""
    from kitout.train.outputs import finish

    if importlib.util.find_spec("accelerate") is None:
        raise ConfigError("training stands on accelerate, not installed here\n  pip install 'kitout[train]'")
    conflicts.machine(config, torch.cuda.is_available())
    _join(config)
    with _folder(config) as place:
        if place.done:
            return _shown_again(place, say)
        made = prepare(config)
        _check_best(made, config)
        if config.evaluate.prove_merge:
            check_mergeable(made)
        known = told(made)
        last = next(reversed(checkpoints.found(place.checkpoints)), None)
        signed = signature(made)  # of the whole base
        if config.train.shard:
            fsdp.shard(made.kit)
        loop, guess = _loop(made, config, place, last, signed)
        if distributed.rank() == 0:
            shown = pages(made, config, known, guess)
            for page in shown:
                render.show(page)
            render.save(shown, place.path)
        if dry_run:
            return Result(place.path)
        memory.reset_peak(made.kit.device)
        with loop.showing:
            loop.train(str(last) if last else None)
        best = loop.load_best()
        reached = outcomes(made, config.evaluate, lambda name: _progress(name, say))
        proofs = {}
        if config.evaluate.prove_merge:
            proofs = {job.name: prove_merge(made, k, config.evaluate) for k, job in enumerate(made.jobs)}
        figures: dict[str, Any] = {}
        with fsdp.whole(made.kit):
            if distributed.rank() == 0:
                figures = finish(made, config, place, loop, guess, best, reached, proofs, say)
            distributed.wait()
        made.kit.detach()
        beside = {name: one.comparison for name, one in reached.items() if one.comparison is not None}
        return Result(place.path, beside, figures)


def _shown_again(place: RunFolder, say: Say) -> Result:
    """A run that is finished, from what it has written."""
    figures = json.loads(place.results.read_text(encoding="utf-8"))
    if shown := closing(figures):
        say(shown)
    say(place.again())
    return Result(place.path, figures=figures)


def _progress(name: str, say: Say) -> Callable[[int, int], None]:
    """A line when a measurement of many examples begins and at each fourth of it: it may take as long as training."""
    start, last = time.monotonic(), -1

    def tell(done: int, total: int) -> None:
        nonlocal last
        now = PARTS * done // max(1, total)
        if now != last and distributed.rank() == 0:
            last = now
            say(f"evaluating {name}: {done:,} of {total:,} examples, {seconds(time.monotonic() - start)}")

    return tell


def _join(config: RunConfig) -> None:
    """Several processes (torchrun, accelerate launch) find each other before any of them works."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if any(job.train.head == "batchnorm" for job in config.alone()):
            raise ConfigError(
                "train.head=batchnorm takes its statistics over a whole batch, in one process: say train.head=linear"
            )
        from accelerate import PartialState

        PartialState(cpu=config.model.device == "cpu" or not torch.cuda.is_available())
        batch = sum(job.train.batch for job in config.alone())
        if batch < distributed.world():
            raise ConfigError(f"train.batch={batch} is fewer examples than the {distributed.world()} processes")
    elif config.train.shard:
        raise ConfigError("train.shard parts the base among processes, and there is one: start it with torchrun")


@contextmanager
def _folder(config: RunConfig) -> Iterator[RunFolder]:
    """The main process opens and holds it; the others look on."""
    if distributed.rank() == 0:
        with run_folder.opened(config) as place:
            distributed.wait()
            yield place
    else:
        distributed.wait()
        path = config.output.folder.expanduser()
        yield RunFolder(path, (path / run_folder.RUN).is_file(), (path / run_folder.RESULTS).is_file())


def _check_best(made: Prepared, config: RunConfig) -> None:
    """What a best checkpoint is chosen by is what will be measured."""
    asked = {"evaluate.best": config.evaluate.best, "train.patience": config.train.patience}
    said = [f"{name}={value}" for name, value in asked.items() if value is not None]
    if not said:
        return
    if not any(len(job.watched) for job in made.jobs):
        raise ConfigError(f"{said[0]} waits for measurements, and no example is left in the validation part")
    names, best = watched_names(made, config.evaluate), config.evaluate.best
    if best is not None and best not in names:
        raise ConfigError(f"evaluate.best={best} is not measured here: {suggest(best, names)}")


def signature(made: Prepared) -> str:
    """What a checkpoint depends on besides the settings, which the folder compares by name."""
    same = {
        "data": [one.digest for one in made.sets],
        "model": fingerprint(made.kit.state, ()).model_dump_json(),
        "dtype": str(made.kit.dtype),
        "versions": [__version__, torch.__version__, transformers.__version__, sys.byteorder],
    }
    return hashlib.sha256(json.dumps(same).encode()).hexdigest()


def _loop(made: Prepared, config: RunConfig, place: RunFolder, last: Path | None, signed: str) -> Any:
    """The loop, and what it will take: tried now, or as it was found before the run was stopped."""
    from transformers import EarlyStoppingCallback

    from kitout.train.loop.trainer import Loop, Steps
    from kitout.train.progress import Progress

    steps = Steps(made.jobs)
    known = place.path / "estimate.json"
    if last is not None and known.is_file():
        guess = Estimate(**json.loads(known.read_text(encoding="utf-8")))
    else:
        tried = [steps[i] for i in range(min(len(steps), 64) if made.main.looked_at else len(steps))]
        guess = estimate(made.kit, made.jobs, tried, config.train.micro_batch, config.train.checkpointing)
        if distributed.rank() == 0:
            write_text(known, json.dumps(guess.__dict__))
    cuts: dict[str, str] = {}
    if made.main.images is not None:
        from kitout.train.loop.frozen_trunk import keep_features  # images need pillow

        cuts, notes = keep_features(made.kit, made.jobs)
        made.notes.extend(notes)
    args = _arguments(config, place, len(steps), any(len(job.watched) for job in made.jobs))
    showing = Progress(place.path)
    callbacks: list[Any] = [showing]
    if config.train.patience is not None:
        patient: Any = EarlyStoppingCallback(config.train.patience)
        patient.on_train_begin = lambda *_, **__: None  # warns that no best is kept, which the loop does itself
        callbacks.append(patient)
    loop = Loop(
        made.kit, made.jobs, place.checkpoints, args, run=signed, watch=watching(made, config.evaluate),
        callbacks=callbacks, micro=min(guess.micro, config.train.micro_batch or guess.micro), kept=config.train.keep,
    )  # fmt: skip
    loop.showing, loop.cuts = showing, cuts
    return loop, guess


def _arguments(config: RunConfig, place: RunFolder, steps: int, watched: bool) -> Any:
    from transformers import TrainingArguments

    every = config.evaluate.every if config.evaluate.every is not None else math.ceil(steps / EVALUATIONS)
    measures = watched and every > 0
    best = config.evaluate.best or "loss"
    reports = list(config.output.report_to) or "none"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return TrainingArguments(
            output_dir=str(place.checkpoints), max_steps=steps, per_device_train_batch_size=1, report_to=reports,
            logging_steps=math.ceil(steps / MOST_LOGS), logging_nan_inf_filter=False, disable_tqdm=True,
            log_level="error",
            eval_strategy="steps" if measures else "no", eval_steps=every if measures else None,
            save_strategy="steps", save_steps=config.train.save_every or math.ceil(steps / SAVES),
            metric_for_best_model=f"eval_{best}" if measures else None,
            greater_is_better=best not in ("loss", "perplexity", "mae", "rmse") if measures else None,
            remove_unused_columns=False, label_names=[],
            use_cpu=not torch.cuda.is_available() or config.model.device == "cpu",
            activation_checkpointing=config.train.checkpointing, seed=config.train.seed, run_name=place.path.name,
            ddp_find_unused_parameters=len(config.jobs) > 1,
        )  # fmt: skip
