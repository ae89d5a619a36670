"""One writer for all: what fails at any point leaves what was there before, and nothing beside it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kitout.errors import ConfigError
from kitout.evaluate.report import html, model_card, plots
from kitout.evaluate.report.summary import RunSummary
from kitout.files import atomic
from kitout.train.config.load import load
from kitout.train.metrics_log import MetricsLog
from kitout.train.run_folder import RunFolder, open_run_folder

KINDS: dict[str, Callable[[Path, str], Any]] = {
    "text": lambda place, words: atomic.write_text(place, words),
    "bytes": lambda place, words: atomic.write_bytes(place, words.encode()),
    "folder": lambda place, words: atomic.replace_folder(
        place, ("a",), lambda fresh: (fresh / "a").write_text(words, encoding="utf-8")
    ),
}


def content(place: Path) -> str:
    return (place / "a" if place.is_dir() else place).read_text(encoding="utf-8")


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def stopped(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def half(self: Path, data: Any, *_: Any, **__: Any) -> Any:
    with self.open("wb") as file:
        file.write(b"half")
    full()


ERRORS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "while writing": lambda m: (m.setattr(Path, "write_bytes", half), m.setattr(Path, "write_text", half)),
    "while renaming": lambda m: (m.setattr(os, "replace", full), m.setattr(atomic, "_exchange", full)),
    "Ctrl-C while renaming": lambda m: m.setattr(os, "replace", stopped),
}


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("write", KINDS.values(), ids=KINDS)
def test_nothing_is_left_behind(
    write: Callable[[Path, str], Any], error: Callable[[pytest.MonkeyPatch], None], there: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    place = tmp_path / "x"
    if there:
        write(place, "before ü")
    with monkeypatch.context() as patch:
        error(patch)
        with pytest.raises((OSError, KeyboardInterrupt)):
            write(place, "after")
    assert [path.name for path in tmp_path.iterdir()] == (["x"] if there else [])
    assert not there or content(place) == "before ü"
    write(place, "after")
    assert content(place) == "after"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_that_cannot_be_flushed_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    KINDS["folder"](tmp_path / "x", "before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        KINDS["folder"](tmp_path / "x", "after")
    assert content(tmp_path / "x") == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def summary() -> RunSummary:
    return RunSummary(title="t", model="m", method="LoRA")


WRITERS: dict[str, Callable[[Path], Any]] = {
    "report.html": lambda folder: html.write_html(summary(), folder / "report.html"),
    "README.md": lambda folder: model_card.write_model_card(summary(), folder),
    "loss.png": lambda folder: plots.write_png(folder / "loss.png", b"\x89PNG"),
    "metrics.jsonl": lambda folder: MetricsLog(folder / "metrics.jsonl").resume_at(0),
    "results.json": lambda folder: RunFolder(folder, False, False).write_results({"loss": 1.0}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_each_writer_of_a_run_leaves_nothing_behind(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_text("before", encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            WRITERS[name](tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text(encoding="utf-8") == "before"
    WRITERS[name](tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() != b"before"


def test_a_run_folder_that_cannot_be_written_keeps_no_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load({"model": "m", "data": "d.jsonl", "output": {"folder": str(tmp_path)}})
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(ConfigError, match="No space"), open_run_folder(run):
            pass
    assert [path.name for path in tmp_path.iterdir()] == [".run.lock"]
    with open_run_folder(run):
        pass


HOLDER = """
import sys, pathlib, time
from kitout.files import atomic
def write_into(folder):
    (folder / "a").write_text("half")
    print(folder.name, flush=True)
    time.sleep(60)
atomic.replace_folder(pathlib.Path(sys.argv[1]), ("a",), write_into)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no locks on folders")
def test_what_a_killed_process_has_left_is_removed_and_a_live_ones_is_not(tmp_path: Path) -> None:
    write = KINDS["folder"]
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "one")], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        left = tmp_path / other.stdout.readline().strip()
        try:
            write(tmp_path / "two", "new")
            assert (left / "a").is_file(), "its writer lives"
            (tmp_path / f".results.json.{other.pid}").touch()
            (tmp_path / f".results.json.{os.getpid()}").touch()  # of a process that had our number before
            (tmp_path / ".mine.json.1").touch()
            atomic.remove_leftovers(tmp_path, lambda name: name == "results.json")
            assert (tmp_path / f".results.json.{other.pid}").is_file()
        finally:
            other.kill()
    assert left.is_dir()
    atomic.remove_leftovers(tmp_path, lambda name: name == "results.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.json.1", "two"]


def test_threads_write_one_file_at_once(tmp_path: Path) -> None:
    place, errors = tmp_path / "a.json", []

    def write(letter: str) -> None:
        try:
            for _ in range(100):
                atomic.write_text(place, letter * 10_000)
                atomic.remove_leftovers(tmp_path, lambda name: name == "a.json")
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert place.read_text(encoding="utf-8") in {letter * 10_000 for letter in "abcd"}
    (tmp_path / f".a.json.{os.getpid()}-{threads[0].native_id}").touch()  # it is over
    atomic.remove_leftovers(tmp_path, lambda name: name == "a.json")
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize("killed_at", ["first", "second"])
def test_two_renames_that_a_kill_interrupted_are_finished_or_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    """Where folders cannot be exchanged; the old one is never lost."""
    write, target = KINDS["folder"], tmp_path / "one"
    write(target, "old")
    left = tmp_path / f".kitout-{'0' * 32}"
    left.mkdir()
    (left / "a").write_text("new")
    old = tmp_path / f"{left.name}-old-one"
    if killed_at == "first":
        target.rename(old)
    else:
        left.rename(old)
    write(tmp_path / "two", "x")
    assert content(target) == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    write(target, "newer")
    assert content(target) == "newer"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
