"""The built-in model in bfloat16 products: its language model and tokenizer choose almost the tokens of float32."""

import dataclasses

import jax
import numpy as np
import pytest

from deepasmr_jax import audio, checkpoint, lm, pool, request, sharding, speech_tokenizer, text

AGREEMENT_LM, AGREEMENT_TOKENIZER = 0.97, 0.9  # of most probable next tokens; of codes, see the tests


@pytest.fixture(scope="module")
def entries():
    """Pool entries of both styles and languages."""
    sharding.ensure_mesh()
    whole = pool.load(request.BUILT_IN / "pool.safetensors")
    return [
        e for style in request.STYLES for language in ("en", "zh") for e in whole.select(style, language)[:4]
    ]


def load(name: str, file, dtype: str):
    """A component of the built-in model with products in `dtype`: layers keep the one they were made with."""
    config = dataclasses.replace(checkpoint.component_config(request.BUILT_IN, name), dtype=dtype)
    like = checkpoint.abstract(lambda key: file.init(config, key), jax.random.key(0))
    entry = checkpoint.read_config(request.BUILT_IN)["components"][name]
    return checkpoint.fill(like, checkpoint.component_arrays(request.BUILT_IN, entry), name), config


def test_the_language_model_ranks_the_same_token_first(entries):
    tokenizer, size = text.MiniTokenizer(), 192
    rows = []
    for e in entries:
        ids = tokenizer.encode(e.transcript, e.language)
        tokens = np.concatenate([[0], ids, [0], e.speech_tokens])[:size]
        kinds = [lm.SOS, *[lm.TEXT] * len(ids), lm.TASK, *[lm.SPEECH] * len(e.speech_tokens)][:size]
        pad = size - len(tokens)
        rows.append((np.pad(tokens, (0, pad)), np.pad(kinds, (0, pad))))
    kinds = np.stack([k for _, k in rows]).astype(np.int32)
    batch = {
        "tokens": np.stack([t for t, _ in rows]).astype(np.int32),
        "kinds": kinds,
        "segment_ids": (kinds != lm.PAD).astype(np.int32),
        "positions": np.tile(np.arange(size, dtype=np.int32), (len(rows), 1)),
    }
    batch = sharding.replicate(batch)
    best, logits = {}, {}
    for dtype in ("float32", "bfloat16"):
        model, config = load("lm", lm, dtype)
        logits[dtype] = np.asarray(jax.device_get(jax.jit(lm.logits, static_argnums=1)(model, config, batch)))
        best[dtype] = logits[dtype].argmax(-1)
    assert np.abs(logits["float32"] - logits["bfloat16"]).max() > 1e-3  # the products do differ
    where = kinds == lm.SPEECH
    assert where.sum() > 800
    share = np.mean(best["float32"][where] == best["bfloat16"][where])
    error = np.abs(logits["float32"] - logits["bfloat16"])[where].max()
    print(
        f"language model, float32 against bfloat16: {100 * share:.2f} % of {where.sum()} tokens, logits {error:.3f}"
    )
    assert AGREEMENT_LM < share


def test_the_tokenizer_gives_the_same_codes():
    """A code has eight digits, each rounded: near a limit the smallest difference changes it."""
    sharding.ensure_mesh()
    wav = audio.load(request.BUILT_IN / "demo" / "en_normal.wav", audio.SAMPLE_RATE)
    wav = wav[: len(wav) // 640 * 640][None]
    mel, frames = audio.s3_log_mel(wav), np.array([wav.shape[1] // 160], np.int32)
    found = {}
    for dtype in ("float32", "bfloat16"):
        model, config = load("speech_tokenizer", speech_tokenizer, dtype)
        tokens, lengths = jax.jit(speech_tokenizer.encode, static_argnums=1)(model, config, mel, frames)
        found[dtype] = np.asarray(jax.device_get(tokens))[0, : int(lengths[0])]
    share = np.mean(found["float32"] == found["bfloat16"])
    print(f"tokenizer, float32 against bfloat16: {100 * share:.1f} % of {len(found['float32'])} codes")
    assert AGREEMENT_TOKENIZER < share
