"""Text: languages, sentence chunks, pronunciation, both tokenizers, and every refusal."""

import functools
import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from deepasmr_jax import text, text_normalize

TOKENIZER = text.MiniTokenizer()


def symbols(sentence: str, language: str, **options) -> str:
    return " ".join(TOKENIZER.decode_symbols(TOKENIZER.encode(sentence, language, **options)))


# ---------------------------------------------------------------- refusals and languages


@pytest.mark.parametrize("function", [text.detect_language, lambda t: text.normalize(t, "en"), text.check])
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("", "text is empty"),
        (" \n\t", "text is empty"),
        ("?!... —", "only punctuation"),
        ("😀 👍🏽", "only punctuation"),
        ("x" * 20_000, "20,000 characters, the limit of one request is 10,000"),
        (b"hello", "found bytes"),
    ],
)
def test_text_that_cannot_be_spoken_is_refused_with_the_reason(function, bad, words):
    with pytest.raises(ValueError, match=words):
        function(bad)


def test_the_limit_itself_is_allowed():
    text.check("a" * text.MAX_CHARACTERS)
    with pytest.raises(ValueError, match="10,001"):
        text.check("a" * (text.MAX_CHARACTERS + 1))


@pytest.mark.parametrize(
    ("sentence", "script"),
    [
        ("привет", "Cyrillic"),
        ("こんにちは", "Japanese"),
        ("日本のカタカナ", "Japanese"),
        ("مرحبا", "Arabic"),
        ("안녕", "Hangul"),
        ("Hello Γειά", "Greek"),
    ],
)
def test_another_script_is_refused_by_name(sentence, script):
    with pytest.raises(ValueError, match=script):
        text.detect_language(sentence)


def test_language_follows_the_script_and_mixed_text_the_majority():
    assert text.detect_language("Hello, world.") == "en"
    assert text.detect_language("déjà vu") == "en"
    assert text.detect_language("你好") == "zh"
    assert text.detect_language("我喜欢 Python 语言") == "zh"
    assert text.detect_language("He said 你好 to all of them") == "en"
    with pytest.raises(ValueError, match="digits only"):
        text.detect_language("2024")


@pytest.mark.parametrize(
    "call",
    [
        lambda: text.normalize("hello", "de"),
        lambda: text.split_sentences("hello", "de"),
        lambda: text_normalize.number_words(3, "de"),
        lambda: TOKENIZER.encode("hello", "de"),
    ],
)
def test_an_unknown_language_is_refused_by_name(call):
    with pytest.raises(ValueError, match="'de'"):
        call()


# ---------------------------------------------------------------- sentences


def test_abbreviations_decimals_and_times_do_not_end_a_sentence():
    raw = "Dr. Lee got 3.5 at 3:30 p.m. today. He left! Why? So."
    assert text._sentences(raw) == ["Dr. Lee got 3.5 at 3:30 p.m. today.", "He left!", "Why?", "So."]


def test_a_chunk_closes_above_80_once_it_has_more_than_60():
    def pieces(*lengths):
        return "".join("好" * (n - 1) + "。" for n in lengths)

    def chunks(*lengths):
        return [len(c) for c in text.split_sentences(pieces(*lengths), "zh")]

    assert chunks(61, 20) == [61, 20]  # 81 > 80 and 61 > 60; 20 is not below 20
    assert chunks(60, 30) == [90]  # 60 is not more than 60
    assert chunks(61, 19) == [80]  # 80 fits
    assert chunks(70, 15) == [85]  # the short tail joins the chunk before


def test_the_end_gets_a_mark_and_chunks_without_words_go():
    assert text.split_sentences("hello", "en") == ["hello."]
    assert text.split_sentences("你好，", "zh") == ["你好。"]
    assert text.split_sentences("Well... yes? !!! ", "en", longest=4, full=0, merge_below=0) == [
        "Well...",
        "yes?",
    ]


def test_one_endless_sentence_is_cut_near_the_limit_without_losing_words():
    english = text.split_sentences("word " * 500, "en")
    assert " ".join(english).replace(".", "").split() == ["word"] * 500
    assert max(map(text.rough_length, english)) <= 81  # the added mark
    chinese = text.split_sentences("一二三四五，" * 100 + "好" * 300, "zh")
    assert sum(c.count("好") for c in chinese) == 300 and max(map(len, chinese)) <= 140


