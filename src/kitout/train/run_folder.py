"""The folder of a run: made or found again, held by one process, never another run's.

run.yaml holds the whole config. The same settings go on where the run stopped; other ones are refused by name, with
both values; settings that cost but do not change the result may differ. It knows no model, no trainer and no data.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kitout.errors import ConfigError, Errors
from kitout.files.atomic import write_text
from kitout.train.config import yaml_file
from kitout.train.config.load import load
from kitout.train.config.schema import RunConfig
from kitout.train.metrics_log import METRICS_FILE as METRICS
from kitout.train.metrics_log import to_json_value

RUN_FILE, RESULTS_FILE = "run.yaml", "results.json"
LOCK_FILE, OWNER_FILE = (
    ".run.lock",
    ".run.owner",
)  # the owner has a file of its own: some systems lock the bytes of the first
PREFLIGHT_FILES = ("preflight.json", "preflight.txt")
HEADER = "# Written by `kitout train`: the settings of the run in this folder."

# They change what a run costs, says or keeps, not what it learns.
MAY_DIFFER = {
    *(
        "train.micro_batch_size",
        "train.activation_checkpointing",
        "train.fsdp",
        "train.save_steps",
        "train.keep_checkpoints",
    ),
    *("evaluate.show_examples", "output.folder", "output.report_to"),
}
DRY_RUN_FILES = {RUN_FILE, "estimate.json", *PREFLIGHT_FILES}  # files of a run that has only been looked at
ABSENT = object()


@dataclass(frozen=True)
class RunFolder:
    """resumes: the folder held this run before. done: and it is finished."""

    path: Path
    resumes: bool
    is_finished: bool

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def results(self) -> Path:
        return self.path / RESULTS_FILE

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Writes results.json, whose presence says that the run is through: to be called last."""
        words = json.dumps(to_json_value(results), indent=2, ensure_ascii=False)
        write_text(self.results, words + "\n")

    def finished_message(self) -> str:
        """What to say of a finished run."""
        return (
            f"{self.path} holds this run, finished: see {self.results.name}"
            + (f" and {self.report.name}" if self.report.is_file() else "")
            + f"\nto run it again: say another output.folder, or delete {self.path}"
        )


@contextmanager
def open_run_folder(config: RunConfig) -> Iterator[RunFolder]:
    """The run's folder, held for this process alone (the main one); ConfigError if it is in use or another run's."""
    path = config.output.folder.expanduser()
    _check_folder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with lock_folder(path):
            resumes = _is_same_run(path, config)
            write_text(path / RUN_FILE, f"{HEADER}\n{yaml_file.to_yaml(config.to_dict())}")
            yield RunFolder(path, resumes, (path / RESULTS_FILE).is_file())
    except PermissionError as wrong:
        raise ConfigError(
            f"output.folder={str(path)!r} cannot be written: {wrong.strerror} ({wrong.filename})"
        ) from wrong


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """The folder is this process's own inside; ConfigError, with its owner, if another process works in it."""
    lock, owner = FileLock(folder / LOCK_FILE), folder / OWNER_FILE
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"{folder} is in use by {_owner_text(owner)}: wait for it, stop it, or choose another folder"
        ) from None
    try:
        facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        write_text(owner, json.dumps(facts))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _owner_text(owner_file: Path) -> str:
    """Who holds the folder, from its owner file; a kill leaves that file, but then nobody holds the lock."""
    try:
        owner = json.loads(owner_file.read_text(encoding="utf-8"))
        where = "" if owner["host"] == socket.gethostname() else f" on {owner['host']}"
        return f"process {owner['pid']}{where} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # not yet written
        return "another process"


def _check_folder(folder: Path) -> None:
    """Nothing that is not ours is touched: neither a foreign folder nor a foreign file in it."""
    above = next((p for p in (folder, *folder.parents) if p.exists()), folder)
    if above.exists() and not above.is_dir():
        raise ConfigError(f"output.folder={str(folder)!r}: {above} is a file; say a folder")
    if not folder.exists():
        return
    names = sorted(entry.name for entry in folder.iterdir())
    if RUN_FILE in names:
        if not _has_header(folder / RUN_FILE):
            raise ConfigError(
                f"{folder} holds a {RUN_FILE} that `kitout train` has not written: say another output.folder, "
                f"for example {folder / 'out'}"
            )
        return
    strange = [name for name in names if name not in {METRICS, *DRY_RUN_FILES} and not _is_own_file(name)]
    if strange:
        shown = ", ".join(strange[:4]) + (", ..." if len(strange) > 4 else "")
        raise ConfigError(f"{folder} is no run's folder: it holds {shown}. Say a new or empty output.folder")


def _is_own_file(name: str) -> bool:
    """The lock, its owner, or what a kill has left of a file that was being written."""
    written = (RUN_FILE, METRICS, RESULTS_FILE, OWNER_FILE, *PREFLIGHT_FILES)
    return name in {LOCK_FILE, OWNER_FILE} or any(name.startswith(f".{made}.") for made in written)


def _has_header(file: Path) -> bool:
    with file.open("rb") as opened_file:
        return opened_file.read(len(HEADER.encode())) == HEADER.encode()


def _is_same_run(path: Path, config: RunConfig) -> bool:
    """Whether the folder holds this run; raises if it holds another. What a dry run leaves is no run."""
    found = (file.relative_to(path) for file in path.rglob("*") if not file.is_dir())
    if all(str(file) in DRY_RUN_FILES or _is_own_file(file.name) for file in found):
        return False
    try:
        old = _flat_settings(load(yaml_file.read_yaml(path / RUN_FILE)))
    except ConfigError as wrong:
        raise ConfigError(
            f"the run in {path} cannot be read, it is damaged or of another version (say another output.folder, or "
            f"delete it): {wrong}"
        ) from wrong
    new = _flat_settings(config)
    faults = Errors(ConfigError, f"{path} holds a run of other settings (say another output.folder, or delete it)")
    for name in dict.fromkeys([*new, *old]):
        before, now = old.get(name, ABSENT), new.get(name, ABSENT)
        if before != now and name not in MAY_DIFFER:
            faults.add(f"{name}: {_value_text(before)} there, {_value_text(now)} asked for")
    faults.raise_if_any()
    return True


def _flat_settings(config: RunConfig) -> dict[str, Any]:
    """By dotted name, a method's defaults too."""
    full = config.to_dict()
    full["method"] |= config.method.model_dump(mode="json")
    return flatten(full)


def _value_text(value: object) -> str:
    return "not set" if value is ABSENT else str(value) if isinstance(value, str) else json.dumps(value)


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted name; an empty list or mapping is a value of its own."""
    if isinstance(values, Mapping) and values:
        inside = {str(key): value for key, value in values.items()}
    elif isinstance(values, list | tuple) and values:
        inside = {str(i): value for i, value in enumerate(values)}
    else:
        return {prefix: list(values) if isinstance(values, tuple) else values}
    found: dict[str, Any] = {}
    for key, value in inside.items():
        found |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return found
