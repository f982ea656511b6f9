"""Speech to a 256-number speaker embedding: WavLM-large under an ECAPA-TDNN, the judge of speaker similarity (SIM).

Source: WavLM (Chen et al., 2022) and ECAPA-TDNN (Desplanques et al., 2020) as UniSpeech released them fine-tuned for
speaker verification; Seed-TTS and others report the cosine of these embeddings. For evaluation only: 320 M parameters,
copied whole to every device; norms use stored statistics.
Batch: wav [B, W] float32 16 kHz, lengths [B] int32 samples.
Letters: B rows, W samples, N frames (50 Hz), C channels, D width, F MLP width, H heads, E size of a head, L layers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepasmr_jax import nn

NORM_EPS = 1e-5  # of layer, instance and batch norms


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of a WavLM with its ECAPA head; the defaults are the public WavLM-large speaker verification model."""

    conv_channels: int = 512
    conv_kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    width: int = 1024
    mlp_width: int = 4096
    num_layers: int = 24
    num_heads: int = 16
    position_kernel: int = 128
    position_groups: int = 16
    num_buckets: int = 320  # of distances, half of them for keys behind the query
    max_distance: int = 800  # frames; all above share a bucket
    head_channels: int = 512
    res2_scale: int = 8
    bottleneck: int = 128  # of the channel gates and of the pooling's attention
    embedding_size: int = 256
    dtype: str = "float32"  # of the products

    def __post_init__(self):
        nn.check_dtype(self.dtype)
        for name in ("conv_kernels", "conv_strides"):  # lists after a round trip through JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.conv_kernels) != len(self.conv_strides):
            raise ValueError(
                f"conv_kernels {self.conv_kernels} and conv_strides {self.conv_strides} differ in number"
            )
        for what, size, count in (
            ("num_heads", self.width, self.num_heads),
            ("position_groups", self.width, self.position_groups),
            ("res2_scale", self.head_channels, self.res2_scale),
            ("4", self.num_buckets, 4),
        ):
            if size % count:
                raise ValueError(f"{what} = {count} does not divide {size}")

    @property
    def min_samples(self) -> int:
        """Samples that give one frame: 400, which is 25 ms, for the public model."""
        size = 1
        for kernel, stride in zip(self.conv_kernels[::-1], self.conv_strides[::-1], strict=True):
            size = (size - 1) * stride + kernel
        return size


def large_sv() -> Config:
    """WavLM-large fine-tuned for speaker verification (`wavlm_large_finetune.pth`)."""
    return Config()


def num_frames(lengths, cfg: Config):
    """Frames of clips of `lengths` samples (int or array); at least 0."""
    for kernel, stride in zip(cfg.conv_kernels, cfg.conv_strides, strict=True):
        lengths = (lengths - kernel) // stride + 1
    return max(lengths, 0) if isinstance(lengths, int) else jnp.maximum(lengths, 0)


# ---------------------------------------------------------------- WavLM