def test_lengths_can_be_measured_by_a_tokenizer():
    def length(s):
        return len(TOKENIZER.encode(s, "en"))

    chunks = text.split_sentences("The cat sat. " * 30, "en", length, longest=60, full=40, merge_below=10)
    assert len(chunks) > 3 and max(map(length, chunks)) <= 60
    with pytest.raises(ValueError, match="merge_below"):
        text.split_sentences("a", "en", longest=10, full=20)


# ---------------------------------------------------------------- pronunciation


@pytest.mark.parametrize(
    ("word", "phones"),
    [
        ("hello", "HH AH0 L OW1"),
        ("don't", "D OW1 N T"),
        ("lex's", "L EH1 K S IH0 Z"),
        ("snuggles'", "S N AH1 G AH0 L Z"),
        ("ASMR", "EY1 EH1 S EH1 M AA1 R"),
        ("whisperingly", "W IH1 S P ER0 IH0 NG L IY0"),
        ("moonstones", "M UW1 N S T OW2 N Z"),
    ],
)
def test_english_words_are_pronounced_by_lexicon_letters_or_rule(word, phones):
    assert " ".join(text.pronounce(word)) == phones


def test_an_unknown_word_is_spelled_by_letters():
    assert text.pronounce("zxqvbn") is None
    assert symbols("zxqvbn", "en") == "<en> z x q v b n"


def test_the_lexicon_is_complete_licensed_and_uses_known_phones_only():
    path = Path(text.__file__).parent / "mini" / "lexicon_en.txt.gz"
    assert path.stat().st_size < 1_200_000
    head = gzip.open(path, "rt").read(2000)
    assert "Carnegie Mellon University" in head and "Redistributions of source code must retain" in head
    words = text.lexicon()
    assert len(words) > 120_000
    assert {p for v in words.values() for p in v.split()} <= set(TOKENIZER.symbols)


def test_the_lexicon_script_keeps_first_pronunciations_and_refuses_other_files(tmp_path):
    sys.path.insert(0, str(Path(__file__).parent.parent / "data"))
    import lexicon

    (tmp_path / "LICENSE").write_text("Copyright someone\n")
    (tmp_path / "cmudict.dict").write_text("b B IY1\na(2) EY1\na AH0 # comment\na.m. EY2 EH1 M\n")
    assert lexicon.write(tmp_path, tmp_path / "x" / "out.gz") == 2
    lines = gzip.open(tmp_path / "x" / "out.gz", "rt").read().splitlines()
    assert lines[-2:] == ["a AH0", "b B IY1"] and "# Copyright someone" in lines
    (tmp_path / "cmudict.dict").write_text("b QQ1\n")
    with pytest.raises(ValueError, match="QQ1"):
        lexicon.read(tmp_path / "cmudict.dict")


@pytest.mark.parametrize(
    ("syllable", "parts"),
    [
        ("zhuang1", ("zh", "uang", 1)), ("shi4", ("sh", "ii", 4)), ("zi5", ("z", "ii", 5)),
        ("ji3", ("j", "i", 3)),
        ("yi2", ("", "i", 2)), ("wu3", ("", "u", 3)), ("yu2", ("", "v", 2)), ("you3", ("", "iu", 3)),
        ("wei4", ("", "ui", 4)), ("wen2", ("", "un", 2)), ("yue4", ("", "ve", 4)), ("yuan2", ("", "van", 2)),
        ("ju4", ("j", "v", 4)), ("xuan1", ("x", "van", 1)), ("qun2", ("q", "vn", 2)), ("lv4", ("l", "v", 4)),
        ("nüe4", ("n", "ve", 4)), ("lue4", ("l", "ve", 4)), ("nǐ", ("n", "i", 3)), ("er2", ("", "er", 2)),
        ("huar1", ("h", "ua", 1)), ("weng1", ("", "ong", 1)), ("xiong2", ("x", "iong", 2)),
        ("de", ("d", "e", 5)),
    ],
)  # fmt: skip
def test_pinyin_parts_of_every_kind_of_spelling(syllable, parts):
    assert text.pinyin_parts(syllable) == parts


@pytest.mark.parametrize("bad", ["", "xyz1", "b", "sha9", "hello"])
def test_what_is_no_syllable_is_refused(bad):
    with pytest.raises(ValueError, match="not a Mandarin syllable"):
        text.pinyin_parts(bad)


