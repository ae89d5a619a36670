"""Prompts, padding and the order of batches."""

from __future__ import annotations

import pytest

from kitout.demo.data import DataError, Example
from kitout.demo.task import LONGEST_TEXT, Task, pad, plan

from .tiny import tokenizer


def test_a_chat_model_gets_its_template() -> None:
    task = Task(tokenizer(), ["good", "bad"], "Say which.")
    text = "see https://t.co/Abc123 now"
    assert task.prompt(text) == "<system>Say which.<end><user>see http now<end><assistant>"
    assert task.tokenizer.decode(task.encode(text)) == task.prompt(text)
    assert task.answer(Example(text, "bad")) == [*task.tokenizer("bad").input_ids, task.end]


def test_a_plain_model_gets_lines_and_a_named_list_of_labels() -> None:
    task = Task(tokenizer(chat=False), ["b", "a", "c"])
    assert task.prompt("hello") == "Classify this text as a, b or c.\nhello\nAnswer:"
    assert task.answers[0] == task.tokenizer(" b").input_ids


def test_long_texts_are_cut_and_the_instruction_stays() -> None:
    task = Task(tokenizer(), ["good", "bad"], "Say which.")
    words = task.prompt("y" * 5000)
    assert words.count("y") == LONGEST_TEXT + 1 + 1  # "Say", "system"
    assert words.endswith("<end><assistant>")


def test_a_tokenizer_without_an_end_is_refused() -> None:
    made = tokenizer()
    made.eos_token = None
    with pytest.raises(DataError, match="no end-of-text token"):
        Task(made, ["a", "b"])


def test_padding_is_on_the_left_and_counts_no_position() -> None:
    batch = pad([[5, 6, 7], [8]], filler=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]


def test_the_plan_uses_every_text_once_an_epoch_and_wastes_little() -> None:
    lengths = [(7 * i) % 60 + 10 for i in range(500)]
    batches = plan(lengths, batch=16, epochs=2, seed=3)
    assert sorted(i for b in batches for i in b) == sorted([*range(500)] * 2)
    assert batches == plan(lengths, 16, 2, seed=3)
    assert batches != plan(lengths, 16, 2, seed=4)
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    assert padded < 1.12 * 2 * sum(lengths)
