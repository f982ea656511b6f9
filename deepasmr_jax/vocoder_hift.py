"""HiFT vocoder of CosyVoice2: log-mel to waveform by a harmonic source, upsampling layers and a short inverse STFT.

F0 is predicted from the mel; sines at its multiples and noise make a source signal, whose short-time spectrum is
added at every upsampling stage; the last layer gives magnitude and phase of frames of 16 samples every 4.
Source: HiFTNet (Li et al., 2023) and the public CosyVoice2 (Du et al., 2024). Differences on purpose: the phase of the
sines is exact at any length, the noise depends on the sample's place only, weight norm is folded, no training.
Letters: B rows, T mel frames, M mel bins, W = T * hop samples, H harmonics, C channels, P upsampling so far,
F frames of the short spectrum, K its bins.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepasmr_jax import audio, nn
from deepasmr_jax.sharding import pick
from deepasmr_jax.vocoder_parts import Conv, Upsample, draw

SLOPE = 0.1  # of every leaky ReLU but the last
LAST_SLOPE = 0.01  # the public code leaves the library's default there
MAX_MAGNITUDE = 100.0
MAX_SAMPLE = 0.99
VOICED_HZ = 10.0  # above this a frame is voiced
SINE_LEVEL = 0.1
NOISE_LEVELS = (SINE_LEVEL / 3, 0.003)  # standard deviation where unvoiced, where voiced
# of F0 and of the short spectra: accelerators round the operands of float32 products by default
EXACT = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of the network; the defaults are the public one's, see `cosyvoice2`."""

    mel_profile: str = "cv2"
    initial_channels: int = 512
    upsample_rates: tuple[int, ...] = (8, 5, 3)
    upsample_kernels: tuple[int, ...] = (16, 11, 7)
    residual_kernels: tuple[int, ...] = (3, 7, 11)  # of the blocks of each stage, which are averaged
    residual_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    source_kernels: tuple[int, ...] = (7, 7, 11)  # of the source's block, one a stage
    source_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    n_fft: int = 16  # samples of a frame of the short spectra
    hop_samples: int = 4
    num_harmonics: int = 9  # the fundamental is one of them
    f0_width: int = 512
    num_f0_layers: int = 5
    # "unvoiced" leaves the sines out: the predictor was trained on voices and can hear one in a whisper
    source: str = "predicted"
    dtype: str = "float32"  # operands of the convolutions; F0, phases and short spectra are float32 always

    def __post_init__(self):
        nn.check_dtype(self.dtype)
        if self.source not in ("predicted", "unvoiced"):
            raise ValueError(f"source {self.source!r} is unknown; use predicted or unvoiced")
        mel = audio.mel_profile(self.mel_profile)
        hop = math.prod(self.upsample_rates) * self.hop_samples
        if hop != mel.hop_samples or mel.kind != "hifigan":
            raise ValueError(
                f"upsample_rates {self.upsample_rates} and hop_samples {self.hop_samples} multiply to {hop}; "
                f"profile {mel.name!r} needs {mel.hop_samples}, and frames that are not centred"
            )
        if mel.sample_rate % hop or hop % 2:
            raise ValueError(
                f"{mel.sample_rate} Hz over a hop of {hop}: need a whole number of frames a second and an even hop, "
                "for exact phases"
            )
        if self.n_fft % (2 * self.hop_samples) or self.n_fft >= hop:
            raise ValueError(
                f"n_fft {self.n_fft} must be an even multiple of hop_samples {self.hop_samples}, below the hop {hop}"
            )
        if not len(self.upsample_rates) == len(self.upsample_kernels) == len(self.source_kernels):
            raise ValueError(
                f"{len(self.upsample_rates)} upsample_rates, {len(self.upsample_kernels)} upsample_kernels and "
                f"{len(self.source_kernels)} source_kernels; give one of each a stage"
            )
        for rate, kernel in zip(self.upsample_rates, self.upsample_kernels, strict=True):
            if kernel < rate or (kernel - rate) % 2:
                raise ValueError(
                    f"upsample kernel {kernel} for rate {rate}: the difference must be even, not below 0"
                )
        for what in ("residual", "source"):
            kernels, dilations = getattr(self, f"{what}_kernels"), getattr(self, f"{what}_dilations")
            if len(kernels) != len(dilations) or any(k % 2 == 0 for k in kernels):
                raise ValueError(
                    f"{what}_kernels {kernels} with {len(dilations)} lists of dilations; give as many, and odd kernels"
                )
        if self.initial_channels % 2 ** len(self.upsample_rates):
            raise ValueError(
                f"initial_channels {self.initial_channels} must halve {len(self.upsample_rates)} times; "
                f"use a multiple of {2 ** len(self.upsample_rates)}"
            )

    @property
    def mel(self) -> audio.MelConfig:
        """The mel recipe of the input."""
        return audio.mel_profile(self.mel_profile)

    @property
    def upsampling(self) -> int:
        """Frames of the short spectra for each mel frame (one more at the end of a row)."""
        return math.prod(self.upsample_rates)


