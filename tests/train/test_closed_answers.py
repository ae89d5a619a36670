"""Accuracy by the likeliest answer of a closed set: which sets are closed, and the metric against one by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import kitout
from kitout.data.encode.item import EncodedExample
from kitout.data.read.tables import DataError
from kitout.train.setup.closed_answers import find_closed_answers
from tiny_models import both, decoder, jsonl, reviews

END = 5
IDS = {"good": (7,), "bad": (8, 9), "so so": (7, 8)}
SYSTEM = "Is it good or bad?"


def item(answer: str, location: str = "line 1", num_truncated: int = 0) -> EncodedExample:
    answer_ids = (*IDS.get(answer, (11,)), END)
    return EncodedExample(
        (1, 2, 3, *answer_ids),
        (-100,) * 3 + answer_ids,
        prompt_length=3,
        reference=answer,
        num_truncated_targets=num_truncated,
        location=location,
    )


def test_repeated_answers_are_a_closed_set() -> None:
    train = [item("bad")] * 3 + [item("good")] * 5 + [item("so so")] * 2
    answers = find_closed_answers(train, [item("bad")])
    assert answers is not None
    assert answers.names == ("good", "bad", "so so")
    assert answers.token_ids == ((7,), (8, 9), (7, 8))
    assert answers.end_token_id == END
    truncated = dataclasses.replace(item("bad"), input_ids=(1, 2, 3, 8), num_truncated_targets=2)
    assert find_closed_answers([truncated, *train], []) == answers, "a truncated answer does not count"


@pytest.mark.parametrize(
    ("train", "evaluated"),
    [
        ([item("good")] * 9, []),  # nothing to tell apart
        ([item("good"), item("bad")], []),  # they do not repeat
        ([item("good"), item("bad")] * 5, [item("so so")]),  # another one is evaluated
        ([item("good"), item(""), item("bad")] * 5, []),  # plain text among them
        (
            [dataclasses.replace(item("good"), input_ids=(1, 2, 3, *range(20, 40), END)), item("bad")] * 5,
            [],
        ),  # a sentence
        ([item("good"), dataclasses.replace(item("bad"), input_ids=item("good").input_ids)] * 5, []),  # the same tokens
    ],
)
def test_what_is_not_a_closed_set(train: list[EncodedExample], evaluated: list[EncodedExample]) -> None:
    assert find_closed_answers(train, evaluated) is None


def test_a_requested_set_is_enforced() -> None:
    train = [item("good"), item("bad")]
    answers = find_closed_answers(train, [], ["bad", "good"])
    assert answers is not None
    assert answers.names == ("bad", "good")
    with pytest.raises(DataError, match=r"line 7: the answer 'so so' is not one of them"):
        find_closed_answers(train, [item("so so", "line 7")], ["bad", "good"])
    with pytest.raises(DataError, match="no training example answers 'so so'"):
        find_closed_answers(train, [], ["bad", "good", "so so"])


def rows_of(number: int, seed: int, long: bool) -> list[dict[str, str]]:
    """long: labels of several tokens, one of which begins another; else of one token each."""
    return [row | {"label": {"good": "good dog", "bad": "good"}[row["label"]] if long else row["label"]}
            for row in reviews(number, seed)]  # fmt: skip


def run(model: Path, folder: Path, long: bool = False, **more: Any) -> Any:
    files = {
        name: jsonl(folder / f"{name}.jsonl", rows_of(n, seed, long))
        for name, n, seed in (("train", 60, 0), ("test", 21, 1))
    }
    source = {"path": str(files["train"]), "system_prompt": SYSTEM}
    settings = {
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"train": [source], "test": str(files["test"]), "validation": 10},
        "train": {"batch_size": 8, "steps": 12, "lr": 1e-2}, "output": {"folder": str(folder / "out")}, **more,
    }  # fmt: skip
    return kitout.train(settings, log=lambda _: None)


@torch.no_grad()
def by_hand(model: Any, words: Any, rows: list[dict[str, str]]) -> list[str]:
    """The likeliest label of each row by whole forwards of single texts; with its end where one begins another."""
    names = sorted({row["label"] for row in rows})
    likeliest = []
    for row in rows:
        turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["text"]}]
        prompt = words(words.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)).input_ids
        log_likelihoods = {}
        for label in names:
            ids = words(label, add_special_tokens=False).input_ids + ([5] if "good dog" in names else [])
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
            log_likelihoods[label] = sum(logits[len(prompt) + i - 1, t].item() for i, t in enumerate(ids))
        likeliest.append(max(log_likelihoods, key=log_likelihoods.__getitem__))
    return likeliest


@pytest.mark.parametrize("long", [False, True])
def test_accuracy_is_that_of_the_likeliest_label_computed_by_hand(tmp_path: Path, long: bool) -> None:
    folder = decoder(tmp_path / "model")
    result = run(folder, tmp_path, long)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    kit = kitout.attach(transformers.AutoModelForCausalLM.from_pretrained(folder).eval())
    kit.load(tmp_path / "out" / "adapter", name="mine")
    rows = rows_of(21, 1, long)
    first = result.comparisons["adapter"].changes[0]
    assert first.name == "accuracy"
    for name, score in ((None, first.base), ("mine", first.tuned)):
        with kit.use(name):
            predictions = by_hand(kit, words, rows)
        num_correct = sum(a == row["label"] for a, row in zip(predictions, rows, strict=True))
        assert score.value == pytest.approx(num_correct / 21)
        assert 0 <= score.low <= score.value <= score.high <= 1
    assert {"balanced_accuracy", "macro_f1", "loss"} <= {c.name for c in result.comparisons["adapter"].changes}
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["labels"]["adapter"]) == {row["label"] for row in rows}
    shown = results["examples"]["adapter"]
    assert {one["reference"] for one in shown} == {row["label"] for row in rows}
    assert results["processor_seconds"] > 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert any("eval_accuracy" in row for row in rows)
    assert rows[-1].get("processor_seconds", 0) <= results["processor_seconds"]


def test_an_encoder_decoder_is_evaluated_likewise(tmp_path: Path) -> None:
    result = run(both(tmp_path / "model"), tmp_path, evaluate={"show_examples": 2})
    assert result.figures["objective"] == "seq2seq_lm"
    assert result.comparisons["adapter"].changes[0].name == "accuracy"
    assert result.figures["labels"]["adapter"]
