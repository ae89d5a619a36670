"""What `ForwardTracer` records of one forward: sums, embedding lookups, block entries and attention calls.

Plain data with module paths and tensors. A value is known by its identity: a tensor object between two writes to it.
It knows nothing of sites or roles.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

ValueIdentity = tuple[int, int]  # id of the tensor, and how often it had been written to


@dataclass
class SumOperand:
    """One of the two values of a sum."""

    value: ValueIdentity
    """Which value it is."""
    leaves: frozenset[str]
    """Labels of the gradient leaves that it comes from."""
    emitters: tuple[str, ...]
    """Paths of the leaf modules that returned it, in order: dropout in eval mode returns its own input."""
    receiver: str | None
    """Path of the first leaf module that took it as input."""
    composite: str | None
    """Path of the module with parts that returned it."""


@dataclass
class ResidualSum:
    """One sum of two activations inside a block."""

    block: str
    """Path of the block."""
    operands: tuple[SumOperand, SumOperand]
    """The two values."""
    out: ValueIdentity | None = None
    """The sum itself."""


@dataclass
class EmbeddingLookup:
    """One lookup of rows in a table."""

    inside: tuple[str, ...]
    """Paths of the modules that were running, outermost first."""
    indices: Tensor
    """The rows."""

    @property
    def table(self) -> str:
        """Path of the module that looked the rows up."""
        return self.inside[-1]


@dataclass
class BlockEntry:
    """The first time a block was entered."""

    inside: tuple[str, ...]
    """Paths of the modules that were running, outermost first, the block last."""
    num_lookups: int
    """Number of embedding lookups before it."""


@dataclass
class InputRead:
    """One operation outside the blocks on a value that the model was called with: its ids, its mask."""

    inside: tuple[str, ...]
    """Paths of the modules that were running, outermost first."""
    num_exits: int
    """Number of times that a block had been left before it."""


@dataclass
class AttentionCall:
    """One attention call and its operands "q", "k" and "v"."""

    path: str
    """Path of the module that made it."""
    written_out: bool
    """It was computed as scores, softmax and product, not by a call of `scaled_dot_product_attention`."""
    block: str | None
    """Path of the block it is in."""
    leaves: dict[str, frozenset[str]]
    """Operand -> labels of the gradient leaves that it comes from."""
    tensors: dict[str, Tensor]
    """Operand -> tensor to take gradients of."""
    out: Tensor | None = None
    """What the call returned."""
    has_mask_bias: bool = False
    """Its mask holds more than who sees whom: a bias of positions."""
