"""A stream of examples looked at as a list of items: asked for in order, read as it is asked, exact after a restart.

Only what the last few steps asked for is kept; an earlier index reads the stream again from its beginning. Epochs
follow each other without end, each in its own order. It knows streams and encoders, nothing of training.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

from kitout.data.encode.item import Item
from kitout.data.examples.examples import Example
from kitout.data.read.tables import DataError
from kitout.data.streaming import Stream, items

KEPT = 4096  # items behind the newest


class Streamed(Sequence[Item]):
    """items[i] for growing i; it has no length that is known, so `len` says how far it was read."""

    def __init__(self, source: Stream, encode: Callable[[Sequence[Example]], list[Item]]) -> None:
        self.source, self.encode = source, encode
        self._begin()

    def _begin(self) -> None:
        self._held: deque[Item] = deque(maxlen=KEPT)
        self._read = 0
        self._items = self._endless()

    def _endless(self) -> Iterator[Item]:
        epoch = self.source.epoch
        while True:
            before = self._read
            for item in items(self.source.at(epoch), self.encode):
                if item.learned:
                    self._read += 1
                    yield item
            if self._read == before:
                raise DataError("an epoch of the stream holds nothing to learn")
            epoch += 1

    def __len__(self) -> int:
        return self._read

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._read))]
        if index < self._read - len(self._held):
            self._begin()
        while self._read <= index:
            self._held.append(next(self._items))
        return self._held[index - self._read]
