"""What enters the first changed block, kept by example: in memory first, then in a mapped file, up to a limit.

All examples are planned before the first is stored, so the same ones are kept in every process that resumes a run. The
file is raw numbers behind a header that is compared and never parsed: another header, and the file is made anew. Each
example has a checksum, so a file left by a killed process is used again as far as it was written. It knows keys and
tensors, and nothing of models.
"""

from __future__ import annotations

import hashlib
import os
import sys
import zlib
from collections.abc import Hashable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kitout.files.atomic import replacing

HEADER_BYTES = 64  # magic and digest
MAGIC = b"kitout trunk 1\n"
ALIGNMENT = 64
WORD = 8  # bytes of the largest value


@dataclass
class Slot:
    """Where one example is kept."""

    lengths: tuple[int, ...]
    """Its tokens at each entry."""
    num_bytes: int
    """Of all of them."""
    values: list[Tensor] | None = None
    """In memory; None: not stored, or in the file."""
    number: int = -1
    """Its number in the file; -1: it is kept in memory."""
    offset: int = 0
    """Its first byte in the file."""
    is_checked: bool = False
    """What the file holds of it was written or verified by this process."""


class FeatureStore:
    """Tensors [tokens, width] of examples, one for each entry, each of its own width and dtype.

    max_bytes: kept in all. memory_bytes: of those in memory. file: for the rest; None: no more than memory is kept.
    """

    slots: dict[Hashable, Slot]
    """By example, in the order they were planned."""
    num_left_out: int
    """Examples for which no room was left."""
    memory_used: int
    """Bytes in memory, once all are stored."""
    file_used: int
    """Bytes in the file."""
    file_error: str
    """Why there is no file, where one was needed."""

    def __init__(
        self, entries: Sequence[tuple[int, torch.dtype]], max_bytes: int, memory_bytes: int, file: Path | None = None
    ) -> None:
        self.entries, self.file = tuple(entries), file
        self.max_bytes, self.memory_bytes = max_bytes, min(max_bytes, memory_bytes)
        self.slots, self.num_left_out, self.file_error = {}, 0, ""
        self.memory_used = self.file_used = 0
        self._in_file: list[Slot] = []
        self._bytes: Tensor | None = None
        self._signature: str | None = None

    def __contains__(self, key: Hashable) -> bool:
        return key in self.slots

    def plan(self, key: Hashable, lengths: Sequence[int]) -> bool:
        """Reserves room for an example, unless it has some; False where none is left."""
        if key in self.slots:
            return True
        num_bytes = sum(self._sizes(lengths))
        slot = Slot(tuple(lengths), num_bytes)
        if self.memory_used + self.file_used + num_bytes > self.max_bytes:
            self.num_left_out += 1
            return False
        if self.memory_used + num_bytes <= self.memory_bytes:
            self.memory_used += num_bytes
        elif self.file is not None and self._signature is None:
            slot.number, slot.offset = len(self._in_file), self.file_used
            self.file_used += -(-num_bytes // ALIGNMENT) * ALIGNMENT
            self._in_file.append(slot)
        else:
            self.num_left_out += 1
            return False
        self.slots[key] = slot
        return True

    def use_file(self, signature: str) -> None:
        """No more is planned into the file, which is made or found when it is first needed.

        One that an earlier process made for the same signature is used again.
        """
        self._signature = signature

    def _open(self) -> bool:
        """Maps the file; False if it cannot be had (a full disk): then `file_error` says why, and memory is left."""
        if self._bytes is not None or self.file is None:
            return self._bytes is not None
        plan = repr((self._signature, self.entries, [(s.lengths, s.offset) for s in self._in_file]))
        header = (MAGIC + hashlib.sha256(plan.encode()).digest()).ljust(HEADER_BYTES, b"\0")
        size = self._data_start + self.file_used
        try:
            if not _is_made_for(self.file, header, size):
                _make(self.file, header, size)
            self._bytes = torch.from_file(str(self.file), shared=True, size=size, dtype=torch.uint8)
        except (OSError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else None
            self.file_error = f"{self.file} cannot be written: {reason or error}"
            self.num_left_out += len(self._in_file)
            self.slots = {key: slot for key, slot in self.slots.items() if slot.number < 0}
            self._in_file, self.file_used = [], 0
            return False
        return True

    @property
    def _data_start(self) -> int:
        return -(-(HEADER_BYTES + 8 * len(self._in_file)) // ALIGNMENT) * ALIGNMENT

    def get(self, key: Hashable) -> list[Tensor] | None:
        """What was stored of an example; None where nothing is."""
        slot = self.slots.get(key)
        if slot is None or slot.number < 0:
            return None if slot is None else slot.values
        if not self._open():
            return None
        data = self._data_of(slot)
        if not slot.is_checked:
            if self._record_of(slot).tolist() != [1, _checksum(data)]:
                return None
            slot.is_checked = True
        return self._tensors(slot, data)

    def put(self, key: Hashable, values: Sequence[Tensor]) -> None:
        """Stores an example, if it has room."""
        slot = self.slots.get(key)
        if slot is None:
            return
        if slot.number < 0:
            pairs = zip(values, self.entries, strict=True)
            slot.values = [value.to("cpu", dtype, copy=True) for value, (_, dtype) in pairs]
            return
        if not self._open():
            return
        data = self._data_of(slot)
        for target, value in zip(self._tensors(slot, data), values, strict=True):
            target.copy_(value)
        self._record_of(slot).copy_(torch.tensor([1, _checksum(data)], dtype=torch.int32))
        slot.is_checked = True

    def close(self) -> None:
        """Forgets everything and deletes the file."""
        self.slots, self._in_file, self._bytes = {}, [], None
        if self.file is not None:
            with suppress(OSError):
                self.file.unlink(missing_ok=True)

    def _data_of(self, slot: Slot) -> Tensor:
        assert self._bytes is not None
        start = self._data_start + slot.offset
        return self._bytes[start : start + slot.num_bytes]

    def _record_of(self, slot: Slot) -> Tensor:
        """[1 once it is written, its checksum], int32."""
        assert self._bytes is not None
        start = HEADER_BYTES + 8 * slot.number
        return self._bytes[start : start + 8].view(torch.int32)

    def _tensors(self, slot: Slot, data: Tensor) -> list[Tensor]:
        parts = zip(data.split(self._sizes(slot.lengths)), slot.lengths, self.entries, strict=True)
        return [part[: n * width * dtype.itemsize].view(dtype).view(n, width) for part, n, (width, dtype) in parts]

    def _sizes(self, lengths: Sequence[int]) -> list[int]:
        """Bytes of an example at each entry: whole words, so that the next one may have larger values."""
        pairs = zip(lengths, self.entries, strict=True)
        return [-(-n * width * dtype.itemsize // WORD) * WORD for n, (width, dtype) in pairs]


def digest_of(texts: Iterable[object]) -> str:
    """A digest of values by their text, in order."""
    sha256 = hashlib.sha256()
    for text in texts:
        sha256.update(repr(text).encode() + b"\n")
    return sha256.hexdigest()


def _checksum(data: Tensor) -> int:
    """CRC-32 as a signed int32."""
    crc = zlib.crc32(data.numpy().data)
    return crc - 2**32 if crc >= 2**31 else crc


def _is_made_for(file: Path, header: bytes, size: int) -> bool:
    """A regular file of this size with this header."""
    if file.is_symlink() or not file.is_file() or file.stat().st_size != size:
        return False
    with file.open("rb") as opened:
        return opened.read(len(header)) == header


def _make(file: Path, header: bytes, size: int) -> None:
    """A file with this header and nothing stored, whole or not at all.

    Its disk space is taken now: a mapped file that grew into a full disk would end the process.
    """
    with replacing(file) as temp_path, temp_path.open("wb") as opened:
        opened.write(header)
        opened.flush()
        if sys.platform == "linux":
            os.posix_fallocate(opened.fileno(), 0, size)
        else:
            for start in range(len(header), size, 2**24):
                opened.write(bytes(min(2**24, size - start)))
