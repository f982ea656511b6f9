"""Layouts `chains` and `whisper40`: one text read aloud and whispered by one speaker, in files named for both.

CHAINS: data/<style>/<speaker>/<speaker>_<text>_<style>.wav, of whose styles `solo` and `whsp` are used. Whisper40:
{nature,whsp}/{enroll,test}/<spk>/<spk>_<NN>_{nature,whsp}.wav. Neither has the texts beside the audio: write them into
a list, `s01 A sentence` a line, and give it with --texts; names are <speaker>_<text> or <text>.
"""

from collections.abc import Iterator
from pathlib import Path

from deepasmr_jax import data_check

STYLES = {"solo": "normal", "nature": "normal", "whsp": "asmr"}


def units(source: Path, options) -> list[tuple]:
    """(folder,) of each speaker and style."""
    found = [(str(folder),) for folder in data_check.audio_folders(source)]
    if not found:
        raise ValueError(f"{source} holds no audio files; give the folder with the styles in it")
    return found


def read(unit: tuple, options) -> Iterator[data_check.Item | data_check.Problem]:
    """The files of a folder that are in one of the two styles; those of the corpus's other styles are told."""
    for path in sorted(Path(unit[0]).iterdir()):
        if path.suffix.lower() not in data_check.AUDIO_SUFFIXES or path.name.startswith("."):
            continue
        parts = path.stem.split("_")
        if len(parts) != 3:
            why = f"{path.name} is not named SPEAKER_TEXT_STYLE"
            yield data_check.Problem(str(path), path.stem, "bad_label", why)
            continue
        speaker, name, style = parts
        if style not in STYLES:
            why = f"of the style {style!r}; those used are {', '.join(STYLES)}"
            yield data_check.Problem(str(path), path.stem, "not_listed", why)
            continue
        pair = f"{speaker}_{name}"
        text = options.texts.get(pair) or options.texts.get(name) or data_check.text_beside(path) or ""
        yield data_check.Item(path.stem, path, str(path), text, speaker, style=STYLES[style], pair_id=pair)
