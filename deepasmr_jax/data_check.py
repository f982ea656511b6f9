"""A corpus before it is records: its utterances, the one path from an utterance to a record, and what is wrong with it.

A layout (data/*.py, or one of the three readers here) yields an `Item` per utterance, or a `Problem` where it cannot.
`examine` makes the record of an item and says what is wrong; builders and `deepasmr data check` both go through it, so
that a check before the build finds what the build will leave out. Nothing is left out in silence: each problem is a
line of a report. Breath, whispers and a low level are no problem; only a clip without any sound is.
Everything is read as a stream; `Seen` keeps the hashes of sounds on disk.
Letters: W samples.
"""

import codecs
import dataclasses
import functools
import hashlib
import io
import json
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from deepasmr_jax import audio, files, input_pipeline, request, shards
from deepasmr_jax import text as text_lib

# kind of problem -> what it means; those of KEPT are reported and stay, those of FIRM cannot be kept
KINDS = {
    "unreadable": "missing, damaged or no audio",
    "wrong_rate": "sampled below the rate of the records (16 kHz), or not at the rate that was asked for",
    "silent": "no sound at all (peak below -80 dB of full scale)",
    "clipped": "samples in a row at full scale",
    "too_short": "shorter than any front end can use",
    "too_long": "longer than the limit",
    "no_text": "text missing or empty",
    "bad_label": "speaker, language or style missing or unknown",
    "duplicate": "the same sound, sample by sample, as an earlier one",
    "not_listed": "audio that no line names, or another file of speech that the layout does not read",
    "no_features": "the second pass cannot read its sound or text",
}
KEPT = ("clipped",)
FIRM = ("unreadable", "too_short", "bad_label", "not_listed", "no_features")
REPORT = "data_check.jsonl"  # beside what was checked
BUILD_REPORT = "report.jsonl"  # in what a build or a second pass made
END_S = 0.01  # that `to_s` may lie beyond the end: manifests round it
RECORD_RATES = (16000, 22050, 24000, 32000, 44100, 48000)  # Hz; 20 ms are whole samples of each
MAX_SECONDS = 30.0  # of the speech tokenizer's window, and of Emilia's longest pieces
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
# other files that may hold speech: what they are -> (their suffixes, the way out)
OTHER_FILES = {
    "audio or video that is not looked for": (
        ".aac .ac3 .aif .aifc .aiff .amr .ape .au .avi .caf .flv .m4a .m4b .m4v .mka .mkv .mov .mp2 .mp4 .oga .pcm "
        ".raw .snd .sph .spx .w64 .webm .wma .wv",
        f"make one of {', '.join(AUDIO_SUFFIXES)} of it",
    ),
    "an archive": (
        ".7z .bz2 .gz .rar .tar .tgz .xz .zip .zst",
        "unpack it; the layout emilia reads a .tar alone",
    ),
    "a table": (
        ".arrow .feather .h5 .hdf5 .parquet .tfrecord",
        "write its audio to files; the layout asmr reads a .parquet alone",
    ),
    "a list": (
        ".jsonl .ndjson",
        "name its lines in one that is read; the layout manifest reads a .jsonl alone",
    ),
}
TEXT_SUFFIXES = (".normalized.txt", ".txt", ".lab")  # of a transcript beside the audio, first found
# names that manifests and tables use for one field, first found
ALIASES = {
    "audio": ("audio_data", "audio", "wav", "audio_path", "audio_filepath", "path"),  # of two, the bytes
    "text": ("text", "transcript", "transcription", "sentence", "caption"),
    "speaker": ("speaker", "speaker_id", "spk", "creator_id"),
    "id": ("id", "name", "utt", "audio_id"),
    "language": ("language", "lang"),
    "style": ("style",),
    "pair_id": ("pair_id",),
    "split": ("split",),
    "from_s": ("from_s",),
    "to_s": ("to_s",),
}


