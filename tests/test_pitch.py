"""Pitch of synthetic voices and noise, and pulse trains: level, spectrum, padding, long rows."""

import jax
import jax.numpy as jnp
import numpy as np

from deepasmr_jax import audio, pitch

RATE, MEL = 16000, audio.mel_profile("mini")
TRACK = jax.jit(pitch.track, static_argnums=1)
PULSES = jax.jit(pitch.pulses, static_argnums=(2, 3))


def voice(hz: np.ndarray) -> np.ndarray:
    """[W] harmonics with falling level of a frequency per sample."""
    phase = 2 * np.pi * np.cumsum(hz) / RATE
    return 0.1 * sum(np.cos(k * phase) / k for k in range(1, 20))


def test_a_gliding_voice_is_tracked_and_noise_is_not_voiced():
    hz = 150 + 60 * np.sin(2 * np.pi * 1.5 * np.arange(2 * RATE) / RATE)
    noise = 0.1 * np.random.default_rng(0).standard_normal(2 * RATE)
    found, voiced = TRACK(np.stack([voice(hz), noise]).astype(np.float32), MEL)
    assert found.shape == voiced.shape == (2, 100)
    middles = np.arange(100) * MEL.hop_samples + MEL.hop_samples // 2
    np.testing.assert_allclose(found[0, 2:-2], hz[middles[2:-2]], rtol=0.02)
    assert np.all(voiced[0, 2:-2]) and np.mean(voiced[1]) < 0.1


def test_silence_before_and_after_a_voice_is_unvoiced():
    wav = np.zeros((1, RATE), np.float32)
    wav[0, 6400:9600] = voice(np.full(3200, 200.0))
    _, voiced = TRACK(wav, MEL)
    assert np.all(voiced[0, 21:29]) and not np.any(voiced[0, :18]) and not np.any(voiced[0, 32:])


def test_pulses_have_unit_power_at_harmonics_only_and_are_silent_without_voice():
    hz = np.full((2, 50), 125.0, np.float32)
    out = np.asarray(PULSES(hz, np.array([[1.0], [0.0]]) * np.ones(50), 320, RATE))
    assert out.shape == (2, RATE) and not out[1].any()
    assert abs(np.mean(out[0] ** 2) - 1) < 0.02
    power = np.abs(np.fft.rfft(out[0])) ** 2  # bins of 1 Hz
    assert power[125::125].sum() > 0.99 * power.sum()
    assert power[125:8000:125].min() > 0.2 * power[125:8000:125].max()  # flat up to the Nyquist frequency


def test_pulses_of_a_row_do_not_depend_on_its_padding():
    rng = np.random.default_rng(1)
    hz, voiced = rng.uniform(80, 300, (1, 20)).astype(np.float32), rng.random((1, 20)) > 0.3
    alone = np.asarray(PULSES(hz, voiced, 320, RATE))
    padded = PULSES(
        np.pad(hz, ((0, 0), (0, 9)), constant_values=400),
        np.pad(voiced, ((0, 0), (0, 9)), constant_values=True),
        320, RATE, np.arange(29)[None] < 20,
    )  # fmt: skip
    np.testing.assert_allclose(padded[:, : 20 * 320], alone, atol=1e-5)
    assert not np.asarray(padded)[:, 20 * 320 :].any()


def test_the_phase_stays_exact_over_a_minute():
    hz = jnp.full((1, 3000), 101.3, jnp.float32)
    out = np.asarray(PULSES(hz, jnp.ones((1, 3000)), 320, RATE))[0]
    exact = np.mod(np.arange(1, len(out) + 1) * 101.3 / RATE, 1.0)
    near = np.minimum(exact, 1 - exact) < 101.3 / RATE / 2  # the sample nearest to each pulse
    assert np.mean(out[near]) > 0.6 * out.max() and np.mean(out[~near] ** 2) < 0.35


def test_a_voice_does_not_start_in_a_glide():
    hz = np.array([[400.0] * 5 + [100.0] * 10 + [400.0] * 5], np.float32)
    voiced = np.array([[0] * 5 + [1] * 10 + [0] * 5], bool)
    out = np.asarray(PULSES(hz, voiced, 320, RATE))[0]
    peaks = np.flatnonzero((out[1:-1] > out[:-2]) & (out[1:-1] > out[2:]) & (out[1:-1] > 3.0))
    np.testing.assert_allclose(np.diff(peaks), 160, atol=1)
