"""The synthetic corpus: sentences, splits, virtual speakers, alignments, whisper, shards, ArrayRecord."""

import dataclasses
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "data"))

pytest.importorskip("pypinyin")

import synthetic  # noqa: E402
import synthetic_text  # noqa: E402
import synthetic_voice  # noqa: E402

from deepasmr_jax import evaluate  # noqa: E402
from deepasmr_jax.text import PHONES, pinyin_parts  # noqa: E402


def _needs(*names):
    """Skip unless all these programs or packages are there."""
    for name in names:
        if name in ("flite", "festival"):
            if shutil.which(name) is None:
                pytest.skip(f"the program {name} is not installed")
        else:
            pytest.importorskip(name)


def _speaker(engine, split="train"):
    return next(s for s in synthetic_voice.speakers() if s.engine == engine and s.split == split)


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("language", ["en", "zh"])
def test_matrix_grammars_have_five_slots_of_ten_words_each(language):
    slots = synthetic_text.MATRIX_EN if language == "en" else synthetic_text.MATRIX_ZH
    assert [len(set(s)) for s in slots] == [10] * 5


def test_a_sentence_has_the_same_split_whatever_its_case_and_punctuation():
    assert synthetic_text.split_of("Kathy sees, seven toys.", "en") == synthetic_text.split_of(
        "kathy sees seven toys", "en"
    )


def test_splits_of_random_sentences_have_the_stated_shares():
    rng = random.Random(0)
    texts = {synthetic_text.draw("en", "matrix", rng) for _ in range(4000)}
    share = {
        s: sum(synthetic_text.split_of(t, "en") == s for t in texts) / len(texts) for s in synthetic.SPLITS
    }
    expected = {"train": 0.87, "valid": 0.04, "test": 0.06, "hts": 0.03}
    assert all(abs(share[s] - expected[s]) < 0.015 for s in expected), share  # 0.015 is 3 standard errors


@pytest.mark.parametrize("language", ["en", "zh"])
def test_sentences_are_distinct_and_in_the_split_of_their_hash(language):
    counts = {"train": {"matrix": 60, "asmr": 60}, "valid": {"matrix": 8, "asmr": 4}, "test": {"matrix": 8}}
    drawn = synthetic_text.sentences(language, counts)
    keys = [synthetic_text.normalize(t) for items in drawn.values() for _, t in items]
    assert len(keys) == len(set(keys)) == 140
    assert all(
        synthetic_text.split_of(t, language) == split for split, items in drawn.items() for _, t in items
    )


def test_every_prefix_of_the_sentences_mixes_the_kinds():
    drawn = synthetic_text.sentences("en", {"train": {"matrix": 60, "asmr": 30}})["train"]
    assert 18 <= sum(kind == "matrix" for kind, _ in drawn[:30]) <= 22


def test_asking_for_more_sentences_than_exist_is_refused(monkeypatch):
    monkeypatch.setattr(
        synthetic_text, "draw", lambda language, kind, rng: rng.choice(("One.", "Two.", "Three."))
    )
    with pytest.raises(ValueError, match="matrix sentences in 'en' ran out"):
        synthetic_text.sentences("en", {"train": {"matrix": 4}})


def test_open_english_words_come_from_the_dictionary():
    _needs("pocketsphinx")
    words = set(synthetic_text.words_en())
    assert len(words) == 12000 and {"water", "morning", "idea"} <= words and "fuck" not in words
    frame_words = set(" ".join(synthetic_text._EN_FRAMES).replace("{w}", "").split()) | {"an"}
    rng = random.Random(1)
    for _ in range(50):
        text = synthetic_text.normalize(synthetic_text.draw("en", "open", rng))
        assert set(text.split()) <= words | frame_words


def test_tone_changes_are_applied_to_the_reading():
    assert synthetic_text.syllables_zh("一个桌子，你好。") == "yi2 ge4 zhuo1 zi5 , ni2 hao3".split()


def test_sentences_with_syllables_that_the_engine_spells_in_english_are_left_out():
    assert not synthetic_text.is_speakable_zh("小熊") and synthetic_text.is_speakable_zh("小猫")


