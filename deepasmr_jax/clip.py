"""The user's clip before any model hears it: read, trimmed, cut to a useful length, judged.

`read` takes whatever a user gives, a file or an array at any rate and level, to the waveform the models get:
without outer silence, at most 10 s, cut at a quiet place. It decides from the sound whether the voice is
normal or whispered, where the caller does not say, and by how much the clip is louder or quieter than the
training data. What was changed or guessed is noted in a sentence for the user.
Letters: W samples.
"""

import os
from dataclasses import dataclass

import numpy as np

from deepasmr_jax import audio

MIN_DURATION_S = 0.5  # a voice cannot be copied from less; the shortest prompt of the corpora is about 1 s
MAX_DURATION_S = 10.0  # longer prompts cost time and gain nothing; the tokenizer's own limit is 30 s
READ_DURATION_S = 60.0  # of a long recording only the first minute is read
# share of periodic frames: synthetic normal speech has 0.39 or more, whisper 0.16 or less
VOICED_SPLIT = 0.25
# level of speech rises and falls: 500 synthetic clips spread by 5.8 dB or more, white and pink noise by 0.3 and 3.0 dB
STEADY_SPREAD_DB = 4.0
LEVEL_SPREAD_DB = 6.0  # within the spread of the training data nothing is touched


@dataclass(frozen=True)
class Excerpt:
    """The part of a clip that is used.

    Attributes:
        wav: [W] float32 at the rate that was asked for, at the clip's own level.
        style: "normal" or "asmr", given or detected.
        gain: factor that brings `wav` to the level of the training data; 1 if it is near enough.
        is_whole: no speech was cut off, so that a transcript of the clip still fits.
    """

    wav: np.ndarray
    style: str
    gain: float
    is_whole: bool


def read(
    voice: str | os.PathLike | np.ndarray,
    voice_rate: int | None,
    sample_rate: int,
    *,
    style: str | None = None,
    levels_db: dict[str, float] | None = None,
    notes: list[str],
) -> Excerpt:
    """Reads a clip, trims it and judges it.

    Args:
        voice: path, or array with `voice_rate`.
        voice_rate: Hz of an array; None for a path.
        sample_rate: Hz of the result.
        style: "normal" or "asmr"; None: detected.
        levels_db: style -> level of the training data (`level_db`); a clip of a style that is not in it keeps
            its level.
        notes: sentences about changes and guesses are appended.

    Raises:
        ValueError: if the clip cannot be used (see `audio.load`), or is a path with `voice_rate`.
    """
    if voice_rate is not None and isinstance(voice, str | os.PathLike):
        raise ValueError(
            f"voice_rate {voice_rate} was given with the file {voice}; leave it out, files carry their own"
        )
    wav = audio.load(
        voice,
        sample_rate,
        voice_rate,
        min_duration_s=MIN_DURATION_S,
        max_duration_s=READ_DURATION_S,
        notes=notes,
    )
    was_cut = any(n.startswith("cut from") for n in notes)
    wav, was_long = _trim(wav, sample_rate)
    is_whole = not was_cut and not was_long
    if not is_whole:
        notes.append(f"of the voice clip {len(wav) / sample_rate:.1f} s are used")
    if style is None:
        share = voiced_share(wav, sample_rate)
        style = "normal" if share >= VOICED_SPLIT else "asmr"
        if 0.6 * VOICED_SPLIT <= share <= 1.5 * VOICED_SPLIT:
            notes.append(
                f"the clip was taken as {style}, but this is unsure ({100 * share:.0f} % of it is voiced); "
                "say which with --voice-style or voice_style"
            )
    if (spread := level_spread_db(wav, sample_rate)) < STEADY_SPREAD_DB:
        notes.append(
            f"the clip's level hardly changes (by {spread:.1f} dB), as that of a noise or a tone does; if nobody "
            "speaks in it, the output has nobody's voice: record the voice again"
        )
    gain = 1.0
    if levels_db and style in levels_db:
        difference_db = levels_db[style] - level_db(wav)
        if abs(difference_db) > LEVEL_SPREAD_DB:
            gain = float(10 ** (difference_db / 20))
            notes.append(
                f"the clip is {abs(difference_db):.0f} dB {'quieter' if difference_db > 0 else 'louder'} than "
                "the model's training data; the output follows the clip's level"
            )
    return Excerpt(wav, style, gain, is_whole)


