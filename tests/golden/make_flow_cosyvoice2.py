"""Makes flow_cosyvoice2.npz: the flow decoder of CosyVoice2 at toy size, written independently with PyTorch.

Run from the repository root: python tests/golden/make_flow_cosyvoice2.py
tests/test_parity_full.py runs the same network at full size.

The reference reads weights by their public names, as `public_names.to_theirs` gives them, and runs every row alone,
without padding. Stored are inputs, the outputs of every group of layers, and the mel after ten steps.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from test_flow_cosyvoice2 import CHUNKED, TINY, make  # noqa: E402

from deepasmr_jax import checkpoint, public_cosyvoice2, public_names, sharding  # noqa: E402

SEED = 3


class Weights:
    """A state dict and a prefix: `w("name")` is a tensor, `w.at("part")` the same dict further down."""

    def __init__(self, tensors: dict[str, torch.Tensor], prefix: str = ""):
        self.tensors, self.prefix = tensors, prefix

    def __call__(self, name: str) -> torch.Tensor:
        return self.tensors[self.prefix + name]

    def at(self, name) -> "Weights":
        return Weights(self.tensors, f"{self.prefix}{name}.")

    def pair(self, name: str):
        return self(f"{name}.weight"), self.tensors.get(f"{self.prefix}{name}.bias")

    def linear(self, name: str, x):
        return F.linear(x, *self.pair(name))

    def norm(self, name: str, x, eps: float = 1e-5):
        return F.layer_norm(x, x.shape[-1:], *self.pair(name), eps)

    def conv(self, name: str, x, before: int, after: int = 0):
        """[N, in] to [N, out]."""
        y = F.pad(x.T[None], (before, after))
        return F.conv1d(y, *self.pair(name))[0].T


def visible(size: int, chunk: int) -> torch.Tensor:
    """[size, size]: may query i see key j."""
    if not chunk:
        return torch.ones(size, size, dtype=torch.bool)
    at = torch.arange(size) // chunk
    return at[None, :] <= at[:, None]


def relative_attention(w: Weights, x, allowed, heads: int):
    size, width = x.shape
    each = width // heads

    def split(name):
        return w.linear(name, x).view(size, heads, each).transpose(0, 1)

    q, k, v = (split(f"linear_{n}") for n in "qkv")
    distance = torch.arange(size)[:, None] - torch.arange(size)[None, :]
    angle = distance[..., None].double() / 10000 ** (torch.arange(0, width, 2).double() / width)
    sinusoid = torch.zeros(size, size, width)
    sinusoid[..., 0::2], sinusoid[..., 1::2] = angle.sin().float(), angle.cos().float()
    p = w.linear("linear_pos", sinusoid).view(size, size, heads, each)
    content = (q + w("pos_bias_u")[:, None]) @ k.transpose(1, 2)
    position = torch.einsum("hie,ijhe->hij", q + w("pos_bias_v")[:, None], p)
    scores = ((content + position) / math.sqrt(each)).masked_fill(~allowed, -math.inf)
    y = scores.softmax(-1) @ v
    return w.linear("linear_out", y.transpose(0, 1).reshape(size, width))


def encoder_layers(w: Weights, count: int, x, allowed, heads: int):
    for i in range(count):
        layer = w.at(i)
        x = x + relative_attention(layer.at("self_attn"), layer.norm("norm_mha", x, 1e-12), allowed, heads)
        y = F.silu(layer.linear("feed_forward.w_1", layer.norm("norm_ff", x, 1e-12)))
        x = x + layer.linear("feed_forward.w_2", y)
    return x


def encode(w: Weights, cfg, tokens) -> dict[str, torch.Tensor]:
    """Every stage of the encoder for one row of tokens [N]."""
    e, scale, out = w.at("encoder"), math.sqrt(cfg.width), {}
    x = w("input_embedding.weight")[tokens]
    x = out["embed"] = e.norm("embed.out.1", e.linear("embed.out.0", x)) * scale
    y = F.leaky_relu(e.conv("pre_lookahead_layer.conv1", x, 0, 3), 0.01)
    x = out["look_ahead"] = x + e.conv("pre_lookahead_layer.conv2", y, 2)
    x = encoder_layers(e.at("encoders"), cfg.num_layers, x, visible(len(x), cfg.chunk_tokens), cfg.num_heads)
    out["layers"] = x
    x = out["frames"] = e.conv("up_layer.conv", x.repeat_interleave(2, 0), 4)
    x = out["up_embed"] = e.norm("up_embed.out.1", e.linear("up_embed.out.0", x)) * scale
    allowed = visible(len(x), 2 * cfg.chunk_tokens)
    x = out["up_layers"] = encoder_layers(e.at("up_encoders"), cfg.num_up_layers, x, allowed, cfg.num_heads)
    out["mu"] = w.linear("encoder_proj", e.norm("after_norm", x))
    return out


def causal_block(w: Weights, x):
    return F.mish(w.norm("block.2", w.conv("block.0", x, 2)))


def resnet(w: Weights, x, time):
    y = causal_block(w.at("block1"), x)
    y = causal_block(w.at("block2"), y + w.linear("mlp.1", F.mish(time)))
    return y + w.conv("res_conv", x, 0)


def transformer(w: Weights, x, allowed, heads: int):
    y = w.norm("norm1", x)
    q, k, v = (
        w.linear(f"attn1.to_{n}", y).view(len(x), heads, -1).transpose(0, 1)[None] for n in ("q", "k", "v")
    )
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)[0].transpose(0, 1).flatten(1)
    x = x + w.linear("attn1.to_out.0", y)
    return x + w.linear("ff.net.2", F.gelu(w.linear("ff.net.0.proj", w.norm("norm3", x))))


def estimate(w: Weights, cfg, x, mu, speaker, condition, t) -> dict[str, torch.Tensor]:
    """Every stage of the estimator for one row; arrays [T, M], speaker [M], t a scalar."""
    w, out = w.at("decoder.estimator"), {}
    half = 2 * cfg.mel_bins
    angle = 1000 * t * torch.exp(torch.arange(half).float() * -(math.log(10000) / (half - 1)))
    features = torch.cat([angle.sin(), angle.cos()])
    time = out["time"] = w.linear("time_mlp.linear_2", F.silu(w.linear("time_mlp.linear_1", features)))
    allowed = visible(len(x), 2 * cfg.chunk_tokens)

    def blocks(w, x):
        for i in range(cfg.blocks_per_level):
            x = transformer(w.at(i), x, allowed, cfg.block_heads)
        return x

    x = torch.cat([x, mu, speaker.expand(len(x), -1), condition], dim=1)
    down, up = w.at("down_blocks.0"), w.at("up_blocks.0")
    x = out["down_resnet"] = resnet(down.at(0), x, time)
    x = out["down"] = skip = blocks(down.at(1), x)
    x = out["down_conv"] = down.conv("2", x, 2)
    for i in range(cfg.num_mid_levels):
        level = w.at(f"mid_blocks.{i}")
        x = blocks(level.at(1), resnet(level.at(0), x, time))
    out["middle"] = x
    x = blocks(up.at(1), resnet(up.at(0), torch.cat([x, skip], dim=1), time))
    x = out["up"] = up.conv("2", x, 2)
    out["velocity"] = w.conv("final_proj", causal_block(w.at("final_block"), x), 0)
    return out


def sample(w: Weights, cfg, tokens, prompt, speaker, noise, steps: int = 10, guidance: float = 0.7):
    """Mel [T, M] of one row; prompt [P, M]."""
    mu = encode(w, cfg, tokens)["mu"]
    voice = w.linear("spk_embed_affine_layer", speaker / speaker.norm())
    condition = torch.zeros_like(mu)
    condition[: len(prompt)] = prompt
    none, no_voice = torch.zeros_like(mu), torch.zeros_like(voice)
    times = [1 - math.cos(math.pi / 2 * i / steps) for i in range(steps + 1)]
    x = noise[: len(mu)]
    for now, then in zip(times[:-1], times[1:], strict=True):
        t = torch.tensor(now, dtype=torch.float32)
        given = estimate(w, cfg, x, mu, voice, condition, t)["velocity"]
        free = estimate(w, cfg, x, none, no_voice, none, t)["velocity"]
        x = x + (then - now) * ((1 + guidance) * given - guidance * free)
    return x


def public_weights(model, cfg) -> Weights:
    arrays = {name: np.asarray(x) for name, x in checkpoint.named_arrays(model).items()}
    theirs = public_names.to_theirs(public_cosyvoice2.flow_cosyvoice2(cfg), arrays)
    return Weights({name: torch.tensor(x) for name, x in theirs.items()})


def random_inputs(cfg, lengths, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of rows with these token counts, padded with numbers that must not be read."""
    rng = np.random.default_rng(seed)
    rows, most = len(lengths), max(lengths)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "tokens": rng.integers(0, cfg.num_codes, (rows, most)).astype(np.int32),
        "num_tokens": np.array(lengths, np.int32),
        "prompt_mel": normal(rows, 2 * most, cfg.mel_bins),
        "prompt_frames": np.array([n // 2 for n in lengths], np.int32),
        "speaker": 3 * normal(rows, cfg.speaker_size),
        "noise": normal(2 * most, cfg.mel_bins),
        "x": normal(rows, 2 * most, cfg.mel_bins),
        "mu": normal(rows, 2 * most, cfg.mel_bins),
        "voice": normal(rows, cfg.mel_bins),
        "t": np.linspace(0.2, 0.8, rows).astype(np.float32),
    }


def reference(w: Weights, cfg, data, row: int) -> dict[str, torch.Tensor]:
    """All groups of one row, cut to its length."""
    n = int(data["num_tokens"][row])
    at = {name: torch.tensor(x[row]) for name, x in data.items() if name != "noise"}
    cut = {name: at[name][: 2 * n] for name in ("x", "mu", "prompt_mel")}
    prompt = at["prompt_mel"][: at["prompt_frames"]]
    condition = torch.zeros_like(cut["x"])
    condition[: len(prompt)] = prompt
    out = {f"encoder.{k}": x for k, x in encode(w, cfg, at["tokens"][:n].long()).items()}
    parts = estimate(w, cfg, cut["x"], cut["mu"], at["voice"], condition, at["t"])
    out |= {f"estimator.{k}": x for k, x in parts.items()}
    out["speaker"] = w.linear("spk_embed_affine_layer", at["speaker"] / at["speaker"].norm())
    noise = torch.tensor(data["noise"])
    out["mel"] = sample(w, cfg, at["tokens"][:n].long(), prompt, at["speaker"], noise)
    return out


def store() -> None:
    data = random_inputs(TINY, (7, 5))
    out = dict(data)
    for name, cfg in (("whole", TINY), ("chunked", CHUNKED)):
        w = public_weights(make(cfg, SEED), cfg)
        with torch.no_grad():
            for row in range(2):
                for key, x in reference(w, cfg, data, row).items():
                    out[f"{name}.{row}.{key}"] = x.numpy()
    torch.manual_seed(0)
    noise = torch.randn(1, 80, 50 * 300)[0].T.numpy()
    out["torch_noise_ends"] = np.stack([noise[:4, :4], noise[-4:, -4:]])
    path = Path(__file__).with_name("flow_cosyvoice2.npz")
    np.savez_compressed(path, **out)
    print(path.stat().st_size, {k: (x.shape, float(np.std(x))) for k, x in out.items() if "0." in k})


if __name__ == "__main__":
    sharding.make_mesh()
    store()
