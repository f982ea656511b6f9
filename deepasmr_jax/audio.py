"""Sound in and out: files, resampling, and every spectral front-end of the package.

The only place that knows windows, hops, bands and floors. A mel array never travels without the name of its
recipe (`MEL_PROFILES`). `load` refuses what cannot be used in one sentence and notes what it changed.
The front-ends are traceable, static in their config, and work on explicit meshes split over the batch axis;
each row of a padded batch gets what it would get alone. Files and resampling are NumPy.

Letters: B rows, W waveform samples, T frames, M mel bands, F Fourier bins.
"""

import dataclasses
import fractions
import math
import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from deepasmr_jax import files

SAMPLE_RATE = 16000  # Hz of records, and of every front-end that listens
TOKEN_RATE = 25  # Hz of S3 speech tokens
TOKEN_SAMPLES = SAMPLE_RATE // TOKEN_RATE  # of one S3 token
S3_HOP_SAMPLES = 160  # of `s3_log_mel`
S3_FRAMES_PER_TOKEN = TOKEN_SAMPLES // S3_HOP_SAMPLES
NUM_CODES = 3**8  # of S3 speech tokens
MIN_DURATION_S = 0.1  # below this no front-end has a useful number of frames
MAX_DURATION_S = 600.0
SILENCE_PEAK = 1e-4  # -80 dBFS, about 3 steps of 16-bit audio


# -------------------------------------------------------------------------------------------------- recipes


@dataclasses.dataclass(frozen=True)
class MelConfig:
    """One log-mel recipe.

    Fields: name; sample_rate (Hz); n_fft, win_samples, hop_samples (samples); num_mels; fmin_hz, fmax_hz;
    kind: "hifigan" (no centring, reflection of (n_fft - hop) / 2, Slaney bands, W // hop frames) or
    "vocos" (centred, HTK bands without normalisation, W // hop + 1 frames).

    Raises:
        ValueError: on an unknown kind, or sizes and bands that do not fit each other or the sample rate.
    """

    name: str
    sample_rate: int
    n_fft: int
    win_samples: int
    hop_samples: int
    num_mels: int
    fmin_hz: float
    fmax_hz: float
    kind: str = "hifigan"

    def __post_init__(self):
        if self.kind not in ("hifigan", "vocos"):
            raise ValueError(f"mel kind {self.kind!r} is unknown; use 'hifigan' or 'vocos'")
        if not 0 < self.hop_samples <= self.win_samples <= self.n_fft:
            raise ValueError(
                f"hop {self.hop_samples}, window {self.win_samples}, n_fft {self.n_fft}: "
                "need 0 < hop <= window <= n_fft"
            )
        if not 0 <= self.fmin_hz < self.fmax_hz <= self.sample_rate / 2:
            raise ValueError(
                f"band {self.fmin_hz}..{self.fmax_hz} Hz does not fit {self.sample_rate} Hz audio; "
                f"keep fmax_hz at most {self.sample_rate / 2:g}"
            )
        if self.kind == "hifigan" and (self.n_fft - self.hop_samples) % 2:
            raise ValueError(f"n_fft - hop is {self.n_fft - self.hop_samples}; it must be even")

    @property
    def pad_samples(self) -> int:
        """Samples of reflection on each side."""
        return self.n_fft // 2 if self.kind == "vocos" else (self.n_fft - self.hop_samples) // 2

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.hop_samples

    @property
    def frames_per_token(self) -> tuple[int, int]:
        """Frames of one S3 token as the smallest (numerator, denominator)."""
        return fractions.Fraction(self.sample_rate, self.hop_samples * TOKEN_RATE).as_integer_ratio()

    def full_band(self) -> "MelConfig":
        """The same recipe up to the Nyquist frequency, as vocoder losses use it."""
        return dataclasses.replace(self, name=f"{self.name}_full", fmax_hz=self.sample_rate / 2)


