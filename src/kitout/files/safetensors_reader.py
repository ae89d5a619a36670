"""Safetensors, read with suspicion: the header within a size limit, bytes hashed as they come.

safetensors' own parser checks the header (gaps, overlaps, padding, sizes). Nothing is allocated for tensors before the
caller has compared the header with what it expects. The bytes are read here: safetensors' tensors are a map of the
file, which gives no digest and dies when the file is cut. No pickle. It knows no adapters, models or json records.
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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kitout.errors import Errors, FileError

MAX_HEADER_BYTES = 16 * 2**20
MAX_DIMS = 8
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
class TensorEntry:
    """One tensor as the header has it."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass
class SafetensorsFile:
    """An open safetensors file whose header is sound."""

    file: BinaryIO
    path: Path
    head: bytes
    """The bytes before the tensors'."""
    entries: dict[str, TensorEntry]
    """In the order of their bytes."""
    size: int
    """Of the whole file in bytes."""

    def read(self) -> tuple[dict[str, Tensor], str]:
        """Every tensor, on the CPU, and the sha256 of the whole file as it was read."""
        digest = hashlib.sha256(self.head)
        self.file.seek(len(self.head))
        tensors = {}
        for name, entry in self.entries.items():
            raw = torch.empty(math.prod(entry.shape) * entry.dtype.itemsize, dtype=torch.uint8)
            view: Any = raw.numpy()
            if self.file.readinto(view) != raw.numel():  # type: ignore[attr-defined]
                raise FileError(f"{self.path} became shorter while it was read: save the adapter again")
            digest.update(view)
            tensors[name] = raw.view(entry.dtype).view(entry.shape)
        return tensors, digest.hexdigest()


def open_regular(path: Path, max_bytes: int | None = None) -> tuple[BinaryIO, int]:
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
    if max_bytes is not None and facts.st_size > max_bytes:
        os.close(fd)
        raise FileError(f"{path} has {facts.st_size:,} bytes, and at most {max_bytes:,} are read")
    return os.fdopen(fd, "rb"), facts.st_size


def open_tensors(path: Path) -> SafetensorsFile:
    """Opens a safetensors file and checks its header against its size; the caller closes `.file`."""
    file, size = open_regular(path)
    try:
        head = _head(file, path, size)
        return SafetensorsFile(file, path, head, _entries(file, path), size)
    except BaseException:
        file.close()
        raise


def _head(file: BinaryIO, path: Path, size: int) -> bytes:
    """The header and the eight bytes that say how long it is."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        raise FileError(f"{path} is cut off or no safetensors file: {size:,} bytes, header said to take {length:,}")
    if length > MAX_HEADER_BYTES:
        raise FileError(f"{path}: the header takes {length:,} bytes, and at most {MAX_HEADER_BYTES:,} are read")
    return start + file.read(length)


def _entries(file: BinaryIO, path: Path) -> dict[str, TensorEntry]:
    """The header's tensors; FileError if safetensors refuses it or it holds what no adapter of ours does."""
    faults = Errors(FileError, str(path))
    entries = {}
    try:
        with safe_open(path, framework="np") as header:  # "pt" would map the whole file as writable memory
            for name in header.offset_keys():
                part = header.get_slice(name)
                kind, shape = part.get_dtype(), tuple(part.get_shape())
                if kind not in DTYPES:
                    faults.add(f"tensor {name[:80]!r}: dtype {kind!r} is none of {', '.join(DTYPES)}")
                elif len(shape) > MAX_DIMS:
                    faults.add(f"tensor {name[:80]!r}: shape {str(shape)[:60]} is no list of at most {MAX_DIMS} sizes")
                else:
                    entries[name] = TensorEntry(DTYPES[kind], shape)
        replaced = not os.path.samestat(os.fstat(file.fileno()), path.stat())  # the parser opened the name once more
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path} is damaged, cut off or padded: {str(error)[:400]}") from None
    if replaced:
        raise FileError(f"{path} was replaced while it was read: load it again")
    faults.raise_if_any()
    return entries


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
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
    return path.stat().st_size, digest.hexdigest()
