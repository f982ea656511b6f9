"""Reads public weight files without their libraries and without running anything in them.

safetensors, PyTorch's zip and older files (`.pt`, `.pth`, `.bin`, `g_00000000`) and ONNX graphs, told apart by content.
Arrays are memory-mapped (read, where they lie unaligned) one at a time when they are asked for, so that a file of 2 GB
needs the memory of its largest tensor. Files are not trusted: whatever is wrong with one is a `ValueError` of one
sentence that names it. The formats are read by `weight_torch` and `weight_onnx`, their arrays by `weight_tensors`.
"""

import codecs
import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from deepasmr_jax import weight_onnx, weight_tensors, weight_torch
from deepasmr_jax.weight_onnx import Graph, Node  # noqa: F401 (names of what read_onnx gives)
from deepasmr_jax.weight_tensors import (
    MAX_NAMES,
    NUMPY,
    Foreign,
    NotWeights,  # noqa: F401 (what `kind` and `read` raise)
    Refused,
    Store,
    Tensor,
    Tensors,
    listed,
    mapped,
    reading,
    short,
    unique,
    visible,
    whole,
)

_SAFETENSORS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64",
    "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
}  # fmt: skip
SAFETENSORS_DTYPES = {code: NUMPY[name] for code, name in _SAFETENSORS.items()}  # of a file -> numpy's


# ---------------------------------------------------------------- what a file is


def kind(path) -> str:
    """What a weight file is, by its content: "safetensors", "torch zip", "torch legacy" or "onnx".

    Raises:
        NotWeights: if it is a text, a program, another archive or a pickle of another program: a ValueError too.
        ValueError: if it is none of these (a folder, a web page, a git-lfs pointer ...) or is cut off so that its
            table of contents is missing.
    """
    with reading(path):
        return _kind(Path(path))


def _kind(path: Path) -> str:
    if path.is_dir():
        raise Refused("is a folder; name the weight file in it")
    if not path.is_file():  # reading a pipe would wait without end
        raise Refused("is missing or no file; check the path, or download it")
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(512)
    if size < 10:
        raise Refused(f"has only {size} bytes and is no weight file; download it again")
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length <= MAX_NAMES:  # before the others: the length may look like one of them
        if length > size - 8:
            raise ValueError(f"{size} bytes, but its header needs {length}")
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        with open(path, "rb") as file:
            weight_torch.archive_members(file)
        return "torch zip"
    if head[:1] == b"\x80" and weight_torch.MAGIC in head[:32]:
        return "torch legacy"
    _refuse_others(head)
    if head[:1] == b"\x08" and head[1] < 64:  # an ONNX file begins with its format version, field 1
        with mapped(path) as data:
            weight_onnx.find_graph(data)
        return "onnx"
    if head[8:9] == b"{":
        raise Refused(f"names a header of {length:,} bytes, no weights need so much; download it again")
    raise Refused(f"begins with {head[:8].hex(' ')}, which is no known weight format; download it again")


_OTHERS = {
    b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"7z\xbc\xaf": "7-Zip", b"Rar!": "RAR",
    b"PK\x05\x06": "empty zip",
}  # fmt: skip


def _refuse_others(head: bytes) -> None:
    """Names the usual wrong files."""
    for start, name in _OTHERS.items():
        if head.startswith(start):
            raise Foreign(f"is a {name} archive; unpack it and give the weight file in it")
    if head[257:262] == b"ustar":
        raise Foreign("is a tar archive; unpack it, or save a file of PyTorch before 0.1.10 again")
    if head.startswith((b"\x93NUMPY", b"\x89HDF")):
        raise Foreign("is a NumPy or HDF5 file; this reader takes safetensors, PyTorch and ONNX files")
    if head[:1] == b"\x80" and head[1] in range(2, 6):
        raise Foreign("is a Python pickle without PyTorch's mark; save its state dict with torch.save")
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith(b"version https://git-lfs"):
        raise Refused("is a git-lfs pointer and not the file; run `git lfs pull` in its folder")
    if text[:15].lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise Refused("is a web page; download the weight file itself, not the page about it")
    with contextlib.suppress(UnicodeDecodeError):
        shown = codecs.getincrementaldecoder("utf-8")().decode(text)  # the last letter may be cut
        if not re.search(r"[\x00-\x08\x0e-\x1f\x7f]", shown):
            raise Foreign(f"is text that begins with {ascii(shown[:24])}; give the weight file itself")


