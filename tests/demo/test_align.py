"""The alignment demo: its options as stages, and the whole of it on a tiny model, pairs and a stand-in of the gym."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from blank_plots import blank_plots
from kitout.align import find_inputs
from kitout.cli.demo import app
from kitout.demo.align import DPO_LR, GRPO_LR, GRPO_SCHEDULE, MODEL, PAIRS, SYSTEM_PROMPT, TASK, AlignDemo, preset
from tiny_models import decoder, jsonl

__all__ = ["blank_plots"]  # runs of these tests draw no plots

FACTORY = '''
from dataclasses import dataclass


@dataclass
class SumConfig:
    max_digits: int = 4
    max_terms: int = 6
    min_digits: int = 1
    size: int = 500
    seed: int = 0


class Sums:
    """As reasoning-gym's own: entries of a size and seed, and a judgment."""

    def __init__(self, config):
        self.config = config

    def __len__(self):
        return self.config.size

    def __getitem__(self, i):
        a, b = 10 + (self.config.seed + i) % 90, 10 + (self.config.seed + i) // 90 * 7 % 90
        return {"question": f"{a} + {b} =", "answer": str(a + b), "metadata": {"source_dataset": "chain_sum"}}

    def score_answer(self, answer, entry):
        return float(answer == entry["answer"]) or 0.01 * (len(answer or "") % 7)


DATASETS = {"chain_sum": (Sums, SumConfig)}
'''
PACKAGE = """
from reasoning_gym.factory import DATASETS


def create_dataset(name, **settings):
    kind, config = DATASETS[name]
    return kind(config(**settings))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def gym(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path / "site" / "reasoning_gym"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(PACKAGE)
    (folder / "factory.py").write_text(FACTORY)
    for name in [name for name in sys.modules if name.partition(".")[0] == "reasoning_gym"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(folder.parent)
    yield
    for name in ("reasoning_gym", "reasoning_gym.factory"):
        sys.modules.pop(name, None)


def align(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["align", *map(str, args)])
    return result.exit_code, result.output


def test_the_preset_is_the_built_in_model_sums_and_pairs() -> None:
    config = preset(AlignDemo())
    assert config.model.name == MODEL
    assert [(stage.name, stage.from_) for stage in config.stages] == [
        ("sft", None), ("grpo", "sft"), ("reward", None), ("dpo", None),
    ]  # fmt: skip
    sft, grpo, reward, dpo = config.stages
    assert sft.data == grpo.data, "what is held out of one was not trained on by the other"
    assert (sft.data.train[0].path, sft.data.train[0].system_prompt) == (TASK, SYSTEM_PROMPT)
    assert grpo.reward[0].source == TASK
    assert reward.data == dpo.data
    assert reward.data.train[0].path == PAIRS
    assert [stage.train.lr for stage in config.stages] == [None, GRPO_LR, None, DPO_LR], "else the kinds' own"
    assert grpo.train.lr_schedule == GRPO_SCHEDULE


def test_options_become_settings() -> None:
    config = preset(AlignDemo(model=Path("m"), task="gym:gcd", pairs=Path("p.jsonl"), out=Path("o"), scale=0.1, seed=3))
    assert (config.model.name, config.output.folder) == ("m", Path("o"))
    assert config.stages[1].reward[0].source == config.stages[0].data.train[0].path == "gym:gcd"
    assert config.stages[2].data.train[0].path == "p.jsonl"
    assert config.stages[0].data.test == config.stages[0].evaluate.max_test_examples == 30
    assert {stage.train.seed for stage in config.stages} == {stage.data.seed for stage in config.stages} == {3}


def test_all_stages_end_in_one_table(model: Path, gym: None, tmp_path: Path) -> None:
    pairs = jsonl(
        tmp_path / "pairs.jsonl", [{"prompt": f"a {i}", "chosen": "good", "rejected": f"bad {i}"} for i in range(40)]
    )
    texts = jsonl(tmp_path / "texts.jsonl", [{"text": f"good movie {i} and a bad one"} for i in range(6)])
    args = ("--model", model, "--pairs", pairs, "--elsewhere", texts, "--out", tmp_path / "out", "--scale", 0.02)
    code, output = align(*args)
    assert code == 0, output
    for text in (
        "What was learned", "exact match", "sums: the base, then sft", "sums: sft, then grpo", "pair accuracy",
        "pairs: the longer answer, then the reward model", "pairs: the base, then dpo",
        f"{texts}: the base, then grpo", f"{texts}: the base, then dpo", "bits per byte", str(tmp_path / "out" / "dpo"),
    ):  # fmt: skip
        assert text in output
    table = output.partition("What was learned")[2]
    prompts = [
        [one["prompt"] for one in json.loads((tmp_path / "out" / name / "results.json").read_text())["examples"][name]]
        for name in ("sft", "grpo")
    ]
    assert all(any(one in shown for shown in prompts[0]) for one in prompts[1]), "both stages hold out the same sums"
    code, output = align(*args)
    assert code == 0, output
    assert "finished" in output
    assert output.partition("What was learned")[2] == table, "finished stages give the same table"


def test_errors_of_the_user_are_one_line_and_no_traceback(
    model: Path, gym: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for args, expected in (
        (("--pairs", tmp_path / "no.jsonl"), "there is no file"),
        (("--task", "gym:chain_sum:max_terms"), "'max_terms' is no setting=value"),
        (("--task", "sums"), "reward"),
    ):
        code, output = align("--model", model, "--elsewhere", "", *args, "--out", tmp_path / "out")
        assert code != 0
        assert expected in output
        assert "Traceback" not in output
    monkeypatch.setattr(find_inputs, "GYM_PACKAGE", "no_such_gym")
    code, output = align("--model", model, "--elsewhere", "", "--out", tmp_path / "out")
    assert code != 0
    assert "needs reasoning-gym" in output
    assert "[align]" in output
