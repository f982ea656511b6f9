"""Reads public weight files without their libraries and without running anything in them.

safetensors, PyTorch's zip and older files (`.pt`, `.pth`, `.bin`, `g_00000000`) and ONNX graphs, told apart by content.
Arrays are memory-mapped (read, where they lie unaligned) one at a time when they are asked for, so that a file of 2 GB
needs the memory of its largest tensor. A pickle is data for a small interpreter of our own: `pickle.Unpickler` with a
`find_class` stops foreign code, but not seven bytes that take 4 GiB (a memo index) or nested tuples that end the
process (their hash). Files are not trusted: whatever is wrong with one is a `ValueError` of one sentence that names it.
"""

import codecs
import contextlib
import hashlib
import io
import json
import math
import mmap
import os
import pickletools
import re
import struct
import weakref
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")  # first pickle of the older PyTorch files
_PROTOCOL = 1001
_MAX_NAMES = 2**24  # bytes of names and shapes, about 150 a tensor
_MAX_STEPS = 2**22  # instructions of a pickle, about 30 a tensor
_MAX_OPTIONS = 2**16  # entries of all namespaces
_MAX_DEPTH, _MAX_NODES = 64, 2**18  # of nested dictionaries and lists; nodes of a graph
_MAX_ELEMENTS = 2**40
_MAX_REPEATED = 2**26  # bytes of a tensor that shows its storage more than once (expanded)
_BLOCK = 2**20

_NUMPY = {
    "float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2,
    "int64": np.int64, "int32": np.int32, "int16": np.int16, "int8": np.int8,
    "uint64": np.uint64, "uint32": np.uint32, "uint16": np.uint16, "uint8": np.uint8, "bool": np.bool_,
    "complex64": np.complex64, "complex128": np.complex128,
}  # fmt: skip
_NUMPY = {name: np.dtype(x) for name, x in _NUMPY.items()}
_SAFETENSORS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64",
    "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
}  # fmt: skip
SAFETENSORS_DTYPES = {code: _NUMPY[name] for code, name in _SAFETENSORS.items()}  # of a file -> numpy's
_STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
    "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
    "ComplexFloat": "complex64", "ComplexDouble": "complex128",
}  # fmt: skip
# number of the type -> (dtype, field that holds values which are not raw); onnx.proto, TensorProto
_ONNX = {
    1: ("float32", 4), 2: ("uint8", 5), 3: ("int8", 5), 4: ("uint16", 5), 5: ("int16", 5), 6: ("int32", 5),
    7: ("int64", 7), 9: ("bool", 5), 10: ("float16", 5), 11: ("float64", 10), 12: ("uint32", 11),
    13: ("uint64", 11), 16: ("bfloat16", 5),
}  # fmt: skip


class _Refused(Exception):
    """A sentence without its subject, the file: what is wrong with it and what to do."""


@contextlib.contextmanager
def _reading(path):
    """Turns whatever goes wrong inside into a ValueError that names the file."""
    try:
        yield
    except _Refused as error:
        raise ValueError(f"{path} {' '.join(str(error).split())}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be opened: {error.strerror or error}; check the path") from error
    except MemoryError:
        raise
    # struct, zipfile, json and a bent pickle raise many kinds; the cause stays in the traceback
    except Exception as error:
        detail = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} is cut off or damaged ({detail}); copy or download it again") from error


# ---------------------------------------------------------------- arrays that are read when asked for


