"""Compiled programs kept whole on disk: the next process reads them and neither traces, lowers nor compiles.

JAX's own cache keeps what XLA made, but a program must be traced and lowered in Python to find it there, which is
most of a start (docs/speed.md, "Programs of a request"). Here the key is what decides a program without tracing it:
code of this package, versions, machine, JAX's settings, the function, its static arguments, and the structure, types
and shardings of the others. A file holds machine code, and JAX's form of it is a pickle
(`jax.experimental.serialize_executable`): only files are read that are the user's and that nobody else may write to.

`use_cache` is the whole setting of a user's machine, and `clock` tells a program's time from that of its making.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import platform
import stat
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from deepasmr_jax import files

READ_EVENT = "/deepasmr/programs/read"  # jax.monitoring: seconds spent on reading one, fun_name
KEPT_VERSIONS = 3  # folders of other code, machines or settings that stay beside the one in use

_lock = threading.Lock()  # one program at a time is looked for or made
_all: "weakref.WeakSet[Program]" = weakref.WeakSet()
_folder: Path | None = None


def use_cache() -> None:
    """Keeps compiled programs on disk for a quick second start; DEEPASMR_CACHE moves them, "off" stops it."""
    place = os.environ.get("DEEPASMR_CACHE", os.path.join("~", ".cache", "deepasmr", "xla"))
    if place == "off" or jax.config.jax_compilation_cache_dir:
        return
    folder = Path(place).expanduser()
    keep_in(folder / "programs")
    with contextlib.suppress(OSError):  # a home that cannot be written is no reason to fail
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def keep_in(folder: str | os.PathLike | None) -> None:
    """From now on programs are read from `folder` and written to it; None: they are compiled in each process.

    Made if it is missing, for its owner alone. If it cannot be made, or belongs to or can be written by others, and on
    a system that does not tell, nothing is kept.
    """
    global _folder
    _folder = None
    forget()
    if folder is None or not hasattr(os, "getuid"):
        return
    folder = Path(folder)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_own = _is_own(folder.stat())
    except OSError:  # a home that cannot be written is no reason to fail
        return
    if is_own:
        _folder = folder


def forget() -> None:
    """Drops the programs in memory, not those on disk."""
    for program in list(_all):
        program.loaded.clear()


def kept(*static: str) -> Callable[[Callable], "Program"]:
    """`jax.jit` for a function of the module level, with the arguments of these names static: see `Program`."""
    return lambda fun: Program(fun, static)


class Program:
    """A function under `jax.jit` whose compiled forms are kept on disk, where `keep_in` named a folder.

    Inside another program, in a job of several processes and without a folder it is `jax.jit` and nothing else.

    Args:
        fun: of the module level (its name is part of the key), a function of its arguments alone. What it returns is
            arrays in tuples and dicts; another result, or constants that are arrays of JAX, are compiled and not kept.
        static: names of the arguments that are part of the program: hashable, with a `repr` that says all of them.
    """

    def __init__(self, fun: Callable, static: tuple[str, ...] = ()):
        functools.update_wrapper(self, fun)
        self.loaded: dict = {}
        self._static, self._signature = static, inspect.signature(fun)
        self._jit = jax.jit(fun, static_argnames=static)
        _all.add(self)

    def __call__(self, *args, **kwargs):
        if _folder is None or jax.process_count() > 1:
            return self._jit(*args, **kwargs)
        given = self._signature.bind(*args, **kwargs)
        given.apply_defaults()
        static = {name: given.arguments.pop(name) for name in self._static}
        leaves, tree = jax.tree.flatten(dict(given.arguments))
        if any(isinstance(x, jax.core.Tracer) for x in leaves):
            return self._jit(*args, **kwargs)
        try:
            mesh = jax.sharding.get_mesh()
        except ValueError:  # inside another program, with nothing of it among the arguments
            return self._jit(*args, **kwargs)
        # settings, and those that code may change for a while, for itself alone
        settings = (
            *jax.config.values.values(),
            jax.config.jax_default_matmul_precision,
            jax.config.jax_enable_x64,
        )
        # as text: types of one name, but of a program's results and of other arrays, are unequal in jax 0.11
        types = tuple(str(jax.typeof(x)) for x in leaves)
        call = tree, types, tuple(static.items()), settings[-2:]
        key = call, mesh, settings
        if key not in self.loaded:
            with _lock:
                self.loaded[key] = self._found(call, mesh, leaves, tree, static)
        return self.loaded[key](*leaves)

    def _found(self, call: tuple, mesh, leaves: list, tree, static: dict) -> Callable:
        """The compiled program, from the disk or made and written there."""
        devices = jax.devices()[:1] if mesh.empty else list(mesh.devices.flat)
        name, places = f"{self.__module__}.{self.__qualname__}", [device.id for device in devices]
        told = *call, name, mesh.shape_tuple, mesh.axis_types, places
        digest = hashlib.sha256(repr(told).encode()).hexdigest()
        path = _folder / _mark() / f"{self.__name__.strip('_')}-{digest[:32]}"
        start = time.perf_counter()
        program = _read(path, jax.tree.structure((tuple(leaves), {})), devices)
        if program is not None:
            seconds = time.perf_counter() - start
            jax.monitoring.record_event_duration_secs(READ_EVENT, seconds, fun_name=self.__name__)
            return program

        def run(*leaves):
            return self.__wrapped__(**jax.tree.unflatten(tree, leaves), **static)

        run.__name__ = run.__qualname__ = self.__name__
        can_keep = _has_room(path.parent)
        with _without_the_cache_of_jax() if can_keep else contextlib.nullcontext():
            program = jax.jit(run).lower(*leaves).compile()
        if can_keep:
            _write(path, program)
        return program


def _is_own(found: os.stat_result) -> bool:
    """Whether a file or folder is the user's and nobody else may write to it."""
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _has_room(folder: Path) -> bool:
    """Whether files can be written to a folder, which is made if it is missing; older ones beside it then go."""
    try:
        folder.mkdir(mode=0o700)
    except OSError:
        return os.access(folder, os.W_OK)
    with contextlib.suppress(OSError):  # another process may be at it
        _drop_others(folder)
    return True


