"""Safetensors, read with suspicion: the header within a size limit, every offset checked, bytes hashed as they come.

Nothing is allocated for tensors before the caller has compared the header with what it expects; a header can only
ask for as many bytes as the file has. No pickle. It knows nothing of adapters, models or json records.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor

from kitout.errors import Faults, FileError

MOST_HEADER = 16 * 2**20
MOST_DIMS = 8
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """One tensor as the header has it; begin and end count from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass
class Tensors:
    """An open safetensors file whose header is sound. size: of the whole file in bytes."""

    file: BinaryIO
    path: Path
    head: bytes
    entries: dict[str, Entry]
    size: int

    def read(self) -> tuple[dict[str, Tensor], str]:
        """Every tensor, on the CPU, and the sha256 of the whole file as it was read."""
        digest = hashlib.sha256(self.head)
        self.file.seek(len(self.head))
        tensors = {}
        for name, entry in self.entries.items():  # in the order of their bytes
            raw = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
            view: Any = raw.numpy()
            if self.file.readinto(view) != raw.numel():  # type: ignore[attr-defined]
                raise FileError(f"{self.path} became shorter while it was read: save the adapter again")
            digest.update(view)
            tensors[name] = raw.view(entry.dtype).view(entry.shape)
        return tensors, digest.hexdigest()


def open_regular(path: Path, most: int | None = None) -> tuple[BinaryIO, int]:
    """A file opened for reading, and its size; refuses pipes, devices and folders, and more than `most` bytes.

    Links are followed: download caches are made of them, and nothing is ever written through one.
    """
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from None
    facts = os.fstat(fd)
    if not stat.S_ISREG(facts.st_mode):
        os.close(fd)
        raise FileError(f"{path} is no regular file")
    if most is not None and facts.st_size > most:
        os.close(fd)
        raise FileError(f"{path} has {facts.st_size:,} bytes, and at most {most:,} are read")
    return os.fdopen(fd, "rb"), facts.st_size


def open_tensors(path: Path) -> Tensors:
    """Opens a safetensors file and checks its header against its size; the caller closes `.file`."""
    file, size = open_regular(path)
    try:
        head, text = _head(file, path, size)
        return Tensors(file, path, head, _entries(parse(text, path), path, size - len(head)), size)
    except BaseException:
        file.close()
        raise


def _head(file: BinaryIO, path: Path, size: int) -> tuple[bytes, bytes]:
    """The bytes before the tensors, and the json in them."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        raise FileError(f"{path} is cut off or no safetensors file: {size:,} bytes, header said to take {length:,}")
    if length > MOST_HEADER:
        raise FileError(f"{path}: the header takes {length:,} bytes, and at most {MOST_HEADER:,} are read")
    text = file.read(length)
    if len(text) < length:
        raise FileError(f"{path} is cut off inside its header")
    return start + text, text


def parse(text: bytes, path: Path) -> dict[str, Any]:
    """A json object, strictly: no NaN, no key twice, no nesting that would exhaust the stack."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            raise ValueError("a key appears twice")
        return found

    def constant(word: str) -> Any:
        raise ValueError(f"{word} is no json")

    try:
        found = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise FileError(f"{path} is no valid json: {reason}") from None
    if not isinstance(found, dict):
        raise FileError(f"{path} must hold a json object, found {type(found).__name__}")
    return found


def _entries(header: dict[str, Any], path: Path, room: int) -> dict[str, Entry]:
    """The header's tensors in the order of their bytes, which must fill the file without gap or overlap."""
    faults = Faults(FileError, str(path))
    header.pop("__metadata__", None)
    found = {}
    for name, value in header.items():
        entry = _entry(value)
        if isinstance(entry, str):
            faults.add(f"tensor {name[:80]!r}: {entry}")
        else:
            found[name] = entry
    faults.raise_if_any()
    ordered = dict(sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)))
    at = 0
    for name, entry in ordered.items():
        if entry.begin != at:
            faults.add(f"tensor {name[:80]!r} starts at byte {entry.begin:,}, the one before ends at {at:,}")
            break
        at = entry.end
    else:
        if at != room:
            faults.add(f"its tensors take {at:,} bytes, the file has {room:,} for them: it is cut off or padded")
    faults.raise_if_any()
    return ordered


def _entry(value: Any) -> Entry | str:
    """One entry, or what is wrong with it."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        return "its header entry needs exactly dtype, shape and data_offsets"
    dtype, shape, offsets = DTYPES.get(str(value["dtype"])), value["shape"], value["data_offsets"]
    if dtype is None:
        return f"dtype {str(value['dtype'])[:20]!r} is none of {', '.join(DTYPES)}"
    if not _counts(shape) or len(shape) > MOST_DIMS:
        return f"shape {str(shape)[:60]} is no list of at most {MOST_DIMS} sizes"
    if not _counts(offsets) or len(offsets) != 2:
        return f"data_offsets {str(offsets)[:60]} is no pair of byte positions"
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        return f"{end - begin:,} bytes for shape {str(shape)[:60]} of {value['dtype']}"
    return Entry(dtype, tuple(shape), begin, end)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[int, str]:
    """Writes a safetensors file; returns its size and sha256."""
    plain = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        # safetensors refuses tensors that share a storage; only a view that is part of a larger one can.
        plain[name] = value.clone() if value.untyped_storage().nbytes() != value.nbytes else value
    save_file(plain, path, dict(metadata))
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
        os.fsync(file.fileno())
    return path.stat().st_size, digest.hexdigest()
