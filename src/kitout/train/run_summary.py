"""What a run's pages show, as values: made from the prepared run, its results and its folders.

The report shows all adapters of a run, a card one of them, without paths of this machine; what one types next is the
same in both and on the terminal. It knows a run and its folders, and draws nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from kitout.evaluate.compare import Comparison
from kitout.evaluate.report import model_card
from kitout.evaluate.report.next_steps import NextSteps
from kitout.evaluate.report.summary import RunSummary
from kitout.files.peft.write_tensors import why_not_in_vllm
from kitout.format import format_bytes, format_duration
from kitout.train.adapter_folders import adapter_folders, data_hash
from kitout.train.config import yaml_file
from kitout.train.config.schema import RunConfig
from kitout.train.measure.merge_proof import MergeProof
from kitout.train.objectives.tasks import REWARD
from kitout.train.portable_texts import portable_summary
from kitout.train.preflight.collect import skipped_text
from kitout.train.run_folder import RunFolder
from kitout.train.setup.find_inputs import resolve_model
from kitout.train.setup.prepare import PreparedRun
from kitout.train.setup.sample_input import sample_answer, sample_input
from kitout.train.usage import base_record
from kitout.version import __version__

SAMPLE_IMAGE = "sample.png"  # a test image in the run's folder, where the data have no file of it


def run_summary(
    run: PreparedRun, config: RunConfig, results: Mapping[str, Any], comparisons: Mapping[str, Comparison],
    adapter: str, run_folder: RunFolder,
) -> RunSummary:  # fmt: skip
    """adapter: the name of one, or several names in words for all of them."""
    estimate, unit = results["estimate"], "images" if "images_per_second" in results else "tokens"
    jobs = [job for job in run.jobs if job.name == adapter] or run.jobs
    methods = {job.name: method_text(run, job.name) for job in jobs}
    datasets = [dataset for job, dataset in zip(run.jobs, run.datasets, strict=True) if job.name in methods]
    reading_notes = dict.fromkeys(note for dataset in datasets for note in dataset.reading_notes)
    sources = [s.path for job in config.per_job() if job.output.name in methods for s in job.data.train]
    skipped = [message for name in methods for message in results["skipped"].get(name, ())]
    labels = dict.fromkeys(label for dataset in datasets for label in dataset.label_names)
    digests = results["data"] if len(jobs) == len(run.jobs) else {adapter: results["data"][adapter]}
    continued = {
        f"{'' if len(jobs) == 1 else f'{job.name}: '}{what}": value
        for job in jobs
        if (parent := run.parents.get(job.name))
        for what, value in (
            ("continues the adapter", f"{parent.portable_name} (sha256 {parent.digest})"),
            ("sha256 of its examples", parent.data_digest),
        )
    }
    continued |= {
        f"made of {name}": f"{run.parts[name].portable_name} (sha256 {run.parts[name].digest})"
        for job in jobs
        for name in run.kit[job.name].method.part_names()
        if name in run.parts
    }
    base = base_record(run, config.model)
    return RunSummary(
        title=f"{', '.join(dict.fromkeys(methods.values()))} on {config.model.name}",
        model=config.model.name,
        method="; ".join(dict.fromkeys(methods.values())),
        adapter=adapter,
        next_steps={job.name: next_steps(run, config, run_folder, job.name) for job in jobs},
        servers=() if run.tokenizer is None else _server_notes(run, jobs[0].name),
        comparisons=comparisons,
        data={
            "sources": ", ".join(dict.fromkeys(sources)),
            "read as": "; ".join(reading_notes),
            **continued,
        }
        | ({"left out": skipped_text(list(dict.fromkeys(skipped)))} if skipped else {}),
        preflight={"objective": run.objective, "dtype": f"{results['machine']['dtype']} ({run.dtype_reason})"}
        | ({"frozen trunk": results["trunk_choice"]} if results.get("trunk_choice") else {}),
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
        notes=[*run.warnings, *results["stopped"].values(), *results.get("align", {}).get("alarms", ())],
        config=yaml_file.to_yaml(config.to_dict()),
        files={
            "adapter/": "the adapter, with its model card",
            "results.json": "every metric",
            **({"scores.safetensors": "what the metrics are made of, example by example"} if comparisons else {}),
            "run.yaml": "the settings",
            "metrics.jsonl": "what was logged, step by step",
        },
        data_name=sources[0],
        data_hash=data_hash(digests),
        hub_name=base.name if base.source == "hub" else "",
        hub_task=run.task.hub_task,
        labels=tuple(labels),
        license=model_card.find_license(Path(resolve_model(config.model.name))),
        created=f"{datetime.now(timezone.utc):%Y-%m-%d} by kitout {__version__}",
    )


def card_summary(summary: RunSummary, config: RunConfig) -> RunSummary:
    """The same for the card in an adapter's folder, which travels: no path of this machine is in it."""
    is_local = Path(config.model.name).expanduser().exists()
    steps = {name: one.on_any_machine("BASE" if is_local else "") for name, one in summary.next_steps.items()}
    return replace(portable_summary(summary, config), next_steps=steps)


def next_steps(run: PreparedRun, config: RunConfig, run_folder: RunFolder, name: str) -> NextSteps:
    """Of one adapter, in its folder."""
    number = [job.name for job in run.jobs].index(name)
    dataset, job_config = run.datasets[number], config.per_job()[number]
    is_closed = dataset.answers is not None
    columns = {} if dataset.reading is None else dataset.reading.columns
    use = run.task.used_as or run.objective
    sample = sample_input(dataset.sample, columns, is_closed or use != "causal_lm")
    if use == REWARD:
        sample = sample_answer(dataset.sample) | {"rewards_on": config.model.name}
    if dataset.images is not None:
        sample = {"text": str(sample_image(run, number, run_folder)), "is_image": True}
    held_out = job_config.data.test
    file = (held_out if isinstance(held_out, str) else job_config.data.train[0].path).partition("#")[0]
    return NextSteps(
        folder=str(adapter_folders(run, run_folder)[name]),
        **sample,
        file=file if Path(file).expanduser().exists() and not file.endswith(".npz") else "",  # arrays are for training
        writes=use == "causal_lm" and not is_closed,
    )


def sample_image(run: PreparedRun, number: int, run_folder: RunFolder) -> Path:
    """The file of a test image; of a set that holds arrays or bytes, where the run writes one."""
    dataset = run.datasets[number]
    source = dataset.images.sources[next(iter(dataset.test or dataset.train))]
    return source if isinstance(source, Path) else run_folder.path / SAMPLE_IMAGE


def _server_notes(run: PreparedRun, name: str) -> list[str]:
    """Whether vLLM, the best known server of adapters, can take it."""
    reasons = why_not_in_vllm(run.kit[name])
    if reasons:
        return [f"vLLM cannot serve this adapter: {'; '.join(reasons)}"]
    return ["vLLM can serve this adapter as LoRA: kitout export FOLDER --to peft --out DIR writes the folder it reads"]


def method_text(run: PreparedRun, name: str) -> str:
    method = run.kit[name].method
    settings = ", ".join(f"{k}={v}" for k, v in method.non_default_settings().items())
    return f"{type(method).__name__}({settings})" if settings else type(method).__name__
