"""A whispered recording whose every part is known, for the tests of the corpus tool."""

import dataclasses

import numpy as np

RATE = 16000


@dataclasses.dataclass(frozen=True)
class Scene:
    """wav [W] float32 at 16 kHz, and (start, end) seconds of its parts; words as (text, start, end) per sentence."""

    wav: np.ndarray
    sentences: list[list[tuple[str, float, float]]]
    breaths: list[tuple[float, float]]
    silences: list[tuple[float, float]]

    def answer(self, locale: str = "en-US") -> dict:
        """What the Fast Transcription service would answer if it heard everything."""
        ms = lambda t: round(1000 * t)
        phrases = [
            {
                "offsetMilliseconds": ms(words[0][1]),
                "durationMilliseconds": ms(words[-1][2]) - ms(words[0][1]),
                "text": " ".join(w for w, _, _ in words) + ".",
                "words": [
                    {"text": w, "offsetMilliseconds": ms(a), "durationMilliseconds": ms(b) - ms(a)}
                    for w, a, b in words
                ],
                "locale": locale,
                "confidence": 0.9,
            }
            for words in self.sentences
        ]
        whole = [{"text": " ".join(p["text"] for p in phrases)}]
        return {
            "durationMilliseconds": ms(len(self.wav) / RATE),
            "combinedPhrases": whole,
            "phrases": phrases,
        }


def _noise(seconds: float, low: float, high: float, level_db: float, rng) -> np.ndarray:
    """Noise between two frequencies (Hz) with a soft start and end, at an RMS level in dB of full scale."""
    n = round(seconds * RATE)
    spectrum = np.fft.rfft(rng.standard_normal(n))
    hz = np.fft.rfftfreq(n, 1 / RATE)
    x = np.fft.irfft(np.where((hz >= low) & (hz <= high), spectrum, 0), n)
    x *= 10 ** (level_db / 20) / np.sqrt(np.mean(x**2))
    ramp = np.minimum(1, np.minimum(np.arange(n), np.arange(n)[::-1]) / (0.02 * RATE))
    return x * ramp


def whispered(level_db: float = -40.0, room_db: float = -70.0, seed: int = 0) -> Scene:
    """Sentences of whispered words, a breath before each, room silence, digital silence, a lone breath.

    Args:
        level_db: of the words; breaths are 14 dB below, so that a breath is 16 dB above the room.
        room_db: of the room; everything shifts with both.
        seed: of the noise.
    """
    rng = np.random.default_rng(seed)
    parts, at = [], 0.0
    sentences, breaths, silences = [], [], []

    def add(x):
        nonlocal at
        parts.append(x)
        at += len(x) / RATE

    def breath(seconds=0.8):
        breaths.append((at, at + seconds))
        add(_noise(seconds, 300, 3000, level_db - 14, rng))

    def sentence(text):
        words = []
        for word in text.split():
            length = round(0.12 + 0.05 * len(word), 2)
            words.append((word, at, at + length))
            add(_noise(length, 500, 6000, level_db, rng))
            add(np.zeros(round(0.08 * RATE)))
        sentences.append(words)

    def pause(seconds, digital=False):
        nonlocal at
        if seconds >= 1.5:
            silences.append((at, at + seconds))
        add(np.full(round(seconds * RATE), np.nan) if digital else np.zeros(round(seconds * RATE)))

    pause(0.4)
    breath()
    pause(0.2)
    sentence("close your eyes and listen")
    pause(0.5)
    breath(0.6)
    sentence("the rain is falling softly")
    pause(5.0)
    breath()
    pause(0.3)
    sentence("you are safe here with me")
    pause(5.0, digital=True)
    breath(1.2)  # alone between two silences
    pause(3.0)
    sentence("good night")
    pause(0.5)
    wav = np.concatenate(parts)
    room = 10 ** (room_db / 20) * rng.standard_normal(len(wav))
    wav = np.where(np.isnan(wav), 0.0, wav + room)
    return Scene(wav.astype(np.float32), sentences, breaths, silences)
