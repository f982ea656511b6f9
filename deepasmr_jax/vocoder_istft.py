"""Vocoder with an inverse-STFT head (Vocos family): log-mel to waveform without upsampling layers.

A convolution over mel frames, ConvNeXt blocks (stacked, scanned), and a linear head that gives the magnitude
and the phase of each frame's spectrum; overlap-add makes the samples. Source: Vocos (Siuzdak, 2023).
With `source` nothing but filters is predicted: one for a pulse train at a pitch read from the mel, silent without
voice, and one for white noise (harmonic plus noise model, Stylianou, 2001; the pulses as in HiFT, Li et al.,
2023). No phase has to be learned, and a voice can come from the pulses alone: beside a head that makes any spectrum,
the pulses are left unused (tried: they ended 60 dB below the rest).
Training: multi-resolution STFT and mel losses, and optionally small multi-period and spectrogram
discriminators from a given step on (least squares; Kong et al., 2020; Jang et al., 2021).
Batch: wav [B, W] float32 in [-1, 1] at the profile's rate; the mel is computed inside the loss. lengths [B] int32:
0 of an empty row, which counts nowhere; may be left out.
Letters: B rows, T mel frames, M mel bins, W samples, D width, F MLP width, P period, C channels;
`bins` are those of a spectrum, `subframes` the output frames of a mel frame.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from deepasmr_jax import audio, nn, pitch, vocoder_parts
from deepasmr_jax.sharding import pick, spec
from deepasmr_jax.vocoder_parts import Gan, mean_of_rows, row_weights

MAX_MAGNITUDE = 100.0  # Vocos: keeps an untrained head from overflowing
WASH_BINS = 3.0  # standard deviation of the smoothing over mel bins in `_spoil`
ROUGHNESS = 0.5  # greatest standard deviation of its noise, in nats


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of the network and weights of its losses; see `mini` for the built-in model's."""

    mel_profile: str = "mini"
    width: int = 256
    mlp_width: int = 768
    num_layers: int = 6
    kernel: int = 7  # frames seen by each block
    # output frames of each mel frame, and their size (0: the profile's n_fft). A long frame with a long hop
    # cannot follow a moving pitch: the phase must fit over 64 ms, and harmonics come out as noise.
    subframes: int = 1
    frame_size: int = 0
    dtype: str = "float32"  # operands of matrix products and convolutions
    remat: bool = False
    source: bool = False  # pulse train at the predicted pitch
    pitch_bins: int = 80  # of the prediction, over pitch.Range on a log scale
    # losses; the adversarial terms are means over discriminators
    stft_sizes: tuple[int, ...] = (256, 512, 1024, 2048)  # windows; the hop is a quarter
    stft_weight: float = 5.0
    mel_weight: float = 15.0
    pitch_weight: float = 1.0  # pitch (of voiced frames) and voicing, in nats a frame
    # share of training rows whose mel is spoilt as an acoustic model spoils it (`_spoil`)
    spoil_probability: float = 0.0
    adversarial: bool = False
    adversarial_start_step: int = 0
    adversarial_weight: float = 1.0
    feature_weight: float = 2.0
    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    period_channels: tuple[int, ...] = (16, 32, 64, 64)
    spectrogram_sizes: tuple[int, ...] = (256, 1024)
    spectrogram_channels: tuple[int, ...] = (8, 32, 32)

    def __post_init__(self):
        nn.check_dtype(self.dtype)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel {self.kernel} is even; use an odd one, it is centred")
        mel = audio.mel_profile(self.mel_profile)
        if (
            self.subframes < 1
            or mel.hop_samples % self.subframes
            or (self.subframes > 1 and mel.kind == "vocos")
        ):
            raise ValueError(
                f"subframes {self.subframes} must divide the hop {mel.hop_samples} of profile {mel.name!r}, "
                "and be 1 for a profile with centred frames"
            )
        if self.frames.n_fft < 2 * self.frames.hop_samples:
            raise ValueError(
                f"output frames of {self.frames.n_fft} samples every {self.frames.hop_samples} do not overlap by "
                f"half; raise subframes or frame_size, or choose another profile than {mel.name!r}"
            )

    @property
    def mel(self) -> audio.MelConfig:
        """The mel recipe of the input."""
        return audio.mel_profile(self.mel_profile)

    @property
    def frames(self) -> audio.MelConfig:
        """Size, hop and placing of the output frames; its mel bands mean nothing."""
        size = self.frame_size or self.mel.n_fft
        hop = self.mel.hop_samples // self.subframes
        return dataclasses.replace(
            self.mel, n_fft=size, win_samples=min(size, self.mel.win_samples), hop_samples=hop
        )


