"""What a run leaves: adapters with their cards, results, pictures and a report; then what to type next.

The adapters come first and results.json last: its presence says that the run is through. It knows folders and pages,
and nothing of learning.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from kitout.errors import ConfigError
from kitout.evaluate.compare import Comparison
from kitout.evaluate.report import adapter_table, class_plots, html, model_card, plots
from kitout.evaluate.report.adapter_table import AdapterRow
from kitout.evaluate.report.summary import RunSummary
from kitout.format import format_bytes, format_duration
from kitout.train.closing import closing_text
from kitout.train.config import yaml_file
from kitout.train.config.schema import RunConfig
from kitout.train.loop.trainer import JobTrainer
from kitout.train.measure.evaluate import JobOutcome
from kitout.train.measure.merge_proof import MergeProof
from kitout.train.metrics_log import read_metrics
from kitout.train.preflight.cost_estimate import CostEstimate
from kitout.train.run_folder import RunFolder
from kitout.train.setup import base_model, device
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
    comparisons = {name: one.comparison for name, one in outcomes.items() if one.comparison is not None}
    rows = _method_rows(run, trainer, outcomes)
    figures = _results(run, trainer, estimate, best_step, comparisons)
    figures["adapters"] = [asdict(row) for row in rows]
    figures["predicted"] = {name: list(one.predictions) for name, one in outcomes.items() if one.references}
    figures["true"] = {name: list(one.references) for name, one in outcomes.items() if one.references}
    if proofs:
        figures["merge"] = {name: asdict(proof) for name, proof in proofs.items()}
    folders = adapter_folders(run, run_folder)
    try:
        _write_all(run, config, run_folder, figures, comparisons, folders, outcomes, rows)
    except (OSError, SafetensorError) as wrong:
        raise ConfigError(
            f"{run_folder.path} cannot be written ({wrong}): what was learnt is kept in its checkpoints; "
            "make room, and the same command finishes the run"
        ) from wrong
    if shown := closing_text(figures):
        log(shown)
    for name, found in comparisons.items():
        log(f"{name}: {found.verdict}" if len(comparisons) > 1 else found.verdict)
    if config.jobs and adapter_table.comparable(rows):
        log(f"\n{adapter_table.text(rows, run.first_dataset.majority_accuracy, _share_data(run))}\n")
    log(_closing_text(run, config, run_folder, folders))
    return figures


def _write_all(
    run: PreparedRun, config: RunConfig, run_folder: RunFolder, figures: Mapping[str, Any],
    comparisons: Mapping[str, Comparison], folders: Mapping[str, Path], outcomes: Mapping[str, JobOutcome],
    rows: Sequence[AdapterRow],
) -> None:  # fmt: skip
    for job, folder in folders.items():
        summary = _run_summary(run, config, figures, {k: v for k, v in comparisons.items() if k == job}, {}, job)
        (folder / "README.md").unlink(missing_ok=True)  # of a run that was killed right here
        run.kit.save(job, folder, metadata={"trained by": "kitout train", "base": config.model.name})
        model_card.write_model_card(summary, folder)
    pictures = _plots(run, run_folder)
    whole = _run_summary(run, config, figures, comparisons, pictures, ", ".join(folders))
    table = rows if config.jobs and adapter_table.comparable(rows) else ()
    reached = _result_plots(run, config, run_folder, outcomes, rows)
    whole = replace(whole, adapters=table, majority=run.first_dataset.majority_accuracy, same_test=_share_data(run))
    html.write_html(replace(whole, result_plots=reached), run_folder.report)
    run_folder.write_results(figures)


def adapter_folders(run: PreparedRun, run_folder: RunFolder) -> dict[str, Path]:
    """Where each adapter goes: `adapter` alone, below it by name if there are several."""
    names = [job.name for job in run.jobs]
    return {name: run_folder.adapter if len(names) == 1 else run_folder.adapter / name for name in names}


def _results(
    run: PreparedRun,
    trainer: JobTrainer,
    estimate: CostEstimate,
    best_step: int | None,
    comparisons: Mapping[str, Comparison],
) -> dict[str, Any]:
    kit, work = run.kit, trainer.step_runner
    counts = {job.name: kit.num_parameters(job.name) for job in run.jobs}
    counted = (row for row in reversed(trainer.state.log_history) if "tokens" in row)
    last: dict[str, Any] = next(counted, {})  # of all processes
    tokens = int(last.get("tokens", work.tokens))
    return {
        "objective": run.objective,
        "steps": trainer.state.global_step,
        "best_step": best_step,
        "stopped": trainer.health.diverged,
        "trunk": trainer.cuts,
        "data": {job.name: one.digest for job, one in zip(run.jobs, run.datasets, strict=True)},
        "majority": {job.name: one.majority_accuracy for job, one in zip(run.jobs, run.datasets, strict=True)},
        "trainable": {name: count.trainable for name, count in counts.items()},
        "percent": {name: count.percent for name, count in counts.items()},
        "labels": {
            job.name: list(one.answers.names) for job, one in zip(run.jobs, run.datasets, strict=True) if one.answers
        },
        "seconds": work.seconds,
        "processor_seconds": last.get("processor_seconds", work.processor_seconds),
        "tokens": tokens,
        "tokens_per_second": tokens / max(work.seconds, 1e-9),
        "padding": work.padded / max(1, work.tokens) - 1,
        "micro_batch": work.micro_batch_size,
        "memory": int(max((row["memory"] for row in trainer.state.log_history if "memory" in row), default=0)),
        "estimate": asdict(estimate),
        "machine": device.describe_machine(kit.device) | {"dtype": str(kit.dtype)[6:]},
        "comparisons": {name: [asdict(change) for change in found.changes] for name, found in comparisons.items()},
        "examples": {name: [asdict(one) for one in found.examples] for name, found in comparisons.items()},
    }


def _plots(run: PreparedRun, run_folder: RunFolder) -> dict[str, bytes]:
    """PNGs of the report, which stand in the folder too; none where matplotlib is not installed."""
    if not plots.has_matplotlib():
        return {}
    drawn = {}
    rows = read_metrics(run_folder.metrics)
    if rows:
        drawn["training"] = plots.plot_training(rows)
    if run.first_dataset.images is None:
        parts = {"train": run.first_dataset.preview or run.first_dataset.train, "test": run.first_dataset.test}
        drawn["lengths"] = plots.plot_lengths(
            {name: [i.length for i in items] for name, items in parts.items() if items}
        )
    for name, picture in drawn.items():
        plots.write_png(run_folder.path / f"{name}.png", picture)
    return drawn


def _method_rows(run: PreparedRun, trainer: JobTrainer, outcomes: Mapping[str, JobOutcome]) -> list[AdapterRow]:
    """Every adapter with what it reached and what it took."""
    reached = list(outcomes.values())
    shared = [metric for metric in reached[0].scores if all(metric in one.scores for one in reached)] if reached else []
    rows = []
    for job, (wall, processor) in zip(run.jobs, trainer.step_runner.job_seconds, strict=True):
        one, count = outcomes.get(job.name), run.kit.num_parameters(job.name)
        done = min(trainer.state.global_step, len(job.batches))
        metric = next(iter(shared or one.scores)) if one else ""
        rows.append(AdapterRow(
            job.name, _method_text(run, job.name), metric, one.scores[metric] if one else None, count.trainable,
            count.percent, sum(len(job.batches[step]) for step in range(done)), wall, processor,
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
) -> dict[str, bytes]:
    """PNGs of what the adapters reached: compared if there are several, and which class is taken for which."""
    if not plots.has_matplotlib():
        return {}
    drawn = {}
    if len(rows) > 1 and _share_data(run) and adapter_table.comparable(rows):
        drawn["comparison"] = class_plots.comparison(
            rows, run.first_dataset.majority_accuracy, f"adapters of {config.model.name}"
        )
    for job, held in zip(run.jobs, run.datasets, strict=True):
        one = outcomes.get(job.name)
        if one is None or not one.references or not held.label_names:
            continue
        several = f"-{job.name}" if len(run.jobs) > 1 else ""
        drawn[f"confusion{several}"] = class_plots.confusion(
            job.name, one.predictions, one.references, held.label_names
        )
        if held.images is not None:
            wrong = class_plots.misclassified(one.predictions, one.references)
            shown = wrong[: class_plots.SHOWN]
            said, true = ([held.label_names[whose[i]] for i in shown] for whose in (one.predictions, one.references))
            pictures = [held.images.open(one.items[i]) for i in shown]
            drawn[f"errors{several}"] = class_plots.errors(job.name, pictures, true, said, len(wrong))
    for name, picture in drawn.items():
        plots.write_png(run_folder.path / f"{name}.png", picture)
    return drawn


def _run_summary(
    run: PreparedRun, config: RunConfig, figures: Mapping[str, Any], comparisons: Mapping[str, Comparison],
    plots: Mapping[str, bytes], adapter: str,
) -> RunSummary:  # fmt: skip
    guess = figures["estimate"]
    shown = run.jobs if adapter not in {job.name for job in run.jobs} else [j for j in run.jobs if j.name == adapter]
    methods = {job.name: _method_text(run, job.name) for job in shown}
    data = dict(zip([job.name for job in run.jobs], run.datasets, strict=True))
    told = [line for job in shown for line in data[job.name].reading_notes]
    sources = [s.path for job in config.per_job() if job.output.name in methods for s in job.data.train]
    labels = dict.fromkeys(label for job in shown for label in data[job.name].label_names)
    hashed = figures["data"] if len(shown) == len(run.jobs) else {adapter: figures["data"][adapter]}
    return RunSummary(
        title=f"{', '.join(methods.values())} on {config.model.name}",
        model=config.model.name,
        method="; ".join(methods.values()),
        adapter=adapter,
        comparisons=comparisons,
        data={"sources": ", ".join(dict.fromkeys(sources)), "read as": "; ".join(told)},
        preflight={"objective": run.objective, "number format": f"{figures['machine']['dtype']} ({run.dtype_reason})"},
        estimates={
            "training time": (format_duration(guess["seconds"]), format_duration(figures["seconds"])),
            "peak memory": (format_bytes(guess["memory"]), format_bytes(figures["memory"])),
        },
        cost={
            "training": format_duration(figures["seconds"]),
            "processor time, all threads": format_duration(figures["processor_seconds"]),
            "tokens a second": figures["tokens_per_second"],
            "peak memory": format_bytes(figures["memory"]),
            "trained values": sum(figures["trainable"][job.name] for job in shown),
            "percent of the base": sum(figures["percent"][job.name] for job in shown),
        },
        checked={name: str(MergeProof(**proof)) for name, proof in figures.get("merge", {}).items() if name in methods},
        notes=[*run.warnings, *figures["stopped"].values()],
        config=yaml_file.to_yaml(config.to_dict()),
        plots=plots,
        files={
            "adapter/": "the trained values, with a card",
            "results.json": "every figure",
            "run.yaml": "the settings",
            "metrics.jsonl": "what was logged, step by step",
        },
        data_name=sources[0],
        data_hash=hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest(),
        loader=base_model.AUTO_MODELS[run.objective],
        base_path=base_model.resolve_model(config.model.name),
        from_pretrained_kwargs=run.from_pretrained_kwargs,
        labels=tuple(labels),
        chat=run.first_dataset.is_chat and bool(run.tokenizer.chat_template),
        license=model_card.find_license(Path(base_model.resolve_model(config.model.name))),
        created=f"{datetime.now(timezone.utc):%Y-%m-%d} by kitout {__version__}",
    )


def _method_text(run: PreparedRun, name: str) -> str:
    method = run.kit[name].method
    settings = ", ".join(f"{k}={v}" for k, v in method.non_default_settings().items())
    return f"{type(method).__name__}({settings})" if settings else type(method).__name__


def _closing_text(run: PreparedRun, config: RunConfig, run_folder: RunFolder, folders: Mapping[str, Path]) -> str:
    """Where everything is, and lines that run as they stand."""
    name, folder = next(iter(folders.items()))
    loader = base_model.AUTO_MODELS[run.objective]
    settings = "".join(f", {setting}={value!r}" for setting, value in run.from_pretrained_kwargs.items())
    opened = json.dumps(base_model.resolve_model(config.model.name)) + settings
    worn = json.dumps(name)
    return "\n".join(
        [
            f"report   {run_folder.report}",
            *(f"adapter  {one}" for one in folders.values()),
            "",
            "use it:",
            "  import kitout",
            f"  from transformers import {loader}",
            f"  kit = kitout.attach({loader}.from_pretrained({opened}).eval())",
            f"  kit.load({json.dumps(str(folder))}, name={worn}); kit.use({worn})",
        ]
    )
