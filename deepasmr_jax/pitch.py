"""Pitch of recordings, and pulses of a pitch track: the source of a source-filter vocoder.

`track` measures F0 by normalised autocorrelation (Boersma, 1993, without its path search); `pulses` turns F0 per
frame into a band-limited pulse train whose phase is exact over any length. Both are jitted, batched, and a row
does not depend on its padding.
Letters: B rows, T frames, W samples, N samples of an analysis frame, L lags.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from deepasmr_jax import audio
from deepasmr_jax.sharding import pick

UNVOICED_HZ = 150.0  # frequency that the silent source runs at between voiced stretches


@dataclasses.dataclass(frozen=True)
class Range:
    """What counts as a pitch: bounds in Hz, and the least autocorrelation of a voiced frame."""

    low_hz: float = 55.0
    high_hz: float = 500.0
    strength: float = 0.6  # at 0.5 a fifth of the frames of a computed whisper pass
    floor: float = 1e-4  # frames with less than this share of the row's greatest energy are unvoiced
    octave_cost: float = 0.03  # taken from a candidate per octave below the highest


def track(wav: jax.Array, recipe: audio.MelConfig, limits: Range = Range()) -> tuple[jax.Array, jax.Array]:
    """F0 and voicing of the frames of a mel recipe.

    Args:
        wav: [B, W] float32.
        recipe: gives sample_rate, n_fft (N), hop and the place of the frames, W // hop of them.
        limits: what counts as a pitch.

    Returns:
        (F0 in Hz [B, T], of the best candidate also where unvoiced; voiced [B, T] bool).

    Source: Boersma (1993), "Accurate short-term analysis of the fundamental frequency ...", equations 8 to 10.
    """
    size, rate = recipe.n_fft, recipe.sample_rate
    first, last = int(rate / limits.high_hz), int(rate / limits.low_hz) + 1
    window = audio.hann(size)
    frames = audio.frame(jnp.pad(wav, ((0, 0), (recipe.pad_samples,) * 2)), size, recipe.hop_samples)
    frames = (frames - jnp.mean(frames, axis=-1, keepdims=True)) * window
    power = jnp.abs(audio.rfft(frames, 2 * size)) ** 2
    correlation = audio.irfft(power, 2 * size)[..., : last + 1]
    energy = correlation[..., :1]
    of_window = np.fft.irfft(np.abs(np.fft.rfft(window, 2 * size)) ** 2)[: last + 1]
    normal = correlation / jnp.maximum(energy, 1e-10) / jnp.asarray(of_window / of_window[0], jnp.float32)
    lags = np.arange(first, last)
    cost = limits.octave_cost * np.log2(lags / first)
    inside = normal[..., first:last]
    is_peak = (inside >= normal[..., first - 1 : last - 1]) & (inside >= normal[..., first + 1 : last + 1])
    best = jnp.argmax(jnp.where(is_peak, inside - jnp.asarray(cost, jnp.float32), -1.0), axis=-1)

    def at(offset: int) -> jax.Array:  # a product, not a gather: rows stay where they are
        chosen = jax.nn.one_hot(best, len(lags))
        return jnp.sum(chosen * normal[..., first + offset : last + offset], axis=-1)

    before, middle, after = at(-1), at(0), at(1)
    curve = before - 2 * middle + after
    shift = jnp.where(curve < -1e-6, 0.5 * (before - after) / jnp.minimum(curve, -1e-6), 0.0)
    hz = rate / (best + first + jnp.clip(shift, -0.5, 0.5))
    loud = pick(energy, 0, 2) > limits.floor * jnp.max(energy, axis=1)
    return hz, (middle > limits.strength) & loud


def pulses(
    hz: jax.Array, voiced: jax.Array, hop: int, rate: int, valid: jax.Array | None = None
) -> jax.Array:
    """Band-limited pulse train of unit power that follows a pitch track.

    Pitch and loudness go linearly from the middle of one frame to the middle of the next. The phase is kept in
    cycles modulo one, so that it is exact however long the row is.

    Args:
        hz: [B, T] F0, read where voiced.
        voiced: [B, T], 1 or True where there is a voice; values between fade.
        hop: samples of a frame.
        rate: Hz.
        valid: [B, T] bool, frames of the row, the first ones; None: all.

    Returns:
        [B, T * hop] float32; zero where unvoiced, and beyond the row.
    """
    gate = jnp.asarray(voiced, jnp.float32)
    valid = hz == hz if valid is None else valid  # keeps the split of the rows
    gate = jnp.where(valid, gate, 0.0)

    def beside(x: jax.Array, offset: int) -> jax.Array:
        """x of the frame before (-1) or after (1); zero outside."""
        padded = jnp.pad(x, ((0, 0), (1, 0) if offset < 0 else (0, 1)))
        return padded[:, :-1] if offset < 0 else padded[:, 1:]

    # an unvoiced frame takes the pitch of a voiced neighbour, so that a voice neither starts nor ends in a glide
    known = jnp.where(beside(gate, 1) > 0, beside(hz, 1), UNVOICED_HZ)
    known = jnp.where(beside(gate, -1) > 0, beside(hz, -1), known)
    hz = jnp.where(gate > 0, hz, known)

    def upsample(x: jax.Array) -> jax.Array:
        """[B, T] to [B, T, hop], linear between frame middles, held at both ends of the row."""
        after = jnp.where(beside(valid.astype(jnp.float32), 1) > 0, beside(x, 1), x)
        before = jnp.where(jnp.arange(x.shape[1]) > 0, beside(x, -1), x)
        place = (np.arange(hop, dtype=np.float32) + 0.5) / hop - 0.5  # in frames, around the frame's middle
        left, right = np.maximum(-place, 0), np.maximum(place, 0)
        return x[..., None] * (1 - left - right) + before[..., None] * left + after[..., None] * right

    step = upsample(hz) / rate
    inner = jnp.cumsum(step, axis=-1)
    turns = (pick(inner, -1, 2) % 1.0 * 2.0**32).astype(jnp.uint32)
    ends = jnp.cumsum(turns, axis=1).astype(jnp.float32) / 2.0**32  # whole numbers wrap around by themselves
    cycles = (beside(ends, -1)[..., None] + inner) % 1.0
    # sum of cos(k x) for k = 1..count in closed form (Dirichlet kernel)
    count = jnp.floor(0.5 / jnp.maximum(step, 1e-4))
    half = jnp.sin(jnp.pi * cycles)
    kernel = jnp.sin((2 * count + 1) * jnp.pi * cycles) / jnp.where(jnp.abs(half) < 1e-4, 1.0, half)
    total = 0.5 * (jnp.where(jnp.abs(half) < 1e-4, 2 * count + 1, kernel) - 1)
    out = total * jnp.sqrt(2 / count) * upsample(gate) * valid[..., None]
    axes = jax.typeof(hz).sharding.spec
    return out.reshape(hz.shape[0], hz.shape[1] * hop, out_sharding=jax.P(axes[0] if axes else None, None))
