"""From a piece of a recording and its transcript to training segments: breath stays, only long silence goes.

What counts as silence is measured against the piece's own floor, never against full scale, so that a whisper and a
breath are kept at any level. Pure functions on arrays; `asmr_db.py` and `asmr_db_beam.py` call them.
Letters: W samples, T frames of 20 ms. Times are seconds from the start of the piece.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

FRAME_S = 0.02
DIGITAL_DB = -95.0  # below this a frame holds no recorded sound: one step of 16-bit audio is at -90 dB


@dataclasses.dataclass(frozen=True)
class Config:
    """Of the cut.

    Fields, in seconds: max_s, longest segment (the speech tokenizer's own limit is 30); min_s, shortest; silence_s,
    a silence is long from here on; keep_s, what stays of a long silence at either side of a sound; reach_s, sound
    that is farther from any words (long silence not counted) is no part of a segment: breath is nearer, minutes of
    tapping are not. In decibels: margin_db, sound is at least so far above the floor; contrast_db, the floor is at
    least so far below the loud frames; steady_db, the levels of a second of floor are no wider apart.

    Raises:
        ValueError: if a length is not positive, or min_s is not below max_s.
    """

    max_s: float = 30.0
    min_s: float = 0.5
    silence_s: float = 1.5
    keep_s: float = 0.25
    reach_s: float = 3.0
    margin_db: float = 3.0
    contrast_db: float = 12.0
    steady_db: float = 8.0

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} is {value}; it must be positive")
        if self.min_s >= self.max_s:
            raise ValueError(f"min_s {self.min_s:g} must be below max_s {self.max_s:g}")
        if 2 * self.keep_s >= self.silence_s:
            raise ValueError(f"keep_s {self.keep_s:g} must be below half of silence_s {self.silence_s:g}")


@dataclasses.dataclass(frozen=True)
class Word:
    """One word of a phrase; times in seconds from the start of the piece."""

    text: str
    start_s: float
    end_s: float


@dataclasses.dataclass(frozen=True)
class Phrase:
    """What a recogniser heard in one go: its times in seconds from the start of the piece.

    Fields: words may be empty; language "en", "zh", or "" if the recogniser does not say.
    """

    text: str
    start_s: float
    end_s: float
    words: tuple[Word, ...] = ()
    language: str = ""


@dataclasses.dataclass(frozen=True)
class Segment:
    """A part of a piece with its text.

    Fields: spans, the (start, end) seconds that are joined, more than one where a long silence was taken out;
    phrases, those that lie in it.
    """

    spans: tuple[tuple[float, float], ...]
    text: str
    language: str
    phrases: tuple[Phrase, ...]

    @property
    def duration_s(self) -> float:
        """Of the sound, without what was taken out."""
        return sum(end - start for start, end in self.spans)

    def cut(self, wav: np.ndarray, sample_rate: int) -> np.ndarray:
        """The segment's samples out of the piece's `wav` [W] at `sample_rate` Hz."""
        at = [(round(a * sample_rate), round(b * sample_rate)) for a, b in self.spans]
        return np.concatenate([wav[a:b] for a, b in at])


def levels_db(wav: np.ndarray, sample_rate: int) -> np.ndarray:
    """Level [T] of 20 ms frames of [W] in dB of full scale; -120 where there is no sound at all.

    RMS above 150 Hz: the rumble of a room would hide breath.
    """
    from scipy import signal

    count = int(len(wav) / (FRAME_S * sample_rate) + 1e-6)
    if not count:
        raise ValueError(f"{len(wav)} samples at {sample_rate} Hz are less than one frame of {FRAME_S} s")
    edges = np.round(np.arange(count + 1) * FRAME_S * sample_rate).astype(int)  # no drift at odd rates
    high = signal.sosfilt(signal.butter(4, 150, "high", fs=sample_rate, output="sos"), wav[: edges[-1]])
    energy = np.add.reduceat(np.square(high, dtype=np.float64), edges[:-1])
    return 10 * np.log10(np.maximum(energy / np.diff(edges), 1e-12))


def is_sound(levels: np.ndarray, cfg: Config = Config()) -> np.ndarray:
    """Which frames hold more than the floor of their piece: speech, breath, any sound.

    The floor is the loud part (90th percentile) of the quietest steady second. A frame is sound if it lies
    `margin_db` above it, median of five frames. Speech is never steady: a soft passage without pauses is no floor.
    Where no second is steady and far enough below the loud frames, only digital silence (below `DIGITAL_DB`) is
    silence; it never counts for the floor.

    Args:
        levels: [T] of `levels_db`.

    Returns:
        [T] bool.
    """
    recorded = levels > DIGITAL_DB
    window = round(1.0 / FRAME_S)
    if np.count_nonzero(recorded) < window:
        return recorded
    low, high = np.percentile(np.lib.stride_tricks.sliding_window_view(levels, window), (10, 90), axis=1)
    whole = np.lib.stride_tricks.sliding_window_view(recorded, window).all(axis=1)
    quiet = high[whole & (high - low <= cfg.steady_db)]
    if not quiet.size or quiet.min() > np.percentile(levels[recorded], 95) - cfg.contrast_db:
        return recorded
    floor = quiet.min()
    smooth = np.median(np.lib.stride_tricks.sliding_window_view(np.pad(levels, 2, mode="edge"), 5), axis=1)
    return recorded & (smooth > floor + cfg.margin_db)


def kept(levels: np.ndarray, cfg: Config = Config()) -> np.ndarray:
    """Which frames stay: [T] bool, all but long silence, of which `keep_s` stay beside a sound."""
    sound = is_sound(levels, cfg)
    keep, margin = np.ones(len(sound), bool), round(cfg.keep_s / FRAME_S)
    for first, last in _runs(~sound):
        if (last - first) * FRAME_S >= cfg.silence_s:
            keep[first + margin * (first > 0) : last - margin * (last < len(sound))] = False
    return keep


def segments(
    wav: np.ndarray, sample_rate: int, phrases: Sequence[Phrase], cfg: Config = Config()
) -> tuple[list[Segment], list[dict]]:
    """Cuts a piece where words pause, and takes long silence out.

    Neighbouring phrases share a segment up to `max_s`, unless a long silence lies between them. The cut between two
    phrases is at the quietest frame between their words: what sounds there, such as a breath, falls to one of them. A
    long silence inside a phrase is taken out of the middle.

    Args:
        wav: [W] float, the piece.
        sample_rate: Hz.
        phrases: the transcript; sorted here.

    Returns:
        The segments in order of time; and what was left out: dicts with reason, start_s, end_s, seconds, text.
    """
    levels = levels_db(wav, sample_rate)
    keep = kept(levels, cfg)
    dropped = _dropped(~keep, "long silence")
    units, bad = _units(sorted(phrases, key=lambda p: (p.start_s, p.end_s)), keep, cfg)
    dropped += bad
    near = _near_words(units, keep, cfg)
    dropped += _dropped(keep & ~near, "sound without words")
    keep = near
    inner = [_cut(a, b, levels, keep) for a, b in zip(units, units[1:], strict=False)]
    cuts = np.maximum.accumulate([0, *inner, len(levels)]).tolist()  # a phrase may lie inside another
    rows = []
    for i, unit in enumerate(units):  # joined while they fit and nothing was taken out between them
        first, last = cuts[i], cuts[i + 1]
        if rows:
            start, _, members = rows[-1]
            between = keep[_frame(members[-1].end_s) : _frame(unit.start_s) + 1]
            fits = np.count_nonzero(keep[start:last]) * FRAME_S <= cfg.max_s
            if fits and between.all() and members[-1].language == unit.language:
                rows[-1] = (start, last, [*members, unit])
                continue
        rows.append((first, last, [unit]))
    out = []
    for first, last, members in rows:
        inside = keep[first:last]
        spans = tuple(((first + a) * FRAME_S, (first + b) * FRAME_S) for a, b in _runs(inside))
        language = members[0].language
        text = join([p.text for p in members])
        segment = Segment(spans, text, language, tuple(members))
        wrong = (
            "shorter than min_s" if segment.duration_s < cfg.min_s
            else "longer than max_s, without times of words to cut at" if segment.duration_s > cfg.max_s + 1e-6
            else ""
        )  # fmt: skip
        if wrong:
            start_s, end_s = (spans[0][0], spans[-1][1]) if spans else (members[0].start_s, members[-1].end_s)
            dropped.append(_left_out(wrong, start_s, end_s, segment.duration_s, text))
        else:
            out.append(segment)
    return out, sorted(dropped, key=lambda d: d["start_s"])


def join(texts: Sequence[str]) -> str:
    """Texts in a row: a space between them unless Chinese characters meet."""
    out = ""
    for text in filter(None, (t.strip() for t in texts)):
        is_tight = out and (_is_wide(out[-1]) or _is_wide(text[0]))
        out += text if not out or is_tight else f" {text}"
    return out


def _is_wide(c: str) -> bool:
    return "\u2e80" <= c <= "\u9fff" or "\uff00" <= c <= "\uffef"


def _frame(seconds: float) -> int:
    return max(int(seconds / FRAME_S + 1e-6), 0)


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """(first, one past the last) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _left_out(reason: str, start_s: float, end_s: float, seconds: float, text: str = "") -> dict:
    facts = {"reason": reason, "start_s": start_s, "end_s": end_s, "seconds": seconds}
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in facts.items()} | {"text": text}


