"""A complete model folder with random weights, small enough to be made and run in seconds, for the tests."""

import atexit
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path

import fill
import jax
import numpy as np

from deepasmr_jax import (
    audio,
    checkpoint,
    flow,
    lm,
    pool,
    sharding,
    speaker,
    speech_tokenizer,
    text,
    vocoder_istft,
)

RATE = 16000


@functools.cache
def shared() -> Path:
    """The one tiny model folder of a test run; tests only read it."""
    root = Path(tempfile.mkdtemp(prefix="deepasmr_tiny_"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return make(root / "tiny")


@functools.cache
def synthesizer():
    """The one synthesizer of the shared folder, so that its programs are compiled once."""
    from deepasmr_jax import synthesis

    return synthesis.load(shared())


def make(folder: Path) -> Path:
    """Writes all five components, a pool of two entries per style and language, and demo clips."""
    os.environ["DEEPASMR_CACHE"] = "off"  # tests leave nothing in the user's home
    sharding.ensure_mesh()
    configs = {
        "speech_tokenizer": (
            speech_tokenizer,
            speech_tokenizer.Config(width=32, num_heads=2, num_blocks=1, mlp_width=32),
        ),
        "speaker": (speaker, speaker_config()),
        "lm": (
            lm,
            lm.mini(
                text.MiniTokenizer().vocab_size,
                width=32,
                num_layers=2,
                num_heads=2,
                num_kv_heads=1,
                head_dim=16,
                mlp_width=32,
            ),
        ),
        "flow": (
            flow,
            flow.Config(
                width=32,
                num_layers=2,
                num_heads=2,
                head_dim=16,
                token_width=16,
                conv_groups=4,
                mel_mean=-6.0,
                mel_std=2.0,
                dtype="float32",
            ),
        ),
        "vocoder": (vocoder_istft, vocoder_istft.Config(width=16, mlp_width=32, num_layers=2)),
    }
    top = {
        "mel_profile": "mini",
        "sample_rate": RATE,
        "sampling": {"lm": {"min_ratio": 1.0, "max_ratio": 3.0}, "flow": {"num_steps": 4, "guidance": 0.5}},
        "text": {"tokenizer": "mini"},
        "provenance": {"data": "none: random weights for tests"},
    }
    for name, (module, cfg) in configs.items():
        # shapes only, then numbers from NumPy: nothing has to be compiled
        shapes = jax.eval_shape(functools.partial(module.init, cfg), jax.random.key(0))
        weights = jax.tree_util.tree_map_with_path(
            lambda path, x: fill.values(fill.path_name(path), x.shape, 0).astype(x.dtype), shapes
        )
        checkpoint.export_component(folder, name, weights, cfg, **top)
    make_pool().save(folder / "pool.safetensors")
    make_demo(folder / "demo")
    return folder


def speaker_config():
    """The smallest speaker encoder."""
    return speaker.Config(base_channels=2, repeats=(1, 1, 1, 1), embedding_size=16)


def make_pool(embedding: int = 16) -> pool.Pool:
    """Two entries of each style and language, random but fixed."""
    rng = np.random.default_rng(0)
    words = {"en": "the rain is soft tonight", "zh": "今晚的雨声很轻"}
    entries = [
        pool.Entry(
            name=f"{language}_{style}_{i}",
            style=style,
            language=language,
            transcript=words[language],
            speech_tokens=rng.integers(0, 6561, 30 + 5 * i).astype(np.int32),
            mel=rng.standard_normal((2 * (30 + 5 * i), 80)).astype(np.float16),
            speaker_embedding=rng.standard_normal(embedding).astype(np.float32),
            provenance={"kind": "synthesis"},
        )
        for language in ("en", "zh")
        for style in ("normal", "asmr")
        for i in range(2)
    ]
    return pool.Pool(tuple(entries), "mini", "tiny")


def plain(p: pool.Pool) -> tuple:
    """All facts and arrays of a pool in a form that == compares."""

    def value(v):
        return (str(v.dtype), v.tolist()) if isinstance(v, np.ndarray) else v

    return p.mel_profile, p.speaker_model, [{k: value(v) for k, v in vars(e).items()} for e in p]


def make_demo(folder: Path) -> None:
    """A voice per language, each with a buzzing and a hissing clip."""
    folder.mkdir(parents=True)
    voices = []
    for language, sentence in (("en", "Good night."), ("zh", "晚安。")):
        clips = {}
        for style, wav in (("normal", buzz()), ("asmr", hiss())):
            name = f"{language}_{style}.wav"
            audio.save(folder / name, wav, RATE)
            clips[style] = {"file": name, "text": sentence}
        voices.append(
            {"voice": f"test voice {language}", "language": language, "clips": clips, "sentences": [sentence]}
        )
    (folder / "demo.json").write_text(json.dumps({"voices": voices}, ensure_ascii=False), "utf-8")


def buzz(seconds: float = 2.0, rate: int = RATE, f0_hz: float = 120.0) -> np.ndarray:
    """[W] a pulse-like harmonic tone with a slow rhythm: periodic like a vowel."""
    t = np.arange(int(seconds * rate)) / rate
    phase = 2 * np.pi * np.cumsum(f0_hz * (1 + 0.1 * np.sin(2 * np.pi * 0.7 * t))) / rate
    tone = sum(np.sin(k * phase) / k for k in range(1, int(rate / 2 / f0_hz / 1.2)))
    return (0.2 * tone * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * t))).astype(np.float32)


def hiss(seconds: float = 2.0, rate: int = RATE, seed: int = 1) -> np.ndarray:
    """[W] noise through two broad resonances with a slow rhythm: like whispered vowels."""
    from scipy.signal import lfilter

    rng = np.random.default_rng(seed)
    x = rng.standard_normal(int(seconds * rate))
    y = np.zeros_like(x)
    for hz, width_hz in ((700, 150), (1800, 250)):
        r, w = np.exp(-np.pi * width_hz / rate), 2 * np.pi * hz / rate
        y += lfilter([1 - r], [1, -2 * r * np.cos(w), r * r], x)
    t = np.arange(len(x)) / rate
    y *= 0.6 + 0.4 * np.sin(2 * np.pi * 3 * t)
    return (0.1 * y / np.abs(y).max()).astype(np.float32)
