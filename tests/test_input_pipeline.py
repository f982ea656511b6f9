"""Order, packing, mixtures and rows of the data pipeline, on noise records."""

import dataclasses
import os
import pickle
import shutil
from pathlib import Path

import fixture_data
import numpy as np
import pytest
from array_record.python import array_record_module

from deepasmr_jax import audio, config, input_pipeline, lm, shards, text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fixture_data.write(tmp_path_factory.mktemp("data"))


def make_config(folder, stage, **changes):
    sizes = dict(
        lm=dict(num_tokens=192),
        flow=dict(num_tokens=64, min_prompt_tokens=8, max_prompt_tokens=20),
        vocoder=dict(num_samples=8000),
        speech_tokenizer=dict(num_samples=16000),
        speaker=dict(num_samples=16000),
    )[stage]
    return input_pipeline.Config(
        stage=stage, batch_size=4, data_dirs=(folder,), num_threads=1, **(sizes | changes)
    )


def equally_long(index):
    """The index with utterances of one length: a share of the hours is then one of the utterances."""
    return dataclasses.replace(index, num_samples=np.full(len(index), 16000, np.int32))


def styles_of(index):
    """The style of each record."""
    return index.styles[index.voice]


def rows_of(batches):
    return [{k: v[i] for k, v in b.items()} for b in batches for i in range(len(next(iter(b.values()))))]


def same(a, b):
    return sorted(a) == sorted(b) and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "stage, changes",
    [
        *((s, {}) for s in input_pipeline.STAGES),
        ("lm", dict(align=True)),
        ("speech_tokenizer", dict(labels="text")),
    ],
)
def test_batches_have_the_arrays_that_are_announced(folder, stage, changes):
    cfg = make_config(folder, stage, **changes)
    expected = {name: ((4, *shape), kind) for name, (shape, kind) in input_pipeline.row_spec(cfg).items()}
    for batch in input_pipeline.first_batches(cfg, 4):
        assert {name: (x.shape, x.dtype) for name, x in batch.items()} == expected


@pytest.mark.parametrize("stage", input_pipeline.STAGES)
def test_a_restored_position_gives_the_next_batches_exactly(folder, stage):
    data = input_pipeline.make(make_config(folder, stage))
    first = iter(data)
    for _ in range(3):
        next(first)
    position = first.get_state()
    expected = [next(first) for _ in range(20)]  # beyond the end of the first epoch
    second = iter(data)
    second.set_state(position)
    assert all(same(a, next(second)) for a in expected)


@pytest.mark.parametrize("stage", input_pipeline.STAGES)
def test_two_process_slices_side_by_side_are_the_batch_of_one_process(folder, stage):
    cfg = make_config(folder, stage)
    whole = input_pipeline.first_batches(cfg, 5)
    parts = [input_pipeline.first_batches(cfg, 5, p, 2) for p in range(2)]
    for one, *two in zip(whole, *parts, strict=True):
        assert same({k: np.concatenate([part[k] for part in two]) for k in one}, one)


@pytest.mark.parametrize("stage", input_pipeline.STAGES)
def test_empty_rows_stand_behind_those_of_a_batch_that_the_chips_do_not_divide(folder, stage):
    cfg = dataclasses.replace(make_config(folder, stage), batch_size=5)
    whole = input_pipeline.first_batches(cfg, 4)
    parts = [
        input_pipeline.first_batches(cfg, 4, p, 4, multiple=8) for p in range(4)
    ]  # the last has no row of its own
    for one, *four in zip(whole, *parts, strict=True):
        joined = {k: np.concatenate([part[k] for part in four]) for k in one}
        assert same({k: v[:5] for k, v in joined.items()}, one)
        for name, values in joined.items():
            is_label = name in ("targets", "phones", "f0_class", "speaker_index")
            assert len(values) == 8 and np.all(values[5:] == (input_pipeline.IGNORED if is_label else 0))


