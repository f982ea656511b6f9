"""Every network at the size of its public file, beside other code, on random weights under the public names.

    python -m pytest -m full -s tests/test_parity_full.py

Each weight goes through `public_names`: one state dict feeds the other side as it is and ours through its table, so a
wrong name, layout or formula shows. Every comparison prints a line
`component | stage | reference and version | error reached | tolerance`, which docs/parity.md collects.
Needs the packages that docs/parity.md installs (a test is skipped without its own), 10 GB of memory and forty minutes
on two cores.
"""

import dataclasses
import functools
import importlib.metadata
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import public_weights
import pytest
import test_flow_cosyvoice2
import test_vocoder_hift
import weight_writers

from deepasmr_jax import (
    audio,
    checkpoint,
    decoding,
    flow,
    flow_cosyvoice2,
    lm,
    public_cosyvoice2,
    public_files,
    public_models,
    public_names,
    sharding,
    speaker,
    speaker_campplus,
    speaker_wavlm,
    speech_tokenizer,
    vocoder,
    vocoder_hift,
)

pytestmark = pytest.mark.full
SEED = 21
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def reference():
    """tests/golden/public_reference.py, or a skip."""
    pytest.importorskip("torch").set_num_threads(os.cpu_count())
    return importlib.import_module("public_reference")


def version(package):
    """`transformers 5.23.0`; skips the test if the package is not installed."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")


def written(script="public_reference.py"):
    return f"{script}, torch {importlib.metadata.version('torch')}"


def golden_script(name, *packages):
    """A script of tests/golden as a module, or a skip: its network is the other side here too."""
    for package in ("torch", *packages):
        pytest.importorskip(package)
    importlib.import_module("torch").set_num_threads(os.cpu_count())
    return importlib.import_module(name)


def report(component, stage, other, error, tolerance, unit=""):
    """Prints the line of one comparison, then checks it."""
    print(
        f"\n{component} | {stage} | {other} | {error:.2g}{unit} | {tolerance:.2g}{unit}", end="", flush=True
    )
    assert error <= tolerance, f"{component}, {stage}: {error} is above {tolerance}"


def relative(found, want):
    """Greatest difference over the greatest value."""
    found, want = np.asarray(found), np.asarray(want)
    assert found.shape == want.shape and np.isfinite(found).all()
    return float(np.max(np.abs(found - want)) / np.max(np.abs(want)))


def report_rounded(component, stage, other, found, itself, want, tolerance):
    """The line of one comparison in bfloat16: ours and the other side's own against the other side in float32."""
    other = f"{other} in float32 (itself in bfloat16: {relative(itself, want):.1e})"
    report(component, f"{stage} with products in bfloat16, relative", other, relative(found, want), tolerance)


def absolute(found, want):
    found, want = np.asarray(found), np.asarray(want)
    assert found.shape == want.shape and np.isfinite(found).all()
    return float(np.max(np.abs(found - want)))


