"""The HiFT vocoder against PyTorch and float64, its phases, masks, mesh and public names."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fill import fill, values

from deepasmr_jax import checkpoint, public_cosyvoice2, public_names, sharding, vocoder_hift

GOLDEN = Path(__file__).parent / "golden" / "vocoder_hift.npz"
TINY = vocoder_hift.Config(initial_channels=32, f0_width=16)
SMALL = dataclasses.replace(  # the same kinds of layers, fewer to compile
    TINY, residual_kernels=(3, 11), residual_dilations=((5,), (1, 3)), source_dilations=((1,), (3,), (5,))
)


def filled(cfg: vocoder_hift.Config, seed: int) -> vocoder_hift.Generator:
    """The weights of `fill`, with F0 and loudness of a voice; nothing is drawn or compiled."""
    shapes = jax.eval_shape(lambda: vocoder_hift.init(cfg, jax.random.key(0)))
    model = fill(sharding.replicate(jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)), seed)
    head, last = model.f0_predictor.head, model.last
    head.kernel[...], head.bias[...] = 100 * head.kernel[...], head.bias[...] + 120.0
    model.source_mix.kernel[...] = 3 * model.source_mix.kernel[...]
    last.kernel[...], last.bias[...] = 0.3 * last.kernel[...], last.bias[...] - 2.0
    return model


def drawn(num_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """mel [1, T, 80] and noise [1, 9, T * 480]."""
    rng = np.random.default_rng(0)
    mel = rng.standard_normal((1, num_frames, 80)).astype(np.float32)
    return mel, rng.standard_normal((1, 9, num_frames * 480)).astype(np.float32)


def shapes_of(cfg: vocoder_hift.Config) -> dict[str, tuple[int, ...]]:
    module = jax.eval_shape(lambda: vocoder_hift.init(cfg, jax.random.key(0)))
    return {name: x.shape for name, x in checkpoint.named_arrays(module).items()}


def stored_shapes(width: int = 512, f0_width: int = 512) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the public hift.pt, or of one of other widths."""
    out = {}

    def plain(name: str, *shape: int) -> None:
        out[f"{name}.weight"] = shape

    def normed(name: str, *shape: int) -> None:
        out[f"{name}.parametrizations.weight.original0"] = (shape[0], 1, 1)
        out[f"{name}.parametrizations.weight.original1"] = shape

    for i in range(5):
        normed(f"f0_predictor.condnet.{2 * i}", f0_width, f0_width if i else 80, 3)
        out[f"f0_predictor.condnet.{2 * i}.bias"] = (f0_width,)
    plain("f0_predictor.classifier", 1, f0_width)
    plain("m_source.l_linear", 1, 9)
    out["f0_predictor.classifier.bias"] = out["m_source.l_linear.bias"] = (1,)
    normed("conv_pre", width, 80, 7)
    normed("conv_post", 18, width // 8, 7)
    out["conv_pre.bias"], out["conv_post.bias"] = (width,), (18,)
    for i, (kernel, down, source) in enumerate(((16, 30, 7), (11, 6, 7), (7, 1, 11))):
        channels = width // 2 ** (i + 1)
        normed(f"ups.{i}", 2 * channels, channels, kernel)
        plain(f"source_downs.{i}", channels, 18, down)
        out[f"ups.{i}.bias"] = out[f"source_downs.{i}.bias"] = (channels,)
        blocks = [(f"resblocks.{3 * i + j}", size) for j, size in enumerate((3, 7, 11))]
        for block, size in [(f"source_resblocks.{i}", source), *blocks]:
            for half in (1, 2):
                for d in range(3):
                    normed(f"{block}.convs{half}.{d}", channels, channels, size)
                    out[f"{block}.convs{half}.{d}.bias"] = (channels,)
                    out[f"{block}.activations{half}.{d}.alpha"] = (channels,)
    return out


def folded_shapes(*widths: int) -> dict[str, tuple[int, ...]]:
    """`stored_shapes` after weight norm was folded, as the table expects them."""
    direction, gain = (f".parametrizations.weight.original{i}" for i in (1, 0))
    stored = stored_shapes(*widths)
    return {
        name.replace(direction, ".weight"): shape for name, shape in stored.items() if not name.endswith(gain)
    }


def public_weights(cfg: vocoder_hift.Config, seed: int) -> dict[str, np.ndarray]:
    """Random weights by public name, folded, with F0 and loudness of a voice."""
    out = {}
    for name, shape in folded_shapes(cfg.initial_channels, cfg.f0_width).items():
        x = values(name, shape, seed)
        if name.endswith("weight"):  # from the fan-in of `values` to that of PyTorch's order
            x = values(name, shape[::-1], seed).reshape(shape)
        out[name] = x
    out["f0_predictor.classifier.weight"] *= 100
    out["f0_predictor.classifier.bias"] += 120
    out["m_source.l_linear.weight"] *= 3
    out["conv_post.weight"] *= 0.2
    out["conv_post.bias"] -= 2
    return out


def named(cfg: vocoder_hift.Config, seed: int) -> vocoder_hift.Generator:
    """The module with `public_weights`, read through the table of names."""
    abstract = checkpoint.abstract(lambda: vocoder_hift.init(cfg, jax.random.key(0)))
    weights = public_names.to_ours(
        public_cosyvoice2.hift(cfg), public_weights(cfg, seed), shapes_of(cfg), "test"
    )
    return checkpoint.fill(abstract, dict(weights), "test")


def exact_sines(hz: np.ndarray) -> np.ndarray:
    """F0 [T] to the nine sines [9, T * 480] in float64."""
    steps = hz.astype(np.float64) * np.arange(1, 10)[:, None] / 24000 % 1
    places = (np.arange(len(hz) * 480) + 0.5) / 480 - 0.5
    turns = np.stack([np.interp(places, np.arange(len(hz)), 480 * np.cumsum(s)) for s in steps])
    return np.sin(2 * np.pi * turns)


# ------------------------------------------------------------------------------------------------ numbers


def test_every_layer_group_equals_the_reference():
    golden = np.load(GOLDEN)
    mel, noise = drawn(3)
    ours = jax.jit(vocoder_hift.layers, static_argnums=1)(named(TINY, 1), TINY, mel, None, noise)
    assert set(ours) == set(golden)
    assert ours["wav"].shape == (1, 3 * 480) and ours["stage_2"].shape == (1, 3 * 120 + 1, 4)
    assert np.min(golden["f0"]) > 80 and np.std(golden["wav"]) > 0.005 and np.std(golden["source"]) > 0.1
    # float32 against float64: the sine of a phase carries its rounding on, and how much differs from CPU to CPU
    for name, want in golden.items():
        near = {"phase": 3e-4, "wav": 1e-3}.get(name, 1e-4)
        np.testing.assert_allclose(ours[name], want, atol=near * np.max(np.abs(want)), err_msg=name)
    f0 = vocoder_hift.f0(named(TINY, 1), TINY, mel)
    np.testing.assert_allclose(f0, golden["f0"], rtol=1e-6)


def test_phases_are_exact_after_thirty_seconds():
    t = np.arange(1500)
    glide = 150 + 60 * np.sin(t / 40) + np.random.default_rng(0).standard_normal(1500)
    steady = np.where(t < 700, 123.456, 377.7)
    odd = np.where(t % 100 < 5, 3500.0, np.where(t % 7 < 2, 0.0, 99.9))  # a sine above the rate; no pitch
    hz = np.stack([glide, steady, odd]).astype(np.float32)
    ours = np.asarray(jax.jit(vocoder_hift.sines, static_argnums=0)(TINY, hz))
    for row, track in zip(ours, hz, strict=True):
        # one sum in float32 is off by 0.06 and more; what is left here is rounding within one frame
        np.testing.assert_allclose(row, exact_sines(track), atol=3e-4)


def test_source_is_a_voice_only_above_ten_hertz():
    hz = np.array([[9.9, 10.1, 200, 0, 0, 300.5]], np.float32)
    model, (_, noise) = filled(TINY, 1), drawn(6)
    source = vocoder_hift.excitation(model, TINY, hz, noise)
    voiced = np.repeat(hz[0] > 10, 480)
    tones = np.where(voiced, 0.1 * exact_sines(hz[0]) + 0.003 * noise[0], 0.1 / 3 * noise[0])
    want = np.tanh(np.asarray(model.source_mix.kernel[:, 0]) @ tones + np.asarray(model.source_mix.bias[0]))
    np.testing.assert_allclose(source[0], want, atol=1e-5)


def test_an_unvoiced_source_has_no_period_although_f0_is_predicted():
    model, (mel, _) = filled(SMALL, 1), drawn(20)
    head = model.f0_predictor.head
    head.kernel[...], head.bias[...] = 0 * head.kernel[...], jnp.full(1, 200.0)

    def run(cfg: vocoder_hift.Config) -> tuple[float, dict]:
        """How much of the source repeats after 5 ms, and all layers."""
        out = jax.jit(vocoder_hift.layers, static_argnums=1)(model, cfg, mel)
        np.testing.assert_allclose(out["f0"], 200.0)
        x = np.asarray(out["source"][0, 480:-480])  # whole periods of 120 samples
        x = x - np.mean(x)
        return float(np.mean(x[120:] * x[:-120]) / np.mean(x**2)), out

    unvoiced = dataclasses.replace(SMALL, source="unvoiced")
    assert run(SMALL)[0] > 0.9
    period, out = run(unvoiced)
    assert abs(period) < 0.05 and np.std(out["source"]) > 0.01 and np.std(out["wav"]) > 1e-3
    noise = vocoder_hift.draw_noise(unvoiced, 20)
    for hz in (90.0, 0.0):  # whatever the predictor says
        source = vocoder_hift.excitation(model, unvoiced, jnp.full((1, 20), hz), noise)
        np.testing.assert_allclose(source, out["source"], atol=1e-6)


def test_inverse_of_the_short_spectrum_is_the_signal_itself():
    wav = np.random.default_rng(2).standard_normal((2, 4 * 480)).astype(np.float32)
    lengths = np.array([4, 2])
    spectrum = np.asarray(vocoder_hift.analyse(TINY, wav, lengths))
    assert spectrum.shape == (2, 4 * 120 + 1, 18) and not spectrum[1, 2 * 120 + 1 :].any()
    parts = spectrum[..., :9] + 1j * spectrum[..., 9:]
    back = vocoder_hift.synthesize(TINY, np.abs(parts), np.angle(parts), lengths)
    np.testing.assert_allclose(back[0], wav[0], atol=1e-5)
    np.testing.assert_allclose(back[1, : 2 * 480], wav[1, : 2 * 480], atol=1e-5)


# ---------------------------------------------------------------------------------------- batches, noise


def test_a_padded_row_equals_the_row_alone_and_is_silent_after_its_end():
    model = filled(SMALL, 2)
    mel = np.random.default_rng(0).standard_normal((4, 6, 80)).astype(np.float32)
    lengths = np.array([6, 3, 1, 0])
    run = jax.jit(vocoder_hift.layers, static_argnums=1)
    out = {name: np.asarray(x) for name, x in run(model, SMALL, mel, lengths).items()}
    for i, n in enumerate(lengths[:3]):
        alone = run(model, SMALL, mel[i : i + 1, :n])
        for name in ("f0", "source", "source_stft", "stage_0", "stage_1", "stage_2", "wav"):
            size = alone[name].shape[1]
            # another program rounds F0 another way, phases with it, and the exponential of the head enlarges it
            tolerance = 3e-4 * np.max(np.abs(alone[name]))
            np.testing.assert_allclose(out[name][i, :size], alone[name][0], atol=tolerance, err_msg=name)
        assert np.std(alone["wav"]) > 1e-3
    for i, n in enumerate(lengths):
        assert not out["wav"][i, n * 480 :].any() and not out["f0"][i, n:].any()


def test_noise_is_fixed_by_the_place_of_a_sample_unless_a_key_is_given():
    short, long = vocoder_hift.draw_noise(SMALL, 2), vocoder_hift.draw_noise(SMALL, 5)
    np.testing.assert_array_equal(short, long[..., : 2 * 480])
    assert abs(np.std(long) - 1) < 0.02 and abs(np.mean(long[0, 0] * long[0, 1])) < 0.06
    assert not np.array_equal(long[..., :480], long[..., 480:960])
    model, mel = filled(SMALL, 1), drawn(2)[0]

    @jax.jit
    def source(noise=None, key=None):
        return vocoder_hift.layers(model, SMALL, mel, None, noise, key)["source"]

    np.testing.assert_array_equal(source(), source(noise=short))
    assert np.max(np.abs(source() - source(key=jax.random.key(7)))) > 1e-3


def test_waveforms_do_not_depend_on_the_mesh():
    mel = np.random.default_rng(1).standard_normal((8, 3, 80)).astype(np.float32)
    batch = {"mel": mel, "lengths": np.array([3, 2, 1, 3, 3, 2, 1, 3], np.int32)}
    results = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        sharding.make_mesh(*sizes)
        inputs = sharding.put(batch)
        wav = jax.jit(vocoder_hift.apply, static_argnums=1)(filled(SMALL, 3), SMALL, *inputs.values())
        assert wav.sharding.spec[0] == jax.typeof(inputs["mel"]).sharding.spec[0]
        results.append(jax.device_get(jax.block_until_ready(wav)))
    assert np.std(results[0]) > 1e-3
    np.testing.assert_allclose(results[1], results[0], atol=3e-4 * np.max(np.abs(results[0])))  # as above


# ------------------------------------------------------------------------------------------ public names


def zeros(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Arrays of these shapes that take no memory."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def total(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(int(np.prod(shape)) for shape in shapes.values())


def test_every_public_tensor_at_true_size_has_its_parameter():
    cfg = vocoder_hift.cosyvoice2()
    stored, folded, ours = stored_shapes(), folded_shapes(), shapes_of(cfg)
    assert len(stored) == 328 and total(stored) == 20_821_295
    assert total(folded) == total(ours) == 20_806_557
    table = public_cosyvoice2.hift(cfg)
    assert public_names.differences(table, zeros(folded), ours) == ""
    arrays = dict(public_names.to_ours(table, zeros(folded), ours, "hift.pt"))
    assert {name: x.shape for name, x in arrays.items()} == ours
    assert {name: x.shape for name, x in public_names.to_theirs(table, arrays).items()} == folded


def test_a_file_with_weight_norm_gives_the_folded_weights_back():
    table, ours = public_cosyvoice2.hift(TINY), shapes_of(TINY)
    model = checkpoint.named_arrays(jax.device_get(filled(TINY, 1)))
    normed = {name.removesuffix(".parametrizations.weight.original1") for name in stored_shapes()}
    stored, rng = {}, np.random.default_rng(0)
    for name, x in public_names.to_theirs(table, model).items():
        if (stem := name.removesuffix(".weight")) in normed and name != stem:
            axes = (1, 2)  # for `ups` too, whose first axis is the input
            stored[f"generator.{stem}.parametrizations.weight.original0"] = np.sqrt(
                np.sum(x**2, axes, keepdims=True)
            )
            scale = rng.uniform(0.5, 2, (len(x), 1, 1)).astype(np.float32)
            stored[f"generator.{stem}.parametrizations.weight.original1"] = x * scale
        else:
            stored[f"generator.{name}"] = x
    assert {name.removeprefix("generator.") for name in stored} == set(stored_shapes())
    read = dict(public_names.to_ours(table, public_cosyvoice2.hift_tensors(stored), ours, "hift.pt"))
    for name, x in model.items():
        np.testing.assert_allclose(read[name], x, rtol=1e-5, atol=1e-7, err_msg=name)


def test_one_error_names_all_missing_unexpected_and_reshaped_tensors():
    cfg = vocoder_hift.cosyvoice2()
    file = zeros(folded_shapes())
    del file["resblocks.4.activations2.1.alpha"]
    file["resblocks.9.convs1.0.bias"] = np.zeros(64, np.float32)
    file["ups.1.weight"] = np.broadcast_to(np.float32(0), (128, 256, 11))
    with pytest.raises(ValueError) as caught:
        public_names.to_ours(public_cosyvoice2.hift(cfg), file, shapes_of(cfg), "hift.pt")
    for part in (
        "1 missing (resblocks.4.activations2.1.alpha)",
        "1 unexpected (resblocks.9.convs1.0.bias)",
        "1 reshaped (ups.1.weight (128, 256, 11) instead of (256, 128, 11))",
    ):
        assert part in str(caught.value)


def test_wrong_configurations_and_inputs_are_refused_with_their_numbers():
    for changes, part in (
        ({"mel_profile": "hifigan"}, "multiply to 480"),
        ({"source": "whispered"}, "'whispered'"),
        ({"upsample_kernels": (15, 11, 7)}, "kernel 15"),
        ({"n_fft": 20}, "n_fft 20"),
        ({"source_kernels": (7, 7)}, "2 source_kernels"),
        ({"residual_kernels": (3, 7)}, "3 lists"),
        ({"initial_channels": 100}, "multiple of 8"),
        ({"dtype": "float16"}, "float16"),
    ):
        with pytest.raises(ValueError, match=part):
            dataclasses.replace(TINY, **changes)
    with pytest.raises(ValueError, match=r"\(1, 4, 100\)"):
        vocoder_hift.apply(filled(TINY, 1), TINY, jnp.zeros((1, 4, 100)))
