"""Names of models, data, folders, functions and gyms that are nothing: all at once, before torch has work to do."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from kitout.align.config.load import load_align
from kitout.align.find_inputs import check_align_inputs
from kitout.errors import KitoutError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "old/adapter", "score/adapter"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "base" / "config.json").write_text("{}")
    for name in ("old", "score"):
        (tmp_path / name / "adapter" / "adapter.json").write_text(json.dumps({}))
    (tmp_path / "d.jsonl").write_text("{}\n")
    (tmp_path / "rules.py").write_text("raise RuntimeError('never run')\n")
    return tmp_path


def errors(*stages: dict[str, Any], model: str = "base") -> list[str]:
    config = load_align({"model": model, "stages": list(stages)})
    try:
        check_align_inputs(config, list(config.runs()))
    except KitoutError as error:
        head, *listed = str(error).split("\n  - ")
        return listed or [head.removeprefix("the run's config: ")]
    return []


SFT: dict[str, Any] = {"kind": "sft", "data": "d.jsonl"}
DPO: dict[str, Any] = {"kind": "dpo", "data": "d.jsonl"}
PPO: dict[str, Any] = {"kind": "ppo", "data": "d.jsonl", "reward": "score/adapter"}


def test_what_is_there() -> None:
    assert errors(SFT, DPO | {"from": "sft"}, PPO | {"from": "old/adapter"}) == []
    assert errors(PPO | {"reward": ["rules:length", "json:dumps", "score/adapter"]}) == []


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([DPO | {"from": "nowhere"}], "from='nowhere': no adapter is there"),
        ([DPO | {"from": "old"}], "from='old': no adapter is there; write from=old/adapter"),
        ([SFT, DPO | {"from": "sfft"}], "stages.1.from='sfft': no adapter is there; did you mean the stage 'sft'?"),
        ([SFT, DPO | {"from": "xyz"}], "stages.1.from='xyz': no adapter is there; stages before it: sft"),
        ([SFT, PPO | {"reward": "tsate"}], "stages.1.reward='tsate': no adapter is there"),
        ([PPO | {"reward": "nomodule:f"}], "reward='nomodule:f': there is no module nomodule: start in the folder of"),
        ([DPO | {"data": "n.jsonl"}], "the data cannot be read: there is no file n.jsonl"),
    ],
)
def test_what_is_nothing(stages: list[dict[str, Any]], message: str) -> None:
    (found,) = errors(*stages)
    assert found.startswith(message)


def test_every_wrong_name_at_once() -> None:
    found = errors(SFT | {"data": "x.csv"}, PPO | {"from": "nowhere", "reward": "gone/adapter"}, model="./nobase")
    assert len(found) == 4


def test_a_gym_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    grpo = {"kind": "grpo", "data": "gym:chain_sum#100", "reward": "gym:chain_sum"}
    find_spec = importlib.util.find_spec
    known = {"reasoning_gym": None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: known[name] if name in known else find_spec(name))
    (found,) = errors(grpo)
    assert found.startswith("gym:chain_sum needs reasoning-gym: ")
    assert "install" in found
    known["reasoning_gym"] = find_spec("json")  # type: ignore[assignment]  # any that is there
    assert errors(grpo) == []


def test_a_reward_model_of_peft_is_no_reward(folder: Path) -> None:
    (folder / "score" / "adapter" / "adapter_config.json").write_text("{}")
    assert errors(PPO)[0].startswith("reward='score/adapter' is a folder of Hugging Face PEFT, whose reward models")


@pytest.mark.parametrize("kind", ["dpo", "reward", "sft"])
def test_peft_folders_of_another_task_are_no_start(kind: str, folder: Path) -> None:
    """As a stage of its own would find out only after the stages before it are trained."""
    for task, name in (("SEQ_CLS", "judge"), ("TaskType.TOKEN_CLS", "tags"), ("CAUSAL_LM", "text"), (None, "any")):
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "task_type": task}))
    (folder / "damaged").mkdir()
    (folder / "damaged" / "adapter_config.json").write_text("[")
    one = {"kind": kind, "data": "d.jsonl"}
    for name in ("text", "any", "damaged"):  # the last is for its loader
        assert errors(one | {"from": name}) == []
    (found,) = errors(one | {"from": "judge"})
    assert found == (
        "from='judge' is a folder of Hugging Face PEFT for SEQ_CLS, whose head is that of another model class; a stage "
        f"of kind {kind} starts from what was trained on answers (CAUSAL_LM): name such a folder, or leave from out"
    )
    (found,) = errors(SFT, one | {"from": "tags", "name": "second"})
    assert found.startswith("stages.1.from='tags' is a folder of Hugging Face PEFT for TOKEN_CLS")
    assert found.endswith("or leave stages.1.from out")
