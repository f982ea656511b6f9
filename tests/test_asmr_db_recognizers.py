"""The recognisers of the corpus tool: the client of Fast Transcription on a local server, and a tiny random Whisper."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import speech_service
from asmr_sounds import whispered

sys.path.insert(0, str(Path(__file__).parent.parent / "data"))

import asmr_db_recognizers as recognizers  # noqa: E402

SCENE = whispered()


@pytest.fixture
def service():
    with speech_service.serve(lambda wav: SCENE.answer()) as running:
        yield running


@pytest.fixture
def client(service):
    waits = []
    made = recognizers.FastTranscription(speech_service.KEY, service.url, timeout_s=20, sleep=waits.append)
    made.waits = waits
    return made


def test_the_request_has_the_key_the_form_and_the_whole_sound(service, client):
    client(SCENE.wav, "zh")
    (asked,) = service.asked
    assert asked["path"] == "/speechtotext/transcriptions:transcribe?api-version=2024-11-15"
    assert asked["headers"]["Ocp-Apim-Subscription-Key"] == speech_service.KEY
    assert asked["headers"]["Content-Type"].startswith("multipart/form-data; boundary=")
    assert asked["fields"] == ["audio", "definition"]
    assert asked["definition"] == {"locales": ["zh-CN"], "profanityFilterMode": "None"}
    assert asked["rate"] == 16000
    np.testing.assert_allclose(asked["wav"], SCENE.wav, atol=1 / 32768)  # one step of 16 bits


def test_without_a_language_the_service_chooses_between_both(service, client):
    client(SCENE.wav, "")
    assert service.asked[0]["definition"]["locales"] == ["en-US", "zh-CN"]


def test_phrases_and_words_come_with_their_times_and_language(client):
    first = client(SCENE.wav, "en")[0]
    assert (first.text, first.language) == ("close your eyes and listen.", "en")
    for word, (text, start_s, end_s) in zip(first.words, SCENE.sentences[0], strict=True):
        assert word.text == text
        assert word.start_s == pytest.approx(start_s, abs=1e-3)  # the protocol has milliseconds
        assert word.end_s == pytest.approx(end_s, abs=2e-3)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_service_is_asked_again_after_longer_and_longer_waits(service, client, status):
    service.refusals = [(status, {}, {"message": "busy"})] * 3
    assert len(client(SCENE.wav, "en")) == len(SCENE.sentences)
    assert client.waits == [1, 2, 4] and len(service.asked) == 4


def test_the_wait_that_the_service_asks_for_is_kept(service, client):
    service.refusals = [(429, {"Retry-After": "7"}, b""), (429, {"Retry-After": "soon"}, b"")]
    client(SCENE.wav, "en")
    assert client.waits == [7, 2]


def test_a_service_that_stays_busy_is_given_up_with_its_last_words(service, client):
    service.refusals = [(503, {}, {"message": "Try later."})] * 9
    with pytest.raises(ValueError, match=r"no transcript in 5 attempts \(last: 503 Try later\.\)"):
        client(SCENE.wav, "en")
    assert len(service.asked) == 5


def test_a_server_that_is_not_there_is_tried_again_and_then_named(client):
    lost = recognizers.FastTranscription("k", "http://127.0.0.1:9", sleep=client.waits.append)
    with pytest.raises(ValueError, match="no transcript in 5 attempts"):
        lost(SCENE.wav, "en")
    assert client.waits == [1, 2, 4, 8]


def test_an_answer_that_is_cut_off_is_asked_for_again(service, client):
    service.refusals = [(200, {"Content-Length": "1000"}, b'{"phrases": [')] * 2
    assert len(client(SCENE.wav, "en")) == len(SCENE.sentences)
    assert client.waits == [1, 2] and len(service.asked) == 3


def test_a_refused_piece_is_not_sent_again(service, client):
    body = {"code": "InvalidArgument", "message": "x", "innerError": {"message": "Locale is wrong."}}
    service.refusals = [(400, {}, body)]
    with pytest.raises(ValueError, match=r"refused the piece \(400 Locale is wrong\.\)"):
        client(SCENE.wav, "en")
    assert len(service.asked) == 1


def test_a_refused_key_stops_the_run_and_is_not_shown(service):
    client = recognizers.FastTranscription("a-wrong-key", service.url)
    with pytest.raises(recognizers.Unusable, match="refused the key.*SPEECH_KEY") as e:
        client(SCENE.wav, "en")
    assert "a-wrong-key" not in str(e.value)


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"phrases": [{"text": "x"}]}'])
def test_an_answer_that_is_no_transcript_is_said(service, client, body):
    service.refusals = [(200, {}, body)]
    with pytest.raises(ValueError, match="no transcript"):
        client(SCENE.wav, "en")


def test_missing_variables_are_named(monkeypatch):
    for name in (recognizers.KEY, recognizers.REGION, recognizers.ENDPOINT):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(recognizers.Unusable, match="SPEECH_KEY is not set"):
        recognizers.make("fast")
    monkeypatch.setenv(recognizers.KEY, "k")
    with pytest.raises(recognizers.Unusable, match="neither SPEECH_REGION nor SPEECH_ENDPOINT"):
        recognizers.make("fast")
    monkeypatch.setenv(recognizers.REGION, "eastus")
    assert recognizers.make("fast")._url.startswith(
        "https://eastus.api.cognitive.microsoft.com/speechtotext/"
    )
    monkeypatch.setenv(recognizers.ENDPOINT, "eastus")
    with pytest.raises(recognizers.Unusable, match="must start with https"):
        recognizers.make("fast")


def test_what_cannot_be_a_recogniser_is_refused(tmp_path):
    with pytest.raises(recognizers.Unusable, match="unknown recogniser 'siri'; use fast or whisper"):
        recognizers.make("siri")
    with pytest.raises(recognizers.Unusable, match="give it with --model"):
        recognizers.make("whisper")
    with pytest.raises(recognizers.Unusable, match="no config.json"):
        recognizers.make("whisper", str(tmp_path))


# ---------------------------------------------------------------- Whisper


@pytest.fixture(scope="module")
def whisper_folder(tmp_path_factory):
    """A Whisper of random weights with a tokenizer of single bytes; it hears nonsense, with times."""
    torch = pytest.importorskip("torch")
    import transformers

    folder = tmp_path_factory.mktemp("whisper")
    characters = [*range(33, 127), *range(161, 173), *range(174, 256)]  # of byte-level BPE
    letters = [chr(c) for c in characters] + [chr(256 + i) for i in range(256 - len(characters))]
    special = [
        "<|endoftext|>",
        "<|startoftranscript|>",
        "<|en|>",
        "<|zh|>",
        "<|translate|>",
        "<|transcribe|>",
    ]
    special += ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    times = [f"<|{0.02 * i:.2f}|>" for i in range(1501)]
    vocab = {t: i for i, t in enumerate([*letters, *special, *times])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.WhisperTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt")
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    mel = transformers.WhisperFeatureExtractor(feature_size=80)
    transformers.WhisperProcessor(mel, tokenizer).save_pretrained(folder)
    end = vocab["<|endoftext|>"]
    cfg = transformers.WhisperConfig(
        vocab_size=len(vocab), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_target_positions=32,
        pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=vocab["<|startoftranscript|>"],
        suppress_tokens=[], begin_suppress_tokens=[],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(cfg)
    model.save_pretrained(folder)
    own = {
        "is_multilingual": True, "lang_to_id": {f"<|{c}|>": vocab[f"<|{c}|>"] for c in ("en", "zh")},
        "task_to_id": {c: vocab[f"<|{c}|>"] for c in ("transcribe", "translate")},
        "no_timestamps_token_id": vocab["<|notimestamps|>"], "max_initial_timestamp_index": 50, "max_length": 24,
        "decoder_start_token_id": vocab["<|startoftranscript|>"], "pad_token_id": end, "bos_token_id": end,
        "eos_token_id": end,
    }  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(own))
    return folder


@pytest.mark.parametrize("seconds, language", [(4.0, "en"), (35.0, "")])
def test_a_local_whisper_gives_phrases_in_order_within_the_sound(whisper_folder, seconds, language):
    heard = recognizers.make("whisper", str(whisper_folder))
    wav = np.resize(SCENE.wav, int(16000 * seconds)).astype(np.float32)
    phrases = heard(wav, language)
    assert phrases
    assert all(0 <= p.start_s <= p.end_s <= seconds and "<|" not in p.text for p in phrases)
    assert [p.start_s for p in phrases] == sorted(p.start_s for p in phrases)
    if seconds > 30:
        assert phrases[-1].end_s > 28  # the second window was heard too


def test_another_model_of_the_same_name_has_another_name_in_transcripts(whisper_folder, tmp_path):
    first = recognizers.make("whisper", str(whisper_folder)).name
    assert first == recognizers.make("whisper", str(whisper_folder)).name
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert first.split()[-1] == recognizers._digest(whisper_folder) != recognizers._digest(tmp_path)


def test_pickled_weights_are_not_read(whisper_folder, tmp_path):
    for path in whisper_folder.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(recognizers.Unusable, match="cannot be read"):
        recognizers.make("whisper", str(tmp_path))