class _Store:
    """Bytes of a file that one or more tensors share, in memory while an array looks at them."""

    def __init__(self, path, start: int, size: int, dtype: np.dtype):
        self.path, self.start, self.size, self.dtype = path, start, size, dtype
        self._found = None

    def bytes(self) -> tuple[Any, int]:
        """A buffer and the place of the first byte in it: the mapped file, or a copy if it lies unaligned there."""
        is_aligned = self.start % self.dtype.alignment == 0
        skip = self.start % mmap.ALLOCATIONGRANULARITY if is_aligned else 0
        found = self._found and self._found()
        if found is None:
            with open(self.path, "rb") as file:
                if is_aligned:
                    size, start = skip + self.size, self.start - skip
                    found = mmap.mmap(file.fileno(), size, offset=start, access=mmap.ACCESS_READ)
                else:
                    if self.size > memory_bytes():  # a mapped one takes no memory before it is looked at
                        raise _Refused(
                            f"has {self.size / 2**30:,.0f} GiB in one tensor, more than memory; use a larger machine"
                        )
                    found = np.fromfile(file, np.uint8, self.size, offset=self.start)
                    found.flags.writeable = False
            self._found = weakref.ref(found)  # let go with its last array
        return found, skip


@dataclass(frozen=True)
class _Tensor:
    """A view of a store: offset and strides count elements of `dtype`."""

    store: _Store
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self):
        if not isinstance(self.store, _Store) or not isinstance(self.dtype, np.dtype):
            raise TypeError("a tensor without storage or type")
        if type(self.shape) is not tuple or type(self.strides) is not tuple or len(self.shape) > 32:
            raise TypeError("the shape of a tensor is no tuple of at most 32")
        numbers = (self.offset, *self.shape, *self.strides)
        if any(type(n) is not int for n in numbers) or len(self.shape) != len(self.strides):
            raise TypeError("the shape of a tensor is not made of whole numbers")
        count, num = math.prod(self.shape), self.store.size // self.dtype.itemsize
        if min(numbers) < 0 or math.prod(max(n, 1) for n in self.shape) > _MAX_ELEMENTS:
            raise ValueError(f"a tensor of shape {_short(self.shape)} and strides {_short(self.strides)}")
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        if count and last >= num:
            raise ValueError(f"a tensor reaches element {last} of a storage of {num}")
        if count > num and count * self.dtype.itemsize > _MAX_REPEATED:
            raise ValueError(f"a tensor of {count} elements repeats a storage of {num}")

    def read(self) -> np.ndarray:
        """The array: a read-only view of its store."""
        if not math.prod(self.shape):
            return np.broadcast_to(np.zeros((), self.dtype), self.shape)
        with _reading(self.store.path):
            data, start = self.store.bytes()
            size = self.dtype.itemsize
            # the stride of an axis of one element may be any number, also one that numpy cannot hold
            steps = [s * size if n > 1 else 0 for n, s in zip(self.shape, self.strides, strict=True)]
            x = np.ndarray(self.shape, self.dtype, data, start + self.offset * size, steps)
            if not x.flags.aligned:  # an untyped storage
                x = x.copy()
                x.flags.writeable = False
            return x


def _whole(store: _Store, shape) -> _Tensor:
    """A tensor in row-major order that fills its store."""
    if len(shape) > 32:
        raise ValueError(f"a shape of {len(shape)} axes")
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    x = _Tensor(store, store.dtype, 0, tuple(shape), strides)
    if math.prod(shape) * store.dtype.itemsize != store.size:
        raise ValueError(f"{store.size} bytes for shape {_short(shape)} of {store.dtype}")
    return x


class Tensors(Mapping):
    """Tensors and other entries of a file by name; an array is mapped when it is asked for, and not kept.

    Values are read-only arrays, `Tensors` for inner dictionaries, lists, or plain Python values. Names that share
    a storage give arrays that share memory. Iterating over `.items()` holds one or two arrays at a time.
    """

    def __init__(self, entries: dict):
        self._entries = entries

    def __getitem__(self, name):
        return _visible(self._entries[name])

    def __contains__(self, name) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Tensors({len(self)} entries: {_listed(self)})"


def _visible(x):
    if isinstance(x, _Tensor):
        return x.read()
    if isinstance(x, dict):
        return Tensors(x)
    if isinstance(x, list | tuple):
        return [_visible(y) for y in x]
    return x


def _listed(names) -> str:
    names = list(names)
    return ", ".join(map(_short, names[:8])) + (", ..." if len(names) > 8 else "")


def _short(x) -> str:
    text = str(x)
    return text if len(text) <= 80 else text[:80] + "..."


