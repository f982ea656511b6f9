"""Measures and judges: against hand-made cases, closed forms, and synthetic speech where flite exists."""

import importlib.util
import json
import math
import shutil
import subprocess

import numpy as np
import pytest

from deepasmr_jax import audio, evaluate, text

RATE = 16000


def tone(seconds: float = 0.6, hz: float = 150.0, seed: int = 0) -> np.ndarray:
    """A buzz with harmonics: voiced beyond doubt."""
    t = np.arange(int(seconds * RATE)) / RATE
    noise = 1e-4 * np.random.default_rng(seed).standard_normal(len(t))
    return (sum(np.sin(2 * np.pi * hz * k * t) / k for k in range(1, 12)) * 0.1 + noise).astype(np.float32)


def hiss(seconds: float = 0.6, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(int(seconds * RATE))).astype(np.float32)


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


@pytest.mark.parametrize(
    ("reference", "hypothesis", "counts"),
    [
        ("a b c", "a b c", (0, 0, 0)),
        ("a b c", "a x c", (1, 0, 0)),
        ("a b c", "a c", (0, 1, 0)),
        ("a b c", "a b b c", (0, 0, 1)),
        ("a b c", "", (0, 3, 0)),
        ("", "a b", (0, 0, 2)),
        ("a b c d", "b c d e", (0, 1, 1)),
        ("a b", "x y", (2, 0, 0)),
    ],
)
def test_edits_are_counted_by_kind(reference, hypothesis, counts):
    found = evaluate.edit_errors(reference.split(), hypothesis.split())
    assert (found.substitutions, found.deletions, found.insertions) == counts
    assert found.edits == sum(counts) and found.reference == len(reference.split())


def test_edits_equal_those_of_jiwer_on_random_strings():
    jiwer = pytest.importorskip("jiwer")
    rng = np.random.default_rng(0)
    for _ in range(100):
        a, b = (" ".join(rng.choice(list("abcd"), rng.integers(1, 9))) for _ in range(2))
        out = jiwer.process_words(a, b)
        found = evaluate.edit_errors(a.split(), b.split())
        assert found.edits == out.substitutions + out.deletions + out.insertions


def test_words_are_compared_without_case_and_marks_and_chinese_by_character():
    assert evaluate.word_errors("Hello, World! It's “me”.", "hello world it's me").edits == 0
    assert evaluate.words_for_errors("你好，OK世界。", "zh") == ["你", "好", "ok", "世", "界"]
    assert evaluate.word_errors("你好世界", "你好时界", "zh").rate == 0.25


def test_the_summary_averages_over_utterances_and_pools_kinds():
    errors = [evaluate.Errors(1, 0, 0, 10), evaluate.Errors(0, 1, 1, 2)]
    found = evaluate.summarise_errors(errors)
    assert found["rate"] == pytest.approx(55) and found["pooled"] == pytest.approx(25)
    assert found["substitutions"] == found["deletions"] == found["insertions"] == pytest.approx(100 / 12)
    assert found["above_half"] == 50 and found["utterances"] == 2 and found["low"] <= 55 <= found["high"]


# ---------------------------------------------------------------- judges


@pytest.fixture(scope="module")
def matrix():
    pytest.importorskip("pocketsphinx")
    return evaluate.MatrixJudge()


def test_the_word_lists_of_the_judge_are_those_of_the_corpus():
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parent.parent / "data"))
    import synthetic_text

    assert evaluate.matrix_words() == [list(slot) for slot in synthetic_text.MATRIX_EN]


def test_the_matrix_judge_knows_its_sentences_only(matrix):
    assert matrix.knows("Lucy sees two red rings.")
    assert not matrix.knows("Lucy sees red two rings") and not matrix.knows("Lucy sees two red")
    with pytest.raises(ValueError, match="no matrix sentence"):
        matrix.errors(hiss(), RATE, "hello")


def test_the_matrix_judge_hears_no_words_in_a_hiss(matrix):
    assert matrix.errors(hiss(2.0), RATE, "lucy sees two red rings").rate >= 0.6
    assert matrix.errors(np.zeros(RATE, np.float32), RATE, "lucy sees two red rings").rate >= 0.6


@pytest.mark.skipif(shutil.which("flite") is None, reason="needs the program flite")
def test_the_matrix_judge_understands_synthetic_speech_and_gives_the_same_answer_twice(matrix, tmp_path):
    rng = np.random.default_rng(3)
    errors = []
    for i in range(4):
        sentence = " ".join(rng.choice(slot) for slot in matrix.words)
        file = str(tmp_path / f"{i}.wav")
        subprocess.run(["flite", "-voice", "slt", "-t", sentence, "-o", file], check=True)
        wav = audio.load(file, RATE)
        errors.append(matrix.errors(wav, RATE, sentence))
        assert matrix.transcribe(wav, RATE) == matrix.transcribe(0.1 * wav, RATE)
    assert evaluate.summarise_errors(errors)["rate"] <= 5  # one word of twenty


@pytest.mark.skipif(shutil.which("flite") is None, reason="needs the program flite")
def test_a_voice_with_short_formants_is_enrolled_at_a_slower_speed_and_understood(matrix, tmp_path):
    file, clips = str(tmp_path / "x.wav"), []
    for i in range(3):
        sentence = " ".join(np.random.default_rng(i).choice(slot) for slot in matrix.words)
        subprocess.run(["flite", "-voice", "slt", "-t", sentence, "-o", file], check=True)
        clips.append((audio.load(file, RATE), sentence))
    high = [(audio.resample(w, round(1.35 * RATE), RATE), t) for w, t in clips]
    assert matrix.enrol(clips, RATE) == 1.0
    factor = matrix.enrol(high, RATE)
    assert factor < 1.0
    rates = [np.mean([matrix.errors(w, RATE, t, f).rate for w, t in high]) for f in (1.0, factor)]
    assert rates[1] <= 0.2 < rates[0]


def test_a_grammar_of_other_words_can_be_given(matrix):
    other = evaluate.MatrixJudge([["red", "green"], ["moonstones", "boats"]])
    assert other.knows("green moonstones")
    with pytest.raises(ValueError, match="zxqv"):
        evaluate.MatrixJudge([["zxqv"]])


def test_word_lists_of_another_form_are_refused(tmp_path):
    (tmp_path / "words.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="list of lists"):
        evaluate.matrix_words(tmp_path / "words.json")


def test_judging_one_clip_gives_errors_only_for_matrix_sentences():
    ratio, rate = evaluate.judge_one(hiss(), RATE, "Any other sentence.", "en")
    assert ratio > 0.6 and rate is None
    assert evaluate.judge_one(hiss(), RATE, "你好", "zh")[1] is None


def test_the_mandarin_judge_counts_symbols_against_pinyin():
    pytest.importorskip("pypinyin")
    judge = evaluate.MandarinJudge(model=object())
    judge.transcribe = lambda wavs, rate: [["zh_n", "zh_i", "zh_h", "zh_a"]]
    found = judge.errors(hiss(), RATE, "你好。")
    assert (found.substitutions, found.reference) == (1, 4)
    with pytest.raises(ValueError, match="recognizer"):
        evaluate.MandarinJudge()


def test_the_mandarin_judge_pads_to_few_lengths_without_changing_the_answer():
    import jax

    from deepasmr_jax import recognizer

    cfg = recognizer.Config(width=16, num_heads=2, num_layers=1, mlp_width=16, kernel=3)
    model = recognizer.init(cfg, jax.random.key(0))
    heard = evaluate.MandarinJudge(model=model, cfg=cfg).transcribe([hiss(1.0)], RATE)
    assert heard == recognizer.decode(model, cfg, hiss(1.0)[None], np.array([RATE]))
    assert heard[0] and set(heard[0]) <= set(text.PHONES)


@pytest.mark.skipif(importlib.util.find_spec("resemblyzer") is None, reason="needs the extra eval")
def test_the_speaker_judge_does_not_depend_on_level_and_tells_clips_apart():
    judge = evaluate.SpeakerJudge()
    a = judge.embed(tone(1.7), RATE)
    assert a.shape == (judge.size,) and np.linalg.norm(a) == pytest.approx(1, abs=1e-3)
    assert a @ judge.embed(0.1 * tone(1.7), RATE) > 0.999
    assert a @ judge.embed(hiss(1.7), RATE) < 0.95


# ---------------------------------------------------------------- speakers and style


def test_retrieval_ranks_the_right_centroid():
    axes = np.eye(3)
    gallery, names = np.concatenate([2 * axes, axes]), ["a", "b", "c"] * 2
    found = evaluate.speaker_retrieval(axes + 0.1, ["a", "b", "a"], gallery, names)
    assert found.ranks.tolist()[:2] == [1, 1] and found.ranks[2] >= 2 and found.num_speakers == 3
    assert found.within(1).value == pytest.approx(2 / 3) and found.within(3).value == 1
    assert found.own_cosine[0] > found.other_cosine[0]
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


# ---------------------------------------------------------------- a folder


def test_a_result_folder_is_measured_by_group(tmp_path):
    class Hears:
        def knows(self, sentence):
            return sentence != "other"

        def errors(self, wav, rate, sentence, factor):
            assert factor == 0.9
            return evaluate.word_errors(sentence, "lucy sees two red beds")

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
    assert normal["retrieval_first"]["value"] == 1 and asmr["retrieval_first"]["value"] == 0
    assert asmr["token_speaker_first"]["value"] == 1 and "token_speaker_first" not in normal
    assert "pYIN" in report["settings"]["unvoiced"]
    assert json.loads((tmp_path / "evaluation.json").read_text()) == report


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "has no results.jsonl"),
        ("", "is empty"),
        ('{"file": "a.wav"}\n', "line 1 lacks text, language"),
        ('{"file": "a.wav", "text": "a", "language": "en"}\n', "does not exist"),
    ],
)
def test_a_folder_without_usable_results_is_refused(tmp_path, content, words):
    if content is not None:
        (tmp_path / "results.jsonl").write_text(content)
    with pytest.raises(ValueError, match=words):
        evaluate.evaluate_folder(tmp_path)
