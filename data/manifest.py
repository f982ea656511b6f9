"""Layout `manifest`: JSON lines with `audio` (a path relative to the manifest), `text`, `speaker`, `language`, `style`.

Also `id`, `pair_id`, `split` (train or valid), and `from_s`, `to_s` for a part of a long recording. SOURCE is one
file, or a folder with *.jsonl, of which data_check.jsonl and report.jsonl are taken for reports and passed over.
"""

from collections.abc import Iterator
from pathlib import Path

from deepasmr_jax import data_check

RANGE_BYTES = 1 << 20  # of lines in one unit; of a short list less, so that several workers have some


def units(source: Path, options) -> list[tuple]:
    """(file, first byte, byte after the last, number of the first line) of pieces of whole lines, in order."""
    paths = [source] if source.is_file() else data_check.manifests(source)
    if not paths:
        raise ValueError(f"{source} is no manifest and holds no *.jsonl; write one line per utterance")
    return [(str(path), *piece) for path in paths for piece in line_ranges(path)]


def read(unit: tuple, options) -> Iterator[data_check.Item | data_check.Problem]:
    """The utterances of a piece."""
    path, start, stop, line = unit
    return data_check.read_manifest(Path(path), start, stop, line, options.fields)


def line_ranges(path: Path) -> Iterator[tuple[int, int, int]]:
    """(first byte, byte after the last, number of the first line) of pieces of whole lines."""
    size = min(max(path.stat().st_size // 64, 1 << 13), RANGE_BYTES)
    with path.open("rb") as file:
        start, line = 0, 1
        while piece := file.read(size):
            rest = b"" if piece.endswith(b"\n") else file.readline()
            stop = start + len(piece) + len(rest)
            yield start, stop, line
            start, line = stop, line + piece.count(b"\n") + rest.count(b"\n")
