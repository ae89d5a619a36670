"""The folder of a run: created or found again, locked by one process, never another run's.

run.yaml holds the whole config, resolved.json what `auto` was resolved to. The same settings resume the run; other
ones are refused by name, with both values; settings that do not change the result may differ. It knows no model, no
trainer and no data.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kitout.errors import ConfigError, Errors, KitoutError
from kitout.files.atomic import remove_leftovers, write_text
from kitout.files.system_errors import ADVICE, as_path
from kitout.format import short_repr
from kitout.train import checkpoints
from kitout.train.config import yaml_file
from kitout.train.config.load import load_as
from kitout.train.config.renamed_keys import translate
from kitout.train.config.schema import RunConfig
from kitout.train.metrics_log import METRICS_FILE, to_json_value

RUN_FILE, RESULTS_FILE, ESTIMATE_FILE, RESOLVED_FILE = "run.yaml", "results.json", "estimate.json", "resolved.json"
SCORES_FILE = "scores.safetensors"
# The owner has a file of its own: some systems lock the bytes of the lock file.
LOCK_FILE, OWNER_FILE = ".run.lock", ".run.owner"
REPORT_FILE = "report.html"
PREFLIGHT_FILES = ("preflight.json", "preflight.txt")
HEADER = "# Written by `kitout train`: the settings of the run in this folder."

# They change what a run costs, prints or keeps, not its result.
MAY_DIFFER = {
    *(
        "train.micro_batch_size",
        "train.activation_checkpointing",
        "train.fsdp",
        "train.save_steps",
        "train.trunk_bytes",
        "train.keep_checkpoints",
    ),
    *("evaluate.show_examples", "output.folder", "output.report_to"),
}
DRY_RUN_FILES = {RUN_FILE, ESTIMATE_FILE, RESOLVED_FILE, *PREFLIGHT_FILES}  # a folder of these alone holds no run yet
# What a run writes file by file, besides plots: a kill may leave `.<name>.<pid>` of any of them.
WRITTEN_FILES = {
    *DRY_RUN_FILES,
    RESULTS_FILE,
    METRICS_FILE,
    OWNER_FILE,
    REPORT_FILE,
    SCORES_FILE,
    "README.md",
    "diverged.json",
    "trunk.bin",
}
TEMPLATE_DATE = "data.template_date"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # a write raises them without a name
ABSENT = object()


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, and the paths in it."""

    path: Path
    """The folder itself."""
    resumes: bool
    """Whether it held this run before."""
    is_finished: bool
    """Whether that run is finished."""

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / METRICS_FILE

    @property
    def report(self) -> Path:
        return self.path / REPORT_FILE

    @property
    def results(self) -> Path:
        return self.path / RESULTS_FILE

    @property
    def scores(self) -> Path:
        return self.path / SCORES_FILE

    @property
    def estimate(self) -> Path:
        return self.path / ESTIMATE_FILE

    def read_resolved(self) -> dict[str, str]:
        """What `auto` was resolved to at the first start; empty where it is not known."""
        try:
            resolved = json.loads((self.path / RESOLVED_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {str(k): str(v) for k, v in resolved.items()} if isinstance(resolved, dict) else {}

    def write_resolved(self, resolved: Mapping[str, str]) -> None:
        """Writes what `auto` was resolved to: on another day a timing may come out otherwise."""
        write_text(self.path / RESOLVED_FILE, json.dumps(dict(resolved), indent=2) + "\n")

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Writes results.json, whose presence means that the run is finished: to be called last."""
        write_text(self.results, json.dumps(to_json_value(results), indent=2, ensure_ascii=False) + "\n")

    def finished_message(self) -> str:
        """What to print of a finished run."""
        return (
            f"{self.path} holds this run, finished: see {self.results.name}"
            + (f" and {self.report.name}" if self.report.is_file() else "")
            + f"\nto run it again: choose another output.folder, or delete {self.path}"
        )


def first_day(config: RunConfig) -> str:
    """The day that chat templates take for today: the setting, what the folder's run has, or today."""
    path = config.output.folder.expanduser() / RUN_FILE
    day = config.data.template_date
    if day is None and path.is_file() and _has_header(path):
        try:
            day = load_as(translate(yaml_file.read_yaml(path)), type(config)).data.template_date
        except ConfigError:  # damaged: reported when the folder is opened
            day = None
    return day or date.today().isoformat()


def with_first_day(config: RunConfig, day: str) -> RunConfig:
    """The config as run.yaml keeps it."""
    return config.model_copy(update={"data": config.data.model_copy(update={"template_date": day})})


@contextmanager
def open_run_folder(config: RunConfig) -> Iterator[RunFolder]:
    """The run's folder, locked by this process (the main one); ConfigError if it is in use or another run's."""
    path = as_path(config.output.folder)
    try:
        _check_folder(path)
        path.mkdir(parents=True, exist_ok=True)
        with lock_folder(path):
            _remove_leftovers(path)
            resumes = _is_same_run(path, config)
            write_text(path / RUN_FILE, f"{HEADER}\n{yaml_file.to_yaml(config.to_dict())}")
            yield RunFolder(path, resumes, (path / RESULTS_FILE).is_file())
    except OSError as error:
        if isinstance(error, KitoutError) or not (error.errno in FULL or _concerns(error, path)):
            raise
        name = f" ({error.filename})" if error.filename else ""
        advice = f": {ADVICE[error.errno]}" if error.errno in ADVICE else ""
        raise ConfigError(
            f"output.folder={short_repr(str(path))} cannot be written: {error.strerror or error}{name[:300]}{advice}"
        ) from error


def _remove_leftovers(path: Path) -> None:
    """What a killed run has left in its folder, which is locked: no live run writes here."""
    adapter = path / "adapter"
    for folder in (path, path / "checkpoints", adapter, *(entry for entry in adapter.glob("*") if entry.is_dir())):
        remove_leftovers(folder, lambda name: name in WRITTEN_FILES or name.endswith(".png"))
    checkpoints.list_checkpoints(path / "checkpoints")  # which finishes or deletes what is not whole


def _concerns(error: OSError, folder: Path) -> bool:
    """Whether it is about a file in the folder, or a folder above it."""
    name = str(error.filename or "")
    return bool(name) and (name.startswith(str(folder)) or str(folder).startswith(name))


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Locks the folder for this process; ConfigError, with the owner, if another process works in it."""
    lock, owner = FileLock(folder / LOCK_FILE), folder / OWNER_FILE
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"{folder} is in use by {_owner_text(owner)}: wait for it, stop it, or choose another folder"
        ) from None
    try:
        process = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        write_text(owner, json.dumps(process))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _owner_text(owner_file: Path) -> str:
    """Who has locked the folder, by its owner file; a kill leaves that file behind, but not the lock."""
    try:
        owner = json.loads(owner_file.read_text(encoding="utf-8"))
        host = "" if owner["host"] == socket.gethostname() else f" on {owner['host']}"
        return f"process {owner['pid']}{host} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # not yet written
        return "another process"


def _check_folder(folder: Path) -> None:
    """ConfigError if the folder, or a file in it, belongs to something else: that is never touched."""
    existing = next((p for p in (folder, *folder.parents) if p.exists()), folder)
    if existing.exists() and not existing.is_dir():
        raise ConfigError(f"output.folder={str(folder)!r}: {existing} is a file; choose a folder")
    if not folder.exists():
        return
    names = sorted(entry.name for entry in folder.iterdir())
    if RUN_FILE in names:
        if not _has_header(folder / RUN_FILE):
            raise ConfigError(
                f"{folder} holds a {RUN_FILE} that `kitout train` has not written: choose another output.folder, "
                f"for example {folder / 'out'}"
            )
        return
    unexpected = [name for name in names if name not in {METRICS_FILE, *DRY_RUN_FILES} and not _is_own_file(name)]
    if unexpected:
        shown = ", ".join(unexpected[:4]) + (", ..." if len(unexpected) > 4 else "")
        raise ConfigError(f"{folder} is not the folder of a run: it holds {shown}. Choose a new or empty output.folder")


def _is_own_file(name: str) -> bool:
    """The lock, its owner, or what a kill has left of a file that was being written."""
    written = (METRICS_FILE, RESULTS_FILE, OWNER_FILE, *DRY_RUN_FILES)
    return name in {LOCK_FILE, OWNER_FILE} or any(name.startswith(f".{file}.") for file in written)


def _has_header(file: Path) -> bool:
    with file.open("rb") as opened_file:
        return opened_file.read(len(HEADER.encode())) == HEADER.encode()


def _is_same_run(path: Path, config: RunConfig) -> bool:
    """Whether the folder holds this run; ConfigError if it holds another one. What a dry run leaves is no run."""
    files = (file.relative_to(path) for file in path.rglob("*") if not file.is_dir())
    if all(str(file) in DRY_RUN_FILES or _is_own_file(file.name) for file in files):
        return False
    try:
        old = _flat_settings(load_as(translate(yaml_file.read_yaml(path / RUN_FILE)), type(config)))
    except ConfigError as error:
        raise ConfigError(
            f"the run in {path} cannot be read, it is damaged or of another version (choose another output.folder, or "
            f"delete it): {error}"
        ) from error
    new = _flat_settings(config)
    errors = Errors(ConfigError, f"{path} holds a run of other settings (choose another output.folder, or delete it)")
    for name in dict.fromkeys([*new, *old]):
        old_value, new_value = old.get(name, ABSENT), new.get(name, ABSENT)
        if name == TEMPLATE_DATE and old_value in (None, ABSENT):
            continue  # of a version that did not keep it; the examples themselves are compared
        if old_value != new_value and name not in MAY_DIFFER:
            errors.add(f"{name}: {_value_text(old_value)} there, {_value_text(new_value)} requested")
    errors.raise_if_any()
    return True


def _flat_settings(config: RunConfig) -> dict[str, Any]:
    """By dotted name, a method's defaults too."""
    settings = config.to_dict()
    settings["method"] |= config.method.model_dump(mode="json")
    return flatten(settings)


def _value_text(value: object) -> str:
    return "not set" if value is ABSENT else str(value) if isinstance(value, str) else json.dumps(value)


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted name; an empty list or mapping is a value of its own."""
    if isinstance(values, Mapping) and values:
        items = {str(key): value for key, value in values.items()}
    elif isinstance(values, list | tuple) and values:
        items = {str(i): value for i, value in enumerate(values)}
    else:
        return {prefix: list(values) if isinstance(values, tuple) else values}
    flat: dict[str, Any] = {}
    for key, value in items.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat
