"""Measures: against hand-made cases and closed forms."""

import json
import math

import numpy as np
import pytest
from sounds import RATE, hiss, tone

from deepasmr_jax import audio, evaluate, judges

# ---------------------------------------------------------------- intervals


def test_the_bootstrap_of_a_ratio_is_the_ratio_of_sums_with_a_covering_interval():
    found = evaluate.bootstrap([1, 9], [10, 10])
    assert found.value == 0.5 and (found.low, found.high) == (0.1, 0.9) and found.count == 2
    values = np.random.default_rng(0).standard_normal(400)
    wide = evaluate.bootstrap(values)
    assert abs((wide.high - wide.low) / (2 * 1.96 / 20) - 1) < 0.15  # the normal interval of 400 unit draws
    assert evaluate.bootstrap(values) == wide
    assert evaluate.Interval(0.123, 0.1, 0.15, 3).percent() == "12.3 % [10.0, 15.0]"


@pytest.mark.parametrize(("values", "weights"), [([], None), ([1], [0]), ([1, 2], [1])])
def test_a_bootstrap_without_data_is_refused(values, weights):
    with pytest.raises(ValueError, match="one weight per value"):
        evaluate.bootstrap(values, weights)


# ---------------------------------------------------------------- unvoiced ratio


def test_the_unvoiced_ratio_tells_a_buzz_from_a_hiss_at_any_rate():
    assert evaluate.unvoiced_ratio([tone()], RATE).ratio < 0.1
    assert evaluate.unvoiced_ratio([hiss()], RATE).ratio > 0.6  # white noise has chance pitches up to 2 kHz
    assert evaluate.unvoiced_ratio([audio.resample(tone(), RATE, 24000)], 24000).ratio < 0.1


def test_silence_is_not_counted_and_utterances_are_pooled_by_frames():
    padded = np.concatenate([np.zeros(RATE, np.float32), hiss()])
    alone, late = (evaluate.unvoiced_ratio([w], RATE) for w in (hiss(), padded))
    assert abs(int(late.active[0]) - int(alone.active[0])) <= 4  # frames that reach over the edge
    both = evaluate.unvoiced_ratio([tone(1.2), hiss(0.4)], RATE)
    assert both.ratio == both.unvoiced.sum() / both.active.sum() < 0.4
    interval = both.interval()
    assert interval.low <= both.ratio <= interval.high
    zeros = evaluate.unvoiced_ratio([np.zeros(RATE, np.float32)], RATE)
    assert zeros.active[0] == 0 and math.isnan(zeros.ratio)


def test_settings_are_printed_and_used():
    settings = evaluate.PitchSettings(fmin_hz=300.0)
    assert "300 to 2093 Hz" in settings.describe() and "frame 1024, hop 256" in settings.describe()
    high = evaluate.unvoiced_ratio([tone(hz=400)], RATE, settings)
    assert high.settings == settings and high.ratio < 0.1
    with pytest.raises(ValueError, match="shorter than one frame"):
        evaluate.unvoiced_ratio([hiss(0.01)], RATE)


# ---------------------------------------------------------------- errors


def test_the_summary_averages_over_utterances_and_pools_kinds():
    errors = [judges.Errors(1, 0, 0, 10), judges.Errors(0, 1, 1, 2)]
    found = evaluate.summarise_errors(errors)
    assert found["rate"] == pytest.approx(55) and found["pooled"] == pytest.approx(25)
    assert found["substitutions"] == found["deletions"] == found["insertions"] == pytest.approx(100 / 12)
    assert found["above_half"] == 50 and found["utterances"] == 2 and found["low"] <= 55 <= found["high"]


# ---------------------------------------------------------------- speakers and style


