"""Pools that a tiny model of random weights makes: its entries, what is refused, the same seed the same pool."""

import dataclasses

import numpy as np
import pytest
import tiny_model

from deepasmr_jax import audio, pool, pool_building


def test_the_pool_can_be_built_by_our_own_synthesis(tmp_path):
    made = tiny_model.synthesizer()
    recordings = []
    for name, wav, style in (
        ("low", tiny_model.buzz(f0_hz=90.0), "normal"),
        ("high", tiny_model.buzz(f0_hz=230.0), "normal"),
        ("whisper", tiny_model.hiss(), "asmr"),
    ):
        audio.save(tmp_path / f"{name}.wav", wav, tiny_model.RATE)
        recordings.append(pool.Recording(name, tmp_path / f"{name}.wav", "Good night.", style, "en"))
    built = pool_building.build(made, recordings, seed=5)
    assert [(e.name, e.style, e.is_real) for e in built] == [
        ("low", "normal", True),
        ("high", "normal", True),
        ("low_asmr", "asmr", False),
        ("high_asmr", "asmr", False),
    ]
    assert all(len(e.mel) == 2 * len(e.speech_tokens) and e.mel.dtype == np.float16 for e in built)
    assert tiny_model.plain(built) == tiny_model.plain(pool_building.build(made, recordings, seed=5))
    real = pool_building.build(made, recordings, synthesize_asmr=False)
    assert [e.name for e in real] == ["low", "high", "whisper"] and all(e.is_real for e in real)
    with pytest.raises(ValueError, match="found 0 normal"):
        pool_building.build(made, recordings[2:])
    second = dataclasses.replace(recordings[2], name="second")
    with pytest.raises(ValueError, match="'whisper' and 'second' are both of 'en': leave one of them out"):
        pool_building.build(made, [*recordings, second])