@dataclasses.dataclass(frozen=True)
class Item:
    """One utterance as its corpus has it.

    Attributes:
        id: its name, unique in the corpus.
        audio: a file, the bytes of a file, or int16 [W].
        where: place for the report: a file, a line, a member of an archive.
        text, speaker, language, style: as the corpus says them; "" where it does not.
        pair_id: shared by readings of one sentence by one speaker; "" is the id.
        split: "train" or "valid" where the corpus decides; "" elsewhere.
        from_s, to_s: part of the audio in seconds; to_s 0 is its end.
        sample_rate: Hz of an array; files say theirs.
    """

    id: str
    audio: str | os.PathLike | bytes | np.ndarray
    where: str
    text: str = ""
    speaker: str = ""
    language: str = ""
    style: str = ""
    pair_id: str = ""
    split: str = ""
    from_s: float = 0.0
    to_s: float = 0.0
    sample_rate: int = audio.SAMPLE_RATE


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong with one utterance.

    Attributes:
        where: its file, line or member.
        id: its name, "" where it is not known.
        problem: one of `KINDS`.
        why: a sentence.
        kept: it is reported only; else the utterance is left out.
    """

    where: str
    id: str
    problem: str
    why: str
    kept: bool = False

    def line(self) -> str:
        """The line of the report."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False) + "\n"


@dataclasses.dataclass(frozen=True)
class Rules:
    """What counts as a problem.

    Attributes:
        rate: Hz that every file must have; 0: any of at least `record_rate`.
        max_seconds: longest utterance.
        keep: kinds of problem that are reported only, beside `KEPT`.
        needs_labels: speaker, language and style must be there (they are in a record); an unknown one is always wrong.
        record_rate: Hz of the records that files become, of `RECORD_RATES`.

    Raises:
        ValueError: on a kind that is unknown or cannot be kept, a limit that is not positive, or a rate that records
            cannot have.
    """

    rate: int = 0
    max_seconds: float = MAX_SECONDS
    keep: tuple[str, ...] = ()
    needs_labels: bool = True
    record_rate: int = audio.SAMPLE_RATE

    def __post_init__(self):
        able = [kind for kind in KINDS if kind not in FIRM]
        for kind in self.keep:
            if kind not in able:
                raise ValueError(f"problem {kind!r} cannot be kept; choose of {', '.join(able)}")
        if not audio.MIN_DURATION_S < self.max_seconds <= audio.MAX_DURATION_S:
            raise ValueError(
                f"{self.max_seconds:g} s are no limit of length; give one of {audio.MIN_DURATION_S:g} to "
                f"{audio.MAX_DURATION_S:g}"
            )
        if self.record_rate not in RECORD_RATES:
            raise ValueError(
                f"records cannot have {self.record_rate} Hz; give one of {', '.join(map(str, RECORD_RATES))}"
            )
        if self.rate and self.rate < self.record_rate:
            raise ValueError(
                f"rate {self.rate} Hz is below that of records, {self.record_rate}; give 0 or more"
            )


# ---------------------------------------------------------------- an utterance becomes a record


def examine(item: Item, rules: Rules) -> tuple[dict | None, list[Problem]]:
    """The record of an utterance, and what is wrong with it.

    Args:
        item: the utterance.
        rules: what is wrong.

    Returns:
        (id, pair_id, text, language, speaker, style, audio, int16 [W] mono, and sample_rate unless that is 16 kHz;
        None if it is to be left out, the problems). The rate of an array is kept. Duplicates are for `Seen` to find.
    """
    problems = []

    def add(kind: str, why: str):
        problems.append(Problem(item.where, item.id, kind, why, kind in KEPT + rules.keep))

    labels = _labels(item, rules, add)
    if not item.text.strip():
        add("no_text", "there is no text; add what is said")
    try:
        "".join((item.id, item.pair_id, item.text, *labels.values())).encode()
    except UnicodeEncodeError as error:
        add("bad_label", f"its name or text is no valid Unicode ({error.reason}); write it in UTF-8")
    rate = item.sample_rate if isinstance(item.audio, np.ndarray) else rules.record_rate
    pcm = _read(item, rate, rules, add)
    if pcm is None or any(not p.kept for p in problems):
        return None, problems
    pair = item.pair_id or item.id
    record = {"id": item.id, "pair_id": pair, "text": item.text.strip(), **labels, "audio": pcm}
    return record | ({} if rate == audio.SAMPLE_RATE else {"sample_rate": rate}), problems


