"""A request: what is said, in whose voice, in which style; with the checks that need no audio and no model.

Imports nothing heavy, so that the command line refuses a bad request in a fraction of a second.
The same checks hold for the Python interface, because `Synthesizer` builds a `Request` from its arguments.
"""

import difflib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from deepasmr_jax import text as text_lib

STYLES = ("normal", "asmr")
BUILT_IN = Path(__file__).parent / "mini"  # folder of the built-in model
POOL_FILE = "pool.safetensors"  # the pool of a model folder
MAX_SEED = 2**32 - 1
MAX_PASSES = 3  # the paper's Table V stops there; each pass loses similarity


@dataclass(frozen=True, kw_only=True)
class Request:
    """One utterance to be made.

    Attributes:
        text: what to say; English or Mandarin, at most `text.MAX_CHARACTERS` characters.
        voice: the clip whose voice is wanted: a path, or an array of samples in [-1, 1].
        voice_rate: sample rate in Hz of `voice` when it is an array; not needed for a path.
        style: wanted style, one of `STYLES`.
        voice_text: transcript of the clip; used when the clip already is in the wanted style.
        voice_style: style of the clip, one of `STYLES`; None: detected from the sound.
        language: language of `text`, one of `text.LANGUAGES`; None: detected from the letters.
        seed: 0..2^32-1; same request, same seed: same audio.
        refine: passes, 1 to 3; each later pass takes the output before it as the voice.
        pool_strategy: how the task prompt is chosen: "nearest", "static", "real", "self", a pool entry's name, or
        "none": the language model gets the text only, and chooses the style itself.

    Raises:
        ValueError: if a value is outside these bounds; the message names the value and the way out.
    """

    text: str
    voice: Any
    voice_rate: int | None = None
    style: str = "asmr"
    voice_text: str | None = None
    voice_style: str | None = None
    language: str | None = None
    seed: int = 0
    refine: int = 1
    pool_strategy: str = "nearest"

    def __post_init__(self):
        text_lib.check(self.text)
        if self.language is None:
            text_lib.detect_language(self.text)  # refuses other scripts now, before anything is loaded
        if self.voice_text is not None:
            try:
                text_lib.check(self.voice_text)
                _ = self.voice_language  # refuses other scripts, and digits whose language nobody says
            except ValueError as e:
                raise ValueError(f"transcript of the voice clip: {e}") from None
        check_choice(self.style, STYLES, "style")
        if self.voice_style is not None:
            check_choice(self.voice_style, STYLES, "style of the voice clip")
        if self.language is not None:
            check_choice(self.language, text_lib.LANGUAGES, "language")
        object.__setattr__(self, "seed", check_seed(self.seed))
        object.__setattr__(self, "refine", check_passes(self.refine))
        if self.voice is None:
            raise ValueError("the voice is empty; give the path of a clip, or an array with voice_rate")
        if isinstance(self.voice, (str, os.PathLike)):
            check_clip_file(self.voice)
        elif self.voice_rate is None:
            raise ValueError(
                "the voice is an array without a sample rate; pass voice_rate in Hz, such as 16000"
            )

    @property
    def voice_language(self) -> str | None:
        """Language of `voice_text`, from its letters; without letters it is `language`. None: no transcript."""
        if self.voice_text is None:
            return None
        if self.language and not any(map(str.isalpha, self.voice_text)):
            return self.language
        return text_lib.detect_language(self.voice_text)


def from_row(row: dict, extras: bool = False) -> Request:
    """The request of one row of a list, whose keys are the fields of `Request`, with _ or - between words.

    Args:
        row: the row.
        extras: leave other keys aside, unless they look like a misspelt field.

    Raises:
        ValueError: on an unknown or a missing key, or as `Request` does.
    """
    known = [f.name for f in fields(Request)]
    given = {str(key).replace("-", "_"): value for key, value in row.items()}
    for key in given:
        near = difflib.get_close_matches(key, known, 1, 0.8 if extras else 0.6)
        if key not in known and (near or not extras):
            way_out = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"unknown field {key!r} in the request; {way_out}")
    for key in ("text", "voice"):
        if key not in given:
            raise ValueError(f"the request has no {key!r}, only {', '.join(given) or 'nothing'}; add it")
    return Request(**{key: value for key, value in given.items() if key in known})


