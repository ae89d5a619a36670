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

from kitout.errors import ConfigError, Faults
from kitout.files.atomic import write_text
from kitout.train.config import yaml_file
from kitout.train.config.load import load
from kitout.train.config.schema import RunConfig
from kitout.train.metrics_log import FILE as METRICS
from kitout.train.metrics_log import to_json_value

RUN, RESULTS = "run.yaml", "results.json"
LOCK, OWNER = ".run.lock", ".run.owner"  # the owner has a file of its own: some systems lock the bytes of the first
PREFLIGHT = ("preflight.json", "preflight.txt")
SIGN = "# Written by `kitout train`: the settings of the run in this folder."

# They change what a run costs, says or keeps, not what it learns.
FREE = {
    *("train.micro_batch", "train.checkpointing", "train.shard", "train.save_every", "train.keep"),
    *("evaluate.shown", "output.folder", "output.report_to"),
}
BEGINNING = {RUN, "estimate.json", *PREFLIGHT}  # files of a run that has only been looked at
ABSENT = object()


@dataclass(frozen=True)
class RunFolder:
    """resumes: the folder held this run before. done: and it is finished."""

    path: Path
    resumes: bool
    done: bool

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
        return self.path / RESULTS

    def finish(self, results: Mapping[str, Any]) -> None:
        """Writes results.json, whose presence says that the run is through: to be called last."""
        words = json.dumps(to_json_value(results), indent=2, ensure_ascii=False)
        write_text(self.results, words + "\n")

    def again(self) -> str:
        """What to say of a finished run."""
        return (
            f"{self.path} holds this run, finished: see {self.results.name}"
            + (f" and {self.report.name}" if self.report.is_file() else "")
            + f"\nto run it again: say another output.folder, or delete {self.path}"
        )


@contextmanager
def opened(config: RunConfig) -> Iterator[RunFolder]:
    """The run's folder, held for this process alone (the main one); ConfigError if it is in use or another run's."""
    path = config.output.folder.expanduser()
    _check_place(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with held(path):
            resumes = _check_run(path, config)
            write_text(path / RUN, f"{SIGN}\n{yaml_file.written(config.dump())}")
            yield RunFolder(path, resumes, (path / RESULTS).is_file())
    except PermissionError as wrong:
        raise ConfigError(
            f"output.folder={str(path)!r} cannot be written: {wrong.strerror} ({wrong.filename})"
        ) from wrong


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder is this process's own inside; ConfigError, with its owner, if another process works in it."""
    lock, owner = FileLock(folder / LOCK), folder / OWNER
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"{folder} is in use by {_named(owner)}: wait for it, stop it, or choose another folder"
        ) from None
    try:
        facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        write_text(owner, json.dumps(facts))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _named(file: Path) -> str:
    """Who holds the folder, from its owner file; a kill leaves that file, but then nobody holds the lock."""
    try:
        owner = json.loads(file.read_text(encoding="utf-8"))
        where = "" if owner["host"] == socket.gethostname() else f" on {owner['host']}"
        return f"process {owner['pid']}{where} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # not yet written
        return "another process"


def _check_place(path: Path) -> None:
    """Nothing that is not ours is touched: neither a foreign folder nor a foreign file in it."""
    above = next((p for p in (path, *path.parents) if p.exists()), path)
    if above.exists() and not above.is_dir():
        raise ConfigError(f"output.folder={str(path)!r}: {above} is a file; say a folder")
    if not path.exists():
        return
    names = sorted(entry.name for entry in path.iterdir())
    if RUN in names:
        if not _signed(path / RUN):
            raise ConfigError(
                f"{path} holds a {RUN} that `kitout train` has not written: say another output.folder, "
                f"for example {path / 'out'}"
            )
        return
    strange = [name for name in names if name not in {METRICS, *BEGINNING} and not _ours(name)]
    if strange:
        shown = ", ".join(strange[:4]) + (", ..." if len(strange) > 4 else "")
        raise ConfigError(f"{path} is no run's folder: it holds {shown}. Say a new or empty output.folder")


def _ours(name: str) -> bool:
    """The lock, its owner, or what a kill has left of a file that was being written."""
    written = (RUN, METRICS, RESULTS, OWNER, *PREFLIGHT)
    return name in {LOCK, OWNER} or any(name.startswith(f".{made}.") for made in written)


def _signed(file: Path) -> bool:
    with file.open("rb") as opened_file:
        return opened_file.read(len(SIGN.encode())) == SIGN.encode()


def _check_run(path: Path, config: RunConfig) -> bool:
    """Whether the folder holds this run; raises if it holds another. What a dry run leaves is no run."""
    found = (file.relative_to(path) for file in path.rglob("*") if not file.is_dir())
    if all(str(file) in BEGINNING or _ours(file.name) for file in found):
        return False
    try:
        old = _settings(load(yaml_file.read(path / RUN)))
    except ConfigError as wrong:
        raise ConfigError(
            f"the run in {path} cannot be read, it is damaged or of another version (say another output.folder, or "
            f"delete it): {wrong}"
        ) from wrong
    new = _settings(config)
    faults = Faults(ConfigError, f"{path} holds a run of other settings (say another output.folder, or delete it)")
    for name in dict.fromkeys([*new, *old]):
        before, now = old.get(name, ABSENT), new.get(name, ABSENT)
        if before != now and name not in FREE:
            faults.add(f"{name}: {_shown(before)} there, {_shown(now)} asked for")
    faults.raise_if_any()
    return True


def _settings(config: RunConfig) -> dict[str, Any]:
    """By dotted name, a method's defaults too."""
    full = config.dump()
    full["method"] |= config.method.model_dump(mode="json")
    return flat(full)


def _shown(value: object) -> str:
    return "not set" if value is ABSENT else str(value) if isinstance(value, str) else json.dumps(value)


def flat(values: Any, name: str = "") -> dict[str, Any]:
    """Nested values by dotted name; an empty list or mapping is a value of its own."""
    if isinstance(values, Mapping) and values:
        inside = {str(key): value for key, value in values.items()}
    elif isinstance(values, list | tuple) and values:
        inside = {str(i): value for i, value in enumerate(values)}
    else:
        return {name: list(values) if isinstance(values, tuple) else values}
    found: dict[str, Any] = {}
    for key, value in inside.items():
        found |= flat(value, f"{name}.{key}" if name else key)
    return found
