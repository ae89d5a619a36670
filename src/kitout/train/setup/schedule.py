"""How long a run is: epochs and batch where the config names neither epochs nor steps, chosen by the data; and
whether the learning rates are such that anything is learned.

A small set seen once is a handful of optimizer steps, after which an adapter is where it began. So it is seen until
its method has the steps that it needs, MAX_EPOCHS times at most, in smaller batches where it is small. What a config
sets is never changed. It knows numbers of examples and settings, no examples and no model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kitout.errors import ConfigError, Errors
from kitout.format import format_duration
from kitout.method import Method
from kitout.train.config.schema import DEFAULT_BATCH_SIZE, RunConfig, TrainConfig
from kitout.train.loop.batch_plan import num_steps
from kitout.train.loop.jobs import Job
from kitout.train.loop.optimizer import REFUSE_ABOVE, check_learning_rate

MAX_EPOCHS = 10
BATCH_SIZES = (DEFAULT_BATCH_SIZE, 8, 4)
FEW_EPOCHS = 5  # a smaller batch is chosen before an example is seen more often than that
MAX_SECONDS = 3600.0  # of a run whose length is chosen here, beyond its first epoch
FEW_STEPS = 50  # fewer are warned of


@dataclass(frozen=True)
class Schedule:
    """How long one job trains, and why."""

    train: TrainConfig
    """Its settings, with batch size and steps."""
    epoch_steps: int | None
    """Optimizer steps of one epoch where the length was chosen here; None: it was set."""
    reason: str
    """In words, for the pre-flight."""

    @property
    def num_steps(self) -> int:
        assert self.train.steps is not None
        return self.train.steps

    @property
    def batch_size(self) -> int:
        assert self.train.batch_size is not None
        return self.train.batch_size


def choose_schedule(num_examples: int | None, train: TrainConfig, method: Method, num_processes: int = 1) -> Schedule:
    """num_examples: of the train split; None: a stream, which has steps. num_processes: each has rows of a batch."""
    if train.steps is not None or train.epochs is not None or num_examples is None:
        batch_size = train.batch_size or DEFAULT_BATCH_SIZE
        steps = train.steps or num_steps(num_examples or 0, batch_size, train.epochs or 1.0)
        setting = "train.epochs" if train.steps is None else "train.steps"
        return _schedule(train, batch_size, steps, None, f"{_text(steps, batch_size, num_examples)}, by {setting}")
    min_steps = method.training_defaults().min_steps
    sizes = [size for size in BATCH_SIZES if size >= num_processes] or [num_processes]
    fitting = [size for size in sizes if size * min_steps <= FEW_EPOCHS * num_examples]
    batch_size = train.batch_size or next(iter(fitting), sizes[-1])
    epochs = min(MAX_EPOCHS, max(1, math.ceil(min_steps * batch_size / num_examples)))
    steps = num_steps(num_examples, batch_size, epochs)
    reason = f"{type(method).__name__} needs about {min_steps} steps or more"
    if steps < min_steps:
        reason += f", and {MAX_EPOCHS} epochs are the most"
    chosen = "epochs" if train.batch_size else "batch and epochs"
    text = f"{_text(steps, batch_size, num_examples)}; {chosen} chosen by the data: {reason}"
    return _schedule(train, batch_size, steps, num_steps(num_examples, batch_size, 1), text)


def _schedule(train: TrainConfig, batch_size: int, steps: int, epoch_steps: int | None, reason: str) -> Schedule:
    return Schedule(train.model_copy(update={"batch_size": batch_size, "steps": steps}), epoch_steps, reason)


def _text(steps: int, batch_size: int, num_examples: int | None) -> str:
    text = f"{steps:,} steps of {batch_size} examples"
    return text if num_examples is None else f"{text}, {steps * batch_size / num_examples:.3g} x {num_examples:,}"


def fit_to_time(
    jobs: Sequence[Job], schedules: Sequence[Schedule], seconds: float
) -> tuple[list[Job], list[Schedule], float]:
    """Jobs whose length was chosen here, cut where all steps take longer than MAX_SECONDS: never below one epoch.

    seconds: estimated, of all jobs; returned as it is after the cut.
    """
    share = min(1.0, MAX_SECONDS / seconds) if seconds > 0 else 1.0
    cut_jobs, cut_schedules = [], []
    for job, schedule in zip(jobs, schedules, strict=True):
        kept = max(schedule.epoch_steps or 0, math.floor(share * len(job.batches)))
        if schedule.epoch_steps is not None and kept < len(job.batches):
            train = schedule.train.model_copy(update={"steps": kept})
            reason = (
                f"{schedule.reason}; cut to {kept:,} steps, since all would take {format_duration(seconds)} "
                "(train.epochs or train.steps sets another length)"
            )
            job = replace(job, batches=job.batches[:kept], settings=train)
            schedule = Schedule(train, schedule.epoch_steps, reason)
        cut_jobs.append(job)
        cut_schedules.append(schedule)
    before, after = (sum(len(rows) for job in some for rows in job.batches) for some in (jobs, cut_jobs))
    return cut_jobs, cut_schedules, seconds * after / max(1, before)


def warn_of_few_steps(name: str, schedule: Schedule) -> list[str]:
    """A warning where a run is too short for most adapters to learn anything."""
    if schedule.num_steps >= FEW_STEPS:
        return []
    is_chosen = schedule.epoch_steps is not None
    more = (
        "add examples, or raise train.epochs" if is_chosen else "leave train.epochs and train.steps out, or raise them"
    )
    steps = f"{name}: {schedule.num_steps} optimizer steps are few"
    return [f"{steps}: below {FEW_STEPS} most adapters have hardly learned; {more}"]


def check_learning_rates(job_configs: Sequence[RunConfig]) -> list[str]:
    """Warnings; ConfigError for rates with which nothing can be trained."""
    errors = Errors(ConfigError, "learning rates")
    warnings = []
    for job in job_configs:
        try:
            warning = None if job.train.lr is None else check_learning_rate(job.method, job.train.lr)
        except ConfigError as error:
            errors.add(f"{job.output.name}: {error}")
            continue
        warnings += [f"{job.output.name}: {warning}"] if warning else []
        head_lr, default = job.train.head_lr, job.method.training_defaults().head_lr
        if head_lr is not None and head_lr >= REFUSE_ABOVE * default:
            errors.add(
                f"{job.output.name}: head_lr={head_lr:g} is {head_lr / default:,.0f} times the default of "
                f"{default:g}: leave it out"
            )
    errors.raise_if_any()
    return warnings
