"""One schema: what it refuses and in which words, what it writes and reads back, how it describes itself."""

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
from kitout.train.config.renamed_keys import RENAMED_KEYS, RENAMED_OBJECTIVES, translate
from kitout.train.config.schema import JobConfig, RunConfig, TrainConfig
from kitout.train.objectives.tasks import TASKS

MINIMAL: dict[str, Any] = {"model": "m", "data": "d.jsonl"}


def errors(values: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load(values)
    head, *listed = str(error.value).split("\n  - ")
    return listed or [head.removeprefix("the run's config: ")]


def test_short_forms() -> None:
    run = load({**MINIMAL, "method": "IA3"})
    assert run.model.name == "m"
    assert run.data.train[0].path == "d.jsonl"
    assert run.method == IA3()
    assert run.train == TrainConfig()
    assert load({**MINIMAL, "train": None, "evaluate": None, "output": None}) == load(MINIMAL)


@pytest.mark.parametrize("name", REGISTRY)
def test_a_dump_loads_as_the_same_run(name: str) -> None:
    settings = {"LoRA": {"rank": 4}, "PartialFineTuning": {"last": 1}}.get(name, {})
    run = load(
        MINIMAL
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
        ({"stages": []}, "stages: there is no such setting; stages are trained by `kitout align`"),
        ({"train": {"lr": "fast"}}, "train.lr: expected a number, found 'fast'"),
        ({"train": {"lr": True}}, "train.lr: expected a number, found true"),
        ({"train": {"steps": True}}, "train.steps: expected a number, found true"),
        ({"train": {"seeds": [0, True]}}, "train.seeds: expected a number, found true"),
        ({"data": {"train": "d", "test": False}}, "data.test: expected a number, found false"),
        ({"train": {"lr": 0}}, "train.lr: expected more than 0, found 0"),
        ({"train": {"warmup_ratio": 1}}, "train.warmup_ratio: expected less than 1, found 1"),
        ({"train": {"lr": float("nan")}}, "train.lr: expected"),
        ({"train": 3}, "train: expected settings (name: value), found 3"),
        ({"train": {"bacth_size": 3}}, "train.bacth_size: there is no such setting; did you mean 'batch_size'"),
        ({"model": {"name": "m", "dtype": "fp16"}}, "model.dtype: expected 'auto', 'float32', 'bfloat16' or 'float16'"),
        ({"data": {"train": "x", "validation": {}}}, "data.validation: expected a text or a number or a whole number"),
        ({"data": {"train": "x", "validation": 1.5}}, "data.validation: a fraction is between 0 and 1"),
        ({"data": {"train": "x", "test": -1}}, "data.test: expected 0 or more"),
        ({"data": {"train": []}}, "data.train: expected at least one source"),
        (
            {"data": {"train": [{"paht": 1, "path": "y"}]}},
            "data.train.0.paht: there is no such setting; did you mean",
        ),
        ({"data": {"train": {"path": "x", "columns": {"text": 3}}}}, "data.train.0.columns.text: expected a text"),
        ({"data": {"train": "x", "labels": ["a", "a"]}}, "data.labels: expected at least 2 labels, each once"),
        ({"method": "loar"}, "method: there is no method 'loar': did you mean 'LoRA'?"),
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
def test_an_error_names_the_setting_and_what_to_write(values: dict[str, Any], words: str) -> None:
    found = errors(MINIMAL | values)
    assert len(found) == 1, found
    assert found[0].startswith(words)


def test_every_error_is_reported_at_once() -> None:
    found = errors({"train": {"lr": -1, "epochs": 0}, "method": {"name": "LoRA", "rnk": 1, "rank": 0}, "data": "d"})
    assert len(found) == 5
    assert found[0] == "model: is required"


def test_a_value_that_fits_no_type_is_one_error_among_others() -> None:
    found = errors(MINIMAL | {"data": {"train": "x", "validation": {}, "max_lenght": 3, "test": []}})
    assert found[0].startswith("data.validation: expected a text or a number or a whole number, found {}")
    assert found[1].startswith("data.test: expected a text or a number or a whole number, found []")
    assert found[2] == "data.max_lenght: there is no such setting; did you mean 'max_length'?"


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_an_old_key_names_the_new_one(old: str, new: str) -> None:
    old, new = old.replace("*", "0"), new.replace("*", "0")
    section, key = old.split(".")[0], old.rpartition(".")[2]
    values: dict[str, Any] = {"data": {"train": [{"path": "d"}]}, "model": {"name": "m"}}
    inner = values.setdefault(section, {})
    (inner["train"][0] if ".train.0." in old else inner)[key] = 1
    assert errors(MINIMAL | values) == [f"{old}: is now {new}"]
    if section in ("train", "data"):
        jobs = [{"name": "a", "data": "d"}, {"name": "b", section: values[section]}]
        assert errors(MINIMAL | {"jobs": jobs}) == [f"jobs.1.{old}: is now jobs.1.{new}"]


@pytest.mark.parametrize(("old", "new"), RENAMED_OBJECTIVES.items())
def test_an_old_objective_names_the_new_one(old: str, new: str) -> None:
    assert errors({**MINIMAL, "objective": old}) == [f"objective: {old!r} is now {new!r}"]


def test_new_names_exist() -> None:
    known = {f"{section.name}.{setting.name}" for section in describe.sections() for setting in section.settings}
    assert {new.replace("*", "0") for new in RENAMED_KEYS.values()} <= known
    assert not {old.replace("*", "0") for old in RENAMED_KEYS} & known
    assert {*RENAMED_OBJECTIVES.values()} <= {*TASKS}


def test_an_old_run_yaml_is_translated() -> None:
    old = {"objective": "classify", "train": {"batch": 4, "lr": 1.0}, "data": {"train": [{"instruction": "x"}]}}
    new = {"objective": "classification", "train": {"batch_size": 4, "lr": 1.0},
           "data": {"train": [{"system_prompt": "x"}]}}  # fmt: skip
    assert translate(old) == new
    assert translate(new) == new
    jobs = {"jobs": [{"name": "a", "train": {"clip": 1}, "method": {"name": "LoRA", "ratio": 3}}]}
    assert translate(jobs) == {
        "jobs": [{"name": "a", "train": {"max_grad_norm": 1}, "method": {"name": "LoRA", "ratio": 3}}]
    }


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model": {"name": "m", "dtype": "float16", "device": "cpu"}}, "float16 overflows"),
        ({"model": {"name": "m", "attention": "flash_attention_2", "device": "cpu"}}, "needs a GPU"),
        ({"model": {"name": "m", "attention": "flash_attention_2", "dtype": "float32"}}, "bfloat16 or float16"),
        ({"objective": "classification", "train": {"packing": True}}, "for language models"),
        ({"objective": "causal_lm", "method": "VPT"}, "method=PromptTuning"),
        ({"objective": "image_classification", "method": "PromptTuning"}, "method=VPT"),
        ({"train": {"packing": True}, "method": "PromptTuning"}, "one place for its virtual tokens"),
        ({"train": {"micro_batch_size": 32}}, "more than the train.batch_size=16"),
        ({"data": {"train": "d", "streaming": True}}, "train.steps is required"),
        (
            {"data": {"train": "d", "validation": 0}, "train": {"early_stopping_patience": 2}},
            "train.early_stopping_patience=2 waits",
        ),
        ({"evaluate": {"steps": 0, "best_metric": "f1"}}, "evaluate.best_metric=f1 chooses"),
        (
            {"objective": "image_classification", "method": "VPT", "jobs": [{"name": "a", "method": "PromptTuning"}]},
            "method=VPT",
        ),
        ({"jobs": [{"name": "a", "train": {"early_stopping_patience": 2}}, {"name": "b"}]}, "of the job a"),
        ({"jobs": [{"name": "a", "train": {"micro_batch_size": 2}}, {"name": "b"}]}, "which has None"),
    ],
)
def test_conflicts(values: dict[str, Any], words: str) -> None:
    found = errors(MINIMAL | values)
    assert len(found) == 1
    assert words in found[0]


