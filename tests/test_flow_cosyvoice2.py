"""The CosyVoice2 flow decoder: numbers against an independent network, padding, meshes, names, loss, sampling."""

import dataclasses
import functools
import inspect
from pathlib import Path

import fill
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import weight_writers
from jax.sharding import NamedSharding

from deepasmr_jax import checkpoint, public_cosyvoice2, public_names, sharding
from deepasmr_jax import flow_cosyvoice2 as flow

GOLDEN = Path(__file__).parent / "golden" / "flow_cosyvoice2.npz"
TINY = flow.tiny()
CHUNKED = flow.tiny(chunk_tokens=3)
EVEN = flow.tiny(
    dropout=0.1, num_layers=1, num_up_layers=1, num_mid_levels=1, blocks_per_level=1
)  # fast to compile


def make(cfg, seed=0):
    """The decoder filled as by `fill.fill`, without compiling its random initialisation."""

    def one(path, x):
        array = fill.values(fill.path_name(path), x.shape, seed)
        return jax.device_put(array, NamedSharding(jax.sharding.get_mesh(), x.sharding.spec))

    abstract = jax.eval_shape(lambda key: flow.init(cfg, key), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(one, abstract)


def make_batch(cfg, num_rows=8, num_tokens=6, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "speech_tokens": rng.integers(0, cfg.num_codes, (num_rows, num_tokens)).astype(np.int32),
        "num_tokens": rng.integers(num_tokens // 2, num_tokens + 1, num_rows).astype(np.int32),
        "mel": rng.standard_normal((num_rows, 2 * num_tokens, cfg.mel_bins)).astype(np.float32),
        "prompt_frames": np.resize([0, 3], num_rows).astype(np.int32),
        "speaker": rng.standard_normal((num_rows, cfg.speaker_size)).astype(np.float32),
    }


@functools.partial(jax.jit, static_argnums=1)
def encoder_groups(model, cfg, tokens, num_tokens):
    encoder, chunk = model.encoder, cfg.chunk_tokens
    valid = flow.nn.length_mask(num_tokens, tokens.shape[1])
    out = {"embed": encoder.embed_tokens(tokens, valid, cfg.dtype)}
    out["look_ahead"] = x = encoder.look_ahead(out["embed"], cfg.dtype)
    out["layers"] = x = encoder.run(encoder.layers, x, flow._attention_mask(valid, chunk, None), cfg)
    out["frames"] = x = encoder.to_frames(x, cfg.dtype)
    out["up_embed"] = x = encoder.up_embed(x, cfg.dtype)
    mask = flow._attention_mask(flow._frames_of(valid), 2 * chunk, None)
    out["up_layers"] = x = encoder.run(encoder.up_layers, x, mask, cfg)
    return out | {"mu": encoder.output(encoder.norm(x, flow.NORM_EPS), cfg.dtype)}


@functools.partial(jax.jit, static_argnums=1)
def estimator_groups(model, cfg, x, mu, voice, condition, t, frames):
    e = model.estimator
    valid = flow.nn.length_mask(frames, x.shape[1])
    mask = flow._attention_mask(valid, 2 * cfg.chunk_tokens, None)
    out = {"time": e.embed_time(t)}
    wide = jnp.concatenate([x, mu, jnp.zeros_like(mu) + voice[:, None], condition], axis=-1)
    out["down_resnet"] = e.down_resnet(wide, out["time"], valid, cfg.dtype)
    out["down"] = y = e.level(e.down_resnet, e.down_blocks, wide, out["time"], valid, mask, cfg)
    out["down_conv"] = y = e.down_conv(jnp.where(valid[..., None], y, 0.0), cfg.dtype, 2)
    out["middle"] = y = e.middle(y, out["time"], valid, mask, cfg)
    y = jnp.concatenate([y, out["down"]], axis=-1)
    y = e.level(e.up_resnet, e.up_blocks, y, out["time"], valid, mask, cfg)
    out["up"] = e.up_conv(jnp.where(valid[..., None], y, 0.0), cfg.dtype, 2)
    return out | {"velocity": e.last(out["up"], valid, cfg.dtype)}


def run_sample(model, cfg, batch, **settings):
    """Two solver steps of a batch of `make_batch`; the mel is the prompt."""
    keys = jax.random.split(jax.random.key(5), len(batch["mel"]))
    settings = {"num_steps": 2, "keys": keys, "speaker": batch["speaker"]} | settings
    names = ("speech_tokens", "num_tokens", "mel", "prompt_frames")
    return np.asarray(flow.sample(model, cfg, *(batch[n] for n in names), **settings))


@functools.partial(jax.jit, static_argnums=1)
def look(model, cfg, batch, key):
    """The loss with a velocity that is its state, and what the estimator was given."""
    seen = []

    def velocity(self, x, mu, speaker, condition, t, valid, cfg, is_chunked=None):
        seen.append({"mu": mu, "speaker": speaker, "condition": condition, "t": t})
        return x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow.Estimator, "__call__", velocity)
        return flow.loss(model, cfg, batch, key), seen[0]


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(("name", "cfg"), [("whole", TINY), ("chunked", CHUNKED)])
def test_every_layer_group_of_a_padded_batch_equals_the_reference_row_by_row(name, cfg):
    golden = np.load(GOLDEN)
    data = sharding.put({k: golden[k] for k in golden.files if "." not in k and k != "torch_noise_ends"})
    model, frames = make(cfg, 3), 2 * data["num_tokens"]
    known = flow.nn.length_mask(data["prompt_frames"], data["x"].shape[1])
    condition = jnp.where(known[..., None], data["prompt_mel"], 0.0)
    got = {
        f"encoder.{k}": x for k, x in encoder_groups(model, cfg, data["tokens"], data["num_tokens"]).items()
    }
    parts = estimator_groups(model, cfg, data["x"], data["mu"], data["voice"], condition, data["t"], frames)
    got |= {f"estimator.{k}": x for k, x in parts.items()}
    got["speaker"] = flow.embed_speaker(model, data["speaker"])
    inputs = (data[k] for k in ("tokens", "num_tokens", "prompt_mel", "prompt_frames"))
    got["mel"] = flow.sample(model, cfg, *inputs, speaker=data["speaker"], noise=golden["noise"])
    assert {k.split(".", 2)[2] for k in golden.files if k.startswith(name)} == set(got)
    for key, x in got.items():
        for row in range(2):
            want = golden[f"{name}.{row}.{key}"]
            assert np.std(want) > 0.05
            tolerance = (
                1e-3 if key == "mel" else 5e-5 * max(1, np.abs(want).max())
            )  # relative to sqrt(D) embeddings
            found = np.asarray(x)[row][: len(want)]
            np.testing.assert_allclose(found, want, rtol=0, atol=tolerance, err_msg=f"{key} of row {row}")


def test_with_chunks_later_tokens_change_no_earlier_chunk():
    cfg = dataclasses.replace(EVEN, chunk_tokens=3)
    model, batch = make(cfg), make_batch(cfg, num_rows=1, num_tokens=9)
    batch["num_tokens"][:] = 9
    other = batch | {"speech_tokens": batch["speech_tokens"].copy()}
    other["speech_tokens"][:, 6:] = (other["speech_tokens"][:, 6:] + 1) % cfg.num_codes
    first, second = run_sample(model, cfg, batch), run_sample(model, cfg, other)
    # the look-ahead of three tokens makes the second chunk see the third
    np.testing.assert_allclose(first[:, :6], second[:, :6], atol=1e-5)
    assert np.abs(first[:, 6:12] - second[:, 6:12]).max() > 1e-3


def test_the_reference_noise_is_that_of_torch():
    ends = np.load(GOLDEN)["torch_noise_ends"]
    noise = flow.reference_noise(15_000)
    np.testing.assert_allclose(np.stack([noise[:4, :4], noise[-4:, -4:]]), ends, rtol=0, atol=6e-7)
    np.testing.assert_array_equal(flow.reference_noise(33), noise[:33])
    assert abs(noise.mean()) < 2e-3 and abs(noise.std() - 1) < 2e-3
    with pytest.raises(ValueError, match="15001"):
        flow.reference_noise(15_001)


def test_a_noise_file_of_pytorch_or_safetensors_is_read_and_another_one_refused(tmp_path):
    noise = np.random.default_rng(0).standard_normal((1, 6, 9)).astype(np.float32)
    for tree in (noise, noise[0], {"any": noise}, {"decoder.rand_noise": noise, "weight": noise}):
        weight_writers.write_torch_zip(tmp_path / "noise.pt", tree)
        np.testing.assert_array_equal(flow.read_noise(tmp_path / "noise.pt", 6), noise[0].T)
    checkpoint.write_arrays(tmp_path / "noise.safetensors", {"rand_noise": noise}, {})
    np.testing.assert_array_equal(flow.read_noise(tmp_path / "noise.safetensors", 6), noise[0].T)
    for tree, words in (
        ({"a": noise, "b": noise}, "holds no noise"),
        (noise[:, :5], r"rand_noise \(1, 5, 9\)\); save one tensor of \(1, 6, frames\)"),
        (np.inf * noise, "not finite"),
        (b"cposix\nsystem\n(Vecho\ntR.", "'posix.system'"),
    ):
        weight_writers.write_torch_zip(tmp_path / "noise.pt", tree)
        with pytest.raises(ValueError, match=words):
            flow.read_noise(tmp_path / "noise.pt", 6)
    with pytest.raises(ValueError, match="nowhere.pt"):
        flow.read_noise(tmp_path / "nowhere.pt", 6)


def test_all_of_the_reference_noise_is_that_of_the_installed_torch():
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    want = torch.randn(1, 80, 50 * 300, generator=generator)[0].T.numpy()
    np.testing.assert_allclose(flow.reference_noise(15_000), want, rtol=0, atol=6e-7)


# ---------------------------------------------------------------- batches, padding, meshes


def test_a_row_of_a_padded_batch_is_the_row_alone_also_with_its_random_noise():
    cfg = dataclasses.replace(EVEN, chunk_tokens=3)
    model, batch = make(cfg), make_batch(cfg, num_rows=2, num_tokens=8)
    batch["num_tokens"] = np.array([8, 5], np.int32)
    keys = jax.random.split(jax.random.key(5), 2)
    together = run_sample(model, cfg, batch, keys=keys)
    alone = {k: v[1:] for k, v in batch.items()}
    alone |= {"speech_tokens": alone["speech_tokens"][:, :5], "mel": alone["mel"][:, :10]}
    np.testing.assert_allclose(together[1, :10], run_sample(model, cfg, alone, keys=keys[1:])[0], atol=1e-4)
    assert together[0].any(axis=1).all() and not together[1, 10:].any()


def test_nothing_beyond_a_row_is_read():
    model, batch = make(EVEN), make_batch(EVEN, num_rows=2)
    batch["num_tokens"][:] = 4
    other = {k: v.copy() for k, v in batch.items()}
    other["speech_tokens"][:, 4:] = -1
    other["mel"][:, 8:] = np.nan
    np.testing.assert_array_equal(run_sample(model, EVEN, batch), run_sample(model, EVEN, other))
    losses = [look(model, EVEN, sharding.put(b), jax.random.key(0))[0][0] for b in (batch, other)]
    assert float(losses[0]) == float(losses[1])


def test_samples_are_those_of_one_device_on_a_split_mesh():
    mels = []
    for shape in ((1, 1, 1), (2, 2, 2)):
        sharding.make_mesh(*shape)
        mels.append(run_sample(make(EVEN), EVEN, sharding.put(make_batch(EVEN))))
    np.testing.assert_allclose(mels[1], mels[0], atol=1e-4)


def value_and_grads(cfg, shape):
    sharding.make_mesh(*shape)

    def mean(model, rows):
        total, count, _ = flow.loss(model, cfg, rows, jax.random.key(1))
        return total / count

    rows = sharding.put(make_batch(cfg))
    value, grads = jax.block_until_ready(jax.jit(jax.value_and_grad(mean))(make(cfg), rows))
    named = {fill.path_name(p): np.asarray(g) for p, g in jax.tree_util.tree_leaves_with_path(grads)}
    return float(value), named


def test_loss_and_gradients_do_not_depend_on_mesh_or_recomputing_and_reach_every_weight():
    cfg = dataclasses.replace(EVEN, chunk_tokens=2)
    value, want = value_and_grads(cfg, (1, 1, 1))
    got, found = value_and_grads(dataclasses.replace(cfg, remat="full"), (2, 2, 2))
    np.testing.assert_allclose(got, value, rtol=1e-5)
    for name, grad in want.items():
        assert np.isfinite(grad).all() and np.abs(grad).max() > 0, name
        # sums over rows in another order: rounding relative to the largest entry; biases of keys have no gradient
        # but rounding, as a softmax does not see what all its scores share
        bound = 1e-4 * max(np.abs(grad).max(), 1e-3)
        np.testing.assert_allclose(found[name], grad, rtol=0, atol=bound, err_msg=name)


# ---------------------------------------------------------------- sampling


def test_it_samples_as_synthesis_asks():
    parameters = inspect.signature(flow.sample).parameters
    for name in ("keys", "speaker", "num_steps", "guidance", "method", "schedule", "noise"):
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert (parameters["num_steps"].default, parameters["guidance"].default) == (10, 0.7)


def test_guidance_moves_away_from_the_model_without_tokens_prompt_and_speaker():
    # in one Euler step the mel is linear in w, and at w = -1 only the unconditional branch is left
    model, batch = make(EVEN), make_batch(EVEN, num_rows=2)

    def one_step(batch, w):  # an array, so that 0 runs both branches too and one program serves all
        return run_sample(model, EVEN, batch, guidance=jnp.float32(w), num_steps=1)

    at = {w: one_step(batch, w) for w in (-1.0, 0.0, 2.0)}
    np.testing.assert_allclose(at[2.0], at[0.0] + 2 * (at[0.0] - at[-1.0]), atol=1e-4)
    np.testing.assert_allclose(run_sample(model, EVEN, batch, guidance=0, num_steps=1), at[0.0], atol=1e-5)
    changes = {
        "speech_tokens": (batch["speech_tokens"] + 1) % EVEN.num_codes,
        "prompt_frames": batch["prompt_frames"] + 1,
        "speaker": batch["speaker"][::-1],
    }
    for name, value in changes.items():
        other = batch | {name: value}
        np.testing.assert_allclose(one_step(other, -1.0), at[-1.0], atol=1e-5, err_msg=name)
        assert np.abs(one_step(other, 0.0) - at[0.0]).max() > 1e-3, name


def test_the_length_of_a_speaker_vector_does_not_matter():
    model, x = make(EVEN), sharding.put(make_batch(EVEN))["speaker"]
    found = flow.embed_speaker(model, 7 * x)
    np.testing.assert_allclose(found, flow.embed_speaker(model, x), atol=1e-6)
    assert np.isfinite(flow.embed_speaker(model, 0 * x)).all() and np.std(found, axis=0).min() > 0.01


def test_the_reference_noise_is_an_array_for_all_rows():
    cfg = dataclasses.replace(EVEN, mel_bins=80)
    model, batch = make(cfg), make_batch(cfg, num_rows=2)
    batch = {k: np.repeat(v[:1], 2, axis=0) for k, v in batch.items()}
    mel = run_sample(model, cfg, batch, keys=None, noise="reference")
    np.testing.assert_array_equal(mel[0], mel[1])
    given = run_sample(model, cfg, batch, keys=None, noise=flow.reference_noise(20))
    np.testing.assert_array_equal(mel, given)
    other = run_sample(model, cfg, batch, keys=None, noise=flow.reference_noise(40)[20:])
    assert np.abs(other - mel).max() > 0.1


# ---------------------------------------------------------------- loss


TRAINED = dataclasses.replace(EVEN, dropout=0.0, sigma_min=0.5)


def many_rows(**changes):
    batch = make_batch(TRAINED, num_rows=1000, num_tokens=10)
    return (
        batch
        | {"num_tokens": np.full(1000, 10, np.int32), "prompt_frames": np.zeros(1000, np.int32)}
        | changes
    )


def test_conditions_prefixes_and_times_of_training_have_the_public_frequencies():
    batch = many_rows()
    (_, _, aux), seen = look(make(TRAINED), TRAINED, sharding.put(batch), jax.random.key(0))
    mu, speaker, condition, t = (np.asarray(seen[k]) for k in ("mu", "speaker", "condition", "t"))
    assert float(aux["prefix_mse"][1]) == 1000 * 20 * TRAINED.mel_bins
    kept = speaker.any(axis=1)
    np.testing.assert_allclose(kept.mean(), 0.8, atol=0.04)  # three standard errors
    np.testing.assert_array_equal(mu.any(axis=(1, 2)), kept)
    lengths = condition.any(axis=2).sum(axis=1)
    assert not lengths[~kept].any() and lengths.max() == 6  # floor(0.3 * 20)
    np.testing.assert_allclose((lengths[kept] == 0).mean(), 0.5 + 0.5 / 7, atol=0.06)
    found = np.bincount(lengths[kept], minlength=7)[1:] / kept.sum()
    np.testing.assert_allclose(found, 0.5 / 7, atol=0.03)
    row = np.flatnonzero(lengths == 4)[0]
    np.testing.assert_array_equal(condition[row, :4], batch["mel"][row, :4])
    assert 0 <= t.min() and t.max() <= 1
    np.testing.assert_allclose([t.mean(), t.std()], [0.5, 12**-0.5], atol=0.03)


def test_the_loss_of_a_velocity_that_is_the_state_has_its_closed_form():
    # with u = 1 - t the error is (u d)^2 + ((1 + (1 - sigma) u) n)^2 for data d and noise n, u uniform
    batch = many_rows(mel=2 * many_rows()["mel"])
    (total, count, _), _ = look(make(TRAINED), TRAINED, sharding.put(batch), jax.random.key(0))
    assert float(count) == 1000 * 20 * TRAINED.mel_bins
    # 1000 times: the mean of u^2 has 3 % noise
    np.testing.assert_allclose(total / count, 4 / 3 + 1 + 0.5 + 0.25 / 3, rtol=0.06)


def test_the_loss_of_a_mel_in_float16_computes_in_float32():
    model, batch = make(TRAINED), make_batch(TRAINED)
    half = batch["mel"].astype(np.float16)
    loss = jax.jit(flow.loss, static_argnums=1)
    each = (batch | {"mel": mel} for mel in (half, half.astype(np.float32)))
    sums = [float(loss(model, TRAINED, sharding.put(x), jax.random.key(0))[0]) for x in each]
    assert sums[0] == pytest.approx(sums[1], rel=1e-6)  # two programs


def test_a_prompted_row_is_given_its_prompt_and_pays_for_the_rest():
    batch = sharding.put(many_rows(prompt_frames=np.full(1000, 3, np.int32)))
    (_, count, aux), seen = look(make(TRAINED), TRAINED, batch, jax.random.key(0))
    assert float(count) == 1000 * 17 * TRAINED.mel_bins == float(aux["prompt_mse"][1])
    kept = np.any(seen["speaker"], axis=1)
    np.testing.assert_array_equal(np.any(seen["condition"], axis=2).sum(axis=1), np.where(kept, 3, 0))


def test_half_of_the_training_batches_use_the_chunks():
    cfg = dataclasses.replace(TRAINED, chunk_tokens=2, drop_condition=0.0)
    model, batch = make(cfg), sharding.put(make_batch(cfg))
    encode = jax.jit(flow.encode, static_argnums=1)
    tokens = batch["speech_tokens"], batch["num_tokens"]
    chunked, whole = (encode(model, cfg, *tokens, is_chunked=jnp.array(flag)) for flag in (True, False))
    assert np.abs(chunked - whole).max() > 1e-3
    np.testing.assert_allclose(
        encode(model, dataclasses.replace(cfg, chunk_tokens=0), *tokens), whole, atol=1e-5
    )
    found = [look(model, cfg, batch, jax.random.key(seed))[1]["mu"] for seed in range(16)]
    is_chunked = [bool(np.abs(x - chunked).max() < 1e-5) for x in found]
    is_whole = [bool(np.abs(x - whole).max() < 1e-5) for x in found]
    assert is_chunked == [not x for x in is_whole] and 3 <= sum(is_chunked) <= 13


def test_a_tiny_decoder_overfits_one_batch():
    cfg = dataclasses.replace(EVEN, dropout=0.0, drop_condition=0.0, drop_prefix=1.0)
    batch = make_batch(cfg, num_rows=4) | {"prompt_frames": np.zeros(4, np.int32)}
    batch = sharding.put(batch)
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

    keys = jax.random.split(jax.random.key(1), 400)
    (model, _), values = train(model, tx.init(model), keys)
    assert np.mean(values[-20:]) < 0.5 * np.mean(values[:5])
    mel = run_sample(model, cfg, batch, num_steps=10, guidance=0.0)
    valid = np.arange(mel.shape[1]) < 2 * np.asarray(batch["num_tokens"])[:, None]
    error = np.mean((mel - np.asarray(batch["mel"]))[valid] ** 2)
    assert error < 0.5  # 2 for an unrelated mel


# ---------------------------------------------------------------- names and checks


@pytest.fixture(scope="module")
def public():
    """Table, our shapes and a file of the public size that takes no memory."""
    sharding.make_mesh()
    cfg = flow.cosyvoice2()
    module = checkpoint.abstract(lambda key: flow.init(cfg, key), jax.random.key(0))
    shapes = {name: x.shape for name, x in checkpoint.named_arrays(module).items()}
    table = public_cosyvoice2.flow_cosyvoice2(cfg)
    tensors = {}
    for name, source in table.items():
        zeros = np.broadcast_to(np.float32(0), shapes[name])
        each = [zeros] if isinstance(source.names, str) else zeros
        names = [source.names] if isinstance(source.names, str) else source.names
        layout = public_names.LAYOUTS[source.layout]
        tensors |= {n: layout.to_theirs(x) for n, x in zip(names, each, strict=True)}
    return table, shapes, tensors


# shapes of section "names and shapes" of the public file, one of each kind
PUBLIC_SHAPES = {
    "input_embedding.weight": (6561, 512),
    "spk_embed_affine_layer.weight": (80, 192),
    "encoder.embed.out.0.weight": (512, 512),
    "encoder.up_embed.out.1.bias": (512,),
    "encoder.pre_lookahead_layer.conv1.weight": (512, 512, 4),
    "encoder.pre_lookahead_layer.conv2.weight": (512, 512, 3),
    "encoder.encoders.5.self_attn.linear_pos.weight": (512, 512),
    "encoder.up_encoders.3.self_attn.pos_bias_v": (8, 64),
    "encoder.encoders.0.feed_forward.w_1.weight": (2048, 512),
    "encoder.encoders.0.feed_forward.w_2.weight": (512, 2048),
    "encoder.up_layer.conv.weight": (512, 512, 5),
    "encoder.after_norm.weight": (512,),
    "encoder_proj.weight": (80, 512),
    "decoder.estimator.time_mlp.linear_1.weight": (1024, 320),
    "decoder.estimator.time_mlp.linear_2.weight": (1024, 1024),
    "decoder.estimator.down_blocks.0.0.block1.block.0.weight": (256, 320, 3),
    "decoder.estimator.down_blocks.0.0.res_conv.weight": (256, 320, 1),
    "decoder.estimator.down_blocks.0.2.weight": (256, 256, 3),
    "decoder.estimator.mid_blocks.11.0.mlp.1.weight": (256, 1024),
    "decoder.estimator.mid_blocks.11.0.block2.block.2.bias": (256,),
    "decoder.estimator.mid_blocks.3.1.2.attn1.to_v.weight": (512, 256),
    "decoder.estimator.mid_blocks.3.1.2.attn1.to_out.0.weight": (256, 512),
    "decoder.estimator.mid_blocks.3.1.2.ff.net.0.proj.weight": (1024, 256),
    "decoder.estimator.mid_blocks.3.1.2.ff.net.2.weight": (256, 1024),
    "decoder.estimator.mid_blocks.3.1.2.norm3.weight": (256,),
    "decoder.estimator.up_blocks.0.0.block1.block.0.weight": (256, 512, 3),
    "decoder.estimator.up_blocks.0.2.bias": (256,),
    "decoder.estimator.final_block.block.0.weight": (256, 256, 3),
    "decoder.estimator.final_proj.weight": (80, 256, 1),
}


def test_the_table_has_the_tensors_of_the_public_file(public):
    table, shapes, tensors = public
    assert len(tensors) == 1121
    assert sum(x.size for x in tensors.values()) == 112_549_360
    assert sum(int(np.prod(s)) for s in shapes.values()) == 112_549_360
    for name, shape in PUBLIC_SHAPES.items():
        assert tensors[name].shape == shape, name
    assert public_names.differences(table, tensors, shapes) == ""


def test_weights_come_back_from_the_public_names():
    table = public_cosyvoice2.flow_cosyvoice2(TINY)
    arrays = {name: np.asarray(x) for name, x in checkpoint.named_arrays(make(TINY)).items()}
    theirs = public_names.to_theirs(table, arrays)
    back = dict(public_names.to_ours(table, theirs, {k: x.shape for k, x in arrays.items()}, "flow.pt"))
    assert set(back) == set(arrays)
    for name, x in arrays.items():
        np.testing.assert_array_equal(back[name], x, err_msg=name)


def test_a_file_that_does_not_fit_gives_one_error_with_all_names(public):
    table, shapes, tensors = public
    wrong = {k: x for k, x in tensors.items() if k != "encoder.after_norm.bias"}
    wrong["encoder.extra.weight"] = wrong["encoder.after_norm.weight"]
    wrong["encoder_proj.weight"] = wrong["encoder_proj.weight"][:, :100]
    with pytest.raises(ValueError, match="flow.pt does not fit") as error:
        public_names.to_ours(table, wrong, shapes, "flow.pt")
    for words in (
        "1 missing (encoder.after_norm.bias)",
        "1 unexpected (encoder.extra.weight)",
        "encoder_proj.weight (80, 100) instead of (80, 512)",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"mel_bins": 0},
        {"width": 30},
        {"chunk_tokens": -1},
        {"chunk_rate": 1.5},
        {"dropout": -0.1},
        {"num_mid_levels": 0},
        {"dtype": "float16"},
        {"attention_dtype": "int8"},
        {"remat": "all"},
    ],
)
def test_a_config_that_cannot_work_is_refused_with_its_value(changes):
    (name, value), *_ = changes.items()
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        flow.tiny(**changes)


def test_inputs_that_do_not_fit_are_refused_with_their_numbers():
    model, batch = make(EVEN), make_batch(EVEN, num_rows=2)
    short = batch | {"mel": batch["mel"][:, :-1]}
    with pytest.raises(ValueError, match="11.*12"):
        flow.loss(model, EVEN, short, jax.random.key(0))
    with pytest.raises(ValueError, match="11.*12"):
        run_sample(model, EVEN, short)
    with pytest.raises(ValueError, match="9.*10"):
        run_sample(model, EVEN, batch, speaker=batch["speaker"][:, :9])
    with pytest.raises(ValueError, match="keys"):
        run_sample(model, EVEN, batch, keys=None)
    with pytest.raises(ValueError, match="public"):
        run_sample(model, EVEN, batch, noise="public")
    with pytest.raises(ValueError, match="80"):
        run_sample(model, EVEN, batch, noise="reference")  # 80 bins, the toy has 6
    with pytest.raises(ValueError, match="heun"):
        run_sample(model, EVEN, batch, method="heun")
    sharding.make_mesh(1, 1, 8)
    with pytest.raises(ValueError, match="8 does not divide 4"):
        flow.init(EVEN, jax.random.key(0))
