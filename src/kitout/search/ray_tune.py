"""A rung by Ray Tune: its designs in groups, each a trial that trains its group as a rung of its own.

A candidate's values do not depend on who is beside it, so the results of the groups are those of one run. What follows
from all of them together stays in this process: which are fast enough, who stays. Designs are divided in their order,
once for a rung, and kept; a group that is finished is not trained again. Ray's own files are removed after the rung.
Source: Liaw et al. 2018, arXiv 1807.05118.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kitout import errors
from kitout.errors import ConfigError, KitoutError, UnusedSite
from kitout.files.atomic import write_text
from kitout.install_hint import suggest_install
from kitout.search.plan.schema import SearchPlan
from kitout.search.population.design import Design
from kitout.search.population.forgetting import wiki_rises
from kitout.search.population.rung import (
    Length,
    LogFn,
    RungResult,
    leave_out_failing,
    read_failed,
    read_rung,
    run_config,
    train_rung,
    write_failed,
)
from kitout.train.loop.stop_on_signal import SIGNALS
from kitout.train.run_folder import RESULTS_FILE
from kitout.train.setup.prepare import PreparedRun, prepare

GROUPS_FILE = "groups.json"
RAY_FOLDER = "ray"  # below the rung's, while it runs
ADDRESS = "RAY_ADDRESS"
# Nothing is sent to Ray's makers, nothing is written into the user's home and Ctrl-C is ours.
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_AIR_NEW_OUTPUT": "0", "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1",
}  # fmt: skip


@dataclass(frozen=True)
class Room:
    """What Ray may use."""

    gpus: int
    """GPUs; 0: CPUs alone."""
    cpus: int
    """CPUs."""
    most: int
    """CPUs that one trial may have: those of the smallest machine, of one of its GPUs where there are any."""

    @classmethod
    def here(cls) -> Room:
        """Of this machine."""
        cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        return cls.of([{"GPU": torch.cuda.device_count(), "CPU": cpus}])

    @classmethod
    def of(cls, machines: Sequence[Mapping[str, float]]) -> Room:
        """Of all that take part, as Ray describes them. With GPUs, those that have none do not."""
        gpus = sum(int(one.get("GPU", 0)) for one in machines)
        used = [one for one in machines if int(one.get("GPU" if gpus else "CPU", 0))]
        by_machine = [int(one.get("CPU", 0)) // max(1, int(one.get("GPU", 0))) for one in used]
        return cls(gpus, max(1, sum(int(one.get("CPU", 0)) for one in used)), max(1, min(by_machine, default=1)))

    @property
    def trials(self) -> int:
        """How many of them have room at once: one for each GPU, else with as many threads as this process takes."""
        return self.gpus or max(1, self.cpus // torch.get_num_threads())

    def resources(self, trials: int) -> dict[str, int]:
        """Of each of so many trials: one GPU where there are any, and a part of the CPUs."""
        at_once = min(trials, self.gpus or self.cpus)
        return {"cpu": min(self.most, max(1, self.cpus // at_once)), "gpu": 1 if self.gpus else 0}


@dataclass(frozen=True)
class _Task:
    """What every trial of a rung gets."""

    plan: SearchPlan
    length: Length
    groups: Sequence[Sequence[Design]]
    folders: Sequence[Path]
    end: int
    before: Mapping[str, Path]
    measures_rises: bool
    threads: int
    working_directory: Path


def check_ray() -> None:
    """ConfigError where it is not installed, or not with what Ray Tune needs."""
    hint = suggest_install(extra="ray")
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(f"engine=ray: Ray is not installed\n  {hint}\n  or leave engine out: rungs are trained here")
    try:
        importlib.import_module("ray.tune")
    except ImportError as error:
        raise ConfigError(f"engine=ray: Ray Tune cannot be imported ({error})\n  {hint}") from error


def engine_text(plan: SearchPlan) -> str:
    """What the pre-flight says of it."""
    address, number = os.environ.get(ADDRESS), plan.trials
    if number is None and address:
        return f"rungs are handed to Ray Tune, in as many trials as {ADDRESS}={address} has room for"
    number = min(number or Room.here().trials, plan.candidates)
    return f"rungs are handed to Ray Tune, each in {number} trial{'s' if number > 1 else ''} at most"


def divide(designs: Sequence[Design], trials: int) -> list[list[Design]]:
    """Groups of nearly one size in the order of the designs, at most one for each."""
    number = min(trials, len(designs))
    ends = [round(len(designs) * (place + 1) / number) for place in range(number)]
    return [list(designs[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]


def train_by_ray(
    plan: SearchPlan, length: Length, designs: Sequence[Design], folder: Path, end: int,
    before: Mapping[str, Path], log: LogFn, *, choose: Callable[[PreparedRun], Collection[str]] | None = None,
    measures_rises: bool = False,
) -> list[tuple[RungResult, Path]]:  # fmt: skip
    """As `train_rung` does, in trials: the result of each group, with its folder.

    choose: is asked in this process, before the trials start. measures_rises: what each one made the model forget.
    """
    kept = _read_groups(folder, designs)
    groups = kept or [_choose(plan, length, designs, folder, log, choose)]
    folders = _folders(folder, groups)
    if kept is None or not all(map(_is_finished, groups, folders)):
        with _running_ray() as room:
            if kept is None:
                groups = divide(groups[0], plan.trials or room.trials)
                folders = _folders(folder, groups)
                folder.mkdir(parents=True, exist_ok=True)
                write_text(folder / GROUPS_FILE, json.dumps([[one.name for one in group] for group in groups]) + "\n")
            left = [place for place, group in enumerate(groups) if not _is_finished(group, folders[place])]
            resources = room.resources(len(left))
            done = f", {len(groups) - len(left)} of them finished before" if len(left) < len(groups) else ""
            log(f"Ray Tune: {len(groups)} trials{done}; how far they are: {folder / 'group-*.log'}")
            task = _Task(
                plan, length, groups, folders, end, before, measures_rises, resources["cpu"], Path.cwd()
            )  # fmt: skip
            _run_trials(task, left, resources, folder / RAY_FOLDER)
    return _collect(folders, read_failed(folder), log)


def _choose(
    plan: SearchPlan, length: Length, designs: Sequence[Design], folder: Path, log: LogFn,
    choose: Callable[[PreparedRun], Collection[str]] | None,
) -> list[Design]:  # fmt: skip
    """Those that are trained at all, found out here and alone: times of trials side by side are no times."""
    if choose is None:
        return list(designs)
    ask = choose

    def attach(left: Sequence[Design], _failed: Mapping[str, str]) -> list[Design]:
        prepared = prepare(run_config(plan, length, left, folder), log=log)
        try:
            names = ask(prepared)
        finally:
            prepared.kit.detach()
        return [one for one in left if one.name in names]

    return leave_out_failing(designs, folder, log, attach)


def _folders(folder: Path, groups: Sequence[Sequence[Design]]) -> list[Path]:
    return [folder / f"group-{number}" for number in range(len(groups))]


def _read_groups(folder: Path, designs: Sequence[Design]) -> list[list[Design]] | None:
    """As they were divided at an earlier start, whatever has room now."""
    file = folder / GROUPS_FILE
    if not file.is_file():
        return None
    by_name = {one.name: one for one in designs}
    return [[by_name[name] for name in group] for group in json.loads(file.read_text(encoding="utf-8"))]


def _is_finished(group: Sequence[Design], folder: Path) -> bool:
    """Whether it is trained and measured, or nobody of it can be trained."""
    return (folder / RESULTS_FILE).is_file() or {one.name for one in group} <= read_failed(folder).keys()


def _collect(folders: Sequence[Path], failed: dict[str, str], log: LogFn) -> list[tuple[RungResult, Path]]:
    """failed: of no group. These, and groups of which nobody could be trained, are said with the first result."""
    results = []
    for folder in folders:
        result = read_rung(folder)
        if result is not None:
            results.append((result, folder))
        of_group = read_failed(folder)
        failed |= of_group
        for name, message in of_group.items():
            log(f"{name} cannot be trained: {message}; the others go on without it")
    if not results:
        raise UnusedSite.of(failed, next(iter(failed.values())))
    first, folder = results[0]
    return [(replace(first, failed=failed), folder), *results[1:]]


@contextmanager
def _running_ray() -> Iterator[Room]:
    """Ray of this process, of the cluster at RAY_ADDRESS, or of this machine, for the time of one rung."""
    import ray

    before = {name: os.environ.get(name) for name in SETTINGS}
    os.environ.update(SETTINGS)
    was_running, address = ray.is_initialized(), os.environ.get(ADDRESS)
    here = Room.here()
    room = {} if address else {"num_cpus": here.cpus, "num_gpus": here.gpus, "include_dashboard": False}
    try:
        if not was_running:
            try:
                with _own_signal_handlers():
                    ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **room)
            except (OSError, RuntimeError, ValueError) as error:
                where = f"{ADDRESS}={address}" if address else "engine=ray"
                raise ConfigError(f"{where}: Ray does not start: {error}") from error
        yield Room.of([node["Resources"] for node in ray.nodes() if node["Alive"]])
    finally:
        if not was_running:
            ray.shutdown()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Those of before are there again after it: Ray puts its own in their place as it starts."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _run_trials(task: _Task, left: Sequence[int], resources: Mapping[str, int], folder: Path) -> None:
    """Trains these groups. The error of a trial is raised here as it would be without Ray, and stops the others."""
    from ray import tune

    class StopAtError(tune.Stopper):  # type: ignore[misc]
        """Ends all trials where one has failed."""

        has_failed = False

        def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
            self.has_failed = self.has_failed or bool(result.get("error"))
            return False

        def stop_all(self) -> bool:
            return self.has_failed

    def trial(config: Mapping[str, Any]) -> dict[str, str]:
        return _train_group(task, config["group"])

    shutil.rmtree(folder, ignore_errors=True)  # of a search that was killed
    tuner = tune.Tuner(
        tune.with_resources(trial, dict(resources)),
        param_space={"group": tune.grid_search(list(left))},
        run_config=tune.RunConfig(
            name="rung", storage_path=str(folder.resolve()), verbose=0, stop=StopAtError(),
            failure_config=tune.FailureConfig(max_failures=0),
        ),
    )  # fmt: skip
    try:
        results = list(tuner.fit())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for one in results:
        if one.error is None and (one.metrics or {}).get("error"):
            raise _as_error(one.metrics["kind"], one.metrics["error"], one.metrics["log"])
    for one in results:
        if one.error is not None:
            text = str(one.error).strip().splitlines()
            raise KitoutError(
                f"a trial of Ray ended without a result: {text[-1] if text else type(one.error).__name__}"
            )


def _as_error(kind: str, text: str, log_file: str) -> Exception:
    """An error of a trial, of the same class where it is one of kitout's."""
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, KitoutError):
        return known(text)
    return KitoutError(f"a trial of Ray failed: {kind}: {text}\n  all of it: {log_file}")