def test_every_reading_of_pypinyin_has_parts_in_the_inventory():
    pytest.importorskip("pypinyin")
    from pypinyin.contrib.tone_convert import to_tone3
    from pypinyin.pinyin_dict import pinyin_dict

    readings = {r for value in pinyin_dict.values() for r in value.split(",")}
    assert len(readings) > 1000
    for reading in readings:
        initial, final, tone = text.pinyin_parts(reading)
        assert (not initial or f"zh_{initial}" in text.PHONES) and f"zh_{final}" in text.PHONES
        assert text.pinyin_parts(to_tone3(reading, neutral_tone_with_five=True)) == (initial, final, tone)


def test_mandarin_has_sandhi_neutral_tones_and_erhua():
    pytest.importorskip("pypinyin")
    assert text.pinyin("你好，绿色的") == ["ni2", "hao3", "lv4", "se4", "de5"]
    assert (
        text.pinyin("花儿")[-1] == "er5"
        and text.pinyin("儿子")[0] == "er2"
        and text.pinyin("女儿")[-1] == "er2"
    )
    assert text.mandarin_phones("知雨") == ["zh_zh", "zh_ii", "zh_v"]
    assert symbols("你好。", "zh") == "<zh> zh_n zh_i2 zh_h zh_ao3 ."


def test_without_pypinyin_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pypinyin", None)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[zh\]" in the checkout'):
        TOKENIZER.encode("你好", "zh")


# ---------------------------------------------------------------- tokenizers


def test_the_vocabulary_is_fixed():
    """Trained models depend on these ids: add at the end only."""
    assert TOKENIZER.vocab_size == len(set(TOKENIZER.symbols)) == 313
    assert TOKENIZER.symbols[:5] == ["<pad>", "<en>", "<zh>", "|", ","]
    assert [TOKENIZER.symbols.index(s) for s in ("a", "'", "AA0", "ZH", "zh_b", "zh_a1", "zh_ii5")] == [
        11, 37, 38, 106, 107, 128, 312,
    ]  # fmt: skip


def test_phone_labels_are_fixed():
    assert len(text.PHONES) == len(set(text.PHONES)) == 98 and text.PHONES[0] == "sil"
    assert (text.PHONES[1], text.PHONES[40], text.PHONES[61]) == ("AA", "zh_b", "zh_a")


def test_a_sentence_becomes_words_separators_and_marks():
    ids = TOKENIZER.encode("Hello, well-known cats...", "en")
    assert ids.dtype == np.int32 and ids.min() > 0
    assert " ".join(TOKENIZER.decode_symbols(ids)) == "<en> HH AH0 L OW1 , | W EH1 L | N OW1 N | K AE1 T S …"


def test_raw_and_normalised_text_give_the_same_ids():
    raw = "Dr. Who paid $3.50 in 1999 — really?!"
    np.testing.assert_array_equal(
        TOKENIZER.encode(raw, "en"), TOKENIZER.encode(text.normalize(raw, "en"), "en")
    )


def test_mixed_text_is_read_word_by_word():
    pytest.importorskip("pypinyin")
    assert symbols("We say 你好", "en") == "<en> W IY1 | S EY1 | zh_n zh_i2 zh_h zh_ao3"
    assert symbols("我爱cats", "zh") == "<zh> zh_uo3 zh_ai4 | K AE1 T S"


def test_random_spelling_follows_its_generator_and_share():
    sentence = "the cat sat on the mat and the dog ran off " * 20
    a, b = (TOKENIZER.encode(sentence, "en", 0.3, np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    words = " ".join(TOKENIZER.decode_symbols(a)[1:]).split(" | ")
    assert 0.2 < np.mean([w[0].islower() for w in words]) < 0.4
    assert symbols("cat", "en", spell_probability=1.0, rng=np.random.default_rng(0)) == "<en> c a t"
    for share, rng in ((0.5, None), (1.5, np.random.default_rng(0))):
        with pytest.raises(ValueError, match=str(share)):
            TOKENIZER.encode("cat", "en", share, rng)


def test_an_id_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="313"):
        TOKENIZER.decode_symbols([1, 313])


BASE = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def qwen_folder(path: Path, specials: list[str]) -> Path:
    """A Qwen2 tokenizer folder of the true size, with made-up pieces above the bytes."""
    alphabet = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256))]
    alphabet += [chr(256 + i) for i in range(68)]
    vocab = {piece: i for i, piece in enumerate([*alphabet, "he", "ll", "hell"])}
    vocab |= {f"<piece{i}>": i for i in range(len(vocab), 151643)}
    path.mkdir()
    (path / "vocab.json").write_text(json.dumps(vocab))
    (path / "merges.txt").write_text("#version: 0.2\nh e\nl l\nhe ll\n")
    flags = ("lstrip", "rstrip", "normalized", "single_word")
    added = {
        str(151643 + i): {"content": s, "special": True} | dict.fromkeys(flags, False)
        for i, s in enumerate(specials)
    }  # fmt: skip
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "eos_token": BASE[0],
              "pad_token": "<|endoftext|>", "unk_token": None, "bos_token": None}  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    return path


