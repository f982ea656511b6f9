"""Front-ends against librosa, Kaldi and plain NumPy; resampling against its formula; what `load` refuses."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from deepasmr_jax import audio, sharding

GOLDEN = Path(__file__).parent / "golden"


def clip(num_samples: int, seed: int = 0, rate: int = 16000) -> np.ndarray:
    """Synthetic clip: a chirp, noise and a quiet end."""
    t = np.arange(num_samples) / rate
    noise = 0.02 * np.random.default_rng(seed).standard_normal(num_samples)
    wav = 0.3 * np.sin(2 * np.pi * (150 * t + 900 * t**2)) + noise
    return (wav * np.where(t < 0.7 * t[-1], 1.0, 0.003)).astype(np.float32)


# ---------------------------------------------------------------- mel


@pytest.mark.parametrize("name", ["cv2", "hifigan", "mini"])
def test_hifigan_style_mel_equals_librosa_within_float32_rounding(name):
    import librosa

    cfg = audio.MEL_PROFILES[name]
    wav = clip(cfg.sample_rate // 2 + 77, rate=cfg.sample_rate)
    pad = (cfg.n_fft - cfg.hop_samples) // 2
    spectrum = librosa.stft(
        np.pad(wav, pad, mode="reflect"), n_fft=cfg.n_fft, hop_length=cfg.hop_samples, center=False
    )
    bank = librosa.filters.mel(
        sr=cfg.sample_rate, n_fft=cfg.n_fft, n_mels=cfg.num_mels, fmin=cfg.fmin_hz, fmax=cfg.fmax_hz
    )
    want = np.log(np.maximum(bank @ np.sqrt(np.abs(spectrum) ** 2 + 1e-9), 1e-5)).T
    got = np.asarray(jax.jit(audio.log_mel, static_argnums=2)(wav[None], None, cfg))[0]
    assert got.shape == (len(wav) // cfg.hop_samples, cfg.num_mels) == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_vocos_style_mel_equals_librosa_with_htk_bands():
    import librosa

    cfg = audio.MEL_PROFILES["f5"]
    wav = clip(12345, rate=24000)
    magnitude = np.abs(librosa.stft(wav, n_fft=1024, hop_length=256, center=True, pad_mode="reflect"))
    bank = librosa.filters.mel(sr=24000, n_fft=1024, n_mels=100, htk=True, norm=None)
    got = np.asarray(jax.jit(audio.log_mel, static_argnums=2)(wav[None], None, cfg))[0]
    assert got.shape == (12345 // 256 + 1, 100)
    np.testing.assert_allclose(got, np.log(np.maximum(bank @ magnitude, 1e-5)).T, rtol=0, atol=1e-4)


def test_s3_mel_equals_a_float64_transform_written_out():
    import librosa

    wav = clip(5000)
    padded = np.pad(wav.astype(np.float64), 200, mode="reflect")
    n = np.arange(400)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * n / 400)
    matrix = np.exp(-2j * np.pi * np.outer(n, np.arange(201)) / 400)
    frames = np.stack([padded[t * 160 : t * 160 + 400] * window for t in range(5000 // 160)])
    power = np.abs(frames @ matrix) ** 2
    mel = np.log10(np.maximum(power @ librosa.filters.mel(sr=16000, n_fft=400, n_mels=128).T, 1e-10))
    want = (np.maximum(mel, mel.max() - 8.0) + 4.0) / 4.0
    got = np.asarray(jax.jit(audio.s3_log_mel)(wav[None]))[0]
    assert got.shape == (31, 128)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def exact_fbank(wav: np.ndarray, window: str, scale: float) -> np.ndarray:
    """Kaldi's filter bank [T, 80] of one clip in float64, before the mean is removed."""
    n, to_mel = np.arange(400), lambda hz: 1127 * np.log(1 + hz / 700)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * n / 399)
    x = np.stack([wav[t : t + 400] for t in range(0, len(wav) - 399, 160)]).astype(np.float64) * scale
    x -= x.mean(axis=1, keepdims=True)
    x -= 0.97 * np.concatenate([x[:, :1], x[:, :-1]], axis=1)
    power = np.abs(np.fft.rfft(x * (hann**0.85 if window == "povey" else 0.08 + 0.92 * hann), 512)) ** 2
    edges, bins = np.linspace(to_mel(20), to_mel(8000), 82), to_mel(np.arange(256)[:, None] * 31.25)
    rise, fall = (bins - edges[:-2]) / np.diff(edges)[:-1], (edges[2:] - bins) / np.diff(edges)[1:]
    return np.log(np.maximum(power[:, :256] @ np.maximum(0, np.minimum(rise, fall)), 2.0**-23))