def cosine_distance(x, y):
    """1 - cosine of two vectors."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return 1 - float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def load(init, cfg, table, state, ignored=(), absent=()):
    """Our module on a plain state dict, by its table; parameters that are absent are zeros."""
    empty = checkpoint.abstract(lambda key: init(cfg, key), jax.random.key(0))
    shapes = {name: tuple(x.shape) for name, x in checkpoint.named_arrays(empty).items()}
    arrays = dict(public_names.to_ours(table, state, shapes, "the reference", ignored, absent))
    arrays |= {name: np.zeros(shapes[name], np.float32) for name in absent}
    return checkpoint.fill(empty, arrays, "the reference")


# ---------------------------------------------------------------- language model


def one_row(text, speech, has_markers=True):
    """A batch of one row for `lm.logits`."""
    kinds = [lm.SOS, *[lm.TEXT] * len(text), lm.TASK, *[lm.SPEECH] * len(speech)]
    tokens = [0, *text, 0, *speech]
    if not has_markers:
        kinds, tokens = [lm.TEXT] * len(text), text
    size = len(tokens)
    batch = dict(tokens=tokens, kinds=kinds, segment_ids=[1] * size, positions=range(size))
    return {k: np.asarray([list(v)], np.int32) for k, v in batch.items()}


def layer_outputs(model, cfg, batch):
    """Residual stream [L, 1, N, D] after every layer."""

    @jax.jit
    def run(model, batch):
        x = lm.embed(model, batch["tokens"], batch["kinds"])
        positions = batch["positions"]
        mask = positions[:, :, None] >= positions[:, None]

        def body(x, layer):
            x = layer(x, positions, mask, cfg)
            return x, x

        return jax.lax.scan(body, x, model.layers)[1]

    return run(model, batch)


def test_a_plain_qwen2_file_gives_the_text_logits_of_transformers(reference):
    import torch
    from transformers import Qwen2ForCausalLM

    other = version("transformers")
    cfg = lm.qwen2_0p5b(dtype="float32")
    with torch.device("meta"):
        inner = reference.qwen2(cfg)
        theirs = Qwen2ForCausalLM(inner.config)
    shapes = reference.shapes(theirs)
    head, table = "lm_head.weight", "model.embed_tokens.weight"
    state = public_weights.state({k: s for k, s in shapes.items() if k != head}, SEED)
    assert (len(state), sum(x.size for x in state.values())) == (290, 494_032_768)
    theirs = reference.load(theirs, state | {head: state[table]})
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)  # a table, left on the meta device
    plain = public_names.without_copy(state | {head: state[table]}, head, table)
    ours = load(lm.init, cfg, public_cosyvoice2.qwen2(cfg), plain, absent=public_cosyvoice2.QWEN2_ABSENT)

    text = np.random.default_rng(0).integers(0, cfg.text_vocab, 48)
    kept = []
    for layer in theirs.model.layers:
        layer.register_forward_hook(
            lambda _, __, y: kept.append((y[0] if isinstance(y, tuple) else y).float().numpy())
        )
    with torch.inference_mode():
        want = theirs(torch.as_tensor(text[None]), use_cache=False).logits[0].numpy()
    batch = one_row(text, [], has_markers=False)
    layers = layer_outputs(ours, cfg, batch)
    errors = [relative(x, np.reshape(y, x.shape)) for x, y in zip(layers, kept, strict=True)]
    report("Qwen2.5-0.5B", "each of 24 layers, relative", other, max(errors), 2e-5)
    hidden = jax.jit(lm.hidden, static_argnums=1)(ours, cfg, batch)
    found = jax.jit(lambda x, table: x[0] @ table.T)(hidden, ours.text_table[...])
    report("Qwen2.5-0.5B", "151,936 text logits of 48 positions", other, absolute(found, want), 2e-4)
    assert np.std(want) > 0.5
    hidden = jax.jit(lm.hidden, static_argnums=1)(ours, dataclasses.replace(cfg, dtype="bfloat16"), batch)
    found = jax.jit(lambda x, table: x[0] @ table.T)(hidden, ours.text_table[...])
    with torch.inference_mode():
        rounded = theirs.to(torch.bfloat16)(torch.as_tensor(text[None]), use_cache=False).logits[0].float()
    report_rounded("Qwen2.5-0.5B", "the same", other, found, rounded, want, 2e-2)


@pytest.mark.parametrize("form", [2, 3])
def test_the_speech_model_gives_the_logits_and_greedy_tokens_of_transformers(reference, form):
    other = version("transformers")
    component = f"CosyVoice{form} language model"
    cfg = (lm.cosyvoice2 if form == 2 else lm.cosyvoice3)(dtype="float32")
    state = public_weights.state(reference.speech_lm_shapes(cfg, form), SEED)
    theirs = reference.SpeechLM(cfg, state, form)
    head = "llm.model.lm_head.weight"
    file = state | {head: state["llm.model.model.embed_tokens.weight"]}
    assert len(file) == (295 if form == 2 else 293)
    plain, table = {
        2: (public_cosyvoice2.lm_cosyvoice2_tensors, public_cosyvoice2.lm_cosyvoice2),
        3: (public_cosyvoice2.lm_cosyvoice3_tensors, public_cosyvoice2.lm_cosyvoice3),
    }[form]
    ours = load(lm.init, cfg, table(cfg), plain(file))

    rng = np.random.default_rng(form)
    text, speech = rng.integers(0, cfg.text_vocab, 13), rng.integers(0, cfg.num_codes, 24)
    _, want = theirs(text, speech)
    batch = one_row(text, speech)
    found = jax.jit(lm.logits, static_argnums=1)(ours, cfg, batch)[0]
    report(
        component, f"{cfg.num_speech_rows} speech logits of 39 positions", other, absolute(found, want), 2e-4
    )

    weights = decoding.unstack(ours, cfg)
    del ours
    steps, size = 4, batch["tokens"].shape[1]
    start = size - steps
    prefill = jax.jit(decoding.prefill, static_argnums=1)
    step = jax.jit(decoding.decode_step, static_argnums=1)
    columns = {k: np.pad(batch[k][:, :start], ((0, 0), (0, 3))) for k in ("tokens", "kinds")}  # with padding
    scores, before = prefill(weights, cfg, columns["tokens"], columns["kinds"], np.asarray([start]))
    new = decoding.empty(before, steps)
    errors = [absolute(scores[0], want[start - 1])]
    for at in range(start, size):
        token, length = batch["tokens"][:, at], np.asarray([start], np.int32)
        scores, new = step(weights, cfg, token, length, before, new, at - start)
        errors.append(absolute(scores[0], want[at]))
    report(component, "the same with a cache, token by token", other, max(errors), 2e-4)

    count, greedy = 10, decoding.Sampling(greedy=True, repetition_aware=False)
    lengths = dict(text=[13, 9], speech=[24, 5])
    columns = {"text": np.stack([text, text[::-1]]), "speech": np.stack([speech, speech[::-1]])}
    given = []
    for name in ("text", "speech"):
        given += [jnp.asarray(columns[name], jnp.int32), jnp.asarray(lengths[name], jnp.int32)]
    limits = jnp.full(2, count, jnp.int32)
    keys = jax.random.split(jax.random.key(0), 2)
    tokens, _ = decoding.generate(weights, cfg, greedy, *given, limits, limits, keys, count)
    differing = 0
    for row in range(2):
        # one pass over all that was said: each token must be the best after those before it
        prompt = columns["speech"][row, : lengths["speech"][row]]
        said = np.concatenate([prompt, tokens[row]])
        _, scores = theirs(columns["text"][row, : lengths["text"][row]], said)
        best = scores[-count - 1 : -1, : cfg.num_codes].argmax(dim=-1).numpy()
        differing += int(np.sum(best != np.asarray(tokens[row])))
    report(
        component, "greedy tokens, 2 padded rows of 10, against full passes", other, differing, 0, " of 20"
    )


# ---------------------------------------------------------------- speech tokenizer


def clips():
    """20 clips at 16 kHz, 0.5 to 58 s: sweeps, noises, vowels, clipping, silence, and mixtures."""
    rng = np.random.default_rng(1)

    def time(seconds):
        return np.arange(int(16000 * seconds)) / 16000

    def sweep(seconds, low, high):
        t = time(seconds)
        return 0.5 * np.sin(2 * np.pi * (low * t + (high - low) * t**2 / (2 * seconds)))

    def noise(seconds, level, tilt):
        x = rng.standard_normal(len(time(seconds)))
        for _ in range(tilt):
            x = np.cumsum(x - x.mean())
            x -= np.convolve(x, np.ones(801) / 801, "same")
        return level * x / np.std(x)

    def vowels(seconds, pitch, formants, level=0.3):
        t = time(seconds)
        f0 = pitch * (1 + 0.15 * np.sin(2 * np.pi * 0.7 * t) + 0.02 * np.sin(2 * np.pi * 5 * t))
        phase, out = 2 * np.pi * np.cumsum(f0) / 16000, np.zeros_like(t)
        for h in range(1, int(7000 / pitch)):
            moving = 1 + 0.3 * np.sin(2 * np.pi * 1.3 * t)
            gain = sum(np.exp(-(((h * f0 - f * moving) / 150) ** 2)) for f in formants)
            out += (gain + 0.003) * np.sin(h * phase)
        syllables = 0.5 + 0.5 * np.sin(2 * np.pi * 3.1 * t)
        return level * syllables * out / np.max(np.abs(out))

    def whisper(seconds, level):
        t = time(seconds)
        return noise(seconds, level, 1) * (0.3 + np.abs(np.sin(2 * np.pi * 2.3 * t)))

    a, i, u = (700, 1200, 2500), (300, 2200, 3000), (320, 800, 2300)
    found = [
        sweep(0.5, 80, 3000), sweep(3, 50, 7900), sweep(12, 7000, 100), noise(1, 0.1, 0), noise(5, 0.01, 0),
        noise(8, 0.2, 1), noise(2.5, 0.3, 2), vowels(0.73, 110, a), vowels(2, 220, i), vowels(6.4, 160, u),
        vowels(15, 95, a), np.clip(3 * vowels(4, 130, i), -0.5, 0.5), np.sign(sweep(1.5, 200, 900)), np.zeros(16000),
        np.concatenate([np.zeros(16000), vowels(2, 180, a), np.zeros(24000)]), whisper(9, 0.02), whisper(20, 0.1),
        vowels(30, 140, i) + noise(30, 0.005, 0), vowels(45, 120, u) + whisper(45, 0.02), whisper(58, 0.05),
    ]  # fmt: skip
    return [x.astype(np.float32) for x in found]


def test_the_tokenizer_gives_the_codes_of_s3tokenizer(reference):
    import torch

    other = version("s3tokenizer")
    cfg = speech_tokenizer.s3_v2()
    theirs = reference.s3_v2(cfg)
    from s3tokenizer.utils import log_mel_spectrogram

    state = public_weights.state(reference.shapes(theirs), SEED)
    assert (len(state), sum(x.size for x in state.values())) == (102, 123_714_568)
    theirs = reference.load(theirs, state)
    ours = load(speech_tokenizer.init, cfg, public_cosyvoice2.s3_v2(cfg), state)
    wavs = clips()
    assert len(wavs) == 20 and max(map(len, wavs)) == 58 * 16000
    our_mels = [np.asarray(audio.s3_log_mel(x[None])[0]) for x in wavs]
    their_mels = [log_mel_spectrogram(torch.as_tensor(x)).numpy().T for x in wavs]
    report("S3 tokenizer V2", "log-mel of 20 clips", other, max(map(absolute, our_mels, their_mels)), 1e-4)

    def quantize(mel):  # one row of at most 30 s
        lengths = torch.as_tensor([len(mel)])
        with torch.inference_mode():
            return theirs.quantize(torch.as_tensor(mel.T[None].copy()), lengths)[0][0].numpy()

    def want(mel):
        """Windows of 30 s, every 26 s until one reaches the end; 2 s off at each inner edge."""
        parts, start = [], 0
        while True:
            part = quantize(mel[start : start + 3000])
            is_last = start + 3000 >= len(mel)
            parts.append(part[50 if start else 0 : None if is_last else -50])
            if is_last:
                return np.concatenate(parts)
            start += 2600

    kept = {}
    blocks = theirs.encoder.blocks
    hooks = [blocks[0].register_forward_pre_hook(lambda _, args: kept.__setitem__("stem", args[0].numpy()))]
    for i, block in enumerate(blocks):
        hooks.append(block.register_forward_hook(lambda _, __, y, i=i: kept.__setitem__(i, y.numpy())))
    quantize(our_mels[9])
    for hook in hooks:
        hook.remove()

    @jax.jit
    def stages(model, mel):
        x, mask = model.encoder.stem(cfg, mel, jnp.asarray([mel.shape[1]]))

        def body(x, block):
            x = block(cfg, x, mask)
            return x, x

        last, each = jax.lax.scan(body, x, model.encoder.blocks)
        return x, each, model.quantizer(last)

    stem, each, projection = stages(ours, our_mels[9][None])
    report("S3 tokenizer V2", "stem, relative", other, relative(stem, kept["stem"]), 1e-5)
    errors = [relative(x, kept[i]) for i, x in enumerate(each)]
    report("S3 tokenizer V2", "each of 6 blocks, relative", other, max(errors), 5e-5)
    with torch.inference_mode():
        codes = theirs.quantizer._codebook.project_down(torch.as_tensor(kept[5])).tanh() * 0.9990000128746033
    report("S3 tokenizer V2", "projection", other, absolute(projection, codes.numpy()), 2e-4)

    mel, short = our_mels[9][None], dataclasses.replace(cfg, dtype="bfloat16")
    lengths = np.asarray([mel.shape[1]], np.int32)
    last = jax.jit(lambda m, mel: speech_tokenizer.hidden(m, short, mel, lengths)[0])(ours, mel)
    encoder = (torch.as_tensor(mel.transpose(0, 2, 1).copy()), torch.as_tensor(lengths))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        rounded = theirs.encoder(*encoder)[0].float().numpy()
    report_rounded("S3 tokenizer V2", "hidden states", other, last, rounded, kept[5], 2e-2)

    targets = [want(mel) for mel in our_mels]
    found = [speech_tokenizer.encode_long(ours, cfg, mel) for mel in our_mels]
    assert [len(x) for x in found] == [len(y) for y in targets] == [-(-len(m) // 4) for m in our_mels]
    total = sum(map(len, targets))
    assert len(np.unique(np.concatenate(targets))) > 500
    wrong = sum(int(np.sum(x != y)) for x, y in zip(found, targets, strict=True))
    report("S3 tokenizer V2", "codes of 20 clips, 0.5 to 58 s, same log-mel", other, wrong, 0, f" of {total}")
    rows = [0, 7, 9, 14]  # the same as a padded batch
    size = max(len(our_mels[i]) for i in rows)
    mels = np.stack(
        [np.pad(our_mels[i], ((0, size - len(our_mels[i])), (0, 0)), constant_values=1.0) for i in rows]
    )
    lengths = np.asarray([len(our_mels[i]) for i in rows], np.int32)
    tokens, counts = jax.jit(speech_tokenizer.encode, static_argnums=1)(ours, cfg, mels, lengths)
    wrong = sum(int(np.sum(np.asarray(tokens[j, : counts[j]]) != targets[i])) for j, i in enumerate(rows))
    report("S3 tokenizer V2", "the same of 4 clips in a padded batch", other, wrong, 0, f" of {sum(counts)}")
    targets = [want(mel) for mel in their_mels]
    wrong = sum(int(np.sum(x != y)) for x, y in zip(found, targets, strict=True))
    report(
        "S3 tokenizer V2",
        "codes from the waveform, each with its own log-mel",
        other,
        wrong,
        0.005 * total,
        f" of {total}",
    )


# ---------------------------------------------------------------- flow decoder


def test_the_flow_gives_the_velocity_of_f5_tts(reference):
    import torch

    other = version("f5-tts")
    cfg = flow.e2tts_base(dtype="float32")
    with torch.device("meta"):
        theirs = reference.e2(cfg)
    shapes = reference.shapes(theirs)
    name = "rotary_embed.inv_freq"
    state = public_weights.state({k: s for k, s in shapes.items() if k != name}, SEED)
    state[name] = (10000.0 ** (-np.arange(0, 64, 2) / 64)).astype(np.float32)
    assert (len(state), sum(x.size for x in state.values())) == (363, 333_470_444 + 32)
    theirs = reference.load(theirs, state)
    prefix = "ema_model.transformer."
    file = {prefix + k: x for k, x in state.items()} | {
        "step": np.asarray(1200000),
        "initted": np.asarray(True),
    }
    ours = load(flow.init, cfg, public_models.flow_e2(cfg), file, public_models.FLOW_E2_IGNORED)

    rng = np.random.default_rng(2)
    x, condition = rng.standard_normal((2, 2, 120, 100)).astype(np.float32)
    condition[:, 50:] = 0
    tokens = np.full((2, 120), -1, np.int32)
    tokens[:, :40] = rng.integers(0, cfg.num_codes, (2, 40))
    t = np.asarray([0.2, 0.9], np.float32)
    kept = {}

    def keep(key):
        return lambda _, __, y: kept.__setitem__(key, y.float().numpy())

    theirs.time_embed.register_forward_hook(keep("time"))
    theirs.input_embed.register_forward_hook(keep("input"))
    middle = theirs.layers[cfg.num_layers // 2][0]
    for net, key in ((middle, "half"), (theirs.norm_out, "layers")):
        net.register_forward_pre_hook(
            lambda _, args, key=key: kept.__setitem__(key, args[0].float().numpy()[..., : cfg.width])
        )
    given = dict(x=x, cond=condition, text=tokens[:, :40].astype(np.int64), time=t)
    given = {name: torch.as_tensor(value) for name, value in given.items()}
    with torch.inference_mode():
        want = theirs(**given).numpy()

    @functools.partial(jax.jit, static_argnums=0)
    def run(cfg, model, x, condition, tokens, t, mask):
        embedded = flow.embed_tokens(model, cfg, tokens, mask)
        time = model.embed_time(t)
        stream = model.embed_input(x, condition, embedded, mask, cfg)
        longer = jnp.concatenate([time[:, None], stream], axis=1)
        valid = jnp.ones_like(longer[..., 0], bool)
        half, _ = jax.lax.scan(lambda x, layer: (layer(x, valid, cfg), None), longer, model.down)
        velocity = model(x, condition, embedded, t, mask, cfg)
        layers = model.layers(longer, valid, cfg)
        return dict(time=time, input=stream, half=half, layers=layers, velocity=velocity)

    batch = dict(x=x, condition=condition, tokens=tokens, t=t, mask=np.ones((2, 120), bool))
    found = run(cfg, ours, **sharding.put(batch))
    names = dict(time="time embedding", input="input embedding", half="12 layers", layers="24 layers")
    for key, name in names.items():
        report("E2TTS_Base", f"{name}, relative", other, relative(found[key], kept[key]), 1e-4)
    report("E2TTS_Base", "velocity of 120 frames, relative", other, relative(found["velocity"], want), 1e-4)
    short = flow.e2tts_base(dtype="bfloat16")
    velocity = run(short, ours, **sharding.put(batch))["velocity"]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        rounded = theirs(**given).float().numpy()
    report_rounded("E2TTS_Base", "velocity", other, velocity, rounded, want, 2e-2)


@pytest.mark.parametrize("chunk", [0, 25])
def test_the_cosyvoice2_flow_gives_the_mel_of_an_independent_one(reference, chunk):
    other = version("chatterbox-tts")
    script = golden_script("make_flow_cosyvoice2")

    cfg = flow_cosyvoice2.cosyvoice2(dtype="float32", chunk_tokens=chunk)
    table = public_cosyvoice2.flow_cosyvoice2(cfg)
    empty = checkpoint.abstract(lambda key: flow_cosyvoice2.init(cfg, key), jax.random.key(0))
    hollow = {k: np.broadcast_to(np.int8(0), x.shape) for k, x in checkpoint.named_arrays(empty).items()}
    shapes = {name: x.shape for name, x in public_names.to_theirs(table, hollow).items()}
    state = public_weights.state(shapes, SEED)
    assert (len(state), sum(x.size for x in state.values())) == (1121, 112_549_360)
    theirs = reference.FlowCosyvoice2(state, chunk)
    ours = load(flow_cosyvoice2.init, cfg, table, state)
    lengths = (60, 45)
    data = script.random_inputs(cfg, lengths)
    want = [theirs(data, row) for row in range(2)]
    component = "CosyVoice2 flow" + (f", chunks of {chunk} tokens" if chunk else "")

    def error(key, found, measure=relative, rows=(0, 1)):
        """Greatest error of the valid frames of some rows."""
        pairs = [(np.asarray(found)[i], want[row][key].numpy()) for i, row in enumerate(rows)]
        return max(measure(x[: len(y)], y) for x, y in pairs)

    stages = test_flow_cosyvoice2.encoder_groups(ours, cfg, data["tokens"], data["num_tokens"])
    errors = [error(f"encoder.{name}", x) for name, x in stages.items() if name != "mu"]
    assert len(errors) == 6
    report(component, "6 stages of the encoder, relative", other, max(errors), 1e-4)
    found = jax.jit(flow_cosyvoice2.encode, static_argnums=1)(ours, cfg, data["tokens"], data["num_tokens"])
    assert min(np.std(x["encoder.mu"].numpy()) for x in want) > 0.1
    stage = "mean mel of 60 and 45 tokens in a padded batch"
    report(component, stage, other, error("encoder.mu", found, absolute), 1e-4)
    known = np.arange(2 * max(lengths)) < data["prompt_frames"][:, None]
    condition = np.where(known[..., None], data["prompt_mel"], np.float32(0))
    given = (data["x"], data["mu"], data["voice"], condition, data["t"], 2 * data["num_tokens"])
    stages = test_flow_cosyvoice2.estimator_groups(ours, cfg, *given)
    errors = [error(f"estimator.{name}", x) for name, x in stages.items()]
    assert len(errors) == 7
    report(component, "7 stages of the estimator, relative", other, max(errors), 1e-4)

    def mel(rows, size):
        names = ("tokens", "num_tokens", "prompt_mel", "prompt_frames")
        tokens, num_tokens, prompt, frames = (data[name][rows] for name in names)
        return flow_cosyvoice2.sample(
            ours,
            cfg,
            tokens[:, :size],
            num_tokens,
            prompt[:, : 2 * size],
            frames,
            speaker=data["speaker"][rows],
            noise=data["noise"],
        )

    assert min(np.std(x["mel"].numpy()) for x in want) > 0.5
    stage = "mel after 10 steps of 45 tokens, same noise"
    report(component, stage, other, error("mel", mel([1], 45), absolute, rows=(1,)), 1e-4)
    stage = "the same of 60 and 45 tokens in a padded batch"
    report(component, stage, other, error("mel", mel([0, 1], 60), absolute), 1e-4)


def test_the_fixed_noise_of_the_cosyvoice2_flow_is_that_of_torch():
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    want = torch.randn(1, 80, 50 * 300, generator=generator)[0].T.numpy()
    error = absolute(flow_cosyvoice2.reference_noise(15_000), want)
    other = f"torch.randn, torch {importlib.metadata.version('torch')}"
    report("CosyVoice2 flow", "fixed noise, 1,200,000 values", other, error, 6e-7)


# ---------------------------------------------------------------- vocoder


@pytest.mark.parametrize(
    "name, count, total", [("v1", 234, 13_936_130), ("v2", 234, 928_514), ("v3", 69, 1_464_322)]
)
def test_the_generator_gives_the_waveform_of_an_independent_one(reference, name, count, total):
    import torch

    cfg = getattr(vocoder, name)()
    other = version("transformers") if cfg.is_paired else written()
    theirs = (reference.hifigan if cfg.is_paired else reference.Generator)(cfg)
    state = public_weights.state(reference.shapes(theirs), SEED)
    assert (len(state), sum(x.size for x in state.values())) == (count, total)
    theirs = reference.load(theirs, state)
    ours = load(vocoder.init_generator, cfg, public_models.hifigan(cfg), public_models.hifigan_folded(state))
    mel = np.random.default_rng(3).standard_normal((1, 86, 80)).astype(np.float32)
    given = torch.as_tensor(mel if cfg.is_paired else mel.transpose(0, 2, 1).copy())
    with torch.inference_mode():
        want = theirs(given).numpy()
    run = jax.jit(vocoder.apply, static_argnums=1)
    component, stage = f"HiFi-GAN {name.upper()}", "waveform of 86 frames"
    assert 0.01 < np.std(want) < 0.7
    report(component, stage, other, absolute(run(ours, cfg, mel), want), 1e-4)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        rounded = theirs(given).float().numpy()
    found = run(ours, dataclasses.replace(cfg, dtype="bfloat16"), mel)
    report_rounded(component, stage, other, found, rounded, want, 2e-2)


def test_the_hift_vocoder_gives_the_waveform_of_an_independent_one(reference):
    other = version("chatterbox-tts")
    script = golden_script("make_vocoder_hift")
    import torch

    cfg = vocoder_hift.cosyvoice2()
    folded = test_vocoder_hift.public_weights(cfg, SEED)
    ends = [f".parametrizations.weight.original{i}" for i in (0, 1)]  # gain and direction
    state, rng = {}, np.random.default_rng(SEED)
    for name, shape in test_vocoder_hift.stored_shapes().items():
        stem, end = name.removesuffix(ends[1]), name[-len(ends[1]) :]
        if end == ends[1]:
            x = folded[f"{stem}.weight"]
            state[stem + ends[0]] = np.sqrt(np.sum(x**2, axis=(1, 2), keepdims=True))
            state[name] = x * rng.uniform(0.5, 2, (len(x), 1, 1)).astype(np.float32)
        elif end != ends[0]:
            state[name] = folded[name]
        assert end == ends[0] or state[name].shape == shape
    assert (len(state), sum(x.size for x in state.values())) == (328, 20_821_295)
    ours = load(vocoder_hift.init, cfg, public_cosyvoice2.hift(cfg), public_cosyvoice2.hift_tensors(state))
    linear = [f"m_source.l_linear.{x}" for x in ("weight", "bias")]  # all that its source reads
    mel, noise = test_vocoder_hift.drawn(100)
    theirs = reference.load(reference.hift(), state)

    def run(dtype):
        net, source = theirs.to(dtype), script.Reference({name: state[name] for name in linear}, dtype)
        net.stft_window = net.stft_window.to(dtype)
        with torch.inference_mode():
            x = torch.tensor(mel).to(dtype).mT
            f0 = net.f0_predictor(x)
            waves = source.make_source(f0, torch.tensor(noise).to(dtype))
            return dict(f0=f0, source=waves, wav=net.decode(x, waves[:, None]))

    want, rounded = run(torch.float64), run(torch.float32)
    assert torch.min(want["f0"]) > 20 and torch.std(want["wav"]) > 0.005 and torch.std(want["source"]) > 0.1
    found = jax.jit(vocoder_hift.layers, static_argnums=1)(ours, cfg, mel, None, noise)
    error = relative(found["f0"], want["f0"])
    report("HiFT", "F0 of 100 frames, relative", f"{other}, in float64", error, 1e-5)
    error, by = absolute(found["source"], want["source"]), written("make_vocoder_hift.py")
    report("HiFT", "its source, given the same noise", f"{by}, in float64", error, 3e-4)
    off = absolute(rounded["wav"], want["wav"])
    report(
        "HiFT",
        "waveform of 2 s, given the same noise",
        f"{other}, in float64 (in float32: {off:.1e})",
        absolute(found["wav"], want["wav"]),
        1e-3,
    )
    t = np.arange(1500)
    glide = (150 + 60 * np.sin(t / 40)).astype(np.float32)
    found = jax.jit(vocoder_hift.sines, static_argnums=0)(cfg, glide[None])[0]
    error = absolute(found, test_vocoder_hift.exact_sines(glide))
    report("HiFT", "sines of a glide from 90 to 210 Hz, 30 s", "numpy in float64", error, 3e-4)


def test_the_discriminators_give_the_scores_of_independent_ones(reference):
    import torch

    cfg = vocoder.v1()
    theirs = reference.Discriminators(cfg)
    state = public_weights.state(reference.shapes(theirs), SEED)
    theirs = reference.load(theirs, state)
    table = public_models.hifigan_discriminators(cfg)
    ours = load(vocoder.Discriminators, cfg, table, public_models.hifigan_folded(state))
    wav = 0.3 * np.random.default_rng(4).standard_normal((1, 8192)).astype(np.float32)
    with torch.inference_mode():
        want = [x.numpy() for x in theirs(torch.as_tensor(wav))]
    found = jax.jit(lambda d, wav: [layers[-1] for layers in d(cfg, wav)])(ours, wav)
    errors = [relative(np.moveaxis(x, -1, 1), y) for x, y in zip(found, want, strict=True)]
    report("HiFi-GAN discriminators", "8 scores of 8192 samples, relative", written(), max(errors), 1e-4)


# ---------------------------------------------------------------- speaker encoder


def speaker_errors(component, stage, other, found, want):
    """Reports embeddings [B, E] by cosine and by value."""
    assert cosine_distance(*want) > 1e-3  # the two clips differ
    errors = [cosine_distance(x, y) for x, y in zip(found, want, strict=True)]
    report(component, f"1 - cosine, {stage}", other, max(errors), 1e-5)
    report(component, "the same, relative", other, max(map(relative, found, want)), 1e-4)


@pytest.mark.parametrize("name, count", [("resnet34", 218), ("resnet221", 1346), ("resnet293", 1778)])
def test_the_speaker_encoder_gives_the_embeddings_of_an_independent_one(reference, name, count):
    import torch

    cfg = getattr(speaker, name)()
    other = version("wespeaker-unofficial")
    theirs = reference.wespeaker(cfg)
    state = public_weights.state(reference.shapes(theirs), SEED)
    assert sum(not k.startswith("projection.") for k in state) == count
    theirs = reference.load(theirs, state)
    ours = load(speaker.init, cfg, public_models.wespeaker(cfg), state, public_models.WESPEAKER_IGNORED)
    lengths = np.asarray([150, 87], np.int32)
    fbank = (2 * np.random.default_rng(5).standard_normal((2, 150, 80))).astype(np.float32)
    fbank += 3 * np.sin(np.arange(80) / 9 * np.asarray([1.0, 2.3])[:, None])[:, None].astype(np.float32)
    found = np.asarray(jax.jit(speaker.embed, static_argnums=1)(ours, cfg, fbank, lengths))
    with torch.inference_mode():
        want = [
            theirs(torch.as_tensor(x[None, :n].copy()))[-1][0].numpy()
            for x, n in zip(fbank, lengths, strict=True)
        ]

    component = f"WeSpeaker {name.replace('resnet', 'ResNet')}"
    speaker_errors(component, "2 clips in a padded batch", other, found, want)


def test_campplus_gives_the_embeddings_of_an_independent_one_from_both_its_files(reference, tmp_path):
    other = version("chatterbox-tts")
    script = golden_script("make_speaker_campplus", "onnx")
    import torch

    cfg = speaker_campplus.cosyvoice()
    with torch.device("meta"):
        theirs = reference.s3gen("xvector").CAMPPlus(embedding_size=cfg.embedding_size)
    state = public_weights.state(reference.shapes(theirs), SEED)
    golden = json.loads(str(np.load(GOLDEN / "speaker_campplus.npz")["shapes"]))
    assert {k: list(x.shape) for k, x in state.items()} == golden and len(state) == 937
    theirs = reference.load(theirs, state)
    lengths = np.asarray([500, 311], np.int32)
    fbank = (2 * np.random.default_rng(6).standard_normal((2, 500, 80))).astype(np.float32)
    fbank += 3 * np.sin(np.arange(80) / 9 * np.asarray([1.0, 2.3])[:, None])[:, None].astype(np.float32)
    with torch.inference_mode():
        rows = [torch.from_numpy(x[None, :n].copy()) for x, n in zip(fbank, lengths, strict=True)]
        want = [theirs(x)[0].numpy() for x in rows]
    weight_writers.write_torch_zip(tmp_path / "campplus_cn_common.bin", state)
    script.export(theirs, 200, tmp_path / "campplus.onnx")
    embed = jax.jit(speaker_campplus.embed, static_argnums=1)
    for file, words in (
        ("campplus_cn_common.bin", "clips of 5 s and 3.1 s in a padded batch"),
        ("campplus.onnx", "the same, read from the ONNX file that torch.onnx writes"),
    ):
        found = public_files.recognise(tmp_path / file)
        assert found.config == cfg and found.problems() == ""
        table = public_cosyvoice2.campplus(cfg)
        ours = load(speaker_campplus.init, cfg, table, found.tensors, public_names.NO_COUNTS)
        speaker_errors("CAM++", words, other, np.asarray(embed(ours, cfg, fbank, lengths)), want)


def test_wavlm_gives_the_states_and_embeddings_of_transformers_and_an_independent_head():
    library = version("transformers")
    script = golden_script("make_speaker_wavlm", "transformers")
    import torch

    cfg = speaker_wavlm.large_sv()
    with torch.device("meta"):
        wavlm, head = script.backbone(cfg), script.Ecapa(cfg)
    names = {f"model.{k}": place for k, place in script.public_names_of(wavlm, head).items()}
    shapes = {public: tuple(m.state_dict()[name].shape) for public, (m, name) in names.items()}
    golden = json.loads(str(np.load(GOLDEN / "speaker_wavlm.npz")["shapes"]))
    assert {k: list(x) for k, x in shapes.items()} == golden
    state = public_weights.state(shapes, SEED)
    for module in (wavlm, head):
        tensors = {name: torch.as_tensor(state[k]) for k, (m, name) in names.items() if m is module}
        module.load_state_dict(tensors, strict=True, assign=True)
        module.eval().requires_grad_(False)
    rng = np.random.default_rng(7)
    lengths = np.asarray([80000, 50001], np.int32)
    wav = 0.1 * rng.standard_normal((2, 80000)) * (1.5 + np.sin(np.arange(80000) / [[3000], [1700]])) + 0.02
    wav = wav.astype(np.float32)
    with torch.inference_mode():
        want = [
            script.forward(wavlm, head, torch.from_numpy(x[:n])) for x, n in zip(wav, lengths, strict=True)
        ]
    want = [{name: groups[name].numpy() for name in ("states", "embedding")} for groups in want]
    del wavlm, head, tensors
    plain = public_names.fold_weight_norm(state, public_models.wavlm_kept_axis)
    ours = load(speaker_wavlm.init, cfg, public_models.wavlm(cfg), plain, public_models.WAVLM_IGNORED)
    del state, plain
    groups = jax.jit(speaker_wavlm.layer_groups, static_argnums=1)(ours, cfg, wav, lengths)
    errors = [
        relative(groups["states"][i, row, : y.shape[0]], y)
        for row in range(2)
        for i, y in enumerate(want[row]["states"])
    ]
    assert len(errors) == 2 * 25
    component, head = "WavLM-large with ECAPA head", f"{library}; head: {written('make_speaker_wavlm.py')}"
    report(component, "each of 25 hidden states, relative", library, max(errors), 2e-5)
    stage = "clips of 5 s and 3.1 s in a padded batch"
    embeddings = [x["embedding"][0] for x in want]
    speaker_errors(component, stage, head, np.asarray(groups["embedding"]), embeddings)
