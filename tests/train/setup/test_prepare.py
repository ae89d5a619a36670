"""From a config to jobs: which objective the data decide, and which example came from which source of a mixture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kitout.data.examples.examples import Chat, Completion, Example, LabeledImage, LabeledText, TaggedWords, Text
from kitout.errors import ConfigError
from kitout.train.config.load import load
from kitout.train.config.schema import DataConfig
from kitout.train.objectives.tasks import TASKS
from kitout.train.setup.datasets import infer_task, load_text_datasets
from kitout.train.setup.prepare import prepare
from tiny_models import encoder, jsonl, reviews, tokenizer


def labeled(*labels: Any) -> list[Example]:
    return [LabeledText(f"text {i}", label) for i, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("examples", "objectives"),
    [
        ([Text("x")], ("causal_lm", "seq2seq_lm")),
        ([Completion("x", "y")], ("causal_lm", "seq2seq_lm")),
        ([Chat(())], ("causal_lm", "seq2seq_lm")),
        ([TaggedWords(("a",), ("O",))], ("token_classification", "token_classification")),
        (labeled(("a", "b"), ("a",)), ("multilabel", "multilabel")),
        (labeled("good", "bad"), ("classification", "classification")),
        (labeled(1, 2, 3), ("classification", "classification")),
        (labeled("1", "2"), ("classification", "classification")),
        (labeled("1", "2.5"), ("regression", "regression")),
        (labeled(1.0, 2.0), ("regression", "regression")),
        (labeled("1", "good"), ("classification", "classification")),
    ],
)
def test_the_data_decide_the_objective(examples: list[Example], objectives: tuple[str, str]) -> None:
    assert tuple(infer_task(examples, "auto", is_encoder_decoder).name for is_encoder_decoder in (False, True)) == (
        objectives
    )
    fitting = [name for name, task in TASKS.items() if task.fits(examples, False)]
    assert fitting == [objectives[0]]  # no two objectives want the same examples
    assert infer_task(examples, "regression", False).name == "regression"


def test_images_are_for_models_that_read_images() -> None:
    with pytest.raises(ConfigError, match="for models that read images"):
        infer_task([LabeledImage("a.png", "a")], "auto", False)


def test_each_entry_bears_its_own_name() -> None:
    assert [task.name for task in TASKS.values()] == list(TASKS)
    assert [name for name, task in TASKS.items() if task.generates_text] == ["causal_lm", "seq2seq_lm"]
    assert [name for name, task in TASKS.items() if task.reads_images] == ["image_classification"]


def test_ranges_of_a_mixture_are_the_examples_of_its_sources(tmp_path: Path) -> None:
    words = {"a": "alpha", "b": "beta", "c": "gamma"}
    for name, word in words.items():
        rows = [{"prompt": f"{word} {i}:", "completion": f" {i}"} for i in range(20)]
        rows.append({"prompt": "in all of them:", "completion": " yes"})
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"path": str(tmp_path / f"{name}.jsonl"), "weight": k + 1.0} for k, name in enumerate(words)]
    datasets = load_text_datasets(DataConfig.model_validate({"train": sources}), "auto", tokenizer(), False)
    assert datasets.mixture_weights == (1.0, 2.0, 3.0)
    assert [r.start for r in datasets.mixture_ranges[1:]] == [r.stop for r in datasets.mixture_ranges[:-1]]
    assert datasets.mixture_ranges[-1].stop == len(datasets.train)
    for name, r in zip(words, datasets.mixture_ranges, strict=True):
        locations = {datasets.train[i].location.partition(":")[0] for i in r}
        assert {Path(location).name for location in locations} == {f"{name}.jsonl"}


def test_a_source_of_duplicates_is_an_error(tmp_path: Path) -> None:
    for name in "ab":
        rows = [{"prompt": f"{i}:", "completion": f" {i}"} for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig.model_validate({"train": [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]})
    with pytest.raises(ConfigError, match=r"no training example is left of .*b\.jsonl"):
        load_text_datasets(config, "auto", tokenizer(), False)


def test_steps_that_no_memory_can_plan(tmp_path: Path) -> None:
    config = load(
        {"model": str(encoder(tmp_path / "model")), "data": str(jsonl(tmp_path / "d.jsonl", reviews(40)))}
        | {"train": {"steps": 10**8}}
    )
    with pytest.raises(ConfigError, match="more than the 30,000,000 examples that one run plans"):
        prepare(config)