@contextlib.contextmanager
def _without_the_cache_of_jax() -> Iterator[None]:
    """A program that comes from there cannot be written again: in jax 0.11 it then lacks functions when it runs."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX looks at the setting once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _write(path: Path, program: jax.stages.Compiled) -> None:
    """Line 1: sha256 of the rest. Line 2: structure of the result, places numbered, tuples as lists. Then the code."""
    result = program.out_tree
    try:
        outline = json.dumps(jax.tree.unflatten(result, range(result.num_leaves)), default=str)
        if jax.tree.structure(_tuples(json.loads(outline))) != result:
            return  # neither tuples nor dicts of names
        code, _, _ = serialize_executable.serialize(program)
    except Exception:  # constants, or a device whose programs cannot be kept: the program itself is good
        return
    body = outline.encode() + b"\n" + code
    # on a full disk the next process compiles again
    with contextlib.suppress(OSError), files.atomic_path(path) as part:
        part.touch(mode=0o600)
        part.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def _read(path: Path, inputs: jax.tree_util.PyTreeDef, devices: list) -> jax.stages.Compiled | None:
    """The program of a whole file; None if there is none, if others may have written it, or if JAX refuses it."""
    try:
        with path.open("rb") as file:
            if not _is_own(os.fstat(file.fileno())):
                return None
            digest, _, body = file.read().partition(b"\n")
    except OSError:
        return None
    with contextlib.suppress(OSError):  # a folder that can only be read is as good
        os.utime(path.parent)  # in use
    if hashlib.sha256(body).hexdigest().encode() != digest:
        return None
    outline, _, code = body.partition(b"\n")
    try:
        result = jax.tree.structure(_tuples(json.loads(outline)))
        return serialize_executable.deserialize_and_load(code, inputs, result, execution_devices=devices)
    except Exception:  # whatever is wrong with it, it can be made anew
        return None


def _tuples(x):
    if isinstance(x, list):
        return tuple(map(_tuples, x))
    return {k: _tuples(v) for k, v in x.items()} if isinstance(x, dict) else x


def _drop_others(folder: Path) -> None:
    """Leaves the folders beside a new one that were used last: each change of the code makes one."""
    others = sorted((x for x in folder.parent.iterdir() if x != folder), key=lambda x: x.stat().st_mtime)
    for old in others[:-KEPT_VERSIONS]:
        for path in old.iterdir():
            path.unlink(missing_ok=True)
        old.rmdir()


def _mark() -> str:
    """What decides a program apart from the call: code, versions, machine and settings; 16 hexadecimal digits."""
    # caches decide nothing, and their settings are made while a program starts
    settings = sorted((name, repr(x)) for name, x in jax.config.values.items() if "cache" not in name)
    return hashlib.sha256(repr((_surroundings(), settings)).encode()).hexdigest()[:16]


def _code() -> str:
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        code.update(path.name.encode() + path.read_bytes())
    return code.hexdigest()


_CODE = _code()  # as it is imported, not as it is edited later


@functools.cache
def _surroundings() -> str:
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")]
    device = jax.devices()[0]
    chip = device.platform, device.device_kind, device.client.platform_version
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flags = [os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    told = _CODE, sys.version, versions, chip, platform.machine(), _instructions(), cores, flags
    return repr(told)


def has_bfloat16_products() -> bool:
    """Whether the processor has products of bfloat16; True where the system does not tell."""
    words = _instructions().lower().split()
    known = "flags" in words or "features" in words
    return not known or any("bf16" in word for word in words)


def _instructions() -> str:
    """Model and instruction set of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({x for x in lines if x.startswith(("model", "flags", "Features", "CPU "))}))


@contextlib.contextmanager
def clock(timings: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds spent inside to timings[name], those of compilation to timings["compile_s"]."""
    spans: list[tuple[float, float]] = []

    def on_event(event: str, seconds: float, **_):
        # tracing, lowering, compiling, or reading it from disk
        if event.startswith("/jax/core/compile/") or event == READ_EVENT:
            now = time.perf_counter()
            spans.append((now - seconds, now))

    jax.monitoring.register_event_duration_secs_listener(on_event)
    start = time.perf_counter()
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(on_event)
        spent, compile_s, reached = time.perf_counter() - start, 0.0, start
        for first, last in sorted(spans):  # one may lie inside another
            compile_s += max(last - max(first, reached), 0.0)
            reached = max(reached, last)
        timings[name] = timings.get(name, 0.0) + max(spent - compile_s, 0.0)
        timings["compile_s"] = timings.get("compile_s", 0.0) + compile_s


@contextlib.contextmanager
def clock_all(each: list[dict[str, float]], name: str) -> Iterator[None]:
    """`clock` for a group: every row gets its share."""
    total: dict[str, float] = {}
    with clock(total, name):
        yield
    for timings in each:
        for key, seconds in total.items():
            timings[key] = timings.get(key, 0.0) + seconds / len(each)
