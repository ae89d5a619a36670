"""Deep copies of modules that hold tensors of a forward pass: states, caches, computed weights.

torch refuses to copy a tensor that has a graph. Here it is copied as a value, wherever it is held: in an attribute, a
buffer, a list, a cache object. It knows nothing of adapters.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor
from torch.overrides import TorchFunctionMode

from kitout.errors import NotMergeable

T = TypeVar("T")


def copy_detached(value: T, memo: dict[int, Any] | None = None) -> T:
    """`copy.deepcopy`, with tensors that have a graph as values; NotMergeable for what cannot be copied at all."""
    try:
        with _CopyValues():
            return copy.deepcopy(value, memo)
    except Exception as error:  # any class may refuse to be copied
        raise NotMergeable(
            f"a {type(value).__name__} holds something that cannot be copied ({type(error).__name__}: "
            f"{str(error)[:160]}); kit.merge(...) works in place and needs no copy"
        ) from error


class _CopyValues(TorchFunctionMode):
    """While it is active, in this thread alone, deepcopy takes a tensor that has a graph as its value."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))
