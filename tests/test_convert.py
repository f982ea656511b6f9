"""Public weights end to end: a synthetic CosyVoice2 folder through doctor, convert, info and say; damage; mix-ups."""

import dataclasses
import json
import shutil
from pathlib import Path

import bad_files
import cosyvoice2_folder
import jax
import numpy as np
import pytest
import soundfile
import test_judges
import test_public_names
import test_speaker_wavlm
import tiny_model
import weight_writers
from bad_files import run

from deepasmr_jax import (
    checkpoint,
    doctor,
    flow,
    flow_cosyvoice2,
    lm,
    pool,
    public_cosyvoice2,
    public_files,
    public_models,
    public_names,
    request,
    speaker_wavlm,
    synthesis,
    vocoder,
    weight_files,
)

CLIP = request.BUILT_IN / "demo" / "en_normal.wav"


@pytest.fixture(scope="module")
def public(tmp_path_factory) -> Path:
    return cosyvoice2_folder.write(tmp_path_factory.mktemp("public") / "CosyVoice2-0.5B")


@pytest.fixture(scope="module")
def small_pool(tmp_path_factory):
    """Four entries of the built-in pool, one of each style and language: hearing all hundred takes a minute."""
    whole = pool.load(request.BUILT_IN / "pool.safetensors")
    some = [whole.select(style, language)[0] for style in request.STYLES for language in ("en", "zh")]
    return pool.Pool(tuple(some), whole.mel_profile, whole.speaker_model)


@pytest.fixture(scope="module")
def model(public, small_pool, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("models") / "cv2"
    with pytest.MonkeyPatch.context() as patch:
        real = synthesis.load

        def load(folder=None, pool_file=None):
            made = real(folder, pool_file)
            if folder is None:
                made.pool = small_pool
            return made

        patch.setattr(synthesis, "load", load)
        assert run("convert", "cosyvoice2", public, "--out", out) == 0
    return out


def test_doctor_finds_every_part_whole(public, capsys):
    assert run("doctor", public) == 0
    out = capsys.readouterr().out
    assert out.count("whole") == 6 and "damaged" not in out
    rows = {line.split()[0]: line for line in out.splitlines() if "  unknown" in line}
    others = (*cosyvoice2_folder.PROGRAMS, cosyvoice2_folder.ESTIMATOR, "spk2info.pt", "LICENSE", "index")
    assert set(rows) == set(others) and "TorchScript" in rows["flow.encoder.fp16.zip"]
    for name in ("language model", "flow", "HiFT", "tokenizer V2", "CAM++", "text tokenizer"):
        assert name in out


def test_the_converted_folder_has_every_part_with_its_source_and_licence(public, model, capsys):
    config = checkpoint.read_config(model)
    assert set(config["components"]) == {"lm", "flow", "vocoder", "speech_tokenizer", "speaker"}
    assert config["sample_rate"] == 24000
    lm = config["provenance"]["lm"]
    assert lm["source"] == "llm.pt" and len(lm["sha256"]) == 64 and lm["licence"] == "Apache-2.0"
    assert config["provenance"]["text_tokenizer"]["licence"] == "Apache-2.0"
    assert config["provenance"]["pool"] == {
        "entries": 4,
        "recordings": 0,
        "licence": "GPL-3.0",
    }  # of espeak-ng
    assert run("info", model) == 0
    out = capsys.readouterr().out
    assert "licence: GPL-3.0 (the strictest of its parts: pool)" in out and "languages: en, zh" in out
    assert "memory:" in out
    assert run("doctor", model) == 0
    assert capsys.readouterr().out.count("whole") == 7  # with the text tokenizer and the pool


def test_weights_are_those_of_the_files(public, model):
    state = cosyvoice2_folder.state("llm.pt", cosyvoice2_folder.SMALL["llm.pt"])
    entry = checkpoint.read_config(model)["components"]["lm"]
    found = checkpoint.component_arrays(model, entry)
    np.testing.assert_array_equal(found["speech_table"], state["speech_embedding.weight"])
    np.testing.assert_array_equal(
        found["layers.attn.q.kernel"][1], state["llm.model.model.layers.1.self_attn.q_proj.weight"].T
    )
    hift = cosyvoice2_folder.state("hift.pt", cosyvoice2_folder.SMALL["hift.pt"])
    found = checkpoint.component_arrays(model, checkpoint.read_config(model)["components"]["vocoder"])
    np.testing.assert_allclose(found["first.kernel"], hift["conv_pre.weight"].transpose(2, 1, 0), rtol=1e-5)


@pytest.mark.parametrize("style", request.STYLES)
def test_the_converted_model_says_a_sentence(model, style, tmp_path):
    out = tmp_path / "out.wav"
    code = run("say", "Close your eyes.", "--voice", CLIP, "--style", style, "--model", model, "--out", out)
    assert code == 0
    wav, rate = soundfile.read(out)
    assert rate == 24000 and len(wav) > 2400 and np.abs(wav).max() > 1e-3


def test_a_whisper_leaves_the_sines_of_the_vocoder_out(model):
    made = synthesis.load(model)
    assert made._vocoder_configs["asmr"].source == "unvoiced"
    assert made._vocoder_configs["normal"].source == "predicted"


def test_another_vocoder_drops_the_settings_of_the_one_before(model, public, tmp_path, capsys):
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    sampling = checkpoint.read_config(copy)["sampling"]
    assert sampling["vocoder"] == {"asmr": {"source": "unvoiced"}} and sampling["lm"] == {"max_ratio": 20.0}
    file = write_generator(tmp_path, vocoder.Config(**SINGLE | HIFIGANS["the mel of CosyVoice2"]))
    assert run("convert", "file", file, "--out", copy) == 0
    config = checkpoint.read_config(copy)
    assert config["sampling"] == {k: x for k, x in sampling.items() if k != "vocoder"}
    synthesis.load(copy, with_pool=False)
    config["sampling"]["vocoder"] = {
        "asmr": {"source": "unvoiced"}
    }  # as folders of an earlier version have it
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"sets source in sampling.vocoder.asmr, which its vocoder does not have"
    ):
        synthesis.load(copy, with_pool=False)
    assert run("convert", "file", public / "hift.pt", "--out", copy) == 0
    assert checkpoint.read_config(copy)["sampling"] == sampling


