"""Run folders -> the adapters in them, with what results.json holds of each: scores, cost, and which test data.

Everything that is wrong with any folder is reported at once. Runs of earlier versions are read as far as they go; what
they did not keep stays empty. It knows files and no table.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from statistics import fmean
from typing import Any

from kitout.align.config.schema import StageRun
from kitout.errors import ConfigError, Errors, FileError
from kitout.evaluate.compare import BASE
from kitout.evaluate.example_scores import AdapterScores, ExampleScores, load_scores
from kitout.evaluate.metrics.measure import Score
from kitout.files.adapter_json import RECORD
from kitout.files.system_errors import as_path
from kitout.format import short_repr
from kitout.train.config import yaml_file
from kitout.train.config.load import load_as
from kitout.train.config.renamed_keys import translate
from kitout.train.config.schema import RunConfig
from kitout.train.config.seeds import job_of
from kitout.train.run_folder import MAY_DIFFER, RESULTS_FILE, RUN_FILE, SCORES_FILE, flatten

# Of one method, run twice: they may differ, and it is the same configuration with another seed.
NOT_OF_THE_CONFIG = {*MAY_DIFFER, "train.seed", "output.name", "data.template_date", "jobs"}
CHOICE_METRICS = {"acc", "acc_norm", "accuracy"}  # of sets whose answers are choices


@dataclass(frozen=True)
class FinishedRun:
    """One adapter of a finished run."""

    folder: Path
    """The run's folder."""
    adapter: str
    """The adapter's name."""
    label: str
    """What the table calls it: no two rows have the same."""
    model: str
    """The base, as the run's config names it; empty where the config cannot be read."""
    method: str
    """The method with the settings that are not its defaults."""
    seed: int | None
    """train.seed; None where the config cannot be read."""
    config: str
    """The same for runs that differ in their seed alone; empty where the config cannot be read."""
    scores: Mapping[str, Score]
    """Each metric on the test split, the headline first; empty without a test split."""
    base_scores: Mapping[str, Score]
    """The same metrics of what the run compares with."""
    baseline: str
    """What that is: the base, or a constant answer."""
    data: str
    """The fingerprint of all examples as the model reads them."""
    test_data: str
    """The fingerprint of the test examples as the data have them; empty in runs of earlier versions."""
    num_test: int
    """The number of test examples that were evaluated."""
    trainable: int
    """Trainable parameters, heads included."""
    percent: float
    """The same in percent of the base's."""
    seconds: float | None
    """Seconds of training, of this adapter alone where several were trained together; None where that is not kept."""
    memory: int
    """Peak memory of the whole run, in bytes."""
    num_adapters: int
    """How many adapters were trained together in this run."""
    device: str
    """The device."""
    dtype: str
    """Of the frozen base."""
    stopped: str
    """Why training stopped early because it diverged; else empty."""
    method_label: str
    """The label without the seed, where the run trained one job with several."""
    recipe: str
    """The same for runs that differ in seed and data alone; empty where the config cannot be read."""
    test_scores: Mapping[str, ExampleScores]
    """What the metrics are made of, example by example; empty in runs of earlier versions."""
    forgetting: float | None
    """Accuracy lost on choice sets, the mean over these; None where that was not measured."""
    forgetting_sets: str
    """Which sets these are, and of how many questions; empty where that was not measured."""


def read_runs(folders: Sequence[str | PathLike[str]]) -> list[FinishedRun]:
    """Every adapter of these runs, in the order given. ConfigError names everything that is wrong, all at once."""
    errors = Errors(ConfigError, "cannot compare")
    runs: list[FinishedRun] = []
    paths = [as_path(folder) for folder in folders]
    seen: set[Path] = set()
    for path in paths:
        resolved = path.resolve()
        if resolved in seen:
            errors.add(f"{path} is given twice")
            continue
        seen.add(resolved)
        if problem := _not_a_finished_run(path):
            errors.add(problem)
            continue
        try:
            runs += _read_run(path)
        except _CannotRead as error:
            errors.add(f"{path / RESULTS_FILE} {error}")
        except FileError as error:
            errors.add(str(error))
    errors.raise_if_any()
    return _with_labels(runs)


