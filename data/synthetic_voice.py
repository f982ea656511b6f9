"""Speech of the synthetic corpus: engines with phone times, virtual speakers, WORLD resynthesis, labels.

Three engines read a sentence and say when each phone ends: flite (CMU voices), espeak-ng through the package
espeakng-loader (its phoneme events are sample-exact) and, for the split `hts` only, festival's HTS voice slt.
One WORLD analysis of that reading gives a true pair: "normal", resynthesised with the virtual speaker's timbre
and pitch, and "asmr", the same envelope excited by noise alone. All of it is synthetic; the whisper is purer than a
real one, so its unvoiced ratio is no evidence of realism. Times are in seconds, audio is 16 kHz, labels are at 50 Hz.

Source: Morise et al., WORLD (2016), through pyworld; whisper by signal processing, as the baseline of Cotescu
et al., Voice Conversion for Whispered Speech Synthesis (2019), with our own settings (constants below).
"""

import ctypes
import dataclasses
import functools
import shutil
import subprocess
import tempfile
import warnings
import zlib
from pathlib import Path

import numpy as np

from deepasmr_jax.text import PHONES, ZH_INITIALS, pinyin_parts

SAMPLE_RATE = 16000
LABEL_HOP = 320  # samples: 50 labels a second
FRAME_S = (
    0.008  # WORLD frame period: 5 ms costs 1.5 times as much and changes nothing audible on these voices
)
NUM_BINS = 513  # WORLD's FFT of 1024 at 16 kHz
WHISPER_STRETCH = 1.12  # whisper is slower by this factor
WHISPER_VOICED_DB = -14.0  # level of formerly voiced frames beside unvoiced ones
WHISPER_TILT_DB = 3.0  # per octave, about 6 dB per two octaves
# base voice -> width (half maximum) over which its formants are spread in the whisper: those of `marcelo` are narrower
# than a mouth's, and noise through them rings so that pYIN heard a pitch in half of it
WHISPER_SPREAD_HZ = {"marcelo": 150.0}
MAX_SECONDS = 8.0
# f0_class: z-score of log F0 about the utterance's median, levels 1..5; the quintiles of a normal
# distribution
F0_CLASS_EDGES = (-0.84, -0.25, 0.25, 0.84)
F0_CLASS_MIN_STD = (
    0.05  # natural log, about one semitone: a monotone voice is not spread over all five levels
)

Segment = tuple[float, float, tuple[str, ...]]  # start_s, end_s, phones that share this time in equal parts