def test_the_rate_follows_the_mel_profile_of_a_part_that_replaces_the_only_one(tmp_path):
    file = write_generator(tmp_path, vocoder.Config(**SINGLE | HIFIGANS["rates the other way"]))
    assert run("convert", "file", file, "--out", tmp_path / "m") == 0
    assert checkpoint.read_config(tmp_path / "m")["sample_rate"] == 22050
    file = write_generator(tmp_path, vocoder.Config(**SINGLE | HIFIGANS["the mel of CosyVoice2"]))
    assert run("convert", "file", file, "--out", tmp_path / "m") == 0
    config = checkpoint.read_config(tmp_path / "m")
    assert (config["mel_profile"], config["sample_rate"]) == ("cv2", 24000)


def test_a_fixed_noise_of_config_json_reaches_the_flow(model, tmp_path, monkeypatch):
    """Without the network, which is tested with given noise elsewhere."""
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    noise = np.random.default_rng(0).standard_normal((1, 80, 200)).astype(np.float32)
    weight_writers.write_torch_zip(copy / "noise.pt", {"rand_noise": noise})
    config = checkpoint.read_config(copy)
    config["sampling"]["flow"]["noise"] = "reference"
    (copy / "config.json").write_text(json.dumps(config))
    made = synthesis.load(copy)
    seen = []

    def sample(model, cfg, tokens, *_, noise=None, **__):
        seen.append(noise)
        return np.zeros((len(tokens), 2 * tokens.shape[1], 80), np.float32)

    monkeypatch.setattr(flow_cosyvoice2, "sample", sample)
    made._vocode = lambda module, cfg, mel, lengths: np.zeros((len(mel), 480 * mel.shape[1]), np.float32)

    def sound():
        entry = made.pool.entries[0]
        clip = synthesis.Clip(entry.speech_tokens[:50], entry.mel[:100], entry.speaker_embedding, entry.style)
        asked = request.Request(text="Hi.", voice=np.zeros(0), voice_rate=24000)
        job = made._job(0, asked, "en", clip, entry.name, entry, float("nan"), [])
        job.tokens = [entry.speech_tokens[:10]]
        made._sound([job], 0)
        return job.error

    assert sound() == ""
    np.testing.assert_array_equal(seen[-1], flow_cosyvoice2.reference_noise(128))  # 60 tokens, padded to 64
    made.flow_noise = made._fixed_noise("noise.pt")
    assert sound() == ""
    np.testing.assert_array_equal(seen[-1], noise[0, :, :128].T)
    made.flow_noise = made.flow_noise[:119]
    assert "120 frames, the fixed noise of the flow 119" in sound() and len(seen) == 2
    made.flow_noise = made._fixed_noise(None)
    assert sound() == "" and seen[-1] is None
    for setting in ("../noise.pt", 5, ["reference"]):
        with pytest.raises(ValueError, match='say "reference" or name a file in that folder'):
            made._fixed_noise(setting)
    with pytest.raises(ValueError, match="nowhere.pt"):
        made._fixed_noise("nowhere.pt")


