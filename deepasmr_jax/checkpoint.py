"""Training checkpoints (Orbax) and the public model folder (safetensors and config.json).

Training: `Checkpoints` saves the whole state and the data position, keeps the last few and restores the
newest that is complete. Contract: same config, same number of hosts and data workers: an interrupted and an
uninterrupted run end with identical weights. Another number of chips on the same hosts: same data order,
equal up to rounding. Another number of hosts: the data order starts afresh, and the log says so.
Public folder, format 1: `config.json` {"format", "name", "mel_profile", "sample_rate", "components":
{name: {"module", "config", "file", "sha256", "dtype", "num_params"}}, "sampling", "text", "provenance"} and
one `<name>.safetensors` per component with dotted parameter paths, written under a temporary name first.
This file alone imports Orbax.
"""

import contextlib
import hashlib
import importlib
import json
import logging
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from deepasmr_jax import config as config_lib
from deepasmr_jax import files, sharding, weight_files

FORMAT = 1
SHARD_BYTES = 2**30  # a weight file is split where it would grow beyond this
DTYPES = ("float32", "float16", "bfloat16")
LICENCES = (  # ever stricter
    "CC0 1.0", "BSD-like", "MIT", "Apache-2.0", "CC BY 4.0", "CC BY-SA 3.0", "CC BY-SA 4.0", "GPL-3.0", "CC BY-NC 4.0",
)  # fmt: skip
_ENTRY = {  # of a component in config.json
    "module": str, "config": dict, "file": str | list, "sha256": str | list, "dtype": str, "num_params": int,
}  # fmt: skip

# ---------------------------------------------------------------- names of parameters


def path_name(path) -> str:
    """`layers.attention.query.kernel` for a pytree path of an NNX module."""
    names = (getattr(k, "name", getattr(k, "key", getattr(k, "idx", None))) for k in path)
    return ".".join(str(n) for n in names if n not in (None, "value"))


def named_arrays(module) -> dict[str, jax.Array]:
    """Every array of a module by its dotted path, in the module's order."""
    return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(module)}


def fill(abstract, arrays: dict[str, np.ndarray], source: str):
    """A module with the tree, dtypes and shardings of `abstract` and the values of `arrays`.

    Args:
        abstract: a module of arrays or of `jax.ShapeDtypeStruct`, on the current mesh.
        arrays: values by dotted path.
        source: where they come from, for the message.

    Raises:
        ValueError: one error that lists all missing, unexpected and reshaped names.
    """
    wanted = named_arrays(abstract)
    missing = sorted(set(wanted) - set(arrays))
    unexpected = sorted(set(arrays) - set(wanted))
    reshaped = [
        f"{name} {tuple(arrays[name].shape)} instead of {tuple(x.shape)}"
        for name, x in wanted.items()
        if name in arrays and tuple(arrays[name].shape) != tuple(x.shape)
    ]
    if missing or unexpected or reshaped:
        raise ValueError(
            f"{source} does not fit the model: missing {missing}, unexpected {unexpected}, "
            f"reshaped {reshaped}; the weights belong to another config"
        )
    mesh = sharding.ensure_mesh()

    def one(path, x):
        value = np.asarray(arrays[path_name(path)]).astype(x.dtype)
        return jax.device_put(value, placement(x, mesh))

    return jax.tree_util.tree_map_with_path(one, abstract)


def placement(x, mesh) -> NamedSharding:
    """Where a traced array belongs on the mesh; scalars, which carry no sharding, go to every device."""
    found = getattr(x, "sharding", None)
    return NamedSharding(mesh, found.spec if isinstance(found, NamedSharding) else PartitionSpec())


def abstract(make, *args):
    """Shapes, dtypes and shardings of `make(*args)` on the current mesh, without memory for its arrays."""
    mesh = sharding.ensure_mesh()
    shapes = jax.eval_shape(make, *args)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement(x, mesh)), shapes)


