"""Device mesh, the one table of logical axis names, and host arrays to global arrays.

The mesh always exists and always has three explicit axes, also on one device:
`slice` (replicas over the slow network), `data` (batch; weights in FSDP fashion) and `model` (tensor parallel).
Weights and activations name their axes by what they mean; `spec` turns the names into a PartitionSpec.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("slice", "data", "model")

# logical axis -> mesh axes; the single source for weights, activations and comments
AXES = {
    "batch": ("slice", "data"),
    "embed": ("data",),
    "heads": ("model",),
    "kv_heads": ("model",),
    "mlp": ("model",),
    "tokens": (),
    "frames": (),
    "head_dim": (),
    "mel": (),
    "channels": (),
    "layers": (),
}


def make_mesh(slice: int = 1, data: int = 1, model: int = 1, devices=None) -> Mesh:
    """Builds the `slice x data x model` mesh of explicit axes and makes it the current one.

    Args:
        slice: replicas over the slow network.
        data: chips over which batch and weights are split.
        model: chips over which heads and MLP are split.
        devices: the devices to use; the first `slice * data * model` of `jax.devices()` if None.

    Raises:
        ValueError: if fewer devices exist than the mesh needs, or `slice` is no multiple of the TPU slices; with
            several hosts also if it leaves devices out, or if a host would have no rows of its own.
    """
    count, hosts = slice * data * model, jax.process_count()
    devices = list(jax.devices() if devices is None else devices)
    if len(devices) < count:
        raise ValueError(
            f"mesh {slice}x{data}x{model} needs {count} devices, found {len(devices)}; "
            "lower one of slice, data, model"
        )
    if hosts > 1 and (len(devices) > count or slice * data % hosts):
        raise ValueError(
            f"mesh {slice}x{data}x{model} does not use the {len(devices)} devices of {hosts} hosts evenly; slice x "
            f"data x model has to be {len(devices)}, and slice x data a multiple of {hosts}"
        )
    mesh = Mesh(_grid((slice, data, model), devices[:count]), MESH_AXES, axis_types=(AxisType.Explicit,) * 3)
    jax.set_mesh(mesh)
    return mesh


def _grid(shape: tuple[int, int, int], devices: list) -> np.ndarray:
    """The devices in the shape of the mesh, near ones side by side; between TPU slices only the first axis runs."""
    found = num_slices(devices)
    if shape[0] % found:
        raise ValueError(
            f"the devices are of {found} TPU slices, mesh.slice is {shape[0]}; set mesh.slice={found} and mesh.data x "
            "mesh.model to the chips of one slice"
        )
    # jax.make_mesh refuses an axis of 8 chips on a torus of 16 x 16, which is split here
    if found == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        (shape[0] // found, *shape[1:]), (found, 1, 1), devices, allow_split_physical_axes=True
    )


def num_slices(devices) -> int:
    """TPU slices of the devices; 1 of others."""
    return len({getattr(d, "slice_index", 0) for d in devices}) if devices[0].platform == "tpu" else 1


def ensure_mesh() -> Mesh:
    """The current mesh; a 1x1x1 mesh is made and set if there is none."""
    mesh = jax.sharding.get_mesh()
    return make_mesh() if mesh.empty else mesh


def spec(*names: str | None) -> PartitionSpec:
    """PartitionSpec of an array whose axes have these logical names (None: not split).

    Raises:
        ValueError: on an unknown name, or if two axes would use the same mesh axis.
    """
    used: set[str] = set()
    parts = []
    for name in names:
        if name is None:
            parts.append(None)
            continue
        if name not in AXES:
            raise ValueError(f"unknown axis name {name!r}; known: {', '.join(sorted(AXES))}")
        axes = AXES[name]
        if used & set(axes):
            raise ValueError(f"axes {names} use a mesh axis twice; leave one of them None")
        used |= set(axes)
        parts.append(None if not axes else axes[0] if len(axes) == 1 else axes)
    return PartitionSpec(*parts)


def check_fits(*sizes: tuple[str, int, str]) -> None:
    """Checks that the current mesh divides what a model splits.

    Args:
        sizes: of each split (what it is, its size, the mesh axis).

    Raises:
        ValueError: naming the first size that is not divided.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shape = ensure_mesh().shape if mesh.empty else mesh.shape
    for what, size, axis in sizes:
        if size % shape[axis]:
            raise ValueError(
                f"mesh axis {axis} of size {shape[axis]} does not divide {size} ({what}); use a divisor of {size}"
            )


def put(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This host's rows of a batch as global arrays, first axis split over `slice` and `data`.

    Args:
        batch: dict of host arrays; every array has the rows of this process on its first axis.
    """
    mesh = ensure_mesh()

    def one(x: np.ndarray) -> jax.Array:
        sharding = NamedSharding(mesh, spec("batch", *([None] * (np.ndim(x) - 1))))
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return {name: one(x) for name, x in batch.items()}


def split_rows(x) -> jax.Array:
    """An array with its first axis split over `batch`; nothing moves if it is already."""
    return jax.sharding.reshard(x, spec("batch", *[None] * (jnp.ndim(x) - 1)))


def replicate(tree):
    """A pytree of host or device arrays, copied whole to every device of the mesh."""
    return jax.device_put(tree, NamedSharding(ensure_mesh(), PartitionSpec()))


def pick(x: jax.Array, index: int, axis: int) -> jax.Array:
    """x at one index of an axis; x[:, index] forgets how a single row is split (jax 0.11), a sum does not."""
    place = jax.lax.broadcasted_iota(
        jnp.int32, [n if i == axis % x.ndim else 1 for i, n in enumerate(x.shape)], axis
    )
    return jnp.sum(jnp.where(place == index % x.shape[axis], x, 0), axis=axis)


def greatest(number: int) -> jax.Array:
    """The greatest of the numbers that the hosts give, on every host; each host has to call it, at the same place.

    Returns:
        int32 scalar; it is waited for when it is read, not here.
    """
    mesh = ensure_mesh()
    own = np.full(len(mesh.local_devices), number, np.int32)
    every = NamedSharding(mesh, PartitionSpec(MESH_AXES))
    return jax.jit(jnp.max)(jax.make_array_from_process_local_data(every, own))


def start_hosts() -> None:
    """Joins the hosts of a multi-host job; does nothing on a single host. Call before any device is used.

    Cloud TPU, Slurm and Kubernetes jobs are known to JAX. Elsewhere JAX_COORDINATOR_ADDRESS (host:port of the first
    process), JAX_NUM_PROCESSES and JAX_PROCESS_ID are set for each process.

    Raises:
        ValueError: if JAX_NUM_PROCESSES is set and one of the other two is not, or either is no number.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, count, number = found = [os.environ.get(name) for name in names]
    if jax.distributed.is_initialized():
        return
    if count or number:
        if not (address and (count or "").isdigit() and (number or "").isdigit()):
            told = ", ".join(f"{k}={v!r}" for k, v in zip(names, found, strict=True))
            raise ValueError(f"{told}: set all three, the last two to numbers, or leave the last two unset")
        return jax.distributed.initialize(address, int(count), int(number))
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    several = len(hosts) > 1 or int(os.environ.get("SLURM_NTASKS", "1")) > 1
    if several or address or "MEGASCALE_NUM_SLICES" in os.environ:
        jax.distributed.initialize()