def check_choice(value: str, known: Sequence[str], what: str) -> str:
    """The value itself; ValueError if it is not among the known ones."""
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}; choose {' or '.join(known)}")
    return value


def check_seed(value) -> int:
    """The seed as int; ValueError if it is no whole number in 0..2^32-1."""
    try:
        seed = int(str(value).strip())
    except ValueError:
        raise ValueError(f"seed {value!r} is not a whole number; give one between 0 and {MAX_SEED}") from None
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed {seed} is out of range; give one between 0 and {MAX_SEED}")
    return seed


def check_passes(value) -> int:
    """The number of passes as int; ValueError outside 1..3."""
    try:
        passes = int(str(value).strip())
    except ValueError:
        passes = 0
    if not 1 <= passes <= MAX_PASSES:
        raise ValueError(f"{value!r} refinement passes are not possible; choose 1, 2 or {MAX_PASSES}")
    return passes


def check_clip_file(path: str | os.PathLike) -> Path:
    """The path of the voice clip; ValueError if no file with content is there."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"the voice clip {path} is a folder; give one audio file")
    if not path.is_file():
        raise ValueError(f"the voice clip {path} does not exist; check the path")
    if path.stat().st_size == 0:
        raise ValueError(f"the voice clip {path} is an empty file; record it again or choose another")
    return path


def check_file_name(name: str) -> str:
    """The name of a file inside an output folder; ValueError if it leads elsewhere or is no wav or flac."""
    if not isinstance(name, str) or Path(name).suffix.lower() not in (".wav", ".flac"):
        raise ValueError(f"the file name {name!r} does not end in .wav or .flac; rename it")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"the file name {name!r} leads out of the output folder; give a name inside it")
    return name


def check_model(model: str | os.PathLike | None) -> Path:
    """The folder of a model, None or "mini" being the built-in one; ValueError if it has no config.json."""
    folder = BUILT_IN if model in (None, "mini") else Path(model)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f'unknown model {str(model or folder)!r}: no config.json in {folder}; give "mini" or a model folder'
        )
    return folder


def read_text(path: str | os.PathLike) -> str:
    """The content of a text file; ValueError that names the file if it is not UTF-8."""
    try:
        return Path(path).read_text("utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as e:
        line = e.object[: e.start].count(b"\n") + 1
        raise ValueError(
            f"{path} is not UTF-8 text (line {line}, byte {e.start}); save it as UTF-8"
        ) from None


def parse_object(line: str) -> dict:
    """The JSON object on a line; ValueError if it is broken or another kind of value."""
    value = json.loads(line)
    if not isinstance(value, dict):
        names = {list: "an array", str: "a string", bool: "a truth value", type(None): "null"}
        raise ValueError(f"it is {names.get(type(value), 'a number')}")
    return value


def read_json_lines(path: str | os.PathLike) -> list[tuple[int, dict]]:
    """The objects of a JSON-lines file with their line numbers; blank lines are passed over.

    Raises:
        ValueError: if it is not UTF-8, a line is no JSON object, or there is none; with file and line.
    """
    rows = []
    for i, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                rows.append((i, parse_object(line)))
            except ValueError as e:
                raise ValueError(f"line {i} of {path} is not a JSON object ({e}); correct it") from None
    if not rows:
        raise ValueError(f"the list {path} is empty; write one JSON object per line")
    return rows


def check_output(path: str | os.PathLike, suffixes: Sequence[str] = (".wav",)) -> Path:
    """The path of a file to be written, in a folder that need not exist yet; ValueError if it cannot be."""
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"the output file {path} does not end in {' or '.join(suffixes)}; rename it")
    if path.is_dir():
        raise ValueError(f"the output {path} is a folder; name a file in it")
    check_output_folder(path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"the output file {path} is write-protected; choose another name")
    return path


def check_output_folder(folder: str | os.PathLike) -> Path:
    """The folder, which need not exist yet and is not made; ValueError if nothing can be written there."""
    folder = Path(folder)
    try:
        existing = next((p for p in (folder, *folder.parents) if p.exists()), folder)
        probe = existing / f".deepasmr_probe_{os.getpid()}"
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as e:
        reason = e.strerror or type(e).__name__
        raise ValueError(f"cannot write in the folder {folder} ({reason}); choose another one") from None
    return folder
