"""What comes out of a request: `Result`, or `Failure`; and how the chunks of a long text become one sound.

Letters: N tokens, T frames, M mel bins, W samples.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deepasmr_jax import audio, page
from deepasmr_jax.request import Request, check_output


@dataclass(frozen=True)
class Result:
    """What a request gave.

    Attributes:
        audio: [W] float32 in [-1, 1].
        sample_rate: Hz.
        tokens: [N] int32 speech tokens, 25 Hz, chunks joined.
        mel: [T, M] float32 log-mel of the spoken part, chunks joined.
        request: what was asked for; with its seed it reproduces the audio.
        task: "N2A", "A2N", "N2N" or "A2A": style of the clip, style of the output.
        language: "en" or "zh".
        prompt: name of the pool entry that gave style and rhythm, "self" for the clip, "none" for nobody.
        prompt_similarity: cosine of speaker embeddings of clip and prompt; nan if not compared.
        notes: sentences about what was changed or guessed.
        timings: seconds per stage (`clip_s`, `lm_s`, `flow_s`, `vocoder_s`), `compile_s` apart; in a batch
            the request's share of its group.
    """

    audio: np.ndarray
    sample_rate: int
    tokens: np.ndarray
    mel: np.ndarray
    request: Request
    task: str
    language: str
    prompt: str
    prompt_similarity: float
    notes: tuple[str, ...]
    timings: dict[str, float]

    @property
    def duration_s(self) -> float:
        """Seconds of audio."""
        return len(self.audio) / self.sample_rate

    @property
    def seed(self) -> int:
        """The seed of the request."""
        return self.request.seed

    def save(self, path: str | os.PathLike) -> Path:
        """Writes 16-bit audio, whole or not at all; see `audio.save`.

        Raises:
            ValueError: if the name does not end in .wav or .flac, or nothing can be written there.
        """
        path = check_output(path, (".wav", ".flac"))
        audio.save(path, self.audio, self.sample_rate)
        return path

    def picture(self) -> bytes:
        """The spectrogram as a PNG file."""
        return page.picture(self.audio, self.sample_rate)

    def facts(self) -> dict:
        """What is worth keeping beside the audio, ready for JSON."""
        similarity = round(self.prompt_similarity, 4) if np.isfinite(self.prompt_similarity) else None
        return {
            "text": self.request.text,
            "task": self.task,
            "style": self.request.style,
            "language": self.language,
            "seed": self.seed,
            "refine": self.request.refine,
            "prompt": self.prompt,
            "prompt_similarity": similarity,
            "duration_s": round(self.duration_s, 3),
            "timings": {k: round(v, 3) for k, v in self.timings.items()},
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        return (
            f"Result({self.task}, {self.duration_s:.2f} s at {self.sample_rate} Hz, {self.language!r}, "
            f"prompt {self.prompt!r}, seed {self.seed}, text {self.request.text!r})"
        )

    def _repr_html_(self) -> str:
        row = page.Row(self.task, "", self.request.text, self.audio, self.sample_rate)
        return f'<div style="max-width: 40rem">{page.player(row)}</div>'


@dataclass(frozen=True)
class Failure:
    """A request of a batch that gave no audio; `error` says in one sentence why."""

    request: Request | dict
    error: str


def join_chunks(wavs: list[np.ndarray], sample_rate: int, pause_s: float) -> np.ndarray:
    """Chunks one after the other with a pause between; 10 ms fades at the inner edges avoid clicks.

    The pause is not silent: between two whispers that would sound as if the microphone were switched off.

    Args:
        wavs: [W] each, at least one.
        sample_rate: Hz.
        pause_s: seconds between two chunks.

    Returns:
        [sum of W + pauses] float32; a single chunk as it came.
    """
    if len(wavs) == 1:
        return wavs[0]
    fade = np.linspace(0, 1, round(0.01 * sample_rate), dtype=np.float32)
    parts, tone = [], _room_tone(np.concatenate(wavs)[: 60 * sample_rate], sample_rate)
    for i, wav in enumerate(wavs):
        wav = np.array(wav, np.float32)
        if i:
            parts.append(tone(round(pause_s * sample_rate), seed=i))
            wav[: len(fade)] *= fade[: len(wav)]
        if i < len(wavs) - 1:
            wav[-len(fade) :] *= fade[::-1][-len(wav) :]
        parts.append(wav)
    return np.concatenate(parts)


def _room_tone(wav: np.ndarray, sample_rate: int) -> Callable[..., np.ndarray]:
    """`tone(length, seed)`: [length] float32 noise with the spectrum of the quietest tenth of `wav` [W].

    It is at least 30 dB below the loud parts. The spectrum is taken once, the noise differs from seed to seed.
    """
    size = 2 * round(0.016 * sample_rate)
    if len(wav) < size:
        return lambda length, seed: np.zeros(length, np.float32)
    hop, window = size // 2, np.sin(np.pi * (np.arange(size) + 0.5) / size)
    frames = np.lib.stride_tricks.sliding_window_view(np.asarray(wav, np.float64), size)[::hop]
    power = np.abs(np.fft.rfft(frames * window)) ** 2 / np.sum(window**2)
    energy = power.sum(axis=1)
    quiet = power[energy <= np.percentile(energy, 10)].mean(axis=0)
    quiet *= min(1.0, 1e-3 * np.percentile(energy, 90) / max(quiet.sum(), 1e-30))

    def tone(length: int, seed: int) -> np.ndarray:
        rng, count = np.random.default_rng(seed), length // hop + 2
        noise = rng.normal(size=(2, count, len(quiet)))
        made = np.fft.irfft((noise[0] + 1j * noise[1]) * np.sqrt(size * quiet / 2), size) * window
        whole = np.zeros((count + 1) * hop)
        for half in (0, 1):  # windows overlap by a half, their squares add up to 1
            whole[half * hop : (half + count) * hop] += made[:, half * hop : (half + 1) * hop].reshape(-1)
        return whole[hop : hop + length].astype(np.float32)

    return tone