def test_the_pool_is_that_of_the_built_in_model_heard_by_this_one(model, small_pool):
    own = pool.load(model / "pool.safetensors")
    assert [e.name for e in own] == [e.name for e in small_pool] and own.mel_profile == "cv2"
    assert all(e.provenance["heard_from_pool_of"] == small_pool.speaker_model for e in own)
    assert [e.provenance["licence"] for e in own.select("normal")] == [
        "BSD-like",
        "GPL-3.0",
    ]  # English, Mandarin
    for mine, theirs in zip(own, small_pool, strict=True):  # 50 frames a second in both profiles
        assert abs(len(mine.mel) - len(theirs.mel)) <= 4 and len(mine.speaker_embedding) == 16


def test_export_writes_the_language_model_under_the_names_of_qwen2(public, model, tmp_path):
    assert run("export", "--model", model, "--out", tmp_path / "hf") == 0
    arrays = checkpoint.read_arrays(tmp_path / "hf" / "model.safetensors")
    state = cosyvoice2_folder.state("llm.pt", cosyvoice2_folder.SMALL["llm.pt"])
    prefix = "llm.model."
    assert set(arrays) == {k.removeprefix(prefix) for k in state if k.startswith(prefix)}
    for name, x in arrays.items():
        np.testing.assert_array_equal(x, state[prefix + name])
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["model_type"] == "qwen2" and config["num_hidden_layers"] == 2
    facts = json.loads((tmp_path / "hf" / "provenance.json").read_text())
    assert facts["licence"] == "Apache-2.0" and facts["lm"]["source"] == "llm.pt"
    assert facts["speech"] == "names of CosyVoice2" and len(list((tmp_path / "hf").iterdir())) == 4


