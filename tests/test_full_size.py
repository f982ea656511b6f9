"""Inference at full size, lowered on a mesh of eight without memory for its arrays; training steps: test_train.py."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from deepasmr_jax import (
    checkpoint,
    decoding,
    flow,
    flow_cosyvoice2,
    lm,
    sharding,
    speaker,
    speech_tokenizer,
    vocoder,
    vocoder_hift,
)

ROWS, TOKENS = 8, 500


def array(*shape, dtype=jnp.int32):
    """An argument, its rows split over the mesh."""
    spec = sharding.spec("batch", *[None] * (len(shape) - 1))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(sharding.ensure_mesh(), spec))


def generate():
    cfg = lm.cosyvoice2(activation_dtype="bfloat16")
    model = checkpoint.abstract(functools.partial(lm.init, cfg), jax.random.key(0))
    call = lambda model, *x: decoding.generate(
        decoding.unstack(model, cfg), cfg, decoding.Sampling(), *x, max_new=TOKENS
    )
    count = array(ROWS)
    return call, model, array(ROWS, 64), count, array(ROWS, 128), count, count, count, keys()


def keys():
    shape = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), ROWS))
    return array(*shape.shape, dtype=shape.dtype)


def sample(file, cfg, **more):
    model = checkpoint.abstract(functools.partial(file.init, cfg), jax.random.key(0))
    mel = array(ROWS, file.num_frames(cfg, TOKENS), cfg.mel_bins, dtype=jnp.float32)

    def call(model, tokens, count, mel, keys, more):
        return file.sample(model, cfg, tokens, count, mel, count, keys=keys, num_steps=10, **more)

    return call, model, array(ROWS, TOKENS), array(ROWS), mel, keys(), more


def applied(file, call, cfg, *arguments):
    """A function of a file on its network, padded rows and their lengths."""
    init = getattr(file, "init_generator", file.init)
    model = checkpoint.abstract(functools.partial(init, cfg), jax.random.key(0))
    return (lambda model, *x: call(model, cfg, *x)), model, *arguments, array(ROWS)


def spectrogram(frames, bins=80):
    return array(ROWS, frames, bins, dtype=jnp.float32)


def hifigan(cfg):
    return applied(vocoder, vocoder.apply, cfg, spectrogram(2 * TOKENS))


@pytest.mark.parametrize(
    "make, results",
    [
        (generate, [(ROWS, TOKENS), (ROWS,)]),
        (lambda: sample(flow, flow.deepasmr()), [(ROWS, 2 * TOKENS, 80)]),
        (
            lambda: sample(
                flow_cosyvoice2, flow_cosyvoice2.cosyvoice2(), speaker=array(ROWS, 192, dtype=jnp.float32)
            ),
            [(ROWS, 2 * TOKENS, 80)],
        ),
        (
            lambda: applied(
                vocoder_hift, vocoder_hift.apply, vocoder_hift.cosyvoice2(), spectrogram(2 * TOKENS)
            ),
            [(ROWS, 2 * TOKENS * 480)],
        ),
        (lambda: hifigan(vocoder.v1()), [(ROWS, 2 * TOKENS * 256)]),
        (lambda: hifigan(vocoder.v2()), [(ROWS, 2 * TOKENS * 256)]),
        (lambda: hifigan(vocoder.v3()), [(ROWS, 2 * TOKENS * 256)]),
        (
            lambda: applied(
                speech_tokenizer,
                speech_tokenizer.encode,
                speech_tokenizer.s3_v2(),
                spectrogram(4 * TOKENS, 128),
            ),
            [(ROWS, TOKENS), (ROWS,)],
        ),
        (lambda: applied(speaker, speaker.embed, speaker.resnet34(), spectrogram(500)), [(ROWS, 256)]),
    ],
    ids=(
        "decoding.generate flow.sample flow_cosyvoice2.sample vocoder_hift.apply vocoder.v1 vocoder.v2 vocoder.v3 "
        "speech_tokenizer.encode speaker.embed"
    ).split(),
)
def test_inference_at_full_size_lowers_with_its_rows_split(make, results):
    sharding.make_mesh(1, 8, 1)
    call, *arguments = make()
    traced = jax.jit(call).trace(*arguments)
    found = jax.tree.leaves(traced.out_info)
    assert [x.shape for x in found] == results
    assert all(x.sharding.spec[0] == ("slice", "data") for x in found)
    traced.lower()