# ---------------------------------------------------------------- public model folder


def model_file(module: str):
    """The Python module of the package that holds a model, by its name in config.json (`lm`, `flow`, ...).

    Raises:
        ValueError: if this version has no such module.
    """
    try:
        return importlib.import_module(f"deepasmr_jax.{module}")
    except ModuleNotFoundError as error:
        if error.name != f"deepasmr_jax.{module}":
            raise
        raise ValueError(
            f"config.json names the module {module!r}, which this version does not have"
        ) from None


def public_part(module, config):
    """The part of a trained module that is exported, with its config.

    A two-player vocoder gives its generator; a speech tokenizer and a speaker encoder drop their training heads;
    the rest is given whole.
    """
    if hasattr(module, "generator"):
        return module.generator, config
    file = importlib.import_module(type(config).__module__)
    return file.without_head(module, config) if hasattr(file, "without_head") else (module, config)


def export_component(folder, name: str, module, config, dtype: str = "float32", **top) -> Path:
    """Writes one component into a model folder and merges it into the folder's config.json.

    Args:
        folder: the model folder, made if absent; other components in it stay.
        name: component name, e.g. "lm"; the file is `<name>.safetensors`.
        module: the weights; of a Gan only the generator is written, of a speech tokenizer and a speaker encoder
            not the training head.
        config: the frozen Config that built the module.
        dtype: "float32", "float16" or "bfloat16" of the file; integers stay as they are.
        **top: top-level entries of config.json to set, e.g. mel_profile="mini", provenance={...} (dicts are
            merged). The strictest licence that `provenance` states goes on top. The component's entry of `sampling`
            is dropped where the folder had another network in its place.

    Returns:
        The path of the weight file.

    Raises:
        ValueError: on an unknown dtype, or a weight that is not finite in it.
    """
    module, config = public_part(module, config)
    arrays = named_arrays(module)
    shapes = {key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in arrays.items()}
    values = ((key, np.asarray(_to_host(x))) for key, x in arrays.items())
    if jax.process_index():
        for _ in values:  # every host takes part in gathering
            pass
        return Path(folder) / f"{name}.safetensors"
    return write_component(folder, name, config, shapes, values, dtype, **top)


def write_component(folder, name: str, config, shapes: dict, arrays, dtype: str = "float32", **top) -> Path:
    """Writes one component array by array, so that no more than one of them need be in memory.

    Args:
        folder, name, config, dtype, top: as for `export_component`.
        shapes: parameter -> its `jax.ShapeDtypeStruct`; the order of the file.
        arrays: (parameter, array) in the order of `shapes`.

    Returns:
        The path of the weight file; of the first one where they are several, each at most `SHARD_BYTES`.

    Raises:
        ValueError: on an unknown dtype, or a weight that is not finite in it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} cannot be exported; use one of {', '.join(DTYPES)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file_dtypes = {
        key: np.dtype(jnp.dtype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype)
        for key, x in shapes.items()
    }
    shards: list[list[str]] = [[]]
    size = 0
    for key, x in shapes.items():
        num_bytes = int(np.prod(x.shape)) * file_dtypes[key].itemsize
        if shards[-1] and size + num_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += num_bytes
    many = len(shards) > 1
    names = [
        f"{name}-{i:05d}-of-{len(shards):05d}.safetensors" if many else f"{name}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    arrays = iter(arrays)
    # files take their names from the last to the first: config.json after all others
    with contextlib.ExitStack() as stack:
        new = stack.enter_context(files.atomic_path(folder / "config.json"))
        parts = [stack.enter_context(files.atomic_path(folder / file)) for file in names]
        sums = [
            _write_safetensors(
                part,
                {k: (file_dtypes[k], shapes[k].shape) for k in keys},
                _finite(arrays, file_dtypes, name),
                {"format": str(FORMAT), "component": name},
            )
            for part, keys in zip(parts, shards, strict=True)
        ]
        values = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else {}
        values = {"format": FORMAT, "name": folder.name, "components": {}} | values
        module, before = type(config).__module__.rsplit(".", 1)[-1], values["components"].get(name)
        if before and before["module"] != module:  # its settings are fields of another network
            values.get("sampling", {}).pop(name, None)
        for key, value in top.items():
            values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
        set_licence(values)
        values["components"][name] = {
            "module": module,
            "config": config_lib.to_dict(config),
            "file": names if many else names[0],
            "sha256": sums if many else sums[0],
            "dtype": dtype,
            "num_params": sum(int(np.prod(x.shape)) for x in shapes.values()),
        }
        config_lib.write_json(new, values)  # on a full disk the weights before stay, as this is written first
    for old in (folder / file for file, _ in files_of(before) if file not in names) if before else ():
        old.unlink(missing_ok=True)  # of a component that was in another number of files
    return folder / names[0]


def _finite(arrays, dtypes: dict, component: str):
    """The same arrays in their dtypes; ValueError at one that is not finite."""
    for key, x in arrays:
        value = np.asarray(x, dtypes[key])  # not ascontiguousarray: that makes a scalar a vector
        if (
            jnp.issubdtype(value.dtype, jnp.floating)
            and not np.isfinite(value.astype(np.float32, copy=False)).all()
        ):
            raise ValueError(
                f"{component}: {key} is not finite in {value.dtype.name}; export float32 or an earlier checkpoint"
            )
        yield key, value


def write_arrays(path: str | os.PathLike, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    """Writes a safetensors file, whole or not at all.

    Args:
        path: the file.
        arrays: name -> array of any shape; bfloat16 included.
        metadata: text entries of the header.

    Returns:
        The sha256 of the file, in hexadecimal.
    """
    entries = {k: (x.dtype, x.shape) for k, x in arrays.items()}
    with files.atomic_path(path) as part:
        return _write_safetensors(part, entries, iter(arrays.items()), metadata)


def _write_safetensors(path: Path, entries: dict[str, tuple], arrays, metadata: dict[str, str]) -> str:
    """Writes these entries (name -> dtype, shape) from the next ones of `arrays`; the sha256 of the file."""
    head: dict = {"__metadata__": metadata}
    codes = {dtype: code for code, dtype in weight_files.SAFETENSORS_DTYPES.items()}
    start = 0
    for key, (dtype, shape) in entries.items():
        end = start + int(np.prod(shape)) * dtype.itemsize
        head[key] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def put(data) -> None:
            file.write(data)
            digest.update(data)

        put(len(text).to_bytes(8, "little"))
        put(text)
        for key, (dtype, shape) in entries.items():
            found, value = next(arrays)
            assert found == key and value.shape == tuple(shape), (found, key, value.shape, shape)
            put(memoryview(np.ascontiguousarray(value, dtype).reshape(-1).view(np.uint8)))
    return digest.hexdigest()


def files_of(entry: dict) -> list[tuple[str, str]]:
    """(file name, sha256) of each weight file of a component's entry in config.json."""
    if isinstance(entry["file"], str):
        return [(entry["file"], entry["sha256"])]
    return list(zip(entry["file"], entry["sha256"], strict=True))


def component_arrays(folder, entry: dict) -> dict[str, np.ndarray]:
    """The arrays of a component of a model folder.

    Args:
        folder: the model folder.
        entry: of the component in config.json: {"file", "sha256", ...}.

    Raises:
        ValueError: as `read_arrays`.
    """
    arrays: dict[str, np.ndarray] = {}
    for file, sha256 in files_of(entry):
        arrays |= read_arrays(Path(folder) / file, sha256)
    return arrays


def _to_host(x: jax.Array):
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(x, tiled=True)
    return jax.device_get(x)


