"""Text as it is spoken: numbers, dates, money, units and symbols in words, in both languages."""

import functools
import sys
import types

import numpy as np
import pytest

from deepasmr_jax import text, text_normalize

ENGLISH = [
    ("Dr. Ito paid $3.50 at 3:30 p.m.", "Doctor Ito paid three dollars and fifty cents at three thirty p m."),
    ("It is 10:05 or 7:00 or 7 am.", "It is ten oh five or seven o'clock or seven a m."),
    ("May 5, 2024 and 2024-05-06", "May fifth, twenty twenty four and May sixth, twenty twenty four"),
    ("In 1905, 1500, 2005, 2010", "In nineteen oh five, fifteen hundred, two thousand five, twenty ten"),
    ("the 1990s, the 22nd and 101st", "the nineteen nineties, the twenty second and one hundred first"),
    ("12.5% of 1,234", "twelve point five percent of one thousand two hundred thirty four"),
    ("0.05", "zero point zero five"),
    ("$5 million, £1.01, €20k", "five million dollars, one pound and one penny, twenty thousand euros"),
    ("1/2 cup, 2 3/4 cups", "one half cup, two and three quarters cups"),
    ("-5 °C, 10-20 km, 1 km", "minus five degrees Celsius, ten to twenty kilometers, one kilometer"),
    ("Call 555-1234, agent 007", "Call five five five, one two three four, agent zero zero seven"),
    ("U.S. cats & dogs vs. mice, e.g. Tom", "U S cats and dogs versus mice, for example, Tom"),
    ("Main St. in St. Louis", "Main Street in Saint Louis"),
    ("I’ve “quoted” this — really… wow!!! 😀", "I've quoted this, really... wow!"),
    ("naïve Æsop (maybe) MP3", "naive Aesop, maybe, MP three"),
    ("see https://example.com", "see example dot com"),
    ("one\ntwo.\r\nthree \n\n four", "one two. three. four"),
    ("‘Hello’ 'tis cats' toys", "Hello 'tis cats' toys"),
    ("v1.2.3", "v one point two point three"),
    ("1234567890123456", "one two three four five six seven eight nine zero one two three four five six"),
]  # fmt: skip

CHINESE = [
    ("我在2024年5月6日花了¥3.50。", "我在二零二四年五月六日花了三点五零元。"),
    ("占12.5%，1/2的人", "占百分之十二点五，二分之一的人"),
    ("现在是10:05，温度-5℃", "现在是十点零五分，温度负五摄氏度"),
    ("买了2个苹果和12个梨，第2名", "买了两个苹果和十二个梨，第二名"),
    ("3~5公里", "三到五公里"),
    ("电话13812345678", "电话幺三八幺二三四五六七八"),
    ("105和1050和10050和115000", "一百零五和一千零五十和一万零五十和十一万五千"),
    ("你好 世界\n再见 - 朋友，", "你好世界再见，朋友。"),
    ("“你好”（朋友）【注】,真的.", "你好朋友注，真的。"),
    ("面积100m²", "面积一百米平方"),
    ("价格$5万，2,345人", "价格五万美元，二千三百四十五人"),
    ("我有3 apples 吗？", "我有三apples吗？"),
]


@pytest.mark.parametrize(("raw", "spoken"), ENGLISH)
def test_english_is_written_as_it_is_spoken(raw, spoken):
    assert text_normalize.normalize(raw, "en") == spoken


@pytest.mark.parametrize(("raw", "spoken"), CHINESE)
def test_chinese_is_written_as_it_is_spoken(raw, spoken):
    assert text_normalize.normalize(raw, "zh") == spoken


