"""Stages in one object: short forms, what is written and read back, what a stage is as a run, errors in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kitout import IA3, LoRA
from kitout.align.config.kinds import KINDS, default_lr
from kitout.align.config.load import load_align
from kitout.align.config.schema import AlignConfig, RewardSource, StageRun, with_default_lr
from kitout.errors import ConfigError
from kitout.train.config import yaml_file
from kitout.train.config.load import load_as
from kitout.train.config.schema import RunConfig

SFT: dict[str, Any] = {"kind": "sft", "data": "chats.jsonl"}
REWARD: dict[str, Any] = {"kind": "reward", "data": "pairs.jsonl", "from": "sft"}
PPO: dict[str, Any] = {"kind": "ppo", "data": "prompts.jsonl", "from": "sft", "reward": "reward"}


def stages(*values: dict[str, Any], **top: Any) -> AlignConfig:
    return load_align({"model": "m", "output": "runs/x", "stages": list(values)} | top)


def errors(values: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_align(values)
    head, *listed = str(error.value).split("\n  - ")
    return listed or [head.removeprefix("the run's config: ")]


def test_short_forms() -> None:
    config = stages(SFT, REWARD, PPO)
    assert config.model.name == "m"
    assert config.output.folder == Path("runs/x")
    assert [stage.name for stage in config.stages] == ["sft", "reward", "ppo"]
    assert config.stages[1].data.train[0].path == "pairs.jsonl"
    assert config.stages[2].reward == (RewardSource(source="reward"),)
    assert stages(SFT | {"train": None, "evaluate": None, "loss": None}, output=None) == stages(SFT, output={})
    assert load_align({"model": "m", "stages": SFT}) == load_align({"model": "m", **SFT})


@pytest.mark.parametrize(
    ("reward", "found"),
    [
        ("a/b", [("a/b", 1.0, "adapter")]),
        ("rules:length", [("rules:length", 1.0, "function")]),
        ("pkg.rules:length", [("pkg.rules:length", 1.0, "function")]),
        ("gym:chain_sum", [("gym:chain_sum", 1.0, "gym")]),
        (["a", {"source": "b", "weight": 2}], [("a", 1.0, "adapter"), ("b", 2.0, "adapter")]),
        ({"a": 1, "x:y": -0.5}, [("a", 1.0, "adapter"), ("x:y", -0.5, "function")]),
        ({"source": "a", "weight": 3}, [("a", 3.0, "adapter")]),
        (Path("c"), [("c", 1.0, "adapter")]),
        ("C:\\runs\\adapter", [("C:\\runs\\adapter", 1.0, "adapter")]),
    ],
)
def test_forms_of_a_reward(reward: Any, found: list[tuple[str, float, str]]) -> None:
    config = stages({"kind": "grpo", "data": "d", "reward": reward})
    assert [(one.source, one.weight, one.of) for one in config.stages[0].reward] == found


@pytest.mark.parametrize("kind", KINDS)
def test_a_dump_loads_as_the_same_stages(kind: str) -> None:
    one = {
        "kind": kind, "name": "x", "from": "runs/a/adapter", "method": {"name": "LoRA", "rank": 4},
        "data": {"train": [{"path": "d", "limit": 3}]}, "train": {"lr": 1e-5, "steps": 7}, "evaluate": {"steps": 3},
    }  # fmt: skip
    one |= {"reward": {"gym:chain_sum": 2, "runs/r/adapter": 1}} if KINDS[kind].takes_reward else {}
    for config in (stages(one), stages(SFT, one), stages(one | {"method": None})):
        plain = config.to_dict()
        assert load_align(plain) == config
        assert load_align(yaml_file.parse_yaml(yaml_file.to_yaml(plain), "run.yaml")) == config
        assert json.loads(json.dumps(plain)) == plain
        absent = {"loss", "rollout", "reward"} - plain["stages"][-1].keys()
        expected = set() if KINDS[kind].takes_reward else {"rollout", "reward"}
        assert absent == expected | ({"loss"} if KINDS[kind].loss is None else set())


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_is_a_run_whose_own_file_is_the_stage_again(kind: str) -> None:
    one = {"kind": kind, "data": "d", "from": "sft", "name": "x"}
    one |= {"reward": "taste", "rollout": {"prompts": 3, "samples": 4}} if KINDS[kind].takes_reward else {}
    config = stages(SFT | {"method": "IA3"}, REWARD | {"name": "taste"}, one)
    run = config.stages[2].run_config(config)
    assert isinstance(run, RunConfig)
    assert run.output.folder == Path("runs/x/x")
    assert run.output.name == "x"
    assert run.train.from_ == str(Path("runs/x/sft/adapter"))
    assert run.method == IA3()
    assert run.kind == kind
    assert run.loss == config.stages[2].loss
    if KINDS[kind].takes_reward:
        assert run.train.batch_size == 3
        assert [reward.source for reward in run.reward] == [str(Path("runs/x/taste/adapter"))]
    assert load_as(run.to_dict(), StageRun) == run
    again = load_align(run.to_dict())  # the run.yaml of the stage's folder
    assert next(again.runs()) == run


def test_a_single_stage_has_the_folder_itself() -> None:
    assert next(stages(SFT).runs()).output.folder == Path("runs/x")
    assert [run.output.folder for run in stages(SFT, REWARD).runs()] == [Path("runs/x/sft"), Path("runs/x/reward")]


def test_the_method_is_that_of_what_a_stage_starts_from() -> None:
    config = stages(SFT | {"method": "IA3"}, REWARD, {"kind": "dpo", "data": "p"}, PPO | {"from": "runs/y/adapter"})
    runs = list(config.runs())
    assert [type(run.method).__name__ for run in runs] == ["IA3", "IA3", "LoRA", "LoRA"]
    assert [("method" in run.model_fields_set) for run in runs] == [True, True, True, False]  # the folder's own
    assert config.method_of(config.stages[3]) is None


@pytest.mark.parametrize(("kind", "factor"), [("sft", 1), ("reward", 1), ("dpo", 0.1), ("kto", 0.1), ("ppo", 0.1)])
def test_the_learning_rate_is_a_multiple_of_the_methods_own(kind: str, factor: float) -> None:
    own = LoRA().training_defaults().lr
    assert default_lr(kind, LoRA()) == pytest.approx(own * factor)
    reward = {"reward": "gym:chain_sum"} if KINDS[kind].takes_reward else {}
    (run,) = stages({"kind": kind, "data": "d", **reward}).runs()
    assert run.train.lr is None
    assert with_default_lr(run).train.lr == default_lr(kind, LoRA())
    (run,) = stages({"kind": kind, "data": "d", "train": {"lr": 3e-3}, **reward}).runs()
    assert with_default_lr(run).train.lr == 3e-3


def test_when_there_is_a_reference() -> None:
    reference = {name for name in KINDS if _has_reference(name, {})}
    assert reference == {"dpo", "kto", "rloo", "ppo"}
    assert _has_reference("grpo", {"beta": 0.04})
    assert not _has_reference("ppo", {"beta": 0})


def _has_reference(kind: str, loss: dict[str, Any]) -> bool:
    values = {"kind": kind, "data": "d"} | ({"loss": loss} if loss else {})
    return stages(values | ({"reward": "gym:x"} if KINDS[kind].takes_reward else {})).stages[0].has_reference


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "stages: is required"),
        ({"stages": []}, "stages: expected at least one stage: {kind: dpo, data: pairs.jsonl}"),
        ({"stages": 3}, "stages: expected a list, found 3"),
        ({"stages": ["dpo"]}, "stages.0: expected settings (name: value), found 'dpo'"),
        ({"stages": [{"data": "d"}]}, "stages.0.kind: is required"),
        ({"stages": [{"kind": "dop", "data": "d"}]}, "stages.0.kind: there is no kind 'dop': did you mean 'dpo'?"),
        ({"stages": [{"kind": ["dpo"], "data": "d"}]}, "stages.0.kind: there is no kind ['dpo']"),
        ({"stages": [{"kind": "dpo"}]}, "stages.0.data: is required"),
        ({"stages": [SFT | {"name": "a b"}]}, "stages.0.name: 'a b': use 1 to 128 letters"),
        ({"stages": [SFT], "output": {"name": "x"}}, "output.name: there is no such setting"),
        ({"stages": [SFT], "stage": "x"}, "stage: there is no such setting; write stages"),
        ({"stages": [SFT], "lr": 1}, "lr: there is no such setting; write stages.0.train.lr"),
        ({"stages": [SFT], "loss": {}}, "loss: there is no such setting; write stages.0.loss"),
        ({"stages": [SFT], "kind": "dpo"}, "kind: there is no such setting; write stages.0.kind"),
        ({"stages": [SFT | {"lr": 1}]}, "stages.0.lr: there is no such setting; write stages.0.train.lr"),
        (
            {"stages": [SFT | {"train": {"max_length": 1}}]},
            "stages.0.train.max_length: there is no such setting; write stages.0.data.max_length",
        ),
        (
            {"stages": [SFT | {"train": {"learning_rate": 1}}]},
            "stages.0.train.learning_rate: there is no such setting; write stages.0.train.lr",
        ),
        ({"stages": [SFT | {"train": {"batch": 1}}]}, "stages.0.train.batch: is now stages.0.train.batch_size"),
        (
            {"stages": [SFT | {"kind": "dpo", "beta": 1}]},
            "stages.0.beta: there is no such setting; write stages.0.loss.beta",
        ),
        (
            {"stages": [SFT | {"kind": "rloo", "num_generations": 1}]},
            "stages.0.num_generations: there is no such setting; write stages.0.rollout.samples",
        ),
        (
            {"stages": [SFT | {"kind": "grpo", "reward_funcs": 1}]},
            "stages.0.reward_funcs: there is no such setting; write stages.0.reward",
        ),
        ({"stages": [SFT | {"use_vllm": 1}]}, "stages.0.use_vllm: there is no such setting; leave it out: answers are"),
        ({"stages": [SFT | {"method": "loar"}]}, "stages.0.method: there is no method 'loar': did you mean 'LoRA'?"),
        ({"stages": [SFT | {"method": {"name": "LoRA", "rnk": 3}}]}, "stages.0.method.rnk: LoRA has no such setting"),
        (
            {"stages": [SFT | {"rollout": {"samples": 3}}]},
            "stages.0.rollout: a stage of kind sft samples no answers (grpo, rloo, ppo do): leave it out",
        ),
        (
            {"stages": [SFT, PPO | {"reward": print}]},
            "stages.1.reward: a function is named by its module, so that a run can be resumed: write module:function",
        ),
        ({"stages": [SFT, PPO | {"reward": {"a": "b"}}]}, "stages.1.reward.0.weight: expected a number, found 'b'"),
        (
            {"stages": [SFT, PPO | {"reward": "gym:x", "rollout": 3}]},
            "stages.1.rollout: expected settings (name: value), found 3",
        ),
        (
            {"stages": [SFT, PPO | {"reward": "gym:x", "rollout": {"prompts": 0}}]},
            "stages.1.rollout.prompts: expected more than 0",
        ),
        (
            {"stages": [SFT, PPO | {"reward": "gym:x", "rollout": {"samples": 0}}]},
            "stages.1.rollout.samples: expected more than 0",
        ),
        (
            {"stages": [SFT, PPO | {"reward": "gym:x", "rollout": {"max_new_tokens": 0}}]},
            "stages.1.rollout.max_new_tokens: expected more than 0",
        ),
        (
            {"stages": [SFT, PPO | {"reward": "gym:x", "rollout": {"temperature": 0}}]},
            "stages.1.rollout.temperature: expected more than 0",
        ),
        (
            {"stages": [SFT, PPO | {"reward": "gym:x", "rollout": {"top_p": 2}}]},
            "stages.1.rollout.top_p: expected 1 or less",
        ),
        (
            {"stages": [SFT, PPO | {"reward": "gym:x", "rollout": {"top_k": -1}}]},
            "stages.1.rollout.top_k: expected 0 or more",
        ),
        (
            {"stages": [SFT, PPO | {"reward": "gym:x", "rollout": {"sampels": 2}}]},
            "stages.1.rollout.sampels: there is no such setting; did you mean 'samples'?",
        ),
    ],
)
def test_an_error_names_the_setting_and_what_to_write(values: dict[str, Any], words: str) -> None:
    found = errors({"model": "m"} | values)
    assert len(found) == 1, found
    assert found[0].startswith(words)


def test_one_stage_at_the_top_names_settings_as_they_stand_there() -> None:
    found = errors({"model": "m", "kind": "dpo", "data": "d", "lr": 1, "loss": {"beta": 0}, "train": {"lr": "x"}})
    assert sorted(found) == [
        "loss.beta: expected more than 0, found 0",
        "lr: there is no such setting; write train.lr",
        "train.lr: expected a number, found 'x'",
    ]


def test_the_json_schema_is_of_every_loss() -> None:
    schema = AlignConfig.model_json_schema()
    losses = {kind.loss.__name__ for kind in KINDS.values() if kind.loss is not None}
    assert losses <= set(schema["$defs"])
    assert schema["$defs"]["StageConfig"]["properties"]["kind"]["enum"] == list(KINDS)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (
            [PPO | {"name": "value", "reward": "m:f", "from": None}],
            "stages.0.name=value: the stage itself has another adapter of",
        ),
        ([SFT, PPO | {"name": "reward-0", "reward": "m:f"}], "stages.1.name=reward-0: the stage itself has another"),
        (
            [SFT, {"kind": "dpo", "name": "reference", "from": "sft", "data": "d"}],
            "stages.1.name=reference: the stage itself has another adapter of that name beside the one that it trains",
        ),
        (
            [
                PPO
                | {
                    "from": None,
                    "reward": "m:f",
                    "rollout": {"prompts": 2, "samples": 3},
                    "train": {"micro_batch_size": 7},
                }
            ],
            "train.micro_batch_size=7 is more than the rollout.prompts=2 x rollout.samples=3 answers",
        ),
        (
            [PPO | {"from": None, "reward": "m:f", "evaluate": {"prove_merge": True}}],
            "stages.0.evaluate.prove_merge: prompts have no answers to compare",
        ),
    ],
)
def test_stages_that_cannot_be_meant(stages: list[dict[str, Any]], words: str) -> None:
    found = errors({"model": "m", "stages": stages})
    assert len(found) == 1, found
    assert found[0].startswith(words)


def test_micro_batches_are_cut_from_all_answers_of_a_step() -> None:
    one = PPO | {"from": None, "reward": "m:f", "rollout": {"prompts": 2, "samples": 3}}
    load_align({"model": "m", "stages": [one | {"train": {"micro_batch_size": 6}}]})
