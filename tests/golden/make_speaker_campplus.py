"""Makes speaker_campplus.npz: a toy CAM++ in plain PyTorch under the public names, its numbers and its ONNX graph.

The network is written here from the paper (Wang et al., 2023) and the list of public tensors; one lone clip at a
time. Also holds names and shapes of the full size. Needs torch and onnx; run from the repository root:

    python tests/golden/make_speaker_campplus.py
"""

import io
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import nn

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from test_speaker_campplus import CONFIG, tensor_values  # noqa: E402

from deepasmr_jax import speaker_campplus  # noqa: E402


def norm_relu(channels, affine=True):
    layers = nn.Sequential()
    layers.add_module("batchnorm", nn.BatchNorm1d(channels, affine=affine))
    if affine:
        layers.add_module("relu", nn.ReLU())
    return layers


class ResidualBlock(nn.Module):
    def __init__(self, channels, stride, has_shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, (stride, 1), 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if has_shortcut:
            self.shortcut.append(nn.Conv2d(channels, channels, 1, (stride, 1), bias=False))
            self.shortcut.append(nn.BatchNorm2d(channels))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class Head(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c)
        self.layer1 = nn.Sequential(ResidualBlock(c, 2, True), ResidualBlock(c, 1, False))
        self.layer2 = nn.Sequential(ResidualBlock(c, 2, True), ResidualBlock(c, 1, False))
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, (2, 1), 1, bias=False), nn.BatchNorm2d(c)

    def forward(self, x):  # [B, 80, T]
        x = F.relu(self.bn1(self.conv1(x[:, None])))
        x = self.layer2(self.layer1(x))
        return F.relu(self.bn2(self.conv2(x))).flatten(1, 2)


class Tdnn(nn.Module):
    def __init__(self, num_in, num_out):
        super().__init__()
        self.linear = nn.Conv1d(num_in, num_out, 5, 2, 2, bias=False)
        self.nonlinear = norm_relu(num_out)

    def forward(self, x):
        return self.nonlinear(self.linear(x))


