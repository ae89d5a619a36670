"""Batches of texts whose forward begins at the first block that an adapter changes (`kitout.trunk`).

`within_trunk` does this for a batch of a kit that keeps what enters that block; of any other kit it does nothing. An
example is known by its tokens, so jobs and evaluations share it. Examples are recorded in the groups they were planned
in, a whole one at a time: a resumed run computes the same bits. It knows objectives and examples, no jobs and no files.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kitout import fast
from kitout.data.encode.item import EncodedExample
from kitout.kit import Kit
from kitout.train.objectives.objective import Batch, Objective
from kitout.trunk.entry import Layout, TrunkEntry
from kitout.trunk.feature_store import FeatureStore

Recorded: TypeAlias = dict[Hashable, list[Tensor]]  # by example, at each entry [tokens, width]

GROUP_TOKENS = 4096  # recorded in one forward, padding included

_kept: WeakKeyDictionary[Kit, KeptInputs] = WeakKeyDictionary()
_is_within: ContextVar[bool] = ContextVar("within_trunk", default=False)


class KeptInputs:
    """What enters the first changed block, of planned examples."""

    entry: TrunkEntry
    """Where forwards begin."""
    store: FeatureStore
    """What is kept, by the tokens of an example."""
    groups: list[tuple[Objective, list[EncodedExample]]]
    """Examples that are recorded together, and whose batches they are."""
    group_of: dict[Hashable, int]
    """By example: the index of its group."""
    is_warned: bool
    """That the store has no file."""

    def __init__(self, entry: TrunkEntry, store: FeatureStore) -> None:
        self.entry, self.store, self.groups, self.group_of = entry, store, [], {}
        self.is_warned = False

    def plan(self, objective: Objective, batches: Iterable[Sequence[EncodedExample]]) -> None:
        """Reserves room for the examples of these batches, as far as there is any, and fixes their groups."""
        for batch in batches:
            new = {key_of(item): item for item in batch if key_of(item) not in self.group_of}
            kept = [item for key, item in new.items() if self.store.plan(key, self._lengths(item))]
            for group in _groups(kept):
                self.group_of |= {key_of(item): len(self.groups) for item in group}
                self.groups.append((objective, group))

    @contextmanager
    def entering(self, objective: Objective, items: Sequence[EncodedExample], batch: Batch) -> Iterator[None]:
        """Forwards over this batch of these items begin at the entry."""
        by_key = {key_of(item): item for item in items}
        found: Recorded = {key: values for key in by_key if (values := self.store.get(key)) is not None}
        missing = [key for key in by_key if key not in found]
        for index in dict.fromkeys(self.group_of[key] for key in missing if key in self.store):
            recorded = self.record(*self.groups[index])
            for key, values in recorded.items():
                self.store.put(key, values)
            found |= recorded
        rest = [item for key, item in by_key.items() if key not in found]
        found |= self.record(objective, rest) if rest else {}
        if self.store.file_error and not self.is_warned:
            self.is_warned = True
            warnings.warn(f"{self.store.file_error}; what is not kept is computed again", RuntimeWarning, stacklevel=2)
        with self.entering_with(found, items, batch):
            yield

    @contextmanager
    def entering_with(self, recorded: Recorded, items: Sequence[EncodedExample], batch: Batch) -> Iterator[None]:
        """The same with what was recorded of them."""
        keys, device = [key_of(item) for item in items], self.entry.kit.device
        rows = [torch.cat([recorded[key][point] for key in keys]).to(device) for point in range(len(self.entry.points))]
        token = _is_within.set(True)
        try:
            with self.entry.entering(rows, self.layouts(batch)):
                yield
        finally:
            _is_within.reset(token)

    def record(self, objective: Objective, items: Sequence[EncodedExample]) -> Recorded:
        """Computes what enters the block, in one forward of the base."""
        batch, kit = objective.collate(items, None), self.entry.kit
        with kit.use(None):
            rows = self.entry.record(lambda: kit(**batch.inputs), self.layouts(batch))
        parts = [
            values.cpu().split([self._lengths(item)[point] for item in items]) for point, values in enumerate(rows)
        ]
        return {key_of(item): list(each) for item, *each in zip(items, *parts, strict=True)}

    def layouts(self, batch: Batch) -> list[Layout]:
        """Of a batch, at each entry."""
        return [layout_of(batch, point.side) for point in self.entry.points]

    def _lengths(self, item: EncodedExample) -> tuple[int, ...]:
        sides = {"input": len(item.input_ids), "decoder": len(item.target_ids)}
        return tuple(sides[point.side] for point in self.entry.points)


def key_of(item: EncodedExample) -> Hashable:
    """What enters a block follows from these alone."""
    return item.input_ids, item.target_ids


def layout_of(batch: Batch, side: str) -> Layout:
    """Where the tokens of one side are."""
    ids = batch.inputs["decoder_input_ids" if side == "decoder" else "input_ids"]
    index = batch.token_index
    if index is None:
        mask = batch.inputs["decoder_attention_mask" if side == "decoder" else "attention_mask"]
        index = mask.flatten().nonzero().squeeze(1)
    return Layout((ids.shape[0], ids.shape[1]), index)


def keep(kit: Kit, kept: KeptInputs) -> None:
    """From now on `within_trunk` uses it for this kit."""
    _kept[kit] = kept


def forget(kit: Kit) -> None:
    """Frees what is kept for this kit and deletes its file."""
    kept = _kept.pop(kit, None)
    if kept is not None:
        kept.store.close()


@contextmanager
def within_trunk(kit: Kit, objective: Objective, items: Sequence[Any], batch: Batch) -> Iterator[None]:
    """The kit's forwards over this batch begin at the first changed block, if what enters it is kept for this kit."""
    kept = _kept.get(kit)
    if kept is None or not fast.enabled():
        yield
        return
    with kept.entering(objective, items, batch):
        yield


def is_within_trunk() -> bool:
    """Forwards here begin at the first changed block, with rows as they were planned."""
    return _is_within.get()


def _groups(items: Sequence[EncodedExample]) -> Iterator[list[EncodedExample]]:
    """In their order, each as large as a forward may be."""
    group: list[EncodedExample] = []
    for item in items:
        longest = max(other.length for other in [*group, item])
        if group and longest * (len(group) + 1) > GROUP_TOKENS:
            yield group
            group = []
        group.append(item)
    if group:
        yield group
