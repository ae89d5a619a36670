"""One rung: candidates trained together up to a step, as jobs of one run; then all measured on the validation split.

Batches, order and schedule are those of a whole training, so a candidate that stops here equals its own run stopped at
this step. The same call resumes a rung that was killed, and returns what a finished one has kept. It knows a plan and
designs, and decides nothing.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from kitout.base import memory
from kitout.errors import TrainingDiverged, UnusedSite
from kitout.evaluate.example_scores import AdapterScores, ExampleScores, keep_ratios, load_scores, save_scores
from kitout.files.atomic import write_text
from kitout.search.plan.schema import SearchPlan
from kitout.search.population.carry_over import carry_over, write_job_sizes
from kitout.search.population.design import Design
from kitout.train import checkpoints
from kitout.train.config.schema import JobConfig, RunConfig, TrainConfig
from kitout.train.loop.step import Stopwatch
from kitout.train.loop.trainer import StepDataset
from kitout.train.measure.evaluate import evaluate
from kitout.train.preflight.cost_estimate import CostEstimate, default_micro_batch
from kitout.train.run import new_trainer, run_signature
from kitout.train.run_folder import RESULTS_FILE, SCORES_FILE, RunFolder
from kitout.train.setup.prepare import PreparedRun, prepare

LogFn = Callable[[str], None]
FAILED_FILE = "failed.json"
T = TypeVar("T")


@dataclass(frozen=True)
class Length:
    """How long a whole training is, and what every run of the search shares."""

    steps: int
    """Optimizer steps."""
    batch_size: int
    """Examples of a step."""
    dtype: str
    """Of the base, as `auto` was resolved."""
    template_date: str | None
    """The day that chat templates take for today."""
    seed: int
    """Of the candidates' values and order of examples: none of the confirmation's."""


@dataclass(frozen=True)
class RungResult:
    """What a rung has come to. (The names are keys of its results.json.)"""

    end: int
    """The step up to which its candidates are trained."""
    names: tuple[str, ...]
    """Its candidates, in order."""
    metric: str
    """The goal's."""
    diverged: Mapping[str, str]
    """Candidates that diverged, and the message."""
    seconds: float
    """Of training and measuring together."""
    training_seconds: float
    """Of this rung's steps alone."""
    examples: int
    """Trained on, of all its candidates together."""
    memory: int
    """Peak, in bytes."""
    checkpoint: str
    """Its last one, below the rung's folder."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Candidates that could not be trained at all, as with a site that has no gradient, and the message."""
    scores: Mapping[str, ExampleScores] = field(default_factory=dict)
    """By candidate: the goal's metric over the validation split. Kept beside results.json."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """By candidate: the validation loss."""
    rises: Mapping[str, float] = field(default_factory=dict)
    """By candidate whose forgetting was measured: how much the bits per byte of `wiki` rose."""


def run_config(plan: SearchPlan, length: Length, designs: Sequence[Design], folder: Path) -> RunConfig:
    """The run that trains these designs together, without evaluations on the way."""
    run = plan.run
    train = run.train.model_copy(update={
        "steps": length.steps, "epochs": None, "batch_size": length.batch_size, "seed": length.seed, "lr": None,
        "save_steps": run.train.save_steps or 1, "keep_checkpoints": 1, "early_stopping_patience": None,
    })  # fmt: skip
    return run.model_copy(update={
        "model": run.model.model_copy(update={"dtype": length.dtype}),
        "data": run.data.model_copy(update={"template_date": length.template_date}),
        "train": train,
        "evaluate": run.evaluate.model_copy(update={"steps": 0, "best_metric": None, "forgetting": "none"}),
        "output": run.output.model_copy(update={"folder": folder, "report_to": ()}),
        "jobs": tuple(JobConfig(name=one.name, method=one.method, train=TrainConfig(lr=one.lr)) for one in designs),
    })  # fmt: skip


def train_rung(
    plan: SearchPlan, length: Length, designs: Sequence[Design], folder: Path, end: int,
    before: Mapping[str, Path], log: LogFn, *, choose: Callable[[PreparedRun], Collection[str]] | None = None,
    measure_rises: Callable[[PreparedRun, RungResult], Mapping[str, float]] | None = None,
) -> RungResult:  # fmt: skip
    """Trains these designs from where `before` has them (by name, a checkpoint; empty: from their start) up to `end`.

    One that cannot be trained is left out, and the others begin again: nothing of theirs depends on who is beside them.

    choose: given the kit with all of them attached, the ones that are trained at all (a limit of latency).
    measure_rises: given them trained and measured, what they made the model forget.
    """
    kept = read_rung(folder)
    if kept is not None:
        return kept

    def train(left: Sequence[Design], failed: Mapping[str, str]) -> RungResult:
        return _train_together(plan, length, left, folder, end, before, failed, log, choose, measure_rises)

    return leave_out_failing(designs, folder, log, train)


def leave_out_failing(
    designs: Sequence[Design], folder: Path, log: LogFn, work: Callable[[Sequence[Design], Mapping[str, str]], T]
) -> T:
    """What `work` comes to with the designs that can be trained, and the messages of those that cannot.

    It is begun again without each that fails; UnusedSite where nobody is left.
    """
    failed = read_failed(folder)
    while True:
        left = [one for one in designs if one.name not in failed]
        try:
            return work(left, failed)
        except UnusedSite as error:
            found = [one.name for one in left if one.name in error.names]
            if not found or len(found) == len(left):
                raise
            log(f"{', '.join(found)} cannot be trained: {error}; the others begin this rung again without it")
            failed |= dict.fromkeys(found, str(error))
            if folder.is_dir():
                shutil.rmtree(folder)
            write_failed(folder, failed)


def read_failed(folder: Path) -> dict[str, str]:
    """By name of a design that a rung could not train: the message."""
    file = folder / FAILED_FILE
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def write_failed(folder: Path, failed: Mapping[str, str]) -> None:
    """Keeps them, so that the rung does not try them again."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / FAILED_FILE, json.dumps(failed, indent=1) + "\n")


