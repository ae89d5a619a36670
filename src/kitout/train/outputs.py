"""What a run writes: adapters with their cards, results, plots and a report; then what to type next.

The adapters come first, before anything is measured, and results.json last: its presence means that the run is
finished. It knows folders and pages, and nothing of training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from kitout.evaluate.compare import Comparison
from kitout.evaluate.report import adapter_table, class_plots, html, model_card, plots
from kitout.evaluate.report.adapter_table import AdapterRow
from kitout.evaluate.report.summary import RunSummary
from kitout.evaluate.report.thumbnails import Misclassified
from kitout.format import format_bytes, format_duration
from kitout.train.adapter_folders import adapter_folders, data_hash, not_written_error
from kitout.train.config import yaml_file
from kitout.train.config.schema import RunConfig
from kitout.train.loop.trainer import JobTrainer
from kitout.train.measure.evaluate import JobOutcome
from kitout.train.measure.merge_proof import MergeProof
from kitout.train.metrics_log import read_metrics
from kitout.train.objectives.tasks import TASKS
from kitout.train.preflight.collect import skipped_text
from kitout.train.preflight.cost_estimate import CostEstimate
from kitout.train.results_text import results_text
from kitout.train.run_folder import RunFolder
from kitout.train.setup import device
from kitout.train.setup.find_inputs import resolve_model
from kitout.train.setup.prepare import PreparedRun
from kitout.version import __version__


def write_outputs(
    run: PreparedRun,
    config: RunConfig,
    run_folder: RunFolder,
    trainer: JobTrainer,
    estimate: CostEstimate,
    best_step: int | None,
    outcomes: Mapping[str, JobOutcome],
    proofs: Mapping[str, MergeProof],
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Writes everything and returns what results.json holds."""
    comparisons = {name: one.comparison for name, one in outcomes.items()}
    rows = _adapter_rows(run, trainer, outcomes)
    results = _results(run, trainer, estimate, best_step, comparisons)
    results["adapters"] = [asdict(row) for row in rows]
    results["predicted"] = {name: list(one.predictions) for name, one in outcomes.items() if one.references}
    results["probes"] = {name: asdict(one.probe) for name, one in comparisons.items() if one.probe is not None}
    results["per_class"] = {
        name: [asdict(score) for score in one.per_class] for name, one in outcomes.items() if one.per_class
    }
    results["true"] = {name: list(one.references) for name, one in outcomes.items() if one.references}
    if proofs:
        results["merge"] = {name: asdict(proof) for name, proof in proofs.items()}
    folders = adapter_folders(run, run_folder)
    try:
        _write_all(run, config, run_folder, results, comparisons, folders, outcomes, rows)
    except (OSError, SafetensorError) as error:
        raise not_written_error(run_folder, error) from error
    if text := results_text(results):
        log(text)
    for name, comparison in comparisons.items():
        log(f"{name}: {comparison.verdict}" if len(comparisons) > 1 else comparison.verdict)
    if config.jobs and adapter_table.comparable(rows):
        log(f"\n{adapter_table.text(rows, run.first_dataset.majority_accuracy, _share_data(run))}\n")
    log(_usage_text(run, config, run_folder, folders))
    return results


def _write_all(
    run: PreparedRun, config: RunConfig, run_folder: RunFolder, results: Mapping[str, Any],
    comparisons: Mapping[str, Comparison], folders: Mapping[str, Path], outcomes: Mapping[str, JobOutcome],
    rows: Sequence[AdapterRow],
) -> None:  # fmt: skip
    for job, folder in folders.items():
        own = {name: comparison for name, comparison in comparisons.items() if name == job}
        summary = _run_summary(run, config, results, own, {}, job)
        summary = replace(summary, per_class={job: outcomes[job].per_class} if job in outcomes else {})
        model_card.write_model_card(summary, folder)
    misclassified = _misclassified(run, outcomes)
    summary = replace(
        _run_summary(run, config, results, comparisons, _training_plots(run, run_folder), ", ".join(folders)),
        adapters=rows if config.jobs and adapter_table.comparable(rows) else (),
        majority=run.first_dataset.majority_accuracy,
        same_test=_share_data(run),
        result_plots=_result_plots(run, config, run_folder, outcomes, rows, misclassified),
        per_class={name: one.per_class for name, one in outcomes.items() if one.per_class},
        misclassified=misclassified,
    )
    html.write_html(summary, run_folder.report)
    run_folder.write_results(results)