def test_the_qwen_tokenizer_gives_cosyvoice_ids_to_the_marks(tmp_path):
    tokenizer = text.QwenTokenizer(qwen_folder(tmp_path / "blank", BASE))
    ids = tokenizer.encode("hello<|endofprompt|>[breath]<|im_end|>[mn]")
    assert ids.dtype == np.int32 and tokenizer.vocab_size == 151936
    assert ids[-4:].tolist() == [151646, 151647, 151645, 151662]
    assert tokenizer.decode_symbols(ids)[:2] == ["hell", "o"]
    assert tokenizer.encode("héllo 你好 😀").max() < 259  # bytes and the made-up pieces only


def test_an_empty_line_ends_a_sentence_and_a_line_end_does_not():
    wrapped = "Listen to the\nrain falling\n\nsoftly. Sleep"
    apart = text.split_sentences(wrapped, "en", apart="sentences")
    assert apart == ["Listen to the\nrain falling.", "softly.", "Sleep."]


def test_marks_that_a_model_was_not_trained_on_are_read_as_those_it_knows():
    some, every = text.MiniTokenizer({"en": ".", "zh": ".,"}), TOKENIZER
    for known, unknown, language in (
        ("好。", "好？！", "zh"),
        ("好，好。", "好；好…", "zh"),
        ("Yes stay.", "Yes, stay!", "en"),
        ("Is it. 你好.", "Is it. 你好?", "en"),
    ):
        np.testing.assert_array_equal(some.encode(known, language), every.encode(known, language))
        np.testing.assert_array_equal(some.encode(unknown, language), every.encode(known, language))


def test_words_that_the_lexicon_does_not_know_are_named():
    assert TOKENIZER.note("Close your eyes, 3,000 times.", "en") is None
    note = TOKENIZER.note("Guten Abend, meine Damen. Guten Abend, zzt und qqx!", "en")
    assert "'Guten', 'Damen', 'zzt' ..." in note and "letter by letter" in note


def test_the_stock_qwen_folder_is_refused_with_the_reason(tmp_path):
    stock = [*BASE, "<|object_ref_start|>", "<|object_ref_end|>"]
    with pytest.raises(ValueError, match="id 151648 .* expected 151646.*CosyVoice-BlankEN"):
        text.QwenTokenizer(qwen_folder(tmp_path / "stock", stock))
    with pytest.raises(ValueError, match="no folder"):
        text.QwenTokenizer(tmp_path / "absent")


def test_single_sentences_and_clauses_are_chunks_where_a_model_was_trained_on_them():
    apart = functools.partial(text.split_sentences, longest=12, merge_below=3)
    with pytest.raises(ValueError, match="apart 'words'"):
        apart("hello", "en", apart="words")
    words = "Close your eyes, and listen to the rain. Yes, stay. It is 3,000 miles!"
    assert apart(words, "en", apart="sentences") == [
        "Close your eyes, and listen to the rain.", "Yes, stay.", "It is 3,000 miles!"
    ]  # fmt: skip
    assert apart(words, "en", apart="clauses") == [
        "Close your eyes.", "and listen to the rain.", "Yes, stay.", "It is 3,000 miles!"
    ]  # fmt: skip
    apart_at_5 = functools.partial(apart, merge_below=5, apart="clauses")
    assert apart_at_5("Come with me here, please. Good night.", "en") == [
        "Come with me here, please.", "Good night."
    ]  # fmt: skip
    assert apart_at_5("Well, come and stay with me, if you like it.", "en") == [
        "Well, come and stay with me.", "if you like it."
    ]  # fmt: skip
    assert apart("把眼睛闭上，听雨。好。", "zh", apart="sentences") == ["把眼睛闭上，听雨。", "好。"]
    chunks = apart("word " * 40, "en", apart="clauses")
    assert len(chunks) == 4 and all(text.rough_length(c) <= 13 for c in chunks)
