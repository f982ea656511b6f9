"""Makes vocoder.npz: HiFi-GAN generators and discriminators of toy size, written independently with PyTorch.

Run from the repository root: python tests/golden/make_vocoder.py
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from test_vocoder import PAIRED, SINGLE, filled  # noqa: E402

from deepasmr_jax import sharding  # noqa: E402


def tensors(module, transposed=False) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of one of our convolutions in PyTorch's layout."""
    kernel = np.asarray(module.kernel[...])
    if transposed:
        kernel = np.flip(kernel, 0).transpose(1, 2, 0)
    else:
        kernel = kernel.transpose(2, 1, 0)
    return torch.tensor(kernel.copy()), torch.tensor(np.asarray(module.bias[...]))


def generate(model, cfg, mel: torch.Tensor) -> torch.Tensor:
    """[B, M, T] to [B, W]."""
    x = F.conv1d(mel, *tensors(model.first), padding=3)
    per_stage = len(cfg.residual_kernels)
    for i, (rate, size) in enumerate(zip(cfg.upsample_rates, cfg.upsample_kernels, strict=True)):
        weight, bias = tensors(model.ups[i], transposed=True)
        x = F.conv_transpose1d(F.leaky_relu(x, 0.1), weight, bias, stride=rate, padding=(size - rate) // 2)
        total = torch.zeros_like(x)
        for j in range(per_stage):
            block, y = model.blocks[i * per_stage + j], x
            kernel = cfg.residual_kernels[j]
            for d, dilation in enumerate(cfg.residual_dilations[j]):
                pad = dilation * (kernel - 1) // 2
                z = F.conv1d(F.leaky_relu(y, 0.1), *tensors(block.convs1[d]), padding=pad, dilation=dilation)
                if cfg.is_paired:
                    z = F.conv1d(F.leaky_relu(z, 0.1), *tensors(block.convs2[d]), padding=(kernel - 1) // 2)
                y = y + z
            total = total + y
        x = total / per_stage
    return torch.tanh(F.conv1d(F.leaky_relu(x, 0.01), *tensors(model.last), padding=3))[:, 0]


def judge_period(model, period: int, wav: torch.Tensor) -> list[torch.Tensor]:
    """[B, W] to layer outputs [B, C, W / P, P]."""
    missing = (period - wav.shape[1] % period) % period
    x = F.pad(wav[:, None], (0, missing), "reflect").view(wav.shape[0], 1, -1, period)
    outputs = []
    for i, conv in enumerate(model.convs):
        weight, bias = tensors(conv)
        stride = (3, 1) if i < 4 else (1, 1)
        x = F.leaky_relu(F.conv2d(x, weight[..., None], bias, stride=stride, padding=(2, 0)), 0.1)
        outputs.append(x)
    weight, bias = tensors(model.last)
    return [*outputs, F.conv2d(x, weight[..., None], bias, padding=(1, 0))]


def judge_scale(model, groups, wav: torch.Tensor) -> list[torch.Tensor]:
    """[B, 1, W] to layer outputs [B, C, W']."""
    x, outputs = wav, []
    strides, pads = (1, 2, 2, 4, 4, 1, 1), (7, 20, 20, 20, 20, 20, 2)
    for conv, stride, pad, group in zip(model.convs, strides, pads, groups, strict=True):
        x = F.leaky_relu(F.conv1d(x, *tensors(conv), stride=stride, padding=pad, groups=group), 0.1)
        outputs.append(x)
    return [*outputs, F.conv1d(x, *tensors(model.last), padding=1)]


def main() -> None:
    torch.set_num_threads(1)
    sharding.make_mesh()
    rng = np.random.default_rng(3)
    mel = rng.standard_normal((2, 6, 80)).astype(np.float32)
    real = (0.3 * rng.standard_normal((2, 1537))).astype(np.float32)
    fake = (0.3 * rng.standard_normal((2, 1537))).astype(np.float32)
    out = dict(mel=mel, real=real, fake=fake)
    paired = filled(PAIRED, 1)
    single = filled(SINGLE, 2)
    with torch.no_grad():
        mel = torch.tensor(mel.transpose(0, 2, 1).copy())
        out["paired"] = generate(paired.generator, PAIRED, mel).numpy()
        out["single"] = generate(single.generator, SINGLE, mel).numpy()
        judged = []
        for wav in (torch.tensor(real), torch.tensor(fake)):
            rows = []
            for model, period in zip(paired.discriminators.by_period, (2, 3, 5, 7, 11), strict=True):
                rows.append(judge_period(model, period, wav))
            pooled = wav[:, None]
            for model in paired.discriminators.by_scale:
                rows.append(judge_scale(model, PAIRED.scale_groups, pooled))
                pooled = F.avg_pool1d(pooled, 4, 2, padding=2)
            judged.append(rows)
        for i, rows in enumerate(judged[0]):
            out[f"score_{i}"] = rows[-1].numpy()
            out[f"level_{i}"] = np.array([float(x.abs().mean()) for x in rows], np.float32)
        pairs = list(zip(*judged, strict=True))
        out["feature"] = sum(float(F.l1_loss(a, b)) for r, f in pairs for a, b in zip(r, f, strict=True))
        out["discriminator"] = sum(float(((r[-1] - 1) ** 2).mean() + (f[-1] ** 2).mean()) for r, f in pairs)
        out["adversarial"] = sum(float(((f[-1] - 1) ** 2).mean()) for _, f in pairs)
    np.savez_compressed(Path(__file__).with_name("vocoder.npz"), **out)


if __name__ == "__main__":
    main()