def _train_together(
    plan: SearchPlan, length: Length, designs: Sequence[Design], folder: Path, end: int, before: Mapping[str, Path],
    failed: Mapping[str, str], log: LogFn, choose: Callable[[PreparedRun], Collection[str]] | None,
    measure_rises: Callable[[PreparedRun, RungResult], Mapping[str, float]] | None,
) -> RungResult:  # fmt: skip
    watch = Stopwatch()
    memory.release()  # of the rung before: its base is not kept beside this one's
    config = run_config(plan, length, designs, folder)
    prepared = prepare(config, log=log)
    try:
        if choose is not None:
            _keep_only(prepared, choose(prepared))
        trainer = _build_trainer(prepared, config, RunFolder(folder, True, False), end, before)
        memory.reset_peak(prepared.kit.device)
        last = next(reversed(checkpoints.list_checkpoints(folder / "checkpoints")), None)
        try:
            with trainer.display:
                trainer.train(str(last) if last else None)
        except TrainingDiverged:
            if len(trainer.health.diverged) < len(prepared.jobs):
                raise
            log("every design of this rung has diverged")
        metric, scores, losses = measure_candidates(prepared, plan, log)
        steps = end - min((checkpoints.step_of(path) for path in before.values()), default=0)
        peak = int(max((row["memory"] for row in trainer.state.log_history if "memory" in row), default=0))
        seconds, _ = watch.elapsed()
        spent_before = max((checkpoints.read_progress(path)["seconds"] for path in before.values()), default=0.0)
        training_seconds = max(0.0, trainer.step_runner.seconds - spent_before)  # which counts the rungs before as well
        result = RungResult(
            end, tuple(scores), metric, diverged(trainer.health.diverged, metric, scores), seconds, training_seconds,
            steps * length.batch_size * len(scores), peak, f"checkpoints/{checkpoints.PREFIX}{end}", failed, scores,
            losses,
        )  # fmt: skip
        if measure_rises is not None:
            result = replace(result, rises=measure_rises(prepared, result))
        _write_rung(folder, result)
    finally:
        prepared.kit.detach()
    return result