def cosyvoice2() -> Config:
    """The public CosyVoice2 `hift.pt`: 24 kHz, 20,806,557 parameters (weight norm folded)."""
    return Config()


# ------------------------------------------------------------------------------------------------- layers


class Linear(nnx.Module):
    """kernel [in, out], bias [out]; float32 whatever the accelerator's default is."""

    def __init__(self, key: jax.Array, num_in: int, num_out: int):
        self.kernel, self.bias = draw(key, (num_in, num_out), num_in)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] to [..., out] float32."""
        return jnp.einsum("...i,io->...o", x, self.kernel[...], precision=EXACT) + self.bias[...]


class Downsample(nnx.Module):
    """Convolution of 2 * rate taps that keeps one frame of `rate`; of one tap if that is 1."""

    def __init__(self, key: jax.Array, rate: int, num_in: int, num_out: int):
        size = 2 * rate if rate > 1 else 1
        self.kernel, self.bias = draw(key, (size, num_in, num_out), size * num_in)

    def __call__(self, x: jax.Array, dtype: str, rate: int) -> jax.Array:
        """[B, rate * N + 1, in] to [B, N, out] float32 (N + 1 frames if the rate is 1)."""
        kernel, pad, layout = self.kernel[...].astype(dtype), rate // 2, ("NWC", "WIO", "NWC")
        y = jax.lax.conv_general_dilated(
            x.astype(dtype), kernel, (rate,), [(pad, pad)], dimension_numbers=layout
        )
        return y.astype(jnp.float32) + self.bias[...]


class Snake(nnx.Module):
    """`x + sin^2(alpha x) / alpha` with alpha [C] (Ziyin et al., 2020)."""

    def __init__(self, channels: int):
        self.alpha = nnx.Param(jnp.ones(channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, W, C] to [B, W, C]."""
        alpha = self.alpha[...]
        return x + jnp.square(jnp.sin(alpha * x)) / (alpha + 1e-9)


class ResidualBlock(nnx.Module):
    """For each dilation: snakes1, convs1 (dilated), snakes2, convs2, and the sum with the input."""

    def __init__(self, key: jax.Array, size: int, channels: int, num_dilations: int):
        keys = jax.random.split(key, 2 * num_dilations)
        self.convs1 = nnx.List([Conv(k, size, channels, channels) for k in keys[:num_dilations]])
        self.convs2 = nnx.List([Conv(k, size, channels, channels) for k in keys[num_dilations:]])
        self.snakes1 = nnx.List([Snake(channels) for _ in range(num_dilations)])
        self.snakes2 = nnx.List([Snake(channels) for _ in range(num_dilations)])

    @functools.partial(jax.jit, static_argnums=(2, 3))  # blocks of one shape are traced once
    def __call__(self, x: jax.Array, dtype: str, dilations: tuple[int, ...], valid=None) -> jax.Array:
        """[B, W, C] to [B, W, C]; `valid` [B, W, 1]: what lies beyond a row's end is zeroed."""
        for i, dilation in enumerate(dilations):
            y = _zeroed(self.convs1[i](self.snakes1[i](x), dtype, dilation=dilation), valid)
            x = x + _zeroed(self.convs2[i](self.snakes2[i](y), dtype), valid)
        return x