class Conv(nnx.Module):
    """Convolution along time, kernel [k, in, out], bias [out] if asked for."""

    def __init__(self, size: int, num_in: int, num_out: int, rngs: nnx.Rngs, use_bias: bool = True):
        normal = jax.nn.initializers.he_normal()
        self.kernel = nnx.Param(normal(rngs.params(), (size, num_in, num_out), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(num_out)) if use_bias else None

    def __call__(
        self, x: jax.Array, dtype: str, stride: int = 1, dilation: int = 1, pad: int = 0
    ) -> jax.Array:
        """[B, T, in] to [B, (T + 2 pad - dilation (k - 1) - 1) / stride + 1, out] float32, as one product."""
        size, num_in, num_out = self.kernel.shape
        count = (x.shape[1] + 2 * pad - dilation * (size - 1) - 1) // stride + 1
        x = jnp.pad(x, ((0, 0), (pad, pad + stride), (0, 0)))
        taps = [x[:, i * dilation :][:, : count * stride : stride] for i in range(size)]
        kernel = self.kernel[...].reshape(size * num_in, num_out)
        y = nn.product("btc,cd->btd", jnp.concatenate(taps, -1), kernel, dtype, nn.like(x, None))
        return y if self.bias is None else y + self.bias[...]


class FeatureLayer(nnx.Module):
    """Strided convolution without bias and without padding, layer norm over channels, GELU."""

    def __init__(self, size: int, num_in: int, num_out: int, rngs: nnx.Rngs):
        self.conv, self.norm = Conv(size, num_in, num_out, rngs, use_bias=False), nn.LayerNorm(num_out)

    def __call__(self, x: jax.Array, dtype: str, stride: int) -> jax.Array:
        return jax.nn.gelu(self.norm(self.conv(x, dtype, stride), NORM_EPS), approximate=False)


class PositionConv(nnx.Module):
    """Grouped convolution whose output is added as the position: kernel [k, D / groups, D], bias [D]."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        shape = (cfg.position_kernel, cfg.width // cfg.position_groups, cfg.width)
        self.kernel = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(cfg.width))

    def __call__(self, x: jax.Array, dtype: str) -> jax.Array:
        """[B, N, D], zero in the padding, to [B, N, D]; padding k / 2, of an even k the last result is dropped."""
        kernel = self.kernel[...].astype(dtype)
        if kernel.shape[0] % 2 == 0:  # one tap of zeros in the place of the dropped result
            kernel = jnp.pad(kernel, ((0, 1), (0, 0), (0, 0)))
        y = nn.grouped_conv(x.astype(dtype), kernel, x.shape[-1] // kernel.shape[1])
        return jax.nn.gelu(y.astype(jnp.float32) + self.bias[...], approximate=False)


class Layer(nnx.Module):
    """Self-attention with a gated distance bias and an MLP, each behind a layer norm on a residual."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, options = cfg.width, dict(rngs=rngs)
        self.attn_norm, self.mlp_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        for name in "qkvo":
            setattr(self, name, nn.Linear(d, d, **options))
        self.gate = nn.Linear(d // cfg.num_heads, 8, **options)
        self.gate_scale = nnx.Param(jnp.ones((1, cfg.num_heads, 1, 1)))
        self.up, self.down = nn.Linear(d, cfg.mlp_width, **options), nn.Linear(cfg.mlp_width, d, **options)

    def __call__(self, cfg: Config, x: jax.Array, bias: jax.Array, mask: jax.Array) -> jax.Array:
        """[B, N, D], distance bias [H, N, N] and mask [B, N] to [B, N, D] float32."""
        h = self.attn_norm(x, NORM_EPS)
        q, k, v = (nn.split_heads(f(h, cfg.dtype), cfg.num_heads, None) for f in (self.q, self.k, self.v))
        # [B, N, H, 8]: 4 and 4 are summed
        pair = self.gate(nn.split_heads(h, cfg.num_heads, None), cfg.dtype)
        pair = pair.reshape(*pair.shape[:3], 2, 4, out_sharding=jax.P(*nn.axes_of(pair)[:3], None, None))
        pair = jax.nn.sigmoid(jnp.einsum("bnhgi->gbhn", pair))[..., None]
        factor = pair[0] * (pair[1] * self.gate_scale[...] - 1.0) + 2.0
        batch = nn.axes_of(x)[0]
        rows = jax.P(batch, None, None, None)
        scores = nn.product("bnhe,bshe->bhns", q * q.shape[-1] ** -0.5, k, cfg.dtype, rows)
        scores = jnp.where(mask[:, None, None], scores + factor * bias, nn.MASKED)
        h = nn.product("bhns,bshe->bnhe", jax.nn.softmax(scores, axis=-1), v, cfg.dtype, rows)
        x = x + self.o(nn.merge_heads(h, None), cfg.dtype)
        h = jax.nn.gelu(self.up(self.mlp_norm(x, NORM_EPS), cfg.dtype), approximate=False)
        return x + self.down(h, cfg.dtype)


def distance_bias(table: jax.Array, num: int, max_distance: int) -> jax.Array:
    """Bias [H, N, N] (query, key) out of a table [buckets, H]; keys after the query use its second half.

    Of the buckets of one side, half are for single distances, half for ranges that grow in proportion.
    """
    half = table.shape[0] // 2
    exact = half // 2
    distance = np.arange(num)[None] - np.arange(num)[:, None]
    size = np.abs(distance)
    ratio = np.log(np.maximum(size, exact).astype(np.float32) / np.float32(exact))
    far = exact + (ratio / np.float32(np.log(max_distance / exact)) * (half - exact)).astype(np.int32)
    bucket = np.where(size < exact, size, np.minimum(far, half - 1)) + half * (distance > 0)
    return jnp.take(table.T, jnp.asarray(bucket), axis=1)


# ---------------------------------------------------------------- ECAPA head


class ConvUnit(nnx.Module):
    """Convolution that keeps the length, ReLU, batch norm; the padding is zero before and after."""

    def __init__(self, size: int, num_in: int, num_out: int, rngs: nnx.Rngs):
        self.conv, self.bn = Conv(size, num_in, num_out, rngs), nn.BatchNorm(num_out)

    def __call__(self, x: jax.Array, mask: jax.Array, dtype: str, dilation: int = 1) -> jax.Array:
        pad = dilation * (self.conv.kernel.shape[0] // 2)
        y = self.bn(jax.nn.relu(self.conv(x, dtype, dilation=dilation, pad=pad)))
        return jnp.where(mask[..., None], y, 0.0)


class Res2Block(nnx.Module):
    """ECAPA block: channels in parts, each convolved with the result of the one before added, then gated."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        c, part = cfg.head_channels, cfg.head_channels // cfg.res2_scale
        self.first, self.last = ConvUnit(1, c, c, rngs), ConvUnit(1, c, c, rngs)
        keys = jax.random.split(rngs.params(), cfg.res2_scale - 1)
        self.parts = jax.vmap(lambda key: ConvUnit(3, part, part, nnx.Rngs(key)))(keys)
        self.gate1 = nn.Linear(c, cfg.bottleneck, rngs=rngs)
        self.gate2 = nn.Linear(cfg.bottleneck, c, rngs=rngs)

    def __call__(self, cfg: Config, x: jax.Array, mask: jax.Array, dilation: int) -> jax.Array:
        """[B, N, C] to [B, N, C], zero in the padding."""
        y = self.first(x, mask, cfg.dtype)
        parts = jnp.stack(jnp.split(y, cfg.res2_scale, axis=-1))  # [scale, B, N, C / scale]

        def one(before, step):
            part, unit = step
            y = unit(before + part, mask, cfg.dtype, dilation)
            return y, y

        last = parts[-1]
        _, done = jax.lax.scan(one, jnp.zeros_like(last), (parts[:-1], self.parts))
        y = jnp.concatenate([*(done[i] for i in range(cfg.res2_scale - 1)), last], axis=-1)
        y = self.last(y, mask, cfg.dtype)
        weight = mask[..., None].astype(jnp.float32)
        mean = jnp.sum(y, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1.0)
        gate = jax.nn.sigmoid(self.gate2(jax.nn.relu(self.gate1(mean, cfg.dtype)), cfg.dtype))
        return x + y * gate[:, None]


class Head(nnx.Module):
    """ECAPA-TDNN: layer1, three blocks, conv over all three, attentive statistics, bn, linear."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        options, full = dict(rngs=rngs), 3 * cfg.head_channels
        self.layer1 = ConvUnit(5, cfg.width, cfg.head_channels, rngs)
        self.blocks = nnx.List([Res2Block(cfg, rngs) for _ in range(3)])
        self.conv = nn.Linear(full, full, **options)
        self.pool1, self.pool2 = (
            nn.Linear(full, cfg.bottleneck, **options),
            nn.Linear(cfg.bottleneck, full, **options),
        )
        self.bn = nn.BatchNorm(2 * full)
        self.linear = nn.Linear(2 * full, cfg.embedding_size, **options)

    def __call__(self, cfg: Config, x: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        """[B, N, D], zero in the padding, to layer1 .. layer4 [B, N, C], pooled [B, 6 C] and embedding."""
        found = {"layer1": self.layer1(x, mask, cfg.dtype)}
        for i, block in enumerate(self.blocks, 2):
            found[f"layer{i}"] = block(cfg, found[f"layer{i - 1}"], mask, dilation=i)
        x = jnp.concatenate([found[f"layer{i}"] for i in (2, 3, 4)], axis=-1)
        x = jax.nn.relu(self.conv(x, cfg.dtype))
        scores = self.pool2(jnp.tanh(self.pool1(x, cfg.dtype)), cfg.dtype)
        weight = jax.nn.softmax(jnp.where(mask[..., None], scores, nn.MASKED), axis=1)
        mean = jnp.sum(weight * x, axis=1)
        var = jnp.sum(weight * jnp.square(x), axis=1) - jnp.square(mean)
        found["pooled"] = jnp.concatenate([mean, jnp.sqrt(jnp.maximum(var, 1e-9))], axis=-1)
        found["embedding"] = self.linear(self.bn(found["pooled"]), cfg.dtype)
        return found


class Encoder(nnx.Module):
    """WavLM (features, projection, position, stacked layers), the weights of its hidden states, and the head."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        sizes = (1, *(cfg.conv_channels for _ in cfg.conv_kernels))
        each = zip(cfg.conv_kernels, sizes[:-1], sizes[1:], strict=True)
        self.features = nnx.List([FeatureLayer(k, i, o, rngs) for k, i, o in each])
        self.feature_norm = nn.LayerNorm(cfg.conv_channels)
        self.projection = nn.Linear(cfg.conv_channels, cfg.width, rngs=rngs)
        self.position = PositionConv(cfg, rngs)
        self.distance_table = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (cfg.num_buckets, cfg.num_heads))
        )
        keys = jax.random.split(rngs.params(), cfg.num_layers)
        self.layers = jax.vmap(lambda key: Layer(cfg, nnx.Rngs(key)))(keys)
        self.norm = nn.LayerNorm(cfg.width)
        self.state_weights = nnx.Param(jnp.zeros(cfg.num_layers + 1))
        self.head = Head(cfg, rngs)


def init(cfg: Config, key: jax.Array) -> Encoder:
    """An encoder with random weights on the current mesh, copied whole to every device."""
    return Encoder(cfg, nnx.Rngs(key))


# ---------------------------------------------------------------- functions


def _standardise(wav: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, W, ...] with mean 0 and variance 1 over the valid places of axis 1, zero beyond."""
    mask = mask.reshape(*mask.shape, *[1] * (wav.ndim - 2))
    count = jnp.maximum(jnp.sum(mask.astype(jnp.float32), axis=1, keepdims=True), 1.0)
    centred = jnp.where(mask, wav - jnp.sum(jnp.where(mask, wav, 0.0), axis=1, keepdims=True) / count, 0.0)
    var = jnp.sum(jnp.square(centred), axis=1, keepdims=True) / count
    return centred * jax.lax.rsqrt(var + NORM_EPS)


def layer_groups(
    model: Encoder, cfg: Config, wav: jax.Array, lengths: jax.Array, keep_states: bool = True
) -> dict[str, jax.Array]:
    """What `embed` computes, group by group; frames beyond a row's end hold no meaning.

    Args:
        model, cfg, wav, lengths: as for `embed`.
        keep_states: gives the hidden states too; they need the memory of L + 1 activations.

    Returns:
        features [B, N, C], states [L + 1, B, N, D] (inputs of the layers, then the normed output), mixed [B, N, D]
        (their weighted sum after instance norm), layer1 .. layer4 [B, N, C], pooled [B, 6 C], embedding [B, E].
    """
    wav = _standardise(wav.astype(jnp.float32), nn.length_mask(lengths, wav.shape[1]))
    x = wav[..., None]
    for layer, stride in zip(model.features, cfg.conv_strides, strict=True):
        x = layer(x, cfg.dtype, stride)
    found = {"features": x}
    mask = nn.length_mask(num_frames(lengths, cfg), x.shape[1])
    x = model.projection(model.feature_norm(x, NORM_EPS), cfg.dtype)
    x = jnp.where(mask[..., None], x, 0.0)
    x = x + model.position(x, cfg.dtype)
    bias = distance_bias(model.distance_table[...], x.shape[1], cfg.max_distance)
    weights = jax.nn.softmax(model.state_weights[...])

    def body(carry, step):
        x, mixed = carry
        layer, weight = step
        return (layer(cfg, x, bias, mask), mixed + weight * x), x if keep_states else None

    (x, mixed), states = jax.lax.scan(body, (x, jnp.zeros_like(x)), (model.layers, weights[:-1]))
    x = model.norm(x, NORM_EPS)
    if keep_states:
        found["states"] = jnp.concatenate([states, x[None]])
    # the public model adds 1e-6 here, which the norm takes out again
    found["mixed"] = _standardise(mixed + weights[-1] * x, mask)
    return found | model.head(cfg, found["mixed"], mask)


def embed(model: Encoder, cfg: Config, wav: jax.Array, lengths: jax.Array) -> jax.Array:
    """Speaker embeddings; a row does not depend on its neighbours or its padding. Compare them by cosine.

    Args:
        model: encoder with loaded weights.
        cfg: its config; static under jit.
        wav: [B, W] float32 at 16 kHz, any level.
        lengths: [B] int32, valid samples of each row, at least cfg.min_samples.

    Returns:
        [B, E] float32, not normalised.

    Raises:
        ValueError: if wav is not [B, W] or too short for one frame.
    """
    if wav.ndim != 2 or wav.shape[1] < cfg.min_samples:
        raise ValueError(f"wav has shape {wav.shape}, expected [B, W] with W at least {cfg.min_samples}")
    return layer_groups(model, cfg, wav, lengths, keep_states=False)["embedding"]
