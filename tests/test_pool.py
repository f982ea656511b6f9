"""The virtual speaker pool: files, retrieval, strategies, lists of recordings."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_model

from deepasmr_jax import pool, request


def test_a_saved_pool_is_read_back_bit_for_bit(tmp_path):
    made = tiny_model.make_pool()
    made.save(tmp_path / "pool.safetensors")
    assert tiny_model.plain(pool.load(tmp_path / "pool.safetensors")) == tiny_model.plain(made)
    assert [p.name for p in tmp_path.iterdir()] == ["pool.safetensors"]


def test_retrieval_returns_the_entry_with_the_largest_cosine_of_the_style_and_language():
    made = tiny_model.make_pool()
    wanted = next(e for e in made if e.name == "en_asmr_1")
    louder = 7.0 * wanted.speaker_embedding  # the cosine does not see the length
    entry, cosine = made.retrieve(louder, "asmr", "en")
    assert entry is wanted and cosine == pytest.approx(1.0, abs=1e-6)
    for style, language in (("normal", "en"), ("asmr", "zh")):
        entry, cosine = made.retrieve(louder, style, language)
        assert (entry.style, entry.language) == (style, language) and cosine < 0.99


def test_retrieval_agrees_with_a_plain_search():
    made = tiny_model.make_pool()
    target = np.random.default_rng(3).standard_normal(16)

    def cosine(e):
        return e.speaker_embedding @ target / np.linalg.norm(e.speaker_embedding) / np.linalg.norm(target)

    best = max(made.select("asmr"), key=cosine)
    entry, found = made.retrieve(target, "asmr", None)
    assert entry is best and found == pytest.approx(cosine(best), rel=1e-6)


def test_the_static_strategy_gives_the_same_entry_for_every_voice():
    made = tiny_model.make_pool()
    rng = np.random.default_rng(0)
    names = {made.retrieve(rng.standard_normal(16), "asmr", "en", "static")[0].name for _ in range(20)}
    assert names == {"en_asmr_0"}
    assert made.retrieve(None, "asmr", "en", "static")[0].name == "en_asmr_0"


def test_an_entry_can_be_chosen_by_name_but_not_against_the_style():
    made = tiny_model.make_pool()
    assert made.retrieve(None, "asmr", "en", "zh_asmr_1")[0].name == "zh_asmr_1"
    with pytest.raises(ValueError, match="en_normal_0.*is normal, but asmr is wanted"):
        made.retrieve(None, "asmr", "en", "en_normal_0")
    with pytest.raises(ValueError, match="'nobody'.*en_asmr_0"):
        made.retrieve(None, "asmr", "en", "nobody")


def test_the_real_strategy_looks_at_recordings_of_people_only():
    made = tiny_model.make_pool()
    target = made.entries[2].speaker_embedding
    with pytest.raises(ValueError, match="no asmr recordings"):
        made.retrieve(target, "asmr", "en", "real")
    person = dataclasses.replace(made.entries[3], name="person", provenance={"kind": "recording"})
    assert made.add(person).retrieve(target, "asmr", "en", "real")[0].name == "person"


def test_the_built_in_pool_has_fifty_synthesised_voices_in_both_styles():
    built_in = pool.load(request.BUILT_IN / "pool.safetensors")
    for style in ("normal", "asmr"):
        assert [len(built_in.select(style, language)) for language in ("en", "zh")] == [32, 18]
        assert not built_in.select(style, real=True)
    voices = [e.provenance["voice"] for e in built_in.select("asmr")]
    assert voices == [e.name for e in built_in.select("normal")]
    for e in built_in:  # every part of it says who spoke it, and under which licence
        spoken = e.provenance if e.style == "normal" else e.provenance["task_prompt_from"]
        assert (spoken["engine"], e.licence) == {"en": ("flite", "BSD-like"), "zh": ("espeak", "GPL-3.0")}[
            e.language
        ]


def test_two_entries_of_one_name_are_refused():
    made = tiny_model.make_pool()
    with pytest.raises(ValueError, match="two entries named 'en_normal_0'"):
        made.add(made.entries[0])


def test_an_entry_of_another_speaker_encoder_is_refused():
    made = tiny_model.make_pool()
    other = dataclasses.replace(made.entries[0], name="new", speaker_embedding=np.zeros(8, np.float32))
    with pytest.raises(ValueError, match="embedding of 8 numbers, the pool 16"):
        made.add(other)


@pytest.mark.parametrize("keep", [0, 10, 3000])
def test_a_damaged_pool_file_is_named_in_one_sentence(tmp_path, keep):
    path = tmp_path / "pool.safetensors"
    tiny_model.make_pool().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="pool.safetensors is damaged"):
        pool.load(path)


@pytest.mark.parametrize("where", ["transcript", "array"])
def test_a_flipped_bit_in_a_pool_file_is_found(tmp_path, where):
    path = tmp_path / "pool.safetensors"
    tiny_model.make_pool().save(path)
    data = bytearray(path.read_bytes())
    data[data.index(b"soft tonight") if where == "transcript" else -3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="pool.safetensors is damaged .*checksum"):
        pool.load(path)


def test_a_file_that_is_no_pool_is_not_called_damaged(tmp_path):
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "weights.safetensors")
    (tmp_path / "notes.txt").write_text("A text, longer than nine letters.")
    (tmp_path / "clip.wav").write_bytes(b"RIFF\x24\x00\x00\x00WAVEfmt ")
    for name, kind in (
        ("weights.safetensors", "another safetensors file"),
        ("notes.txt", "of another kind"),
        ("clip.wav", "of another kind"),
    ):
        with pytest.raises(
            ValueError, match=f"{name} is no pool file but {kind}; give .*deepasmr pool build"
        ):
            pool.load(tmp_path / name)


def test_a_pool_that_is_not_there_is_named_with_the_whole_command(tmp_path):
    with pytest.raises(
        ValueError, match="build one with `deepasmr pool build SOURCE --out .*none.safetensors`"
    ):
        pool.load(tmp_path / "none.safetensors")


def test_a_saved_pool_has_the_rights_of_any_new_file(tmp_path):
    (tmp_path / "new").touch()
    tiny_model.make_pool().save(tmp_path / "pool.safetensors")
    assert (tmp_path / "pool.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_a_folder_of_recordings_is_listed_with_transcripts_and_languages(tmp_path):
    for name, text in (("b", "Good night."), ("a", "晚安。")):
        (tmp_path / f"{name}.wav").write_bytes(b"x")
        (tmp_path / f"{name}.txt").write_text(text, "utf-8")
    found = pool.read_recordings(tmp_path, style="normal")
    assert [(r.name, r.transcript, r.language, r.style) for r in found] == [
        ("a", "晚安。", "zh", "normal"),
        ("b", "Good night.", "en", "normal"),
    ]
    (tmp_path / "c.wav").write_bytes(b"x")
    with pytest.raises(ValueError, match="c.wav has no transcript"):
        pool.read_recordings(tmp_path, style="normal")


def test_a_manifest_is_listed_in_its_order_and_its_faults_are_named_by_line(tmp_path):
    (tmp_path / "x.wav").write_bytes(b"x")
    row = {
        "audio": "x.wav",
        "text": "Hello.",
        "style": "asmr",
        "attributes": {"gender": "female"},
        "kind": "synthesis",
    }
    path = tmp_path / "list.jsonl"
    other = row | {"name": "two", "style": "normal", "licence": "CC0 1.0"}
    path.write_text(json.dumps(row) + "\n" + json.dumps(other) + "\n")
    assert [r.licence for r in pool.read_recordings(path)] == ["", "CC0 1.0"]
    found = pool.read_recordings(path, licence="CC BY 4.0")
    assert [r.licence for r in found] == ["CC BY 4.0", "CC0 1.0"]
    assert [(r.name, r.style, r.kind) for r in found] == [
        ("x", "asmr", "synthesis"),
        ("two", "normal", "synthesis"),
    ]
    assert found[0].attributes == {"gender": "female"}
    for fault, message in (
        ({"style": "loud"}, "line 1.*'loud'"),
        ({"audio": "y.wav"}, "line 1.*y.wav"),
        ({"language": "xx"}, "line 1.*'xx'"),
        ({"text": " "}, "line 1.*empty transcript"),
        ({"kind": "guess"}, "line 1.*'guess'"),
        ({"licence": 4}, "line 1.*licence 4"),
    ):
        path.write_text(json.dumps(row | fault) + "\n")
        with pytest.raises(ValueError, match=message):
            pool.read_recordings(path)
    path.write_text("{broken\n")
    with pytest.raises(ValueError, match="line 1 .*not a JSON object"):
        pool.read_recordings(path)