def digest(pcm: np.ndarray) -> bytes:
    """16 bytes that name the sound of a record."""
    return hashlib.blake2b(np.ascontiguousarray(pcm).data, digest_size=16).digest()


def _labels(item: Item, rules: Rules, add: Callable) -> dict[str, str]:
    language = item.language.lower().replace("_", "-").split("-")[0]
    if not language and item.text.strip():
        try:
            language = text_lib.detect_language(item.text)
        except ValueError as error:
            if rules.needs_labels:
                add("bad_label", str(error))
    labels = {"language": language, "speaker": item.speaker, "style": item.style}
    for name, known in (("language", text_lib.LANGUAGES), ("speaker", ()), ("style", request.STYLES)):
        value = labels[name]
        if not value:
            if rules.needs_labels and (name != "language" or not item.text.strip()):
                add("bad_label", f"the {name} is missing; add it, or give one for all with --{name}")
        elif known and value not in known:
            add("bad_label", f"{name} {value!r} is unknown; known are {' and '.join(known)}")
    return labels


def _read(item: Item, record_rate: int, rules: Rules, add: Callable) -> np.ndarray | None:
    """int16 [W] at `record_rate`; None if it cannot be read or need not be, since it is left out."""
    if isinstance(item.audio, np.ndarray):
        wav, rate = item.audio, record_rate
        _check_rate(rate, rules, add)
        duration_s = len(wav) / rate
        if duration_s > rules.max_seconds:
            add("too_long", f"it lasts {duration_s:.1f} s, the limit is {rules.max_seconds:g} s")
    else:
        try:
            wav, rate = _read_file(item, rules, add)
        except (ValueError, OSError, RuntimeError) as error:
            add("unreadable", " ".join(str(error).split()))
            return None
        if wav is None:
            return None
        duration_s = len(wav) / rate
    if duration_s < audio.MIN_DURATION_S:
        add("too_short", f"it lasts {duration_s:.3f} s; give at least {audio.MIN_DURATION_S:g} s")
        return None
    notes = []
    try:
        wav = audio.load(
            wav, record_rate, rate, allow_silence=True, max_duration_s=duration_s + 1, notes=notes
        )
    except ValueError as error:  # NaN, another unit
        add("unreadable", str(error))
        return None
    if audio.is_silent(wav):
        add("silent", f"peak {np.abs(wav).max():.1e} of full scale")
    for note in notes:
        if note.startswith("clipped"):
            add("clipped", note)
    if isinstance(item.audio, np.ndarray):
        return item.audio
    return np.clip(np.round(wav * 32768.0), -32768, 32767).astype(np.int16)


def _check_rate(rate: int, rules: Rules, add: Callable) -> None:
    if rate < rules.record_rate or rules.rate not in (0, rate):
        wanted = f"{rules.rate}" if rules.rate else f"at least {rules.record_rate}"
        add("wrong_rate", f"it has {rate} Hz, wanted are {wanted}")


