"""Flow-matching decoder: speech tokens and a prompt's mel to the mel of the whole utterance.

The network is DeepASMR's acoustic decoder: a Transformer of the E2 TTS family with U-Net skips, with speech
tokens in place of text (E2 TTS, Eskimez et al., 2024, as released in F5-TTS, Chen et al., 2024). It predicts
the velocity of a straight path from noise (t = 0) to mel (t = 1); training is infilling as in Voicebox (Le et
al., 2023).

Batch keys of `loss`: speech_tokens [B, N] int32; num_tokens [B] int32; mel [B, T, M] log-mel in float16 or 32, T the
frames of N tokens; prompt_frames [B] int32 (0: the loss draws an infilling span).
Letters: B rows, N tokens, T mel frames, M mel bins, P positions (T / patch_frames, rounded up),
F values of a position (patch_frames * M), D width, H heads, E head size, L layers.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from deepasmr_jax import audio, nn, ode, programs, sharding
from deepasmr_jax.sharding import spec, split_rows

TIME_FEATURES = 256  # sinusoids of the flow time, E2 TTS


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and training settings of the flow decoder.

    Attributes:
        mel_bins: M.
        frames_per_token: mel frames per speech token as (numerator, denominator): (2, 1) at 50 Hz,
            (441, 128) for 22.05 kHz / 256, (15, 4) for 24 kHz / 256.
        mel_mean, mel_std: scalars that make the log-mel about zero mean and unit variance inside the network.
        patch_frames: mel frames side by side in one position of the Transformer.
        num_codes: size of the speech-token vocabulary; the table has one filler row more, at index 0.
        token_width: size of a token's embedding.
        width, num_layers, num_heads, head_dim, mlp_ratio: the Transformer; num_layers is even.
        rotary_heads: heads that see rotary positions; None is all of them, 1 is the released E2 TTS.
        rotary_base: wavelength base of the rotary positions.
        conv_kernel, conv_groups: the convolutional position term.
        qk_norm: RMS norm of every query and key head before the rotary positions.
        dropout: after attention and inside the MLP, in training only.
        sigma_min: noise left at t = 1.
        drop_audio: probability that a training row loses its mel condition.
        drop_both: probability that a training row loses mel condition and tokens (the guidance branch).
        span_min: least fraction of the frames that an infilling span covers; the most is 1.
        train_schedule: density of flow times in training: "uniform" (F5/E2) or "cosine", t = 1 - cos(pi u / 2)
            for uniform u, which spends most steps where the shape of the mel is still open (CosyVoice2).
        dtype: type of the operands of matrix products.
        attention_dtype: the same for the two products inside attention.
        activation_dtype: type of what is kept between products in the layers.
        remat: "none", "full" (recompute each layer in the backward pass) or "dots" (keep matrix products).
        unroll: layers per iteration of the loop over layers; 1 compiles fastest.
    """

    mel_bins: int = 80
    frames_per_token: tuple[int, int] = (2, 1)
    mel_mean: float = 0.0
    mel_std: float = 1.0
    patch_frames: int = 1
    num_codes: int = audio.NUM_CODES
    token_width: int = 512
    width: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    head_dim: int = 64
    mlp_ratio: int = 4
    rotary_heads: int | None = None
    rotary_base: float = 10000.0
    conv_kernel: int = 31
    conv_groups: int = 16
    qk_norm: bool = False
    dropout: float = 0.0
    sigma_min: float = 1e-6  # CosyVoice2; Voicebox 1e-5, F5/E2 0
    drop_audio: float = 0.3  # F5/E2
    drop_both: float = 0.2  # F5/E2
    span_min: float = 0.7  # F5/E2, Voicebox
    train_schedule: str = "uniform"
    dtype: str = "bfloat16"
    attention_dtype: str = "float32"
    activation_dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1

    def __post_init__(self):
        object.__setattr__(self, "frames_per_token", tuple(int(n) for n in self.frames_per_token))
        if len(self.frames_per_token) != 2 or min(self.frames_per_token) < 1:
            raise ValueError(
                f"frames_per_token is {self.frames_per_token}; give two positive integers, (2, 1)"
            )
        if self.num_layers < 2 or self.num_layers % 2:
            raise ValueError(
                f"num_layers is {self.num_layers}; the U-Net skips need an even number, at least 2"
            )
        if self.width % self.conv_groups:
            raise ValueError(f"conv_groups {self.conv_groups} does not divide width {self.width}; change one")
        if self.conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel is {self.conv_kernel}; it must be odd")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even number")
        if self.patch_frames < 1:
            raise ValueError(f"patch_frames is {self.patch_frames}; it must be at least 1")
        if self.mel_std <= 0:
            raise ValueError(f"mel_std is {self.mel_std}; it must be positive")
        for name in ("drop_audio", "drop_both", "dropout", "span_min", "sigma_min"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        nn.check_dtype(self.dtype)
        nn.check_dtype(self.attention_dtype, "attention_dtype")
        nn.check_dtype(self.activation_dtype, "activation_dtype")
        if self.train_schedule not in ("uniform", "cosine"):
            raise ValueError(f"train_schedule is {self.train_schedule!r}; use 'uniform' or 'cosine'")
        if self.remat not in nn.REMAT:
            raise ValueError(f"remat is {self.remat!r}; use one of {', '.join(nn.REMAT)}")


def deepasmr(**changes) -> Config:
    """24 layers of width 1024 on 80-band mel at 50 Hz: the decoder of DeepASMR, 336,936,016 parameters.

    The normalisation is about that of LJSpeech in Matcha-TTS; set it to the corpus where that is known.
    """
    return dataclasses.replace(Config(mel_mean=-5.5, mel_std=2.1, dropout=0.1), **changes)


def e2tts_base(**changes) -> Config:
    """The shape of the released E2TTS_Base, 333,470,444 parameters.

    Its characters take the place of speech tokens: one per frame, -1 (filler) after the end of the text.
    """
    base = Config(
        mel_bins=100, frames_per_token=(1, 1), num_codes=2545, token_width=100, rotary_heads=1, sigma_min=0.0
    )
    return dataclasses.replace(base, **changes)


def mini(**changes) -> Config:
    """The built-in model: width 256, 6 layers, one position per token of two 20 ms frames.

    It is never asked to speak without a prompt, and its training is short: conditions are dropped less often.
    """
    sizes = dict(patch_frames=2, token_width=128, width=256, num_layers=6, num_heads=4)
    training = dict(drop_audio=0.1, drop_both=0.1, train_schedule="cosine")
    base = Config(mel_mean=-5.5, mel_std=2.1, **training, **sizes)
    return dataclasses.replace(base, **changes)


class ScaleNorm(nnx.Module):
    """`x / |x| * sqrt(D) * scale`: RMS norm with no constant inside the root, as in E2 TTS; float32."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32, out_sharding=spec(None)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D] float32; a zero vector stays zero."""
        x = x.astype(jnp.float32)
        square = jnp.sum(x * x, axis=-1, keepdims=True)
        # the bound is on the square: E2 TTS bounds the length by 1e-12
        return x * (jax.lax.rsqrt(jnp.maximum(square, 1e-24)) * x.shape[-1] ** 0.5) * self.scale[...]


class GroupedConv(nnx.Module):
    """Grouped 1-d convolution with zero padding that keeps the length.

    Weights: kernel [taps, D / groups, D], bias [D]; both replicated.
    """

    def __init__(self, width: int, kernel: int, groups: int, *, rngs: nnx.Rngs):
        init = jax.nn.initializers.lecun_normal(in_axis=(0, 1), out_axis=2)
        shape = (kernel, width // groups, width)
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32, out_sharding=spec(None, None, None)))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32, out_sharding=spec(None)))
        self.groups = groups

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, P, D] -> [B, P, D] float32."""
        return nn.grouped_conv(x, self.kernel[...], self.groups) + self.bias[...]


class Attention(nnx.Module):
    """Bidirectional self-attention with biases and interleaved rotary positions."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        inner = cfg.num_heads * cfg.head_dim
        make = functools.partial(nn.Linear, rngs=rngs)
        self.query = make(cfg.width, inner, ("embed", "heads"))
        self.key = make(cfg.width, inner, ("embed", "heads"))
        self.value = make(cfg.width, inner, ("embed", "heads"))
        self.out = make(inner, cfg.width, ("heads", "embed"))
        if cfg.qk_norm:
            self.query_norm = nn.RMSNorm(cfg.head_dim)
            self.key_norm = nn.RMSNorm(cfg.head_dim)

    def __call__(self, x: jax.Array, mask: jax.Array, cfg: Config) -> jax.Array:
        """[B, P, D] and the valid positions [B, P] -> [B, P, D] in cfg.activation_dtype."""
        types = cfg.dtype, cfg.activation_dtype
        q, k, v = (nn.split_heads(f(x, *types), cfg.num_heads) for f in (self.query, self.key, self.value))
        if cfg.qk_norm:
            q, k = self.query_norm(q).astype(q.dtype), self.key_norm(k).astype(k.dtype)
        positions = jnp.arange(x.shape[1])[None]

        def rotate(y):
            turned = nn.rotary(y, positions, cfg.rotary_base, interleaved=True)
            if cfg.rotary_heads is None:
                return turned
            return jnp.where((jnp.arange(cfg.num_heads) < cfg.rotary_heads)[:, None], turned, y)

        y = nn.attention(rotate(q), rotate(k), v, mask[:, None], dtype=cfg.attention_dtype)
        return self.out(nn.merge_heads(y), *types)


