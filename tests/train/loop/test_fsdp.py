"""Several processes: two of them with DistributedDataParallel or FSDP2 come to what one does with the same batch."""

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
from train.other_processes import apart


def same(found: Any, wanted: Any, most: float = 1e-6) -> None:
    tensors = [{key: torch.tensor(value) for key, value in one["weights"].items()} for one in (found, wanted)]
    assert far(*tensors) <= most
    for key, value in wanted["seen"].items():
        assert abs(found["seen"][key] - value) <= 1e-5, key
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(wanted["losses"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["joint", pytest.param("single", marks=pytest.mark.slow)])
def test_two_processes_are_one(tmp_path: Path, kind: str) -> None:
    (wanted,) = apart(runs.shared, tmp_path / "one", kind)
    first, second = apart(runs.shared, tmp_path / "two", kind, processes=2)
    assert first["weights"] == second["weights"]
    assert first["seen"] == second["seen"]
    assert first["tokens"] == wanted["tokens"]
    same(first, wanted)


def test_a_parted_base_is_the_whole_one(tmp_path: Path) -> None:
    (wanted,) = apart(runs.shared, tmp_path / "one", "parted")
    first, second = apart(runs.shared, tmp_path / "two", "parted", processes=2)
    assert first["weights"] == second["weights"]
    same(first, wanted)
    assert first["held"] <= 0.55 * wanted["held"]
    assert first["saved"] == wanted["saved"], "the same fingerprint of the base, and it loads"


@pytest.mark.slow
def test_a_restart_of_two_processes_is_exact(tmp_path: Path) -> None:
    whole = apart(runs.shared, tmp_path / "whole", "joint", processes=2)
    apart(runs.shared, tmp_path / "cut", "joint", 5, processes=2)
    again = apart(runs.shared, tmp_path / "cut", "joint", processes=2)
    assert again[0]["from"] == 4
    for key in ("weights", "losses", "tokens"):
        assert again[0][key] == whole[0][key]


def test_what_cannot_be_parted_is_said_before_training() -> None:
    first, second = apart(runs.proven, processes=2)
    assert first == second
    text, deep, copies, again = first
    assert "'text' (PromptTuning) works with a block's weights outside of that block" in text
    assert "'deep' (PrefixTuning)" in deep
    assert "['copies'] put values in the place of the base's own parameters" in copies
    assert "parted already" in again


def test_one_process_has_nothing_to_part() -> None:
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node"):
        fsdp.shard(kit_of("llama"))


LAUNCHED = """
import json, sys
from pathlib import Path
from train import subprocess_runs as runs
found = runs.shared(Path(sys.argv[1]), sys.argv[2])
if runs.processes.rank() == 0:
    Path(sys.argv[1], "found.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
@pytest.mark.parametrize("kind", ["joint", "parted"])
def test_as_users_start_it(tmp_path: Path, launcher: str, kind: str) -> None:
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
    (wanted,) = apart(runs.shared, tmp_path / "one", kind)
    same(json.loads((tmp_path / "found.json").read_text()), wanted)
