"""The steps of the corpus tool on one item each: a recording to its pieces, a piece to segments on disk.

`asmr_db.py` calls them in a loop on one machine, `asmr_db_beam.py` in a Beam pipeline on many; both give the same
files. A store is the work folder (`Folder` here, any Beam file system there), whose parts are:

    transcripts/PIECE.json    what the recogniser heard; a piece that has one is not transcribed again, unless its
                              recording sounds or is cut otherwise now, or another model is heard with
    corpus/audio/SPEAKER/PIECE-NNN.flac
    segments/PIECE.jsonl      manifest lines of the piece; written last: a piece that has it is finished
    left_out/PIECE.jsonl      what of the piece is in no segment, and why
    failures/ID.json          a recording or piece that failed, and why; gone once it succeeds
"""

import dataclasses
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

import asmr_db_segments
import numpy as np
from asmr_db_recognizers import Unusable
from asmr_db_segments import Phrase, Word

from deepasmr_jax import audio, files
from deepasmr_jax import text as text_lib

PIECE_S = 600.0  # of the paper
SEARCH_S = 10.0  # a piece ends at the quietest place of its last seconds, so that no word is cut
MIN_RECORDING_S = 1.0


@dataclasses.dataclass(frozen=True)
class Recording:
    """A recording that was accepted.

    Fields: id and speaker are safe as file names (`safe_name`); audio, path or address of the file; language "en",
    "zh" or "" if the recogniser shall say; style "asmr" or "normal"; gender and rights, for the dataset card.
    """

    id: str
    audio: str
    speaker: str
    topic: str
    language: str = ""
    style: str = "asmr"
    gender: str = ""
    rights: str = ""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Seconds `start_s` to `end_s` of a recording, at most `PIECE_S` long; `version` is that of the file."""

    recording: Recording
    index: int
    start_s: float
    end_s: float
    version: str = ""

    @property
    def id(self) -> str:
        """Of its files."""
        return f"{self.recording.id}-{self.index:03d}"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How segments are made: highest sample rate in Hz of the files (a lower one of a recording is kept); the cut."""

    sample_rate: int = 24000
    cut: asmr_db_segments.Config = asmr_db_segments.Config()


@runtime_checkable  # Beam checks arguments against it
class Store(Protocol):
    """Files of the work folder by names with "/", and recordings by their own path. Writes are whole or absent."""

    def exists(self, name: str) -> bool: ...
    def read(self, name: str) -> bytes: ...
    def write(self, name: str, content: bytes) -> None: ...
    def remove(self, name: str) -> None: ...
    def names(self, folder: str) -> list[str]: ...
    def open(self, path: str) -> BinaryIO: ...
    def version(self, path: str) -> str: ...


class Folder:
    """A store on a disk of this machine."""

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self.root / name).is_file()

    def read(self, name: str) -> bytes:
        """The content of a file."""
        return (self.root / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """Writes a file, whole or not at all."""
        with files.atomic_path(self.root / name) as part:
            part.write_bytes(content)

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        (self.root / name).unlink(missing_ok=True)

    def names(self, folder: str) -> list[str]:
        """Sorted names of the files of a folder, with the folder; none if it is absent."""
        paths = (self.root / folder).glob("[!.]*")
        return sorted(p.relative_to(self.root).as_posix() for p in paths if p.is_file())

    def open(self, path: str) -> BinaryIO:
        """A recording, opened."""
        return Path(path).open("rb")

    def version(self, path: str) -> str:
        """Bytes and time of the last change (s) of a recording: others if it was replaced."""
        found = Path(path).stat()
        return f"{found.st_size} {int(found.st_mtime)}"


def safe_name(text: str) -> str:
    """`text` if it can be a file name everywhere, else its safe letters and a checksum."""
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,79}", text):
        return text
    letters = re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_")[:60]
    return f"{letters or 'x'}_{zlib.crc32(text.encode()):08x}"


