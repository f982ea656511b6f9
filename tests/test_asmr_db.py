"""The corpus tool: topics, vetting, pieces, segments that keep breath, the whole run, resuming, the card."""

import csv
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import speech_service
from asmr_sounds import RATE, whispered

sys.path.insert(0, str(Path(__file__).parent.parent / "data"))

import asmr_db  # noqa: E402
import asmr_db_card  # noqa: E402
import asmr_db_pieces  # noqa: E402
import asmr_db_recognizers  # noqa: E402
import asmr_db_segments as segmenting  # noqa: E402
import asmr_db_topics as topics  # noqa: E402
from asmr_db_pieces import Folder, Piece, Recording, Settings  # noqa: E402
from asmr_db_segments import Phrase, Word  # noqa: E402

from deepasmr_jax import audio, pool, request  # noqa: E402

SCENE = whispered()


def _heard(scene):
    return [asmr_db_recognizers._phrase(p) for p in scene.answer()["phrases"]]


def _phrase(text, start_s, end_s):
    """A phrase whose words share its time evenly."""
    words = text.split()
    step = (end_s - start_s) / len(words)
    times = tuple(Word(w, start_s + i * step, start_s + (i + 1) * step) for i, w in enumerate(words))
    return Phrase(text, start_s, end_s, times, "en")


def _noise(seconds, level, seed=0):
    return (level * np.random.default_rng(seed).standard_normal(round(seconds * RATE))).astype(np.float32)


# ---------------------------------------------------------------- topics


@pytest.mark.parametrize(
    "title, topic, is_kept",
    [
        ("ASMR for Deep SLEEP", "sleep", True),
        ("ASMR 哄睡 轻声细语", "sleep", True),
        ("Reading you a story", "reading", True),
        ("Eating honeycomb before sleep", "eating", False),  # what is left out wins
        ("ASMR Ear Cleaning roleplay", "ear_spa", False),
        ("采耳 助眠", "ear_spa", False),
        ("A treat for your heart", "", False),  # neither eat nor ear
        ("", "", False),
    ],
)
def test_a_title_shows_its_topic_and_whether_it_is_kept(title, topic, is_kept):
    found, keyword, kept = topics.classify([title])
    assert (found, kept) == (topic, is_kept) and bool(keyword) == bool(topic)


def test_nine_topics_are_kept_and_two_left_out():
    assert len(topics.BUILT_IN.kept) == 9 and set(topics.BUILT_IN.excluded) == {"eating", "ear_spa"}