def test_retrieval_ranks_the_right_centroid():
    axes = np.eye(3)
    gallery, names = np.concatenate([2 * axes, axes]), ["a", "b", "c"] * 2
    found = evaluate.speaker_retrieval(axes + 0.1, ["a", "b", "a"], gallery, names)
    assert found.ranks.tolist()[:2] == [1, 1] and found.ranks[2] >= 2 and found.num_speakers == 3
    assert found.within(1).value == pytest.approx(2 / 3) and found.within(3).value == 1
    assert found.own_cosine[0] > found.own_cosine[2]
    with pytest.raises(ValueError, match="'d'"):
        evaluate.speaker_retrieval(axes, ["a", "b", "d"], gallery, names)
    with pytest.raises(ValueError, match="one speaker per clip"):
        evaluate.speaker_retrieval(axes, ["a"], gallery, names)


def test_the_spectral_tilt_of_known_slopes():
    rng = np.random.default_rng(0)
    white = rng.standard_normal(4 * RATE)
    assert evaluate.spectral_tilt(white, RATE) == pytest.approx(0, abs=0.4)
    spectrum = np.fft.rfft(white)
    hz = np.maximum(np.fft.rfftfreq(len(white), 1 / RATE), 1)
    pink = np.fft.irfft(spectrum / hz)  # amplitude 1/f: 6.02 dB per octave
    assert evaluate.spectral_tilt(pink, RATE) == pytest.approx(-6.02, abs=0.4)
    assert evaluate.spectral_tilt(5 * pink, RATE) == pytest.approx(
        evaluate.spectral_tilt(pink, RATE), abs=1e-6
    )
    with pytest.raises(ValueError, match="silent"):
        evaluate.spectral_tilt(np.zeros(RATE), RATE)


def test_syllables_and_their_rate_between_the_first_and_last_sound():
    assert evaluate.count_syllables("Hello, moonlight.", "en") == 4
    wav = np.concatenate([np.zeros(RATE), hiss(2.0), np.zeros(RATE)])
    assert evaluate.speaking_rate(wav, RATE, "Hello, moonlight.", "en") == pytest.approx(2.0, rel=0.03)
    assert evaluate.speaking_rate(np.zeros(RATE), RATE, "Hello", "en") == 0


def test_the_style_proxy_is_minus_one_and_plus_one_at_its_references():
    normal = evaluate.StyleFeatures(0.2, -8.0, 5.0)
    asmr = evaluate.StyleFeatures(0.9, -4.0, 4.0)
    assert evaluate.style_proxy(normal, [normal], [asmr]) == pytest.approx(-1)
    assert evaluate.style_proxy(asmr, [normal], [asmr]) == pytest.approx(1)
    half = evaluate.StyleFeatures(0.55, -6.0, 4.5)
    assert evaluate.style_proxy(half, [normal], [asmr]) == pytest.approx(0)
    noise = evaluate.StyleFeatures(1.0, 0.0, 0.0)
    assert evaluate.style_proxy(noise, [normal], [asmr]) == pytest.approx(1)  # why it is only a proxy
    with pytest.raises(ValueError, match="both styles"):
        evaluate.style_proxy(half, [], [asmr])


def test_an_outside_style_model_is_asked_and_its_answer_checked():
    def client(instruction, wav, rate):
        assert "Style_Rating" in instruction and rate == RATE
        return 'Sure: {"Style_Rating": 0.5, "Style_Comment": "soft"}'

    assert evaluate.style_by_client(hiss(), RATE, client) == (0.5, "soft")
    for answer in ("no idea", '{"Style_Rating": "x"}', '{"Style_Rating": 3}'):
        with pytest.raises(ValueError, match="style model"):
            evaluate.style_by_client(hiss(), RATE, lambda *_, answer=answer: answer)


# ---------------------------------------------------------------- one clip, a folder