@pytest.mark.parametrize("window, scale", [("hamming", 32768.0), ("povey", 1.0)])
def test_filter_bank_equals_kaldi_and_its_formula_in_float64(window, scale):
    golden = np.load(GOLDEN / "fbank.npz")
    got = np.asarray(jax.jit(audio.fbank, static_argnums=(2, 3))(golden["wav"][None], None, window, scale))[0]
    exact = exact_fbank(golden["wav"], window, scale)
    # 70 dB below the loudest band of its frame a value is rounding of the spectrum, on Kaldi's side too
    heard = exact > exact.max(axis=1, keepdims=True) - 7 * np.log(10)
    assert 0.99 < np.mean(heard) < 1
    exact -= exact.mean(axis=0)
    for want in (golden[window], exact):
        assert got.shape == want.shape
        np.testing.assert_allclose(got[heard], want[heard], rtol=0, atol=1e-4)
        np.testing.assert_allclose(got, want, rtol=0, atol=5e-4)
        assert np.mean(np.abs(got - want)) < 1e-5


FRONT_ENDS = {
    "mini": lambda w, n: audio.log_mel(w, n, audio.MEL_PROFILES["mini"]),
    "f5": lambda w, n: audio.log_mel(w, n, audio.MEL_PROFILES["f5"]),
    "s3": audio.s3_log_mel,
    "fbank": audio.fbank,
}


@pytest.mark.parametrize(
    "size, shape", [(1024, (2, 7, 1024)), (400, (1, 33, 400)), (2048, (3, 5, 1024)), (512, (9, 512))]
)
def test_a_transform_in_tiles_is_the_transform_and_so_is_its_gradient(monkeypatch, size, shape):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    back = lambda a, forth: jnp.sum(jnp.abs(forth(a, size)) ** 1.5)
    plain, there = jnp.fft.rfft(x, size), jnp.fft.irfft(jnp.fft.rfft(x, size), size)
    slope = jax.grad(back)(x, lambda a, n: jnp.fft.rfft(a, n))
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert "scan" in str(jax.make_jaxpr(lambda a: audio.rfft(a, size))(x))
    tiled = jax.jit(audio.rfft, static_argnums=1)(x, size)
    np.testing.assert_allclose(tiled, plain, atol=1e-5)
    np.testing.assert_allclose(audio.irfft(tiled, size), there, atol=1e-6)
    np.testing.assert_allclose(jax.grad(back)(x, audio.rfft), slope, rtol=1e-4, atol=1e-4)


def test_a_transform_in_tiles_leaves_rows_where_they_are(monkeypatch):
    sharding.make_mesh()
    x = sharding.put({"x": np.random.default_rng(0).normal(size=(8, 5, 400)).astype(np.float32)})["x"]
    plain = jnp.fft.rfft(x)
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert "scan" in str(jax.make_jaxpr(audio.rfft)(x))
    for tiled in (audio.rfft(x), jax.jit(audio.rfft)(x)):
        assert any(jax.typeof(x).sharding.spec) and jax.typeof(tiled).sharding == jax.typeof(plain).sharding
        np.testing.assert_allclose(tiled, plain, atol=1e-5)


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_a_row_of_a_padded_batch_equals_the_row_alone_and_ends_in_zeros(name):
    front_end = FRONT_ENDS[name]
    lengths = [6000, 4321, 1600]
    wavs = [clip(n, seed=n) for n in lengths]
    batch = np.full((3, 6000), 0.5, np.float32)  # rubbish in the padding
    for row, wav in zip(batch, wavs, strict=True):
        row[: len(wav)] = wav
    got = np.asarray(jax.jit(front_end)(batch, jnp.array(lengths)))
    for i, wav in enumerate(wavs):
        alone = np.asarray(jax.jit(lambda w: front_end(w, None))(wav[None]))[0]
        # the logarithm of nearly empty bands turns rounding of the sums into the fourth decimal
        np.testing.assert_allclose(got[i, : len(alone)], alone, atol=2e-3)
        assert not got[i, len(alone) :].any()


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_front_ends_keep_the_batch_split_on_a_mesh_of_eight_devices(name):
    sharding.make_mesh(2, 4, 1)
    wav = np.stack([clip(3000, seed=i) for i in range(8)])
    batch = sharding.put({"wav": wav, "lengths": np.full(8, 2500, np.int32)})
    got = jax.block_until_ready(jax.jit(FRONT_ENDS[name])(batch["wav"], batch["lengths"]))
    assert got.sharding.spec[0] == ("slice", "data")
    alone = np.asarray(jax.jit(lambda w: FRONT_ENDS[name](w, None))(wav[3:4, :2500]))[0]
    np.testing.assert_allclose(np.asarray(got)[3, : len(alone)], alone, atol=2e-3)