def _results(
    run: PreparedRun,
    trainer: JobTrainer,
    estimate: CostEstimate,
    best_step: int | None,
    comparisons: Mapping[str, Comparison],
) -> dict[str, Any]:
    kit, runner = run.kit, trainer.step_runner
    counts = {job.name: kit.num_parameters(job.name) for job in run.jobs}
    history = trainer.state.log_history
    last: dict[str, Any] = next((row for row in reversed(history) if "tokens" in row), {})  # of all processes
    tokens = int(last.get("tokens", runner.tokens))
    unit = "tokens" if run.first_dataset.images is None else "images"
    return {
        "objective": run.objective,
        "steps": trainer.state.global_step,
        "best_step": best_step,
        "stopped": trainer.health.diverged,
        "trunk": trainer.cuts,
        "data": {job.name: one.digest for job, one in zip(run.jobs, run.datasets, strict=True)},
        "test_data": {job.name: one.test_digest for job, one in zip(run.jobs, run.datasets, strict=True)},
        "skipped": {
            job.name: list(one.skipped) for job, one in zip(run.jobs, run.datasets, strict=True) if one.skipped
        },
        "majority": {job.name: one.majority_accuracy for job, one in zip(run.jobs, run.datasets, strict=True)},
        "trainable": {name: count.trainable for name, count in counts.items()},
        "percent": {name: count.percent for name, count in counts.items()},
        "labels": {
            job.name: list(one.answers.names) for job, one in zip(run.jobs, run.datasets, strict=True) if one.answers
        },
        "seconds": runner.seconds,
        "processor_seconds": last.get("processor_seconds", runner.processor_seconds),
        unit: tokens,
        f"{unit}_per_second": tokens / max(runner.seconds, 1e-9),
        "padding": runner.padded / max(1, runner.tokens) - 1,
        "micro_batch": runner.micro_batch_size,
        "memory": int(max((row["memory"] for row in history if "memory" in row), default=0)),
        "estimate": asdict(estimate),
        "machine": device.describe_machine(kit.device) | {"dtype": str(kit.dtype)[6:]},
        "comparisons": {name: [asdict(change) for change in one.changes] for name, one in comparisons.items()},
        "examples": {name: [asdict(example) for example in one.examples] for name, one in comparisons.items()},
    }


def _training_plots(run: PreparedRun, run_folder: RunFolder) -> dict[str, bytes]:
    """PNGs of the report, saved in the folder too; none where matplotlib is not installed."""
    if not plots.has_matplotlib():
        return {}
    pngs = {}
    rows = read_metrics(run_folder.metrics)
    if rows:
        pngs["training"] = plots.plot_training(rows)
    if run.first_dataset.images is None:
        splits = {"train": run.first_dataset.preview or run.first_dataset.train, "test": run.first_dataset.test}
        pngs["lengths"] = plots.plot_lengths(
            {name: [item.length for item in items] for name, items in splits.items() if items}
        )
    for name, png in pngs.items():
        plots.write_png(run_folder.path / f"{name}.png", png)
    return pngs


