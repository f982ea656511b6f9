"""Synthesis on a tiny model with random weights: every hop of a request, batches, notes, prompts."""

import dataclasses
import json
import shutil
import types

import jax
import numpy as np
import pytest
import tiny_model

from deepasmr_jax import clip, pool, programs, results, sharding, synthesis
from deepasmr_jax.request import Request

TEXT = "Close your eyes, and listen to the rain."


@pytest.fixture(scope="module")
def made():
    """The synthesizer that all tests share, so that each program is compiled once."""
    sharding.make_mesh()
    return tiny_model.synthesizer()


def ask(**changes):
    return Request(**({"text": TEXT, "voice": tiny_model.buzz(), "voice_rate": tiny_model.RATE} | changes))


def test_the_audio_has_the_length_of_its_tokens_and_the_facts_are_complete(made):
    result = made(TEXT, tiny_model.buzz(), voice_rate=tiny_model.RATE, seed=3)
    assert (
        result.audio.dtype == np.float32
        and np.isfinite(result.audio).all()
        and np.abs(result.audio).max() <= 1
    )
    assert len(result.audio) == 640 * len(result.tokens) and len(result.mel) == 2 * len(result.tokens)
    assert result.task == "N2A" and result.prompt.startswith("en_asmr") and result.seed == 3
    assert {"clip_s", "lm_s", "flow_s", "vocoder_s", "compile_s"} == set(result.timings)
    assert "<audio" in result._repr_html_() and "<img" in result._repr_html_()
    assert repr(result).startswith("Result(N2A, ") and "array" not in repr(result)


