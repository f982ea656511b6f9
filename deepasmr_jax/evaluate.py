"""Measures over a result folder, and judges that need no network.

Unvoiced ratio (pYIN), word errors, speaker retrieval, a style proxy, and bootstrap intervals over utterances.
Judges: `MatrixJudge` (pocketsphinx, closed-set English), `MandarinJudge` (our own recogniser, not independent
of the corpus), `SpeakerJudge` (resemblyzer). All are checked on synthetic speech: a number here is about
intelligibility and identity of synthetic voices, and the style score is a proxy, not a listener.
Letters: W samples, Q and G clips, E embedding size. Extras: `judge` for pocketsphinx, `eval` for resemblyzer,
`zh`.
"""

import dataclasses
import functools
import json
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from deepasmr_jax import audio, text

MATRIX_FILE = Path(__file__).parent / "mini" / "matrix_en.json"  # word lists of the corpus' matrix sentences
RESULTS = "results.jsonl"


# ----------------------------------------------------------------------------- intervals


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % bootstrap interval over utterances."""

    value: float
    low: float
    high: float
    count: int

    def percent(self) -> str:
        """Such as "12.3 % [10.1, 14.9]"."""
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def bootstrap(values, weights=None, num_samples: int = 2000, seed: int = 0) -> Interval:
    """Mean of values, or ratio of sums, with the 2.5 and 97.5 % points of resampled utterances.

    Args:
        values: [Q] numbers, one per utterance (numerators if weights are given).
        weights: [Q] denominators: the estimate is sum(values) / sum(weights); None: the plain mean.
        num_samples: resamplings.
        seed: of the resampling.

    Raises:
        ValueError: if there is no value, the lengths differ, or the weights sum to 0.

    Source: Efron and Tibshirani, 1993, percentile interval.
    """
    values = np.asarray(values, np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    if not len(values) or values.shape != weights.shape or weights.sum() <= 0:
        raise ValueError(
            f"need one weight per value and a positive sum, found {len(values)} and {weights.shape}"
        )
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, num_samples, 200):  # in blocks: [200, Q] indices at a time
        index = rng.integers(0, len(values), (min(200, num_samples - start), len(values)))
        below = weights[index].sum(1)
        means.append(values[index].sum(1)[below > 0] / below[below > 0])
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Interval(float(values.sum() / weights.sum()), float(low), float(high), len(values))


# ----------------------------------------------------------------------------- unvoiced ratio


@dataclasses.dataclass(frozen=True)
class PitchSettings:
    """Settings of the unvoiced ratio. They move a voice by up to 13 points: print them with every number."""

    sample_rate: int = 16000
    frame_samples: int = 1024
    hop_samples: int = 256
    fmin_hz: float = 65.4
    fmax_hz: float = 2093.0
    silence: float = 0.02  # of the greatest frame RMS of the utterance
    num_thresholds: int = 100
    beta: tuple[float, float] = (2.0, 18.0)
    boltzmann: float = 2.0
    resolution: float = 0.1  # semitones
    max_transition: float = 35.92  # octaves per second
    switch_probability: float = 0.01
    no_trough_probability: float = 0.01

    def describe(self) -> str:
        """One line for tables."""
        return (
            f"pYIN {self.sample_rate} Hz, frame {self.frame_samples}, hop {self.hop_samples}, "
            f"{self.fmin_hz:g} to {self.fmax_hz:g} Hz, {self.num_thresholds} thresholds, beta {self.beta}, "
            f"switch {self.switch_probability:g}, active from {self.silence:g} of the greatest RMS, global"
        )


@dataclasses.dataclass(frozen=True)
class Unvoiced:
    """Frames per utterance, [Q] each: active, and unvoiced among them; with the settings that made them."""

    unvoiced: np.ndarray
    active: np.ndarray
    settings: PitchSettings

    @property
    def ratio(self) -> float:
        """Unvoiced / active summed over all utterances ("global"); nan without an active frame."""
        active = self.active.sum()
        return float(self.unvoiced.sum() / active) if active else math.nan

    def interval(self, seed: int = 0) -> Interval:
        """The ratio with its bootstrap interval."""
        return bootstrap(self.unvoiced, self.active, seed=seed)


def unvoiced_ratio(
    wavs: Sequence[np.ndarray], sample_rate: int, settings: PitchSettings | None = None, workers: int = 1
) -> Unvoiced:
    """Share of active frames without a fundamental frequency.

    Args:
        wavs: clips [W], float in [-1, 1].
        sample_rate: of all clips, Hz; resampled to settings.sample_rate.
        settings: None: the defaults.
        workers: processes; from 2 on, the calling script needs `if __name__ == "__main__":`.

    Returns:
        counts per utterance; `.ratio` is the global number. A clip of zeros has no active frame.

    Raises:
        ValueError: on a clip shorter than one frame.

    Source: protocol of DeepASMR; pYIN is librosa's.
    """
    settings = settings or PitchSettings()
    jobs = [(np.asarray(w, np.float32), sample_rate, settings) for w in wavs]
    if workers > 1 and len(jobs) > 1:
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        # spawn: a fork of a process that runs JAX may hang
        with ProcessPoolExecutor(min(workers, len(jobs)), multiprocessing.get_context("spawn")) as pool:
            counts = list(pool.map(_count_unvoiced, jobs, chunksize=max(1, len(jobs) // (4 * workers))))
    else:
        counts = [_count_unvoiced(job) for job in jobs]
    unvoiced, active = np.array(counts, np.int64).reshape(-1, 2).T
    return Unvoiced(unvoiced, active, settings)


def _count_unvoiced(job) -> tuple[int, int]:
    """(unvoiced frames, active frames) of one clip."""
    import librosa

    wav, sample_rate, s = job
    if sample_rate != s.sample_rate:
        wav = audio.resample(wav, sample_rate, s.sample_rate)
    if len(wav) < s.frame_samples:
        raise ValueError(f"clip of {len(wav)} samples is shorter than one frame of {s.frame_samples}")
    rms = librosa.feature.rms(
        y=wav, frame_length=s.frame_samples, hop_length=s.hop_samples, pad_mode="constant"
    )[0]
    active = rms >= s.silence * rms.max()
    if not rms.max() > 0:
        return 0, 0
    f0, _, _ = librosa.pyin(
        wav,
        fmin=s.fmin_hz,
        fmax=s.fmax_hz,
        sr=s.sample_rate,
        frame_length=s.frame_samples,
        hop_length=s.hop_samples,
        n_thresholds=s.num_thresholds,
        beta_parameters=s.beta,
        boltzmann_parameter=s.boltzmann,
        resolution=s.resolution,
        max_transition_rate=s.max_transition,
        switch_prob=s.switch_probability,
        no_trough_prob=s.no_trough_probability,
        pad_mode="constant",
    )
    return int((np.isnan(f0) & active).sum()), int(active.sum())


# ----------------------------------------------------------------------------- word errors


@dataclasses.dataclass(frozen=True)
class Errors:
    """Edits that turn the reference of one utterance into the hypothesis."""

    substitutions: int
    deletions: int
    insertions: int
    reference: int  # words (characters, phones) of the reference

    @property
    def edits(self) -> int:
        """Substitutions + deletions + insertions."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Edits per reference word; above 1 is possible. An empty reference counts as one word."""
        return self.edits / max(self.reference, 1)