def test_an_export_never_goes_where_something_is(model, tmp_path, capsys, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in model.rglob("*")}
    assert run("export", "--model", model, "--out", model) == 2
    assert "give a new folder" in (error := capsys.readouterr().err) and str(model) in error
    assert {p: p.stat().st_mtime_ns for p in model.rglob("*")} == before
    bad_files.fill_the_disk(monkeypatch, "speech.safetensors", room=5000)
    assert run("export", "--model", model, "--out", tmp_path / "a" / "hf") == 2
    assert "No space left" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_language_model_of_cosyvoice3_goes_back_under_its_own_names(tmp_path):
    cfg = lm.cosyvoice3(width=64, num_layers=1, num_heads=2, num_kv_heads=1, mlp_width=64, text_vocab=50)
    state = cosyvoice2_folder.state("llm.pt", cfg)
    state["llm_decoder.bias"] = np.zeros_like(state["llm_decoder.bias"])
    state = public_cosyvoice2.lm_cosyvoice3_theirs(state)
    weight_writers.write_torch_zip(tmp_path / "llm.pt", state)
    assert run("convert", "file", tmp_path / "llm.pt", "--out", tmp_path / "m") == 0
    assert run("export", "--model", tmp_path / "m", "--out", tmp_path / "hf") == 0
    speech = checkpoint.read_arrays(tmp_path / "hf" / "speech.safetensors")
    assert set(speech) == {"llm_decoder.weight", "speech_embedding.weight"}
    for name, x in speech.items():
        np.testing.assert_array_equal(x, state[name])


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_the_exported_language_model_and_gives_its_logits(dtype, public, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import Qwen2ForCausalLM

    model = tmp_path / "m"
    assert run("convert", "file", public / "llm.pt", "--out", model, "--dtype", dtype) == 0
    assert run("export", "--model", model, "--out", tmp_path / "hf") == 0
    theirs, told = Qwen2ForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours, cfg = checkpoint.load_component(model, "lm")
    cfg = dataclasses.replace(cfg, dtype="float32")
    text = np.random.default_rng(0).integers(0, cfg.text_vocab, (1, 20)).astype(np.int32)
    with torch.inference_mode():
        want = theirs.eval()(torch.as_tensor(text.astype(np.int64))).logits.numpy()
    ones = np.ones_like(text)
    batch = dict(
        tokens=text, kinds=lm.TEXT * ones, segment_ids=ones, positions=np.arange(20, dtype=np.int32)[None]
    )
    found = np.asarray(lm.hidden(ours, cfg, batch)) @ np.asarray(ours.text_table[...]).T
    assert np.std(want) > 0.1
    np.testing.assert_allclose(found, want, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("theirs", "ours"), [("float16", "bfloat16"), ("bfloat16", "float16"), ("bfloat16", "float32")]
)
def test_half_precision_files_convert(theirs, ours, tmp_path):
    theirs, tensors = np.dtype(theirs), bad_files.resnet()
    rng = np.random.default_rng(0)
    tensors = {k: rng.standard_normal(x.shape).astype(theirs) for k, x in tensors.items()}
    weight_writers.write_torch_zip(tmp_path / "any_name", tensors)
    assert run("convert", "file", tmp_path / "any_name", "--out", tmp_path / "m", "--dtype", ours) == 0
    entry = checkpoint.read_config(tmp_path / "m")["components"]["speaker"]
    assert entry["dtype"] == ours and entry["module"] == "speaker"
    found = checkpoint.component_arrays(tmp_path / "m", entry)
    table = public_models.wespeaker(bad_files.RESNET)
    for name, x in public_names.to_theirs(table, found).items():
        assert x.dtype == np.dtype(ours)
        np.testing.assert_array_equal(x, tensors[name].astype(np.float32).astype(ours), name)


def test_plain_qwen2_starts_a_speech_model(model, tmp_path):
    assert run("export", "--model", model, "--out", tmp_path / "hf") == 0
    assert run("convert", "file", tmp_path / "hf" / "model.safetensors", "--out", tmp_path / "m") == 0
    entry = checkpoint.read_config(tmp_path / "m")["components"]["lm"]
    found = checkpoint.component_arrays(tmp_path / "m", entry)
    own = checkpoint.component_arrays(model, checkpoint.read_config(model)["components"]["lm"])
    for name, x in own.items():
        if name in public_cosyvoice2.QWEN2_ABSENT:
            assert (np.std(found[name]) > 0.01) == (not name.endswith("bias"))
        else:
            np.testing.assert_array_equal(found[name], x, name)
    checkpoint.load_component(tmp_path / "m", "lm")


def e2_tensors() -> dict[str, np.ndarray]:
    """A small E2 TTS under its public names."""
    cfg = dataclasses.replace(flow.e2tts_base(), width=128, num_layers=4, num_heads=2, num_codes=30)
    like = checkpoint.abstract(lambda key: flow.init(cfg, key), jax.random.key(0))
    hollow = {k: np.zeros(x.shape, np.float32) for k, x in checkpoint.named_arrays(like).items()}
    shapes = {k: x.shape for k, x in public_names.to_theirs(public_models.flow_e2(cfg), hollow).items()}
    return cosyvoice2_folder.public_weights.state(shapes, 3)


@pytest.mark.parametrize("profile", ["f5", "cv2", "hifigan"])
def test_e2_tts_starts_a_flow_on_each_mel(profile, tmp_path, capsys):
    tensors = e2_tensors()
    weight_writers.write_torch_zip(tmp_path / "e2.pt", {"ema_model_state_dict": tensors, "step": 7})
    words = ("convert", "file", tmp_path / "e2.pt", "--out", tmp_path / "m", "--mel-profile", profile)
    assert run(*words) == 0, capsys.readouterr().err
    config = checkpoint.read_config(tmp_path / "m")
    assert config["mel_profile"] == profile and config["provenance"]["flow"]["licence"] == "CC BY-NC 4.0"
    assert ("output.kernel" in config["provenance"]["flow"]["copied"]) == (profile == "f5")
    module, made = checkpoint.load_component(tmp_path / "m", "flow")
    weight = tensors["ema_model.transformer.layers.1.4.ff.2.weight"].T
    np.testing.assert_array_equal(module.down.mlp_out.kernel[...][1], weight)
    assert flow.num_frames(made, 128) == {"f5": 480, "cv2": 256, "hifigan": 441}[profile]


def test_of_a_file_with_much_missing_doctor_names_all_and_convert_some(tmp_path, capsys):
    tensors = e2_tensors()
    lost = [name for name in tensors if ".layers." in name and not name.endswith(".1.g")]
    assert len(lost) > public_files.NAMED
    weight_writers.write_torch_zip(
        tmp_path / "e2.pt", {"ema_model_state_dict": {k: x for k, x in tensors.items() if k not in lost}}
    )
    assert run("convert", "file", tmp_path / "e2.pt", "--out", tmp_path / "m") == 2
    error = capsys.readouterr().err
    assert f"{len(lost)} missing" in error and f"and {len(lost) - public_files.NAMED} more" in error
    assert f"`deepasmr doctor {tmp_path}` names all" in error
    assert sum(f"{name}," in error or f"{name} and" in error for name in lost) == public_files.NAMED
    assert run("doctor", tmp_path) == 1
    out = capsys.readouterr().out
    assert f"\ne2.pt: {len(lost)} missing (" in out and all(name in out for name in lost)


def test_an_e2_tts_file_with_a_tensor_missing_is_no_start(tmp_path, capsys):
    tensors = e2_tensors()
    del tensors["ema_model.transformer.time_embed.time_mlp.0.bias"]
    weight_writers.write_torch_zip(tmp_path / "e2.pt", {"ema_model_state_dict": tensors})
    assert run("doctor", tmp_path) == 1
    assert "1 missing" in capsys.readouterr().out
    assert run("convert", "file", tmp_path / "e2.pt", "--out", tmp_path / "m") == 2
    assert "time_mlp.0.bias" in capsys.readouterr().err and not (tmp_path / "m").exists()


def test_a_part_of_a_stricter_licence_changes_that_of_the_model(model, tmp_path, capsys):
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    assert run("convert", "file", bad_files.good(tmp_path), "--out", copy) == 0
    assert "build the pool again" in capsys.readouterr().out
    config = checkpoint.read_config(copy)
    assert config["provenance"]["speaker"]["licence"] == "CC BY 4.0" and config["licence"] == "GPL-3.0"
    del config["provenance"]["pool"]
    checkpoint.set_licence(config)
    assert config["licence"] == "CC BY 4.0"


def _flip(path: Path, where: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 1
    path.write_bytes(data)


def _other_pool(path: Path) -> None:
    tiny_model.make_pool().save(path)


TEXT, POOL = "text_tokenizer/", "pool.safetensors"


@pytest.mark.parametrize(
    ("part", "harm", "words"),
    [
        (POOL, lambda m: (m / POOL).unlink(), ["missing", "copy the whole"]),
        (POOL, lambda m: (m / POOL).write_bytes((m / POOL).read_bytes()[:-9]), ["damaged", "damaged ("]),
        (POOL, lambda m: _flip(m / POOL, 0.9), ["damaged", "its checksum is another"]),
        (POOL, lambda m: _other_pool(m / POOL), ["damaged", "'mini'", "'cv2'"]),
        (TEXT, lambda m: shutil.rmtree(m / TEXT), ["missing", "copy the whole"]),
        (TEXT, lambda m: (m / TEXT / "merges.txt").unlink(), ["damaged", "merges.txt: copy"]),
        (TEXT, lambda m: _flip(m / TEXT / "vocab.json", 0.5), ["damaged", "vocab.json: its sha256"]),
    ],
)
def test_doctor_finds_a_damaged_pool_or_text_tokenizer(part, harm, words, model, tmp_path, capsys):
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    harm(copy)
    assert run("doctor", copy) == 1
    rows = capsys.readouterr().out.splitlines()
    row = next(r for r in rows if r.startswith(part))
    assert all(word in row for word in words), row
    assert sum("  whole" in r for r in rows) == 6


def copied(public: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(public, copy)
    return copy


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda f: (f / "hift.pt").write_bytes((f / "hift.pt").read_bytes()[:-500]), ["hift.pt"]),
        (lambda f: (f / "flow.pt").write_bytes(b"PK"), ["flow.pt"]),
        (lambda f: (f / "llm.pt").unlink(), ["llm.pt", "missing", "doctor"]),
        (lambda f: shutil.copy(f / "hift.pt", f / "flow.pt"), ["flow.pt", "HiFT"]),
        (lambda f: shutil.rmtree(f / "CosyVoice-BlankEN"), ["CosyVoice-BlankEN", "missing"]),
        (lambda f: _drop(f / "flow.pt", "flow.pt", "encoder_proj.bias"), ["1 missing", "encoder_proj.bias"]),
        (lambda f: _run_code(f / "llm.pt"), ["llm.pt", "system"]),
    ],
)
def test_a_damaged_folder_is_refused_in_one_sentence_and_leaves_nothing(
    harm, words, public, tmp_path, capsys
):
    copy = copied(public, tmp_path)
    harm(copy)
    assert run("convert", "cosyvoice2", copy, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip()
    assert error.splitlines()[-1].startswith("deepasmr: ") and "Traceback" not in error
    for word in words:
        assert word in error, error
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    assert run("doctor", copy) == 1
    assert "damaged" in (said := capsys.readouterr().out) or "missing" in said


def _drop(path: Path, name: str, tensor: str) -> None:
    tensors = cosyvoice2_folder.state(name, cosyvoice2_folder.SMALL[name])
    del tensors[tensor]
    weight_writers.write_torch_zip(path, tensors)


def _run_code(path: Path) -> None:
    weight_writers.write_torch_zip(path, b"cposix\nsystem\n(Vecho\ntR.")


def test_a_full_disk_leaves_nothing_of_a_whole_folder(public, tmp_path, capsys, monkeypatch):
    bad_files.fill_the_disk(monkeypatch, "vocoder.safetensors", room=5000)
    out = tmp_path / "a" / "b"
    assert run("convert", "cosyvoice2", public, "--out", out) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in error for word in (str(out), "No space left", "make room"))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_none_or_holds_something_else(tmp_path, capsys):
    assert run("convert", "cosyvoice2", tmp_path / "nowhere", "--out", tmp_path / "out") == 2
    assert "nowhere" in capsys.readouterr().err
    assert run("doctor", tmp_path) == 2
    assert "no weight files" in capsys.readouterr().err
    assert run("convert", "other", tmp_path, "--out", tmp_path / "out") == 2
    assert "cosyvoice2" in capsys.readouterr().err
    weight_writers.write_torch_zip(tmp_path / "x.pt", {"a": np.zeros(3, np.float32)})
    assert run("doctor", tmp_path) == 0
    assert "unknown" in capsys.readouterr().out