def read_config(folder) -> dict:
    """The config.json of a model folder.

    Raises:
        ValueError: if it is absent, not JSON, of a run, of another format version, or without a list of components.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} is no model folder: it has no config.json")
    try:
        values = json.loads(path.read_text("utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it holds no JSON object")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); copy the whole model folder again") from None
    if "format" not in values and {"component", "steps"} <= values.keys():
        raise ValueError(
            f"{folder} is the folder of a run; give {path.parent / 'export'} if it is there, or the folder that was "
            "given to --export"
        )
    if values.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {values.get('format')!r}; this version reads format {FORMAT}, which "
            "`deepasmr convert` makes of public weights"
        )
    entries = values.get("components")
    if not isinstance(entries, dict) or not all(map(_is_entry, entries.values())):
        raise ValueError(
            f"{path} does not list components with {', '.join(sorted(_ENTRY))}; copy the whole model folder again"
        )
    for key in ("sampling", "text", "provenance"):
        if not isinstance(values.get(key, {}), dict):
            raise ValueError(f"{path} has no object as {key}; copy the whole model folder again")
    if not isinstance(values.get("languages", []), list):
        raise ValueError(f"{path} has no list as languages; copy the whole model folder again")
    return values


def _is_entry(x) -> bool:
    return isinstance(x, dict) and all(isinstance(x.get(key), kind) for key, kind in _ENTRY.items())


def read_arrays(path, sha256: str | None = None) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, bfloat16 included, memory-mapped and read-only.

    Raises:
        ValueError: if the file is absent, larger than the memory, its sha256 differs, or it cannot be parsed.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} is missing; copy the whole model folder, or export the component again")
    weight_files.check_size(path)
    if sha256 is not None and (found := weight_files.sha256(path)) != sha256:
        raise ValueError(
            f"{path} is damaged: {path.stat().st_size} bytes with sha256 {found[:12]}..., "
            f"config.json says {sha256[:12]}...; copy it again"
        )
    return dict(weight_files.read(path))


def strictest(stated) -> str:
    """The strictest of one or more licences, by the order of `LICENCES`; an unknown one is stricter than all."""
    return max(stated, key=lambda x: LICENCES.index(x) if x in LICENCES else len(LICENCES))


def licences(values: dict) -> dict[str, str]:
    """Part -> licence, of the parts for which the `provenance` of a config.json states one."""
    parts = {k: x for k, x in values.get("provenance", {}).items() if isinstance(x, dict)}
    return {name: str(x["licence"]) for name, x in parts.items() if x.get("licence")}


def set_licence(values: dict) -> None:
    """Puts the strictest licence of the parts on top of the values of a config.json; none if no part states one."""
    values.pop("licence", None)
    if stated := licences(values).values():
        values["licence"] = strictest(stated)


def component_config(folder, name: str):
    """The Config object of a component of a model folder.

    Raises:
        ValueError: if the folder has no such component or its config has other fields than this version.
    """
    values = read_config(folder)
    if name not in values["components"]:
        raise ValueError(
            f"{folder} has no component {name!r}; it has {', '.join(sorted(values['components']))}"
        )
    entry = values["components"][name]
    return config_lib.from_dict(model_file(entry["module"]).Config, entry["config"])


def load_component(folder, name: str, init=None):
    """Reads one component of a model folder onto the current mesh.

    Args:
        folder: the model folder.
        name: component name, e.g. "lm".
        init: `init(config, key) -> module`, the shape of the module; the `init` of the component's file if
            None.

    Returns:
        (module with float32 weights, its Config).

    Raises:
        ValueError: if a file is missing, damaged or truncated, or its names or shapes do not fit the config
            (one error with all missing, unexpected and reshaped names).
    """
    cfg = component_config(folder, name)
    entry = read_config(folder)["components"][name]
    make = init or model_file(entry["module"]).init
    shapes = abstract(lambda key: public_part(make(cfg, key), cfg)[0], jax.random.key(0))
    source = str(Path(folder) / files_of(entry)[0][0])
    return fill(shapes, component_arrays(folder, entry), source), cfg


# ---------------------------------------------------------------- training checkpoints


class Checkpoints:
    """The numbered checkpoints of one run, in `folder/checkpoints`.

    A checkpoint is whole when its folder holds `commit_success.txt`. It is written under another name and renamed; on a
    mounted bucket, which may refuse to rename a folder, under its own name, and that file comes last.

    Args:
        folder: the run's working directory.
        keep: how many of the newest stay.
        keep_every: every checkpoint whose step is a multiple of this stays too; 0: none.
    """

    def __init__(self, folder, keep: int = 2, keep_every: int = 0):
        from orbax.checkpoint import v1 as ocp

        logging.getLogger("absl").addFilter(_not_of_orbax)  # until `close`
        self.folder = Path(folder).absolute() / "checkpoints"
        modes = ocp.options.AtomicityMode
        mode = modes.COMMIT_FILE if is_fuse(self.folder) else modes.ATOMIC_RENAME
        policies = ocp.training.preservation_policies
        rules = [policies.LatestN(keep)]
        if keep_every:
            rules.append(policies.EveryNSteps(keep_every))
        self._checkpointer = ocp.training.Checkpointer(
            self.folder,
            cleanup_tmp_directories=True,
            preservation_policy=policies.AnyPreservationPolicy(rules),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            context=ocp.Context(atomicity_options=ocp.options.AtomicityOptions(mode=mode)),
        )
        self._pending = None

    def save(self, step: int, state, data, wait: bool = False) -> None:
        """Saves `state` and the position of the Grain iterator `data`, in the background unless `wait`.

        On CPU it always waits: the host copy of an array may be the array itself, which the next step
        overwrites.

        Args:
            step: number of the checkpoint's folder; one that exists is replaced.
            state: any pytree of arrays.
            data: the Grain iterator.
            wait: block until the checkpoint is complete.

        Raises:
            OSError: if this checkpoint or the one in progress could not be written; older ones stay.
        """
        self.wait()
        with self._explained(step):
            pending = self._checkpointer.save_checkpointables_async(
                step, {"state": _flat(state), "data": data}, force=True, overwrite=True
            )
        self._pending = step, pending
        if wait or jax.default_backend() == "cpu":
            self.wait()

    def wait(self) -> None:
        """Blocks until the save in progress is complete.

        Raises:
            OSError: if it could not be written.
        """
        if self._pending is not None:
            (step, pending), self._pending = self._pending, None
            with self._explained(step):
                pending.result()

    @contextlib.contextmanager
    def _explained(self, step: int):
        """Errors of a save (Orbax and TensorStore raise many kinds) as an OSError with the way out."""
        try:
            yield
        except Exception as error:
            whole = [s for s in steps(self.folder) if _problem(self.folder / str(s)) is None]
            kept = f"that of step {whole[-1]} is kept" if whole else "there is none before it"
            cause = " ".join(str(error).split())[:300] or type(error).__name__
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self.folder} ({cause}); {kept}; make room and "
                "run the same command again"
            ) from error

    def close(self) -> None:
        """Finishes the save in progress and releases the folder."""
        self.wait()
        self._checkpointer.close()
        logging.getLogger("absl").removeFilter(_not_of_orbax)

    def restore(self, abstract_state, data) -> tuple[int, object] | None:
        """The newest complete checkpoint.

        A folder without commit marker (half copied) or that cannot be read is reported and the one before is
        used.

        Args:
            abstract_state: from `abstract(init, key)`: shapes, dtypes and shardings.
            data: the Grain iterator, moved to the saved position.

        Returns:
            (step, state), or None if there is no checkpoint at all.

        Raises:
            ValueError: if checkpoints exist but none can be read.
        """
        found = steps(self.folder)
        errors = []
        for step in reversed(found):
            problem = _problem(self.folder / str(step))
            if problem is None:
                try:
                    position = data.get_state()
                    return step, self._load(step, abstract_state, data)
                except Exception as error:  # Orbax raises many kinds for damaged files
                    problem = f"{type(error).__name__}: {str(error)[:300]}"
                    data.set_state(position)
            errors.append(f"step {step}: {problem}")
            print(f"checkpoint of step {step} is damaged and skipped: {problem}", flush=True)
        if errors:
            raise ValueError(f"no readable checkpoint in {self.folder}: {'; '.join(errors)}")
        return None

    def _load(self, step: int, abstract_state, data):
        from orbax.checkpoint import v1 as ocp

        path = self.folder / str(step)
        flat = _flat(abstract_state)
        targets = {"state": flat, "data": data}
        hosts = len(list((path / "data").glob("process_*.json")))
        if hosts and hosts != jax.process_count():
            print(
                f"saved by {hosts} hosts, now {jax.process_count()}: the data order starts afresh", flush=True
            )
            del targets["data"]
        loaded = ocp.load_checkpointables(path, targets)["state"]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), [loaded[name] for name in flat])


def is_fuse(folder) -> bool:
    """Whether a folder, there or not, is on a FUSE file system such as a bucket mounted by gcsfuse; Linux only."""
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return False
    # a blank in a name is written \040
    plain = lambda name: name.encode("latin-1", "backslashreplace").decode("unicode_escape")
    kinds = {plain(x[1]): x[2] for x in (line.split() for line in lines)}
    folder = Path(folder).resolve()
    kind = next((kinds[str(p)] for p in (folder, *folder.parents) if str(p) in kinds), "")
    return kind.startswith("fuse")


def _not_of_orbax(record: logging.LogRecord) -> bool:
    """A save that fails logs some hundred lines of tracebacks; its error comes as one sentence of `_explained`."""
    return "orbax" not in record.pathname


def _flat(state) -> dict:
    """A state as one dict by dotted path: Orbax cannot restore NNX lists, whose keys are numbers and text."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    flat = {path_name(path): x for path, x in leaves}
    assert len(flat) == len(leaves), "two leaves of the state have one name"
    return flat