def test_judging_one_clip_gives_errors_only_for_matrix_sentences(monkeypatch):
    class Hears:
        def knows(self, sentence):
            return sentence == "lucy sees two red rings"

        def errors(self, wav, rate, sentence):
            return judges.word_errors(sentence, "lucy sees two red beds")

    monkeypatch.setattr(evaluate, "_matrix_judge", Hears)
    ratio, rate = evaluate.judge_one(hiss(), RATE, "lucy sees two red rings", "en")
    assert ratio > 0.6 and rate == 0.2
    assert evaluate.judge_one(hiss(), RATE, "Any other sentence.", "en") == (ratio, None)
    assert evaluate.judge_one(hiss(), RATE, "lucy sees two red rings", "zh") == (ratio, None)
    monkeypatch.setattr(evaluate, "_matrix_judge", lambda: None)  # pocketsphinx is not installed
    assert evaluate.judge_one(hiss(), RATE, "lucy sees two red rings", "en") == (ratio, None)


def test_a_result_folder_is_measured_by_group(tmp_path):
    class Hears:
        def knows(self, sentence):
            return sentence != "other"

        def errors(self, wav, rate, sentence, factor):
            assert factor == 0.9
            return judges.word_errors(sentence, "lucy sees two red beds")

    class Speaker:
        def embed(self, wav, rate):
            return np.array([1.0, 0.0]) if evaluate.spectral_tilt(wav, rate) < -3 else np.array([0.0, 1.0])

    rows = []
    for i, (wav, style, sentence) in enumerate(
        [
            (tone(), "normal", "lucy sees two red rings"),
            (tone(), "normal", "other"),
            (hiss(), "asmr", "other"),
        ]
    ):
        audio.save(tmp_path / f"{i}.wav", wav, RATE)
        rows.append(
            {"file": f"{i}.wav", "text": sentence, "language": "en", "style": style, "speaker": "buzz"}
            | ({"token_speaker": "hiss"} if style == "asmr" else {})
        )
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    gallery = (np.eye(2), ["buzz", "hiss"])
    report = evaluate.evaluate_folder(
        tmp_path, matrix=Hears(), speaker=Speaker(), gallery=gallery, factors={"buzz": 0.9}
    )
    normal, asmr = report["groups"]["normal"], report["groups"]["asmr"]
    assert normal["clips"] == 2 and normal["matrix_wer"]["rate"] == 20 and "matrix_wer" not in asmr
    assert normal["unvoiced"]["value"] < 0.1 < 0.6 < asmr["unvoiced"]["value"]
    assert normal["unvoiced"]["value"] < report["unvoiced"]["value"] < asmr["unvoiced"]["value"]
    assert report["unvoiced"]["count"] == 3
    assert normal["retrieval_first"]["value"] == 1 and asmr["retrieval_first"]["value"] == 0
    assert asmr["token_speaker_first"]["value"] == 1 and "token_speaker_first" not in normal
    assert "pYIN" in report["settings"]["unvoiced"] and report["settings"]["judges"] == ["matrix", "speaker"]
    assert json.loads((tmp_path / "evaluation.json").read_text()) == report