class Block(nnx.Module):
    """Pre-norm Transformer layer; in the upper half it first merges the skip of its partner."""

    def __init__(self, cfg: Config, has_skip: bool, *, rngs: nnx.Rngs):
        if has_skip:
            self.skip = nn.Linear(2 * cfg.width, cfg.width, ("embed", None), rngs=rngs, use_bias=False)
        self.attention_norm = ScaleNorm(cfg.width)
        self.attention = Attention(cfg, rngs=rngs)
        self.mlp_norm = ScaleNorm(cfg.width)
        hidden = cfg.mlp_ratio * cfg.width
        self.mlp_in = nn.Linear(cfg.width, hidden, ("embed", "mlp"), rngs=rngs)
        self.mlp_out = nn.Linear(hidden, cfg.width, ("mlp", "embed"), rngs=rngs)

    def __call__(self, x, mask, cfg: Config, skip=None, key=None) -> jax.Array:
        """[B, P, D] (and the skip, same shape) -> [B, P, D], all in cfg.activation_dtype."""
        types = cfg.dtype, cfg.activation_dtype
        keys = (None, None) if key is None else jax.random.split(key)
        if skip is not None:
            x = self.skip(jnp.concatenate([x, skip], axis=-1), *types)
        x = x + nn.dropout(
            self.attention(self.attention_norm(x).astype(x.dtype), mask, cfg), cfg.dropout, keys[0]
        )
        hidden = self.mlp_in(self.mlp_norm(x).astype(x.dtype), *types).astype(jnp.float32)
        hidden = nn.dropout(jax.nn.gelu(hidden, approximate=True), cfg.dropout, keys[1])
        return x + self.mlp_out(hidden.astype(cfg.activation_dtype), *types)


