"""Features of a corpus: the tokens and embeddings that synthesis would take from the same clips."""

import dataclasses
import functools
import json
import os
import shutil
from pathlib import Path

import fill
import fixture_data
import jax
import numpy as np
import pytest
import tiny_model

from deepasmr_jax import (
    audio,
    checkpoint,
    clip,
    data_check,
    input_pipeline,
    shards,
    speaker_campplus,
    synthesis,
)


def with_campplus(folder):
    """The tiny model with a small CAM++ in place of its speaker encoder, and without a pool."""
    shutil.copytree(tiny_model.shared(), folder)
    (folder / "pool.safetensors").unlink()
    cfg = speaker_campplus.Config(
        head_channels=2, initial_channels=8, growth=4, bottleneck=4, repeats=(2,), dilations=(1,), embedding_size=16
    )  # fmt: skip
    shapes = jax.eval_shape(functools.partial(speaker_campplus.init, cfg), jax.random.key(0))
    weights = jax.tree_util.tree_map_with_path(
        lambda path, x: fill.values(fill.path_name(path), x.shape, 0).astype(x.dtype), shapes
    )
    checkpoint.export_component(folder, "speaker", weights, cfg)
    return folder


@pytest.mark.parametrize("encoder", ["resnet", "campplus"])
def test_features_and_synthesis_hear_a_clip_alike(tmp_path, encoder):
    folder = with_campplus(tmp_path / "model") if encoder == "campplus" else tiny_model.shared()
    # what synthesis leaves of a clip: trimmed, and a whole number of tokens
    wav = clip.read(tiny_model.buzz(2.0), tiny_model.RATE, tiny_model.RATE, notes=[]).wav
    wav = wav[: len(wav) // audio.TOKEN_SAMPLES * audio.TOKEN_SAMPLES]
    made = synthesis.Synthesizer(folder) if encoder == "campplus" else tiny_model.synthesizer()
    heard = made.read_clip(wav, tiny_model.RATE)
    [found] = fixture_data.script("data/add_features.py").Extractor(str(folder), "mini", 2)(
        [wav], [tiny_model.RATE]
    )
    np.testing.assert_array_equal(found["speech_tokens"], heard.tokens)
    np.testing.assert_allclose(found["mel"], heard.mel, atol=1e-2)  # float16
    scale = np.abs(heard.embedding).max()
    np.testing.assert_allclose(found["speaker_embedding"], heard.embedding, atol=1e-4 * scale)
    if encoder == "campplus":  # the front end of the other encoders would give something else
        module, cfg = checkpoint.load_component(folder, "speaker")
        frames = audio.fbank_frames(np.array([len(wav)]))
        other = speaker_campplus.embed(module, cfg, audio.fbank(wav[None]), frames)[0]
        assert np.abs(other - heard.embedding).max() > 0.01 * scale


def test_clips_beyond_the_window_of_the_tokenizer_get_all_their_tokens():
    folder = str(tiny_model.shared())
    tools = fixture_data.script("data/add_features.py")
    wav = np.concatenate([tiny_model.hiss(4.0, seed=i) for i in range(9)])  # 36 s
    short = tiny_model.buzz(1.5)
    found = tools.Extractor(folder, "mini", 2)([wav, short], 2 * [tiny_model.RATE])
    tokenizer, cfg = checkpoint.load_component(folder, "speech_tokenizer")
    file = checkpoint.model_file("speech_tokenizer")
    log_mel = np.asarray(audio.s3_log_mel(wav[None]))[0]
    expected = file.encode_long(tokenizer, cfg, log_mel)
    assert len(found[0]["speech_tokens"]) == len(expected) == 36 * audio.TOKEN_RATE
    # sums of another padded length may turn a digit that lies on its rounding limit
    assert np.mean(found[0]["speech_tokens"] == expected) > 0.99
    assert len(found[0]["mel"]) == 2 * len(expected)
    assert len(found[1]["speech_tokens"]) == -(-150 // 4)


def test_eight_devices_find_the_features_of_one():
    folder, devices = str(tiny_model.shared()), jax.local_devices()
    wavs = [tiny_model.buzz(1.0 + 0.1 * i, f0_hz=100.0 + 10 * i) for i in range(9)]  # 1 row of 1 s, 8 of 2 s
    extract = fixture_data.script("data/add_features.py").Extractor
    sizes, found = [], []
    for used in (devices[:1], None):
        make = extract(folder, "cv2", 7, devices=used)
        sizes.append((make.batch_size, jax.sharding.get_mesh().size))
        found.append(make(wavs, [audio.SAMPLE_RATE] * len(wavs)))
    assert sizes == [(7, 1), (8, len(devices))] and len(devices) == 8
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(b["speech_tokens"], a["speech_tokens"])
        np.testing.assert_array_equal(b["mel"], a["mel"])
        # a CPU sums the products of one row and of seven in different orders
        np.testing.assert_allclose(b["speaker_embedding"], a["speaker_embedding"], rtol=0, atol=1e-5)


def test_the_mel_is_made_of_the_record_and_the_tokens_of_its_16_khz():
    tools = fixture_data.script("data/add_features.py")
    extract = tools.Extractor(str(tiny_model.shared()), "f5", 2, "flow")
    full = 0.1 * np.random.default_rng(0).standard_normal(12000).astype(np.float32)
    low = audio.resample(full, 24000, 16000)
    high, without = extract([full, low], [24000, 16000])
    np.testing.assert_array_equal(high["speech_tokens"], without["speech_tokens"])
    assert high["mel"].shape == without["mel"].shape == (47, 100)
    centres = audio.mel_filters(24000, 1024, 100, 0.0, 12000.0, "htk").argmax(0) * 24000 / 1024
    above, below = centres > 9500, centres < 6000  # the resampling filter begins to fall there
    assert np.all(high["mel"][2:-2, above] > without["mel"][2:-2, above] + 3)  # nats
    np.testing.assert_allclose(high["mel"][2:-2, below], without["mel"][2:-2, below], atol=0.1)


class FakeExtractor:
    """Features that are told from the waveform alone, without a model."""

    profile, embedding_size = audio.mel_profile("mini"), 4

    def __init__(self, *arguments):
        pass

    def __call__(self, wavs, rates):
        return [
            {"speech_tokens": np.arange(len(w) // 640, dtype=np.int32), "speaker_embedding": w[:4],
             "mel": np.full((len(w) // 320, 80), w[4], np.float16)}
            for w in wavs
        ]  # fmt: skip


def contents(folder):
    """Arrays and texts of every record of a feature folder, by split and in order."""
    found = []
    for split in ("train", "valid"):
        rows = shards.Records(input_pipeline.Config("lm", 1, (str(folder),), split))
        found += [
            {k: v.tolist() if hasattr(v, "tolist") else v for k, v in rows[i].items()}
            for i in range(len(rows))
        ]
    return found


def test_processes_share_a_pass_that_goes_on_after_a_kill_and_names_what_it_leaves_out(
    tmp_path, monkeypatch, capsys
):
    tools = fixture_data.script("data/add_features.py")
    monkeypatch.setattr(tools, "Extractor", FakeExtractor)
    real = fixture_data.record

    def record(i, split, *rest):
        faults = {("train", 3): {"text": "こんばんは"}, ("valid", 1): {"audio": np.ones(600, np.int16)}}
        return real(i, split, *rest) | faults.get((split, i), {})

    monkeypatch.setattr(fixture_data, "record", record)
    corpus = fixture_data.write(tmp_path, {"train": 9, "valid": 2}, has_features=False)
    options = ["--data", corpus, "--model", str(tiny_model.shared()), "--shard-size", "2", "--out"]
    alone, shared = tmp_path / "a" / "f" / "1.0.0", tmp_path / "b" / "f" / "1.0.0"
    assert tools.main([*options, str(alone)]) == 1
    assert "records left out: 2" in capsys.readouterr().out
    lines = [json.loads(line) for line in (alone / data_check.BUILD_REPORT).read_text("utf-8").splitlines()]
    assert [line["id"] for line in lines] == ["train_3", "valid_1"] and "600 samples" in lines[1]["why"]
    rows = contents(alone)
    assert len(rows) == 9 and rows[0]["duration_s"] == pytest.approx(len(rows[0]["audio"]) / 16000)

    assert tools.main([*options, str(shared), "--process", "1/3"]) == 0
    write_shard, written = tools.tfds_files.write_shard, []

    def stop(path, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        return write_shard(path, *rest)

    monkeypatch.setattr(tools.tfds_files, "write_shard", stop)
    assert tools.main([*options, str(shared)]) == 130
    assert not (shared / "dataset_info.json").exists() and len(list(shared.glob("f-*"))) == 4
    monkeypatch.setattr(tools.tfds_files, "write_shard", write_shard)
    capsys.readouterr()
    for name, other in (
        ("--shard-size", "3"),
        ("--data", fixture_data.write(tmp_path / "c", {"train": 9, "valid": 2})),
    ):
        changed = [*options, str(shared)]
        changed[changed.index(name) + 1] = other
        assert tools.main(changed) == 2 and "was begun with" in capsys.readouterr().err
    [path] = Path(corpus).glob("*-valid.array_record-00000*")  # rewritten, if with as many bytes
    before = path.stat().st_mtime
    os.utime(path, (before, before + 5))
    assert tools.main([*options, str(shared)]) == 2
    assert "was begun with files of the corpus" in capsys.readouterr().err
    os.utime(path, (before, before))
    model = with_campplus(tmp_path / "model")  # another speaker encoder
    changed[:4] = ["--data", corpus, "--model", str(model)]
    assert tools.main(changed) == 2 and "the speaker encoder of sha256" in capsys.readouterr().err
    for folder, words in (("nowhere", "it does not exist; give the version folder"), ("a/f", "did you mean")):
        changed[1] = str(tmp_path / folder)
        assert tools.main(changed) == 2 and words in capsys.readouterr().err
    changed[1] = corpus
    made = json.loads((model / "config.json").read_text())
    del made["components"]["speech_tokenizer"]
    (model / "config.json").write_text(json.dumps(made))
    assert tools.main(changed) == 2 and "no component 'speech_tokenizer'" in capsys.readouterr().err
    (shared / ".0123abcd.part.f-train.array_record-00000-of-00005").write_bytes(b"left by a kill")
    begun = json.loads((shared / "made_with.json").read_text())
    assert not begun["corpus_size"].endswith("bytes")
    begun["corpus_size"] = begun["corpus_size"].replace("iB", "iB bytes")  # by an older version
    (shared / "made_with.json").write_text(json.dumps(begun))
    assert tools.main([*options, str(shared), "--process", "2/3"]) == 0
    assert not (shared / "dataset_info.json").exists()
    assert tools.main([*options, str(shared)]) == 1
    assert contents(shared) == rows and not list(shared.glob(".*.part.*"))
    assert (shared / data_check.BUILD_REPORT).read_text() == (alone / data_check.BUILD_REPORT).read_text()
    assert tools.main([*options, str(shared), "--process", "3/3"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_for_one_stage_gives_the_rows_of_a_full_one_and_is_refused_by_the_others(
    tmp_path, monkeypatch, capsys
):
    tools = fixture_data.script("data/add_features.py")
    model = str(tiny_model.shared())
    assert tools.Extractor(model, "mini", 2, "flow")._embed is None
    assert tools.Extractor(model, "mini", 2, "lm")._mel is None
    monkeypatch.setattr(tools, "Extractor", FakeExtractor)
    corpus = fixture_data.write(tmp_path, {"train": 16, "valid": 2}, has_features=False)
    out = {name: tmp_path / name / "f" / "1.0.0" for name in ("all", "lm", "flow", "copied")}

    def add(data, name, stage, *more):
        return tools.main(["--data", str(data), "--out", str(out[name]), "--for", stage, *more])

    for stage in ("all", "lm", "flow"):
        assert add(corpus, stage, stage, "--model", model) == 0
    assert add(out["all"], "copied", "lm") == 0  # without a model
    [row, *_] = contents(out["lm"])
    assert set(row) == set(tools.KEPT["lm"]) and contents(out["copied"]) == contents(out["lm"])
    assert row["num_samples"] == len(contents(out["all"])[0]["audio"])

    lm = input_pipeline.Config("lm", 4, (str(out["all"]),), num_tokens=192, align=True)
    flow = input_pipeline.Config(
        "flow", 4, (str(out["all"]),), num_tokens=64, min_prompt_tokens=8, max_prompt_tokens=20
    )
    for cfg, name in ((lm, "lm"), (lm, "copied"), (flow, "flow")):
        lean = dataclasses.replace(cfg, data_dirs=(str(out[name]),))
        for a, b in zip(*(input_pipeline.first_batches(c, 6) for c in (cfg, lean)), strict=True):
            assert all(np.array_equal(a[k], b[k]) for k in a | b)

    for stage, name, words in (
        (
            "flow",
            "lm",
            "for the stage lm alone and have no mel; give the stage flow a folder .* --for flow",
        ),
        ("lm", "flow", "for the stage flow alone and have no .*text_ids; .* --for lm"),
        ("vocoder", "lm", f"no audio; give the stage vocoder the records they were made of, {corpus}"),
    ):
        with pytest.raises(ValueError, match=words):
            input_pipeline.make(input_pipeline.Config(stage, 4, (str(out[name]),)))
    for name, stage in (("lm", "flow"), ("all", "lm")):
        capsys.readouterr()
        assert add(corpus, name, stage, "--model", model) == 2
        assert f"was begun with records for {name}, not {stage}" in capsys.readouterr().err
        made = json.loads((out["all"] / "made_with.json").read_text())
        made.pop("for", None)  # a pass of an older version
        (out["all"] / "made_with.json").write_text(json.dumps(made))
    assert add(out["lm"], "copied", "lm") == 2
    assert "has no ['audio', 'mel'] to copy; give --model" in capsys.readouterr().err
    assert add(out["lm"], "copied", "lm", "--model", model) == 2
    assert "has no audio to make features of" in capsys.readouterr().err
