"""The Mandarin judge's recogniser: padding, CTC, decoding, and that it can learn."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepasmr_jax import nn, recognizer, text

TINY = recognizer.Config(width=32, num_heads=4, num_layers=2, mlp_width=64, kernel=5)
NI_HAO = [text.PHONES.index(p) for p in ("zh_n", "zh_i", "zh_h", "zh_ao")]


loss = jax.jit(recognizer.loss, static_argnums=1)


def clips(rows: int, samples: int, seed: int = 0) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal((rows, samples)).astype(np.float32)


def batch(rows: int = 4, samples: int = 9600) -> dict[str, np.ndarray]:
    """Noise whose frames are called NI_HAO, 5 or 6 frames a phone between silences, and padding at the end."""
    phones = np.zeros((rows, samples // 320), np.int32)
    for i, phone in enumerate(NI_HAO):
        phones[:, 2 + 6 * i : 7 + 6 * i + (i % 2)] = phone
    phones[:, 27:] = -1
    return {"wav": clips(rows, samples), "lengths": np.full(rows, samples, np.int32), "phones": phones}


def test_symbols_are_the_mandarin_part_of_the_phone_inventory():
    assert recognizer.SYMBOLS[1] == "zh_b" and recognizer.SYMBOLS[-1] == text.PHONES[-1]
    assert len(recognizer.SYMBOLS) == 1 + len(text.ZH_INITIALS) + len(text.ZH_FINALS)


def test_padding_and_level_change_no_valid_score():
    model = recognizer.init(TINY, jax.random.key(0))
    wav = clips(1, 12800)
    short, counts = recognizer._scores(model, TINY, wav, jnp.array([12800]))
    padded = np.concatenate([wav, clips(1, 6400, 7)], axis=1)
    both = np.concatenate([padded, clips(1, 19200, 8)])
    long, more = recognizer._scores(model, TINY, both, jnp.array([12800, 19200]))
    assert counts[0] == more[0] == 20 and more[1] == 30
    np.testing.assert_allclose(long[0, :20], short[0], atol=2e-4)  # float32 products in another order
    quiet, _ = recognizer._scores(model, TINY, 0.3 * wav, jnp.array([12800]))
    np.testing.assert_allclose(quiet, short, atol=2e-3)  # the log floor moves a little


def test_loss_is_the_negative_log_of_the_summed_path_probabilities():
    scores = jax.random.normal(jax.random.key(1), (1, 4, 3))
    found = nn.ctc(scores, jnp.array([4]), jnp.array([[1, 2]]), jnp.array([2]))[0]
    logp = np.asarray(jax.nn.log_softmax(scores[0]))
    total = 0.0
    for path in itertools.product(range(3), repeat=4):
        joined = [s for i, s in enumerate(path) if s and (i == 0 or s != path[i - 1])]
        if joined == [1, 2]:
            total += np.exp(sum(logp[t, s] for t, s in enumerate(path)))
    np.testing.assert_allclose(found, -np.log(total), rtol=1e-5)


def test_rows_without_mandarin_or_too_long_for_their_clip_carry_no_loss():
    model = recognizer.init(TINY, jax.random.key(0))
    whole = batch()
    total, count, aux = loss(model, TINY, whole, None)
    part = {k: v.copy() for k, v in whole.items()}
    part["phones"][1] = 0
    part["lengths"][2] = 1920  # 3 positions for 4 symbols
    part["phones"][3] = text.PHONES.index("AA")
    some, fewer, used = loss(model, TINY, part, None)
    first = whole | {"phones": np.where(np.arange(4)[:, None] == 0, whole["phones"], 0)}
    alone, _, _ = loss(model, TINY, first, None)
    assert count == 16 and fewer == 4 and used["rows_used"] == (1.0, 4.0)
    np.testing.assert_allclose(some, alone, rtol=1e-5)
    assert np.isfinite(total) and aux["blank_share"][1] == 4 * 15


def test_frame_labels_give_the_loss_of_the_sequence_they_spell():
    model = recognizer.init(TINY, jax.random.key(0))
    given = batch()
    ids, lengths = recognizer.sequence_of_frames(jnp.asarray(given["phones"]), 6)
    assert ids[0].tolist() == [*NI_HAO, 0, 0] and lengths.tolist() == [4] * 4
    scores, counts = recognizer._scores(model, TINY, given["wav"], given["lengths"])
    symbols = np.array([[recognizer.SYMBOLS.index(text.PHONES[i]) for i in NI_HAO]] * 4)
    by_hand = jnp.sum(nn.ctc(scores, counts, jnp.asarray(symbols), jnp.full(4, 4)))
    np.testing.assert_allclose(loss(model, TINY, given, None)[0], by_hand, rtol=1e-5)
    with pytest.raises(ValueError, match="no phones; give frame labels"):
        recognizer.loss(model, TINY, {k: given[k] for k in ("wav", "lengths")}, None)


def test_the_tiny_recogniser_learns_to_read_one_batch():
    tones = {"zh_b": 300, "zh_a": 700, "zh_m": 1500, "zh_i": 2600}
    rng = np.random.default_rng(0)
    sequences = [list(rng.permutation(list(tones))) for _ in range(8)]
    t = np.arange(3200) / 16000
    wav = np.stack([np.concatenate([0.2 * np.sin(2 * np.pi * tones[p] * t) for p in s]) for s in sequences])
    wav = (wav + 0.001 * rng.standard_normal(wav.shape)).astype(np.float32)
    data = {
        "wav": wav,
        "lengths": np.full(8, wav.shape[1], np.int32),
        "phones": np.repeat(
            np.array([[text.PHONES.index(p) for p in s] for s in sequences], np.int32), 10, 1
        ),
    }
    model = recognizer.init(TINY, jax.random.key(0))
    tx = optax.adam(3e-3)

    @jax.jit
    def step(model, state):
        def mean(model):
            total, count, _ = recognizer.loss(model, TINY, data, None)
            return total / count

        value, grads = jax.value_and_grad(mean)(model)
        updates, state = tx.update(grads, state, model)
        return optax.apply_updates(model, updates), state, value

    state = tx.init(model)
    for _ in range(120):
        model, state, value = jax.block_until_ready(step(model, state))
    assert value < 0.1
    assert recognizer.decode(model, TINY, data["wav"], data["lengths"]) == sequences


def test_a_head_size_that_is_no_even_number_is_refused():
    with pytest.raises(ValueError, match="width 30 with 4 heads"):
        recognizer.Config(width=30, num_heads=4)
    with pytest.raises(ValueError, match="kernel 4 is even"):
        recognizer.Config(kernel=4)


def test_target_is_the_pinyin_of_the_sentence_without_tones():
    pytest.importorskip("pypinyin")
    assert recognizer.target("你好。").tolist() == NI_HAO