# ---------------------------------------------------------------- virtual speakers


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A virtual speaker: a base voice and what is changed about it.

    alpha scales formant frequencies; bend adds to it below 1.5 kHz and takes from it above; tilt_db is a
    spectral slope in dB per octave about 1 kHz: these three survive whispering. f0_scale, f0_range and rate
    are factors.
    """

    name: str
    engine: str  # flite, espeak or festival
    voice: str  # of the engine; for espeak the variant
    split: str  # train, test or hts
    languages: tuple[str, ...]
    alpha: float
    bend: float
    tilt_db: float
    f0_scale: float
    f0_range: float
    rate: float
    f0_limits: tuple[float, float]  # Hz, search range of the base voice


_F0_LIMITS = {
    "rms": (60.0, 260.0), "slt": (95.0, 400.0), "awb": (65.0, 320.0), "kal16": (60.0, 240.0),
    "m3": (50.0, 260.0), "m7": (50.0, 260.0), "klatt5": (50.0, 260.0), "marcelo": (50.0, 260.0),
    "f1": (75.0, 420.0), "f3": (75.0, 420.0), "steph": (75.0, 420.0),
}  # fmt: skip
_TRAIN_ALPHAS_EN, _TEST_ALPHAS_EN = (0.76, 0.88, 1.00, 1.12, 1.24), (0.82, 0.94, 1.06, 1.18)
_TRAIN_ALPHAS_ZH = (0.84, 0.96, 1.08, 1.20)
FLITE_VOICES = ("rms", "slt", "awb", "kal16")
ESPEAK_TRAIN_VOICES = ("m3", "m7", "f1", "f3", "klatt5")  # envelopes 10 dB or more apart, most of them
# half of the Mandarin test speakers have a base voice that training never hears
_TEST_ZH = (
    ("steph", 0.90), ("steph", 1.10), ("marcelo", 0.90), ("marcelo", 1.10),
    ("m3", 1.02), ("m7", 0.90), ("f1", 1.02), ("f3", 0.90),
)  # fmt: skip


def _speaker(engine, voice, split, languages, alpha, side, tag):
    name = f"{split}_{languages[0]}_{voice}_a{round(alpha * 100):03d}_{tag}"
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    tonal = "zh" in languages
    spread = (0.90, 1.20) if tonal else (0.75, 1.35)
    f0_range = rng.uniform(*spread) * (1.3 if voice == "kal16" else 1.0)  # kal16 is nearly monotone
    return Speaker(
        name, engine, voice, split, languages, alpha,
        bend=round(side * rng.uniform(0.03, 0.06), 4),
        tilt_db=round(-side * rng.uniform(0.6, 1.5), 3),
        f0_scale=round(float(np.clip(alpha * rng.uniform(0.90, 1.14), 0.75, 1.45)), 4),
        f0_range=round(f0_range, 4),
        rate=round(rng.uniform(0.94, 1.14), 4),
        f0_limits=_F0_LIMITS[voice],
    )  # fmt: skip


@functools.cache
def speakers() -> tuple[Speaker, ...]:
    """All virtual speakers, always the same: train 40 English and 20 bilingual, test 16 + 8, hts 3."""
    table = []
    for voice in FLITE_VOICES:
        for alpha in _TRAIN_ALPHAS_EN:
            table += [
                _speaker("flite", voice, "train", ("en",), alpha, s, f"v{v}") for v, s in enumerate((1, -1))
            ]
        for i, alpha in enumerate(_TEST_ALPHAS_EN):
            table.append(_speaker("flite", voice, "test", ("en",), alpha, (1, -1)[i % 2], "t"))
    for i, voice in enumerate(ESPEAK_TRAIN_VOICES):
        for j, alpha in enumerate(_TRAIN_ALPHAS_ZH):
            table.append(_speaker("espeak", voice, "train", ("zh", "en"), alpha, (1, -1)[(i + j) % 2], "v"))
    for i, (voice, alpha) in enumerate(_TEST_ZH):
        table.append(_speaker("espeak", voice, "test", ("zh",), alpha, (1, -1)[i % 2], "t"))
    for i, alpha in enumerate((0.91, 1.0, 1.09)):
        table.append(_speaker("festival", "slt", "hts", ("en",), alpha, (1, -1)[i % 2], "h"))
    return tuple(table)


# ---------------------------------------------------------------- engines

INSTALL = "apt-get install flite festival festvox-us-slt-hts, and pip install espeakng-loader"


def require(engine: str) -> None:
    """Raises RuntimeError, with the command that installs it, if an engine is not there."""
    if engine == "espeak":
        try:
            import espeakng_loader  # noqa: F401
        except ModuleNotFoundError:
            raise RuntimeError(f"the espeakng-loader package is missing: {INSTALL}") from None
    elif shutil.which(engine) is None:
        raise RuntimeError(f"the program {engine!r} is missing: {INSTALL}")


def _read_wav(path):
    from scipy.io import wavfile

    rate, wav = wavfile.read(path)
    return _to_16k(wav.astype(np.float64) / 32768.0, rate)


def _to_16k(wav, rate):
    from math import gcd

    from scipy.signal import resample_poly

    if rate == SAMPLE_RATE:
        return wav
    g = gcd(rate, SAMPLE_RATE)
    return resample_poly(wav, SAMPLE_RATE // g, rate // g)


_CMU_PHONES = {"pau": "sil", "#": "sil", "ax": "AH", "axr": "ER", "dx": "T", "el": "L", "em": "M", "en": "N"}


def _cmu_phone(name):
    label = _CMU_PHONES.get(name, name.upper())
    if label != "sil" and label not in PHONES:
        raise ValueError(f"unknown phone {name!r} of a CMU voice")
    return (label,)


def flite_say(text: str, voice: str) -> tuple[np.ndarray, list[Segment]]:
    """Read an English sentence with flite.

    Returns:
        (wav [W] float64 at 16 kHz, segments that cover it from 0).

    Raises:
        RuntimeError: if flite is missing or fails. ValueError: on a phone outside text.PHONES.
    """
    require("flite")
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/x.wav"
        done = subprocess.run(
            ["flite", "-voice", voice, "-psdur", "-t", text, "-o", path], capture_output=True, text=True
        )
        if done.returncode or not Path(path).exists():
            raise RuntimeError(f"flite failed on {text!r}: {done.stderr.strip()[-200:]}")
        wav = _read_wav(path)
    segments, start = [], 0.0
    for part in done.stdout.split():
        name, end = part.rsplit(":", 1)
        segments.append((start, float(end), _cmu_phone(name)))
        start = float(end)
    return wav, segments


def festival_say(texts: list[str], timeout_s: float = 900) -> list[tuple[np.ndarray, list[Segment]]]:
    """Read many English sentences in one festival process (its start dominates) with the HTS voice slt.

    Returns:
        One (wav, segments) for each text, as `flite_say`.

    Raises:
        RuntimeError: if festival or its voice is missing or fails.
    """
    require("festival")
    with tempfile.TemporaryDirectory() as folder:
        lines = ["(voice_cmu_us_slt_arctic_hts)"]
        for i, text in enumerate(texts):
            quoted = text.replace("\\", " ").replace('"', " ")
            lines.append(f'(set! u (utt.synth (eval (list (quote Utterance) (quote Text) "{quoted}"))))')
            lines.append(f'(utt.save.wave u "{folder}/{i}.wav" \'riff) (utt.save.segs u "{folder}/{i}.lab")')
        script = Path(folder, "x.scm")
        script.write_text("\n".join(lines) + "\n")
        done = subprocess.run(["festival", "-b", script], capture_output=True, text=True, timeout=timeout_s)
        result = []
        for i, text in enumerate(texts):
            if done.returncode or not Path(folder, f"{i}.lab").exists():
                raise RuntimeError(
                    f"festival failed on {text!r} ({done.stderr.strip()[-200:]}); is the voice there?"
                )
            wav = _read_wav(f"{folder}/{i}.wav")
            segments, start = [], 0.0
            for line in Path(folder, f"{i}.lab").read_text().splitlines():
                fields = line.split()
                if len(fields) != 3:
                    continue
                segments.append((start, float(fields[0]), _cmu_phone(fields[2])))
                start = float(fields[0])
            result.append((wav, segments))
    return result


class _EspeakEvent(ctypes.Structure):
    class Id(ctypes.Union):
        _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]

    _fields_ = [
        ("type", ctypes.c_int), ("uid", ctypes.c_uint), ("text_position", ctypes.c_int),
        ("length", ctypes.c_int), ("audio_position", ctypes.c_int), ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p), ("id", Id),
    ]  # fmt: skip


_ESPEAK_WORD, _ESPEAK_PHONEME = 1, 7


class _Espeak:
    """espeak-ng in this process: one library, one callback, the buffers of the current sentence."""

    def __init__(self):
        import espeakng_loader

        self.lib = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path().encode()
        self.rate = self.lib.espeak_Initialize(2, 0, data, 1)  # synchronous, phoneme events
        if self.rate <= 0:
            raise RuntimeError(f"espeak-ng does not start with its data in {data.decode()}")
        self.audio, self.events = [], []
        kind = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_EspeakEvent)
        )
        self.callback = kind(self._receive)  # kept alive: C holds a pointer to it
        self.lib.espeak_SetSynthCallback(self.callback)

    def _receive(self, wav, num_samples, events):
        if wav and num_samples > 0:
            self.audio.append(np.ctypeslib.as_array(wav, (num_samples,)).copy())
        i = 0
        while events[i].type:
            e = events[i]
            if e.type == _ESPEAK_WORD:
                self.events.append((e.sample, None))
            elif e.type == _ESPEAK_PHONEME:
                self.events.append((e.sample, e.id.string.decode("utf-8", "replace")))
            i += 1
        return 0

    def say(self, text, voice):
        self.audio.clear()
        self.events.clear()
        if self.lib.espeak_SetVoiceByName(voice.encode()):
            raise RuntimeError(f"espeak-ng refuses the voice {voice!r}")
        self.lib.espeak_SetParameter(2, 60, 0)  # volume: at 100 some variants touch full scale
        raw = text.encode()
        self.lib.espeak_Synth(raw, len(raw) + 1, 0, 0, 0, 1, None, None)
        self.lib.espeak_Synchronize()
        if not self.audio:
            raise RuntimeError(f"espeak-ng gave no audio for {text!r}")
        return np.concatenate(self.audio).astype(np.float64) / 32768.0, list(self.events)


@functools.cache
def _espeak():
    return _Espeak()


_ESPEAK_EN = {
    "a": "AE", "aa": "AE", "a#": "AH", "E": "EH", "i:": "IY", "i": "IY", "I": "IH", "I2": "IH", "I#": "IH",
    "@": "AH", "@2": "AH", "@-": "AH", "@5": "AH", "V": "AH", "3": "ER", "3:": "ER", "aI": "AY", "oU": "OW",
    "eI": "EY", "u:": "UW", "aU": "AW", "U": "UH", "U@": "UH R", "0": "AA", "A:": "AA", "@L": "AH L",
    "O@": "AO R", "o@": "AO R", "A@": "AA R", "e@": "EH R", "i@3": "IY R", "i@": "IY AH", "aI@": "AY AH",
    "aI3": "AY ER", "OI": "OY", "O2": "AO", "O:": "AO", "O": "AO", "aU@": "AW AH", "r-": "R", "r": "R",
    "t2": "T", "t#": "T", "t": "T", "?": "T", "n-": "N", "n": "N", "N": "NG", "D": "DH", "T": "TH", "S": "SH",
    "Z": "ZH",
    "dZ": "JH", "tS": "CH", "j": "Y", ";": "Y", "h": "HH", "s": "S", "l": "L", "d": "D", "k": "K", "m": "M",
    "z": "Z", "p": "P", "b": "B", "f": "F", "w": "W", "v": "V", "g": "G",
}  # fmt: skip


def espeak_say(text: str, variant: str, language: str) -> tuple[np.ndarray, list[Segment]]:
    """Read a sentence with espeak-ng: English ("en") as text, Mandarin ("zh") as pinyin syllable by syllable.

    Args:
        text: the sentence; Mandarin in characters (they are read through pypinyin, tone changes applied).
        variant: espeak voice variant such as "m3".
        language: "en" or "zh".

    Returns:
        (wav [W] float64 at 16 kHz, segments).

    Raises:
        RuntimeError: if espeak-ng is missing or fails. ValueError: if its phones do not agree with the
        reading.
    """
    require("espeak")
    engine = _espeak()
    if language == "en":
        wav, events = engine.say(text, f"en-us+{variant}")
        times = [(t, p) for t, p in events if p is not None]
    else:
        from synthetic_text import syllables_zh

        syllables = syllables_zh(text)
        wav, events = engine.say(" ".join(syllables).replace(" ,", ","), f"cmn+{variant}")
        spoken = [s for s in syllables if s != ","]
        if sum(p is None for _, p in events) != len(spoken):
            raise ValueError(
                f"espeak-ng reads {sum(p is None for _, p in events)} syllables in {text!r}, not {spoken}"
            )
        times = _label_zh(events, spoken)
    total = len(wav) / engine.rate
    segments = []
    for i, (sample, name) in enumerate(times):
        start = sample / engine.rate
        end = times[i + 1][0] / engine.rate if i + 1 < len(times) else total
        if language == "zh":
            phones = (name,)
        elif name.startswith("_") or not name:
            phones = ("sil",) if name in ("_", "_:") else None
        else:
            bare = name.lstrip("',%=")
            if bare not in _ESPEAK_EN:
                raise ValueError(f"unknown espeak-ng phoneme {name!r} in {text!r}")
            phones = tuple(_ESPEAK_EN[bare].split())
        if phones is None and segments:  # boundary marks: the time belongs to the phone before
            segments[-1] = (segments[-1][0], end, segments[-1][2])
        elif end > start:
            segments.append((start, end, phones or ("sil",)))
    if segments and segments[0][0] > 0:
        segments.insert(0, (0.0, segments[0][0], ("sil",)))
    return _to_16k(wav, engine.rate), segments


def _label_zh(events, spoken):
    """(sample, label) of initials, finals, pauses; a first phoneme is the initial if there is one."""
    result, index, position = [], -1, 0
    for sample, name in events:
        if name is None:
            index, position = index + 1, 0
        elif name in ("_", "_:"):
            result.append((sample, "sil"))
        elif name.startswith("(") or index < 0:
            raise ValueError(f"espeak-ng left Mandarin at syllable {spoken[max(index, 0)]!r}")
        elif name.startswith("_"):
            continue
        else:
            initial, final, _ = pinyin_parts(spoken[index])
            if position == 0 and initial:
                result.append((sample, f"zh_{initial}"))
            elif position <= 1 or not result[-1][1] == f"zh_{final}":
                if not result or result[-1][1] != f"zh_{final}" or position == 0:
                    result.append((sample, f"zh_{final}"))
            position += 1
    return result


# ---------------------------------------------------------------- WORLD


def _trim(wav, segments, head_s, tail_s):
    """Cut the silence at both ends to head_s and tail_s, zero padded where less; segments shift along."""
    spoken = [s for s in segments if s[2] != ("sil",)]
    if not spoken:
        raise ValueError("no phone but silence in the alignment")
    start, end = spoken[0][0] - head_s, spoken[-1][1] + tail_s
    a, b = round(start * SAMPLE_RATE), round(end * SAMPLE_RATE)
    cut = wav[max(a, 0) : max(b, 0)]
    cut = np.pad(cut, (max(-a, 0), max(b - len(wav), 0)))
    inner = [(s - start, e - start, p) for s, e, p in segments if e > spoken[0][0] and s < spoken[-1][1]]
    return cut, [(0.0, inner[0][0], ("sil",)), *inner, (inner[-1][1], len(cut) / SAMPLE_RATE, ("sil",))]


def labels(segments: list[Segment], times_s: np.ndarray) -> np.ndarray:
    """Index in text.PHONES at each time; 0 (silence) outside all segments. [T] int32."""
    starts, names = [], []
    for start, end, phones in segments:
        step = (end - start) / len(phones)
        for i, phone in enumerate(phones):
            starts.append(start + i * step)
            names.append(PHONES.index(phone))
    starts.append(segments[-1][1])
    names.append(0)
    index = np.searchsorted(np.asarray(starts), times_s, side="right") - 1
    return np.where(index < 0, 0, np.asarray(names, np.int32)[np.maximum(index, 0)]).astype(np.int32)


_VOICELESS = {"sil", "CH", "F", "K", "P", "S", "SH", "T", "TH"} | {
    f"zh_{i}" for i in "b p f d t g k h j q x zh ch sh z c s".split()
}
# HH is not among them: between vowels it is voiced, and loud if it escapes the whisper's -14 dB
_VOWELS = set("AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW".split()) | {
    p for p in PHONES if p.startswith("zh_") and p[3:] not in ZH_INITIALS
}


@functools.cache
def _phone_flags():
    return np.asarray([p in _VOICELESS for p in PHONES]), np.asarray([p in _VOWELS for p in PHONES])


def _inside(flags, margin):
    """Frames that are True together with their `margin` neighbours on both sides."""
    padded = np.pad(flags, margin, "edge")
    return np.lib.stride_tricks.sliding_window_view(padded, 2 * margin + 1).all(1)


def _clean_f0(f0, phone_ids):
    """Voicing by phone: none inside silence and voiceless consonants, everywhere inside vowels, no short
    runs.

    DIO alone calls 40 % of the frames of voiceless consonants voiced, and loses vowels beside a noisy onset.
    The two frames at each edge of a phone stay as DIO found them. Gaps are interpolated in log F0.
    """
    voiceless, vowel = (flags[phone_ids] for flags in _phone_flags())
    f0 = np.where(_inside(voiceless, 2) | (phone_ids == 0), 0.0, f0)
    state = np.concatenate(([0], (f0 > 0).astype(np.int8), [0]))
    edges = np.flatnonzero(np.diff(state))
    for a, b in zip(edges[::2], edges[1::2], strict=True):
        if b - a < 4:
            f0[a:b] = 0.0
    known = np.flatnonzero(f0)
    if len(known):
        gaps = _inside(vowel, 2) & (f0 == 0)
        for a, b in zip(known[:-1], known[1:], strict=True):  # sonorants between two voiced frames
            if 1 < b - a <= 9 and not voiceless[a + 1 : b].any():
                gaps[a + 1 : b] = True
        f0[gaps] = np.exp(np.interp(np.flatnonzero(gaps), known, np.log(f0[known])))
    return f0


def f0_classes(f0_hz: np.ndarray) -> np.ndarray:
    """Pitch level [T] int32: 0 where f0_hz is 0, else 1..5 by the z-score of log F0 (F0_CLASS_EDGES)."""
    voiced = f0_hz > 0
    result = np.zeros(f0_hz.shape, np.int32)
    if voiced.any():
        log_f0 = np.log(f0_hz[voiced])
        z = (log_f0 - np.median(log_f0)) / max(float(log_f0.std()), F0_CLASS_MIN_STD)
        result[voiced] = 1 + np.searchsorted(F0_CLASS_EDGES, z, side="right")
    return result


def _speaker_map(speaker, hz):
    """Frequency of the base voice that ends up at hz (piecewise linear, 8 kHz stays)."""
    low, high = speaker.alpha * (1 + speaker.bend), speaker.alpha * (1 - speaker.bend)
    source = np.array([0.0, 1000.0, 2200.0, 4600.0, 8000.0])
    target = np.array([0.0, 1000.0 * low, 2200.0 * speaker.alpha, 4600.0 * high, 8000.0])
    return np.interp(hz, target, source)


def _whisper_map(hz):
    """Inverse of the whisper's formant shift: factor 1.18 at 0 Hz falling to 1.04 at 4 kHz and 1 at 8 kHz."""
    source = np.linspace(0.0, 8000.0, 161)
    factor = np.interp(source, (0.0, 4000.0, 8000.0), (1.18, 1.04, 1.0))
    return np.interp(hz, source * factor, source)