class F0Predictor(nnx.Module):
    """convs (kernel 3, ELU) and head."""

    def __init__(self, cfg: Config, key: jax.Array):
        keys = jax.random.split(key, cfg.num_f0_layers + 1)
        sizes = (cfg.mel.num_mels, *[cfg.f0_width] * cfg.num_f0_layers)
        self.convs = nnx.List(
            [Conv(k, 3, i, o) for k, i, o in zip(keys[:-1], sizes[:-1], sizes[1:], strict=True)]
        )
        self.head = Linear(keys[-1], cfg.f0_width, 1)


class Generator(nnx.Module):
    """f0_predictor, source_mix; first; a stage: ups, source_downs, source_blocks, residual blocks; last.

    blocks: stages x residual kernels, stage by stage.
    """

    def __init__(self, cfg: Config, key: jax.Array):
        num_stages, num_kernels = len(cfg.upsample_rates), len(cfg.residual_kernels)
        keys = iter(jax.random.split(key, 4 + num_stages * (3 + num_kernels)))
        self.f0_predictor = F0Predictor(cfg, next(keys))
        self.source_mix = Linear(next(keys), cfg.num_harmonics, 1)
        channels = cfg.initial_channels
        self.first = Conv(next(keys), 7, cfg.mel.num_mels, channels)
        ups, downs, source_blocks, blocks = [], [], [], []
        rate = cfg.upsampling
        for i in range(num_stages):
            ups.append(Upsample(next(keys), cfg.upsample_kernels[i], channels, channels // 2))
            channels //= 2
            rate //= cfg.upsample_rates[i]
            downs.append(Downsample(next(keys), rate, cfg.n_fft + 2, channels))
            size, dilations = cfg.source_kernels[i], cfg.source_dilations[i]
            source_blocks.append(ResidualBlock(next(keys), size, channels, len(dilations)))
            for size, dilations in zip(cfg.residual_kernels, cfg.residual_dilations, strict=True):
                blocks.append(ResidualBlock(next(keys), size, channels, len(dilations)))
        self.ups, self.blocks = nnx.List(ups), nnx.List(blocks)
        self.source_downs, self.source_blocks = nnx.List(downs), nnx.List(source_blocks)
        self.last = Conv(next(keys), 7, channels, cfg.n_fft + 2)


def init(cfg: Config, key: jax.Array) -> Generator:
    """New weights."""
    return Generator(cfg, key)


# ------------------------------------------------------------------------------------------------- source


def f0(model: Generator, cfg: Config, mel: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
    """Fundamental frequency that the predictor hears in a log-mel spectrogram.

    Args:
        model: the generator.
        cfg: its config; static under jit.
        mel: [B, T, M] float, of the recipe cfg.mel_profile.
        lengths: [B] int, valid frames of each row; None: all T.

    Returns:
        [B, T] float32 Hz; a frame is voiced above VOICED_HZ. 0 beyond a row's end.

    Raises:
        ValueError: if `mel` does not have the recipe's number of bins.
    """
    _check_mel(cfg, mel)
    x = _keep(mel.astype(jnp.float32), lengths, 1)
    for conv in model.f0_predictor.convs:
        x = _keep(jax.nn.elu(conv(x, "float32", precision=EXACT)), lengths, 1)
    return pick(_keep(jnp.abs(model.f0_predictor.head(x)), lengths, 1), 0, 2)


def _turns(hz: jax.Array, frame_rate: int) -> jax.Array:
    """What a tone of `hz` [B, T] turns in a frame, whole turns left out, in 2^-32 of a turn; uint32.

    Integers wrap around where turns do, so their sum is exact at any length. A float32 sum is not: at 30 s and
    150 Hz it is off by 0.07 in the ninth sine.
    """
    whole = jnp.floor(hz)
    count = whole.astype(jnp.uint32) % frame_rate
    unit, rest = divmod(2**32, frame_rate)
    part = ((hz - whole) * 2.0**24).astype(jnp.uint32)  # exact from 1 Hz on: float32 has 24 bits
    return (
        count * np.uint32(unit) + count * np.uint32(rest) // frame_rate + part * np.uint32(256) // frame_rate
    )


def sines(cfg: Config, hz: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
    """Sines at the multiples of F0, of amplitude 1.

    The phase at the middle of a frame is the sum of the frames' turns up to and with its own; between middles it
    is linear; before the first and after the last middle it stands still.

    Args:
        cfg: config.
        hz: [B, T] float32, at least 0.
        lengths: [B] int, valid frames of each row; None: all T. Beyond a row's end values mean nothing.

    Returns:
        [B, H, W] float32. No gradient reaches `hz` through the sum of turns.

    Source: what the public code's down-sampling, cumulative sum and up-sampling amount to, without its rounding.
    """
    hop, rate = cfg.mel.hop_samples, cfg.mel.sample_rate
    numbers = np.arange(1, cfg.num_harmonics + 1)[:, None]
    at_middle = jnp.cumsum(_turns(hz, rate // hop), axis=1)[:, None] * numbers.astype(np.uint32)  # [B, H, T]
    at_middle = at_middle.astype(jnp.float32) / 2.0**32
    # turns a sample on the way to the middle of frame t; a step of a whole turn is none
    step = hz[:, None] * numbers.astype(np.float32) / rate % 1.0
    inside = jnp.arange(hz.shape[1]) > 0
    if lengths is not None:
        inside = inside & (jnp.arange(hz.shape[1]) < jnp.asarray(lengths)[:, None, None])
    step = jnp.where(inside, step, 0.0)
    # T + 1 pieces of one hop, each from a middle to the next; half of the first and of the last lies outside
    start = jnp.concatenate([at_middle[..., :1], at_middle], axis=-1)[..., None]
    step = jnp.pad(step, ((0, 0), (0, 0), (0, 1)))[..., None]
    turns = start + step * (np.arange(hop, dtype=np.float32) + 0.5)
    turns = turns.reshape(*turns.shape[:2], -1)[..., hop // 2 : -hop // 2]
    return jnp.sin(2 * np.pi * (turns - jnp.floor(turns)))


def draw_noise(cfg: Config, num_frames: int, key: jax.Array | None = None) -> jax.Array:
    """White noise of unit power for `excitation`, [1, H, W]; the same for a sample whatever the length."""
    key = jax.random.key(0) if key is None else key

    def of_frame(number: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, number), (cfg.num_harmonics, cfg.mel.hop_samples))

    noise = jax.vmap(of_frame, out_axes=1)(jnp.arange(num_frames))
    return noise.reshape(1, cfg.num_harmonics, -1)


def excitation(
    model: Generator, cfg: Config, hz: jax.Array, noise: jax.Array, lengths: jax.Array | None = None
) -> jax.Array:
    """Source signal: sines with a little noise where voiced, more noise elsewhere, mixed to one channel.

    Args:
        model: the generator.
        cfg: its config; with source "unvoiced" all frames are taken as unvoiced.
        hz: [B, T] float32 F0.
        noise: [B, H, W] or [1, H, W] float32, white, of unit power.
        lengths: [B] int, valid frames of each row; None: all T. Beyond a row's end values mean nothing.

    Returns:
        [B, W] float32 in [-1, 1].
    """
    voiced = (hz > VOICED_HZ) & (cfg.source == "predicted")
    voiced = jnp.repeat(voiced, cfg.mel.hop_samples, axis=1)[:, None]  # [B, 1, W]
    tones = noise * jnp.where(voiced, NOISE_LEVELS[1], NOISE_LEVELS[0])
    if cfg.source == "predicted":
        tones = tones + jnp.where(voiced, SINE_LEVEL * sines(cfg, hz, lengths), 0.0)
    gains = model.source_mix.kernel[...]  # [H, 1]
    return jnp.tanh(jnp.sum(tones * gains, axis=1) + model.source_mix.bias[...])


# ----------------------------------------------------------------------------------------- short spectra


def _bases(n_fft: int) -> tuple[np.ndarray, np.ndarray]:
    """Windowed Fourier transform [n_fft, 2 K] and its windowed inverse [2 K, n_fft]; K real, then K imaginary.

    Products with them are fast where a Fourier transform of 16 samples is not.
    """
    bins, window = np.arange(n_fft // 2 + 1), audio.hann(n_fft).astype(np.float64)
    angles = 2 * np.pi * np.arange(n_fft)[:, None] * bins / n_fft
    forward = np.concatenate([np.cos(angles), -np.sin(angles)], axis=1)
    twice = np.where((bins == 0) | (bins == n_fft // 2), 1.0, 2.0) / n_fft
    inverse = forward * np.concatenate([twice, twice])
    return (forward * window[:, None]).astype(np.float32), (inverse * window[:, None]).T.astype(np.float32)


def analyse(cfg: Config, wav: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
    """Short-time spectrum with centred frames; a row's valid samples are reflected at both ends.

    Args:
        cfg: gives n_fft and hop_samples.
        wav: [B, W] float32.
        lengths: [B] int, valid mel frames (not samples) of each row, at least 1; None: all.

    Returns:
        [B, F, 2 K] float32, real parts before imaginary ones, F = W / hop_samples + 1; 0 beyond a row's
        lengths * upsampling + 1 frames.
    """
    half = cfg.n_fft // 2
    if lengths is None:
        x = jnp.pad(wav, ((0, 0), (half, half)), mode="reflect")
    else:

        def reflect(row: jax.Array, end: jax.Array) -> jax.Array:
            tail = jax.lax.dynamic_slice(row, (end - 1 - half,), (half,))[::-1]
            return jax.lax.dynamic_update_slice(jnp.pad(row, (half, half)), tail, (end + half,))

        x = jax.vmap(reflect)(wav, jnp.asarray(lengths, jnp.int32) * cfg.mel.hop_samples)
        x = jnp.concatenate([wav[:, half:0:-1], x[:, half:]], axis=1)
    frames = audio.frame(x, cfg.n_fft, cfg.hop_samples)
    spectrum = jnp.einsum("bfn,nk->bfk", frames, _bases(cfg.n_fft)[0], precision=EXACT)
    return _keep(spectrum, lengths, cfg.upsampling, 1)


def synthesize(
    cfg: Config, magnitude: jax.Array, phase: jax.Array, lengths: jax.Array | None = None
) -> jax.Array:
    """Inverse of `analyse`: overlap-add, divided by the summed squared windows.

    Args:
        cfg: gives n_fft and hop_samples.
        magnitude: [B, F, K] float32.
        phase: [B, F, K] float32, radians.
        lengths: [B] int, valid mel frames of each row; None: all.

    Returns:
        [B, (F - 1) * hop_samples] float32; beyond a row's end values mean nothing.
    """
    num_frames, hop = magnitude.shape[1], cfg.hop_samples
    parts = jnp.concatenate([magnitude * jnp.cos(phase), magnitude * jnp.sin(phase)], axis=-1)
    frames = jnp.einsum("bfk,kn->bfn", parts, _bases(cfg.n_fft)[1], precision=EXACT)
    weights = jnp.broadcast_to(jnp.square(audio.hann(cfg.n_fft)), (1, num_frames, cfg.n_fft))
    frames, weights = (_keep(x, lengths, cfg.upsampling, 1) for x in (frames, weights))

    def add(x: jax.Array) -> jax.Array:
        pieces = cfg.n_fft // hop
        shifted = [
            jnp.pad(x[..., i * hop : (i + 1) * hop], ((0, 0), (i, pieces - 1 - i), (0, 0)))
            for i in range(pieces)
        ]
        y = sum(shifted).reshape(x.shape[0], -1)
        return y[:, cfg.n_fft // 2 : cfg.n_fft // 2 + (num_frames - 1) * hop]

    return add(frames) / jnp.maximum(add(weights), 1e-8)


# ---------------------------------------------------------------------------------------------- generator


def _check_mel(cfg: Config, mel: jax.Array) -> None:
    if mel.ndim != 3 or mel.shape[-1] != cfg.mel.num_mels:
        raise ValueError(
            f"mel has shape {mel.shape}; profile {cfg.mel_profile!r} needs [B, T, {cfg.mel.num_mels}]"
        )


def _valid(x: jax.Array, lengths: jax.Array | None, per_frame: int, more: int = 0) -> jax.Array | None:
    """[B, W, 1] bool: which places of x [B, W, C] lie before `lengths * per_frame + more`; None for all."""
    if lengths is None:
        return None
    ends = jnp.asarray(lengths, jnp.int32) * per_frame + more
    return nn.length_mask(ends, x.shape[1])[..., None]


def _zeroed(x: jax.Array, valid: jax.Array | None) -> jax.Array:
    """x with zeros where it is not valid."""
    return x if valid is None else jnp.where(valid, x, 0.0)


def _keep(x: jax.Array, lengths: jax.Array | None, per_frame: int, more: int = 0) -> jax.Array:
    """[B or 1, W, C] with zeros beyond `lengths * per_frame + more`, as a convolution's padding has them."""
    return _zeroed(x, _valid(x, lengths, per_frame, more))


def layers(
    model: Generator,
    cfg: Config,
    mel: jax.Array,
    lengths: jax.Array | None = None,
    noise: jax.Array | None = None,
    key: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """All that `apply` computes on the way; arguments and errors as there.

    Returns:
        f0 [B, T] Hz; source [B, W]; source_stft [B, F, 2 K], F = T * upsampling + 1; stage_0, stage_1, ...
        [B, T * P, C] (the last has F frames); magnitude, phase [B, F, K]; wav [B, W].
    """
    _check_mel(cfg, mel)
    out = {"f0": f0(model, cfg, mel, lengths)}
    noise = draw_noise(cfg, mel.shape[1], key) if noise is None else noise
    out["source"] = excitation(model, cfg, out["f0"], noise, lengths)
    out["source_stft"] = spectrum = analyse(cfg, out["source"], lengths)
    x = _keep(model.first(_keep(mel.astype(jnp.float32), lengths, 1), cfg.dtype), lengths, 1)
    num_kernels, num_stages = len(cfg.residual_kernels), len(cfg.upsample_rates)
    done = 1
    for i, rate in enumerate(cfg.upsample_rates):
        done *= rate
        more = int(i == num_stages - 1)

        x = model.ups[i](jax.nn.leaky_relu(x, SLOPE), cfg.dtype, rate)
        if more:  # one frame by reflection on the left: the source's spectrum has one frame more
            x = jnp.concatenate([jax.lax.slice_in_dim(x, 1, 2, axis=1), x], axis=1)
        valid = _valid(x, lengths, done, more)
        source = _zeroed(model.source_downs[i](spectrum, cfg.dtype, cfg.upsampling // done), valid)
        x = _zeroed(x, valid) + model.source_blocks[i](source, cfg.dtype, cfg.source_dilations[i], valid)
        stage = model.blocks[i * num_kernels : (i + 1) * num_kernels]
        x = sum(b(x, cfg.dtype, d, valid) for b, d in zip(stage, cfg.residual_dilations, strict=True))
        out[f"stage_{i}"] = x = x / num_kernels
    y = model.last(jax.nn.leaky_relu(x, LAST_SLOPE), cfg.dtype)
    log_magnitude, angle = jnp.split(y, 2, axis=-1)
    out["magnitude"] = jnp.minimum(jnp.exp(log_magnitude), MAX_MAGNITUDE)
    out["phase"] = jnp.sin(angle)
    wav = synthesize(cfg, out["magnitude"], out["phase"], lengths)
    wav = jnp.clip(wav, -MAX_SAMPLE, MAX_SAMPLE)
    if lengths is not None:
        ends = jnp.asarray(lengths, jnp.int32)[:, None] * cfg.mel.hop_samples
        wav = jnp.where(jnp.arange(wav.shape[1]) < ends, wav, 0.0)
    out["wav"] = wav
    return out


def apply(
    model: Generator,
    cfg: Config,
    mel: jax.Array,
    lengths: jax.Array | None = None,
    noise: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Waveform of a log-mel spectrogram.

    Args:
        model: the generator.
        cfg: its config; static under jit.
        mel: [B, T, M] float, of the recipe cfg.mel_profile.
        lengths: [B] int, valid frames of each row; None: all T.
        noise: [B, H, W] or [1, H, W] float32, white, of unit power; None: `draw_noise` with `key`.
        key: of the noise, one for all rows; None: a fixed one.

    Returns:
        [B, W] float32 in [-0.99, 0.99], W = T * 480 for profile "cv2". With `lengths` a row is zero from its
        lengths * hop samples on, and the samples before are those of a single run: they depend neither on T nor
        on other rows.

    Raises:
        ValueError: if `mel` does not have the recipe's number of bins.
    """
    return layers(model, cfg, mel, lengths, noise, key)["wav"]
