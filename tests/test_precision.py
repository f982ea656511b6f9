"""Products in bfloat16: the config of a call decides them, and the built-in model chooses almost the same tokens."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from deepasmr_jax import (
    audio,
    checkpoint,
    config,
    flow,
    flow_cosyvoice2,
    lm,
    pool,
    request,
    sharding,
    speech_tokenizer,
    text,
    train,
)

AGREEMENT_LM, AGREEMENT_TOKENIZER = 0.97, 0.9  # of most probable next tokens; of codes, see the tests


@pytest.fixture(scope="module")
def entries():
    """Pool entries of both styles and languages."""
    sharding.ensure_mesh()
    whole = pool.load(request.BUILT_IN / "pool.safetensors")
    return [
        e for style in request.STYLES for language in ("en", "zh") for e in whole.select(style, language)[:4]
    ]


def load(name: str, file):
    """A component of the built-in model and its config."""
    config = checkpoint.component_config(request.BUILT_IN, name)
    like = checkpoint.abstract(lambda key: file.init(config, key), jax.random.key(0))
    entry = checkpoint.read_config(request.BUILT_IN)["components"][name]
    return checkpoint.fill(like, checkpoint.component_arrays(request.BUILT_IN, entry), name), config


def products(jaxpr) -> list[set[str]]:
    """Types of the operands of every matrix product of a program, inner programs included."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append({v.aval.dtype.name for v in equation.invars})
        for value in jax.tree.leaves(dict(equation.params)):
            found += products(value) if hasattr(value, "eqns") else []
    return found