def _dropped(mask: np.ndarray, reason: str) -> list[dict]:
    return [_left_out(reason, a * FRAME_S, b * FRAME_S, (b - a) * FRAME_S) for a, b in _runs(mask)]


def _units(phrases: list[Phrase], keep: np.ndarray, cfg: Config) -> tuple[list[Phrase], list[dict]]:
    """Phrases that lie in sound, those over `max_s` split between words; and what is wrong with the others."""
    out, bad, queue = [], [], phrases[::-1]
    while queue:
        phrase = queue.pop()
        inside = keep[_frame(phrase.start_s) : max(_frame(phrase.end_s), _frame(phrase.start_s) + 1)]
        reason = "" if phrase.text.strip() else "no text"
        if not reason and phrase.end_s <= phrase.start_s:
            reason = "phrase of no length"
        if not reason and not inside.any():
            reason = "words where there is silence"
        if reason:
            bad.append(
                _left_out(reason, phrase.start_s, phrase.end_s, phrase.end_s - phrase.start_s, phrase.text)
            )
        elif np.count_nonzero(inside) * FRAME_S > cfg.max_s - 2 * cfg.keep_s and len(phrase.words) > 1:
            queue += _halves(phrase)[::-1]
        else:
            out.append(phrase)
    return out, bad


