"""Whether a tensor may have changed since: what everything kept of a value is stamped with.

Autograd's version counter alone misses optimizers that write all values in one fused call (`AdamW(fused=True)` in torch
2.13 counts nothing), so every optimizer step in the process counts as a change as well. The hook for that is torch's
own global one and is never removed. It knows tensors and no optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = count(1)
_calls = count(1)
_last_step = 0


def _count_step(*_: Any) -> None:
    global _last_step  # one number for the process, as its hook is one
    _last_step = next(_steps)


register_optimizer_step_post_hook(_count_step)


def count_writes(t: Tensor) -> int:
    """What autograd has counted. A tensor made in inference mode counts nothing: another number at every call."""
    return -next(_calls) if t.is_inference() else t._version


def tensor_version(t: Tensor, *, is_frozen: bool = False) -> tuple[int, ...]:
    """Changes when a value is replaced or written to, and with every optimizer step unless it is frozen.

    Writing to `t.data` goes unseen, as it does in autograd.
    """
    return t.data_ptr(), count_writes(t), 0 if is_frozen else _last_step


def tensor_versions(tensors: Sequence[Tensor]) -> tuple[object, ...]:
    """The same of many at once: one answer for all of them, in less than half the time."""
    try:
        writes = [t._version for t in tensors]
    except RuntimeError:  # one was made in inference mode
        writes = [count_writes(t) for t in tensors]
    return _last_step, writes, [t.data_ptr() for t in tensors]