def test_a_result_that_cannot_be_saved_says_so_in_a_sentence(made, tmp_path):
    result = made(TEXT, tiny_model.buzz(), voice_rate=tiny_model.RATE, seed=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write in the folder .*choose another"):
        result.save(tmp_path / "file" / "out.wav")
    with pytest.raises(ValueError, match="does not end in .wav or .flac"):
        result.save(tmp_path / "out.mp3")
    assert result.save(tmp_path / "new" / "out.flac").stat().st_size > 0


def test_the_same_seed_gives_the_same_audio_and_another_seed_does_not(made):
    first, second = (made.batch([ask(seed=1)])[0] for _ in range(2))
    np.testing.assert_array_equal(first.audio, second.audio)
    assert not np.array_equal(first.tokens, made.batch([ask(seed=2)])[0].tokens)


@pytest.mark.parametrize(
    "told, large, lm_dtype, flow_dtype",
    [
        ("flags : fma avx2", 0, "float32", "float32"),
        ("flags : fma avx512_bf16", 0, "bfloat16", "bfloat16"),
        ("flags : fma avx2", 10**9, "float32", "bfloat16"),
        ("flags : fma avx512_bf16", 10**9, "float32", "bfloat16"),
        ("Features : fp asimd bf16", 0, "bfloat16", "bfloat16"),
        ("Features : fp asimd", 0, "float32", "float32"),
        ("arm", 0, "bfloat16", "bfloat16"),
    ],
)
def test_a_cpu_takes_the_products_of_a_part_in_the_faster_type(
    tmp_path, monkeypatch, told, large, lm_dtype, flow_dtype
):
    folder = shutil.copytree(tiny_model.shared(), tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    for name, fields in (("lm", ("dtype",)), ("flow", synthesis.TYPES)):
        values["components"][name]["config"] |= dict.fromkeys(fields, "bfloat16")
    (folder / "config.json").write_text(json.dumps(values))
    monkeypatch.setattr(programs, "_instructions", lambda: told)
    monkeypatch.setattr(synthesis, "LARGE_PARAMS", large)
    made = synthesis.load(folder)
    assert made._parts["lm"].config.dtype == lm_dtype
    assert {getattr(made._parts["flow"].config, name) for name in synthesis.TYPES} == {flow_dtype}
    assert made._decode_weights.layers[0]["down"].dtype == lm_dtype


def test_a_batch_gives_each_request_what_it_gets_alone(made):
    requests = [
        ask(seed=1),
        ask(seed=2, text="Good night."),
        ask(seed=3, voice=tiny_model.hiss(3.0)),
        ask(seed=4),
    ]
    together = made.batch(requests)
    for one, result in zip(requests, together, strict=True):
        alone = made.batch([one])[0]
        np.testing.assert_array_equal(alone.tokens, result.tokens)
        # the sums of a matrix product with more rows are rounded in another order
        np.testing.assert_allclose(alone.audio, result.audio, atol=1e-4)


def test_a_request_that_fails_leaves_the_others_of_its_batch_alone(made):
    silent = np.zeros(tiny_model.RATE, np.float32)
    spoken = made.batch([{"text": ""}, ask(voice=silent), ask(seed=1), dict(text=TEXT, voise="x")])
    assert [isinstance(r, results.Failure) for r in spoken] == [True, True, False, True]
    assert "silent" in spoken[1].error and "voise" in spoken[3].error
    np.testing.assert_array_equal(spoken[2].tokens, made.batch([ask(seed=1)])[0].tokens)


def test_given_tokens_sound_as_in_the_request_they_come_from(made):
    result = made.batch([ask(seed=1)])[0]
    [again] = made.speak_tokens([result.request], [result.tokens])
    np.testing.assert_array_equal(again.audio, result.audio)
    [other] = made.speak_tokens([ask(seed=2)], [result.tokens])
    assert len(other.audio) == len(result.audio) and np.abs(other.audio - result.audio).max() > 1e-4


def test_a_copy_goes_through_the_vocoder_alone_and_padding_does_not_matter(made):
    wav = tiny_model.buzz(1.01)
    copy = made.copy(wav)
    assert len(copy) == len(wav) // 320 * 320 and np.isfinite(copy).all()
    np.testing.assert_allclose(made.copy(wav[: len(copy)]), copy, atol=1e-5)


def test_within_a_style_the_clip_is_the_prompt_if_its_transcript_is_known(made):
    result = made.batch([ask(style="normal", voice_text="Hello there.")])[0]
    assert (result.task, result.prompt) == ("N2N", "self")
    assert not any("pool" in n for n in result.notes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "transcript is not known"),
        ({"voice_text": "你好。"}, "another language"),
        ({"voice_text": "Hello.", "voice": tiny_model.buzz(14.0)}, "no longer fits"),
    ],
)
def test_within_a_style_the_pool_helps_out_where_the_clip_cannot_be_the_prompt(made, changes, reason):
    result = made.batch([ask(style="normal", voice_style="normal", **changes)])[0]
    assert result.prompt.startswith("en_normal") and any(reason in n for n in result.notes)


def test_across_styles_the_prompt_is_the_nearest_entry_of_the_wanted_style_and_language(made):
    voice = made.read_clip(tiny_model.hiss(), tiny_model.RATE)
    for style, language, text in (("normal", "en", TEXT), ("normal", "zh", "今晚下雨了。")):
        expected, cosine = made.pool.retrieve(voice.embedding, style, language)
        result = made.batch([ask(voice=tiny_model.hiss(), style=style, text=text)])[0]
        assert (result.task, result.prompt, result.language) == ("A2N", expected.name, language)
        assert result.prompt_similarity == pytest.approx(cosine, abs=1e-5)


def test_the_task_prompt_can_be_fixed_or_named(made):
    assert made.batch([ask(pool_strategy="static")])[0].prompt == "en_asmr_0"
    assert made.batch([ask(pool_strategy="en_asmr_1")])[0].prompt == "en_asmr_1"


