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
from jax.sharding import NamedSharding

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
TRAINED = dataclasses.replace(PATCHED, dropout=0.1)


def make(cfg, seed=0):
    """The decoder filled as by `fill.fill`, without compiling its random initialisation."""

    def one(path, x):
        array = fill.values(fill.path_name(path), x.shape, seed)
        return jax.device_put(array, NamedSharding(jax.sharding.get_mesh(), x.sharding.spec))

    abstract = jax.eval_shape(lambda key: flow.init(cfg, key), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(one, abstract)


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
    settings = {"num_steps": 2, "guidance": 1.5} | settings
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
    x = model.embed_input(inputs["x"], inputs["condition"], tokens, mask, cfg)
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
        inputs = sharding.put({k: golden[k] for k in ("x", "condition", "tokens", "t")})
        got = golden_forward(make(cfg, seed=3), cfg, inputs)
        for part in ("time", "input", "half", "layers", "velocity"):
            # time and input come before the attention and are stored once
            want = golden[f"{name}.{part}" if f"{name}.{part}" in golden else f"one_head.{part}"]
            np.testing.assert_allclose(got[part], want, atol=5e-5, err_msg=f"{name} {part}")


def test_a_batch_gives_the_mel_of_its_rows_alone():
    cfg = PATCHED
    model, batch = make(cfg), make_batch(cfg, num_rows=4)
    keys = jax.random.split(jax.random.key(5), 4)
    together = run_sample(model, cfg, batch, keys)
    for row in range(4):
        alone = run_sample(model, cfg, {k: v[row : row + 1] for k, v in batch.items()}, keys[row : row + 1])
        np.testing.assert_allclose(together[row], alone[0], atol=1e-4)


@pytest.mark.parametrize(
    "cfg", [TINY, dataclasses.replace(PATCHED, frames_per_token=(15, 4))], ids=["50 Hz", "f5 in patches"]
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


def value_and_grads(cfg, shape):
    sharding.make_mesh(*shape)

    def mean(model, rows):
        total, count, _ = flow.loss(model, cfg, rows, jax.random.key(1))
        return total / count

    rows = sharding.put(make_batch(cfg))
    value, grads = jax.block_until_ready(jax.jit(jax.value_and_grad(mean))(make(cfg), rows))
    named = {fill.path_name(p): np.asarray(g) for p, g in jax.tree_util.tree_leaves_with_path(grads)}
    return float(value), named


@pytest.fixture(scope="module")
def one_device():
    """Loss and gradients on the 1x1x1 mesh."""
    return value_and_grads(TRAINED, (1, 1, 1))


def assert_same(got, want):
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for name, grad in want[1].items():
        # sums over rows in another order: rounding relative to the largest entry
        np.testing.assert_allclose(got[1][name], grad, atol=1e-4 * np.abs(grad).max(), err_msg=name)


@pytest.mark.parametrize("shape", MESHES[1:])
def test_loss_and_gradients_are_those_of_one_device_on_every_mesh(one_device, shape):
    assert_same(value_and_grads(TRAINED, shape), one_device)


def test_recomputing_layers_changes_no_gradient(one_device):
    assert_same(value_and_grads(dataclasses.replace(TRAINED, remat="full"), (1, 1, 1)), one_device)


def test_every_weight_gets_a_gradient(one_device):
    for name, grad in one_device[1].items():
        assert np.isfinite(grad).all() and np.abs(grad).max() > 0, name


def test_samples_are_those_of_one_device_on_a_split_mesh():
    mels = []
    for shape in (MESHES[0], MESHES[-1]):
        sharding.make_mesh(*shape)
        keys = jax.random.split(jax.random.key(3), 8)
        mels.append(run_sample(make(PATCHED), PATCHED, sharding.put(make_batch(PATCHED)), keys))
    np.testing.assert_allclose(mels[1], mels[0], atol=1e-4)


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

    def one_step(batch, w):  # an array, so that 0 runs both branches too and one program serves all
        return run_sample(model, TINY, batch, keys, guidance=jnp.float32(w), num_steps=1)

    at = {w: one_step(batch, w) for w in (-1.0, 0.0, 2.0)}
    np.testing.assert_allclose(at[2.0], at[0.0] + 2 * (at[0.0] - at[-1.0]), atol=1e-4)
    other = batch | {
        "speech_tokens": (batch["speech_tokens"] + 1) % 20,
        "prompt_frames": 0 * batch["prompt_frames"],
    }
    np.testing.assert_allclose(one_step(other, -1.0), at[-1.0], atol=1e-5)
    assert np.abs(one_step(other, 0.0) - at[0.0]).max() > 1e-2


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


def test_the_loss_of_a_mel_in_float16_computes_in_float32():
    model, batch = make(TINY), make_batch(TINY)
    half = batch | {"mel": batch["mel"].astype(np.float16)}
    whole = half | {"mel": half["mel"].astype(np.float32)}
    assert run_loss(model, TINY, half)[0] == run_loss(model, TINY, whole)[0]


def test_the_loss_of_a_zero_velocity_is_the_variance_of_the_target():
    # the target is data - (1 - sigma_min) noise, the two independent
    cfg = dataclasses.replace(TINY, sigma_min=0.5)
    batch = make_batch(cfg, num_rows=8, num_tokens=60)
    batch["mel"] = batch["mel"] * cfg.mel_std * 2 + cfg.mel_mean
    model = make(cfg)
    model.output.kernel[...] = 0 * model.output.kernel[...]
    model.output.bias[...] = 0 * model.output.bias[...]
    total, count, _ = run_loss(model, cfg, batch)
    np.testing.assert_allclose(total / count, 4 + 0.25, rtol=0.05)  # 4,000 values: about 2 % noise


@pytest.mark.parametrize("schedule, mean", [("uniform", 0.5), ("cosine", 1 - 2 / np.pi)])
def test_flow_times_of_training_have_the_density_asked_for(monkeypatch, schedule, mean):
    seen = []

    def velocity(self, x, condition, tokens, t, mask, cfg, key=None):
        seen.append(np.asarray(t))
        return x

    monkeypatch.setattr(flow.Decoder, "__call__", velocity)
    cfg = dataclasses.replace(TINY, train_schedule=schedule)
    flow.loss(make(cfg), cfg, sharding.put(make_batch(cfg, num_rows=512, num_tokens=4)), jax.random.key(0))
    assert 0 <= seen[0].min() and seen[0].max() <= 1
    np.testing.assert_allclose(seen[0].mean(), mean, atol=0.04)  # three standard errors


def test_dropped_tokens_and_prompts_are_not_seen_and_the_count_stays():
    batch, model = make_batch(TINY), make(TINY)
    batch["prompt_frames"][:] = 4
    others = batch | {"speech_tokens": (batch["speech_tokens"] + 1) % TINY.num_codes}
    sums = {}
    for name, both, audio in (("none", 0.0, 0.0), ("audio", 0.0, 1.0), ("both", 1.0, 0.0)):
        cfg = dataclasses.replace(TINY, drop_both=both, drop_audio=audio)
        total, count, _ = run_loss(model, cfg, batch)
        sums[name] = total, abs(total - run_loss(model, cfg, others)[0])
        assert count == ((2 * batch["num_tokens"] - 4) * TINY.mel_bins).sum()
    assert sums["none"][1] > 1e-2 and sums["audio"][1] > 1e-2  # the tokens are seen
    assert sums["both"][1] == 0
    assert abs(sums["none"][0] - sums["audio"][0]) > 1e-2


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
    [(flow.e2tts_base(), 333_470_444), (flow.deepasmr(), 336_936_016), (flow.mini(), 6_511_008)],
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
        {"train_schedule": "linear"},
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
