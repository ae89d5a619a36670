"""Watching one forward: which modules fire, what each attention call reads, what is added to the residual stream.

Projection outputs and block inputs are cut into gradient leaves, so that walking a tensor's graph ends at the nearest
of them. `scaled_dot_product_attention` and matmul-softmax-matmul give q, k and v; tensor additions give the sublayers.
It knows module paths and tensors, no architecture, and changes no value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import Self

ADDS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
PRODUCTS = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, torch.baddbmm, Tensor.baddbmm}

ValueIdentity = tuple[int, int]  # of a value: its tensor, and how often that had been written to


@dataclass
class ResidualSum:
    """One sum inside a block: for both operands the leaves it comes from, who emitted it (dropout hands on what it is
    given, so there may be several, in order), who first received it. operands, out: identities. wholes:
    modules with parts that emitted them.
    """

    block: str
    leaves: tuple[frozenset[str], frozenset[str]]
    emitters: tuple[tuple[str, ...], tuple[str, ...]]
    receivers: tuple[str | None, str | None]
    operands: tuple[ValueIdentity, ValueIdentity]
    composites: tuple[str | None, str | None]
    out: ValueIdentity | None = None


@dataclass
class EmbeddingLookup:
    """One row lookup in a table. inside: paths of the modules in progress, the one that asked last."""

    inside: tuple[str, ...]
    indices: Tensor


@dataclass
class BlockEntry:
    """The first time a block was entered. lookups: how many there had been."""

    inside: tuple[str, ...]
    num_lookups: int


@dataclass
class AttentionCall:
    """One attention call: by letter the leaves it reads, and the tensors to take gradients of.

    path: of the module that made it. product: it was written out, scores and softmax and all. biased: its mask says
    more than who sees whom.
    """

    path: str
    written_out: bool
    block: str | None
    leaves: dict[str, frozenset[str]]
    tensors: dict[str, Tensor]
    out: Tensor | None = None
    has_mask_bias: bool = False


class ForwardTracer(TorchFunctionMode):
    """Use as a context around one forward of `model`.

    cut: paths of projections whose outputs become leaves. blocks: paths whose first input becomes a leaf.
    """

    def __init__(self, model: nn.Module, cut_at: Iterable[str], blocks: Sequence[str]) -> None:
        super().__init__()
        self.model, self.cut_at, self.blocks = model, set(cut_at), set(blocks)
        self.call_counts: Counter[str] = Counter()
        self.first_dims: dict[str, int] = {}
        self.leaves: dict[str, list[Tensor]] = {}
        self.residual_sums: list[ResidualSum] = []
        self.attention_calls: list[AttentionCall] = []
        self.lookups: list[EmbeddingLookup] = []
        self.block_entries: dict[str, BlockEntry] = {}
        self.read_parameters: set[int] = set()  # identities of the tensors that went into an operation
        self.inputs_of: dict[str, set[ValueIdentity]] = {}  # what each block and leaf took, and leaves gave
        self.outputs_of: dict[str, set[ValueIdentity]] = {}
        self.block_outputs: set[ValueIdentity] = set()  # the blocks' outputs
        self._label: dict[int, str] = {}
        self._emitter: dict[int, list[str]] = {}
        self._receiver: dict[int, str] = {}
        self._composite_of: dict[ValueIdentity, str] = {}
        self._keep_alive: list[Any] = []  # ids are only good while their tensors live
        self._open_blocks: list[str] = []  # blocks
        self._open_modules: list[str] = []  # modules
        self._product: tuple[Tensor, Tensor, Tensor] | None = None
        self._hooks: list[Any] = []
        self._is_paused = False

    def __enter__(self) -> Self:
        for path, module in self.model.named_modules():
            self._hooks.append(module.register_forward_pre_hook(self._enter(path)))
            if path in self.blocks:
                self._hooks.append(module.register_forward_pre_hook(self._block_in(path), with_kwargs=True))
                self._hooks.append(module.register_forward_hook(self._block_out(path), always_call=True))
            elif next(module.children(), None) is None or path in self.cut_at:
                self._hooks.append(module.register_forward_pre_hook(self._leaf_in(path), with_kwargs=True))
                self._hooks.append(module.register_forward_hook(self._leaf_out(path)))
            elif any(path.startswith(f"{block}.") for block in self.blocks):
                self._hooks.append(module.register_forward_hook(self._composite_out(path)))
            self._hooks.append(module.register_forward_hook(self._leave, always_call=True))
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    # ---- hooks -------------------------------------------------------------------------------------------------

    def _enter(self, path: str) -> Any:
        def hook(_module: nn.Module, _args: Any) -> None:
            self._open_modules.append(path)
            if path in self.blocks and path not in self.block_entries:
                self.block_entries[path] = BlockEntry(tuple(self._open_modules), len(self.lookups))

        return hook

    def _leave(self, _module: nn.Module, _args: Any, _out: Any) -> None:
        self._open_modules.pop()

    def _block_in(self, path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._open_blocks.append(path)
            self.call_counts[path] += 1
            if args and isinstance(args[0], Tensor):
                self.first_dims[path] = args[0].shape[0]
                return (self._cut_stream(path, args[0]), *args[1:]), kwargs
            name = next((k for k, v in kwargs.items() if isinstance(v, Tensor) and v.is_floating_point()), None)
            if name is None:
                return None
            self.first_dims[path] = kwargs[name].shape[0]
            return args, {**kwargs, name: self._cut_stream(path, kwargs[name])}

        return hook

    def _cut_stream(self, path: str, value: Tensor) -> Tensor:
        cut = self._make_leaf(f"stream:{path}", value)
        self.inputs_of.setdefault(path, set()).add(self._identity(cut))
        return cut

    def _block_out(self, path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            self._open_blocks.pop()
            first = out[0] if isinstance(out, (tuple, list)) and out else out
            if isinstance(first, Tensor):
                self.block_outputs.add(self._identity(first))

        return hook

    def _leaf_in(self, path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            self.call_counts[path] += 1
            if isinstance(x, Tensor):
                self._keep_alive.append(x)
                self._receiver.setdefault(id(x), path)
                self.inputs_of.setdefault(path, set()).add(self._identity(x))
                self.first_dims[path] = x.shape[0] if x.ndim else 0

        return hook

    def _leaf_out(self, path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, out: Any) -> Any:
            if not isinstance(out, Tensor):
                return None
            if path in self.cut_at and out.is_floating_point():
                out = self._make_leaf(path, out)
            self._keep_alive.append(out)
            self._emitter.setdefault(id(out), []).append(path)
            self.outputs_of.setdefault(path, set()).add(self._identity(out))
            if out.ndim and out.shape[0] == 1:
                self.first_dims[path] = 1  # looked up once for all rows, whatever it was asked with
            return out

        return hook

    def _composite_out(self, path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            first = out[0] if isinstance(out, (tuple, list)) and out else out
            if isinstance(first, Tensor):
                self.call_counts[path] += 1
                self.first_dims[path] = first.shape[0] if first.ndim else 0
                self._composite_of[self._identity(first)] = path

        return hook

    def _make_leaf(self, label: str, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        leaf = value.detach().requires_grad_()
        self._label[id(leaf)] = label
        self.leaves.setdefault(label, []).append(leaf)
        return leaf.clone()  # models may write to it in place, which a leaf does not allow

    # ---- calls -------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._is_paused:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self._record_attention(*_query_key_value(args, kwargs), written_out=False)
            self.attention_calls[-1].has_mask_bias = _has_mask_bias(
                args[3] if len(args) > 3 else kwargs.get("attn_mask")
            )
            self.attention_calls[-1].out = func(*args, **kwargs)
            return self.attention_calls[-1].out
        if func is F.embedding:
            self.lookups.append(EmbeddingLookup(tuple(self._open_modules), args[0] if args else kwargs["input"]))
        adds = func in ADDS and self._open_blocks and len(args) > 1 and self._record_sum(args[0], args[1])
        out = self._record_product(func, args, kwargs) if func in PRODUCTS else func(*args, **kwargs)
        if adds:
            self._finish_sum(args[0], out)
        if isinstance(out, (Tensor, tuple)):  # not of those that only ask for a shape or a dtype
            given = [x for a in (*args, *kwargs.values()) for x in (a if isinstance(a, (tuple, list)) else (a,))]
            self.read_parameters.update(id(x) for x in given if isinstance(x, nn.Parameter))
        return out

    def _record_attention(self, q: Tensor, k: Tensor, v: Tensor, written_out: bool) -> None:
        tensors = {"q": q, "k": k, "v": v}
        self._keep_alive.append(tensors)
        leaves = {letter: self.ancestors(t) for letter, t in tensors.items()}
        block = self._open_blocks[-1] if self._open_blocks else None
        self.attention_calls.append(AttentionCall(self._open_modules[-1], written_out, block, leaves, tensors))

    def _record_product(self, func: Any, args: Any, kwargs: Any) -> Any:
        """scores = q k^T, softmax, scores v: recognised by the softmax on the second product's first operand."""
        out = func(*args, **kwargs)
        a, b = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)][-2:]
        if self._product is not None and _is_after_softmax(a):
            self._record_attention(self._product[0], self._product[1], b, written_out=True)
            self.attention_calls[-1].out = out
            self._product = None
        elif a.ndim > 2 and b.ndim > 2:
            self._keep_alive.append((a, b, out))
            self._product = (a, b, out)
        return out

    def _record_sum(self, a: Any, b: Any) -> bool:
        """Notes a sum of two activations, before it is computed: that may be in place."""
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.shape != b.shape or not a.is_floating_point():
            return False
        if not (a.requires_grad and b.requires_grad):
            return False
        self._keep_alive.append((a, b))
        self.residual_sums.append(
            ResidualSum(
                self._open_blocks[-1],
                (self.ancestors(a), self.ancestors(b)),
                (tuple(self._emitter.get(id(a), ())), tuple(self._emitter.get(id(b), ()))),
                (self._receiver.get(id(a)), self._receiver.get(id(b))),
                (self._identity(a), self._identity(b)),
                (self._composite_of.get(self._identity(a)), self._composite_of.get(self._identity(b))),
            )
        )
        return True

    def _finish_sum(self, a: Tensor, out: Tensor) -> None:
        self.residual_sums[-1].out = self._identity(out)
        if out is a:  # written in place: no longer what was emitted and received
            self._emitter.pop(id(a), None)
            self._receiver.pop(id(a), None)

    def _identity(self, t: Tensor) -> ValueIdentity:
        """One value: the same for a tensor and views of the whole of it, another once it has been written to."""
        whole = t if t._base is None or t._base.numel() != t.numel() else t._base
        self._keep_alive.append(whole)
        return id(whole), whole._version

    def ancestors(self, t: Tensor) -> frozenset[str]:
        """Labels of the nearest leaves a tensor is computed from."""
        found, seen, stack = set(), set(), [t.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)  # only AccumulateGrad nodes have one
            if variable is not None and id(variable) in self._label:
                found.add(self._label[id(variable)])
            stack.extend(parent for parent, _ in node.next_functions)
        return frozenset(found)


def _query_key_value(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (args[i] if len(args) > i else kwargs[n] for i, n in enumerate(("query", "key", "value")))
    return q, k, v


def _has_mask_bias(mask: Tensor | None) -> bool:
    if mask is None or mask.dtype == torch.bool or mask.is_meta:
        return False
    return bool(((mask != 0) & (mask > torch.finfo(mask.dtype).min / 2)).any())


def _is_after_softmax(t: Tensor) -> bool:
    """True if a softmax is the last thing but for reshapes, casts and dropout that happened to t."""
    node = t.grad_fn
    for _ in range(6):
        if node is None:
            return False
        if "Softmax" in node.name():
            return True
        parents = [p for p, _ in node.next_functions if p is not None]
        if len(parents) != 1:
            return False
        node = parents[0]
    return False
