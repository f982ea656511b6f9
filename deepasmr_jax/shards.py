"""Records of TFDS folders by their number, and the index of their lengths and names, which the loader plans with.

A record is read by the fields that are wanted. The index is one mapped file beside the (first) folder, joined of
what the writers of the shards kept (`ShardIndex`); only shards without that are read for it.
"""

import bisect
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from deepasmr_jax import audio, files

FEATURES = {"speech_tokens", "mel", "text_ids"}  # fields that data/add_features.py makes
# beside them, what made them: {"name": "mini" or "qwen", "vocab_size", "speech_tokenizer": sha256, "mel_profile",
# "corpus", "for": "all", "lm" or "flow"}, the first two of the text tokenizer; older folders may say less, under the
# older name
MADE_WITH_FILE = "made_with.json"
OLD_MADE_WITH_FILE = "text_tokenizer.json"


class Wanted(Protocol):
    """What names records: `input_pipeline.Config`, of which nothing else is read here."""

    data_dirs: tuple[str, ...]  # TFDS version folders; their records are joined
    split: str
    stage: str  # for messages, as the next
    align: bool


def made_with_file(folder: str | os.PathLike) -> Path:
    """The file of a feature folder that says what made it, under its older name if only that is there."""
    path, old = Path(folder) / MADE_WITH_FILE, Path(folder) / OLD_MADE_WITH_FILE
    return old if old.exists() and not path.exists() else path


def made_with(folder: str | os.PathLike) -> dict:
    """What `made_with_file` says; empty where there is none."""
    path = made_with_file(folder)
    return json.loads(path.read_text()) if path.exists() else {}


@dataclasses.dataclass
class Index:
    """Lengths and names of the records of a split, in record order: `_ROW` in a file beside the data, mapped.

    A voice is a speaker in one style and language; the names stand once for each, in the order of these three.
    """

    voice: np.ndarray  # [records] int32: place in the three below
    pair: np.ndarray  # [records] uint64: hash of the name that the records of one sentence share
    num_samples: np.ndarray  # [records] int32, as the next two; at 16 kHz, whatever the rate of the record
    num_tokens: np.ndarray  # 0 where the corpus has no features yet
    num_text: np.ndarray
    speakers: np.ndarray  # [voices] names
    styles: np.ndarray
    languages: np.ndarray

    def __len__(self) -> int:
        return len(self.voice)

    def __getstate__(self):  # a worker process maps the file again
        return {k: (str(v.filename), k) if getattr(v, "filename", None) else v for k, v in vars(self).items()}

    def __setstate__(self, state):
        for name, v in state.items():
            setattr(self, name, np.load(v[0], mmap_mode="r")[v[1]] if isinstance(v, tuple) else v)


# of the index file: 24 bytes a record
_ROW = np.dtype([("pair", "<u8")] + [(k, "<i4") for k in ("voice", "num_samples", "num_tokens", "num_text")])
_PACKED = struct.Struct("<Q4i")  # the same