MEL_PROFILES: dict[str, MelConfig] = {
    p.name: p
    for p in (
        MelConfig("cv2", 24000, 1920, 1920, 480, 80, 0.0, 8000.0),  # CosyVoice2 flow and HiFT
        MelConfig("hifigan", 22050, 1024, 1024, 256, 80, 0.0, 8000.0),  # public HiFi-GAN V1..V3
        MelConfig("f5", 24000, 1024, 1024, 256, 100, 0.0, 12000.0, kind="vocos"),  # F5/E2 TTS, Vocos
        MelConfig("mini", 16000, 1024, 1024, 320, 80, 0.0, 8000.0),  # built-in model: 2 frames per S3 token
    )
}


def mel_profile(name: str) -> MelConfig:
    """The recipe called `name`.

    Raises:
        ValueError: on an unknown name.
    """
    if name not in MEL_PROFILES:
        raise ValueError(f"unknown mel profile {name!r}; known: {', '.join(MEL_PROFILES)}")
    return MEL_PROFILES[name]


# ----------------------------------------------------------------------------------------- files and arrays


def load(
    source,
    sample_rate: int,
    source_rate: int | None = None,
    *,
    min_duration_s: float = MIN_DURATION_S,
    max_duration_s: float = MAX_DURATION_S,
    allow_silence: bool = False,
    notes: list[str] | None = None,
) -> np.ndarray:
    """A mono clip at `sample_rate`, from a file or an array; its level is kept.

    Args:
        source: path or binary file object of anything libsndfile reads (wav, flac, ogg, mp3, ...), or an
            array [W], [W, channels] or [channels, W] (the longer axis is time): floats in [-1, 1] or
            integers, which are scaled by the range of their type.
        sample_rate: Hz of the result.
        source_rate: Hz of an array, `sample_rate` if None; not allowed with files, which carry their own.
        min_duration_s: shorter clips are refused.
        max_duration_s: longer clips are cut to it, and noted.
        allow_silence: also take a clip without sound, as measures of a failed output must.
        notes: if given, one sentence is appended for each change or warning: cut, mixed down, rescaled,
            clipped, resampled.

    Returns:
        [W] float32 in [-1, 1].

    Raises:
        ValueError: if the source is missing, empty, not audio, not finite, silent or too short.
    """
    notes = [] if notes is None else notes
    if isinstance(source, str | os.PathLike) or hasattr(source, "read"):
        if source_rate is not None:
            raise ValueError(
                f"source_rate={source_rate} was given with a file; leave it out, files carry theirs"
            )
        wav, rate, name = _read_file(source, max_duration_s, notes)
    else:
        rate = sample_rate if source_rate is None else source_rate
        wav, name = _read_array(source), "the array"
    for what, hz in (("source", rate), ("target", sample_rate)):
        if isinstance(hz, bool) or hz != int(hz) or not 1000 <= hz <= 768000:
            raise ValueError(
                f"{what} sample rate {hz} of {name} is not usable; give whole Hz in 1000..768000"
            )
    rate, sample_rate = int(rate), int(sample_rate)

    if wav.shape[0] == 0:
        raise ValueError(f"{name} holds no samples; give a clip of at least {min_duration_s:g} s")
    limit = int(max_duration_s * rate)
    if wav.shape[0] > limit:
        notes.append(f"cut from {wav.shape[0] / rate:.1f} s to the first {max_duration_s:g} s")
        wav = wav[:limit]
    bad = wav.size - int(np.count_nonzero(np.isfinite(wav)))
    if bad:
        raise ValueError(f"{name} holds {bad} samples that are NaN or infinite; export the clip again")
    duration_s = wav.shape[0] / rate
    if duration_s < min_duration_s:
        raise ValueError(f"{name} lasts {duration_s:.3f} s; give at least {min_duration_s:g} s")
    channel_peaks = np.max(np.abs(wav), axis=0)
    if is_silent(channel_peaks) and not allow_silence:
        raise ValueError(
            f"{name} is silent (peak {channel_peaks.max():.1e} of full scale); "
            f"record again with a peak above {SILENCE_PEAK:g}"
        )
    wav = _to_mono(wav, channel_peaks, notes)
    wav = _to_full_scale(wav, name, notes)
    if rate != sample_rate:
        wav = resample(wav, rate, sample_rate)
        note = f"resampled from {rate} Hz to {sample_rate} Hz"
        if rate < sample_rate:
            note += f"; there is no sound above {rate / 2:g} Hz in it"
        notes.append(note)
    return np.clip(wav, -1.0, 1.0)  # the resampling filter may overshoot full scale