def write_generator(folder: Path, cfg: vocoder.Config, **changes) -> Path:
    """A `g_` file of zeros with the config.json that HiFi-GAN's authors put beside it."""
    like = checkpoint.abstract(lambda key: vocoder.init_generator(cfg, key), jax.random.key(0))
    zeros = {k: np.zeros(x.shape, np.float32) for k, x in checkpoint.named_arrays(like).items()}
    tensors = public_names.to_theirs(public_models.hifigan(cfg), zeros)
    weight_writers.write_torch_zip(folder / "g_00000000", {"generator": tensors})
    settings = {
        "resblock": "1" if cfg.is_paired else "2",
        "upsample_rates": cfg.upsample_rates,
        "upsample_kernel_sizes": cfg.upsample_kernels,
        "upsample_initial_channel": cfg.initial_channels,
        "resblock_kernel_sizes": cfg.residual_kernels,
        "resblock_dilation_sizes": cfg.residual_dilations,
        "segment_size": 8192,
        "num_mels": cfg.mel.num_mels,
        "n_fft": cfg.mel.n_fft,
        "hop_size": cfg.mel.hop_samples,
        "win_size": cfg.mel.win_samples,
        "sampling_rate": cfg.mel.sample_rate,
        "fmin": int(cfg.mel.fmin_hz),
        "fmax": int(cfg.mel.fmax_hz),
        "fmax_for_loss": None,
    }
    (folder / "config.json").write_text(json.dumps(settings | changes))
    return folder / "g_00000000"