class Records:
    """Random access to the records of one split of several TFDS folders, reading only the wanted fields.

    Args:
        cfg: names the folders and the split.
        fields: names of the features to decode; None: all. With "audio" also `sample_rate`, where records have it.

    Raises:
        ValueError: if a folder is no TFDS dataset, or lacks the split or a field.
    """

    def __init__(self, cfg: Wanted, fields: tuple[str, ...] | None = None):
        if not cfg.data_dirs:
            raise ValueError("no data: give the dataset with --set data.data_dirs=FOLDER")
        for folder in cfg.data_dirs:
            absent = sorted(set(fields or ()) - set(builder(folder).info.features))
            names = ", ".join(absent)
            if absent == ["phones"] and cfg.align:
                raise ValueError(
                    f"records of {folder} have no phone labels `phones`; train without them: "
                    "--set=data.align=false --set=model.alignment_weight=0"
                )
            if absent and (made := made_with(folder)).get("for", "all") != "all":
                raise ValueError(
                    f"records of {folder} were made for the stage {made['for']} alone and have no {names}; give the "
                    f"stage {cfg.stage} "
                    + (
                        f"a folder that data/add_features.py made --for {cfg.stage}"
                        if cfg.stage in ("lm", "flow")
                        else f"the records they were made of, {made['corpus']}"
                    )
                )
            if absent:
                raise ValueError(
                    f"records of {folder} have no {names}; "
                    + (
                        "run data/add_features.py on the corpus first"
                        if FEATURES.issuperset(absent)
                        else "only the built-in corpus has them (data/README.md); which stages need none, and what "
                        "`data.labels` does, is in docs/training.md"
                        if {"f0_class", "phones"}.issuperset(absent)
                        else "build the corpus with them, see data/README.md"
                    )
                )
        self._dirs, self._split, self._fields = cfg.data_dirs, cfg.split, fields
        self._ends = list(itertools.accumulate(_num_records(folder, cfg.split) for folder in cfg.data_dirs))
        self._open = {}

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> dict:
        source = bisect.bisect_right(self._ends, i)
        start = self._ends[source - 1] if source else 0
        if source not in self._open:
            self._open[source] = _Source(self._dirs[source], self._split, self._fields)
        return self._open[source][int(i) - start]

    def __getstate__(self):
        return self.__dict__ | {"_open": {}}  # file handles do not travel to worker processes


@functools.cache
def builder(folder: str):
    """The TFDS builder of a version folder.

    Raises:
        ValueError: if it is no TFDS dataset.
    """
    import tensorflow_datasets as tfds

    if not (Path(folder) / "dataset_info.json").exists():
        inner = sorted(p.parent for p in Path(folder).glob("**/dataset_info.json"))
        hint = (
            f"did you mean {inner[-1]}?"
            if inner
            else "give the version folder that data/build.py or data/add_features.py has finished, such as NAME/1.0.0"
        )
        what = "has no dataset_info.json" if Path(folder).is_dir() else "does not exist"
        raise ValueError(f"{folder} is no dataset: it {what}; {hint}")
    return tfds.builder_from_directory(str(folder))


def _num_records(folder: str, split: str) -> int:
    splits = builder(folder).info.splits
    if split not in splits:
        way_out = "eval_batches=0 trains without one, data/build.py --split-by says how one is made"
        raise ValueError(
            f"{folder} has no split {split!r}; it has {', '.join(sorted(splits))}"
            + (f" ({way_out})" if split == "valid" else "")
        )
    return splits[split].num_examples


class _Source:
    """Records of one folder; only the wanted features are parsed, which matters beside long waveforms.

    Texts, arrays kept as bytes and lists of integers, which is nearly all that training reads, are taken from the
    parsed record directly: TFDS's own way is several times slower for short ones. TFDS reads other features.
    """

    def __init__(self, folder: str, split: str, fields: tuple[str, ...] | None):
        import tensorflow_datasets as tfds
        from tensorflow_datasets.proto import tf_example_pb2

        found = builder(folder)
        features = found.info.features
        names = tuple(fields or features)
        if "audio" in names and "sample_rate" in features:
            names += ("sample_rate",)
        readers = {name: _reader(features[name]) for name in names}
        self._readers = {name: read for name, read in readers.items() if read is not None}
        rest = {name: features[name] for name in names if name not in self._readers}
        self._rest = tfds.features.FeaturesDict(rest) if rest else None
        self._parse, self._folder = tf_example_pb2.Example.FromString, folder
        self._raw = found.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)

    def __getitem__(self, i: int) -> dict:
        raw = self._raw[i]
        record = self._rest.deserialize_example_np(raw) if self._rest else {}
        found = self._parse(raw).features.feature
        for name, read in self._readers.items():
            if name not in found:
                maker = "data/add_features.py" if name in FEATURES else "data/build.py"
                raise ValueError(
                    f"record {i} of {self._folder} has no {name}; write the folder again with {maker}"
                )
            record[name] = read(found[name])
        return record