def is_silent(wav: np.ndarray) -> bool:
    """Whether no sample [...] of a clip reaches `SILENCE_PEAK`."""
    return float(np.max(np.abs(wav), initial=0.0)) < SILENCE_PEAK


def _read_file(source, max_duration_s: float, notes: list[str]) -> tuple[np.ndarray, int, str]:
    """([W, channels] float32, Hz, name for messages); reads no more than `max_duration_s`."""
    import soundfile

    name = "the file" if hasattr(source, "read") else f"'{os.fspath(source)}'"
    if not hasattr(source, "read"):
        path = Path(source)
        if not path.exists():
            raise ValueError(f"{name} does not exist; check the path")
        if path.is_dir():
            raise ValueError(f"{name} is a folder; give one audio file")
        if path.stat().st_size == 0:
            raise ValueError(f"{name} is empty (0 bytes); record or export it again")
        source = str(path)
    try:
        with soundfile.SoundFile(source) as file:
            limit = int(max_duration_s * file.samplerate)
            wav = file.read(min(limit, file.frames), dtype="float32", always_2d=True)
            if file.frames > limit:
                notes.append(
                    f"cut from {file.frames / file.samplerate:.1f} s to the first {max_duration_s:g} s"
                )
            return wav, file.samplerate, name
    except (soundfile.LibsndfileError, RuntimeError, TypeError, OSError) as error:
        reason = str(error).rstrip(".")
        raise ValueError(
            f"{name} is not audio that can be read ({reason}); convert it to wav, flac, ogg or mp3"
        ) from error


def _read_array(source) -> np.ndarray:
    """[W, channels] float32 from an array of floats or integers."""
    wav = np.asarray(source)
    if wav.dtype.kind not in "iuf":
        raise ValueError(
            f"audio array has type {wav.dtype}; give floats in [-1, 1] or integers such as int16"
        )
    if wav.ndim not in (1, 2):
        raise ValueError(f"audio array has shape {wav.shape}; give [W] or [W, channels]")
    if wav.dtype.kind in "iu":
        half = 2.0 ** (8 * wav.dtype.itemsize - 1)
        wav = wav.astype(np.float64) / half - (1.0 if wav.dtype.kind == "u" else 0.0)
    if wav.ndim == 1:
        wav = wav[:, None]
    elif wav.shape[0] < wav.shape[1] and wav.shape[0] > 0:
        wav = wav.T
    return wav.astype(np.float32)


def _to_mono(wav: np.ndarray, channel_peaks: np.ndarray, notes: list[str]) -> np.ndarray:
    """[W, channels] -> [W]: the mean, or the loudest channel where the mean cancels."""
    if wav.shape[1] == 1:
        return wav[:, 0]
    mono = wav.mean(axis=1, dtype=np.float32)
    if np.max(np.abs(mono)) < 0.05 * channel_peaks.max():  # channels of opposite phase
        best = int(np.argmax(channel_peaks))
        notes.append(f"the {wav.shape[1]} channels cancel each other: channel {best + 1} was kept")
        return wav[:, best]
    notes.append(f"{wav.shape[1]} channels mixed to one")
    return mono