def edit_errors(reference: Sequence, hypothesis: Sequence) -> Errors:
    """Errors between two sequences: fewest edits, and among those the alignment with most substitutions.

    Source: Levenshtein, 1966; all three edits cost 1.
    """
    # cell: (edits, insertions + deletions, substitutions, deletions, insertions), compared in this order
    row = [(j, j, 0, 0, j) for j in range(len(hypothesis) + 1)]
    for i, r in enumerate(reference, 1):
        above, row = row, [(i, i, 0, i, 0)]
        for j, h in enumerate(hypothesis, 1):
            e, g, s, d, n = above[j - 1]
            change = (e, g, s, d, n) if r == h else (e + 1, g, s + 1, d, n)
            e, g, s, d, n = above[j]
            delete = (e + 1, g + 1, s, d + 1, n)
            e, g, s, d, n = row[j - 1]
            row.append(min(change, delete, (e + 1, g + 1, s, d, n + 1)))
    _, _, s, d, n = row[-1]
    return Errors(s, d, n, len(reference))


def words_for_errors(sentence: str, language: str) -> list[str]:
    """Words (en) or characters (zh) as the error rate counts them: lower case, only the apostrophe kept.

    Source: Seed-TTS evaluation protocol.
    """
    sentence = unicodedata.normalize("NFKC", sentence).replace("’", "'").lower()
    sentence = re.sub(r"[^\w']|_", " ", sentence)
    if language == "zh":
        return re.findall(r"[a-z0-9']+|[^\W\da-z]", sentence)
    return sentence.split()