# ---------------------------------------------------------------- what a file is


def kind(path) -> str:
    """What a weight file is, by its content: "safetensors", "torch zip", "torch legacy" or "onnx".

    Raises:
        ValueError: if it is none of these (a folder, a web page, a git-lfs pointer, text, another archive ...) or is
            cut off so that its table of contents is missing.
    """
    with _reading(path):
        return _kind(Path(path))


def _kind(path: Path) -> str:
    if path.is_dir():
        raise _Refused("is a folder; name the weight file in it")
    if not path.is_file():  # reading a pipe would wait without end
        raise _Refused("is missing or no file; check the path, or download it")
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(512)
    if size < 10:
        raise _Refused(f"has only {size} bytes and is no weight file; download it again")
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length <= _MAX_NAMES:  # before the others: the length may look like one of them
        if length > size - 8:
            raise ValueError(f"{size} bytes, but its header needs {length}")
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        with open(path, "rb") as file:
            _members(file)
        return "torch zip"
    if head[:1] == b"\x80" and _MAGIC in head[:32]:
        return "torch legacy"
    _refuse_others(head)
    if head[:1] == b"\x08" and head[1] < 64:  # an ONNX file begins with its format version, field 1
        with _mapped(path) as data:
            _graph(data)
        return "onnx"
    if head[8:9] == b"{":
        raise _Refused(f"names a header of {length:,} bytes, no weights need so much; download it again")
    raise _Refused(f"begins with {head[:8].hex(' ')}, which is no known weight format; download it again")


_OTHERS = {
    b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"7z\xbc\xaf": "7-Zip", b"Rar!": "RAR",
    b"PK\x05\x06": "empty zip",
}  # fmt: skip


def _refuse_others(head: bytes) -> None:
    """Names the usual wrong files."""
    for start, name in _OTHERS.items():
        if head.startswith(start):
            raise _Refused(f"is a {name} archive; unpack it and give the weight file in it")
    if head[257:262] == b"ustar":
        raise _Refused("is a tar archive; unpack it, or save a file of PyTorch before 0.1.10 again")
    if head.startswith((b"\x93NUMPY", b"\x89HDF")):
        raise _Refused("is a NumPy or HDF5 file; this reader takes safetensors, PyTorch and ONNX files")
    if head[:1] == b"\x80" and head[1] in range(2, 6):
        raise _Refused("is a Python pickle without PyTorch's mark; save its state dict with torch.save")
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith(b"version https://git-lfs"):
        raise _Refused("is a git-lfs pointer and not the file; run `git lfs pull` in its folder")
    if text[:15].lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise _Refused("is a web page; download the weight file itself, not the page about it")
    with contextlib.suppress(UnicodeDecodeError):
        shown = codecs.getincrementaldecoder("utf-8")().decode(text)  # the last letter may be cut
        if not re.search(r"[\x00-\x08\x0e-\x1f\x7f]", shown):
            raise _Refused(f"is text that begins with {ascii(shown[:24])}; give the weight file itself")


def check_size(path) -> None:
    """Refuses a file that this machine could not hold in memory, before anything of it is read.

    Raises:
        ValueError: if it is larger than the memory, or no file.
    """
    with _reading(path):
        if not os.path.isfile(path):  # reading a pipe would wait without end
            raise _Refused("is missing or no file; check the path, or download it")
        size, memory = os.stat(path).st_size, memory_bytes()
        if size > memory:
            raise _Refused(
                f"has {size / 2**30:,.0f} GiB, this machine {memory / 2**30:,.0f} GiB of memory; "
                "use a larger machine, or download it again if it should be smaller"
            )


