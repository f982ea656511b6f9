"""Tensors in a file that are read when asked for, and the one sentence for whatever is wrong with a file.

The base of the readers: `weight_files` (the public face, safetensors), `weight_torch` and `weight_onnx`. Arrays are
memory-mapped, or read where they lie unaligned, one at a time.
"""

import contextlib
import math
import mmap
import os
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

MAX_NAMES = 2**24  # bytes of names and shapes, about 150 a tensor
MAX_NODES = 2**18  # of a graph or of nested dictionaries and lists
_MAX_ELEMENTS = 2**40
_MAX_REPEATED = 2**26  # bytes of a tensor that shows its storage more than once (expanded)

NUMPY = {
    "float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2,
    "int64": np.int64, "int32": np.int32, "int16": np.int16, "int8": np.int8,
    "uint64": np.uint64, "uint32": np.uint32, "uint16": np.uint16, "uint8": np.uint8, "bool": np.bool_,
    "complex64": np.complex64, "complex128": np.complex128,
}  # fmt: skip
NUMPY = {name: np.dtype(x) for name, x in NUMPY.items()}


class Refused(Exception):
    """A sentence without its subject, the file: what is wrong with it and what to do."""


class Foreign(Refused):
    """Of a file that is recognised as something else than weights: a program, a text, another archive."""


class NotWeights(ValueError):
    """A file that is nothing for this reader, and not for being damaged."""


@contextlib.contextmanager
def reading(path):
    """Turns whatever goes wrong inside into a ValueError that names the file; `Foreign` into a `NotWeights`."""
    try:
        yield
    except Foreign as error:
        raise NotWeights(f"{path} {' '.join(str(error).split())}") from None
    except Refused as error:
        raise ValueError(f"{path} {' '.join(str(error).split())}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be opened: {error.strerror or error}; check the path") from error
    except MemoryError:
        raise
    # struct, zipfile, json and a bent pickle raise many kinds; the cause stays in the traceback
    except Exception as error:
        detail = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} is cut off or damaged ({detail}); copy or download it again") from error


@contextlib.contextmanager
def mapped(path) -> Iterator[mmap.mmap]:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def unique(pairs) -> dict:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name is there twice")
    return out


_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container


def memory_bytes() -> float:
    """The memory of this machine, or of the container if that may use less; infinite where the system does not tell."""
    found = [math.inf]
    with contextlib.suppress(AttributeError, OSError, ValueError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max": none
            found.append(int(Path(limit).read_text()))
    return min(found)


class Store:
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
                        raise Refused(
                            f"has {self.size / 2**30:,.0f} GiB in one tensor, more than memory; use a larger machine"
                        )
                    found = np.fromfile(file, np.uint8, self.size, offset=self.start)
                    found.flags.writeable = False
            self._found = weakref.ref(found)  # let go with its last array
        return found, skip


@dataclass(frozen=True)
class Tensor:
    """A view of a store: offset and strides count elements of `dtype`."""

    store: Store
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self):
        if not isinstance(self.store, Store) or not isinstance(self.dtype, np.dtype):
            raise TypeError("a tensor without storage or type")
        if type(self.shape) is not tuple or type(self.strides) is not tuple or len(self.shape) > 32:
            raise TypeError("the shape of a tensor is no tuple of at most 32")
        numbers = (self.offset, *self.shape, *self.strides)
        if any(type(n) is not int for n in numbers) or len(self.shape) != len(self.strides):
            raise TypeError("the shape of a tensor is not made of whole numbers")
        count, num = math.prod(self.shape), self.store.size // self.dtype.itemsize
        if min(numbers) < 0 or math.prod(max(n, 1) for n in self.shape) > _MAX_ELEMENTS:
            raise ValueError(f"a tensor of shape {short(self.shape)} and strides {short(self.strides)}")
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        if count and last >= num:
            raise ValueError(f"a tensor reaches element {last} of a storage of {num}")
        if count > num and count * self.dtype.itemsize > _MAX_REPEATED:
            raise ValueError(f"a tensor of {count} elements repeats a storage of {num}")

    def read(self) -> np.ndarray:
        """The array: a read-only view of its store."""
        if not math.prod(self.shape):
            return np.broadcast_to(np.zeros((), self.dtype), self.shape)
        with reading(self.store.path):
            data, start = self.store.bytes()
            size = self.dtype.itemsize
            # the stride of an axis of one element may be any number, also one that numpy cannot hold
            steps = [s * size if n > 1 else 0 for n, s in zip(self.shape, self.strides, strict=True)]
            x = np.ndarray(self.shape, self.dtype, data, start + self.offset * size, steps)
            if not x.flags.aligned:  # an untyped storage
                x = x.copy()
                x.flags.writeable = False
            return x


def whole(store: Store, shape) -> Tensor:
    """A tensor in row-major order that fills its store."""
    if len(shape) > 32:
        raise ValueError(f"a shape of {len(shape)} axes")
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    x = Tensor(store, store.dtype, 0, tuple(shape), strides)
    if math.prod(shape) * store.dtype.itemsize != store.size:
        raise ValueError(f"{store.size} bytes for shape {short(shape)} of {store.dtype}")
    return x


class Tensors(Mapping):
    """Tensors and other entries of a file by name; an array is mapped when it is asked for, and not kept.

    Values are read-only arrays, `Tensors` for inner dictionaries, lists, or plain Python values. Names that share
    a storage give arrays that share memory. Iterating over `.items()` holds one or two arrays at a time.
    """

    def __init__(self, entries: dict):
        self._entries = entries

    def __getitem__(self, name):
        return visible(self._entries[name])

    def __contains__(self, name) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Tensors({len(self)} entries: {listed(self)})"


def visible(x):
    if isinstance(x, Tensor):
        return x.read()
    if isinstance(x, dict):
        return Tensors(x)
    if isinstance(x, list | tuple):
        return [visible(y) for y in x]
    return x


def listed(names) -> str:
    names = list(names)
    return ", ".join(map(short, names[:8])) + (", ..." if len(names) > 8 else "")


def short(x) -> str:
    text = str(x)
    return text if len(text) <= 80 else text[:80] + "..."
