"""A run's folder: one process at a time, one run only, never what is not ours."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kitout.errors import ConfigError, KitoutError
from kitout.train import run_folder
from kitout.train.config import yaml_file
from kitout.train.config.load import load
from kitout.train.config.schema import RunConfig
from kitout.train.run_folder import LOCK_FILE, MAY_DIFFER, OWNER_FILE, RUN_FILE, flatten, open_run_folder

HOLDER = """
import sys, time
from pathlib import Path
from kitout.train.run_folder import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def begin(folder: Path, **changes: Any) -> None:
    """A run that has logged its first step."""
    with open_run_folder(config(folder, **changes)) as run:
        run.metrics.write_text("{}\n")


def config(folder: Path, **changes: Any) -> RunConfig:
    values: dict[str, Any] = {"model": "m", "data": "d.jsonl", "output": {"folder": str(folder)}}
    return load(values | changes)


def test_new_then_resumed_then_finished(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    with open_run_folder(config(folder)) as run:
        assert (run.path, run.resumes, run.is_finished) == (folder, False, False)
        run.metrics.write_text("{}\n")
    with open_run_folder(config(folder)) as run:
        assert (run.resumes, run.is_finished) == (True, False)
        run.write_results({"loss": 0.5, "worst": float("nan"), "by": {"a": 1}})
    with open_run_folder(config(folder)) as run:
        assert (run.resumes, run.is_finished) == (True, True)
        assert "delete" in run.finished_message()
    assert json.loads(run.results.read_text()) == {"loss": 0.5, "worst": None, "by": {"a": 1}}


def test_what_a_dry_run_leaves_is_no_run(tmp_path: Path) -> None:
    with open_run_folder(config(tmp_path)) as run:
        run.checkpoints.mkdir()
        (tmp_path / "preflight.txt").touch()
        (tmp_path / ".run.yaml.123").touch()
    with open_run_folder(config(tmp_path, method="IA3")) as run:
        assert not run.resumes
    assert load(yaml_file.read_yaml(tmp_path / RUN_FILE)) == config(tmp_path, method="IA3")


def test_run_yaml_holds_the_run(tmp_path: Path) -> None:
    run_config = config(
        tmp_path, method={"name": "IA3"}, train={"lr": 3e-4}, data={"train": "1e-4", "labels": ["no", "1"]}
    )
    with open_run_folder(run_config):
        assert load(yaml_file.read_yaml(tmp_path / RUN_FILE)) == run_config


def test_other_settings_are_named_with_both_values(tmp_path: Path) -> None:
    begin(tmp_path)
    with (
        pytest.raises(ConfigError) as error,
        open_run_folder(config(tmp_path, method="IA3", train={"lr": 0.1, "batch_size": 8})),
    ):
        pass
    message = str(error.value)
    assert "other output.folder" in message
    assert "method.rank: 8 there, not set requested" in message
    for line in (
        "method.name: LoRA there, IA3 requested",
        "train.lr: null there, 0.1",
        "train.batch_size: null there, 8",
    ):
        assert line in message
    assert load(yaml_file.read_yaml(tmp_path / RUN_FILE)) == config(tmp_path)  # nothing was written


def test_settings_that_do_not_change_the_result_may_differ(tmp_path: Path) -> None:
    begin(tmp_path)
    cheaper = {"micro_batch_size": 2, "activation_checkpointing": True, "keep_checkpoints": 5, "save_steps": 3}
    with open_run_folder(config(tmp_path, train=cheaper, evaluate={"show_examples": 1})) as run:
        assert run.resumes
    assert yaml_file.read_yaml(tmp_path / RUN_FILE)["train"]["micro_batch_size"] == 2


def test_settings_that_may_differ_exist(tmp_path: Path) -> None:
    assert set(flatten(config(tmp_path).to_dict())) >= MAY_DIFFER


def test_a_setting_that_came_later_is_no_difference(tmp_path: Path) -> None:
    begin(tmp_path)
    file = tmp_path / RUN_FILE
    file.write_text(file.read_text().replace("  max_grad_norm: 1.0\n", ""))
    with open_run_folder(config(tmp_path)) as run:
        assert run.resumes
    file.write_text(file.read_text().replace("  max_grad_norm: 1.0\n", ""))
    with (
        pytest.raises(ConfigError, match=r"train\.max_grad_norm: 1\.0 there, 2\.0 requested"),
        open_run_folder(config(tmp_path, train={"max_grad_norm": 2})),
    ):
        pass


def test_the_run_of_an_older_folder_resumes_under_todays_names(tmp_path: Path) -> None:
    run_config = config(
        tmp_path,
        objective="token_classification",
        train={"batch_size": 8, "max_grad_norm": 2.0, "save_steps": 3},
        evaluate={"max_test_examples": 9},
        data={"train": [{"path": "d.jsonl", "system_prompt": "be brief"}], "train_on": "last"},
        jobs=[{"name": "a", "train": {"warmup_ratio": 0.5}}],
    )
    with open_run_folder(run_config) as run:
        run.metrics.write_text("{}\n")
    file = tmp_path / RUN_FILE
    text = file.read_text()
    for new, old in (("objective: token_classification", "objective: tokens"), ("batch_size", "batch"),
                     ("max_grad_norm", "clip"), ("save_steps", "save_every"), ("max_test_examples", "test"),
                     ("system_prompt", "instruction"), ("train_on", "learn"), ("warmup_ratio", "warmup")):  # fmt: skip
        assert f"{new}: " in text or new in text
        text = text.replace(new, old)
    file.write_text(text)
    with open_run_folder(run_config) as run:
        assert run.resumes
    assert load(yaml_file.read_yaml(file)) == run_config  # written anew
    file.write_text(text.replace("clip: 2.0", "clip: 3.0"))
    with (
        pytest.raises(ConfigError, match=r"train\.max_grad_norm: 3\.0 there, 2\.0 requested"),
        open_run_folder(run_config),
    ):
        pass


def test_what_auto_was_resolved_to_is_kept(tmp_path: Path) -> None:
    with open_run_folder(config(tmp_path)) as run:
        assert run.read_resolved() == {}
        run.write_resolved({"dtype": "bfloat16"})
    with open_run_folder(config(tmp_path)) as run:
        assert not run.resumes  # it is no run by this alone
        assert run.read_resolved() == {"dtype": "bfloat16"}
    for damaged in ("[]", "{", ""):
        (tmp_path / "resolved.json").write_text(damaged)
        assert run.read_resolved() == {}


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter.json").write_text("{}")
    (tmp_path / "weights.safetensors").write_text("x")
    with pytest.raises(ConfigError, match=r"adapter\.json"), open_run_folder(config(tmp_path)):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.json", "weights.safetensors"]
    file = tmp_path / "file"
    file.write_text("x")
    for path in (file, file / "below"):
        with pytest.raises(ConfigError, match="is a file"), open_run_folder(config(path)):
            pass


def test_the_users_own_run_yaml_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / RUN_FILE).write_text("# mine\nmodel: m\n")
    with pytest.raises(ConfigError, match="has not written"), open_run_folder(config(tmp_path)):
        pass
    assert (tmp_path / RUN_FILE).read_text() == "# mine\nmodel: m\n"