def test_a_vocoder_of_another_profile_is_refused(model, tmp_path, capsys):
    file = write_generator(tmp_path, dataclasses.replace(vocoder.v3(), initial_channels=32))
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    assert run("convert", "file", file, "--out", copy) == 2
    assert "hifigan" in (error := capsys.readouterr().err) and "cv2" in error


SINGLE = dict(
    initial_channels=16, residual_kernels=(3, 5), residual_dilations=((1, 2), (2, 6)), is_paired=False
)
HIFIGANS = {
    "rates the other way": dict(upsample_rates=(4, 8, 8), upsample_kernels=(16, 16, 8)),
    "the mel of CosyVoice2": dict(
        mel_profile="cv2", upsample_rates=(10, 6, 4, 2), upsample_kernels=(20, 12, 8, 4)
    ),
}


@pytest.mark.parametrize("case", HIFIGANS)
def test_a_hifi_gan_has_the_rates_and_the_mel_of_the_config_beside_it(case, tmp_path, capsys):
    cfg = vocoder.Config(**SINGLE | HIFIGANS[case])
    file = write_generator(tmp_path, cfg)
    assert run("convert", "file", file, "--out", tmp_path / "m") == 0, capsys.readouterr().err
    assert checkpoint.component_config(tmp_path / "m", "vocoder") == cfg
    assert checkpoint.read_config(tmp_path / "m")["mel_profile"] == cfg.mel_profile
    assert run("doctor", tmp_path) == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            dict(sampling_rate=48000, hop_size=512, win_size=2048, n_fft=2048, fmax=24000),
            ["sampling_rate 48000"],
        ),
        (dict(fmax=None), ["fmax None", "none of the profiles"]),
        (dict(upsample_rates=[8, 8, 8]), ["multiply to 512", "needs 256"]),
        (dict(upsample_rates=[4, 4, 4, 4]), ["3 upsample_kernels for 4 rates"]),
        (dict(upsample_rates=8), ["upsample_rates 8,", "of another kind"]),
        (dict(upsample_kernel_sizes=[16, 16, 4]), ["[16, 16, 4]", "[16, 16, 8]"]),
        (dict(resblock_kernel_sizes=[3, 7]), ["[3, 7]", "[3, 5]"]),
        (dict(resblock_dilation_sizes=[[1], [2]]), ["[[1], [2]]", "[2, 2]"]),
        (dict(resblock="1"), ["resblock '1'", "'2'"]),
        (dict(upsample_initial_channel=32), ["upsample_initial_channel 32", "16"]),
    ],
)
def test_a_config_that_is_not_the_hifi_gan_s_is_refused(changes, words, tmp_path, capsys):
    cfg = vocoder.Config(**SINGLE, upsample_rates=(8, 8, 4), upsample_kernels=(16, 16, 8))
    file = write_generator(tmp_path, cfg, **changes)
    assert run("convert", "file", file, "--out", tmp_path / "m") == 2
    error = capsys.readouterr().err
    for word in ("config.json beside", "g_00000000", *words):
        assert word in error, error
    assert error.count("\n") == 1 and not (tmp_path / "m").exists()
    assert run("doctor", tmp_path) == 1 and "damaged" in capsys.readouterr().out