def test_an_evaluation_leaves_out_folders_and_styles_that_its_split_has_not(folder, tmp_path, capsys):
    other = fixture_data.write(tmp_path / "all", {"train": 4})
    few = fixture_data.write(tmp_path / "few", {"train": 4, "valid": 2})
    cfg = dataclasses.replace(make_config(folder, "lm", spell_probability=0.5), data_dirs=(folder, other))
    found = input_pipeline.held_out(cfg, "valid")
    assert (found.split, found.data_dirs, found.style_weights) == ("valid", (folder,), (1.0, 1.0))
    assert found.spell_probability == 0
    assert capsys.readouterr().out.endswith(f"valid: evaluated without {other}, of which it has nothing\n")
    cfg = dataclasses.replace(cfg, data_dirs=(few,), styles=("asmr", "sung"))
    assert input_pipeline.held_out(cfg, "valid").style_weights == (1.0, 0.0)
    assert "evaluated without sung" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"has no split 'valid' to evaluate on; .*--set=eval_batches=0"):
        input_pipeline.held_out(dataclasses.replace(cfg, data_dirs=(other,)), "valid")


def test_a_saved_position_is_a_batch_whatever_the_chips(folder):
    cfg = dataclasses.replace(make_config(folder, "lm"), batch_size=5)
    expected = input_pipeline.first_batches(cfg, 3)[2]
    data = iter(input_pipeline.make(cfg))
    next(data), next(data)
    for multiple in (8, 1):
        other = iter(input_pipeline.make(cfg, multiple=multiple))
        other.set_state(data.get_state())
        assert same({k: v[:5] for k, v in next(other).items()}, expected)


def test_worker_processes_give_the_batches_of_threads_and_go_on_from_a_saved_position(folder):
    cfg = make_config(folder, "lm", spell_probability=0.3)
    expected = input_pipeline.first_batches(cfg, 8)
    data = iter(input_pipeline.make(dataclasses.replace(cfg, worker_count=2)))
    assert all(same(next(data), batch) for batch in expected[:3])
    position = data.get_state()
    assert all(same(next(data), batch) for batch in expected[3:5])
    again = iter(input_pipeline.make(dataclasses.replace(cfg, worker_count=2), multiple=8))
    again.set_state(position)
    assert all(same({k: v[:4] for k, v in next(again).items()}, batch) for batch in expected[3:])


@pytest.mark.parametrize("changes", [{}, dict(sample_rate=44100), dict(stage="lm"), dict(stage="flow")])
def test_a_record_is_what_tfds_reads(tmp_path, changes):
    import tensorflow_datasets as tfds

    own = fixture_data.write(tmp_path, {"train": 4}, **changes)
    records, info = shards.Records(make_config(own, "lm")), shards.builder(own).info
    raw = shards.builder(own).as_data_source(
        "train", deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )
    for i in range(4):
        found, expected = records[i], info.features.deserialize_example_np(raw[i])
        assert sorted(found) == sorted(expected)
        for name, value in found.items():
            assert type(value) is type(expected[name]), name
            np.testing.assert_array_equal(value, expected[name], strict=True)


def test_a_record_without_a_field_of_its_folder_is_told(folder, tmp_path):
    own = shutil.copytree(fixture_data.write(tmp_path / "a", {"train": 4}, stage="flow"), tmp_path / "b")
    path = own / "features.json"
    path.write_text(path.read_text().replace('"speech_tokens"', '"text_ids"'))
    with pytest.raises(ValueError, match=f"record 0 of {own} has no text_ids; write the folder again"):
        shards.Records(make_config(str(own), "lm"), ("text_ids",))[0]


def test_a_segment_is_start_texts_task_speech_with_targets_only_on_speech_and_end(folder):
    cfg = make_config(folder, "lm")
    seen = 0
    for row in rows_of(input_pipeline.first_batches(cfg, 10)):
        assert np.all(row["kinds"][row["segment_ids"] == 0] == lm.PAD)
        assert np.all(row["targets"][row["segment_ids"] == 0] == -1)
        for segment in range(1, row["segment_ids"].max() + 1):
            inside = row["segment_ids"] == segment
            kinds, tokens, targets = (row[k][inside] for k in ("kinds", "tokens", "targets"))
            assert np.array_equal(np.diff(np.flatnonzero(inside)), np.ones(inside.sum() - 1))
            assert np.array_equal(row["positions"][inside], np.arange(inside.sum()))
            num_text, num_speech = int((kinds == lm.TEXT).sum()), int((kinds == lm.SPEECH).sum())
            layout = [lm.SOS] + [lm.TEXT] * num_text + [lm.TASK] + [lm.SPEECH] * num_speech
            assert kinds.tolist() == layout
            assert np.all(targets[: num_text + 1] == -1)
            assert np.array_equal(targets[num_text + 1 : -1], tokens[num_text + 2 :])
            assert targets[-1] == cfg.end_id
            seen += 1
    assert seen > 20


