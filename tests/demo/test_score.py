"""Scores are the model's own likelihoods, intervals are Wilson's."""

from __future__ import annotations

import math

import pytest
import torch

import kitout
from kitout import Kit, LoRA
from kitout.demo.data import Example
from kitout.demo.score import label_scores, measure, wilson, write
from kitout.demo.task import Task

from .tiny import model, tokenizer

TEXTS = ["a short one", "a somewhat longer text than that", "x"]


@pytest.fixture
def kit() -> Kit:
    return kitout.attach(model())


def alone(kit: Kit, prompt: list[int], answer: list[int]) -> float:
    """Log-likelihood of the answer, from one plain forward without cache or padding."""
    with torch.no_grad():
        logits = kit(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return float(sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(answer)))


@pytest.mark.parametrize(
    ("labels", "with_end"),
    [(["g", "b"], False), (["good", "bad", "so so"], False), (["1", "10", "2"], True)],
)
def test_label_scores_are_what_the_model_gives_each_alone(kit: Kit, labels: list[str], with_end: bool) -> None:
    task = Task(tokenizer(), labels)
    prompts = [task.encode(text) for text in TEXTS]
    answers = [[*a, task.end] if with_end else a for a in task.answers]
    expected = torch.tensor([[alone(kit, p, a) for a in answers] for p in prompts])
    torch.testing.assert_close(label_scores(kit, task, prompts), expected, atol=1e-4, rtol=1e-5)


def test_measure_keeps_the_order_of_the_texts(kit: Kit) -> None:
    task = Task(tokenizer(), ["good", "bad"])
    best = label_scores(kit, task, [task.encode(t) for t in TEXTS]).argmax(1).tolist()
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


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (258, 400, 0.5970, 0.6904)],
)
def test_wilson(right: int, total: int, low: float, high: float) -> None:
    found = wilson(right, total)
    assert found == pytest.approx((low, high), abs=1e-4)
    assert all(math.isfinite(x) for x in found)


def test_wilson_refuses_what_is_no_share() -> None:
    for right, total in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="no share"):
            wilson(right, total)
