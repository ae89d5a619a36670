"""`advise(config)`: the finished runs nearest to a planned one, what they chose and what they gained.

Near is a distance over the model's shape, the task and the number of examples (`distance`). What a run gained it gained
on its own test data, so the list is where to begin and no proof of anything. The model is built without its weights.
It knows the history of runs, and trains nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from kitout.base.find.find import find_sites
from kitout.base.find.on_meta import on_meta
from kitout.errors import ConfigError
from kitout.evaluate.compare import BASE, format_value
from kitout.evaluate.metrics.registry import metric_title
from kitout.format import align_columns, format_duration
from kitout.runtime.count import num_base_parameters
from kitout.train.config.schema import ModelConfig, RunConfig
from kitout.train.measure.run_history import VARIABLE, HistoryRow, ModelShape, history_file, read_rows
from kitout.train.objectives.tasks import Task
from kitout.train.setup.base_model import find_base, load_tokenizer
from kitout.train.setup.lengths import requested_lengths
from kitout.train.setup.prepare import common_task, load_all_datasets, reads_images

MIN_RUNS = 5  # fewer near ones say nothing
MAX_DISTANCE = 6.0  # such as a model 8 times smaller and 8 times fewer examples
MAX_BY_PATH = 4  # values of a setting by role or path that are shown one by one
OTHER_TASK, OTHER_KIND = 4.0, 1.0
COLUMNS = ("distance", "model", "task", "examples", "design", "gain over base", "trainable", "time")


@dataclass(frozen=True)
class PlannedRun:
    """What a run is compared by, before it is run."""

    model: ModelShape
    """Of its base."""
    task: str
    """The objective."""
    examples: int | None
    """How many there are to train on; None of a stream."""


@dataclass(frozen=True)
class PastRun:
    """One design of a finished run; several seeds of it are one."""

    rows: tuple[HistoryRow, ...]
    """By seed."""
    distance: float
    """From the planned run."""

    @property
    def design(self) -> dict[str, Any]:
        """Method, settings that are not its defaults, lr, steps, batch_size."""
        values: dict[str, Any] = json.loads(self.rows[0].design)
        return values

    @property
    def gain(self) -> float | None:
        """The mean over its seeds; None where it was not measured."""
        gains = [row.gain for row in self.rows if row.gain is not None]
        return fmean(gains) if gains else None

    @property
    def gain_text(self) -> str:
        """accuracy +12.1 (9.0 to 15.2)"""
        first, gain = self.rows[0], self.gain
        if any(row.diverged for row in self.rows):
            return "diverged"
        if gain is None:
            return "not measured"

        def text(value: float) -> str:
            return format_value(value, first.is_share, sign=True)

        interval = ""
        if len(self.rows) > 1:
            gains = [row.gain for row in self.rows if row.gain is not None]
            interval = f" ({len(gains)} seeds: {text(min(gains))} to {text(max(gains))})"
        elif first.low is not None and first.high is not None:
            interval = f" ({text(first.low)} to {text(first.high)})"
        other = "" if first.baseline == BASE else f" over {first.baseline}"
        return f"{metric_title(first.metric)} {text(gain)}{interval}{other}"

    @property
    def design_text(self) -> str:
        """LoRA(rank=16), lr 0.001, 300 steps of 16"""
        design = self.design
        settings = ", ".join(f"{name}={_setting_text(value)}" for name, value in design["settings"].items())
        method = f"{design['method']}({settings})" if settings else design["method"]
        return f"{method}, lr {design['lr']:g}, {design['steps']:,} steps of {design['batch_size']}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        rows = [{**asdict(row), "design": None} for row in self.rows]
        for row in rows:
            del row["design"]
        return {"distance": self.distance, "gain": self.gain, "design": self.design, "rows": rows}


@dataclass(frozen=True)
class Advice:
    """The nearest finished runs."""

    planned: PlannedRun
    """What they are near to."""
    nearest: tuple[PastRun, ...]
    """Nearest first; none where too few are near."""
    num_near: int
    """How many are near."""
    num_runs: int
    """How many there are in all."""

    def __str__(self) -> str:
        model, examples = self.planned.model, self.planned.examples
        known = "an unknown number of" if examples is None else f"{examples:,}"
        planned = f"{_model_text(model)}, {self.planned.task}, {known} examples"
        if not self.nearest:
            return (
                f"too few runs like this one ({planned}): {self.num_near} near it, {self.num_runs} in all; "
                f"at least {MIN_RUNS} near ones are needed.\nEvery finished run leaves its row, unless {VARIABLE}=off"
            )
        lines = [f"planned: {planned}", *align_columns([COLUMNS, *map(_cells, self.nearest)])]
        shown = len(self.nearest)
        more = f"; {self.num_near - shown} more are near" if self.num_near > shown else ""
        lines.append(
            f"{shown} nearest of {self.num_runs} runs{more}. Each gained this on its own test data: a place to begin, "
            "no proof that it is best here."
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "nearest": [run.to_dict() for run in self.nearest]}


def advise(config: RunConfig, *, limit: int = 10, log: Callable[[str], None] = lambda _line: None) -> Advice:
    """The finished runs nearest to what a config describes. limit: of the list. log: gets lines of the progress."""
    file = history_file()
    if file is None:
        raise ConfigError(f"{VARIABLE}=off keeps no rows of runs, so there is nothing to look up: unset it")
    rows = read_rows(file)
    return advise_from(rows, plan_of(config, log), limit)


def advise_from(rows: Sequence[HistoryRow], planned: PlannedRun, limit: int) -> Advice:
    """The nearest of these rows; none where fewer than `MIN_RUNS` are near."""
    groups: dict[tuple[object, ...], list[HistoryRow]] = {}
    for row in rows:
        groups.setdefault((row.run, row.design, row.examples), []).append(row)
    runs = [PastRun(tuple(group), distance(planned, group[0])) for group in groups.values()]
    near = [run for run in runs if run.distance <= MAX_DISTANCE]
    near.reverse()  # of equally near ones the newest first
    near.sort(key=lambda run: run.distance)
    return Advice(planned, tuple(near[:limit]) if len(near) >= MIN_RUNS else (), len(near), len(runs))


def distance(planned: PlannedRun, row: HistoryRow) -> float:
    """In doublings: of parameters and of examples, half as much of depth and of width; another task counts as 4 of
    them, another kind of model as 1. An unknown number counts nothing.
    """
    model = planned.model
    return (
        _doublings(model.parameters, row.parameters)
        + (_doublings(model.depth, row.depth) + _doublings(model.width, row.width)) / 2
        + _doublings(planned.examples, row.examples)
        + OTHER_TASK * (planned.task != row.task)
        + OTHER_KIND * (model.kind != row.model_kind)
    )


def _doublings(one: int | None, other: int | None) -> float:
    return abs(math.log2(one / other)) if one and other else 0.0


def plan_of(config: RunConfig, log: Callable[[str], None]) -> PlannedRun:
    """What a config describes: its data are read, of its model only the shape. Of several jobs the first one's data."""
    hf_config = find_base(config, log)
    (job, *_) = config.per_job()
    tokenizer = None if reads_images(config.objective, hf_config) else load_tokenizer(config.model)
    lengths = [] if tokenizer is None else [requested_lengths(job.data, tokenizer)]
    log(f"reading {', '.join(source.path for source in job.data.train)} ...")
    (data,) = load_all_datasets([job], config.objective, hf_config, tokenizer, lengths, log, samples=True)
    task = common_task([job], [data])
    examples = None if data.preview else data.sampled_of or len(data.train)
    return PlannedRun(model_shape(config.model, task, hf_config, len(data.label_names)), task.name, examples)