def word_errors(reference: str, hypothesis: str, language: str = "en") -> Errors:
    """Word errors (en) or character errors (zh) of a transcript; both sides pass `words_for_errors`."""
    return edit_errors(words_for_errors(reference, language), words_for_errors(hypothesis, language))


def summarise_errors(errors: Sequence[Errors], seed: int = 0) -> dict[str, float]:
    """Numbers of the Seed-TTS protocol, in percent.

    Returns:
        rate, low, high (mean over utterances and its interval), pooled (all edits over all reference words),
        substitutions, deletions, insertions (pooled), above_half (share of utterances above 50 %),
        utterances.

    Raises:
        ValueError: if there is no utterance.
    """
    mean = bootstrap([e.rate for e in errors], seed=seed)
    words = max(sum(e.reference for e in errors), 1)
    pooled = {
        name: 100 * sum(getattr(e, name) for e in errors) / words
        for name in ("substitutions", "deletions", "insertions")
    }
    return {
        "rate": 100 * mean.value,
        "low": 100 * mean.low,
        "high": 100 * mean.high,
        "pooled": sum(pooled.values()),
        **pooled,
        "above_half": 100 * float(np.mean([e.rate > 0.5 for e in errors])),
        "utterances": len(errors),
    }


# ----------------------------------------------------------------------------- judges


def matrix_words(path: str | Path = MATRIX_FILE) -> list[list[str]]:
    """The word lists of the matrix sentences, one list per place in the sentence.

    Raises:
        ValueError: if the file is not a JSON list of lists of words.
    """
    words = json.loads(Path(path).read_text(encoding="utf-8"))
    if not words or not isinstance(words, list) or any(not isinstance(w, str) for s in words for w in s):
        raise ValueError(f'{path} must hold a list of lists of words, such as [["lucy"], ["sees"]]')
    return words


FACTORS = (0.8, 0.9, 1.0, 1.12, 1.25)  # speeds that `MatrixJudge.enrol` tries


