"""Where a forward can enter a model: behind the last block that runs before anything the adapters change.

One probe forward shows which blocks those are and in which form each returns its hidden states. Later the model's own
forward runs with these blocks skipped, and the last of them returns what was recorded of the real tokens. So
embeddings, position ids, rotary tables and masks are prepared as always, and whatever follows is the model's own code.
An encoder-decoder has two entries where its encoder is frozen. It knows no architecture, no examples and no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from kitout.kit import Kit
from kitout.runtime.adapter import Adapter

RunModel: TypeAlias = Callable[[], Any]  # calls the kit once
# Of a block's output; None: the hidden states alone. A tuple has HIDDEN first, then for each value None, (the key of
# the input that is passed on,), or OWN for what only the block can compute.
OutputForm: TypeAlias = tuple[Any, ...] | None
HIDDEN, OWN = "hidden", "own"


@dataclass(frozen=True)
class Layout:
    """Where the real tokens of a batch are, one example after the other."""

    shape: tuple[int, int]
    """[B, T]."""
    index: Tensor
    """[N]: their places in the flattened [B * T]."""


@dataclass(frozen=True)
class EntryPoint:
    """The blocks of one tower that need not run."""

    skipped: Mapping[str, OutputForm]
    """Path -> the form of its output, in the order they run. The last one returns what was recorded."""
    width: int
    """Of the hidden states."""
    dtype: torch.dtype
    """Of the hidden states: a model may add in float32 what its weights of half precision compute."""
    side: Literal["input", "decoder"]
    """Which tokens they are of: of the input, or of the decoder's input in an encoder-decoder."""

    @property
    def source(self) -> str:
        """The block whose output is recorded."""
        return list(self.skipped)[-1]


class TrunkEntry:
    """`record` gives the hidden states of real tokens at every entry; within `entering` a forward begins there."""

    points: tuple[EntryPoint, ...]
    """In the order they run."""
    cut: str
    """The first block that runs, or the first changed module where that is in none."""

    def __init__(self, kit: Kit, points: Sequence[EntryPoint], cut: str) -> None:
        self.kit, self.points, self.cut = kit, tuple(points), cut

    @property
    def sources(self) -> str:
        """The blocks whose outputs are recorded, as text."""
        return " and ".join(point.source for point in self.points)

    @torch.no_grad()
    def record(self, run_model: RunModel, layouts: Sequence[Layout]) -> list[Tensor]:
        """The hidden states [N, width] of the real tokens at each entry; the forward ends at the last one."""
        outputs: dict[str, Tensor] = {}

        def keep_output(path: str) -> Callable[..., None]:
            def keep(_module: nn.Module, _args: Any, output: Any) -> None:
                outputs[path] = _hidden_of(output)
                if path == self.points[-1].source:
                    raise _EntryReached

            return keep

        with ExitStack() as stack:
            for point in self.points:
                block = self.kit.base.get_submodule(point.source)
                stack.callback(block.register_forward_hook(keep_output(point.source)).remove)
            with suppress(_EntryReached):
                run_model()
        pairs = zip(self.points, layouts, strict=True)
        return [outputs[p.source].reshape(-1, p.width)[layout.index] for p, layout in pairs]

    @contextmanager
    def entering(self, rows: Sequence[Tensor], layouts: Sequence[Layout]) -> Iterator[None]:
        """rows: as `record` gives them. Padding has zeros, which no real token sees."""
        with ExitStack() as stack:
            for point, values, layout in zip(self.points, rows, layouts, strict=True):
                flat = values.new_zeros(layout.shape[0] * layout.shape[1], point.width)
                hidden = flat.index_copy_(0, layout.index, values).view(*layout.shape, point.width)
                for path, form in point.skipped.items():
                    new = hidden if path == point.source else None
                    _replace_forward(self.kit.base.get_submodule(path), _skipping(form, new), stack)
            yield


