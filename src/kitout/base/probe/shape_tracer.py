"""ShapeTracer: which modules run in one forward, how often, and how wide the first dimension is where they do.

All that a second forward, with more rows, is run for. No graph is recorded. Where the data choose nothing, the products
of linear modules are left out too: their values are of no use, and reading all weights once more is half of the time.
It knows module paths and shapes, no architecture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import Self

from kitout.base.find.module_tree import ancestors


class ShapeTracer(TorchFunctionMode):
    """Use as a context around one forward of `model`.

    blocks: paths of modules whose first input counts. leaves: paths of modules that count as leaves though they have
    parts (a linear whose weight is parametrized). skips_products: linear modules give zeros. Being a mode, it also
    keeps torch from running a whole encoder layer in one call that none of its modules sees.
    """

    def __init__(
        self, model: nn.Module, blocks: Iterable[str], leaves: Iterable[str] = (), skips_products: bool = False
    ) -> None:
        super().__init__()
        self.model, self.blocks, self.leaf_paths, self.skips_products = model, set(blocks), set(leaves), skips_products
        self.call_counts: Counter[str] = Counter()  # path -> number of calls, in the order of the first ones
        self.first_dims: dict[str, int] = {}  # path -> dim 0 of the value
        self.output_shapes: dict[str, torch.Size] = {}  # of modules that return one tensor, or one first
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        for path, module in self.model.named_modules():
            self._hooks += self._hook(path, module)
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and self.skips_products and len(args) > 1:
            x, w = args[:2]
            if type(x) is Tensor and type(w) is nn.Parameter and w.ndim == 2 and x.shape[-1] == w.shape[1]:
                return x.new_zeros(*x.shape[:-1], w.shape[0])
        return func(*args, **(kwargs or {}))

    def _hook(self, path: str, module: nn.Module) -> list[Any]:
        """Hooks on one module."""
        has_parts = next(module.children(), None) is not None
        hooks = [module.register_forward_hook(self._shape_out(path))] if has_parts else []
        if path in self.blocks:
            return [*hooks, module.register_forward_pre_hook(self._count_block(path), with_kwargs=True)]
        if self._is_leaf(path, module):
            into = module.register_forward_pre_hook(self._count_leaf(path), with_kwargs=True)
            return [*hooks, into, module.register_forward_hook(self._leaf_shape(path))]
        if self._is_in_block(path):
            return [*hooks, module.register_forward_hook(self._count_composite(path))]
        return hooks

    def _is_leaf(self, path: str, module: nn.Module) -> bool:
        return next(module.children(), None) is None or path in self.leaf_paths

    def _is_in_block(self, path: str) -> bool:
        return any(above in self.blocks for above in ancestors(path))

    def _count_block(self, path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.call_counts[path] += 1
            _, value = block_input(args, kwargs)
            if value is not None:
                self.first_dims[path] = value.shape[0]

        return hook

    def _count_leaf(self, path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            self.call_counts[path] += 1
            if isinstance(x, Tensor):
                self.first_dims[path] = x.shape[0] if x.ndim else 0

        return hook

    def _leaf_shape(self, path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            if isinstance(out, Tensor):
                self.output_shapes[path] = out.shape
                if out.ndim and out.shape[0] == 1:
                    self.first_dims[path] = 1  # one result for all rows, whatever the input was

        return hook

    def _count_composite(self, path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            first = first_output(out)
            if isinstance(first, Tensor):
                self.call_counts[path] += 1
                self.first_dims[path] = first.shape[0] if first.ndim else 0

        return hook

    def _shape_out(self, path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            first = first_output(out)
            if isinstance(first, Tensor):
                self.output_shapes[path] = first.shape

        return hook


def block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str | None, Tensor | None]:
    """What a block is given first, with its name where it has one: positional, or the first floating tensor."""
    if args and isinstance(args[0], Tensor):
        return None, args[0]
    pairs = ((k, v) for k, v in kwargs.items() if isinstance(v, Tensor) and v.is_floating_point())
    return next(pairs, (None, None))


def first_output(out: Any) -> Any:
    return out[0] if isinstance(out, (tuple, list)) and out else out