def test_without_a_task_prompt_the_language_model_gets_the_text_only(made, monkeypatch):
    monkeypatch.setattr(made, "pool", pool.Pool((), "mini", "tiny"))  # none is needed
    heard = []
    draw = made._draw
    monkeypatch.setattr(made, "_draw", lambda size, group, n: heard.extend(group) or draw(size, group, n))
    whispered = made.batch([ask(seed=1, pool_strategy="none")])[0]
    normal = made.batch([ask(seed=1, pool_strategy="none", style="normal", voice=tiny_model.hiss())])[0]
    for job, _, text_ids, *_ in heard:
        assert len(job.prompt_tokens) == 0
        np.testing.assert_array_equal(text_ids, made.tokenizer.encode(TEXT, "en"))
    assert whispered.prompt == "none" and whispered.facts()["prompt_similarity"] is None
    assert any("chooses the style itself, asmr or not" in n for n in whispered.notes)
    np.testing.assert_array_equal(whispered.tokens, normal.tokens)  # of clip and style it knows nothing
    assert len(whispered.audio) == 640 * len(whispered.tokens) and np.abs(whispered.audio).max() > 0


def test_a_pool_without_the_language_of_the_text_is_used_with_a_note(made, monkeypatch):
    english = tuple(e for e in made.pool if e.language == "en")
    monkeypatch.setattr(made, "pool", pool.Pool(english, "mini", "tiny"))
    result = made.batch([ask(text="今晚下雨了。")])[0]
    assert result.prompt.startswith("en_asmr") and any("no asmr entry in 'zh'" in n for n in result.notes)


def test_a_later_pass_keeps_tokens_and_prompt_and_takes_the_output_as_the_voice(made):
    one, two = (made.batch([ask(seed=1, refine=n)])[0] for n in (1, 2))
    np.testing.assert_array_equal(one.tokens, two.tokens)
    assert one.prompt == two.prompt and one.task == two.task == "N2A"
    assert np.abs(one.audio - two.audio).max() > 1e-4


def test_a_long_text_is_spoken_in_chunks_with_pauses_between(made):
    text = " ".join([TEXT] * 20)
    result = made.batch([ask(text=text, style="normal", voice_style="asmr")])[0]
    chunks = made.reading(ask(text=text))[::2]
    assert len(chunks) >= 2
    pauses = len(result.audio) - 640 * len(result.tokens)
    assert pauses == (len(chunks) - 1) * round(synthesis.PAUSE_S["normal"] * tiny_model.RATE)


def test_a_chunk_that_was_misread_is_drawn_again_and_noted_if_that_does_not_help(made, monkeypatch):
    fine, held = np.arange(40, dtype=np.int32) % 7, np.full(40, 5, np.int32)
    drawn = []

    def draw(size, group, attempt):
        drawn.append((attempt, [row[0].request.seed for row in group]))
        good = {1: 0, 2: 1, 3: 9, 4: 9}  # seed -> the attempt that is well read
        bad = {
            3: held[: 40 - attempt],
            4: held[:0] if attempt else held,
        }  # silence is worse than a held sound
        return [
            fine if attempt >= good[seed] else bad.get(seed, held)
            for seed in (row[0].request.seed for row in group)
        ]

    monkeypatch.setattr(made, "redraw", {"attempts": 2, "longest_run": 14})
    monkeypatch.setattr(made, "_draw", draw)
    spoken = made.batch([ask(seed=i) for i in (1, 2, 3, 4)])
    assert drawn == [(0, [1, 2, 3, 4]), (1, [2, 3, 4]), (2, [3, 4])]
    assert [len(r.tokens) for r in spoken] == [40, 40, 38, 40]
    assert [any("held for 1." in n for n in r.notes) for r in spoken] == [False, False, True, True]


def test_another_attempt_draws_other_tokens_and_the_first_is_the_one_without_redrawing(made, monkeypatch):
    plain = made.batch([ask(seed=1)])[0]
    monkeypatch.setattr(made, "_problem", lambda tokens, most: "misread")
    assert np.array_equal(made.batch([ask(seed=1)])[0].tokens, plain.tokens)
    monkeypatch.setattr(
        made, "_problem", lambda tokens, most: "misread" if np.array_equal(tokens, plain.tokens) else ""
    )
    monkeypatch.setattr(made, "redraw", {"attempts": 1, "longest_run": 0})
    assert not np.array_equal(made.batch([ask(seed=1)])[0].tokens, plain.tokens)