@pytest.mark.parametrize(
    ("raw", "language"), [(r, "en") for r, _ in ENGLISH] + [(r, "zh") for r, _ in CHINESE]
)
def test_normalising_twice_changes_nothing_more(raw, language):
    once = text_normalize.normalize(raw, language)
    assert text_normalize.normalize(once, language) == once


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_digit_and_no_foreign_symbol_survives_random_text(language):
    rng, tokenizer = np.random.default_rng(0), text.MiniTokenizer()
    alphabet = list("0123456789.,:;/-$€%'\"()[]#@&+=~ abAZé你好年月点第个“”…—😀\n°²½")
    for _ in range(400):
        raw = "a" + "".join(rng.choice(alphabet, rng.integers(1, 40)))
        spoken = text_normalize.normalize(raw, language)
        assert not any(c.isdigit() for c in spoken), (raw, spoken)
        assert not set(spoken) & set('$€%"()[]#@&+=~“”—😀°\n/'), (raw, spoken)
        tokenizer.encode(raw, language)


@pytest.fixture
def forget_wetext():
    """The package is looked for anew, before the test and after it."""
    text_normalize.wetext_normalizer.cache_clear()
    yield
    text_normalize.wetext_normalizer.cache_clear()


def qwen_note(raw: str, language: str) -> str | None:
    """Of a Qwen tokenizer that wants wetext; its folder is not looked at."""
    return text.QwenTokenizer.note(types.SimpleNamespace(normalizer="wetext"), raw, language)


def test_wetext_reads_first_and_our_rules_what_it_leaves(monkeypatch, forget_wetext):
    asked = []

    class Normalizer:
        def __init__(self, lang, operator):
            self.lang, self.operator = lang, operator

        def normalize(self, raw):
            asked.append((self.lang, self.operator, raw))
            return raw.replace("$3", "three bucks").replace("2个", "俩")

    monkeypatch.setitem(sys.modules, "wetext", types.SimpleNamespace(Normalizer=Normalizer))
    spoken = functools.partial(text_normalize.spoken_form, normalizer="wetext")
    assert spoken("Pay $3 & 5%.", "en") == "Pay three bucks and five percent."
    assert spoken("买2个，占5%。", "zh") == "买俩，占百分之五。"
    assert asked == [("en", "tn", "Pay $3 & 5%."), ("zh", "tn", "买2个，占5%。")]
    assert spoken("<|endofprompt|>$3", "en") == "<|endofprompt|>$3" and len(asked) == 2
    assert text_normalize.spoken_form("Pay $3.", "en") == "Pay three dollars." and len(asked) == 2
    assert qwen_note("$3", "en") is None


def test_without_wetext_our_rules_read_and_a_note_says_so(monkeypatch, forget_wetext):
    monkeypatch.setitem(sys.modules, "wetext", None)  # importing it fails
    assert text_normalize.spoken_form("Pay $3.", "en", "wetext") == "Pay three dollars."
    assert "pip install wetext" in qwen_note("$3", "en")


def test_the_installed_wetext_reads_numbers_in_both_languages(forget_wetext):
    pytest.importorskip("wetext")
    for raw, language, expected in (
        (
            "It costs $3.50, or 12.5%.",
            "en",
            "It costs three point five dollars, or twelve point five percent.",
        ),
        ("我在2024年5月6日花了¥3.50。", "zh", "我在二零二四年五月六日花了三点五零元。"),
    ):
        assert text_normalize.spoken_form(raw, language, "wetext") == expected


def test_text_with_control_marks_is_left_alone():
    assert text_normalize.normalize(" <|endofprompt|>3 cats ", "en") == "<|endofprompt|>3 cats"
    with pytest.raises(ValueError, match="endofprompt"):
        text.MiniTokenizer().encode("<|endofprompt|>3 cats", "en")


@pytest.mark.parametrize(
    ("number", "en", "zh"),
    [
        (0, "zero", "零"),
        (10, "ten", "十"),
        (15, "fifteen", "十五"),
        (110, "one hundred ten", "一百一十"),
        (1_001, "one thousand one", "一千零一"),
        (10_015, "ten thousand fifteen", "一万零一十五"),
        (100_000, "one hundred thousand", "十万"),
        (120_000_000, "one hundred twenty million", "一亿二千万"),
        (10**12 + 1, "one trillion one", "一兆零一"),
    ],
)
def test_numbers_in_words(number, en, zh):
    assert text_normalize.number_words(number, "en") == en
    assert text_normalize.number_words(number, "zh") == zh