def measure_candidates(
    run: PreparedRun, plan: SearchPlan, log: LogFn
) -> tuple[str, dict[str, ExampleScores], dict[str, float]]:
    """The goal's metric, and of every candidate its values by example and its loss, on the validation split."""
    metric, scores, losses = plan.goal.metric, {}, {}
    how: dict[str, Any] = {
        "num_generated": plan.run.evaluate.generate_examples, "max_new_tokens": plan.run.evaluate.max_new_tokens,
    }  # fmt: skip
    for number, job in enumerate(run.jobs, 1):
        examples = list(job.validation)
        log(f"measuring {job.name} on {len(examples):,} examples ({number} of {len(run.jobs)}) ...")
        measures, predictions = evaluate(run, job, examples, job.name, **how)
        metric = metric or next(iter(measures))
        scores[job.name], losses[job.name] = keep_ratios(measures)[metric], predictions.mean_loss
    assert metric is not None, "a rung has candidates"
    return metric, scores, losses


def diverged(in_training: Mapping[str, str], metric: str, scores: Mapping[str, ExampleScores]) -> dict[str, str]:
    """By candidate why it diverged: in training, or seen by a metric that is not finite."""
    values = {name: one.measure.value for name, one in scores.items()}
    return {
        **{name: f"its {metric} is {value}" for name, value in values.items() if not math.isfinite(value)},
        **in_training,
    }


def _keep_only(run: PreparedRun, names: Collection[str]) -> None:
    """Removes the other candidates."""
    for place in reversed(range(len(run.jobs))):
        if run.jobs[place].name not in names:
            run.kit.remove(run.jobs[place].name)
            del run.jobs[place], run.datasets[place], run.schedules[place]


def _build_trainer(
    prepared: PreparedRun, config: RunConfig, folder: RunFolder, end: int, before: Mapping[str, Path]
) -> Any:
    """The loop up to the step `end`, from the checkpoints of the rungs before."""
    steps = StepDataset(prepared.jobs)
    largest = max((steps[i] for i in range(end)), key=lambda rows: _tokens(prepared, rows))
    micro = config.train.micro_batch_size or default_micro_batch(prepared.kit.device, prepared.jobs, largest)
    run_id = run_signature(prepared)
    (folder.path / "checkpoints").mkdir(parents=True, exist_ok=True)
    if before and not checkpoints.list_checkpoints(folder.checkpoints):
        carry_over({job.name: before[job.name] for job in prepared.jobs}, folder.checkpoints, run_id)
    estimate = CostEstimate(0.0, 0, 0, micro, 0, 0.0)
    unit = "tokens" if prepared.first_dataset.images is None else "images"
    trainer = new_trainer(prepared.kit, prepared.jobs, config, folder, estimate, run_id, dict, unit=unit, max_steps=end)
    write_job_sizes(folder.checkpoints, prepared.jobs, [prepared.kit[job.name] for job in prepared.jobs])
    return trainer


def _tokens(prepared: PreparedRun, rows: Sequence[tuple[int, int]]) -> int:
    return sum(prepared.jobs[j].objective.num_tokens(prepared.jobs[j].examples[i]) for j, i in rows)


def _write_rung(folder: Path, result: RungResult) -> None:
    """results.json last: its presence means that the rung is finished."""
    save_scores(
        folder / SCORES_FILE,
        {name: AdapterScores("validation", "", {result.metric: one}) for name, one in result.scores.items()},
    )
    plain = {name: value for name, value in asdict(result).items() if name != "scores"}
    write_text(folder / RESULTS_FILE, json.dumps(plain, indent=1) + "\n")


def read_rung(folder: Path) -> RungResult | None:
    """What a finished rung has kept; None of one that is not finished."""
    file = folder / RESULTS_FILE
    if not file.is_file():
        return None
    plain = json.loads(file.read_text(encoding="utf-8"))
    scores = load_scores(folder / SCORES_FILE)
    plain |= {"names": tuple(plain["names"])}
    return RungResult(**plain, scores={name: scores[name].tuned[plain["metric"]] for name in plain["names"]})
