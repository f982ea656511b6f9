"""Every network at the size of its public file, beside other code, on random weights under the public names.

    python -m pytest -m full -s tests/test_parity_full.py

Each weight goes through `public_names`: one state dict feeds the other side as it is and ours through its table, so a
wrong name, layout or formula shows. Every comparison prints a line
`component | stage | reference and version | error reached | tolerance`, which docs/parity.md collects.
Needs torch, transformers, s3tokenizer and f5-tts (tests skip without), 10 GB of memory and half an hour on two cores.
"""

import importlib.metadata
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import public_weights
import pytest

from deepasmr_jax import (
    audio,
    checkpoint,
    flow,
    lm,
    public_names,
    sharding,
    speaker,
    speech_tokenizer,
    vocoder,
)

pytestmark = pytest.mark.full
SEED = 21


@pytest.fixture(scope="module")
def reference():
    """tests/golden/public_reference.py, or a skip."""
    pytest.importorskip("torch").set_num_threads(os.cpu_count())
    return importlib.import_module("public_reference")


def version(package):
    """`transformers 5.23.0`; skips the test if the package is not installed."""
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        pytest.skip(f"{package} is not installed")
    return f"{package} {importlib.metadata.version(package)}"


def written():
    return f"public_reference.py, torch {importlib.metadata.version('torch')}"


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


