"""Safetensors files from anywhere: the header is checked first, the tensors are read and hashed afterwards.

`open_tensors` limits the size of the header and leaves its checks (gaps, overlaps, padding, sizes) to safetensors. The
caller compares the entries with what it expects before `SafetensorsFile.read` allocates anything. The bytes are read
here, because the tensors of safetensors are a map of the file: that gives no digest, and the process dies when the file
is cut. No pickle. It knows no adapters, models or json records.
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
    """What the header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass
class SafetensorsFile:
    """An open safetensors file whose header is valid."""

    file: BinaryIO
    path: Path
    header: bytes
    """All bytes before those of the tensors."""
    entries: dict[str, TensorEntry]
    """In the order of their bytes."""
    size: int
    """Of the whole file in bytes."""

    def read(self) -> tuple[dict[str, Tensor], str]:
        """Every tensor, on the CPU, and the sha256 of the whole file as it was read."""
        digest = hashlib.sha256(self.header)
        self.file.seek(len(self.header))
        tensors = {}
        for name, entry in self.entries.items():
            data = torch.empty(math.prod(entry.shape) * entry.dtype.itemsize, dtype=torch.uint8)
            buffer: Any = data.numpy()  # shares the memory of `data`
            if self.file.readinto(buffer) != data.numel():  # type: ignore[attr-defined]
                raise FileError(f"{self.path} became shorter while it was read: save the adapter again")
            digest.update(buffer)
            tensors[name] = data.view(entry.dtype).view(entry.shape)
        return tensors, digest.hexdigest()


def open_regular(path: Path, max_bytes: int | None = None) -> tuple[BinaryIO, int]:
    """A file opened for reading, and its size. Refuses pipes, devices, folders, and more than `max_bytes`.

    Links are followed: download caches are made of them, and nothing is written through one.
    """
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise FileError(f"{path} is not a regular file")
    if max_bytes is not None and status.st_size > max_bytes:
        os.close(fd)
        raise FileError(f"{path} has {status.st_size:,} bytes, and at most {max_bytes:,} are read")
    return os.fdopen(fd, "rb"), status.st_size


def open_tensors(path: Path) -> SafetensorsFile:
    """Opens a safetensors file and checks its header against its size; the caller closes `.file`."""
    file, size = open_regular(path)
    try:
        header = _read_header(file, path, size)
        return SafetensorsFile(file, path, header, _parse_entries(file, path), size)
    except BaseException:
        file.close()
        raise


def _read_header(file: BinaryIO, path: Path, size: int) -> bytes:
    """The eight bytes that give the length of the header, and the header."""
    length_bytes = file.read(8)
    length = int.from_bytes(length_bytes, "little")
    if len(length_bytes) < 8 or length > size - 8:
        raise FileError(f"{path} is cut off or not a safetensors file: {size:,} bytes, with a header of {length:,}")
    if length > MAX_HEADER_BYTES:
        raise FileError(f"{path}: the header takes {length:,} bytes, and at most {MAX_HEADER_BYTES:,} are read")
    return length_bytes + file.read(length)


def _parse_entries(file: BinaryIO, path: Path) -> dict[str, TensorEntry]:
    """The tensors of the header. FileError if safetensors refuses it or a dtype or shape is not one of an adapter."""
    errors = Errors(FileError, str(path))
    entries = {}
    try:
        with safe_open(path, framework="np") as header:  # "pt" would map the whole file as writable memory
            for name in header.offset_keys():
                tensor = header.get_slice(name)
                dtype, shape = tensor.get_dtype(), tuple(tensor.get_shape())
                if dtype not in DTYPES:
                    errors.add(f"tensor {name[:80]!r}: dtype {dtype!r} is none of {', '.join(DTYPES)}")
                elif len(shape) > MAX_DIMS:
                    errors.add(f"tensor {name[:80]!r}: shape {str(shape)[:60]} has more than {MAX_DIMS} dimensions")
                else:
                    entries[name] = TensorEntry(DTYPES[dtype], shape)
        # safe_open has opened the path a second time: it must still be the same file.
        is_same_file = os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path} is damaged, cut off or padded: {str(error)[:400]}") from None
    if not is_same_file:
        raise FileError(f"{path} was replaced while it was read: load it again")
    errors.raise_if_any()
    return entries


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """A json object, strictly: no NaN, no key twice, no nesting that would exhaust the stack."""

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            raise ValueError("a key appears twice")
        return fields

    def refuse_constant(name: str) -> Any:
        raise ValueError(f"{name} is not json")

    try:
        fields = json.loads(text, object_pairs_hook=to_dict, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise FileError(f"{path} is not valid json: {reason}") from None
    if not isinstance(fields, dict):
        raise FileError(f"{path} must hold a json object, found {type(fields).__name__}")
    return fields


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[int, str]:
    """Writes a safetensors file; returns its size and sha256."""
    values = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        # safetensors refuses tensors that share a storage: a view of a larger one is copied.
        values[name] = value.clone() if value.untyped_storage().nbytes() != value.nbytes else value
    save_file(values, path, dict(metadata))
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return path.stat().st_size, digest.hexdigest()