def _halves(phrase: Phrase) -> list[Phrase]:
    """A phrase cut at the longest pause between words of its middle half; at least one word each."""
    words, length = phrase.words, phrase.end_s - phrase.start_s
    low, high = phrase.start_s + length / 4, phrase.end_s - length / 4
    inner = [i for i in range(1, len(words)) if low <= words[i].start_s <= high] or [len(words) // 2]
    at = max(inner, key=lambda i: words[i].start_s - words[i - 1].end_s)
    return [
        dataclasses.replace(
            phrase, text=join([w.text for w in part]), start_s=part[0].start_s, end_s=part[-1].end_s, words=part
        )
        for part in (words[:at], words[at:])
    ]  # fmt: skip


def _near_words(units: list[Phrase], keep: np.ndarray, cfg: Config) -> np.ndarray:
    """Frames of `keep` within `reach_s` of words, counted in frames that are kept."""
    clock = np.cumsum(keep)
    near, reach = np.zeros(len(keep), bool), round(cfg.reach_s / FRAME_S)
    for unit in units:
        first = min(_frame(unit.start_s), len(keep) - 1)
        last = min(max(_frame(unit.end_s) - 1, first), len(keep) - 1)
        near |= (clock >= clock[first] - reach) & (clock <= clock[last] + reach)
    return near & keep


def _cut(a: Phrase, b: Phrase, levels: np.ndarray, keep: np.ndarray) -> int:
    """Frame of the cut between two phrases: in the longest part taken out, else the quietest frame."""
    first, last = _frame(a.end_s), _frame(b.start_s)
    if last <= first:  # they touch or overlap: look around the middle
        middle = (first + last) // 2
        first, last = middle - 5, middle + 6
    first, last = max(first, 0), min(max(last, first + 1), len(levels))
    out = _runs(~keep[first:last])
    if out:
        begin, end = max(out, key=lambda run: run[1] - run[0])
        return first + (begin + end) // 2
    return first + int(np.argmin(levels[first:last])) if last > first else min(first, len(levels))
