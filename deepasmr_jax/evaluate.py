"""Measures over clips and result folders, with bootstrap intervals over utterances.

Unvoiced ratio (pYIN), summary of word errors, speaker retrieval, a style proxy, and the report of a folder. Who
listens is in judges.py. All are checked on synthetic speech: a number here is about intelligibility and
identity of synthetic voices, and the style score is a proxy, not a listener.
Letters: W samples, Q and G clips, E embedding size.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from deepasmr_jax import audio, config, judges, request, text

RESULTS, FAILURES = "results.jsonl", "failures.jsonl"


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


def summarise_errors(errors: Sequence[judges.Errors], seed: int = 0) -> dict[str, float]:
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


# ----------------------------------------------------------------------------- speakers


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Speaker retrieval: [Q] each the rank of the right speaker (1 = first) and the cosine to its centroid;
    and the number of speakers in the gallery."""

    ranks: np.ndarray
    own_cosine: np.ndarray
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
    return Retrieval(ranks, own, len(names))


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
    """Syllables per second between the first and the last active frame (20 ms, 0.02 of the greatest RMS).

    Args:
        wav: [W] float.
        sample_rate: Hz.
        sentence: what is said.
        language: "en" or "zh".

    Returns:
        The rate; 0 for a clip without an active frame.
    """
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


