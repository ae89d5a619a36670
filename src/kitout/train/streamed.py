"""A stream of examples looked at as a list of items: asked for in order, read as it is asked, exact after a restart.

Only what the last few steps asked for is kept; an earlier index reads the stream again from its beginning. Epochs
follow each other without end, each in its own order. It knows streams and encoders, nothing of training.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

from kitout.data.encode.item import EncodedExample
from kitout.data.examples.examples import Example
from kitout.data.read.tables import DataError
from kitout.data.streaming import Stream, encode_stream

BUFFERED_ITEMS = 4096  # items behind the newest


class StreamedItems(Sequence[EncodedExample]):
    """items[i] for growing i; it has no length that is known, so `len` says how far it was read."""

    def __init__(self, source: Stream, encode: Callable[[Sequence[Example]], list[EncodedExample]]) -> None:
        self.source, self.encode = source, encode
        self._restart()

    def _restart(self) -> None:
        self._buffer: deque[EncodedExample] = deque(maxlen=BUFFERED_ITEMS)
        self._num_read = 0
        self._items = self._repeat_epochs()

    def _repeat_epochs(self) -> Iterator[EncodedExample]:
        epoch = self.source.epoch
        while True:
            before = self._num_read
            for item in encode_stream(self.source.for_epoch(epoch), self.encode):
                if item.num_targets:
                    self._num_read += 1
                    yield item
            if self._num_read == before:
                raise DataError("an epoch of the stream holds nothing to learn")
            epoch += 1

    def __len__(self) -> int:
        return self._num_read

    @overload
    def __getitem__(self, index: int) -> EncodedExample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[EncodedExample]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._num_read))]
        if index < self._num_read - len(self._buffer):
            self._restart()
        while self._num_read <= index:
            self._buffer.append(next(self._items))
        return self._buffer[index - self._num_read]