def check_size(path) -> None:
    """Refuses a file that this machine could not hold in memory, before anything of it is read.

    Raises:
        ValueError: if it is larger than the memory, or no file.
    """
    with reading(path):
        if not os.path.isfile(path):  # reading a pipe would wait without end
            raise Refused("is missing or no file; check the path, or download it")
        size, memory = os.stat(path).st_size, weight_tensors.memory_bytes()
        if size > memory:
            raise Refused(
                f"has {size / 2**30:,.0f} GiB, this machine {memory / 2**30:,.0f} GiB of memory; "
                "use a larger machine, or download it again if it should be smaller"
            )


def sha256(path) -> str:
    """Hexadecimal SHA-256 of a file, read in blocks.

    Raises:
        ValueError: if it cannot be read.
    """
    with reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    with reading(path):
        found = _read(path, check)
        for i, name in enumerate(key):
            if not isinstance(found, dict) or name not in found:
                raise Refused(f"has no {'.'.join(key[: i + 1])}; {_contents(found)}")
            found = found[name]
        where = f" at {'.'.join(key)}" if key else ""
        if not isinstance(found, dict):
            raise Refused(f"holds {type(found).__name__.strip('_')}{where} and no dictionary of tensors")
        tensors = {name: x for name, x in found.items() if isinstance(x, Tensor)}
        inner = [name for name, x in found.items() if isinstance(x, dict) and _has_tensors(x)]
        if inner:
            raise Refused(
                f"has inner dictionaries of tensors{where} ({listed(inner)}); choose one with `key`"
            )
        if found and not tensors:
            raise Refused(f"has no tensors{where}; {_contents(found)}")
        if any(not isinstance(name, str) for name in tensors):
            raise Refused(f"names tensors{where} by other values than text; it is no state dict")
        return Tensors(tensors)


def read_tree(path, check: bool = True) -> Any:
    """Everything in a safetensors or PyTorch file, as nested as it was saved.

    Returns:
        A `Tensors` mapping whose values are arrays, `Tensors`, lists and plain values; or one of these, if the file
        holds no dictionary. Tuples and sets are lists, dtypes numpy dtypes, option namespaces mappings.

    Raises:
        ValueError: if the file is damaged or holds more than data.
    """
    with reading(path):
        tree = _read(path, check)
    return visible(tree)


def read_onnx(path) -> Graph:
    """Initialisers and nodes of an ONNX file; tensors in files beside it are found by their relative path.

    Attributes of nodes, sub-graphs and the types of values are not read.

    Raises:
        ValueError: if the file is none, is damaged, has a tensor of a type without numbers, or its data is missing.
    """
    path = Path(path)
    with reading(path):
        what = _kind(path)
        if what != "onnx":
            raise Refused(f"is a {what} file and no ONNX graph; use read")
        return weight_onnx.read_graph(path)


def _read(path, check: bool):
    what = _kind(Path(path))
    if what == "onnx":
        raise Refused("is an ONNX graph, whose tensors have no fixed names; use read_onnx")
    if what == "safetensors":
        return _read_safetensors(path)
    return weight_torch.read_zip(path, check) if what == "torch zip" else weight_torch.read_legacy(path)


def _contents(x) -> str:
    return f"it has {listed(x)}" if isinstance(x, dict) and x else "there is no dictionary"


def _has_tensors(tree) -> bool:
    waiting = [tree]
    while waiting:
        x = waiting.pop()
        if isinstance(x, Tensor):
            return True
        waiting += list(x.values()) if isinstance(x, dict) else x if isinstance(x, list | tuple) else []
    return False


def _read_safetensors(path) -> dict[str, Tensor]:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length).decode(), object_pairs_hook=unique)
    header.pop("__metadata__", None)
    tensors, ranges = {}, []
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise Refused(f"has {name} in {short(entry['dtype'])}, which is not read; convert it to float32")
        ranges.append((start, end))
        store = Store(path, 8 + length + start, end - start, SAFETENSORS_DTYPES[entry["dtype"]])
        tensors[name] = whole(store, entry["shape"])
    position = 0
    for start, end in sorted(ranges):
        if start != position or type(start) is not int or type(end) is not int:
            raise ValueError(f"its tensors leave a gap or overlap at byte {position}")
        position = end
    if 8 + length + position != size:
        raise ValueError(f"{size} bytes instead of {8 + length + position}")
    return tensors
