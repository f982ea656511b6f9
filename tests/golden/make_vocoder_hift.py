"""Makes vocoder_hift.npz: the HiFT vocoder of toy size, written independently with PyTorch, in float64.

The weights are made under their public names, so that a wrong name in the package's table gives a wrong sound.
The source is made as the public code makes it: F0 repeated to samples, turns of each sample, linear down-sampling,
sum, linear up-sampling.
Run from the repository root: python tests/golden/make_vocoder_hift.py
tests/test_parity_full.py runs the same network at full size.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from test_vocoder_hift import TINY, drawn, public_weights  # noqa: E402

from deepasmr_jax import sharding  # noqa: E402


class Reference:
    """The network over tensors by public name; channels before time, as PyTorch has them."""

    def __init__(self, weights: dict[str, np.ndarray], dtype=torch.float64):
        self.weights = {name: torch.tensor(np.array(x)).to(dtype) for name, x in weights.items()}
        self.dtype = dtype
        self.window = torch.hann_window(16, periodic=True, dtype=dtype)

    def of(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    def predict_f0(self, mel: torch.Tensor) -> torch.Tensor:
        """[B, 80, T] to [B, T]."""
        x = mel
        for i in (0, 2, 4, 6, 8):
            x = F.elu(F.conv1d(x, *self.of(f"f0_predictor.condnet.{i}"), padding=1))
        return F.linear(x.transpose(1, 2), *self.of("f0_predictor.classifier")).abs()[..., 0]

    def make_source(self, f0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """F0 [B, T] and noise [B, 9, W] to [B, W]."""
        f0 = F.interpolate(f0[:, None], scale_factor=480.0, mode="nearest")  # [B, 1, W]
        turns = f0 * torch.arange(1, 10, dtype=self.dtype)[:, None] / 24000 % 1
        start = torch.rand(len(f0), 9, dtype=self.dtype)
        start[:, 0] = 0
        turns[:, :, 0] += start  # random phases of the overtones, which the next line does not read
        turns = F.interpolate(turns, scale_factor=1 / 480, mode="linear")
        assert turns.shape[-1] == f0.shape[-1] // 480
        phase = torch.cumsum(turns, dim=-1) * 2 * np.pi
        phase = F.interpolate(phase * 480, scale_factor=480.0, mode="linear")
        voiced = (f0 > 10).to(self.dtype)
        level = voiced * 0.003 + (1 - voiced) * 0.1 / 3
        waves = 0.1 * torch.sin(phase) * voiced + level * noise
        return torch.tanh(F.linear(waves.transpose(1, 2), *self.of("m_source.l_linear")))[..., 0]

    def snake(self, x: torch.Tensor, name: str) -> torch.Tensor:
        alpha = self.weights[f"{name}.alpha"][None, :, None]
        return x + torch.sin(x * alpha) ** 2 / (alpha + 1e-9)

    def block(self, x: torch.Tensor, name: str, size: int) -> torch.Tensor:
        for d, dilation in enumerate((1, 3, 5)):
            y = self.snake(x, f"{name}.activations1.{d}")
            pad = (size - 1) * dilation // 2
            y = F.conv1d(y, *self.of(f"{name}.convs1.{d}"), dilation=dilation, padding=pad)
            y = self.snake(y, f"{name}.activations2.{d}")
            x = x + F.conv1d(y, *self.of(f"{name}.convs2.{d}"), padding=(size - 1) // 2)
        return x

    def run(self, mel: np.ndarray, noise: np.ndarray) -> dict[str, np.ndarray]:
        """mel [B, T, 80], noise [B, 9, W]; the layer groups as `vocoder_hift.layers` names and shapes them."""
        mel = torch.tensor(mel).to(self.dtype).transpose(1, 2)
        out = {"f0": self.predict_f0(mel)}
        out["source"] = self.make_source(out["f0"], torch.tensor(noise).to(self.dtype))
        spectrum = torch.stft(
            out["source"], 16, 4, 16, window=self.window, center=True, pad_mode="reflect", return_complex=True
        )
        spectrum = torch.cat([spectrum.real, spectrum.imag], dim=1)
        out["source_stft"] = spectrum.transpose(1, 2)
        x = F.conv1d(mel, *self.of("conv_pre"), padding=3)
        sizes = ((8, 16, 4, 15, 7, 7), (5, 11, 3, 3, 1, 7), (3, 7, 2, 1, 0, 11))
        for i, (rate, _, pad, down, down_pad, source_size) in enumerate(sizes):
            x = F.conv_transpose1d(F.leaky_relu(x, 0.1), *self.of(f"ups.{i}"), stride=rate, padding=pad)
            if i == 2:
                x = F.pad(x, (1, 0), mode="reflect")
            s = F.conv1d(spectrum, *self.of(f"source_downs.{i}"), stride=down, padding=down_pad)
            x = x + self.block(s, f"source_resblocks.{i}", source_size)
            x = sum(self.block(x, f"resblocks.{3 * i + j}", size) for j, size in enumerate((3, 7, 11))) / 3
            out[f"stage_{i}"] = x.transpose(1, 2)
        y = F.conv1d(F.leaky_relu(x, 0.01), *self.of("conv_post"), padding=3)
        magnitude, phase = torch.exp(y[:, :9]).clip(max=100), torch.sin(y[:, 9:])
        out["magnitude"], out["phase"] = magnitude.transpose(1, 2), phase.transpose(1, 2)
        spectrum = torch.complex(magnitude * torch.cos(phase), magnitude * torch.sin(phase))
        wav = torch.istft(spectrum, 16, 4, 16, window=self.window, center=True)
        out["wav"] = wav.clip(-0.99, 0.99)
        assert out["wav"].shape[1] == 480 * mel.shape[-1]
        return {name: np.asarray(x) for name, x in out.items()}


def main() -> None:
    torch.manual_seed(0)
    sharding.make_mesh()
    with torch.no_grad():
        out = Reference(public_weights(TINY, 1)).run(*drawn(3))
    out = {name: x.astype(np.float32) for name, x in out.items()}
    np.savez_compressed(Path(__file__).with_name("vocoder_hift.npz"), **out)


if __name__ == "__main__":
    main()