def _read_file(item: Item, rules: Rules, add: Callable) -> tuple[np.ndarray | None, int]:
    """(samples of the wanted part, Hz); None for what is too long and left out: it is not decoded."""
    import soundfile

    source = item.audio
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    elif not Path(source).is_file():
        raise ValueError(f"{source} does not exist; correct the path")
    with soundfile.SoundFile(source if isinstance(source, io.BytesIO) else str(source)) as file:
        rate = file.samplerate
        _check_rate(rate, rules, add)
        first = round(item.from_s * rate)
        stop = round(item.to_s * rate) if item.to_s else file.frames
        if file.frames < stop <= file.frames + END_S * rate:
            stop = file.frames
        if not 0 <= first < stop <= file.frames:
            raise ValueError(
                f"the part from {item.from_s:g} s to {stop / rate:g} s does not lie in its {file.frames / rate:g} s"
            )
        seconds = (stop - first) / rate
        if seconds > rules.max_seconds:
            add("too_long", f"it lasts {seconds:.1f} s, the limit is {rules.max_seconds:g} s")
            if "too_long" not in rules.keep:
                return None, rate
        if seconds > audio.MAX_DURATION_S:
            raise ValueError(
                f"it lasts {seconds:.0f} s; cut it into pieces of at most {audio.MAX_DURATION_S:g} s"
            )
        if first:
            file.seek(first)
        wav = file.read(stop - first, dtype="float32", always_2d=True)
    if len(wav) < stop - first:
        raise ValueError(f"it ends after {len(wav)} of {stop - first} samples; copy the file again")
    return wav, rate


class Seen:
    """Which sounds were met before, and under which name: a table on disk, so that memory stays bounded."""

    def __init__(self):
        self._table = sqlite3.connect("", isolation_level=None)  # private, on disk, gone when closed
        self._table.execute("PRAGMA cache_size = -65536")  # KiB; the rest lies in the temporary file
        self._table.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY, name TEXT) WITHOUT ROWID")
        self._table.execute("BEGIN")

    def add(self, digest: bytes, name: str) -> str | None:
        """None if the sound is new, else the name under which it was met first."""
        if self._table.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (digest, name)).rowcount:
            return None
        return self._table.execute("SELECT name FROM seen WHERE digest = ?", (digest,)).fetchone()[0]


# ---------------------------------------------------------------- three readers of any corpus


def from_fields(row: dict, where: str, folder: Path, fields: dict[str, str] | None = None) -> Item | Problem:
    """The item of a row of a manifest or a table.

    Args:
        row: the row; names of fields as in `ALIASES`. Its audio is a path relative to `folder`, bytes, or both in a
            dict {"bytes", "path"}; "attributes" may hold the speaker.
        where: for the report.
        folder: of the manifest.
        fields: names that this corpus uses, such as {"text": "caption"}, in place of `ALIASES`.

    Returns:
        The item; a problem if a field has another type, one of `fields` is not in the row, or there is no audio.
    """
    fields = fields or {}
    given = {}
    for name, aliases in ALIASES.items():
        names = (fields[name],) if name in fields else aliases
        given[name] = next((row[n] for n in names if row.get(n) is not None), None)
    for name, column in fields.items():
        if column not in row:
            kind = {"audio": "unreadable", "text": "no_text"}.get(name, "bad_label")
            why = f"there is no {column!r}, named for {name}, among {', '.join(row)}; null there is no value"
            return Problem(where, str(given["id"] or ""), kind, why)
    attributes = row.get("attributes")
    if given["speaker"] is None and "speaker" not in fields and isinstance(attributes, dict):
        given["speaker"] = attributes.get("speaker")
    name, sound = given.pop("id"), given.pop("audio")
    if isinstance(sound, dict):
        name = name or sound.get("path")
        sound = sound.get("bytes") or sound.get("path")
    if not isinstance(sound, str | bytes) or not sound:
        return Problem(where, str(name or ""), "unreadable", f"there is no audio among {', '.join(row)}")
    if isinstance(sound, str):
        name = name or "_".join(Path(sound).with_suffix("").parts[-3:])
        sound = folder / sound
    values = {"from_s": 0.0, "to_s": 0.0}
    for key, value in given.items():
        if value is None:
            continue
        if key in values:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
                return Problem(where, str(name), "unreadable", f"{key} {value!r} are no seconds")
            values[key] = float(value)
        elif isinstance(value, str) or (isinstance(value, int) and key == "speaker"):
            values[key] = str(value)
        else:
            kind = "bad_label" if key in ("speaker", "language", "style") else "no_text"
            return Problem(where, str(name), kind, f"{key} {value!r} is no string")
    if values.get("split", "train") not in ("train", "valid"):
        return Problem(where, str(name), "bad_label", f"split {values['split']!r} is not train or valid")
    return Item(id=str(name or where), audio=sound, where=where, **values)