def test_no_segment_has_an_utterance_twice_where_a_style_is_heard_again_in_an_epoch(folder):
    cfg = make_config(folder, "lm", style_weights=(1.0, 30.0), num_tokens=512)
    rows = input_pipeline._Lm(cfg, shards.read_index(cfg))
    for epoch in range(5):
        order, starts = rows.segments(epoch)
        parts = [part.tolist() for part in np.split(order, starts[1:-1])]
        assert len(np.unique(order)) < len(order) and max(map(len, parts)) > 1
        assert all(len(set(part)) == len(part) for part in parts)


def test_frames_are_aligned_to_the_symbols_that_are_heard_in_them():
    ids = {name: i for i, name in enumerate(text.PHONES)}
    heard = "sil sil K K AE AE AE T T T HH IH IH Z Z sil sil".split()
    symbols = ["<en>", "|", "K", "AE1", "T", "|", "HH", "IH1", "Z", "."]
    found = input_pipeline.align(symbols, np.array([ids[p] for p in heard]), 20)
    names = [symbols[i] for i in found]
    assert names[2:10] == "K K AE1 AE1 AE1 T T T".split()
    assert names[10:15] == "HH IH1 IH1 Z Z".split()
    assert names[15:] == ["."] * 5  # the last one goes on beyond the labels
    assert np.all(np.diff(found) >= 0)


def test_letters_and_mandarin_finals_are_aligned_too():
    ids = {name: i for i, name in enumerate(text.PHONES)}
    letters = input_pipeline.align(list("dog"), np.array([ids[p] for p in "D D AO AO G G".split()]), 6)
    assert letters.tolist() == [0, 0, 1, 1, 2, 2]
    heard = np.array([ids[p] for p in "zh_n zh_i zh_i zh_h zh_ao".split()])
    assert input_pipeline.align(["zh_n", "zh_i3", "zh_h", "zh_ao3"], heard, 5).tolist() == [0, 1, 1, 2, 3]


def test_aligned_positions_are_text_of_the_same_segment_wherever_speech_is_predicted(folder):
    cfg = make_config(folder, "lm", align=True, spell_probability=0.3, seed=3)
    plain = input_pipeline.first_batches(dataclasses.replace(cfg, align=False), 3)
    for batch, without in zip(input_pipeline.first_batches(cfg, 3), plain, strict=True):
        aligned = batch.pop("aligned")
        assert same(batch, without)
        speaks = (batch["targets"] >= 0) & (batch["targets"] != cfg.end_id)
        assert np.array_equal(aligned[..., 0] >= 0, speaks) and np.array_equal(aligned[..., 1] >= 0, speaks)
        rows, at = np.nonzero(speaks)
        for half in range(2):
            found = aligned[rows, at, half]
            assert np.all(batch["kinds"][rows, found] == lm.TEXT)
            assert np.array_equal(batch["segment_ids"][rows, found], batch["segment_ids"][rows, at])


def test_every_utterance_is_in_the_epoch_once_and_each_segment_has_one_speaker_and_style(folder):
    cfg = make_config(folder, "lm")
    index = equally_long(shards.read_index(cfg))
    rows = input_pipeline._Lm(cfg, index)
    used, starts = rows.segments(0)
    segments = np.split(used, starts[1:-1])
    assert sorted(used) == sorted(np.flatnonzero(index.num_tokens + index.num_text + 2 <= cfg.num_tokens))
    assert {len(s) for s in segments} == {1, 2, 3}
    for segment in segments:
        assert len(set(index.voice[segment])) == 1
    planned = [tuple(s) for i in range(len(rows._plan(0))) for s in rows._plan(0)[i]]
    assert sorted(planned) == sorted(tuple(s) for s in segments)


def test_packing_keeps_every_item_once_and_never_overfills():
    lengths = np.random.default_rng(0).integers(20, 300, 3000)
    rows = list(input_pipeline.pack(lengths, 512))
    assert sorted(i for row in rows for i in row) == list(range(3000))
    fill = np.array([lengths[row].sum() for row in rows])
    assert fill.max() <= 512
    assert fill.mean() / 512 > 0.93  # best fit over 256 open rows; one item a row would be 0.31


