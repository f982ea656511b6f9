"""Initialisers and nodes of an ONNX graph, read without its runtime. Called by `weight_files`.

Source: protocol-buffer wire format; field numbers of onnx.proto, IR version 10.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepasmr_jax.weight_tensors import (
    MAX_NODES,
    NUMPY,
    Refused,
    Store,
    Tensor,
    Tensors,
    mapped,
    short,
    unique,
    whole,
)

# number of the type -> (dtype, field that holds values which are not raw); onnx.proto, TensorProto
_ONNX = {
    1: ("float32", 4), 2: ("uint8", 5), 3: ("int8", 5), 4: ("uint16", 5), 5: ("int16", 5), 6: ("int32", 5),
    7: ("int64", 7), 9: ("bool", 5), 10: ("float16", 5), 11: ("float64", 10), 12: ("uint32", 11),
    13: ("uint64", 11), 16: ("bfloat16", 5),
}  # fmt: skip


class Node(NamedTuple):
    """One operation of a graph, e.g. Node("MatMul", "/blocks.0/attn/query/MatMul", ("x", "onnx::MatMul_2"), ("y",))."""

    op_type: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """The main graph of an ONNX file.

    Attributes:
        initializers: constant tensors by name, read when asked for as in `Tensors`.
        nodes: the operations in the order of the file.
    """

    initializers: Tensors
    nodes: list[Node]


def read_graph(path: Path) -> Graph:
    """Initialisers and nodes of a file that is known to be an ONNX graph; as `weight_files.read_onnx`."""
    tensors, nodes = [], []
    with mapped(path) as data:
        for number, wire, value in _fields(data, *find_graph(data)):
            if len(nodes) + len(tensors) > MAX_NODES:
                raise Refused(f"has more than {MAX_NODES} nodes; export the network alone")
            if number == 1:
                nodes.append(_onnx_node(data, _span(wire, value)))
            elif number == 5:
                tensors.append(_onnx_tensor(data, _span(wire, value), path))
            elif number == 15:
                raise Refused("has sparse initialisers, which are not read; export it again without")
    return Graph(Tensors(unique(tensors)), nodes)


def _varint(data, start: int, end: int) -> tuple[int, int]:
    """A variable-length number and the position behind it."""
    value = 0
    for i in range(start, min(end, start + 10)):
        value |= (data[i] & 127) << 7 * (i - start)
        if data[i] < 128:
            return value & (2**64 - 1), i + 1
    raise ValueError(f"a number without end at byte {start}")


def _fields(data, start: int, end: int) -> Iterator[tuple[int, int, Any]]:
    """(field, wire type, number or (start, end) of its bytes) of the message in data[start:end]."""
    while start < end:
        tag, start = _varint(data, start, end)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, start = _varint(data, start, end)
        elif wire in (1, 2, 5):
            length, start = _varint(data, start, end) if wire == 2 else (8 if wire == 1 else 4, start)
            value = (start, start + length)
            start += length
        else:
            raise ValueError(f"wire type {wire}")
        if start > end or not 0 < number < 2**29:
            raise ValueError(f"field {number} has no end")
        yield number, wire, value


def _span(wire: int, value) -> tuple[int, int]:
    if wire != 2:
        raise ValueError(f"wire type {wire} for bytes")
    return value


def _text(data, wire: int, value) -> str:
    start, end = _span(wire, value)
    return data[start:end].decode()


def find_graph(data) -> tuple[int, int]:
    """Where the graph of a model lies; the whole file must be made of complete fields."""
    graphs, has_opset = [], False
    for number, wire, value in _fields(data, 0, len(data)):
        if number == 7:
            graphs.append(_span(wire, value))
        has_opset |= number == 8  # behind the graph, and never absent: a file cut between the two is found
    if len(graphs) != 1 or not has_opset:
        raise ValueError(f"{len(graphs)} graphs and {'an' if has_opset else 'no'} operator set")
    return graphs[0]


def _onnx_node(data, span) -> Node:
    texts = {1: [], 2: [], 3: [""], 4: [""]}
    for number, wire, value in _fields(data, *span):
        if number in texts:
            texts[number].append(_text(data, wire, value))
    return Node(texts[4][-1], texts[3][-1], tuple(texts[1]), tuple(texts[2]))


def _onnx_tensor(data, span, path: Path) -> tuple[str, Any]:
    shape, name, code, is_external, raw, external = [], "", 0, False, None, {}
    typed: dict[int, list] = {}
    for number, wire, value in _fields(data, *span):
        if number == 1:
            shape += [value] if wire == 0 else _varints(data, *_span(wire, value)).tolist()
        elif number == 2:
            code = value
        elif number in (3, 6):
            raise Refused("has a tensor in segments or of text, which is not read; export it again")
        elif number in (4, 5, 7, 10, 11):
            typed.setdefault(number, []).append((wire, value))
            if len(typed[number]) > MAX_NODES:
                raise Refused(f"has {name!r} in single unpacked values; export it again with raw data")
        elif number == 8:
            name = _text(data, wire, value)
        elif number == 9:
            raw = _span(wire, value)
        elif number == 13:
            entry = {n: _text(data, w, v) for n, w, v in _fields(data, *_span(wire, value))}
            external[entry[1]] = entry.get(2, "")
        elif number == 14:
            is_external = value == 1
    if code not in _ONNX:
        raise Refused(f"has {name!r} in type {code} of ONNX, which is not read; export it in float32")
    dtype, field = NUMPY[_ONNX[code][0]], _ONNX[code][1]
    if min(shape, default=0) < 0 or max(shape, default=0) >= 2**40:
        raise ValueError(f"{name} has shape {short(shape)}")
    if is_external:
        return name, _external(path, name, external, shape, dtype)
    parts = typed.get(field, [])
    if raw is None and field in (4, 10) and len(parts) == 1 and parts[0][0] == 2:
        raw = parts[0][1]  # packed floating-point numbers lie in the file as raw ones do
    if raw is not None:
        return name, whole(Store(path, raw[0], raw[1] - raw[0], dtype), shape)
    return name, _typed(data, parts, field, dtype, shape)


def _external(path: Path, name: str, entry: dict[str, str], shape, dtype) -> Tensor:
    location = entry.get("location", "")
    parts = re.split(r"[/\\]", location)
    # the text decides, not where links lead: in a download cache both files are links to another folder
    if not location or "\0" in location or ":" in location or not parts[0] or ".." in parts:
        raise Refused(f"keeps {name!r} in {short(ascii(location))}, outside its folder; do not use this file")
    other = path.parent / location
    if not other.is_file():
        raise Refused(f"keeps {name!r} in {other}, which is missing; put that file beside it")
    size = math.prod(shape) * dtype.itemsize
    numbers = [entry.get("offset", "0"), entry.get("length", str(size))]
    if any(not re.fullmatch(r"[0-9]{1,18}", n) for n in numbers):
        raise ValueError(f"the place of {name} in {location}")
    start, length = map(int, numbers)
    if length != size or start + length > other.stat().st_size:
        raise Refused(
            f"needs bytes {start} to {start + size} of {other} for {name!r}, which has {other.stat().st_size} bytes "
            f"and {length} of them given; download both again"
        )
    return whole(Store(other, start, length, dtype), shape)


def _varints(data, start: int, end: int) -> np.ndarray:
    """Packed variable-length numbers as int64."""
    x = np.frombuffer(data[start:end], np.uint8)
    last = np.flatnonzero(x < 128)
    first = np.concatenate([[0], last[:-1] + 1]) if len(last) else last
    if len(x) and (not len(last) or last[-1] != len(x) - 1 or np.max(last - first) > 9):
        raise ValueError(f"a number without end at byte {start}")
    out = np.zeros(len(last), np.uint64)
    for k in range(10):
        here = first + k <= last
        out[here] |= (x[first[here] + k] & 127).astype(np.uint64) << np.uint64(7 * k)
    return out.view(np.int64)


def _typed(data, parts, field: int, dtype: np.dtype, shape) -> np.ndarray:
    """Values that are not raw: packed or one by one; 16-bit floats are the bits of an integer."""
    if field in (4, 10):
        raw = b"".join(data[slice(*value)] for _, value in parts)
        x = np.frombuffer(raw, "<f4" if field == 4 else "<f8")
    else:
        chunks = [
            np.array([v], np.uint64).view(np.int64) if w == 0 else _varints(data, *_span(w, v))
            for w, v in parts
        ]
        x = np.concatenate(chunks or [np.zeros(0, np.int64)])
    if dtype.name in ("float16", "bfloat16"):
        bits = x.astype(np.uint16)
        x, exact = bits.view(dtype), np.array_equal(bits, x)
    elif dtype == np.uint64:
        x, exact = x.view(np.uint64), True
    else:
        exact = np.array_equal(x.astype(dtype).astype(x.dtype), x, equal_nan=x.dtype.kind == "f")
        x = x.astype(dtype)
    if not exact or x.size != math.prod(shape):
        raise ValueError(f"{x.size} values for shape {short(shape)} of {dtype}")
    x = x.reshape(shape)
    x.flags.writeable = False
    return x
