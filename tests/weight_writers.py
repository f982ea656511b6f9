"""Writes small weight files as PyTorch and ONNX exporters write them, with neither of them installed.

A tree is dictionaries, lists, tuples, plain values and NumPy arrays; views of one array share a storage.
`Call` and `Raw` put anything else into a pickle: what a reader must refuse.
"""

import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

STORAGES = {
    "float64": "Double", "float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "int64": "Long",
    "int32": "Int", "int16": "Short", "int8": "Char", "uint8": "Byte", "bool": "Bool",
}  # fmt: skip
MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")


@dataclass(frozen=True)
class Call:
    """`name(*arguments)` in a pickle, then its state if it is not None; name is "module attribute"."""

    name: str
    arguments: tuple = ()
    state: object = None


@dataclass(frozen=True)
class Raw:
    """Instructions of a pickle as they are; they must leave one value."""

    code: bytes


@dataclass(frozen=True)
class Persistent:
    """A persistent id."""

    identity: tuple


class Pickle:
    """One pickle of protocol 2, and the storages its tensors name."""

    def __init__(self, first_key: int = 0, is_legacy: bool = False):
        self.storages: list[np.ndarray] = []
        self.first_key, self.is_legacy = first_key, is_legacy

    def dumps(self, tree) -> bytes:
        return b"\x80\x02" + self.value(tree) + b"."

    def value(self, x) -> bytes:
        if x is None or isinstance(x, bool):
            return {None: b"N", True: b"\x88", False: b"\x89"}[x]
        if isinstance(x, int):
            if -(2**31) <= x < 2**31:
                return b"J" + struct.pack("<i", x)
            data = x.to_bytes(x.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(data)]) + data
        if isinstance(x, float):
            return b"G" + struct.pack(">d", x)
        if isinstance(x, str):
            return b"X" + struct.pack("<I", len(x.encode())) + x.encode()
        if isinstance(x, dict):
            pairs = b"".join(self.value(k) + self.value(v) for k, v in x.items())
            return b"}(" + pairs + b"u"
        if isinstance(x, list):
            return b"](" + b"".join(map(self.value, x)) + b"e"
        if isinstance(x, tuple):
            return b"(" + b"".join(map(self.value, x)) + b"t"
        if isinstance(x, Raw):
            return x.code
        if isinstance(x, Persistent):
            return self.value(x.identity) + b"Q"
        if isinstance(x, Call):
            module, name = x.name.split(" ")
            made = f"c{module}\n{name}\n".encode() + self.value(x.arguments) + b"R"
            return made if x.state is None else made + self.value(x.state) + b"b"
        if isinstance(x, np.ndarray):
            return self.value(self.tensor(x))
        raise TypeError(type(x))

    def tensor(self, x: np.ndarray) -> Call:
        """The call that PyTorch writes for a tensor."""
        root = x
        while isinstance(root.base, np.ndarray):
            root = root.base
        assert root.flags.c_contiguous
        same = [i for i, s in enumerate(self.storages) if s is root]
        if not same:
            self.storages.append(root)
        key = str(self.first_key + (same[0] if same else len(self.storages) - 1))
        size = x.dtype.itemsize
        offset = (x.__array_interface__["data"][0] - root.__array_interface__["data"][0]) // size
        storage = Raw(f"ctorch\n{STORAGES[x.dtype.name]}Storage\n".encode())
        identity = ("storage", storage, key, "cpu", root.size) + ((None,) if self.is_legacy else ())
        strides = tuple(s // size for s in x.strides)
        hooks = Call("collections OrderedDict")
        return Call(
            "torch._utils _rebuild_tensor_v2",
            (Persistent(identity), offset, tuple(x.shape), strides, False, hooks),
        )


def write_zip(path, members: list[tuple[str, bytes]], root: str = "archive", compression=zipfile.ZIP_STORED):
    """A zip archive whose members begin at multiples of 64 bytes, as PyTorch's do."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            info = zipfile.ZipInfo(f"{root}/{name}")
            info.compress_type = compression
            place = archive.fp.tell() + 30 + len(info.filename) + 4
            padding = -place % 64
            info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
            archive.writestr(info, data)


def write_torch_zip(path, tree, byteorder: str = "little", extra: tuple[tuple[str, bytes], ...] = ()) -> None:
    """A file as torch.save writes it; `extra` are more members.

    `tree` may be the bytes of a whole pickle.
    """
    pickle = Pickle()
    data = tree if isinstance(tree, bytes) else pickle.dumps(tree)
    storages = [(f"data/{i}", x.tobytes()) for i, x in enumerate(pickle.storages)]
    ends = [("version", b"3\n"), (".data/serialization_id", b"0" * 40)]
    write_zip(path, [("data.pkl", data), ("byteorder", byteorder.encode()), *storages, *ends, *extra])


def write_torch_legacy(path, tree, little_endian: bool = True) -> None:
    """A file as torch.save wrote it before version 1.6: five pickles, then each storage after its length."""
    pickle = Pickle(first_key=94_000_000_000_000, is_legacy=True)
    data = tree if isinstance(tree, bytes) else pickle.dumps(tree)
    keys = [str(pickle.first_key + i) for i in range(len(pickle.storages))]
    sizes = {"short": 2, "int": 4, "long": 4}
    machine = {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": sizes}
    head = [MAGIC, Pickle().dumps(1001), Pickle().dumps(machine), data, Pickle().dumps(keys)]
    bodies = [struct.pack("<q", x.size) + x.tobytes() for x in pickle.storages]
    Path(path).write_bytes(b"".join(head + bodies))


# ---------------------------------------------------------------- ONNX

ONNX_TYPES = {
    "float32": (1, 4), "uint8": (2, 5), "int8": (3, 5), "int32": (6, 5), "int64": (7, 7), "bool": (9, 5),
    "float16": (10, 5), "float64": (11, 10), "uint32": (12, 11), "uint64": (13, 11), "bfloat16": (16, 5),
}  # fmt: skip


def varint(value: int) -> bytes:
    """A number of the protocol-buffer wire format; a negative one as its 64-bit complement."""
    value &= 2**64 - 1
    out = []
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value) -> bytes:
    """One field: a number, text, or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def onnx_tensor(name: str, x: np.ndarray, style: str = "raw", place: dict | None = None) -> bytes:
    """A TensorProto. Styles: "raw", "packed", "single" (one field a value), "external" at `place`."""
    code, number = ONNX_TYPES[x.dtype.name]
    x = np.ascontiguousarray(x).reshape(x.shape)
    out = b"".join(field(1, n) for n in x.shape) if style == "single" else b""
    if style != "single" and x.ndim:
        out = field(1, b"".join(map(varint, x.shape)))
    out += field(2, code)
    if style in ("packed", "single"):
        if number in (4, 10):
            wire = varint(number << 3 | (5 if number == 4 else 1))
            each = [v.tobytes() for v in x.ravel()]
        else:
            wire = varint(number << 3)
            is_half = x.dtype in (np.float16, ml_dtypes.bfloat16)
            each = [varint(int(v)) for v in (x.view(np.uint16) if is_half else x).ravel()]
        out += field(number, b"".join(each)) if style == "packed" else b"".join(wire + v for v in each)
    out += field(8, name)
    if style == "raw":
        out += field(9, x.tobytes())
    if style == "external":
        out += b"".join(field(13, field(1, k) + field(2, str(v))) for k, v in place.items()) + field(14, 1)
    return out


def write_onnx(path, initializers: dict, nodes, external: str | None = None, style: str = "raw") -> None:
    """An ONNX model of IR version 8, operator set 17.

    Args:
        path: the file.
        initializers: arrays by name.
        nodes: (op_type, name, inputs, outputs) each.
        external: name of a file beside `path` that takes the data.
        style: how values are written, see `onnx_tensor`.
    """
    graph, data = b"", b""
    for op_type, name, inputs, outputs in nodes:
        texts = [field(1, x) for x in inputs] + [field(2, x) for x in outputs]
        graph += field(1, b"".join(texts) + field(3, name) + field(4, op_type))
    graph += field(2, "main_graph")
    for name, x in initializers.items():
        if external is None:
            graph += field(5, onnx_tensor(name, x, style))
        else:
            place = {"location": external, "offset": len(data), "length": x.nbytes}
            graph += field(5, onnx_tensor(name, x, "external", place))
            data += x.tobytes() + bytes(-x.nbytes % 4096)
    if external is not None:
        (Path(path).parent / external).write_bytes(data)
    write_model(path, graph)


def write_model(path, graph: bytes) -> None:
    """The model around the bytes of a GraphProto."""
    opset = field(8, field(2, 17))
    Path(path).write_bytes(field(1, 8) + field(2, "tests") + field(7, graph) + opset)
