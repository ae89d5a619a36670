"""An example as a model takes it: token ids, what is to be learnt of them, and what it is worth to say about it.

Made by the encoders of this room, read by `kitout.train` and `kitout.evaluate`. Plain values, so that a set can be
hashed, cached and counted. It knows no tokenizer, no model and no file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

IGNORED = -100  # a label that is not learnt, as torch's cross_entropy and transformers have it


@dataclass(frozen=True, slots=True)
class Item:
    """One encoded example.

    ids: what the model reads, without padding. labels: one per id (not shifted): the id itself where a causal model
    learns it, or a token's class, IGNORED elsewhere. target: what a sequence-to-sequence model writes, its end token
    included. value: the class of a sequence, a regression value, or a 0/1 vector. prompt: causal: ids[:prompt] is what
    an answer is generated from (all before the last learnt turn). reference: the answer as text. cut: tokens that
    truncation left out; lost: those of them that were to be learnt. place: where it was read.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...] = ()
    target: tuple[int, ...] = ()
    value: int | float | tuple[float, ...] | None = None
    prompt: int = 0
    reference: str = ""
    cut: int = 0
    lost: int = 0
    place: str = ""

    @property
    def length(self) -> int:
        """Tokens a model works through."""
        return len(self.ids) + len(self.target)

    @property
    def learned(self) -> int:
        """Tokens the loss is taken over; 1 for a sequence's value."""
        return 1 if self.value is not None else sum(label != IGNORED for label in self.labels) + len(self.target)


def digest(items: Iterable[Item]) -> str:
    """A fingerprint of the items in their order; where they were read does not count."""
    seen = hashlib.sha256()
    for i in items:
        seen.update(repr((i.ids, i.labels, i.target, i.value, i.prompt, i.reference, i.cut, i.lost)).encode())
    return seen.hexdigest()