class _CannotRead(Exception):
    """Why a results.json cannot be used."""


def _not_a_finished_run(path: Path) -> str:
    """Why this folder holds nothing to compare, and what to do; empty where it does."""
    try:
        if path.is_file():
            return f"{path} is a file: name the folder of a run, for example {path.parent}"
        if not path.is_dir():
            return f"there is no folder {path}" + _runs_nearby(path.parent)
        if (path / RESULTS_FILE).is_file():
            return ""
        if (path / RUN_FILE).is_file():
            return (
                f"the run in {path} is not finished (there is no {RESULTS_FILE}): the same `kitout train` command "
                "resumes it"
            )
        if (path / RECORD).is_file():
            owner = next((p for p in (path.parent, path.parent.parent) if (p / RESULTS_FILE).is_file()), None)
            where = f"compare its run: {owner}" if owner else "its results are in the folder of the run that trained it"
            return f"{path} is the folder of an adapter: {where}"
        return f"{path} is not the folder of a run: it has no {RESULTS_FILE}{_runs_nearby(path)}"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror or error}"


def _runs_nearby(parent: Path) -> str:
    """Up to three finished runs in this folder, to name instead."""
    found = sorted(str(file.parent) for file in parent.glob(f"*/{RESULTS_FILE}"))[:3] if parent.is_dir() else []
    return f"; finished runs there: {', '.join(found)}" if found else ""


