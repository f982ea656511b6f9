"""HiFi-GAN against PyTorch modules written independently, its sizes, masks and training."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fill import fill

from deepasmr_jax import sharding, vocoder

GOLDEN = Path(__file__).parent / "golden" / "vocoder.npz"
PAIRED = vocoder.Config(
    initial_channels=32,
    period_channels=(4, 4, 8, 8, 8),
    scale_channels=(8, 8, 16, 16, 16, 16, 16),
    scale_groups=(1, 4, 4, 8, 8, 8, 1),
)
SINGLE = vocoder.Config(
    initial_channels=16,
    upsample_rates=(8, 8, 4),
    upsample_kernels=(16, 16, 8),
    residual_kernels=(3, 5, 7),
    residual_dilations=((1, 2), (2, 6), (3, 12)),
    is_paired=False,
    adversarial=False,
)
TINY = vocoder.Config(
    initial_channels=16,
    upsample_rates=(16, 16),
    upsample_kernels=(32, 32),
    residual_kernels=(3,),
    residual_dilations=((1, 3),),
    periods=(2,),
    period_channels=(4, 4),
    num_scales=1,
    scale_channels=(4,) * 7,
    scale_groups=(1, 2, 2, 2, 2, 2, 1),
)


def filled(cfg: vocoder.Config, seed: int) -> vocoder.Gan:
    """Both players with the weights of `fill`; nothing is drawn or compiled."""
    shapes = jax.eval_shape(lambda: vocoder.init(cfg, jax.random.key(0)))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    return fill(sharding.replicate(zeros), seed)


def num_parameters(tree) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("name, cfg, seed", [("paired", PAIRED, 1), ("single", SINGLE, 2)])
def test_generator_equals_the_reference(name, cfg, seed):
    golden = np.load(GOLDEN)
    wav = jax.jit(vocoder.apply, static_argnums=1)(filled(cfg, seed).generator, cfg, golden["mel"])
    assert wav.shape == (2, 6 * 256) and np.std(golden[name]) > 0.01
    np.testing.assert_allclose(wav, golden[name], atol=2e-5)


def test_discriminators_and_their_losses_equal_the_reference():
    golden = np.load(GOLDEN)
    judge = jax.jit(lambda d, wav: d(PAIRED, wav))
    model = filled(PAIRED, 1).discriminators
    real, fake = judge(model, golden["real"]), judge(model, golden["fake"])
    assert len(real) == 8
    for i, layers in enumerate(real):
        score = np.moveaxis(np.asarray(layers[-1]), -1, 1)
        np.testing.assert_allclose(score, golden[f"score_{i}"], atol=2e-5)
        levels = [float(jnp.mean(jnp.abs(x))) for x in layers]
        np.testing.assert_allclose(levels, golden[f"level_{i}"], rtol=2e-5)
    rows = jnp.ones(len(golden["real"]))
    np.testing.assert_allclose(vocoder.feature_loss(real, fake, rows), golden["feature"], rtol=2e-5)
    np.testing.assert_allclose(
        vocoder.discriminator_loss(real, fake, rows), golden["discriminator"], rtol=2e-5
    )
    np.testing.assert_allclose(vocoder.adversarial_loss(fake, rows), golden["adversarial"], rtol=2e-5)


@pytest.mark.parametrize("preset, total", [("v1", 13_926_017), ("v2", 925_985), ("v3", 1_462_273)])
def test_full_size_presets_have_the_public_parameter_totals(preset, total):
    cfg = getattr(vocoder, preset)()
    gan = jax.eval_shape(lambda: vocoder.init(cfg, jax.random.key(0)))
    assert num_parameters(gan.generator) == total
    # the public files store one weight-norm gain per output channel; ours are folded
    by_period, by_scale = gan.discriminators.by_period, gan.discriminators.by_scale
    gains = sum(x.shape[0] for x in jax.tree.leaves(by_period) if len(x.shape) == 1)
    assert num_parameters(by_period) + gains == 41_105_770
    gains = sum(x.shape[0] for d in by_scale[1:] for x in jax.tree.leaves(d) if len(x.shape) == 1)
    assert num_parameters(by_scale) + gains == 29_618_821


@pytest.mark.parametrize("cfg", [PAIRED, SINGLE], ids=["paired", "single"])
def test_a_padded_row_equals_the_row_alone_and_is_silent_after_its_end(cfg):
    model = filled(cfg, 3).generator
    mel = np.random.default_rng(0).standard_normal((3, 9, 80)).astype(np.float32)
    lengths = np.array([9, 5, 2])
    run = jax.jit(vocoder.apply, static_argnums=1)
    wav = np.asarray(run(model, cfg, mel, lengths))
    for i, n in enumerate(lengths):
        alone = np.asarray(run(model, cfg, mel[i : i + 1, :n]))[0]
        np.testing.assert_allclose(wav[i, : n * 256], alone, atol=1e-5)
        assert not wav[i, n * 256 :].any()


@pytest.mark.parametrize("cfg", [PAIRED, SINGLE], ids=["paired", "single"])
def test_tiles_of_products_equal_the_convolutions_in_bfloat16(cfg):
    sharding.make_mesh(1, 2, 1)
    block, dilations = filled(cfg, 6).generator.blocks[2], cfg.residual_dilations[2]
    x = np.random.default_rng(1).standard_normal((2, 333, block.convs1[0].kernel.shape[1])).astype(np.float32)
    given = sharding.put({"x": x, "ends": np.int32([333, 150])})
    x, ends = vocoder._keep(given["x"], given["ends"]), given["ends"]
    run = jax.jit(vocoder._residual_tiled, static_argnums=(3, 4))
    for end in (ends, None):  # a tile's margin reaches over its neighbours, the start, and both ends
        whole = np.asarray(vocoder._residual_whole(block, x, end, dilations, "bfloat16"))
        tiled = np.asarray(run(block, x, end, dilations, 100))
        assert np.std(whole - x) > 0.05  # the convolutions count
        # XLA rounds the result of a bfloat16 convolution; a product keeps its float32
        np.testing.assert_allclose(tiled, whole, rtol=0, atol=0.04 * np.std(whole - x))


def test_a_wide_generator_in_bfloat16_takes_tiles_and_has_the_gradient_of_the_convolutions(monkeypatch):
    cfg = dataclasses.replace(TINY, dtype="bfloat16")
    model = filled(cfg, 7).generator
    mel = np.random.default_rng(2).standard_normal((2, 4, 80)).astype(np.float32)
    sums, grads, forms = [], [], []
    tiled = vocoder._residual_tiled
    monkeypatch.setattr(vocoder, "_residual_tiled", lambda *a, **k: forms.append(1) or tiled(*a, **k))
    for channels in (1, 1000):
        monkeypatch.setattr(vocoder, "TILED_CHANNELS", channels)
        run = jax.jit(lambda m: jnp.sum(vocoder.apply(m, cfg, mel) ** 2))
        sums.append(float(run(model)))
        grads.append(jax.tree.leaves(jax.jit(jax.grad(run))(model)))
        assert len(forms) == 2  # both blocks, and only the first time; never for a gradient
    np.testing.assert_allclose(sums[0], sums[1], rtol=1e-2)
    for a, b in zip(*grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 + 1e-3 * np.abs(b).max())


def test_training_overfits_one_batch_with_both_players():
    t = np.arange(4096) / 22050
    wav = np.stack([0.5 * np.sin(2 * np.pi * f * t) for f in (220, 500)]).astype(np.float32)
    model, tx = filled(TINY, 4), optax.adamw(2e-3, b1=0.8, b2=0.99)
    before = jax.tree.map(np.asarray, model.discriminators)
    state = vocoder.init_opt(tx, model)

    @jax.jit
    def step(model, state, i):
        return vocoder.train_step(model, state, tx, TINY, {"wav": wav}, None, i)

    first = None
    for i in range(30):
        model, state, aux = step(model, state, jnp.int32(i))
        first = first or float(aux["mel"][0] / aux["mel"][1])
    norms = {"generator_grad_norm", "discriminators_grad_norm"}
    assert set(aux) == {"loss", "mel", "adversarial", "feature", "discriminator"} | norms
    total, count, _ = jax.jit(vocoder.loss, static_argnums=1)(model, TINY, {"wav": wav})
    assert float(total / count) < 0.5 * TINY.mel_weight * first
    moved = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), before, model.discriminators)
    assert all(x > 0 for x in jax.tree.leaves(moved))


def test_wrong_configurations_and_inputs_are_refused_with_their_numbers():
    with pytest.raises(ValueError, match="320"):
        vocoder.Config(mel_profile="mini")
    with pytest.raises(ValueError, match="kernel 15"):
        vocoder.Config(upsample_kernels=(15, 16, 4, 4))
    with pytest.raises(ValueError, match="multiple of 16"):
        vocoder.Config(initial_channels=100)
    with pytest.raises(ValueError, match="100"):
        vocoder.apply(filled(SINGLE, 1).generator, SINGLE, jnp.zeros((1, 4, 100)))
    with pytest.raises(ValueError, match="768"):
        vocoder.loss(filled(SINGLE, 1), SINGLE, {"wav": jnp.zeros((1, 1000))})
