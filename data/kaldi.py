"""Layout `kaldi`: the lists wav.scp, text and utt2spk of a Kaldi folder, as CosyVoice's recipes write them.

Optional lists: utt2lang and utt2style (normal or asmr). Lines are `NAME VALUE` in any order. Paths are relative to the
working directory or to the folder; a command in wav.scp ("... |") is never run.
"""

import array
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

import manifest
import numpy as np

from deepasmr_jax import data_check

LISTS = {"text": "text", "speaker": "utt2spk", "language": "utt2lang", "style": "utt2style"}


class _List:
    """Values of a list by name; memory holds 16 bytes a line, the values stay in the file."""

    def __init__(self, path: Path):
        self._file = path.open("rb")
        hashes, places, at = array.array("Q"), array.array("Q"), 0
        for line in self._file:
            if line.strip():
                hashes.append(_hash(line.split(maxsplit=1)[0]))
                places.append(at)
            at += len(line)
        hashes = np.frombuffer(hashes, np.uint64)
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._places = hashes[order], np.frombuffer(places, np.uint64)[order]

    def get(self, name: bytes) -> str:
        """The value, "" if there is none."""
        at = int(np.searchsorted(self._hashes, np.uint64(_hash(name))))
        while at < len(self._hashes) and self._hashes[at] == _hash(name):
            self._file.seek(int(self._places[at]))
            found = self._file.readline().split(maxsplit=1)
            if found and found[0] == name:
                return found[1].decode("utf-8", "replace").strip() if len(found) > 1 else ""
            at += 1
        return ""


@functools.lru_cache(maxsize=len(LISTS))
def _list(path: Path, size: int) -> _List:
    return _List(path)


def _hash(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def units(source: Path, options) -> list[tuple]:
    """(folder, first byte, byte after the last, number of the first line) of pieces of wav.scp."""
    for name in ("wav.scp", "text", "utt2spk"):
        if not (source / name).is_file():
            raise ValueError(f"{source} has no list {name}; a Kaldi folder has wav.scp, text and utt2spk")
    return [(str(source), *piece) for piece in manifest.line_ranges(source / "wav.scp")]


def lists(unit: tuple) -> list[str]:
    """What a unit is read from, beside the recordings that it names."""
    return [f"{unit[0]}/{name}" for name in ("wav.scp", *LISTS.values())]


def read(unit: tuple, options) -> Iterator[data_check.Item | data_check.Problem]:
    """The utterances of a piece of wav.scp."""
    folder, at, stop, line = unit
    folder = Path(folder)
    paths = {key: folder / name for key, name in LISTS.items() if (folder / name).is_file()}
    lists = {key: _list(path, path.stat().st_size) for key, path in paths.items()}
    with (folder / "wav.scp").open("rb") as file:
        file.seek(at)
        for number, entry in enumerate(file, line):
            if at >= stop:
                return
            at += len(entry)
            if not entry.strip():
                continue
            where = f"line {number} of {folder / 'wav.scp'}"
            name = entry.split(maxsplit=1)[0]
            utterance, wav = (
                name.decode("utf-8", "replace"),
                entry.strip()[len(name) :].decode("utf-8", "replace").strip(),
            )
            if not wav or wav.endswith("|"):
                why = "it names a command, which is not run" if wav else "it names no file"
                yield data_check.Problem(where, utterance, "unreadable", f"{why}: write a path")
                continue
            path = Path(wav) if Path(wav).is_file() else folder / wav
            values = {key: values.get(name) for key, values in lists.items()}
            yield data_check.Item(utterance, path, where, **values)
