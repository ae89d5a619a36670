"""What a search writes: recommended.yaml for `kitout train`, trials.csv, the report, and search.json last.

It knows the population and the confirmation, and how files are written.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from kitout.evaluate.compare import format_value
from kitout.format import align_columns
from kitout.search.confirmation import Confirmation
from kitout.search.pages.report import ADAPTERS, adapters_of, write_report
from kitout.search.population.design import Design
from kitout.search.population.population import Population
from kitout.search.search_folder import RECOMMENDED_FILE, REPORT_FILE, RESULTS_FILE, TRIALS_FILE, SearchFolder
from kitout.train.config.method_field import method_to_dict
from kitout.train.config.yaml_file import to_yaml

LogFn = Callable[[str], None]


def write_outputs(
    population: Population, finalists: Sequence[Design], confirmation: Confirmation, of_run: Mapping[str, Any],
    folder: SearchFolder, log: LogFn,
) -> dict[str, Any]:  # fmt: skip
    """Writes everything and returns what search.json holds. of_run: what results.json of the confirmation holds."""
    recommended = next((one for one in finalists if one.name == confirmation.recommended), None)
    run = {} if recommended is None else recommended_run(population, recommended)
    figures = {
        "answer": confirmation.answer,
        "recommended": confirmation.recommended,
        "recommended_run": run,
        "confirmation": confirmation.to_dict(),
        "designs": [one.to_dict() for one in {**population.designs, finalists[0].name: finalists[0]}.values()],
        "refused": [one for generation in population.generations for one in generation.refused],
        "failed": population.failed,
        "latency": population.latency,
        "adapters": adapters_of(population.plan, confirmation),
        "rungs": [
            {
                "end": done[0].end,
                "decisions": [asdict(one) for one in decisions],
                "seconds": sum(one.seconds for one in done),
                "training_seconds": sum(one.training_seconds for one in done),
                "examples": sum(one.examples for one in done),
                "memory": max(one.memory for one in done),
            }
            for done, decisions in zip(population.results, population.decisions, strict=True)
        ],
        "cost": {**population.cost(), "confirmation_seconds": float(of_run.get("seconds", 0.0))},
    }
    figures = json.loads(json.dumps(figures, default=str).replace("NaN", "null"))
    if recommended is not None:
        header = f"# The design that a search recommends: {confirmation.answer}.\n# kitout train {RECOMMENDED_FILE}\n"
        folder.write_text(RECOMMENDED_FILE, header + to_yaml(run))
    write_report(population, folder, confirmation, of_run)
    folder.write_text(TRIALS_FILE, trials_csv(population, confirmation))
    folder.write_text(RESULTS_FILE, json.dumps(figures, indent=1) + "\n")
    log(results_text(figures, folder))
    return dict(figures)


def recommended_run(population: Population, design: Design) -> dict[str, Any]:
    """The plan's run with this design and the length it was searched with, as a run.yaml has it."""
    plan, length = population.plan, population.length
    values = plan.run.model_copy(update={"method": design.method}).to_dict()
    values["method"] = method_to_dict(design.method)
    values["train"] |= {"lr": design.lr, "steps": length.steps, "epochs": None, "batch_size": length.batch_size}
    values["output"] = {**values["output"], "folder": "runs/recommended"}
    return values


def trials_csv(population: Population, confirmation: Confirmation) -> str:
    """A line for each design: what it is, what it costs, what every rung measured and decided, what the test says."""
    head = ["name", "design", "origin", "trainable", "bytes", "latency"]
    for number in range(1, len(population.results) + 1):
        head += [f"rung {number}", f"decision {number}"]
    head += ["forgetting", "test mean", "verdict"]
    confirmed = {one.name: one for one in confirmation.designs}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for name, design in population.designs.items():
        row: list[Any] = [name, design.text, design.origin, design.trainable, design.bytes]
        row.append(population.latency.get(name, ""))
        for decisions in population.decisions:
            own = next((one for one in decisions if one.name == name), None)
            row += ["", ""] if own is None else [own.value, own.what]
        if name in population.failed:
            row[-1] = f"failed: {population.failed[name]}"
        row.append(population.rises.get(name, ""))
        row += [confirmed[name].mean, confirmed[name].verdict] if name in confirmed else ["", ""]
        writer.writerow(row)
    return text.getvalue()


def results_text(figures: Mapping[str, Any], folder: SearchFolder) -> str:
    """The verdicts, the answer and what to type next."""
    confirmation, designs = figures["confirmation"], {one["name"]: one for one in figures["designs"]}
    rows: list[tuple[str, ...]] = [("design", confirmation["metric"], "trainable", "against the default")]
    for one in confirmation["designs"]:
        difference = one["against_default"]
        against = "" if difference is None else _difference_text(difference)
        mean = format_value(one["mean"], confirmation["share"])
        rows.append((one["name"], mean, f"{designs[one['name']]['trainable']:,}", against))
    cost = figures["cost"]
    took = (
        f"the search took {cost['trainings']:.2f} trainings of one design, {cost['seconds']:,.0f} s in all; the "
        f"confirmation {cost['confirmation_seconds']:,.0f} s of training"
    )
    lines = ["", *align_columns(rows), "", f"{figures['answer']}.", took]
    if figures["recommended"]:
        lines.append(f"recommended: {figures['recommended']}")
    lines += [
        f"report    {folder.path / REPORT_FILE}",
        f"adapters  {folder.path / ADAPTERS}: {', '.join(figures['adapters'])}, one for each seed",
    ]
    if figures["recommended"]:
        lines += ["", f"  kitout train {folder.path / RECOMMENDED_FILE}"]
    return "\n".join(lines)


def _difference_text(difference: Mapping[str, Any]) -> str:
    share = difference["share"]
    value, low, high = (format_value(difference[key], share, sign=True) for key in ("difference", "low", "high"))
    adjusted = difference["adjusted"]
    p_text = "no verdict" if adjusted is None else f"p (Holm) {adjusted:.2g}"
    return f"{value} ({low} to {high}), {p_text}"


def show_finished(folder: SearchFolder, log: LogFn) -> dict[str, Any]:
    """A search that is finished, from what it has written."""
    figures: dict[str, Any] = json.loads(folder.results.read_text(encoding="utf-8"))
    log(results_text(figures, folder))
    log(f"\n{folder.path} holds this search, finished; to search again choose another out, or delete it")
    return figures
