"""ForwardTracer: which modules run, what each attention call reads, what is added to the residual stream.

Projection outputs and block inputs become gradient leaves, so that a walk through a tensor's graph ends at the nearest
of them. `scaled_dot_product_attention` and matmul-softmax-matmul show q, k and v; tensor additions show the sublayers.
It knows module paths and tensors, no architecture, and changes no value.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kitout.base.probe.shape_tracer import ShapeTracer, block_input, first_output
from kitout.base.probe.trace_records import (
    AttentionCall,
    BlockEntry,
    EmbeddingLookup,
    InputRead,
    ResidualSum,
    SumOperand,
    ValueIdentity,
)

ADDS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
PRODUCTS = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, torch.baddbmm, Tensor.baddbmm}


class ForwardTracer(ShapeTracer):
    """Use as a context around one forward of `model`.

    cut_at: paths of projections whose outputs become gradient leaves. blocks: paths whose first input becomes one,
    labeled "stream:" and the path. leaves: paths of modules that count as leaves though they have parts (a linear
    whose weight is parametrized). inputs: what the model is called with.
    """

    def __init__(
        self,
        model: nn.Module,
        cut_at: Iterable[str],
        blocks: Sequence[str],
        leaves: Iterable[str] = (),
        inputs: Iterable[Any] = (),
    ) -> None:
        self.cut_at = set(cut_at)
        super().__init__(model, blocks, {*self.cut_at, *leaves})
        self.leaves: dict[str, list[Tensor]] = {}  # label -> the gradient leaves made for it
        self.residual_sums: list[ResidualSum] = []
        self.attention_calls: list[AttentionCall] = []
        self.lookups: list[EmbeddingLookup] = []
        self.block_entries: dict[str, BlockEntry] = {}
        self.last_exits: dict[str, int] = {}  # block -> number of exits from any block when it was last left
        self.input_reads: list[InputRead] = []
        self.read_parameters: set[int] = set()  # ids of the parameters that went into an operation
        self.readers: dict[int, set[str]] = {}  # id of a parameter -> paths of the modules whose forward read it
        self.inputs_of: dict[str, set[ValueIdentity]] = {}  # of blocks and leaf modules
        self.arguments: dict[str, list[ValueIdentity]] = {}  # of leaf modules: the very tensors, call by call
        self.outputs_of: dict[str, set[ValueIdentity]] = {}  # of leaf modules
        self.block_outputs: set[ValueIdentity] = set()
        self.streams: dict[str, Tensor] = {}  # path of a block -> what it returned
        self._label: dict[int, str] = {}  # id of a gradient leaf -> its label
        self._path_of_weight = {id(w): path for path in self.cut_at if (w := _weight_of(model, path)) is not None}
        self._emitters: dict[int, list[str]] = {}  # id of a tensor -> leaf modules that returned it
        self._receiver: dict[int, str] = {}  # id of a tensor -> first leaf module that took it
        self._composite_of: dict[ValueIdentity, str] = {}  # value -> last module with parts that returned it
        ids = [t for t in inputs if isinstance(t, Tensor) and t.ndim == 2 and not t.is_floating_point()]
        self._inputs, self._num_ids = {id(t) for t in ids}, ids[0].numel() if ids else 0
        self._num_exits = 0
        self._keep_alive: list[Any] = []  # an id is only unique while its tensor lives
        self._open_blocks: list[str] = []  # paths of the running blocks, outermost first
        self._open_modules: list[str] = []  # paths of all running modules, outermost first
        self._scores_operands: tuple[Tensor, Tensor] | None = None  # of the last product that may give scores

    def _hook(self, path: str, module: nn.Module) -> list[Any]:
        hooks = [module.register_forward_pre_hook(self._enter(path)), *super()._hook(path, module)]
        if path in self.blocks:
            hooks.append(module.register_forward_pre_hook(self._block_in(path), with_kwargs=True))
            hooks.append(module.register_forward_hook(self._block_out(path), always_call=True))
        elif self._is_leaf(path, module):
            hooks.append(module.register_forward_pre_hook(self._leaf_in(path), with_kwargs=True))
            hooks.append(module.register_forward_hook(self._leaf_out(path)))
        elif self._is_in_block(path):
            hooks.append(module.register_forward_hook(self._composite_out(path)))
        return [*hooks, module.register_forward_hook(self._leave, always_call=True)]

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
        """Cuts the block's first input, positional or by name, into a gradient leaf."""

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._open_blocks.append(path)
            name, value = block_input(args, kwargs)
            if value is None:
                return None
            stream = self._cut_stream(path, value)
            return ((stream, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: stream})

        return hook

    def _cut_stream(self, path: str, value: Tensor) -> Tensor:
        stream = self._make_leaf(f"stream:{path}", value)
        self.inputs_of.setdefault(path, set()).add(self._identity(stream))
        return stream

    def _block_out(self, path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            self._open_blocks.pop()
            self._num_exits += 1
            self.last_exits[path] = self._num_exits
            first = first_output(out)
            if isinstance(first, Tensor):
                self.block_outputs.add(self._identity(first))
                self.streams[path] = first

        return hook

    def _leaf_in(self, path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(x, Tensor):
                self._keep_alive.append(x)
                self._receiver.setdefault(id(x), path)
                self.inputs_of.setdefault(path, set()).add(self._identity(x))
                self.arguments.setdefault(path, []).append((id(x), x._version))

        return hook

    def _leaf_out(self, path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, out: Any) -> Any:
            if not isinstance(out, Tensor):
                return None
            if path in self.cut_at and out.is_floating_point():
                out = self._make_leaf(path, out)
            self._keep_alive.append(out)
            self._emitters.setdefault(id(out), []).append(path)
            self.outputs_of.setdefault(path, set()).add(self._identity(out))
            return out

        return hook

    def _composite_out(self, path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            first = first_output(out)
            if isinstance(first, Tensor):
                self._composite_of[self._identity(first)] = path

        return hook

    def _make_leaf(self, label: str, value: Tensor) -> Tensor:
        """The same value, its graph cut at a new gradient leaf."""
        if not value.is_floating_point():
            return value
        leaf = value.detach().requires_grad_()
        self._label[id(leaf)] = label
        self.leaves.setdefault(label, []).append(leaf)
        return leaf.clone()  # models may write to it in place, which a leaf does not allow

    # ---- calls -------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = (args[i] if len(args) > i else kwargs[n] for i, n in enumerate(("query", "key", "value")))
            call = self._record_attention(q, k, v, written_out=False)
            call.has_mask_bias = _has_mask_bias(args[3] if len(args) > 3 else kwargs.get("attn_mask"))
            call.out = func(*args, **kwargs)
            return call.out
        if func is F.embedding:
            self.lookups.append(EmbeddingLookup(tuple(self._open_modules), args[0] if args else kwargs["input"]))
        residual_sum = self._record_sum(*args[:2]) if func in ADDS and self._open_blocks and len(args) > 1 else None
        out = func(*args, **kwargs)
        if residual_sum is not None:
            residual_sum.out = self._identity(out)
            if out is args[0]:  # written in place: no longer the value that was returned and taken
                self._emitters.pop(id(out), None)
                self._receiver.pop(id(out), None)
        if func in PRODUCTS:
            a, b = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)][-2:]
            self._record_product(a, b, out)
        if isinstance(out, Tensor) and not self._open_blocks and self._reads_input(args, kwargs):
            self.input_reads.append(InputRead(tuple(self._open_modules), self._num_exits))
            if out.numel() == self._num_ids:  # a mask made of ids, or of another dtype
                self._keep_alive.append(out)
                self._inputs.add(id(out))
        if isinstance(out, (Tensor, tuple)):  # not where only a shape or a dtype is read
            self._record_parameters(args, kwargs)
        if func is F.linear and isinstance(out, Tensor):
            path = self._path_of_weight.get(id(args[1] if len(args) > 1 else kwargs["weight"]))
            if path is not None and path != self._open_modules[-1]:  # by another module than its own
                return self._make_leaf(path, out)
        return out

    def _record_parameters(self, args: Any, kwargs: Any) -> None:
        for value in (*args, *kwargs.values()):
            for x in value if isinstance(value, (tuple, list)) else (value,):
                if type(x) is not Tensor and isinstance(x, nn.Parameter):  # whose own check is slow
                    self.read_parameters.add(id(x))
                    self.readers.setdefault(id(x), set()).add(self._open_modules[-1])

    def _reads_input(self, args: Any, kwargs: Any) -> bool:
        """Whether an operation takes one of the model's own inputs, or a view of it."""
        tensors = (t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        return any(id(t if t._base is None else t._base) in self._inputs for t in tensors)

    def _record_attention(self, q: Tensor, k: Tensor, v: Tensor, written_out: bool) -> AttentionCall:
        tensors = {"q": q, "k": k, "v": v}
        self._keep_alive.append(tensors)
        call = AttentionCall(
            path=self._open_modules[-1],
            written_out=written_out,
            block=self._open_blocks[-1] if self._open_blocks else None,
            leaves={operand: self.ancestors(t) for operand, t in tensors.items()},
            tensors=tensors,
        )
        self.attention_calls.append(call)
        return call

    def _record_product(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """scores = q k^T, softmax, scores v: recognized by the softmax on the second product's first operand."""
        if self._scores_operands is not None and _is_after_softmax(a):
            q, k = self._scores_operands
            self._record_attention(q, k, b, written_out=True).out = out
            self._scores_operands = None
        elif a.ndim > 2 and b.ndim > 2:
            self._keep_alive.append((a, b, out))
            self._scores_operands = (a, b)

    def _record_sum(self, a: Any, b: Any) -> ResidualSum | None:
        """Records a sum of two activations, before it is computed: that may be in place. None for any other sum."""
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.shape != b.shape or not a.is_floating_point():
            return None
        if not (a.requires_grad and b.requires_grad):
            return None
        self._keep_alive.append((a, b))
        residual_sum = ResidualSum(self._open_blocks[-1], (self._operand(a), self._operand(b)))
        self.residual_sums.append(residual_sum)
        return residual_sum

    def _operand(self, t: Tensor) -> SumOperand:
        return SumOperand(
            value=self._identity(t),
            leaves=self.ancestors(t),
            emitters=tuple(self._emitters.get(id(t), ())),
            receiver=self._receiver.get(id(t)),
            composite=self._composite_of.get(self._identity(t)),
        )

    def _identity(self, t: Tensor) -> ValueIdentity:
        """Which value it is: the same for a tensor and views of the whole of it, another once it is written to."""
        whole = t if t._base is None or t._base.numel() != t.numel() else t._base
        self._keep_alive.append(whole)
        return id(whole), whole._version

    def ancestors(self, t: Tensor) -> frozenset[str]:
        """Labels of the nearest leaves a tensor is computed from."""
        labels, visited, stack = set(), set(), [t.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in visited:
                continue
            visited.add(node)
            variable = getattr(node, "variable", None)  # only AccumulateGrad nodes have one
            if variable is not None and id(variable) in self._label:
                labels.add(self._label[id(variable)])
            stack.extend(parent for parent, _ in node.next_functions)
        return frozenset(labels)


def _weight_of(model: nn.Module, path: str) -> nn.Parameter | None:
    return model.get_submodule(path)._parameters.get("weight")


def _has_mask_bias(mask: Tensor | None) -> bool:
    """True for an additive mask with values besides 0 and the smallest."""
    if mask is None or mask.dtype == torch.bool or mask.is_meta:
        return False
    return bool(((mask != 0) & (mask > torch.finfo(mask.dtype).min / 2)).any())


def _is_after_softmax(t: Tensor) -> bool:
    """True if t comes from a softmax, with at most reshapes, casts and dropout in between."""
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