def _warp(log_spectrum, source_hz):
    """Read each frame's spectrum [T, 513] at other frequencies [513]."""
    position = np.clip(source_hz / (SAMPLE_RATE / 2) * (NUM_BINS - 1), 0, NUM_BINS - 1.001)
    index = position.astype(np.int64)
    w = (position - index).astype(log_spectrum.dtype)
    return log_spectrum[:, index] * (1 - w) + log_spectrum[:, index + 1] * w


def _spread(power, width_hz):
    """Power spectra [T, 513] smoothed over frequency with a bell of this width at half its height."""
    from scipy.ndimage import gaussian_filter1d

    bins = width_hz / (SAMPLE_RATE / 2) * (NUM_BINS - 1)
    return gaussian_filter1d(power, bins / np.sqrt(8 * np.log(2)), axis=1, mode="nearest")


def _noise_synthesis(log_amplitude, num_samples, frame_samples, rng):
    """White noise through a time-varying zero-phase filter, log_amplitude [T, 513] each frame_samples."""
    from scipy import fft  # stays in float32

    hop, window_size, size = 80, 320, 1024
    num_frames = num_samples // hop + 5
    noise = rng.standard_normal(num_frames * hop + window_size, dtype=np.float32)
    starts = np.arange(num_frames) * hop
    window = np.hanning(window_size + 1)[:-1].astype(np.float32) / 2.0  # four overlapping frames sum to one
    frames = np.zeros((num_frames, size), np.float32)
    offset = (size - window_size) // 2
    frames[:, offset : offset + window_size] = noise[starts[:, None] + np.arange(window_size)] * window
    # frame k is centred on output sample k * hop - window_size / 2 after the cut below
    position = np.clip((starts - window_size / 2) / frame_samples, 0, len(log_amplitude) - 1.001)
    index = position.astype(np.int64)
    w = (position - index).astype(np.float32)[:, None]
    log_amplitude = log_amplitude.astype(np.float32)
    gain = np.exp(log_amplitude[index] * (1 - w) + log_amplitude[index + 1] * w)
    filtered = fft.irfft(fft.rfft(frames) * gain, size)
    out = np.zeros(num_frames * hop + size, np.float32)
    for k in range(num_frames):
        out[k * hop : k * hop + size] += filtered[k]
    cut = offset + window_size  # drops the lead-in, where fewer than four frames overlap
    return out[cut : cut + num_samples]