# ---------------------------------------------------------------- plan


@pytest.fixture(scope="module")
def small_plan():
    """A plan of about 400 pairs; a toy phrase table stands in for pypinyin's, which takes long to read."""
    _needs("pocketsphinx")
    phrases = tuple(a + b for a in "山水火土风云花草" for b in "上下里外前后左右")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic_text, "_phrases_zh", lambda: (phrases, {"shan": phrases[:8]}))
        yield synthetic.plan(limit=400)


def test_the_plan_is_always_the_same_and_has_one_split_per_shard(small_plan):
    assert small_plan == synthetic.plan(limit=400)
    assert {p.language for shard in small_plan for p in shard} == {"en", "zh"}
    assert all(len({p.split for p in shard}) == 1 for shard in small_plan)
    ids = [p.pair_id for shard in small_plan for p in shard]
    assert len(ids) == len(set(ids))


def test_test_speakers_never_read_training_sentences(small_plan):
    split_of = {s.name: s.split for s in synthetic_voice.speakers()}
    for pair in (p for shard in small_plan for p in shard):
        assert split_of[pair.speaker] == ("train" if pair.split == "valid" else pair.split)


def test_the_first_training_shard_is_balanced_like_the_whole(small_plan):
    train = [shard for shard in small_plan if shard[0].split == "train"]
    whole = [p for shard in train for p in shard]
    for field, value in (("language", "zh"), ("kind", "matrix")):
        first = np.mean([getattr(p, field) == value for p in train[0]])
        assert abs(first - np.mean([getattr(p, field) == value for p in whole])) < 0.06


def test_full_counts_give_every_test_speaker_at_least_16_matrix_sentences():
    speakers = synthetic_voice.speakers()
    for language, least in (("en", 16), ("zh", 16)):
        count = sum(s.split == "test" and s.languages[0] == language for s in speakers)
        assert synthetic.COUNTS[language]["test"]["matrix"] >= least * count
        assert sum(synthetic.COUNTS[language]["test"].values()) >= 30 * count


# ---------------------------------------------------------------- voices


def test_virtual_speakers_are_distinct_and_test_timbres_are_not_train_timbres():
    speakers = synthetic_voice.speakers()
    assert len({s.name for s in speakers}) == len(speakers) == 87
    timbre = {
        split: {(s.voice, s.alpha) for s in speakers if s.split == split} for split in ("train", "test")
    }
    assert not timbre["train"] & timbre["test"]


def test_frequency_maps_rise_from_0_to_8000_hz():
    hz = np.linspace(0, 8000, 513)
    maps = [synthetic_voice._speaker_map(s, hz) for s in synthetic_voice.speakers()]
    for m in [*maps, synthetic_voice._whisper_map(hz)]:
        assert m[0] == 0 and m[-1] == 8000 and (np.diff(m) > 0).all()


def test_labels_split_a_segment_of_two_phones_in_the_middle():
    segments = [(0.0, 0.1, ("sil",)), (0.1, 0.3, ("AO", "R"))]
    found = synthetic_voice.labels(segments, np.array([0.05, 0.15, 0.25, 0.35]))
    assert [PHONES[i] for i in found] == ["sil", "AO", "R", "sil"]


def test_f0_classes_are_zero_where_unvoiced_and_rise_with_pitch():
    f0 = np.concatenate([np.zeros(3), np.geomspace(80, 240, 50)])
    classes = synthetic_voice.f0_classes(f0)
    assert (
        (classes[:3] == 0).all() and (np.diff(classes[3:]) >= 0).all() and set(classes[3:]) == {1, 2, 3, 4, 5}
    )


