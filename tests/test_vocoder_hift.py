"""The HiFT vocoder against PyTorch and float64, its phases, masks, mesh and public names."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fill import fill

from deepasmr_jax import checkpoint, public_names, sharding, vocoder_hift

GOLDEN = Path(__file__).parent / "golden" / "vocoder_hift.npz"
TINY = vocoder_hift.Config(initial_channels=32, f0_width=16)


def filled(cfg: vocoder_hift.Config, seed: int) -> vocoder_hift.Generator:
    """The weights of `fill`, with F0 and loudness of a voice; nothing is drawn or compiled."""
    shapes = jax.eval_shape(lambda: vocoder_hift.init(cfg, jax.random.key(0)))
    model = fill(
        sharding.replicate(jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)), seed
    )
    head, last = model.f0_predictor.head, model.last
    head.kernel[...], head.bias[...] = 100 * head.kernel[...], head.bias[...] + 120.0
    model.source_mix.kernel[...] = 3 * model.source_mix.kernel[...]
    last.kernel[...], last.bias[...] = 0.3 * last.kernel[...], last.bias[...] - 2.0
    return model


def drawn(num_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """mel [1, T, 80] and noise [1, 9, T * 480]."""
    rng = np.random.default_rng(0)
    mel = rng.standard_normal((1, num_frames, 80)).astype(np.float32)
    return mel, rng.standard_normal((1, 9, num_frames * 480)).astype(np.float32)