ROWS, COUNTS = np.zeros((2, 8), np.int32), np.full(2, 8, np.int32)
LM_BATCH = dict.fromkeys(("tokens", "kinds", "segment_ids", "positions"), ROWS)
FLOW_BATCH = dict(speech_tokens=ROWS, num_tokens=COUNTS, mel=np.zeros((2, 16, 6), np.float32))
FLOW_BATCH |= dict(prompt_frames=COUNTS, speaker=np.zeros((2, 10), np.float32))
SIZES = dict(width=32, num_layers=2, num_heads=2)
# the file, a config, a call, and how many products are float32 whatever the config says
MODELS = {
    "lm": (
        lm,
        lm.Config(text_vocab=20, num_codes=27, num_kv_heads=2, head_dim=16, mlp_width=48, **SIZES),
        lambda m, c: lm.logits(m, c, LM_BATCH),
        0,
    ),
    "flow": (
        flow,
        flow.Config(mel_bins=6, num_codes=20, token_width=16, head_dim=16, **SIZES),
        lambda m, c: flow.loss(m, c, FLOW_BATCH, jax.random.key(0)),
        6,  # two of the time, two in the attention of each half
    ),
    "flow_cosyvoice2": (
        flow_cosyvoice2,
        flow_cosyvoice2.Config(mel_bins=6, num_codes=20, speaker_size=10, width=32, num_heads=4, channels=24),
        lambda m, c: flow_cosyvoice2.loss(m, c, FLOW_BATCH, jax.random.key(0)),
        18,  # speaker; time: two, and one in each kind of level; attention: two in each kind, three in each encoder
    ),
    "speech_tokenizer": (
        speech_tokenizer,
        speech_tokenizer.Config(width=32, num_heads=2, num_blocks=2, mlp_width=64),
        lambda m, c: speech_tokenizer.hidden(m, c, np.zeros((2, 16, 128), np.float32), COUNTS),
        1,  # onto the eight digits
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_config_of_the_call_decides_the_products_of_one_module(name):
    file, config, call, num_exact = MODELS[name]
    made = {}
    for built in ("float32", "bfloat16"):
        config = dataclasses.replace(config, dtype=built)
        model = jax.eval_shape(lambda key, c=config: file.init(c, key), jax.random.key(0))
        for dtype in ("float32", "bfloat16"):
            c = dataclasses.replace(config, dtype=dtype)
            made[built, dtype] = products(jax.make_jaxpr(lambda m, c=c: call(m, c))(model).jaxpr)
    for (built, dtype), found in made.items():
        exact = len(found) if dtype == "float32" else num_exact
        assert found.count({"float32"}) == exact and found.count({"bfloat16"}) == len(found) - exact, built
    assert len(found) > num_exact


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
    model, stored = load("lm", lm)
    for dtype in ("float32", "bfloat16"):
        config = dataclasses.replace(stored, dtype=dtype)
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
    model, stored = load("speech_tokenizer", speech_tokenizer)
    for dtype in ("float32", "bfloat16"):
        config = dataclasses.replace(stored, dtype=dtype)
        tokens, lengths = jax.jit(speech_tokenizer.encode, static_argnums=1)(model, config, mel, frames)
        found[dtype] = np.asarray(jax.device_get(tokens))[0, : int(lengths[0])]
    share = np.mean(found["float32"] == found["bfloat16"])
    print(f"tokenizer, float32 against bfloat16: {100 * share:.1f} % of {len(found['float32'])} codes")
    assert AGREEMENT_TOKENIZER < share


@pytest.mark.parametrize("name", ["lm", "flow"])
def test_activations_in_bfloat16_change_loss_and_gradient_by_their_rounding_alone(name):
    file, config, _, _ = MODELS[name]
    sharding.make_mesh()
    config = dataclasses.replace(config, remat="dots", dtype="bfloat16")
    model = file.init(config, jax.random.key(0))
    if name == "lm":
        draw = np.random.default_rng(0).integers(0, 20, (2, 4, 16)).astype(np.int32)
        ones = np.ones((4, 16), np.int32)
        batch = dict(tokens=draw[0], kinds=lm.SPEECH * ones, segment_ids=ones, positions=np.arange(16) * ones)
        batch["targets"] = draw[1]
    else:
        batch = FLOW_BATCH | dict(mel=np.random.default_rng(0).normal(size=(2, 16, 6)).astype(np.float32))
        model.output.kernel[...] = 0.1 * jax.random.normal(jax.random.key(1), model.output.kernel.shape)
    batch = sharding.replicate(batch)

    def run(dtype):
        types = dict(activation_dtype=dtype) | (dict(attention_dtype=dtype) if name == "flow" else {})
        c = dataclasses.replace(config, **types)
        mean = lambda m: (lambda out: out[0] / out[1])(file.loss(m, c, batch, jax.random.key(2)))
        value, grads = jax.jit(jax.value_and_grad(mean))(model)
        return float(value), np.concatenate([np.ravel(x) for x in jax.tree.leaves(grads)])

    (value, grads), (rounded_value, rounded) = run("float32"), run("bfloat16")
    assert grads.dtype == rounded.dtype == np.float32
    assert 0 < abs(value - rounded_value) < 5e-3 * value
    assert 0 < np.linalg.norm(grads - rounded) < 0.05 * np.linalg.norm(grads)


@pytest.mark.parametrize("name", ["lm", "flow"])
def test_what_the_backward_pass_keeps_of_a_layer_is_in_the_type_of_the_activations(name):
    """A product that is kept in float32 costs twice the memory: seen in the stacked results of the loop over layers."""
    file, config, call, _ = MODELS[name]
    if name == "lm":
        batch = LM_BATCH | dict(targets=ROWS)
        call = lambda m, c: lm.loss(m, c, batch)
    model = jax.eval_shape(lambda key: file.init(config, key), jax.random.key(0))
    c = dataclasses.replace(config, remat="dots", dtype="bfloat16", activation_dtype="bfloat16")
    jaxpr = jax.make_jaxpr(jax.grad(lambda m: call(m, c)[0]))(model).jaxpr
    loops = [e for e in jaxpr.eqns if e.primitive.name == "scan" and not e.params["reverse"]]
    pairs = [pair for e in loops for pair in zip(e.outvars, e.params["jaxpr"].jaxpr.outvars, strict=True)]
    kept = [v.aval for v, of_layer in pairs if v.aval.shape != of_layer.aval.shape]  # stacked, not carried
    large = [x.dtype.name for x in kept if x.ndim > 3 and x.dtype.kind != "b"]
    assert large and "float32" not in large


def curve(name: str, steps: int, seed: int = 0, **changes) -> np.ndarray:
    """Losses of a training run of configs/tiny.py on rows that can be learned, the same rows in every run."""
    cfg = config.load(str(Path(__file__).parent.parent / "configs" / f"tiny.py:{name}"))
    model = dataclasses.replace(cfg.model, width=64, num_heads=4, remat="full", **changes)
    cfg = dataclasses.replace(cfg, model=model, steps=steps, ema_decay=None)
    draw = np.random.default_rng(0)
    next_code, sound = draw.permutation(40), draw.normal(size=(40, 1, 80))
    sharding.make_mesh()
    state, step, found = jax.jit(lambda: train.init(cfg, jax.random.key(seed)))(), train.make_step(cfg), []
    for _ in range(steps):
        codes = draw.integers(0, 40, (8, 33)).astype(np.int32)
        for i in range(1, 33):
            codes[:, i] = np.where(draw.random(8) < 0.9, next_code[codes[:, i - 1]], codes[:, i])
        ones, counts = np.ones((8, 32), np.int32), np.full(8, 32, np.int32)
        if name == "lm":
            batch = dict(tokens=codes[:, :-1], kinds=lm.SPEECH * ones, targets=codes[:, 1:], segment_ids=ones)
            batch["positions"] = np.arange(32, dtype=np.int32) * ones
        else:
            mel = -5.5 + 2 * np.repeat(sound[codes[:, 1:]][:, :, 0], 2, axis=1).astype(np.float32)
            batch = dict(speech_tokens=codes[:, 1:], num_tokens=counts, mel=mel, prompt_frames=counts // 2)
        state, out = step(state, (sharding.put(batch),))
        found.append(float(out["loss"]))
    return np.array(found)


@pytest.mark.full  # minutes
@pytest.mark.parametrize("name", ["lm", "flow"])
def test_the_loss_curve_in_bfloat16_follows_that_of_float32(name):
    """200 steps; what the precision changes is measured against what another start of the weights changes."""
    low = dict(dtype="bfloat16", activation_dtype="bfloat16")
    low |= dict(attention_dtype="bfloat16") if name == "flow" else {}
    exact, other, rounded = (
        curve(name, 200, seed, **types)
        for seed, types in ((0, dict(dtype="float32")), (1, dict(dtype="float32")), (0, low))
    )
    late = slice(100, 200)
    apart = lambda x: np.mean(np.abs(x - exact)[late]) / np.mean(exact[late])
    print(
        f"{name}: loss {exact[0]:.3f} at first, {exact[late].mean():.4f} in the last 100 steps; in bfloat16 "
        f"{rounded[late].mean():.4f}, each {100 * apart(rounded):.2f} % off; another seed {100 * apart(other):.2f} %"
    )
    assert np.mean(exact[late]) < 0.9 * exact[0]  # something was learned
    assert apart(rounded) < 0.02 and apart(rounded) < apart(other)
    assert abs(np.mean(rounded[late]) / np.mean(exact[late]) - 1) < 5e-3