def test_a_config_beside_a_hifi_gan_that_is_damaged_or_of_another_program(tmp_path, capsys):
    cfg = dataclasses.replace(vocoder.v3(), initial_channels=32)
    file = write_generator(tmp_path, cfg)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["hop_size"]
    for text, words in ((json.dumps(values), "has no hop_size"), ("{", "is damaged")):
        (tmp_path / "config.json").write_text(text)
        assert run("convert", "file", file, "--out", tmp_path / "m") == 2
        assert words in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')  # then it is V3 by its shapes
    assert run("convert", "file", file, "--out", tmp_path / "m") == 0
    assert checkpoint.component_config(tmp_path / "m", "vocoder") == cfg


# ---------------------------------------------------------------- the judge, and the second player of HiFi-GAN


def test_a_wavlm_file_becomes_a_judge_of_its_own(tmp_path, capsys):
    tensors = test_judges.wavlm_tensors()
    file = tmp_path / "public" / "wavlm_large_finetune.pth"
    file.parent.mkdir()
    weight_writers.write_torch_zip(file, {"model": tensors, "epoch": 3})
    assert run("doctor", file.parent) == 0 and "WavLM" in capsys.readouterr().out
    assert run("convert", "file", file, "--out", tmp_path / "judge") == 0
    assert "as speaker_judge" in capsys.readouterr().out
    config = checkpoint.read_config(tmp_path / "judge")
    made = config["provenance"]["speaker_judge"]
    assert (made["source"], made["licence"]) == (file.name, "CC BY-SA 3.0") and len(made["sha256"]) == 64
    module, cfg = checkpoint.load_component(tmp_path / "judge", "speaker_judge")
    assert cfg == test_judges.WAVLM
    np.testing.assert_array_equal(module.head.linear.kernel[...], tensors["linear.weight"].T)
    assert run("doctor", tmp_path / "judge") == 0 and run("info", tmp_path / "judge") == 0
    assert "speaker_wavlm" in (out := capsys.readouterr().out) and "licence: CC BY-SA 3.0" in out
    del tensors["feature_weight"]
    weight_writers.write_torch_zip(file, {"model": tensors})
    assert run("doctor", file.parent) == 1 and "1 missing (model.feature_weight)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["wavlm", "discriminators"])
def test_sizes_of_the_released_files_are_read_off_their_shapes(name):
    kinds = {k.component: k for k in public_files.KINDS}
    if name == "wavlm":
        kind, expected = kinds["speaker_judge"], speaker_wavlm.large_sv()
        public = json.loads(str(np.load(test_speaker_wavlm.GOLDEN)["shapes"]))
        ones = {n.removeprefix("model."): np.broadcast_to(np.float32(1), s) for n, s in public.items()}
        tensors = kind.prepare(ones)
    else:
        kind, expected = kinds["discriminators"], vocoder.v1()
        tensors = test_public_names.plain_shapes(
            test_public_names.MODELS[name], test_public_names.NAMES["full"][name]
        )
    assert kind.config(tensors) == expected
    assert public_files.Found(Path(name), kind, tensors, expected).problems() == ""


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("llm.pt", "llm.model.model.layers.23."),
        ("flow.pt", "decoder.estimator.mid_blocks.11."),
        ("speech_tokenizer_v2.onnx", "encoder.blocks.5."),
        ("campplus.onnx", "xvector.block3.tdnnd16."),
    ],
)
def test_a_file_of_the_released_widths_without_its_last_layer_is_not_whole(name, layer):
    kind = next(k for k in public_files.KINDS if any(r[0] == name for r in k.released))
    shapes = checkpoint.named_arrays(
        checkpoint.abstract(lambda key: kind.init(kind.preset(), key), jax.random.key(0))
    )
    hollow = {k: np.broadcast_to(np.float32(0), x.shape) for k, x in shapes.items()}
    tensors = cosyvoice2_folder.their_shapes(kind.table(kind.preset()), hollow)
    assert public_files.Found(Path(name), kind, tensors, kind.config_of(tensors)).problems() == ""
    lost = [k for k in tensors if k.startswith(layer)]
    left = {k: x for k, x in tensors.items() if k not in lost}
    assert kind.config(left) != kind.preset()  # by its numbers alone it would be a shallower network
    problems = public_files.Found(Path(name), kind, left, kind.config_of(left)).problems()
    assert (
        problems.startswith(f"{len(lost)} missing (") and all(k in problems for k in lost) and len(lost) > 2
    )


