"""What a finished run draws: PNGs in its folder, charts and thumbnails in its report.

PNGs need matplotlib and are left out without it; the report draws itself. It knows a run and its outcomes, and leaves
the drawing to `evaluate.report`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from kitout.data.answer_statistics import rows_of
from kitout.evaluate.report import adapter_table, class_plots, plots
from kitout.evaluate.report.adapter_table import AdapterRow
from kitout.evaluate.report.charts import Chart
from kitout.evaluate.report.run_charts import lengths_chart, training_charts
from kitout.evaluate.report.thumbnails import PredictedImages
from kitout.train.measure.evaluate import JobOutcome
from kitout.train.metrics_log import read_metrics
from kitout.train.run_folder import RunFolder
from kitout.train.run_summary import sample_image
from kitout.train.setup.prepare import PreparedRun

SHOWN = 12  # test images with their prediction, besides the misclassified ones


def share_data(run: PreparedRun) -> bool:
    """Whether all jobs have the same examples."""
    return len({one.digest for one in run.datasets}) == 1


def report_charts(run: PreparedRun, run_folder: RunFolder) -> list[Chart]:
    """Training, and the lengths of texts."""
    lengths = lengths_chart(_token_counts(run))
    return [*training_charts(read_metrics(run_folder.metrics)), *([lengths] if lengths else [])]


def _token_counts(run: PreparedRun) -> dict[str, list[int]]:
    """Of each split of the first job; empty for images."""
    dataset = run.first_dataset
    if dataset.images is not None:
        return {}
    splits = {"train": dataset.preview or dataset.train, "test": dataset.test}
    return {name: [row.length for item in items for row in rows_of(item)] for name, items in splits.items() if items}


def predicted_images(
    run: PreparedRun, outcomes: Mapping[str, JobOutcome]
) -> tuple[dict[str, PredictedImages], dict[str, PredictedImages]]:
    """Of each classifier of images: test images with what was predicted, and the misclassified ones."""
    first, wrong = {}, {}
    for job, dataset in zip(run.jobs, run.datasets, strict=True):
        outcome = outcomes.get(job.name)
        if outcome is None or dataset.images is None:
            continue
        indices = class_plots.in_turn(dict(enumerate(outcome.references)))
        first[job.name] = _pick(dataset, outcome, indices, SHOWN)
        wrong[job.name] = _pick(
            dataset, outcome, class_plots.misclassified(outcome.predictions, outcome.references), class_plots.SHOWN
        )
    return first, wrong


def _pick(dataset: Any, outcome: JobOutcome, indices: Sequence[int], limit: int) -> PredictedImages:
    names = dataset.label_names
    return PredictedImages(
        [dataset.images.open(outcome.items[i]) for i in indices[:limit]],
        [names[outcome.references[i]] for i in indices[:limit]],
        [names[outcome.predictions[i]] for i in indices[:limit]],
        len(indices),
    )


def write_pngs(
    run: PreparedRun,
    run_folder: RunFolder,
    outcomes: Mapping[str, JobOutcome],
    rows: Sequence[AdapterRow],
    misclassified: Mapping[str, PredictedImages],
    base_name: str,
    pictures: Mapping[str, bytes] | None = None,
) -> None:
    """Training, lengths, the adapters compared if there are several, confusion matrices, misclassified images.

    pictures: of the kind of run, by name; one of the same name is left out for them.
    """
    dataset = run.first_dataset
    if dataset.images is not None and not (image_file := sample_image(run, 0, run_folder)).exists():
        buffer = io.BytesIO()
        dataset.images.open(next(iter(dataset.test or dataset.train))).save(buffer, "PNG")
        plots.write_png(image_file, buffer.getvalue())
    if not plots.has_matplotlib():
        return
    pngs: dict[str, bytes] = {}
    if metrics := read_metrics(run_folder.metrics):
        pngs["training"] = plots.plot_training(metrics)
    if counts := _token_counts(run):
        pngs["lengths"] = plots.plot_lengths(counts)
    if len(rows) > 1 and share_data(run) and adapter_table.comparable(rows):
        pngs["comparison"] = class_plots.comparison(rows, dataset.majority_accuracy, f"adapters of {base_name}")
    for name, outcome in outcomes.items():
        suffix = f"-{name}" if len(run.jobs) > 1 else ""
        if outcome.confusion is not None:
            pngs[f"confusion{suffix}"] = class_plots.confusion(name, outcome.confusion)
        if wrong := misclassified.get(name):
            pngs[f"errors{suffix}"] = class_plots.errors(name, wrong.images, wrong.true, wrong.predicted, wrong.total)
    for name, png in (pngs | dict(pictures or {})).items():
        plots.write_png(run_folder.path / f"{name}.png", png)