def mini() -> Config:
    """The built-in model's vocoder: 16 kHz, 1.6 M parameters, pulses and noise, frames of 32 ms every 10 ms."""
    return Config(
        mlp_width=512, num_layers=4, subframes=2, frame_size=512, source=True, spoil_probability=0.7
    )


def vocos_24khz() -> Config:
    """Shape of the public Vocos mel-24khz model: 13.5 M parameters."""
    return Config(mel_profile="f5", width=512, mlp_width=1536, num_layers=8)


# ------------------------------------------------------------------------------------------------ generator


def _param(key: jax.Array, shape: tuple[int, ...], std: float) -> nnx.Param:
    return nnx.Param(std * jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32))


class Linear(nnx.Module):
    """kernel [in, out], bias [out]."""

    def __init__(self, key: jax.Array, num_in: int, num_out: int, std: float = 0.02):
        self.kernel = _param(key, (num_in, num_out), std)
        self.bias = nnx.Param(jnp.zeros(num_out))

    def __call__(self, x: jax.Array, dtype: str) -> jax.Array:
        """[..., in] to [..., out] float32."""
        kernel = self.kernel[...].astype(dtype)
        y = jnp.einsum("...d,df->...f", x.astype(dtype), kernel, preferred_element_type=jnp.float32)
        return y + self.bias[...]


class Conv(nnx.Module):
    """Convolution over frames, zero padded: kernel [k, in, out], bias [out]."""

    def __init__(self, key: jax.Array, size: int, num_in: int, num_out: int):
        self.kernel = _param(key, (size, num_in, num_out), 0.02)
        self.bias = nnx.Param(jnp.zeros(num_out))

    def __call__(self, x: jax.Array, dtype: str) -> jax.Array:
        """[B, T, in] to [B, T, out] float32."""
        kernel = self.kernel[...].astype(dtype)
        half = kernel.shape[0] // 2
        layout = ("NWC", "WIO", "NWC")
        y = jax.lax.conv_general_dilated(
            x.astype(dtype), kernel, (1,), [(half, half)], dimension_numbers=layout
        )
        return y.astype(jnp.float32) + self.bias[...]


