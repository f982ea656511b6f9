"""TFDS datasets as ArrayRecord files, written without TensorFlow: shards, their names, and the description beside them.

`tensorflow_datasets.builder_from_directory(FOLDER).as_data_source(SPLIT)` reads them. FOLDER is NAME/VERSION.
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from deepasmr_jax import files, input_pipeline, shards  # noqa: E402

PARTS = ".parts"  # folder beside the shards for what a pass keeps of each, until it is complete


class ShardWriter:
    """Writes records one by one; `size` is the sum of the serialized sizes in bytes, `count` their number.

    `index` has their part of the loader's index (None of records that no stage reads).
    """

    def __init__(self, path: Path, features):
        from array_record.python.array_record_module import ArrayRecordWriter
        from tensorflow_datasets.core import example_serializer

        self._features = features
        self._serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
        # ArrayRecord's default, zstd, takes three to four times as long to read from memory (data/README.md)
        self._writer = ArrayRecordWriter(str(path), "group_size:1,snappy")
        known = {name: features[name] for name in shards.ShardIndex.fields if name in features}
        self._indexed = features.__class__(known)
        self.index = shards.ShardIndex() if {"speaker", "style", "language"} <= set(known) else None
        self.size = self.count = 0

    def write(self, record: dict) -> None:
        """Appends a record."""
        self._append(self._serializer.serialize_example(self._features.encode_example(record)))
        if self.index is not None:
            self.index.add(record)

    def write_raw(self, data: bytes) -> None:
        """Appends a record as another shard has it."""
        self._append(data)
        if self.index is not None:
            self.index.add(self._indexed.deserialize_example_np(data))

    def _append(self, data: bytes) -> None:
        self._writer.write(data)
        self.size += len(data)
        self.count += 1

    def close(self) -> None:
        """Completes the file."""
        self._writer.close()


@contextlib.contextmanager
def open_shard(path: Path, features) -> Iterator[ShardWriter]:
    """A shard to write to, and its part of the index (`shards.ShardIndex`).

    The file has its name when the block has ended, and its part of the index is there before; no file is left if the
    block fails.
    """
    with files.atomic_path(path) as part:
        writer = ShardWriter(part, features)
        try:
            yield writer
        finally:
            writer.close()
        if writer.index is not None:
            writer.index.write(path, shards.file_stamp(part))


def remove_shard(path: Path) -> None:
    """Removes a shard and its part of the index."""
    path.unlink()
    shards.piece_path(path).unlink(missing_ok=True)


def write_shard(path: Path, features, records) -> int:
    """Writes records as one ArrayRecord file, atomically.

    Args:
        path: the file, named `<dataset>-<split>.array_record-00000-of-00001`.
        features: `tfds.features.FeaturesDict`.
        records: iterable of dicts.

    Returns:
        The sum of the serialized sizes in bytes.
    """
    with open_shard(path, features) as shard:
        for record in records:
            shard.write(record)
    return shard.size


def read_shard(path: Path) -> Iterator[bytes]:
    """The serialized records of a shard."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path))
    try:
        for i in range(reader.num_records()):
            yield reader.read([i])[0]
    finally:
        reader.close()


def num_records(path: Path) -> int:
    """Records in a shard."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path))
    try:
        return reader.num_records()
    finally:
        reader.close()


def shard_name(dataset: str, split: str, shard: int, num_shards: int) -> str:
    """File name of a shard, in the pattern that TFDS reads.

    Raises:
        ValueError: if there are more shards than five digits count; TFDS takes them in the order of their names.
    """
    if num_shards > 99_999:
        raise ValueError(f"{num_shards} shards of {split!r} are more than 99,999; put more records into each")
    return f"{dataset}-{split}.array_record-{shard:05d}-of-{num_shards:05d}"


def remove_left_overs(folder: Path) -> None:
    """Removes what kills left of unfinished files (`files.atomic_path`); no process may write there any more."""
    for path in folder.glob(".*.part.*"):
        path.unlink(missing_ok=True)


def process_of(number: str) -> tuple[int, int]:
    """(2, 8) of "2/8", the process that a pass is for.

    Raises:
        ValueError: if the first is not below the second, or it is no pair of numbers.
    """
    index, _, count = number.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(
            f"process {number!r} is not of the form I/N with I from 0 to N - 1; give 0/1 for all"
        )
    return int(index), int(count)


def write_metadata(folder: Path, features, shard_lengths: dict[str, list[int]], description: str) -> None:
    """Writes dataset_info.json and features.json for shards that are already there.

    Args:
        folder: version folder, e.g. `NAME/1.0.0`.
        features: `tfds.features.FeaturesDict`.
        shard_lengths: records of each shard, per split.
        description: what the data is.
    """
    import tensorflow_datasets as tfds

    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=folder.parent.name, filetype_suffix="array_record",
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    )  # fmt: skip
    splits = []
    for split, lengths in shard_lengths.items():
        size = sum(p.stat().st_size for p in folder.glob(f"[!.]*-{split}.array_record-*"))
        own = template.replace(split=split)
        splits.append(
            tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=own)
        )
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=splits, filename_template=template, check_data=False,
        description=description,
    )  # fmt: skip


def write_index(folder: Path, splits: Iterable[str]) -> None:
    """Makes the loader's index of a dataset from the parts beside its shards, so that no run has to."""
    for split in splits:
        shards.read_index(input_pipeline.Config("lm", 1, (str(folder),), split))
