"""The command as tests call it, a small WeSpeaker file, and a disk that fills up: for the tests of weight files."""

import errno
import functools
import os
from pathlib import Path

import jax
import numpy as np
import weight_writers

from deepasmr_jax import checkpoint, cli, public_models, public_names, speaker

RESNET = speaker.Config(base_channels=4, repeats=(1, 1, 1, 1), embedding_size=16)


def run(*words) -> int:
    try:
        return cli.main([str(w) for w in words])
    except SystemExit as e:
        return e.code


@functools.cache
def resnet() -> dict[str, np.ndarray]:
    """A small WeSpeaker file: zeros under the public names."""
    like = checkpoint.abstract(lambda key: speaker.init(RESNET, key), jax.random.key(0))
    zeros = {k: np.zeros(x.shape, np.float32) for k, x in checkpoint.named_arrays(like).items()}
    return public_names.to_theirs(public_models.wespeaker(RESNET), zeros)


def good(folder: Path) -> Path:
    weight_writers.write_torch_zip(folder / "avg_model.pt", resnet())
    return folder / "avg_model.pt"


class Full:
    """Stands for a file on a disk that has this much room."""

    def __init__(self, file, room: int):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def fill_the_disk(monkeypatch, where: str, room: int) -> None:
    """Files whose name has `where` in it can take this many bytes."""
    real = Path.open

    def open_(path, mode="r", *args, **options):
        file = real(path, mode, *args, **options)
        return Full(file, room) if "w" in mode and where in path.name else file

    def write_text(path, text, *args, **options):
        with open_(path, "w") as file:
            file.write(text)

    monkeypatch.setattr(Path, "open", open_)
    monkeypatch.setattr(Path, "write_text", write_text)