def read_manifest(
    path: Path, start: int = 0, stop: int | None = None, line: int = 1, fields: dict[str, str] | None = None
) -> Iterator[Item | Problem]:
    """Items of the lines of a JSON-lines file, see `from_fields`.

    Args:
        path: the file.
        start, stop: bytes of it, each at the begin of a line; all of it without them.
        line: number of the first line, for the report.
        fields: as for `from_fields`.
    """
    path = Path(path)
    stop = path.stat().st_size if stop is None else stop
    with path.open("rb") as file:
        file.seek(start)
        for number, text in enumerate(file, line):
            if start >= stop:
                return
            start += len(text)
            text = text.removeprefix(codecs.BOM_UTF8) if number == 1 else text
            if not text.strip():
                continue
            where = f"line {number} of {path}"
            try:
                row = request.parse_object(text.decode())
            except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
                yield Problem(where, "", "unreadable", f"it is not a JSON object ({error}); correct it")
                continue
            yield from_fields(row, where, path.parent, fields)


def audio_folders(root: Path) -> Iterator[Path]:
    """The folders below `root` that hold audio files, in order of their names; hidden ones are passed over."""
    for folder, below, names in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if any(name.lower().endswith(AUDIO_SUFFIXES) for name in names):
            yield Path(folder)


def read_folder(folder: Path, root: Path) -> Iterator[Item]:
    """Items of the audio files of one folder.

    The text is in a file beside (`TEXT_SUFFIXES`) or in a list X.trans.txt of the folder. The speaker is the nearest
    folder whose name begins the file's ("84/121123/84_121123_000007.wav": 84), else the folder itself.
    """
    lists = {}
    for path in sorted(folder.glob("*.trans.txt")):
        for line in path.read_text("utf-8", errors="replace").splitlines():
            name, _, text = line.partition(" ")
            lists[name] = text
    inner = folder.relative_to(root).parts or (folder.name,)
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in AUDIO_SUFFIXES):
        if path.name.startswith("."):
            continue
        speaker = next((p for p in reversed(inner) if path.name.startswith((f"{p}_", f"{p}-"))), inner[-1])
        text = text_beside(path)
        if text is None:
            text = lists.get(path.stem, "")
        name = "_".join(path.relative_to(root).with_suffix("").parts)
        yield Item(id=name, audio=path, where=str(path), text=text, speaker=speaker)


def text_beside(path: Path) -> str | None:
    """What is said in an audio file, from a text file of its name; None if there is none."""
    for suffix in TEXT_SUFFIXES:
        beside = path.with_suffix(suffix)
        if beside.is_file():
            return beside.read_text("utf-8", errors="replace").strip()
    return None


def read_records(folder: str | os.PathLike) -> Iterator[Item | Problem]:
    """Items of the records of every split of a dataset that was built.

    Raises:
        ValueError: if the folder is no TFDS dataset, or has no waveforms.
    """
    import tensorflow_datasets as tfds

    info = tfds.builder_from_directory(str(folder)).info
    names = ("audio", "id", "pair_id", "text", "speaker", "language", "style")
    names = tuple(name for name in names if name in info.features)
    if "audio" not in names:
        raise ValueError(f"records of {folder} have no audio, only {', '.join(info.features)}")
    for split in info.splits:
        cfg = input_pipeline.Config("vocoder", 1, (str(folder),), split)
        records = shards.Records(cfg, names)
        for i in range(len(records)):
            where = f"{folder} {split} record {i}"
            try:
                record = records[i]
                row = {k: v.decode() if isinstance(v, bytes) else v for k, v in record.items()}
            except Exception as error:  # the reader of damaged files has errors of its own
                yield Problem(where, "", "unreadable", " ".join(str(error).split()) or type(error).__name__)
                continue
            yield Item(where=where, **({"id": where} | row))


