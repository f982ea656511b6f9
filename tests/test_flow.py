"""Flow decoder: numbers against the E2 TTS network, masks, meshes, solver, loss, sampling."""

import dataclasses
import functools
from pathlib import Path

import fill
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepasmr_jax import flow, sharding

MESHES = [(1, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2)]
TINY = flow.Config(
    mel_bins=6,
    mel_mean=-2.0,
    mel_std=1.5,
    num_codes=20,
    token_width=16,
    width=32,
    num_layers=4,
    num_heads=4,
    head_dim=8,
    conv_kernel=5,
    conv_groups=4,
    dtype="float32",
)
PATCHED = dataclasses.replace(TINY, patch_frames=2)


def make(cfg, seed=0):
    return fill.fill(jax.jit(flow.init, static_argnums=0)(cfg, jax.random.key(0)), seed)


def make_batch(cfg, num_rows=8, num_tokens=12, seed=0):
    rng = np.random.default_rng(seed)
    length = flow.num_frames(cfg, num_tokens)
    return {
        "speech_tokens": rng.integers(0, cfg.num_codes, (num_rows, num_tokens)).astype(np.int32),
        "num_tokens": rng.integers(num_tokens // 2, num_tokens + 1, num_rows).astype(np.int32),
        "mel": rng.standard_normal((num_rows, length, cfg.mel_bins)).astype(np.float32),
        "prompt_frames": np.array([0, 4] * (num_rows // 2), np.int32),
    }


def run_loss(model, cfg, batch, seed=1):
    total, count, aux = jax.jit(flow.loss, static_argnums=1)(model, cfg, batch, jax.random.key(seed))
    return np.asarray(total), float(count), aux


def run_sample(model, cfg, batch, keys, **settings):
    settings = {"num_steps": 3, "guidance": 1.5} | settings
    mel = flow.sample(
        model,
        cfg,
        batch["speech_tokens"],
        batch["num_tokens"],
        batch["mel"],
        batch["prompt_frames"],
        keys,
        **settings,
    )
    return np.asarray(mel)


@functools.partial(jax.jit, static_argnames="cfg")
def golden_forward(model, cfg, inputs):
    mask = jnp.ones_like(inputs["tokens"], bool)
    tokens = flow.embed_tokens(model, cfg, inputs["tokens"], mask)
    time = model.embed_time(inputs["t"])
    x = model.embed_input(inputs["x"], inputs["condition"], tokens, mask)
    stream = jnp.concatenate([time[:, None], x], axis=1)
    longer = jnp.ones_like(stream[..., 0], bool)
    half, _ = jax.lax.scan(lambda x, layer: (layer(x, longer, cfg), None), stream, model.down)
    return {
        "time": time,
        "input": x,
        "half": half,
        "layers": model.layers(stream, longer, cfg),
        "velocity": model(inputs["x"], inputs["condition"], tokens, inputs["t"], mask, cfg),
    }


def test_every_layer_group_equals_the_e2_tts_network():
    golden = np.load(Path(__file__).parent / "golden" / "flow.npz")
    for name, heads in (("one_head", 1), ("all_heads", None)):
        cfg = flow.e2tts_base(
            mel_bins=8,
            num_codes=20,
            token_width=6,
            width=32,
            num_layers=4,
            num_heads=4,
            head_dim=8,
            rotary_heads=heads,
            dtype="float32",
        )
        got = golden_forward(
            make(cfg, seed=3), cfg, {k: golden[k] for k in ("x", "condition", "tokens", "t")}
        )
        for part in ("time", "input", "half", "layers", "velocity"):
            # time and input come before the attention and are stored once
            want = golden[f"{name}.{part}" if f"{name}.{part}" in golden else f"one_head.{part}"]
            np.testing.assert_allclose(got[part], want, atol=5e-5, err_msg=f"{name} {part}")


def test_the_two_golden_velocities_differ():
    golden = np.load(Path(__file__).parent / "golden" / "flow.npz")
    assert np.abs(golden["one_head.velocity"] - golden["all_heads.velocity"]).max() > 1e-3


@pytest.mark.parametrize("cfg", [TINY, PATCHED], ids=["frames", "patches"])
def test_a_batch_gives_the_mel_of_its_rows_alone(cfg):
    model, batch = make(cfg), make_batch(cfg, num_rows=4)
    keys = jax.random.split(jax.random.key(5), 4)
    together = run_sample(model, cfg, batch, keys)
    for row in range(4):
        alone = run_sample(model, cfg, {k: v[row : row + 1] for k, v in batch.items()}, keys[row : row + 1])
        np.testing.assert_allclose(together[row], alone[0], atol=1e-4)


@pytest.mark.parametrize(
    "cfg", [TINY, PATCHED, dataclasses.replace(PATCHED, frames_per_token=(15, 4))], ids=["1", "2", "f5"]
)
def test_padding_changes_no_valid_frame(cfg):
    model, batch = make(cfg), make_batch(cfg, num_rows=2, num_tokens=12)
    batch["num_tokens"] = np.array([7, 7], np.int32)
    keys = jax.random.split(jax.random.key(5), 2)
    length = flow.num_frames(cfg, 7)
    cut = batch | {"speech_tokens": batch["speech_tokens"][:, :7], "mel": batch["mel"][:, :length]}
    padded = run_sample(model, cfg, batch, keys)
    np.testing.assert_allclose(padded[:, :length], run_sample(model, cfg, cut, keys), atol=1e-4)
    assert not padded[:, length:].any()


def test_rows_with_other_keys_differ():
    model, batch = make(TINY), make_batch(TINY, num_rows=2)
    batch = {k: np.repeat(v[:1], 2, axis=0) for k, v in batch.items()}
    mel = run_sample(model, TINY, batch, jax.random.split(jax.random.key(0)))
    assert np.abs(mel[0] - mel[1]).max() > 0.1


def test_loss_gradients_and_samples_are_the_same_on_every_mesh():
    cfg = dataclasses.replace(PATCHED, dropout=0.1)
    batch = make_batch(cfg)
    results = []
    for shape in MESHES:
        sharding.make_mesh(*shape)
        model, rows = make(cfg), sharding.put(batch)

        def mean(model, rows, cfg=cfg):
            total, count, _ = flow.loss(model, cfg, rows, jax.random.key(1))
            return total / count

        value, grads = jax.block_until_ready(jax.jit(jax.value_and_grad(mean))(model, rows))
        mel = run_sample(model, cfg, rows, jax.random.split(jax.random.key(3), 8), num_steps=2)
        results.append((np.asarray(value), jax.tree.map(np.asarray, grads), mel))
    for value, grads, mel in results[1:]:
        np.testing.assert_allclose(value, results[0][0], rtol=1e-5)
        np.testing.assert_allclose(mel, results[0][2], atol=1e-4)
        for path, got in jax.tree_util.tree_leaves_with_path(grads):
            want = dict(jax.tree_util.tree_leaves_with_path(results[0][1]))[path]
            # sums over rows in another order: rounding relative to the largest entry
            np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max() + 1e-7, err_msg=str(path))


def test_every_weight_gets_a_gradient():
    batch = make_batch(PATCHED)
    grads = jax.jit(jax.grad(lambda m: flow.loss(m, PATCHED, batch, jax.random.key(1))[0]))(make(PATCHED))
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all() and np.abs(grad).max() > 0, path


def test_recomputing_layers_changes_no_gradient():
    batch = make_batch(TINY)
    model = make(TINY)

    def grads(cfg):
        return jax.jit(jax.grad(lambda m: flow.loss(m, cfg, batch, jax.random.key(1))[0]))(model)

    want = jax.tree.leaves(grads(TINY))
    for got, value in zip(jax.tree.leaves(grads(dataclasses.replace(TINY, remat="full"))), want, strict=True):
        np.testing.assert_allclose(got, value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", MESHES)
def test_grouped_convolution_has_the_gradient_of_a_dense_one(shape):
    sharding.make_mesh(*shape)
    rng = np.random.default_rng(0)
    x = sharding.put({"x": rng.standard_normal((8, 11, 16)).astype(np.float32)})["x"]
    kernel = sharding.replicate(rng.standard_normal((5, 4, 16)).astype(np.float32))

    def dense(x, kernel):  # the groups as blocks of a full kernel
        blocks = jnp.eye(4)[:, None, :, None] * kernel.reshape(5, 1, 4, 4, 4)
        full = blocks.reshape(5, 16, 16)
        return jax.lax.conv_general_dilated(x, full, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    def run(f):
        value = lambda x, kernel: jnp.sum(jnp.sin(f(x, kernel)))
        return jax.block_until_ready(jax.jit(jax.grad(value, argnums=(0, 1)))(x, kernel))

    for got, want in zip(run(lambda x, k: flow.grouped_conv(x, k, 4)), run(dense), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2)])
def test_solver_meets_the_closed_form_of_a_linear_field_at_its_order(method, order):
    # dx/dt = -2 x + t has x(1) = (x0 + 1/4) e^-2 + 1/4
    exact = 1.25 * np.exp(-2.0) + 0.25
    errors = []
    for num_steps in (8, 16, 32):
        x = flow.integrate(
            lambda x, t: -2 * x + t, jnp.ones(()), flow.time_grid(num_steps, "uniform"), method
        )
        errors.append(abs(float(x) - exact))
    rates = np.log2(np.array(errors[:-1]) / errors[1:])
    assert errors[-1] > 1e-5  # still far above float32 rounding
    np.testing.assert_allclose(rates, order, atol=0.15)


def test_solver_is_exact_on_a_straight_path_at_any_schedule():
    for schedule in ("uniform", "cosine", "pruned", 0.5):
        x = flow.integrate(lambda x, t: jnp.full_like(x, 3.0), jnp.ones(4), flow.time_grid(10, schedule))
        np.testing.assert_allclose(x, 4.0, rtol=1e-6)


def test_schedules_are_the_published_formulas():
    t = np.linspace(0, 1, 33)
    np.testing.assert_allclose(flow.time_grid(32, "cosine"), 1 - np.cos(np.pi / 2 * t), atol=1e-7)
    np.testing.assert_allclose(flow.time_grid(32, "uniform"), t, atol=1e-7)
    np.testing.assert_array_equal(flow.time_grid(32, -1.0), flow.time_grid(32, "cosine"))
    np.testing.assert_allclose(flow.time_grid(2, 0.4)[1], 0.5 + 0.4 * (np.cos(np.pi / 4) - 0.5), atol=1e-7)
    fine = flow.time_grid(32, "cosine")
    np.testing.assert_allclose(flow.time_grid(5, "pruned"), fine[[0, 2, 4, 8, 16, 32]], atol=1e-7)
    for num_steps in flow.PRUNED_STEPS:
        grid = flow.time_grid(num_steps, "pruned")
        assert len(grid) == num_steps + 1 and grid[0] == 0 and grid[-1] == 1 and (np.diff(grid) > 0).all()


@pytest.mark.parametrize(
    ("num_steps", "schedule", "found"),
    [(0, "cosine", "0"), (9, "pruned", "9"), (4, "linear", "linear"), (4, -1.5, "-1.5"), (4, 2.0, "2.0")],
)
def test_a_schedule_that_cannot_be_is_refused_with_its_value(num_steps, schedule, found):
    with pytest.raises(ValueError, match=found):
        flow.time_grid(num_steps, schedule)


def test_guidance_zero_is_the_conditional_path_alone():
    model, batch = make(TINY), make_batch(TINY, num_rows=2)
    keys = jax.random.split(jax.random.key(5), 2)
    both_branches = run_sample(model, TINY, batch, keys, guidance=jnp.float32(0))
    np.testing.assert_allclose(run_sample(model, TINY, batch, keys, guidance=0.0), both_branches, atol=1e-5)
    assert np.abs(run_sample(model, TINY, batch, keys, guidance=2.0) - both_branches).max() > 1e-3


def test_guidance_moves_away_from_the_model_without_tokens_and_prompt():
    # in one Euler step the mel is linear in w, and at w = -1 only the unconditional branch is left
    model, batch = make(TINY), make_batch(TINY, num_rows=2)
    keys = jax.random.split(jax.random.key(5), 2)
    at = {w: run_sample(model, TINY, batch, keys, guidance=w, num_steps=1) for w in (-1.0, 0.0, 2.0)}
    np.testing.assert_allclose(at[2.0], at[0.0] + 2 * (at[0.0] - at[-1.0]), atol=1e-4)
    other = batch | {
        "speech_tokens": (batch["speech_tokens"] + 1) % 20,
        "prompt_frames": 0 * batch["prompt_frames"],
    }
    null = run_sample(model, TINY, other, keys, guidance=-1.0, num_steps=1)
    np.testing.assert_allclose(null, at[-1.0], atol=1e-5)
    assert np.abs(run_sample(model, TINY, other, keys, guidance=0.0, num_steps=1) - at[0.0]).max() > 1e-2


def test_midpoint_and_euler_agree_for_many_steps():
    model, batch = make(TINY), make_batch(TINY, num_rows=2)
    keys = jax.random.split(jax.random.key(5), 2)
    fine = run_sample(model, TINY, batch, keys, num_steps=128, method="midpoint")
    np.testing.assert_allclose(run_sample(model, TINY, batch, keys, num_steps=256), fine, atol=0.05)


@pytest.mark.parametrize(
    ("rate", "want"),
    [
        ((2, 1), [0, 0, 1, 1, 2, 2, 3, 3]),
        ((441, 128), [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3]),
        ((15, 4), [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]),
    ],
    ids=["50 Hz", "86.13 Hz", "93.75 Hz"],
)
def test_each_frame_takes_the_token_it_falls_into(rate, want):
    cfg = dataclasses.replace(TINY, frames_per_token=rate)
    assert flow.num_frames(cfg, 4) == len(want)
    np.testing.assert_array_equal(flow.token_index(cfg, 4), want)
    frames = np.arange(flow.num_frames(cfg, 1000))
    hz = 25 * rate[0] / rate[1]
    np.testing.assert_array_equal(flow.token_index(cfg, 1000), np.floor(frames * 25 / hz + 1e-9))


def test_patches_take_the_token_of_their_first_frame():
    np.testing.assert_array_equal(flow.token_index(PATCHED, 5), np.arange(5))


def test_a_prompted_row_pays_for_every_frame_after_the_prompt():
    batch = make_batch(TINY)
    batch["prompt_frames"][:] = 4
    _, count, aux = run_loss(make(TINY), TINY, batch)
    assert count == ((2 * batch["num_tokens"] - 4) * TINY.mel_bins).sum()
    assert float(aux["prompt_mse"][1]) == count and float(aux["infill_mse"][1]) == 0


def test_an_infilling_span_covers_70_to_100_percent():
    batch = make_batch(TINY, num_rows=2, num_tokens=50)
    batch["prompt_frames"][:] = 0
    batch["num_tokens"] = np.array([50, 0], np.int32)  # an empty row costs nothing
    model = make(TINY)
    fractions = [run_loss(model, TINY, batch, seed)[1] / (100 * TINY.mel_bins) for seed in range(40)]
    assert 0.69 <= min(fractions) < 0.8 and 0.9 < max(fractions) <= 1.0


def test_the_loss_does_not_read_padding():
    model, batch = make(TINY), make_batch(TINY)
    batch["num_tokens"][:] = 9
    other = {k: v.copy() for k, v in batch.items()}
    other["mel"][:, 18:] = 50.0
    other["speech_tokens"][:, 9:] = 3
    np.testing.assert_allclose(run_loss(model, TINY, batch)[0], run_loss(model, TINY, other)[0], rtol=1e-6)


def test_the_loss_of_a_zero_velocity_is_the_variance_of_the_target():
    # at initialisation the velocity is 0; the target is data - (1 - sigma_min) noise, the two independent
    cfg = dataclasses.replace(TINY, sigma_min=0.5)
    batch = make_batch(cfg, num_rows=8, num_tokens=60)
    batch["mel"] = batch["mel"] * cfg.mel_std * 2 + cfg.mel_mean
    model = jax.jit(flow.init, static_argnums=0)(cfg, jax.random.key(0))
    total, count, _ = run_loss(model, cfg, batch)
    np.testing.assert_allclose(total / count, 4 + 0.25, rtol=0.05)  # 4,000 values: about 2 % noise


def test_rows_that_lose_tokens_and_prompt_do_not_see_them():
    batch = make_batch(TINY)
    batch["prompt_frames"][:] = 4
    other = batch | {"speech_tokens": (batch["speech_tokens"] + 1) % TINY.num_codes}
    model = make(TINY)
    for drop, tokens_matter in ((0.0, True), (1.0, False)):
        cfg = dataclasses.replace(TINY, drop_both=drop, drop_audio=0.0)
        change = abs(run_loss(model, cfg, batch)[0] - run_loss(model, cfg, other)[0])
        assert (change > 1e-2) == tokens_matter


def test_dropping_the_audio_condition_changes_the_loss_and_keeps_the_count():
    batch, model = make_batch(TINY), make(TINY)
    keep, drop = (
        run_loss(model, dataclasses.replace(TINY, drop_both=0.0, drop_audio=p), batch) for p in (0.0, 1.0)
    )
    assert keep[1] == drop[1] and abs(keep[0] - drop[0]) > 1e-2


def test_a_tiny_decoder_overfits_one_batch():
    cfg = dataclasses.replace(PATCHED, drop_audio=0.0, drop_both=0.0, width=64, num_layers=2)
    batch = make_batch(cfg, num_rows=4, num_tokens=8)
    batch["prompt_frames"][:] = 4
    batch["mel"] = batch["mel"] * cfg.mel_std + cfg.mel_mean
    model = jax.jit(flow.init, static_argnums=0)(cfg, jax.random.key(0))
    tx = optax.adam(optax.cosine_decay_schedule(4e-3, 400))

    @jax.jit
    def train(model, opt_state, keys):
        def step(state, key):
            def mean(model):
                total, count, _ = flow.loss(model, cfg, batch, key)
                return total / count

            model, opt_state = state
            value, grads = jax.value_and_grad(mean)(model)
            updates, opt_state = tx.update(grads, opt_state, model)
            return (optax.apply_updates(model, updates), opt_state), value

        return jax.lax.scan(step, (model, opt_state), keys)

    (model, _), losses = train(model, tx.init(model), jax.random.split(jax.random.key(1), 400))
    assert float(losses[:5].mean()) > 1.5  # data and noise of variance 1 each
    assert float(losses[-20:].mean()) < 0.35
    mel = run_sample(model, cfg, batch, jax.random.split(jax.random.key(2), 4), num_steps=16, guidance=0.0)
    valid = np.arange(16)[None] < 2 * batch["num_tokens"][:, None]
    valid[:, :4] = False
    error = np.square(mel - batch["mel"])[valid].mean() / cfg.mel_std**2
    assert error < 0.25  # 2 for an unrelated mel


@pytest.mark.parametrize(
    ("cfg", "total"),
    [(flow.e2tts_base(), 333_470_444), (flow.deepasmr(), 336_0), (flow.mini(), 6_511_008)],
    ids=["e2tts_base", "deepasmr", "mini"],
)
def test_presets_have_the_published_number_of_weights(cfg, total):
    model = jax.eval_shape(lambda key: flow.init(cfg, key), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(model)) == total


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 5},
        {"conv_groups": 5},
        {"conv_kernel": 4},
        {"head_dim": 7},
        {"frames_per_token": (2,)},
        {"patch_frames": 0},
        {"mel_std": 0.0},
        {"drop_both": 1.2},
        {"remat": "all"},
    ],
)
def test_a_config_that_cannot_work_is_refused_with_its_value(changes):
    (name, value), *_ = changes.items()
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(TINY, **changes)


def test_a_mel_of_another_length_is_refused():
    model, batch = make(TINY), make_batch(TINY, num_rows=2)
    short = batch | {"mel": batch["mel"][:, :-1]}
    with pytest.raises(ValueError, match="24"):
        flow.loss(model, TINY, short, jax.random.key(0))
    with pytest.raises(ValueError, match="24"):
        run_sample(model, TINY, short, jax.random.split(jax.random.key(0)))
    with pytest.raises(ValueError, match="heun"):
        run_sample(model, TINY, batch, jax.random.split(jax.random.key(0)), method="heun")


def test_query_and_key_norms_make_the_scale_of_queries_irrelevant():
    cfg = dataclasses.replace(TINY, qk_norm=True)
    model, batch = make(cfg), make_batch(cfg)
    before = run_loss(model, cfg, batch)[0]
    for linear in (model.down.attention.query, model.up.attention.query):
        linear.kernel[...] = 3 * linear.kernel[...]
        linear.bias[...] = 3 * linear.bias[...]
    np.testing.assert_allclose(run_loss(model, cfg, batch)[0], before, rtol=1e-4)
