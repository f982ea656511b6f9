"""Sounds that need no synthesiser: a buzz and a hiss, for the tests of judges and measures."""

import numpy as np

RATE = 16000


def tone(seconds: float = 0.6, hz: float = 150.0, seed: int = 0) -> np.ndarray:
    """A buzz with harmonics: voiced beyond doubt."""
    t = np.arange(int(seconds * RATE)) / RATE
    noise = 1e-4 * np.random.default_rng(seed).standard_normal(len(t))
    return (sum(np.sin(2 * np.pi * hz * k * t) / k for k in range(1, 12)) * 0.1 + noise).astype(np.float32)


def hiss(seconds: float = 0.6, seed: int = 0) -> np.ndarray:
    """White noise: unvoiced beyond doubt."""
    return (0.1 * np.random.default_rng(seed).standard_normal(int(seconds * RATE))).astype(np.float32)
