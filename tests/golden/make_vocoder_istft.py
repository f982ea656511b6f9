"""Makes vocoder_istft.npz: the inverse-STFT vocoder of toy size, written independently with PyTorch and NumPy.

wav: one head (Vocos). source_wav: pulses and noise through filters, with the noise that the package draws;
the pulses are added up cosine by cosine in float64.
Run from the repository root: python tests/golden/make_vocoder_istft.py
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from test_vocoder_istft import SOURCE, TINY, filled_generator  # noqa: E402

from deepasmr_jax import sharding, vocoder_istft  # noqa: E402

RATE, HOP, FRAMES = 16000, 320, 9


def tensor(param, *index) -> torch.Tensor:
    return torch.tensor(np.asarray(param[...])[index])


def linear(x: torch.Tensor, layer, *index) -> torch.Tensor:
    return x @ tensor(layer.kernel, *index) + tensor(layer.bias, *index)


def norm(x: torch.Tensor, layer, *index) -> torch.Tensor:
    return F.layer_norm(x, (16,), tensor(layer.scale, *index), tensor(layer.bias, *index), 1e-6)


def backbone(model, mel: np.ndarray) -> torch.Tensor:
    """[B, T, 80] to [B, T, 16]: all that comes before the heads."""
    kernel = tensor(model.embed.kernel).permute(2, 1, 0)
    x = F.conv1d(torch.tensor(mel).transpose(1, 2), kernel, tensor(model.embed.bias), padding=3)
    x = norm(x.transpose(1, 2), model.norm)
    layers = model.layers
    for i in range(3):
        taps = tensor(layers.depthwise, i).T[:, None]  # [D, 1, k]
        y = F.conv1d(x.transpose(1, 2), taps, tensor(layers.depthwise_bias, i), padding=3, groups=16)
        y = norm(y.transpose(1, 2), layers.norm, i)
        y = linear(F.gelu(linear(y, layers.up, i)), layers.down, i)
        x = x + tensor(layers.gain, i) * y
    return norm(x, model.final_norm)


def overlap_add(spectrum: np.ndarray, size: int, hop: int) -> np.ndarray:
    """[B, N, K] to [B, FRAMES * HOP] in float64, in [-1, 1]."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    pieces, num = np.fft.irfft(spectrum, n=size) * window, spectrum.shape[1]
    wav, energy = np.zeros((len(spectrum), (num - 1) * hop + size)), np.zeros((num - 1) * hop + size)
    for t in range(num):
        wav[:, t * hop : t * hop + size] += pieces[:, t]
        energy[t * hop : t * hop + size] += window**2
    start = (size - hop) // 2
    return np.clip((wav / np.maximum(energy, 1e-11))[:, start : start + FRAMES * HOP], -1, 1)


def one_head(model, mel: np.ndarray) -> np.ndarray:
    y = linear(backbone(model, mel), model.head).double().numpy()
    return overlap_add(np.minimum(np.exp(y[..., :513]), 100) * np.exp(1j * y[..., 513:]), 1024, HOP)


def pulse_train(hz: np.ndarray, voiced: np.ndarray) -> np.ndarray:
    """F0 and voicing per frame, [T], to samples: cosines at all multiples below half the rate, of unit power."""
    track = np.full(FRAMES, 150.0)
    for t in range(FRAMES):
        for beside in (t + 1, t - 1, t):  # the frame itself first, then the one before, then the one after
            if 0 <= beside < FRAMES and voiced[beside]:
                track[t] = hz[beside]
    middles, samples = (np.arange(FRAMES) + 0.5) * HOP, np.arange(FRAMES * HOP) + 0.5
    step = np.interp(samples, middles, track) / RATE
    loud = np.interp(samples, middles, voiced.astype(float))
    cycles, count = np.cumsum(step), np.floor(0.5 / step)
    total = sum(
        np.where(k <= count, np.cos(2 * np.pi * k * cycles), 0) for k in range(1, int(count.max()) + 1)
    )
    return total * np.sqrt(2 / count) * loud


def pulses_and_noise(model, mel: np.ndarray, noise: np.ndarray) -> np.ndarray:
    x = backbone(model, mel)
    pitch = linear(x, model.pitch_head).double().numpy()
    filters = linear(x, model.filter_head).double().numpy().reshape(2, 2 * FRAMES, 2, 257)
    colour = np.minimum(np.exp(linear(x, model.noise_head).double().numpy().reshape(2, 2 * FRAMES, 257)), 100)
    centres = np.log(55.0) + np.arange(80) * (np.log(500.0) - np.log(55.0)) / 79
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(512) / 512)

    def spectra(source: np.ndarray) -> np.ndarray:
        source = np.pad(source, 176)
        pieces = np.stack([source[t * 160 : t * 160 + 512] for t in range(2 * FRAMES)])
        return np.fft.rfft(pieces * window) / np.sqrt(np.sum(window**2))

    rows = []
    for row in range(2):
        hz = np.zeros(FRAMES)
        for t in range(FRAMES):
            best = int(np.argmax(pitch[row, t, :-1]))
            near = slice(max(best - 3, 0), best + 4)
            weights = np.exp(pitch[row, t, near] - pitch[row, t, best])
            hz[t] = np.exp(np.sum(weights * centres[near]) / np.sum(weights))
        pulses = spectra(pulse_train(hz, pitch[row, :, -1] > 0))
        shape = np.minimum(np.exp(filters[row, :, 0]), 100) * np.exp(1j * filters[row, :, 1])
        rows.append(pulses * shape + spectra(noise) * colour[row])
    return overlap_add(np.stack(rows), 512, 160)


def main() -> None:
    torch.set_num_threads(1)
    sharding.make_mesh()
    mel = np.random.default_rng(4).standard_normal((2, FRAMES, 80)).astype(np.float32)
    noise = np.asarray(vocoder_istft._noise(FRAMES, HOP, 0))[0]
    with torch.no_grad():
        made = {
            "wav": one_head(filled_generator(TINY, 1), mel),
            "source_wav": pulses_and_noise(filled_generator(SOURCE, 1), mel, noise.astype(np.float64)),
        }
    made = {name: wav.astype(np.float32) for name, wav in made.items()}
    np.savez_compressed(Path(__file__).with_name("vocoder_istft.npz"), mel=mel, **made)


if __name__ == "__main__":
    main()
