"""Stages on one base, one after the other: each is a run in a folder of its own, resumed by the same call.

A stage of kind sft is a run of `kitout train`. Others have the same folder, set-up, loop and pages; what is theirs is
the reference that is computed once, the rounds of reinforcement, and what is measured. It knows the order of the work.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kitout.align.config.gym_name import is_gym
from kitout.align.config.schema import AlignConfig, StageRun, with_default_lr
from kitout.align.gym_data import with_gym_data
from kitout.align.measure.pairs import LOSS, measure_answers, validation_metrics
from kitout.align.measure.reward_figures import AUC, PAIR_ACCURACY, RewardFigures
from kitout.align.objectives.kto import KTOObjective, mismatched_rows
from kitout.align.objectives.preference_objective import PreferenceObjective
from kitout.align.pages.reward_pages import reward_picture, reward_section
from kitout.align.pages.stage_section import stage_section
from kitout.align.reference import Unscored, load_start, reference_scores
from kitout.align.reinforce import Reinforcement
from kitout.align.rewards.gym_tasks import open_gym_reward
from kitout.align.rewards.user_function import import_function
from kitout.align.tasks import task_of
from kitout.base import memory
from kitout.errors import ConfigError, Errors, KitoutError, RewardError
from kitout.evaluate.report import plots
from kitout.evaluate.report.section import RunDetails
from kitout.files.part_folders import content_digest
from kitout.train import checkpoints, run_folder
from kitout.train.adapter_folders import save_adapters
from kitout.train.config import conflicts
from kitout.train.config.schema import RunConfig
from kitout.train.loop import distributed, stop_on_signal
from kitout.train.loop.jobs import Job
from kitout.train.measure.evaluate import JobOutcome, check_groups, mean_over_jobs
from kitout.train.measure.forgetting import check_forgetting, measure_forgetting
from kitout.train.measure.merge_proof import check_mergeable, prove_merge
from kitout.train.outputs import write_outputs
from kitout.train.preflight import render
from kitout.train.preflight.collect import collect_pages, collect_statistics
from kitout.train.preflight.cost_estimate import CostEstimate
from kitout.train.run import (
    Result,
    build_trainer,
    check_best,
    join_processes,
    no_log,
    opened_run_folder,
    progress_fn,
    resolve_placement,
    run_signature,
    show_finished,
    train_and_save,
)
from kitout.train.run import run as train_run
from kitout.train.run_folder import RunFolder
from kitout.train.setup.base_model import load_config
from kitout.train.setup.parent import adopt_parents, read_parent
from kitout.train.setup.prepare import PreparedRun, prepare
from kitout.train.start import RESULTS_FILE

LogFn = Callable[[str], None]


def run(config: AlignConfig, *, dry_run: bool = False, log: LogFn = print) -> Result:
    """Trains the stages in order; finished ones are shown and not trained again. The result is the last stage's.

    dry_run: of each stage the pre-flight alone; one that starts from a stage that is not finished is left out.
    """
    check_sources(config)
    result = Result(config.output.folder)
    for number, stage in enumerate(config.stages, 1):
        if len(config.stages) > 1:
            log(f"\nstage {number} of {len(config.stages)}: {stage.name} ({stage.kind})")
        taken = [stage.from_, *(one.source for one in stage.reward)]
        missing = [
            name
            for name in taken
            if name and config.stage(name) and not (config.folder_of(name).expanduser() / RESULTS_FILE).is_file()
        ]
        if dry_run and missing:
            log(f"{stage.name} starts from {', '.join(missing)}, which is not trained yet: its pre-flight comes then")
            continue
        result = run_stage(stage.run_config(config), dry_run=dry_run, log=log)
    return result


def run_stage(config: StageRun, *, dry_run: bool = False, log: LogFn = print) -> Result:
    """One stage."""
    if config.kind == "sft":
        return train_run(config, dry_run=dry_run, log=log, read_data=partial(with_gym_data, with_answers=True))
    config = with_default_lr(adopted(config))
    conflicts.check_machine(config.with_answers_as_batch(), torch.cuda.is_available())
    join_processes(config)
    day = distributed.all_gather([run_folder.first_day(config)])[0]
    config = config.model_copy(update={"data": config.data.model_copy(update={"template_date": day})})
    with stop_on_signal.interrupt_on_sigterm(), opened_run_folder(config) as folder:
        if folder.is_finished:
            return show_finished(folder, log)
        main_log = log if distributed.rank() == 0 else no_log
        check_decoder(config)
        if config.of_kind.takes_reward:
            check_one_process(config)
        given = with_gym_data(config, folder.path)
        prepared = prepare(given, resolve_placement(config, folder), main_log, samples=dry_run, task=task_of(config))
        if config.of_kind.takes_reward:
            work: Any = Reinforcement(config, prepared, folder, main_log)
        else:
            work = OfflineStage(config, prepared, folder, main_log)
        return _run_prepared(work, config, prepared, folder, dry_run, log, main_log)


def _run_prepared(
    work: Any, config: StageRun, prepared: PreparedRun, folder: RunFolder, dry_run: bool, log: LogFn, main_log: LogFn
) -> Result:
    check_best(prepared, config, work.metric_names)
    check_groups(prepared, config.evaluate)
    check_forgetting(prepared, config.evaluate, config.train.seed, main_log)
    if config.evaluate.prove_merge:
        check_mergeable(prepared)
    statistics = collect_statistics(prepared)
    last_checkpoint = next(reversed(checkpoints.list_checkpoints(folder.checkpoints)), None)
    signature = run_signature(prepared)
    work.prepare(signature, dry_run)
    main_log("trying the longest and the usual step, for their time and memory ...")
    trainer, estimate = work.build_trainer(last_checkpoint, signature)
    if distributed.rank() == 0:
        pages = [work.as_page(page) for page in collect_pages(prepared, config, statistics, estimate)]
        for page in pages:
            render.print_page(page)
        render.save_pages(pages, folder.path)
    if dry_run:
        return Result(folder.path)
    memory.reset_peak(prepared.kit.device)
    best_step = train_and_save(
        trainer, last_checkpoint, prepared, partial(save_adapters, prepared, config, folder, log)
    )
    outcomes: dict[str, JobOutcome] = work.measure()
    forgetting = {} if work.is_reward_model else measure_forgetting(
        prepared, config.evaluate, config.train.seed, main_log, lambda name: progress_fn(name, log)
    )  # fmt: skip
    proofs = {}
    if config.evaluate.prove_merge:
        proofs = {job.name: prove_merge(prepared, k, config.evaluate) for k, job in enumerate(prepared.jobs)}
    results: dict[str, Any] = {}
    if distributed.rank() == 0:
        log("writing the report ...")
        results = write_outputs(
            prepared, config, folder, trainer, estimate, best_step, outcomes, proofs, forgetting, log, "align",
            work.details(),
        )  # fmt: skip
    distributed.barrier()
    prepared.kit.detach()
    return Result(folder.path, {name: one.comparison for name, one in outcomes.items()}, results)


class OfflineStage:
    """A stage over answers that are there: reward, dpo, orpo, simpo, kto."""

    def __init__(self, config: StageRun, prepared: PreparedRun, folder: RunFolder, log: LogFn) -> None:
        self.config, self.prepared, self.folder, self.log = config, prepared, folder, log
        self.start = load_start(config, prepared)
        self.figures: RewardFigures | None = None

    @property
    def job(self) -> Job:
        """The first: with several seeds each is a job, on the same data and against the same reference."""
        return self.prepared.jobs[0]

    @property
    def is_reward_model(self) -> bool:
        return not self.config.of_kind.writes_text

    def prepare(self, signature: str, dry_run: bool) -> None:
        """Computes what the reference makes of every answer that steps and their evaluations take, once.

        Of a dry run the steps that are tried do without.
        """
        job, objective = self.job, self.job.objective
        trained = [
            job.examples[i] for i in sorted({i for one in self.prepared.jobs for batch in one.batches for i in batch})
        ]
        measured = list(self.prepared.first_dataset.test)[: self.config.evaluate.max_test_examples]
        rows = [row for item in (*trained, *job.validation, *measured) for row in item.rows]
        if isinstance(objective, KTOObjective):
            longest = self.prepared.lengths[0].text.tokens
            objective.mismatched = mismatched_rows(job.validation, longest) | mismatched_rows(job.examples, longest)
            rows += [objective.mismatched[row] for row in rows if row in objective.mismatched]
        if not (isinstance(objective, PreferenceObjective | KTOObjective) and self.config.has_reference):
            return
        if dry_run:
            objective.reference = Unscored()
        else:
            self.log(f"computing the reference's log-probabilities of {len(set(rows)):,} answers, once ...")
            objective.reference = reference_scores(
                self.prepared.kit, objective.scorer, rows, self.start, self.folder.path,
                reference_key(self.prepared, self.start, signature), progress_fn("the reference", self.log),
            )  # fmt: skip
        for other in (one.objective for one in self.prepared.jobs[1:]):
            assert isinstance(other, PreferenceObjective | KTOObjective), "of one task"
            other.reference = objective.reference
            if isinstance(other, KTOObjective) and isinstance(objective, KTOObjective):
                other.mismatched = objective.mismatched

    def build_trainer(self, last_checkpoint: Path | None, signature: str) -> tuple[Any, CostEstimate]:
        return build_trainer(self.prepared, self.config, self.folder, last_checkpoint, signature, self._validate)

    def as_page(self, page: render.PreflightPage) -> render.PreflightPage:
        """The pre-flight as it is."""
        return page

    @property
    def metric_names(self) -> list[str]:
        """What an evaluation during training reports."""
        return [LOSS, AUC if isinstance(self.job.objective, KTOObjective) else PAIR_ACCURACY]

    def _validate(self) -> dict[str, float]:
        if not len(self.job.validation):
            return {}
        jobs, metrics = self.prepared.jobs, dict[str, float]()
        for job in jobs:
            prefix = "eval_" if len(jobs) == 1 else f"eval_{job.name}/"
            metrics |= {f"{prefix}{name}": value for name, value in validation_metrics(self.prepared, job).items()}
        metrics |= {} if len(jobs) == 1 else mean_over_jobs(metrics)
        memory.reset_peak(self.prepared.kit.device)
        return metrics

    def measure(self) -> dict[str, JobOutcome]:
        test = self.prepared.first_dataset.test
        if not test:
            return {}
        outcomes: dict[str, JobOutcome] = {}
        for job in reversed(self.prepared.jobs):  # the figures shown are those of the first
            progress = progress_fn(job.name, self.log)
            outcomes[job.name], self.figures = measure_answers(
                self.prepared, job, test, self.config.evaluate, self.start, progress
            )
        return {job.name: outcomes[job.name] for job in self.prepared.jobs}

    def details(self) -> RunDetails:
        """What pages and results.json have of this kind of stage."""
        values: dict[str, Any] = {"kind": self.config.kind}
        if self.config.has_reference:
            values["reference"] = self.start or "base"
        stage = stage_section(self.config, values.get("reference"))
        if self.figures is None:
            return RunDetails(values=values, sections=[stage])
        pictures = {"reward": reward_picture(self.figures)} if plots.has_matplotlib() else {}
        values["held_out"] = self.figures.to_dict()
        return RunDetails(values=values, sections=[reward_section(self.figures), stage], pictures=pictures)


def adopted(config: StageRun) -> StageRun:
    """With the method of the adapter that it starts from. ConfigError for one that writes no text."""
    source = config.train.from_
    if source is not None and config.of_kind.writes_text and read_parent(source, "from").has_heads:
        raise ConfigError(
            f"from={source}: the adapter has a head of its own, as a reward model or a classifier, and writes no text; "
            f"{config.kind} trains answers: leave from out, or name an adapter that was trained on answers"
        )
    found = adopt_parents(config)
    assert isinstance(found, StageRun), "adopt_parents copies what it gets"
    return found


def check_sources(config: AlignConfig) -> None:
    """RewardError for tasks of reasoning-gym and reward functions that are not there, of all stages still to come.

    Before the first of them trains: the last would say so after hours. What a module of a later stage reads when it is
    imported may be what a stage before it writes, so a file that is not there yet is left to that stage.
    """
    errors = Errors(RewardError, "the run's config")
    waiting = [one for one in config.stages if not (config.folder_of(one.name).expanduser() / RESULTS_FILE).is_file()]
    texts = [
        text
        for stage in waiting
        for text in (*(source.path for source in stage.data.train), *(one.source for one in stage.reward))
    ]
    functions = {one.source for stage in waiting for one in stage.reward if one.of == "function"}
    of_first = {one.source for stage in waiting[:1] for one in stage.reward}
    for text in dict.fromkeys(texts):
        try:
            if is_gym(text):
                open_gym_reward(text)
            elif text in functions:
                import_function(text)
        except KitoutError as error:
            if text in of_first or not isinstance(error.__cause__, OSError | KitoutError):
                errors.add(str(error).removeprefix("reward "))
    errors.raise_if_any()


def check_one_process(config: StageRun) -> None:
    """ConfigError for several."""
    if distributed.world_size() > 1:
        raise ConfigError(
            f"kind={config.kind}: answers are sampled by one process, found {distributed.world_size()}: start it "
            "without torchrun"
        )


def check_decoder(config: RunConfig) -> None:
    """ConfigError where the base is no decoder."""
    hf_config = load_config(config.model)
    if getattr(hf_config, "is_encoder_decoder", False):
        raise ConfigError(
            f"model.name={config.model.name} is an encoder-decoder, and alignment trains decoders, which continue one "
            "sequence of prompt and answer: choose a decoder, for example model=smollm2-135m"
        )


def reference_key(prepared: PreparedRun, reference: str | None, signature: str) -> str:
    """Of everything that the reference's values depend on: data, base, dtype and adapter."""
    state = prepared.kit.state
    adapter = "" if reference is None else content_digest(state, state[reference], keep_encoder=True)
    return hashlib.sha256(json.dumps([signature, adapter]).encode()).hexdigest()
