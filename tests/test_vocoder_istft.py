"""The inverse-STFT vocoder against PyTorch and NumPy, its masks, switches and training."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fill import fill

from deepasmr_jax import audio, sharding, vocoder_istft

GOLDEN = Path(__file__).parent / "golden" / "vocoder_istft.npz"
TINY = vocoder_istft.Config(width=16, mlp_width=48, num_layers=3)
SOURCE = dataclasses.replace(TINY, subframes=2, frame_size=512, source=True)
SPOILT = dataclasses.replace(SOURCE, spoil_probability=0.7, stft_sizes=(512,))
TINY_GAN = vocoder_istft.Config(
    width=16,
    mlp_width=32,
    num_layers=1,
    stft_sizes=(512,),
    adversarial=True,
    periods=(3,),
    period_channels=(4, 4),
    spectrogram_sizes=(256,),
    spectrogram_channels=(4,),
)


def filled(make, cfg: vocoder_istft.Config, seed: int):
    """Module of `make` (init or init_generator) with the weights of `fill`; nothing is drawn or compiled."""
    shapes = jax.eval_shape(lambda: make(cfg, jax.random.key(0)))
    return fill(sharding.replicate(jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)), seed)


def filled_generator(cfg: vocoder_istft.Config, seed: int) -> vocoder_istft.Generator:
    return filled(vocoder_istft.init_generator, cfg, seed)


def buzz() -> np.ndarray:
    """Two synthetic clips [2, 3200] at 16 kHz: harmonics of 200 and 320 Hz with a little noise."""
    t = np.arange(3200) / 16000
    rows = [sum(0.3 / k * np.sin(2 * np.pi * f * k * t) for k in range(1, 8000 // f)) for f in (200, 320)]
    return (np.stack(rows) + 0.01 * np.random.default_rng(0).standard_normal((2, 3200))).astype(np.float32)


def test_generator_equals_the_reference():
    golden = np.load(GOLDEN)
    wav = jax.jit(vocoder_istft.apply, static_argnums=1)(filled_generator(TINY, 1), TINY, golden["mel"])
    assert wav.shape == (2, 9 * 320) and np.std(golden["wav"]) > 0.01
    np.testing.assert_allclose(wav, golden["wav"], atol=2e-5)


def test_pulses_and_noise_through_filters_equal_the_reference():
    golden = np.load(GOLDEN)
    wav = jax.jit(vocoder_istft.apply, static_argnums=1)(filled_generator(SOURCE, 1), SOURCE, golden["mel"])
    assert np.std(golden["source_wav"]) > 0.01 and np.mean(np.abs(golden["source_wav"]) == 1) < 0.01
    # 1e-7 of F0 grows with time and with the number of the harmonic
    np.testing.assert_allclose(wav, golden["source_wav"], atol=1e-3)


@pytest.mark.parametrize("name", ["mini", "cv2", "hifigan", "f5"])
def test_inverse_stft_equals_overlap_add_in_float64(name):
    cfg = audio.MEL_PROFILES[name]
    rng = np.random.default_rng(0)
    num_frames, bins = 7, cfg.n_fft // 2 + 1
    spectrum = rng.standard_normal((2, num_frames, bins)) + 1j * rng.standard_normal((2, num_frames, bins))
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(cfg.n_fft) / cfg.n_fft)
    total = (num_frames - 1) * cfg.hop_samples + cfg.n_fft
    wav, energy = np.zeros((2, total)), np.zeros(total)
    for t in range(num_frames):
        place = slice(t * cfg.hop_samples, t * cfg.hop_samples + cfg.n_fft)
        wav[:, place] += np.fft.irfft(spectrum[:, t], n=cfg.n_fft) * window
        energy[place] += window**2
    start = cfg.pad_samples
    want = (wav / np.maximum(energy, 1e-8))[:, start : start + num_frames * cfg.hop_samples]
    got = vocoder_istft.inverse_stft(jnp.asarray(spectrum, jnp.complex64), cfg)
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_inverse_stft_of_a_clip_gives_the_clip_back():
    cfg = audio.MEL_PROFILES["mini"]
    wav = np.random.default_rng(1).standard_normal(10 * 320).astype(np.float32)
    padded = np.pad(wav, cfg.pad_samples, mode="reflect")
    frames = np.stack([padded[t * 320 : t * 320 + 1024] * audio.hann(1024) for t in range(10)])
    got = vocoder_istft.inverse_stft(jnp.asarray(np.fft.rfft(frames)[None], jnp.complex64), cfg)
    np.testing.assert_allclose(got[0], wav, atol=1e-4)


def test_a_padded_row_equals_the_row_alone_and_is_silent_after_its_end():
    model = filled_generator(TINY, 2)
    mel = np.random.default_rng(0).standard_normal((3, 12, 80)).astype(np.float32)
    lengths = np.array([12, 7, 1])
    run = jax.jit(vocoder_istft.apply, static_argnums=1)
    wav = np.asarray(run(model, TINY, mel, lengths))
    for i, n in enumerate(lengths):
        alone = np.asarray(run(model, TINY, mel[i : i + 1, :n]))[0]
        assert alone.any()
        np.testing.assert_allclose(wav[i, : n * 320], alone, atol=1e-5)
        assert not wav[i, n * 320 :].any()
    np.testing.assert_allclose(run(model, TINY, mel), run(model, TINY, mel, np.full(3, 12)), atol=1e-6)


def test_subframes_lie_evenly_inside_their_mel_frame_and_rows_stay_independent():
    cfg = dataclasses.replace(TINY, subframes=2, frame_size=512)
    assert (cfg.frames.hop_samples, cfg.frames.n_fft, cfg.mel.hop_samples) == (160, 512, 320)
    # centres of the two output frames of mel frame t: t * 320 + 80 and + 240, around the mel's t * 320 + 160
    centres = [i * 160 - cfg.frames.pad_samples + 256 for i in range(4)]
    assert centres == [80, 240, 400, 560]
    model, lengths = filled_generator(cfg, 2), np.array([12, 5])
    mel = np.random.default_rng(0).standard_normal((2, 12, 80)).astype(np.float32)
    run = jax.jit(vocoder_istft.apply, static_argnums=1)
    wav = np.asarray(run(model, cfg, mel, lengths))
    assert wav.shape == (2, 12 * 320) and not wav[1, 5 * 320 :].any()
    alone = np.asarray(run(model, cfg, mel[1:, :5]))[0]
    np.testing.assert_allclose(wav[1, : 5 * 320], alone, atol=1e-5)
    with pytest.raises(ValueError, match="subframes 3 must divide the hop 320"):
        dataclasses.replace(TINY, subframes=3)
    with pytest.raises(ValueError, match="do not overlap by half"):
        dataclasses.replace(TINY, frame_size=512)


def test_a_source_keeps_rows_independent_of_their_padding():
    model, lengths = filled_generator(SOURCE, 2), np.array([12, 5])
    mel = np.random.default_rng(0).standard_normal((2, 12, 80)).astype(np.float32)
    run = jax.jit(vocoder_istft.apply, static_argnums=1)
    wav = np.asarray(run(model, SOURCE, mel, lengths))
    alone = np.asarray(run(model, SOURCE, mel[1:, :5]))[0]
    # a rounding of F0 by 1e-7 grows with time and with the number of the harmonic
    np.testing.assert_allclose(wav[1, : 5 * 320], alone, atol=1e-3)


def set_bias(head, value) -> None:
    """The head says `value` at every frame."""
    head.bias[...] = jnp.broadcast_to(jnp.asarray(value, jnp.float32), head.bias.shape)
    head.kernel[...] = jnp.zeros_like(head.kernel[...])


def harmonic_share(wav: np.ndarray, hz: float) -> float:
    """Share of the power of [W] within 10 Hz of multiples of `hz`."""
    power = np.abs(np.fft.rfft(wav * np.hanning(len(wav)))) ** 2
    away = (np.fft.rfftfreq(len(wav), 1 / 16000) + hz / 2) % hz - hz / 2
    return power[np.abs(away) < 10].sum() / power.sum()


def test_pulses_sound_where_voice_is_predicted_and_noise_everywhere():
    model = filled_generator(SOURCE, 2)
    mel = np.random.default_rng(0).standard_normal((1, 50, 80)).astype(np.float32)
    hz = float(vocoder_istft.pitch_centres(SOURCE)[40])
    bins = np.where(np.arange(81) == 40, 20.0, 0.0)
    num_bins = SOURCE.subframes * 257
    plain = np.zeros((SOURCE.subframes, 2, 257))  # magnitude 1, phase 0
    synthesize = jax.jit(lambda model: vocoder_istft._synthesize(model, SOURCE, mel)[0])

    def run(voiced: bool, noise_db: float, filter_db: float) -> np.ndarray:
        set_bias(model.pitch_head, np.where(np.arange(81) == 80, 1.0 if voiced else -1.0, bins))
        set_bias(model.noise_head, np.full(num_bins, noise_db * np.log(10) / 20))
        values = plain + np.array([filter_db * np.log(10) / 20, 0.0])[:, None]
        set_bias(model.filter_head, values.reshape(-1))
        return np.asarray(synthesize(model))[0]

    pulses, noise = run(True, -200, 0), run(False, 0, 0)
    assert harmonic_share(pulses[1600:-1600], hz) > 0.99
    assert harmonic_share(noise[1600:-1600], hz) < 0.3  # 20 of about 165 Hz
    level = np.sum(audio.hann(512) ** 2) ** -0.5  # of a signal whose frames have a spectrum of magnitude 1
    np.testing.assert_allclose(pulses[1600:-1600].std(), level, rtol=0.1)
    np.testing.assert_allclose(noise[1600:-1600].std(), level, rtol=0.1)
    np.testing.assert_allclose(noise, run(True, 0, -200), atol=1e-4)  # silent pulses leave the noise as it is
    assert np.abs(run(False, -200, 0)).max() < 1e-6


def test_the_training_step_reports_the_loss_it_descends():
    model, tx, batch = filled(vocoder_istft.init, SPOILT, 3), optax.sgd(1e-3), {"wav": buzz()}
    state, key = vocoder_istft.init_opt(tx, model), jax.random.key(2)
    _, _, of_step = jax.jit(lambda m, s: vocoder_istft.train_step(m, s, tx, SPOILT, batch, key, 0))(
        model, state
    )
    total, count, aux = jax.jit(lambda m: vocoder_istft.loss(m, SPOILT, batch, key))(model)
    assert of_step.keys() == aux.keys() | {"generator_grad_norm"}
    assert float(aux["loss"][0] / count) == pytest.approx(float(total / count))
    for name in aux:
        assert float(of_step[name][0]) == pytest.approx(float(aux[name][0]), rel=1e-5)


def test_training_teaches_pitch_and_voicing_from_the_mel():
    cfg = dataclasses.replace(SOURCE, width=32, mlp_width=64, stft_sizes=(512,))
    wav = np.concatenate([buzz(), 0.1 * np.random.default_rng(1).standard_normal((1, 3200))]).astype(
        np.float32
    )
    model, tx = jax.jit(vocoder_istft.init, static_argnums=0)(cfg, jax.random.key(0)), optax.adam(1e-2)
    state = vocoder_istft.init_opt(tx, model)
    step = jax.jit(lambda m, s, i: vocoder_istft.train_step(m, s, tx, cfg, {"wav": wav}, None, i))
    for i in range(60):
        model, state, aux = step(model, state, jnp.int32(i))

    @jax.jit
    def pitch(generator, wav):
        _, logits = vocoder_istft._synthesize(generator, cfg, audio.log_mel(wav, None, cfg.mel))
        return vocoder_istft._decode_pitch(cfg, logits)

    hz, voiced = pitch(model.generator, wav)
    np.testing.assert_allclose(hz[:2, 2:-2], np.array([[200], [320]]) * np.ones(6), rtol=0.03)
    assert np.all(voiced[:2]) and not np.any(voiced[2])
    assert float(aux["pitch"][0] / aux["pitch"][1]) < 0.5


def test_spoilt_mels_keep_their_envelope_and_lose_their_harmonics():
    sharding.make_mesh()
    cfg = dataclasses.replace(vocoder_istft.mini(), spoil_probability=0.75)
    bins = np.arange(80)
    ripple, envelope = np.sin(2 * np.pi * bins / 4), -5 + 2 * np.sin(2 * np.pi * bins / 160)
    mel = sharding.replicate(np.tile(envelope + ripple, (400, 50, 1)).astype(np.float32))
    made = np.asarray(vocoder_istft._spoil(cfg, mel, jax.random.key(0)))
    left = 2 * np.mean((made - envelope) * ripple, axis=(1, 2))  # of a ripple of 1
    rough = np.std(made - made.mean(1, keepdims=True), axis=(1, 2))
    clean = np.all(made == np.asarray(mel), axis=(1, 2))
    np.testing.assert_allclose(clean.mean(), 0.25, atol=0.07)  # three standard errors
    np.testing.assert_allclose(left[~clean].mean(), 0.5, atol=0.06)
    assert 0 < rough[~clean].min() and 0.4 < rough.max() < 0.55
    np.testing.assert_allclose(made.mean((0, 1))[16:64], envelope[16:64] + 0.6 * ripple[16:64], atol=0.1)
    assert vocoder_istft._spoil(cfg, mel, None) is mel


@pytest.mark.parametrize("subframes", [1, 2])
def test_training_from_new_weights_overfits_one_batch(subframes):
    sizes = dict(subframes=subframes, frame_size=1024 // subframes)
    cfg = vocoder_istft.Config(width=32, mlp_width=64, num_layers=3, stft_sizes=(512,), **sizes)
    model, tx, wav = (
        jax.jit(vocoder_istft.init, static_argnums=0)(cfg, jax.random.key(0)),
        optax.adam(5e-3),
        buzz(),
    )
    state = vocoder_istft.init_opt(tx, model)

    @jax.jit
    def step(model, state, i):
        return vocoder_istft.train_step(model, state, tx, cfg, {"wav": wav}, None, i)

    losses = []
    for i in range(120):
        model, state, aux = step(model, state, jnp.int32(i))
        losses.append(float(aux["mel"][0] / aux["mel"][1]))
    assert losses[-1] < 0.1 * losses[0]  # 2.7 at first, about 0.15 after 100 steps


def test_adversarial_step_trains_both_players_only_from_its_start_on():
    cfg, tx = dataclasses.replace(TINY_GAN, adversarial_start_step=1), optax.sgd(1e-2)
    model = filled(vocoder_istft.init, cfg, 3)
    state = vocoder_istft.init_opt(tx, model)
    step = jax.jit(lambda m, s, i: vocoder_istft.train_step(m, s, tx, cfg, {"wav": buzz()}, None, i))
    early, _, aux = step(model, state, jnp.int32(0))
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), model.discriminators, early.discriminators)
    assert all(jax.tree.leaves(same)) and float(aux["discriminator"][0]) == 0.0
    late, _, aux = step(model, state, jnp.int32(1))
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), model.discriminators, late.discriminators)
    assert all(jax.tree.leaves(moved)) and float(aux["discriminator"][0]) > 0.0
    # the generator's gradient has an adversarial part
    differs = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), early.generator, late.generator)
    assert any(jax.tree.leaves(differs))


def test_generator_update_of_the_two_player_step_is_the_gradient_of_the_whole_loss():
    cfg, tx = TINY_GAN, optax.sgd(1.0)
    model, batch = filled(vocoder_istft.init, cfg, 3), {"wav": buzz()}
    got, _, _ = jax.jit(
        lambda m: vocoder_istft.train_step(m, vocoder_istft.init_opt(tx, m), tx, cfg, batch, None, 0)
    )(model)

    def whole(generator):  # least squares and feature matching written out once more
        total, count, _ = vocoder_istft.loss(vocoder_istft.Gan(generator, None), cfg, batch)
        mel = audio.log_mel(batch["wav"], None, cfg.mel)
        fake = got.discriminators(cfg, vocoder_istft._synthesize(generator, cfg, mel)[0])
        real = got.discriminators(cfg, batch["wav"])
        scores = [jnp.mean((f[-1] - 1) ** 2) for f in fake]
        matches = [
            sum(jnp.mean(jnp.abs(a - b)) for a, b in zip(r[:-1], f[:-1], strict=True))
            for r, f in zip(real, fake, strict=True)
        ]
        return (
            total / count + cfg.adversarial_weight * sum(scores) / 2 + cfg.feature_weight * sum(matches) / 2
        )

    grads = jax.jit(jax.grad(whole))(model.generator)
    scale = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(grads))
    for old, g, fresh in zip(*map(jax.tree.leaves, (model.generator, grads, got.generator)), strict=True):
        np.testing.assert_allclose(old - g, fresh, atol=1e-4 * scale)


def test_presets_have_their_stated_sizes():
    def size(cfg):
        model = jax.eval_shape(lambda: vocoder_istft.init_generator(cfg, jax.random.key(0)))
        return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(model))

    assert size(vocoder_istft.mini()) == 1_624_663
    assert size(vocoder_istft.vocos_24khz()) == 13_531_650


def test_wrong_configurations_and_inputs_are_refused_with_their_numbers():
    with pytest.raises(ValueError, match="kernel 6"):
        vocoder_istft.Config(kernel=6)
    with pytest.raises(ValueError, match="100"):
        vocoder_istft.apply(filled_generator(TINY, 1), TINY, jnp.zeros((1, 4, 100)))
    with pytest.raises(ValueError, match="1600"):
        vocoder_istft.loss(filled(vocoder_istft.init, TINY, 1), TINY, {"wav": jnp.zeros((1, 1700))})
