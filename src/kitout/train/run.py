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
from kitout.format import format_duration
from kitout.train import checkpoints, run_folder
from kitout.train.closing import closing_text
from kitout.train.config import conflicts
from kitout.train.config.schema import RunConfig
from kitout.train.loop import distributed, fsdp
from kitout.train.measure.evaluate import evaluate_jobs, metric_names, validation_fn
from kitout.train.measure.merge_proof import check_mergeable, prove_merge
from kitout.train.preflight import render
from kitout.train.preflight.collect import collect_pages, collect_statistics
from kitout.train.preflight.cost_estimate import CostEstimate, estimate_cost
from kitout.train.run_folder import RunFolder
from kitout.train.setup.prepare import PreparedRun, prepare
from kitout.version import __version__

LogFn = Callable[[str], None]
MAX_LOGS = 2000
EVALUATIONS, SAVES = 5, 10  # in a run, unless said otherwise
PROGRESS_LINES = 4  # lines of one measurement


@dataclass(frozen=True)
class Result:
    """folder: of the run. comparisons: by adapter; none of a dry run. figures: what results.json holds."""

    folder: Path
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)


def run(config: RunConfig, *, dry_run: bool = False, log: LogFn = print) -> Result:
    """Trains what the config says. dry_run: stops before the first step. say: hears what is worth telling."""
    from kitout.train.outputs import write_outputs

    if importlib.util.find_spec("accelerate") is None:
        raise ConfigError("training stands on accelerate, not installed here\n  pip install 'kitout[train]'")
    conflicts.check_machine(config, torch.cuda.is_available())
    _join_processes(config)
    with _run_folder(config) as place:
        if place.is_finished:
            return _show_finished(place, log)
        made = prepare(config)
        _check_best(made, config)
        if config.evaluate.prove_merge:
            check_mergeable(made)
        known = collect_statistics(made)
        last = next(reversed(checkpoints.list_checkpoints(place.checkpoints)), None)
        signed = run_signature(made)  # of the whole base
        if config.train.fsdp:
            fsdp.shard(made.kit)
        loop, guess = _build_trainer(made, config, place, last, signed)
        if distributed.rank() == 0:
            shown = collect_pages(made, config, known, guess)
            for page in shown:
                render.print_page(page)
            render.save_pages(shown, place.path)
        if dry_run:
            return Result(place.path)
        memory.reset_peak(made.kit.device)
        with loop.showing:
            loop.train(str(last) if last else None)
        best = loop.load_best()
        reached = evaluate_jobs(made, config.evaluate, lambda name: _progress_fn(name, log))
        proofs = {}
        if config.evaluate.prove_merge:
            proofs = {job.name: prove_merge(made, k, config.evaluate) for k, job in enumerate(made.jobs)}
        figures: dict[str, Any] = {}
        with fsdp.unsharded(made.kit):
            if distributed.rank() == 0:
                figures = write_outputs(made, config, place, loop, guess, best, reached, proofs, log)
            distributed.barrier()
        made.kit.detach()
        beside = {name: one.comparison for name, one in reached.items() if one.comparison is not None}
        return Result(place.path, beside, figures)


def _show_finished(run_folder: RunFolder, log: LogFn) -> Result:
    """A run that is finished, from what it has written."""
    figures = json.loads(run_folder.results.read_text(encoding="utf-8"))
    if shown := closing_text(figures):
        log(shown)
    log(run_folder.finished_message())
    return Result(run_folder.path, figures=figures)


def _progress_fn(name: str, log: LogFn) -> Callable[[int, int], None]:
    """A line when a measurement of many examples begins and at each fourth of it: it may take as long as training."""
    start, last = time.monotonic(), -1

    def tell(done: int, total: int) -> None:
        nonlocal last
        now = PROGRESS_LINES * done // max(1, total)
        if now != last and distributed.rank() == 0:
            last = now
            log(f"evaluating {name}: {done:,} of {total:,} examples, {format_duration(time.monotonic() - start)}")

    return tell