@pytest.mark.parametrize("weights, share", [((1.0, 1.0), 0.5), ((3.0, 1.0), 0.25), ((1.0, 0.0), 0.0)])
def test_styles_are_drawn_in_the_wanted_shares_of_the_hours(folder, weights, share):
    cfg = make_config(folder, "flow", style_weights=weights)
    index = shards.read_index(cfg)
    samples = np.where(
        styles_of(index) == "asmr", 3 * index.num_samples, index.num_samples
    )  # whispers are slow
    index = dataclasses.replace(index, num_samples=samples)
    mixture = input_pipeline.Mixture(cfg, index, np.ones(len(index), bool))
    drawn = np.concatenate([mixture.order(epoch) for epoch in range(50)])
    whispered = index.num_samples[drawn][styles_of(index)[drawn] == "asmr"].sum()
    # an epoch of 48 has whole numbers of each: up to half an utterance of some ten is missing
    assert whispered / index.num_samples[drawn].sum() == pytest.approx(share, abs=0.03)


def test_shares_of_the_hours_are_of_what_the_rows_take(folder):
    cfg = make_config(folder, "speaker", num_samples=3200)  # one crop of each record, however long it is
    index = shards.read_index(cfg)
    samples = np.where(styles_of(index) == "asmr", 3 * index.num_samples, index.num_samples)
    mixture = input_pipeline._Waves(cfg, dataclasses.replace(index, num_samples=samples)).mixture
    drawn = np.concatenate([mixture.order(epoch) for epoch in range(5)])
    assert np.mean(styles_of(index)[drawn] == "asmr") == pytest.approx(0.5, abs=0.03)


def test_a_style_with_a_small_share_goes_on_in_the_next_epoch(folder):
    cfg = make_config(folder, "flow", style_weights=(3.0, 1.0))
    index = equally_long(shards.read_index(cfg))
    mixture = input_pipeline.Mixture(cfg, index, np.ones(len(index), bool))
    asmr = [i for epoch in range(2) for i in mixture.order(epoch) if styles_of(index)[i] == "asmr"]
    assert len(asmr) == len(set(asmr)) == 24


def test_two_epochs_have_different_orders(folder):
    cfg = make_config(folder, "flow")
    index = equally_long(shards.read_index(cfg))
    mixture = input_pipeline.Mixture(cfg, index, np.ones(len(index), bool))
    assert sorted(mixture.order(0)) == sorted(mixture.order(1))
    assert mixture.order(0).tolist() != mixture.order(1).tolist()


def test_a_flow_prompt_is_another_sentence_of_the_same_speaker_and_both_styles_occur(folder):
    cfg = make_config(folder, "flow", no_prompt_prob=0.0)
    index = shards.read_index(cfg)
    rows, speakers = input_pipeline._Flow(cfg, index), index.speakers[index.voice]
    pairs = set()
    for target in range(len(index)):
        prompt = rows._draw_prompt(target, np.random.default_rng(target))
        assert speakers[prompt] == speakers[target]
        assert index.pair[prompt] != index.pair[target]
        pairs.add((str(styles_of(index)[prompt]), str(styles_of(index)[target])))
    assert len(pairs) == 4


def test_flow_rows_hold_the_prompt_first_and_two_frames_per_token(folder):
    cfg = make_config(folder, "flow", no_prompt_prob=0.3)
    rows = rows_of(input_pipeline.first_batches(cfg, 20))
    with_prompt = [r for r in rows if r["prompt_frames"] > 0]
    assert 0.5 < len(with_prompt) / len(rows) < 0.9
    for row in rows:
        frames = 2 * row["num_tokens"]
        assert row["mel"].shape == (128, 80) and row["mel"].dtype == np.float16
        assert row["prompt_frames"] % 2 == 0 and 0 <= row["prompt_frames"] < frames
        assert np.all(row["mel"][frames:] == 0) and np.all(row["speech_tokens"][row["num_tokens"] :] == 0)
        assert np.all(np.any(row["mel"][:frames] != 0, axis=1))
    assert all(16 <= r["prompt_frames"] <= 40 for r in with_prompt)


def test_flow_tokens_and_mel_of_a_row_are_cut_at_the_same_place(folder):
    cfg = make_config(folder, "flow", num_tokens=24, no_prompt_prob=1.0)
    records = shards.Records(cfg)
    by_tokens = {}
    for i in range(len(records)):
        record = records[i]
        for at in range(len(record["speech_tokens"]) - 1):
            by_tokens[tuple(record["speech_tokens"][at : at + 2])] = (record, at)
    for row in rows_of(input_pipeline.first_batches(cfg, 5)):
        record, at = by_tokens[tuple(row["speech_tokens"][:2])]
        count = int(row["num_tokens"])
        assert np.array_equal(row["speech_tokens"][:count], record["speech_tokens"][at : at + count])
        assert np.array_equal(row["mel"][: 2 * count], record["mel"][2 * at : 2 * (at + count)])


