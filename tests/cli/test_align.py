"""`kitout align` as a person meets it: help, files to start from, one stage by options, errors in plain words."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from kitout.align.config import describe
from kitout.align.config.kinds import KINDS
from kitout.align.config.load import load_align
from kitout.align.config.schema import AlignConfig
from kitout.cli import app
from kitout.train.config import yaml_file


def kitout_align(*args: str) -> Result:
    return CliRunner().invoke(app, ["align", *args])


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[AlignConfig]:
    importlib.import_module("kitout.align.start")
    found: list[AlignConfig] = []
    start = lambda config, dry_run, log: found.append(config)  # noqa: E731
    monkeypatch.setattr(sys.modules["kitout.align.start"], "start", start)
    return found


@pytest.mark.parametrize("args", [[], ["--help"]])
def test_help_explains_every_setting_and_kind(args: list[str]) -> None:
    result = kitout_align(*args)
    assert result.exit_code == 0
    for section in describe.align_sections():
        for setting in section.settings:
            assert f"{section.name}.{setting.name}".lstrip(".") in result.stdout
    for name, kind in KINDS.items():
        assert f"  {name:<7} {kind.title}" in result.stdout
    assert "kitout align --example > run.yaml" in result.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_the_help_of_a_kind_has_its_settings_alone(kind: str) -> None:
    result = kitout_align(kind, "--help")
    assert result.exit_code == 0
    for section in describe.kind_sections(kind):
        for setting in section.settings:
            default = f" = {setting.default}" if setting.default else ", required"
            name = f"{section.name}.{setting.name}".lstrip(".")
            assert f"  {name}  {setting.kind}{default}\n" in result.stdout
    assert ("  rollout." in result.stdout) == KINDS[kind].takes_reward
    assert ("  loss." in result.stdout) == (KINDS[kind].loss is not None)
    assert "stages.0" not in result.stdout


def test_the_examples_are_runs() -> None:
    assert load_align(yaml_file.parse_yaml(kitout_align("--example").stdout, "example")).stages[2].kind == "ppo"
    assert load_align(yaml_file.parse_yaml(kitout_align("kto", "--example").stdout, "example")).stages[0].kind == "kto"


def test_the_schema_is_json() -> None:
    schema = json.loads(kitout_align("--json-schema").stdout)
    assert set(schema["properties"]) == {"model", "output", "stages"}


def test_one_stage_by_options(started: list[AlignConfig]) -> None:
    result = kitout_align(
        "ppo", "--model", "m", "--data", "q.jsonl", "--from", "a/adapter", "--reward", "r/adapter", "--reward", "x:f",
        "--out", "runs/1", "reward.1.weight=3", "loss.beta=0.2", "rollout.prompts=4", "train.steps=3",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    (config,) = started
    (stage,) = config.stages
    assert (stage.kind, stage.from_, stage.data.train[0].path) == ("ppo", "a/adapter", "q.jsonl")
    assert [(one.source, one.weight) for one in stage.reward] == [("r/adapter", 1), ("x:f", 3)]
    assert config.output.folder == Path("runs/1")
    assert stage.loss is not None
    assert stage.loss.model_dump()["beta"] == 0.2


def test_stages_of_a_file_by_name_or_number(started: list[AlignConfig], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    stages: list[dict[str, Any]] = [
        {"kind": "sft", "data": "d"},
        {"kind": "dpo", "name": "first", "data": "p", "from": "sft"},
        {"kind": "dpo", "name": "second", "data": "p", "from": "first"},
    ]
    file.write_text(yaml_file.to_yaml({"model": "m", "stages": stages}))
    words = ["stages.second.loss.beta=0.5", "stages.1.loss.beta=0.3", "stages.sft.data.train.limit=9", "output=x"]
    result = kitout_align(str(file), *words)
    assert result.exit_code == 0, result.stderr
    betas = [stage.loss.model_dump()["beta"] for stage in started[0].stages if stage.loss is not None]
    assert betas == [0.3, 0.5]
    assert started[0].stages[0].data.train[0].limit == 9
    assert started[0].output.folder == Path("x")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "m"], "a run.yaml is required, or a kind (sft, reward, dpo,"),
        (["nowhere.yaml"], "nowhere.yaml is not there"),
        (["dop", "--model", "m"], "there is no kind of stage 'dop', and no file: did you mean 'dpo'?"),
        (["a.yaml", "b.yaml"], "one run.yaml at a time, not a.yaml, b.yaml"),
        (["dpo", "--model", "m"], "the run's config: data: is required"),
        (["dpo", "--data", "d"], "the run's config: model: is required"),
        (["dpo", "--model", "m", "--data", "d", "--beta", "1"], "there is no option --beta; write loss.beta"),
        (["dpo", "--model", "m", "--data", "d", "--lr", "1"], "there is no option --lr; write train.lr"),
        (["dpo", "--modle", "m"], "there is no option --modle; did you mean --model?"),
        (["dpo", "--model", "m", "--data", "d", "loss.bta=1"], "loss.bta: there is no such setting; did you mean"),
        (["dpo", "--model", "m", "--data", "d", "--reward", "x"], "kind dpo takes none (grpo, rloo, ppo do)"),
        (["grpo", "--model", "m", "--data", "d"], "a grpo stage needs what scores its answers: a stage of kind"),
        (["grpo", "--model", "m", "--data", "gym:a"], "needs what scores its answers: write reward=gym:a"),
        (["dpo", "--model", "m", "--data", "d", "--method", "loar"], "did you mean 'LoRA'?"),
        (["dpo", "--model", "m", "--data", "d", "x.y=1", "=2"], "2 errors"),
        (["{stages}", "stages.dop.loss.beta=1"], "choose one, for example stages.0, or by name (sft, dpo)"),
        (["{stages}", "stages.7.loss.beta=1"], "there is no entry '7' (there are 0 to 1: sft, dpo)"),
        (["{stages}", "--data", "d"], "data: there is no such setting; write stages.0.data"),
        (["{stages}", "--lr", "1"], "there is no option --lr; write stages.0.train.lr"),
        (["dpo", "{stages}"], "holds stages of its own: leave dpo out, or name a file without stages"),
    ],
)  # fmt: skip
def test_errors_in_plain_words(args: list[str], message: str, tmp_path: Path) -> None:
    file = tmp_path / "stages.yaml"
    file.write_text("model: m\nstages: [{kind: sft, data: d}, {kind: dpo, data: p}]\n")
    result = kitout_align(*(arg.format(stages=file) for arg in args))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