def voiced_share(wav: np.ndarray, sample_rate: int) -> float:
    """Share of the active frames that are periodic: high in normal speech, near zero in whisper.

    A frame (50 ms, every 20 ms) is active within 30 dB of the loud ones (95th percentile of RMS), and
    periodic if its normalised difference function below 1200 Hz reaches 0.7 at a lag of 65 to 400 Hz. On 27
    synthetic normal clips (flite, festival, espeak-ng) it read 0.39 to 0.9, on their whispered versions 0 to
    0.16. It decides the style of a clip; it is not the unvoiced ratio of the evaluation.

    Args:
        wav: [W] float, any level.
        sample_rate: Hz.

    Source: the normalised square difference function of McLeod and Wyvill (2005).
    """
    x = np.asarray(wav, np.float64)
    window, hop = round(0.05 * sample_rate), round(0.02 * sample_rate)
    if len(x) < window:
        x = np.pad(x, (0, window - len(x)))
    spectrum = np.fft.rfft(x)
    hz = np.fft.rfftfreq(len(x), 1 / sample_rate)
    low = np.fft.irfft(np.where((hz >= 50) & (hz <= 1200), spectrum, 0), len(x))
    at = np.arange(0, len(x) - window + 1, hop)[:, None] + np.arange(window)
    rms = np.sqrt(np.mean(x[at] ** 2, axis=1))
    active = rms >= 10 ** (-30 / 20) * max(np.percentile(rms, 95), 1e-9)
    frames = low[at[active]]
    frames = frames - frames.mean(axis=1, keepdims=True)
    correlation = np.fft.irfft(np.abs(np.fft.rfft(frames, 2 * window)) ** 2)[:, :window]
    energy = np.cumsum(frames**2, axis=1)
    lags = np.arange(round(sample_rate / 400), round(sample_rate / 65))
    both = energy[:, window - 1 - lags] + energy[:, -1:] - energy[:, lags - 1]
    periodicity = np.max(2 * correlation[:, lags] / (both + 1e-12), axis=1)
    return float(np.mean(periodicity > 0.7))


def level_db(wav: np.ndarray) -> float:
    """Level of the loud parts of [W] in dB of full scale: RMS of 320 samples each, 90th percentile."""
    frames = np.asarray(wav[: len(wav) // 320 * 320], np.float64).reshape(-1, 320)
    return float(20 * np.log10(np.percentile(np.sqrt(np.mean(frames**2, axis=1)), 90) + 1e-9))


def level_spread_db(wav: np.ndarray, sample_rate: int) -> float:
    """How far the level of [W] moves, in dB: RMS of 50 ms each, 90th less 20th percentile."""
    frame = round(0.05 * sample_rate)
    frames = np.asarray(wav[: len(wav) // frame * frame], np.float64).reshape(-1, frame)
    low, high = np.percentile(10 * np.log10(np.mean(frames**2, axis=1) + 1e-12), (20, 90))
    return float(high - low)


def _trim(wav: np.ndarray, sample_rate: int) -> tuple[np.ndarray, bool]:
    """(clip without outer silence and at most `MAX_DURATION_S` long, True if speech was cut off).

    Silence is 40 dB below the loud frames; 0.1 s of it stay. A cut is made at the quietest 20 ms of the last
    3 s.
    """
    frame = round(0.02 * sample_rate)
    count = len(wav) // frame
    rms = np.sqrt(np.mean(wav[: count * frame].reshape(count, frame) ** 2, axis=1))
    loud = np.flatnonzero(rms > 0.01 * np.percentile(rms, 95))
    if len(loud):
        first, last = max(loud[0] - 5, 0), min(loud[-1] + 6, count)
        if (last - first) * frame >= MIN_DURATION_S * sample_rate:
            wav, rms = wav[first * frame : last * frame], rms[first:last]
    longest = int(MAX_DURATION_S * sample_rate)
    if len(wav) <= longest:
        return wav, False
    start, end = int((MAX_DURATION_S - 3.0) * sample_rate) // frame, longest // frame
    cut = start + int(np.argmin(rms[start:end]))
    return wav[: cut * frame], True