def test_the_style_that_is_given_wins_over_the_detected_one(made):
    assert made.read_clip(tiny_model.hiss(), tiny_model.RATE).style == "asmr"
    assert made.read_clip(tiny_model.hiss(), tiny_model.RATE, voice_style="normal").style == "normal"
    assert made.batch([ask(voice=tiny_model.hiss(), voice_style="normal")])[0].task == "N2A"


def test_a_transcript_of_digits_is_of_the_language_that_is_given(made):
    job = made._prepare(0, ask(voice_text="1 2 3", style="normal", voice_style="normal", language="en"))
    assert (job.prompt_name, job.clip.language) == ("self", "en")


def test_odd_clips_are_used_with_a_note(made, tmp_path):
    import soundfile

    buzz = tiny_model.buzz
    cases = {
        "clipped": (np.clip(10 * buzz(), -1, 1), 16000, "clipped"),
        "eight": (np.stack([buzz()] * 8, 1), 16000, "8 channels"),
        "narrow": (buzz(rate=8000), 8000, "8000 Hz"),
        "wide": (buzz(rate=96000), 96000, "96000 Hz"),
        "long": (np.tile(buzz(10.0), 60), 16000, "600.0 s"),
    }
    for name, (wav, rate, words) in cases.items():
        soundfile.write(tmp_path / f"{name}.wav", wav, rate)
        notes = []
        voice = made.read_clip(tmp_path / f"{name}.wav", notes=notes)
        assert any(words in n for n in notes), (name, notes)
        assert len(voice.tokens) <= 250 and len(voice.mel) == 2 * len(voice.tokens)
        assert np.isfinite(voice.mel).all() and np.isfinite(voice.embedding).all()


def test_what_is_padded_behind_a_clip_changes_nothing(made):
    wav = tiny_model.buzz(2.6)  # 65 tokens: padded to 128
    whole = made.read_clip(wav, tiny_model.RATE)
    fitting = made.read_clip(wav[: 64 * 640], tiny_model.RATE)
    assert (len(whole.tokens), len(fitting.tokens)) == (65, 64)
    np.testing.assert_allclose(whole.mel[:120], fitting.mel[:120], atol=1e-3)


def test_a_clip_far_from_the_training_level_is_aligned_and_the_output_follows_the_clip(made, monkeypatch):
    wav = tiny_model.buzz()
    monkeypatch.setattr(made, "clip_level_db", {"normal": clip.level_db(wav)})
    loud, quiet = (made.batch([ask(voice=g * wav, seed=1)])[0] for g in (1.0, 0.05))
    assert not any("dB" in n for n in loud.notes) and any("26 dB quieter" in n for n in quiet.notes)
    np.testing.assert_allclose(quiet.audio, 0.05 * loud.audio, atol=2e-3 * np.abs(loud.audio).max())


def test_a_model_says_how_much_it_speaks_in_one_go(made, monkeypatch):
    request = ask(text="Close your eyes, and listen. Stay.")
    assert len(made.reading(request)) == 2  # a chunk and its symbols
    monkeypatch.setattr(made, "chunks", {"en": {"longest": 14, "merge_below": 3, "apart": "clauses"}})
    assert made.reading(request)[::2] == ["Close your eyes.", "and listen.", "Stay."]


def test_the_output_gain_of_a_style_changes_its_level_and_nothing_else(made, monkeypatch):
    as_is = made.batch([ask(seed=1), ask(seed=1, style="normal")])
    monkeypatch.setattr(made, "output_gain_db", {"asmr": -6.0})
    softer = made.batch([ask(seed=1), ask(seed=1, style="normal")])
    np.testing.assert_allclose(softer[0].audio, 10**-0.3 * as_is[0].audio, atol=1e-6)
    np.testing.assert_array_equal(softer[1].audio, as_is[1].audio)