def _reader(feature) -> Callable | None:
    """A function from a parsed field to the value that TFDS would give; None for features that TFDS reads itself."""
    info = feature.get_serialized_info()  # of features of several fields it is a dict
    shape, dtype = getattr(info, "shape", None), getattr(info, "np_dtype", None)
    if shape == () and dtype == np.object_:
        return lambda field: feature.decode_example_np(field.bytes_list.value[0])
    if shape == () and np.issubdtype(dtype, np.signedinteger):
        return lambda field: field.int64_list.value[0]
    if shape == (None,) and np.issubdtype(dtype, np.signedinteger):
        return lambda field: np.fromiter(field.int64_list.value, dtype, len(field.int64_list.value))
    return None


def read_index(cfg: Wanted) -> Index:
    """The index of the split, mapped from the file beside the (first) dataset.

    Where there is none it is joined of what the writers of the shards kept, the other shards are read, and it is kept.

    Raises:
        ValueError: if no folder is given, one is no TFDS dataset, or lacks the split.
    """
    if not cfg.data_dirs:
        raise ValueError("no data: give the dataset with --set data.data_dirs=FOLDER")
    return _index(tuple(cfg.data_dirs), cfg.split)


@functools.lru_cache(maxsize=16)
def _index(folders: tuple[str, ...], split: str) -> Index:
    """The index of one folder, or of several joined, opened once a process."""
    rows, voices = _kept(folders, split)
    speakers, styles, languages = np.array(voices, np.str_).reshape(-1, 3).T
    return Index(
        **{name: rows[name] for name in _ROW.names}, speakers=speakers, styles=styles, languages=languages
    )


def _kept(folders: tuple[str, ...], split: str) -> tuple[np.ndarray, list[list[str]]]:
    """(`_ROW` of every record, names of the voices) of a folder, or of several joined; kept in a file beside them."""
    marks = "".join(files_mark(folder, [split]) for folder in folders)
    mark = marks if len(folders) == 1 else hashlib.sha256(marks.encode()).hexdigest()[:12]
    path = Path(folders[0]) / f"index_{split}_{mark}.npy"
    names = path.with_suffix(".json")
    if path.exists() and names.exists():
        return np.load(path, mmap_mode="r"), json.loads(names.read_text("utf-8"))
    count = sum(_num_records(folder, split) for folder in folders)
    parts = _of_shards(folders[0], split) if len(folders) == 1 else (_kept((f,), split) for f in folders)
    rows, voices = _joined(parts, count)
    try:
        files.write_text(names, json.dumps(voices, ensure_ascii=False))
        with files.atomic_path(path) as part:
            np.save(part, rows)
        rows = np.load(path, mmap_mode="r")
    except OSError as error:  # a read-only folder costs memory, and one pass per start
        print(f"index of {folders[0]} is not kept: {error}", flush=True)
    return rows, voices


def files_mark(folder: str | os.PathLike, splits: Iterable[str]) -> str:
    """12 hexadecimal digits of the names, bytes and times (s) of the files of splits: other records, other digits."""
    paths = sorted(p for p in Path(folder).glob("[!.]*") if any(f"-{split}." in p.name for split in splits))
    facts = [(p.name, *file_stamp(p)) for p in paths]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def file_stamp(path: Path) -> tuple[int, int]:
    """Bytes of a file, and the time (s) of its last change."""
    found = path.stat()
    return found.st_size, int(found.st_mtime)