def test_what_this_machine_cannot() -> None:
    half = load({**MINIMAL, "model": {"name": "m", "dtype": "float16"}})
    conflicts.check_machine(half, has_cuda=True)
    with pytest.raises(ConfigError, match=r"float16.*no GPU here"):
        conflicts.check_machine(half, has_cuda=False)
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        conflicts.check_machine(load({**MINIMAL, "model": {"name": "m", "device": "cuda"}}), has_cuda=False)
    conflicts.check_machine(load(MINIMAL), has_cuda=False)


def test_jobs_inherit_what_they_do_not_set() -> None:
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
    assert load(MINIMAL).per_job() == (load(MINIMAL),)


def test_the_schema_knows_every_method() -> None:
    schema = json.loads(json.dumps(RunConfig.model_json_schema()))
    offered = {one["properties"]["name"]["const"]: one for one in schema["properties"]["method"]["oneOf"]}
    assert set(offered) == set(REGISTRY)
    assert "rank" in offered["LoRA"]["properties"]
    assert "rank" not in offered["IA3"]["properties"]
    assert all(one["description"] for one in offered.values())
    assert schema["$defs"]["TrainConfig"]["properties"]["lr"]["description"].startswith("Learning rate")


def test_every_setting_is_explained() -> None:
    described = {f"{section.name}.{setting.name}" for section in describe.sections() for setting in section.settings}
    dumped = load({**MINIMAL, "jobs": [{"name": "a"}]}).to_dict()
    flat = {f"{k}.{inner}" for k, values in dumped.items() if isinstance(values, dict) for inner in values}
    assert flat - {"method.name"} <= described
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