def _adapter_rows(run: PreparedRun, trainer: JobTrainer, outcomes: Mapping[str, JobOutcome]) -> list[AdapterRow]:
    """Every adapter with its result and its cost. The metric is one that all have, where there is such a one."""
    first, *others = [one.scores for one in outcomes.values()] or [{}]
    shared = [metric for metric in first if all(metric in scores for scores in others)]
    rows = []
    for job, (seconds, processor_seconds) in zip(run.jobs, trainer.step_runner.job_seconds, strict=True):
        outcome, count = outcomes.get(job.name), run.kit.num_parameters(job.name)
        num_steps = min(trainer.state.global_step, len(job.batches))
        metric = next(iter(shared or outcome.scores)) if outcome else ""
        rows.append(AdapterRow(
            job.name, _method_text(run, job.name), metric, outcome.scores[metric] if outcome else None,
            count.trainable, count.percent, sum(map(len, job.batches[:num_steps])), seconds, processor_seconds,
        ))  # fmt: skip
    return rows


def _share_data(run: PreparedRun) -> bool:
    return len({one.digest for one in run.datasets}) == 1


def _result_plots(
    run: PreparedRun,
    config: RunConfig,
    run_folder: RunFolder,
    outcomes: Mapping[str, JobOutcome],
    rows: Sequence[AdapterRow],
    misclassified: Mapping[str, Misclassified],
) -> dict[str, bytes]:
    """PNGs of the results: the adapters compared if there are several, and each one's confusion matrix."""
    if not plots.has_matplotlib():
        return {}
    pngs = {}
    if len(rows) > 1 and _share_data(run) and adapter_table.comparable(rows):
        pngs["comparison"] = class_plots.comparison(
            rows, run.first_dataset.majority_accuracy, f"adapters of {config.model.name}"
        )
    for job, dataset in zip(run.jobs, run.datasets, strict=True):
        outcome, names = outcomes.get(job.name), dataset.label_names
        if outcome is None or not outcome.references or not names:
            continue
        suffix = f"-{job.name}" if len(run.jobs) > 1 else ""
        pngs[f"confusion{suffix}"] = class_plots.confusion(job.name, outcome.predictions, outcome.references, names)
        if wrong := misclassified.get(job.name):
            errors = class_plots.errors(job.name, wrong.images, wrong.true, wrong.predicted, wrong.total)
            plots.write_png(run_folder.path / f"errors{suffix}.png", errors)  # the report has thumbnails
    for name, png in pngs.items():
        plots.write_png(run_folder.path / f"{name}.png", png)
    return pngs


def _misclassified(run: PreparedRun, outcomes: Mapping[str, JobOutcome]) -> dict[str, Misclassified]:
    """Of each classifier of images."""
    found = {}
    for job, dataset in zip(run.jobs, run.datasets, strict=True):
        outcome, names = outcomes.get(job.name), dataset.label_names
        if outcome is None or dataset.images is None:
            continue
        wrong = class_plots.misclassified(outcome.predictions, outcome.references)
        shown = wrong[: class_plots.SHOWN]
        found[job.name] = Misclassified(
            [dataset.images.open(outcome.items[i]) for i in shown],
            [names[outcome.references[i]] for i in shown],
            [names[outcome.predictions[i]] for i in shown],
            len(wrong),
        )
    return found


