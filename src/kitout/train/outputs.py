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
from kitout.evaluate.report.summary import Summary
from kitout.format import seconds, size
from kitout.train.closing import closing
from kitout.train.config import yaml_file
from kitout.train.config.schema import RunConfig
from kitout.train.loop.trainer import Loop
from kitout.train.measure.evaluate import Outcome
from kitout.train.measure.merge_proof import MergeProof
from kitout.train.metrics_log import read
from kitout.train.preflight.cost_estimate import Estimate
from kitout.train.run_folder import RunFolder
from kitout.train.setup import base_model, device
from kitout.train.setup.prepare import Prepared
from kitout.version import __version__


def finish(
    made: Prepared, config: RunConfig, place: RunFolder, loop: Loop, guess: Estimate, best: int | None,
    outcomes: Mapping[str, Outcome], proofs: Mapping[str, MergeProof], say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Writes everything and returns what results.json holds."""
    comparisons = {name: one.comparison for name, one in outcomes.items() if one.comparison is not None}
    rows = _rows(made, loop, outcomes)
    figures = _figures(made, loop, guess, best, comparisons)
    figures["adapters"] = [asdict(row) for row in rows]
    figures["predicted"] = {name: list(one.predictions) for name, one in outcomes.items() if one.truth}
    figures["true"] = {name: list(one.truth) for name, one in outcomes.items() if one.truth}
    if proofs:
        figures["merge"] = {name: asdict(proof) for name, proof in proofs.items()}
    folders = adapters(made, place)
    try:
        _written(made, config, place, figures, comparisons, folders, outcomes, rows)
    except (OSError, SafetensorError) as wrong:
        raise ConfigError(
            f"{place.path} cannot be written ({wrong}): what was learnt is kept in its checkpoints; "
            "make room, and the same command finishes the run"
        ) from wrong
    if shown := closing(figures):
        say(shown)
    for name, found in comparisons.items():
        say(f"{name}: {found.verdict}" if len(comparisons) > 1 else found.verdict)
    if config.jobs and adapter_table.comparable(rows):
        say(f"\n{adapter_table.text(rows, made.main.majority, _same_data(made))}\n")
    say(_next(made, config, place, folders))
    return figures


def _written(
    made: Prepared, config: RunConfig, place: RunFolder, figures: Mapping[str, Any],
    comparisons: Mapping[str, Comparison], folders: Mapping[str, Path], outcomes: Mapping[str, Outcome],
    rows: Sequence[AdapterRow],
) -> None:  # fmt: skip
    for job, folder in folders.items():
        summary = _summary(made, config, figures, {k: v for k, v in comparisons.items() if k == job}, {}, job)
        (folder / "README.md").unlink(missing_ok=True)  # of a run that was killed right here
        made.kit.save(job, folder, metadata={"trained by": "kitout train", "base": config.model.name})
        model_card.write(summary, folder)
    pictures = _pictures(made, place)
    whole = _summary(made, config, figures, comparisons, pictures, ", ".join(folders))
    table = rows if config.jobs and adapter_table.comparable(rows) else ()
    reached = _result_pictures(made, config, place, outcomes, rows)
    whole = replace(whole, adapters=table, majority=made.main.majority, same_test=_same_data(made))
    html.write(replace(whole, result_plots=reached), place.report)
    place.finish(figures)


def adapters(made: Prepared, place: RunFolder) -> dict[str, Path]:
    """Where each adapter goes: `adapter` alone, below it by name if there are several."""
    names = [job.name for job in made.jobs]
    return {name: place.adapter if len(names) == 1 else place.adapter / name for name in names}


def _figures(
    made: Prepared, loop: Loop, guess: Estimate, best: int | None, comparisons: Mapping[str, Comparison]
) -> dict[str, Any]:  # fmt: skip
    kit, work = made.kit, loop.work
    counts = {job.name: kit.num_parameters(job.name) for job in made.jobs}
    counted = (row for row in reversed(loop.state.log_history) if "tokens" in row)
    last: dict[str, Any] = next(counted, {})  # of all processes
    tokens = int(last.get("tokens", work.tokens))
    return {
        "objective": made.objective,
        "steps": loop.state.global_step,
        "best_step": best,
        "stopped": loop.health.stopped,
        "trunk": loop.cuts,
        "data": {job.name: one.digest for job, one in zip(made.jobs, made.sets, strict=True)},
        "majority": {job.name: one.majority for job, one in zip(made.jobs, made.sets, strict=True)},
        "trainable": {name: count.trainable for name, count in counts.items()},
        "percent": {name: count.percent for name, count in counts.items()},
        "labels": {
            job.name: list(one.answers.names) for job, one in zip(made.jobs, made.sets, strict=True) if one.answers
        },
        "seconds": work.seconds,
        "processor_seconds": last.get("processor_seconds", work.processor_seconds),
        "tokens": tokens,
        "tokens_per_second": tokens / max(work.seconds, 1e-9),
        "padding": work.padded / max(1, work.tokens) - 1,
        "micro_batch": work.micro,
        "memory": int(max((row["memory"] for row in loop.state.log_history if "memory" in row), default=0)),
        "estimate": asdict(guess),
        "machine": device.describe(kit.device) | {"dtype": str(kit.dtype)[6:]},
        "comparisons": {name: [asdict(change) for change in found.changes] for name, found in comparisons.items()},
        "examples": {name: [asdict(one) for one in found.examples] for name, found in comparisons.items()},
    }


def _pictures(made: Prepared, place: RunFolder) -> dict[str, bytes]:
    """PNGs of the report, which stand in the folder too; none where matplotlib is not installed."""
    if not plots.possible():
        return {}
    drawn = {}
    rows = read(place.metrics)
    if rows:
        drawn["training"] = plots.training(rows)
    if made.main.images is None:
        parts = {"train": made.main.looked_at or made.main.train, "test": made.main.test}
        drawn["lengths"] = plots.lengths({name: [i.length for i in items] for name, items in parts.items() if items})
    for name, picture in drawn.items():
        plots.write(place.path / f"{name}.png", picture)
    return drawn


def _rows(made: Prepared, loop: Loop, outcomes: Mapping[str, Outcome]) -> list[AdapterRow]:
    """Every adapter with what it reached and what it took."""
    reached = list(outcomes.values())
    shared = [metric for metric in reached[0].scores if all(metric in one.scores for one in reached)] if reached else []
    rows = []
    for job, (wall, processor) in zip(made.jobs, loop.work.spent, strict=True):
        one, count = outcomes.get(job.name), made.kit.num_parameters(job.name)
        done = min(loop.state.global_step, len(job.steps))
        metric = next(iter(shared or one.scores)) if one else ""
        rows.append(AdapterRow(
            job.name, _method(made, job.name), metric, one.scores[metric] if one else None, count.trainable,
            count.percent, sum(len(job.steps[step]) for step in range(done)), wall, processor,
        ))  # fmt: skip
    return rows


def _same_data(made: Prepared) -> bool:
    return len({one.digest for one in made.sets}) == 1


def _result_pictures(
    made: Prepared, config: RunConfig, place: RunFolder, outcomes: Mapping[str, Outcome], rows: Sequence[AdapterRow]
) -> dict[str, bytes]:
    """PNGs of what the adapters reached: compared if there are several, and which class is taken for which."""
    if not plots.possible():
        return {}
    drawn = {}
    if len(rows) > 1 and _same_data(made) and adapter_table.comparable(rows):
        drawn["comparison"] = class_plots.comparison(rows, made.main.majority, f"adapters of {config.model.name}")
    for job, held in zip(made.jobs, made.sets, strict=True):
        one = outcomes.get(job.name)
        if one is None or not one.truth or not held.names:
            continue
        several = f"-{job.name}" if len(made.jobs) > 1 else ""
        drawn[f"confusion{several}"] = class_plots.confusion(job.name, one.predictions, one.truth, held.names)
        if held.images is not None:
            wrong = class_plots.misclassified(one.predictions, one.truth)
            shown = wrong[: class_plots.SHOWN]
            said, true = ([held.names[whose[i]] for i in shown] for whose in (one.predictions, one.truth))
            pictures = [held.images.open(one.items[i]) for i in shown]
            drawn[f"errors{several}"] = class_plots.errors(job.name, pictures, true, said, len(wrong))
    for name, picture in drawn.items():
        plots.write(place.path / f"{name}.png", picture)
    return drawn


def _summary(
    made: Prepared, config: RunConfig, figures: Mapping[str, Any], comparisons: Mapping[str, Comparison],
    pictures: Mapping[str, bytes], adapter: str,
) -> Summary:  # fmt: skip
    guess = figures["estimate"]
    shown = made.jobs if adapter not in {job.name for job in made.jobs} else [j for j in made.jobs if j.name == adapter]
    methods = {job.name: _method(made, job.name) for job in shown}
    data = dict(zip([job.name for job in made.jobs], made.sets, strict=True))
    told = [line for job in shown for line in data[job.name].told]
    sources = [s.path for job in config.alone() if job.output.name in methods for s in job.data.train]
    labels = dict.fromkeys(label for job in shown for label in data[job.name].names)
    hashed = figures["data"] if len(shown) == len(made.jobs) else {adapter: figures["data"][adapter]}
    return Summary(
        title=f"{', '.join(methods.values())} on {config.model.name}",
        model=config.model.name,
        method="; ".join(methods.values()),
        adapter=adapter,
        comparisons=comparisons,
        data={"sources": ", ".join(dict.fromkeys(sources)), "read as": "; ".join(told)},
        preflight={"objective": made.objective, "number format": f"{figures['machine']['dtype']} ({made.why})"},
        estimates={
            "training time": (seconds(guess["seconds"]), seconds(figures["seconds"])),
            "peak memory": (size(guess["memory"]), size(figures["memory"])),
        },
        cost={
            "training": seconds(figures["seconds"]),
            "processor time, all threads": seconds(figures["processor_seconds"]),
            "tokens a second": figures["tokens_per_second"],
            "peak memory": size(figures["memory"]),
            "trained values": sum(figures["trainable"][job.name] for job in shown),
            "percent of the base": sum(figures["percent"][job.name] for job in shown),
        },
        checked={name: str(MergeProof(**proof)) for name, proof in figures.get("merge", {}).items() if name in methods},
        notes=[*made.notes, *figures["stopped"].values()],
        config=yaml_file.written(config.dump()),
        plots=pictures,
        files={
            "adapter/": "the trained values, with a card",
            "results.json": "every figure",
            "run.yaml": "the settings",
            "metrics.jsonl": "what was logged, step by step",
        },
        data_name=sources[0],
        data_hash=hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest(),
        loader=base_model.CLASSES[made.objective],
        opened=base_model.found(config.model.name),
        opening=made.opening,
        labels=tuple(labels),
        chat=made.main.chat and bool(made.tokenizer.chat_template),
        licence=model_card.licence_of(Path(base_model.found(config.model.name))),
        made=f"{datetime.now(timezone.utc):%Y-%m-%d} by kitout {__version__}",
    )


def _method(made: Prepared, name: str) -> str:
    method = made.kit[name].method
    settings = ", ".join(f"{k}={v}" for k, v in method.describe().items())
    return f"{type(method).__name__}({settings})" if settings else type(method).__name__


def _next(made: Prepared, config: RunConfig, place: RunFolder, folders: Mapping[str, Path]) -> str:
    """Where everything is, and lines that run as they stand."""
    name, folder = next(iter(folders.items()))
    loader = base_model.CLASSES[made.objective]
    settings = "".join(f", {setting}={value!r}" for setting, value in made.opening.items())
    opened = json.dumps(base_model.found(config.model.name)) + settings
    worn = json.dumps(name)
    return "\n".join(
        [
            f"report   {place.report}",
            *(f"adapter  {one}" for one in folders.values()),
            "",
            "use it:",
            "  import kitout",
            f"  from transformers import {loader}",
            f"  kit = kitout.attach({loader}.from_pretrained({opened}).eval())",
            f"  kit.load({json.dumps(str(folder))}, name={worn}); kit.use({worn})",
        ]
    )