def manifests(folder: Path, is_deep: bool = False) -> list[Path]:
    """The *.jsonl of a folder, or also below it, in order; reports and hidden files are none."""
    paths = sorted(folder.rglob("*.jsonl") if is_deep else folder.glob("*.jsonl"))
    hidden = (any(part.startswith(".") for part in p.relative_to(folder).parts) for p in paths)
    return [p for p, h in zip(paths, hidden, strict=True) if not h and p.name not in (REPORT, BUILD_REPORT)]


def find(folder: str | os.PathLike) -> Iterator[Item | Problem]:
    """Items of a folder of unknown kind: records, else manifests *.jsonl, else audio files with texts beside.

    Raises:
        ValueError: if nothing of these is there.
    """
    root = Path(folder)
    if root.is_file() and root.suffix == ".jsonl":
        return read_manifest(root)
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}; give a corpus, or records that were built from one")
    if (root / "dataset_info.json").is_file():
        return read_records(root)
    if paths := manifests(root):
        return with_rest((item for path in paths for item in read_manifest(path)), root, paths)
    if next(audio_folders(root), None) is not None:
        return with_rest((item for inner in audio_folders(root) for item in read_folder(inner, root)), root)
    packed = (p for p in root.rglob("*") if p.suffix in (".tar", ".parquet") or p.name == "wav.scp")
    if (found := next(packed, None)) is None:
        way_out = f"audio is {', '.join(AUDIO_SUFFIXES)}"
    else:
        layout = f"kaldi {found.parent}" if found.name == "wav.scp" else f"LAYOUT {root}"
        way_out = (
            f"check it with `python data/build.py check {layout} --out report.jsonl`, which reads the layouts of "
            "data/README.md"
        )
    raise ValueError(f"{root} holds no records, no *.jsonl and no audio files; {way_out}")


# ---------------------------------------------------------------- what no reader took


class Rest:
    """Files below a folder that may hold speech and that no reader took: audio, and `OTHER_FILES`.

    Texts, tables without sound (.csv, .tsv, .json), what is hidden or empty, and what these tools write are none.
    """

    def __init__(self, root: str | os.PathLike, lists: Iterable[str | os.PathLike] = ()):
        """Nothing is taken yet but the lists.

        Args:
            root: the corpus; one file has no rest.
            lists: the lists, archives and tables that are read of it.
        """
        self._root, self._taken, names = root, Seen(), []
        for path in lists:
            self.take(path)
            names.append(os.path.basename(path))
        lines = [name for name in names if name.endswith((".jsonl", "wav.scp"))]
        self._has_lines = bool(lines)
        names = lines or names
        told = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        self._why = (
            f"no line of {told} names it" if lines else f"of this folder {told} is read; give one of both"
        )

    def take(self, path: str | os.PathLike) -> None:
        """Notes a file that was read, or of which a problem is told."""
        try:
            self._taken.add(_mark(path), "")
        except ValueError:  # a name that no file can have
            pass

    def problems(self) -> Iterator[Problem]:
        """A problem for each file that was not taken, and for each folder that cannot be looked into."""
        failed = []
        for folder, below, names in os.walk(self._root, onerror=failed.append):
            below[:] = sorted(name for name in below if not name.startswith("."))
            for path in (Path(folder, name) for name in below if not self._has_lines):
                if path.is_symlink():
                    why = "a link to a folder, which is not followed; give that folder itself"
                    yield Problem(str(path), path.name, "not_listed", why)
            for path in (Path(folder, name) for name in sorted(names) if not name.startswith(".")):
                why = self._reason(path)
                if why and self._taken.add(_mark(path), "") is None and not _is_report(path):
                    yield Problem(str(path), path.stem, "not_listed", why)
        for error in failed:
            if error.filename != os.fspath(self._root):  # which may be one file, or gone since
                yield Problem(
                    str(error.filename), "", "unreadable", f"no folder to look into ({error.strerror})"
                )

    def _reason(self, path: Path) -> str | None:
        """Why a file counts that no reader took; None if it holds no speech."""
        suffix = path.suffix.lower().split("-")[0]  # of a.tfrecord-00000-of-00002 too
        if suffix in AUDIO_SUFFIXES:
            return self._why
        return next(
            (f"{kind}; {way}" for kind, (known, way) in OTHER_FILES.items() if suffix in known.split()), None
        )