def test_the_random_draws_depend_on_seed_and_chunk_and_stage_but_not_on_the_place():
    data = lambda *a: jax.random.key_data(synthesis._keys(*map(np.uint32, a[:2]), a[2]))
    one, other = data([5, 6], [0, 1], 0), data([6, 5], [1, 0], 0)
    np.testing.assert_array_equal(one[0], other[1])
    np.testing.assert_array_equal(one[1], other[0])
    keys = [data([s], [c], k) for s in (5, 6) for c in (0, 1) for k in (0, 1)]
    assert len({k.tobytes() for k in keys}) == 8


def test_padded_sizes_are_a_base_times_powers_of_two_and_for_the_flow_half_octaves():
    assert [synthesis._padded(n, 64) for n in (1, 64, 65, 128, 129, 1000)] == [64, 64, 128, 128, 256, 1024]
    sizes = {1: 64, 64: 64, 65: 96, 96: 96, 97: 128, 129: 192, 193: 256, 769: 1024, 768: 768}
    assert {n: synthesis._padded_finely(n, 64) for n in sizes} == sizes


@pytest.mark.parametrize("num_tokens, padded", [(60, 64), (70, 96), (100, 128), (150, 192)])
def test_the_flow_is_given_rows_of_a_half_octave(made, monkeypatch, num_tokens, padded):
    seen, sample = [], made._parts["flow"].file.sample

    def watched(model, cfg, speech_tokens, *rest, **settings):
        seen.append(speech_tokens.shape[1])
        return sample(model, cfg, speech_tokens, *rest, **settings)

    file = types.SimpleNamespace(**vars(made._parts["flow"].file) | {"sample": watched})
    monkeypatch.setattr(made._parts["flow"], "file", file)
    clip = made.read_clip(tiny_model.buzz(), tiny_model.RATE, voice_style="normal")
    made.speak_tokens([ask()], [np.zeros(num_tokens - len(clip.tokens), np.int32)])
    assert seen == [padded]


@pytest.mark.parametrize(
    "path, value, words",
    [
        ("mel_profile", "cv2", "has mel profile 'mini', config.json 'cv2'"),
        ("sample_rate", 24000, "sample_rate 24000, its mel profile 'mini' 16000"),
        (
            "components/lm/config/width",
            "abc",
            "lm.Config: width is 'abc'; correct the file, width is of type int",
        ),
        ("sampling/lm", {"top_p": "x"}, "decoding.Sampling: top_p is 'x'"),
        ("sampling/flow", {"num_steps": "many"}, "sampling.flow.num_steps = 'many'"),
        (
            "sampling/flow",
            {"schedule": -0.5, "method": 3},
            "sampling.flow.method = 3",
        ),  # a coefficient may be given
        ("sampling/ratios", {"asmr": {"min_ratio": "x"}}, "sampling.ratios = .*'x'"),
        ("sampling/chunks", {"en": {"longest": "x"}}, "damaged .*'int' and 'str'"),
        ("sampling/chunks", "x", "damaged .*'str'"),
    ],
)
def test_a_config_that_was_changed_by_hand_is_refused_with_the_value(tmp_path, path, value, words):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model.shared(), folder)
    config = json.loads((folder / "config.json").read_text())
    *above, name = path.split("/")
    place = config
    for key in above:
        place = place.setdefault(key, {})
    place[name] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        synthesis.load(folder)


def test_a_pool_that_another_model_made_is_refused(tmp_path):
    path = tmp_path / "p.safetensors"
    dataclasses.replace(tiny_model.make_pool(), mel_profile="cv2").save(path)
    with pytest.raises(ValueError, match="mel profile 'cv2', the model 'mini'"):
        synthesis.load(tiny_model.shared(), path)
    tiny_model.make_pool(embedding=8).save(path)
    with pytest.raises(ValueError, match="embedding of 8 numbers, the model's speaker encoder gives 16"):
        synthesis.load(tiny_model.shared(), path)
