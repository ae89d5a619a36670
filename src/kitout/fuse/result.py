"""A fused adapter put on its kit: the common end of combining, converting and extracting.

The adapter is built on the meta device and filled, as one that is loaded from a folder, with the heads of its sources.
It also says what a result could not hold. It knows kits, adapters and their tensors, and no rule.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kitout.base.site import Site
from kitout.errors import ConfigError, Errors
from kitout.files.adapter_tensors import HEAD, build_empty, fill_and_register, tensor_slots
from kitout.files.usage_record import TextRecord
from kitout.fuse.changes import Change, Place, Places, square_of
from kitout.fuse.residual import Residual
from kitout.fuse.sources import Source
from kitout.method import Method
from kitout.runtime.adapter import Adapter
from kitout.runtime.state import KitState

DROPPABLE = {
    "biases": "biases of linears and convolutions",
    "norms": "gains and shifts of norms",
    "other": "class tokens, positions, other gains, stacked experts",
    "heads": "heads that replace modules of the model",
}
ANSWERS = {"answers", "answer_tokens", "end_token"}
ROUNDING = 1e-14  # a square this small, of the squares it is the sum of, is rounding


@dataclass
class Combined:
    """One place's change, as asked for."""

    change: Change
    """The change; of a matrix in the form [d_out, d_in]."""
    parts: float
    """Sum of the squares that it is the (weighted) sum of."""

    @property
    def square(self) -> float:
        """Its squared norm, 0 where nothing is left but rounding."""
        square = square_of(self.change)
        return square if square > ROUNDING * self.parts else 0.0


@dataclass
class NewAdapter:
    """What a result is made with, besides its tensors."""

    state: KitState
    """The kit's."""
    places: Places
    """The base's."""
    name: str
    """The new adapter's."""
    sources: Sequence[Source]
    """What it is made of; empty for an extraction."""
    drop: frozenset[str] = frozenset()
    """What may be left out."""
    note: dict[str, Any] = field(default_factory=dict)
    """How it was made, for its metadata."""
    heads: dict[str, Adapter] = field(default_factory=dict)
    """Path of a head -> the adapter that has it, a source or a part of one."""
    check: Callable[[Residual], None] | None = None
    """Raises where too much is missing, before the kit is changed."""
    residual: Residual = field(default_factory=Residual)
    """What is missing so far."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Parameter -> its kind, of what was left out."""
    refused: dict[str, str] = field(default_factory=dict)
    """The same, of what may not be left out."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its values, as `kit.add` chooses it."""
        return torch.promote_types(self.state.dtype, torch.float32)

    def leave_out(self, place: Place, square: float) -> None:
        """A change that the result has no place for."""
        if square:
            self.residual.add(place.path, place.role, square, square)
            (self.dropped if place.kind in self.drop else self.refused)[place.name] = place.kind

    def check_refused(self, holder: str, hint: str = "") -> None:
        """ConfigError that lists what the result cannot hold."""
        if not self.refused:
            return
        errors = Errors(ConfigError, f"{self.name!r} cannot be made: {holder} cannot hold all of it")
        kinds = dict.fromkeys(self.refused.values())
        for kind in kinds:
            names = [name for name, k in self.refused.items() if k == kind]
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            errors.add(f"{DROPPABLE.get(kind, kind)}: {', '.join(names[:6])}{more}")
        words = " ".join(kind for kind in kinds if kind in DROPPABLE)
        advice = [f"drop={words!r} leaves them out and counts them in the residual"] if words else []
        errors.add("; ".join([*advice, *([hint] if hint else [])]) or "choose other targets")
        errors.raise_if_any()

    def register(self, method: Method, sites: Sequence[Site], values: dict[str, Tensor]) -> Adapter:
        """The adapter on the kit, trainable as a new one. values: its tensors by name; heads come from the sources."""
        if self.check is not None:
            self.check(self.residual)
        heads: dict[str, nn.Module] = {
            path: copy.deepcopy(source.heads_by_path()[path]) for path, source in self.heads.items()
        }
        adapter, slots = build_empty(self.state, self.name, method, sites, heads)
        for path, source in self.heads.items():
            stem = HEAD + path.replace(".", "/") + "."
            values |= {n: s.tensor.detach().clone() for n, s in tensor_slots(source).items() if n.startswith(stem)}
        for name, slot in slots.items():
            if name in values and not name.startswith(HEAD):
                values[name] = values[name].to(self.dtype).contiguous()
            slot.tensor.requires_grad_(slot.tensor.is_floating_point() and isinstance(slot.tensor, nn.Parameter))
        adapter.metadata = {"fused": self.note}
        adapter.usage = common_usage([usage for source in self.sources for usage in source.usages])
        fill_and_register(self.state, adapter, slots, values, 1.0)
        return adapter


def common_usage(usages: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """How a fused adapter is used: as its sources, without the settings of texts in which they differ.

    None where a source does not say it, or task, labels, base, tokenizer or images are not the same.
    """
    first = usages[0] if usages else None
    if first is None:
        return None
    texts: list[dict[str, Any]] = []
    for usage in usages:
        text = None if usage is None else usage["text"]
        if usage is None or any(usage[key] != first[key] for key in ("task", "labels", "base", "images")):
            return None
        if (text is None) != (first["text"] is None) or (text and text["tokenizer"] != first["text"]["tokenizer"]):
            return None
        texts += [text] if text else []
    common = copy.deepcopy(first)
    if texts:
        defaults = {key: field.get_default() for key, field in TextRecord.model_fields.items()}
        differing = {key for key in defaults if any(text[key] != texts[0][key] for text in texts)}
        if differing & ANSWERS:
            differing |= ANSWERS  # they belong together
        common["text"] |= {key: defaults[key] for key in differing}
        common["text"]["max_length"] = max(text["max_length"] for text in texts)
    return common


def parse_drop(drop: str | None) -> frozenset[str]:
    """The words of `drop=`."""
    words = (drop or "").split()
    if unknown := [word for word in words if word not in DROPPABLE]:
        known = ", ".join(f"{word} ({what})" for word, what in DROPPABLE.items())
        raise ConfigError(f"drop={drop!r}: {' '.join(unknown)!r} is none of {known}")
    return frozenset(words)


def heads_of(sources: Iterable[tuple[Source, float]], drop: frozenset[str]) -> dict[str, Adapter]:
    """The heads that a sum takes over: those of one source at weight 1. A sum of several heads is no head."""
    if "heads" in drop:
        return {}
    owners: dict[str, list[tuple[Source, float]]] = {}
    for source, weight in sources:
        for path in source.head_paths:
            owners.setdefault(path, []).append((source, weight))
    errors = Errors(ConfigError, "heads cannot be added")
    heads: dict[str, Adapter] = {}
    for path, having in owners.items():
        source, weight = having[0]
        head = source.head_at(path)
        if len(having) > 1 or weight != 1.0 or head is None:
            shown = ", ".join(f"{source.name!r} at {weight:g}" for source, weight in having)
            inside = f" (which blends or changes a head of {_with_head(source, path)})" if head is None else ""
            errors.add(
                f"{path} is replaced by {shown}{inside}: one source at weight 1 may bring its head; drop='heads' "
                "leaves all out"
            )
        else:
            heads[path] = head
    errors.raise_if_any()
    return heads


def _with_head(source: Source, path: str) -> str:
    return ", ".join(repr(adapter.name) for adapter in source.adapters if path in adapter.heads_by_path())