def memory_bytes() -> float:
    """The memory of this machine; infinite where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return math.inf


def sha256(path) -> str:
    """Hexadecimal SHA-256 of a file, read in blocks.

    Raises:
        ValueError: if it cannot be read.
    """
    with _reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _mapped(path) -> Iterator[mmap.mmap]:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


# ---------------------------------------------------------------- reading


def read(path, key: tuple[str, ...] = (), check: bool = True) -> Tensors:
    """The tensors of a safetensors or PyTorch file by name.

    Args:
        path: the file; its name does not matter.
        key: names of inner dictionaries to go down, e.g. ("generator",) of a HiFi-GAN checkpoint.
        check: compare the data with the checksums of a zip file, one pass; the other formats have none.

    Returns:
        A lazy mapping {name: read-only array}; entries that are no tensors are left out.

    Raises:
        ValueError: if the file is damaged, holds more than data, or has no tensors at `key`.
    """
    with _reading(path):
        found = _read(path, check)
        for i, name in enumerate(key):
            if not isinstance(found, dict) or name not in found:
                raise _Refused(f"has no {'.'.join(key[: i + 1])}; {_contents(found)}")
            found = found[name]
        where = f" at {'.'.join(key)}" if key else ""
        if not isinstance(found, dict):
            raise _Refused(f"holds {type(found).__name__.strip('_')}{where} and no dictionary of tensors")
        tensors = {name: x for name, x in found.items() if isinstance(x, _Tensor)}
        inner = [name for name, x in found.items() if isinstance(x, dict) and _has_tensors(x)]
        if inner:
            raise _Refused(
                f"has inner dictionaries of tensors{where} ({_listed(inner)}); choose one with `key`"
            )
        if found and not tensors:
            raise _Refused(f"has no tensors{where}; {_contents(found)}")
        if any(not isinstance(name, str) for name in tensors):
            raise _Refused(f"names tensors{where} by other values than text; it is no state dict")
        return Tensors(tensors)


def read_tree(path, check: bool = True) -> Any:
    """Everything in a safetensors or PyTorch file, as nested as it was saved.

    Returns:
        A `Tensors` mapping whose values are arrays, `Tensors`, lists and plain values; or one of these, if the file
        holds no dictionary. Tuples and sets are lists, dtypes numpy dtypes, option namespaces mappings.

    Raises:
        ValueError: if the file is damaged or holds more than data.
    """
    with _reading(path):
        tree = _read(path, check)
    return _visible(tree)


def _read(path, check: bool):
    what = _kind(Path(path))
    if what == "onnx":
        raise _Refused("is an ONNX graph, whose tensors have no fixed names; use read_onnx")
    if what == "safetensors":
        return _read_safetensors(path)
    return _read_zip(path, check) if what == "torch zip" else _read_legacy(path)


def _contents(x) -> str:
    return f"it has {_listed(x)}" if isinstance(x, dict) and x else "there is no dictionary"


def _has_tensors(tree) -> bool:
    waiting = [tree]
    while waiting:
        x = waiting.pop()
        if isinstance(x, _Tensor):
            return True
        waiting += list(x.values()) if isinstance(x, dict) else x if isinstance(x, list | tuple) else []
    return False


def _unique(pairs) -> dict:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name is there twice")
    return out


def _read_safetensors(path) -> dict[str, _Tensor]:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length).decode(), object_pairs_hook=_unique)
    header.pop("__metadata__", None)
    tensors, ranges = {}, []
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise _Refused(
                f"has {name} in {_short(entry['dtype'])}, which is not read; convert it to float32"
            )
        ranges.append((start, end))
        store = _Store(path, 8 + length + start, end - start, SAFETENSORS_DTYPES[entry["dtype"]])
        tensors[name] = _whole(store, entry["shape"])
    position = 0
    for start, end in sorted(ranges):
        if start != position or type(start) is not int or type(end) is not int:
            raise ValueError(f"its tensors leave a gap or overlap at byte {position}")
        position = end
    if 8 + length + position != size:
        raise ValueError(f"{size} bytes instead of {8 + length + position}")
    return tensors


# ---------------------------------------------------------------- PyTorch


@dataclass(frozen=True)
class _Member:
    """A stored file of a zip archive: place, bytes, checksum (0: not written)."""

    start: int
    size: int
    crc: int


def _members(file) -> tuple[str, dict[str, _Member]]:
    """Folder name of a PyTorch archive and its members without that folder."""
    archive = zipfile.ZipFile(file)
    infos = sorted(archive.infolist(), key=lambda i: i.header_offset)
    names = [i.filename for i in infos]
    roots = [n.removesuffix("/data.pkl") for n in names if re.fullmatch(r"[^/]+/data\.pkl", n)]
    if len(roots) != 1:
        raise _Refused(
            f"is a zip archive without one data.pkl ({_listed(names)}); unpack it, or give a weight file"
        )
    if len(set(names)) != len(names):
        raise ValueError("a member is there twice")
    if f"{roots[0]}/constants.pkl" in names:
        raise _Refused(
            "is a TorchScript program and no plain weight file; save its state dict with torch.save"
        )
    members, position = {}, 0
    for info in infos:
        if info.filename.startswith("/") or ".." in info.filename.split("/"):
            raise _Refused(f"has a member {info.filename!r} outside its folder; do not use this file")
        if (
            info.compress_type != zipfile.ZIP_STORED
            or info.compress_size != info.file_size
            or info.flag_bits & 1
        ):
            raise _Refused(f"has {info.filename} compressed or encrypted; zip it again without compression")
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


def _read_zip(path, check: bool):
    with open(path, "rb") as file:
        _, members = _members(file)

        def content(name: str, limit: int) -> bytes:
            member = members[name]
            if member.size > limit:
                raise _Refused(f"has a {name} of {member.size} bytes; this reader takes {limit}")
            file.seek(member.start)
            data = file.read(member.size)
            if len(data) != member.size or member.crc not in (0, zlib.crc32(data)):
                raise ValueError(f"checksum of {name}")
            return data

        if "byteorder" in members and content("byteorder", 16) != b"little":
            raise _Refused("was written with big-endian numbers; save it again on a usual machine")
        stores: dict[str, _Store] = {}

        def storage(dtype: np.dtype, key: str, num: int) -> _Store:
            member = members[f"data/{key}"]
            return stores.setdefault(key, _Store(path, member.start, member.size, dtype))

        tree = _unpickle(io.BytesIO(content("data.pkl", _MAX_NAMES)), storage)
        for name, member in members.items() if check else ():
            crc, left = 0, member.size
            file.seek(member.start)
            while left and (block := file.read(min(left, _BLOCK))):
                crc, left = zlib.crc32(block, crc), left - len(block)
            if member.crc not in (0, crc):
                raise ValueError(f"checksum of {name}")
    return tree


def _read_legacy(path):
    """Pickles of magic number, version, machine, tree and storage keys; then each storage after its length."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        stream = io.BytesIO(file.read(_MAX_NAMES))
        stores: dict[str, _Store] = {}

        def storage(dtype: np.dtype, key: str, num: int) -> _Store:
            if not 0 <= num <= size:
                raise ValueError(f"storage {_short(key)} of {num} elements in a file of {size} bytes")
            return stores.setdefault(key, _Store(path, -1, num * dtype.itemsize, dtype))

        if _unpickle(stream) != int.from_bytes(_MAGIC, "little") or _unpickle(stream) != _PROTOCOL:
            raise ValueError("its version")
        if _unpickle(stream).get("little_endian") is not True:
            raise _Refused("was written with big-endian numbers; save it again on a usual machine")
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
                raise ValueError(f"storage {_short(key)} at byte {position}")
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


