"""An example as a model takes it: token ids, what is to be learnt of them, and what it is worth to say about it.

Made by the encoders of this room, read by `kitout.train` and `kitout.evaluate`. Plain values, so that a set can be
hashed, cached and counted. It knows no tokenizer, no model and no file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

IGNORE_INDEX = -100  # a label that is not learnt, as torch's cross_entropy and transformers have it


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """One encoded example.

    ids: what the model reads, without padding. labels: one per id (not shifted): the id itself where a causal model
    learns it, or a token's class, IGNORED elsewhere. target: what a sequence-to-sequence model writes, its end token
    included. value: the class of a sequence, a regression value, or a 0/1 vector. prompt: causal: ids[:prompt] is what
    an answer is generated from (all before the last learnt turn). reference: the answer as text. cut: tokens that
    truncation left out; lost: those of them that were to be learnt. place: where it was read.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...] = ()
    target_ids: tuple[int, ...] = ()
    label: int | float | tuple[float, ...] | None = None
    prompt_length: int = 0
    reference: str = ""
    num_truncated: int = 0
    num_truncated_targets: int = 0
    location: str = ""

    @property
    def length(self) -> int:
        """Tokens a model works through."""
        return len(self.input_ids) + len(self.target_ids)

    @property
    def num_targets(self) -> int:
        """Tokens the loss is taken over; 1 for a sequence's value."""
        return (
            1 if self.label is not None else sum(label != IGNORE_INDEX for label in self.labels) + len(self.target_ids)
        )


def digest(examples: Iterable[EncodedExample]) -> str:
    """A fingerprint of the items in their order; where they were read does not count."""
    seen = hashlib.sha256()
    for i in examples:
        seen.update(
            repr(
                (
                    i.input_ids,
                    i.labels,
                    i.target_ids,
                    i.label,
                    i.prompt_length,
                    i.reference,
                    i.num_truncated,
                    i.num_truncated_targets,
                )
            ).encode()
        )
    return seen.hexdigest()