class MatrixJudge:
    """Closed-set English recogniser: knows the word lists of the matrix sentences and nothing else.

    It measures closed-set intelligibility only (10 words in each of 5 places: guessing has 90 % errors). On
    other sentences its error is meaningless.

    Args:
        words: one list of words per place; default the built-in matrix.

    Raises:
        ValueError: if pocketsphinx is missing, or a word is neither in its dictionary nor in our lexicon.

    Source: matrix sentence tests (Hagerman, 1982); recogniser PocketSphinx with a JSGF grammar.
    """

    def __init__(self, words: Sequence[Sequence[str]] | None = None) -> None:
        try:
            import pocketsphinx
        except ImportError as error:
            raise ValueError(
                'the English judge needs pocketsphinx: pip install "deepasmr_jax[judge]"'
            ) from error
        self.words = [list(slot) for slot in (words or matrix_words())]
        # wider beams changed nothing on synthetic voices, normal or whispered
        options = dict(
            beam=1e-60, pbeam=1e-60, wbeam=1e-40, maxhmmpf=-1, maxwpf=-1, cmn="batch", samprate=16000
        )
        self._decoder = pocketsphinx.Decoder(lm=None, loglevel="FATAL", **options)
        for word in {w for slot in self.words for w in slot}:
            if self._decoder.lookup_word(word) is None:
                phones = text.pronounce(word)
                if phones is None:
                    raise ValueError(
                        f"the judge cannot pronounce {word!r}; choose a word of the CMU dictionary"
                    )
                self._decoder.add_word(word, " ".join(p.rstrip("012") for p in phones), True)
        rules = "".join(f"<p{i}> = {' | '.join(slot)};\n" for i, slot in enumerate(self.words))
        places = " ".join(f"<p{i}>" for i in range(len(self.words)))
        self._decoder.add_jsgf_string(
            "matrix", f"#JSGF V1.0;\ngrammar matrix;\npublic <sentence> = {places};\n{rules}"
        )
        self._decoder.activate_search("matrix")

    def knows(self, sentence: str) -> bool:
        """Whether this is a sentence of the grammar."""
        words = words_for_errors(sentence, "en")
        return len(words) == len(self.words) and all(w in s for w, s in zip(words, self.words, strict=True))

    def transcribe(self, wav: np.ndarray, sample_rate: int, factor: float = 1.0) -> str:
        """The sentence of the grammar that was heard; "" if none fits (then all words count as deleted).

        Args:
            wav: [W] float in [-1, 1]; its level does not matter.
            sample_rate: Hz.
            factor: the clip is heard at this speed, formants and all; see `enrol`.
        """
        wav, sample_rate = np.asarray(wav, np.float32), round(sample_rate * factor)
        wav = audio.resample(wav, sample_rate, 16000) if sample_rate != 16000 else wav
        wav = wav * (0.9 / max(float(np.abs(wav).max(initial=0.0)), 1e-6))
        edge = np.zeros(4000, np.float32)  # the grammar starts and ends in silence
        wav = np.concatenate([edge, wav, edge])
        wav = wav + 1e-4 * np.random.default_rng(0).standard_normal(len(wav))  # no digital zero
        self._decoder.start_utt()
        self._decoder.process_raw((np.clip(wav, -1, 1) * 32767).astype(np.int16).tobytes(), full_utt=True)
        self._decoder.end_utt()
        heard = self._decoder.hyp()
        return heard.hypstr if heard else ""

    def errors(self, wav: np.ndarray, sample_rate: int, sentence: str, factor: float = 1.0) -> Errors:
        """Word errors of one clip.

        Raises:
            ValueError: if the sentence is not one of the grammar.
        """
        if not self.knows(sentence):
            raise ValueError(f"{sentence!r} is no matrix sentence; this judge hears nothing else")
        return word_errors(sentence, self.transcribe(wav, sample_rate, factor))

    def enrol(self, clips: Sequence[tuple[np.ndarray, str]], sample_rate: int) -> float:
        """The speed at which this judge understands a speaker's true recordings best.

        Its acoustic model knows adult voices. A voice with shorter or longer formants is brought near them by
        playing it slower or faster, the oldest form of vocal tract length normalisation. Enrol with recordings
        that are in no row, and hear every row at that speed.

        Args:
            clips: recordings of one speaker in one style, with their matrix sentences.
            sample_rate: Hz.

        Returns:
            One of `FACTORS`: least word errors; among equals the nearest to 1.
        """
        rates = {f: sum(self.errors(w, sample_rate, t, f).rate for w, t in clips) for f in FACTORS}
        return min(FACTORS, key=lambda f: (rates[f], abs(math.log(f))))


