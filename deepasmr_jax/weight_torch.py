"""PyTorch's zip and older files, read without PyTorch and without running anything in them.

A pickle is data for a small interpreter of our own: `pickle.Unpickler` with a `find_class` stops foreign code, but not
seven bytes that take 4 GiB (a memo index) or nested tuples that end the process (their hash). Called by `weight_files`.
"""

import io
import os
import pickletools
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepasmr_jax.weight_tensors import (
    MAX_NAMES,
    MAX_NODES,
    NUMPY,
    Foreign,
    Refused,
    Store,
    Tensor,
    listed,
    short,
)

MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")  # first pickle of the older PyTorch files
_PROTOCOL = 1001
_MAX_STEPS = 2**22  # instructions of a pickle, about 30 a tensor
_MAX_OPTIONS = 2**16  # entries of all namespaces
_MAX_DEPTH = 64  # of nested dictionaries and lists
_BLOCK = 2**20

_STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
    "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
    "ComplexFloat": "complex64", "ComplexDouble": "complex128",
}  # fmt: skip


@dataclass(frozen=True)
class _Member:
    """A stored file of a zip archive: place, bytes, checksum (0: not written)."""

    start: int
    size: int
    crc: int


def archive_members(file) -> tuple[str, dict[str, _Member]]:
    """Folder name of a PyTorch archive and its members without that folder."""
    archive = zipfile.ZipFile(file)
    infos = sorted(archive.infolist(), key=lambda i: i.header_offset)
    names = [i.filename for i in infos]
    roots = [n.removesuffix("/data.pkl") for n in names if re.fullmatch(r"[^/]+/data\.pkl", n)]
    if len(roots) != 1:
        raise Foreign(
            f"is a zip archive without one data.pkl ({listed(names)}); unpack it, or give a weight file"
        )
    if len(set(names)) != len(names):
        raise ValueError("a member is there twice")
    if f"{roots[0]}/constants.pkl" in names:
        raise Foreign(
            "is a TorchScript program and no plain weight file; save its state dict with torch.save"
        )
    members, position = {}, 0
    for info in infos:
        if info.filename.startswith("/") or ".." in info.filename.split("/"):
            raise Refused(f"has a member {info.filename!r} outside its folder; do not use this file")
        if (
            info.compress_type != zipfile.ZIP_STORED
            or info.compress_size != info.file_size
            or info.flag_bits & 1
        ):
            raise Refused(f"has {info.filename} compressed or encrypted; zip it again without compression")
        file.seek(info.header_offset)
        head = file.read(30)
        name_length, extra_length = struct.unpack("<HH", head[26:30])
        start = info.header_offset + 30 + name_length + extra_length
        name = file.read(name_length)
        if head[:4] != b"PK\x03\x04" or name != info.orig_filename.encode() or info.header_offset < position:
            raise ValueError(f"the place of {info.filename}")
        position = start + info.file_size
        members[info.filename.removeprefix(f"{roots[0]}/")] = _Member(start, info.file_size, info.CRC)
    if position > archive.start_dir:
        raise ValueError("the last member has no end")
    return roots[0], members


def read_zip(path, check: bool):
    with open(path, "rb") as file:
        _, members = archive_members(file)

        def content(name: str, limit: int) -> bytes:
            member = members[name]
            if member.size > limit:
                raise Refused(f"has a {name} of {member.size} bytes; this reader takes {limit}")
            file.seek(member.start)
            data = file.read(member.size)
            if len(data) != member.size or member.crc not in (0, zlib.crc32(data)):
                raise ValueError(f"checksum of {name}")
            return data

        if "byteorder" in members and content("byteorder", 16) != b"little":
            raise Refused("was written with big-endian numbers; save it again on a usual machine")
        stores: dict[str, Store] = {}

        def storage(dtype: np.dtype, key: str, num: int) -> Store:
            member = members[f"data/{key}"]
            return stores.setdefault(key, Store(path, member.start, member.size, dtype))

        tree = _unpickle(io.BytesIO(content("data.pkl", MAX_NAMES)), storage)
        for name, member in members.items() if check else ():
            crc, left = 0, member.size
            file.seek(member.start)
            while left and (block := file.read(min(left, _BLOCK))):
                crc, left = zlib.crc32(block, crc), left - len(block)
            if member.crc not in (0, crc):
                raise ValueError(f"checksum of {name}")
    return tree