class ContextMask(nn.Module):
    def __init__(self, num_in, num_out, dilation, segment):
        super().__init__()
        self.segment = segment
        self.linear_local = nn.Conv1d(num_in, num_out, 3, 1, dilation, dilation, bias=False)
        self.linear1 = nn.Conv1d(num_in, num_in // 2, 1)
        self.linear2 = nn.Conv1d(num_in // 2, num_out, 1)

    def forward(self, x):
        mean = F.avg_pool1d(x, self.segment, self.segment, ceil_mode=True)
        mean = mean[..., None].expand(-1, -1, -1, self.segment).flatten(2)[..., : x.shape[-1]]
        context = F.relu(self.linear1(x.mean(-1, keepdim=True) + mean))
        return self.linear_local(x) * torch.sigmoid(self.linear2(context))


class DenseLayer(nn.Module):
    def __init__(self, num_in, bottleneck, growth, dilation, segment):
        super().__init__()
        self.nonlinear1, self.linear1 = norm_relu(num_in), nn.Conv1d(num_in, bottleneck, 1, bias=False)
        self.nonlinear2 = norm_relu(bottleneck)
        self.cam_layer = ContextMask(bottleneck, growth, dilation, segment)

    def forward(self, x):
        y = self.cam_layer(self.nonlinear2(self.linear1(self.nonlinear1(x))))
        return torch.cat([x, y], dim=1)


class Transit(nn.Module):
    def __init__(self, num_in, num_out):
        super().__init__()
        self.nonlinear, self.linear = norm_relu(num_in), nn.Conv1d(num_in, num_out, 1, bias=False)

    def forward(self, x):
        return self.linear(self.nonlinear(x))


class Pool(nn.Module):
    def forward(self, x):
        return torch.cat([x.mean(-1), x.std(-1, unbiased=True)], dim=-1)


class Dense(nn.Module):
    def __init__(self, num_in, num_out, squeezed):
        super().__init__()
        self.linear = nn.Conv1d(num_in, num_out, 1, bias=False)
        self.nonlinear = norm_relu(num_out, affine=False)
        self.squeezed = squeezed  # before the norm or after it: no number changes, the exported graph does

    def forward(self, x):
        x = self.linear(x[..., None])
        return self.nonlinear(x[..., 0]) if self.squeezed else self.nonlinear(x)[..., 0]


class Campplus(nn.Module):
    def __init__(self, cfg, squeezed=True):
        super().__init__()
        self.head = Head(cfg.head_channels)
        self.xvector = nn.Sequential()
        width = cfg.initial_channels
        self.xvector.add_module("tdnn", Tdnn(10 * cfg.head_channels, width))
        for b, (count, dilation) in enumerate(zip(cfg.repeats, cfg.dilations, strict=True), 1):
            block = nn.Sequential()
            for i in range(1, count + 1):
                layer = DenseLayer(width, cfg.bottleneck, cfg.growth, dilation, cfg.segment_frames)
                block.add_module(f"tdnnd{i}", layer)
                width += cfg.growth
            self.xvector.add_module(f"block{b}", block)
            self.xvector.add_module(f"transit{b}", Transit(width, width // 2))
            width //= 2
        self.xvector.add_module("out_nonlinear", norm_relu(width))
        self.xvector.add_module("stats", Pool())
        self.xvector.add_module("dense", Dense(2 * width, cfg.embedding_size, squeezed))

    def forward(self, fbank):  # [B, T, 80]
        return self.xvector(self.head(fbank.transpose(1, 2)))


def export(model, frames, file) -> None:
    """Writes the graph of a network to a path or a binary file, with torch.onnx."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            torch.zeros(1, frames, 80),
            file,
            dynamo=False,
            input_names=["input"],
            output_names=["output"],
            dynamic_axes={"input": {0: "B", 1: "T"}, "output": {0: "B"}},
        )


def exported(model, frames) -> tuple[dict[str, np.ndarray], list]:
    """Initialisers and nodes (operator, name, inputs, outputs) of the graph that torch.onnx writes."""
    file = io.BytesIO()
    export(model, frames, file)
    graph = onnx.load_from_string(file.getvalue()).graph
    initializers = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
    return initializers, [[n.op_type, n.name, list(n.input), list(n.output)] for n in graph.node]


def packed(graph) -> dict[str, np.ndarray]:
    """A graph as one array of numbers and one text."""
    initializers, nodes = graph
    text = {"shapes": {name: list(x.shape) for name, x in initializers.items()}, "nodes": nodes}
    numbers = np.concatenate([x.ravel() for x in initializers.values()])
    return {"numbers": numbers.astype(np.float32), "text": np.array(json.dumps(text))}


@torch.inference_mode()
def main():
    rng = np.random.default_rng(5)
    lengths = np.asarray([37, 30], np.int32)
    fbank = (2 * rng.standard_normal((2, 37, 80))).astype(np.float16)
    out = {"fbank": fbank, "lengths": lengths}
    names = ["head", *(name for name, _ in Campplus(CONFIG).xvector.named_children())]
    for squeezed in (True, False):
        model = Campplus(CONFIG, squeezed).eval()
        state = {
            k: torch.tensor(tensor_values(k, v.shape)).to(v.dtype) for k, v in model.state_dict().items()
        }
        model.load_state_dict(state)
        graph = exported(model, 30)
        out |= {f"graph_{squeezed}_{name}": x for name, x in packed(graph).items()}
        embeddings = []
        for x, n in zip(fbank, lengths, strict=True):
            x = torch.from_numpy(x[None, :n].astype(np.float32))
            groups = [model.head(x.transpose(1, 2))]
            for part in model.xvector:
                groups.append(part(groups[-1]))
            embeddings.append(groups[-1])
        for name, x in zip(names, groups, strict=True):  # of the shorter clip, [T, C]
            if name not in ("out_nonlinear", "dense"):
                out[name] = x[0].T.numpy() if x.ndim == 3 else x[0].numpy()
        out["embedding"] = torch.cat(embeddings).numpy()
        print(out["embedding"][:, :4])
    with torch.device("meta"):
        full = Campplus(speaker_campplus.cosyvoice())
    print(len(full.state_dict()), sum(p.numel() for p in full.parameters()))
    shapes = {name: list(x.shape) for name, x in full.state_dict().items()}
    np.savez_compressed(
        Path(__file__).with_name("speaker_campplus.npz"), shapes=np.array(json.dumps(shapes)), **out
    )


if __name__ == "__main__":
    main()
