"""Read node names and fp32 weights out of an ONNX file, without the onnx package.

An ONNX file is one protobuf message; of its grammar this reads the ten fields that an exported network's weights need
(ModelProto.graph, GraphProto.node and .initializer, NodeProto, TensorProto with raw fp32 data). Everything else is
skipped by length. Source: the protobuf wire format and onnx.proto3. It knows no model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FLOAT = 1  # TensorProto.DataType
Array = NDArray[np.float32]


@dataclass
class Node:
    name: str = ""
    op: str = ""
    inputs: list[str] = field(default_factory=list)


@dataclass
class Graph:
    nodes: list[Node] = field(default_factory=list)
    tensors: dict[str, Array] = field(default_factory=dict)


def read(path: Path) -> Graph:
    """The nodes and the fp32 initialisers of the file's graph; initialisers of other types are left out."""
    graph = Graph()
    for number, value in _fields(memoryview(path.read_bytes())):
        if number == 7:
            for inner, part in _fields(_bytes(value)):
                if inner == 1:
                    graph.nodes.append(_node(_bytes(part)))
                elif inner == 5:
                    _tensor(_bytes(part), graph.tensors)
    if not graph.nodes:
        raise ValueError(f"{path} holds no ONNX graph")
    return graph


def _node(data: memoryview) -> Node:
    node = Node()
    for number, value in _fields(data):
        if number == 1:
            node.inputs.append(_text(value))
        elif number == 3:
            node.name = _text(value)
        elif number == 4:
            node.op = _text(value)
    return node


def _tensor(data: memoryview, into: dict[str, Array]) -> None:
    dims: list[int] = []
    kind, name, raw = 0, "", memoryview(b"")
    for number, value in _fields(data):
        if number == 1:
            dims += [value] if isinstance(value, int) else list(_packed(value))
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8:
            name = _text(value)
        elif number == 9:
            raw = _bytes(value)
    if kind != FLOAT:
        return
    if len(raw) != 4 * prod(dims):
        raise ValueError(f"ONNX tensor {name!r} of shape {dims} has {len(raw)} bytes, expected {4 * prod(dims)}")
    into[name] = np.frombuffer(raw, dtype="<f4").reshape(dims).copy()


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field number and value of each field of one message: an int, or the bytes of a string, message or array."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            size, at = _varint(data, at)
        if size is None or at + size > len(data):
            raise ValueError(f"not a protobuf message: wire type {wire} at byte {at} of {len(data)}")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while at < len(data) and shift < 64:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError(f"not a protobuf message: unended number at byte {at} of {len(data)}")


def _packed(data: memoryview) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError(f"not an ONNX file: found the number {value} where bytes belong")
    return value


def _text(value: int | memoryview) -> str:
    return bytes(_bytes(value)).decode("utf-8")
