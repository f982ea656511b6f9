"""The user's clip before any model hears it: style, trimming, level, and what is noted."""

import json

import numpy as np
import pytest
import tiny_model

from deepasmr_jax import clip, request


def test_the_style_of_a_clip_is_told_from_its_periodicity():
    rng = np.random.default_rng(0)
    for f0 in (80, 120, 220, 330):
        wav = tiny_model.buzz(f0_hz=float(f0))
        assert clip.voiced_share(wav, 16000) > 0.9
        noisy = wav + 0.02 * rng.standard_normal(len(wav))  # about 15 dB below
        assert clip.voiced_share(noisy, 16000) > 0.8
    for seed in range(3):
        assert clip.voiced_share(tiny_model.hiss(seed=seed), 16000) < 0.15
        assert clip.voiced_share(1e-3 * tiny_model.hiss(seed=seed), 16000) < 0.15
    mixed = np.concatenate([tiny_model.buzz(1.0), tiny_model.hiss(1.0)])
    assert 0.3 < clip.voiced_share(mixed, 16000) < 0.7


def test_the_style_of_speech_is_told_without_a_doubt():
    folder = request.BUILT_IN / "demo"
    for voice in json.loads((folder / "demo.json").read_text("utf-8"))["voices"]:
        for style, given in voice["clips"].items():
            notes = []
            assert clip.read(folder / given["file"], None, 16000, notes=notes).style == style
            assert notes == []


def test_outer_silence_is_trimmed_and_long_speech_is_cut_at_a_quiet_place():
    wav = np.concatenate([np.zeros(16000), tiny_model.buzz(3.0), np.zeros(32000)]).astype(np.float32)
    trimmed, was_cut = clip._trim(wav, 16000)
    assert not was_cut and 3.0 <= len(trimmed) / 16000 <= 3.3
    long = tiny_model.buzz(14.0)
    long[int(8.2 * 16000) : int(8.4 * 16000)] *= 0.01
    trimmed, was_cut = clip._trim(long, 16000)
    assert was_cut and 8.15 <= len(trimmed) / 16000 <= 8.45


def test_a_transcript_fits_a_clip_of_which_no_speech_was_cut_off():
    notes = []
    excerpt = clip.read(tiny_model.buzz(), tiny_model.RATE, tiny_model.RATE, notes=notes)
    assert excerpt.is_whole and excerpt.style == "normal" and excerpt.gain == 1.0 and not notes
    excerpt = clip.read(tiny_model.buzz(14.0), tiny_model.RATE, tiny_model.RATE, style="asmr", notes=notes)
    assert not excerpt.is_whole and excerpt.style == "asmr" and "s are used" in notes[-1]
    assert len(excerpt.wav) <= clip.MAX_DURATION_S * tiny_model.RATE


def test_a_rate_that_is_given_with_a_file_is_refused_by_its_own_name(tmp_path):
    with pytest.raises(ValueError, match="voice_rate 16000 was given with the file .*a.wav; leave it out"):
        clip.read(tmp_path / "a.wav", 16000, 16000, notes=[])


def test_a_guess_of_the_style_says_how_to_give_it_on_the_command_line_and_in_python():
    notes = []
    for share in (0.1, 0.2, 0.3, 0.4, 0.5):
        mixed = np.concatenate([tiny_model.buzz(2 * share), tiny_model.hiss(2 - 2 * share)])
        clip.read(mixed, 16000, 16000, notes=notes)
    assert any("say which with --voice-style or voice_style" in note for note in notes)


def test_a_clip_whose_level_does_not_move_is_used_with_a_warning():
    rng, notes = np.random.default_rng(0), []
    noise = rng.normal(size=32000).astype(np.float32) * 0.1
    clip.read(noise, 16000, 16000, style="normal", notes=notes)
    assert any("nobody's voice" in note for note in notes)
    notes.clear()
    syllables = noise * (np.sin(2 * np.pi * 4 * np.arange(32000) / 16000) > -0.3)
    clip.read(syllables, 16000, 16000, style="normal", notes=notes)
    assert not notes


def test_the_gain_brings_a_clip_to_the_level_of_its_style_only_if_it_is_far_from_it():
    wav, notes = tiny_model.buzz(), []
    level = clip.level_db(wav)
    gain_of = lambda **levels: clip.read(wav, 16000, 16000, levels_db=levels, notes=notes).gain
    assert gain_of(normal=level + 5.0) == 1.0 and gain_of(asmr=level + 20.0) == 1.0 and not notes
    assert gain_of(normal=level + 20.0) == pytest.approx(10.0, rel=0.01) and "20 dB quieter" in notes[-1]
