"""Speech LM: numbers of the reference, cache, padding, meshes, sampling, losses."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fill import fill

from deepasmr_jax import checkpoint, lm, sharding

MESHES = [(1, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2)]
SIZES = dict(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=64)
TINY = lm.Config(text_vocab=20, num_codes=27, width=32, init_std=0.3, **SIZES)
KEYS = ("tokens", "kinds", "segment_ids", "positions")


def utterance(text, speech, segment=1):
    """One segment as a dict of [N] arrays."""
    num_text, num_speech = len(text), len(speech)
    size = 2 + num_text + num_speech
    return dict(
        tokens=np.array([0, *text, 0, *speech], np.int32),
        kinds=np.array([lm.SOS, *[lm.TEXT] * num_text, lm.TASK, *[lm.SPEECH] * num_speech], np.int32),
        segment_ids=np.full(size, segment, np.int32),
        positions=np.arange(size, dtype=np.int32),
        targets=np.array([-1] * (num_text + 1) + [*speech, TINY.end_id], np.int32),
    )


def rows(utterances_of_rows, size):
    """Packs lists of (text, speech) into a batch of `size` columns."""
    batch = {k: [] for k in (*KEYS, "targets")}
    for utterances in utterances_of_rows:
        parts = [utterance(text, speech, i + 1) for i, (text, speech) in enumerate(utterances)]
        for k in batch:
            x = np.concatenate([p[k] for p in parts])
            batch[k].append(np.pad(x, (0, size - len(x)), constant_values=-1 if k == "targets" else 0))
    return {k: np.stack(v) for k, v in batch.items()}


def random_utterance(rng, num_text, num_speech):
    return rng.integers(0, TINY.text_vocab, num_text), rng.integers(0, TINY.num_codes, num_speech)


def random_batch(num_rows=8, size=24):
    rng = np.random.default_rng(0)
    return rows([[random_utterance(rng, 3, 5), random_utterance(rng, 2, 7)] for _ in range(num_rows)], size)


def model_of(cfg=TINY):
    return jax.block_until_ready(jax.jit(lm.init, static_argnums=0)(cfg, jax.random.key(0)))


def spread(model):
    """The same weights on the current mesh, split as `init` splits them."""
    abstract = jax.eval_shape(lambda key: lm.init(TINY, key), jax.random.key(0))
    mesh = jax.sharding.get_mesh()

    def move(x, like):
        return jax.device_put(np.asarray(x), jax.NamedSharding(mesh, like.sharding.spec))

    moved = jax.tree.map(move, model, abstract)
    return jax.block_until_ready(moved)


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
    scores, _ = jax.jit(lm.prefill, static_argnums=1)(
        lm.unstack(model, cfg), cfg, batch["tokens"], batch["kinds"], np.array([num, num - 4])
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
    greedy = lm.Sampling(greedy=True, repetition_aware=False)
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


# --- decoding ---


def call(model, sampling, text, text_lengths, prompt, prompt_lengths, least, most, seeds, max_new, cfg=TINY):
    """lm.generate on plain lists, one seed per row."""
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    numbers = [jnp.asarray(x, jnp.int32) for x in (text, text_lengths, prompt, prompt_lengths, least, most)]
    out = lm.generate(model, cfg, sampling, *numbers, keys, max_new)
    return tuple(np.asarray(x) for x in jax.block_until_ready(out))


def requests(num_rows, text_columns=6, prompt_columns=5, padding=0):
    """Random rows of several lengths, padded with `padding`; the content does not depend on the columns."""
    rng = np.random.default_rng(2)
    text, prompt = np.full((num_rows, text_columns), padding), np.full((num_rows, prompt_columns), padding)
    text_lengths, prompt_lengths = [], []
    for row in range(num_rows):
        a, b = random_utterance(rng, 1 + row % 6, row % 5)
        text[row, : len(a)], prompt[row, : len(b)] = a, b
        text_lengths.append(len(a))
        prompt_lengths.append(len(b))
    return text, text_lengths, prompt, prompt_lengths


@pytest.mark.parametrize(
    "dtype, num_rows, mesh, atol",
    [  # bfloat16 against the float32 forward, logits up to 4.7; without a cache it is off by up to 0.14
        ("float32", 2, MESHES[0], 3e-5),
        ("bfloat16", 2, MESHES[0], 0.16),
        ("bfloat16", 1, MESHES[0], 0.16),
        ("bfloat16", 2, (1, 2, 2), 0.16),
    ],
)
def test_cached_logits_equal_the_full_forward(model, dtype, num_rows, mesh, atol):
    sharding.make_mesh(*mesh)
    cfg, rng = dataclasses.replace(TINY, dtype=dtype), np.random.default_rng(6)
    batch = rows([[random_utterance(rng, 3, 9)], [random_utterance(rng, 5, 7)]], 14)
    batch = {name: x[:num_rows] for name, x in batch.items()}
    full = np.asarray(logits(spread(model), TINY, sharding.put(batch)))
    weights = lm.unstack(spread(model), cfg)
    start, row = np.array([6, 8])[:num_rows], np.arange(num_rows)  # rows are at different places
    inside = np.arange(14) < start[:, None]
    put = lambda *arrays: sharding.put(dict(enumerate(arrays))).values()
    [length] = put(start)
    scores, before = jax.jit(lm.prefill, static_argnums=1)(
        weights, cfg, *put(batch["tokens"], batch["kinds"] * inside), length
    )
    step, new = jax.jit(lm.decode_step, static_argnums=1), lm.empty(before, 6)
    for i in range(6):
        np.testing.assert_allclose(scores, full[row, start + i - 1], atol=atol)
        scores, new = step(weights, cfg, *put(batch["tokens"][row, start + i]), length, before, new, i)
    np.testing.assert_allclose(scores, full[row, start + 5], atol=atol)


@pytest.mark.parametrize("mesh", [MESHES[0], MESHES[3]])
@pytest.mark.parametrize("num_rows", [1, 2, lm.FEW_ROWS, lm.FEW_ROWS + 1])
def test_a_float32_product_has_the_weights_on_the_left_for_few_rows(num_rows, mesh):
    sharding.make_mesh(*mesh)
    rng = np.random.default_rng(num_rows)
    x, kernel = (rng.standard_normal(shape, np.float32) for shape in ((num_rows, 1, 32), (48, 32)))
    cfg, whole = dataclasses.replace(TINY, dtype="float32"), jax.sharding.PartitionSpec(None, None, None)
    step = jax.jit(lambda x, kernel: lm._product(x, kernel, cfg, whole))
    program = step.lower(jnp.asarray(x), jnp.asarray(kernel)).compile()
    np.testing.assert_allclose(program(x, kernel), x @ kernel.T, atol=2e-5)
    if mesh == MESHES[0] and jax.default_backend() == "cpu" and num_rows > 1:
        made = re.search(r"= f32\[(\d+),(\d+)\]\S* dot\(", program.as_text()).groups()
        few = num_rows <= lm.FEW_ROWS
        assert made == (("48", str(num_rows)) if few else (str(num_rows), "48"))


def reference_sample(scores, generated, key, s):
    """Repetition-aware sampling, step by step, on the same Gumbel noise as jax.random.categorical."""
    scores = scores.astype(np.float32) / np.float32(s.temperature)
    p = np.exp(scores - scores.max())
    p = p / p.sum()
    kept, mass = [], 0.0
    for token in np.argsort(-p, kind="stable"):
        if mass >= s.top_p or len(kept) >= s.top_k:
            break
        kept.append(token)
        mass += p[token]
    first, second = jax.random.split(key)
    noise = np.asarray(jax.random.gumbel(first, (min(s.top_k, len(scores)),)))
    token = kept[int(np.argmax(scores[kept] + noise[: len(kept)]))]
    if s.repetition_aware and generated[-s.window :].count(token) >= s.window * s.tau - 1e-9:
        rest = scores.copy()
        rest[token] = -np.inf
        token = int(np.argmax(rest + np.asarray(jax.random.gumbel(second, scores.shape))))
    return int(token)


@pytest.mark.parametrize(
    "sampling",
    [
        lm.Sampling(),
        lm.Sampling(top_p=0.5, top_k=4, window=3, tau=0.4, temperature=0.7),
        lm.Sampling(top_p=1.0, top_k=100, repetition_aware=False),
    ],
)
def test_generate_equals_an_uncached_loop_with_a_plain_sampler(model, sampling):
    text, text_lengths, prompt, prompt_lengths = requests(4)
    seeds, least, most = [11, 12, 13, 14], [5, 0, 0, 8], [16, 16, 6, 16]
    tokens, lengths = call(
        model, sampling, text, text_lengths, prompt, prompt_lengths, least, most, seeds, 16
    )
    for row in range(4):
        said = []
        while len(said) < most[row]:
            speech = [*prompt[row, : prompt_lengths[row]], *said]
            batch = rows([[(text[row, : text_lengths[row]], speech)]], 32)
            at = 1 + text_lengths[row] + len(speech)
            scores = np.array(logits(model, TINY, batch))[0, at]
            if len(said) < least[row]:
                scores[TINY.num_codes :] = -np.inf
            key = jax.random.fold_in(jax.random.key(seeds[row]), len(said))
            token = reference_sample(scores, said, key, sampling)
            if token >= TINY.num_codes:
                break
            said.append(token)
        assert tokens[row, : lengths[row]].tolist() == said
        assert not tokens[row, lengths[row] :].any()


def test_a_row_does_not_depend_on_its_neighbours_or_on_padding(model):
    least, most, seeds = [4] * 4, [16] * 4, [1, 2, 3, 4]
    together = call(model, lm.Sampling(), *requests(4), least, most, seeds, 16)
    padded = call(model, lm.Sampling(), *requests(4, 11, 9, padding=19), least, most, seeds, 16)
    np.testing.assert_array_equal(padded[0], together[0])
    np.testing.assert_array_equal(padded[1], together[1])
    for row in range(4):
        one = [np.asarray(x)[row : row + 1] for x in requests(4)]
        alone = call(model, lm.Sampling(), *one, [4], [16], seeds[row : row + 1], 16)
        np.testing.assert_array_equal(alone[0][0], together[0][row])
        assert alone[1][0] == together[1][row]


@pytest.mark.parametrize("num_rows, meshes", [(8, MESHES), (3, [MESHES[0], MESHES[3]])])
def test_generate_gives_the_same_tokens_on_every_mesh(model, num_rows, meshes):
    results = []
    for shape in meshes:  # 3 rows are repeated on every device
        sharding.make_mesh(*shape)
        arguments = ([3] * num_rows, [8] * num_rows, range(num_rows), 8)
        results.append(call(spread(model), lm.Sampling(), *requests(num_rows), *arguments))
    for tokens, lengths in results[1:]:
        np.testing.assert_array_equal(tokens, results[0][0])
        np.testing.assert_array_equal(lengths, results[0][1])


def pushed_to_end(model, amount):
    """Decode weights whose three stopping ids are more or less likely."""
    weights = lm.unstack(model, TINY)
    return dataclasses.replace(weights, head_bias=weights.head_bias.at[TINY.end_id :].add(amount))


def test_no_row_ends_before_its_minimum_or_after_its_maximum(model):
    def lengths(weights, least, most):
        return call(weights, lm.Sampling(), *requests(4), least, most, [1, 2, 3, 4], 16)[1].tolist()

    assert lengths(pushed_to_end(model, 100.0), [0, 1, 5, 9], [10] * 4) == [0, 1, 5, 9]
    # the last one is cut by the columns of the result
    assert lengths(pushed_to_end(model, -100.0), [0] * 4, [0, 1, 7, 99]) == [0, 1, 7, 16]


def test_each_special_id_of_a_longer_list_stops_a_row_and_none_before_its_minimum():
    cfg = dataclasses.replace(TINY, num_special=6, end_offset=1)
    assert (cfg.end_id, cfg.num_speech_rows) == (TINY.num_codes + 1, TINY.num_codes + 6)
    weights = lm.unstack(model_of(cfg), cfg)
    for special in range(cfg.num_codes, cfg.num_speech_rows):
        pushed = dataclasses.replace(weights, head_bias=weights.head_bias.at[special].add(100.0))
        lengths = call(pushed, lm.Sampling(), *requests(2), [0, 3], [8] * 2, [1, 2], 8, cfg)[1]
        assert lengths.tolist() == [0, 3]


def test_an_empty_prompt_and_no_prompt_columns_are_the_same(model):
    text, text_lengths, _, _ = requests(2)
    results = [
        call(
            model,
            lm.Sampling(),
            text,
            text_lengths,
            np.zeros((2, columns)),
            [0, 0],
            [4] * 2,
            [8] * 2,
            [5, 6],
            8,
        )
        for columns in (0, 3)
    ]
    np.testing.assert_array_equal(results[0][0], results[1][0])


def test_generate_refuses_rows_that_do_not_match(model):
    text, text_lengths, prompt, prompt_lengths = requests(3)
    with pytest.raises(ValueError, match="prompt_tokens has 2 rows"):
        call(
            model,
            lm.Sampling(),
            text,
            text_lengths,
            prompt[:2],
            prompt_lengths,
            [1] * 3,
            [2] * 3,
            [1, 2, 3],
            4,
        )


# --- one draw ---


def draws(p, sampling, recent=(), num=4000):
    """Relative frequency of each token over `num` draws from probabilities `p`."""
    window = jnp.asarray([*recent, *[-1] * (sampling.window - len(recent))])
    keys = jax.random.split(jax.random.key(0), num)
    scores = jnp.log(jnp.asarray(p, jnp.float32))
    tokens = jax.jit(jax.vmap(lambda k: lm.sample_token(scores, window, k, sampling)))(keys)
    return np.bincount(np.asarray(tokens), minlength=len(p)) / num


def test_the_token_that_crosses_the_mass_limit_is_kept():
    # 0.5 + 0.2 = 0.7 is below 0.8, so the third token is kept; the fourth is not
    found = draws([0.05, 0.5, 0.2, 0.15, 0.1], lm.Sampling())
    assert found[[0, 4]].max() == 0
    np.testing.assert_allclose(found[1:4], np.array([0.5, 0.2, 0.15]) / 0.85, atol=0.03)  # 4 deviations


def test_no_more_than_top_k_tokens_are_kept():
    found = draws([0.3, 0.25, 0.25, 0.2], lm.Sampling(top_p=1.0, top_k=2))
    assert (found > 0).tolist() == [True, True, False, False]


def test_a_repeated_token_is_redrawn_from_the_whole_rest():
    found = draws([0.9, 0.04, 0.03, 0.03], lm.Sampling(), recent=[0])
    assert found[0] == 0
    np.testing.assert_allclose(found[1:], [0.4, 0.3, 0.3], atol=0.03)
    assert draws([0.9, 0.04, 0.03, 0.03], lm.Sampling(repetition_aware=False), recent=[0])[0] == 1


def test_a_token_below_its_share_of_the_window_is_not_redrawn():
    sampling = lm.Sampling(tau=0.3)
    assert draws([0.9, 0.1], sampling, recent=[0, 0], num=50)[0] == 1
    assert draws([0.9, 0.1], sampling, recent=[0, 0, 0], num=50)[0] == 0


def test_greedy_takes_the_most_probable_token():
    assert draws([0.3, 0.4, 0.3], lm.Sampling(greedy=True), num=20)[1] == 1
    assert draws([0.3, 0.4, 0.29, 0.01], lm.Sampling(greedy=True), recent=[1], num=20)[0] == 1


def test_length_limits_round_down():
    assert lm.Sampling(min_ratio=1.5, max_ratio=20.0).limits(5) == (7, 100)


@pytest.mark.parametrize(
    "wrong", [dict(top_p=0.0), dict(top_k=0), dict(tau=0.0), dict(temperature=0.0), dict(min_ratio=30.0)]
)
def test_sampling_refuses_values_out_of_range(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        lm.Sampling(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [dict(num_kv_heads=3), dict(head_dim=7), dict(dtype="float16"), dict(remat="some"), dict(end_offset=3)],
)
def test_config_refuses_sizes_that_do_not_fit(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        lm.Config(**(dict(text_vocab=20, width=32) | SIZES | wrong))
