"""What one forward in progress tells its programs: positions, tokens that wait to be put in, keys of prompts.

Programs are compiled once per route and shared by all its forwards; what differs from forward to forward is in a Call,
which travels with the route into recomputations. It knows tensors and module paths, and nothing of adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kitout.delta import KeyValue


@dataclass(eq=False)
class ForwardState:
    """places: by stack, the position of each query among its row's text, [B or 1, T]. rewrite: by table path, what is
    to be done to the table's next answer or question. leads: by attention path, keys and values of each entry's prompt.
    leaves: the same cut off from their graph; latest: those of the stack that was run last. back: by stack, for every
    column of the caller's the widened one, [B, T]; wide: how many those are. recorded: leads have a graph; cut: blocks
    are recomputed in graphs of their own, which end at the leaves. slotted: takes an image's tokens out of an output.
    """

    token_index: dict[str, Tensor] = field(default_factory=dict)
    pending_rewrites: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    prompt_kv: dict[str, list[KeyValue | None]] = field(default_factory=dict)
    prompt_kv_leaves: dict[str, list[KeyValue | None]] = field(default_factory=dict)
    caller_columns: dict[str, Tensor] = field(default_factory=dict)
    widened_width: dict[str, int] = field(default_factory=dict)
    last_prompt_kv: dict[str, list[KeyValue | None]] = field(default_factory=dict)
    drop_image_tokens: Callable[[Any], Any] | None = None
    has_graph: bool = False
    reentrant: bool = False


class ForwardSlot:
    """The place where the programs of a route find the Call in progress."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state = ForwardState()

    def __reduce__(self) -> tuple[Any, ...]:  # a forward in progress does not travel
        return ForwardSlot, ()
