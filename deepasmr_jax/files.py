"""Files that are whole or absent: every file of the package is written under another name first.

A reader, a second process or the next start after a kill sees the old file or the new one, never a part of it.
This row of the package imports nothing of it, so that every other file may use it.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its name when the block ends.

    The temporary name is hidden, ends like `path` (writers choose the format by the suffix) and is used once, so
    that two processes never write to one file. If the block fails, it is removed and `path` stays as it was; after
    a kill, `.XXXXXXXX.part.NAME` is left and may be deleted.

    Args:
        path: the file to be; missing folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{secrets.token_hex(4)}.part.{path.name}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all."""
    with atomic_path(path) as part:
        part.write_text(text, "utf-8")
