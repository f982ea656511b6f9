"""Golden numbers of the speaker ResNets from a plain PyTorch forward written here, one lone clip at a time.

Our module is filled with `fill.fill`; the forward below reads its numbers and follows the published structure
(WeSpeaker): NCHW image of frequency x time, basic or bottleneck blocks, statistics pooling, linear map.
Needs torch; run from this folder:

    python make_speaker.py
"""

import sys
from pathlib import Path

import jax
import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from fill import fill  # noqa: E402

from deepasmr_jax import sharding, speaker  # noqa: E402

CONFIGS = {
    "basic": speaker.Config(base_channels=4, repeats=(1, 3, 1, 1), embedding_size=16),
    "bottleneck": speaker.Config(base_channels=4, repeats=(2, 1, 1, 1), bottleneck=True, embedding_size=16),
}
SEED = 7


def tensor(x) -> torch.Tensor:
    return torch.from_numpy(np.array(x, np.float32))


def conv(x, layer, stride=1):
    kernel = tensor(layer.kernel[...]).permute(3, 2, 0, 1)
    return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)


def norm(x, layer):
    mean, var, scale, bias = (tensor(getattr(layer, n)[...]) for n in ("mean", "var", "scale", "bias"))
    return F.batch_norm(x, mean, var, scale, bias, training=False, eps=1e-5)


def block(x, layer, stride, bottleneck):
    if bottleneck:
        y = F.relu(norm(conv(x, layer.conv1), layer.bn1))
        y = F.relu(norm(conv(y, layer.conv2, stride), layer.bn2))
        y = norm(conv(y, layer.conv3), layer.bn3)
    else:
        y = F.relu(norm(conv(x, layer.conv1, stride), layer.bn1))
        y = norm(conv(y, layer.conv2), layer.bn2)
    if stride != 1 or x.shape[1] != y.shape[1]:
        x = norm(conv(x, layer.shortcut_conv, stride), layer.shortcut_bn)
    return F.relu(x + y)


def forward(model, cfg, fbank):
    """fbank [T, 80] of one clip; outputs of the four stages and the embedding."""
    x = tensor(fbank).T[None, None]
    x = F.relu(norm(conv(x, model.conv1), model.bn1))
    stages = []
    for i, repeats in enumerate(cfg.repeats):
        stage = getattr(model, f"layer{i + 1}")
        x = block(x, stage.first, 1 if i == 0 else 2, cfg.bottleneck)
        for j in range(repeats - 1):
            x = block(x, jax.tree.map(lambda v, j=j: v[j], stage.rest), 1, cfg.bottleneck)
        stages.append(x)
    deviation = torch.sqrt(x.var(dim=-1, unbiased=True) + 1e-7)
    pooled = torch.cat([x.mean(dim=-1).flatten(1), deviation.flatten(1)], dim=1)
    return stages, F.linear(pooled, tensor(model.seg_1.kernel[...]).T, tensor(model.seg_1.bias[...]))


@torch.inference_mode()
def main():
    sharding.make_mesh()
    rng = np.random.default_rng(4)
    lengths = np.asarray([45, 33], np.int32)
    fbank = (2 * rng.standard_normal((2, 45, 80))).astype(np.float16)
    out = {"fbank": fbank, "lengths": lengths}
    for name, cfg in CONFIGS.items():
        model = fill(speaker.init(cfg, jax.random.key(0)), SEED)
        results = [forward(model, cfg, x[:n]) for x, n in zip(fbank, lengths, strict=True)]
        out[f"{name}_embedding"] = torch.cat([embedding for _, embedding in results]).numpy()
        for i in range(4):  # of the shorter clip, every fifth of F, [F / 5, T, C]
            out[f"{name}_layer{i + 1}"] = results[1][0][i][0].permute(1, 2, 0)[::5].numpy()
        print(name, out[f"{name}_embedding"][0, :4])
    np.savez_compressed(Path(__file__).with_name("speaker.npz"), **out)


if __name__ == "__main__":
    main()
