"""The demo's texts in their order; likelihoods, answers and intervals themselves are tested in tests/evaluate."""

from __future__ import annotations

import pytest

import kitout
from kitout import Kit, LoRA
from kitout.demo.data import Example
from kitout.demo.score import measure, write
from kitout.demo.task import Task
from kitout.evaluate.ask.label_likelihood import likelihoods

from .tiny import model, tokenizer

TEXTS = ["a short one", "a somewhat longer text than that", "x"]


@pytest.fixture
def kit() -> Kit:
    return kitout.attach(model())


def test_measure_keeps_the_order_of_the_texts(kit: Kit) -> None:
    task = Task(tokenizer(), ["good", "bad"])
    best = likelihoods(kit, [task.encode(t) for t in TEXTS], task.answers, task.end).argmax(1).tolist()
    truth = [Example(t, task.labels[b]) for t, b in zip(TEXTS, best, strict=True)]
    steps: list[int] = []
    found = measure(kit, task, truth, lambda done, total, note: steps.append(done), batch=2)
    assert found.chosen == [e.label for e in truth]
    assert (found.right, found.accuracy, found.balanced) == (3, 1.0, 1.0)
    assert steps[-1] == 3
    assert found.tokens == sum(len(task.encode(t)) for t in TEXTS)


def test_written_answers_do_not_depend_on_their_batch(kit: Kit) -> None:
    kit.add("a", LoRA(targets="all-linear"), seed=1)
    kit.use("a")
    task = Task(tokenizer(), ["good", "bad"])
    assert write(kit, task, TEXTS, 5) == [write(kit, task, [text], 5)[0] for text in TEXTS]
