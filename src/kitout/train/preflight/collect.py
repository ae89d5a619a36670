"""The pre-flight of a prepared run: what `render` shows of each job before its first step.

It puts statistics, parameter counts and estimates together; how they look is `render`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kitout.data.answer_statistics import label_name, rows_of
from kitout.data.encode.answers import dropped_text
from kitout.data.encode.item import AnyItem, EncodedExample, EncodedPrompt, EncodedUnpaired
from kitout.data.statistics import DataStatistics, compute_statistics, render_spans
from kitout.kit import Kit
from kitout.runtime.left_out import fused_experts_text, left_out_text
from kitout.runtime.show import site_table
from kitout.train.config.schema import RunConfig
from kitout.train.config.seeds import job_of, repeated_adapters
from kitout.train.preflight.cost_estimate import CostEstimate
from kitout.train.preflight.render import PreflightPage
from kitout.train.setup.job_datasets import Datasets
from kitout.train.setup.prepare import PreparedRun

MAX_SKIPPED, MAX_SKIPPED_CHARS = 12, 160  # messages of rows that were left out, all of which results.json holds


def collect_statistics(run: PreparedRun) -> list[DataStatistics]:
    """Statistics of every job's data, over all of it. DataError where nothing can be trained on."""
    return [
        compute_statistics(
            {
                "train": _encoded(dataset, dataset.preview or dataset.train),
                "validation": _encoded(dataset, dataset.validation),
                "test": _encoded(dataset, dataset.test),
            },
            dataset.label_names,
            dataset.answers is not None,
            at_model_limit=bool(run.lengths) and run.lengths[i].at_model_limit,
            num_dropped={split: len(messages) for split, messages in dataset.dropped.items()},
        )
        for i, dataset in enumerate(run.datasets)
    ]


def collect_pages(
    run: PreparedRun, config: RunConfig, statistics: Sequence[DataStatistics], estimate: CostEstimate
) -> list[PreflightPage]:
    """One page per job, whatever its seeds; memory and time are of all of them together."""
    pages = []
    repeated, configs = repeated_adapters(run.seeds), config.per_job()
    shown = [k for k, job in enumerate(run.jobs) if job.name not in repeated]
    for k in shown:
        job, job_config, dataset, is_last = run.jobs[k], configs[k], run.datasets[k], k == shown[-1]
        examples = _encoded(dataset, dataset.preview or dataset.train)
        example = next((item for item in examples if item.num_targets or isinstance(item, EncodedPrompt)), None)
        spans = (
            [render_spans(row, run.tokenizer) if row.input_ids else [] for row in rows_of(example)] if example else []
        )
        pages.append(
            PreflightPage(
                settings=_settings_texts(run, job_config, k, estimate),
                facts=statistics[k],
                example=spans[0] if spans else [],
                rejected=spans[1] if len(spans) > 1 else (),
                answer=_answer_text(dataset, example),
                count=run.kit.num_parameters(job.name),
                sites=site_table(run.kit[job.name].sites),
                left_out=_left_out_lines(run.kit, job.name),
                steps=len(job.batches),
                memory=estimate.memory if is_last else None,
                time=estimate.seconds if is_last else None,
                warnings=[
                    *run.kit[job.name].method.notes(run.kit[job.name].sites),
                    *dataset.warnings,
                    *(run.warnings if is_last else ()),
                ],
            )
        )
    return pages


def _left_out_lines(kit: Kit, name: str) -> list[str]:
    """What the adapter does not reach: sites where it would have no effect, and experts fused into parameters."""
    adapter = kit[name]
    trains_parameters = any(site.port == "param" for site in adapter.sites)
    experts = "" if trains_parameters else fused_experts_text(kit.survey)
    sites = left_out_text(adapter.left_out)
    return [line for line in (sites and f"left out: {sites}", experts) if line]


def _settings_texts(run: PreparedRun, job_config: RunConfig, job_index: int, estimate: CostEstimate) -> dict[str, str]:
    kit, job, dataset = run.kit, run.jobs[job_index], run.datasets[job_index]
    method, train = kit[job.name].method, job_config.train
    lr = method.training_defaults().lr if train.lr is None else train.lr
    settings = ", ".join(f"{k}={v}" for k, v in method.non_default_settings().items())
    has_several_jobs = len(run.jobs) > 1
    schedule = run.schedules[job_index]
    micro_batch = f"{estimate.micro} of all jobs" if has_several_jobs else f"{min(estimate.micro, schedule.batch_size)}"
    made_of = [f"{name} ({run.parts[name].folder})" for name in method.part_names() if name in run.parts]
    name = job_of(run.seeds, job.name)
    seeds = [f"{adapter} (seed {seed})" for adapter, seed in run.seeds.get(name, {}).items()]
    texts = {"job": name} if has_several_jobs else {}
    texts |= {"adapters": ", ".join(seeds)} if seeds else {}
    texts |= {
        "model": f"{job_config.model.name}, {str(kit.dtype)[6:]} ({run.dtype_reason}), {kit.device.type}",
        "method": f"{type(method).__name__}({settings})" if settings else type(method).__name__,
        **({"continues": str(parent.folder)} if (parent := run.parents.get(job.name)) else {}),
        **({"made of": ", ".join(made_of)} if made_of else {}),
        "objective": run.objective,
        "schedule": schedule.reason,
        "batch": f"{schedule.batch_size} examples a step, at most {micro_batch} in one forward; learning rate {lr:g}",
    }
    if run.lengths:
        texts["length"] = run.lengths[job_index].describe(kit.config.is_encoder_decoder)
    if dataset.languages is not None:
        texts["languages"] = f"{dataset.languages.source} to {dataset.languages.target}"
    *reading_notes, split_note = dataset.reading_notes  # of each source, then of the split
    for number, note in enumerate(reading_notes, 1):
        texts[f"data {number}" if number > 1 else "data"] = note
    texts["splits" if reading_notes else "data"] = split_note
    if dataset.skipped:
        texts["left out"] = skipped_text(dataset.skipped)
    if dropped := [message for messages in dataset.dropped.values() for message in messages]:
        texts["dropped"] = dropped_text(dropped)
    if dataset.majority_accuracy and run.objective != "regression":
        texts["majority class"] = (
            f"always giving the majority class gets {100 * dataset.majority_accuracy:.1f} % of the test split right"
        )
    return texts


def skipped_text(messages: Sequence[str]) -> str:
    """How many bad rows were left out, and the first of them."""
    shown = "; ".join(message[:MAX_SKIPPED_CHARS] for message in messages[:MAX_SKIPPED])
    return f"{len(messages):,} bad rows (data.bad_rows=skip): {shown}" + ("; ..." if messages[MAX_SKIPPED:] else "")


def _encoded(dataset: Datasets, items: Sequence[Any]) -> Sequence[AnyItem]:
    """Rows of images as examples with a label and without tokens."""
    if dataset.images is None:
        return items
    return [EncodedExample((), label=int(dataset.images.labels[row]), location=f"image {row}") for row in items]


def _answer_text(dataset: Datasets, item: AnyItem | None) -> str:
    if isinstance(item, EncodedUnpaired):
        return label_name(item)
    if not isinstance(item, EncodedExample) or item.label is None:
        return ""
    if isinstance(item.label, tuple):
        applies = zip(dataset.label_names, item.label, strict=False)
        return ", ".join(name for name, is_set in applies if is_set) or "none"
    return dataset.label_names[int(item.label)] if dataset.label_names else f"{item.label:g}"
