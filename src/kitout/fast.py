"""The switch of every fast path: with KITOUT_FAST=off in the environment the plain form of each runs instead.

A fast path computes what its plain form does in less time: one autograd node for two, a write in place, rows batched,
a shared part computed once. Results are equal but for rounding, so the switch shows whether a strange number or an
error comes from one of them. It asks no path which it is: each asks `enabled` where it would begin.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLE = "KITOUT_FAST"

_enabled = os.environ.get(VARIABLE, "").strip().lower() != "off"  # read once: a run does not change in its course


def enabled() -> bool:
    """Whether fast paths may run."""
    return _enabled


@contextmanager
def disabled() -> Iterator[None]:
    """Plain forms alone in this process until the end of the block, as with KITOUT_FAST=off."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before
