"""Makes speaker_wavlm.npz: WavLM of the transformers library at toy size under an ECAPA head in plain PyTorch.

The head is written here from the paper and the list of public tensors; one lone clip at a time. The library's names
are turned into those of the public file. Also holds names and shapes of the full size. Needs torch and
transformers; run from the repository root:

    python tests/golden/make_speaker_wavlm.py
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from test_speaker_wavlm import CONFIG, tensor_values  # noqa: E402

from deepasmr_jax import speaker_wavlm  # noqa: E402

PUBLIC = (  # name in the library -> name in the public file
    (r"masked_spec_embed", "mask_emb"),
    (r"feature_extractor\.conv_layers\.(\d+)\.conv\.", r"feature_extractor.conv_layers.\1.0."),
    (r"feature_extractor\.conv_layers\.(\d+)\.layer_norm\.", r"feature_extractor.conv_layers.\1.2.1."),
    (r"feature_projection\.layer_norm\.", "layer_norm."),
    (r"feature_projection\.projection\.", "post_extract_proj."),
    (r"pos_conv_embed\.conv\.bias", "pos_conv.0.bias"),
    (r"pos_conv_embed\.conv\.parametrizations\.weight\.original0", "pos_conv.0.weight_g"),
    (r"pos_conv_embed\.conv\.parametrizations\.weight\.original1", "pos_conv.0.weight_v"),
    (r"attention\.gru_rel_pos_const", "self_attn.grep_a"),
    (r"attention\.gru_rel_pos_linear", "self_attn.grep_linear"),
    (r"attention\.rel_attn_embed", "self_attn.relative_attention_bias"),
    (r"attention\.([qkv]_proj|out_proj)", r"self_attn.\1"),
    (r"(layers\.\d+)\.layer_norm", r"\1.self_attn_layer_norm"),
    (r"feed_forward\.intermediate_dense", "fc1"),
    (r"feed_forward\.output_dense", "fc2"),
)


def public_name(name: str) -> str:
    for pattern, new in PUBLIC:
        found, count = re.subn(pattern, new, name)
        if count:
            name = found
            break
    return f"feature_extract.model.{name}"


def backbone(cfg) -> nn.Module:
    return transformers.WavLMModel(
        transformers.WavLMConfig(
            hidden_size=cfg.width,
            num_hidden_layers=cfg.num_layers,
            num_attention_heads=cfg.num_heads,
            intermediate_size=cfg.mlp_width,
            conv_dim=(cfg.conv_channels,) * len(cfg.conv_kernels),
            conv_kernel=cfg.conv_kernels,
            conv_stride=cfg.conv_strides,
            feat_extract_norm="layer",
            do_stable_layer_norm=True,
            num_conv_pos_embeddings=cfg.position_kernel,
            num_conv_pos_embedding_groups=cfg.position_groups,
            num_buckets=cfg.num_buckets,
            max_bucket_distance=cfg.max_distance,
        )
    )


class Unit(nn.Module):
    def __init__(self, num_in, num_out, size, dilation=1):
        super().__init__()
        self.conv = nn.Conv1d(num_in, num_out, size, 1, size // 2 * dilation, dilation)
        self.bn = nn.BatchNorm1d(num_out)

    def forward(self, x):
        return self.bn(F.relu(self.conv(x)))


class Parts(nn.Module):
    def __init__(self, channels, scale, dilation):
        super().__init__()
        self.width = channels // scale
        convs = [nn.Conv1d(self.width, self.width, 3, 1, dilation, dilation) for _ in range(scale - 1)]
        self.convs = nn.ModuleList(convs)
        self.bns = nn.ModuleList([nn.BatchNorm1d(self.width) for _ in range(scale - 1)])

    def forward(self, x):
        *given, rest = x.split(self.width, dim=1)
        out, before = [], 0
        for x, conv, bn in zip(given, self.convs, self.bns, strict=True):
            before = bn(F.relu(conv(x + before)))
            out.append(before)
        return torch.cat([*out, rest], dim=1)


class Gate(nn.Module):
    def __init__(self, channels, bottleneck):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(channels, bottleneck), nn.Linear(bottleneck, channels)

    def forward(self, x):
        return x * torch.sigmoid(self.linear2(F.relu(self.linear1(x.mean(-1)))))[..., None]


class Block(nn.Module):
    def __init__(self, cfg, dilation):
        super().__init__()
        c = cfg.head_channels
        self.Conv1dReluBn1, self.Conv1dReluBn2 = Unit(c, c, 1), Unit(c, c, 1)
        self.Res2Conv1dReluBn = Parts(c, cfg.res2_scale, dilation)
        self.SE_Connect = Gate(c, cfg.bottleneck)

    def forward(self, x):
        return x + self.SE_Connect(self.Conv1dReluBn2(self.Res2Conv1dReluBn(self.Conv1dReluBn1(x))))


class Pooling(nn.Module):
    def __init__(self, channels, bottleneck):
        super().__init__()
        self.linear1, self.linear2 = nn.Conv1d(channels, bottleneck, 1), nn.Conv1d(bottleneck, channels, 1)

    def forward(self, x):
        weight = torch.softmax(self.linear2(torch.tanh(self.linear1(x))), dim=-1)
        mean = (weight * x).sum(-1)
        var = (weight * x**2).sum(-1) - mean**2
        return torch.cat([mean, var.clamp(min=1e-9).sqrt()], dim=-1)


class Ecapa(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        c = cfg.head_channels
        self.feature_weight = nn.Parameter(torch.zeros(cfg.num_layers + 1))
        self.layer1 = Unit(cfg.width, c, 5)
        self.layer2, self.layer3, self.layer4 = (Block(cfg, d) for d in (2, 3, 4))
        self.conv = nn.Conv1d(3 * c, 3 * c, 1)
        self.pooling = Pooling(3 * c, cfg.bottleneck)
        self.bn = nn.BatchNorm1d(6 * c)
        self.linear = nn.Linear(6 * c, cfg.embedding_size)

    def forward(self, states) -> dict[str, torch.Tensor]:
        weights = torch.softmax(self.feature_weight, dim=0)
        x = sum(w * x for w, x in zip(weights, states, strict=True)).transpose(1, 2) + 1e-6
        found = {"mixed": F.instance_norm(x)}
        found["layer1"] = self.layer1(found["mixed"])
        for i in (2, 3, 4):
            found[f"layer{i}"] = getattr(self, f"layer{i}")(found[f"layer{i - 1}"])
        x = F.relu(self.conv(torch.cat([found[f"layer{i}"] for i in (2, 3, 4)], dim=1)))
        found["pooled"] = self.pooling(x)
        found["embedding"] = self.linear(self.bn(found["pooled"]))
        return found


def public_names_of(wavlm, head) -> dict[str, tuple[nn.Module, str]]:
    names = {public_name(name): (wavlm, name) for name in wavlm.state_dict()}
    return names | {name: (head, name) for name in head.state_dict()}


def forward(wavlm, head, wav) -> dict[str, torch.Tensor]:
    """Groups of one clip [W]; the hidden states are caught where they go into the layers."""
    states, hooks = [], []
    for layer in wavlm.encoder.layers:
        hooks.append(layer.register_forward_pre_hook(lambda _, given: states.append(given[0].clone())))
    out = wavlm(F.layer_norm(wav, wav.shape)[None])
    for hook in hooks:
        hook.remove()
    states.append(out.last_hidden_state)
    features = wavlm.feature_extractor(F.layer_norm(wav, wav.shape)[None])
    return {"features": features, "states": torch.cat(states)} | head(states)


@torch.inference_mode()
def main():
    wavlm, head = backbone(CONFIG).eval(), Ecapa(CONFIG).eval()
    for public, (module, name) in public_names_of(wavlm, head).items():
        x = module.state_dict()[name]
        x.copy_(torch.tensor(tensor_values(f"model.{public}", x.shape)))
    rng = np.random.default_rng(6)
    lengths = np.asarray([1000, 811], np.int32)
    wav = (0.1 * rng.standard_normal((2, 1000)) + 0.02).astype(np.float16)
    out, embeddings = {"wav": wav, "lengths": lengths}, []
    for x, n in zip(wav, lengths, strict=True):
        groups = forward(wavlm, head, torch.from_numpy(x[:n].astype(np.float32)))
        embeddings.append(groups["embedding"])
    for name, x in groups.items():  # of the shorter clip, time before channels
        out[name] = x.numpy() if name == "states" else x[0].numpy().T
    out["embedding"] = torch.cat(embeddings).numpy()
    print(out["embedding"][:, :4], out["states"].shape, [(k, v.std()) for k, v in out.items()])
    with torch.device("meta"):
        wavlm, head = backbone(speaker_wavlm.large_sv()), Ecapa(speaker_wavlm.large_sv())
    print(sum(p.numel() for p in wavlm.parameters()), sum(p.numel() for p in head.parameters()))
    names = public_names_of(wavlm, head)
    shapes = {f"model.{public}": list(m.state_dict()[name].shape) for public, (m, name) in names.items()}
    print(len(shapes))
    np.savez_compressed(
        Path(__file__).with_name("speaker_wavlm.npz"), shapes=np.array(json.dumps(shapes)), **out
    )


if __name__ == "__main__":
    main()
