"""Flow-matching decoder of CosyVoice2: speech tokens, a prompt's mel and a speaker vector to the mel of the utterance.

A Transformer encoder with relative positions turns the tokens into a mean mel of two frames a token; a
convolutional U-Net with Transformer blocks (the estimator) gives the velocity from noise (t = 0) to mel (t = 1).
The mel is the log-mel of profile "cv2" as it is. Source: CosyVoice2 (Du et al., 2024) and its public weights; the
estimator is that of Matcha-TTS (Mehta et al., 2024). Differences on purpose: padding is masked everywhere, so a row
of a batch is the row alone, and noise belongs to a frame of a request unless the public noise is asked for.

Batch keys of `loss`: speech_tokens [B, N] int32; num_tokens [B] int32; mel [B, T, M] log-mel in float16 or 32, T = 2 N;
prompt_frames [B] int32 (0: the loss draws a prefix); speaker [B, S] float32, of any length.
Letters: B rows, N tokens (of attention: positions), T mel frames, M mel bins, S speaker vector, D encoder width,
C channels, H heads, E head size.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from deepasmr_jax import audio, nn, ode, programs, sharding, weight_files
from deepasmr_jax.sharding import spec, split_rows

FRAMES_PER_TOKEN = 2
NORM_EPS = 1e-5
LAYER_NORM_EPS = 1e-12  # of the two norms in each encoder layer
AHEAD_TAPS, AHEAD_BACK_TAPS, UPSAMPLE_TAPS, TAPS = 4, 3, 5, 3
REFERENCE_NOISE_FRAMES = 15_000
REFERENCE_NOISE_BINS = 80


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and training settings; the sizes default to the public ones.

    Attributes:
        mel_bins: M.
        num_codes: size of the speech-token vocabulary.
        speaker_size: S.
        width, num_heads, mlp_width: D, heads and MLP of the encoder.
        num_layers, num_up_layers: encoder layers at token rate and at frame rate.
        channels: C, width of the estimator.
        time_width: width of the time embedding.
        num_mid_levels: levels between the first and the last one.
        blocks_per_level: Transformer blocks after the convolutions of each level.
        block_heads, block_head_dim, block_mlp_width: of these blocks.
        chunk_tokens: 0 lets every position attend to all others; otherwise, as in streaming, to chunks of this
            many tokens up to its own (the public model: 25). Frames are in chunks of twice as many.
        chunk_rate: probability that a training batch uses the chunks, where there are any.
        dropout: in the encoder, in training only.
        sigma_min: noise left at t = 1.
        drop_condition: probability that a training row loses mean mel, speaker and prompt together.
        drop_prefix: probability that a training row without a prompt is given no prefix either.
        prefix_max: longest prefix as a fraction of the row.
        dtype: type of the operands of matrix products and convolutions.
        attention_dtype: the same for the products inside attention.
        remat: "none", "full" (recompute each layer or level in the backward pass) or "dots" (keep matrix products).
    """

    mel_bins: int = 80
    num_codes: int = audio.NUM_CODES
    speaker_size: int = 192
    width: int = 512
    num_heads: int = 8
    mlp_width: int = 2048
    num_layers: int = 6
    num_up_layers: int = 4
    channels: int = 256
    time_width: int = 1024
    num_mid_levels: int = 12
    blocks_per_level: int = 4
    block_heads: int = 8
    block_head_dim: int = 64
    block_mlp_width: int = 1024
    chunk_tokens: int = 0
    chunk_rate: float = 0.5
    dropout: float = 0.1
    sigma_min: float = 1e-6
    drop_condition: float = 0.2
    drop_prefix: float = 0.5
    prefix_max: float = 0.3
    dtype: str = "bfloat16"
    attention_dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        for name in ("mel_bins", "num_layers", "num_up_layers", "num_mid_levels", "blocks_per_level"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.width % self.num_heads or self.width % 2:
            raise ValueError(f"width {self.width} must be even and a multiple of num_heads {self.num_heads}")
        if self.chunk_tokens < 0:
            raise ValueError(f"chunk_tokens is {self.chunk_tokens}; use 0 for full attention, or 25")
        for name in ("chunk_rate", "dropout", "sigma_min", "drop_condition", "drop_prefix", "prefix_max"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        nn.check_dtype(self.dtype)
        nn.check_dtype(self.attention_dtype, "attention_dtype")
        if self.remat not in nn.REMAT:
            raise ValueError(f"remat is {self.remat!r}; use one of {', '.join(nn.REMAT)}")


def cosyvoice2(**changes) -> Config:
    """The public `flow.pt`: 112,549,360 parameters."""
    return dataclasses.replace(Config(), **changes)


def tiny(**changes) -> Config:
    """A toy for tests, all parts present."""
    sizes = dict(mel_bins=6, num_codes=20, speaker_size=10, width=32, num_heads=4, mlp_width=48, channels=24)
    counts = dict(num_layers=2, num_up_layers=2, num_mid_levels=3, blocks_per_level=2)
    blocks = dict(time_width=40, block_heads=2, block_head_dim=8, block_mlp_width=48)
    return dataclasses.replace(Config(dtype="float32", **sizes, **counts, **blocks), **changes)


# ---------------------------------------------------------------- modules


class Conv(nnx.Module):
    """1-d convolution without padding of its own, as one product over the taps side by side.

    Weights: kernel [taps, in, out], bias [out]; both replicated.
    """

    def __init__(self, taps: int, num_in: int, num_out: int, *, rngs: nnx.Rngs):
        init = jax.nn.initializers.lecun_normal(in_axis=(0, 1), out_axis=2)
        shape = (taps, num_in, num_out)
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32, out_sharding=spec(None, None, None)))
        self.bias = nnx.Param(jnp.zeros(num_out, jnp.float32, out_sharding=spec(None)))

    def __call__(self, x: jax.Array, dtype: str, before: int, after: int = 0) -> jax.Array:
        """[B, N, in], padded with `before` and `after` zeros -> [B, N, out] for taps - 1 zeros; float32."""
        taps, num_in, num_out = self.kernel.shape
        size = x.shape[1] + before + after - taps + 1
        x = jnp.pad(x.astype(dtype), ((0, 0), (before, after), (0, 0)))
        x = jnp.concatenate([x[:, i : i + size] for i in range(taps)], axis=-1)
        kernel = self.kernel[...].reshape(taps * num_in, num_out)
        return nn.product("bni,io->bno", x, kernel, dtype, nn.like(x, None)) + self.bias[...]