def test_labels_of_a_cropped_waveform_start_at_its_first_sample(folder):
    cfg = make_config(folder, "speech_tokenizer", num_samples=6400)
    records = shards.Records(cfg)
    waves = [records[i]["audio"].astype(np.float32) / 32768 for i in range(len(records))]
    starts = set()
    for row in rows_of(input_pipeline.first_batches(cfg, 5)):
        assert row["lengths"] == 6400 and row["phones"].shape == (20,)
        places = [(i, at) for i, w in enumerate(waves) for at in range(0, len(w) - 6399, 320)]
        [(i, at)] = [(i, at) for i, at in places if np.array_equal(waves[i][at : at + 6400], row["wav"])]
        assert np.array_equal(row["phones"], records[i]["phones"][at // 320 : at // 320 + 20])
        assert np.array_equal(row["f0_class"], records[i]["f0_class"][at // 320 : at // 320 + 20])
        starts.add(at)
    assert len(starts) > 3


def test_padding_of_labels_is_minus_one_and_of_waves_is_silence(folder):
    cfg = make_config(folder, "speech_tokenizer", num_samples=32000)
    for row in rows_of(input_pipeline.first_batches(cfg, 3)):
        frames = row["lengths"] // 320
        assert row["lengths"] < 32000 and np.all(row["wav"][row["lengths"] :] == 0)
        assert np.all(row["phones"][frames:] == -1) and np.all(row["phones"][:frames] >= 0)


def test_a_row_for_the_text_loss_is_a_whole_utterance_with_the_sounds_of_its_text(folder, capsys):
    cfg = make_config(folder, "speech_tokenizer", labels="text", num_samples=19200)
    index = shards.read_index(cfg)
    rows = input_pipeline._Waves(cfg, index)
    told = capsys.readouterr().out
    expected = text.MiniTokenizer().heard("the quiet rain falls", "en")
    num_long = np.sum(index.num_samples > 19200)
    assert (
        f"train: {num_long} of 48 records are left out, they are longer than a row of 1.2 s: train_" in told
    )
    for example in range(len(rows.mixture)):
        record, row = int(rows.mixture.order(0)[example]), rows.row(example, np.random.default_rng(0))
        assert row["lengths"] == index.num_samples[record] <= 19200
        assert np.array_equal(row["text_ids"], expected) and row["text_lengths"] == 14
    assert not capsys.readouterr().out


def test_a_text_that_its_recording_cannot_hold_gives_no_loss_and_is_told(folder, capsys):
    cfg = make_config(folder, "speech_tokenizer", labels="text")
    rows = input_pipeline._Waves(cfg, equally_long(shards.read_index(cfg)))
    texts = {"the quiet rain falls": "it needs 14 tokens, its recording has 13", "!": "has only punctuation"}
    for words, why in (texts | {"a <|laugh|>": "mark '<|laugh|>' is unknown"}).items():
        row = rows._text({"text": words, "language": "en"}, 8479)  # 52 frames
        assert row["text_lengths"] == 0 and len(row["text_ids"]) == 0
        assert why in capsys.readouterr().out
    assert rows._text({"text": "the quiet rain falls", "language": "en"}, 8480)["text_lengths"] == 14
    for count, length in ((5, 0), (6, 5)):  # S IY1 T T IY1: a blank between the two T
        assert rows._text({"text": "seat t", "language": "en"}, 640 * count)["text_lengths"] == length
    for _ in range(3):
        rows._text({"text": "?", "language": "en"}, 8000)
    assert capsys.readouterr().out.count("no loss") == 2  # "seat t", the fourth, and one more


@pytest.mark.parametrize(
    "stage, changes, fault, why",
    [
        ("lm", {}, dict(num_tokens=0), "have no speech tokens"),
        ("lm", {}, dict(num_text=180), "take more than the 190 positions of a row"),
        ("flow", {}, dict(num_tokens=0), "have no speech tokens"),
        ("vocoder", {}, dict(num_samples=7999), "are shorter than 0.5 s"),
        ("speech_tokenizer", {}, dict(num_samples=639), "are shorter than 0.04 s"),
        ("speech_tokenizer", dict(labels="text"), dict(num_samples=16001), "are longer than a row of 1 s"),
        ("speaker", {}, dict(num_samples=0), "are shorter than 0.04 s"),
    ],
)
def test_what_a_stage_leaves_out_is_counted_and_named(folder, capsys, stage, changes, fault, why):
    cfg = make_config(folder, stage, **changes)
    index = equally_long(shards.read_index(cfg))
    for name, value in fault.items():
        values = getattr(index, name).copy()
        values[[7, 20, 21, 40]] = value
        index = dataclasses.replace(index, **{name: values})
    rows = {"lm": input_pipeline._Lm, "flow": input_pipeline._Flow}.get(stage, input_pipeline._Waves)(
        cfg, index
    )
    told = capsys.readouterr().out
    assert told == f"train: 4 of 48 records are left out, they {why}: train_7, train_20, train_21, ...\n"
    assert not {7, 20, 21, 40} & set(np.concatenate([rows.mixture.order(e) for e in range(2)]).tolist())
    asked = dataclasses.replace(cfg, styles=("normal",), style_weights=(1.0,))  # of 20 and 40
    rows.__class__(asked, index)
    assert capsys.readouterr().out == f"train: 2 of 24 records are left out, they {why}: train_20, train_40\n"


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (7, 40), (40, 7), (12, 12)])
def test_the_cheapest_way_is_that_of_librosa(shape):
    import librosa

    for seed in range(5):
        cost = np.random.default_rng(seed).integers(0, 11, shape)
        expected = librosa.sequence.dtw(C=cost.astype(float))[1][::-1]
        np.testing.assert_array_equal(input_pipeline.warp(cost), expected)


def test_waves_of_the_vocoder_are_at_the_rate_of_its_mel_profile(folder):
    cfg = make_config(folder, "vocoder", mel_profile="hifigan", num_samples=4410)
    rows = input_pipeline._Waves(cfg, shards.read_index(cfg))
    row = rows.row(0, np.random.default_rng(0))
    samples = rows.records[int(rows.mixture.order(0)[0])]["audio"]
    start = np.random.default_rng(0).integers(len(samples) - 3200 + 1)  # 3200 samples at 16 kHz are 4410 here
    piece = samples[start : start + 3200].astype(np.float32) / 32768
    np.testing.assert_array_equal(row["wav"], audio.resample(piece, 16000, 22050))


def test_frame_labels_of_records_of_another_rate_are_those_of_their_piece(folder, tmp_path):
    own = fixture_data.write(tmp_path, sample_rate=44100)
    pair = [make_config(f, "speech_tokenizer", num_samples=12800) for f in (folder, own)]
    assert np.array_equal(*(shards.read_index(cfg).voice for cfg in pair))
    for a, b in zip(*(rows_of(input_pipeline.first_batches(cfg, 4)) for cfg in pair), strict=True):
        assert np.array_equal(a["phones"], b["phones"]) and np.array_equal(a["f0_class"], b["f0_class"])
        assert abs(a["lengths"] - b["lengths"]) <= 1 and np.corrcoef(a["wav"], b["wav"])[0, 1] > 0.98


def test_speaker_labels_follow_the_sorted_names_of_the_training_split(folder):
    cfg = make_config(folder, "speaker")
    assert input_pipeline.speakers(cfg) == ["speaker_0", "speaker_1", "speaker_2"]
    found = {int(r["speaker_index"]) for r in rows_of(input_pipeline.first_batches(cfg, 10))}
    assert found == {0, 1, 2}


def test_spelled_words_keep_the_row_within_its_length(folder):
    cfg = make_config(folder, "lm", spell_probability=0.9)
    plain = rows_of(input_pipeline.first_batches(make_config(folder, "lm"), 3))
    spelled = rows_of(input_pipeline.first_batches(cfg, 3))
    assert all(r["tokens"].shape == (192,) for r in spelled)

    def texts(rows):
        return {tuple(r["tokens"][(r["segment_ids"] == 1) & (r["kinds"] == lm.TEXT)]) for r in rows}

    assert texts(plain) != texts(spelled)


def test_the_index_is_read_from_its_file_the_second_time_and_made_again_for_other_records(
    folder, tmp_path, monkeypatch
):
    cfg = make_config(folder, "lm")
    first = shards.read_index(cfg)
    shards._index.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(shards, "_Source", None)
        second = shards.read_index(cfg)
    sent = pickle.dumps(second)  # to a worker process
    for index in (second, pickle.loads(sent)):
        assert isinstance(index.num_samples, np.memmap)
        for field in dataclasses.fields(first):
            assert np.array_equal(getattr(first, field.name), getattr(index, field.name))
    path = Path(first.voice.filename)
    assert 24 * 48 < path.stat().st_size < 24 * 48 + 256 and len(sent) < 2000
    shard = next(Path(folder).glob("noise-train*"))
    shutil.copy2(shard, tmp_path / "shard")
    os.utime(shard, (0, 0))  # rewritten, if with as many bytes
    shards._index.cache_clear()
    assert shards.read_index(cfg).voice.filename != str(path)
    shutil.copystat(tmp_path / "shard", shard)


def test_shards_are_written_with_what_is_read_fast(tmp_path):
    folder = fixture_data.write(tmp_path, {"train": 4})
    paths = list(Path(folder).glob("noise-train*"))
    assert len(paths) == 2
    for path in paths:
        assert "snappy" in array_record_module.ArrayRecordReader(str(path)).writer_options_string()


def test_the_index_is_joined_of_what_the_writers_kept_and_other_shards_are_read(tmp_path, monkeypatch):
    real, read = fixture_data.record, []
    monkeypatch.setattr(
        fixture_data, "record", lambda i, *rest: real(i, *rest) | ({"pair_id": ""} if i == 7 else {})
    )
    folder = fixture_data.write(tmp_path, {"train": 12})  # two shards of six

    class Source(shards._Source):
        def __getitem__(self, i):
            read.append(i)
            return super().__getitem__(i)

    monkeypatch.setattr(shards, "_Source", Source)

    def index():
        shards._index.cache_clear()
        [path.unlink() for path in Path(folder).glob("index_*")]
        read.clear()
        return shards.read_index(make_config(folder, "lm"))

    def same_as(expected):
        found = index()
        return all(np.array_equal(getattr(found, k), v) for k, v in vars(expected).items())

    first = index()
    expected = {k: np.array(v) for k, v in vars(first).items()}
    expected = shards.Index(**expected)
    assert not read and len(expected) == 12 and expected.pair[7] == shards._pair(f"{folder}:7")
    paths = sorted(Path(folder).glob("noise-train*"))
    pieces = [shards.piece_path(path) for path in paths]
    for piece, numbers in zip(pieces, (range(6), range(6, 12)), strict=True):
        piece.unlink()
        assert same_as(expected) and read == list(numbers)
        assert same_as(expected) and not read  # it was kept
    pieces[0].write_bytes(pieces[0].read_bytes()[:-99])
    os.utime(paths[1], (0, 0))  # remade by something that keeps no piece
    assert same_as(expected) and read == list(range(12))
    shutil.rmtree(pieces[0].parent)  # a folder of an older version
    assert same_as(expected) and read == list(range(12))


def test_the_index_of_two_folders_is_that_of_both_one_after_the_other(folder, tmp_path):
    other = fixture_data.write(tmp_path, {"train": 20}, num_speakers=5)
    both = shards.read_index(dataclasses.replace(make_config(folder, "lm"), data_dirs=(folder, other)))
    assert isinstance(both.num_samples, np.memmap)
    parts = [shards.read_index(make_config(f, "lm")) for f in (folder, other)]
    for name in ("pair", "num_samples", "num_tokens", "num_text"):
        assert np.array_equal(getattr(both, name), np.concatenate([getattr(p, name) for p in parts]))
    for name in ("speakers", "styles", "languages"):
        found = [getattr(p, name)[p.voice] for p in parts]
        assert np.array_equal(getattr(both, name)[both.voice], np.concatenate(found))
    assert len(both.speakers) == 10


def test_an_index_that_cannot_be_kept_is_held_in_memory(tmp_path, monkeypatch, capsys):
    folder = fixture_data.write(tmp_path, {"train": 8})
    monkeypatch.setattr(shards.files, "write_text", lambda *a: (_ for _ in ()).throw(OSError("read-only")))
    index = shards.read_index(make_config(folder, "lm"))
    assert len(index) == len(pickle.loads(pickle.dumps(index))) == 8
    assert "is not kept: read-only" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(styles=("normal", "sung")), "no usable record of style 'sung'"),
        (
            dict(languages=("sv",)),
            "no usable record of style 'normal' in split 'train' and languages sv; styles",
        ),
        (dict(split="trian"), "no split 'trian'; it has train, valid"),
        (dict(data_dirs=()), "data.data_dirs=FOLDER"),
        (dict(batch_size=3), "does not divide over 2 hosts; use a multiple"),
    ],
)
def test_data_that_does_not_fit_is_refused_with_the_way_out(folder, changes, words):
    with pytest.raises(ValueError, match=words):
        input_pipeline.make(dataclasses.replace(make_config(folder, "flow"), **changes), 0, 2)