def test_a_released_file_of_another_content_or_size_is_told_from_it(tmp_path, monkeypatch):
    size = bad_files.good(tmp_path).stat().st_size
    kind = next(k for k in public_files.KINDS if "ResNet" in k.name)

    def found(size: int, sha256: str | None) -> dict:
        known = dataclasses.replace(kind, released=(("avg_model.pt", size, sha256),))
        monkeypatch.setattr(public_files, "KINDS", (known,))
        return doctor.examine(tmp_path)[0]

    row = found(size, "0" * 64)
    assert row["state"] == "damaged" and "the size is right, the sha256 is not" in row["detail"]
    row = found(size + 1, "0" * 64)
    assert row["state"] == "whole" and f"({size:,} bytes, {size + 1:,})" in row["detail"]
    row = found(size, weight_files.sha256(tmp_path / "avg_model.pt"))
    assert row["state"] == "whole" and "another size" not in row["detail"]


def test_parts_of_two_models_do_not_speak_with_the_wrong_text_tokenizer(model, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    config = checkpoint.read_config(copy)
    del config["text"]  # as `convert file` of every part leaves it: then the built-in tokenizer is meant
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"reads 151936 text ids, the text tokenizer of its config.json makes 313"
    ):
        synthesis.load(copy, with_pool=False)


def hifigan_files(folder: Path) -> tuple[Path, Path]:
    """`g_` and `do_` at toy size with everything that training leaves in the latter."""
    tensors = test_public_names.toy_state("discriminators")
    tree = {p: {n[4:]: x for n, x in tensors.items() if n.startswith(f"{p}.")} for p in ("mpd", "msd")}
    moments = {0: {"step": 7, "exp_avg": np.ones(3, np.float32), "exp_avg_sq": np.ones(3, np.float32)}}
    state = {"state": moments, "param_groups": [{"lr": 2e-4, "betas": (0.8, 0.99), "params": [0]}]}
    weight_writers.write_torch_zip(
        folder / "do_00000000", tree | {"optim_g": state, "optim_d": state, "steps": 7, "epoch": -1}
    )
    generator = test_public_names.toy_state("hifigan_paired")
    weight_writers.write_torch_zip(folder / "g_00000000", {"generator": generator})
    return folder / "g_00000000", folder / "do_00000000"


def test_the_second_player_goes_beside_the_generator_and_not_beside_another_mel(tmp_path, capsys):
    generator, second = hifigan_files(tmp_path)
    for file, component in ((generator, "vocoder"), (second, "discriminators")):
        assert run("convert", "file", file, "--out", tmp_path / "m") == 0
        assert f"as {component}" in capsys.readouterr().out
    config = checkpoint.read_config(tmp_path / "m")
    assert set(config["components"]) == {"vocoder", "discriminators"} and config["licence"] == "MIT"
    cfg = checkpoint.component_config(tmp_path / "m", "discriminators")
    toy = test_public_names.CONFIGS["toy"]["discriminators"]
    for field in ("periods", "period_channels", "num_scales", "scale_channels", "scale_groups"):
        assert getattr(cfg, field) == getattr(toy, field)
    found = checkpoint.component_arrays(tmp_path / "m", config["components"]["discriminators"])
    expected = test_public_names.load("discriminators", toy, test_public_names.toy_state("discriminators"))
    for name, x in checkpoint.named_arrays(expected).items():
        np.testing.assert_array_equal(found[name], x, name)
    assert run("doctor", tmp_path / "m") == 0 and run("doctor", tmp_path) == 0
    assert "discriminators, for training on" in capsys.readouterr().out
    values = {"format": 1, "mel_profile": "cv2", "components": {"vocoder": config["components"]["vocoder"]}}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(values))
    assert run("convert", "file", second, "--out", tmp_path / "other") == 2
    assert "'hifigan'" in (error := capsys.readouterr().err) and "'cv2'" in error


def test_the_strictest_licence_is_on_top():
    assert checkpoint.strictest(["MIT", "Apache-2.0"]) == "Apache-2.0"
    assert checkpoint.strictest(["Apache-2.0", "CC BY-NC 4.0", "MIT"]) == "CC BY-NC 4.0"
    assert checkpoint.strictest(["MIT", "something new"]) == "something new"
    assert all(k.licence in checkpoint.LICENCES for k in public_files.KINDS)