def read_legacy(path):
    """Pickles of magic number, version, machine, tree and storage keys; then each storage after its length."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        stream = io.BytesIO(file.read(MAX_NAMES))
        stores: dict[str, Store] = {}

        def storage(dtype: np.dtype, key: str, num: int) -> Store:
            if not 0 <= num <= size:
                raise ValueError(f"storage {short(key)} of {num} elements in a file of {size} bytes")
            return stores.setdefault(key, Store(path, -1, num * dtype.itemsize, dtype))

        if _unpickle(stream) != int.from_bytes(MAGIC, "little") or _unpickle(stream) != _PROTOCOL:
            raise ValueError("its version")
        if _unpickle(stream).get("little_endian") is not True:
            raise Refused("was written with big-endian numbers; save it again on a usual machine")
        tree = _unpickle(stream, storage)
        position = None
        for key in _unpickle(stream):
            position = stream.tell() if position is None else position
            store = stores[key]
            file.seek(position)
            num = int.from_bytes(file.read(8), "little")
            if (
                store.start != -1
                or num * store.dtype.itemsize != store.size
                or position + 8 + store.size > size
            ):
                raise ValueError(f"storage {short(key)} at byte {position}")
            store.start, position = position + 8, position + 8 + store.size
    if any(s.start == -1 for s in stores.values()):
        raise ValueError("a storage is missing")
    return tree


# ---------------------------------------------------------------- an interpreter of pickles that only builds data


class _Namespace(dict):
    """An argparse.Namespace: options, whose state is its entries."""


@dataclass(frozen=True)
class _Call:
    """Stands for a function or class of the file; ours is called instead."""

    make: Any


def _rebuild_tensor(store, offset, shape, strides, *_) -> Tensor:
    return Tensor(store, store.dtype, offset, shape, strides)


def _rebuild_tensor_v3(store, offset, shape, strides, _, __, dtype, ___=None) -> Tensor:
    return Tensor(store, dtype, offset, shape, strides)


def _first(of):
    """The first argument, which must be of this kind; nothing is copied."""

    def make(x, *_):
        if not isinstance(x, of):
            raise TypeError(f"{type(x).__name__} as an argument")
        return x

    return make


def _empty(made):
    def make(*arguments):
        if any(not isinstance(x, _Call | None) for x in arguments):  # a default factory at most
            raise Refused("has dictionaries as Python 2 wrote them; save it again with Python 3")
        return made()

    return make


def _numpy_dtype(code, *_) -> np.dtype:
    if not re.fullmatch(r"[biufc](1|2|4|8|16)", code):
        raise Refused(f"asks for the numpy dtype {short(ascii(code))}; save it again with plain numbers")
    return np.dtype(code)


def _numpy_scalar(dtype, data):
    if not isinstance(dtype, np.dtype) or len(data) != dtype.itemsize:
        raise ValueError("a numpy number")
    return np.frombuffer(data, dtype)[0].item()


def _encode(text, code) -> bytes:
    """How pickles of protocol 2 write bytes."""
    if code not in ("latin1", "latin-1") or len(text) > 256:  # many calls cannot fill the memory
        raise Refused("holds long byte strings; save its state dict alone")
    return text.encode("latin-1")


# what a file may ask for; anything else is refused when it is named, before it could be called
_ALLOWED = {
    "torch._utils._rebuild_tensor": _Call(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v2": _Call(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v3": _Call(_rebuild_tensor_v3),
    "torch._utils._rebuild_parameter": _Call(_first(Tensor)),
    "torch.Size": _Call(_first(tuple)),
    "torch.device": _Call(_first(str)),
    "torch.storage.UntypedStorage": NUMPY["uint8"],
    **{f"torch.{name}Storage": NUMPY[dtype] for name, dtype in _STORAGES.items()},
    **{f"torch.{name}": dtype for name, dtype in NUMPY.items()},
    "collections.OrderedDict": _Call(_empty(dict)),
    "collections.defaultdict": _Call(_empty(dict)),  # states of optimizers
    "argparse.Namespace": _Call(_empty(_Namespace)),  # options beside the weights of training checkpoints
    **{f"{m}.{name}": _Call(_empty(made)) for m in ("builtins", "__builtin__") for name, made in
       (("dict", dict), ("list", list), ("bytes", bytes))},
    **{f"{m}.{name}": _Call(_first(list)) for m in ("builtins", "__builtin__") for name in ("set", "frozenset")},
    "_codecs.encode": _Call(_encode),
    "numpy.dtype": _Call(_numpy_dtype),  # learning rates are often numpy numbers
    **{f"numpy.{m}.multiarray.scalar": _Call(_numpy_scalar) for m in ("core", "_core")},
}  # fmt: skip
_PUSHED = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE",
    "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES",
    "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


def _allowed(name: str):
    if name not in _ALLOWED:
        raise Refused(
            f"asks for {short(name)!r}, which is code and no data, and was not run; "
            "save its state dict alone, or use a safetensors file"
        )
    return _ALLOWED[name]


def _unpickle(stream, storage=None):
    """The value of the next pickle of a stream.

    Args:
        stream: binary file; left behind the end of the pickle.
        storage: (dtype, key, number of elements) -> Store for the persistent ids of tensors.

    Returns:
        dict, list, tuple, Tensor and plain values; not nested deeper than `_MAX_DEPTH`, without cycles.
    """
    stack, marks, memo = [], [], {}
    num_copied = 0

    def since_mark() -> list:
        mark = marks.pop()
        out = stack[mark:]
        del stack[mark:]
        return out

    def fill(pairs) -> None:
        target = stack[-1]
        for name, value in zip(pairs[::2], pairs[1::2], strict=True):
            # other keys have hashes that can be made slow, or recursive without end
            if not isinstance(name, str | bytes | float | int | None) or (
                isinstance(name, int) and abs(name) >= 2**63
            ):
                raise TypeError(f"{type(name).__name__} as a name")
            if not isinstance(target, dict) or name in target:
                raise ValueError(f"the name {short(name)} is there twice")
            target[name] = value

    def build(target, state) -> None:
        nonlocal num_copied
        if isinstance(target, _Namespace):
            num_copied += len(state)
            if num_copied > _MAX_OPTIONS:
                raise Refused(f"has more than {_MAX_OPTIONS} options; save its state dict alone")
            fill([x for pair in state.items() for x in pair])
        elif isinstance(target, np.dtype):
            if state[1] == ">":
                raise Refused("was written with big-endian numbers; save it again on a usual machine")
        elif not isinstance(
            target, dict
        ):  # an OrderedDict's attributes are the version notes of a state dict
            raise TypeError(f"a state for {type(target).__name__}")

    def persistent(identity) -> Store:
        if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
            raise Refused("holds Python objects beside tensors; save its state dict with torch.save")
        _, dtype, key, _, num, *view = identity
        if storage is None or not isinstance(dtype, np.dtype) or type(key) is not str or type(num) is not int:
            raise TypeError("a storage")
        if view not in ([], [None]):
            raise Refused("has views of storages, as early versions of PyTorch wrote; save it again")
        store = storage(dtype, key, num)
        if (store.dtype, store.size) != (dtype, num * dtype.itemsize):
            raise ValueError(f"storage {short(key)} of {num} {dtype} has {store.size} bytes of {store.dtype}")
        return store

    for step, (op, argument, _) in enumerate(pickletools.genops(stream)):
        name = op.name
        if step > _MAX_STEPS:
            raise Refused(f"has a pickle of more than {_MAX_STEPS} steps; save its state dict alone")
        if name in _PUSHED:
            if type(argument) is int and argument.bit_length() > 512:
                raise ValueError("a number of more than 512 bits")
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in ("EMPTY_LIST", "EMPTY_SET"):
            stack.append([])
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            num = int(name[-1])
            stack[-num:] = [tuple(stack[-num:])]
        elif name in ("LIST", "FROZENSET"):
            stack.append(since_mark())
        elif name == "DICT":
            pairs = since_mark()
            stack.append({})
            fill(pairs)
        elif name == "SETITEM":
            pair = [stack.pop(-2), stack.pop()]
            fill(pair)
        elif name == "SETITEMS":
            fill(since_mark())
        elif name == "APPEND":
            value = stack.pop()
            stack[-1].append(value)
        elif name in ("APPENDS", "ADDITEMS"):
            values = since_mark()
            stack[-1].extend(values)
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            since_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "GLOBAL":
            stack.append(_allowed(argument.replace(" ", ".", 1)))
        elif name == "STACK_GLOBAL":
            attribute = stack.pop()
            stack.append(_allowed(".".join((stack.pop(), attribute))))  # only of texts: others may be endless
        elif name in ("REDUCE", "NEWOBJ"):
            arguments = stack.pop()
            function = stack.pop()
            if not isinstance(function, _Call) or not isinstance(arguments, tuple):
                raise Refused(f"calls {type(function).__name__}, which is no function; do not use this file")
            stack.append(function.make(*arguments))
        elif name == "BUILD":
            state = stack.pop()
            build(stack[-1], state)
        elif name == "BINPERSID":
            stack.append(persistent(stack.pop()))
        elif name != "STOP":
            if name == "INST":  # a call of protocol 0: refused by the name of what it asks for
                _allowed(argument.replace(" ", ".", 1))
            raise Refused(
                f"uses the pickle instruction {name}, which weights do not need; save its state dict alone"
            )
    value = stack.pop()
    _check_tree(value)
    return value


def _check_tree(tree) -> None:
    """Refuses cycles, great depth, and lists of lists that share their parts to become endless."""
    waiting, seen = [(tree, 0)], 0
    while waiting:
        x, depth = waiting.pop()
        seen += 1
        if depth > _MAX_DEPTH or seen > MAX_NODES:
            raise Refused("holds endlessly nested lists or dictionaries; save its state dict alone")
        if isinstance(x, dict | list | tuple):
            waiting += [(y, depth + 1) for y in (x.values() if isinstance(x, dict) else x)]
        elif isinstance(x, _Call | Store):
            raise TypeError("a function or a bare storage as a value")