def _to_full_scale(wav: np.ndarray, name: str, notes: list[str]) -> np.ndarray:
    """Brings slightly too large floats to [-1, 1] and notes clipping."""
    peak = float(np.max(np.abs(wav)))
    if peak > 16.0:  # 24 dB over full scale is no headroom but another unit
        raise ValueError(
            f"{name} has a peak of {peak:g}; floats must lie in [-1, 1]: divide 16-bit samples by 32768"
        )
    if peak > 1.0:
        notes.append(f"peak {peak:.2f} is over full scale: the clip was scaled down to 1")
        wav = wav / np.float32(peak)
    at_peak = np.abs(wav) >= 0.999
    run = at_peak[:-2] & at_peak[1:-1] & at_peak[2:]  # three in a row: a single sample may touch the top
    if np.any(run):
        notes.append(f"clipped: {int(np.count_nonzero(at_peak))} samples at full scale; record it quieter")
    return wav.astype(np.float32)


def save(path, wav: np.ndarray, sample_rate: int) -> None:
    """Writes a mono clip as 16-bit audio, whole or not at all.

    Args:
        path: file name; its ending (.wav, .flac) gives the format. Missing folders are made.
        wav: [W] floats; values outside [-1, 1] are clipped.
        sample_rate: Hz.

    Raises:
        ValueError: if `wav` is not one-dimensional, is empty or not finite, or on an unknown ending.
    """
    import soundfile

    path, wav = Path(path), np.asarray(wav, np.float32)
    if wav.ndim != 1 or wav.size == 0:
        raise ValueError(f"cannot write audio of shape {wav.shape} to '{path}'; give [W] with W > 0")
    if bad := wav.size - int(np.count_nonzero(np.isfinite(wav))):
        raise ValueError(
            f"audio for '{path}' holds {bad} samples of {wav.size} that are NaN or infinite; use np.nan_to_num, or "
            "look for the cause in what made them"
        )
    kind = path.suffix.lstrip(".").upper()
    if kind not in ("WAV", "FLAC"):
        raise ValueError(f"cannot write '{path.name}'; let its name end in .wav or .flac")
    pcm = np.clip(np.round(wav * 32768.0), -32768, 32767).astype(np.int16)
    with files.atomic_path(path) as part:
        soundfile.write(str(part), pcm, int(sample_rate), format=kind, subtype="PCM_16")


# ----------------------------------------------------------------------------------------------- resampling

_ZEROS, _ROLLOFF = 6, 0.99  # half-width of the filter in zero crossings; cut-off over the Nyquist frequency