def style_features(
    wav: np.ndarray, sample_rate: int, sentence: str, language: str, unvoiced: float | None = None
) -> StyleFeatures:
    """Features of one clip for `style_proxy`.

    Args:
        wav: [W] float in [-1, 1], at 12 kHz or more.
        sample_rate: Hz.
        sentence: what is said.
        language: "en" or "zh".
        unvoiced: the clip's unvoiced ratio, where it is known.

    Raises:
        ValueError: if the clip is silent or shorter than a frame, or the rate too low (`spectral_tilt`).
    """
    return StyleFeatures(
        unvoiced_ratio([wav], sample_rate).ratio if unvoiced is None else unvoiced,
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
def _matrix_judge() -> "judges.MatrixJudge | None":
    try:
        return judges.MatrixJudge()
    except ValueError:
        return None


def judge_one(wav: np.ndarray, sample_rate: int, sentence: str, language: str) -> tuple[float, float | None]:
    """Measures of one clip that need nothing but the clip and its text.

    Args:
        wav: [W] float in [-1, 1].
        sample_rate: Hz.
        sentence: what it should say.
        language: "en" or "zh".

    Returns:
        (unvoiced ratio, word error rate); the rate is None unless the text is a sentence of the built-in
        English matrix and pocketsphinx is installed.

    Raises:
        ValueError: if the clip is shorter than one frame of `PitchSettings`.
    """
    ratio = unvoiced_ratio([wav], sample_rate).ratio
    judge = _matrix_judge() if language == "en" else None
    if judge is None or not judge.knows(sentence):
        return ratio, None
    return ratio, judge.errors(wav, sample_rate, sentence).rate


def evaluate_folder(
    folder: str | Path,
    *,
    matrix: judges.MatrixJudge | None = None,
    mandarin: judges.MandarinJudge | None = None,
    speaker: judges.SpeakerJudge | None = None,
    similarity: judges.SimilarityJudge | None = None,
    gallery: tuple[np.ndarray, Sequence[str]] | None = None,
    factors: dict[str, float] | None = None,
    style: tuple[Sequence[StyleFeatures], Sequence[StyleFeatures]] | None = None,
    workers: int = 1,
) -> dict:
    """Measures of a folder of results, by group, written to evaluation.json beside them.

    The folder holds 16-bit wav files and results.jsonl, one object per line: "file" (path inside the folder),
    "text", "language" ("en"/"zh"), and if known "group" (such as "N2A/test"; default: the "style"), "style",
    "speaker", and "clip" or "voice", the clip whose voice was wanted: a path, absolute or from the working
    directory. A silent file, as launch/table.py writes for a request that failed, has lost all its words and has
    no voice: it counts in the word errors and not among the voices. The lines of failures.jsonl are counted and
    enter no measure.

    Args:
        folder: the folder.
        matrix: judges English matrix sentences; None: no word errors.
        mandarin: judges Chinese; None: none.
        speaker: with gallery, measures speaker retrieval.
        similarity: compares each output with its clip; None: no similarity.
        gallery: ([G, E] embeddings by the same judge, [G] speakers), in the style of the clips.
        factors: of each speaker, the speed at which `matrix` hears them (`judges.MatrixJudge.enrol`); 1 for others.
        style: features of true normal and of true ASMR clips, between which `style_proxy` places each output.
        workers: processes for the unvoiced ratio.

    Returns:
        {"settings": ..., "failed": number of requests without audio, "unvoiced" and "similarity": Interval over all
        groups, "groups": {name: {"clips", "silent", "unvoiced": Interval, "matrix_wer": ..., "mandarin_ser": ...,
        "retrieval_first": Interval, "speaker_cosine", "similarity", "style_proxy": Interval}}}, rates in percent
        where the key says wer or ser. "similarity" is the mean cosine of the outputs and their voice clips.
        Where each line names a `token_speaker`, whose tokens were spoken, also "token_speaker_first": how
        often that voice is heard instead.
        Beside "retrieval_first" stand "retrieval_first_three": Interval (among the first three), and
        "retrieval_chance" (of the first place). A measure whose judge or clips are absent has no key.

    Raises:
        ValueError: if results.jsonl is missing, empty (then failures.jsonl is named, if it has lines) or damaged, a
            line lacks a field, or a file is missing; with `similarity` also if a clip is, or no line names one.
    """
    folder = Path(folder)
    rows = _read_results(folder)
    clips = {} if similarity is None else _embed_clips(folder, rows, similarity)
    settings = PitchSettings()
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(str(row.get("group") or row.get("style") or "all"), []).append(row)
    judging = dict(matrix=matrix, mandarin=mandarin, speaker=speaker, similarity=similarity, style=style)
    report = {
        "settings": {
            "unvoiced": settings.describe(),
            "judges": sorted(name for name, judge in judging.items() if judge is not None),
        },
        "failed": _count_failures(folder),
        "groups": {},
    }
    if similarity is not None:
        report["settings"]["similarity"] = similarity.describe()
    counted, cosines = [], []
    for name, members in sorted(groups.items()):
        wavs = [audio.load(folder / r["file"], settings.sample_rate, allow_silence=True) for r in members]
        made = {"clips": len(wavs), "silent": sum(map(audio.is_silent, wavs))}
        unvoiced = unvoiced_ratio(wavs, settings.sample_rate, settings, workers)
        counted.append(unvoiced)
        if unvoiced.active.sum():
            made["unvoiced"] = dataclasses.asdict(unvoiced.interval())
        if style is not None and unvoiced.active.sum():
            scores = [
                style_proxy(style_features(w, settings.sample_rate, r["text"], r["language"], u / a), *style)
                for w, r, u, a in zip(wavs, members, unvoiced.unvoiced, unvoiced.active, strict=True)
                if a  # a silent file has no style
            ]
            made["style_proxy"] = dataclasses.asdict(bootstrap(scores))
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
            known = [(w, r) for w, r in known if not audio.is_silent(w)]
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
        pairs = [(w, clips[_clip_of(r)]) for w, r in zip(wavs, members, strict=True) if _clip_of(r) in clips]
        pairs = [(w, clip) for w, clip in pairs if not audio.is_silent(w)]
        if pairs:
            embeddings = similarity.embed([w for w, _ in pairs], settings.sample_rate)
            cosines.append(np.sum(embeddings * np.stack([clip for _, clip in pairs]), axis=1))
            made["similarity"] = dataclasses.asdict(bootstrap(cosines[-1]))
        report["groups"][name] = made
    counts = (np.concatenate([getattr(u, key) for u in counted]) for key in ("unvoiced", "active"))
    every = Unvoiced(*counts, settings)
    if every.active.sum():
        report["unvoiced"] = dataclasses.asdict(every.interval())
    if cosines:
        report["similarity"] = dataclasses.asdict(bootstrap(np.concatenate(cosines)))
    config.write_json(folder / "evaluation.json", report)
    return report


def _read_results(folder: Path) -> list[dict]:
    path = folder / RESULTS
    if not path.is_file():
        raise ValueError(f"{folder} has no {RESULTS}; give a folder that the batch command wrote")
    rows, way_out = [], "run `deepasmr batch` again"
    for i, line in enumerate(request.read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = request.parse_object(line)
        except ValueError as e:
            raise ValueError(f"{path} line {i} is not a JSON object ({e}); {way_out}") from None
        if missing := [k for k in ("file", "text", "language") if not isinstance(row.get(k), str)]:
            raise ValueError(f"{path} line {i} lacks {', '.join(missing)}; {way_out}")
        if not (folder / row["file"]).is_file():
            raise ValueError(f"{path} line {i} names {row['file']}, which does not exist; {way_out}")
        rows.append(row)
    if not rows and _count_failures(folder):
        raise ValueError(
            f"all requests of {folder} failed, there is nothing to measure: {folder / FAILURES} says why; "
            f"correct the list, then {way_out}"
        )
    if not rows:
        raise ValueError(f"{path} is empty; {way_out}")
    return rows


def _clip_of(row: dict) -> str | None:
    """The clip that a line names; those of older versions have only the path as it was given, under "voice"."""
    clip = row.get("clip", row.get("voice"))
    return clip if isinstance(clip, str) else None


def _embed_clips(folder: Path, rows: list[dict], judge: judges.SimilarityJudge) -> dict[str, np.ndarray]:
    """Voice clip -> its embedding [E]."""
    names = list(dict.fromkeys(name for name in map(_clip_of, rows) if name))
    if not names:
        raise ValueError(
            f'no line of {folder / RESULTS} names its voice clip; add "clip" with its path to the lines'
        )
    if missing := [name for name in names if not Path(name).is_file()]:
        raise ValueError(
            f"{folder / RESULTS} names the voice clip {missing[0]}, which does not exist"
            f"{f', as {len(missing) - 1} more' if missing[1:] else ''}; put it there, or correct the lines"
        )
    wavs = [audio.load(name, audio.SAMPLE_RATE) for name in names]
    return dict(zip(names, judge.embed(wavs, audio.SAMPLE_RATE), strict=True))


def _count_failures(folder: Path) -> int:
    path = folder / FAILURES
    return sum(bool(line.strip()) for line in path.read_text("utf-8").split("\n")) if path.is_file() else 0