def with_rest(
    items: Iterable[Item | Problem], root: str | os.PathLike, lists: Iterable[str | os.PathLike] = ()
) -> Iterator[Item | Problem]:
    """Items, then a problem for each file of their corpus of which none came; arguments as of `Rest`."""
    rest = Rest(root, lists)
    for item in items:
        place = item.where if isinstance(item, Problem) else item.audio
        if isinstance(place, str | os.PathLike):
            rest.take(place)
        yield item
    yield from rest.problems()


def _mark(path: str | os.PathLike) -> bytes:
    """16 bytes that name a file, whichever way its folder is written."""
    folder, name = os.path.split(os.path.join(os.getcwd(), path))
    return hashlib.blake2b(os.fsencode(os.path.join(_real(folder), name)), digest_size=16).digest()


@functools.lru_cache(1024)
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def _is_report(path: Path) -> bool:
    """Whether a list is empty or a report, by its name or as `Problem.line` writes it."""
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    if path.name in (REPORT, BUILD_REPORT):
        return True
    with path.open("rb") as file:
        return file.read(9) in (b"", b'{"where":')


# ---------------------------------------------------------------- the check


def check(
    items: Iterable[Item | Problem],
    report: str | os.PathLike,
    rules: Rules,
    progress: Callable[[str], None] | None = None,
) -> dict[str, int | float]:
    """Examines every item and writes a line for each problem; memory does not grow with their number.

    Args:
        items: the utterances.
        report: the JSON-lines file to write: fields of `Problem`.
        rules: what is wrong.
        progress: called with a sentence now and then.

    Returns:
        {"files", "left_out", "hours" of the rest, and the number of each kind that was found}.
    """
    seen, found, num_files, left_out, seconds = Seen(), Counter(), 0, 0, 0.0
    start = said = time.perf_counter()
    with (
        files.atomic_path(report) as part,
        part.open("w", encoding="utf-8", errors="backslashreplace") as lines,
    ):
        for item in items:
            num_files += 1
            record, problems = (None, [item]) if isinstance(item, Problem) else examine(item, rules)
            if record is not None:
                first = seen.add(digest(record["audio"]), item.where)
                if first is not None:
                    kept = "duplicate" in rules.keep
                    why = f"the same sound as {first}"
                    problems.append(Problem(item.where, item.id, "duplicate", why, kept))
                    record = record if kept else None
            if record is None:
                left_out += 1
            else:
                seconds += len(record["audio"]) / shards.sample_rate(record)
            for problem in problems:
                found[problem.problem] += 1
                lines.write(problem.line())
            if progress and time.perf_counter() - said > 10:
                said = time.perf_counter()
                progress(
                    f"{num_files} files, {num_files / (said - start):.0f} a second, {left_out} with a fault"
                )
    hours = round(seconds / 3600, 4)
    return {"files": num_files, "left_out": left_out, "hours": hours} | {
        k: found[k] for k in KINDS if found[k]
    }