class Embed(nnx.Module):
    """Linear map and norm in front of the encoder layers, scaled by the root of the width."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.linear = nn.Linear(cfg.width, cfg.width, (None, "embed"), rngs=rngs)
        self.norm = nn.LayerNorm(cfg.width)

    def __call__(self, x: jax.Array, dtype: str) -> jax.Array:
        """[B, N, D] -> [B, N, D] float32."""
        return self.norm(self.linear(x, dtype), NORM_EPS) * x.shape[-1] ** 0.5


class RelativeAttention(nnx.Module):
    """Self-attention whose scores depend on content and on the signed distance of query and key.

    score(i, j) = ((q_i + content_bias) . k_j + (q_i + position_bias) . p_(i-j)) / sqrt(E); biases [H, E].
    Source: Transformer-XL (Dai et al., 2019), section 3.3.
    """

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        make = functools.partial(nn.Linear, cfg.width, cfg.width, rngs=rngs)
        self.q = make(("embed", "heads"))
        self.k = make(("embed", "heads"))
        self.v = make(("embed", "heads"))
        self.position = make(("embed", "heads"), use_bias=False)
        self.out = make(("heads", "embed"))
        draw = functools.partial(jax.nn.initializers.glorot_uniform(), dtype=jnp.float32)
        shape = (cfg.num_heads, cfg.width // cfg.num_heads)
        self.content_bias = nnx.Param(draw(rngs.params(), shape, out_sharding=spec("heads", None)))
        self.position_bias = nnx.Param(draw(rngs.params(), shape, out_sharding=spec("heads", None)))

    def __call__(self, x: jax.Array, table: jax.Array, mask: jax.Array, cfg: Config) -> jax.Array:
        """[B, N, D], sinusoids [2N - 1, D] of `distances`, mask [B, 1 or N, N] -> [B, N, D] float32."""
        q, k, v = (nn.split_heads(f(x, cfg.dtype), cfg.num_heads) for f in (self.q, self.k, self.v))
        p = nn.split_heads(self.position(table, cfg.dtype), cfg.num_heads)
        batch, _, heads, _ = nn.axes_of(q)
        split = PartitionSpec(batch, heads, None, None)
        dtype = cfg.attention_dtype
        by_content = nn.product("bnhe,bshe->bhns", q + self.content_bias[...], k, dtype, split)
        by_distance = nn.product("bnhe,phe->bhnp", q + self.position_bias[...], p, dtype, split)
        scores = (by_content + _by_key(by_distance)) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(mask[:, None], scores, nn.MASKED), axis=-1)
        y = nn.product("bhns,bshe->bnhe", weights, v, dtype, PartitionSpec(*nn.axes_of(q)))
        return self.out(nn.merge_heads(y), cfg.dtype)


def _by_key(x: jax.Array) -> jax.Array:
    """Scores by distance [B, H, N, 2N - 1], from N - 1 down, -> scores by key [B, H, N, N]: row i starts at N - 1 - i.

    One column more makes every row one longer than the shift from row to row, so two reshapes do it.
    """
    num_rows, heads, size, _ = x.shape
    split = PartitionSpec(*nn.axes_of(x))
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (1, 0)))
    x = jnp.reshape(x, (num_rows, heads, 2 * size, size), out_sharding=split)[:, :, 1:]
    return jnp.reshape(x, (num_rows, heads, size, 2 * size - 1), out_sharding=split)[..., :size]


def distances(size: int, width: int) -> jax.Array:
    """[2 size - 1, width] float32: sine and cosine, in turn, of the distances size - 1 down to 1 - size."""
    frequencies = (10000.0 ** (-np.arange(0, width, 2) / width)).astype(np.float32)
    angles = jnp.arange(size - 1, -size, -1, dtype=jnp.float32)[:, None] * frequencies
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(2 * size - 1, width)


class EncoderLayer(nnx.Module):
    """Pre-norm Transformer layer with relative positions."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.attention_norm = nn.LayerNorm(cfg.width)
        self.attention = RelativeAttention(cfg, rngs=rngs)
        self.mlp_norm = nn.LayerNorm(cfg.width)
        self.mlp_in = nn.Linear(cfg.width, cfg.mlp_width, ("embed", "mlp"), rngs=rngs)
        self.mlp_out = nn.Linear(cfg.mlp_width, cfg.width, ("mlp", "embed"), rngs=rngs)

    def __call__(self, x, table, mask, cfg: Config, key=None) -> jax.Array:
        """[B, N, D] -> [B, N, D] float32; see `RelativeAttention`."""
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        y = self.attention(self.attention_norm(x, LAYER_NORM_EPS), table, mask, cfg)
        x = x + nn.dropout(y, cfg.dropout, keys[0])
        y = jax.nn.silu(self.mlp_in(self.mlp_norm(x, LAYER_NORM_EPS), cfg.dtype))
        y = self.mlp_out(nn.dropout(y, cfg.dropout, keys[1]), cfg.dtype)
        return x + nn.dropout(y, cfg.dropout, keys[2])