def test_records_that_are_all_too_long_are_not_called_missing(folder):
    with pytest.raises(
        ValueError, match="none of the .* records of style 'normal' .* can be used, for the reasons in"
    ):
        input_pipeline.make(make_config(folder, "lm", num_tokens=12))


def test_a_corpus_without_features_is_sent_to_add_features(tmp_path):
    folder = fixture_data.write(tmp_path, {"train": 4}, has_features=False)
    with pytest.raises(ValueError, match="data/add_features.py"):
        input_pipeline.make(make_config(folder, "flow"))


def test_what_a_kill_left_beside_the_records_is_no_record(tmp_path):
    folder = fixture_data.write(tmp_path, {"train": 16})
    before = shards.read_index(make_config(folder, "flow"))
    [index] = (tmp_path / "noise" / "1.0.0").glob("index_train_*.npy")
    (index.parent / ".0a1b2c3d.part.noise-train.array_record-00000-of-00002").write_bytes(b"half")
    shards._index.cache_clear()
    after = shards.read_index(make_config(folder, "flow"))
    assert np.array_equal(before.num_tokens, after.num_tokens)
    assert list(index.parent.glob("index_train_*.npy")) == [index]  # read again, not made again


@pytest.mark.parametrize("name", [shards.MADE_WITH_FILE, shards.OLD_MADE_WITH_FILE])
def test_features_of_another_mel_profile_are_refused_for_the_flow_only(tmp_path, name):
    folder = fixture_data.write(tmp_path, {"train": 16})  # 80 bands, as of mini, cv2 and hifigan
    made = {"name": "mini", "vocab_size": 313, "mel_profile": "mini"}
    config.write_json(tmp_path / "noise" / "1.0.0" / name, made)
    next(iter(input_pipeline.make(make_config(folder, "flow"))))
    for stage in ("lm", "vocoder", "speaker"):  # read no mel, or make their own
        next(iter(input_pipeline.make(make_config(folder, stage, mel_profile="cv2"))))
    words = "have mel profile 'mini', data.mel_profile is 'cv2'; make them again with --mel-profile"
    with pytest.raises(ValueError, match=words):
        input_pipeline.make(make_config(folder, "flow", mel_profile="cv2"))
    made.pop("mel_profile")  # a folder from before the profile was written down
    config.write_json(tmp_path / "noise" / "1.0.0" / name, made)
    next(iter(input_pipeline.make(make_config(folder, "flow", mel_profile="cv2"))))