class Block(nnx.Module):
    """ConvNeXt block: depthwise convolution over frames, norm, MLP with GELU, layer scale, residual."""

    def __init__(self, cfg: Config, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.depthwise = _param(keys[0], (cfg.kernel, cfg.width), 0.02)
        self.depthwise_bias = nnx.Param(jnp.zeros(cfg.width))
        self.norm = nn.LayerNorm(cfg.width)
        self.up = Linear(keys[1], cfg.width, cfg.mlp_width)
        self.down = Linear(keys[2], cfg.mlp_width, cfg.width)
        self.gain = nnx.Param(jnp.full(cfg.width, 1.0 / cfg.num_layers))

    def __call__(self, x: jax.Array, dtype: str) -> jax.Array:
        """[B, T, D] to [B, T, D] float32."""
        taps = self.depthwise[...]
        half = taps.shape[0] // 2
        padded = jnp.pad(x, ((0, 0), (half, half), (0, 0)))
        # shifted multiply-adds: XLA's grouped convolution is slow on CPU
        y = sum(padded[:, i : i + x.shape[1]] * taps[i] for i in range(taps.shape[0]))
        y = self.norm(y + self.depthwise_bias[...])
        y = self.down(jax.nn.gelu(self.up(y, dtype), approximate=False), dtype)
        return x + self.gain[...] * y


class Generator(nnx.Module):
    """embed, norm, layers (stacked on axis 0), final_norm, head; with a source three heads in place of `head`.

    For each of the output frames of a mel frame: head and filter_head give log magnitudes, then phases (kernels
    [D, subframes * 2 * bins]), noise_head log magnitudes ([D, subframes * bins]). pitch_head gives logits of the
    pitch bins, then of voicing.
    """

    def __init__(self, cfg: Config, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.embed = Conv(keys[0], cfg.kernel, cfg.mel.num_mels, cfg.width)
        self.norm = nn.LayerNorm(cfg.width)
        self.layers = jax.vmap(lambda k: Block(cfg, k))(jax.random.split(keys[1], cfg.num_layers))
        self.final_norm = nn.LayerNorm(cfg.width)
        num_bins = cfg.subframes * (cfg.frames.n_fft // 2 + 1)
        if cfg.source:
            pitch_key, filter_key, noise_key = jax.random.split(keys[2], 3)
            self.pitch_head = Linear(pitch_key, cfg.width, cfg.pitch_bins + 1)
            self.filter_head = Linear(filter_key, cfg.width, 2 * num_bins)
            self.noise_head = Linear(noise_key, cfg.width, num_bins)
        else:
            self.head = Linear(keys[2], cfg.width, 2 * num_bins)


def overlap_add(frames: jax.Array, hop: int, start: int, num_samples: int) -> jax.Array:
    """Sum of frames placed `hop` samples apart.

    Args:
        frames: [B, T, size].
        hop: distance of neighbouring frames.
        start: first sample to return.
        num_samples: number of samples to return; zeros where no frame reaches.

    Returns:
        [B, num_samples].
    """
    num_rows, num_frames, size = frames.shape
    pieces = -(-size // hop)
    frames = jnp.pad(frames, ((0, 0), (0, 0), (0, pieces * hop - size)))
    frames = frames.reshape(num_rows, num_frames, pieces, hop)
    shifted = [jnp.pad(pick(frames, i, 2), ((0, 0), (i, pieces - 1 - i), (0, 0))) for i in range(pieces)]
    out = sum(shifted).reshape(num_rows, (num_frames + pieces - 1) * hop)
    missing = max(0, start + num_samples - out.shape[1])
    return jnp.pad(out, ((0, 0), (0, missing)))[:, start : start + num_samples]


def inverse_stft(spectrum: jax.Array, cfg: audio.MelConfig, valid: jax.Array | None = None) -> jax.Array:
    """Waveform of a spectrogram with frames placed as in `audio.log_mel`.

    The sum of windowed frames is divided by the sum of squared windows, so that the inverse of an unmodified
    short-time spectrum is the signal itself.

    Args:
        spectrum: [B, T, bins] complex64, bins = n_fft // 2 + 1.
        cfg: gives n_fft, win_samples, hop_samples and how many samples lie before the centre of frame 0.
        valid: [B, T] bool, frames to use; None: all.

    Returns:
        [B, T * hop_samples] float32; samples without a valid frame are 0.
    """
    left = (cfg.n_fft - cfg.win_samples) // 2
    window = np.pad(audio.hann(cfg.win_samples), (left, cfg.n_fft - cfg.win_samples - left))
    frames = audio.irfft(spectrum, cfg.n_fft) * window
    num_rows, num_frames, _ = frames.shape
    weights = jnp.broadcast_to(jnp.square(window), (1, num_frames, cfg.n_fft))
    if valid is not None:
        frames = frames * valid[..., None]
        weights = weights * valid[..., None]
    start, total = cfg.pad_samples, num_frames * cfg.hop_samples
    wav = overlap_add(frames, cfg.hop_samples, start, total)
    energy = overlap_add(weights, cfg.hop_samples, start, total)
    return jnp.where(energy > 1e-8, wav / jnp.maximum(energy, 1e-8), 0.0)


def pitch_centres(cfg: Config) -> np.ndarray:
    """F0 in Hz of the bins of the pitch head, [pitch_bins], evenly spaced in log frequency."""
    limits = pitch.Range()
    return np.geomspace(limits.low_hz, limits.high_hz, cfg.pitch_bins)


def _decode_pitch(cfg: Config, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[B, T, bins + 1] to (F0 in Hz, voiced), each [B, T]: the mean of the bins around the most probable one."""
    scores, centres = logits[..., :-1], jnp.asarray(np.log(pitch_centres(cfg)), jnp.float32)
    away = jnp.abs(jnp.arange(cfg.pitch_bins) - jnp.argmax(scores, axis=-1)[..., None])
    weights = jax.nn.softmax(jnp.where(away <= 3, scores, -1e9), axis=-1)
    return jnp.exp(jnp.sum(weights * centres, axis=-1)), pick(logits, -1, 2) > 0


def _pitch_loss(cfg: Config, logits: jax.Array, hz: jax.Array, voiced: jax.Array) -> jax.Array:
    """Cross-entropy per frame, [B]: pitch bins of voiced frames, between the two nearest, and voicing."""
    centres = np.log(pitch_centres(cfg))
    place = (jnp.log(hz) - centres[0]) / (centres[1] - centres[0])
    target = jnp.maximum(1.0 - jnp.abs(jnp.arange(cfg.pitch_bins) - place[..., None]), 0.0)
    nll = -jnp.sum(target * jax.nn.log_softmax(logits[..., :-1]), axis=-1) * voiced
    score = pick(logits, -1, 2)
    return jnp.mean(nll + jax.nn.softplus(score) - score * voiced, axis=1)


def _noise(num_frames: int, hop: int, first: int | jax.Array) -> jax.Array:
    """White noise of unit power, [1, T * hop], the same for a frame number whatever the length."""

    def of_frame(number: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(jax.random.key(0), number), (hop,))

    return jax.vmap(of_frame)(first + jnp.arange(num_frames)).reshape(1, -1)


def _synthesize(
    model: Generator,
    cfg: Config,
    mel: jax.Array,
    lengths: jax.Array | None = None,
    track: tuple[jax.Array, jax.Array] | None = None,
    first: int | jax.Array = 0,
) -> tuple[jax.Array, jax.Array | None]:
    """`apply` without the final clip, and the pitch logits.

    A `track` (Hz, voiced) drives the pulses in place of the predicted one; `first` picks the noise.
    """
    valid = None if lengths is None else jnp.arange(mel.shape[1]) < jnp.asarray(lengths)[:, None]

    def keep(x: jax.Array) -> jax.Array:
        """Frames beyond a row's end must look like a convolution's zero padding."""
        return x if valid is None else jnp.where(valid[..., None], x, 0.0)

    def body(x: jax.Array, block: Block):
        return keep(block(x, cfg.dtype)), None

    x = keep(model.norm(model.embed(keep(mel.astype(jnp.float32)), cfg.dtype)))
    x, _ = jax.lax.scan(jax.checkpoint(body) if cfg.remat else body, x, model.layers)
    x = model.final_norm(x)
    out_valid = None if valid is None else jnp.repeat(valid, cfg.subframes, axis=1)
    frames, size = cfg.frames, cfg.frames.n_fft

    def per_frame(head: Linear) -> jax.Array:
        y = head(x, cfg.dtype)
        if cfg.subframes > 1:
            rows = jax.P(nn.axes_of(y)[0], None, None)
            shape = (y.shape[0], y.shape[1] * cfg.subframes, y.shape[2] // cfg.subframes)
            y = y.reshape(shape, out_sharding=rows)
        return y

    def magnitude(y: jax.Array) -> jax.Array:
        return jnp.minimum(jnp.exp(y), MAX_MAGNITUDE)

    def spectrum(head: Linear) -> jax.Array:
        log_magnitude, phase = jnp.split(per_frame(head), 2, axis=-1)
        level = magnitude(log_magnitude)
        return jax.lax.complex(level * jnp.cos(phase), level * jnp.sin(phase))

    if not cfg.source:
        return inverse_stft(spectrum(model.head), frames, out_valid), None

    left = (size - frames.win_samples) // 2
    window = np.pad(audio.hann(frames.win_samples), (left, size - frames.win_samples - left))

    def excitation(source: jax.Array) -> jax.Array:
        """[B, T * hop] of unit power to [B, T * subframes, bins] of about unit power."""
        source = jnp.pad(jax.lax.stop_gradient(source), ((0, 0), (frames.pad_samples,) * 2))
        pieces = audio.frame(source, size, frames.hop_samples) * window
        return audio.rfft(pieces) / float(np.sqrt(np.sum(window**2)))

    hop, rate = cfg.mel.hop_samples, cfg.mel.sample_rate
    logits = model.pitch_head(x, cfg.dtype)
    hz, voiced = _decode_pitch(cfg, logits) if track is None else track
    pulses = excitation(pitch.pulses(hz, voiced, hop, rate, valid))
    noise = _noise(mel.shape[1], hop, first)
    noise = excitation(noise if valid is None else noise * jnp.repeat(valid, hop, axis=1))
    total = pulses * spectrum(model.filter_head) + noise * magnitude(per_frame(model.noise_head))
    return inverse_stft(total, frames, out_valid), logits


def apply(model: Generator, cfg: Config, mel: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
    """Waveform of a log-mel spectrogram.

    Args:
        model: the generator (`Gan.generator`).
        cfg: its config; static under jit.
        mel: [B, T, M] float, of the recipe cfg.mel_profile.
        lengths: [B] int, valid frames of each row; None: all T.

    Returns:
        [B, T * hop] float32 in [-1, 1]. With `lengths` a row is zero from its lengths * hop samples on, and
        the samples before are those of a single run: they depend neither on T nor on other rows.

    Raises:
        ValueError: if `mel` does not have the recipe's number of bins.
    """
    if mel.ndim != 3 or mel.shape[-1] != cfg.mel.num_mels:
        raise ValueError(
            f"mel has shape {mel.shape}; profile {cfg.mel_profile!r} needs [B, T, {cfg.mel.num_mels}]"
        )
    wav = jnp.clip(_synthesize(model, cfg, mel, lengths)[0], -1.0, 1.0)
    if lengths is None:
        return wav
    ends = jnp.asarray(lengths)[:, None] * cfg.mel.hop_samples
    return jnp.where(jnp.arange(wav.shape[1]) < ends, wav, 0.0)


# ------------------------------------------------------------------------------------------- discriminators


def _patches(x: jax.Array, size: int, stride: int) -> jax.Array:
    """[B, A, ..., C] to [B, ceil(A / stride), ..., size * C]: neighbours along axis 1, zeros outside.

    With a matrix product this is a convolution. Not the convolution primitive: on CPU that is about 15 times
    slower inside `lax.cond`, where the adversarial losses live.
    """
    num = -(-x.shape[1] // stride)
    left = (size - 1) // 2
    right = (num - 1) * stride + size - left - x.shape[1]
    x = jnp.pad(x, [(0, 0), (left, max(right, 0))] + [(0, 0)] * (x.ndim - 2))
    pieces = [x[:, i : i + (num - 1) * stride + 1 : stride] for i in range(size)]
    return jnp.concatenate(pieces, axis=-1)


class PeriodDiscriminator(nnx.Module):
    """Convolutions along the samples that lie one period apart; kernel 5, stride 3, then 1."""

    def __init__(self, channels: tuple[int, ...], key: jax.Array):
        keys = jax.random.split(key, len(channels) + 1)
        sizes = (1, *channels)
        pairs = zip(keys[:-1], sizes[:-1], channels, strict=True)
        self.convs = nnx.List([Linear(k, 5 * i, o, std=(5 * i) ** -0.5) for k, i, o in pairs])
        self.out = Linear(keys[-1], 3 * sizes[-1], 1, std=(3 * sizes[-1]) ** -0.5)

    def __call__(self, wav: jax.Array, period: int, dtype: str) -> list[jax.Array]:
        """[B, W] to the outputs of all layers [B, W / P / stride, P, C]; the last is the score."""
        x = jnp.pad(wav, ((0, 0), (0, -wav.shape[1] % period)), mode="reflect")
        x = x.reshape(x.shape[0], -1, period, 1)
        outputs = []
        for i, conv in enumerate(self.convs):
            stride = 3 if i < len(self.convs) - 1 else 1
            x = jax.nn.leaky_relu(conv(_patches(x, 5, stride), dtype), 0.1)
            outputs.append(x)
        return [*outputs, self.out(_patches(x, 3, 1), dtype)]


class SpectrogramDiscriminator(nnx.Module):
    """Convolutions over a compressed spectrogram; kernel 8 bins x 3 frames, stride 4 in bins."""

    def __init__(self, channels: tuple[int, ...], key: jax.Array):
        keys = jax.random.split(key, len(channels) + 1)
        sizes = (1, *channels)
        pairs = zip(keys[:-1], sizes[:-1], channels, strict=True)
        self.convs = nnx.List([Linear(k, 24 * i, o, std=(24 * i) ** -0.5) for k, i, o in pairs])
        self.out = Linear(keys[-1], 9 * sizes[-1], 1, std=(9 * sizes[-1]) ** -0.5)

    def __call__(self, wav: jax.Array, n_fft: int, dtype: str) -> list[jax.Array]:
        """[B, W] to the outputs of all layers [B, bins / 4^layer, T, C]; the last is the score."""
        power = audio.power_spectrogram(wav, n_fft, n_fft // 4)
        # root of the magnitude: quiet speech counts too
        x = ((power + 1e-8) ** 0.25).swapaxes(1, 2)[..., None]
        outputs = []
        for conv in self.convs:
            x = jax.nn.leaky_relu(conv(self._neighbours(x, 8, 4), dtype), 0.1)
            outputs.append(x)
        return [*outputs, self.out(self._neighbours(x, 3, 1), dtype)]

    def _neighbours(self, x: jax.Array, size: int, stride: int) -> jax.Array:
        """[B, bins, T, C] to [B, bins / stride, T, 3 * size * C]: `size` bins x 3 frames."""
        x = _patches(x, size, stride)
        x = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))
        return jnp.concatenate([x[:, :, :-2], x[:, :, 1:-1], x[:, :, 2:]], axis=-1)


class Discriminators(nnx.Module):
    """by_period and by_spectrogram: one small network per period and per window size."""

    def __init__(self, cfg: Config, key: jax.Array):
        period_key, spectrogram_key = jax.random.split(key)
        self.by_period = nnx.List(
            [
                PeriodDiscriminator(cfg.period_channels, k)
                for k in jax.random.split(period_key, len(cfg.periods))
            ]
        )
        self.by_spectrogram = nnx.List(
            [
                SpectrogramDiscriminator(cfg.spectrogram_channels, k)
                for k in jax.random.split(spectrogram_key, len(cfg.spectrogram_sizes))
            ]
        )

    def __call__(self, cfg: Config, wav: jax.Array) -> list[list[jax.Array]]:
        """[B, W] to one list of layer outputs per discriminator."""
        by_period = [d(wav, p, cfg.dtype) for d, p in zip(self.by_period, cfg.periods, strict=True)]
        pairs = zip(self.by_spectrogram, cfg.spectrogram_sizes, strict=True)
        return by_period + [d(wav, n, cfg.dtype) for d, n in pairs]


def init(cfg: Config, key: jax.Array) -> Gan:
    """New weights for training."""
    generator_key, discriminator_key = jax.random.split(key)
    discriminators = Discriminators(cfg, discriminator_key) if cfg.adversarial else None
    return Gan(Generator(cfg, generator_key), discriminators)


def init_generator(cfg: Config, key: jax.Array) -> Generator:
    """New weights of the generator alone: what is exported and what `apply` takes."""
    return Generator(cfg, key)


# --------------------------------------------------------------------------------------------------- losses


def _spectral_losses(cfg: Config, real: jax.Array, fake: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Multi-resolution STFT loss [B] and mel loss [B] of two waveforms [B, W]."""
    stft = 0.0
    for size in cfg.stft_sizes:
        a = jnp.sqrt(audio.power_spectrogram(real, size, size // 4) + 1e-9)
        b = jnp.sqrt(audio.power_spectrogram(fake, size, size // 4) + 1e-9)
        convergence = jnp.sqrt(jnp.sum((a - b) ** 2, (1, 2)) + 1e-12) / jnp.sqrt(jnp.sum(a**2, (1, 2)))
        log_distance = jnp.mean(jnp.abs(jnp.log(a + 1e-4) - jnp.log(b + 1e-4)), (1, 2))
        stft = stft + (convergence + log_distance) / len(cfg.stft_sizes)
    recipe = cfg.mel.full_band()
    mel = jnp.abs(audio.log_mel(real, None, recipe) - audio.log_mel(fake, None, recipe))
    return stft, jnp.mean(mel, (1, 2))


def _reconstruction(cfg: Config, real: jax.Array, fake: jax.Array, weights: jax.Array):
    """(sum, count, aux) of the spectral losses of waveforms [B, W], rows with weights [B]."""
    stft, mel = (x * weights for x in _spectral_losses(cfg, real, fake))
    total = jnp.sum(cfg.stft_weight * stft + cfg.mel_weight * mel)
    count = jnp.sum(weights)
    aux = {"loss": (total, count), "stft": (jnp.sum(stft), count), "mel": (jnp.sum(mel), count)}
    return total, count, aux


def _inputs(cfg: Config, batch: dict[str, jax.Array], key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """wav [B, W'] cut to whole frames, and its mel [B, T, M], spoilt for some rows."""
    hop, longest = cfg.mel.hop_samples, max(cfg.stft_sizes + (cfg.mel.n_fft,))
    wav = batch["wav"][:, : batch["wav"].shape[1] // hop * hop]
    if wav.shape[1] < longest:
        raise ValueError(
            f"training crop of {wav.shape[1]} samples; give at least {longest}, the longest window"
        )
    return wav, _spoil(cfg, jax.lax.stop_gradient(audio.log_mel(wav, None, cfg.mel)), key)


def _spoil(cfg: Config, mel: jax.Array, key: jax.Array | None) -> jax.Array:
    """Mels [B, T, M] as an acoustic model writes them: harmonics washed out, and rough from bin to bin.

    A generated mel has the right envelope and weak harmonics, and a vocoder that has only met recordings answers
    with noise. Trained on this, it takes voicing from the envelope and harmonics from the source.
    """
    if key is None or cfg.spoil_probability == 0:
        return mel
    keys, num_rows = jax.random.split(jax.random.fold_in(key, 0), 4), mel.shape[0]

    def per_row(i: int, high: float = 1.0) -> jax.Array:
        draw = jax.random.uniform(keys[i], (num_rows,), maxval=high, out_sharding=spec("batch"))
        return draw[:, None, None]

    bins = np.arange(mel.shape[-1])
    near = np.exp(-0.5 * ((bins[:, None] - bins) / WASH_BINS) ** 2)
    washed = jnp.einsum("btm,mn->btn", mel, jnp.asarray(near / near.sum(0), jnp.float32))
    noise = jax.random.normal(keys[0], mel.shape, out_sharding=spec("batch", None, None))
    spoilt = mel + per_row(1) * (washed - mel) + per_row(2, ROUGHNESS) * noise
    return jnp.where(per_row(3) < cfg.spoil_probability, spoilt, mel)


def loss(model: Gan, cfg: Config, batch: dict[str, jax.Array], key: jax.Array | None = None):
    """Spectral losses of the copy synthesis of a batch; the adversarial terms are only in `train_step`.

    Args:
        model: `init(cfg, key)`.
        cfg: its config.
        batch: see the file docstring.
        key: draws the rows to spoil and the noise of the source; None: none spoilt, always the same noise.

    Returns:
        (sum over rows, number of rows, aux) with aux "loss", "stft" (spectral convergence + log magnitude
        distance, mean over resolutions), "mel" (mean absolute difference of natural-log mel up to Nyquist) and,
        with a source, "pitch" (`_pitch_loss`), each (sum, count).

    Raises:
        ValueError: if W is shorter than the longest analysis window.

    Source: multi-resolution STFT loss of Parallel WaveGAN (Yamamoto et al., 2020), mel loss of HiFi-GAN.
    """
    wav, mel = _inputs(cfg, batch, key)
    weights = row_weights(batch)
    fake, extra = _with_pitch_loss(model.generator, cfg, wav, mel, weights, key)
    total, count, aux = _reconstruction(cfg, wav, fake, weights)
    if cfg.source:
        aux["pitch"] = (jnp.sum(extra), count)
        total = total + cfg.pitch_weight * jnp.sum(extra)
        aux["loss"] = (total, count)
    return total, count, aux


def _with_pitch_loss(
    model: Generator, cfg: Config, wav: jax.Array, mel: jax.Array, weights: jax.Array, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Copy synthesis of recordings [B, W], the pulses driven by their own pitch, and the weighted pitch loss [B]."""
    if not cfg.source:
        return _synthesize(model, cfg, mel)[0][:, : wav.shape[1]], jnp.zeros_like(weights)
    hz, voiced = jax.lax.stop_gradient(pitch.track(wav, cfg.mel))
    first = 0 if key is None else jax.random.randint(jax.random.fold_in(key, 1), (), 0, 2**30)
    fake, logits = _synthesize(model, cfg, mel, track=(hz, voiced), first=first)
    return fake[:, : wav.shape[1]], weights * _pitch_loss(cfg, logits, hz, voiced)


def _discriminator_loss(
    real: list[list[jax.Array]], fake: list[list[jax.Array]], weights: jax.Array
) -> jax.Array:
    """Least squares, real to 1 and fake to 0: mean over discriminators; weights of rows [B]."""
    terms = [mean_of_rows((r[-1] - 1.0) ** 2 + f[-1] ** 2, weights) for r, f in zip(real, fake, strict=True)]
    return sum(terms) / len(terms)


def _generator_losses(
    real: list[list[jax.Array]], fake: list[list[jax.Array]], weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Least squares, fake to 1, and feature matching (sum over layers): means over discriminators."""
    adversarial = sum(mean_of_rows((f[-1] - 1.0) ** 2, weights) for f in fake)
    pairs = ((x, y) for r, f in zip(real, fake, strict=True) for x, y in zip(r[:-1], f[:-1], strict=True))
    feature = sum(mean_of_rows(jnp.abs(x - y), weights) for x, y in pairs)
    return adversarial / len(fake), feature / len(fake)


init_opt = vocoder_parts.init_opt  # where train.py looks for it


def train_step(
    model: Gan,
    opt_state: dict,
    tx: optax.GradientTransformation,
    cfg: Config,
    batch: dict[str, jax.Array],
    key: jax.Array | None,
    step: jax.Array,
):
    """One update: discriminators first, then the generator against the new discriminators.

    Before cfg.adversarial_start_step (and always without cfg.adversarial) only the generator is trained, on
    the spectral losses, and the adversarial entries of aux are 0.

    Args:
        model, opt_state: `init` and `init_opt`, or the results of the step before.
        tx: optimizer of each player; schedules inside it count the updates of that player.
        cfg: static under jit.
        batch: see the file docstring.
        key: draws the rows to spoil and the noise of the source; None: none spoilt, always the same noise.
        step: int32 scalar, 0 for the first update.

    Returns:
        (model, opt_state, aux): aux as in `loss`, and "adversarial", "feature", "discriminator" if
        cfg.adversarial, each (sum, count); "generator_grad_norm" and "discriminators_grad_norm" (norm, 1), before
        clipping.
    """
    wav, mel = _inputs(cfg, batch, key)
    weights = row_weights(batch)
    count = jnp.sum(weights)

    def synthesize(generator):
        return _with_pitch_loss(generator, cfg, wav, mel, weights, key)

    def update(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    # the waveform is made once; both players read it, and the generator's gradient is pulled back from it
    (fake, off_pitch), pull_back = jax.vjp(synthesize, model.generator)

    def spectral(fake):
        total, _, aux = _reconstruction(cfg, wav, fake, weights)
        return total / jnp.maximum(count, 1.0), aux

    def without_adversary(discriminators, state):
        grad, aux = jax.grad(spectral, has_aux=True)(fake)
        names = ("adversarial", "feature", "discriminator", "discriminators_grad_norm")
        return grad, aux | dict.fromkeys(names, (jnp.float32(0.0), count)), discriminators, state

    def with_adversary(discriminators, state):
        def judge(d):
            return _discriminator_loss(d(cfg, wav), d(cfg, fake), weights)

        value, grads = jax.value_and_grad(judge)(discriminators)
        norm = (optax.tree.norm(grads), jnp.float32(1.0))
        discriminators, state = update(grads, state, discriminators)
        real = discriminators(cfg, wav)

        def total(fake):
            mean, aux = spectral(fake)
            adversarial, feature = _generator_losses(real, discriminators(cfg, fake), weights)
            mean = mean + cfg.adversarial_weight * adversarial + cfg.feature_weight * feature
            aux = aux | {"loss": (mean * count, count), "adversarial": (adversarial * count, count)}
            aux["discriminators_grad_norm"] = norm
            return mean, aux | {"feature": (feature * count, count), "discriminator": (value * count, count)}

        grad, aux = jax.grad(total, has_aux=True)(fake)
        return grad, aux, discriminators, state

    discriminators, state = model.discriminators, opt_state["discriminators"]
    if not cfg.adversarial:
        grad, aux = jax.grad(spectral, has_aux=True)(fake)
    elif cfg.adversarial_start_step <= 0:
        grad, aux, discriminators, state = with_adversary(discriminators, state)
    else:
        is_on = jnp.asarray(step) >= cfg.adversarial_start_step
        grad, aux, discriminators, state = jax.lax.cond(
            is_on, with_adversary, without_adversary, discriminators, state
        )
    (grads,) = pull_back((grad, jnp.full_like(off_pitch, cfg.pitch_weight / count)))
    if cfg.source:
        sum_pitch = jnp.sum(off_pitch)
        aux = aux | {
            "pitch": (sum_pitch, count),
            "loss": (aux["loss"][0] + cfg.pitch_weight * sum_pitch, count),
        }
    aux = aux | {"generator_grad_norm": (optax.tree.norm(grads), jnp.float32(1.0))}
    generator, generator_state = update(grads, opt_state["generator"], model.generator)
    opt_state = {"generator": generator_state, "discriminators": state}
    return Gan(generator, discriminators), opt_state, aux