def _run_summary(
    run: PreparedRun, config: RunConfig, results: Mapping[str, Any], comparisons: Mapping[str, Comparison],
    plots: Mapping[str, bytes], adapter: str,
) -> RunSummary:  # fmt: skip
    """adapter: the name of one, or several names in words for all of them."""
    estimate, unit = results["estimate"], "images" if "images_per_second" in results else "tokens"
    jobs = [job for job in run.jobs if job.name == adapter] or run.jobs
    methods = {job.name: _method_text(run, job.name) for job in jobs}
    datasets = [dataset for job, dataset in zip(run.jobs, run.datasets, strict=True) if job.name in methods]
    reading_notes = [note for dataset in datasets for note in dataset.reading_notes]
    sources = [s.path for job in config.per_job() if job.output.name in methods for s in job.data.train]
    languages = datasets[0].languages
    skipped = [message for name in methods for message in results["skipped"].get(name, ())]
    labels = dict.fromkeys(label for dataset in datasets for label in dataset.label_names)
    digests = results["data"] if len(jobs) == len(run.jobs) else {adapter: results["data"][adapter]}
    continued = {
        f"{'' if len(jobs) == 1 else f'{job.name}: '}{what}": value
        for job in jobs
        if (parent := run.parents.get(job.name))
        for what, value in (
            ("continues the adapter", f"{parent.folder} (sha256 {parent.digest})"),
            ("sha256 of its examples", parent.data_digest),
        )
    }
    return RunSummary(
        title=f"{', '.join(methods.values())} on {config.model.name}",
        model=config.model.name,
        method="; ".join(methods.values()),
        adapter=adapter,
        comparisons=comparisons,
        data={"sources": ", ".join(dict.fromkeys(sources)), "read as": "; ".join(reading_notes), **continued}
        | ({"left out": skipped_text(list(dict.fromkeys(skipped)))} if skipped else {}),
        preflight={"objective": run.objective, "dtype": f"{results['machine']['dtype']} ({run.dtype_reason})"},
        estimates={
            "training time": (format_duration(estimate["seconds"]), format_duration(results["seconds"])),
            "peak memory": (format_bytes(estimate["memory"]), format_bytes(results["memory"])),
        },
        cost={
            "training": format_duration(results["seconds"]),
            "processor time, all threads": format_duration(results["processor_seconds"]),
            f"{unit} per second": results[f"{unit}_per_second"],
            "peak memory": format_bytes(results["memory"]),
            "trainable parameters": sum(results["trainable"][job.name] for job in jobs),
            "% trainable": sum(results["percent"][job.name] for job in jobs),
        },
        checked={name: str(MergeProof(**proof)) for name, proof in results.get("merge", {}).items() if name in methods},
        notes=[*run.warnings, *results["stopped"].values()],
        config=yaml_file.to_yaml(config.to_dict()),
        plots=plots,
        files={
            "adapter/": "the adapter, with its model card",
            "results.json": "every metric",
            "run.yaml": "the settings",
            "metrics.jsonl": "what was logged, step by step",
        },
        data_name=sources[0],
        data_hash=data_hash(digests),
        loader=TASKS[run.objective].auto_model,
        hub_task=TASKS[run.objective].hub_task,
        base_path=resolve_model(config.model.name),
        from_pretrained_kwargs=run.from_pretrained_kwargs,
        tokenizer_kwargs={"src_lang": languages.source, "tgt_lang": languages.target} if languages else {},
        generate_kwargs=dict(languages.generation_settings) if languages else {},
        labels=tuple(labels),
        chat=run.first_dataset.is_chat and bool(run.tokenizer.chat_template),
        license=model_card.find_license(Path(resolve_model(config.model.name))),
        created=f"{datetime.now(timezone.utc):%Y-%m-%d} by kitout {__version__}",
    )


def _method_text(run: PreparedRun, name: str) -> str:
    method = run.kit[name].method
    settings = ", ".join(f"{k}={v}" for k, v in method.non_default_settings().items())
    return f"{type(method).__name__}({settings})" if settings else type(method).__name__


def _usage_text(run: PreparedRun, config: RunConfig, run_folder: RunFolder, folders: Mapping[str, Path]) -> str:
    """Where everything is, and lines that run as they stand."""
    name, folder = next(iter(folders.items()))
    loader = TASKS[run.objective].auto_model
    settings = "".join(f", {setting}={value!r}" for setting, value in run.from_pretrained_kwargs.items())
    model = json.dumps(resolve_model(config.model.name)) + settings
    adapter = json.dumps(name)
    return "\n".join(
        [
            f"report   {run_folder.report}",
            *(f"adapter  {one}" for one in folders.values()),
            "",
            "use it:",
            "  import kitout",
            f"  from transformers import {loader}",
            f"  kit = kitout.attach({loader}.from_pretrained({model}).eval())",
            f"  kit.load({json.dumps(str(folder))}, name={adapter}); kit.use({adapter})",
        ]
    )
