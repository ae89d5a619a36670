"""An example as a model takes it: token ids, which of them are trained on, and what is worth saying about it.

The encoders of this folder make it, `kitout.train` and `kitout.evaluate` read it. Plain values, so that a set can be
hashed, cached and counted. It knows no tokenizer, no model and no file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

IGNORE_INDEX = -100  # the label of a token that is not trained on, as in torch's cross_entropy and transformers


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """One encoded example."""

    input_ids: tuple[int, ...]
    """What the model reads, without padding."""
    labels: tuple[int, ...] = ()
    """One per id, not shifted: the id itself where a causal model is trained on it, or a token's class; else
    IGNORE_INDEX."""
    target_ids: tuple[int, ...] = ()
    """What a sequence-to-sequence model writes, its end token included."""
    label: int | float | tuple[float, ...] | None = None
    """The class of a sequence, a regression value, or a 0/1 vector."""
    prompt_length: int = 0
    """Causal: an answer is generated from `input_ids[:prompt_length]`, all before the last trained turn."""
    reference: str = ""
    """The answer as text."""
    num_truncated: int = 0
    """Tokens that truncation took."""
    num_truncated_targets: int = 0
    """Those of them that were to be trained on."""
    location: str = ""
    """Where it was read, for messages."""
    remarks: tuple[str, ...] = ()
    """What of the example the model does not see or is not trained on as the data have it: one phrase each."""
    group: str = ""
    """As in `Example`."""

    @property
    def length(self) -> int:
        """Tokens a model works through."""
        return len(self.input_ids) + len(self.target_ids)

    @property
    def num_targets(self) -> int:
        """Tokens the loss is taken over; 1 for a sequence's value."""
        if self.label is not None:
            return 1
        return sum(label != IGNORE_INDEX for label in self.labels) + len(self.target_ids)


def digest(examples: Iterable[EncodedExample]) -> str:
    """A fingerprint of the examples in their order; where they were read, remarks and groups do not count."""
    sha256 = hashlib.sha256()
    for e in examples:
        content = (
            e.input_ids, e.labels, e.target_ids, e.label, e.prompt_length, e.reference, e.num_truncated,
            e.num_truncated_targets,
        )  # fmt: skip
        sha256.update(repr(content).encode())
    return sha256.hexdigest()