def cut(recording: Recording, file: BinaryIO) -> list[Piece]:
    """The pieces of a recording, without a gap: each ends at the quietest 0.2 s of its last `SEARCH_S`.

    Only those seconds are read.

    Raises:
        ValueError: if the file is no sound, or shorter than `MIN_RECORDING_S`.
    """
    with _sound(recording, file) as sound:
        rate, length_s = sound.samplerate, sound.frames / sound.samplerate
        if length_s < MIN_RECORDING_S:
            raise ValueError(f"{recording.audio} lasts {length_s:.2f} s; give at least {MIN_RECORDING_S:g} s")
        edges = [0.0]
        while length_s - edges[-1] > PIECE_S:
            start_s = edges[-1] + PIECE_S - SEARCH_S
            sound.seek(int(start_s * rate))
            wav = sound.read(int(SEARCH_S * rate), dtype="float32", always_2d=True).mean(axis=1)
            levels = asmr_db_segments.levels_db(wav, rate)
            calm = np.convolve(levels, np.ones(10) / 10, "valid")
            edges.append(round(start_s + (int(np.argmin(calm)) + 5) * asmr_db_segments.FRAME_S, 3))
    edges.append(length_s)
    return [Piece(recording, i, a, b) for i, (a, b) in enumerate(zip(edges, edges[1:], strict=False))]


def read(recording: Recording, file: BinaryIO, start_s: float, end_s: float) -> tuple[np.ndarray, int]:
    """([W] float32, Hz): seconds `start_s` to `end_s` of a recording, mono, at its own rate and level.

    Raises:
        ValueError: if the file is no sound or ends before `start_s`.
    """
    with _sound(recording, file) as sound:
        rate = sound.samplerate
        first, last = round(start_s * rate), min(round(end_s * rate), sound.frames)
        try:
            sound.seek(min(first, sound.frames))
            wav = sound.read(max(last - first, 0), dtype="float32", always_2d=True)
        except RuntimeError as e:
            raise ValueError(f"{recording.audio} cannot be read from {start_s:.1f} s on ({e})") from None
    if not len(wav):
        raise ValueError(f"{recording.audio} ends before {start_s:.1f} s; is it still being written?")
    return audio.load(wav, rate, rate, max_duration_s=end_s - start_s + 1, allow_silence=True), rate


def pieces(recording: Recording, store: Store) -> list[Piece]:
    """`cut` with the failure recorded: a recording that cannot be read has no pieces."""
    failure = f"failures/{recording.id}.json"
    try:
        version = store.version(recording.audio)
        with store.open(recording.audio) as file:
            found = [dataclasses.replace(piece, version=version) for piece in cut(recording, file)]
    except (ValueError, OSError) as e:
        _write_failure(store, failure, recording, "cut", e)
        return []
    store.remove(failure)
    gone = len(found)  # pieces of a longer recording that was here before
    while store.exists(f"transcripts/{recording.id}-{gone:03d}.json"):
        _remove_segments(f"{recording.id}-{gone:03d}", store)
        for name in ("left_out/{}.jsonl", "failures/{}.json", "transcripts/{}.json"):
            store.remove(name.format(f"{recording.id}-{gone:03d}"))
        gone += 1
    return found


def make_piece(
    piece: Piece, store: Store, recognizer: Callable[[np.ndarray, str], list[Phrase]], settings: Settings
) -> str:
    """Transcribes a piece, cuts it and writes its files; what is there already is used.

    Returns:
        "made", "before" if it was finished before, or "failed", which is recorded with its reason.

    Raises:
        Unusable: if the recogniser itself cannot work.
    """
    finished = f"segments/{piece.id}.jsonl"
    recording, step = piece.recording, "read"
    failure = f"failures/{piece.id}.json"
    try:
        was_heard = _heard_before(piece, store, recognizer)
        if store.exists(finished):
            if was_heard is not False:
                return "before"
            _remove_segments(piece.id, store)
        wav, rate = _read(piece, store)
        heard = audio.resample(wav, rate, audio.SAMPLE_RATE)
        step = "transcribe"
        if not was_heard:
            _transcribe(piece, store, recognizer, heard, _digest(wav))
        phrases = _transcript(piece, store)
        step = "cut into segments"
        found, left_out = asmr_db_segments.segments(heard, audio.SAMPLE_RATE, phrases, settings.cut)
        out_rate = min(rate, settings.sample_rate)
        wav = audio.resample(wav, rate, out_rate)
        lines = []
        for segment in found:
            try:
                language = recording.language or segment.language
                if language not in text_lib.LANGUAGES:
                    language = text_lib.detect_language(segment.text)
            except ValueError as e:
                start_s, end_s = segment.spans[0][0], segment.spans[-1][1]
                lost = {"reason": str(e), "start_s": start_s, "end_s": end_s, "seconds": segment.duration_s}
                left_out.append(lost | {"text": segment.text})
                continue
            name = f"{piece.id}-{len(lines):03d}"
            path = f"audio/{recording.speaker}/{name}.flac"
            store.write(f"corpus/{path}", _flac(segment.cut(wav, out_rate), out_rate))
            lines.append(_manifest_line(piece, segment, name, path, language))
    except Unusable:
        raise
    except (ValueError, OSError, RuntimeError) as e:
        _write_failure(store, failure, recording, step, e, piece)
        return "failed"
    store.write(f"left_out/{piece.id}.jsonl", json_lines(left_out))
    store.write(finished, json_lines(lines))
    store.remove(failure)
    return "made"