def _read_run(path: Path) -> list[FinishedRun]:
    try:
        results = json.loads((path / RESULTS_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise _CannotRead(f"cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise _CannotRead(f"is damaged, not JSON: {str(error)[:120]}") from error
    needed = ("trainable", "comparisons", "data")
    if (
        not isinstance(results, dict)
        or not all(isinstance(results.get(name), dict) for name in needed)
        or not results["trainable"]
    ):
        raise _CannotRead(
            "is not one that this version of kitout writes (no trainable, comparisons and data): train again"
        )
    configs = _configs_of(path)
    scores = load_scores(path / SCORES_FILE) if (path / SCORES_FILE).is_file() else {}
    try:
        return [_adapter_of(path, results, name, configs.get(name), scores.get(name)) for name in results["trainable"]]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise _CannotRead(f"is damaged: {type(error).__name__} {short_repr(str(error), 80)}") from error


def _configs_of(path: Path) -> dict[str, RunConfig]:
    """The config of each adapter, by name; none where run.yaml is not there or of another version."""
    try:
        values = translate(yaml_file.read_yaml(path / RUN_FILE))
        config = load_as(values, StageRun if "kind" in values else RunConfig)
    except ConfigError:
        return {}
    return {one.output.name: one for one in config.per_job()}


def _adapter_of(
    path: Path, results: Mapping[str, Any], name: str, config: RunConfig | None, kept: AdapterScores | None
) -> FinishedRun:  # fmt: skip
    row: Mapping[str, Any] = next((row for row in results.get("adapters") or () if row["name"] == name), {})
    num_adapters = len(results["trainable"])
    changes = results["comparisons"].get(name, ())
    scores = {str(change["name"]): _score(change["tuned"]) for change in changes}
    machine = results.get("machine") or {}
    seconds = row.get("seconds") if num_adapters > 1 else results["seconds"]
    return FinishedRun(
        folder=path,
        adapter=name,
        label="",
        model="" if config is None else config.model.name,
        method=str(row.get("method") or ("" if config is None else _method_text(config))),
        seed=None if config is None else config.train.seed,
        config="" if config is None else _config_key(config),
        scores=scores,
        base_scores={str(change["name"]): _score(change["base"]) for change in changes},
        baseline=str(changes[0].get("baseline", BASE)) if changes else BASE,
        data=str(results["data"][name]),
        test_data=str((results.get("test_data") or {}).get(name, "")),
        num_test=max((score.n for score in scores.values()), default=0),
        trainable=int(results["trainable"][name]),
        percent=float(results["percent"][name]),
        seconds=None if seconds is None else float(seconds),
        memory=int(results["memory"]),
        num_adapters=num_adapters,
        device=str(machine.get("device", "")),
        dtype=str(machine.get("dtype", "")),
        stopped=str((results.get("stopped") or {}).get(name, "")),
        method_label=job_of((results.get("seeds") or {}).get("adapters", {}), name),
        recipe="" if config is None else _config_key(config, without="data."),
        test_scores={} if kept is None else kept.tuned,
        forgetting=_accuracy_lost((results.get("forgetting") or {}).get(name)),
        forgetting_sets=_choice_sets((results.get("forgetting") or {}).get(name)),
    )


def _accuracy_lost(section: Mapping[str, Any] | None) -> float | None:
    """The mean over sets of choices of base minus adapter; None without such a set."""
    sets = [] if section is None else section["sets"].values()
    lost = [-float(one["difference"]) for one in sets if one["metric"] in CHOICE_METRICS]
    return fmean(lost) if lost else None


def _choice_sets(section: Mapping[str, Any] | None) -> str:
    sets = {} if section is None else section["sets"]
    asked = {name: one.get("n", "") for name, one in sets.items() if one["metric"] in CHOICE_METRICS}
    return ", ".join(f"{name} ({n})" if n else name for name, n in asked.items())


def _score(values: Mapping[str, Any]) -> Score:
    """results.json has null for what is not finite."""
    numbers = {key: math.nan if values[key] is None else float(values[key]) for key in ("value", "low", "high")}
    return Score(
        **numbers,
        n=int(values["n"]),
        higher_is_better=bool(values["higher_is_better"]),
        share=bool(values["share"]),
        note=str(values.get("note", "")),  # a run of an earlier version has none
        num_groups=None if values.get("num_groups") is None else int(values["num_groups"]),
    )


def _method_text(config: RunConfig) -> str:
    settings = ", ".join(f"{key}={value}" for key, value in config.method.non_default_settings().items())
    return type(config.method).__name__ + (f"({settings})" if settings else "")


def _config_key(config: RunConfig, without: str = "") -> str:
    """without: the beginning of settings that do not count."""
    settings = config.to_dict()
    settings["method"] = {"name": type(config.method).__name__, **config.method.model_dump(mode="json")}
    flat = {key: value for key, value in flatten(settings).items() if key not in NOT_OF_THE_CONFIG}
    flat = {key: value for key, value in flat.items() if not (without and key.startswith(without))}
    return json.dumps(flat, sort_keys=True, default=str)


def _with_labels(runs: Sequence[FinishedRun]) -> list[FinishedRun]:
    """Runs by the last part of their folder, by the whole of it where two share that; several adapters with names.

    If that gives two runs one label, all are called by the whole of their folders.
    """
    named = _named(runs, by_whole=False)
    labels = Counter([run.label for run in named])
    rows = {(run.method_label, run.folder) for run in named}
    is_unique = len(labels) == len(named) and len({label for label, _ in rows}) == len(rows)
    return named if is_unique else _named(runs, by_whole=True)


def _named(runs: Sequence[FinishedRun], by_whole: bool) -> list[FinishedRun]:
    folders = list(dict.fromkeys(run.folder for run in runs))
    counts = Counter(folder.resolve().name for folder in folders)
    methods = {folder: {run.method_label for run in runs if run.folder == folder} for folder in folders}
    between = ": " if by_whole else "/"
    labels = []
    for run in runs:
        name = run.folder.resolve().name
        folder = name if name and counts[name] == 1 and not by_whole else str(run.folder)
        label = f"{folder}{between}{run.adapter}" if run.num_adapters > 1 else folder
        labels.append((label, f"{folder}{between}{run.method_label}" if len(methods[run.folder]) > 1 else folder))
    return [replace(run, label=a, method_label=b) for run, (a, b) in zip(runs, labels, strict=True)]