def test_noise_synthesis_follows_the_envelope_in_time_and_frequency():
    log_amplitude = np.full((100, 513), -12.0)
    log_amplitude[50:, 257:] = 0.0  # only above 4 kHz, only in the second half
    wav = synthetic_voice._noise_synthesis(log_amplitude, 16000, 160, np.random.default_rng(0))
    first, second = (np.abs(np.fft.rfft(w)) for w in (wav[:7000], wav[9000:]))
    assert (first**2).sum() < 1e-4 * (second**2).sum()
    assert (second[: 7000 // 4 - 100] ** 2).sum() < 1e-2 * (second**2).sum()
    assert abs(wav[9000:].std() - np.sqrt(0.5)) < 0.05  # half of the band of unit white noise


@pytest.fixture(scope="module")
def flite_pair():
    _needs("flite", "pyworld", "scipy")
    speaker = _speaker("flite")
    wav, segments = synthetic_voice.flite_say("Kathy sees seven green toys.", speaker.voice)
    return wav, segments, synthetic_voice.make_pair(wav, segments, speaker, 0)


def test_flite_segments_cover_its_audio_in_order(flite_pair):
    wav, segments, _ = flite_pair
    assert all(a[1] == b[0] for a, b in zip(segments, segments[1:], strict=False))
    assert abs(segments[-1][1] - len(wav) / 16000) < 0.06
    spoken = [p for _, _, (p,) in segments if p != "sil"]
    assert spoken[:4] == ["K", "AE", "TH", "IY"] and spoken[-3:] == ["T", "OY", "Z"]


def test_both_styles_have_labels_for_every_20_ms_and_the_same_phones_in_order(flite_pair):
    pair = flite_pair[2]
    runs = {}
    for style, r in pair.items():
        assert r["audio"].dtype == np.int16
        assert len(r["phones"]) == len(r["f0_class"]) == len(r["audio"]) // 320
        runs[style] = [int(p) for i, p in enumerate(r["phones"]) if i == 0 or p != r["phones"][i - 1]]
    assert runs["normal"] == runs["asmr"]
    assert (
        abs(len(pair["asmr"]["audio"]) / len(pair["normal"]["audio"]) - synthetic_voice.WHISPER_STRETCH)
        < 0.01
    )


def test_whisper_is_quieter_unvoiced_and_without_the_lowest_band(flite_pair):
    normal, whisper = (flite_pair[2][style] for style in ("normal", "asmr"))
    assert (whisper["f0_class"] == 0).all() and (normal["f0_class"] > 0).mean() > 0.4
    assert np.abs(whisper["audio"]).max() < np.abs(normal["audio"]).max()

    def low_share(audio):
        power = np.abs(np.fft.rfft(audio / 32768.0)) ** 2
        return power[: len(power) * 200 // 8000].sum() / power.sum()

    assert low_share(whisper["audio"]) < 0.1 * low_share(normal["audio"])


def _frames(r, phones, size):
    """Windows of `size` samples about the label frames of some phones."""
    wanted = np.isin(r["phones"], [PHONES.index(p) for p in phones])
    centres = [t * 320 + 160 for t in np.flatnonzero(wanted)]
    return np.stack([r["audio"][c - size // 2 : c + size // 2].astype(np.float64) for c in centres])


def test_whisper_has_no_pitch_period(flite_pair):
    values = []
    for style in ("normal", "asmr"):
        frames = _frames(flite_pair[2][style], ("AE", "IY", "EH", "OY"), 1024)
        best = []
        for x in frames:
            r = [np.corrcoef(x[:-lag], x[lag:])[0, 1] for lag in range(60, 260)]  # 62 to 267 Hz
            best.append(max(r))
        values.append(np.median(best))
    assert values[0] > 0.7 and values[1] < 0.5, values


def test_phone_labels_agree_with_the_energy(flite_pair):
    r = flite_pair[2]["normal"]
    frames = r["audio"][: len(r["phones"]) * 320].reshape(-1, 320).astype(np.float64)
    level_db = 10 * np.log10((frames**2).mean(1) + 1)
    assert level_db[r["phones"] == 0].mean() < level_db[r["phones"] != 0].mean() - 20


def test_the_same_seed_gives_the_same_pair(flite_pair):
    wav, segments, pair = flite_pair
    again = synthetic_voice.make_pair(wav, segments, _speaker("flite"), 0)
    assert all((pair[s]["audio"] == again[s]["audio"]).all() for s in pair)


def test_a_larger_alpha_moves_the_formants_up_by_its_factor_in_both_styles(flite_pair):
    wav, segments, pair = flite_pair
    speaker = _speaker("flite")
    moved = synthetic_voice.make_pair(
        wav, segments, dataclasses.replace(speaker, alpha=speaker.alpha * 1.3), 0
    )
    hz = np.linspace(0, 8000, 513)

    def level_db(
        r, scale
    ):  # mean level of the front vowels at 500..3000 Hz times scale, smoothed over 200 Hz
        frames = _frames(r, ("AE", "EH", "IY"), 1024) * np.hanning(1024)
        power = np.mean(np.abs(np.fft.rfft(frames)) ** 2, axis=0)
        smooth = 10 * np.log10(np.convolve(power, np.hanning(25), "same"))
        return np.interp(np.geomspace(500, 3000, 100) * scale, hz, smooth)

    for style in ("normal", "asmr"):
        scales = np.arange(0.9, 1.7, 0.02)
        match = [np.corrcoef(level_db(pair[style], 1.0), level_db(moved[style], s))[0, 1] for s in scales]
        assert abs(scales[np.argmax(match)] - 1.3) < 0.1, (style, scales[np.argmax(match)])


def test_speech_over_the_longest_length_is_refused(flite_pair):
    wav, segments, _ = flite_pair
    slow = dataclasses.replace(_speaker("flite"), rate=0.2)
    with pytest.raises(ValueError, match="over 8"):
        synthetic_voice.make_pair(wav, segments, slow, 0)


def test_espeak_mandarin_labels_are_the_pinyin_of_the_text():
    _needs("espeakng_loader", "scipy")
    text = "小猫在睡觉，你去女儿家。"
    wav, segments = synthetic_voice.espeak_say(text, "m3", "zh")
    spoken = [p for _, _, (p,) in segments if p != "sil"]
    expected = []
    for syllable in synthetic_text.syllables_zh(text):
        if syllable != ",":
            initial, final, _ = pinyin_parts(syllable)
            expected += ([f"zh_{initial}"] if initial else []) + [f"zh_{final}"]
    assert spoken == expected and len(wav) > 16000


def test_espeak_english_phones_are_arpabet():
    _needs("espeakng_loader", "scipy")
    _, segments = synthetic_voice.espeak_say("Before the early morning, try a quick journey.", "f1", "en")
    spoken = [p for _, _, phones in segments for p in phones if p != "sil"]
    assert spoken[:5] == ["B", "IH", "F", "AO", "R"] and set(spoken) <= set(PHONES)


def test_festival_reads_several_sentences_in_one_process():
    _needs("festival", "scipy")
    readings = synthetic_voice.festival_say(["Kathy sees toys.", "Relax now."])
    assert [segments[1][2] for _, segments in readings] == [("K",), ("R",)]
    assert all(abs(segments[-1][1] - len(wav) / 16000) < 0.06 for wav, segments in readings)


def test_a_missing_program_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="'flite' is missing: apt-get install"):
        synthetic_voice.flite_say("Hello.", "slt")


# ---------------------------------------------------------------- shards and ArrayRecord


def test_shards_become_array_records_with_the_same_audio_and_labels(tmp_path, monkeypatch):
    """With a stand-in for the engine and the whisper."""

    def make_pair(speaker, seed):
        rng = np.random.default_rng(seed)
        labels = {"phones": rng.integers(0, len(PHONES), 20), "f0_class": rng.integers(0, 6, 20)}
        return {
            style: labels | {"audio": rng.integers(-9, 9, 6500).astype(np.int16)}
            for style in ("normal", "asmr")
        }

    monkeypatch.setattr(synthetic_voice, "read_aloud", lambda *_: ())
    monkeypatch.setattr(synthetic_voice, "make_pair", make_pair)
    speaker = _speaker("flite")
    pairs = [
        synthetic.Pair(f"{split}-en-00000", split, "en", "matrix", text, speaker.name)
        for split, text in (("train", "Kathy sees seven green toys."), ("valid", "Lucy got two old mugs."))
    ]
    raw = tmp_path / "raw"
    raw.mkdir()
    for pair in pairs:
        synthetic._write_shard(raw / f"{pair.split}-00000.npz", [pair])
    assert not list(raw.glob(".*")), "a temporary file was left"
    builder = synthetic.build(raw, tmp_path / "records")
    records = {r["id"].decode(): r for r in builder.as_data_source("train")}
    expected = {r["id"]: r for r in synthetic.read_shard(raw / "train-00000.npz")}
    assert set(records) == set(expected) == {"train-en-00000-normal", "train-en-00000-asmr"}
    for key, r in records.items():
        assert set(r) == set(synthetic.FEATURES)
        for name in ("audio", "phones", "f0_class"):
            np.testing.assert_array_equal(r[name], expected[key][name])
    again = synthetic.build(raw, tmp_path / "records")  # whole: an earlier run was killed before it said so
    assert again.info.splits["train"].num_examples == 2
    report = synthetic.report(raw)
    assert report["train en normal"]["records"] == 1 and report["shared_sentences"] == 0
    (raw / "plan.json").write_text('{"seed": 1}')
    with pytest.raises(ValueError, match="there already .*another plan"):
        synthetic.build(raw, tmp_path / "records")
    (raw / "plan.json").unlink()
    shutil.copy(raw / "train-00000.npz", raw / "train-00001.npz")
    with pytest.raises(ValueError, match="there already with other records .*remove it"):
        synthetic.build(raw, tmp_path / "records")
    monkeypatch.setattr(synthetic, "read_shard", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        synthetic.build(raw, tmp_path / "other")
    assert list((tmp_path / "other" / "synthetic").iterdir()) == []  # nothing half written is left


def test_a_folder_with_another_plan_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic_voice, "require", lambda engine: None)
    pair = synthetic.Pair("train-en-00000", "train", "en", "matrix", "x", "s")
    monkeypatch.setattr(synthetic, "plan", lambda limit, seed: [[pair]])
    (tmp_path / "plan.json").write_text('{"seed": 5}')
    with pytest.raises(ValueError, match="another plan"):
        synthetic.make(tmp_path)


def test_building_from_an_empty_folder_says_what_to_run(tmp_path):
    _needs("tensorflow_datasets")
    with pytest.raises(FileNotFoundError, match="synthetic.py make"):
        synthetic.build(tmp_path, tmp_path / "out")


def test_spread_keeps_power_and_has_its_width():
    _needs("scipy")
    power = np.full((2, synthetic_voice.NUM_BINS), 1e-9)
    power[0, 256] = 1.0
    power[1] = 3.0
    found = synthetic_voice._spread(power, 150.0)
    np.testing.assert_allclose(found.sum(axis=1), power.sum(axis=1), rtol=1e-6)
    np.testing.assert_allclose(found[1], 3.0, rtol=1e-9)
    hz = (
        np.arange(synthetic_voice.NUM_BINS) * synthetic_voice.SAMPLE_RATE / 2 / (synthetic_voice.NUM_BINS - 1)
    )
    above = hz[found[0] >= found[0].max() / 2]
    assert 150.0 - 2 * hz[1] <= above[-1] - above[0] <= 150.0


def test_the_whisper_of_marcelo_has_no_pitch():
    _needs("espeakng_loader", "scipy", "pyworld", "pypinyin")
    speaker = next(s for s in synthetic_voice.speakers() if "marcelo" in s.name)
    wav, segments = synthetic_voice.read_aloud("今天晚上外面下着小雨。", "zh", speaker)
    whisper = synthetic_voice.make_pair(wav, segments, speaker, 5)["asmr"]["audio"]
    found = evaluate.unvoiced_ratio([np.float32(whisper) / 32768], synthetic_voice.SAMPLE_RATE)
    assert found.unvoiced.sum() >= 0.95 * found.active.sum()