def absolute(found, want):
    found, want = np.asarray(found), np.asarray(want)
    assert found.shape == want.shape and np.isfinite(found).all()
    return float(np.max(np.abs(found - want)))


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
    ours = load(lm.init, cfg, public_names.qwen2(cfg), plain, absent=public_names.QWEN2_ABSENT)

    text = np.random.default_rng(0).integers(0, cfg.text_vocab, 48)
    kept = []
    for layer in theirs.model.layers:
        layer.register_forward_hook(
            lambda _, __, y: kept.append((y[0] if isinstance(y, tuple) else y).numpy())
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
        2: (public_names.lm_cosyvoice2_tensors, public_names.lm_cosyvoice2),
        3: (public_names.lm_cosyvoice3_tensors, public_names.lm_cosyvoice3),
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

    weights = lm.unstack(ours, cfg)
    del ours
    steps, size = 4, batch["tokens"].shape[1]
    start = size - steps
    prefill = jax.jit(lm.prefill, static_argnums=(1, 5))
    step = jax.jit(lm.decode_step, static_argnums=1)
    columns = {k: np.pad(batch[k][:, :start], ((0, 0), (0, 3))) for k in ("tokens", "kinds")}  # with padding
    scores, cache = prefill(weights, cfg, columns["tokens"], columns["kinds"], np.asarray([start]), size + 3)
    errors = [absolute(scores[0], want[start - 1])]
    for at in range(start, size):
        token = batch["tokens"][:, at]
        scores, cache = step(weights, cfg, token, np.asarray([at], np.int32), cache)
        errors.append(absolute(scores[0], want[at]))
    report(component, "the same with a cache, token by token", other, max(errors), 2e-4)

    count, greedy = 10, lm.Sampling(greedy=True, repetition_aware=False)
    lengths = dict(text=[13, 9], speech=[24, 5])
    columns = {"text": np.stack([text, text[::-1]]), "speech": np.stack([speech, speech[::-1]])}
    given = []
    for name in ("text", "speech"):
        given += [jnp.asarray(columns[name], jnp.int32), jnp.asarray(lengths[name], jnp.int32)]
    limits = jnp.full(2, count, jnp.int32)
    keys = jax.random.split(jax.random.key(0), 2)
    tokens, _ = lm.generate(weights, cfg, greedy, *given, limits, limits, keys, count)
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
    ours = load(speech_tokenizer.init, cfg, public_names.s3_v2(cfg), state)
    wavs = clips()
    assert len(wavs) == 20 and max(map(len, wavs)) == 58 * 16000
    our_mels = [np.asarray(audio.s3_log_mel(x[None])[0]) for x in wavs]
    their_mels = [log_mel_spectrogram(torch.as_tensor(x)).numpy().T for x in wavs]
    report("S3 tokenizer V2", "log-mel of 20 clips", other, max(map(absolute, our_mels, their_mels)), 5e-4)

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
    ours = load(flow.init, cfg, public_names.flow_e2(cfg), file, public_names.FLOW_E2_IGNORED)

    rng = np.random.default_rng(2)
    x, condition = rng.standard_normal((2, 2, 120, 100)).astype(np.float32)
    condition[:, 50:] = 0
    tokens = np.full((2, 120), -1, np.int32)
    tokens[:, :40] = rng.integers(0, cfg.num_codes, (2, 40))
    t = np.asarray([0.2, 0.9], np.float32)
    kept = {}

    def keep(key):
        return lambda _, __, y: kept.__setitem__(key, y.numpy())

    theirs.time_embed.register_forward_hook(keep("time"))
    theirs.input_embed.register_forward_hook(keep("input"))
    middle = theirs.layers[cfg.num_layers // 2][0]
    for net, key in ((middle, "half"), (theirs.norm_out, "layers")):
        net.register_forward_pre_hook(
            lambda _, args, key=key: kept.__setitem__(key, args[0].numpy()[..., : cfg.width])
        )
    with torch.inference_mode():
        want = theirs(
            x=torch.as_tensor(x),
            cond=torch.as_tensor(condition),
            text=torch.as_tensor(tokens[:, :40].astype(np.int64)),
            time=torch.as_tensor(t),
        ).numpy()

    @jax.jit
    def run(model, x, condition, tokens, t, mask):
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
    found = run(ours, **sharding.put(batch))
    names = dict(time="time embedding", input="input embedding", half="12 layers", layers="24 layers")
    for key, name in names.items():
        report("E2TTS_Base", f"{name}, relative", other, relative(found[key], kept[key]), 1e-4)
    report("E2TTS_Base", "velocity of 120 frames, relative", other, relative(found["velocity"], want), 1e-4)


# ---------------------------------------------------------------- vocoder


@pytest.mark.parametrize(
    "name, count, total", [("v1", 234, 13_936_130), ("v2", 234, 928_514), ("v3", 69, 1_464_322)]
)
def test_the_generator_gives_the_waveform_of_an_independent_one(reference, name, count, total):
    import torch

    cfg = getattr(vocoder, name)()
    theirs = reference.Generator(cfg)
    state = public_weights.state(reference.shapes(theirs), SEED)
    assert (len(state), sum(x.size for x in state.values())) == (count, total)
    theirs = reference.load(theirs, state)
    ours = load(vocoder.init_generator, cfg, public_names.hifigan(cfg), public_names.hifigan_folded(state))
    mel = np.random.default_rng(3).standard_normal((1, 86, 80)).astype(np.float32)
    with torch.inference_mode():
        want = theirs(torch.as_tensor(mel.transpose(0, 2, 1).copy())).numpy()
    found = jax.jit(vocoder.apply, static_argnums=1)(ours, cfg, mel)
    assert 0.01 < np.std(want) < 0.7
    report(f"HiFi-GAN {name.upper()}", "waveform of 86 frames", written(), absolute(found, want), 1e-4)


def test_the_discriminators_give_the_scores_of_independent_ones(reference):
    import torch

    cfg = vocoder.v1()
    theirs = reference.Discriminators(cfg)
    state = public_weights.state(reference.shapes(theirs), SEED)
    theirs = reference.load(theirs, state)
    table = public_names.hifigan_discriminators(cfg)
    ours = load(vocoder.Discriminators, cfg, table, public_names.hifigan_folded(state))
    wav = 0.3 * np.random.default_rng(4).standard_normal((1, 8192)).astype(np.float32)
    with torch.inference_mode():
        want = [x.numpy() for x in theirs(torch.as_tensor(wav))]
    found = jax.jit(lambda d, wav: [layers[-1] for layers in d(cfg, wav)])(ours, wav)
    errors = [relative(np.moveaxis(x, -1, 1), y) for x, y in zip(found, want, strict=True)]
    report("HiFi-GAN discriminators", "8 scores of 8192 samples, relative", written(), max(errors), 1e-4)


# ---------------------------------------------------------------- speaker encoder


@pytest.mark.parametrize("name, count", [("resnet34", 218), ("resnet221", 1346), ("resnet293", 1778)])
def test_the_speaker_encoder_gives_the_embeddings_of_an_independent_one(reference, name, count):
    import torch

    cfg = getattr(speaker, name)()
    theirs = reference.SpeakerResNet(cfg)
    state = public_weights.state(reference.shapes(theirs), SEED)
    assert sum(not k.startswith("projection.") for k in state) == count
    theirs = reference.load(theirs, state)
    ours = load(speaker.init, cfg, public_names.wespeaker(cfg), state, public_names.WESPEAKER_IGNORED)
    lengths = np.asarray([150, 87], np.int32)
    fbank = (2 * np.random.default_rng(5).standard_normal((2, 150, 80))).astype(np.float32)
    fbank += 3 * np.sin(np.arange(80) / 9 * np.asarray([1.0, 2.3])[:, None])[:, None].astype(np.float32)
    found = np.asarray(jax.jit(speaker.embed, static_argnums=1)(ours, cfg, fbank, lengths))
    with torch.inference_mode():
        want = [
            theirs(torch.as_tensor(x[None, :n].copy()))[0].numpy()
            for x, n in zip(fbank, lengths, strict=True)
        ]

    def cosine(x, y):
        x, y = x.astype(np.float64), y.astype(np.float64)
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    errors = [1 - cosine(x, y) for x, y in zip(found, want, strict=True)]
    assert 1 - cosine(*want) > 1e-3  # the two clips differ
    component = f"WeSpeaker {name.replace('resnet', 'ResNet')}"
    report(component, "1 - cosine, 2 clips in a padded batch", written(), max(errors), 1e-5)
    report(component, "the same, relative", written(), max(map(relative, found, want)), 1e-4)