class Encoder(nnx.Module):
    """Speech tokens to the mean mel; `layers` and `up_layers` are stacks of equal layers."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        conv = functools.partial(Conv, num_in=cfg.width, num_out=cfg.width, rngs=rngs)
        # replicated, as in flow.py: 6561 rows divide by no mesh
        table = jax.random.normal(
            rngs.params(), (cfg.num_codes, cfg.width), out_sharding=spec(None, None), dtype=jnp.float32
        )
        self.token_table = nnx.Param(table)
        self.embed = Embed(cfg, rngs=rngs)
        self.ahead = conv(AHEAD_TAPS)
        self.ahead_back = conv(AHEAD_BACK_TAPS)
        self.layers = jax.vmap(lambda r: EncoderLayer(cfg, rngs=r))(rngs.split(cfg.num_layers))
        self.upsample = conv(UPSAMPLE_TAPS)
        self.up_embed = Embed(cfg, rngs=rngs)
        self.up_layers = jax.vmap(lambda r: EncoderLayer(cfg, rngs=r))(rngs.split(cfg.num_up_layers))
        self.norm = nn.LayerNorm(cfg.width)
        self.output = nn.Linear(cfg.width, cfg.mel_bins, ("embed", None), rngs=rngs)

    def embed_tokens(self, speech_tokens: jax.Array, valid: jax.Array, dtype: str) -> jax.Array:
        """[B, N] int32 and the valid tokens [B, N] -> [B, N, D] float32, 0 where not valid."""
        ids = jnp.where(valid, speech_tokens, 0)
        x = self.token_table[...].at[ids].get(out_sharding=PartitionSpec(*nn.axes_of(ids), None))
        # zero only after the bias and the norm of `embed`
        return jnp.where(valid[..., None], self.embed(x, dtype), 0.0)

    def look_ahead(self, x: jax.Array, dtype: str) -> jax.Array:
        """[B, N, D] -> [B, N, D] float32: adds to each token what the next three say."""
        y = jax.nn.leaky_relu(self.ahead(x, dtype, 0, AHEAD_TAPS - 1), 0.01)
        return x + self.ahead_back(y, dtype, AHEAD_BACK_TAPS - 1)

    def to_frames(self, x: jax.Array, dtype: str) -> jax.Array:
        """[B, N, D] -> [B, 2N, D] float32, each position twice, then a convolution that looks back."""
        num_rows, size, width = x.shape
        split = PartitionSpec(*nn.axes_of(x))
        x = jnp.stack([x, x], axis=2)
        x = jnp.reshape(x, (num_rows, FRAMES_PER_TOKEN * size, width), out_sharding=split)
        return self.upsample(x, dtype, UPSAMPLE_TAPS - 1)

    def run(self, layers: EncoderLayer, x, mask, cfg: Config, key=None) -> jax.Array:
        """A stack of layers: [B, N, D], mask [B, 1 or N, N] -> [B, N, D] float32."""
        table = distances(x.shape[1], cfg.width)
        keys = None
        if key is not None and cfg.dropout > 0:
            first, key = jax.random.split(key)
            x = nn.dropout(x, cfg.dropout, first)
            keys = jax.random.split(key, layers.mlp_in.kernel.shape[0])

        def step(x, layer_and_key):
            layer, key = layer_and_key
            return layer(x, table, mask, cfg, key), None

        return jax.lax.scan(_recomputed(step, cfg), x, (layers, keys))[0]

    def __call__(self, speech_tokens, valid, cfg: Config, key=None, is_chunked=None) -> jax.Array:
        """[B, N] int32 and the valid tokens [B, N] -> [B, 2N, M] float32; see `encode`."""
        keys = (None, None) if key is None else jax.random.split(key)
        x = self.look_ahead(self.embed_tokens(speech_tokens, valid, cfg.dtype), cfg.dtype)
        x = self.run(self.layers, x, _attention_mask(valid, cfg.chunk_tokens, is_chunked), cfg, keys[0])
        x = self.up_embed(self.to_frames(x, cfg.dtype), cfg.dtype)
        valid = _frames_of(valid)
        mask = _attention_mask(valid, FRAMES_PER_TOKEN * cfg.chunk_tokens, is_chunked)
        x = self.run(self.up_layers, x, mask, cfg, keys[1])
        return jnp.where(valid[..., None], self.output(self.norm(x, NORM_EPS), cfg.dtype), 0.0)


class Resnet(nnx.Module):
    """Two causal convolutions with norm and Mish, the time added between them, around a linear skip."""

    def __init__(self, cfg: Config, num_in: int, *, rngs: nnx.Rngs):
        size = cfg.channels
        self.first = Conv(TAPS, num_in, size, rngs=rngs)
        self.first_norm = nn.LayerNorm(size)
        self.time = nn.Linear(cfg.time_width, size, ("embed", None), rngs=rngs)
        self.second = Conv(TAPS, size, size, rngs=rngs)
        self.second_norm = nn.LayerNorm(size)
        self.skip = nn.Linear(num_in, size, (None, "embed"), rngs=rngs)

    def __call__(self, x: jax.Array, time: jax.Array, valid: jax.Array, dtype: str) -> jax.Array:
        """[B, T, in], embedded time [B, time_width], valid frames [B, T] -> [B, T, C] float32."""
        valid = valid[..., None]
        x = jnp.where(valid, x, 0.0)
        y = jax.nn.mish(self.first_norm(self.first(x, dtype, TAPS - 1), NORM_EPS))
        y = y + self.time(jax.nn.mish(time), "float32")[:, None]
        y = self.second(jnp.where(valid, y, 0.0), dtype, TAPS - 1)
        y = jnp.where(valid, jax.nn.mish(self.second_norm(y, NORM_EPS)), 0.0)
        return y + self.skip(x, dtype)


class Block(nnx.Module):
    """Pre-norm Transformer block of the estimator, without positions."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        inner = cfg.block_heads * cfg.block_head_dim
        make = functools.partial(nn.Linear, rngs=rngs)
        self.attention_norm = nn.LayerNorm(cfg.channels)
        self.q = make(cfg.channels, inner, ("embed", "heads"), use_bias=False)
        self.k = make(cfg.channels, inner, ("embed", "heads"), use_bias=False)
        self.v = make(cfg.channels, inner, ("embed", "heads"), use_bias=False)
        self.out = make(inner, cfg.channels, ("heads", "embed"))
        self.mlp_norm = nn.LayerNorm(cfg.channels)
        self.mlp_in = make(cfg.channels, cfg.block_mlp_width, ("embed", "mlp"))
        self.mlp_out = make(cfg.block_mlp_width, cfg.channels, ("mlp", "embed"))

    @functools.partial(jax.jit, static_argnums=3)  # traced once for all levels
    def __call__(self, x: jax.Array, mask: jax.Array, cfg: Config) -> jax.Array:
        """[B, T, C], mask [B, 1 or T, T] -> [B, T, C] float32."""
        y = self.attention_norm(x, NORM_EPS)
        q, k, v = (nn.split_heads(f(y, cfg.dtype), cfg.block_heads) for f in (self.q, self.k, self.v))
        y = nn.attention(q, k, v, mask, dtype=cfg.attention_dtype)
        x = x + self.out(nn.merge_heads(y), cfg.dtype)
        y = jax.nn.gelu(self.mlp_in(self.mlp_norm(x, NORM_EPS), cfg.dtype), approximate=False)
        return x + self.mlp_out(y, cfg.dtype)


