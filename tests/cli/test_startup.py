"""What each start loads: help and errors of a config come without torch, methods with torch alone, and few modules.

A fresh process each, because what is imported once stays imported.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kitout.cli import VERBS, load_verb

HEAVY = ("torch", "transformers", "numpy", "pandas", "pyarrow", "datasets", "matplotlib", "PIL", "peft", "accelerate")
WITHOUT_TORCH_MODULES = 550  # 315 to 420
MORE_THAN_TORCH_MODULES = 350  # 200
TORCH_ALONE = "import sys, torch; print(len(sys.modules))"
START = """
import contextlib, io, json, sys
from kitout.cli import main
for args in json.loads(sys.argv[1]):
    sys.argv, output = ["kitout", *args], io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), contextlib.suppress(SystemExit):
        main()
    loaded = [name for name in {heavy} if name in sys.modules]
    print(json.dumps([output.getvalue(), len(sys.modules), loaded]))
"""


def start(*commands: list[str]) -> list[tuple[str, int, set[str]]]:
    """By command, of one process: what is printed, the modules loaded so far, and the heavy packages loaded so far."""
    code = START.format(heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)], capture_output=True, text=True, check=True
    )
    return [(text, modules, set(loaded)) for text, modules, loaded in map(json.loads, done.stdout.splitlines())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("startup")
    (folder / "broken.yaml").write_text("model: [x\n")
    (folder / "jobs.yaml").write_text(
        "model: m\ndata: d\nmethod: {name: vpt_deep}\nbogus: 1\njobs: [{name: a}, {name: b, method: ia3}]\n"
    )
    (folder / "stages.yaml").write_text(
        "model: m\noutput: {name: x}\nbogus: 1\nstages: [{kind: sft, lr: 1, data: d, loss: {beta: 1}}, {kind: dop, "
        "data: d}, {kind: dpo, data: d, loss: {beta: 0, bta: 1}}, {kind: ppo, data: d, rollout: {samples: 0}, "
        "reward: 3}]\n"
    )
    (folder / "conflicts.yaml").write_text(
        "model: m\nstages: [{kind: sft, data: d, from: dpo}, {kind: dpo, data: d, reward: x, train: {packing: true}}, "
        "{kind: grpo, data: d, rollout: {samples: 1}}]\n"
    )
    return folder


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--help"], "train"),
        (["tran"], "Did you mean"),
        (["demo", "text", "--help"], "LoRA"),
        (["train", "nowhere.yaml"], "nowhere.yaml is not there"),
        (["train", "{folder}/broken.yaml"], "broken.yaml, line"),
        (["train", "{folder}/jobs.yaml"], "bogus: there is no such setting"),
        (["train", "--model", "m", "--data", "d", "train.learning_rate=1"], "write train.lr"),
        (["train", "--model", "m", "--data", "d", "=1", "train.epochs=x"], "2 errors"),
        (["train", "--model", "m", "--data", "d", "--lr", "1"], "write train.lr"),
        (["train", "--model", "m", "--data", "d", "--method", "LORA", "train.lr=x"], "expected a number"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_without_torch(args: list[str], text: str, folder: Path) -> None:
    ((output, modules, loaded),) = start([arg.format(folder=folder) for arg in args])
    assert text in output
    assert not loaded
    assert modules < WITHOUT_TORCH_MODULES


def test_align_without_torch(folder: Path) -> None:
    """In one process: a module that any of them loads stays loaded."""
    commands = {
        "stages.0.loss.beta": ["align"],
        "loss.kl_target": ["align", "ppo", "--help"],
        "kind: ppo": ["align", "--example"],
        "nowhere.yaml is not there": ["align", "nowhere.yaml"],
        "did you mean 'dpo'": ["align", "dop"],
        "9 errors": ["align", "{folder}/stages.yaml"],
        "5 errors": ["align", "{folder}/conflicts.yaml"],
        "loss.beta: expected more": ["align", "dpo", "--model", "m", "--data", "d", "loss.beta=0", "method=IA3"],
        "needs what scores its answers": ["align", "grpo", "--model", "m", "--data", "d"],
        "write loss.beta": ["align", "dpo", "--model", "m", "--data", "d", "--beta", "1"],
    }
    started = start(*([arg.format(folder=folder) for arg in args] for args in commands.values()))
    assert [text for text, (output, *_) in zip(commands, started, strict=True) if text not in output] == []
    _, modules, loaded = started[-1]
    assert not loaded
    assert modules < WITHOUT_TORCH_MODULES


def test_with_torch_alone() -> None:
    run = ["train", "--model", "m", "--data", "d"]
    commands = {
        "PrefixTuning": ["methods"],
        "rank": ["methods", "lora"],
        "train.lr": ["train", "--help"],
        "model:": ["train", "--example"],
        "method.rank": [*run, "method.rank=0"],
        "there is no method": [*run, "method=nothing", "train.lr=x"],
        "train.micro_batch_size=99": [*run, "train.micro_batch_size=99"],
    }
    started = start(*commands.values())
    assert [text for text, (output, *_) in zip(commands, started, strict=True) if text not in output] == []
    assert started[-1][2] <= {"torch", "numpy"}
    done = subprocess.run([sys.executable, "-c", TORCH_ALONE], capture_output=True, text=True, check=True)
    assert started[0][1] < int(done.stdout) + MORE_THAN_TORCH_MODULES


def test_public_names_load_no_transformers() -> None:
    code = (
        "import sys, kitout; [getattr(kitout, name) for name in kitout.__all__]; "
        "kitout.attach; print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("verb", VERBS)
def test_the_first_line_of_a_verb_is_its_own(verb: str) -> None:
    own = load_verb(verb).help
    assert " ".join(own.split()).startswith(VERBS[verb])