def find_entry(
    kit: Kit, names: Sequence[str], run_model: RunModel, shapes: Mapping[str, tuple[int, int]]
) -> TrunkEntry | str:
    """The latest entry before anything that one of these adapters changes: a TrunkEntry, or why there is none (str).

    run_model: calls the kit once. shapes: [B, T] of its tokens by side ("input", "decoder").
    """
    changed: set[str] = set()
    for name in names:
        adapter = kit[name]
        if adapter.prompts or adapter.prefixes:
            return f"{name} has virtual tokens, and the positions of a text follow from what lies in front of it"
        changed |= _changed_paths(adapter)
    if "" in changed:
        return "the model itself is changed"
    with kit.use(None), torch.no_grad():
        probe = _Probe(kit, run_model)
    cut = next((k for k, (event, path) in enumerate(probe.events) if event == "enter" and path in changed), None)
    if cut is None:
        return "nothing that is changed ran"
    first = probe.events[cut][1]
    entered_later = {path for event, path in probe.events[cut:] if event == "enter"}
    left = [path for event, path in probe.events[:cut] if event == "leave"]
    points = []
    for tower in kit.survey.towers:
        blocks = {b.path: b for b in kit.survey.blocks if b.tower == tower.path and b.is_one_module}
        finished = [path for path in left if path in blocks]
        if not finished or kit.survey.is_media_tower(tower):
            continue
        if len(set(finished)) < len(finished) or entered_later & set(finished):
            return f"a block of {tower.path} runs more than once"
        skipped: dict[str, OutputForm] = {}
        no_choice = all(OWN in (probe.forms[path] or ()) for path in finished)  # then maybe nothing reads these
        for path in finished:
            form = probe.forms[path]
            skipped = {} if OWN in (form or ()) and not no_choice else {**skipped, path: form}
        side = _side(kit, tower.causal)
        if not skipped or side is None or probe.shapes[list(skipped)[-1]] != (*shapes[side], tower.width):
            return f"what the blocks of {tower.path} pass on is not the hidden states of one token each"
        points.append(EntryPoint(skipped, tower.width, probe.dtypes[list(skipped)[-1]], side))
    if not points:
        return f"no block runs before {first}, the first module that is changed"
    order = [path for event, path in probe.events if event == "leave"]
    block = next((b.path for b in kit.survey.blocks if f"{first}.".startswith(f"{b.path}.")), first)
    return TrunkEntry(kit, sorted(points, key=lambda point: order.index(point.source)), block)


def _changed_paths(adapter: Adapter) -> set[str]:
    heads = {path.replace("/", ".") for path in adapter.heads}
    return {site.path for site in adapter.sites} | heads | {*adapter.by_module, *adapter.input_relays}


def _side(kit: Kit, causal: bool | None) -> Literal["input", "decoder"] | None:
    if not kit.config.is_encoder_decoder:
        return "input"
    return None if causal is None else "decoder" if causal else "input"


class _EntryReached(Exception):
    """Ends a forward at the last entry: nothing after it is needed."""


class _Probe:
    """What one forward shows of the order of modules and of the blocks' outputs."""

    events: list[tuple[str, str]]
    """("enter" | "leave", path) of every module, in order."""
    forms: dict[str, Any]
    """By block: the form of its output."""
    shapes: dict[str, tuple[int, ...]]
    """By block: of the hidden states that leave it; () where it returns something else."""
    dtypes: dict[str, torch.dtype]
    """By block: of the same."""

    def __init__(self, kit: Kit, run_model: RunModel) -> None:
        self.events, self.forms, self.shapes, self.dtypes = [], {}, {}, {}
        blocks = {block.path for block in kit.survey.blocks}
        with ExitStack() as stack:
            for path, module in kit.base.named_modules():
                if path:
                    stack.callback(module.register_forward_pre_hook(self._on_enter(path)).remove)
                    on_leave = self._on_leave(path, path in blocks)
                    stack.callback(module.register_forward_hook(on_leave, with_kwargs=True).remove)
            run_model()

    def _on_enter(self, path: str) -> Callable[..., None]:
        return lambda *_: self.events.append(("enter", path))

    def _on_leave(self, path: str, is_block: bool) -> Callable[..., None]:
        def record(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.events.append(("leave", path))
            if is_block:
                self.forms[path] = _form_of(args, kwargs, output)
                hidden = _hidden_of(output)
                self.shapes[path] = ()
                if isinstance(hidden, Tensor):
                    self.shapes[path], self.dtypes[path] = tuple(hidden.shape), hidden.dtype

        return record


def _form_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> OutputForm:
    if type(output) is not tuple:
        return None
    inputs: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    form: list[Any] = [HIDDEN]
    for value in output[1:]:
        passed_on = next((key for key, given in inputs.items() if given is value), None)
        form.append(None if value is None else OWN if passed_on is None else (passed_on,))
    return tuple(form)


def _skipping(form: OutputForm, new: Tensor | None) -> Callable[..., Any]:
    """A block's forward that passes its input on, or returns new hidden states, in the form of its real output."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = new
        if hidden is None:
            hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if form is None:
            return hidden
        inputs: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        return tuple(hidden if part == HIDDEN else inputs[part[0]] if type(part) is tuple else None for part in form)

    return forward


def _hidden_of(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) and output else output


def _replace_forward(module: nn.Module, forward: Callable[..., Any], stack: ExitStack) -> None:
    """Until the stack closes."""
    attributes = module.__dict__
    before = attributes.get("forward")
    attributes["forward"] = forward
    if before is None:
        stack.callback(attributes.pop, "forward")
    else:
        stack.callback(attributes.__setitem__, "forward", before)
