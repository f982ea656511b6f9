"""Layout `folders`: audio files with texts beside them, as LibriTTS and LibriSpeech have them (VCTK's are apart).

LibriTTS: <subset>/<speaker>/<chapter>/<speaker>_<chapter>_*.wav with .normalized.txt. `data_check.read_folder` says
where text and speaker come from. The style is `normal` unless --style says otherwise.
"""

from collections.abc import Iterator
from pathlib import Path

from deepasmr_jax import data_check


def units(source: Path, options) -> list[tuple]:
    """(folder, source) of each folder that holds audio."""
    found = [(str(folder), str(source)) for folder in data_check.audio_folders(source)]
    if not found:
        raise ValueError(f"{source} holds no audio files ({', '.join(data_check.AUDIO_SUFFIXES)})")
    return found


def read(unit: tuple, options) -> Iterator[data_check.Item | data_check.Problem]:
    """The utterances of a folder."""
    return data_check.read_folder(Path(unit[0]), Path(unit[1]))