def _token_table(key: jax.Array, cfg: Config) -> jax.Array:
    """Start of the token table [codes + 1, width], unit variance, row 0 the filler.

    A code is eight ternary digits (speech_tokenizer.py), and codes that share digits sound alike. Rows are random
    projections of the digits, so that what is learned of one code holds for its neighbours from the first step.
    """
    shape = (cfg.num_codes + 1, cfg.token_width)
    if cfg.num_codes != audio.NUM_CODES:
        return jax.random.normal(key, shape, out_sharding=spec(None, None))
    digits = np.arange(cfg.num_codes)[:, None] // 3 ** np.arange(8) % 3
    features = np.eye(3, dtype=np.float32)[digits].reshape(cfg.num_codes, 24) / np.sqrt(8)
    features = np.concatenate([np.zeros((1, 24), np.float32), features])
    projection = jax.random.normal(key, (24, cfg.token_width), out_sharding=spec(None, None))
    return jnp.matmul(features, projection, precision="highest")


class Decoder(nnx.Module):
    """Velocity network: noisy mel, condition mel, tokens and flow time to a velocity.

    `down` stacks layers 1..L/2. `up` stacks the others so that up[l] merges the input of down[l]: it runs
    from its last entry to its first, and the layer numbered l = L/2+1..L (from 1) is up[L - l].
    """

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        # replicated: 6562 rows divide by no mesh, and the table is 1 % of the weights
        self.token_table = nnx.Param(_token_table(rngs.params(), cfg))
        frame = cfg.patch_frames * cfg.mel_bins
        self.input = nn.Linear(2 * frame + cfg.token_width, cfg.width, (None, "embed"), rngs=rngs)
        self.conv_first = GroupedConv(cfg.width, cfg.conv_kernel, cfg.conv_groups, rngs=rngs)
        self.conv_second = GroupedConv(cfg.width, cfg.conv_kernel, cfg.conv_groups, rngs=rngs)
        self.time_in = nn.Linear(TIME_FEATURES, cfg.width, (None, "embed"), rngs=rngs)
        self.time_out = nn.Linear(cfg.width, cfg.width, ("embed", None), rngs=rngs)
        half = cfg.num_layers // 2
        self.down = jax.vmap(lambda r: Block(cfg, False, rngs=r))(rngs.split(half))
        self.up = jax.vmap(lambda r: Block(cfg, True, rngs=r))(rngs.split(half))
        self.norm = ScaleNorm(cfg.width)
        zeros = jax.nn.initializers.zeros
        self.output = nn.Linear(cfg.width, frame, ("embed", None), rngs=rngs, init=zeros)

    def embed_time(self, t: jax.Array) -> jax.Array:
        """Flow time [B] in [0, 1] -> [B, D] float32; float32 products whatever cfg.dtype."""
        half = TIME_FEATURES // 2
        frequencies = jnp.exp(-math.log(10000.0) / (half - 1) * jnp.arange(half, dtype=jnp.float32))
        angles = 1000.0 * t[:, None] * frequencies
        features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        return self.time_out(jax.nn.silu(self.time_in(features, "float32")), "float32")

    def embed_input(self, x, condition, tokens, mask, cfg: Config) -> jax.Array:
        """Patched mels [B, P, F], token embeddings [B, P, token_width], mask [B, P] -> [B, P, D] float32."""
        x = self.input(jnp.concatenate([x, condition, tokens], axis=-1), cfg.dtype)
        valid = mask[..., None]
        y = _mish(self.conv_first(jnp.where(valid, x, 0.0)))
        y = _mish(self.conv_second(jnp.where(valid, y, 0.0)))
        return x + y

    def layers(self, x, mask, cfg: Config, key=None) -> jax.Array:
        """All layers with their skips: [B, P, D] -> [B, P, D] in cfg.activation_dtype, before the last norm."""
        x = x.astype(cfg.activation_dtype)
        half = cfg.num_layers // 2
        use_dropout = key is not None and cfg.dropout > 0
        down_keys, up_keys = jax.random.split(key, (2, half)) if use_dropout else (None, None)

        def down(x, layer_and_key):
            layer, key = layer_and_key
            return layer(x, mask, cfg, key=key), x

        def up(x, layer_skip_and_key):
            layer, skip, key = layer_skip_and_key
            return layer(x, mask, cfg, skip, key), None

        if cfg.remat != "none":
            down, up = (jax.checkpoint(f, policy=nn.REMAT[cfg.remat]) for f in (down, up))
        x, skips = jax.lax.scan(down, x, (self.down, down_keys), unroll=cfg.unroll)
        x, _ = jax.lax.scan(up, x, (self.up, skips, up_keys), reverse=True, unroll=cfg.unroll)
        return x

    def __call__(self, x, condition, tokens, t, mask, cfg: Config, key=None) -> jax.Array:
        """Velocity of normalised mel.

        Args:
            x: [B, T, M] float32, the state at time t.
            condition: [B, T, M] float32, mel where it is known, 0 elsewhere.
            tokens: [B, P, token_width] float32, from `embed_tokens`.
            t: [B] float32 in [0, 1].
            mask: [B, P] bool, the valid positions.
            cfg: the module's config.
            key: dropout key; None for none.

        Returns:
            [B, T, M] float32.
        """
        num_frames = x.shape[1]
        x = self.embed_input(_patch(x, cfg), _patch(condition, cfg), tokens, mask, cfg)
        x = jnp.concatenate([self.embed_time(t)[:, None], x], axis=1)
        mask = jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True)  # the frame of the time
        x = self.layers(x, mask, cfg, key)
        return _unpatch(self.output(self.norm(x)[:, 1:], cfg.dtype), cfg)[:, :num_frames]