def _train_group(task: _Task, number: int) -> dict[str, str]:
    """One trial, in a process of Ray's. Returns what went wrong, and as what."""
    os.chdir(task.working_directory)
    torch.set_num_threads(task.threads)
    group, folder = task.groups[number], task.folders[number]
    log_file = folder.with_suffix(".log")
    before = {one.name: task.before[one.name] for one in group if one.name in task.before}
    folder.mkdir(parents=True, exist_ok=True)
    with log_file.open("a", encoding="utf-8", buffering=1) as file:

        def log(line: str) -> None:
            file.write(f"{line}\n")

        def measure_rises(run: PreparedRun, result: RungResult) -> dict[str, float]:
            rises: dict[str, float] = {}
            for name in result.names:
                if name not in result.diverged:
                    rises |= wiki_rises(run, [name], task.plan.seed, log)
            return rises

        measure = measure_rises if task.measures_rises else None
        try:
            train_rung(task.plan, task.length, group, folder, task.end, before, log, measure_rises=measure)
        except Exception as error:
            left = {one.name for one in group} - read_failed(folder).keys()
            if isinstance(error, UnusedSite) and left <= set(error.names):  # the other groups go on
                write_failed(folder, read_failed(folder) | dict.fromkeys(left, str(error)))
            else:
                file.write(traceback.format_exc())
                return {"error": str(error), "kind": type(error).__name__, "log": str(log_file)}
    return {"error": "", "kind": "", "log": str(log_file)}
