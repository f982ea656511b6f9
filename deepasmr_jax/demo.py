"""The demonstration: the bundled clips of a model folder, and all four tasks from each of them.

`make` reads the folder `demo` of a model (two voices, each once normal and once whispered, with sentences to speak)
and gives the clips and what was made from them, as `Sound`s. It writes nothing: the command `deepasmr demo` makes
wavs, pictures and the page (`page.py`) of them.
Letters: W samples.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from deepasmr_jax import audio
from deepasmr_jax.request import Request
from deepasmr_jax.results import Failure
from deepasmr_jax.synthesis import Synthesizer

_WORDS = {"normal": "normal", "asmr": "whispered"}
_LABELS = {"normal": "normal clip", "asmr": "ASMR clip"}
_TASKS = (("normal", "asmr"), ("asmr", "normal"), ("normal", "normal"), ("asmr", "asmr"))


@dataclass(frozen=True)
class Sound:
    """One sound of the demo: a bundled clip, or what was made from it.

    Attributes:
        name: for files.
        voice: title of the voice.
        label: "normal clip", "ASMR clip", or the task.
        caption: one line.
        text, language: what is said.
        wav: [W] float32 at the synthesizer's rate.
        is_clip: True for a bundled clip.
        similarity: cosine to the clip by the model's own speaker encoder; None for clips.
        timings: seconds per stage; empty for clips.
        notes: sentences about what was changed or guessed; empty for clips.
    """

    name: str
    voice: str
    label: str
    caption: str
    text: str
    language: str
    wav: np.ndarray
    is_clip: bool
    similarity: float | None = None
    timings: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def make(
    synthesizer: Synthesizer, seed: int = 0, progress: Callable[[str], None] | None = None
) -> list[Sound]:
    """The bundled clips, then what was made from them, voice by voice.

    Reads `demo/demo.json` in the model folder: {"voices": [{"voice", "language", "clips": {"normal":
    {"file", "text"}, "asmr": {...}}, "sentences": [...]}]}.

    Args:
        synthesizer: the model, whose folder holds the clips.
        seed: of every request.
        progress: called with a short sentence before each stage.

    Raises:
        ValueError: if the model folder has no demo clips, demo.json is damaged, or a clip or a sound made from it
            cannot be used; the message names the file or the sound.
    """
    path = synthesizer.folder / "demo" / "demo.json"
    if not path.exists():
        raise ValueError(
            f"the model in {synthesizer.folder} brings no demo clips ({path} is missing); use `deepasmr say`"
        )
    try:
        sounds, asked = _read(path, synthesizer.sample_rate, seed)
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ValueError(f"{path} is damaged ({type(e).__name__}: {e}); fetch the model again") from e
    made = synthesizer.batch([request for *_, request in asked], progress)
    for (name, title, request), result in zip(asked, made, strict=True):
        if isinstance(result, Failure):
            raise ValueError(f"{name}: {result.error}")
        caption = f"from the {_WORDS[request.voice_style]} clip to {_WORDS[request.style]} speech"
        try:
            similarity = _similarity(synthesizer, request.voice, result.audio)
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None
        sounds.append(
            Sound(
                name, title, result.task, caption, request.text, result.language, result.audio, False,
                similarity, result.timings, result.notes,
            )
        )  # fmt: skip
    return sounds


def _read(path: Path, sample_rate: int, seed: int) -> tuple[list[Sound], list[tuple[str, str, Request]]]:
    """The clips of demo.json, and (name, voice, request) of each sound to be made from them."""
    sounds, asked = [], []
    for number, voice in enumerate(json.loads(path.read_text("utf-8"))["voices"], 1):
        language, title, clips = voice["language"], voice["voice"], voice["clips"]
        stem = f"{language}{number}"
        for style, label in _LABELS.items():
            wav = audio.load(path.parent / clips[style]["file"], sample_rate)
            name, text = f"{stem}_clip_{style}", clips[style]["text"]
            sounds.append(Sound(name, title, label, "given", text, language, wav, True))
        for source, target in _TASKS:
            for i, text in enumerate(voice["sentences"], 1):
                request = Request(
                    text=text, voice=path.parent / clips[source]["file"], style=target, voice_style=source,
                    voice_text=clips[source]["text"] if source == target else None, language=language, seed=seed,
                )  # fmt: skip
                asked.append((f"{stem}_{source[0]}2{target[0]}_{i}", title, request))
    return sounds, asked


def _similarity(synthesizer: Synthesizer, clip: Path, wav: np.ndarray) -> float:
    """Cosine of the speaker embeddings of a clip and of what was made."""
    a = synthesizer.read_clip(clip, voice_style="normal").embedding
    b = synthesizer.read_clip(wav, synthesizer.sample_rate, voice_style="normal").embedding
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