def init(cfg: Config, key: jax.Array) -> Decoder:
    """A decoder with random weights, float32, sharded over the current mesh; its first velocity is 0.

    Raises:
        ValueError: if the mesh does not divide the heads, the width or the MLP.
    """
    sharding.check_fits(
        ("heads", cfg.num_heads, "model"),
        ("MLP width", cfg.mlp_ratio * cfg.width, "model"),
        ("width", cfg.width, "data"),
    )
    return Decoder(cfg, rngs=nnx.Rngs(params=key))


def num_frames(cfg: Config, num_tokens):
    """Mel frames of this many speech tokens, rounded down; an int for an int, an array for an array."""
    numerator, denominator = cfg.frames_per_token
    return num_tokens * numerator // denominator


def token_index(cfg: Config, num_tokens: int) -> np.ndarray:
    """[P] int32: the token of each position, that of its first frame.

    Frame i takes token floor(i / frames_per_token), clipped to the last.
    """
    numerator, denominator = cfg.frames_per_token
    first_frames = np.arange(0, num_frames(cfg, num_tokens), cfg.patch_frames)
    return np.minimum(first_frames * denominator // numerator, num_tokens - 1).astype(np.int32)


def forward_flops(cfg: Config, num_rows: int, num_tokens: int) -> float:
    """FLOPs of the products of one velocity over full rows of `num_tokens` speech tokens."""
    positions, heads = -(-num_frames(cfg, num_tokens) // cfg.patch_frames), cfg.num_heads * cfg.head_dim
    frame, width = cfg.patch_frames * cfg.mel_bins, cfg.width
    layer = 4 * width * heads + 2 * cfg.mlp_ratio * width**2 + width**2  # half of them merge 2 D to D
    ends = (2 * frame + cfg.token_width) * width + frame * width
    ends += 2 * cfg.conv_kernel * width * width // cfg.conv_groups
    pairs = (positions + 1) ** 2  # one position more, of the time
    each = (positions + 1) * cfg.num_layers * layer + positions * ends
    return 2.0 * num_rows * (each + cfg.num_layers * 2 * heads * pairs)


def embed_tokens(model: Decoder, cfg: Config, speech_tokens: jax.Array, keep: jax.Array) -> jax.Array:
    """Token embeddings at the positions of the Transformer.

    Args:
        speech_tokens: [B, N] int32 in 0..num_codes-1; -1 is the filler.
        keep: [B, N] or [B, 1] bool; other tokens become the filler.

    Returns:
        [B, P, token_width] float32.
    """
    ids = jnp.where(keep, speech_tokens + 1, 0)[:, token_index(cfg, speech_tokens.shape[1])]
    return model.token_table[...].at[ids].get(out_sharding=PartitionSpec(*nn.axes_of(ids), None))


def loss(
    model: Decoder, cfg: Config, batch: dict[str, jax.Array], key: jax.Array
) -> tuple[jax.Array, jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """Flow-matching loss: squared error of the velocity over the frames that the row has to produce.

    A row with a prompt is conditioned on its first prompt_frames frames and pays for the rest; a row without
    draws a contiguous span of span_min..1 of its frames, pays inside it and is conditioned on the others.
    With `drop_audio` the condition is zeroed, with `drop_both` the tokens too; what is paid for stays.

    Args:
        batch: see the top of this file.
        key: draws time, noise, spans and dropped conditions, alike on every mesh.

    Returns:
        sum of squared errors in units of normalised mel, number of values summed, and (sum, count) pairs
        of the rows with a prompt ("prompt_mse") and without ("infill_mse").

    Raises:
        ValueError: if the mel has not the frames of the tokens.

    Source: Voicebox (Le et al., 2023), sections 3.1 and 4; spans and probabilities of F5-TTS, drawn per row
    instead of per batch.
    """
    batch = jax.tree.map(split_rows, batch)
    speech_tokens, mel = batch["speech_tokens"], batch["mel"].astype(jnp.float32)
    _check_frames(cfg, speech_tokens, mel, "mel")
    num_rows, length, _ = mel.shape
    names = ("t", "noise", "span", "start", "audio", "both", "dropout")
    keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))

    def uniform(name, low=0.0):
        return jax.random.uniform(keys[name], (num_rows,), minval=low, out_sharding=spec("batch"))

    frames = num_frames(cfg, batch["num_tokens"])
    frame = jnp.arange(length)[None]
    valid = frame < frames[:, None]

    prompt = batch["prompt_frames"]
    span = jnp.floor(uniform("span", cfg.span_min) * frames).astype(jnp.int32)
    start = jnp.floor(uniform("start") * (frames - span + 1)).astype(jnp.int32)
    start = jnp.where(prompt > 0, prompt, jnp.minimum(start, frames - span))
    end = jnp.where(prompt > 0, frames, start + span)
    wanted = (frame >= start[:, None]) & (frame < end[:, None]) & valid

    drop_both = uniform("both") < cfg.drop_both
    drop_audio = drop_both | (uniform("audio") < cfg.drop_audio)

    data = jnp.where(valid[..., None], (mel - cfg.mel_mean) / cfg.mel_std, 0.0)
    noise = jax.random.normal(keys["noise"], mel.shape, out_sharding=spec("batch", "frames", "mel"))
    t = uniform("t")
    if cfg.train_schedule == "cosine":
        t = 1.0 - jnp.cos(jnp.pi / 2 * t)
    rest = 1.0 - cfg.sigma_min
    state = (1.0 - rest * t[:, None, None]) * noise + t[:, None, None] * data
    condition = jnp.where((valid & ~wanted & ~drop_audio[:, None])[..., None], data, 0.0)
    keep = (jnp.arange(speech_tokens.shape[1])[None] < batch["num_tokens"][:, None]) & ~drop_both[:, None]
    tokens = embed_tokens(model, cfg, speech_tokens, keep)

    velocity = model(state, condition, tokens, t, _position_mask(cfg, frames, length), cfg, keys["dropout"])
    error = jnp.where(wanted[..., None], velocity - (data - rest * noise), 0.0)
    sums = jnp.sum(error * error, axis=(1, 2))
    counts = (jnp.sum(wanted, axis=1) * cfg.mel_bins).astype(jnp.float32)
    has_prompt = prompt > 0

    def part(rows):
        return jnp.sum(jnp.where(rows, sums, 0.0)), jnp.sum(jnp.where(rows, counts, 0.0))

    return jnp.sum(sums), jnp.sum(counts), {"prompt_mse": part(has_prompt), "infill_mse": part(~has_prompt)}


def sample(
    model: Decoder,
    cfg: Config,
    speech_tokens: jax.Array,
    num_tokens: jax.Array,
    prompt_mel: jax.Array,
    prompt_frames: jax.Array,
    keys: jax.Array,
    num_steps: int = 32,
    guidance: float = 2.0,
    method: str = "euler",
    schedule: str | float = "cosine",
) -> jax.Array:
    """Mel of speech tokens in the voice of a prompt; one compiled program per shape and solver setting.

    A row depends on its own inputs and key only, whatever its neighbours, the batch size and the padding.
    The frames of the prompt are generated too: cut them off or write the prompt over them.

    Args:
        speech_tokens: [B, N] int32, the prompt's tokens first, then those to speak.
        num_tokens: [B] int32, valid tokens of each row, prompt included.
        prompt_mel: [B, T, M] float32 log-mel, T = num_frames(cfg, N); read up to prompt_frames only.
        prompt_frames: [B] int32; 0 for no prompt.
        keys: [B] typed random keys.
        num_steps: solver steps.
        guidance: w in v = v_cond + w (v_cond - v_null); 0 skips the second half of the work.
        method: "euler" or "midpoint".
        schedule: see `ode.time_grid`.

    Returns:
        [B, T, M] float32 log-mel; 0 beyond a row's num_frames(cfg, num_tokens).

    Raises:
        ValueError: if prompt_mel has not the frames of N tokens, or on an unknown method or schedule.

    Source: guidance and sway sampling of F5-TTS; 32 steps with guidance 2 and 10 with 0.7 (CosyVoice2) are
    the two settings worth keeping.
    """
    _check_frames(cfg, speech_tokens, prompt_mel, "prompt_mel")
    grid = jnp.asarray(ode.time_grid(num_steps, schedule))
    inputs = (speech_tokens, num_tokens, prompt_mel, prompt_frames, keys)
    return _sample(model, cfg, inputs, grid, jnp.float32(guidance), ode.is_guided(guidance), method)


@programs.kept("cfg", "is_guided", "method")
def _sample(model, cfg, inputs, grid, guidance, is_guided, method):
    speech_tokens, num_tokens, prompt_mel, prompt_frames, keys = map(split_rows, inputs)
    length = prompt_mel.shape[1]
    frames = num_frames(cfg, num_tokens)
    frame = jnp.arange(length)
    has_prompt = frame[None] < jnp.minimum(prompt_frames, frames)[:, None]
    condition = jnp.where(has_prompt[..., None], (prompt_mel - cfg.mel_mean) / cfg.mel_std, 0.0)
    keep = jnp.arange(speech_tokens.shape[1])[None] < num_tokens[:, None]
    mask = _position_mask(cfg, frames, length)

    start = ode.frame_noise(keys, length, cfg.mel_bins)
    given, null = (embed_tokens(model, cfg, speech_tokens, keep), mask, condition), None
    if is_guided:
        filler = embed_tokens(model, cfg, speech_tokens, jnp.zeros_like(keep))
        null = filler, mask, jnp.zeros_like(condition)

    def velocity(x, t, tokens, mask, condition):
        return model(x, condition, tokens, t, mask, cfg)

    x = ode.integrate(ode.guided(velocity, given, null, guidance), start, grid, method)
    return jnp.where((frame[None] < frames[:, None])[..., None], x * cfg.mel_std + cfg.mel_mean, 0.0)


def _check_frames(cfg: Config, speech_tokens, mel, name: str) -> None:
    num_tokens = speech_tokens.shape[1]
    ode.check_mel(mel, num_frames(cfg, num_tokens), cfg.mel_bins, num_tokens, name)


def _position_mask(cfg: Config, frames: jax.Array, length: int) -> jax.Array:
    """[B, P] bool: positions whose first frame is valid."""
    return jnp.arange(0, length, cfg.patch_frames)[None] < frames[:, None]


def _patch(x: jax.Array, cfg: Config) -> jax.Array:
    """[B, T, M] -> [B, P, patch_frames * M], zeros after the end."""
    size = cfg.patch_frames
    if size == 1:
        return x
    num_rows, length, num_bins = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % size), (0, 0)))
    return x.reshape(num_rows, -1, size * num_bins, out_sharding=PartitionSpec(*nn.axes_of(x)))


def _unpatch(x: jax.Array, cfg: Config) -> jax.Array:
    """[B, P, patch_frames * M] -> [B, P * patch_frames, M]."""
    return x.reshape(x.shape[0], -1, cfg.mel_bins, out_sharding=PartitionSpec(*nn.axes_of(x)))


def _mish(x: jax.Array) -> jax.Array:
    return x * jnp.tanh(jax.nn.softplus(x))
