"""Random numbers under public names: both sides of a comparison fill a state dict with these, so no file holds weights.

A value depends on the tensor's name, shape and seed alone, through NumPy's stable Philox generator.
"""

import zlib

import numpy as np


def values(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float32 tensor of realistic scale: gains near 1, small biases, matrices scaled by fan-in (PyTorch layout)."""
    rng = np.random.Generator(np.random.Philox([seed, zlib.crc32(name.encode())]))
    x = rng.standard_normal(shape, dtype=np.float32)
    last = name.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return np.asarray(7, np.int64)
    if last in ("g", "weight_g", "running_var") or (last == "weight" and len(shape) == 1):
        return 1 + np.float32(0.1) * np.abs(x)
    if last in ("bias", "running_mean", "weight_u", "weight_v"):
        return np.float32(0.05) * x
    x *= np.float32(np.prod(shape[1:], dtype=np.int64) ** -0.5)
    return x


def state(names: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """A whole state dict; the stored vectors of a spectral norm are those after one power iteration."""
    out = {name: values(name, tuple(shape), seed) for name, shape in names.items()}
    for name in [n for n in out if n.endswith(".weight_orig")]:
        stem = name.removesuffix("weight_orig")
        w = out[name].reshape(len(out[name]), -1)
        v = w.T @ out[stem + "weight_u"]
        out[stem + "weight_v"] = v / np.linalg.norm(v)
        u = w @ out[stem + "weight_v"]
        out[stem + "weight_u"] = u / np.linalg.norm(u)
    return out
