"""Results: how the chunks of a long text become one sound, without clicks and without digital silence."""

import numpy as np
import pytest

from deepasmr_jax import results


def test_joined_chunks_fade_to_the_pause_and_keep_their_outer_edges():
    joined = results.join_chunks([np.ones(1000, np.float32)] * 3, 16000, 0.1)
    assert len(joined) == 3000 + 2 * 1600 and joined[0] == 1 and joined[-1] == 1
    assert joined[999] == 0 and joined[1000 + 1600] == 0 and np.abs(np.diff(joined)).max() < 0.1


def test_a_pause_has_the_level_and_colour_of_the_quietest_part_of_the_speech_before_it():
    rng = np.random.default_rng(0)
    noise = np.convolve(rng.normal(size=64000), 0.9 ** np.arange(60), "same")  # more at low frequencies
    weak = np.arange(64000) % 16000 < 4000  # a quarter is 40 dB down
    wav = (noise * np.where(weak, 1e-3, 1e-1)).astype(np.float32)
    tone = results._room_tone(wav, 16000)(64000, seed=1)
    colour = lambda x: np.corrcoef(x[1:], x[:-1])[0, 1]
    assert tone.dtype == np.float32 and tone.shape == (64000,)
    assert 0.7 < np.std(tone) / (1e-3 * np.std(noise)) < 1.1
    assert colour(tone) == pytest.approx(colour(noise), abs=0.05)
    parts = np.std(tone.reshape(-1, 1600), axis=1)
    assert 0.6 < parts.min() / parts.max()
    # without a pause in it: 30 dB below
    steady = results._room_tone(noise.astype(np.float32), 16000)(16000, seed=1)
    assert np.std(steady) == pytest.approx(10**-1.5 * np.std(noise), rel=0.2)
    assert not results._room_tone(np.zeros(100, np.float32), 16000)(500, seed=1).any()
    assert not results._room_tone(np.zeros(2000, np.float32), 16000)(500, seed=1).any()