def model_shape(model: ModelConfig, task: Task, hf_config: Any, num_labels: int) -> ModelShape:
    """Of the model in the class of its task, without its weights."""
    import transformers

    if not task.is_language_model:
        hf_config.num_labels = max(1, num_labels)
    try:
        with on_meta():
            base = getattr(transformers, task.auto_model).from_config(hf_config)
    except Exception as error:  # whatever a model raises on a config it cannot be built from
        raise ConfigError(f"model.name={model.name}: its shape is not found without weights: {error}") from error
    return ModelShape.of(find_sites(base).towers, hf_config, num_base_parameters(base))


def _setting_text(value: Any) -> str:
    """Many ranks by path are shown by their range."""
    if isinstance(value, dict) and len(value) > MAX_BY_PATH:
        return f"{min(value.values()):g} to {max(value.values()):g} by {len(value)} patterns"
    return str(value)


def _model_text(model: ModelShape) -> str:
    kind = f"{model.kind} " if model.kind else ""
    return f"{kind}{model.depth} x {model.width}, {model.parameters / 1e6:,.3g}M"


def _cells(run: PastRun) -> tuple[str, ...]:
    row = run.rows[0]
    return (
        f"{run.distance:.1f}",
        _model_text(ModelShape(row.model_kind, row.depth, row.width, row.parameters)),
        row.task,
        "?" if row.examples is None else f"{row.examples:,}",
        run.design_text,
        run.gain_text,
        f"{row.trainable:,}",
        format_duration(fmean(one.seconds for one in run.rows)),
    )
