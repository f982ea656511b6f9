"""A tiny language model, packed rows and a plain call of the decoding, for the tests of both."""

import jax
import jax.numpy as jnp
import numpy as np

from deepasmr_jax import decoding, lm

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


def call(model, sampling, text, text_lengths, prompt, prompt_lengths, least, most, seeds, max_new, cfg=TINY):
    """decoding.generate on plain lists, one seed per row."""
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    numbers = [jnp.asarray(x, jnp.int32) for x in (text, text_lengths, prompt, prompt_lengths, least, most)]
    out = decoding.generate(model, cfg, sampling, *numbers, keys, max_new)
    return tuple(np.asarray(x) for x in jax.block_until_ready(out))
