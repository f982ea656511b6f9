"""Layout `asmr`: DeepASMR-DB, as Parquet with embedded audio, or as a folder of audio with JSON lines.

Parquet: `audio` is a struct of `bytes` and `path`, or plain bytes; the other columns as in `data_check.ALIASES`. The
published sister set of the same laboratory has `audio_id`, `caption` and `creator_id`; the speech set is said to follow
it, but its column names are not published: name other columns with --field. Also reads CosyVoice's Parquet rows (`utt`,
`audio_data`, `text`, `spk`). A file is read in batches of a few rows. Where there is one, lists and audio beside are
not read, and told (`data_check.Rest`).
"""

from collections.abc import Iterator
from pathlib import Path

import manifest

from deepasmr_jax import data_check

BATCH_ROWS = 16  # with their audio in memory


def units(source: Path, options) -> list[tuple]:
    """(file, row group) of Parquet files, or pieces of manifests."""
    paths = [source] if source.suffix == ".parquet" else sorted(source.rglob("*.parquet"))
    if not paths:
        return manifest.units(source, options)
    return [(str(path), group) for path in paths for group in range(_num_groups(path))]


def read(unit: tuple, options) -> Iterator[data_check.Item | data_check.Problem]:
    """The utterances of a row group, or of a piece of a manifest."""
    if len(unit) > 2:
        yield from manifest.read(unit, options)
        return
    import pyarrow.parquet

    path, group = Path(unit[0]), unit[1]
    with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        known = {n for names in data_check.ALIASES.values() for n in names} | set(options.fields.values())
        columns = [name for name in file.schema_arrow.names if name in known | {"attributes"}]
        row_number = 0
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
            for row in batch.to_pylist():
                where = f"{path} row group {group} row {row_number}"
                row_number += 1
                yield data_check.from_fields(row, where, path.parent, options.fields)


def _num_groups(path: Path) -> int:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            return file.metadata.num_row_groups
    except (OSError, ValueError):
        return 1  # reading it will say what is wrong
