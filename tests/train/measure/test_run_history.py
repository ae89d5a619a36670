"""The rows that finished runs leave: what is in them and what is not, several processes, and files that refuse."""

from __future__ import annotations

import json
import re
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import kitout
from kitout.errors import ConfigError
from kitout.method import registered_methods
from kitout.train.config.schema import TrainConfig
from kitout.train.loop.jobs import Job
from kitout.train.measure import run_history
from kitout.train.measure.run_history import HISTORY_FILE, HistoryRow, append_rows, design_of, history_file, read_rows
from tiny_models import encoder, jsonl, reviews

ROW = HistoryRow(
    run="r", day="2026-11-30", version="0", source="train", model_kind="bert", depth=2, width=48, parameters=10_000,
    task="classification", examples=40, design='{"method": "LoRA"}', seed=0, metric="accuracy", baseline="base",
    score=0.9, gain=0.2, low=0.1, high=0.3, higher_is_better=True, is_share=True, num_test=10, diverged=False,
    trainable=100, seconds=1.0, memory=0, device="cpu", dtype="float32",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KITOUT_RUNS", str(tmp_path / "history"))
    monkeypatch.setattr(run_history, "LOCK_SECONDS", 0.1)
    return tmp_path / "history"


@pytest.mark.parametrize(
    ("value", "expected"), [("off", None), ("OFF", None), ("0", None), ("no", None), ("on", "data"), ("", "data")]
)
def test_where_it_is(value: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KITOUT_RUNS", value)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    found = history_file()
    assert (found is None) == (expected is None)
    if found is not None and sys.platform == "linux":
        assert found == tmp_path / "kitout" / HISTORY_FILE


def test_a_relative_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KITOUT_RUNS", "of")
    with pytest.raises(ConfigError, match="write off, on, or the absolute path"):
        history_file()


def test_rows_come_back_and_the_file_is_the_users_alone(folder: Path) -> None:
    file = folder / HISTORY_FILE
    assert read_rows(file) == []
    other = replace(ROW, run="s", gain=None, examples=None, diverged=True)
    assert append_rows(file, [ROW]) is True
    file.chmod(0o644)
    assert append_rows(file, [other, ROW]) is False
    assert read_rows(file) == [ROW, other, ROW]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert {path.name for path in folder.iterdir()} == {HISTORY_FILE}


def test_several_processes_at_once(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from kitout.train.measure.run_history import *\n"
        f"row = HistoryRow({', '.join(f'{k}={v!r}' for k, v in vars(ROW).items())})\n"
        "print(sum(append_rows(Path(sys.argv[1]), [row, row]) for _ in range(10)))"
    )
    file = folder / HISTORY_FILE
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    said = [int(process.communicate(timeout=120)[0]) for process in processes]
    assert sorted(said) == [0, 0, 1], "one of them began the file"
    assert len(read_rows(file)) == 60


def damaged(file: Path) -> None:
    file.write_bytes(b"not a database" * 100)


def cut_short(file: Path) -> None:
    append_rows(file, [ROW] * 200)
    file.write_bytes(file.read_bytes()[:5000])


def of_a_later_version(file: Path) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute("PRAGMA user_version = 99")


def a_folder(file: Path) -> None:
    file.mkdir()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damaged, "damaged.*delete it"), (cut_short, "damaged.*delete it"), (of_a_later_version, "update kitout"),
        (a_folder, "unable to open"),
    ],
)  # fmt: skip
def test_what_refuses_is_one_warning(spoil: Callable[[Path], None], message: str, folder: Path) -> None:
    folder.mkdir()
    spoil(folder / HISTORY_FILE)
    assert_one_warning(message)


def test_a_locked_file_is_one_warning(folder: Path) -> None:
    append_rows(folder / HISTORY_FILE, [ROW])
    holder = sqlite3.connect(folder / HISTORY_FILE, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    assert_one_warning("locked")
    holder.close()
    assert read_rows(folder / HISTORY_FILE) == [ROW]


def test_a_full_disk_is_one_warning_and_costs_no_row(folder: Path) -> None:
    resource = pytest.importorskip("resource")
    append_rows(folder / HISTORY_FILE, [ROW])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        assert_one_warning("runs.sqlite")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_rows(folder / HISTORY_FILE) == [ROW]


def assert_one_warning(message: str) -> None:
    """Of a run whose rows cannot be kept."""
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_history, "rows_of_run", lambda *_: [ROW] * 100)
        run_history.record_run(None, None, {}, {}, lines.append)  # type: ignore[arg-type]
    (line,) = lines
    assert re.search(rf"^warning: .*{message}", line)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_nothing_personal_is_in_a_design() -> None:
    """Over all methods: an initial text and names of adapters stay out, whatever a method calls them."""
    job = Job("secret", None, [], [[0, 1]], TrainConfig(batch_size=2))  # type: ignore[arg-type]
    secret = "my secret"
    for method in registered_methods():
        for name, field in method.model_fields.items():
            if name in run_history.SELECTIONS:
                continue
            for value in (secret, (secret,), {secret: "x"}, (1, 2, 3)):
                made = method.model_construct(**{name: value})
                if field.default == value:
                    continue
                assert "settings" in design_of(made, job, 1)
                assert secret not in json.dumps(design_of(made, job, 1))
    lora = design_of(kitout.LoRA(rank=16, targets="mlp.*", bias="all", alpha={"*": 3.0}), job, 1)
    assert lora == {
        "method": "LoRA", "settings": {"rank": 16, "targets": "mlp.*", "bias": "all", "alpha": {"*": 3.0}},
        "lr": 1e-3, "steps": 1, "batch_size": 2,
    }  # fmt: skip


def test_a_run_leaves_its_rows_and_says_so_once(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = encoder(tmp_path / "secretmodel")
    data = jsonl(tmp_path / "secretdata.jsonl", reviews(60))
    printed: list[list[str]] = []

    def train(out: str, **more: Any) -> None:
        printed.append([])
        kitout.train(
            {
                "model": {"name": str(model), "dtype": "float32"}, "data": {"train": str(data), "test": 20},
                "train": {"batch_size": 8, "steps": 2, **more}, "output": {"folder": str(tmp_path / out)},
            },
            log=printed[-1].append,
        )  # fmt: skip

    train("a", seeds=[0, 1], lr=2e-3)
    train("b")
    train("b")  # finished: it is only shown
    said = [sum("KITOUT_RUNS=off" in line for line in lines) for lines in printed]
    assert said == [1, 0, 0]
    rows = read_rows(folder / HISTORY_FILE)
    assert [row.seed for row in rows] == [0, 1, 0]
    assert rows[0].run == rows[1].run != rows[2].run
    first = rows[0]
    assert (first.model_kind, first.depth, first.width, first.task) == ("bert", 2, 48, "classification")
    assert (first.metric, first.num_test, first.is_share, first.diverged) == ("accuracy", 20, True, False)
    assert first.low <= first.gain <= first.high  # type: ignore[operator]
    assert json.loads(first.design) == {
        "method": "LoRA", "settings": {}, "lr": 2e-3, "steps": 2, "batch_size": 8
    }  # fmt: skip
    results = json.loads((tmp_path / "b" / "results.json").read_text())
    assert (rows[2].examples, rows[2].trainable) == (37, results["trainable"]["adapter"])
    content = (folder / HISTORY_FILE).read_bytes()
    assert not [word for word in (b"secret", b"good", str(tmp_path).encode(), b"text") if word in content]
