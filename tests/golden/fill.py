"""Fills a module with reproducible random weights, so that golden files need to hold no weights.

Both the scripts that make the golden files and the tests call `fill` with the same seed.
Values depend on the parameter's path, shape and seed only, through NumPy's stable Philox generator.
"""

import zlib

import jax
import numpy as np


def path_name(path) -> str:
    """'layers.attn.q.kernel' for a pytree path."""
    names = []
    for key in path:
        name = getattr(key, "name", None) or getattr(key, "key", None) or getattr(key, "idx", None)
        if name not in (None, "value"):
            names.append(str(name))
    return ".".join(names)


def values(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float32 array for one parameter: gains near 1, biases small, matrices scaled by fan-in."""
    rng = np.random.Generator(np.random.Philox([seed, zlib.crc32(name.encode())]))
    x = rng.standard_normal(shape).astype(np.float32)
    last = name.rsplit(".", 1)[-1]
    if last in ("scale", "gain", "g", "alpha", "var"):
        return 1.0 + 0.1 * np.abs(x)
    if last in ("bias", "mean"):
        return 0.05 * x
    fan_in = int(np.prod(shape[:-1])) if len(shape) > 1 else 1
    return x / np.sqrt(max(min(fan_in, 4096), 1))


def fill(module, seed: int):
    """The module with every array replaced by `values` of its path; same tree, same shardings."""

    def one(path, x):
        return jax.device_put(values(path_name(path), x.shape, seed).astype(x.dtype), x.sharding)

    return jax.tree_util.tree_map_with_path(one, module)
