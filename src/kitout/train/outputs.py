"""What a run writes: adapters with their cards, results, plots and a report; then what to type next.

The adapters come first, before anything is measured, and results.json last: its presence means that the run is
finished. It knows folders and pages, and nothing of training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from kitout.data.streaming import StreamedItems
from kitout.evaluate.compare import Comparison
from kitout.evaluate.metrics.measure import score_difference
from kitout.evaluate.report import adapter_table, html, model_card
from kitout.evaluate.report.adapter_table import AdapterRow
from kitout.evaluate.report.section import RunDetails
from kitout.evaluate.sets.forgetting import SetChange, forgetting_to_dict
from kitout.evaluate.significance.by_method import MetricByMethod
from kitout.evaluate.significance.power import SmallestDifference, smallest_of_measures
from kitout.runtime.adapter import Adapter
from kitout.train.adapter_folders import adapter_folders, not_written_error
from kitout.train.config.schema import RunConfig
from kitout.train.config.seeds import job_of
from kitout.train.loop.jobs import Job
from kitout.train.loop.trainer import JobTrainer
from kitout.train.measure.evaluate import JobOutcome
from kitout.train.measure.merge_proof import MergeProof
from kitout.train.measure.run_history import record_run
from kitout.train.measure.seed_results import metrics_by_method, write_scores
from kitout.train.preflight.cost_estimate import CostEstimate
from kitout.train.results_text import next_text, results_text
from kitout.train.run_folder import RunFolder
from kitout.train.run_plots import predicted_images, report_charts, share_data, write_pngs
from kitout.train.run_summary import card_summary, method_text, next_steps, run_summary
from kitout.train.setup import device
from kitout.train.setup.prepare import PreparedRun


def write_outputs(
    run: PreparedRun,
    config: RunConfig,
    run_folder: RunFolder,
    trainer: JobTrainer,
    estimate: CostEstimate,
    best_step: int | None,
    outcomes: Mapping[str, JobOutcome],
    proofs: Mapping[str, MergeProof],
    forgetting: Mapping[str, Sequence[SetChange]],
    log: Callable[[str], None],
    source: str,
    details: RunDetails | None = None,
) -> dict[str, Any]:
    """Writes everything and returns what results.json holds. details: of an alignment stage. source: of its rows."""
    comparisons = {name: one.comparison for name, one in outcomes.items()}
    rows = _adapter_rows(run, trainer, outcomes)
    results = _results(run, trainer, estimate, best_step, comparisons)
    results["trunk_choice"] = run_folder.read_resolved().get("trunk", "")
    if (report := trainer.step_runner.compiled.report) is not None:
        results["compiled"] = {"graphs": len(report.graphs), "seconds": report.seconds, "kinds": report.kinds}
        log(f"compiled {report}")
    results["adapters"] = [asdict(row) for row in rows]
    if details is not None:
        results["align"] = {**details.values, "alarms": list(details.alarms)}
        results["sections"] = [section.to_dict() for section in details.sections if section.is_printed]
    by_method = metrics_by_method(run, outcomes)
    if by_method:
        metrics = [asdict(one) for one in by_method]
        results["seeds"] = {"adapters": run.seeds, "metrics": metrics, "text": by_method[0].text}
    smallest = None if run.seeds else _smallest_between(run, rows, outcomes)
    if smallest is not None:
        results["smallest_between_adapters"] = asdict(smallest)
    results["predicted"] = {name: list(one.predictions) for name, one in outcomes.items() if one.references}
    results["probes"] = {name: asdict(one.probe) for name, one in comparisons.items() if one.probe is not None}
    results["per_class"] = {
        name: [asdict(score) for score in one.per_class] for name, one in outcomes.items() if one.per_class
    }
    results["confusion"] = {name: asdict(one.confusion) for name, one in outcomes.items() if one.confusion}
    results["true"] = {name: list(one.references) for name, one in outcomes.items() if one.references}
    if proofs:
        results["merge"] = {name: asdict(proof) for name, proof in proofs.items()}
    if forgetting:
        results["forgetting"] = {name: forgetting_to_dict(changes) for name, changes in forgetting.items()}
    steps = next_steps(run, config, run_folder, run.jobs[0].name)
    results["next"] = {"commands": steps.commands, "python": steps.python_lines}
    folders = adapter_folders(run, run_folder)
    try:
        if outcomes:
            write_scores(run, outcomes, run_folder.scores)
        _write_all(
            run,
            config,
            run_folder,
            results,
            comparisons,
            folders,
            outcomes,
            rows,
            smallest,
            forgetting,
            by_method,
            details,
        )
    except (OSError, SafetensorError) as error:
        raise not_written_error(run_folder, error) from error
    if text := results_text(results):
        log(text)
    for name, comparison in comparisons.items():
        log(f"{name}: {comparison.verdict}" if len(comparisons) > 1 else comparison.verdict)
    if len(run.jobs) > 1 and adapter_table.comparable(rows):
        majority = run.first_dataset.majority_accuracy
        log(f"\n{adapter_table.text(rows, majority, share_data(run), smallest, has_seeds=bool(by_method))}\n")
    log("\n".join([f"report   {run_folder.report}", *(f"adapter  {folder}" for folder in folders.values()), ""]))
    record_run(run, config, results, comparisons, log, source)
    log(next_text(results))
    return results


def _write_all(
    run: PreparedRun, config: RunConfig, run_folder: RunFolder, results: Mapping[str, Any],
    comparisons: Mapping[str, Comparison], folders: Mapping[str, Path], outcomes: Mapping[str, JobOutcome],
    rows: Sequence[AdapterRow], smallest: SmallestDifference | None, forgetting: Mapping[str, Sequence[SetChange]],
    by_method: Sequence[MetricByMethod], details: RunDetails | None,
) -> None:  # fmt: skip
    sections = () if details is None else details.sections
    for job, folder in folders.items():
        own = {name: comparison for name, comparison in comparisons.items() if name == job}
        summary = run_summary(run, config, results, own, job, run_folder)
        summary = replace(
            summary,
            per_class={job: outcomes[job].per_class} if job in outcomes else {},
            by_method=by_method,
            method_name=job_of(run.seeds, job),
            forgetting={name: changes for name, changes in forgetting.items() if name == job},
            sections=sections,
        )
        model_card.write_model_card(card_summary(summary, config), folder)
    first_images, misclassified = predicted_images(run, outcomes)
    pictures = {} if details is None else details.pictures
    write_pngs(run, run_folder, outcomes, rows, misclassified, config.model.name, pictures)
    summary = replace(
        run_summary(run, config, results, comparisons, ", ".join(folders), run_folder),
        adapters=rows,
        majority=run.first_dataset.majority_accuracy,
        same_test=share_data(run),
        smallest=smallest,
        by_method=by_method,
        forgetting=forgetting,
        sections=sections,
        charts=report_charts(run, run_folder),
        per_class={name: one.per_class for name, one in outcomes.items() if one.per_class},
        confusions={name: one.confusion for name, one in outcomes.items() if one.confusion},
        predicted_images=first_images,
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


def _adapter_rows(run: PreparedRun, trainer: JobTrainer, outcomes: Mapping[str, JobOutcome]) -> list[AdapterRow]:
    """Every adapter with its result and its cost. The metric is one that all have, where there is such a one."""
    first, *others = [one.scores for one in outcomes.values()] or [{}]
    shared = [metric for metric in first if all(metric in scores for scores in others)]
    rows = []
    seconds_of = {job.name: spent for job, spent in zip(trainer.jobs, trainer.step_runner.job_seconds, strict=True)}
    for job in run.jobs:
        seconds, processor_seconds = seconds_of[job.name]
        outcome, count = outcomes.get(job.name), run.kit.num_parameters(job.name)
        num_steps = min(trainer.state.global_step, len(job.batches))
        metric = next(iter(shared or outcome.scores)) if outcome else ""
        rows.append(AdapterRow(
            job.name, method_text(run, job.name), metric, outcome.scores[metric] if outcome else None,
            count.trainable, count.percent, sum(map(len, job.batches[:num_steps])), seconds, processor_seconds,
            _training_bytes(run.kit[job.name], trainer.optimizer), _num_tokens(job, num_steps),
        ))  # fmt: skip
    return rows


def _num_tokens(job: Job, num_steps: int) -> int | None:
    """Of the examples of its steps; of a stream, which is read once, they are not known afterwards."""
    if isinstance(job.examples, StreamedItems):
        return None
    rows = (i for batch in job.batches[:num_steps] for i in batch)
    return sum(job.objective.num_tokens(job.examples[i]) for i in rows)


def _smallest_between(
    run: PreparedRun, rows: Sequence[AdapterRow], outcomes: Mapping[str, JobOutcome]
) -> SmallestDifference | None:  # fmt: skip
    """What the test split can show of any two adapters, in their common metric; None where they have none."""
    if len(outcomes) < 2 or not adapter_table.comparable(rows) or not share_data(run):
        return None
    found = []
    for one, other in combinations([outcome.measures[rows[0].metric] for outcome in outcomes.values()], 2):
        _, low, high = score_difference(one, other)
        found.append(smallest_of_measures(one, other, (low, high)))
    return max(found, key=lambda smallest: smallest.value)


def _training_bytes(adapter: Adapter, optimizer: Any) -> int:
    """Parameters, gradients and the optimizer's state."""
    trained = [value for value in adapter.parameters() if value.requires_grad]
    states = [tensor for value in trained for tensor in optimizer.state.get(value, {}).values()]
    tensors = [*trained, *trained, *(tensor for tensor in states if isinstance(tensor, Tensor) and tensor.dim())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