def resample(wav: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Windowed-sinc resampling, equal to the filter of the public pipelines.

    Output phases are handled in blocks of 64, each one matrix product over strided windows, so that the work
    per sample and the memory stay small for any pair of rates and length.

    Args:
        wav: [W] samples at `from_rate`.
        from_rate, to_rate: positive whole Hz.

    Returns:
        [ceil(W * to_rate / from_rate)] float32.

    Raises:
        ValueError: on a rate that is not a positive whole number, or an array that is not one-dimensional.

    Source: torchaudio's default "sinc_interp_hann": 6 zero crossings, roll-off 0.99, Hann window.
    """
    wav = np.asarray(wav, np.float32)
    if wav.ndim != 1:
        raise ValueError(f"resample takes [W], found shape {wav.shape}")
    for rate in (from_rate, to_rate):
        if rate != int(rate) or rate <= 0:
            raise ValueError(f"sample rate {rate} is not a positive whole number of Hz")
    common = math.gcd(int(from_rate), int(to_rate))
    old, new = int(from_rate) // common, int(to_rate) // common
    if old == new or wav.size == 0:
        return wav.copy()
    base = _ROLLOFF * min(old, new)
    width = math.ceil(_ZEROS * old / base)
    num_out = -(-new * wav.size // old)
    periods = -(-num_out // new)  # each period reads `old` samples and writes `new`
    right = max(0, (periods - 1) * old + old + width + 1 - wav.size)
    padded = np.pad(wav, (width, right))
    out = np.empty((periods, new), np.float32)
    block = 64
    for first in range(0, new, block):
        phases = np.arange(first, min(first + block, new))
        start = first * old // new  # the earliest sample of this block, relative to the padded period
        taps = phases[-1] * old // new - start + 2 * width + 2
        taps = min(taps, 2 * width + old + 1 - start)
        offsets = start + np.arange(taps) - width
        t = np.clip(base * (offsets[:, None] / old - phases / new), -_ZEROS, _ZEROS)
        kernel = np.sinc(t) * np.cos(np.pi * t / (2 * _ZEROS)) ** 2 * base / old
        kernel = kernel.astype(np.float32)
        windows = np.lib.stride_tricks.sliding_window_view(padded[start:], taps)[::old]
        rows = max(1, (4 << 20) // taps)  # 16 MiB of windows at a time
        for row in range(0, periods, rows):
            piece = np.ascontiguousarray(windows[row : min(row + rows, periods)])
            out[row : row + len(piece), first : first + len(phases)] = piece @ kernel
    return out.reshape(-1)[:num_out]


# ----------------------------------------------------------------------------------------------- mel scales


def _hz_to_slaney(hz):
    """Slaney's mel scale: linear (3 mel per 200 Hz) to 1 kHz, then 27 mel per factor 6.4."""
    hz = np.asarray(hz, np.float64)
    return np.where(
        hz < 1000.0, hz * 3 / 200, 15.0 + 27.0 * np.log(np.maximum(hz, 1e-9) / 1000.0) / np.log(6.4)
    )


def _slaney_to_hz(mel):
    mel = np.asarray(mel, np.float64)
    return np.where(mel < 15.0, mel * 200 / 3, 1000.0 * np.exp((mel - 15.0) * np.log(6.4) / 27.0))


def _hz_to_htk(hz):
    return 2595.0 * np.log10(1.0 + np.asarray(hz, np.float64) / 700.0)


def _htk_to_hz(mel):
    return 700.0 * (10.0 ** (np.asarray(mel, np.float64) / 2595.0) - 1.0)


def mel_filters(
    sample_rate: int, n_fft: int, num_mels: int, fmin_hz: float, fmax_hz: float, scale: str
) -> np.ndarray:
    """Triangular mel bands over Fourier bins.

    Args:
        sample_rate, n_fft: of the analysis.
        num_mels: number of bands.
        fmin_hz, fmax_hz: outer edges of the first and last band.
        scale: "slaney" (Slaney scale, each triangle has unit area in Hz) or "htk" (HTK scale, peak 1).

    Returns:
        [F, M] float32, F = n_fft // 2 + 1.

    Source: the behaviour of librosa's `filters.mel` (norm "slaney") and of torchaudio's HTK bank (no norm).
    """
    to_mel, to_hz = {"slaney": (_hz_to_slaney, _slaney_to_hz), "htk": (_hz_to_htk, _htk_to_hz)}[scale]
    edges = to_hz(np.linspace(to_mel(fmin_hz), to_mel(fmax_hz), num_mels + 2))
    bins = np.arange(n_fft // 2 + 1) * (sample_rate / n_fft)
    rise = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    bank = np.maximum(0.0, np.minimum(rise, fall))
    if scale == "slaney":
        bank *= 2.0 / (edges[2:] - edges[:-2])
    return bank.astype(np.float32)


def kaldi_filters(
    sample_rate: int = 16000, n_fft: int = 512, num_mels: int = 80, fmin_hz: float = 20.0
) -> np.ndarray:
    """Kaldi's bands: triangles that are linear in mel, 1127 ln(1 + f / 700), up to Nyquist.

    Returns:
        [F, M] float32, F = n_fft // 2 + 1; the Nyquist bin has no weight.
    """

    def to_mel(hz):
        return 1127.0 * np.log1p(np.asarray(hz, np.float64) / 700.0)

    edges = np.linspace(to_mel(fmin_hz), to_mel(sample_rate / 2), num_mels + 2)
    bins = to_mel(np.arange(n_fft // 2 + 1) * (sample_rate / n_fft))
    rise = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    bank = np.maximum(0.0, np.minimum(rise, fall))
    bank[-1] = 0.0
    return bank.astype(np.float32)


# ----------------------------------------------------------------------------------------------- front-ends


def hann(size: int) -> np.ndarray:
    """Periodic Hann window [size], float32."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)).astype(np.float32)


def frame(x: jax.Array, size: int, hop: int) -> jax.Array:
    """Overlapping frames [B, T, size] of [B, W], T = 1 + (W - size) // hop.

    Shifted slices and a concatenation, not an index table: their gradient is slices again, not a scatter.
    """
    num_rows, num_samples = x.shape
    num_frames = 1 + (num_samples - size) // hop
    pieces = -(-size // hop)
    total = (num_frames - 1 + pieces) * hop
    x = jnp.pad(x[:, :total], ((0, 0), (0, max(0, total - num_samples))))
    x = x.reshape(num_rows, num_frames - 1 + pieces, hop)
    return jnp.concatenate([x[:, i : i + num_frames] for i in range(pieces)], axis=-1)[..., :size]


def rfft(x: jax.Array, size: int | None = None) -> jax.Array:
    """`jnp.fft.rfft` of the last axis, [..., size // 2 + 1] complex64 of [..., N]; see `_in_tiles`."""
    size = x.shape[-1] if size is None else size
    return _in_tiles(lambda rows: jnp.fft.rfft(rows, size), x, size)


def irfft(spectrum: jax.Array, size: int) -> jax.Array:
    """`jnp.fft.irfft` of the last axis, [..., size] float32; see `_in_tiles`."""
    return _in_tiles(lambda rows: jnp.fft.irfft(rows, size), spectrum, size)


def _in_tiles(transform: Callable, x: jax.Array, size: int) -> jax.Array:
    """A transform of rows [..., N], on one CPU device of jax 0.11 and later some rows at a time.

    There XLA shares a transform of many rows among the threads of the pool that it runs in, and waits for them: with as
    many transforms at once as threads, such as the three of a clip on two cores, all wait for ever (openxla/xla#46347).
    So few rows are not shared. Before 0.11 a transform in a pool ran on one thread; on several devices of a CPU, which
    only tests have, it is left as it is.
    """
    if jax.default_backend() != "cpu" or jax.device_count() > 1 or jax.__version_info__ < (0, 11):
        return transform(x)
    tile = 4 if size >= 1000 else 16  # shared from 2 and 8 times the floats of a vector register on
    lead, spec = x.shape[:-1], jax.typeof(x).sharding.spec
    if any(spec):  # over one device: a loop over its rows wants them whole all the same
        x = jax.sharding.reshard(x, PartitionSpec(*(None,) * x.ndim))
    rows = x.reshape(-1, x.shape[-1])
    num = len(rows)
    rows = jnp.pad(rows, ((0, -num % tile), (0, 0))).reshape(-1, tile, x.shape[-1])
    out = jax.lax.map(transform, rows)
    out = out.reshape(-1, out.shape[-1])[:num].reshape(*lead, out.shape[-1])
    return jax.sharding.reshard(out, spec) if any(spec) else out


def power_spectrogram(
    x: jax.Array, n_fft: int, hop_samples: int, win_samples: int | None = None
) -> jax.Array:
    """Squared magnitude of the Fourier transform of Hann-windowed frames; no padding of the ends.

    Args:
        x: [B, W] float32.
        n_fft, hop_samples: in samples.
        win_samples: length of the window, centred in the frame; `n_fft` if None.

    Returns:
        [B, T, F] float32, T = 1 + (W - n_fft) // hop_samples, F = n_fft // 2 + 1.
    """
    win_samples = n_fft if win_samples is None else win_samples
    left = (n_fft - win_samples) // 2
    window = np.pad(hann(win_samples), (left, n_fft - win_samples - left))
    spectrum = rfft(frame(x, n_fft, hop_samples) * window)
    return spectrum.real**2 + spectrum.imag**2


def _reflect(wav: jax.Array, lengths: jax.Array | None, pad: int) -> jax.Array:
    """[B, W] -> [B, W + 2 pad]: reflection at both ends of each row's valid samples, zeros after."""
    if wav.shape[1] <= pad:
        raise ValueError(f"clip of {wav.shape[1]} samples is too short to reflect; give more than {pad}")
    if lengths is None:
        return jnp.pad(wav, ((0, 0), (pad, pad)), mode="reflect")

    def one(row: jax.Array, length: jax.Array) -> jax.Array:
        row = jnp.where(jnp.arange(row.shape[0]) < length, row, 0.0)
        tail = jax.lax.dynamic_slice(row, (length - 1 - pad,), (pad,))[::-1]
        padded = jnp.concatenate([row[1 : pad + 1][::-1], row, jnp.zeros(pad, row.dtype)])
        return jax.lax.dynamic_update_slice(padded, tail, (pad + length,))

    return jax.vmap(one)(wav, jnp.asarray(lengths, jnp.int32))


def num_frames(length, cfg: MelConfig):
    """Mel frames of `length` samples (int or array): W // hop, one more for the centred "vocos" kind."""
    return length // cfg.hop_samples + (1 if cfg.kind == "vocos" else 0)


def _keep(x: jax.Array, valid_frames: jax.Array | None) -> jax.Array:
    """[B, T, M] with the frames from `valid_frames` [B] on set to zero."""
    if valid_frames is None:
        return x
    return jnp.where((jnp.arange(x.shape[1]) < valid_frames[:, None])[..., None], x, 0.0)


def log_mel(wav: jax.Array, lengths: jax.Array | None, cfg: MelConfig) -> jax.Array:
    """Log-mel spectrogram by one of the named recipes.

    "hifigan": frame t is centred on sample (t + 1/2) * hop; "vocos": on sample t * hop.

    Args:
        wav: [B, W] float32 in [-1, 1] at cfg.sample_rate.
        lengths: [B] int, valid samples of each row, each more than cfg.pad_samples (or 0); None: all W.
        cfg: recipe; static under jit.

    Returns:
        [B, T, M] float32, natural log of amplitude floored at log(1e-5), T = num_frames(W, cfg). Frames from
        num_frames(lengths, cfg) on are 0; the others do not depend on W or on other rows.

    Raises:
        ValueError: if W is not more than cfg.pad_samples.

    Source: HiFi-GAN (Kong et al., 2020) and Vocos (Siuzdak, 2023), as in their public front-ends.
    """
    wav = jnp.asarray(wav, jnp.float32)
    lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)
    x = _reflect(wav, lengths, cfg.pad_samples)
    power = power_spectrogram(x, cfg.n_fft, cfg.hop_samples, cfg.win_samples)
    # without the small number the root has no gradient at 0; "vocos" has the plain magnitude in its value
    magnitude = jnp.sqrt(power + (1e-9 if cfg.kind == "hifigan" else 1e-20))
    scale = "slaney" if cfg.kind == "hifigan" else "htk"
    bank = mel_filters(cfg.sample_rate, cfg.n_fft, cfg.num_mels, cfg.fmin_hz, cfg.fmax_hz, scale)
    mel = jnp.einsum("btf,fm->btm", magnitude, bank, precision=jax.lax.Precision.HIGHEST)
    mel = jnp.log(jnp.maximum(mel, 1e-5))[:, : num_frames(wav.shape[1], cfg)]
    return _keep(mel, None if lengths is None else num_frames(lengths, cfg) * (lengths > 0))


def s3_log_mel(wav: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
    """Whisper-style log-mel, the input of the S3 speech tokenizer.

    Args:
        wav: [B, W] float32 in [-1, 1], 16 kHz.
        lengths: [B] int, valid samples, each more than 200 (or 0); None: all W.

    Returns:
        [B, T, 128] float32 about -1..1, T = W // 160 (100 Hz). The dynamic range is 8 (log10 of power) below
        the maximum over the row's own valid frames; frames from lengths // 160 on are 0.

    Raises:
        ValueError: if W is at most 200.

    Source: Whisper (Radford et al., 2022), section 2.2, with 128 Slaney bands as in CosyVoice2's tokenizer.
    """
    wav = jnp.asarray(wav, jnp.float32)
    lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)
    num = wav.shape[1] // S3_HOP_SAMPLES
    power = power_spectrogram(_reflect(wav, lengths, 200), 400, S3_HOP_SAMPLES)[:, :num]
    bank = mel_filters(16000, 400, 128, 0.0, 8000.0, "slaney")
    mel = jnp.einsum("btf,fm->btm", power, bank, precision=jax.lax.Precision.HIGHEST)
    mel = jnp.log10(jnp.maximum(mel, 1e-10))
    valid = jnp.full(wav.shape[:1], num) if lengths is None else lengths // S3_HOP_SAMPLES
    inside = (jnp.arange(num) < valid[:, None])[..., None]
    peak = jnp.max(jnp.where(inside, mel, -10.0), axis=(1, 2), keepdims=True)
    mel = (jnp.maximum(mel, peak - 8.0) + 4.0) / 4.0
    return mel if lengths is None else _keep(mel, valid)


def fbank_frames(length):
    """Frames of `fbank` for `length` samples (int or array): 1 + (length - 400) // 160, at least 0."""
    if isinstance(length, int):
        return max(0, 1 + (length - 400) // 160)
    return jnp.maximum(0, 1 + (jnp.asarray(length, jnp.int32) - 400) // 160)


def fbank(
    wav: jax.Array, lengths: jax.Array | None = None, window: str = "hamming", scale: float = 32768.0
) -> jax.Array:
    """Kaldi log filter bank with its mean over time removed, the input of speaker encoders.

    Args:
        wav: [B, W] float32 in [-1, 1], 16 kHz.
        lengths: [B] int, valid samples; None: all W.
        window: "hamming" (WeSpeaker, with scale 32768) or "povey" (CAM++, with scale 1).
        scale: factor on the samples; it matters only through the floor of the logarithm.

    Returns:
        [B, T, 80] float32, T = 1 + (W - 400) // 160 (25 ms windows every 10 ms); frames beyond a row's length
        are 0, and the mean is that of the row's own frames.

    Raises:
        ValueError: if W is under 400 samples, or on an unknown window.

    Source: Kaldi's compute-fbank-feats with snip edges, no dither, no energy.
    """
    wav = jnp.asarray(wav, jnp.float32)
    if wav.shape[1] < 400:
        raise ValueError(
            f"clip of {wav.shape[1]} samples is shorter than one window; give at least 400 (25 ms)"
        )
    n = np.arange(400)
    if window == "hamming":
        taper = 0.54 - 0.46 * np.cos(2 * np.pi * n / 399)
    elif window == "povey":
        taper = (0.5 - 0.5 * np.cos(2 * np.pi * n / 399)) ** 0.85
    else:
        raise ValueError(f"window {window!r} is unknown; use 'hamming' or 'povey'")
    x = frame(wav * scale, 400, 160)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    previous = jnp.concatenate([x[..., :1], x[..., :-1]], axis=-1)
    x = (x - 0.97 * previous) * taper.astype(np.float32)
    spectrum = rfft(jnp.pad(x, ((0, 0), (0, 0), (0, 112))))
    power = spectrum.real**2 + spectrum.imag**2
    mel = jnp.einsum("btf,fm->btm", power, kaldi_filters(), precision=jax.lax.Precision.HIGHEST)
    mel = jnp.log(jnp.maximum(mel, 1.1920929e-7))
    if lengths is None:
        return mel - jnp.mean(mel, axis=1, keepdims=True)
    valid = fbank_frames(jnp.asarray(lengths, jnp.int32))
    mean = jnp.sum(_keep(mel, valid), axis=1, keepdims=True) / jnp.maximum(valid, 1)[:, None, None]
    return _keep(mel - mean, valid)
