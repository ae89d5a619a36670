"""What one forward in progress tells its programs: positions, pending rewrites, keys of prompts.

Programs are compiled once per route and shared by all its forwards. What differs from forward to forward is in a
ForwardState, which travels with the route into recomputations. It knows tensors and module paths, and nothing of
adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kitout.delta import KeyValue


@dataclass(eq=False)
class ForwardState:
    """The state of one forward."""

    token_index: dict[str, Tensor] = field(default_factory=dict)
    """Tower -> [B or 1, T]: the position of each query in its row's text, counted without virtual tokens."""
    num_tokens: dict[str, int | None] = field(default_factory=dict)
    """Tower -> a number above every `token_index`; None where only the device knows one."""
    own_positions: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Tower -> the position ids that its blocks are given, and those of the text without virtual tokens."""
    real_positions: dict[str, Tensor] = field(default_factory=dict)
    """Tower -> [B, T]: 1 or true where a position of its sequence is no padding; none where all are real."""
    pending_rewrites: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    """Path of a table -> what to do to its next output (token table) or input (position table)."""
    prompt_kv: dict[str, list[KeyValue | None]] = field(default_factory=dict)
    """Path of an attention -> keys and values of each entry's prompt."""
    prompt_kv_leaves: dict[str, list[KeyValue | None]] = field(default_factory=dict)
    """The same, detached from their graph where `has_graph`."""
    last_prompt_kv: dict[str, list[KeyValue | None]] = field(default_factory=dict)
    """Of the tower that ran last: what goes with the cache it returns."""
    caller_columns: dict[str, Tensor] = field(default_factory=dict)
    """Tower -> [B, T]: the column of the widened sequence where each of the caller's columns went."""
    widened_width: dict[str, int] = field(default_factory=dict)
    """Tower -> the number of columns of the widened sequence."""
    kernels: dict[tuple[int, type], tuple[str, Callable[..., Any]]] = field(default_factory=dict)
    """Config and class of an attention -> its kernel, looked up by the first one of the forward."""
    drop_image_tokens: Callable[[Any], Any] | None = None
    """Takes the added image tokens out of the model's output."""
    is_prefill: bool = False
    """Part of the model is run for its keys and values alone: it is no forward of the model."""
    positions_from_generate: bool = False
    """Position ids come from `generate`, which counts them from the mask, and not from a caller."""
    has_graph: bool = False
    """The prompts' keys have a graph, and blocks will be recomputed."""
    reentrant: bool = False
    """Blocks are recomputed in graphs of their own, which end at `prompt_kv_leaves`."""


class ForwardSlot:
    """The place where the programs of a route find the state of the forward in progress."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state = ForwardState()

    def __reduce__(self) -> tuple[Any, ...]:  # a forward in progress is not copied
        return ForwardSlot, ()