def test_topics_of_a_file_take_the_place_of_the_built_in_ones(tmp_path):
    path = tmp_path / "topics.json"
    path.write_text('{"kept": {"rain": ["rain", "雨"]}}')
    assert topics.classify(["雨声"], topics.read(path)) == ("rain", "雨", True)
    for text in ("[]", "{", '{"kept": {"a": [1]}}', '{"kept": {}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="topics.json"):
            topics.read(path)


# ---------------------------------------------------------------- index


@pytest.fixture
def listed(tmp_path):
    """A list of three recordings of two creators and four bad lines; (path of the list, work folder)."""
    for name in ("a1", "a2", "b1"):
        soundfile.write(tmp_path / f"{name}.flac", SCENE.wav, RATE, subtype="PCM_16")
    rows = [
        {"audio": "a1.flac", "speaker": "Ann B.", "title": "ASMR sleep", "language": "en", "gender": "female",
         "rights": "with consent"},
        {"audio": "a2.flac", "speaker": "Ann B.", "title": "reading a book", "tags": ["asmr"], "language": "en"},
        {"audio": "b1.flac", "speaker": "bo", "title": "闲聊", "language": "en"},
        {"audio": "a1.flac", "speaker": "bo", "title": "sleep", "id": "b1"},
        {"audio": "none.flac", "speaker": "bo", "title": "sleep"},
        {"audio": "b1.flac", "speaker": "bo", "title": "mukbang", "id": "b2"},
        {"audio": "b1.flac", "speaker": "bo", "title": "sleep", "id": "b3", "style": "loud"},
    ]  # fmt: skip
    path = tmp_path / "recordings.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    work = tmp_path / "work"
    assert (
        asmr_db.main(["index", str(path), "--out", str(work)]) == 1
    )  # bad lines are recorded, the rest goes on
    return path, work


def test_the_index_keeps_good_recordings_and_says_why_the_others_are_out(listed):
    _, work = listed
    rows = [row for _, row in request.read_json_lines(work / "index.jsonl")]
    assert [row["accepted"] for row in rows] == [True] * 3 + [False] * 4
    for row, reason in zip(rows[3:], ("id 'b1'", "does not exist", "'mukbang'", "style"), strict=True):
        assert reason in row["reason"]
    assert [r.topic for r in asmr_db.recordings_of(work)] == ["sleep", "reading", "talk"]
    assert all(r.speaker == asmr_db.safe_name(r.speaker) for r in asmr_db.recordings_of(work))


@pytest.mark.parametrize("name", ["Ann B.", "耳语", "../../etc", "a" * 200, ".hidden", ""])
def test_a_safe_name_is_a_file_name_and_tells_names_apart(name):
    safe = asmr_db.safe_name(name)
    assert safe == asmr_db.safe_name(safe) and len(safe) < 100
    assert not set(safe) & set("/\\: ") and not safe.startswith(".")
    assert safe != asmr_db.safe_name(name + "?")


# ---------------------------------------------------------------- vetting


def test_ten_clips_a_creator_are_drawn_from_all_of_the_recordings_and_always_the_same():
    rs = [Recording(f"r{i}", "", "s", "sleep") for i in range(3)]
    lengths = {r.id: 300.0 for r in rs}
    drawn = asmr_db.draw_clips(rs, lengths)
    assert drawn == asmr_db.draw_clips(rs, lengths) != asmr_db.draw_clips(rs, lengths, seed=1)
    assert len({(p.recording.id, p.start_s) for p in drawn}) == len(drawn) == 90
    assert {p.recording.id for p in drawn[:10]} == {"r0", "r1", "r2"}


def _mark(work, verdicts):
    rows = asmr_db.read_sheet(work / "vetting.csv")
    for row in rows:
        row["verdict"] = verdicts[row["speaker"]]
    with (work / "vetting.csv").open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, asmr_db.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def test_vetting_writes_clips_and_a_sheet_and_keeps_verdicts_that_are_there(listed):
    _, work = listed
    assert asmr_db.main(["vet", str(work)]) == 0
    rows = asmr_db.read_sheet(work / "vetting.csv")
    ann = asmr_db.safe_name("Ann B.")
    assert sorted(r["speaker"] for r in rows) == sorted(
        [ann] * 4 + ["bo"] * 2
    )  # all that 25.5 s recordings have
    assert all(soundfile.info(work / r["clip"]).duration == 10 for r in rows)
    assert all(float(r["voiced"]) < 0.25 for r in rows)  # a whisper
    _mark(work, {ann: "Yes", "bo": "no"})
    asmr_db.main(["vet", str(work)])
    assert [r["verdict"] for r in asmr_db.read_sheet(work / "vetting.csv")].count("Yes") == 4
    chosen, refused = asmr_db.vetted(work, asmr_db.recordings_of(work))
    assert {r.speaker for r in chosen} == {ann} and "0 of 2" in refused["bo"]


@pytest.mark.parametrize("good, reason", [(10, ""), (8, ""), (7, "7 of 10 clips are good")])
def test_a_creator_needs_eight_good_clips_of_ten(good, reason):
    rows = [{"speaker": "s", "verdict": "yes" if i < good else "no"} for i in range(10)]
    assert asmr_db.judge(rows)["s"].startswith(reason) and bool(reason) == bool(asmr_db.judge(rows)["s"])


def test_a_sheet_that_is_not_finished_accepts_nobody_and_an_odd_verdict_is_refused():
    assert (
        "1 of 2 clips have no verdict"
        in asmr_db.judge([{"speaker": "s", "verdict": "yes"}, {"speaker": "s", "verdict": ""}])["s"]
    )
    with pytest.raises(ValueError, match="'maybe'; write yes or no"):
        asmr_db.judge([{"speaker": "s", "verdict": "maybe"}])


# ---------------------------------------------------------------- pieces


def test_a_long_recording_is_cut_at_quiet_places_into_pieces_of_at_most_ten_minutes(tmp_path):
    rate, calm = 8000, (593.0, 1185.5)  # seconds where nobody speaks
    wav = 0.1 * np.random.default_rng(0).standard_normal(1250 * rate).astype(np.float32)
    for at in calm:
        wav[int(at * rate) : int((at + 0.5) * rate)] *= 0.01
    path = tmp_path / "long.wav"
    soundfile.write(path, wav, rate)
    recording = Recording("long", str(path), "s", "sleep")
    found = asmr_db_pieces.pieces(recording, Folder(tmp_path))
    assert [p.id for p in found] == ["long-000", "long-001", "long-002"]
    for piece, at in zip(found, calm, strict=False):
        assert at + 0.1 <= piece.end_s <= at + 0.4  # inside the quiet half second
    assert found[0].start_s == 0 and found[-1].end_s == 1250
    assert all(a.end_s == b.start_s for a, b in zip(found, found[1:], strict=False))
    with path.open("rb") as file:
        read, got = asmr_db_pieces.read(recording, file, found[1].start_s, found[1].start_s + 2)
    first = round(found[1].start_s * rate)
    assert got == rate
    np.testing.assert_allclose(read, wav[first : first + 2 * rate], atol=1 / 32768)


def test_a_recording_that_cannot_be_read_is_listed_and_has_no_pieces(tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"RIFF nothing")
    store = Folder(tmp_path / "work")
    assert asmr_db_pieces.pieces(Recording("bad", str(tmp_path / "bad.wav"), "s", "sleep"), store) == []
    assert "is not audio" in json.loads(store.read("failures/bad.json"))["reason"]


# ---------------------------------------------------------------- segments


@pytest.mark.parametrize("level_db, room_db", [(-40, -70), (-60, -85), (-20, -50), (-40, -60)])
def test_every_breath_is_kept_and_long_silence_goes_at_any_level(level_db, room_db):
    scene = whispered(level_db, room_db)
    found, left_out = segmenting.segments(scene.wav, RATE, _heard(scene))
    kept = np.zeros(len(scene.wav), bool)
    for start_s, end_s in (span for s in found for span in s.spans):
        kept[round(start_s * RATE) : round(end_s * RATE)] = True

    def share(start_s, end_s):
        return kept[round(start_s * RATE) : round(end_s * RATE)].mean()

    assert [share(a, b) for a, b in scene.breaths] == [1.0] * 4
    assert all(share(w[1], w[2]) == 1.0 for words in scene.sentences for w in words)
    # of a long silence `keep_s` may stay at either side, and the frames that a sound touches
    assert all(share(a, b) * (b - a) < 2 * 0.25 + 0.1 for a, b in scene.silences)
    assert {row["reason"] for row in left_out} == {"long silence"}
    gone = sum(row["seconds"] for row in left_out)
    assert gone + sum(s.duration_s for s in found) == pytest.approx(len(scene.wav) / RATE, abs=0.02)


@pytest.mark.parametrize("name", ["en_asmr", "en_normal", "zh_asmr", "zh_normal"])
def test_of_the_bundled_clips_in_a_room_nothing_but_long_silence_goes(name):
    clip = audio.load(request.BUILT_IN / "demo" / f"{name}.wav", RATE)
    wav = np.concatenate([clip, np.zeros(5 * RATE, np.float32), clip])
    wav += 10 ** (-75 / 20) * _noise(len(wav) / RATE, 1.0)
    keep, n = segmenting.kept(segmenting.levels_db(wav, RATE)), len(clip) // 320
    assert keep[:n].all() and keep[-n:].all()
    assert keep[n:-n].sum() * 0.02 <= 0.6  # of five seconds


def test_segments_hold_their_words_at_the_times_of_the_transcript():
    found, _ = segmenting.segments(SCENE.wav, RATE, _heard(SCENE))
    spoken = [p for s in found for p in s.phrases]
    assert [p.text for p in spoken] == [" ".join(w[0] for w in words) + "." for words in SCENE.sentences]
    for segment in found:
        for phrase in segment.phrases:
            inside = [a - 0.02 <= phrase.start_s and phrase.end_s <= b + 0.02 for a, b in segment.spans]
            assert sum(inside) == 1
        assert segment.text == " ".join(p.text for p in segment.phrases)
        assert len(segment.cut(SCENE.wav, RATE)) == pytest.approx(RATE * segment.duration_s, abs=2)


def test_speech_without_any_pause_loses_nothing():
    wav = _noise(20, 0.05)
    found, left_out = segmenting.segments(wav, RATE, [_phrase("on and on", 0.0, 20.0)])
    assert left_out == [] and found[0].spans == ((0.0, 20.0),)


def test_a_soft_passage_without_pauses_is_no_silence():
    words = np.concatenate([np.append(_noise(0.3, 1.0, i), np.zeros(RATE // 12)) for i in range(50)])
    wav = np.concatenate([10 ** (-30 / 20) * words, 10 ** (-58 / 20) * words])
    wav = (wav + 10 ** (-70 / 20) * _noise(len(wav) / RATE, 1.0, 99)[: len(wav)]).astype(np.float32)
    assert segmenting.kept(segmenting.levels_db(wav, RATE)).all()


def test_the_rumble_of_a_room_does_not_hide_breath():
    t = np.arange(len(SCENE.wav)) / RATE
    rumble = 0.01 * np.sin(2 * np.pi * 35 * t) * (1 + np.sin(2 * np.pi * 0.7 * t))  # as loud as the words
    levels = segmenting.levels_db((SCENE.wav + rumble).astype(np.float32), RATE)
    keep = segmenting.kept(levels)
    at = lambda span: keep[round(span[0] / 0.02) : round(span[1] / 0.02)]
    assert all(at(b).all() for b in SCENE.breaths) and not at(SCENE.silences[0])[50:-50].any()


def test_in_a_gated_recording_everything_but_digital_silence_is_sound():
    wav = np.zeros(20 * RATE, np.float32)
    for start_s in (2, 9, 15):  # half a second each, the faintest at -80 dB
        wav[start_s * RATE : start_s * RATE + RATE // 2] = _noise(0.5, 1e-4 * start_s)
    sound = segmenting.is_sound(segmenting.levels_db(wav, RATE))
    assert sound[2 * 50 : 2 * 50 + 25].all()
    assert 3 * 25 <= sound.sum() <= 3 * 26  # the filter's tail may reach one frame more


def test_a_recording_without_any_sound_gives_nothing_and_says_so():
    found, left_out = segmenting.segments(np.zeros(5 * RATE, np.float32), RATE, [_phrase("a ghost", 1, 2)])
    assert found == [] and {row["reason"] for row in left_out} == {
        "long silence",
        "words where there is silence",
    }


def test_minutes_of_tapping_far_from_words_are_left_out():
    wav = _noise(60, 0.02)
    found, left_out = segmenting.segments(wav, RATE, [_phrase("here it is", 20.0, 22.0)])
    assert found[0].spans == (pytest.approx((17.0, 25.0), abs=0.05),)  # reach_s on both sides
    assert {row["reason"] for row in left_out} == {"sound without words"}
    assert sum(row["seconds"] for row in left_out) == pytest.approx(52, abs=0.1)


def test_phrases_share_a_segment_up_to_the_longest_and_meet_at_the_quietest_place():
    wav = _noise(40, 0.02)
    wav[round(17.9 * RATE) : round(18.0 * RATE)] *= 0.3
    heard = [_phrase("one two", 0.5, 9.0), _phrase("three four", 9.5, 17.0), _phrase("five six", 19.0, 39.0)]
    found, _ = segmenting.segments(wav, RATE, heard, segmenting.Config(max_s=30))
    assert [s.text for s in found] == ["one two three four", "five six"]
    assert found[0].spans[-1][1] == found[1].spans[0][0]
    assert 17.88 <= found[0].spans[-1][1] <= 18.0


def test_a_phrase_over_the_longest_is_cut_between_words_and_left_out_if_it_has_none():
    wav = _noise(70, 0.02)
    phrase = _phrase(" ".join(f"w{i}" for i in range(70)), 0.0, 70.0)
    found, left_out = segmenting.segments(wav, RATE, [phrase])
    assert " ".join(s.text for s in found) == phrase.text and left_out == []
    assert all(s.duration_s <= 30 for s in found)
    bare = Phrase(phrase.text, 0.0, 70.0)
    found, left_out = segmenting.segments(wav, RATE, [bare])
    assert found == [] and "longer than max_s" in left_out[0]["reason"] and left_out[0]["text"] == phrase.text


def test_phrases_inside_each_other_or_out_of_order_lose_no_word_and_no_sound():
    wav = _noise(10, 0.02)
    heard = [_phrase("later", 6, 9), _phrase("around all of it", 1, 5), _phrase("inside", 2, 3)]
    found, left_out = segmenting.segments(wav, RATE, heard, segmenting.Config(max_s=4.5, min_s=0.1))
    words = " ".join([s.text for s in found] + [row["text"] for row in left_out]).split()
    assert sorted(words) == sorted("around all of it inside later".split())
    edges = [span for s in found for span in s.spans]
    assert edges == sorted(edges) and all(a[1] <= b[0] for a, b in zip(edges, edges[1:], strict=False))


def test_chinese_is_joined_without_spaces():
    assert segmenting.join(["闭上眼睛，", "听雨。"]) == "闭上眼睛，听雨。"
    assert segmenting.join(["close", "your eyes"]) == "close your eyes"


@pytest.mark.parametrize("change", [{"max_s": 0}, {"min_s": 40}, {"keep_s": 1}, {"margin_db": float("nan")}])
def test_a_cut_that_cannot_be_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        segmenting.Config(**change)


# ---------------------------------------------------------------- the whole run


@pytest.fixture
def service(monkeypatch):
    with speech_service.serve(lambda wav: SCENE.answer()) as running:
        monkeypatch.setenv(asmr_db_recognizers.KEY, speech_service.KEY)
        monkeypatch.setenv(asmr_db_recognizers.ENDPOINT, running.url)
        yield running


def _make(work, *more):
    return asmr_db.main(["make", str(work), "--recognizer", "fast", "--no-vetting", *more])


def test_from_recordings_to_a_corpus_that_the_readers_of_manifests_take(listed, service):
    _, work = listed
    assert _make(work) == 0
    rows = [row for _, row in request.read_json_lines(work / "corpus" / "manifest.jsonl")]
    assert len(rows) == 3 * 3  # three recordings, of four sentences two share a segment
    for row in rows:
        assert list(row)[:6] == ["audio", "text", "speaker", "language", "style", "topic"]
        wav, rate = soundfile.read(work / "corpus" / row["audio"])
        assert rate == RATE  # not raised to 24 kHz
        assert len(wav) / rate == pytest.approx(row["duration_s"], abs=1e-3)
        assert row["language"] == "en" and row["style"] == "asmr"
    read = pool.read_recordings(work / "corpus" / "manifest.jsonl")
    assert [r.transcript for r in read] == [row["text"] for row in rows]
    first = rows[0]
    wav, _ = soundfile.read(work / "corpus" / first["audio"], dtype="float32")
    start = round(first["start_s"] * RATE)
    np.testing.assert_allclose(wav, SCENE.wav[start : start + len(wav)], atol=1 / 32768)  # the level is kept


def test_a_second_run_sends_nothing_and_changes_nothing(listed, service):
    _, work = listed
    _make(work)
    before = (work / "corpus" / "manifest.jsonl").read_bytes()
    assert _make(work, "--workers", "3") == 0
    assert len(service.asked) == 3
    assert (work / "corpus" / "manifest.jsonl").read_bytes() == before


def test_a_piece_that_was_transcribed_before_a_kill_is_not_sent_again(listed, service):
    _, work = listed
    _make(work)
    before = (work / "corpus" / "manifest.jsonl").read_bytes()
    (work / "segments" / "a2-000.jsonl").unlink()
    for path in (work / "corpus" / "audio").rglob("a2-*"):
        path.unlink()
    assert _make(work) == 0 and len(service.asked) == 3
    assert (work / "corpus" / "manifest.jsonl").read_bytes() == before


def test_a_recording_that_was_replaced_is_heard_again_and_one_that_was_only_copied_is_not(listed, service):
    path, work = listed
    _make(work)
    manifest = work / "corpus" / "manifest.jsonl"
    before = manifest.read_bytes()
    for name in ("a1", "a2"):
        os.utime(path.parent / f"{name}.flac", (0, 0))
    assert _make(work) == 0 and len(service.asked) == 3 and manifest.read_bytes() == before
    wav, rate = soundfile.read(path.parent / "a2.flac", dtype="float32")
    soundfile.write(path.parent / "a2.flac", 0.9 * wav, rate, subtype="PCM_16")  # of the same length
    assert _make(work) == 0 and len(service.asked) == 4
    assert _make(work) == 0 and len(service.asked) == 4


def test_a_recording_of_another_length_is_heard_again_and_a_corrected_index_is_followed(listed, service):
    path, work = listed
    _make(work)
    manifest = work / "corpus" / "manifest.jsonl"
    before = [row for _, row in request.read_json_lines(manifest)]
    soundfile.write(path.parent / "a2.flac", SCENE.wav[: 20 * RATE], RATE, subtype="PCM_16")
    index = work / "index.jsonl"
    index.write_text(index.read_text("utf-8").replace('"topic": "talk"', '"topic": "sleep"'), "utf-8")
    assert _make(work) == 0 and len(service.asked) == 4
    after = [row for _, row in request.read_json_lines(manifest)]
    assert {r["topic"] for r in before if r["recording"] == "b1"} == {"talk"}
    assert {r["topic"] for r in after if r["recording"] == "b1"} == {"sleep"}
    assert [r for r in after if r["recording"] == "a1"] == [r for r in before if r["recording"] == "a1"]
    assert max(r["end_s"] for r in after if r["recording"] == "a2") <= 20
    there = {p.relative_to(work / "corpus").as_posix() for p in (work / "corpus" / "audio").rglob("*.flac")}
    assert there == {r["audio"] for r in after}
    store = Folder(work)
    for name in ("transcripts/a2-001.json", "segments/a2-001.jsonl"):  # of a recording that was longer
        store.write(name, store.read(name.replace("001", "000")).replace(b"a2-000", b"a2-001"))
    old = (
        work
        / "corpus"
        / next(r["audio"] for r in after if r["recording"] == "a2").replace("a2-000", "a2-001")
    )
    old.write_bytes(b"x")
    assert (
        _make(work) == 0
        and [row for _, row in request.read_json_lines(manifest)] == after
        and not old.exists()
    )


def test_a_failed_piece_is_listed_with_its_reason_and_tried_again(listed, service, capsys):
    _, work = listed
    service.refusals = [(400, {}, {"message": "Audio is empty."})]
    assert _make(work) == 1
    (row,) = [row for _, row in request.read_json_lines(work / "failures.jsonl")]
    assert row["step"] == "transcribe" and "Audio is empty." in row["reason"] and row["piece"] == "a1-000"
    assert "1 failed" in capsys.readouterr().out
    assert _make(work) == 0 and len(service.asked) == 4
    assert (work / "failures.jsonl").read_bytes() == b""


def test_a_refused_key_ends_the_run_at_once_with_one_sentence(listed, service, monkeypatch, capsys):
    _, work = listed
    monkeypatch.setenv(asmr_db_recognizers.KEY, "wrong")
    assert _make(work) == 2 and len(service.asked) == 1
    assert (
        capsys.readouterr()
        .err.strip()
        .splitlines()[-1]
        .startswith("asmr_db: the speech service refused the key")
    )


def test_other_settings_need_another_folder(listed, service, capsys):
    _, work = listed
    _make(work)
    assert _make(work, "--max-s", "10") == 2
    assert "max_s 30.0, not 10.0" in capsys.readouterr().err


def test_without_a_sheet_or_an_index_the_way_is_told(listed, tmp_path, capsys):
    _, work = listed
    assert asmr_db.main(["make", str(work), "--recognizer", "fast"]) == 2
    assert "vet" in capsys.readouterr().err
    assert asmr_db.main(["vet", str(tmp_path / "none")]) == 2
    assert "index" in capsys.readouterr().err
    assert _make(work, "--runner=DirectRunner") == 2
    assert "--beam" in capsys.readouterr().err


def test_a_language_that_is_neither_is_left_out_and_said(tmp_path, service):
    path = tmp_path / "r.flac"
    soundfile.write(path, SCENE.wav, RATE)
    store = Folder(tmp_path / "work")
    piece = Piece(Recording("r", str(path), "s", "sleep"), 0, 0.0, len(SCENE.wav) / RATE)

    def heard(wav, language):
        return [Phrase("Закрой глаза", 1.4, 3.0), Phrase("good night", 12.9, 14.6, (), "fr")]

    heard.name = "test"
    assert asmr_db_pieces.make_piece(piece, store, heard, Settings()) == "made"
    assert "Cyrillic" in store.read("left_out/r-000.jsonl").decode()
    (row,) = store.read("segments/r-000.jsonl").decode().splitlines()
    assert json.loads(row)["text"] == "good night" and json.loads(row)["language"] == "en"


# ---------------------------------------------------------------- card


def test_the_card_has_hours_by_language_speaker_and_topic_beside_the_papers():
    line = {"recording": "r", "style": "asmr"}
    lines = [
        line | {"language": "en", "topic": "sleep", "speaker": "ann", "duration_s": 5400.0},
        line | {"language": "zh", "topic": "talk", "speaker": "bo", "duration_s": 1800.0},
    ]
    people = [
        Recording("r", "", "ann", "sleep", gender="female", rights="consent"),
        Recording("q", "", "bo", "talk", gender="male"),
    ]
    text = asmr_db_card.card(lines, people, {"long silence": 360.0}, 2, False, {"recogniser": "fast"})
    for part in (
        "2.00 hours, 2 segments, 2 speakers (1 female, 1 male); mean segment 3600.0 s",
        "| en | 1.50 | 1 | 1 | 532.8 | 13 |",
        "| all | 2.00 | 2 | 2 | 674.5 | 35 |",
        "| sleep | 1.50 | 1 |",
        "| ann | 1.50 | 1 | female | consent |",
        "2 recordings or pieces that failed; long silence: 0.10 h.",
        "language: [en, zh]",
        "creators not vetted",
    ):
        assert part in text


def test_a_corpus_of_nothing_still_has_a_card():
    assert "0.00 hours, 0 segments" in asmr_db_card.card([], [], {}, 0, True, {})


# ---------------------------------------------------------------- Beam


def test_beam_that_is_missing_or_cannot_begin_pins_no_settings(listed, monkeypatch, capsys):
    _, work = listed
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    monkeypatch.delitem(sys.modules, "asmr_db_beam", raising=False)
    assert _make(work, "--beam") == 2
    assert "pip install -e '.[beam]'" in capsys.readouterr().err and not (work / "settings.json").exists()

    def run(*arguments):
        assert (work / "settings.json").exists()
        raise ValueError("the Beam pipeline stopped: no key")

    fake = types.SimpleNamespace(Shared=Folder, run=run)
    monkeypatch.setitem(sys.modules, "asmr_db_beam", fake)
    assert _make(work, "--beam", "--max-s", "20") == 2
    assert "no key" in capsys.readouterr().err and not (work / "settings.json").exists()
    Folder(work).write("transcripts/a1-000.json", b"{}")  # it had worked
    assert _make(work, "--beam", "--max-s", "20") == 2 and (work / "settings.json").exists()


def test_the_beam_pipeline_makes_the_same_corpus(listed, service, monkeypatch):
    pytest.importorskip("apache_beam")
    _, work = listed
    other = work.with_name("beam")
    Folder(other).write("index.jsonl", (work / "index.jsonl").read_bytes())
    assert _make(work) == 0 and _make(other, "--beam", "--runner=DirectRunner") == 0
    for name in ("corpus/manifest.jsonl", "corpus/README.md", "failures.jsonl"):
        assert Folder(other).read(name) == Folder(work).read(name)
    assert Folder(other).names("left_out") == Folder(work).names("left_out")
    asked = len(service.asked)
    assert _make(other, "--beam", "--runner=DirectRunner") == 0 and len(service.asked) == asked