class Estimator(nnx.Module):
    """Velocity of the mel: one level down, several in the middle, one up that reads the first again.

    `mid_resnets` stacks one entry a level, the `_blocks` one entry a block, level after level.
    """

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        size, num_blocks = cfg.channels, cfg.blocks_per_level

        def blocks(count):
            return jax.vmap(lambda r: Block(cfg, rngs=r))(rngs.split(count))

        self.time_in = nn.Linear(4 * cfg.mel_bins, cfg.time_width, (None, "embed"), rngs=rngs)
        self.time_out = nn.Linear(cfg.time_width, cfg.time_width, ("embed", None), rngs=rngs)
        self.down_resnet = Resnet(cfg, 4 * cfg.mel_bins, rngs=rngs)
        self.down_blocks = blocks(num_blocks)
        self.down_conv = Conv(TAPS, size, size, rngs=rngs)
        self.mid_resnets = jax.vmap(lambda r: Resnet(cfg, size, rngs=r))(rngs.split(cfg.num_mid_levels))
        self.mid_blocks = blocks(cfg.num_mid_levels * num_blocks)
        self.up_resnet = Resnet(cfg, 2 * size, rngs=rngs)
        self.up_blocks = blocks(num_blocks)
        self.up_conv = Conv(TAPS, size, size, rngs=rngs)
        self.last_conv = Conv(TAPS, size, size, rngs=rngs)
        self.last_norm = nn.LayerNorm(size)
        self.output = nn.Linear(size, cfg.mel_bins, ("embed", None), rngs=rngs)

    def embed_time(self, t: jax.Array) -> jax.Array:
        """Flow time [B] in [0, 1] -> [B, time_width] float32; float32 products whatever cfg.dtype."""
        half = self.time_in.kernel.shape[0] // 2
        frequencies = np.exp(-math.log(10000.0) / (half - 1) * np.arange(half)).astype(np.float32)
        angles = 1000.0 * t[:, None] * frequencies
        features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        return self.time_out(jax.nn.silu(self.time_in(features, "float32")), "float32")

    def level(self, resnet: Resnet, blocks: Block, x, time, valid, mask, cfg: Config) -> jax.Array:
        """Convolutions, then a stack of blocks: [B, T, in] -> [B, T, C] float32."""

        def step(x, block):
            return block(x, mask, cfg), None

        return jax.lax.scan(step, resnet(x, time, valid, cfg.dtype), blocks)[0]

    def middle(self, x, time, valid, mask, cfg: Config) -> jax.Array:
        """All middle levels: [B, T, C] -> [B, T, C] float32."""

        def by_level(w):
            shape = (cfg.num_mid_levels, cfg.blocks_per_level, *w.shape[1:])
            return jnp.reshape(w, shape, out_sharding=PartitionSpec(None, *nn.axes_of(w)))

        def step(x, level):
            return self.level(*level, x, time, valid, mask, cfg), None

        levels = self.mid_resnets, jax.tree.map(by_level, self.mid_blocks)
        return jax.lax.scan(_recomputed(step, cfg), x, levels)[0]

    def last(self, x: jax.Array, valid: jax.Array, dtype: str) -> jax.Array:
        """[B, T, C], valid frames [B, T] -> [B, T, M] float32, 0 where not valid."""
        valid = valid[..., None]
        x = self.last_conv(jnp.where(valid, x, 0.0), dtype, TAPS - 1)
        x = jax.nn.mish(self.last_norm(x, NORM_EPS))
        return jnp.where(valid, self.output(x, dtype), 0.0)

    def __call__(self, x, mu, speaker, condition, t, valid, cfg: Config, is_chunked=None) -> jax.Array:
        """Shapes as in `velocity`, but valid frames [B, T] -> [B, T, M] float32."""
        mask = _attention_mask(valid, FRAMES_PER_TOKEN * cfg.chunk_tokens, is_chunked)
        time = self.embed_time(t)
        speaker = jnp.zeros_like(mu) + speaker[:, None]
        level = functools.partial(self.level, time=time, valid=valid, mask=mask, cfg=cfg)
        edge = _recomputed(lambda resnet, blocks, x: level(resnet, blocks, x), cfg)
        x = jnp.concatenate([x, mu, speaker, condition], axis=-1)
        skip = edge(self.down_resnet, self.down_blocks, x)
        x = self.down_conv(jnp.where(valid[..., None], skip, 0.0), cfg.dtype, TAPS - 1)
        x = self.middle(x, time, valid, mask, cfg)
        x = edge(self.up_resnet, self.up_blocks, jnp.concatenate([x, skip], axis=-1))
        x = self.up_conv(jnp.where(valid[..., None], x, 0.0), cfg.dtype, TAPS - 1)
        return self.last(x, valid, cfg.dtype)


