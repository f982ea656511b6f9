"""Speech tokenizer: the public package's numbers, FSQ arithmetic, padding, long audio, losses."""

import dataclasses
import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fill import fill

from deepasmr_jax import audio
from deepasmr_jax import speech_tokenizer as st

GOLDEN = Path(__file__).parent / "golden" / "speech_tokenizer.npz"
GOLDEN_CONFIG = st.Config(width=128, num_heads=2, num_blocks=2, mlp_width=512)
init = jax.jit(st.init, static_argnums=0)
encode = jax.jit(st.encode, static_argnums=1)
hidden = jax.jit(st.hidden, static_argnums=1)
loss = jax.jit(st.loss, static_argnums=1)
# a short memory kernel compiles faster; the golden tests have the true one
TINY = st.Config(
    width=64, num_heads=2, num_blocks=2, mlp_width=128, fsmn_kernel=5, has_head=True, head_width=64
)
TEXT = dataclasses.replace(TINY, labels="text", head_blocks=1, num_symbols=8)


def num_parameters(cfg):
    tree = jax.eval_shape(lambda key: st.init(cfg, key), jax.random.key(0))
    return sum(x.size for x in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


@pytest.fixture
def golden_model():
    return fill(init(GOLDEN_CONFIG, jax.random.key(0)), 5)


def tones(num_rows, seconds=1.0, seed=0):
    """Stand-in speech: each phone is a pitch held for 80 to 200 ms; odd rows are noisy, F0 class 0."""
    rng = np.random.default_rng(seed)
    num_slots = int(seconds * 50)
    phones = np.concatenate(
        [
            np.repeat(rng.integers(1, 7, (num_rows, 1)), rng.integers(4, 11), axis=1)
            for _ in range(num_slots // 4)
        ],
        axis=1,
    )[:, :num_slots].astype(np.int32)
    hz = np.repeat(250.0 * 1.6**phones, 320, axis=1)
    noisy = (np.arange(num_rows) % 2)[:, None]
    wav = 0.3 * np.sin(2 * np.pi * np.cumsum(hz, axis=1) / 16000)
    wav = wav * (1 - 0.5 * noisy) + rng.standard_normal(wav.shape) * (0.001 + 0.05 * noisy)
    return {
        "wav": wav.astype(np.float32),
        "lengths": np.full(num_rows, wav.shape[1], np.int32),
        "phones": phones,
        "f0_class": (np.where(noisy, 0, 1 + phones % 5)).astype(np.int32),
    }


def spelled(num_rows, seconds=1.0, seed=0):
    """`tones` with the sequence of the phones for a text, in the place of frame labels."""
    batch = tones(num_rows, seconds, seed)
    runs = [row[np.insert(row[1:] != row[:-1], 0, True)] for row in batch.pop("phones")]
    ids = np.stack([np.pad(run, (0, int(25 * seconds) - len(run))) for run in runs]).astype(np.int32)
    lengths = np.asarray([len(run) for run in runs], np.int32)
    return {k: batch[k] for k in ("wav", "lengths")} | {"text_ids": ids, "text_lengths": lengths}


def numpy_ctc(scores, labels):
    """Nats of a label sequence under the scores [N, V] of all positions: the recursion over labels and blanks."""
    log_probs = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    states = np.zeros(2 * len(labels) + 1, int)
    states[1::2] = labels
    alpha = np.where(np.arange(len(states)) < 2, log_probs[0, states], -np.inf)
    for row in log_probs[1:]:
        before = np.stack([alpha, np.append(-np.inf, alpha[:-1]), np.append([-np.inf] * 2, alpha[:-2])])
        before[2, 2:][(states[2:] == 0) | (states[2:] == states[:-2])] = -np.inf
        alpha = np.logaddexp.reduce(before, axis=0) + row[states]
    return -np.logaddexp(alpha[-1], alpha[-2])


def test_stem_and_blocks_equal_the_public_package(golden, golden_model):
    cfg, lengths = GOLDEN_CONFIG, jnp.asarray(golden["lengths"])

    @jax.jit
    def stem_and_blocks(encoder, log_mel, lengths):
        x, mask = encoder.stem(cfg, log_mel, lengths)
        outputs = [x]
        for i in range(cfg.num_blocks):
            outputs.append(jax.tree.map(lambda v: v[i], encoder.blocks)(cfg, outputs[-1], mask))  # noqa: B023
        return mask, outputs

    mask, outputs = stem_and_blocks(golden_model.encoder, golden["log_mel"], lengths)
    valid = np.asarray(mask)
    # 1e-4 of values of size 1 to 5: float32 sums of up to 512 terms in another order
    np.testing.assert_allclose(np.asarray(outputs[0])[valid], golden["stem"][valid], atol=1e-4)
    for i, x in enumerate(outputs[1:]):
        np.testing.assert_allclose(np.asarray(x)[valid], golden[f"block{i}"][valid], atol=2e-4)
    states, projection = hidden(golden_model, cfg, golden["log_mel"], lengths)
    np.testing.assert_allclose(states, golden["block1"], atol=2e-4)
    np.testing.assert_allclose(projection, golden["projection"], atol=2e-4)


def test_all_codes_of_a_padded_batch_equal_the_public_package(golden, golden_model):
    tokens, counts = encode(golden_model, GOLDEN_CONFIG, golden["log_mel"], jnp.asarray(golden["lengths"]))
    np.testing.assert_array_equal(tokens, golden["codes"])
    np.testing.assert_array_equal(counts, golden["counts"])


def test_each_norm_of_a_block_has_its_own_eps(golden, golden_model):
    block = jax.tree.map(lambda v: v[0], golden_model.encoder.blocks)
    mask = jnp.ones((1, 12), bool)
    np.testing.assert_allclose(block(GOLDEN_CONFIG, golden["small"], mask), golden["small_block"], atol=1e-4)
    other = dataclasses.replace(GOLDEN_CONFIG, attention_norm_eps=1e-5)
    assert np.abs(block(other, golden["small"], mask) - golden["small_block"]).max() > 1e-2


def test_presets_have_their_stated_sizes():
    assert num_parameters(st.s3_v2()) == 123_714_568
    with_head, bare = (
        num_parameters(st.mini()),
        num_parameters(dataclasses.replace(st.mini(), has_head=False)),
    )
    assert 1.9e6 < bare < 2.1e6 < with_head < 2.2e6


def test_the_digits_cover_all_codes():
    digits = jnp.asarray(list(itertools.product((-1, 0, 1), repeat=8)))[:, ::-1]
    np.testing.assert_array_equal(st.tokens_of(digits), np.arange(audio.NUM_CODES))
    assert int(st.tokens_of(jnp.zeros(8))) == 3280
    assert int(st.tokens_of(jnp.asarray([1, -1, -1, -1, -1, -1, -1, -1]))) == 2  # digit 0 counts least


def test_padding_and_neighbours_do_not_change_a_row():
    model = init(TINY, jax.random.key(1))
    rng = np.random.default_rng(0)
    log_mel = rng.uniform(-1, 1, (3, 90, 128)).astype(np.float32)
    lengths = np.asarray([90, 33, 50], np.int32)
    _, together = hidden(model, TINY, log_mel, jnp.asarray(lengths))
    for row, length in enumerate(lengths):
        _, alone = hidden(model, TINY, log_mel[row : row + 1, :length], jnp.asarray([length]))
        count = -(-int(length) // 4)
        # other shapes, other blocking of the products: float32 rounding only
        np.testing.assert_allclose(together[row, :count], alone[0], atol=2e-5)
        assert not np.any(together[row, count:])


@pytest.mark.parametrize("num_frames", [1, 3000, 3001, 5250, 5601])
def test_long_audio_gives_one_token_for_every_four_frames(num_frames):
    cfg = st.Config(width=32, num_heads=2, num_blocks=1, mlp_width=32, fsmn_kernel=3)
    model = init(cfg, jax.random.key(2))
    log_mel = np.random.default_rng(1).uniform(-1, 1, (num_frames, 128)).astype(np.float32)
    tokens = st.encode_long(model, cfg, log_mel)
    assert tokens.shape == (-(-num_frames // 4),) and tokens.dtype == np.int32
    if num_frames == 5250:  # the case where public code gives 1263
        assert len(tokens) == 1313
        last = encode(model, cfg, log_mel[None, 2600:], jnp.asarray([2650]))[0][0]
        assert (
            np.mean(tokens[700:] == np.asarray(last)[50:]) > 0.99
        )  # rounding may flip a digit near its limit
        first = encode(model, cfg, log_mel[None, :3000], jnp.asarray([3000]))[0][0]
        assert np.mean(tokens[:700] == np.asarray(first)[:700]) > 0.99


def test_wrong_inputs_are_refused_with_the_number_that_is_wrong():
    model = init(TINY, jax.random.key(0))
    with pytest.raises(ValueError, match="80"):
        st.encode(model, TINY, jnp.zeros((1, 10, 80)), jnp.asarray([10]))
    with pytest.raises(ValueError, match="3004"):
        st.encode(model, TINY, jnp.zeros((1, 3004, 128)), jnp.asarray([3004]))
    bare, bare_cfg = st.without_head(model, TINY)
    with pytest.raises(ValueError, match="has_head"):
        st.loss(bare, bare_cfg, tones(1), None)
    with pytest.raises(ValueError, match="no text_ids, text_lengths; give data.labels=text"):
        st.loss(jax.eval_shape(lambda: st.init(TEXT, jax.random.key(0))), TEXT, tones(1), None)
    with pytest.raises(ValueError, match="no f0_class, phones; give frame labels"):
        st.loss(model, TINY, {k: v for k, v in tones(1).items() if k in ("wav", "lengths")}, None)
    with pytest.raises(ValueError, match="7"):
        st.Config(width=64, num_heads=7)


def test_exported_tokenizer_without_its_head_gives_the_same_tokens():
    model = init(TINY, jax.random.key(3))
    bare, bare_cfg = st.without_head(model, TINY)
    assert bare.head is None and not bare_cfg.has_head
    like = jax.tree.structure(jax.eval_shape(lambda key: st.init(bare_cfg, key), jax.random.key(0)))
    assert jax.tree.structure(bare) == like
    log_mel = np.random.default_rng(2).uniform(-1, 1, (1, 40, 128)).astype(np.float32)
    with_head = encode(model, TINY, log_mel, jnp.asarray([40]))[0]
    np.testing.assert_array_equal(encode(bare, bare_cfg, log_mel, jnp.asarray([40]))[0], with_head)


def test_padded_frames_and_labels_do_not_change_the_loss():
    model = init(TINY, jax.random.key(4))
    batch = tones(2, 0.6)
    padded = {
        "wav": np.pad(batch["wav"], ((0, 0), (0, 3200)), constant_values=0.5),
        "lengths": batch["lengths"],
        "phones": np.pad(batch["phones"], ((0, 0), (0, 10)), constant_values=-1),
        "f0_class": np.pad(batch["f0_class"], ((0, 0), (0, 10)), constant_values=-1),
    }
    total, count, _ = loss(model, TINY, batch, None)
    padded_total, padded_count, _ = loss(model, TINY, padded, None)
    assert count == padded_count == 60
    np.testing.assert_allclose(total, padded_total, rtol=1e-5)


def test_the_loss_of_a_text_is_plain_ctc_over_its_codes_and_its_states_whatever_the_padding():
    batch, model = spelled(4, 0.8), init(TEXT, jax.random.key(4))
    batch["text_lengths"][3] = 0  # no text
    batch["text_ids"][2], batch["text_lengths"][2] = 5, 18  # 20 tokens; 17 blanks would have to part these

    @jax.jit
    def both_scores(model):
        log_mel = audio.s3_log_mel(batch["wav"], batch["lengths"])
        states, projection = st.hidden(model, TEXT, log_mel, batch["lengths"] // 160)
        mask = jnp.ones(projection.shape[:2], bool)
        return model.head.logits(TEXT, jnp.round(projection), mask), model.head.direct_logits(states)

    texts = [batch["text_ids"][i, : batch["text_lengths"][i]] for i in range(2)]
    scores = [np.asarray(s, np.float64) for s in both_scores(model)]
    expected = sum(numpy_ctc(s[i], texts[i]) for s in scores for i in range(2))
    padded = batch | {
        "wav": np.pad(batch["wav"], ((0, 0), (0, 3200)), constant_values=0.5),
        "text_ids": np.pad(batch["text_ids"], ((0, 0), (0, 5)), constant_values=3),
    }
    for rows in (batch, padded):
        total, count, aux = loss(model, TEXT, rows, None)
        np.testing.assert_allclose(total, expected, rtol=1e-5)
        assert count == sum(map(len, texts)) and aux["rows_used"] == (2, 4)


def test_without_f0_weight_no_style_label_reaches_the_encoder():
    batch = tones(2, 0.4)
    other = {**batch, "f0_class": (batch["f0_class"] + 2) % 6}

    @functools.partial(jax.jit, static_argnums=0)
    def encoder_gradient(cfg, batch):
        model = init(cfg, jax.random.key(5))
        return jax.grad(lambda m: st.loss(m, cfg, batch, None)[0])(model).encoder.conv1.kernel[...]

    off = dataclasses.replace(TINY, f0_weight=0.0)
    np.testing.assert_array_equal(encoder_gradient(off, batch), encoder_gradient(off, other))
    assert np.abs(encoder_gradient(TINY, batch) - encoder_gradient(TINY, other)).max() > 0


@pytest.mark.parametrize("cfg", [TINY, TEXT], ids=["frames", "text"])
def test_one_batch_is_learned_through_its_codes_alone(cfg):
    batch = {"frames": tones, "text": spelled}[cfg.labels](4, 0.8)
    model = init(cfg, jax.random.key(9))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))

    @jax.jit
    def step(model, opt_state):
        def objective(model):
            total, count, aux = st.loss(model, cfg, batch, None)
            return total / count, aux

        (_, aux), gradient = jax.value_and_grad(objective, has_aux=True)(model)
        updates, opt_state = tx.update(gradient, opt_state, model)
        return optax.apply_updates(model, updates), opt_state, aux

    opt_state = tx.init(model)
    for _ in range(150 if cfg is TINY else 40):
        model, opt_state, aux = step(model, opt_state)
    rates = {name: float(total / count) for name, (total, count) in aux.items()}
    if cfg is TEXT:
        assert rates["code_nats"] < 1.0 and rates["distinct_codes"] > 6, rates
        return
    assert rates["phone_accuracy"] > 0.9, rates
    assert rates["f0_accuracy"] > 0.8, rates
    assert rates["distinct_codes"] > 6, rates
