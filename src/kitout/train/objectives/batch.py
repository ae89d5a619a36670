"""Rows of ids as one padded batch: what a model is called with.

Padding is marked by the attention mask alone, so the id that fills it may be any, the end token's too. It knows no
tokenizer beyond that id and no objective.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """inputs: what the model is called with. gold: what its answer is compared with. rows: examples, in order.

    tokens: without padding. padded: with it.
    """

    inputs: dict[str, Any]
    targets: dict[str, Tensor]
    num_examples: int
    num_tokens: int
    num_padded_tokens: int = 0
