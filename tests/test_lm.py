"""Speech LM: numbers of the reference, packing, meshes, losses."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from fill import fill
from tiny_lm import MESHES, SIZES, TINY, call, model_of, random_batch, random_utterance, rows, spread

from deepasmr_jax import checkpoint, decoding, lm, sharding

logits = jax.jit(lm.logits, static_argnums=1)
loss = jax.jit(lm.loss, static_argnums=1)


@pytest.fixture(scope="module")
def model():
    sharding.make_mesh()
    return model_of()


# --- numbers of the reference ---


def golden():
    data = np.load(Path(__file__).parent / "golden" / "lm.npz")
    cfg = lm.Config(
        text_vocab=40,
        num_codes=27,
        width=64,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mlp_width=96,
    )
    batch = rows([[(data["text"][i], data["speech"][i])] for i in range(2)], data["embedded"].shape[1])
    return data, cfg, fill(model_of(cfg), 7), batch


def test_every_layer_equals_the_qwen2_reference():
    data, cfg, model, batch = golden()
    x = lm.embed(model, batch["tokens"], batch["kinds"])
    np.testing.assert_allclose(x, data["embedded"], atol=1e-6)
    order = np.arange(x.shape[1])
    apply = jax.jit(lambda layer, x: layer(x, batch["positions"], (order[:, None] >= order)[None], cfg))
    for i in range(cfg.num_layers):
        x = apply(jax.tree.map(lambda p, i=i: p[i], model.layers), x)
        np.testing.assert_allclose(x, data["layers"][i], atol=2e-5)  # float32, sums of up to 96 terms
    np.testing.assert_allclose(model.norm(x), data["final"], atol=5e-5)


def test_packed_forward_and_fused_decode_weights_equal_the_qwen2_reference():
    data, cfg, model, batch = golden()
    np.testing.assert_allclose(logits(model, cfg, batch), data["logits"], atol=5e-5)
    num = data["logits"].shape[1]
    scores, _ = jax.jit(decoding.prefill, static_argnums=1)(
        decoding.unstack(model, cfg), cfg, batch["tokens"], batch["kinds"], np.array([num, num - 4])
    )
    np.testing.assert_allclose(scores, [data["logits"][0, -1], data["logits"][1, -5]], atol=5e-5)


def test_presets_have_the_parameter_totals_of_the_public_models():
    def count(tree):
        return sum(x.size for x in jax.tree.leaves(tree))

    abstract = jax.eval_shape(lambda k: lm.init(lm.cosyvoice2(), k), jax.random.key(0))
    assert count(abstract) == 505_803_812
    assert count((abstract.text_table, abstract.layers, abstract.norm)) == 494_032_768
    assert count((abstract.layers, abstract.norm)) == 357_898_112
    assert lm.qwen2_0p5b() == lm.cosyvoice2()
    assert (lm.cosyvoice2().end_id, lm.cosyvoice2().num_speech_rows) == (6561, 6564)
    small = jax.eval_shape(lambda k: lm.init(lm.mini(150), k), jax.random.key(0))
    assert count(small.layers) == 4_724_736
    assert small.text_table.shape == (150, 256)


# --- packing, padding, meshes ---


def test_packing_changes_no_logit_of_an_utterance(model):
    rng = np.random.default_rng(1)
    a, b = random_utterance(rng, 3, 5), random_utterance(rng, 4, 6)
    packed = logits(model, TINY, rows([[a, b]], 32))[0]
    alone = logits(model, TINY, rows([[a], [b]], 14))
    np.testing.assert_allclose(packed[:10], alone[0, :10], atol=2e-5)
    np.testing.assert_allclose(packed[10:22], alone[1, :12], atol=2e-5)


def test_packing_changes_no_sum_and_no_count(model):
    rng = np.random.default_rng(1)
    a, b = random_utterance(rng, 3, 5), random_utterance(rng, 4, 6)
    packed = loss(model, TINY, rows([[a, b]], 32))
    alone = loss(model, TINY, rows([[a], [b]], 14))
    assert float(packed[1]) == float(alone[1]) == 5 + 1 + 6 + 1
    assert float(packed[0]) == pytest.approx(float(alone[0]), rel=1e-5)


def test_attention_in_causal_chunks_changes_no_logit(model, monkeypatch):
    whole = logits(model, TINY, random_batch(2))
    monkeypatch.setattr(lm, "CAUSAL_CHUNK", 7)
    chunked = jax.jit(lambda m, batch: lm.logits(m, TINY, batch))(model, random_batch(2))
    np.testing.assert_allclose(chunked, whole, atol=2e-5)


def test_loss_and_gradient_are_the_same_on_every_mesh(model, monkeypatch):
    monkeypatch.setattr(lm, "CAUSAL_CHUNK", 16)

    def mean(model, batch):
        total, count, _ = lm.loss(model, TINY, batch)
        return total / count

    results = []
    for shape in MESHES:
        sharding.make_mesh(*shape)
        value, grads = jax.jit(jax.value_and_grad(mean))(spread(model), sharding.put(random_batch()))
        results.append((float(value), jax.device_get(grads)))
    for value, grads in results[1:]:
        assert value == pytest.approx(results[0][0], rel=1e-5)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(results[0][1]), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_rematerialisation_changes_no_gradient(model):
    def grads(remat):
        cfg = dataclasses.replace(TINY, remat=remat)
        return jax.tree.leaves(jax.jit(jax.grad(lambda m: lm.loss(m, cfg, random_batch(2))[0]))(model))

    plain = grads("none")
    for remat in ("dots", "full"):
        for a, b in zip(grads(remat), plain, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_init_refuses_a_mesh_that_does_not_divide_the_heads():
    sharding.make_mesh(1, 1, 4)
    with pytest.raises(ValueError, match="model of size 4 does not divide 2"):
        lm.init(TINY, jax.random.key(0))


# --- losses ---


def test_loss_matches_numpy_with_smoothing_and_z_loss(model):
    cfg = dataclasses.replace(TINY, label_smoothing=0.1, z_loss=0.01)
    batch = random_batch(2)
    scores = np.asarray(logits(model, TINY, batch), np.float64)
    log_total = np.log(np.exp(scores).sum(-1))
    valid = batch["targets"] >= 0
    nll = log_total - np.take_along_axis(scores, np.maximum(batch["targets"], 0)[..., None], -1)[..., 0]
    expected = 0.9 * nll + 0.1 * (log_total - scores.mean(-1)) + 0.01 * log_total**2
    total, count, aux = loss(model, cfg, batch)
    assert float(count) == valid.sum()
    assert float(total) == pytest.approx(expected[valid].sum(), rel=1e-5)
    assert float(aux["nll_nats"][0]) == pytest.approx(nll[valid].sum(), rel=1e-5)
    is_end = batch["targets"] == TINY.end_id
    assert float(aux["end_nll_nats"][0]) == pytest.approx(nll[is_end].sum(), rel=1e-5)
    assert float(aux["end_nll_nats"][1]) == 4
    assert float(aux["accuracy"][0]) == (scores.argmax(-1) == batch["targets"])[valid].sum()


ALIGNED = dataclasses.replace(TINY, alignment_weight=0.3, alignment_layers=(1,))


def aligned_batch():
    """A batch and, for each position that predicts speech, two random text positions of its segment."""
    batch, rng = random_batch(), np.random.default_rng(1)
    batch["aligned"] = np.full((*batch["targets"].shape, 2), -1, np.int32)
    for row, at in zip(*np.nonzero((batch["targets"] >= 0) & (batch["targets"] != TINY.end_id)), strict=True):
        same = batch["segment_ids"][row] == batch["segment_ids"][row, at]
        batch["aligned"][row, at] = rng.choice(np.flatnonzero(same & (batch["kinds"][row] == lm.TEXT)), 2)
    return batch


def test_alignment_loss_is_the_cross_entropy_of_two_heads_over_visible_positions(model):
    batch = aligned_batch()
    total, count, aux = loss(model, ALIGNED, batch)
    plain = loss(model, TINY, batch)[0]
    # the weights of the second layer's heads, in numpy
    w = {k: np.asarray(v, np.float64) for k, v in checkpoint.named_arrays(model).items()}
    one = dataclasses.replace(TINY, num_layers=1)
    first = jax.tree.map(lambda x: x[:1], model.layers)
    x = np.asarray(jax.jit(lambda m: _layers(m, first, one, batch))(model), np.float64)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + TINY.norm_eps) * w["layers.attn_norm.scale"][1]

    def rotated(name, heads):
        y = x @ w[f"layers.attn.{name}.kernel"][1] + w[f"layers.attn.{name}.bias"][1]
        y = y.reshape(*y.shape[:2], heads, -1)
        half = y.shape[-1] // 2
        angle = batch["positions"][:, :, None, None] * TINY.rope_base ** (-np.arange(half) / half)
        a, b = y[..., :half], y[..., half:]
        turned = [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
        return np.concatenate(turned, -1)

    q, k = rotated("q", TINY.num_heads)[:, :, :2], rotated("k", TINY.num_kv_heads)
    scores = np.einsum("bnhe,bse->bhns", q, k[:, :, 0]) * TINY.head_dim**-0.5  # both read key head 0
    expected, seen = 0.0, 0
    for row, at in zip(*np.nonzero(batch["aligned"][..., 0] >= 0), strict=True):
        visible = (batch["segment_ids"][row] == batch["segment_ids"][row, at]) & (
            np.arange(scores.shape[-1]) <= at
        )
        for head in range(2):
            line = scores[row, head, at]
            expected += np.log(np.exp(line[visible]).sum()) - line[batch["aligned"][row, at, head]]
        seen += 1
    assert float(aux["alignment_nll_nats"][1]) == seen == float(count) - 16  # all but the ends
    assert float(aux["alignment_nll_nats"][0]) == pytest.approx(expected / 2, rel=1e-4)
    assert float(total) == pytest.approx(float(plain) + 0.3 * expected / 2, rel=1e-4)


def _layers(model, layers, cfg, batch):
    positions, segments = batch["positions"], batch["segment_ids"]
    mask = (segments[:, :, None] == segments[:, None, :]) & (positions[:, :, None] >= positions[:, None, :])
    x = lm.embed(model, batch["tokens"], batch["kinds"])
    for number in range(cfg.num_layers):
        x = jax.tree.map(lambda p: p[number], layers)(x, positions, mask, cfg)  # noqa: B023
    return x


def test_alignment_is_learned_and_speech_reads_what_it_looks_at(model):
    batch = aligned_batch()
    trained, _ = fit(model, lambda m: lm.loss(m, ALIGNED, batch)[0] / 96, 150, 3e-3)
    aux = loss(trained, ALIGNED, batch)[2]
    assert aux["alignment_accuracy"][0] / aux["alignment_accuracy"][1] > 0.9


def test_alignment_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="alignment_layers in 0..1 and 2 heads"):
        dataclasses.replace(TINY, alignment_weight=0.3, alignment_layers=(2,))


def test_alignment_without_labels_names_both_ways_out(model):
    with pytest.raises(ValueError, match="data.align=true, or model.alignment_weight=0"):
        lm.loss(model, ALIGNED, random_batch())


def fit(model, objective, num_steps, rate):
    """Model after `num_steps` of Adam on `objective(model) -> scalar`, and the last value."""
    tx = optax.adam(rate)

    @jax.jit
    def step(model, opt_state):
        value, grads = jax.value_and_grad(objective)(model)
        updates, opt_state = tx.update(grads, opt_state, model)
        return optax.apply_updates(model, updates), opt_state, value

    opt_state = tx.init(model)
    for _ in range(num_steps):
        model, opt_state, value = step(model, opt_state)
    return model, float(value)


def test_the_model_learns_one_batch_and_then_says_it():
    batch = random_batch(2)

    def mean(model):
        total, count, _ = lm.loss(model, TINY, batch)
        return total / count

    model, value = fit(model_of(dataclasses.replace(TINY, init_std=0.1)), mean, 150, 1e-2)
    assert value < 0.02
    text, speech = batch["tokens"][:1, 1:4], batch["tokens"][0, 5:10]
    greedy = decoding.Sampling(greedy=True, repetition_aware=False)
    tokens, lengths = call(model, greedy, text, [3], np.zeros((1, 0), np.int32), [0], [0], [9], [0], 9)
    assert lengths.tolist() == [5]
    assert tokens[0, :5].tolist() == speech.tolist()


def test_log_probs_average_the_targets_and_nothing_else(model):
    rng = np.random.default_rng(4)
    batch = rows([[random_utterance(rng, 3, 5)], [random_utterance(rng, 2, 7)]], 16)
    scores = np.asarray(jax.nn.log_softmax(logits(model, TINY, batch)))
    for row, value in enumerate(jax.jit(lm.log_probs, static_argnums=1)(model, TINY, batch)):
        at = [i for i in range(16) if batch["targets"][row, i] >= 0]
        expected = np.mean([scores[row, i, batch["targets"][row, i]] for i in at])
        assert float(value) == pytest.approx(expected, rel=1e-5)


def test_preference_loss_starts_at_log_two_and_moves_towards_the_chosen(model):
    rng = np.random.default_rng(5)
    text = rng.integers(0, 20, 3)
    sides = [rows([[(text, rng.integers(0, 27, 6))]] * 2, 12) for _ in range(2)]
    batch = dict(chosen=sides[0], rejected=sides[1])

    @jax.jit
    def preference(m, batch, sft_weight):
        return lm.dpo_loss(m, model, TINY, batch, beta=0.5, sft_weight=sft_weight)

    total, count, aux = preference(model, batch, 0.0)
    assert float(total / count) == pytest.approx(np.log(2), rel=1e-5)
    joint = preference(model, batch, 2.0)
    assert float(joint[0] - total) == pytest.approx(2 * float(aux["chosen_nll_nats"][0]), rel=1e-5)

    after, _ = fit(model, lambda m: preference(m, batch, 0.0)[0], 5, 1e-3)
    aux = preference(after, batch, 0.0)[2]
    assert float(aux["margin_nats"][0]) > 0
    assert float(aux["preferred"][0]) == 2
    swapped = preference(after, dict(chosen=sides[1], rejected=sides[0]), 0.0)[2]
    assert float(swapped["margin_nats"][0]) == pytest.approx(-float(aux["margin_nats"][0]), rel=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [dict(num_kv_heads=3), dict(head_dim=7), dict(dtype="float16"), dict(remat="some"), dict(end_offset=3)],
)
def test_config_refuses_sizes_that_do_not_fit(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        lm.Config(**(dict(text_vocab=20, width=32) | SIZES | wrong))