def json_lines(rows: list[dict]) -> bytes:
    """Rows as JSON lines in UTF-8."""
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()


def _manifest_line(piece: Piece, segment, name: str, path: str, language: str) -> dict:
    r = piece.recording
    return {
        "audio": path,
        "text": segment.text,
        "speaker": r.speaker,
        "language": language,
        "style": r.style,
        "topic": r.topic,
        "name": name,
        "duration_s": round(segment.duration_s, 3),
        "recording": r.id,
        "start_s": round(piece.start_s + segment.spans[0][0], 3),
        "end_s": round(piece.start_s + segment.spans[-1][1], 3),
    }


def _sound(recording: Recording, file: BinaryIO):
    import soundfile

    try:
        return soundfile.SoundFile(file)
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as e:
        reason = str(e).rstrip(".")
        raise ValueError(
            f"{recording.audio} is not audio that can be read ({reason}); convert it to wav, flac, ogg or mp3"
        ) from None


def _remove_segments(piece_id: str, store: Store) -> None:
    """Removes the segments of a piece, if it has any, and their audio."""
    name = f"segments/{piece_id}.jsonl"
    if store.exists(name):
        for row in filter(None, store.read(name).decode().split("\n")):
            store.remove(f"corpus/{json.loads(row)['audio']}")
        store.remove(name)


def _read(piece: Piece, store: Store) -> tuple[np.ndarray, int]:
    """`read` of a piece."""
    with store.open(piece.recording.audio) as file:
        return read(piece.recording, file, piece.start_s, piece.end_s)


def _digest(wav: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(wav).data, digest_size=16).hexdigest()


def _origin(piece: Piece, recognizer) -> dict:
    """What a transcript is of, kept with it."""
    return {"recognizer": recognizer.name, "start_s": piece.start_s, "end_s": piece.end_s}


def _heard_before(piece: Piece, store: Store, recognizer) -> bool | None:
    """Whether the transcript is of this piece and recogniser; None if there is none.

    Of a file with another version the sound is compared too: one that was only copied is not heard again.
    """
    name = f"transcripts/{piece.id}.json"
    if not store.exists(name):
        return None
    found = json.loads(store.read(name))
    if any(found.get(key) != value for key, value in _origin(piece, recognizer).items()):
        return False
    if found.get("version", piece.version) != piece.version:  # older transcripts have none
        if found["sound"] != _digest(_read(piece, store)[0]):
            return False
        found["version"] = piece.version
        store.write(name, json.dumps(found, ensure_ascii=False).encode())
    return True


def _transcribe(piece: Piece, store: Store, recognizer, heard: np.ndarray, sound: str) -> None:
    """Writes the transcript of a piece; `sound` is the digest of it."""
    phrases = [dataclasses.asdict(p) for p in recognizer(heard, piece.recording.language)]
    kept = _origin(piece, recognizer) | {"version": piece.version, "sound": sound, "phrases": phrases}
    store.write(f"transcripts/{piece.id}.json", json.dumps(kept, ensure_ascii=False).encode())


def _transcript(piece: Piece, store: Store) -> list[Phrase]:
    rows = json.loads(store.read(f"transcripts/{piece.id}.json"))["phrases"]
    return [Phrase(**(row | {"words": tuple(Word(**w) for w in row["words"])})) for row in rows]


def _flac(wav: np.ndarray, sample_rate: int) -> bytes:
    import soundfile

    out = io.BytesIO()
    soundfile.write(out, wav, sample_rate, format="FLAC", subtype="PCM_16")
    return out.getvalue()


def _write_failure(
    store: Store, name: str, recording: Recording, step: str, error: Exception, piece: Piece | None = None
) -> None:
    facts = {"recording": recording.id, "piece": piece.id if piece else "", "step": step}
    reason = " ".join(str(error).split()) or type(error).__name__
    store.write(name, json.dumps(facts | {"reason": reason}, ensure_ascii=False).encode())
