"""Speech to S3 tokens: masked convolution stem, attention blocks with an FSMN memory, FSQ of 3^8 codes.

25 tokens/s from a 100 Hz Whisper-style log-mel of 16 kHz speech (`audio.s3_log_mel`). Network and `s3_v2()`
follow the released S3 tokenizer V2 of CosyVoice 2 (Du et al., 2024); `mini()` is the same code at toy width.
Training is by recognition through the quantised codes, and needs one of two kinds of labels (`Config.labels`):
  frames: a head that sees only the code of one token names its two 20 ms phones and their F0 classes;
  text: blocks behind the codes read the whole text by CTC, as the rest of an ASR model does in CosyVoice 2.
Batch: wav [B, W] float32 16 kHz, lengths [B] samples, and of frames: phones and f0_class [B, W // 320] int32 (-1 is
padding), of text: text_ids [B, S] int32 of `text.MiniTokenizer.heard` (0 is padding) and text_lengths [B].
Letters: B rows, T log-mel frames, N = ceil(T / 4) tokens, S symbols, D width, H heads, E head size, M mel bins.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepasmr_jax import audio, nn, text

NUM_DIGITS = 8
FSQ_SCALE = 0.9990000128746033  # float32 constant of the released graph
WINDOW_FRAMES = 3000  # 30 s at 100 Hz, the longest input the released model was trained on
STRIDE_FRAMES = 2600  # 4 s overlap
EDGE_TOKENS = 50  # 2 s dropped at each inner edge of a window
# what a batch has beside wav and lengths, by Config.labels
LABELS = {"frames": ("phones", "f0_class"), "text": ("text_ids", "text_lengths")}
_LENGTH_STEP = 500  # encode_long pads to multiples of 5 s, so that few lengths are compiled


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape and loss weights of a tokenizer; the defaults are the released V2 network, without a head."""

    num_mels: int = 128
    width: int = 1280
    num_heads: int = 20
    num_blocks: int = 6
    mlp_width: int = 5120
    fsmn_kernel: int = 31
    rotary_base: float = 10000.0
    attention_norm_eps: float = 1e-6
    mlp_norm_eps: float = 1e-5
    dtype: str = "float32"  # of the matrix products; the projection to the code stays in float32
    remat: bool = False
    # recognition head and losses (training only)
    has_head: bool = False
    labels: Literal["frames", "text"] = "frames"  # what the head learns from
    direct_weight: float = 1.0  # of the same recognition straight from the states: the encoder learns faster
    raw_share: float = (
        0.5  # of the rows in training whose code is not rounded: twice as many codes come into use
    )
    # text: blocks of the encoder's size behind the code, and symbols, of which 0 is the blank
    head_blocks: int = 2
    num_symbols: int = text.MiniTokenizer().vocab_size
    # frames
    head_width: int = 256
    num_phones: int = len(text.PHONES)
    num_f0_classes: int = 6
    phone_weight: float = 1.0
    f0_weight: float = 0.3  # 0: codes learn from phones alone, the F0 head only probes what they still hold
    # on tokens whose predicted code reads right; on all tokens both terms leave one code after 50 steps
    predictability_weight: float = 0.3  # pulls the code towards the one predicted from the token's labels
    commit_weight: float = 0.1  # pulls each digit away from its rounding limits
    # augmentation in training: number and greatest height of blanked bands, greatest warp of the mel axis
    num_band_masks: int = 2
    band_mask_mels: int = 16
    max_warp: float = 0.08

    def __post_init__(self):
        nn.check_dtype(self.dtype)
        if self.labels not in LABELS:
            raise ValueError(f"labels {self.labels!r} are unknown; use {' or '.join(LABELS)}")
        if self.head_blocks < 1:
            raise ValueError(f"head_blocks {self.head_blocks} must be at least 1")
        if self.width % self.num_heads:
            raise ValueError(
                f"width {self.width} is not a multiple of {self.num_heads} heads; change num_heads"
            )
        if (self.width // self.num_heads) % 2:
            raise ValueError(
                f"head size {self.width // self.num_heads} is odd; rotary positions need an even one"
            )
        if self.fsmn_kernel % 2 == 0:
            raise ValueError(f"fsmn_kernel {self.fsmn_kernel} is even; use an odd one, it is centred")

    @property
    def head_dim(self) -> int:
        """Size E of one attention head."""
        return self.width // self.num_heads


def s3_v2() -> Config:
    """The released V2 tokenizer: 123,714,568 parameters."""
    return Config()


def mini() -> Config:
    """The built-in model's tokenizer: 2 M parameters, with its recognition head."""
    return Config(width=192, num_heads=3, num_blocks=4, mlp_width=768, has_head=True, f0_weight=0.6)


# ---------------------------------------------------------------- modules


def _scaled(gain: float):
    """Initializer of a kernel whose outputs have `gain` times the root mean square of its inputs."""
    return jax.nn.initializers.variance_scaling(gain**2, "fan_in", "normal")


class Conv(nnx.Module):
    """Kernel 3, stride 2, one zero on each side: kernel [3, in, out], bias [out]."""

    def __init__(self, num_in: int, num_out: int, rngs: nnx.Rngs):
        self.kernel = nnx.Param(_scaled(1.0)(rngs.params(), (3, num_in, num_out), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(num_out))

    def __call__(self, x: jax.Array, dtype: str) -> jax.Array:
        kernel, layout = self.kernel[...].astype(dtype), ("NWC", "WIO", "NWC")
        y = jax.lax.conv_general_dilated(x.astype(dtype), kernel, (2,), [(1, 1)], dimension_numbers=layout)
        return y.astype(jnp.float32) + self.bias[...]


class Attention(nnx.Module):
    """Self-attention whose values also pass through a depthwise convolution, the FSMN memory."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        width, residual_gain = cfg.width, (2 * cfg.num_blocks) ** -0.5
        self.query = nn.Linear(width, width, rngs=rngs)
        self.key = nn.Linear(width, width, rngs=rngs, use_bias=False)
        self.value = nn.Linear(width, width, rngs=rngs)
        self.out = nn.Linear(width, width, rngs=rngs, init=_scaled(residual_gain))
        self.fsmn = nnx.Param(_scaled(residual_gain)(rngs.params(), (cfg.fsmn_kernel, width), jnp.float32))

    def memory(self, v: jax.Array, mask: jax.Array) -> jax.Array:
        """FSMN: values [B, N, D] plus their centred depthwise convolution, valid positions only."""
        v = v * mask[:, :, None]
        taps = self.fsmn[...]
        half = taps.shape[0] // 2
        padded = jnp.pad(v, ((0, 0), (half, half), (0, 0)))
        y = v
        # shifted multiply-adds: faster on CPU than a grouped convolution, 0.32 against 0.43 s at true size
        for i in range(taps.shape[0]):
            y = y + padded[:, i : i + v.shape[1]] * taps[i]
        return y * mask[:, :, None]

    def __call__(self, cfg: Config, x: jax.Array, mask: jax.Array) -> jax.Array:
        positions = jnp.arange(x.shape[1])[None]
        q = nn.rotary(nn.split_heads(self.query(x, cfg.dtype), cfg.num_heads), positions, cfg.rotary_base)
        k = nn.rotary(nn.split_heads(self.key(x, cfg.dtype), cfg.num_heads), positions, cfg.rotary_base)
        v = self.value(x, cfg.dtype)
        y = nn.attention(q, k, nn.split_heads(v, cfg.num_heads), mask[:, None, :], dtype=cfg.dtype)
        return self.out(nn.merge_heads(y), cfg.dtype) + self.memory(v, mask)


class Block(nnx.Module):
    """Pre-norm attention with memory, then a GELU MLP."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        residual_gain = (2 * cfg.num_blocks) ** -0.5
        self.attn_ln = nn.LayerNorm(cfg.width)
        self.attn = Attention(cfg, rngs)
        self.mlp_ln = nn.LayerNorm(cfg.width)
        self.mlp_in = nn.Linear(cfg.width, cfg.mlp_width, rngs=rngs)
        self.mlp_out = nn.Linear(cfg.mlp_width, cfg.width, rngs=rngs, init=_scaled(residual_gain))

    def __call__(self, cfg: Config, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.attn(cfg, self.attn_ln(x, cfg.attention_norm_eps), mask)
        y = jax.nn.gelu(self.mlp_in(self.mlp_ln(x, cfg.mlp_norm_eps), cfg.dtype), approximate=False)
        return x + self.mlp_out(y, cfg.dtype)


class Encoder(nnx.Module):
    """Two strided convolutions and the stacked blocks; no final norm."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        self.conv1 = Conv(cfg.num_mels, cfg.width, rngs)
        self.conv2 = Conv(cfg.width, cfg.width, rngs)
        keys = jax.random.split(rngs.params(), cfg.num_blocks)
        self.blocks = jax.vmap(lambda key: Block(cfg, nnx.Rngs(key)))(keys)

    def stem(self, cfg: Config, log_mel: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, T, M] to [B, N, D] and its mask [B, N]; padding is zeroed before each convolution."""
        x = log_mel.astype(jnp.float32)
        for conv in (self.conv1, self.conv2):
            x = jnp.where(nn.length_mask(lengths, x.shape[1])[:, :, None], x, 0.0)
            x = jax.nn.gelu(conv(x, cfg.dtype), approximate=False)
            lengths = (lengths + 1) // 2
        return x, nn.length_mask(lengths, x.shape[1])

    def __call__(self, cfg: Config, log_mel: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, mask = self.stem(cfg, log_mel, lengths)
        return _through(cfg, self.blocks, x, mask), mask


class Quantizer(nnx.Module):
    """Projection of the encoder states to the eight numbers that are rounded."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        self.project_down = nn.Linear(
            cfg.width, NUM_DIGITS, rngs=rngs, init=_scaled(0.4)
        )  # tanh unsaturated at the start

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, D] to [B, N, 8] float32 in (-1, 1), before rounding; float32 products whatever cfg.dtype."""
        return FSQ_SCALE * jnp.tanh(self.project_down(x, "float32"))


class Head(nnx.Module):
    """Recognition from one code, without context: 20 ms phone and F0-class logits, two slots a token.

    All its products are float32 whatever cfg.dtype.

    `direct_out` recognises from the encoder's states, past the code: a short way for the gradient, without
    which the encoder learns slowly (held-out phones after 300 steps 44 % with it; without it 37 % after 400).
    `code_in`/`code_out` go the other way, from a token's labels to its code: they measure, and with
    `predictability_weight` improve, how well a code follows from what a language model can know.
    """

    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        num_labels = 2 * (cfg.num_phones + cfg.num_f0_classes)
        self.phone_in = nn.Linear(NUM_DIGITS, cfg.head_width, rngs=rngs)
        self.phone_out = nn.Linear(cfg.head_width, 2 * cfg.num_phones, rngs=rngs)
        self.f0_in = nn.Linear(NUM_DIGITS, cfg.head_width, rngs=rngs)
        self.f0_out = nn.Linear(cfg.head_width, 2 * cfg.num_f0_classes, rngs=rngs)
        self.direct_out = nn.Linear(cfg.width, num_labels, rngs=rngs)
        one_hot_gain = (num_labels / 4) ** 0.5  # four of the inputs are one, the others zero
        self.code_in = nn.Linear(num_labels, cfg.head_width, rngs=rngs, init=_scaled(one_hot_gain))
        self.code_out = nn.Linear(cfg.head_width, NUM_DIGITS, rngs=rngs)

    def phone_logits(self, code: jax.Array) -> jax.Array:
        """[B, N, 8] to [B, 2 N, num_phones]."""
        return _slots(_float32_mlp(self.phone_in, self.phone_out, code))

    def f0_logits(self, code: jax.Array) -> jax.Array:
        """[B, N, 8] to [B, 2 N, num_f0_classes]."""
        return _slots(_float32_mlp(self.f0_in, self.f0_out, code))

    def direct_logits(self, states: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Encoder states [B, N, D] to phone and F0-class logits [B, 2 N, .]."""
        logits = _slots(self.direct_out(states, "float32"))
        num_phones = self.phone_out.kernel.shape[-1] // 2
        return logits[..., :num_phones], logits[..., num_phones:]

    def code_of(self, phones: jax.Array, f0_class: jax.Array) -> jax.Array:
        """One-hot labels [B, 2 N, .] of the slots to the code they call for, [B, N, 8] in (-1, 1)."""
        labels = jnp.concatenate([phones, f0_class], axis=-1)
        labels = _reshape(labels, labels.shape[1] // 2, 2 * labels.shape[2])
        return FSQ_SCALE * jnp.tanh(_float32_mlp(self.code_in, self.code_out, labels))


class TextHead(nnx.Module):
    """Recognition of a text from codes: blocks that see the whole row, then CTC scores of each position.

    `direct_out` is that of `Head`. Products outside the blocks are float32 whatever cfg.dtype.
    """

    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        self.code_in = nn.Linear(NUM_DIGITS, cfg.width, rngs=rngs)
        keys = jax.random.split(rngs.params(), cfg.head_blocks)
        self.blocks = jax.vmap(lambda key: Block(cfg, nnx.Rngs(key)))(keys)
        self.norm = nn.LayerNorm(cfg.width)
        self.out = nn.Linear(cfg.width, cfg.num_symbols, rngs=rngs)
        self.direct_out = nn.Linear(cfg.width, cfg.num_symbols, rngs=rngs)

    def logits(self, cfg: Config, code: jax.Array, mask: jax.Array) -> jax.Array:
        """[B, N, 8] and its mask [B, N] to [B, N, num_symbols]."""
        x = _through(cfg, self.blocks, self.code_in(code, "float32"), mask)
        return self.out(self.norm(x, cfg.mlp_norm_eps), "float32")

    def direct_logits(self, states: jax.Array) -> jax.Array:
        """Encoder states [B, N, D] to [B, N, num_symbols]."""
        return self.direct_out(states, "float32")


class Tokenizer(nnx.Module):
    """`encoder`, `quantizer` and, in training, `head` (None otherwise)."""

    def __init__(self, cfg: Config, key: jax.Array):
        rngs = nnx.Rngs(key)
        self.encoder = Encoder(cfg, rngs)
        self.quantizer = Quantizer(cfg, rngs)
        head = {"frames": Head, "text": TextHead}[cfg.labels]
        self.head = head(cfg, rngs) if cfg.has_head else None


def init(cfg: Config, key: jax.Array) -> Tokenizer:
    """A tokenizer with random weights; its head is None unless cfg.has_head."""
    return Tokenizer(cfg, key)


def without_head(model: Tokenizer, cfg: Config) -> tuple[Tokenizer, Config]:
    """The tokenizer and its config as they are exported: same encoder and quantiser, no head."""
    cfg = dataclasses.replace(cfg, has_head=False)
    bare = jax.eval_shape(functools.partial(init, cfg), jax.random.key(0))
    bare.encoder, bare.quantizer = model.encoder, model.quantizer
    return bare, cfg


# ---------------------------------------------------------------- small helpers


def _through(cfg: Config, blocks: Block, x: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, N, D] through stacked blocks."""

    def body(x: jax.Array, block: Block) -> tuple[jax.Array, None]:
        return block(cfg, x, mask), None

    return jax.lax.scan(jax.checkpoint(body) if cfg.remat else body, x, blocks)[0]


def _float32_mlp(first: nn.Linear, second: nn.Linear, x: jax.Array) -> jax.Array:
    """`second(gelu(first(x)))` with float32 products."""
    return second(jax.nn.gelu(first(x, "float32")), "float32")


def _slots(x: jax.Array) -> jax.Array:
    """[B, N, 2 K] to [B, 2 N, K]: the two 20 ms halves of each 40 ms token."""
    return _reshape(x, 2 * x.shape[1], x.shape[2] // 2)


def _reshape(x: jax.Array, *shape: int) -> jax.Array:
    """x with the axes after the first one reshaped; the split of the first is kept, the others have none."""
    return x.reshape(x.shape[0], *shape, out_sharding=jax.P(nn.axes_of(x)[0], *(None for _ in shape)))


# ---------------------------------------------------------------- codes


def tokens_of(digits: jax.Array) -> jax.Array:
    """Digits in {-1, 0, 1} to token numbers; digit 0 is the least significant.

    Args:
        digits: [..., 8], any dtype.

    Returns:
        [...] int32 in [0, 6561); all-zero digits give 3280.

    Source: CosyVoice 2 (Du et al., 2024), section 2.2; the released graph's order of digits.
    """
    powers = jnp.asarray([3**i for i in range(NUM_DIGITS)], jnp.int32)
    return jnp.sum((digits.astype(jnp.int32) + 1) * powers, axis=-1)


def hidden(
    model: Tokenizer, cfg: Config, log_mel: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Pre-quantised states, the material of the style and speaker analysis.

    Args:
        model: tokenizer.
        cfg: its config.
        log_mel: [B, T, M] float32 of `audio.s3_log_mel`; frames beyond a row's length are ignored.
        lengths: [B] int32, valid frames of each row, at most T.

    Returns:
        encoder states [B, N, D] float32 and their projection [B, N, 8] float32 in (-1, 1), whose rounded
        values are the code; N = ceil(T / 4), both zero beyond ceil(length / 4).

    Raises:
        ValueError: if log_mel does not have cfg.num_mels bands.
    """
    if log_mel.ndim != 3 or log_mel.shape[-1] != cfg.num_mels:
        raise ValueError(
            f"log_mel has shape {log_mel.shape}, expected [B, T, {cfg.num_mels}]; use audio.s3_log_mel"
        )
    x, mask = model.encoder(cfg, log_mel, lengths)
    x = jnp.where(mask[:, :, None], x, 0.0)
    return x, jnp.where(mask[:, :, None], model.quantizer(x), 0.0)


def encode(
    model: Tokenizer, cfg: Config, log_mel: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Speech tokens of a batch; a row's tokens do not depend on its neighbours or its padding.

    Args:
        model: tokenizer.
        cfg: its config.
        log_mel: [B, T, M] float32 of `audio.s3_log_mel`, 100 Hz; at most 3000 frames (`encode_long`).
        lengths: [B] int32, valid frames of each row.

    Returns:
        tokens [B, N] int32 in [0, 6561), N = ceil(T / 4), 0 beyond a row's count; counts [B], which
        are ceil(lengths / 4).

    Raises:
        ValueError: if log_mel does not have cfg.num_mels bands, or is longer than 30 s.
    """
    if log_mel.shape[1] > WINDOW_FRAMES:
        raise ValueError(f"{log_mel.shape[1]} frames exceed the window of {WINDOW_FRAMES}; use encode_long")
    _, projection = hidden(model, cfg, log_mel, lengths)
    counts = -(-lengths // audio.S3_FRAMES_PER_TOKEN)
    tokens = tokens_of(jnp.round(projection))
    return jnp.where(nn.length_mask(counts, tokens.shape[1]), tokens, 0), counts


_encode = jax.jit(encode, static_argnums=1)


def encode_long(model: Tokenizer, cfg: Config, log_mel: np.ndarray) -> np.ndarray:
    """Tokens of one recording of any length, on the host: windows of 30 s that overlap by 4 s.

    Two seconds are dropped at each inner edge. The last window is the first one that reaches the end; public
    code goes on to a further short one and so loses up to 50 tokens (5250 frames: 1313 here, 1263 there).

    Args:
        model: tokenizer.
        cfg: its config.
        log_mel: [T, M] float32 of the whole recording.

    Returns:
        [ceil(T / 4)] int32.

    Raises:
        ValueError: if log_mel is empty or not [T, M].
    """
    log_mel = np.asarray(log_mel, np.float32)
    if log_mel.ndim != 2 or not len(log_mel):
        raise ValueError(f"log_mel has shape {log_mel.shape}, expected [T, {cfg.num_mels}] with T > 0")
    size = len(log_mel)
    starts = [0]
    while starts[-1] + WINDOW_FRAMES < size:
        starts.append(starts[-1] + STRIDE_FRAMES)
    parts = []
    for start in starts:
        window = log_mel[start : start + WINDOW_FRAMES]
        padding = -len(window) % _LENGTH_STEP
        padded = np.pad(window, ((0, padding), (0, 0)))[None]
        tokens, counts = _encode(model, cfg, padded, np.asarray([len(window)], np.int32))
        first = EDGE_TOKENS if start else 0
        last = int(counts[0]) - (EDGE_TOKENS if start != starts[-1] else 0)
        parts.append(np.asarray(tokens[0])[first:last])
    return np.concatenate(parts).astype(np.int32)


# ---------------------------------------------------------------- training


def _augment(cfg: Config, log_mel: jax.Array, key: jax.Array) -> jax.Array:
    """Stretches each row's mel axis a little (another vocal tract) and blanks a few bands."""
    num_rows, _, num_mels = log_mel.shape
    keys = jax.random.split(key, 3)
    bins = jnp.arange(num_mels, dtype=jnp.float32)
    warp = 1.0 + cfg.max_warp * jax.random.uniform(keys[0], (num_rows, 1, 1), minval=-1.0)
    source = jnp.clip(bins[None, None, :] * warp, 0, num_mels - 1)
    interpolation = jnp.maximum(1.0 - jnp.abs(bins[None, :, None] - source), 0.0)  # [B, M in, M out], linear
    interpolation = jax.sharding.reshard(interpolation, jax.P(nn.axes_of(log_mel)[0], None, None))
    log_mel = jnp.einsum("btm,bmc->btc", log_mel, interpolation)
    if cfg.num_band_masks:
        shape = (num_rows, 1, cfg.num_band_masks)
        height = cfg.band_mask_mels * jax.random.uniform(keys[1], shape)
        low = jax.random.uniform(keys[2], shape) * (num_mels - height)
        inside = (bins[None, :, None] >= low) & (bins[None, :, None] < low + height)
        log_mel = jnp.where(jnp.any(inside, axis=-1)[:, None, :], 0.0, log_mel)
    return log_mel


def _num_distinct(tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """How many different valid tokens there are in the whole batch."""
    tokens, mask = (jax.sharding.reshard(x, jax.P()) for x in (tokens, mask))
    return jnp.sum(jnp.zeros(audio.NUM_CODES).at[tokens].max(mask.astype(jnp.float32)))


def _labels(labels: jax.Array, num_slots: int, num_classes: int) -> tuple[jax.Array, jax.Array]:
    """[B, T50] int32 with -1 padding to one-hot [B, num_slots, num_classes] and the mask [B, num_slots]."""
    labels = labels[:, :num_slots]
    labels = jnp.pad(labels, ((0, 0), (0, num_slots - labels.shape[1])), constant_values=-1)
    return jax.nn.one_hot(labels, num_classes), labels >= 0


def loss(model: Tokenizer, cfg: Config, batch: dict[str, jax.Array], key: jax.Array | None):
    """Recognition loss of the quantised code, of frame labels or of the text (cfg.labels).

    In both cases the gradient passes the rounding unchanged, some rows are not rounded at all (cfg.raw_share), and a
    second recognition from the states, past the code, has the weight cfg.direct_weight.

    Frames: cross-entropy of phone (cfg.phone_weight) and F0 class (cfg.f0_weight) in both slots of a token. With
    cfg.f0_weight = 0 no style or pitch label reaches the encoder; the F0 head still learns from detached codes;
    its accuracy tells how much of that information the codes keep.
    Two mild terms make codes follow from labels: squared distance of the projection to the code that a small network
    predicts from the token's labels, and to its own rounded value. They act on tokens whose predicted code the head
    reads as the right labels, so that nothing is pulled to a code that means something else.

    Text: connectionist temporal classification of the symbols. Rows without a text, or with one that needs more
    positions than the row has tokens, carry no loss.

    Args:
        model: tokenizer with a head.
        cfg: its config.
        batch: see the file docstring.
        key: for augmentation and raw rows; None: neither, as in validation.

    Returns:
        (sum, count, aux): nats summed over valid slots or symbols, their number, and name -> (sum, count):
        distinct_codes (number of different tokens in this batch). Frames: phone_accuracy and direct_phone_accuracy
        (from the states); f0_accuracy, voicing_accuracy; code_agreement (share of tokens that equal the code predicted
        from their labels), digit_agreement (the same for single digits). Text: code_nats and direct_nats a symbol;
        blank_share (of the tokens, read from codes); rows_used (share of the rows that carry a loss).

    Raises:
        ValueError: if the model has no head, or the batch no labels.

    Source: CosyVoice 2 (Du et al., 2024), section 2.2, quantises inside the encoder of an ASR model: six blocks before
        the code, the other blocks and a decoder of text behind it. For text we have CTC in the decoder's place, and
        sounds of `text.MiniTokenizer` in that of BPE; raw rows and the second recognition are ours.
    """
    if model.head is None:
        raise ValueError("the tokenizer has no recognition head; train one built with Config(has_head=True)")
    if missing := set(LABELS[cfg.labels]) - set(batch):
        what = {"frames": "frame labels of both", "text": "data.labels=text"}[cfg.labels]
        raise ValueError(f"batch has {sorted(batch)}, no {', '.join(sorted(missing))}; give {what}")
    log_mel = audio.s3_log_mel(batch["wav"], batch["lengths"])
    lengths = batch["lengths"] // audio.S3_HOP_SAMPLES
    if key is not None:
        log_mel = _augment(cfg, log_mel, jax.random.fold_in(key, 0))
    states, projection = hidden(model, cfg, log_mel, lengths)
    digits = jax.lax.stop_gradient(jnp.round(projection))
    code = projection + jax.lax.stop_gradient(digits - projection)  # straight-through round
    if key is not None:  # the head also learns from unrounded rows, whose gradient is exact
        is_raw = jax.random.uniform(jax.random.fold_in(key, 1), (code.shape[0], 1, 1)) < cfg.raw_share
        code = jnp.where(is_raw, projection, code)
    counts = -(-lengths // audio.S3_FRAMES_PER_TOKEN)
    token_mask = nn.length_mask(counts, code.shape[1])
    if cfg.labels == "text":
        total, count, aux = _text_loss(model.head, cfg, batch, states, code, counts)
    else:
        total, count, aux = _frame_loss(model.head, cfg, batch, states, projection, digits, code, token_mask)
    aux["distinct_codes"] = (_num_distinct(tokens_of(digits), token_mask), jnp.ones(()))
    return total, count, aux


def _text_loss(head: TextHead, cfg: Config, batch, states, code, counts):
    """`loss` of the text: (sum, count, aux)."""
    ids, given = batch["text_ids"], batch["text_lengths"]
    mask = nn.length_mask(counts, code.shape[1])
    used = nn.ctc_fits(counts, ids, given)
    count = jnp.sum(jnp.where(used, given, 0)).astype(jnp.float32)
    scores, direct = head.logits(cfg, code, mask), head.direct_logits(states)
    nats, direct_nats = (
        jnp.sum(jnp.where(used, nn.ctc(x, counts, ids, given), 0.0)) for x in (scores, direct)
    )
    blanks = jnp.sum((jnp.argmax(scores, axis=-1) == 0) & mask, dtype=jnp.float32)
    aux = {
        "code_nats": (nats, count),
        "direct_nats": (direct_nats, count),
        "blank_share": (blanks, jnp.sum(mask, dtype=jnp.float32)),
        "rows_used": (jnp.sum(used, dtype=jnp.float32), jnp.sum(counts > 0, dtype=jnp.float32)),
    }
    return nats + cfg.direct_weight * direct_nats, count, aux


def _frame_loss(head: Head, cfg: Config, batch, states, projection, digits, code, token_mask):
    """`loss` of frame labels: (sum, count, aux)."""
    phone_log_probs = jax.nn.log_softmax(head.phone_logits(code))
    direct_phones, direct_f0 = (jax.nn.log_softmax(x) for x in head.direct_logits(states))
    num_slots = phone_log_probs.shape[1]
    phones, slot_mask = _labels(batch["phones"], num_slots, cfg.num_phones)
    total = -cfg.phone_weight * jnp.sum(phones * (phone_log_probs + cfg.direct_weight * direct_phones))
    count = jnp.sum(slot_mask, dtype=jnp.float32)
    aux = {
        "direct_phone_accuracy": _accuracy(direct_phones, phones, slot_mask),
        "phone_accuracy": _accuracy(phone_log_probs, phones, slot_mask),
    }
    f0_class, f0_mask = _labels(batch["f0_class"], num_slots, cfg.num_f0_classes)
    f0_code = code if cfg.f0_weight else jax.lax.stop_gradient(code)
    f0_log_probs = jax.nn.log_softmax(head.f0_logits(f0_code))
    total = total - (cfg.f0_weight or 1.0) * jnp.sum(f0_class * f0_log_probs)
    total = total - cfg.f0_weight * cfg.direct_weight * jnp.sum(f0_class * direct_f0)
    voiced = jnp.argmax(f0_log_probs, axis=-1) > 0
    right = (voiced == (f0_class[..., 0] == 0)) & f0_mask
    aux["f0_accuracy"] = _accuracy(f0_log_probs, f0_class, f0_mask)
    aux["voicing_accuracy"] = (jnp.sum(right, dtype=jnp.float32), jnp.sum(f0_mask, dtype=jnp.float32))
    called_for = head.code_of(phones, f0_class * (1.0 if cfg.f0_weight else 0.0))
    pairs = (token_mask.shape[1], 2)
    labelled = token_mask & jnp.all(_reshape(slot_mask, *pairs), axis=-1)
    meant = jnp.round(called_for)
    is_right = jnp.argmax(head.phone_logits(meant), axis=-1) == jnp.argmax(phones, axis=-1)
    if cfg.f0_weight:
        is_right &= jnp.argmax(head.f0_logits(meant), axis=-1) == jnp.argmax(f0_class, axis=-1)
    settled = labelled & jnp.all(_reshape(is_right, *pairs), axis=-1)
    stop = jax.lax.stop_gradient
    total = total + 2 * (  # 2 slots
        _squared_distance(stop(projection), called_for, labelled)
        + cfg.predictability_weight * _squared_distance(projection, stop(called_for), settled)
        + cfg.commit_weight * _squared_distance(projection, digits, settled)
    )
    same = (meant == digits) & labelled[:, :, None]
    tokens_labelled = jnp.sum(labelled, dtype=jnp.float32)
    aux["digit_agreement"] = (jnp.sum(same, dtype=jnp.float32), NUM_DIGITS * tokens_labelled)
    aux["code_agreement"] = (jnp.sum(jnp.all(same, axis=-1), dtype=jnp.float32), tokens_labelled)
    return total, count, aux


def _squared_distance(x: jax.Array, y: jax.Array, mask: jax.Array) -> jax.Array:
    """Sum of |x - y|^2 over the tokens of the mask."""
    return jnp.sum(jnp.where(mask, jnp.sum(jnp.square(x - y), axis=-1), 0.0))


def _accuracy(log_probs: jax.Array, one_hot: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(right answers, labels) over the mask."""
    right = jnp.argmax(log_probs, axis=-1) == jnp.argmax(one_hot, axis=-1)
    return jnp.sum(right & mask, dtype=jnp.float32), jnp.sum(mask, dtype=jnp.float32)
