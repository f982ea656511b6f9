"""Judges, and the errors they count: against hand-made cases, and synthetic speech where flite exists."""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import test_speaker_wavlm
import weight_writers
from sounds import RATE, hiss, tone

from deepasmr_jax import audio, convert, judges, request, speaker_wavlm, text

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
    found = judges.edit_errors(reference.split(), hypothesis.split())
    assert (found.substitutions, found.deletions, found.insertions) == counts
    assert found.edits == sum(counts) and found.reference == len(reference.split())


def test_edits_equal_those_of_jiwer_on_random_strings():
    jiwer = pytest.importorskip("jiwer")
    rng = np.random.default_rng(0)
    for _ in range(100):
        a, b = (" ".join(rng.choice(list("abcd"), rng.integers(1, 9))) for _ in range(2))
        out = jiwer.process_words(a, b)
        found = judges.edit_errors(a.split(), b.split())
        assert found.edits == out.substitutions + out.deletions + out.insertions


def test_words_are_compared_without_case_and_marks_and_chinese_by_character():
    assert judges.word_errors("Hello, World! It's “me”.", "hello world it's me").edits == 0
    assert judges.words_for_errors("你好，OK世界。", "zh") == ["你", "好", "ok", "世", "界"]
    assert judges.word_errors("你好世界", "你好时界", "zh").rate == 0.25


# ---------------------------------------------------------------- judges


@pytest.fixture(scope="module")
def matrix():
    pytest.importorskip("pocketsphinx")
    return judges.MatrixJudge()


def test_the_word_lists_of_the_judge_are_those_of_the_corpus():
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parent.parent / "data"))
    import synthetic_text

    assert judges.matrix_words() == [list(slot) for slot in synthetic_text.MATRIX_EN]


def test_the_matrix_judge_knows_its_sentences_only(matrix):
    assert matrix.knows("Lucy sees two red rings.")
    assert not matrix.knows("Lucy sees red two rings") and not matrix.knows("Lucy sees two red")
    with pytest.raises(ValueError, match="no matrix sentence"):
        matrix.errors(hiss(), RATE, "hello")


def test_the_matrix_judge_hears_no_words_in_a_hiss(matrix):
    assert matrix.errors(hiss(2.0), RATE, "lucy sees two red rings").rate >= 0.6
    assert matrix.transcribe(np.zeros(RATE, np.float32), RATE) == ""


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
    assert np.mean([e.rate for e in errors]) <= 0.05  # one word of twenty


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
    other = judges.MatrixJudge([["red", "green"], ["moonstones", "boats"]])
    assert other.knows("green moonstones")
    with pytest.raises(ValueError, match="zxqv"):
        judges.MatrixJudge([["zxqv"]])