def _join_processes(config: RunConfig) -> None:
    """Several processes (torchrun, accelerate launch) find each other before any of them works."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if any(job.train.head == "batchnorm" for job in config.per_job()):
            raise ConfigError(
                "train.head=batchnorm takes its statistics over a whole batch, in one process: say train.head=linear"
            )
        from accelerate import PartialState

        PartialState(cpu=config.model.device == "cpu" or not torch.cuda.is_available())
        batch = sum(job.train.batch_size for job in config.per_job())
        if batch < distributed.world_size():
            raise ConfigError(
                f"train.batch_size={batch} is fewer examples than the {distributed.world_size()} processes"
            )
    elif config.train.fsdp:
        raise ConfigError("train.fsdp parts the base among processes, and there is one: start it with torchrun")


@contextmanager
def _run_folder(config: RunConfig) -> Iterator[RunFolder]:
    """The main process opens and holds it; the others look on."""
    if distributed.rank() == 0:
        with run_folder.open_run_folder(config) as place:
            distributed.barrier()
            yield place
    else:
        distributed.barrier()
        path = config.output.folder.expanduser()
        yield RunFolder(path, (path / run_folder.RUN_FILE).is_file(), (path / run_folder.RESULTS_FILE).is_file())


def _check_best(prepared: PreparedRun, config: RunConfig) -> None:
    """What a best checkpoint is chosen by is what will be measured."""
    asked = {
        "evaluate.best_metric": config.evaluate.best_metric,
        "train.early_stopping_patience": config.train.early_stopping_patience,
    }
    said = [f"{name}={value}" for name, value in asked.items() if value is not None]
    if not said:
        return
    if not any(len(job.validation) for job in prepared.jobs):
        raise ConfigError(f"{said[0]} waits for measurements, and no example is left in the validation part")
    names, best = metric_names(prepared, config.evaluate), config.evaluate.best_metric
    if best is not None and best not in names:
        raise ConfigError(f"evaluate.best_metric={best} is not measured here: {suggest(best, names)}")


def run_signature(prepared: PreparedRun) -> str:
    """What a checkpoint depends on besides the settings, which the folder compares by name."""
    same = {
        "data": [one.digest for one in prepared.datasets],
        "model": fingerprint(prepared.kit.state, ()).model_dump_json(),
        "dtype": str(prepared.kit.dtype),
        "versions": [__version__, torch.__version__, transformers.__version__, sys.byteorder],
    }
    return hashlib.sha256(json.dumps(same).encode()).hexdigest()


def _build_trainer(
    prepared: PreparedRun, config: RunConfig, run_folder: RunFolder, last_checkpoint: Path | None, run_id: str
) -> Any:
    """The loop, and what it will take: tried now, or as it was found before the run was stopped."""
    from transformers import EarlyStoppingCallback

    from kitout.train.loop.trainer import JobTrainer, StepDataset
    from kitout.train.progress import ProgressDisplay

    steps = StepDataset(prepared.jobs)
    known = run_folder.path / "estimate.json"
    if last_checkpoint is not None and known.is_file():
        guess = CostEstimate(**json.loads(known.read_text(encoding="utf-8")))
    else:
        tried = [steps[i] for i in range(min(len(steps), 64) if prepared.first_dataset.preview else len(steps))]
        guess = estimate_cost(
            prepared.kit, prepared.jobs, tried, config.train.micro_batch_size, config.train.activation_checkpointing
        )
        if distributed.rank() == 0:
            write_text(known, json.dumps(guess.__dict__))
    cuts: dict[str, str] = {}
    if prepared.first_dataset.images is not None:
        from kitout.train.loop.frozen_trunk import keep_features  # images need pillow

        cuts, notes = keep_features(prepared.kit, prepared.jobs)
        prepared.warnings.extend(notes)
    args = _training_arguments(config, run_folder, len(steps), any(len(job.validation) for job in prepared.jobs))
    showing = ProgressDisplay(run_folder.path)
    callbacks: list[Any] = [showing]
    if config.train.early_stopping_patience is not None:
        patient: Any = EarlyStoppingCallback(config.train.early_stopping_patience)
        patient.on_train_begin = lambda *_, **__: None  # warns that no best is kept, which the loop does itself
        callbacks.append(patient)
    loop = JobTrainer(
        prepared.kit,
        prepared.jobs,
        run_folder.checkpoints,
        args,
        run_id=run_id,
        evaluate_fn=validation_fn(prepared, config.evaluate),
        callbacks=callbacks,
        micro_batch_size=min(guess.micro, config.train.micro_batch_size or guess.micro),
        num_checkpoints=config.train.keep_checkpoints,
    )
    loop.showing, loop.cuts = showing, cuts
    return loop, guess


def _training_arguments(config: RunConfig, run_folder: RunFolder, steps: int, has_validation: bool) -> Any:
    from transformers import TrainingArguments

    every = config.evaluate.steps if config.evaluate.steps is not None else math.ceil(steps / EVALUATIONS)
    measures = has_validation and every > 0
    best = config.evaluate.best_metric or "loss"
    reports = list(config.output.report_to) or "none"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return TrainingArguments(
            output_dir=str(run_folder.checkpoints),
            max_steps=steps,
            per_device_train_batch_size=1,
            report_to=reports,
            logging_steps=math.ceil(steps / MAX_LOGS),
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            log_level="error",
            eval_strategy="steps" if measures else "no",
            eval_steps=every if measures else None,
            save_strategy="steps",
            save_steps=config.train.save_steps or math.ceil(steps / SAVES),
            metric_for_best_model=f"eval_{best}" if measures else None,
            greater_is_better=best not in ("loss", "perplexity", "mae", "rmse") if measures else None,
            remove_unused_columns=False,
            label_names=[],
            use_cpu=not torch.cuda.is_available() or config.model.device == "cpu",
            activation_checkpointing=config.train.activation_checkpointing,
            seed=config.train.seed,
            run_name=run_folder.path.name,
            ddp_find_unused_parameters=len(config.jobs) > 1,
        )
