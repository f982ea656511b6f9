"""ArrayRecord to packed, padded, fixed-shape NumPy batches with Grain; the same order on every run of a seed.

One chain per stage: example number -> random choices of that number -> rows of this process, without padding
-> batch -> prefetch. An example number names an epoch and a place in its order, so that a saved position is one
integer and two hosts together read what one host would. Records are TFDS features: text, speaker, style,
language, audio int16 [W] at 16 kHz or, where records have it, at their `sample_rate`, phones and f0_class
int32, one each 20 ms; data/add_features.py adds speech_tokens [N], mel float16 [T, M] and text_ids, and may
leave out what a stage does not read.
Batches, B rows each, all lengths static:
  lm: tokens, kinds, segment_ids, positions, targets, each [B, N] int32; kinds as in lm.py;
    segment_ids 0 = padding; targets -1 = ignored. A segment is 1..k utterances of one speaker and one style:
    [sos] text_1 .. text_k [task] speech_1 .. speech_k, targets on the speech ids and the end id. With
    `align` also aligned [B, N, 2]: row positions of the symbols heard in the two halves of the target.
  flow: speech_tokens [B, N] int32, num_tokens [B] int32, mel [B, T, M] float16 as in the records (half the bytes on
    the way to the device; computed with in float32), prompt_frames [B] int32 (0: no prompt).
  vocoder: wav [B, W] float32 in [-1, 1] at the rate of `mel_profile`, no padding; lengths [B] int32 samples.
  speech_tokenizer: wav [B, W], lengths [B], and with labels="frames" phones and f0_class [B, W // 320] int32
    (-1 = padding); with "text" whole utterances, text_ids [B, S = W // 640] int32 of `MiniTokenizer.heard` (0 =
    padding) and text_lengths [B], 0 where the text cannot be read or needs more tokens than the utterance has.
  speaker: wav [B, W], lengths [B], speaker_index [B] int32 in the order of `speakers`.
Letters: B rows, N tokens (lm: positions of a row), S symbols, T mel frames, M mel bins, W samples.
What a stage cannot use is left out, and a line says how many records, why, and the first of them.
Where chips do not divide a batch, empty rows stand behind its own: zeros, and IGNORED where a row has labels.
"""

import array
import bisect
import dataclasses
import functools
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Literal

import numpy as np

from deepasmr_jax import audio, lm, shards, text

IGNORED = -1  # target or label that carries no loss
LABEL_SAMPLES = 320  # one phone label each 20 ms
STAGES = ("lm", "flow", "vocoder", "speech_tokenizer", "speaker")
_EXAMPLES = 2**40  # "without end", for Grain's range
_LABELS = ("targets", "aligned", "phones", "f0_class", "speaker_index")  # IGNORED in padding
_NO_TOKENS = "have no speech tokens"
_TOLD = 5  # texts without a loss that a process tells one by one
_OPEN_ROWS = 256  # rows that the packing fills at the same time


@dataclasses.dataclass(frozen=True)
class Config:
    """What a stage reads and how its rows are made. `batch_size` is the number of rows over all hosts.

    Raises:
        ValueError: on an unknown stage or mel profile, weights that do not fit the styles, or a row length that is no
            multiple of a token or has no room beside a prompt.
    """

    stage: Literal["lm", "flow", "vocoder", "speech_tokenizer", "speaker"]
    batch_size: int
    data_dirs: tuple[str, ...] = ()  # TFDS version folders; their records are joined
    split: str = "train"
    styles: tuple[str, ...] = ("normal", "asmr")
    style_weights: tuple[float, ...] = (1.0, 1.0)  # share of the hours heard per style
    languages: tuple[str, ...] = ()  # empty: all
    seed: int = 0
    # lm and flow
    num_tokens: int = 512  # N: length of a packed LM row, or of a flow row in speech tokens
    max_utterances: int = 3  # utterances in one LM segment
    end_id: int = audio.NUM_CODES
    # share of English words spelled by letters; text_ids must be of text.MiniTokenizer
    spell_probability: float = 0.0
    spell_room: int = 16  # positions of each row kept free for them when spell_probability > 0
    align: bool = False  # adds `aligned`; needs `phones`, and text_ids of text.MiniTokenizer
    # flow and vocoder
    mel_profile: str = "mini"
    # flow
    no_prompt_prob: float = 0.2
    min_prompt_tokens: int = 25
    max_prompt_tokens: int = 100
    # vocoder, speech_tokenizer, speaker
    num_samples: int = 16000  # W; for the vocoder at the rate of mel_profile
    # speech_tokenizer: crops with `phones` and `f0_class`, or whole utterances with `text`
    labels: Literal["frames", "text"] = "frames"
    # reading; the saved position depends on worker_count, the order does not
    worker_count: int = 0  # processes; 0: threads of this one
    num_threads: int = 2
    num_prefetch: int = 4  # batches made ahead

    def __post_init__(self):
        if self.stage not in STAGES:
            raise ValueError(f"stage {self.stage!r} is unknown; use one of {', '.join(STAGES)}")
        audio.mel_profile(self.mel_profile)  # refuses an unknown name
        if len(self.styles) != len(self.style_weights) or not any(w > 0 for w in self.style_weights):
            raise ValueError(
                f"{len(self.styles)} styles {self.styles} with weights {self.style_weights}; "
                "give one weight per style and at least one above 0"
            )
        if self.stage == "speech_tokenizer" and self.num_samples % (2 * LABEL_SAMPLES):
            raise ValueError(
                f"num_samples {self.num_samples} is not a multiple of {2 * LABEL_SAMPLES} (one token)"
            )
        if self.labels not in ("frames", "text"):
            raise ValueError(f"labels {self.labels!r} are unknown; use frames or text")
        if self.stage == "flow" and self.num_tokens <= 2 * self.min_prompt_tokens:
            raise ValueError(
                f"num_tokens {self.num_tokens} leaves no room beside a prompt of {self.min_prompt_tokens} "
                "tokens; use a longer row"
            )

    @property
    def items_per_batch(self) -> int:
        """Positions (lm, flow) or samples (the rest) of one batch, padding included."""
        return self.batch_size * (self.num_tokens if self.stage in ("lm", "flow") else self.num_samples)

    @property
    def item(self) -> str:
        """What `items_per_batch` counts."""
        return "tokens" if self.stage in ("lm", "flow") else "samples"


def row_spec(cfg: Config) -> dict[str, tuple[tuple[int, ...], type]]:
    """Name -> (shape of a row, type) of the arrays in a batch of a stage; see the top of this file."""
    row = (cfg.num_tokens,)
    if cfg.stage == "lm":
        names = ("tokens", "kinds", "segment_ids", "positions", "targets")
        aligned = {"aligned": ((*row, 2), np.int32)} if cfg.align else {}
        return {name: (row, np.int32) for name in names} | aligned
    if cfg.stage == "flow":
        profile = audio.mel_profile(cfg.mel_profile)
        numerator, denominator = profile.frames_per_token
        frames = cfg.num_tokens * numerator // denominator
        counts = {name: ((), np.int32) for name in ("num_tokens", "prompt_frames")}
        return {"speech_tokens": (row, np.int32), "mel": ((frames, profile.num_mels), np.float16)} | counts
    spec = {"wav": ((cfg.num_samples,), np.float32), "lengths": ((), np.int32)}
    if cfg.stage == "speaker":
        return spec | {"speaker_index": ((), np.int32)}
    if cfg.stage == "speech_tokenizer" and cfg.labels == "text":
        longest = (cfg.num_samples // (2 * LABEL_SAMPLES),)
        return spec | {"text_ids": (longest, np.int32), "text_lengths": ((), np.int32)}
    if cfg.stage == "speech_tokenizer":
        return spec | {
            name: ((cfg.num_samples // LABEL_SAMPLES,), np.int32) for name in ("phones", "f0_class")
        }
    return spec


def speakers(cfg: Config) -> list[str]:
    """Speakers of the training split, sorted; the labels of the speaker stage are places in this list.

    Raises:
        ValueError: as `shards.read_index`.
    """
    return sorted(set(shards.read_index(dataclasses.replace(cfg, split="train")).speakers.tolist()))


# ---------------------------------------------------------------- order of an epoch


def _rng(*numbers: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(numbers)))


def _wanted(cfg: Config, index: shards.Index) -> np.ndarray:
    """[records] bool: of a style with a weight, and of the languages."""
    heard = [s for s, weight in zip(cfg.styles, cfg.style_weights, strict=True) if weight > 0]
    voices = np.isin(index.styles, heard)
    if cfg.languages:
        voices &= np.isin(index.languages, cfg.languages)
    return voices[index.voice]


def _usable(cfg: Config, index: shards.Index, faults: dict[str, np.ndarray]) -> np.ndarray:
    """Which records a stage can use; says of the wanted ones that it cannot how many, why, and which first.

    Args:
        cfg: names the data.
        index: the records.
        faults: what is wrong, as it stands behind "they" -> [records] bool; the first one counts.

    Returns:
        [records] bool.
    """
    left, asked = np.ones(len(index), bool), _wanted(cfg, index)
    for why, mask in faults.items():
        found = np.flatnonzero(mask & left & asked)
        left &= ~mask
        if len(found):
            print(
                f"{cfg.split}: {len(found)} of {np.sum(asked)} records are left out, they {why}: "
                + ", ".join(_names(cfg, found[:3]) + ["..."] * (len(found) > 3)),
                flush=True,
            )
    return left


def _names(cfg: Config, numbers: np.ndarray) -> list[str]:
    """Ids of records, or their numbers where a corpus has none."""
    if not all("id" in shards.builder(folder).info.features for folder in cfg.data_dirs):
        return [str(i) for i in numbers]
    records = shards.Records(cfg, ("id",))
    return [shards.decoded(records[i]["id"]) for i in numbers]


class Mixture:
    """The order of the records in each epoch, styles in the wanted shares of the hours.

    An epoch has as many examples as there are usable records. A style whose share is larger than its part of
    the records starts its next shuffled pass within the epoch; one whose share is smaller goes on in the next
    epoch.

    Args:
        cfg: names styles, weights and seed.
        index: the records.
        usable: bool per record; the others are never drawn.
        lengths: what a row takes of each record, in any unit; None: all of it.

    Raises:
        ValueError: if a style with a weight has no usable record.
    """

    def __init__(
        self, cfg: Config, index: shards.Index, usable: np.ndarray, lengths: np.ndarray | None = None
    ):
        usable = usable & _wanted(cfg, index)
        of_style = (usable & (index.styles == style)[index.voice] for style in cfg.styles)
        pools = [np.flatnonzero(mask).astype(np.int32) for mask in of_style]
        for style, weight, pool in zip(cfg.styles, cfg.style_weights, pools, strict=True):
            if weight > 0 and len(pool) == 0:
                found = ", ".join(sorted(set(index.styles.tolist())))
                if (there := (index.styles == style)[index.voice] & _wanted(cfg, index)).any():
                    raise ValueError(
                        f"none of the {there.sum()} records of style {style!r} in split {cfg.split!r} can be used, for "
                        "the reasons in the lines above; too long ones want longer rows (data.num_tokens, num_samples)"
                    )
                spoken = f" and languages {', '.join(cfg.languages)}" if cfg.languages else ""
                raise ValueError(
                    f"no usable record of style {style!r} in split {cfg.split!r}{spoken}; styles there: {found}; "
                    f"give style {style!r} the share 0 in data.style_weights (now {cfg.style_weights}), or add some"
                )
        total = sum(len(p) for p, w in zip(pools, cfg.style_weights, strict=True) if w > 0)
        # a share of the hours is one of the utterances where these are equally long
        lengths = index.num_samples if lengths is None else lengths
        hours = [lengths[p].mean() if len(p) else 1.0 for p in pools]
        shares = np.array(cfg.style_weights) / np.maximum(hours, 1.0)
        shares /= shares.sum()
        self._pools, self._seed = pools, cfg.seed
        self._counts = [max(1, round(total * s)) if s > 0 else 0 for s in shares]
        self._order = functools.lru_cache(maxsize=2)(self.make_order)

    def __len__(self) -> int:
        return sum(self._counts)

    def order(self, epoch: int) -> np.ndarray:
        """Record numbers of an epoch, shuffled: [records of an epoch] int32. The last two are kept."""
        return self._order(epoch)

    def make_order(self, epoch: int) -> np.ndarray:
        """`order` that is not kept."""
        drawn = []
        for i, (pool, count) in enumerate(zip(self._pools, self._counts, strict=True)):
            start = epoch * count
            while count and start < (epoch + 1) * count:
                shuffled = _rng(self._seed, 1, i, start // len(pool)).permutation(pool)
                piece = shuffled[start % len(pool) :][: (epoch + 1) * count - start]
                drawn.append(piece)
                start += len(piece)
        return _rng(self._seed, 2, epoch).permutation(np.concatenate(drawn))

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "_order"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._order = functools.lru_cache(maxsize=2)(self.make_order)


def pack(lengths: np.ndarray, capacity: int, num_open: int = _OPEN_ROWS) -> Iterator[list[int]]:
    """Best-fit packing of items into rows; memory does not grow with their number.

    Each item goes into the open row that it fills best; of more than `num_open` open rows, the fullest is
    closed.

    Args:
        lengths: [items] int, each at most `capacity`.

    Yields:
        Rows of item numbers.
    """
    rooms: list[tuple[int, int]] = []  # of the open rows, sorted: (room, number of the row)
    rows: dict[int, list[int]] = {}
    num_rows = 0
    for item, length in enumerate(_ints(lengths)):
        best = bisect.bisect_left(rooms, (length,))
        if best < len(rooms):
            room, row = rooms.pop(best)
            rows[row].append(item)
            bisect.insort(rooms, (room - length, row))
            continue
        if len(rooms) == num_open:
            yield rows.pop(rooms.pop(0)[1])
        rows[num_rows] = [item]
        bisect.insort(rooms, (capacity - length, num_rows))
        num_rows += 1
    yield from rows.values()


def _ints(values: np.ndarray) -> Iterator[int]:
    """The numbers of a long array for a loop in Python, which is several times slower over NumPy's own."""
    for start in range(0, len(values), 65536):
        yield from values[start : start + 65536].tolist()


# ---------------------------------------------------------------- rows of each stage


def align(symbols: list[str], phones: np.ndarray, num_frames: int) -> np.ndarray:
    """Which symbol of a text is heard in each 20 ms frame, by dynamic time warping.

    The recording and the text may disagree (weak forms, letters, other lexicon): every frame gets a symbol,
    in the order of the text.

    Args:
        symbols: names of text.MiniTokenizer.
        phones: [frames] int, index in text.PHONES of each frame.
        num_frames: frames wanted; beyond those of `phones` the last one is repeated.

    Returns:
        [num_frames] int32, index in `symbols`, never decreasing.
    """
    classes = np.array([_symbol_class(s) for s in symbols])
    cost = _phone_costs()[classes][:, phones]
    path = warp(cost)
    # a frame at which several symbols are passed has the one that fits it best
    order = np.lexsort((cost[path[:, 0], path[:, 1]], path[:, 1]))
    frames, first = np.unique(path[order, 1], return_index=True)
    found = np.maximum.accumulate(path[order[first], 0])
    # the way through a mark without a pause takes a frame of one of the sounds beside it
    for frame in np.flatnonzero((classes[found] == len(_phone_costs()) - 1) & (phones != 0)):
        beside = [i for i in (found[frame] - 1, found[frame] + 1) if 0 <= i < len(symbols)]
        found[frame] = min(beside, key=lambda i: cost[i, frame], default=found[frame])
    found = np.maximum.accumulate(found)
    return found[np.minimum(np.arange(num_frames), len(frames) - 1)].astype(np.int32)


def warp(cost: np.ndarray) -> np.ndarray:
    """The cheapest way through a matrix by dynamic time warping, as `librosa.sequence.dtw` finds it.

    Args:
        cost: [rows, columns] int; in whole numbers, ties are exact.

    Returns:
        [steps, 2] int cells from the first to the last; a step goes on in both axes, in the second, or in the
        first, in this order among equals.
    """
    total = np.cumsum(cost, axis=1)
    for i in range(1, len(cost)):
        above = np.minimum(total[i - 1], np.append(np.iinfo(total.dtype).max // 2, total[i - 1, :-1]))
        # enter the row at the best column so far, then follow it; total[i] still is the row's cumulative cost
        total[i] += np.minimum.accumulate(above - (total[i] - cost[i]))
    cell = (cost.shape[0] - 1, cost.shape[1] - 1)
    path = [cell]
    while cell != (0, 0):
        i, j = cell
        cell = min(
            (c for c in ((i - 1, j - 1), (i, j - 1), (i - 1, j)) if min(c) >= 0), key=lambda c: total[c]
        )
        path.append(cell)
    return np.array(path[::-1])


@functools.cache
def _symbol_class(symbol: str) -> int:
    """Row of `_phone_costs`: the phone itself, or one of the rows behind them (vowel, consonant, mark)."""
    name = symbol.rstrip("012345")
    if name in text.PHONES:
        return text.PHONES.index(name)
    is_letter = len(name) == 1 and name.isalpha()
    return len(text.PHONES) + (0 if name in [*"aeiouy"] else 1 if is_letter else 2)


@functools.cache
def _phone_costs() -> np.ndarray:
    """[symbol class, phone of the frame] int: 0 for the same, 10 for speech against silence."""
    names = text.PHONES
    vowel = np.array([n[0] in "AEIOU" or n[3:] in text.ZH_FINALS for n in names])
    cost = np.where(vowel[:, None] == vowel, 5, 8)
    np.fill_diagonal(cost, 0)
    cost = np.concatenate([cost, [np.where(vowel, 2, 5), np.where(vowel, 5, 2), np.full(len(names), 6)]])
    cost[1:, 0] = cost[0, 1:] = 10
    cost[-1, 0] = 0
    return cost


def check_mel_profile(folder: str | os.PathLike, wanted: str) -> None:
    """Compares the mel profile that made a feature folder with the wanted one; old folders do not say theirs.

    Several profiles have 80 bands and 50 frames/s: a flow would train on the wrong mel without another sign.

    Raises:
        ValueError: if they differ.
    """
    found = shards.made_with(folder).get("mel_profile", wanted)
    if found != wanted:
        raise ValueError(
            f"features in {folder} have mel profile {found!r}, data.mel_profile is {wanted!r}; "
            "make them again with --mel-profile"
        )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The rows of an epoch of the language model: at most 12 bytes a record."""

    order: np.ndarray  # record numbers, segment after segment
    starts: np.ndarray  # [segments + 1]: of the segments in `order`
    segments: np.ndarray  # of the rows, row after row
    ends: np.ndarray  # [rows + 1]: of the rows in `segments`
    rows: np.ndarray  # in the order of the epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> list[np.ndarray]:
        """Record numbers of each segment of a row."""
        row = self.rows[place]
        own = self.segments[self.ends[row] : self.ends[row + 1]]
        return [self.order[self.starts[s] : self.starts[s + 1]] for s in own]


class _Lm:
    """Packed rows of whole segments; the packing of an epoch is planned from the index alone."""

    def __init__(self, cfg: Config, index: shards.Index):
        self.cfg, self.index = cfg, index
        fields = ("speech_tokens", "text_ids") + (("text", "language") if cfg.spell_probability else ())
        self.records = shards.Records(cfg, fields + (("phones",) if cfg.align else ()))
        cost = index.num_text + index.num_tokens
        self._capacity = cfg.num_tokens - (cfg.spell_room if cfg.spell_probability else 0)
        too_long = f"take more than the {self._capacity - 2} positions of a row"
        faults = {_NO_TOKENS: index.num_tokens == 0, too_long: cost + 2 > self._capacity}
        self.mixture = Mixture(cfg, index, _usable(cfg, index, faults))
        self._plans: dict[int, _Plan] = {}
        self._lock = threading.Lock()
        self.num_rows = len(self._plan(0))
        self.tokenizer = text.MiniTokenizer() if cfg.spell_probability else None
        self._symbols = text.MiniTokenizer().symbols if cfg.align else []
        self._places = np.arange(cfg.num_tokens, dtype=np.int32)

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "_lock"} | {"_plans": {}}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def _cost(self, records: np.ndarray) -> np.ndarray:
        """Positions that the text and the speech of each record take."""
        return self.index.num_text[records] + self.index.num_tokens[records]

    def segments(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(record numbers, where each segment starts, and the end): runs of one speaker, style and language."""
        order = self.mixture.make_order(epoch)
        order = order[np.argsort(self.index.voice[order], kind="stable")]
        voice, cost = self.index.voice[order], self._cost(order)
        wanted = _rng(self.cfg.seed, 3, epoch).integers(1, self.cfg.max_utterances + 1, len(order))
        starts, own, of, room, most = array.array("i"), [], -1, 0, 0
        columns = map(_ints, (order, voice, cost, wanted))
        for at, (record, speaks, needs, count) in enumerate(zip(*columns, strict=True)):
            # a style that is heard more than once in an epoch: not twice in one segment
            if speaks != of or needs > room or len(own) == most or record in own:
                starts.append(at)
                own, of, room, most = [], speaks, self._capacity - 2, count
            own.append(record)
            room -= needs
        starts.append(len(order))
        return order, np.frombuffer(starts, np.int32)

    def _plan(self, epoch: int) -> _Plan:
        with self._lock:
            if epoch not in self._plans:
                self._plans = {e: p for e, p in self._plans.items() if e == epoch - 1}
                order, starts = self.segments(epoch)
                rng = _rng(self.cfg.seed, 4, epoch)
                shuffled = rng.permutation(len(starts) - 1).astype(np.int32)
                lengths = 2 + np.add.reduceat(self._cost(order), starts[:-1])
                packed, ends = array.array("i"), array.array("i", [0])
                for row in pack(lengths[shuffled], self._capacity):
                    packed.extend(row)
                    ends.append(len(packed))
                segments, ends = shuffled[np.frombuffer(packed, np.int32)], np.frombuffer(ends, np.int32)
                rows = rng.permutation(len(ends) - 1).astype(np.int32)
                self._plans[epoch] = _Plan(order, starts, segments, ends, rows)
            return self._plans[epoch]

    def row(self, example: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        cfg = self.cfg
        epoch, place = divmod(example, self.num_rows)
        plan = self._plan(epoch)
        segments = plan[place % len(plan)]
        room = 0  # for texts that spelling makes longer
        if self.tokenizer is not None:
            room = cfg.num_tokens - sum(2 + int(self._cost(s).sum()) for s in segments)
        tokens, kinds, segment_ids, positions = np.empty((4, cfg.num_tokens), np.int32)
        targets = np.full(cfg.num_tokens, IGNORED, np.int32)
        aligned = np.full((cfg.num_tokens, 2), IGNORED, np.int32) if cfg.align else None
        at = 0  # in the row
        for number, segment in enumerate(segments, 1):
            start, speech, heard = at, [], []
            kinds[at], tokens[at] = lm.SOS, 0
            at += 1
            for i in segment:
                record = self.records[i]
                ids = record["text_ids"]
                other = self._respelled(record, rng)
                if other is not None and len(other) - len(ids) <= room:
                    room -= len(other) - len(ids)
                    ids = other
                if cfg.align:
                    symbols = [self._symbols[i] for i in ids]
                    frames = 2 * len(record["speech_tokens"])
                    heard.append(at + align(symbols, record["phones"], frames).reshape(-1, 2))
                tokens[at : at + len(ids)] = ids
                at += len(ids)
                speech.append(record["speech_tokens"])
            kinds[start + 1 : at] = lm.TEXT
            kinds[at], tokens[at] = lm.TASK, 0  # predicts the first token
            task = at
            for own in speech:
                targets[at : at + len(own)] = tokens[at + 1 : at + 1 + len(own)] = own
                at += len(own)
            targets[at] = cfg.end_id
            if aligned is not None:
                aligned[task:at] = np.concatenate(heard)
            at += 1
            kinds[task + 1 : at] = lm.SPEECH
            segment_ids[start:at] = number
            positions[start:at] = self._places[: at - start]
        out = dict(tokens=tokens, kinds=kinds, segment_ids=segment_ids, positions=positions, targets=targets)
        out |= {} if aligned is None else {"aligned": aligned}
        return {name: values[:at] for name, values in out.items()}

    def _respelled(self, record: dict, rng: np.random.Generator) -> np.ndarray | None:
        """The record's text with some words spelled by letters; None to keep the recorded encoding."""
        if self.tokenizer is None:
            return None
        words, language = shards.decoded(record["text"]), shards.decoded(record["language"])
        return self.tokenizer.encode(words, language, self.cfg.spell_probability, rng)


class _Flow:
    """A target utterance behind a piece of another utterance of its speaker, in a random style."""

    def __init__(self, cfg: Config, index: shards.Index):
        self.cfg, self.index = cfg, index
        self.records = shards.Records(cfg, ("speech_tokens", "mel"))
        for folder in cfg.data_dirs:
            check_mel_profile(folder, cfg.mel_profile)
        fit = _usable(cfg, index, {_NO_TOKENS: index.num_tokens == 0})
        row_samples = cfg.num_tokens * audio.SAMPLE_RATE // audio.TOKEN_RATE
        self.mixture = Mixture(cfg, index, fit, np.minimum(index.num_samples, row_samples))
        self.num_rows = len(self.mixture)
        profile = audio.mel_profile(cfg.mel_profile)
        numerator, denominator = profile.frames_per_token
        self._ratio = numerator / denominator
        self._num_mels = profile.num_mels
        fit &= np.isin(index.styles, cfg.styles)[index.voice]  # prompts may be of a style without a weight
        enough = np.flatnonzero(fit & (index.num_tokens >= cfg.min_prompt_tokens)).astype(np.int32)
        # prompts of a speaker, one list per style, whatever the language
        pairs = list(zip(index.speakers.tolist(), index.styles.tolist(), strict=True))
        places = {pair: i for i, pair in enumerate(sorted(set(pairs)))}
        group = np.array([places[pair] for pair in pairs], np.int32)[index.voice[enough]]
        ends = np.cumsum(np.bincount(group, minlength=len(places)))
        parts = np.split(enough[np.argsort(group, kind="stable")], ends[:-1])
        self._prompts: dict[str, list[np.ndarray]] = {}
        for speaker in index.speakers.tolist():
            own = [parts[places[speaker, style]] for style in cfg.styles if (speaker, style) in places]
            self._prompts[speaker] = [part for part in own if len(part)]

    def row(self, example: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        cfg = self.cfg
        epoch, place = divmod(example, self.num_rows)
        target = int(self.mixture.order(epoch)[place])
        prompt = None if rng.random() < cfg.no_prompt_prob else self._draw_prompt(target, rng)
        tokens, mel = self._read(target)
        prompt_tokens = np.zeros(0, np.int32)
        prompt_mel = np.zeros((0, self._num_mels), np.float16)
        if prompt is not None:
            prompt_tokens, prompt_mel = self._read(prompt)
            room = max(cfg.num_tokens - len(tokens), cfg.min_prompt_tokens)
            most = min(cfg.max_prompt_tokens, room, len(prompt_tokens))
            if most >= cfg.min_prompt_tokens:
                count = int(rng.integers(cfg.min_prompt_tokens, most + 1))
                prompt_tokens, prompt_mel = self._crop(prompt_tokens, prompt_mel, count, rng)
            else:
                prompt_tokens, prompt_mel = prompt_tokens[:0], prompt_mel[:0]
        count = min(len(tokens), cfg.num_tokens - len(prompt_tokens))
        tokens, mel = self._crop(tokens, mel, count, rng)
        num_tokens = len(prompt_tokens) + len(tokens)
        return {
            "speech_tokens": np.concatenate([prompt_tokens, tokens]),
            "num_tokens": np.int32(num_tokens),
            "mel": np.concatenate([prompt_mel, mel])[: int(num_tokens * self._ratio)],
            "prompt_frames": np.int32(len(prompt_mel)),
        }

    def _draw_prompt(self, target: int, rng: np.random.Generator) -> int | None:
        """Another sentence of the target's speaker, styles equally likely; None if there is no other."""
        lists = self._prompts[self.index.speakers[self.index.voice[target]]]
        for i in rng.permutation(len(lists)):
            for _ in range(8):
                found = int(lists[i][rng.integers(len(lists[i]))])
                if self.index.pair[found] != self.index.pair[target]:
                    return found
        return None

    def _read(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [N] and mel [frames of N tokens, M] of a record, cut to what both have."""
        record = self.records[i]
        tokens, mel = record["speech_tokens"], record["mel"]
        if mel.shape[1] != self._num_mels:
            raise ValueError(
                f"record {i} has {mel.shape[1]} mel bands, profile {self.cfg.mel_profile!r} has "
                f"{self._num_mels}; run data/add_features.py with this profile"
            )
        count = min(len(tokens), int(len(mel) / self._ratio))
        return tokens[:count], mel[: int(count * self._ratio)]

    def _crop(self, tokens, mel, count: int, rng) -> tuple[np.ndarray, np.ndarray]:
        start = int(rng.integers(len(tokens) - count + 1))
        first = int(start * self._ratio)
        return tokens[start : start + count], mel[first : first + int(count * self._ratio)]


class _Waves:
    """Pieces of waveforms, with frame labels, the text or the speaker's number where the stage wants them."""

    def __init__(self, cfg: Config, index: shards.Index):
        self.cfg, self.index = cfg, index
        self._labels, self._reader, self._num_told = (), None, 0
        if cfg.stage == "speech_tokenizer":
            self._labels = ("text", "language") if cfg.labels == "text" else ("phones", "f0_class")
        self.records = shards.Records(cfg, ("audio", *self._labels))
        self._rate = (
            audio.mel_profile(cfg.mel_profile).sample_rate if cfg.stage == "vocoder" else audio.SAMPLE_RATE
        )
        length = self._length(audio.SAMPLE_RATE)
        least = length if cfg.stage == "vocoder" else 2 * LABEL_SAMPLES
        faults = {f"are shorter than {least / audio.SAMPLE_RATE:g} s": index.num_samples < least}
        if "text" in self._labels:  # belongs to all of its utterance, so there are no crops
            longest = f"are longer than a row of {length / audio.SAMPLE_RATE:g} s"
            faults[longest] = index.num_samples > length
            is_read = np.isin(index.languages, text.LANGUAGES)
            faults["are neither English nor Mandarin"] = ~is_read[index.voice]
            self._reader = text.MiniTokenizer()
            if "zh" in index.languages[np.unique(index.voice[_wanted(cfg, index)])]:
                text.pinyin("你")  # refuses a machine without pypinyin here, and not record by record
        taken = np.minimum(index.num_samples, length)
        self.mixture = Mixture(cfg, index, _usable(cfg, index, faults), taken)
        self.num_rows = len(self.mixture)
        self._speakers = {name: i for i, name in enumerate(speakers(cfg))} if cfg.stage == "speaker" else {}

    def row(self, example: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        cfg = self.cfg
        epoch, place = divmod(example, self.num_rows)
        i = int(self.mixture.order(epoch)[place])
        record = self.records[i]
        samples, rate = np.asarray(record["audio"]), shards.sample_rate(record)
        length = self._length(rate)
        unit = LABEL_SAMPLES * rate // audio.SAMPLE_RATE if cfg.stage == "speech_tokenizer" else 1
        start = unit * int(rng.integers(max(len(samples) - length, 0) // unit + 1))
        piece = samples[start : start + length].astype(np.float32) / 32768.0
        piece = audio.resample(piece, rate, self._rate)[: cfg.num_samples]
        out = {"wav": piece, "lengths": np.int32(len(piece))}
        if cfg.stage == "speaker":
            speaker = self.index.speakers[self.index.voice[i]]
            return out | {"speaker_index": np.int32(self._speakers.get(speaker, IGNORED))}
        if self._reader is not None:
            return out | self._text(record, len(piece))
        for name in self._labels:
            out[name] = record[name][start // unit :][: len(piece) // LABEL_SAMPLES]
        return out

    def _length(self, rate: int) -> int:
        """Samples of a record at `rate` that fill a row."""
        return -(-self.cfg.num_samples * rate // self._rate)

    def _text(self, record: dict, num_samples: int) -> dict[str, np.ndarray]:
        """text_ids and text_lengths of an utterance; no text, and so no loss, where it cannot be its utterance's.

        Reading a text takes a millisecond or more: too long for a look at every record before a run begins. The first
        ones of a process are told here, and all are counted by the loss (rows_used).
        """
        why = ids = None
        try:
            ids = self._reader.heard(shards.decoded(record["text"]), shards.decoded(record["language"]))
        except ValueError as error:
            why = str(error)
        if ids is not None:
            needs = len(ids) + int(np.sum(ids[1:] == ids[:-1]))  # CTC puts a blank between equal symbols
            has = -(-(num_samples // audio.S3_HOP_SAMPLES) // audio.S3_FRAMES_PER_TOKEN)
            if not 0 < needs <= has:
                why = f"it needs {needs} tokens, its recording has {has}"
        if why is not None:
            ids = np.zeros(0, np.int32)
            self._num_told += 1
            if self._num_told <= _TOLD:
                more = "; more are only counted, in rows_used" if self._num_told == _TOLD else ""
                print(
                    f"no loss from the text {shards.decoded(record['text'])[:60]!r}: {why}{more}", flush=True
                )
        return {"text_ids": ids, "text_lengths": np.int32(len(ids))}


# ---------------------------------------------------------------- the chain


def padded(num_rows: int, multiple: int) -> int:
    """The least multiple that holds so many rows."""
    return -(-num_rows // multiple) * multiple


class _Batches:
    """Batches of one process, of the rows of all processes and empty ones behind them.

    Blocks of following rows, so that the processes' blocks side by side are the batch of one process, row by row.

    Args:
        rows: dataset of single rows, whose arrays may be shorter than `spec` says.
        spec: as `row_spec` gives it.
        own: rows of a batch of all processes that are not empty.
        share: rows of this process.
        first: place of the first one in the batch.
    """

    def __init__(self, rows, spec: dict[str, tuple[tuple[int, ...], type]], own: int, share: int, first: int):
        self._rows, self._spec, self._own, self._share, self._first = rows, spec, own, share, first

    def __len__(self) -> int:
        return _EXAMPLES // self._own

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        out = {name: np.zeros((self._share, *shape), kind) for name, (shape, kind) in self._spec.items()}
        for name in out.keys() & set(_LABELS):
            out[name].fill(IGNORED)
        for place in range(self._first, min(self._first + self._share, self._own)):
            for name, value in self._rows[number * self._own + place].items():
                start = (slice(len(value)),) if value.ndim else ()
                out[name][place - self._first, *start] = value
        return out


def make(cfg: Config, process_index: int = 0, process_count: int = 1, multiple: int = 1):
    """The endless Grain dataset of this process's batches; `iter` of it can be saved and restored.

    With `worker_count` the iterator has to be closed before the program ends: its processes ignore SIGTERM.

    Args:
        cfg: stage, folders and row shape.
        process_index: this host.
        process_count: all hosts; each gets an equal number of a batch's rows.
        multiple: empty rows behind a batch's own make their number a multiple of this.

    Raises:
        ValueError: if the rows do not divide, or the data does not fit the stage.
    """
    import grain

    size = padded(cfg.batch_size, multiple)
    if size % process_count:
        raise ValueError(
            f"batch_size {cfg.batch_size} does not divide over {process_count} hosts; use a multiple of them"
        )
    rows = {"lm": _Lm, "flow": _Flow}.get(cfg.stage, _Waves)(cfg, shards.read_index(cfg))
    dataset = grain.MapDataset.range(_EXAMPLES).random_map(rows.row, seed=cfg.seed)
    share = size // process_count
    batches = _Batches(dataset, row_spec(cfg), cfg.batch_size, share, process_index * share)
    dataset = grain.MapDataset.source(batches)
    if cfg.worker_count:
        chain = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        options = grain.MultiprocessingOptions(
            num_workers=cfg.worker_count, per_worker_buffer_size=cfg.num_prefetch
        )
        return chain.mp_prefetch(options, worker_init_fn=_guard_worker)
    ahead = max(cfg.num_prefetch, cfg.num_threads)  # with fewer, Grain leaves threads idle
    return dataset.to_iter_dataset(grain.ReadOptions(cfg.num_threads, ahead))


def _guard_worker(index: int, count: int) -> None:
    """In a worker process: a signal to the whole job is for the main process; the worker ends when that has gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def held_out(cfg: Config, split: str) -> Config:
    """The config of an evaluation on another split: of the folders that have it and the styles in them; tells the rest.

    Args:
        cfg: of the training.
        split: to be read, without spelled words.

    Raises:
        ValueError: if no folder has the split, or in the speaker stage not every folder.
    """
    folders = [folder for folder in cfg.data_dirs if split in shards.builder(folder).info.splits]
    if cfg.data_dirs and not folders:
        raise ValueError(
            f"{', '.join(cfg.data_dirs)} has no split {split!r} to evaluate on; build it with one (data/README.md), or "
            "switch the evaluation off: --set=eval_batches=0"
        )
    absent = [folder for folder in cfg.data_dirs if folder not in folders]
    if absent and cfg.stage == "speaker":  # its labels are places among the speakers of all folders
        raise ValueError(
            f"{', '.join(absent)} has no split {split!r}, and the labels of the speaker stage are of all folders "
            "together; build it with one (data/README.md), or switch the evaluation off: --set=eval_batches=0"
        )
    cfg = dataclasses.replace(cfg, split=split, data_dirs=tuple(folders), spell_probability=0.0)
    index = shards.read_index(cfg)
    voices = zip(index.styles.tolist(), index.languages.tolist(), strict=True)
    there = {style for style, language in voices if not cfg.languages or language in cfg.languages}
    weights = tuple(w if s in there else 0.0 for s, w in zip(cfg.styles, cfg.style_weights, strict=True))
    if not any(weights):
        return cfg  # `Mixture` says what is wanted and what is there
    absent += [s for s, old, new in zip(cfg.styles, cfg.style_weights, weights, strict=True) if old != new]
    if absent:
        print(f"{split}: evaluated without {', '.join(absent)}, of which it has nothing", flush=True)
    return dataclasses.replace(cfg, style_weights=weights)


def first_batches(
    cfg: Config, count: int, process_index: int = 0, process_count: int = 1, multiple: int = 1
) -> list[dict]:
    """The first `count` batches of this process: the fixed set of an evaluation.

    Args:
        cfg, process_index, process_count, multiple: as for `make`, whose errors it has.
        count: number of batches.

    Returns:
        Dicts of NumPy arrays, see the file docstring.
    """
    own = dataclasses.replace(cfg, worker_count=0)
    batches: Iterator = iter(make(own, process_index, process_count, multiple))
    return [next(batches) for _ in range(count)]