class ShardIndex:
    """What the index has of the records of one shard, gathered by who writes them or, once, by who reads them.

    It is kept as `index/SHARD.npz` beside the shard with the shard's size and time, and counts for no other file.
    """

    fields = (
        "speaker", "style", "language", "pair_id", "audio", "sample_rate", "num_samples", "speech_tokens", "text_ids"
    )  # fmt: skip

    def __init__(self):
        self._rows, self._voices = bytearray(), {}

    def add(self, record: dict) -> None:
        """The next record, with those of `fields` that it has."""
        voice = tuple(decoded(record[k]) for k in ("speaker", "style", "language"))
        pair = decoded(record.get("pair_id", b""))
        self._rows += _PACKED.pack(
            _pair(pair) if pair else 0,
            self._voices.setdefault(voice, len(self._voices)),
            record["num_samples"] if "num_samples" in record else num_samples(record),
            len(record.get("speech_tokens", ())),
            len(record.get("text_ids", ())),
        )

    def parts(self) -> tuple[np.ndarray, list[list[str]]]:
        """(`_ROW` of every record, names of the voices); 0 for the pair of a record without one."""
        return np.frombuffer(self._rows, _ROW), [list(voice) for voice in self._voices]

    def write(self, shard: Path, stamp: tuple[int, int]) -> None:
        """Keeps it for a shard, as the shard is at its `file_stamp`."""
        rows, voices = self.parts()
        with files.atomic_path(piece_path(shard)) as part:
            np.savez(part, rows=rows, voices=np.array(voices, np.str_), stamp=stamp)


def piece_path(shard: Path) -> Path:
    """The file with a shard's part of the index; it may be absent."""
    return shard.parent / "index" / f"{shard.name}.npz"


def _read_piece(shard: Path, count: int) -> tuple[np.ndarray, list[list[str]]] | None:
    """`ShardIndex.parts` as the shard's writer kept them; None if they are absent, damaged or of another file."""
    try:
        with np.load(piece_path(shard)) as found:
            rows, voices, stamp = found["rows"], found["voices"].reshape(-1, 3), tuple(found["stamp"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    fits = stamp == file_stamp(shard) and rows.dtype == _ROW and len(rows) == count
    return (rows, voices.tolist()) if fits else None


def _of_shards(folder: str, split: str) -> Iterator[tuple[np.ndarray, list[list[str]]]]:
    """`ShardIndex.parts` of each shard, with all pairs; shards whose writer kept none are read, and it is kept then."""
    info, source, start = builder(folder).info, None, 0
    for shard in info.splits[split].file_instructions:  # in the order of the records, without empty ones
        path, count = Path(shard.filename), shard.examples_in_shard
        found = _read_piece(path, count)
        if found is None:
            if source is None:
                print(f"reading records of {folder} once, for their index", flush=True)
                source = _Source(folder, split, tuple(f for f in ShardIndex.fields if f in info.features))
            made, stamp = ShardIndex(), file_stamp(path)
            for i in range(start, start + count):
                made.add(source[i])
            with contextlib.suppress(OSError):  # of a read-only folder
                made.write(path, stamp)
            found = made.parts()
        rows, voices = found[0].copy(), found[1]
        for i in np.flatnonzero(rows["pair"] == 0):
            rows["pair"][i] = _pair(f"{folder}:{start + i}")
        yield rows, voices
        start += count


def _pair(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _joined(parts: Iterable[tuple[np.ndarray, list]], count: int) -> tuple[np.ndarray, list[list[str]]]:
    """Parts of `count` records one after the other, with the voices of all in the order of their names."""
    rows, places, start = np.empty(count, _ROW), {}, 0
    for part, voices in parts:
        own = rows[start : start + len(part)]
        own[:] = part
        numbers = [places.setdefault(tuple(voice), len(places)) for voice in voices]
        own["voice"] = np.array(numbers, np.int32)[part["voice"]]
        start += len(part)
    order = sorted(places, key="\n".join)
    numbers = np.empty(len(order), np.int32)
    numbers[[places[voice] for voice in order]] = np.arange(len(order))
    rows["voice"] = numbers[rows["voice"]]
    return rows, [list(voice) for voice in order]


def sample_rate(record: dict) -> int:
    """Hz of the audio of a record: its field `sample_rate`, which records of 16 kHz do not have."""
    return int(record.get("sample_rate", audio.SAMPLE_RATE))


def num_samples(record: dict) -> int:
    """Whole samples at 16 kHz that the audio of a record lasts."""
    return len(record["audio"]) * audio.SAMPLE_RATE // sample_rate(record)


def decoded(value) -> str:
    """A text of a record, whether it is bytes, as read, or a string."""
    return value.decode() if isinstance(value, bytes) else str(value)
