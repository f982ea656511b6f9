"""Decoding of the speech LM: cache, padding, meshes, sampling."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_lm import MESHES, TINY, call, model_of, random_utterance, rows, spread

from deepasmr_jax import decoding, lm, sharding

logits = jax.jit(lm.logits, static_argnums=1)


@pytest.fixture(scope="module")
def model():
    sharding.make_mesh()
    return model_of()


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
    weights = decoding.unstack(spread(model), cfg)
    start, row = np.array([6, 8])[:num_rows], np.arange(num_rows)  # rows are at different places
    inside = np.arange(14) < start[:, None]
    put = lambda *arrays: sharding.put(dict(enumerate(arrays))).values()
    [length] = put(start)
    scores, before = jax.jit(decoding.prefill, static_argnums=1)(
        weights, cfg, *put(batch["tokens"], batch["kinds"] * inside), length
    )
    step, new = jax.jit(decoding.decode_step, static_argnums=1), decoding.empty(before, 6)
    for i in range(6):
        np.testing.assert_allclose(scores, full[row, start + i - 1], atol=atol)
        scores, new = step(weights, cfg, *put(batch["tokens"][row, start + i]), length, before, new, i)
    np.testing.assert_allclose(scores, full[row, start + 5], atol=atol)


@pytest.mark.parametrize("mesh", [MESHES[0], MESHES[3]])
@pytest.mark.parametrize("num_rows", [1, 2, decoding.FEW_ROWS, decoding.FEW_ROWS + 1])
def test_a_float32_product_has_the_weights_on_the_left_for_few_rows(num_rows, mesh):
    sharding.make_mesh(*mesh)
    rng = np.random.default_rng(num_rows)
    x, kernel = (rng.standard_normal(shape, np.float32) for shape in ((num_rows, 1, 32), (48, 32)))
    cfg, whole = dataclasses.replace(TINY, dtype="float32"), jax.sharding.PartitionSpec(None, None, None)
    step = jax.jit(lambda x, kernel: decoding._product(x, kernel, cfg, whole))
    program = step.lower(jnp.asarray(x), jnp.asarray(kernel)).compile()
    np.testing.assert_allclose(program(x, kernel), x @ kernel.T, atol=2e-5)
    if mesh == MESHES[0] and jax.default_backend() == "cpu" and num_rows > 1:
        made = re.search(r"= f32\[(\d+),(\d+)\]\S* dot\(", program.as_text()).groups()
        few = num_rows <= decoding.FEW_ROWS
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
        decoding.Sampling(),
        decoding.Sampling(top_p=0.5, top_k=4, window=3, tau=0.4, temperature=0.7),
        decoding.Sampling(top_p=1.0, top_k=100, repetition_aware=False),
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
    together = call(model, decoding.Sampling(), *requests(4), least, most, seeds, 16)
    padded = call(model, decoding.Sampling(), *requests(4, 11, 9, padding=19), least, most, seeds, 16)
    np.testing.assert_array_equal(padded[0], together[0])
    np.testing.assert_array_equal(padded[1], together[1])
    for row in range(4):
        one = [np.asarray(x)[row : row + 1] for x in requests(4)]
        alone = call(model, decoding.Sampling(), *one, [4], [16], seeds[row : row + 1], 16)
        np.testing.assert_array_equal(alone[0][0], together[0][row])
        assert alone[1][0] == together[1][row]


@pytest.mark.parametrize("num_rows, meshes", [(8, MESHES), (3, [MESHES[0], MESHES[3]])])
def test_generate_gives_the_same_tokens_on_every_mesh(model, num_rows, meshes):
    results = []
    for shape in meshes:  # 3 rows are repeated on every device
        sharding.make_mesh(*shape)
        arguments = ([3] * num_rows, [8] * num_rows, range(num_rows), 8)
        results.append(call(spread(model), decoding.Sampling(), *requests(num_rows), *arguments))
    for tokens, lengths in results[1:]:
        np.testing.assert_array_equal(tokens, results[0][0])
        np.testing.assert_array_equal(lengths, results[0][1])


def pushed_to_end(model, amount):
    """Decode weights whose three stopping ids are more or less likely."""
    weights = decoding.unstack(model, TINY)
    return dataclasses.replace(weights, head_bias=weights.head_bias.at[TINY.end_id :].add(amount))


def test_no_row_ends_before_its_minimum_or_after_its_maximum(model):
    def lengths(weights, least, most):
        return call(weights, decoding.Sampling(), *requests(4), least, most, [1, 2, 3, 4], 16)[1].tolist()

    assert lengths(pushed_to_end(model, 100.0), [0, 1, 5, 9], [10] * 4) == [0, 1, 5, 9]
    # the last one is cut by the columns of the result
    assert lengths(pushed_to_end(model, -100.0), [0] * 4, [0, 1, 7, 99]) == [0, 1, 7, 16]


def test_each_special_id_of_a_longer_list_stops_a_row_and_none_before_its_minimum():
    cfg = dataclasses.replace(TINY, num_special=6, end_offset=1)
    assert (cfg.end_id, cfg.num_speech_rows) == (TINY.num_codes + 1, TINY.num_codes + 6)
    weights = decoding.unstack(model_of(cfg), cfg)
    for special in range(cfg.num_codes, cfg.num_speech_rows):
        pushed = dataclasses.replace(weights, head_bias=weights.head_bias.at[special].add(100.0))
        lengths = call(pushed, decoding.Sampling(), *requests(2), [0, 3], [8] * 2, [1, 2], 8, cfg)[1]
        assert lengths.tolist() == [0, 3]


def test_an_empty_prompt_and_no_prompt_columns_are_the_same(model):
    text, text_lengths, _, _ = requests(2)
    no_prompts = [(np.zeros((2, columns)), [0, 0]) for columns in (0, 3)]
    limits = [4] * 2, [8] * 2, [5, 6], 8
    results = [call(model, decoding.Sampling(), text, text_lengths, *none, *limits) for none in no_prompts]
    np.testing.assert_array_equal(results[0][0], results[1][0])


def test_generate_refuses_rows_that_do_not_match(model):
    text, text_lengths, prompt, prompt_lengths = requests(3)
    with pytest.raises(ValueError, match="prompt_tokens has 2 rows"):
        given = text, text_lengths, prompt[:2], prompt_lengths
        call(model, decoding.Sampling(), *given, [1] * 3, [2] * 3, [1, 2, 3], 4)


# --- one draw ---


def draws(p, sampling, recent=(), num=4000):
    """Relative frequency of each token over `num` draws from probabilities `p`."""
    window = jnp.asarray([*recent, *[-1] * (sampling.window - len(recent))])
    keys = jax.random.split(jax.random.key(0), num)
    scores = jnp.log(jnp.asarray(p, jnp.float32))
    tokens = jax.jit(jax.vmap(lambda k: decoding.sample_token(scores, window, k, sampling)))(keys)
    return np.bincount(np.asarray(tokens), minlength=len(p)) / num


def test_the_token_that_crosses_the_mass_limit_is_kept():
    # 0.5 + 0.2 = 0.7 is below 0.8, so the third token is kept; the fourth is not
    found = draws([0.05, 0.5, 0.2, 0.15, 0.1], decoding.Sampling())
    assert found[[0, 4]].max() == 0
    np.testing.assert_allclose(found[1:4], np.array([0.5, 0.2, 0.15]) / 0.85, atol=0.03)  # 4 deviations


def test_no_more_than_top_k_tokens_are_kept():
    found = draws([0.3, 0.25, 0.25, 0.2], decoding.Sampling(top_p=1.0, top_k=2))
    assert (found > 0).tolist() == [True, True, False, False]


def test_a_repeated_token_is_redrawn_from_the_whole_rest():
    found = draws([0.9, 0.04, 0.03, 0.03], decoding.Sampling(), recent=[0])
    assert found[0] == 0
    np.testing.assert_allclose(found[1:], [0.4, 0.3, 0.3], atol=0.03)
    assert draws([0.9, 0.04, 0.03, 0.03], decoding.Sampling(repetition_aware=False), recent=[0])[0] == 1


def test_a_token_below_its_share_of_the_window_is_not_redrawn():
    sampling = decoding.Sampling(tau=0.3)
    assert draws([0.9, 0.1], sampling, recent=[0, 0], num=50)[0] == 1
    assert draws([0.9, 0.1], sampling, recent=[0, 0, 0], num=50)[0] == 0


def test_greedy_takes_the_most_probable_token():
    assert draws([0.3, 0.4, 0.3], decoding.Sampling(greedy=True), num=20)[1] == 1
    assert draws([0.3, 0.4, 0.29, 0.01], decoding.Sampling(greedy=True), recent=[1], num=20)[0] == 1


def test_length_limits_round_down():
    assert decoding.Sampling(min_ratio=1.5, max_ratio=20.0).limits(5) == (7, 100)


@pytest.mark.parametrize(
    "wrong", [dict(top_p=0.0), dict(top_k=0), dict(tau=0.0), dict(temperature=0.0), dict(min_ratio=30.0)]
)
def test_sampling_refuses_values_out_of_range(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        decoding.Sampling(**wrong)
