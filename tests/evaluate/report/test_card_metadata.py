"""The front matter passes the rules that the hub documents, for every task, base, license and kind of result.

`ModelCard.validate` posts {"repoType": "model", "content": the card} to /api/validate-yaml; without a network the
documented rules stand in (`check_hub_rules`), after huggingface_hub's own reader.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from transformers.pipelines import PIPELINE_REGISTRY

from kitout.evaluate.compare import Comparison, compare
from kitout.evaluate.metrics.registry import compute_measures
from kitout.evaluate.report import model_card
from kitout.evaluate.report.card_metadata import HUB_LICENSES
from kitout.evaluate.report.summary import RunSummary
from kitout.train.objectives.tasks import TASKS


def check_hub_rules(card: ModelCard) -> dict[str, Any]:
    """huggingface/hub-docs, modelcard.md: what is required, what is an id, what is on a list; the fields."""
    fields: dict[str, Any] = card.data.to_dict()
    assert all(value is not None for value in fields.values())
    assert fields["license"] in HUB_LICENSES | {"other", "unknown"}
    assert ("license_name" in fields) == (fields["license"] == "other"), "a name goes with `other`"
    assert re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", fields.get("license_name", "x"))
    assert fields["library_name"] == "kitout"
    assert all(isinstance(tag, str) and 0 < len(tag) <= 96 for tag in fields["tags"])
    assert len(set(fields["tags"])) == len(fields["tags"])
    assert ("base_model" in fields) == ("base_model_relation" in fields)
    assert fields.get("base_model_relation", "adapter") == "adapter"
    for name in (*fields.get("datasets", ()), *filter(None, [fields.get("base_model")])):
        validate_repo_id(name)
    assert fields.get("pipeline_tag", "text-generation") in PIPELINE_REGISTRY.get_supported_tasks()
    for model in fields.get("model-index", ()):
        assert model["name"]
        for result in model["results"]:
            assert result["task"]["type"]
            assert result["dataset"]["type"]
            assert result["dataset"]["name"]
            for metric in result["metrics"]:
                assert metric["type"]
                assert math.isfinite(metric["value"])
    return fields


def card_of(tmp_path: Path, comparison: Comparison | None = None, **fields: Any) -> dict[str, Any]:
    summary = RunSummary(title="t", model="m", method="LoRA(rank=4)", adapter="a", **fields)
    if comparison:
        summary = RunSummary(
            title="t", model="m", method="LoRA()", adapter="a", comparisons={"a": comparison}, **fields
        )
    model_card.write_model_card(summary, tmp_path)
    return check_hub_rules(ModelCard.load(tmp_path / "README.md"))


def score(task: Any, tuned: list[Any], references: list[Any]) -> Comparison:
    wrong = references[::-1]
    return compare(compute_measures(task, wrong, references), compute_measures(task, tuned, references))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_tag_that_the_hub_knows(task: str, tmp_path: Path) -> None:
    assert card_of(tmp_path, hub_task=TASKS[task].hub_task)["pipeline_tag"] == TASKS[task].hub_task


@pytest.mark.parametrize("name", ["org/model-1", "gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_a_base_of_the_hub_is_linked_as_the_base_of_an_adapter(name: str, tmp_path: Path) -> None:
    fields = card_of(tmp_path, hub_name=name)
    assert (fields["base_model"], fields["base_model_relation"]) == (name, "adapter")


def test_another_base_is_not_linked(tmp_path: Path) -> None:
    """`model` may look like an id ("models/tiny"): only the hub's own name is one."""
    assert "base_model" not in card_of(tmp_path)


@pytest.mark.parametrize(
    ("stated", "license_", "name"),
    [
        ("apache-2.0", "apache-2.0", None),
        ("llama3.2", "llama3.2", None),
        ("gpl-3.0-or-later", "other", "gpl-3.0-or-later"),  # SPDX's, and not on the hub's list
        ("tongyi qianwen research", "other", "tongyi-qianwen-research"),
        ("<b>ask me</b>", "other", "b-ask-me-b"),
        ("other", "unknown", None),
        ("???", "unknown", None),
        (model_card.UNKNOWN_LICENSE, "unknown", None),
        ("", "unknown", None),
    ],
)
def test_a_license_is_one_of_the_hubs_or_other_with_a_name(
    stated: str, license_: str, name: str | None, tmp_path: Path
) -> None:
    fields = card_of(tmp_path, license=stated)
    assert (fields["license"], fields.get("license_name")) == (license_, name)


def test_a_base_under_another_license_hands_its_name_on(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: Qwen-Research\n---\n")
    assert model_card.find_license(tmp_path) == "qwen-research"


@pytest.mark.parametrize(
    ("source", "dataset", "type_"),
    [
        ("org/reviews", ["org/reviews"], "org/reviews"),
        ("org/reviews:en#500", ["org/reviews"], "org/reviews"),
        ("tweets", None, "tweets"),
        ("data/My Reviews.csv", None, "data-my-reviews.csv"),
        ("data/reviews.jsonl", None, "data-reviews.jsonl"),
        ("ⲁ/ⲃ", None, "data"),
    ],
)
def test_results_name_their_data(source: str, dataset: list[str] | None, type_: str, tmp_path: Path) -> None:
    comparison = score("classification", ["a", "b"], ["a", "b"])
    fields = card_of(tmp_path, comparison, data_name=source, hub_task="text-classification")
    assert fields.get("datasets") == dataset
    (result,) = fields["model-index"][0]["results"]
    assert (result["dataset"]["type"], result["dataset"]["name"]) == (type_, source)
    assert result["task"]["type"] == fields["pipeline_tag"]


def test_a_result_without_a_number_is_left_out(tmp_path: Path) -> None:
    """A perplexity may be infinite, and YAML's .inf would be refused."""
    comparison = score("regression", [1.0, 2.0, 2.0], [1.0, 2.0, 3.0])
    first, *others = comparison.changes
    infinite = replace(first, tuned=replace(first.tuned, value=math.inf))
    fields = card_of(tmp_path, replace(comparison, changes=[infinite, *others]), data_name="x")
    metrics = {metric["type"] for result in fields["model-index"][0]["results"] for metric in result["metrics"]}
    assert metrics == {change.name for change in others}
