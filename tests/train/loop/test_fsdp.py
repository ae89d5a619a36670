"""Several processes: two of them with DistributedDataParallel or FSDP2 get the results of one with the same batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kitout.errors import ConfigError
from kitout.train.loop import fsdp
from train import subprocess_runs as runs
from train.fixtures import far, kit_of
from train.other_processes import run_in_processes


def assert_same_run(run: Any, reference: Any) -> None:
    weights = [{key: torch.tensor(value) for key, value in one["weights"].items()} for one in (run, reference)]
    assert far(*weights) <= 1e-6
    for key, value in reference["eval_losses"].items():
        assert abs(run["eval_losses"][key] - value) <= 1e-5, key
    torch.testing.assert_close(torch.tensor(run["losses"]), torch.tensor(reference["losses"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["joint", pytest.param("single", marks=pytest.mark.slow)])
def test_two_processes_equal_one(tmp_path: Path, kind: str) -> None:
    (reference,) = run_in_processes(runs.train_in_group, tmp_path / "one", kind)
    first, second = run_in_processes(runs.train_in_group, tmp_path / "two", kind, processes=2)
    assert first["weights"] == second["weights"]
    assert first["eval_losses"] == second["eval_losses"]
    assert first["tokens"] == reference["tokens"]
    assert_same_run(first, reference)


def test_a_sharded_base_equals_the_whole_one(tmp_path: Path) -> None:
    (reference,) = run_in_processes(runs.train_in_group, tmp_path / "one", "sharded")
    first, second = run_in_processes(runs.train_in_group, tmp_path / "two", "sharded", processes=2)
    assert first["weights"] == second["weights"]
    assert_same_run(first, reference)
    assert first["base_size"] <= 0.55 * reference["base_size"]
    assert first["fingerprint"] == reference["fingerprint"], "the same fingerprint of the base, and it loads"


@pytest.mark.slow
def test_compiled_blocks_in_two_processes_equal_eager_ones_in_one(tmp_path: Path) -> None:
    (reference,) = run_in_processes(runs.train_in_group, tmp_path / "one", "compiled")
    first, second = run_in_processes(runs.train_in_group, tmp_path / "two", "compiled", processes=2)
    assert (reference["compiled"], first["compiled"], second["compiled"]) == (False, True, True)
    assert first["weights"] == second["weights"]
    assert_same_run(first, reference)


@pytest.mark.slow
@pytest.mark.parametrize("is_sharded", [False, True])
def test_pairs_in_two_processes_equal_one(tmp_path: Path, is_sharded: bool) -> None:
    (reference,) = run_in_processes(runs.train_pairs_in_group, tmp_path / "one", is_sharded)
    first, second = run_in_processes(runs.train_pairs_in_group, tmp_path / "two", is_sharded, processes=2)
    assert first == second
    weights = [{key: torch.tensor(value) for key, value in run["weights"].items()} for run in (first, reference)]
    assert far(*weights) <= 1e-6
    assert first["baselines"] == pytest.approx(reference["baselines"], abs=1e-6)
    for row, expected in zip(first["logged"], reference["logged"], strict=True):
        assert row == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_resuming_two_processes_is_exact(tmp_path: Path) -> None:
    whole = run_in_processes(runs.train_in_group, tmp_path / "whole", "joint", processes=2)
    run_in_processes(runs.train_in_group, tmp_path / "cut", "joint", 5, processes=2)
    again = run_in_processes(runs.train_in_group, tmp_path / "cut", "joint", processes=2)
    assert again[0]["from"] == 4
    for key in ("weights", "losses", "tokens"):
        assert again[0][key] == whole[0][key]


def test_what_cannot_be_sharded_is_refused_before_training() -> None:
    first, second = run_in_processes(runs.shard_refusals, processes=2)
    assert first == second
    text, deep, copies, again = first
    assert "'text' (PromptTuning) uses a block's weights outside of that block" in text
    assert "'deep' (PrefixTuning)" in deep
    assert "['copies'] replace the base's own parameters" in copies
    assert "already sharded" in again


def test_one_process_cannot_shard() -> None:
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node"):
        fsdp.shard(kit_of("llama"))


LAUNCHED = """
import json, sys
from pathlib import Path
from train import subprocess_runs as runs
summary = runs.train_in_group(Path(sys.argv[1]), sys.argv[2])
if runs.distributed.rank() == 0:
    Path(sys.argv[1], "summary.json").write_text(json.dumps(summary))
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
@pytest.mark.parametrize("kind", ["joint", "sharded"])
def test_started_by_a_launcher(tmp_path: Path, launcher: str, kind: str) -> None:
    import json
    import os

    (tmp_path / "script.py").write_text(LAUNCHED)
    starts = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
        "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1",
                       "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"],
    }  # fmt: skip
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *starts[launcher], str(tmp_path / "script.py"), str(tmp_path), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    (reference,) = run_in_processes(runs.train_in_group, tmp_path / "one", kind)
    assert_same_run(json.loads((tmp_path / "summary.json").read_text()), reference)
