"""A labelled text as the model reads it: instruction and text as a chat, then the label's tokens and the end of turn.

Uses the model's own chat template (the instruction is the system turn, so that in a chat the user types just the text)
or, for a model without one, plain lines. Links are shortened to "http": a link costs a dozen tokens and says nothing.
It knows tokens and nothing of weights, training or files.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kitout.data.read.tables import DataError
from kitout.demo.data import Example

LONGEST_TEXT = 256  # tokens; longer texts are cut at the end
TWEETS = "Classify the sentiment of this tweet as negative, neutral or positive."


class Task:
    """Prompts and answers of one classification, under one tokenizer."""

    def __init__(self, tokenizer: Any, labels: Sequence[str], instruction: str | None = None) -> None:
        if tokenizer.eos_token_id is None:
            raise DataError("this model's tokenizer has no end-of-text token: the demo cannot teach it where to stop")
        self.tokenizer = tokenizer
        self.labels = list(labels)
        self.instruction = instruction or f"Classify this text as {_listed(sorted(labels))}."
        self.chat = bool(tokenizer.chat_template)
        self.end = int(tokenizer.eos_token_id)
        self.answers = [self._ids(label if self.chat else f" {label}") for label in self.labels]

    def prompt(self, text: str) -> str:
        text = self._short(re.sub(r"https?://\S+", "http", text))
        if not self.chat:
            return f"{self.instruction}\n{text}\nAnswer:"
        turns = [{"role": "system", "content": self.instruction}, {"role": "user", "content": text}]
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def encode(self, text: str) -> list[int]:
        """Tokens of the prompt; a template brings its own start token, plain text gets the tokenizer's."""
        return list(self.tokenizer(self.prompt(text), add_special_tokens=not self.chat).input_ids)

    def answer(self, example: Example) -> list[int]:
        return [*self.answers[self.labels.index(example.label)], self.end]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _short(self, text: str) -> str:
        if len(text) <= LONGEST_TEXT:  # a token is at least a character
            return text
        ids = self._ids(text)
        return text if len(ids) <= LONGEST_TEXT else str(self.tokenizer.decode(ids[:LONGEST_TEXT]))


def _listed(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]])


def pad(rows: Sequence[list[int]], filler: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Padded on the left, so that what is asked for stands in the last columns; positions count real tokens only."""
    width = max(map(len, rows))
    ids = torch.tensor([[filler] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    return {name: value.to(device) for name, value in batch.items()}


def plan(lengths: Sequence[int], batch: int, epochs: int, seed: int) -> list[list[int]]:
    """The whole run's batches: each epoch shuffled, cut into pools of eight batches, each pool sorted by length.

    Like lengths share a batch, so little is padding; pools keep the order random. It depends on the seed alone, so a
    resumed run only has to know how many batches are done.
    """
    dice = random.Random(seed)
    batches: list[list[int]] = []
    for _ in range(epochs):
        order = list(range(len(lengths)))
        dice.shuffle(order)
        pools = [sorted(order[i : i + 8 * batch], key=lengths.__getitem__) for i in range(0, len(order), 8 * batch)]
        cut = [pool[i : i + batch] for pool in pools for i in range(0, len(pool), batch)]
        dice.shuffle(cut)
        batches += cut
    return batches