def test_outputs_are_compared_with_their_clips_by_group(tmp_path, monkeypatch):
    class Judge:
        heard = 0

        def embed(self, wavs, rate):
            assert rate == RATE
            self.heard += len(wavs)
            tilted = [evaluate.spectral_tilt(w, rate) < -3 for w in wavs]
            return np.array([[1.0, 0.0] if t else [0.6, 0.8] for t in tilted], np.float32)

        def describe(self):
            return "SIM of a test"

    monkeypatch.chdir(tmp_path)
    for name, wav in (("buzz", tone()), ("hiss", hiss()), ("none", np.zeros(RATE // 2, np.float32))):
        audio.save(tmp_path / f"{name}.wav", wav, RATE)
    line = {"text": "a", "language": "en"}
    rows = [
        line | {"file": "buzz.wav", "group": "new", "clip": str(tmp_path / "buzz.wav"), "voice": "moved.wav"},
        line | {"file": "hiss.wav", "group": "new", "clip": str(tmp_path / "buzz.wav")},
        line | {"file": "none.wav", "group": "new", "clip": str(tmp_path / "buzz.wav")},
        line | {"file": "hiss.wav", "group": "old", "voice": "hiss.wav"},
        line | {"file": "hiss.wav", "group": "unnamed"},
    ]
    results = tmp_path / "results.jsonl"
    results.write_text("\n".join(map(json.dumps, rows)))
    report = evaluate.evaluate_folder(tmp_path, similarity=(judge := Judge()))
    new, old, unnamed = (report["groups"][k] for k in ("new", "old", "unnamed"))
    assert new["similarity"]["value"] == pytest.approx(0.8) and new["similarity"]["count"] == 2
    assert old["similarity"]["value"] == pytest.approx(1.0) and "similarity" not in unnamed
    assert report["similarity"]["value"] == pytest.approx(2.6 / 3) and report["similarity"]["count"] == 3
    assert report["similarity"]["low"] < report["similarity"]["value"] < report["similarity"]["high"]
    assert report["settings"]["similarity"] == "SIM of a test" and judge.heard == 5  # each clip once
    assert report["settings"]["judges"] == ["similarity"]
    for left, words in (
        (rows[4:], "no line of .* names its voice clip"),
        (rows[:4], "hiss.wav, which does not"),
    ):
        results.write_text("\n".join(json.dumps(r | {"file": "buzz.wav"}) for r in left))
        (tmp_path / "hiss.wav").unlink(missing_ok=True)
        with pytest.raises(ValueError, match=words):
            evaluate.evaluate_folder(tmp_path, similarity=judge)


def test_a_silent_file_counts_among_the_words_and_not_among_the_voices(tmp_path):
    class Speaker:
        def embed(self, wav, rate):
            assert np.any(wav)
            return np.array([1.0, 0.0])

    rows = [{"file": f"{i}.wav", "text": "a b", "language": "en", "speaker": "one"} for i in range(2)]
    audio.save(tmp_path / "0.wav", tone(), RATE)
    audio.save(tmp_path / "1.wav", np.zeros(RATE // 2, np.float32), RATE)
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, rows)))

    class Hears:
        def knows(self, sentence):
            return True

        def errors(self, wav, rate, sentence, factor):
            return judges.word_errors(sentence, sentence if np.any(wav) else "")

    style = tuple([evaluate.style_features(w, RATE, "a b", "en")] for w in (tone(), hiss()))
    found = evaluate.evaluate_folder(
        tmp_path, matrix=Hears(), speaker=Speaker(), gallery=(np.eye(2), ["one", "two"]), style=style
    )["groups"]["all"]
    assert found["clips"] == 2 and found["silent"] == 1
    assert found["matrix_wer"]["rate"] == 50 and found["matrix_wer"]["deletions"] == 50
    assert found["retrieval_first"]["count"] == 1 and found["unvoiced"]["value"] < 0.1
    assert found["style_proxy"]["count"] == 1 and found["style_proxy"]["value"] < -0.7


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "has no results.jsonl"),
        ("", "is empty; run `deepasmr batch` again"),
        ("[]\n", "line 1 is not a JSON object .it is an array."),
        ('{"file": "a.wav"}\n', "line 1 lacks text, language; run `deepasmr batch` again"),
        ('{"file": "a.wav", "text": "a", "language": "en"}\n', "does not exist"),
    ],
)
def test_a_folder_without_usable_results_is_refused(tmp_path, content, words):
    if content is not None:
        (tmp_path / "results.jsonl").write_text(content)
    with pytest.raises(ValueError, match=words):
        evaluate.evaluate_folder(tmp_path)


def test_a_folder_whose_requests_all_failed_points_to_their_list(tmp_path):
    (tmp_path / "results.jsonl").write_text("")
    (tmp_path / "failures.jsonl").write_text('{"error": "a"}\n')
    with pytest.raises(
        ValueError, match="all requests of .* failed.*failures.jsonl says why; correct the list"
    ):
        evaluate.evaluate_folder(tmp_path)