def test_a_kill_at_the_very_beginning_leaves_a_folder_that_can_be_used(tmp_path: Path) -> None:
    for name in (".run.yaml.123", LOCK_FILE, OWNER_FILE, f".{OWNER_FILE}.5", ".preflight.json.7"):
        (tmp_path / name).touch()
    with open_run_folder(config(tmp_path)) as run:
        assert not run.resumes


def test_damaged_settings_are_reported(tmp_path: Path) -> None:
    begin(tmp_path)
    (tmp_path / RUN_FILE).write_text((tmp_path / RUN_FILE).read_text()[:90] + "\n  [")
    with pytest.raises(ConfigError, match="is damaged or of another version"), open_run_folder(config(tmp_path)):
        pass


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be written"), open_run_folder(config(tmp_path / "run")):
        pass


def test_a_live_process_keeps_the_lock_and_a_killed_one_releases_it(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "locked\n"
            in_use = rf"in use by process {other.pid} since 20\d\d-"
            with pytest.raises(ConfigError, match=in_use), open_run_folder(config(tmp_path)):
                pass
            assert not (tmp_path / RUN_FILE).exists()
        finally:
            other.kill()
    assert str(other.pid) in (tmp_path / OWNER_FILE).read_text()
    with open_run_folder(config(tmp_path)) as run:
        assert not run.resumes
    assert not (tmp_path / OWNER_FILE).exists()


def test_the_same_process_cannot_lock_it_twice(tmp_path: Path) -> None:
    begin(tmp_path)
    with open_run_folder(config(tmp_path)):
        with pytest.raises(ConfigError, match=f"process {os.getpid()} since"), open_run_folder(config(tmp_path)):
            pass
        time.sleep(0.01)
    with open_run_folder(config(tmp_path)) as run:  # a refusal has neither released the first lock nor kept one
        assert run.resumes


def test_an_error_releases_the_lock(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_run_folder(config(tmp_path)):
        raise ZeroDivisionError
    with open_run_folder(config(tmp_path)):
        pass


def test_the_owner_may_be_on_another_machine_or_unknown(tmp_path: Path) -> None:
    elsewhere = {"pid": 7, "host": socket.gethostname() + "-2", "since": "2026-01-01 00:00:00"}
    with open_run_folder(config(tmp_path)):
        for content, owner in ((json.dumps(elsewhere), r"process 7 on .*-2 since 2026"), ("{", "another process")):
            (tmp_path / OWNER_FILE).write_text(content)
            with pytest.raises(ConfigError, match=f"in use by {owner}"), open_run_folder(config(tmp_path)):
                pass


def test_what_a_killed_run_has_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    begin(tmp_path)
    adapters = tmp_path / "adapter" / "one"
    adapters.mkdir(parents=True)
    kept = {tmp_path / "notes.txt", tmp_path / ".notes.txt.77", adapters / "adapter.json"}
    dead = 2**22 + 1  # no process has such a number
    left = {
        *(tmp_path / f".{name}.{dead}" for name in ("run.yaml", "results.json", "metrics.jsonl", "confusion-a.png")),
        *(tmp_path / f".{name}.{dead}" for name in ("report.html", "preflight.txt", ".run.owner")),
        adapters / f".README.md.{dead}",
        tmp_path / "checkpoints" / f".diverged.json.{dead}",
    }
    folders = {
        tmp_path / f".kitout-{'1' * 32}", tmp_path / "adapter" / f".kitout-{'2' * 32}",
        tmp_path / "checkpoints" / ".checkpoint-3.new", tmp_path / "checkpoints" / "checkpoint-4",
    }  # fmt: skip
    for folder in folders:
        folder.mkdir(parents=True)
    for file in (*kept, *left):
        file.touch()
    with open_run_folder(config(tmp_path)) as run:
        assert run.resumes
        assert not [path for path in (*left, *folders) if path.exists()]
        assert all(path.exists() for path in kept)


def test_a_disk_that_is_full_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load({"model": "m", "data": "d", "output": {"folder": str(tmp_path / "out")}})

    def full(file: Path, text: str) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_folder, "write_text", full)
    message = "cannot be written: No space left on device: free some space"
    with pytest.raises(ConfigError, match=message), run_folder.open_run_folder(config):
        pass
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="No space left"), run_folder.open_run_folder(config):
        full(tmp_path, "")  # by whatever else writes in a run
    with pytest.raises(OSError, match="unreachable"), run_folder.open_run_folder(config):
        raise OSError(errno.EHOSTUNREACH, "unreachable")  # not about the folder


@pytest.mark.parametrize("name", ["x" * 300, "~no-such-user/x", "a\0b", f"a/{'y' * 300}/b"])
def test_a_folder_that_no_system_can_have(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load({"model": "m", "data": "d", "output": {"folder": name}})
    with pytest.raises(KitoutError) as error, run_folder.open_run_folder(config):
        pass
    assert len(str(error.value)) < 1200
    assert not list(tmp_path.rglob("*.yaml"))
