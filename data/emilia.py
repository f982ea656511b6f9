"""Layout `emilia`: JSON lines with `wav` beside MP3 files (the older form), or tar files of <id>.mp3 and <id>.json.

Fields: id, wav, text, duration, speaker, language, dnsmos. Tar files (WebDataset, also .tar.gz) are read as a stream
and never unpacked; where there is one, lists and MP3 files beside are not read, and told (`data_check.Rest`).
"""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import manifest

from deepasmr_jax import data_check

MAX_BYTES = 1 << 28  # of one member; a piece of 30 s has less than 1 % of it


def units(source: Path, options) -> list[tuple]:
    """(tar file, its size), or pieces of manifests."""
    if source.is_file():
        tars = [source] if ".tar" in source.suffixes else []
    else:
        tars = sorted(p for p in source.rglob("*") if p.suffix == ".tar" or p.name.endswith(".tar.gz"))
    if tars:
        return [(str(path), path.stat().st_size) for path in tars]
    if source.is_file():
        return manifest.units(source, options)
    paths = data_check.manifests(source, is_deep=True)
    if not paths:
        raise ValueError(
            f"{source} holds neither *.tar nor *.jsonl; give Emilia's folder or one language of it"
        )
    return [unit for path in paths for unit in manifest.units(path, options)]


def read(unit: tuple, options) -> Iterator[data_check.Item | data_check.Problem]:
    """The utterances of a tar file, or of a piece of a manifest."""
    if len(unit) > 2:
        yield from manifest.read(unit, options)
        return
    path = Path(unit[0])
    name, parts, too_big = None, {}, None
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                archive.members = []  # else the list grows with the archive
                stem, _, suffix = member.name.rpartition(".")
                if not member.isfile() or Path(member.name).name.startswith("."):
                    continue
                if stem != name:
                    yield from _sample(path, name, parts, options)
                    name, parts = stem, {}
                if stem == too_big:  # its problem is told already
                    continue
                if member.size > MAX_BYTES:
                    why = f"{member.size} bytes, the limit is {MAX_BYTES}"
                    yield data_check.Problem(f"{path} {member.name}", stem, "too_long", why)
                    parts, too_big = {}, stem
                    continue
                parts[f".{suffix.lower()}"] = archive.extractfile(member).read()
        yield from _sample(path, name, parts, options)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"the archive is damaged after {name or 'its begin'} ({error})") from error


def _sample(path: Path, name: str | None, parts: dict[str, bytes], options):
    """The item of the members of one name."""
    if not parts:
        return
    where = f"{path} {name}"
    sound = next((parts[s] for s in data_check.AUDIO_SUFFIXES if s in parts), None)
    if sound is None:
        yield data_check.Problem(where, name, "unreadable", f"there is no audio beside {', '.join(parts)}")
        return
    try:
        row = json.loads(parts.get(".json", b"{}"))
        if not isinstance(row, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        yield data_check.Problem(where, name, "unreadable", f"its .json is no JSON object ({error})")
        return
    if ".txt" in parts:
        row.setdefault("text", parts[".txt"].decode("utf-8", "replace"))
    row = {k: v for k, v in row.items() if k not in data_check.ALIASES["audio"]}
    row = {"id": name} | row | {options.fields.get("audio", "audio"): sound}
    yield data_check.from_fields(row, where, path.parent, options.fields)
