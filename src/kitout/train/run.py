"""A whole run: config in, tested adapter out, in one folder that a kill cannot ruin.

Pre-flight, training, comparison, report, in this order; how each is done is in the modules beside it. The same call
resumes a run that was stopped. It knows the order of the work.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from kitout.base import memory
from kitout.errors import ConfigError, suggest
from kitout.evaluate.compare import Comparison
from kitout.files.atomic import write_text
from kitout.files.base_fingerprint import fingerprint
from kitout.files.part_folders import content_digest
from kitout.format import format_duration
from kitout.install_hint import suggest_install
from kitout.kit import Kit
from kitout.train import checkpoints, run_folder
from kitout.train.adapter_folders import save_adapters, settle_adapters
from kitout.train.config import conflicts
from kitout.train.config.schema import RunConfig
from kitout.train.config.seeds import repeated_adapters
from kitout.train.loop import distributed, fsdp, stop_on_signal
from kitout.train.loop.jobs import Job
from kitout.train.loop.step import StepRows
from kitout.train.loop.step_data import StepData
from kitout.train.loop.training_arguments import training_arguments
from kitout.train.measure.evaluate import check_groups, evaluate_jobs, metric_names, validation_fn
from kitout.train.measure.forgetting import check_forgetting, measure_forgetting
from kitout.train.measure.merge_proof import check_mergeable, prove_merge
from kitout.train.preflight import render
from kitout.train.preflight.collect import collect_pages, collect_statistics
from kitout.train.preflight.cost_estimate import CostEstimate, estimate_cost
from kitout.train.results_text import next_text, results_text
from kitout.train.run_folder import RunFolder
from kitout.train.setup.base_model import Placement, choose_placement
from kitout.train.setup.parent import adopt_parents
from kitout.train.setup.prepare import SAMPLED_STEPS, PreparedRun, prepare
from kitout.train.setup.schedule import fit_to_time, warn_of_few_steps
from kitout.train.trunk import kept_inputs
from kitout.train.trunk.of_run import keep_trunk
from kitout.version import __version__

LogFn = Callable[[str], None]
EvaluateFn = Callable[[], dict[str, float]]
NUM_PROGRESS_LINES = 4  # of one evaluation


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    folder: Path
    """Of the run."""
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)
    """Base vs. fine-tuned by adapter; none of a dry run."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """What results.json holds."""


def run(
    config: RunConfig, *, dry_run: bool = False, log: LogFn = print, source: str = "train",
    read_data: Callable[[RunConfig, Path], RunConfig] = lambda config, _folder: config,
) -> Result:  # fmt: skip
    """Trains what the config describes. dry_run: stops before the first step. log: gets the lines to print.

    read_data: puts data that are made into the run's folder, and names them. source: as `HistoryRow` has it.
    """
    from kitout.train.outputs import write_outputs

    if importlib.util.find_spec("accelerate") is None:
        raise ConfigError(f"training needs accelerate, which is not installed\n  {suggest_install(extra='train')}")
    config = adopt_parents(config)
    conflicts.check_machine(config, torch.cuda.is_available())
    join_processes(config)
    config = run_folder.with_first_day(config, distributed.all_gather([run_folder.first_day(config)])[0])
    with stop_on_signal.interrupt_on_sigterm(), opened_run_folder(config) as folder:
        if folder.is_finished:
            return show_finished(folder, log)
        own_log = log if distributed.rank() == 0 else no_log
        prepared = prepare(read_data(config, folder.path), resolve_placement(config, folder), own_log, samples=dry_run)
        check_best(prepared, config)
        check_groups(prepared, config.evaluate)
        check_forgetting(prepared, config.evaluate, config.train.seed, own_log)
        if config.evaluate.prove_merge:
            check_mergeable(prepared)
        statistics = collect_statistics(prepared)
        last_checkpoint = next(reversed(checkpoints.list_checkpoints(folder.checkpoints)), None)
        signature = run_signature(prepared)  # of the whole base
        if config.train.fsdp:
            fsdp.shard(prepared.kit)
        main_log = log if distributed.rank() == 0 else no_log
        if last_checkpoint is None:
            main_log("trying the longest and the usual step, for their time and memory ...")
        trainer, estimate = build_trainer(
            prepared, config, folder, last_checkpoint, signature, validation_fn(prepared, config.evaluate)
        )
        trainer.cuts = keep_trunk(prepared, config, folder, signature, trainer.step_runner.micro_batch_size, main_log)
        if distributed.rank() == 0:
            pages = collect_pages(prepared, config, statistics, estimate)
            for page in pages:
                render.print_page(page)
            render.save_pages(pages, folder.path)
        if dry_run:
            return Result(folder.path)
        memory.reset_peak(prepared.kit.device)
        if any(job.settings.compile != "off" for job in prepared.jobs):
            main_log("the first steps compile the blocks, which takes seconds to minutes (train.compile=blocks) ...")
        save = partial(save_adapters, prepared, config, folder, log)
        best_step = train_and_save(trainer, last_checkpoint, prepared, save)
        outcomes = evaluate_jobs(prepared, config.evaluate, lambda name: progress_fn(name, log))
        kept_inputs.forget(prepared.kit)
        proofs = {}
        if config.evaluate.prove_merge:
            proofs = {job.name: prove_merge(prepared, k, config.evaluate) for k, job in enumerate(prepared.jobs)}
        forgetting = measure_forgetting(
            prepared, config.evaluate, config.train.seed, main_log, lambda name: progress_fn(name, log)
        )
        results: dict[str, Any] = {}
        with fsdp.unsharded(prepared.kit):
            if distributed.rank() == 0:
                log("writing the report ...")
                results = write_outputs(
                    prepared, config, folder, trainer, estimate, best_step, outcomes, proofs, forgetting, log, source
                )
            distributed.barrier()
        prepared.kit.detach()
        comparisons = {name: one.comparison for name, one in outcomes.items()}
        return Result(folder.path, comparisons, results)


def train_and_save(
    trainer: Any, last_checkpoint: Path | None, prepared: PreparedRun, save: Callable[[], None]
) -> int | None:
    """The step whose values are kept. Adapters are saved here, before anything is measured on them."""
    try:
        with trainer.display:
            trainer.train(str(last_checkpoint) if last_checkpoint else None)
    except Exception:
        if trainer.is_evaluating and distributed.world_size() == 1:  # what is trained so far is not lost with it
            save()
        raise
    best_step: int | None = trainer.load_best()
    settle_adapters(prepared, trainer.state.global_step)
    with fsdp.unsharded(prepared.kit):
        if distributed.rank() == 0:
            save()
        distributed.barrier()
    return best_step


def no_log(line: str) -> None:
    """The other processes are silent."""


def resolve_placement(config: RunConfig, folder: RunFolder) -> Placement:
    """Device and dtype of the base. The dtype that `auto` found at the first start holds for the whole run."""
    placement = choose_placement(config.model)
    if config.model.dtype != "auto":
        return placement
    resolved = folder.read_resolved() if folder.resumes else {}
    if resolved.get("dtype") not in ("float32", "bfloat16"):
        resolved = {"dtype": str(placement.dtype).removeprefix("torch."), "dtype_reason": placement.reason}
    resolved = distributed.all_gather([resolved])[0]  # of the main process
    if distributed.rank() == 0:
        folder.write_resolved(resolved)
    return Placement(placement.device, getattr(torch, resolved["dtype"]), resolved.get("dtype_reason", ""))


def show_finished(folder: RunFolder, log: LogFn) -> Result:
    """A run that is finished, from what it has written."""
    results = json.loads(folder.results.read_text(encoding="utf-8"))
    if text := results_text(results):
        log(text)
    log(folder.finished_message())
    if text := next_text(results):
        log(f"\n{text}")
    return Result(folder.path, figures=results)


def progress_fn(name: str, log: LogFn) -> Callable[[int, int], None]:
    """A line when an evaluation of many examples begins and at each fourth of it: it may take as long as training."""
    start, last_fourth = time.monotonic(), -1

    def report(done: int, total: int) -> None:
        nonlocal last_fourth
        fourth = NUM_PROGRESS_LINES * done // max(1, total)
        if fourth != last_fourth and distributed.rank() == 0:
            last_fourth = fourth
            log(f"evaluating {name}: {done:,} of {total:,} examples, {format_duration(time.monotonic() - start)}")

    return report


def join_processes(config: RunConfig) -> None:
    """Several processes (torchrun, accelerate launch) find each other before any of them works."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if any(job.train.head == "batchnorm" for job in config.per_job()):
            raise ConfigError(
                "train.head=batchnorm takes its statistics over a whole batch, in one process: choose train.head=linear"
            )
        from accelerate import PartialState

        PartialState(cpu=config.model.device == "cpu" or not torch.cuda.is_available())
        batch_size = sum(job.train.batch_size or distributed.world_size() for job in config.per_job())
        if batch_size < distributed.world_size():
            raise ConfigError(
                f"train.batch_size={batch_size} is fewer examples than the {distributed.world_size()} processes"
            )
    elif config.train.fsdp:
        raise ConfigError("train.fsdp shards the base over processes, and there is one: start it with torchrun")