def test_mel_gradient_is_finite_at_digital_silence():
    for name in ("mini", "f5"):
        cfg = audio.MEL_PROFILES[name]
        grad = jax.jit(jax.grad(lambda w, cfg=cfg: jnp.sum(audio.log_mel(w, None, cfg))))(np.zeros((1, 2048)))
        assert np.all(np.isfinite(grad))


def test_too_short_input_is_refused_with_its_length():
    with pytest.raises(ValueError, match="352"):
        audio.log_mel(np.zeros((1, 352), np.float32), None, audio.MEL_PROFILES["mini"])
    with pytest.raises(ValueError, match="399"):
        audio.fbank(np.zeros((1, 399), np.float32))


def test_profiles_have_the_frame_rates_the_models_rely_on():
    rates = {name: cfg.frame_rate for name, cfg in audio.MEL_PROFILES.items()}
    assert rates == {"cv2": 50.0, "hifigan": 22050 / 256, "f5": 93.75, "mini": 50.0}
    with pytest.raises(ValueError, match="8000"):
        audio.MelConfig("bad", 16000, 1024, 1024, 320, 80, 0.0, 8001.0)
    with pytest.raises(ValueError, match="mini"):
        audio.mel_profile("minni")


# ---------------------------------------------------------------- resampling


def resample_by_formula(wav: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """One output sample at a time in float64: the input weighted by the windowed sinc around its place."""
    common = np.gcd(from_rate, to_rate)
    old, new = from_rate // common, to_rate // common
    base = 0.99 * min(old, new)
    reach = int(np.ceil(6 * old / base)) + 1
    out = np.zeros(-(-new * len(wav) // old))
    for m in range(len(out)):
        centre = m * old / new
        k = np.arange(max(0, int(centre) - reach), min(len(wav), int(centre) + reach + 1))
        t = base * (k - centre) / old
        tap = np.where(np.abs(t) < 6, np.sinc(t) * np.cos(np.pi * t / 12) ** 2, 0.0) * base / old
        out[m] = tap @ wav[k]
    return out


@pytest.mark.parametrize(
    "from_rate, to_rate", [(44100, 16000), (48000, 16000), (16000, 24000), (24000, 22050), (16001, 8000)]
)
def test_resampling_equals_the_windowed_sinc_formula(from_rate, to_rate):
    wav = np.random.default_rng(1).standard_normal(2501).astype(np.float32)
    got, want = audio.resample(wav, from_rate, to_rate), resample_by_formula(wav, from_rate, to_rate)
    assert got.dtype == np.float32 and got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=5e-6)


def test_resampling_in_several_chunks_equals_one_chunk():
    wav = np.random.default_rng(2).standard_normal(3_000_000).astype(np.float32)  # over 16 MiB of windows
    long = audio.resample(wav, 48000, 16000)
    start = 400_000  # output samples; the piece begins 100 samples earlier so that its filter is filled
    piece = audio.resample(wav[3 * (start - 100) : 3 * (start + 1000)], 48000, 16000)
    np.testing.assert_allclose(long[start : start + 800], piece[100:900], atol=1e-6)


def test_resampling_keeps_a_tone_and_removes_one_above_the_new_nyquist():
    t = np.arange(48000) / 48000
    low = audio.resample(np.sin(2 * np.pi * 1000 * t).astype(np.float32), 48000, 16000)[1000:15000]
    np.testing.assert_allclose(
        low, np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)[1000:15000], atol=1e-3
    )
    high = audio.resample(np.sin(2 * np.pi * 12000 * t).astype(np.float32), 48000, 16000)[1000:15000]
    assert np.max(np.abs(high)) < 2e-3


# ---------------------------------------------------------------- load and save


def test_saved_audio_is_read_back_exactly_and_leaves_no_temporary_file(tmp_path):
    wav = np.round(clip(8000) * 32768).astype(np.float32) / 32768
    for name in ("a.wav", "folder/b.flac"):
        audio.save(tmp_path / name, wav, 16000)
        np.testing.assert_array_equal(audio.load(tmp_path / name, 16000), wav)
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["a.wav", "b.flac"]


def test_the_sizes_of_tokens_and_frames_agree():
    assert audio.TOKEN_SAMPLES == 640 and audio.S3_FRAMES_PER_TOKEN == 4
    assert audio.S3_FRAMES_PER_TOKEN * audio.S3_HOP_SAMPLES == audio.TOKEN_SAMPLES
    wanted = {"cv2": (2, 1), "hifigan": (441, 128), "f5": (15, 4), "mini": (2, 1)}
    assert {name: p.frames_per_token for name, p in audio.MEL_PROFILES.items()} == wanted


def test_save_clips_loud_samples_and_refuses_unusable_ones(tmp_path):
    wav = clip(4000)
    wav[:10] = 1.7
    audio.save(tmp_path / "loud.wav", wav, 16000)
    assert soundfile.read(tmp_path / "loud.wav", dtype="int16")[0][0] == 32767
    for bad, words in (
        (wav[:0], "shape"),
        (wav[None], "shape"),
        (wav * np.nan, "holds 4000 samples of 4000 that are NaN"),
    ):
        with pytest.raises(ValueError, match=words):
            audio.save(tmp_path / "bad.wav", bad, 16000)
    with pytest.raises(ValueError, match="wav or .flac"):
        audio.save(tmp_path / "bad.txt", wav, 16000)
    assert not list(tmp_path.glob("*bad*"))


@pytest.mark.parametrize("dtype", ["float32", "float64", "int16", "int32", "uint8"])
def test_arrays_of_every_sample_type_mean_the_same_sound(dtype):
    wav = clip(4000)
    if np.dtype(dtype).kind == "f":
        source = wav.astype(dtype)
    elif dtype == "uint8":
        source = np.round(wav * 128 + 128).astype(np.uint8)
    else:
        source = np.round(wav * 2.0 ** (8 * np.dtype(dtype).itemsize - 1)).astype(dtype)
    np.testing.assert_allclose(audio.load(source, 16000), wav, atol=0.005 if dtype == "uint8" else 2e-5)


def test_channels_are_mixed_resampled_and_both_are_noted(tmp_path):
    stereo = np.stack([clip(22050, 0, 44100), clip(22050, 1, 44100)], axis=1)
    soundfile.write(tmp_path / "stereo.wav", stereo, 44100, subtype="FLOAT")
    notes: list[str] = []
    got = audio.load(tmp_path / "stereo.wav", 16000, notes=notes)
    np.testing.assert_allclose(got, audio.resample(stereo.mean(1), 44100, 16000), atol=1e-6)
    assert len(notes) == 2 and "2 channels" in notes[0] and "44100 Hz to 16000 Hz" in notes[1]
    np.testing.assert_array_equal(got, audio.load(stereo.T, 16000, source_rate=44100))


def test_channels_of_opposite_phase_do_not_vanish():
    wav, notes = clip(4000), []
    np.testing.assert_array_equal(audio.load(np.stack([wav, -wav]), 16000, notes=notes), wav)
    assert "cancel" in notes[0]


def test_long_clips_are_cut_and_noted_from_files_and_arrays(tmp_path):
    wav = clip(16000)
    audio.save(tmp_path / "long.wav", wav, 16000)
    for source in (tmp_path / "long.wav", wav):
        notes: list[str] = []
        assert audio.load(source, 16000, max_duration_s=0.4, notes=notes).shape == (6400,)
        assert notes == ["cut from 1.0 s to the first 0.4 s"]


def test_clipped_and_too_large_samples_are_noted_and_scaled():
    notes: list[str] = []
    audio.load(np.clip(clip(4000) * 10, -1, 1), 16000, notes=notes)
    assert len(notes) == 1 and notes[0].startswith("clipped")
    notes = []
    assert np.max(np.abs(audio.load(clip(4000) * 4, 16000, notes=notes))) <= 1.0
    assert "over full scale" in notes[0]
    notes = []
    audio.load(clip(4000), 16000, notes=notes)
    assert notes == []


def test_a_quiet_whisper_keeps_its_level():
    wav = clip(4000) * 0.002
    np.testing.assert_array_equal(audio.load(wav, 16000), wav)


def test_every_kind_of_unusable_clip_is_refused_with_the_value_and_the_way_out(tmp_path):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("this is no audio " * 100)
    soundfile.write(tmp_path / "header.wav", np.zeros(0, np.float32), 16000)
    good = clip(4000)
    hole = good.copy()
    hole[7] = np.nan
    cases = [
        (tmp_path / "nowhere.wav", "does not exist"),
        (str(tmp_path), "folder"),
        (tmp_path / "empty.wav", "0 bytes"),
        (tmp_path / "text.wav", "convert it to wav"),
        (tmp_path / "header.wav", "no samples"),
        (np.zeros(0, np.float32), "no samples"),
        (hole, "1 samples that are NaN"),
        (np.zeros(16000, np.float32), "silent"),
        (good[:800], "0.050 s.*at least 0.1 s"),
        (good * 20000, "divide 16-bit samples by 32768"),
        (np.array(["a"]), "type <U1"),
        (np.zeros((2, 3, 4)), r"\(2, 3, 4\)"),
    ]
    for source, words in cases:
        with pytest.raises(ValueError, match=words):
            audio.load(source, 16000)
    for rate in (0, -5, 16000.5):
        with pytest.raises(ValueError, match="sample rate"):
            audio.load(good, 16000, source_rate=rate)
    with pytest.raises(ValueError, match="source_rate"):
        audio.load(tmp_path / "text.wav", 16000, source_rate=8000)
    with pytest.raises(ValueError, match="at least 3 s"):
        audio.load(good, 16000, min_duration_s=3.0)