def test_a_corpus_without_labels_is_sent_to_the_description_of_records(tmp_path):
    folder = fixture_data.write(tmp_path, {"train": 4}, has_labels=False)
    with pytest.raises(ValueError, match="no f0_class, phones; .*data/README.md"):
        input_pipeline.make(make_config(folder, "speech_tokenizer"))


def test_alignment_without_phone_labels_says_how_to_train_without_it(tmp_path):
    folder = fixture_data.write(tmp_path, {"train": 4}, has_labels=False)
    with pytest.raises(ValueError, match="no phone labels.*data.align=false"):
        input_pipeline.make(make_config(folder, "lm", align=True))
    next(iter(input_pipeline.make(make_config(folder, "lm"))))


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(stage="vocodr"), "unknown"),
        (dict(stage="lm", style_weights=(1.0,)), "one weight per style"),
        (dict(stage="speech_tokenizer", num_samples=16001), "16001 is not a multiple of 640"),
        (dict(stage="flow", num_tokens=40), "leaves no room"),
        (dict(stage="speech_tokenizer", labels="phones"), "labels 'phones' are unknown; use frames or text"),
        (dict(stage="flow", mel_profile="minni"), "unknown mel profile 'minni'; known: cv2"),
    ],
)
def test_a_config_that_cannot_work_is_refused_when_built(changes, words):
    with pytest.raises(ValueError, match=words):
        input_pipeline.Config(**(dict(batch_size=4) | changes))