@contextmanager
def opened_run_folder(config: RunConfig) -> Iterator[RunFolder]:
    """The main process opens and locks it; the others wait until it has."""
    if distributed.rank() == 0:
        with run_folder.open_run_folder(config) as folder:
            distributed.barrier()
            yield folder
    else:
        distributed.barrier()
        path = config.output.folder.expanduser()
        yield RunFolder(path, (path / run_folder.RUN_FILE).is_file(), (path / run_folder.RESULTS_FILE).is_file())


def check_best(prepared: PreparedRun, config: RunConfig, names: Sequence[str] | None = None) -> None:
    """ConfigError if the best checkpoint is chosen by a metric that is not evaluated. names: those that are."""
    settings = {
        "evaluate.best_metric": config.evaluate.best_metric,
        "train.early_stopping_patience": config.train.early_stopping_patience,
    }
    used = [f"{name}={value}" for name, value in settings.items() if value is not None]
    if not used:
        return
    if not any(len(job.validation) for job in prepared.jobs):
        raise ConfigError(f"{used[0]} waits for evaluations, and the validation split is empty")
    names, best = names or metric_names(prepared, config.evaluate), config.evaluate.best_metric
    if best is not None and best not in names:
        raise ConfigError(f"evaluate.best_metric={best} is not evaluated here: {suggest(best, names)}")