@functools.cache
def _pyworld():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its pkg_resources import
        import pyworld
    return pyworld


def _check(wav, what):
    if not np.isfinite(wav).all() or wav.size < SAMPLE_RATE // 4:
        raise ValueError(f"{what}: {wav.size} samples, finite: {bool(np.isfinite(wav).all())}")
    peak, rms = np.abs(wav).max(), np.sqrt(np.mean(wav**2))
    if peak > 0.99 or rms < 1e-3:
        raise ValueError(f"{what}: peak {peak:.3f}, rms {rms:.5f}; clipped or silent")
    if wav.size > MAX_SECONDS * SAMPLE_RATE:
        raise ValueError(f"{what}: {wav.size / SAMPLE_RATE:.1f} s, over {MAX_SECONDS} s")


def make_pair(wav: np.ndarray, segments: list[Segment], speaker: Speaker, seed: int) -> dict[str, dict]:
    """The normal and the whispered reading of one sentence by a virtual speaker, with 50 Hz labels.

    Args:
        wav: [W] float64, an engine's reading at 16 kHz.
        segments: its alignment.
        speaker: who reads.
        seed: of levels, ends and noise.

    Returns:
        {"normal": r, "asmr": r}, r = audio int16 [W'], phones int32 [W' // 320], f0_class int32 [W' // 320].

    Raises:
        ValueError: if a result is not finite, clipped, silent, or longer than MAX_SECONDS.
    """
    pw = _pyworld()
    rng = np.random.default_rng(seed)
    wav, segments = _trim(wav, segments, rng.uniform(0.07, 0.13), rng.uniform(0.08, 0.14))
    wav = wav / max(np.abs(wav).max(), 1e-6) * 0.5 + 1e-5 * rng.standard_normal(len(wav))
    wav = np.ascontiguousarray(wav, np.float64)

    # analysis
    low, high = speaker.f0_limits
    f0, times = pw.dio(
        wav, SAMPLE_RATE, f0_floor=low, f0_ceil=high, frame_period=FRAME_S * 1000, allowed_range=0.15
    )
    f0 = _clean_f0(pw.stonemask(wav, f0, times, SAMPLE_RATE), labels(segments, times))
    spectrum = pw.cheaptrick(wav, f0, times, SAMPLE_RATE, fft_size=1024)
    # D4C is the dearest part and aperiodicity moves slowly: every third frame
    coarse = pw.d4c(wav, f0[::3].copy(), times[::3].copy(), SAMPLE_RATE, threshold=0.0, fft_size=1024)
    aperiodicity = np.repeat(coarse, 3, axis=0)[: len(f0)]
    fresh = np.repeat(f0[::3] > 0, 3)[: len(f0)]
    aperiodicity[(f0 > 0) & ~fresh] = np.median(coarse[f0[::3] > 0], axis=0) if fresh.any() else 0.5
    aperiodicity[f0 == 0] = 1.0

    # the speaker's envelope
    hz = np.linspace(0.0, SAMPLE_RATE / 2, NUM_BINS)
    octave = np.log2(np.clip(hz, 150.0, 6500.0) / 1000.0)
    db = np.log(10.0) / 10.0  # of power
    log_spectrum = np.log(np.maximum(spectrum, 1e-16)).astype(np.float32)
    own = _speaker_map(speaker, hz)
    voiced = f0 > 0
    log_normal = _warp(log_spectrum, own) + speaker.tilt_db * db * octave

    # normal
    new_f0 = np.zeros_like(f0)
    if voiced.any():
        log_f0 = np.log(f0[voiced])
        median = np.median(log_f0)
        new_f0[voiced] = np.exp(median + speaker.f0_range * (log_f0 - median)) * speaker.f0_scale
        new_f0[voiced] = np.clip(new_f0[voiced], 55.0, 500.0)
    new_aperiodicity = np.clip(_warp(aperiodicity, own), 0.0, 1.0)
    normal = pw.synthesize(
        new_f0,
        np.ascontiguousarray(np.exp(log_normal), np.float64),
        np.ascontiguousarray(new_aperiodicity),
        SAMPLE_RATE,
        FRAME_S * 1000 / speaker.rate,
    )
    normal = normal[: int(len(wav) / speaker.rate)]
    normal = normal / max(np.abs(normal).max(), 1e-9) * rng.uniform(0.3, 0.7)
    normal = normal + 10 ** (-66 / 20) * rng.standard_normal(len(normal))

    # whisper: the envelope through the formant shift, then levels, then noise
    log_whisper = _warp(log_spectrum, _speaker_map(speaker, _whisper_map(hz)))
    amount = np.convolve(np.pad(voiced.astype(np.float64), 2, "edge"), np.ones(5) / 5, "valid")[:, None]
    log_whisper = log_whisper + speaker.tilt_db * db * octave
    log_whisper = log_whisper + amount * db * (WHISPER_VOICED_DB + WHISPER_TILT_DB * octave)
    log_whisper = log_whisper + db * 24.0 * np.minimum(np.log2(np.maximum(hz, 20.0) / 250.0), 0.0)
    # breath: a stationary floor under the power envelope, falling 3 dB an octave from 90 Hz to 8 kHz
    power = np.exp(log_whisper)
    if speaker.voice in WHISPER_SPREAD_HZ:
        power = _spread(power, WHISPER_SPREAD_HZ[speaker.voice])
    breath = 10 ** (-0.3 * np.clip(np.log2(np.maximum(hz, 50.0) / 700.0), -3.0, 3.5))
    power += breath / breath.mean() * power.mean() * 10 ** (rng.uniform(-40, -32) / 10)
    stretch = WHISPER_STRETCH / speaker.rate
    num_samples = int(len(wav) * stretch)
    whisper = _noise_synthesis(0.5 * np.log(power), num_samples, FRAME_S * SAMPLE_RATE * stretch, rng)
    whisper = whisper / max(np.abs(whisper).max(), 1e-9) * rng.uniform(0.08, 0.25)

    result = {}
    for style, audio, factor in (("normal", normal, 1 / speaker.rate), ("asmr", whisper, stretch)):
        _check(audio, f"{style} reading by {speaker.name}")
        centres_s = (np.arange(len(audio) // LABEL_HOP) + 0.5) * LABEL_HOP / SAMPLE_RATE / factor
        nearest = np.clip(np.round(centres_s / FRAME_S).astype(np.int64), 0, len(f0) - 1)
        result[style] = {
            "audio": np.round(audio * 32767).astype(np.int16),
            "phones": labels(segments, centres_s),
            "f0_class": f0_classes(new_f0)[nearest]
            if style == "normal"
            else np.zeros(len(centres_s), np.int32),
        }
    return result


def read_aloud(text: str, language: str, speaker: Speaker) -> tuple[np.ndarray, list[Segment]]:
    """One sentence by the speaker's engine, before any conversion: (wav [W] float64 16 kHz, segments)."""
    if speaker.engine == "flite":
        return flite_say(text, speaker.voice)
    if speaker.engine == "festival":
        return festival_say([text])[0]
    return espeak_say(text, speaker.voice, language)
