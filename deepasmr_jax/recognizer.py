"""Mandarin judge: log-mel to toneless pinyin initials and finals, by CTC.

No independent Mandarin recogniser works offline, so this one is trained here. It is NOT independent of the
corpus: show its error on the ground truth beside every number. It learns from the Mandarin records of the split
that the speech tokenizer learns from, so it knows the same voices; it has another seed, and reads the 80-band
"mini" mel instead of the tokenizer's 128-band one.
Batch: wav [B, W] float32 16 kHz, lengths [B] samples, and frame labels phones [B, W // 320] int32 (ids in
text.PHONES, -1 = padding), whose runs give the sequence.
Letters: B rows, T mel frames, N = T // 2 positions, P phones of a row, D width, V symbols with the blank
(id 0).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepasmr_jax import audio, nn, sharding, text
from deepasmr_jax.sharding import spec

MEL = "mini"
BLANK = 0
STRIDE = 2  # mel frames per position: 25 Hz, for about 10 symbols per second
FIRST = next(i for i, p in enumerate(text.PHONES) if p.startswith("zh_"))  # id in PHONES of symbol 1
SYMBOLS = ["", *text.PHONES[FIRST:]]  # symbol i > 0 is PHONES[FIRST + i - 1]


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of the recogniser and its augmentation; the defaults have 1.5 M parameters."""

    width: int = 160
    num_heads: int = 4
    num_layers: int = 5
    mlp_width: int = 320
    kernel: int = 9  # of the depthwise convolution, in positions of 40 ms
    rotary_base: float = 10000.0
    dtype: str = "float32"  # of the matrix products
    max_phones: int = 96  # P: longer rows carry no loss
    # augmentation in training
    num_bands: int = 2
    band_mels: int = 12
    num_gaps: int = 2
    gap_frames: int = 6
    max_shift_mels: int = 3  # the mel axis is moved by up to this: other vocal tracts

    def __post_init__(self):
        nn.check_dtype(self.dtype)
        if self.width % self.num_heads or (self.width // self.num_heads) % 2:
            raise ValueError(
                f"width {self.width} with {self.num_heads} heads: the head size must be whole and even"
            )
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel {self.kernel} is even; use an odd one, it is centred")


def mini() -> Config:
    """The size that configs/mini.py trains. No weights of it come with the package."""
    return Config()


class Block(nnx.Module):
    """Self-attention, gated depthwise convolution and SwiGLU, each behind an RMS norm, on a residual."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        d, options = cfg.width, dict(rngs=rngs)
        small = jax.nn.initializers.variance_scaling(1 / (3 * cfg.num_layers), "fan_in", "normal")
        self.attention_norm = nn.RMSNorm(d)
        self.query = nn.Linear(d, d, ("embed", "heads"), **options)
        self.key = nn.Linear(d, d, ("embed", "heads"), **options)
        self.value = nn.Linear(d, d, ("embed", "heads"), **options)
        self.out = nn.Linear(d, d, ("heads", "embed"), init=small, **options)
        self.conv_norm = nn.RMSNorm(d)
        self.gate = nn.Linear(d, d, **options)
        taps = jax.random.normal(rngs.params(), (cfg.kernel, d), out_sharding=spec(None, None))
        self.taps = nnx.Param(taps * cfg.kernel**-0.5)
        self.conv_out = nn.Linear(d, d, init=small, **options)
        self.mlp_norm = nn.RMSNorm(d)
        self.mlp = nn.SwiGLU(d, cfg.mlp_width, init=small, **options)

    def __call__(self, cfg: Config, x: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
        """[B, N, D], [1, N], [B, N] bool -> [B, N, D] float32."""
        h = self.attention_norm(x)
        q, k, v = (nn.split_heads(f(h, cfg.dtype), cfg.num_heads) for f in (self.query, self.key, self.value))
        q, k = (nn.rotary(y, positions, cfg.rotary_base) for y in (q, k))
        h = nn.attention(q, k, v, mask[:, None, :], dtype=cfg.dtype)
        x = x + self.out(nn.merge_heads(h), cfg.dtype)
        h = self.conv_norm(x)
        h = h * jax.nn.sigmoid(self.gate(h, cfg.dtype)) * mask[:, :, None]
        half = cfg.kernel // 2
        padded = jnp.pad(h, ((0, 0), (half, half), (0, 0)))
        taps = self.taps[...]
        h = sum(padded[:, i : i + h.shape[1]] * taps[i] for i in range(cfg.kernel))
        x = x + self.conv_out(jax.nn.silu(h), cfg.dtype)
        return x + self.mlp(self.mlp_norm(x), cfg.dtype)


class Recognizer(nnx.Module):
    """Two stacked mel frames per position, the blocks, and one score per symbol."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        num_in = STRIDE * audio.MEL_PROFILES[MEL].num_mels
        self.inlet = nn.Linear(num_in, cfg.width, (None, "embed"), rngs=rngs)
        keys = jax.random.split(rngs.params(), cfg.num_layers)
        self.layers = jax.vmap(lambda key: Block(cfg, nnx.Rngs(key)))(keys)
        self.norm = nn.RMSNorm(cfg.width)
        self.outlet = nn.Linear(cfg.width, len(SYMBOLS), ("embed", None), rngs=rngs)


def init(cfg: Config, key: jax.Array) -> Recognizer:
    """Random weights on the current mesh.

    Raises:
        ValueError: if the mesh does not divide the heads, the width or the MLP.
    """
    sharding.check_fits(
        ("heads", cfg.num_heads, "model"),
        ("MLP width", cfg.mlp_width, "model"),
        ("width", cfg.width, "data"),
    )
    return Recognizer(cfg, nnx.Rngs(key))


def logits(
    model: Recognizer, cfg: Config, wav: jax.Array, lengths: jax.Array, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Symbol scores of clips; neither padding nor level nor other rows change a valid score.

    Args:
        model: weights.
        cfg: their config.
        wav: [B, W] float32 in [-1, 1], 16 kHz.
        lengths: [B] int32 valid samples.
        key: for the augmentation of training; None reads the clips as they are.

    Returns:
        ([B, N, V] float32, [B] int32 valid positions): N = W // 640, 25 per second.
    """
    profile = audio.MEL_PROFILES[MEL]
    mel = audio.log_mel(wav, lengths, profile)
    frames = audio.num_frames(lengths, profile)
    mel = _standardise(mel, nn.length_mask(frames, mel.shape[1]))
    if key is not None:
        mel = _augment(cfg, mel, key)
    num = mel.shape[1] // STRIDE
    x = mel[:, : num * STRIDE]
    x = x.reshape(x.shape[0], num, -1, out_sharding=nn.like(x, None))
    counts = frames // STRIDE
    mask = nn.length_mask(counts, num)
    x = model.inlet(x, cfg.dtype)
    positions = jnp.arange(num)[None]

    @jax.checkpoint
    def body(x, block):
        return block(cfg, x, positions, mask), None

    x, _ = jax.lax.scan(body, x, model.layers)
    return model.outlet(model.norm(x), cfg.dtype), counts


def loss(model: Recognizer, cfg: Config, batch: dict[str, jax.Array], key: jax.Array | None):
    """Connectionist temporal classification of the initials and finals.

    Rows without Mandarin, or with more symbols than positions, carry no loss.

    Args:
        model: weights.
        cfg: their config.
        batch: see the file docstring.
        key: for the augmentation; None: none.

    Returns:
        (nats summed over rows, number of symbols, aux): aux has blank_share (of valid positions) and
        rows_used (of all rows), each (sum, count).

    Raises:
        ValueError: if the batch has no phones.

    Source: Graves et al., 2006; the recursion is Optax's.
    """
    if "phones" not in batch:
        raise ValueError(f"batch has {sorted(batch)}, no phones; give frame labels")
    ids, given = sequence_of_frames(batch["phones"], cfg.max_phones)
    scores, counts = logits(model, cfg, batch["wav"], batch["lengths"], key)
    labels = jnp.clip(ids - (FIRST - 1), 0, len(SYMBOLS) - 1)
    used = nn.ctc_fits(counts, labels, given)
    nats = nn.ctc(scores, counts, labels, given)
    total = jnp.sum(jnp.where(used, nats, 0.0))
    count = jnp.sum(jnp.where(used, given, 0)).astype(jnp.float32)
    position = nn.length_mask(counts, scores.shape[1])
    blank = jnp.sum((jnp.argmax(scores, axis=-1) == BLANK) & position)
    aux = {
        "blank_share": (blank.astype(jnp.float32), jnp.sum(position).astype(jnp.float32)),
        "rows_used": (jnp.sum(used).astype(jnp.float32), jnp.sum(counts > 0).astype(jnp.float32)),
    }
    return total, count, aux


def sequence_of_frames(phones: jax.Array, max_phones: int) -> tuple[jax.Array, jax.Array]:
    """Runs of Mandarin phones in frame labels, as a sequence.

    Two equal phones side by side give one entry (a final before the same vowel without initial): rare, and
    the same in every row.

    Args:
        phones: [B, T] int32 ids in text.PHONES; silence, English and padding (-1) are passed over.
        max_phones: P.

    Returns:
        (ids [B, P] int32, 0 = padding; true lengths [B] int32, above P where entries were lost).
    """
    before = jnp.pad(phones, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    starts = (phones >= FIRST) & (phones != before)
    place = jnp.cumsum(starts, axis=1) - 1
    hit = starts[:, :, None] & (place[:, :, None] == jnp.arange(max_phones))
    return jnp.sum(jnp.where(hit, phones[:, :, None], 0), axis=1), jnp.sum(starts, axis=1).astype(jnp.int32)


def target(sentence: str) -> np.ndarray:
    """[P] int32 ids in text.PHONES of a Mandarin sentence: initials and toneless finals by pypinyin.

    Raises:
        ValueError: if pypinyin is not installed or a character has no reading.
    """
    return np.array([text.PHONES.index(p) for p in text.mandarin_phones(sentence)], np.int32)


@functools.partial(jax.jit, static_argnums=1)
def _scores(model, cfg, wav, lengths):
    return logits(model, cfg, wav, lengths)


def decode(model: Recognizer, cfg: Config, wav, lengths) -> list[list[str]]:
    """Best symbol of every position, repeats joined, blanks removed.

    Args:
        model: weights.
        cfg: their config.
        wav: [B, W] float32, 16 kHz. One program per shape: pad to few lengths.
        lengths: [B] int32 valid samples.

    Returns:
        for each row the labels of text.PHONES, such as ["zh_n", "zh_i", "zh_h", "zh_ao"].
    """
    scores, counts = _scores(model, cfg, jnp.asarray(wav, jnp.float32), jnp.asarray(lengths, jnp.int32))
    best = np.asarray(jnp.argmax(scores, axis=-1))
    rows = []
    for row, count in zip(best, np.asarray(counts), strict=True):
        row = row[:count]
        changed = np.concatenate([[True], row[1:] != row[:-1]]) if count else np.zeros(0, bool)
        rows.append([SYMBOLS[i] for i in row[changed] if i != BLANK])
    return rows


def _standardise(mel: jax.Array, mask: jax.Array) -> jax.Array:
    """Zero mean per band, unit deviation per row, over valid frames; zero elsewhere."""
    weight = mask[:, :, None].astype(jnp.float32)
    frames = jnp.maximum(jnp.sum(weight, axis=1, keepdims=True), 1.0)
    mel = (mel - jnp.sum(mel * weight, axis=1, keepdims=True) / frames) * weight
    power = jnp.sum(mel * mel, axis=(1, 2), keepdims=True) / (frames * mel.shape[2])
    return mel * jax.lax.rsqrt(power + 1e-5)


def _augment(cfg: Config, mel: jax.Array, key: jax.Array) -> jax.Array:
    """Blanks bands and gaps and moves the mel axis, each row for itself; [B, T, M] standardised."""
    batch, frames, mels = mel.shape

    def span(key, num, longest, size):
        start_key, size_key = jax.random.split(key)
        start = jax.random.randint(start_key, (batch, num, 1), 0, size)
        end = start + jax.random.randint(size_key, (batch, num, 1), 0, longest + 1)
        place = jnp.arange(size)
        return jnp.any((place >= start) & (place < end), axis=1)  # [B, size]

    band_key, gap_key, shift_key = jax.random.split(key, 3)
    shift = jax.random.randint(shift_key, (batch, 1), -cfg.max_shift_mels, cfg.max_shift_mels + 1)
    moved = sum(
        jnp.where((shift == s)[:, :, None], _shifted(mel, s), 0.0)
        for s in range(-cfg.max_shift_mels, cfg.max_shift_mels + 1)
    )
    lost = span(band_key, cfg.num_bands, cfg.band_mels, mels)[:, None, :]
    lost = lost | span(gap_key, cfg.num_gaps, cfg.gap_frames, frames)[:, :, None]
    return jnp.where(lost, 0.0, moved)


def _shifted(mel: jax.Array, by: int) -> jax.Array:
    """Mel axis moved up by `by` bands, zeros at the end."""
    if by == 0:
        return mel
    pad = (by, 0) if by > 0 else (0, -by)
    padded = jnp.pad(mel, ((0, 0), (0, 0), pad))
    return padded[:, :, : mel.shape[2]] if by > 0 else padded[:, :, -mel.shape[2] :]