def run_signature(prepared: PreparedRun) -> str:
    """What a checkpoint depends on besides the settings, which the folder compares by name."""
    parts: dict[str, Any] = {
        "data": [one.digest for one in prepared.datasets],
        "model": fingerprint(prepared.kit.state, ()).model_dump_json(),
        "dtype": str(prepared.kit.dtype),
        "versions": [__version__, torch.__version__, transformers.__version__, sys.byteorder],
    }
    if prepared.parents:
        parts["from"] = {name: parent.digest for name, parent in prepared.parents.items()}
    if prepared.parts:
        state = prepared.kit.state
        parts["adapters"] = {name: content_digest(state, state[name], keep_encoder=True) for name in prepared.parts}
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def build_trainer(
    prepared: PreparedRun, config: RunConfig, folder: RunFolder, last_checkpoint: Path | None, run_id: str,
    evaluate_fn: EvaluateFn,
) -> tuple[Any, CostEstimate]:  # fmt: skip
    """The trainer, and what it will take: tried now, or as it was before the run was stopped."""
    from kitout.train.loop.trainer import StepDataset

    steps = StepDataset(prepared.jobs)
    first = prepared.first_dataset
    num_tried = 64 if first.preview else SAMPLED_STEPS if first.sampled_of else len(steps)
    planned = [steps[i] for i in range(min(len(steps), num_tried))]
    estimate = find_estimate(prepared.kit, prepared.jobs, planned, len(steps), config, folder, last_checkpoint)
    seconds = max(distributed.all_gather([estimate.seconds]))
    jobs, schedules, fitting_seconds = fit_to_time(prepared.jobs, prepared.schedules, seconds)
    prepared.jobs[:], prepared.schedules[:] = jobs, schedules
    for job, schedule in zip(jobs, schedules, strict=True):
        if job.name not in repeated_adapters(prepared.seeds):
            prepared.warnings.extend(warn_of_few_steps(job.name, schedule))
    if fitting_seconds < seconds:
        share = fitting_seconds / seconds
        estimate = replace(estimate, seconds=estimate.seconds * share, tokens=round(estimate.tokens * share))
    unit = "tokens" if prepared.first_dataset.images is None else "images"
    trainer = new_trainer(prepared.kit, prepared.jobs, config, folder, estimate, run_id, evaluate_fn, unit=unit)
    return trainer, estimate


def find_estimate(
    kit: Kit, jobs: Sequence[Job], planned: Sequence[StepRows], num_steps: int, config: RunConfig, folder: RunFolder,
    last_checkpoint: Path | None,
) -> CostEstimate:  # fmt: skip
    """What num_steps steps will take, by some of them that are tried now; of a resumed run as it was found first."""
    if last_checkpoint is not None and folder.estimate.is_file():
        return CostEstimate(**json.loads(folder.estimate.read_text(encoding="utf-8")))
    train = config.train
    estimate = estimate_cost(kit, jobs, planned, train.micro_batch_size, train.activation_checkpointing)
    if len(planned) < num_steps:
        factor = num_steps / len(planned)
        estimate = replace(estimate, seconds=estimate.seconds * factor, tokens=round(estimate.tokens * factor))
    if distributed.rank() == 0:
        write_text(folder.estimate, json.dumps(estimate.__dict__))
    return estimate


def new_trainer(
    kit: Kit, jobs: Sequence[Job], config: RunConfig, folder: RunFolder, estimate: CostEstimate, run_id: str,
    evaluate_fn: EvaluateFn, *, unit: str = "tokens", step_data: StepData | None = None, max_steps: int | None = None,
) -> Any:  # fmt: skip
    """The loop over these jobs, with its display (a context), early stopping and checkpoints; it ends at max_steps."""
    from transformers import EarlyStoppingCallback

    from kitout.train.loop.trainer import JobTrainer, StepDataset
    from kitout.train.progress import ProgressDisplay

    num_steps = max_steps or len(StepDataset(jobs))
    args = training_arguments(config, folder, num_steps, any(len(job.validation) for job in jobs))
    display = ProgressDisplay(folder.path, unit=unit)
    callbacks: list[Any] = [display]
    if config.train.early_stopping_patience is not None:
        early_stopping: Any = EarlyStoppingCallback(config.train.early_stopping_patience)
        early_stopping.on_train_begin = lambda *_, **__: None  # warns that no best is kept, which JobTrainer does
        callbacks.append(early_stopping)
    trainer = JobTrainer(
        kit,
        jobs,
        folder.checkpoints,
        args,
        run_id=run_id,
        evaluate_fn=evaluate_fn,
        callbacks=callbacks,
        micro_batch_size=min(estimate.micro, config.train.micro_batch_size or estimate.micro),
        num_checkpoints=config.train.keep_checkpoints,
        step_data=step_data,
    )
    trainer.display = display
    return trainer