def _rebuild_tensor(store, offset, shape, strides, *_) -> _Tensor:
    return _Tensor(store, store.dtype, offset, shape, strides)


def _rebuild_tensor_v3(store, offset, shape, strides, _, __, dtype, ___=None) -> _Tensor:
    return _Tensor(store, dtype, offset, shape, strides)


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
            raise _Refused("has dictionaries as Python 2 wrote them; save it again with Python 3")
        return made()

    return make


def _numpy_dtype(code, *_) -> np.dtype:
    if not re.fullmatch(r"[biufc](1|2|4|8|16)", code):
        raise _Refused(f"asks for the numpy dtype {_short(ascii(code))}; save it again with plain numbers")
    return np.dtype(code)


def _numpy_scalar(dtype, data):
    if not isinstance(dtype, np.dtype) or len(data) != dtype.itemsize:
        raise ValueError("a numpy number")
    return np.frombuffer(data, dtype)[0].item()


def _encode(text, code) -> bytes:
    """How pickles of protocol 2 write bytes."""
    if code not in ("latin1", "latin-1") or len(text) > 256:  # many calls cannot fill the memory
        raise _Refused("holds long byte strings; save its state dict alone")
    return text.encode("latin-1")


# what a file may ask for; anything else is refused when it is named, before it could be called
_ALLOWED = {
    "torch._utils._rebuild_tensor": _Call(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v2": _Call(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v3": _Call(_rebuild_tensor_v3),
    "torch._utils._rebuild_parameter": _Call(_first(_Tensor)),
    "torch.Size": _Call(_first(tuple)),
    "torch.device": _Call(_first(str)),
    "torch.storage.UntypedStorage": _NUMPY["uint8"],
    **{f"torch.{name}Storage": _NUMPY[dtype] for name, dtype in _STORAGES.items()},
    **{f"torch.{name}": dtype for name, dtype in _NUMPY.items()},
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
        raise _Refused(
            f"asks for {_short(name)!r}, which is code and no data, and was not run; "
            "save its state dict alone, or use a safetensors file"
        )
    return _ALLOWED[name]


def _unpickle(stream, storage=None):
    """The value of the next pickle of a stream.

    Args:
        stream: binary file; left behind the end of the pickle.
        storage: (dtype, key, number of elements) -> _Store for the persistent ids of tensors.

    Returns:
        dict, list, tuple, _Tensor and plain values; not nested deeper than `_MAX_DEPTH`, without cycles.
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
                raise ValueError(f"the name {_short(name)} is there twice")
            target[name] = value

    def build(target, state) -> None:
        nonlocal num_copied
        if isinstance(target, _Namespace):
            num_copied += len(state)
            if num_copied > _MAX_OPTIONS:
                raise _Refused(f"has more than {_MAX_OPTIONS} options; save its state dict alone")
            fill([x for pair in state.items() for x in pair])
        elif isinstance(target, np.dtype):
            if state[1] == ">":
                raise _Refused("was written with big-endian numbers; save it again on a usual machine")
        elif not isinstance(
            target, dict
        ):  # an OrderedDict's attributes are the version notes of a state dict
            raise TypeError(f"a state for {type(target).__name__}")

    def persistent(identity) -> _Store:
        if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
            raise _Refused("holds Python objects beside tensors; save its state dict with torch.save")
        _, dtype, key, _, num, *view = identity
        if storage is None or not isinstance(dtype, np.dtype) or type(key) is not str or type(num) is not int:
            raise TypeError("a storage")
        if view not in ([], [None]):
            raise _Refused("has views of storages, as early versions of PyTorch wrote; save it again")
        store = storage(dtype, key, num)
        if (store.dtype, store.size) != (dtype, num * dtype.itemsize):
            raise ValueError(
                f"storage {_short(key)} of {num} {dtype} has {store.size} bytes of {store.dtype}"
            )
        return store

    for step, (op, argument, _) in enumerate(pickletools.genops(stream)):
        name = op.name
        if step > _MAX_STEPS:
            raise _Refused(f"has a pickle of more than {_MAX_STEPS} steps; save its state dict alone")
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
                raise _Refused(f"calls {type(function).__name__}, which is no function; do not use this file")
            stack.append(function.make(*arguments))
        elif name == "BUILD":
            state = stack.pop()
            build(stack[-1], state)
        elif name == "BINPERSID":
            stack.append(persistent(stack.pop()))
        elif name != "STOP":
            raise _Refused(
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
        if depth > _MAX_DEPTH or seen > _MAX_NODES:
            raise _Refused("holds endlessly nested lists or dictionaries; save its state dict alone")
        if isinstance(x, dict | list | tuple):
            waiting += [(y, depth + 1) for y in (x.values() if isinstance(x, dict) else x)]
        elif isinstance(x, _Call | _Store):
            raise TypeError("a function or a bare storage as a value")


# ---------------------------------------------------------------- ONNX


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


def read_onnx(path) -> Graph:
    """Initialisers and nodes of an ONNX file; tensors in files beside it are found by their relative path.

    Attributes of nodes, sub-graphs and the types of values are not read.

    Raises:
        ValueError: if the file is none, is damaged, has a tensor of a type without numbers, or its data is missing.

    Source: protocol-buffer wire format; field numbers of onnx.proto, IR version 10.
    """
    path = Path(path)
    with _reading(path):
        what = _kind(path)
        if what != "onnx":
            raise _Refused(f"is a {what} file and no ONNX graph; use read")
        tensors, nodes = [], []
        with _mapped(path) as data:
            for number, wire, value in _fields(data, *_graph(data)):
                if len(nodes) + len(tensors) > _MAX_NODES:
                    raise _Refused(f"has more than {_MAX_NODES} nodes; export the network alone")
                if number == 1:
                    nodes.append(_onnx_node(data, _span(wire, value)))
                elif number == 5:
                    tensors.append(_onnx_tensor(data, _span(wire, value), path))
                elif number == 15:
                    raise _Refused("has sparse initialisers, which are not read; export it again without")
        return Graph(Tensors(_unique(tensors)), nodes)


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


def _graph(data) -> tuple[int, int]:
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
            raise _Refused("has a tensor in segments or of text, which is not read; export it again")
        elif number in (4, 5, 7, 10, 11):
            typed.setdefault(number, []).append((wire, value))
            if len(typed[number]) > _MAX_NODES:
                raise _Refused(f"has {name!r} in single unpacked values; export it again with raw data")
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
        raise _Refused(f"has {name!r} in type {code} of ONNX, which is not read; export it in float32")
    dtype, field = _NUMPY[_ONNX[code][0]], _ONNX[code][1]
    if min(shape, default=0) < 0 or max(shape, default=0) >= 2**40:
        raise ValueError(f"{name} has shape {_short(shape)}")
    if is_external:
        return name, _external(path, name, external, shape, dtype)
    parts = typed.get(field, [])
    if raw is None and field in (4, 10) and len(parts) == 1 and parts[0][0] == 2:
        raw = parts[0][1]  # packed floating-point numbers lie in the file as raw ones do
    if raw is not None:
        return name, _whole(_Store(path, raw[0], raw[1] - raw[0], dtype), shape)
    return name, _typed(data, parts, field, dtype, shape)


def _external(path: Path, name: str, entry: dict[str, str], shape, dtype) -> _Tensor:
    location = entry.get("location", "")
    parts = re.split(r"[/\\]", location)
    # the text decides, not where links lead: in a download cache both files are links to another folder
    if not location or "\0" in location or ":" in location or not parts[0] or ".." in parts:
        raise _Refused(
            f"keeps {name!r} in {_short(ascii(location))}, outside its folder; do not use this file"
        )
    other = path.parent / location
    if not other.is_file():
        raise _Refused(f"keeps {name!r} in {other}, which is missing; put that file beside it")
    size = math.prod(shape) * dtype.itemsize
    numbers = [entry.get("offset", "0"), entry.get("length", str(size))]
    if any(not re.fullmatch(r"[0-9]{1,18}", n) for n in numbers):
        raise ValueError(f"the place of {name} in {location}")
    start, length = map(int, numbers)
    if length != size or start + length > other.stat().st_size:
        raise _Refused(
            f"needs bytes {start} to {start + size} of {other} for {name!r}, which has {other.stat().st_size} bytes "
            f"and {length} of them given; download both again"
        )
    return _whole(_Store(other, start, length, dtype), shape)


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
        raise ValueError(f"{x.size} values for shape {_short(shape)} of {dtype}")
    x = x.reshape(shape)
    x.flags.writeable = False
    return x
