"""The mode a kit works in while it learns: the frozen base still (no dropout), what is trained at work.

Where activations are computed again in backward, the blocks themselves have to be in training mode; their parts stay
still, so that no dropout of the base is drawn. It knows modes, and nothing of losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kitout.kit.kit import Kit


@contextmanager
def at_work(kit: Kit, names: Sequence[str], checkpointing: bool) -> Iterator[None]:
    """While it lasts the named adapters are in training mode and the base is not; then all is eval."""
    kit.eval()
    for name in names:
        kit[name].train()
    if checkpointing:
        kit.gradient_checkpointing_enable()
        for module in kit.base.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True
    try:
        yield
    finally:
        if checkpointing:
            kit.gradient_checkpointing_disable()
        kit.eval()
