"""One schema: what it refuses and in which words, what it writes and reads back, what it says about itself."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from kitout import IA3, LoRA
from kitout.errors import ConfigError
from kitout.method import REGISTRY
from kitout.train.config import conflicts, describe, yaml_file
from kitout.train.config.load import load
from kitout.train.config.schema import JobConfig, RunConfig, TrainConfig

LEAST: dict[str, Any] = {"model": "m", "data": "d.jsonl"}


def faults(values: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as wrong:
        load(values)
    head, *listed = str(wrong.value).split("\n  - ")
    return listed or [head.removeprefix("the run's config: ")]


def test_short_forms() -> None:
    run = load({**LEAST, "method": "IA3"})
    assert run.model.name == "m"
    assert run.data.train[0].path == "d.jsonl"
    assert run.method == IA3()
    assert run.train == TrainConfig()
    assert load({**LEAST, "train": None, "evaluate": None, "output": None}) == load(LEAST)


@pytest.mark.parametrize("name", REGISTRY)
def test_a_dump_loads_as_the_same_run(name: str) -> None:
    settings = {"LoRA": {"rank": 4}, "PartialFineTuning": {"last": 1}}.get(name, {})
    run = load(
        LEAST
        | {
            "method": {"name": name, **settings},
            "data": {"train": ["a", {"path": "b", "weight": 2, "columns": {"text": "t"}}], "labels": ["no", 1, "1e-4"]},
            "train": {"lr": 1e-5, "steps": 7},
            "jobs": [{"name": "x", "train": {"epochs": 2}}, {"name": "y", "method": "BitFit", "data": "z"}],
        }
    )
    assert load(run.to_dict()) == run
    assert load(yaml_file.parse_yaml(yaml_file.to_yaml(run.to_dict()), "run.yaml")) == run
    assert json.loads(json.dumps(run.to_dict())) == run.to_dict()
    assert load(run.to_dict()).per_job() == run.per_job()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"trian": {}}, "trian: there is no such setting; did you mean 'train'?"),
        ({"train": {"lr": "fast"}}, "train.lr: expected a number, found 'fast'"),
        ({"train": {"lr": 0}}, "train.lr: expected more than 0, found 0"),
        ({"train": {"warmup_ratio": 1}}, "train.warmup_ratio: expected less than 1, found 1"),
        ({"train": {"lr": float("nan")}}, "train.lr: expected"),
        ({"train": 3}, "train: expected settings (name: value), found 3"),
        ({"train": {"bacth": 3}}, "train.bacth: there is no such setting; did you mean 'batch'?"),
        ({"model": {"name": "m", "dtype": "fp16"}}, "model.dtype: expected 'auto', 'float32', 'bfloat16' or 'float16'"),
        ({"data": {"train": "x", "validation": {}}}, "data.validation: expected a text or a number or a whole number"),
        ({"data": {"train": "x", "validation": 1.5}}, "data.validation: a share lies between 0 and 1"),
        ({"data": {"train": "x", "test": -1}}, "data.test: expected 0 or more"),
        ({"data": {"train": []}}, "data.train: say at least one source"),
        (
            {"data": {"train": [{"paht": 1, "path": "y"}]}},
            "data.train.0.paht: there is no such setting; did you mean",
        ),
        ({"data": {"train": {"path": "x", "columns": {"text": 3}}}}, "data.train.0.columns.text: expected a text"),
        ({"data": {"train": "x", "labels": ["a", "a"]}}, "data.labels: expected at least 2 labels, each once"),
        ({"method": "lora"}, "method: there is no method 'lora': did you mean 'LoRA'?"),
        ({"method": 3}, "method: write a method's name"),
        ({"method": None}, "method: write a method's name"),
        ({"method": {"name": "LoRA", "rnk": 3}}, "method.rnk: LoRA has no such setting; did you mean 'rank'?"),
        ({"method": {"name": "LoRA", "rank": 0}}, "method.rank: rank must be at least 1, found 0"),
        ({"method": {"name": "LoRA", "rank": "x"}}, "method.rank: expected a whole number or settings (name: value)"),
        ({"jobs": [{"name": "a", "method": {"name": "IA3", "x": 1}}]}, "jobs.0.method.x: IA3 has no such setting"),
        ({"jobs": [{"name": "a"}, {"name": "a"}]}, "two jobs share a name: ['a']"),
        ({"jobs": [{"name": "a b"}]}, "jobs.0.name: 'a b': use 1 to 128 letters"),
        ({"output": {"name": "../x"}}, "output.name: '../x': use 1 to 128 letters"),
    ],
)
def test_a_fault_names_the_setting_and_what_to_write(values: dict[str, Any], words: str) -> None:
    found = faults(LEAST | values)
    assert len(found) == 1, found
    assert found[0].startswith(words)


def test_every_fault_is_told_at_once() -> None:
    found = faults({"train": {"lr": -1, "epochs": 0}, "method": {"name": "LoRA", "rnk": 1, "rank": 0}, "data": "d"})
    assert len(found) == 5
    assert found[0] == "model: must be said"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model": {"name": "m", "dtype": "float16", "device": "cpu"}}, "float16 overflows"),
        ({"model": {"name": "m", "attention": "flash_attention_2", "device": "cpu"}}, "needs a GPU"),
        ({"model": {"name": "m", "attention": "flash_attention_2", "dtype": "float32"}}, "bfloat16 or float16"),
        ({"objective": "classification", "train": {"packing": True}}, "for language models"),
        ({"objective": "causal_lm", "method": "VPT"}, "method=PromptTuning"),
        ({"objective": "image_classification", "method": "PromptTuning"}, "method=VPT"),
        ({"train": {"packing": True}, "method": "PromptTuning"}, "one place for its tokens"),
        ({"train": {"micro_batch_size": 32}}, "more than the train.batch_size=16"),
        ({"data": {"train": "d", "streaming": True}}, "say train.steps"),
        (
            {"data": {"train": "d", "validation": 0}, "train": {"early_stopping_patience": 2}},
            "train.early_stopping_patience=2 waits",
        ),
        ({"evaluate": {"steps": 0, "best_metric": "f1"}}, "evaluate.best_metric=f1 chooses"),
        (
            {"objective": "image_classification", "method": "VPT", "jobs": [{"name": "a", "method": "PromptTuning"}]},
            "method=VPT",
        ),
    ],
)
def test_contradictions(values: dict[str, Any], words: str) -> None:
    found = faults(LEAST | values)
    assert len(found) == 1
    assert words in found[0]


def test_what_this_machine_cannot() -> None:
    half = load({**LEAST, "model": {"name": "m", "dtype": "float16"}})
    conflicts.check_machine(half, has_cuda=True)
    with pytest.raises(ConfigError, match=r"float16.*no GPU here"):
        conflicts.check_machine(half, has_cuda=False)
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        conflicts.check_machine(load({**LEAST, "model": {"name": "m", "device": "cuda"}}), has_cuda=False)
    conflicts.check_machine(load(LEAST), has_cuda=False)


def test_jobs_inherit_what_they_do_not_say() -> None:
    run = RunConfig(
        model="m",  # type: ignore[arg-type]
        data={"train": "d", "max_length": 64},  # type: ignore[arg-type]
        train=TrainConfig(epochs=3),
        jobs=(
            JobConfig(name="a", train=TrainConfig(lr=0.5)),
            JobConfig(name="b", method=IA3(), data="e"),  # type: ignore[arg-type]
        ),
    )
    first, second = run.per_job()
    assert (first.train.lr, first.train.epochs, first.method) == (0.5, 3, LoRA())
    assert (second.train.lr, second.data.train[0].path, second.data.max_length) == (None, "e", 64)
    assert (second.method, second.output.name, second.jobs) == (IA3(), "b", ())
    assert load(LEAST).per_job() == (load(LEAST),)


def test_the_schema_knows_every_method() -> None:
    schema = json.loads(json.dumps(RunConfig.model_json_schema()))
    offered = {one["properties"]["name"]["const"]: one for one in schema["properties"]["method"]["oneOf"]}
    assert set(offered) == set(REGISTRY)
    assert "rank" in offered["LoRA"]["properties"]
    assert "rank" not in offered["IA3"]["properties"]
    assert all(one["description"] for one in offered.values())
    assert schema["$defs"]["TrainConfig"]["properties"]["lr"]["description"].startswith("Learning rate")


def test_every_setting_is_explained() -> None:
    told = {f"{section.name}.{setting.name}" for section in describe.sections() for setting in section.settings}
    dumped = load({**LEAST, "jobs": [{"name": "a"}]}).to_dict()
    flat = {f"{k}.{inner}" for k, values in dumped.items() if isinstance(values, dict) for inner in values}
    assert flat - {"method.name"} <= told
    for section in describe.sections():
        assert section.text
        for setting in section.settings:
            assert setting.text, f"{section.name}.{setting.name} has no docstring"
            assert setting.kind


def test_the_example_is_a_run() -> None:
    text = describe.example_yaml()
    assert all(len(line) <= 112 for line in text.split("\n"))
    run = load(yaml_file.parse_yaml(text, "example"))
    assert run.output.folder.name == "first"
    without_jobs = text.replace("#jobs:", "").replace("#  - name: first", "")
    everything = re.sub(r"^(\s*)#(?=\w+:)", r"\1", without_jobs, flags=re.MULTILINE)
    assert (
        load(yaml_file.parse_yaml(everything, "all of it")) == run
    )  # every commented setting stands there with its default
    assert everything.count("\n") == text.count("\n")
    assert yaml_file.parse_yaml(everything, "all of it").keys() >= set(RunConfig.model_fields) - {"jobs"}