class Decoder(nnx.Module):
    """Encoder, estimator and the affine map of the speaker vector."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.speaker = nn.Linear(cfg.speaker_size, cfg.mel_bins, (None, None), rngs=rngs)
        self.encoder = Encoder(cfg, rngs=rngs)
        self.estimator = Estimator(cfg, rngs=rngs)


def init(cfg: Config, key: jax.Array) -> Decoder:
    """A decoder with random weights, float32, sharded over the current mesh.

    Raises:
        ValueError: if the mesh does not divide the heads, the widths or the MLPs.
    """
    sharding.check_fits(
        ("encoder heads", cfg.num_heads, "model"),
        ("block heads", cfg.block_heads, "model"),
        ("encoder MLP width", cfg.mlp_width, "model"),
        ("block MLP width", cfg.block_mlp_width, "model"),
        ("encoder width", cfg.width, "data"),
        ("channels", cfg.channels, "data"),
        ("time width", cfg.time_width, "data"),
    )
    return Decoder(cfg, rngs=nnx.Rngs(params=key))


# ---------------------------------------------------------------- parts of a forward pass


def num_frames(cfg: Config, num_tokens):
    """Mel frames of this many speech tokens, two a token; an int for an int, an array for an array."""
    return num_tokens * FRAMES_PER_TOKEN


def encode(
    model: Decoder, cfg: Config, speech_tokens: jax.Array, num_tokens: jax.Array, key=None, is_chunked=None
) -> jax.Array:
    """Mean mel of speech tokens.

    Args:
        speech_tokens: [B, N] int32 in 0..num_codes-1; anything after a row's num_tokens.
        num_tokens: [B] int32.
        key: dropout key; None for none.
        is_chunked: bool scalar, may be traced: whether the chunks of `cfg.chunk_tokens` are used; None is yes.

    Returns:
        [B, 2N, M] float32; 0 beyond a row's frames.
    """
    valid = nn.length_mask(num_tokens, speech_tokens.shape[1])
    return model.encoder(speech_tokens, valid, cfg, key, is_chunked)


def embed_speaker(model: Decoder, speaker: jax.Array) -> jax.Array:
    """Speaker vectors [B, S] of any length -> [B, M] float32 as `velocity` takes them; a float32 product."""
    square = jnp.sum(speaker * speaker, axis=-1, keepdims=True)
    return model.speaker(speaker * jax.lax.rsqrt(jnp.maximum(square, 1e-24)), "float32")


def velocity(
    model: Decoder,
    cfg: Config,
    x: jax.Array,
    mu: jax.Array,
    speaker: jax.Array,
    condition: jax.Array,
    t: jax.Array,
    frames: jax.Array,
    is_chunked=None,
) -> jax.Array:
    """Velocity of the mel.

    Args:
        x: [B, T, M] float32, the state at time t.
        mu: [B, T, M] float32, from `encode`; 0 for the unconditional branch, like the next two.
        speaker: [B, M] float32, from `embed_speaker`.
        condition: [B, T, M] float32, mel where it is known, 0 elsewhere.
        t: [B] float32 in [0, 1].
        frames: [B] int32, valid frames.
        is_chunked: as in `encode`.

    Returns:
        [B, T, M] float32; 0 beyond a row's frames.
    """
    valid = nn.length_mask(frames, x.shape[1])
    return model.estimator(x, mu, speaker, condition, t, valid, cfg, is_chunked)


# ---------------------------------------------------------------- training


def loss(
    model: Decoder, cfg: Config, batch: dict[str, jax.Array], key: jax.Array
) -> tuple[jax.Array, jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """Flow-matching loss: squared error of the velocity over the frames that the row has to produce.

    A row with a prompt is conditioned on its first prompt_frames frames and pays for the rest, as in flow.py; a
    row without draws a prefix of up to prefix_max of its frames, or none, and pays for all frames, as the public model
    was trained. With `drop_condition` mean mel, speaker and condition are zeroed together; what is paid for stays.
    Written and tested as a loss, but no stage or config uses it yet: the pipeline makes no batch["speaker"].

    Args:
        batch: see the top of this file.
        key: draws time, noise, prefixes, dropped conditions, chunks and dropout, alike on every mesh.

    Returns:
        sum of squared errors, number of values summed, and (sum, count) pairs of the rows with a prompt
        ("prompt_mse") and without ("prefix_mse").

    Raises:
        ValueError: if the mel has not the frames of the tokens, or the speaker vector another size.

    Source: CosyVoice (Du et al., 2024), section 2.3, and the public training code, with uniform times.
    """
    batch = jax.tree.map(split_rows, batch)
    mel, prompt, num_tokens = batch["mel"].astype(jnp.float32), batch["prompt_frames"], batch["num_tokens"]
    _check_inputs(cfg, batch["speech_tokens"], mel, "mel", batch["speaker"])
    num_rows, length, _ = mel.shape
    names = ("t", "noise", "prefix", "no_prefix", "condition", "chunk", "dropout")
    keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))

    def uniform(name):
        return jax.random.uniform(keys[name], (num_rows,), out_sharding=spec("batch"))

    frames = num_frames(cfg, num_tokens)
    valid = nn.length_mask(frames, length)
    longest = jnp.floor(cfg.prefix_max * frames)
    prefix = jnp.floor(uniform("prefix") * (longest + 1)).astype(jnp.int32)
    prefix = jnp.where(uniform("no_prefix") < cfg.drop_prefix, 0, prefix)
    known = nn.length_mask(jnp.where(prompt > 0, prompt, prefix), length) & valid
    wanted = valid & ~nn.length_mask(prompt, length)

    data = jnp.where(valid[..., None], mel, 0.0)
    noise = jax.random.normal(keys["noise"], mel.shape, out_sharding=spec("batch", "frames", "mel"))
    t = uniform("t")
    rest = 1.0 - cfg.sigma_min
    state = (1.0 - rest * t[:, None, None]) * noise + t[:, None, None] * data

    is_chunked = jax.random.bernoulli(keys["chunk"], cfg.chunk_rate) if cfg.chunk_tokens else None
    kept = (uniform("condition") >= cfg.drop_condition)[:, None]
    mu = encode(model, cfg, batch["speech_tokens"], num_tokens, keys["dropout"], is_chunked)
    mu = jnp.where(kept[..., None], mu, 0.0)
    speaker = jnp.where(kept, embed_speaker(model, batch["speaker"]), 0.0)
    condition = jnp.where((known & kept)[..., None], data, 0.0)
    found = velocity(model, cfg, state, mu, speaker, condition, t, frames, is_chunked)

    error = jnp.where(wanted[..., None], found - (data - rest * noise), 0.0)
    sums = jnp.sum(error * error, axis=(1, 2))
    counts = (jnp.sum(wanted, axis=1) * cfg.mel_bins).astype(jnp.float32)
    has_prompt = prompt > 0

    def part(rows):
        return jnp.sum(jnp.where(rows, sums, 0.0)), jnp.sum(jnp.where(rows, counts, 0.0))

    return jnp.sum(sums), jnp.sum(counts), {"prompt_mse": part(has_prompt), "prefix_mse": part(~has_prompt)}


# ---------------------------------------------------------------- sampling


def reference_noise(num_frames: int) -> np.ndarray:
    """The one noise with which the public model starts every utterance, to 5e-7.

    It is what PyTorch draws on a CPU after seed 0 for 80 bins and 15,000 frames: Box-Muller on the 24 low bits of
    MT19937, in runs of eight pairs.

    Args:
        num_frames: T, at most 15,000 (300 s).

    Returns:
        [T, 80] float32.

    Raises:
        ValueError: if more frames are asked for.
    """
    if not 0 <= num_frames <= REFERENCE_NOISE_FRAMES:
        raise ValueError(
            f"the reference noise has {REFERENCE_NOISE_FRAMES} frames, {num_frames} are asked for; "
            "use shorter chunks or noise=None"
        )
    shape = (REFERENCE_NOISE_BINS, REFERENCE_NOISE_FRAMES)
    bits = np.random.RandomState(0).randint(0, 2**32, shape[0] * shape[1], dtype=np.uint32)
    uniform = ((bits & (2**24 - 1)) / np.float32(2**24)).astype(np.float32).reshape(-1, 2, 8)
    radius = np.sqrt(-2 * np.log1p(-uniform[:, 0]))
    angle = np.float32(2 * np.pi) * uniform[:, 1]
    noise = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(shape)
    return np.ascontiguousarray(noise[:, :num_frames].T)


def read_noise(path, mel_bins: int = REFERENCE_NOISE_BINS) -> np.ndarray:
    """A fixed noise from a safetensors or PyTorch file, of which nothing is executed.

    Args:
        path: file with one tensor [1, M, T] or [M, T], alone or in a dictionary; among several the one that is called
            "rand_noise", as in the public decoder.
        mel_bins: M.

    Returns:
        [T, M] float32.

    Raises:
        ValueError: if the file cannot be read, has no such tensor, or one that is not finite.
    """
    tree = weight_files.read_tree(path)
    named = tree if isinstance(tree, Mapping) else {"rand_noise": tree}
    arrays = {name: x for name, x in named.items() if isinstance(x, np.ndarray)}
    if len(arrays) > 1:
        arrays = {name: x for name, x in arrays.items() if name.split(".")[-1] == "rand_noise"}
    found = [x[0] if x.ndim == 3 and len(x) == 1 else x for x in arrays.values()]
    if len(found) != 1 or found[0].ndim != 2 or len(found[0]) != mel_bins or not found[0].size:
        shapes = ", ".join(f"{k} {x.shape}" for k, x in arrays.items()) or "none"
        raise ValueError(
            f"{path} holds no noise (tensors that may be one: {shapes}); save one tensor of (1, {mel_bins}, frames)"
        )
    noise = np.ascontiguousarray(found[0].T, np.float32)
    if not np.isfinite(noise).all():
        raise ValueError(f"{path} holds a noise that is not finite; save it again")
    return noise


def sample(
    model: Decoder,
    cfg: Config,
    speech_tokens: jax.Array,
    num_tokens: jax.Array,
    prompt_mel: jax.Array,
    prompt_frames: jax.Array,
    *,
    keys: jax.Array | None = None,
    speaker: jax.Array,
    num_steps: int = 10,
    guidance: float = 0.7,
    method: str = "euler",
    schedule: str | float = "cosine",
    noise: jax.Array | str | None = None,
) -> jax.Array:
    """Mel of speech tokens in the voice of a prompt; one compiled program per shape and solver setting.

    A row depends on its own inputs and key only, whatever its neighbours, the batch size and the padding.
    The frames of the prompt are generated too: cut them off or write the prompt over them.

    Args:
        speech_tokens: [B, N] int32, the prompt's tokens first, then those to speak.
        num_tokens: [B] int32, valid tokens of each row, prompt included.
        prompt_mel: [B, T, M] float32 log-mel, T = 2 N; read up to prompt_frames only.
        prompt_frames: [B] int32; 0 for no prompt.
        keys: [B] typed random keys; not read where `noise` is given.
        speaker: [B, S] float32, of any length.
        num_steps: solver steps.
        guidance: w in v = v_cond + w (v_cond - v_null); 0 skips the second half of the work.
        method: "euler" or "midpoint".
        schedule: see `ode.time_grid`.
        noise: None draws the start from `keys`; "reference" is `reference_noise` and an array [T or more, M] is itself,
            for all rows alike.

    Returns:
        [B, T, M] float32 log-mel; 0 beyond a row's frames.

    Raises:
        ValueError: if prompt_mel has not the frames of N tokens, if speaker or noise do not fit, without keys
            and noise, or on an unknown method or schedule.

    Source: CosyVoice2's 10 steps with guidance 0.7.
    """
    _check_inputs(cfg, speech_tokens, prompt_mel, "prompt_mel", speaker)
    length = prompt_mel.shape[1]
    if isinstance(noise, str):
        if noise != "reference":
            raise ValueError(f"noise is {noise!r}; use 'reference', an array or None")
        noise = reference_noise(length)
    if noise is not None:
        if noise.ndim != 2 or noise.shape[0] < length or noise.shape[1] != cfg.mel_bins:
            raise ValueError(
                f"noise is {tuple(noise.shape)}; it needs {(length, cfg.mel_bins)} or more frames"
            )
        keys, noise = None, jnp.asarray(noise[:length], jnp.float32)
    elif keys is None:
        raise ValueError("keys are None; give one key a row, or noise='reference'")
    grid = jnp.asarray(ode.time_grid(num_steps, schedule))
    inputs = (speech_tokens, num_tokens, prompt_mel, prompt_frames, speaker)
    return _sample(
        model, cfg, inputs, keys, noise, grid, jnp.float32(guidance), ode.is_guided(guidance), method
    )


@programs.kept("cfg", "is_guided", "method")
def _sample(model, cfg, inputs, keys, noise, grid, guidance, is_guided, method):
    speech_tokens, num_tokens, prompt_mel, prompt_frames, speaker = map(split_rows, inputs)
    length = prompt_mel.shape[1]
    frames = num_frames(cfg, num_tokens)
    known = nn.length_mask(jnp.minimum(prompt_frames, frames), length)
    condition = jnp.where(known[..., None], prompt_mel, 0.0)

    if noise is None:
        start = ode.frame_noise(keys, length, cfg.mel_bins)
    else:
        start = jnp.zeros_like(condition) + noise
    mu, voice = encode(model, cfg, speech_tokens, num_tokens), embed_speaker(model, speaker)
    given, null = (mu, voice, condition, frames), None
    if is_guided:
        null = *(jnp.zeros_like(x) for x in (mu, voice, condition)), frames

    def of_state(x, t, mu, voice, condition, frames):
        return velocity(model, cfg, x, mu, voice, condition, t, frames)

    x = ode.integrate(ode.guided(of_state, given, null, guidance), start, grid, method)
    return jnp.where(nn.length_mask(frames, length)[..., None], x, 0.0)


# ---------------------------------------------------------------- small helpers


def _attention_mask(valid: jax.Array, chunk: int, is_chunked) -> jax.Array:
    """[B, N] -> [B, 1, N], or with chunks [B, N, N]: all valid positions up to the end of the query's chunk."""
    mask = valid[:, None]
    if not chunk:
        return mask
    place = jnp.arange(valid.shape[1]) // chunk
    allowed = place[None] <= place[:, None]
    return mask & (allowed if is_chunked is None else allowed | ~is_chunked)[None]


def _frames_of(valid: jax.Array) -> jax.Array:
    """Valid tokens [B, N] -> valid frames [B, 2N]."""
    return nn.length_mask(FRAMES_PER_TOKEN * jnp.sum(valid, axis=1), FRAMES_PER_TOKEN * valid.shape[1])


def _recomputed(step, cfg: Config):
    """The function, computed anew in the backward pass as `cfg.remat` says."""
    return step if cfg.remat == "none" else jax.checkpoint(step, policy=nn.REMAT[cfg.remat])


def _check_inputs(cfg: Config, speech_tokens, mel, name: str, speaker) -> None:
    num_tokens = speech_tokens.shape[1]
    ode.check_mel(mel, num_frames(cfg, num_tokens), cfg.mel_bins, num_tokens, name)
    if speaker.shape != (speech_tokens.shape[0], cfg.speaker_size):
        raise ValueError(
            f"speaker is {tuple(speaker.shape)}, but the model takes {(speech_tokens.shape[0], cfg.speaker_size)}; "
            "its vectors come from another speaker encoder"
        )