def test_word_lists_of_another_form_are_refused(tmp_path):
    (tmp_path / "words.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="list of lists"):
        judges.matrix_words(tmp_path / "words.json")


def test_the_mandarin_judge_counts_symbols_against_pinyin():
    pytest.importorskip("pypinyin")
    judge = judges.MandarinJudge(model=object())
    judge.transcribe = lambda wavs, rate: [["zh_n", "zh_i", "zh_h", "zh_a"]]
    found = judge.errors(hiss(), RATE, "你好。")
    assert (found.substitutions, found.reference) == (1, 4)
    with pytest.raises(ValueError, match="recognizer"):
        judges.MandarinJudge()


def test_the_mandarin_judge_pads_to_few_lengths_without_changing_the_answer():
    import jax

    from deepasmr_jax import recognizer

    cfg = recognizer.Config(width=16, num_heads=2, num_layers=1, mlp_width=16, kernel=3)
    model = recognizer.init(cfg, jax.random.key(0))
    heard = judges.MandarinJudge(model=model, cfg=cfg).transcribe([hiss(1.0)], RATE)
    assert heard == recognizer.decode(model, cfg, hiss(1.0)[None], np.array([RATE]))
    assert heard[0] and set(heard[0]) <= set(text.PHONES)
    silent = np.zeros(RATE, np.float32)
    assert judges.MandarinJudge(model=model, cfg=cfg).transcribe([silent, hiss(1.0)], RATE) == [[], *heard]


@pytest.mark.skipif(importlib.util.find_spec("resemblyzer") is None, reason="needs the extra eval")
def test_the_speaker_judge_does_not_depend_on_level_and_tells_clips_apart():
    judge = judges.SpeakerJudge()
    a = judge.embed(tone(1.7), RATE)
    assert a.shape == (judge.size,) and np.linalg.norm(a) == pytest.approx(1, abs=1e-3)
    assert a @ judge.embed(0.1 * tone(1.7), RATE) > 0.999
    assert a @ judge.embed(hiss(1.7), RATE) < 0.95


@pytest.mark.parametrize(
    ("package", "judge", "extra"),
    [("pocketsphinx", judges.MatrixJudge, "judge"), ("resemblyzer", judges.SpeakerJudge, "eval")],
)
def test_a_judge_without_its_package_names_the_extra_of_the_checkout(monkeypatch, package, judge, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf'needs {package}: pip install -e "\.\[{extra}\]" in the checkout'):
        judge()


# ---------------------------------------------------------------- similarity

# the strides are those of the public model: shapes do not tell them
WAVLM = dataclasses.replace(
    test_speaker_wavlm.CONFIG,
    conv_kernels=speaker_wavlm.large_sv().conv_kernels,
    conv_strides=speaker_wavlm.large_sv().conv_strides,
    max_distance=800,
)


def wavlm_tensors() -> dict[str, np.ndarray]:
    """What `wavlm_large_finetune.pth` holds under "model", at toy size, with the tensors that nobody reads."""
    with mock.patch.object(test_speaker_wavlm, "CONFIG", WAVLM):
        tensors = test_speaker_wavlm.toy_tensors()
    tensors = {name.removeprefix("model."): x for name, x in tensors.items()}
    tensors |= {"loss_calculator.projection.weight": np.ones((3, 8), np.float32)}
    tensors |= {"feature_extract.model.mask_emb": np.ones(16, np.float32)}
    return tensors | {"layer1.bn.num_batches_tracked": np.asarray(7, np.int64)}


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory):
    """A converted toy judge of speaker similarity."""
    place = tmp_path_factory.mktemp("judge")
    weight_writers.write_torch_zip(place / "wavlm_large_finetune.pth", {"model": wavlm_tensors()})
    convert.convert_file(place / "wavlm_large_finetune.pth", place / "judge")
    return place / "judge"


@pytest.fixture(scope="module")
def similarity(judge_folder):
    return judges.SimilarityJudge(judge_folder)


def test_embeddings_of_clips_of_several_lengths_equal_those_of_each_clip_alone(similarity, monkeypatch):
    monkeypatch.setattr(judges.SimilarityJudge, "_SECONDS", (1, 2))
    monkeypatch.setattr(judges.SimilarityJudge, "_ROWS_TIMES_SECONDS", 2)
    wavs = [hiss(s, seed=i) for i, s in enumerate((0.5, 1.5, 1.0, 0.7, 2.0, 0.01))]
    found = similarity.embed(wavs, RATE)
    assert found.shape == (6, 8) and similarity._apply._cache_size() == 2  # one program for each length
    for wav, row in zip(wavs, found, strict=True):
        np.testing.assert_allclose(row, similarity.embed([wav], RATE)[0], atol=2e-5)
    assert len(np.unique(found.round(3), axis=0)) == 6
    model, cfg, length = similarity._model, similarity._cfg, np.array([len(wavs[0])], np.int32)
    direct = np.asarray(similarity._apply(model, cfg, wavs[0][None], length))[0]
    np.testing.assert_allclose(found[0], direct / np.linalg.norm(direct), atol=2e-5)
    assert similarity.embed([], RATE).shape == (0, 8)
    resampled, cut = audio.resample(wavs[4], RATE, 24000), np.concatenate([wavs[4], tone(1.0)])
    assert similarity.embed([resampled], 24000)[0] @ found[4] > 0.999
    np.testing.assert_allclose(similarity.embed([cut], RATE)[0], found[4], atol=2e-5)


def test_the_judge_of_similarity_says_what_it_is_and_another_folder_is_none(similarity, tmp_path):
    assert (
        "wavlm_large_finetune.pth, sha256 " in similarity.describe() and "16000 Hz" in similarity.describe()
    )
    with pytest.raises(ValueError, match="no config.json"):
        judges.SimilarityJudge(tmp_path)
    built_in = json.loads((request.BUILT_IN / "config.json").read_text())
    built_in["components"] = {name: built_in["components"][name] for name in ("lm", "flow")}
    (tmp_path / "config.json").write_text(json.dumps(built_in))
    with pytest.raises(
        ValueError, match="no judge of speaker similarity, only flow, lm; make one with .*wavlm"
    ):
        judges.SimilarityJudge(tmp_path)
