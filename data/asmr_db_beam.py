"""The corpus tool's steps on Apache Beam: recordings -> pieces -> segments, the same functions and files as locally.

The DirectRunner runs it on one machine; Dataflow, Flink and Spark take the same pipeline with their own options. The
work folder may be on any file system that Beam knows (a path, gs://, s3://, hdfs://). Needs the extra `beam`.
"""

import os
from collections import Counter
from collections.abc import Sequence
from typing import BinaryIO

import apache_beam as beam
import asmr_db_pieces
import asmr_db_recognizers
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions, SetupOptions
from asmr_db_pieces import Piece, Recording, Settings

from deepasmr_jax import files


class Shared:
    """A store (`asmr_db_pieces.Store`) on a file system that all workers see.

    A file is written under another name and renamed, as locally; on object stores the rename is a copy.
    """

    def __init__(self, root: str):
        self._root = str(root).rstrip("/")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return FileSystems.exists(self._path(name))

    def read(self, name: str) -> bytes:
        """The content of a file."""
        with self.open(self._path(name)) as file:
            return file.read()

    def write(self, name: str, content: bytes) -> None:
        """Writes a file, whole or not at all."""
        path = self._path(name)
        if "://" not in path:
            with files.atomic_path(path) as part:
                part.write_bytes(content)
            return
        folder, _, last = path.rpartition("/")
        part = f"{folder}/.{os.urandom(4).hex()}.part.{last}"
        with FileSystems.create(part, compression_type="uncompressed") as file:
            file.write(content)
        FileSystems.rename([part], [path])

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        if self.exists(name):
            FileSystems.delete([self._path(name)])

    def names(self, folder: str) -> list[str]:
        """Sorted names of the files of a folder, with the folder; none if it is absent."""
        found = FileSystems.match([f"{self._path(folder)}/*"])[0].metadata_list
        names = (m.path.replace("\\", "/").rpartition("/")[2] for m in found)
        return sorted(f"{folder}/{n}" for n in names if not n.startswith("."))

    def open(self, path: str) -> BinaryIO:
        """A recording, opened, with no guess at compression from its name."""
        return FileSystems.open(path, compression_type="uncompressed")

    def version(self, path: str) -> str:
        """Bytes and time of the last change (s) of a recording, as `asmr_db_pieces.Folder` gives them."""
        found = FileSystems.match([path])[0].metadata_list
        if not found:
            raise ValueError(f"{path} does not exist; correct the list")
        return f"{found[0].size_in_bytes} {int(found[0].last_updated_in_seconds)}"


class MakePiece(beam.DoFn):
    """`asmr_db_pieces.make_piece` with one recogniser a worker; yields what became of the piece."""

    def __init__(self, work: str, recognizer: str, model: str | None, settings: Settings):
        self._args = work, recognizer, model, settings

    def setup(self):
        work, recognizer, model, self._settings = self._args
        self._store = Shared(work)
        self._recognizer = asmr_db_recognizers.make(recognizer, model)

    def process(self, piece: Piece):
        became = asmr_db_pieces.make_piece(piece, self._store, self._recognizer, self._settings)
        beam.metrics.Metrics.counter("asmr_db", became).inc()
        yield became


def run(
    work: str,
    recordings: Sequence[Recording],
    recognizer: str,
    model: str | None,
    settings: Settings,
    beam_args: Sequence[str] = (),
) -> Counter:
    """Runs the pipeline to its end.

    Args:
        work: the work folder, as every worker sees it; likewise `model` and the recordings' `audio`.
        recognizer, model: as for `asmr_db_recognizers.make`, which every worker calls: a key of the service must be
            in the workers' environment.
        beam_args: options of Beam and of the runner, e.g. ["--runner=DataflowRunner", "--project=P", ...].

    Returns:
        How many pieces were "made", "before" or "failed".

    Raises:
        ValueError: if the pipeline stops, as when the recogniser cannot work. What was finished stays.
    """
    work, options = str(work), PipelineOptions(list(beam_args))
    options.view_as(SetupOptions).save_main_session = False  # everything is in importable files
    store = Shared(work)
    pipeline = beam.Pipeline(options=options)
    (
        pipeline
        | "recordings" >> beam.Create(list(recordings))
        | "cut" >> beam.FlatMap(asmr_db_pieces.pieces, store)
        | "spread" >> beam.Reshuffle()  # pieces of one recording go to many workers
        | "transcribe and segment" >> beam.ParDo(MakePiece(work, recognizer, model, settings))
    )
    try:
        result = pipeline.run()
        result.wait_until_finish()
    except Exception as e:  # of any runner; the way out is in the last line of what a worker said
        reason = str(e).strip() or type(e).__name__
        raise ValueError(f"the Beam pipeline stopped: {reason.splitlines()[-1]}") from e
    found = result.metrics().query(beam.metrics.MetricsFilter().with_namespace("asmr_db"))["counters"]
    return Counter({c.key.metric.name: c.committed or c.attempted or 0 for c in found})
