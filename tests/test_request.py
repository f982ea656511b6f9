"""Requests and the checks that need no audio and no model."""

import pytest

from deepasmr_jax import request


def make(tmp_path, **changes):
    clip = tmp_path / "clip.wav"
    clip.write_bytes(b"something")
    return request.Request(**({"text": "Good night.", "voice": clip} | changes))


def test_a_good_request_is_kept_and_its_numbers_are_read_from_strings(tmp_path):
    made = make(tmp_path, seed="7", refine="3")
    assert (made.seed, made.refine, made.style, made.pool_strategy) == (7, 3, "asmr", "nearest")


def test_the_language_of_the_transcript_is_its_own_and_of_digits_that_of_the_text(tmp_path):
    assert make(tmp_path).voice_language is None
    assert make(tmp_path, voice_text="晚安。", language="en").voice_language == "zh"
    assert make(tmp_path, voice_text="1 2 3", language="zh").voice_language == "zh"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text": ""}, "empty"),
        ({"text": "..., !?"}, "punctuation"),
        ({"text": "a " * 10_000}, "20,000 characters"),
        ({"text": "Спокойной ночи"}, "Cyrillic"),
        ({"text": None}, "NoneType"),
        ({"style": "loud"}, "'loud'.*normal or asmr"),
        ({"voice_style": "loud"}, "style of the voice clip 'loud'"),
        ({"voice_text": "?!"}, "transcript of the voice clip"),
        (
            {"voice_text": "1 2 3"},
            "transcript of the voice clip: .* digits only.*give the language, en or zh",
        ),
        ({"voice_text": "こんばんは", "language": "en"}, "transcript of the voice clip: .*Japanese"),
        ({"language": "fr"}, "'fr'.*en or zh"),
        ({"seed": "twelve"}, "'twelve' is not a whole number"),
        ({"seed": 1.5}, "'1.5'|1.5 is not a whole number"),
        ({"seed": -1}, "seed -1 is out of range"),
        ({"seed": 2**32}, "out of range"),
        ({"refine": 0}, "0 refinement passes"),
        ({"refine": "many"}, "'many' refinement passes"),
        ({"voice": "no_such_clip.wav"}, "no_such_clip.wav does not exist"),
        ({"voice": [0.0, 0.1]}, "voice_rate"),
        ({"voice": None}, "the voice is empty; give the path"),
    ],
)
def test_a_bad_value_is_named_with_the_way_out(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words) as caught:
        make(tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_a_clip_that_is_a_folder_or_empty_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        make(tmp_path, voice=tmp_path)
    (tmp_path / "nothing.wav").touch()
    with pytest.raises(ValueError, match="nothing.wav is an empty file"):
        make(tmp_path, voice=tmp_path / "nothing.wav")


def test_an_output_path_must_be_a_wav_in_a_folder_that_can_be_written(tmp_path):
    assert request.check_output(tmp_path / "new" / "deep" / "out.wav").name == "out.wav"
    assert list(tmp_path.iterdir()) == []  # no folder is made, and the probe is gone
    with pytest.raises(ValueError, match="out.txt does not end in .wav"):
        request.check_output(tmp_path / "out.txt")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write in the folder"):
        request.check_output(tmp_path / "file" / "out.wav")


def test_a_row_of_a_list_may_write_its_keys_with_dashes_and_hold_other_things(tmp_path):
    clip = tmp_path / "clip.wav"
    clip.write_bytes(b"something")
    row = {"text": "Good night.", "voice": clip, "voice-text": "Hello.", "group": "a", "speaker": "b"}
    assert request.from_row(row, extras=True) == make(tmp_path, voice_text="Hello.")


@pytest.mark.parametrize(
    ("row", "extras", "words"),
    [
        ({"text": "Hi.", "voise": "x"}, False, "'voise'.*did you mean 'voice'"),
        ({"text": "Hi.", "voise": "x"}, True, "'voise'.*did you mean 'voice'"),
        ({"text": "Hi.", "voice": "x", "voicetext": "Hi."}, True, "did you mean 'voice_text'"),
        ({"text": "Hi.", "voice": "x", "group": "a"}, False, "'group'.*known are text, voice"),
        ({"text": "Hi."}, True, "no 'voice', only text"),
        ({}, False, "no 'text', only nothing"),
    ],
)
def test_a_row_with_a_wrong_key_is_refused_with_the_right_one(row, extras, words):
    with pytest.raises(ValueError, match=words):
        request.from_row(row, extras)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[1, 2]", "line 2 of .*list.jsonl is not a JSON object .it is an array.; correct it"),
        ("[]", "it is an array"),
        ('[["text", "Hi."]]', "it is an array"),
        ('"text"', "it is a string"),
        ("5", "it is a number"),
        ("null", "it is null"),
        ("{", "is not a JSON object"),
    ],
)
def test_a_line_that_is_no_object_is_named_and_its_kind(tmp_path, line, words):
    (tmp_path / "list.jsonl").write_text(f'{{"text": "Hi."}}\n{line}\n')
    with pytest.raises(ValueError, match=words) as caught:
        request.read_json_lines(tmp_path / "list.jsonl")
    assert "sequence" not in str(caught.value)


def test_a_list_that_is_not_utf_8_is_named_with_its_line(tmp_path):
    (tmp_path / "list.jsonl").write_bytes(b'{"a": 1}\n\n{"b": "\xe9"}\n')
    with pytest.raises(ValueError, match=r"list.jsonl is not UTF-8 text \(line 3, byte 17\)"):
        request.read_json_lines(tmp_path / "list.jsonl")


@pytest.mark.parametrize("name", ["x.mp3", "../x.wav", "/tmp/x.wav", 5, "x"])
def test_a_file_name_must_be_a_wav_inside_the_folder(name):
    with pytest.raises(ValueError, match="file name"):
        request.check_file_name(name)
    assert request.check_file_name("a/x.wav") == "a/x.wav"
