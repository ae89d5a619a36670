"""The pre-flight of a prepared run: what `screen` shows of each job before its first step.

It puts facts, counts and estimates together; how they look is `screen`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kitout.data.encode.item import EncodedExample
from kitout.data.statistics import DataStatistics, compute_statistics, render_spans
from kitout.runtime.show import site_table
from kitout.train.config.schema import RunConfig
from kitout.train.preflight.cost_estimate import CostEstimate
from kitout.train.preflight.render import PreflightPage
from kitout.train.setup.datasets import Datasets
from kitout.train.setup.prepare import PreparedRun


def collect_statistics(run: PreparedRun) -> list[DataStatistics]:
    """Facts of every job's data, over all of it. DataError where nothing can be learnt."""
    return [
        compute_statistics(
            {
                "train": _as_items(one, one.preview or one.train),
                "validation": _as_items(one, one.validation),
                "test": _as_items(one, one.test),
            },
            one.label_names,
            one.answers is not None,
        )
        for one in run.datasets
    ]


def collect_pages(
    run: PreparedRun, config: RunConfig, statistics: Sequence[DataStatistics], estimate: CostEstimate
) -> list[PreflightPage]:
    """One page a job; memory and time are of all of them together."""
    found = []
    for number, (job, own) in enumerate(zip(run.jobs, config.per_job(), strict=True)):
        one = run.datasets[number]
        shown = next((item for item in _as_items(one, one.preview or one.train) if item.num_targets), None)
        last = number == len(run.jobs) - 1
        found.append(
            PreflightPage(
                settings=_settings_texts(run, own, number, estimate),
                facts=statistics[number],
                example=render_spans(shown, run.tokenizer) if shown is not None and shown.input_ids else [],
                answer=_answer_text(one, shown),
                count=run.kit.num_parameters(job.name),
                sites=site_table(run.kit[job.name].sites),
                steps=len(job.batches),
                memory=estimate.memory if last else None,
                time=estimate.seconds if last else None,
                warnings=run.warnings if last else (),
            )
        )
    return found


def _settings_texts(run: PreparedRun, job_config: RunConfig, job_index: int, estimate: CostEstimate) -> dict[str, str]:
    kit, job, one = run.kit, run.jobs[job_index], run.datasets[job_index]
    method = kit[job.name].method
    own_lr = method.training_defaults().lr if job_config.train.lr is None else job_config.train.lr
    settings = ", ".join(f"{k}={v}" for k, v in method.non_default_settings().items())
    several = len(run.jobs) > 1
    forward = f"{estimate.micro} of all jobs" if several else f"{min(estimate.micro, job_config.train.batch_size)}"
    told = {
        "model": f"{job_config.model.name}, {str(kit.dtype)[6:]} ({run.dtype_reason}), {kit.device.type}",
        "method": f"{type(method).__name__}({settings})" if settings else type(method).__name__,
        "objective": run.objective,
        "batch": f"{job_config.train.batch_size} examples a step, at most {forward} in one forward; "
        f"learning rate {own_lr:g}",
    }
    told |= _data_texts(one)
    if one.majority_accuracy and run.objective != "regression":
        told["commonest"] = (
            f"always saying the commonest answer gets {100 * one.majority_accuracy:.1f} % of the test part right"
        )
    return ({"job": job.name} if several else {}) | told


def _data_texts(dataset: Datasets) -> dict[str, str]:
    """How each source was read, then how all of them were parted."""
    *read, parted = dataset.reading_notes
    named = {f"data {i + 1}" if i else "data": line for i, line in enumerate(read)}
    return named | {"parts" if read else "data": parted}


def _as_items(dataset: Datasets, items: Sequence[Any]) -> Sequence[EncodedExample]:
    if dataset.images is None:
        return items
    return [EncodedExample((), label=int(dataset.images.labels[row]), location=f"image {row}") for row in items]


def _answer_text(dataset: Datasets, item: EncodedExample | None) -> str:
    if item is None or item.label is None:
        return ""
    if isinstance(item.label, tuple):
        return ", ".join(name for name, there in zip(dataset.label_names, item.label, strict=False) if there) or "none"
    return dataset.label_names[int(item.label)] if dataset.label_names else f"{item.label:g}"