def steps(folder) -> list[int]:
    """The steps of the checkpoint folders in `folder`, ascending, complete or not."""
    folder = Path(folder)
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def _problem(path: Path) -> str | None:
    """Why a step folder cannot be complete, or None."""
    for marker in (
        "commit_success.txt",
        "_CHECKPOINT_METADATA",
        "state/commit_success.txt",
        "state/_METADATA",
    ):
        if not (path / marker).exists():
            return f"no {marker}"
    return None


def load_weights(folder) -> dict[str, np.ndarray]:
    """Weights by dotted path from the newest complete checkpoint of a run; the averaged ones if it has them.

    Raises:
        ValueError: if `folder` holds no complete checkpoint.
    """
    root = Path(folder).absolute() / "checkpoints"
    for step in reversed(steps(root)):
        if _problem(root / str(step)) is None:
            return read_state(root / str(step), "ema.") or read_state(root / str(step), "model.")
    raise ValueError(f"{folder} holds no complete checkpoint")


def read_state(path, prefix: str = "") -> dict[str, np.ndarray]:
    """The arrays of a checkpoint in host memory, whatever devices and hosts wrote it; random keys as their numbers.

    Args:
        path: folder of one step.
        prefix: arrays whose dotted path begins with it are read, under the rest of their path.
    """
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        found = ocp.metadata(path, checkpointable_name="state").metadata
        # arrays as the target, not shapes: a shape without devices is put on those that wrote it
        target = {k: np.empty(x.shape, x.dtype) for k, x in found.items() if k.startswith(prefix)}
        if not target:
            return {}
        read = ocp.load(path, target, checkpointable_name="state")
    return {name.removeprefix(prefix): x for name, x in read.items()}