class MandarinJudge:
    """Our own recogniser of initials and finals without tones. It is not independent of the corpus.

    Show its error on the ground truth beside every number. A syllable has two symbols or one, so the rate is
    neither a character nor a syllable error rate: call it symbol error rate.

    Args:
        folder: a model folder with the component "recognizer" (trained by the same program as the other
            models).

    Raises:
        ValueError: if the folder has no such component.
    """

    _STEP = 32000  # clips are padded to multiples of 2 s, so that few lengths are compiled

    def __init__(self, folder: str | Path | None = None, model=None, cfg=None) -> None:
        if model is None:
            from deepasmr_jax import checkpoint

            if folder is None:
                raise ValueError("the Mandarin judge needs a folder with the component 'recognizer'")
            model, cfg = checkpoint.load_component(folder, "recognizer")
        self._model, self._cfg = model, cfg

    def transcribe(self, wavs: Sequence[np.ndarray], sample_rate: int) -> list[list[str]]:
        """Labels of text.PHONES heard in each clip, such as ["zh_n", "zh_i", "zh_h", "zh_ao"].

        Args:
            wavs: clips [W], float in [-1, 1].
            sample_rate: Hz.
        """
        from deepasmr_jax import recognizer

        heard = []
        for wav in wavs:
            wav = np.asarray(wav, np.float32)
            wav = audio.resample(wav, sample_rate, 16000) if sample_rate != 16000 else wav
            row = np.zeros((1, max(1, -(-len(wav) // self._STEP)) * self._STEP), np.float32)
            row[0, : len(wav)] = wav
            heard += recognizer.decode(self._model, self._cfg, row, np.array([len(wav)], np.int32))
        return heard

    def errors(self, wav: np.ndarray, sample_rate: int, sentence: str) -> Errors:
        """Symbol errors of one clip against the pinyin of its sentence (Chinese characters only).

        Raises:
            ValueError: if pypinyin is missing.
        """
        spoken = text.normalize(sentence, "zh")
        return edit_errors(text.mandarin_phones(spoken), self.transcribe([wav], sample_rate)[0])


class SpeakerJudge:
    """Speaker embeddings of resemblyzer (GE2E), independent of our own speaker encoder.

    Its voice activity detection is not used: it would cut whispers away.

    Raises:
        ValueError: if resemblyzer or torch is missing.

    Source: Wan et al., 2018; weights in the resemblyzer wheel.
    """

    size = 256

    def __init__(self) -> None:
        import importlib.util
        import sys
        import types

        if importlib.util.find_spec("webrtcvad") is None:  # imported by resemblyzer for the step we leave out
            sys.modules.setdefault("webrtcvad", types.ModuleType("webrtcvad"))
        try:
            from resemblyzer import VoiceEncoder
        except ImportError as error:
            raise ValueError(
                'the speaker judge needs resemblyzer: pip install "deepasmr_jax[eval]"'
            ) from error
        self._encoder = VoiceEncoder("cpu", verbose=False)

    def embed(self, wav: np.ndarray, sample_rate: int) -> np.ndarray:
        """[E] float32 of length 1.

        Args:
            wav: [W] float in [-1, 1]; brought to -30 dB relative to full scale as in the encoder's training.
            sample_rate: Hz.
        """
        wav = np.asarray(wav, np.float32)
        wav = audio.resample(wav, sample_rate, 16000) if sample_rate != 16000 else wav
        wav = wav * (10 ** (-30 / 20) / max(float(np.sqrt(np.mean(wav**2))), 1e-6))
        return np.asarray(self._encoder.embed_utterance(wav), np.float32)


# ----------------------------------------------------------------------------- speakers


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Speaker retrieval: [Q] each the rank of the right speaker (1 = first), cosine to its centroid, greatest
    cosine to another one; and the number of speakers in the gallery."""

    ranks: np.ndarray
    own_cosine: np.ndarray
    other_cosine: np.ndarray
    num_speakers: int

    def within(self, rank: int = 1) -> Interval:
        """Share of clips whose right speaker is among the first `rank`; chance is rank / num_speakers."""
        return bootstrap((self.ranks <= rank).astype(float))


def speaker_retrieval(
    embeddings: np.ndarray, speakers: Sequence[str], gallery: np.ndarray, gallery_speakers: Sequence[str]
) -> Retrieval:
    """Finds the speaker of each clip among the centroids of a gallery.

    Across styles the raw cosine hardly separates speakers, so give a gallery in the style of the clips:
    whisper centroids for whispers, normal ones for normal speech.

    Args:
        embeddings: [Q, E] clips to be identified.
        speakers: [Q] the speaker each should have.
        gallery: [G, E] clips of known speakers, not among the first.
        gallery_speakers: [G].

    Raises:
        ValueError: if lengths differ or a speaker is not in the gallery.
    """
    embeddings, gallery = np.atleast_2d(embeddings), np.atleast_2d(gallery)
    if len(embeddings) != len(speakers) or len(gallery) != len(gallery_speakers):
        raise ValueError(
            f"{len(embeddings)} clips with {len(speakers)} speakers, {len(gallery)} gallery clips with "
            f"{len(gallery_speakers)}; give one speaker per clip"
        )
    names = sorted(set(gallery_speakers))
    if missing := sorted(set(speakers) - set(names)):
        raise ValueError(f"speakers {missing[:5]} are not in the gallery; add clips of theirs")
    labels = np.array(gallery_speakers)
    unit = _unit(gallery)
    centroids = _unit(np.stack([unit[labels == n].mean(0) for n in names]))
    cosine = _unit(embeddings) @ centroids.T
    index = np.array([names.index(s) for s in speakers], int)
    own = cosine[np.arange(len(index)), index]
    ranks = 1 + (cosine > own[:, None]).sum(1)
    others = cosine.copy()
    others[np.arange(len(index)), index] = -1.0
    return Retrieval(ranks, own, others.max(1), len(names))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9)


# ----------------------------------------------------------------------------- style


def spectral_tilt(wav: np.ndarray, sample_rate: int, low_hz: float = 250.0, high_hz: float = 6000.0) -> float:
    """Slope of the long-term spectrum of active frames in dB per octave. Whispers are nearer to 0.

    Frames of 32 ms whose RMS is at least 0.02 of the greatest; mean power in third-octave bands; straight
    line.

    Args:
        wav: [W] float.
        sample_rate: Hz, at least 2 * high_hz.

    Raises:
        ValueError: if the clip is silent, shorter than a frame, or the rate too low.
    """
    size = int(0.032 * sample_rate)
    if len(wav) < size or sample_rate < 2 * high_hz:
        raise ValueError(
            f"need {size} samples at {2 * high_hz:g} Hz or more, found {len(wav)} at {sample_rate} Hz"
        )
    frames = np.lib.stride_tricks.sliding_window_view(np.asarray(wav, np.float64), size)[:: size // 2]
    rms = np.sqrt((frames**2).mean(1))
    if not rms.max() > 0:
        raise ValueError("the clip is silent, it has no spectrum")
    power = (np.abs(np.fft.rfft(frames[rms >= 0.02 * rms.max()] * np.hanning(size))) ** 2).mean(0)
    hz = np.fft.rfftfreq(size, 1 / sample_rate)
    edges = low_hz * 2 ** (np.arange(int(3 * np.log2(high_hz / low_hz)) + 1) / 3)
    bands = [power[(hz >= a) & (hz < b)] for a, b in zip(edges[:-1], edges[1:], strict=True)]
    level = [(i / 3, 10 * np.log10(b.mean() + 1e-20)) for i, b in enumerate(bands) if len(b)]
    return float(np.polyfit(*zip(*level, strict=True), 1)[0])


@functools.cache
def _tokenizer() -> text.MiniTokenizer:
    return text.MiniTokenizer()


def count_syllables(sentence: str, language: str) -> int:
    """Syllables of a text: stressed-vowel symbols and Mandarin finals of the built-in tokenizer; unknown
    words have one per run of vowel letters."""
    symbols = _tokenizer().decode_symbols(_tokenizer().encode(sentence, language))
    letters = "".join(s if len(s) == 1 else " " for s in symbols)
    return sum(s[-1].isdigit() for s in symbols) + len(re.findall("[aeiouy]+", letters))


def speaking_rate(wav: np.ndarray, sample_rate: int, sentence: str, language: str) -> float:
    """Syllables per second between the first and the last active frame (20 ms, 0.02 of the greatest RMS)."""
    size = int(0.02 * sample_rate)
    frames = np.asarray(wav[: len(wav) // size * size], np.float64).reshape(-1, size)
    rms = np.sqrt((frames**2).mean(1)) if len(frames) else np.zeros(1)
    active = np.flatnonzero((rms >= 0.02 * rms.max()) & (rms > 0))
    if not len(active):
        return 0.0
    return count_syllables(sentence, language) / (0.02 * (active[-1] - active[0] + 1))


@dataclasses.dataclass(frozen=True)
class StyleFeatures:
    """What the style proxy looks at."""

    unvoiced: float
    tilt_db_per_octave: float
    syllables_per_s: float


STYLE_PROXY_WEIGHTS = (0.6, 0.2, 0.2)  # voicing is what makes a whisper; the other two only colour the number


def style_features(wav: np.ndarray, sample_rate: int, sentence: str, language: str) -> StyleFeatures:
    """Features of one clip for `style_proxy`."""
    return StyleFeatures(
        unvoiced_ratio([wav], sample_rate).ratio,
        spectral_tilt(wav, sample_rate),
        speaking_rate(wav, sample_rate, sentence, language),
    )


def style_proxy(
    features: StyleFeatures, normal: Sequence[StyleFeatures], asmr: Sequence[StyleFeatures]
) -> float:
    """PROXY of the style score, -1 (normal) to +1 (ASMR): place of each feature between two reference means.

    It is no listener and no audio language model: a clip of pure noise scores as ASMR. Show the score of
    held-out ground truth beside it.

    Args:
        features: of the clip.
        normal: features of true normal clips.
        asmr: features of true ASMR clips.

    Raises:
        ValueError: if a reference is empty.
    """
    if not normal or not asmr:
        raise ValueError("the style proxy needs reference clips of both styles")
    total = 0.0
    for weight, field in zip(STYLE_PROXY_WEIGHTS, dataclasses.fields(StyleFeatures), strict=True):
        low, high = (np.mean([getattr(f, field.name) for f in group]) for group in (normal, asmr))
        if abs(high - low) > 1e-9:  # a feature that does not tell the references apart says nothing
            total += weight * float(
                np.clip(2 * (getattr(features, field.name) - low) / (high - low) - 1, -1, 1)
            )
    return total


STYLE_INSTRUCTION = (
    "Rate the speaking style of this recording from -1 (normal speech) to +1 (ASMR speech), 0 = unsure. "
    "Judge the voice only: vocal-fold vibration, softness, breathiness, flat or soothing intonation, slow "
    "pace, lack of projection. Ignore noise, silence, content, gender and accent. Answer with JSON only: "
    '{"Style_Rating": number, "Style_Comment": "one sentence"}'
)


def style_by_client(wav: np.ndarray, sample_rate: int, client: Callable[[str, np.ndarray, int], str]):
    """Style score by an audio language model of the caller's choice.

    Args:
        wav: [W] float in [-1, 1].
        sample_rate: Hz.
        client: `client(instruction, wav, sample_rate) -> answer`; it does the network call.

    Returns:
        (rating in [-1, 1], comment).

    Raises:
        ValueError: if the answer holds no such JSON or the rating is out of range.
    """
    answer = client(STYLE_INSTRUCTION, wav, sample_rate)
    found = re.search(r"\{.*\}", answer, re.DOTALL)
    try:
        values = json.loads(found[0])
        rating, comment = float(values["Style_Rating"]), str(values.get("Style_Comment", ""))
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"the style model answered {answer[:80]!r}, expected JSON with Style_Rating"
        ) from error
    if not -1 <= rating <= 1:
        raise ValueError(f"the style model rated {rating}, expected -1 to 1")
    return rating, comment


# ----------------------------------------------------------------------------- one clip, a folder


@functools.cache
def _matrix_judge() -> MatrixJudge | None:
    try:
        return MatrixJudge()
    except ValueError:
        return None


def judge_one(wav: np.ndarray, sample_rate: int, sentence: str, language: str) -> tuple[float, float | None]:
    """Measures of one clip that need nothing but the clip and its text.

    Returns:
        (unvoiced ratio, word error rate); the rate is None unless the text is a sentence of the built-in
        English matrix and pocketsphinx is installed.
    """
    ratio = unvoiced_ratio([wav], sample_rate).ratio
    judge = _matrix_judge() if language == "en" else None
    if judge is None or not judge.knows(sentence):
        return ratio, None
    return ratio, judge.errors(wav, sample_rate, sentence).rate


def evaluate_folder(
    folder: str | Path,
    *,
    matrix: MatrixJudge | None = None,
    mandarin: MandarinJudge | None = None,
    speaker: SpeakerJudge | None = None,
    gallery: tuple[np.ndarray, Sequence[str]] | None = None,
    factors: dict[str, float] | None = None,
    workers: int = 1,
) -> dict:
    """Measures of a folder of results, by group, written to evaluation.json beside them.

    The folder holds 16-bit wav files and results.jsonl, one object per line: "file" (path inside the folder),
    "text", "language" ("en"/"zh"), and if known "group" (such as "N2A/test"; default: the "style"), "style",
    "speaker".

    Args:
        folder: the folder.
        matrix: judges English matrix sentences; None: no word errors.
        mandarin: judges Chinese; None: none.
        speaker: with gallery, measures speaker retrieval.
        gallery: ([G, E] embeddings by the same judge, [G] speakers), in the style of the clips.
        factors: of each speaker, the speed at which `matrix` hears them (`MatrixJudge.enrol`); 1 for others.
        workers: processes for the unvoiced ratio.

    Returns:
        {"settings": ..., "groups": {name: {"clips", "unvoiced": Interval, "matrix_wer": ..., "mandarin_ser":
        ..., "retrieval_first": Interval, "speaker_cosine"}}}, rates in percent where the key says wer or ser.
        Where each line names a `token_speaker`, whose tokens were spoken, also "token_speaker_first": how
        often that voice is heard instead.

    Raises:
        ValueError: if results.jsonl is missing, empty or a line lacks a field; a file is missing.
    """
    folder = Path(folder)
    rows = _read_results(folder)
    settings = PitchSettings()
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(str(row.get("group") or row.get("style") or "all"), []).append(row)
    report = {"settings": {"unvoiced": settings.describe()}, "groups": {}}
    for name, members in sorted(groups.items()):
        wavs = [audio.load(folder / r["file"], settings.sample_rate) for r in members]
        made = {"clips": len(wavs)}
        unvoiced = unvoiced_ratio(wavs, settings.sample_rate, settings, workers)
        if unvoiced.active.sum():
            made["unvoiced"] = dataclasses.asdict(unvoiced.interval())
        english = [(w, r) for w, r in zip(wavs, members, strict=True) if r["language"] == "en"]
        english = [(w, r) for w, r in english if matrix is not None and matrix.knows(r["text"])]
        if english:
            heard = (factors or {}).get
            made["matrix_wer"] = summarise_errors(
                [
                    matrix.errors(w, settings.sample_rate, r["text"], heard(r.get("speaker"), 1.0))
                    for w, r in english
                ]
            )
        chinese = [(w, r["text"]) for w, r in zip(wavs, members, strict=True) if r["language"] == "zh"]
        if mandarin is not None and chinese:
            errors = [mandarin.errors(w, settings.sample_rate, t) for w, t in chinese]
            made["mandarin_ser"] = summarise_errors(errors)
        if speaker is not None and gallery is not None:
            known = [(w, r) for w, r in zip(wavs, members, strict=True) if r.get("speaker") in gallery[1]]
            if known:
                embeddings = np.stack([speaker.embed(w, settings.sample_rate) for w, _ in known])
                found = speaker_retrieval(embeddings, [r["speaker"] for _, r in known], *gallery)
                lenders = [r.get("token_speaker") for _, r in known]
                if all(s in gallery[1] for s in lenders):
                    wrong = speaker_retrieval(embeddings, lenders, *gallery)
                    made["token_speaker_first"] = dataclasses.asdict(wrong.within(1))
                made["retrieval_first"] = dataclasses.asdict(found.within(1))
                made["retrieval_first_three"] = dataclasses.asdict(found.within(3))
                made["retrieval_chance"] = 1 / found.num_speakers
                made["speaker_cosine"] = dataclasses.asdict(bootstrap(found.own_cosine))
        report["groups"][name] = made
    (folder / "evaluation.json").write_text(
        json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return report


def _read_results(folder: Path) -> list[dict]:
    path = folder / RESULTS
    if not path.is_file():
        raise ValueError(f"{folder} has no {RESULTS}; give a folder that the batch command wrote")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for i, row in enumerate(rows, 1):
        if missing := [k for k in ("file", "text", "language") if k not in row]:
            raise ValueError(f"{path} line {i} lacks {', '.join(missing)}")
        if not (folder / row["file"]).is_file():
            raise ValueError(f"{path} line {i} names {row['file']}, which does not exist")
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows
