"""Virtual speaker pool: short prompts in a known style, and the choice of one for a target voice.

An entry holds what the language model and the flow need to use it as a prompt (transcript, tokens, mel) and
the speaker embedding that retrieval compares. A pool is one safetensors file: arrays, and JSON in its
metadata; no pickle. Two ways to fill it (DeepASMR, section 3.3): the paper's, 50 normal voices and 50 ASMR
entries that our own model makes from one good ASMR sample and each normal voice (`pool_building.build`); or
recordings with transcripts, which `read_recordings` lists.

Letters: N tokens, T frames, M mel bins, E embedding.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from deepasmr_jax import audio, files, request
from deepasmr_jax import text as text_lib

FORMAT = 1
STRATEGIES = ("nearest", "static", "real")
_AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
_ARRAYS = {"speech_tokens": np.int32, "mel": np.float16, "speaker_embedding": np.float32}
_FACTS = ("name", "style", "language", "transcript", "attributes", "provenance")


@dataclass(frozen=True)
class Entry:
    """One prompt of the pool.

    Attributes:
        name: unique, letters, digits, "_" and "-".
        style: "normal" or "asmr".
        language: "en" or "zh".
        transcript: what is said.
        speech_tokens: [N] int32, 25 Hz.
        mel: [T, M] float16, natural log, in the pool's mel profile.
        speaker_embedding: [E] float32, any length; compared by cosine.
        attributes: free facts such as {"gender": "female", "pitch": "low"}.
        provenance: where it came from: "kind" ("recording" or "synthesis"); of a file its "source" (name) and
            "sha256"; "licence" where it was stated; of what a model spoke its name, the voice and the task prompt;
            of the built-in pool the engine, its voice, the speaker and the corpus.
    """

    name: str
    style: str
    language: str
    transcript: str
    speech_tokens: np.ndarray
    mel: np.ndarray
    speaker_embedding: np.ndarray
    attributes: dict = field(default_factory=dict)
    provenance: dict = field(default_factory=dict)

    @property
    def is_real(self) -> bool:
        """True for a recording of a person, False for synthesised speech."""
        return self.provenance.get("kind") == "recording"

    @property
    def duration_s(self) -> float:
        """Seconds of speech, from the token count."""
        return len(self.speech_tokens) / audio.TOKEN_RATE

    @property
    def licence(self) -> str:
        """As stated; "" if it was not."""
        return self.provenance.get("licence", "")


@dataclass(frozen=True)
class Recording:
    """One recording with its transcript, before analysis.

    Attributes:
        name, transcript, style, language, attributes: as in `Entry`.
        audio: its file.
        kind: "recording" of a person, or "synthesis".
        licence: of the recording, "" if it was not stated.
    """

    name: str
    audio: Path
    transcript: str
    style: str
    language: str
    attributes: dict = field(default_factory=dict)
    kind: str = "recording"
    licence: str = ""


@dataclass(frozen=True)
class Pool:
    """Entries of both styles that share a mel profile and a speaker encoder.

    Attributes:
        entries: the prompts, names unique.
        mel_profile: name of the mel recipe in `audio.MEL_PROFILES`.
        speaker_model: name of the encoder that made the embeddings.

    Raises:
        ValueError: if two entries have one name.
    """

    entries: tuple[Entry, ...]
    mel_profile: str
    speaker_model: str

    def __post_init__(self):
        names = [e.name for e in self.entries]
        double = sorted({n for n in names if names.count(n) > 1})
        if double:
            raise ValueError(f"the pool has two entries named {double[0]!r}; rename one of them")

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def select(self, style: str, language: str | None = None, *, real: bool = False) -> list[Entry]:
        """Entries of a style, of one language unless it is None; only recordings of people if `real`."""
        return [
            e
            for e in self.entries
            if e.style == style and language in (None, e.language) and (e.is_real or not real)
        ]

    def add(self, *entries: Entry) -> "Pool":
        """A new pool with these entries at its end.

        Raises:
            ValueError: on a name that is taken, or on arrays that do not fit the pool's.
        """
        for e in entries:
            for old in self.entries[:1]:
                if e.mel.shape[-1] != old.mel.shape[-1]:
                    raise ValueError(
                        f"entry {e.name!r} has {e.mel.shape[-1]} mel bins, the pool {old.mel.shape[-1]}; "
                        "analyse it with the pool's own model"
                    )
                if e.speaker_embedding.shape != old.speaker_embedding.shape:
                    raise ValueError(
                        f"entry {e.name!r} has an embedding of {e.speaker_embedding.shape[0]} numbers, "
                        f"the pool {old.speaker_embedding.shape[0]}; analyse it with the pool's own model"
                    )
        return Pool(self.entries + tuple(entries), self.mel_profile, self.speaker_model)

    def retrieve(
        self, embedding: np.ndarray | None, style: str, language: str | None, strategy: str = "nearest"
    ) -> tuple[Entry, float]:
        """The entry to use as task prompt for a target voice.

        Args:
            embedding: [E] speaker embedding of the target voice; may be None for "static" and for a name.
            style: style of the wanted entry.
            language: only entries of this language; None: all.
            strategy: "nearest": largest cosine; "static": the first entry of that style and language,
                whatever the voice; "real": largest cosine among recordings of people; or the name of an
                entry.

        Returns:
            (entry, cosine); the cosine is nan where no embedding was given.

        Raises:
            ValueError: if no entry fits.

        Source: DeepASMR, section 3.3 (arg max of the cosine) and its pool ablation (static, real).
        """
        if strategy not in STRATEGIES:
            found = [e for e in self.entries if e.name == strategy]
            if not found:
                near = ", ".join(e.name for e in self.select(style, language)[:3]) or "none of this style"
                raise ValueError(
                    f"unknown pool strategy or entry {strategy!r}; use nearest, static, real, self, none "
                    f"or an entry's name (such as {near}; `deepasmr pool list` shows all)"
                )
            if found[0].style != style:
                raise ValueError(
                    f"pool entry {strategy!r} is {found[0].style}, but {style} is wanted; choose "
                    "an entry of that style"
                )
            return found[0], _cosine(embedding, found)[0]
        entries = self.select(style, language, real=strategy == "real")
        if not entries:
            kind = "recordings" if strategy == "real" else "entries"
            raise ValueError(
                f"the pool has no {style} {kind} in language {language!r}; give a pool that has one with "
                "--pool, or add one with `deepasmr pool add`"
            )
        if strategy == "static":
            return entries[0], _cosine(embedding, entries)[0]
        cosine = _cosine(embedding, entries)
        best = int(np.argmax(cosine))
        return entries[best], cosine[best]

    def check_fits(self, mel_profile: str, embedding_size: int) -> None:
        """ValueError if a model of this mel profile and speaker encoder cannot use the pool."""
        way_out = "build a pool with this model, or give the model that made the pool"
        if self.mel_profile != mel_profile:
            raise ValueError(
                f"the pool has mel profile {self.mel_profile!r}, the model {mel_profile!r}; {way_out}"
            )
        for e in self.entries:
            if len(e.speaker_embedding) != embedding_size:
                raise ValueError(
                    f"the pool's entry {e.name!r} has an embedding of {len(e.speaker_embedding)} numbers, the "
                    f"model's speaker encoder gives {embedding_size}; {way_out}"
                )

    def save(self, path: str | os.PathLike) -> None:
        """Writes the pool to one safetensors file with its checksum, whole or not at all; missing folders are made."""
        from safetensors.numpy import save

        tensors = {
            f"{i:04d}.{name}": np.asarray(getattr(e, name), dtype)
            for i, e in enumerate(self.entries)
            for name, dtype in _ARRAYS.items()
        }
        facts = [{n: getattr(e, n) for n in _FACTS} for e in self.entries]
        head = {"format": FORMAT, "mel_profile": self.mel_profile, "speaker_model": self.speaker_model}
        head |= {"entries": facts}
        head["sha256"] = _sha256(head, tensors.values())
        metadata = {"pool": json.dumps(head, ensure_ascii=False)}
        with files.atomic_path(path) as part:
            # bytes, as safetensors makes its own files readable by the owner only
            part.write_bytes(save(tensors, metadata))


def load(path: str | os.PathLike) -> Pool:
    """Reads a pool file.

    Raises:
        ValueError: if the file is missing, no pool file, damaged, or of another format. Files made before they had a
            checksum are taken as they are.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"there is no pool file {path}; build one with `deepasmr pool build SOURCE --out {path}`"
        )
    try:
        if not _may_be_safetensors(path):
            raise ValueError(f"{path} is no pool file but of another kind; {_WAY_OUT}")
        with safe_open(path, framework="numpy") as f:
            if "pool" not in (f.metadata() or {}):
                raise ValueError(f"{path} is no pool file but another safetensors file; {_WAY_OUT}")
            head = json.loads(f.metadata()["pool"])
            if head["format"] != FORMAT:
                raise ValueError(
                    f"the pool {path} has format {head['format']}, this version reads {FORMAT}; rebuild it"
                )
            arrays = [{a: f.get_tensor(f"{i:04d}.{a}") for a in _ARRAYS} for i in range(len(head["entries"]))]
        stated = head.pop("sha256", None)
        if stated is not None and stated != _sha256(head, (x for each in arrays for x in each.values())):
            raise ValueError(
                f"the pool file {path} is damaged (its checksum is another); fetch it again or rebuild it"
            )
        entries = tuple(Entry(**facts, **each) for facts, each in zip(head["entries"], arrays, strict=True))
        return Pool(entries, head["mel_profile"], head["speaker_model"])
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as e:
        raise ValueError(f"the pool file {path} is damaged ({e}); fetch it again or rebuild it") from None


def _sha256(head: dict, arrays: Iterable[np.ndarray]) -> str:
    """Of everything in a pool file but the checksum itself."""
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for x in arrays:
        digest.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8))
    return digest.hexdigest()


_WAY_OUT = "give a file that `deepasmr pool build` made"


def _may_be_safetensors(path: Path) -> bool:
    """False if the file starts unlike safetensors: 8 bytes with the header's length, below 100 MB, then "{"."""
    with path.open("rb") as f:
        start = f.read(9)
    return not any(start[4:8]) and start[8:] in (b"", b"{")  # a file that was cut off may still be one


def read_recordings(
    path: str | os.PathLike, style: str | None = None, language: str | None = None, licence: str = ""
) -> list[Recording]:
    """Lists recordings with transcripts, in the order of their names or of the manifest's lines.

    Args:
        path: a folder with `x.wav` (flac, ogg, mp3) and `x.txt` beside each; or a JSON-lines manifest with
            the keys audio (path, relative to the manifest), text, style, language, and optional name,
            attributes, licence, and kind ("recording" of a person, the default, or "synthesis").
        style: style of a folder's recordings, or the default for manifest lines without one.
        language: likewise; None in a folder: Mandarin where the transcript has Chinese characters, else
            English.
        licence: of the recordings, where a manifest line has none.

    Raises:
        ValueError: on a missing transcript, an unknown key's value, or an empty list; with file and line.
    """
    path = Path(path)
    if path.is_dir():
        rows = []
        for file in sorted(p for p in path.rglob("*") if p.suffix.lower() in _AUDIO_SUFFIXES):
            transcript = file.with_suffix(".txt")
            if not transcript.is_file():
                raise ValueError(
                    f"{file} has no transcript; write what is said into {transcript.name} beside it"
                )
            name = "_".join(file.relative_to(path).with_suffix("").parts)
            rows.append(
                (str(file), {"name": name, "audio": file, "text": request.read_text(transcript).strip()})
            )
    elif path.is_file():
        rows = []
        for i, row in request.read_json_lines(path):
            try:
                row["audio"] = path.parent / row["audio"]
                row.setdefault("name", row["audio"].stem)
                row["text"]
            except (KeyError, TypeError) as e:
                raise ValueError(
                    f"line {i} of {path} is not a JSON object with audio and text ({e}); correct it"
                ) from None
            rows.append((f"line {i} of {path}", row))
    else:
        raise ValueError(f"{path} does not exist; give a folder of recordings or a JSON-lines manifest")
    if not rows:
        raise ValueError(
            f"{path} holds no recordings ({', '.join(_AUDIO_SUFFIXES)}); add some with transcripts"
        )
    return [_recording(where, {"licence": licence} | row, style, language) for where, row in rows]


def describe(entries: Iterable[Entry]) -> list[dict]:
    """One flat dict of printable facts per entry, for tables; "seconds" from the token count."""
    return [
        {
            "name": e.name,
            "style": e.style,
            "language": e.language,
            "seconds": round(e.duration_s, 2),
            "kind": e.provenance.get("kind", "?"),
            "licence": e.licence or "not stated",
            "attributes": " ".join(f"{k}={v}" for k, v in e.attributes.items()),
            "transcript": e.transcript,
        }
        for e in entries
    ]


def _recording(where: str, row: dict, style: str | None, language: str | None) -> Recording:
    kinds = {"text": str, "name": str, "licence": str, "attributes": dict}
    for key, kind, name in ((k, x, "string" if x is str else "object") for k, x in kinds.items()):
        if not isinstance(row.get(key, kind()), kind):
            raise ValueError(f"{where} has {key} {row[key]!r}, which is no JSON {name}; correct it")
    style = row.get("style", style)
    if style not in request.STYLES:
        raise ValueError(f"{where} has style {style!r}; say normal or asmr, in the manifest or with --style")
    chinese = any("\u4e00" <= c <= "\u9fff" for c in row["text"])
    language = row.get("language", language) or ("zh" if chinese else "en")
    if language not in text_lib.LANGUAGES:
        raise ValueError(f"{where} has language {language!r}; say en or zh")
    if not row["text"].strip():
        raise ValueError(f"{where} has an empty transcript; write what is said")
    if not row["audio"].is_file():
        raise ValueError(f"{where} names {row['audio']}, which does not exist; correct the path")
    kind = row.get("kind", "recording")
    if kind not in ("recording", "synthesis"):
        raise ValueError(f"{where} has kind {kind!r}; say recording (of a person) or synthesis")
    attributes, licence = row.get("attributes", {}), row["licence"].strip()
    return Recording(
        row["name"], row["audio"], row["text"].strip(), style, language, attributes, kind, licence
    )


def _cosine(embedding: np.ndarray | None, entries: list[Entry]) -> list[float]:
    if embedding is None:
        return [float("nan")] * len(entries)
    matrix = np.stack([e.speaker_embedding for e in entries]).astype(np.float64)
    target = np.asarray(embedding, np.float64)
    scale = np.linalg.norm(matrix, axis=1) * np.linalg.norm(target)
    return [float(x) for x in matrix @ target / np.maximum(scale, 1e-12)]
