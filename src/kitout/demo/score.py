"""What a model makes of the demo's texts: the label it finds likeliest for each, and the answers it writes.

How likelihoods, answers and intervals come about is in `kitout.evaluate`; here are the demo's prompts, and what its
results.json holds. It knows no training.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from kitout import Kit
from kitout.demo.data import Example
from kitout.demo.screen import Tell
from kitout.demo.task import Task
from kitout.evaluate.ask.generate import answers
from kitout.evaluate.ask.label_likelihood import likelihoods
from kitout.evaluate.metrics.interval import wilson


@dataclass(frozen=True)
class Measured:
    """Labels chosen for the texts, in their order, and what that cost."""

    chosen: list[str]
    right: int
    balanced: float  # mean over labels of the share of its texts that were recognised
    seconds: float
    tokens: int

    @property
    def accuracy(self) -> float:
        return self.right / len(self.chosen)

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, len(self.chosen))


def measure(kit: Kit, task: Task, examples: Sequence[Example], tell: Tell, batch: int = 32) -> Measured:
    """Chooses the likeliest label of each text under what the kit wears now."""
    start = time.perf_counter()
    prompts = [task.encode(e.text) for e in examples]
    scores = likelihoods(kit, prompts, task.answers, task.end, batch, lambda done, total: tell(done, total, ""))
    chosen = [task.labels[label] for label in scores.argmax(dim=1).tolist()]
    right = [guess == e.label for guess, e in zip(chosen, examples, strict=True)]
    shares = [[r for r, e in zip(right, examples, strict=True) if e.label == label] for label in task.labels]
    balanced = [sum(share) / len(share) for share in shares if share]
    seconds = time.perf_counter() - start
    return Measured(chosen, sum(right), sum(balanced) / len(balanced), seconds, sum(map(len, prompts)))


def write(kit: Kit, task: Task, texts: Sequence[str], longest: int = 12) -> list[str]:
    """What the model itself writes, greedily, one line per text."""
    said = answers(kit, task.tokenizer, [task.encode(text) for text in texts], longest, stop=[task.end])
    return [" ".join(words.split()) for words in said]
