"""Makes vocoder_istft.npz: an inverse-STFT vocoder of toy size, written independently with PyTorch.

Run from the repository root: python tests/golden/make_vocoder_istft.py
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from test_vocoder_istft import TINY, filled_generator  # noqa: E402

from deepasmr_jax import sharding  # noqa: E402


def main() -> None:
    torch.set_num_threads(1)
    sharding.make_mesh()
    model = filled_generator(TINY, 1)
    w = {  # plain names of every weight
        "embed": model.embed.kernel, "embed_b": model.embed.bias,
        "norm": model.norm.scale, "norm_b": model.norm.bias,
        "final": model.final_norm.scale, "final_b": model.final_norm.bias,
        "head": model.head.kernel, "head_b": model.head.bias,
    }  # fmt: skip
    w = {k: torch.tensor(np.asarray(v[...])) for k, v in w.items()}
    layers = model.layers
    mel = np.random.default_rng(4).standard_normal((2, 9, 80)).astype(np.float32)
    with torch.no_grad():
        x = F.conv1d(torch.tensor(mel).transpose(1, 2), w["embed"].permute(2, 1, 0), w["embed_b"], padding=3)
        x = F.layer_norm(x.transpose(1, 2), (16,), w["norm"], w["norm_b"], 1e-6)
        for i in range(3):

            def get(p, i=i):
                return torch.tensor(np.asarray(p[...])[i])

            taps = get(layers.depthwise).T[:, None]  # [D, 1, k]
            y = F.conv1d(x.transpose(1, 2), taps, get(layers.depthwise_bias), padding=3, groups=16)
            y = F.layer_norm(y.transpose(1, 2), (16,), get(layers.norm.scale), get(layers.norm.bias), 1e-6)
            y = F.gelu(y @ get(layers.up.kernel) + get(layers.up.bias))
            y = y @ get(layers.down.kernel) + get(layers.down.bias)
            x = x + get(layers.gain) * y
        x = F.layer_norm(x, (16,), w["final"], w["final_b"], 1e-6) @ w["head"] + w["head_b"]
        magnitude, phase = x.double().chunk(2, dim=-1)
        spectrum = torch.polar(magnitude.exp().clamp(max=100.0), phase)
        window = torch.hann_window(1024, dtype=torch.float64)
        frames = torch.fft.irfft(spectrum, dim=-1) * window
        wav, energy = torch.zeros(2, 8 * 320 + 1024).double(), torch.zeros(8 * 320 + 1024).double()
        for t in range(9):
            wav[:, t * 320 : t * 320 + 1024] += frames[:, t]
            energy[t * 320 : t * 320 + 1024] += window**2
        wav = (wav / energy.clamp(min=1e-11))[:, 352 : 352 + 9 * 320].clamp(-1, 1)
    np.savez_compressed(Path(__file__).with_name("vocoder_istft.npz"), mel=mel, wav=wav.float().numpy())


if __name__ == "__main__":
    main()
