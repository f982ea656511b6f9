"""Pools that a tiny model of random weights makes: its entries, what is refused, the same seed the same pool."""

import dataclasses

import numpy as np
import pytest
import tiny_model

from deepasmr_jax import audio, pool, pool_building


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Two normal voices and a whisper, all in English."""
    folder, made = tmp_path_factory.mktemp("recordings"), []
    for name, wav, text, style in (
        ("low", tiny_model.buzz(f0_hz=90.0), "Good night.", "normal"),
        ("high", tiny_model.buzz(f0_hz=230.0), "1 2 3", "normal"),
        ("whisper", tiny_model.hiss(), "Good night.", "asmr"),
    ):
        audio.save(folder / f"{name}.wav", wav, tiny_model.RATE)
        made.append(pool.Recording(name, folder / f"{name}.wav", text, style, "en"))
    return made


def test_the_pool_can_be_built_by_our_own_synthesis(recordings):
    made = tiny_model.synthesizer()
    built = pool_building.build(made, recordings, seed=5)
    assert [(e.name, e.style, e.is_real) for e in built] == [
        ("low", "normal", True),
        ("high", "normal", True),
        ("low_asmr", "asmr", False),
        ("high_asmr", "asmr", False),
    ]
    assert all(len(e.mel) == 2 * len(e.speech_tokens) and e.mel.dtype == np.float16 for e in built)
    assert tiny_model.plain(built) == tiny_model.plain(pool_building.build(made, recordings, seed=5))


def test_recordings_of_both_styles_are_a_pool_as_they_are(recordings):
    built = pool_building.build(tiny_model.synthesizer(), recordings, synthesize_asmr=False)
    assert [e.name for e in built] == ["low", "high", "whisper"] and all(e.is_real for e in built)


def test_a_transcript_of_digits_is_of_the_language_that_is_given(recordings):
    digits = dataclasses.replace(recordings[1], language="zh")
    entry = pool_building.hear(tiny_model.synthesizer(), digits)
    assert (entry.transcript, entry.language) == ("1 2 3", "zh")


def test_a_pool_needs_a_normal_voice_and_one_whisper_of_a_language(recordings):
    made = tiny_model.synthesizer()
    with pytest.raises(ValueError, match="found 0 normal"):
        pool_building.build(made, recordings[2:])
    second = dataclasses.replace(recordings[2], name="second")
    with pytest.raises(ValueError, match="'whisper' and 'second' are both of 'en': leave one of them out"):
        pool_building.build(made, [*recordings, second])
