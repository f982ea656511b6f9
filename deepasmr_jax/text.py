"""Text of the two languages, English and Mandarin: language, normalisation, sentences, phones, tokenizers.

`normalize` turns digits and symbols into words, `split_sentences` makes chunks for one generation each, and a
tokenizer turns a chunk into `text_ids` [N] int32: `MiniTokenizer` (phones) for the built-in model,
`QwenTokenizer` for models on the 0.5 B backbone. `pinyin_parts` and `PHONES` are the one place that knows the
phone inventory.
"""

import functools
import gzip
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np

ARPABET = (
    "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"
).split()
ZH_INITIALS = "b p m f d t n l g k h j q x zh ch sh r z c s".split()
# finals of standard pinyin without tone; "v" is u-umlaut, "ii" the vowel of zhi/chi/shi/ri/zi/ci/si
ZH_FINALS = (
    "a o e ai ei ao ou an en ang eng er i ia ie iao iu ian in iang ing iong io "
    "u ua uo uai ui uan un uang ong v ve van vn ii"
).split()
# frame labels of the tokenizer's recognition loss; id 0 is silence
PHONES = ["sil", *ARPABET, *(f"zh_{p}" for p in ZH_INITIALS), *(f"zh_{p}" for p in ZH_FINALS)]

LANGUAGES = ("en", "zh")
MAX_CHARACTERS = 10_000  # of one request; a page of speech is about 2,000
TONES = "12345"  # 5 = neutral
WORD_SEPARATOR = "|"
PUNCTUATION = [",", ".", "?", "!", ";", ":", "…"]  # "…" is the long pause

_STRESSED = frozenset("AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW".split())
_CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff\u3007"  # u3007: the zero of years
_BYPASS = re.compile(r"<\|[^|<>]+\|>")


# ----------------------------------------------------------------------------- checks and language


def check(text: str, limit: int | None = MAX_CHARACTERS) -> None:
    """Refuses a text that cannot be spoken.

    Args:
        text: what a caller gave.
        limit: most characters allowed; None: any number.

    Raises:
        ValueError: not a string, empty, without any letter or digit, or longer than `limit` characters.
    """
    if not isinstance(text, str):
        raise ValueError(f"text must be a str, found {type(text).__name__}; decode bytes first")
    if not text.strip():
        raise ValueError("text is empty; give at least one word")
    if limit is not None and len(text) > limit:
        raise ValueError(
            f"text has {len(text):,} characters, the limit of one request is {limit:,}; "
            "split it into several requests"
        )
    if not any(c.isalnum() for c in text):
        raise ValueError(f"text {text[:40]!r} has only punctuation or symbols, nothing to speak; add words")


def _check_language(language: str) -> None:
    if language not in LANGUAGES:
        raise ValueError(f"language {language!r} is not supported; use one of {', '.join(LANGUAGES)}")


def detect_language(text: str) -> str:
    """ "en" or "zh", from the script of the letters.

    Mixed text is Chinese if it has at least as many Chinese characters as Latin words. Latin letters always
    count as English: other languages in Latin script are not told apart, nor is Japanese without kana from
    Chinese.

    Raises:
        ValueError: if `check` refuses the text, if a letter belongs to another script (the message names it),
            or if there is no letter at all, only digits.
    """
    check(text)
    text = unicodedata.normalize("NFKC", text)
    chinese = len(re.findall(f"[{_CJK}]", text))
    for c in text:
        if not c.isalpha() or re.match(f"[{_CJK}]", c) or c in "µμΩπ":  # symbols of science are tolerated
            continue
        script = unicodedata.name(c, "unknown").split()[0].split("-")[0]
        if script in ("HIRAGANA", "KATAKANA"):
            script = f"Japanese ({script.lower()})"
        if script not in ("LATIN", "MODIFIER", "FEMININE", "MASCULINE"):
            raise ValueError(
                f"text contains the {script.capitalize()} letter {c!r}; only English (en) and Mandarin (zh) "
                "are supported: write it in Latin letters or Chinese characters"
            )
    latin = len(re.findall(r"[^\W\d_]+", re.sub(f"[{_CJK}]", " ", text)))
    if not chinese and not latin:
        raise ValueError(
            f"text {text[:40]!r} has digits only, its language is unknown; give language='en' or 'zh'"
        )
    return "zh" if chinese >= max(latin, 1) else "en"


# ----------------------------------------------------------------------------- numbers

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
_TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()
_SCALES = [(10**12, "trillion"), (10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred")]
_IRREGULAR = {
    "one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
    "twelve": "twelfth",
}  # fmt: skip
_ZH_DIGITS = "零一二三四五六七八九"


def number_words(number: int, language: str) -> str:
    """A whole number in words, 342 -> "three hundred forty two" or "三百四十二"; from 10^15 on its digits.

    Raises:
        ValueError: on a negative number or an unknown language.
    """
    _check_language(language)
    if number < 0:
        raise ValueError(f"number {number} is negative; say the sign apart")
    if number >= 10**15:
        return _digits(str(number), language)
    return _english_number(number) if language == "en" else _chinese_number(number)


def _english_number(n: int) -> str:
    if n < 20:
        return _ONES[n]
    if n < 100:
        return _TENS[n // 10] + (f" {_ONES[n % 10]}" if n % 10 else "")
    size, name = next((s, name) for s, name in _SCALES if n >= s)
    rest = f" {_english_number(n % size)}" if n % size else ""
    return f"{_english_number(n // size)} {name}{rest}"


def _chinese_number(n: int) -> str:
    if 10 <= n < 20:
        return "十" + (_ZH_DIGITS[n % 10] if n % 10 else "")
    for size, name in ((10**12, "兆"), (10**8, "亿"), (10**4, "万"), (1000, "千"), (100, "百"), (10, "十")):
        if n >= size:
            head, rest = divmod(n, size)
            front = ("一十" if 10 <= head < 20 else "") and "十" + _ZH_DIGITS[head % 10] * (head > 10)
            words = (front or _chinese_number(head)) + name
            if not rest:
                return words
            inner = _chinese_number(rest)
            if 10 <= rest < 20:
                inner = "一" + inner  # 一百一十五
            return words + ("零" if rest < size // 10 else "") + inner
    return _ZH_DIGITS[n]


def _digits(text: str, language: str) -> str:
    names, gap = (_ONES, " ") if language == "en" else (_ZH_DIGITS, "")
    return gap.join(names[int(c)] for c in text if c.isdigit())


def _spoken(number: str, language: str) -> str:
    """Digits with optional thousands commas and decimals, in words; "007" digit by digit."""
    whole, _, fraction = number.replace(",", "").partition(".")
    whole = whole or "0"
    zeros = len(whole) > 1 and whole[0] == "0"
    words = _digits(whole, language) if zeros else number_words(int(whole), language)
    if fraction:
        words += (" point " if language == "en" else "点") + _digits(fraction, language)
    return words


def _ordinal(n: int) -> str:
    head, _, last = number_words(n, "en").rpartition(" ")
    last = _IRREGULAR.get(last) or (last[:-1] + "ieth" if last.endswith("y") else last + "th")
    return f"{head} {last}".strip()


def _year(n: int) -> str:
    if not 1100 <= n < 2100 or 2000 <= n < 2010 or n == 2000:
        return number_words(n, "en")
    rest = n % 100
    tail = "hundred" if rest == 0 else f"oh {_ONES[rest]}" if rest < 10 else _english_number(rest)
    return f"{_english_number(n // 100)} {tail}"


# ----------------------------------------------------------------------------- English normalisation

_MONTHS = ("January February March April May June July August September October November December").split()
_QUOTES = str.maketrans({**dict.fromkeys("’‘‛`´ʼ", "'"), **dict.fromkeys('“”„«»‹›"', " ")})
_FOLD = str.maketrans({"æ": "ae", "Æ": "Ae", "œ": "oe", "Œ": "Oe", "ø": "o", "Ø": "O", "ß": "ss", "đ": "d",
                       "ł": "l", "Ł": "L", "ð": "th", "þ": "th", "ı": "i"})  # fmt: skip
_SYMBOLS_EN = {
    "&": " and ", "@": " at ", "+": " plus ", "=": " equals ", "×": " times ", "÷": " divided by ",
    "±": " plus or minus ", "µ": " micro ", "μ": " micro ", "Ω": " ohms ", "π": " pi ", "°": " degrees ",
    "©": " ", "®": " ", "™": " ", "/": " ", "\\": " ", "_": " ", "*": " ", "|": " ", "~": " ", "^": " ",
    "#": " ", "<": " ", ">": " ",
}  # fmt: skip
_ABBREVIATIONS_EN = {
    "Mr": "Mister", "Mrs": "Missus", "Ms": "Miz", "Dr": "Doctor", "Prof": "Professor", "Jr": "Junior",
    "Sr": "Senior", "Capt": "Captain", "Gen": "General", "Lt": "Lieutenant", "Sgt": "Sergeant", "Mt": "Mount",
    "Ave": "Avenue", "Blvd": "Boulevard", "Rd": "Road", "Ltd": "Limited", "Inc": "Incorporated",
    "Co": "Company", "Corp": "Corporation", "vs": "versus", "etc": "et cetera", "approx": "approximately",
    "dept": "department", "Jan": "January", "Feb": "February", "Aug": "August", "Sept": "September",
    "Sep": "September", "Oct": "October", "Nov": "November", "Dec": "December",
}  # fmt: skip
_UNITS_EN = {
    "km/h": "kilometers per hour", "kmh": "kilometers per hour", "mph": "miles per hour",
    "km": "kilometers", "cm": "centimeters", "mm": "millimeters", "kg": "kilograms", "mg": "milligrams",
    "lbs": "pounds", "lb": "pounds", "oz": "ounces", "ft": "feet", "ml": "milliliters",
    "mL": "milliliters", "kHz": "kilohertz", "MHz": "megahertz", "GHz": "gigahertz", "Hz": "hertz",
    "dB": "decibels", "KB": "kilobytes", "MB": "megabytes", "GB": "gigabytes", "ms": "milliseconds",
    "min": "minutes", "hrs": "hours", "hr": "hours", "sec": "seconds", "m": "meters", "g": "grams",
    "s": "seconds",
}  # fmt: skip
_CLIPPED = r"(?:tis|twas|til|em|cause|round|bout|n)\b"  # words that begin with an apostrophe
_MONEY_EN = {"$": ("dollar", "cent"), "€": ("euro", "cent"), "£": ("pound", "penny"), "¥": ("yen", "")}
_NUM = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.?\d+"


def _plural(count: str, name: str) -> str:
    if count == "1" or name == "yen":
        return name
    return "pence" if name == "penny" else name + "s"


def _money_en(m: re.Match) -> str:
    name, small = _MONEY_EN[m[1]]
    amount, scale = m[2].replace(",", ""), (m[3] or "").strip()
    whole, _, cents = amount.partition(".")
    if scale:
        scale = {"k": "thousand", "K": "thousand", "M": "million", "B": "billion"}.get(scale, scale)
        return f"{_spoken(amount, 'en')} {scale} {_plural('2', name)}"
    words = "" if cents and not int(whole or 0) else f"{_spoken(whole, 'en')} {_plural(whole, name)}"
    if len(cents) != 2 or not small:
        return words if not cents else f"{_spoken(amount, 'en')} {_plural('2', name)}"
    if int(cents):
        words += (
            f"{' and ' if words else ''}{_spoken(str(int(cents)), 'en')} {_plural(str(int(cents)), small)}"
        )
    return words or f"zero {name}s"


def _time_en(m: re.Match) -> str:
    hour, minute, half = int(m[1]), int(m[2]), (m[3] or "").lower()
    if hour > 24 or minute > 59:
        return m[0]
    words = number_words(hour, "en")
    if minute:
        words += f" {'oh ' if minute < 10 else ''}{number_words(minute, 'en')}"
    elif not half:
        words += " o'clock" if 1 <= hour <= 12 else " hundred"
    return words + (f" {half[0]} m" if half else "")


def _date_en(year: str, month: int, day: int, fallback: str) -> str:
    if not 1 <= month <= 12 or not 1 <= day <= 31:
        return fallback
    return f"{_MONTHS[month - 1]} {_ordinal(day)}, {_year(int(year))}"


def _slash_date_en(m: re.Match) -> str:
    month, day = int(m[1]), int(m[2])
    if month > 12:
        month, day = day, month
    return _date_en(m[3], month, day, m[0])


def _fraction_en(m: re.Match) -> str:
    top, bottom = int(m[1]), int(m[2])
    if bottom in (2, 4) and top < bottom:
        name = {2: "half", 4: "quarter"}[bottom] + ("s" if top > 1 else "")
    elif 2 < bottom <= 20 and top < bottom:
        name = _ordinal(bottom) + ("s" if top > 1 else "")
    else:
        name = f"over {number_words(bottom, 'en')}"
    return f"{number_words(top, 'en')} {name}"


def _decade_en(m: re.Match) -> str:
    head, _, last = _year(int(m[1] or m[2])).rpartition(" ")
    return f"{head} {last[:-1] + 'ies' if last.endswith('y') else last + 's'}".strip()


def _clean(text: str) -> str:
    """Quotes to ASCII, emoji and invisible characters away, compatibility forms folded."""
    text = text.translate(_QUOTES).replace("…", "...").replace("½", " 1/2").replace("¼", " 1/4")
    text = (
        text.replace("¾", " 3/4").replace("\u2044", "/").replace("−", "-").replace("‐", "-").replace("‑", "-")
    )
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/")
    keep = "°©®™"  # spoken or dropped later, by name
    return "".join(
        " " if c.isspace() else c
        for c in text
        if c.isspace()
        or c in keep + "^`"
        or unicodedata.category(c) not in ("So", "Sk", "Cs", "Co", "Cn", "Cf", "Cc")
    )


def _english(text: str) -> str:
    text = re.sub(r"[\r\n]+\s*", "\n", text)
    text = re.sub(r"([^\s.,?!;:])\n", r"\1, ", text)  # a line break without a mark is a pause
    text = _clean(
        text.replace("²", " squared ").replace("³", " cubed ").replace("℃", " °C").replace("℉", " °F")
    )
    text = unicodedata.normalize("NFKD", text.translate(_FOLD))
    text = unicodedata.normalize("NFC", "".join(c for c in text if unicodedata.category(c) != "Mn"))
    text = re.sub(r"(\d)\s?[–—]\s?(?=\d)", r"\1-", text)
    text = re.sub(r"\s*(?:[–—]|--+|\s-\s)\s*", ", ", text)
    text = re.sub(r"\s*[()\[\]{}]\s*", ", ", text)
    # addresses
    text = re.sub(r"\bhttps?://(?:www\.)?|\bwww\.", "", text)
    text = re.sub(r"(?<=[A-Za-z0-9])\.(?=(?:com|org|net|io|edu|gov|co|ai|uk|de|cn)\b)", " dot ", text)
    # abbreviations
    text = re.sub(r"\b(?:[ei]\.?g\.|e\. g\.),?", "for example,", text)
    text = re.sub(r"\bi\.e\.,?", "that is,", text)
    text = re.sub(r"\b([apAP])\.\s?[mM]\.(?=\s+[A-Z]|\s*$)", r"\1 m.", text)  # also the end of a sentence
    text = re.sub(r"\b([apAP])\.\s?[mM]\.", r"\1 m", text)
    text = re.sub(r"\bNo\.\s?(?=\d)", "number ", text)
    text = re.sub(r"\bSt\.(?=\s+[A-Z])", "Saint", text)
    text = re.sub(r"\bSt\.", "Street", text)
    names = "|".join(sorted(_ABBREVIATIONS_EN, key=len, reverse=True))
    text = re.sub(rf"\b({names})\.(?=\s*$)", lambda m: _ABBREVIATIONS_EN[m[1]] + ".", text)
    text = re.sub(rf"\b({names})\.", lambda m: _ABBREVIATIONS_EN[m[1]], text)
    text = re.sub(r"\b(?:[A-Z]\.){2,}(?=\s*$)", lambda m: " ".join(m[0].split(".")).strip() + ".", text)
    text = re.sub(r"\b(?:[A-Z]\.){2,}", lambda m: " ".join(m[0].split(".")).strip(), text)
    # numbers with a meaning of their own, the most specific first
    scale = r"(\s?(?:hundred|thousand|million|billion|trillion)\b|[kKMB]\b)?"
    text = re.sub(rf"([$€£¥])\s?({_NUM}){scale}", _money_en, text)
    text = re.sub(
        r"\b(\d{4})-(\d{1,2})-(\d{1,2})\b", lambda m: _date_en(m[1], int(m[2]), int(m[3]), m[0]), text
    )
    text = re.sub(r"\b(\d{1,2})/(\d{1,2})/(\d{4})\b", _slash_date_en, text)
    text = re.sub(r"\b(\d{1,2}):(\d{2})(?:\s?([aApP])\s?[mM]\b)?", _time_en, text)
    text = re.sub(
        r"\b(\d{1,2})\s?([aApP])\s?[mM]\b", lambda m: f"{_spoken(m[1], 'en')} {m[2].lower()} m", text
    )
    text = re.sub(r"(?:\+?\b\d{1,2}[ -])?\b(?:\d{3}[ -])?\d{3}-\d{4}\b",
                  lambda m: ", ".join(_digits(p, "en") for p in re.findall(r"\d+", m[0])), text)  # fmt: skip
    months = "|".join(_MONTHS)
    text = re.sub(
        rf"\b({months}) (\d{{1,2}})(?:st|nd|rd|th)?\b(?!:)", lambda m: f"{m[1]} {_ordinal(int(m[2]))}", text
    )
    text = re.sub(
        r"\b(\d{1,3}(?:,\d{3})+|\d+)(?:st|nd|rd|th)\b", lambda m: _ordinal(int(m[1].replace(",", ""))), text
    )
    text = re.sub(r"\b(\d{3}0)s\b|\b(\d+)'s\b", _decade_en, text)
    text = re.sub(r"\b(\d+) (?=\d+/\d+\b)", r"\1 and ", text)  # 2 1/2
    text = re.sub(r"\b(\d{1,4})/(\d{1,4})\b", _fraction_en, text)
    text = re.sub(rf"({_NUM})\s?%", r"\1 percent", text)
    text = re.sub(rf"({_NUM})\s?°\s?([CF])\b",
                  lambda m: f"{m[1]} degrees {'Celsius' if m[2] == 'C' else 'Fahrenheit'}", text)  # fmt: skip
    units = "|".join(re.escape(u) for u in sorted(_UNITS_EN, key=len, reverse=True))
    text = re.sub(rf"(?<![A-Za-z])({_NUM})\s?({units})\b(?!')", _unit_en, text)
    text = re.sub(rf"({_NUM})-(?=\d)", r"\1 to ", text)
    text = re.sub(r"(?:(?<=\s)|^)-(?=\.?\d)", "minus ", text)
    text = re.sub(
        r"\d+(?:\.\d+){2,}", lambda m: f" {' point '.join(_spoken(p, 'en') for p in m[0].split('.'))} ", text
    )
    text = re.sub(r"#\s?(?=\d)", "number ", text)
    text = re.sub(r"(?<![\d.,])(1[1-9]\d\d|20\d\d)(?![\d]|[.,]\d)", lambda m: f" {_year(int(m[1]))} ", text)
    text = re.sub(_NUM, lambda m: f" {_spoken(m[0], 'en')} ", text)
    for symbol, words in _SYMBOLS_EN.items():
        text = text.replace(symbol, words)
    text = re.sub(f"[^A-Za-z{_CJK}' ,.?!;:，。？！；：、-]", " ", text)
    return _tidy(text, "...")


def _unit_en(m: re.Match) -> str:
    name = _UNITS_EN[m[2]]
    if m[1] == "1":
        first, *rest = name.split(" ", 1)
        first = "foot" if first == "feet" else first.rstrip("s") if first not in ("hertz",) else first
        name = " ".join([first, *rest])
    return f"{m[1]} {name}"


def _tidy(text: str, ellipsis: str) -> str:
    """Repeated marks to one, no marks at the head, single blanks, no blank before a mark."""
    marks = ",.?!;:，。？！；：、"
    text = re.sub(r"(?<![\w])-|-(?![\w])", " ", text)  # hyphens stay inside words only
    text = re.sub(
        rf"(?<!\w)'(?!{_CLIPPED})(\w[^']*\w)'(?!\w)", r"\1", text
    )  # quotes; 'tis and cats' keep theirs
    text = re.sub(r"(?<!\w)'(?!\w)", " ", text)
    text = re.sub(rf"\s+(?=[{marks}…])", "", re.sub(r"\s+", " ", text))
    text = re.sub(r"\.{2,}|…+|。{2,}", "…", text)
    text = re.sub(rf"[{marks}…]{{2,}}", _strongest, text).lstrip(f" {marks}…-")
    gap = "" if ellipsis == "…" else " "
    return re.sub(r"…(?=\w)", f"…{gap}", text).replace("…", ellipsis).strip()


def _strongest(m: re.Match) -> str:
    """Of a run of marks the one that shapes the sentence most."""
    for mark in "?？!！…。.;；:：,，、":
        if mark in m[0]:
            return mark
    return m[0][0]


# ----------------------------------------------------------------------------- Chinese normalisation

_SYMBOLS_ZH = {"&": "和", "@": "艾特", "+": "加", "=": "等于", "×": "乘", "÷": "除以", "±": "正负", "°": "度"}
_UNITS_ZH = {
    "km/h": "公里每小时", "km": "公里", "cm": "厘米", "mm": "毫米", "kg": "公斤", "mg": "毫克", "ml": "毫升",
    "mL": "毫升", "m": "米", "g": "克", "°C": "摄氏度", "kHz": "千赫兹", "Hz": "赫兹", "GB": "吉字节",
}  # fmt: skip
_MONEY_ZH = {"$": "美元", "€": "欧元", "£": "英镑", "¥": "元"}
_MEASURES_ZH = (
    "个|只|条|本|张|位|次|天|年|小时|分钟|秒钟|公里|米|公斤|斤|块|元|杯|件|"
    "家|句|首|双|遍|岁|周|层|种|间|辆|台|瓶|碗"
)
_TO_ZH_MARKS = str.maketrans({",": "，", "?": "？", "!": "！", ";": "；", ":": "：", "｡": "。"})


def _time_zh(m: re.Match) -> str:
    hour, minute, second = int(m[1]), int(m[2]), int(m[3] or 0)
    if hour > 24 or minute > 59 or second > 59:
        return m[0]
    words = f"{'两' if hour == 2 else _chinese_number(hour)}点"
    if minute or second:
        words += f"{'零' if 0 < minute < 10 else ''}{_chinese_number(minute)}分"
    return words + (f"{'零' if second < 10 else ''}{_chinese_number(second)}秒" if second else "")


def _chinese(text: str) -> str:
    text = text.replace("㎡", "平方米").replace("℃", "°C").replace("²", "平方").replace("³", "立方")
    text = re.sub(r"[\r\n]+", "", text) if re.search(f"[{_CJK}]", text) else text
    text = re.sub(r"\s+-\s+|[—―]+|\s*--+\s*", "，", text)
    text = _clean(text.replace("·", " "))
    text = re.sub(r"[()\[\]{}【】《》〈〉「」『』〔〕<>]", "", text)
    text = re.sub(r"\b(?:1\d{10}|0\d{2,3}-?\d{7,8}|400-?\d{3}-?\d{4})\b",
                  lambda m: _digits(m[0], "zh").replace("一", "幺"), text, flags=re.ASCII)  # fmt: skip
    num = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?"
    text = re.sub(r"(?<!\d)(\d{4})[-/](\d{1,2})[-/](\d{1,2})(?!\d)", r"\1年\2月\3日", text)
    text = re.sub(r"(?<!\d)(\d{4})(?=年)", lambda m: _digits(m[1], "zh"), text)
    text = re.sub(r"(?<!\d)(\d{1,2}):(\d{2})(?::(\d{2}))?(?!\d)", _time_zh, text)
    text = re.sub(rf"({num})\s?%?\s?[-~～]\s?(?={num})", r"\1到", text)
    text = re.sub(rf"(?:(?<=[^\w])|(?<=[{_CJK}])|^)-(?=\d)", "负", text)
    text = re.sub(rf"(负?)({num})\s?%", lambda m: f"{m[1]}百分之{_spoken(m[2], 'zh')}", text)
    text = re.sub(r"(\d+)/(\d+)", lambda m: f"{_spoken(m[2], 'zh')}分之{_spoken(m[1], 'zh')}", text)
    text = re.sub(rf"([$€£¥])\s?({num})\s?([万亿千百]*)",
                  lambda m: _spoken(m[2], "zh") + m[3] + _MONEY_ZH[m[1]], text)  # fmt: skip
    units = "|".join(re.escape(u) for u in sorted(_UNITS_ZH, key=len, reverse=True))
    text = re.sub(rf"({num})\s?({units})(?![A-Za-z])", lambda m: m[1] + _UNITS_ZH[m[2]], text)
    text = re.sub(rf"(?<![\d.第])2(?=(?:{_MEASURES_ZH}))", "两", text)
    text = re.sub(r"\d+(?:\.\d+){2,}", lambda m: "点".join(_spoken(p, "zh") for p in m[0].split(".")), text)
    text = re.sub(num, lambda m: _spoken(m[0], "zh"), text)
    for symbol, words in _SYMBOLS_ZH.items():
        text = text.replace(symbol, words)
    text = re.sub(r"\.{2,}", "…", text)
    text = re.sub(r"(?<=[A-Za-z])\.(?=[A-Za-z])", " ", text).replace(".", "。").translate(_TO_ZH_MARKS)
    text = re.sub(f"[^A-Za-z{_CJK}' ，。？！；：、…-]", " ", text)
    text = re.sub(r"(?<![A-Za-z'])\s+|\s+(?![A-Za-z'])", "", text)
    text = re.sub(r"(?<![A-Za-z])-|-(?![A-Za-z])", "", text)
    return re.sub("[，、]+$", "。", _tidy(text, "…"))


def normalize(text: str, language: str, backend: str = "own") -> str:
    """Text as it is spoken: digits, dates, money, units, abbreviations in words; emoji and quotes away.

    Applying it twice changes nothing. Text that contains a mark of the form <|...|> is returned as it is.
    English keeps its case, the marks , . ? ! ; : ... and hyphens and apostrophes inside words. Chinese gets
    full-width marks, no blanks between characters, and its trailing commas become a full stop.

    Args:
        text: at most `MAX_CHARACTERS` characters.
        language: "en" or "zh": how digits and symbols are read. Words of the other language are kept.
        backend: "own", or "wetext" to read numbers with the weighted-FST library of that name (to be
            installed by the caller) before our own clean-up. Never chosen by what is installed: the same text
            must give the same tokens.

    Raises:
        ValueError: if `check` refuses the text, nothing speakable is left, or language or backend is unknown.

    Source: clean-up of Chinese as in CosyVoice2's front-end; blanks around Latin words differ on purpose.
    """
    check(text)
    if backend not in ("own", "wetext"):
        raise ValueError(f"normaliser {backend!r} is unknown; use 'own' or 'wetext'")
    if backend == "wetext" and not _BYPASS.search(text):
        text = _wetext(text, language)
    return _normalize(text, language)


def _normalize(text: str, language: str) -> str:
    _check_language(language)
    if _BYPASS.search(text):
        return text.strip()
    spoken = _english(text) if language == "en" else _chinese(text)
    if not any(c.isalpha() or c == "〇" for c in spoken):
        raise ValueError(
            f"nothing speakable is left of text {text[:40]!r}; use Latin letters, digits or Chinese"
        )
    return spoken


def _wetext(text: str, language: str) -> str:
    try:
        import wetext
    except ImportError as error:
        raise ValueError("normaliser 'wetext' is not installed: pip install wetext, or use 'own'") from error
    return wetext.Normalizer(lang=language, operator="tn").normalize(text)


# ----------------------------------------------------------------------------- sentences

_PROTECTED = re.compile(
    r"\b(?:Mr|Mrs|Ms|Dr|Prof|Jr|Sr|St|Mt|Capt|Gen|Lt|Sgt|Ave|Blvd|vs|etc|approx|dept|Inc|Ltd|Co|Corp|No|[ei]\.?g|i\.e"
    r"|[ap]\.m|Jan|Feb|Aug|Sept?|Oct|Nov|Dec|(?:[A-Z]\.)*[A-Z])\.$"
)


def _sentences(text: str) -> list[str]:
    """Cuts after sentence marks; a period needs a following blank and no abbreviation before it."""
    pieces, start = [], 0
    for m in re.finditer(r"(?:[。？！；…]+|[.?!;:]+(?=[\s\"'”’)]|$)|：)[\"'”’)」』]*\s*", text):
        before = text[start : m.start() + 1]
        if (
            m[0].startswith(".")
            and not m[0].startswith("..")
            and m.end() < len(text)
            and _PROTECTED.search(before)
        ):
            continue
        pieces.append(text[start : m.end()].strip())
        start = m.end()
    return [p for p in (*pieces, text[start:].strip()) if p]


def _cut(piece: str, length: Callable[[str], int], longest: int, join: str) -> list[str]:
    """A sentence above `longest` in parts: at commas, else at blanks, else anywhere."""
    if length(piece) <= longest:
        return [piece]
    parts = [p.strip() for p in re.split(r"(?<=[，、])|(?<=,)(?=\s)", piece) if p.strip()]
    if len(parts) == 1:
        parts = piece.split() if " " in piece else [piece[: len(piece) // 2], piece[len(piece) // 2 :]]
    if len(parts) == 1 or min(map(len, parts)) == 0:
        return [piece]
    result = [""]
    for part in (q for p in parts for q in _cut(p, length, longest, join)):
        grown = f"{result[-1]}{join}{part}" if result[-1] else part
        if result[-1] and length(grown) > longest:
            result.append(part)
        else:
            result[-1] = grown
    return result


def rough_length(text: str) -> int:
    """Chinese characters plus Latin words plus marks: near the BPE count the split rules were made for."""
    return len(re.findall(f"[{_CJK}]|[^\\W_{_CJK}]+|[^\\w\\s]", text))


def split_sentences(
    text: str,
    language: str,
    length: Callable[[str], int] | None = None,
    longest: int = 80,
    full: int = 60,
    merge_below: int = 20,
) -> list[str]:
    """Chunks of whole sentences, each short enough for one generation: at most `longest` + `full`.

    A chunk is closed when the next sentence would take it above `longest` and it already has more than
    `full`; a last chunk below `merge_below` joins the one before. Chunks without a word are dropped, a
    missing final mark is added. A single sentence above `longest` is cut at commas, else at blanks (our
    addition).

    Args:
        text: any length; usually after `normalize`, but abbreviations, decimals and times are safe before it
            too.
        language: "en" or "zh".
        length: measures a piece; default: characters for Chinese, words and marks for English. Give the size
            of a tokenizer's result for exact limits.
        longest, full, merge_below: in units of `length`.

    Raises:
        ValueError: text empty or without words; unknown language; limits out of order.

    Source: CosyVoice2's paragraph split (80 / 60 / 20).
    """
    check(text, limit=None)
    _check_language(language)
    if not 0 <= merge_below <= full <= longest or longest < 1:
        raise ValueError(f"need merge_below <= full <= longest, found {merge_below}, {full}, {longest}")
    length = length or (len if language == "zh" else rough_length)
    join = "" if language == "zh" else " "
    chunks, current = [], ""
    for piece in (q for p in _sentences(text) for q in _cut(p, length, longest, join)):
        grown = f"{current}{join}{piece}" if current else piece
        if current and length(grown) > longest and length(current) > full:
            chunks.append(current)
            current = piece
        else:
            current = grown
    if chunks and length(current) < merge_below:
        chunks[-1] = f"{chunks[-1]}{join}{current}"
    elif current:
        chunks.append(current)
    chunks = [c for c in chunks if any(x.isalnum() for x in c)]
    chunks = [re.sub(r"[，、,]+$", "", c) if c[-1] in "，、," else c for c in chunks]
    stop = "。" if language == "zh" else "."
    return [c if c.rstrip("\"'”’)」』")[-1:] in tuple(".?!;:…。？！；：") else c + stop for c in chunks]


# ----------------------------------------------------------------------------- English pronunciation

_SIBILANTS = frozenset("S Z SH ZH CH JH".split())
_VOICELESS = frozenset("P T K F TH S SH CH".split())


@functools.cache
def lexicon() -> dict[str, str]:
    """Lower-case English word -> ARPAbet phones with stress digits, joined by blanks. Read once per process.

    Raises:
        ValueError: if the package's lexicon file is missing.

    Source: the CMU Pronouncing Dictionary; licence at the head of the file, made by data/lexicon.py.
    """
    path = Path(__file__).parent / "mini" / "lexicon_en.txt.gz"
    if not path.exists():
        raise ValueError(f"the English lexicon {path} is missing; make it with: python data/lexicon.py")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return dict(line.rstrip("\n").split(" ", 1) for line in file if not line.startswith("#"))


def pronounce(word: str) -> list[str] | None:
    """ARPAbet phones with stress digits of one English word, or None if no rule knows it.

    In order: the lexicon, capitals spelled by letter names, endings ('s, s, es, ed, ing, ly, er, est, ness,
    less, ful) on a known stem, compounds of two known words.
    """
    known = lexicon()
    lower = word.lower()
    bare = lower.strip("'")
    for key in (lower, bare):
        if key in known and not (len(bare) == 1 and key != bare):
            return known[key].split()
    if not bare:
        return None
    if word.strip("'").isupper() and len(bare) <= 6 and bare.isalpha():
        return [p for c in bare for p in ("EY1" if c == "a" else known[c]).split()]
    return _inflected(bare) or _compound(bare)


def _stem(word: str, dropped_e: bool) -> list[str] | None:
    known = lexicon()
    keys = [word]
    if dropped_e:
        keys.append(word + "e")
    if len(word) > 3 and word[-1] == word[-2]:
        keys.append(word[:-1])  # stopp-ed
    if word.endswith("i"):
        keys.append(word[:-1] + "y")  # happi-ly
    found = next((k for k in keys if k in known and len(k) > 1), None)
    return known[found].split() if found else None


def _inflected(word: str) -> list[str] | None:
    if word.endswith("'s") or word.endswith("s'") or (word.endswith("s") and not word.endswith("ss")):
        base = word[:-2] if "'" in word[-2:] else word[:-1]
        phones = pronounce(base) if "'" in word[-2:] else _stem(base, False)
        if phones is None and word.endswith("es"):
            phones = _stem(word[:-2], False)
        if phones:
            last = phones[-1]
            return phones + (["IH0", "Z"] if last in _SIBILANTS else ["S"] if last in _VOICELESS else ["Z"])
    if word.endswith("ed") and (phones := _stem(word[:-2], True)):
        last = phones[-1]
        return phones + (["IH0", "D"] if last in ("T", "D") else ["T"] if last in _VOICELESS else ["D"])
    endings = {"ing": "IH0 NG", "ly": "L IY0", "er": "ER0", "est": "AH0 S T", "ness": "N AH0 S",
               "less": "L AH0 S", "ful": "F AH0 L"}  # fmt: skip
    for ending, sound in endings.items():
        if word.endswith(ending) and (phones := _stem(word[: -len(ending)], ending in ("ing", "er", "est"))):
            return phones + sound.split()
    return None


def _compound(word: str) -> list[str] | None:
    known = lexicon()
    for cut in range(len(word) - 3, 2, -1):
        left, right = word[:cut], word[cut:]
        if left in known and right in known:
            return known[left].split() + [p.replace("1", "2") for p in known[right].split()]
    return None


# ----------------------------------------------------------------------------- Mandarin pronunciation

_TONE_MARKS = {"\u0304": "1", "\u0301": "2", "\u030c": "3", "\u0300": "4"}
_FINAL_OF = {  # spellings of syllables without an initial, and long forms of finals
    "yi": "i", "ya": "ia", "ye": "ie", "yai": "ia", "yao": "iao", "you": "iu", "yan": "ian", "yin": "in",
    "yang": "iang", "ying": "ing", "yo": "io", "yong": "iong", "wu": "u", "wa": "ua", "wo": "uo",
    "wai": "uai", "wei": "ui", "wan": "uan", "wen": "un", "wang": "uang", "weng": "ong", "wong": "ong",
    "yu": "v", "yue": "ve", "yuan": "van", "yun": "vn", "iou": "iu", "uei": "ui", "uen": "un",
    "ueng": "ong", "ê": "ei", "eh": "ei", "n": "en", "ng": "en", "m": "en", "hm": "en", "hng": "en",
}  # fmt: skip


def pinyin_parts(syllable: str) -> tuple[str, str, int]:
    """Initial, final and tone of one pinyin syllable: "zhuang1" -> ("zh", "uang", 1), "yi2" -> ("", "i", 2).

    The initial is in ZH_INITIALS or empty, the final in ZH_FINALS: "ii" is the vowel of zhi chi shi ri zi ci
    si, "v" is u-umlaut (also in ju qu xu yu). weng is ("", "ong"); the nasal interjections (m, n, ng) become
    "en".

    Args:
        syllable: tone as a digit 1..5 (5 or 0 neutral) or as an accent; no tone means 5. u-umlaut as "v", "ü"
            or "u:". An erhua r ("huar1") is dropped: in running text `pinyin` keeps it as a syllable of its
            own.

    Raises:
        ValueError: if it is not a Mandarin syllable.
    """
    text = syllable.strip().lower().replace("u:", "v")
    tone = "5"
    letters = []
    for c in unicodedata.normalize("NFD", text):
        if c in _TONE_MARKS:
            tone = _TONE_MARKS[c]
        elif c in "012345":
            tone = "5" if c == "0" else c
        else:
            letters.append(c)
    base = unicodedata.normalize("NFC", "".join(letters)).replace("ü", "v")
    if len(base) > 2 and base.endswith("r"):
        base = base[:-1]
    if base in _FINAL_OF:
        return "", _FINAL_OF[base], int(tone)
    initial = next((i for i in ("zh", "ch", "sh", *ZH_INITIALS) if base.startswith(i)), "")
    final = base[len(initial) :]
    final = _FINAL_OF.get(final, final) if final in ("iou", "uei", "uen", "ueng", "ê") else final
    if final == "i" and initial in ("zh", "ch", "sh", "r", "z", "c", "s"):
        final = "ii"
    if initial in ("j", "q", "x") and final in ("u", "ue", "uan", "un"):
        final = "v" + final[1:]
    if initial in ("n", "l") and final == "ue":
        final = "ve"
    if final not in ZH_FINALS or final == "ii" and not initial:
        raise ValueError(
            f"{syllable!r} is not a Mandarin syllable in pinyin; write for example 'zhuang1', 'lv4'"
        )
    return initial, final, int(tone)


_NOT_ERHUA_BEFORE = "女婴幼孤少胎健宠男小"
_NOT_ERHUA_AFTER = "子童女媳科歌"


def pinyin(text: str) -> list[str]:
    """One pinyin syllable with tone digit per Chinese character, such as "lv4"; 5 is the neutral tone.

    Tone sandhi is applied (third tones, 一, 不) as far as pypinyin knows it.
    Other characters are passed over (they end a phrase). The suffix of erhua is "er5".

    Raises:
        ValueError: if pypinyin is not installed, or a character has no reading.
    """
    try:
        from pypinyin import Style, lazy_pinyin
    except ImportError as error:
        raise ValueError('Mandarin needs pypinyin: pip install "deepasmr_jax[zh]"') from error
    result = []
    for run in re.findall(f"[{_CJK}]+", text):
        syllables = lazy_pinyin(
            run,
            style=Style.TONE3,
            neutral_tone_with_five=True,
            tone_sandhi=True,
            errors=lambda s: ["?"] * len(s),
        )
        for i, (c, syllable) in enumerate(zip(run, syllables, strict=True)):
            if c == "〇":
                syllable = "ling2"
            if syllable == "?":
                raise ValueError(
                    f"the character {c!r} has no pinyin reading; replace it by a common character"
                )
            follows = run[i + 1 : i + 2]
            if (
                c == "儿"
                and i
                and run[i - 1] not in _NOT_ERHUA_BEFORE
                and follows not in tuple(_NOT_ERHUA_AFTER)
            ):
                syllable = "er5"
            result.append(syllable)
    return result


def mandarin_phones(text: str) -> list[str]:
    """Initials and toneless finals of a text's Chinese characters, as labels of PHONES such as "zh_b"."""
    parts = [pinyin_parts(s)[:2] for s in pinyin(text)]
    return [f"zh_{p}" for pair in parts for p in pair if p]


# ----------------------------------------------------------------------------- tokenizers

_PIECES = re.compile(
    rf"(?P<zh>[{_CJK}]+)|(?P<en>'?[A-Za-z]+(?:'[A-Za-z]+)*'?)|(?P<mark>\.\.\.|[…,.?!;:，。？！；：、])"
)
_MARK_OF = {"...": "…", "，": ",", "。": ".", "？": "?", "！": "!", "；": ";", "：": ":", "、": ","}


class MiniTokenizer:
    """Phones of the built-in model: <en>/<zh>, then per word its phones, a separator between words, marks.

    English words are ARPAbet with stress digits; a word that `pronounce` does not know is spelled by letters.
    Chinese characters are an initial (if any) and a final with its tone. Id 0 is padding and never in a
    result.
    """

    def __init__(self) -> None:
        english = [p for a in ARPABET for p in ([f"{a}{s}" for s in "012"] if a in _STRESSED else [a])]
        finals = [f"zh_{f}{t}" for f in ZH_FINALS for t in TONES]
        self.symbols = ["<pad>", "<en>", "<zh>", WORD_SEPARATOR, *PUNCTUATION, *"abcdefghijklmnopqrstuvwxyz'",
                        *english, *(f"zh_{i}" for i in ZH_INITIALS), *finals]  # fmt: skip
        self._ids = {s: i for i, s in enumerate(self.symbols)}

    @property
    def vocab_size(self) -> int:
        """Number of ids, padding included."""
        return len(self.symbols)

    def encode(self, text: str, language: str, spell_probability: float = 0.0, rng=None) -> np.ndarray:
        """Ids of a text; it is normalised first, and mixed text is read word by word.

        Args:
            text: raw or normalised.
            language: "en" or "zh": the language mark, and how digits are read.
            spell_probability: share of English words spelled by letters although they are known, in training,
                so that letters are learned too.
            rng: numpy Generator for that; needed if the share is above 0.

        Returns:
            [N] int32, each in 1..vocab_size - 1.

        Raises:
            ValueError: text without words or with <|...|> marks, unknown language, pypinyin missing for
                Chinese, a share outside [0, 1] or without rng.
        """
        if not 0.0 <= spell_probability <= 1.0 or (spell_probability and rng is None):
            raise ValueError(
                f"spell_probability {spell_probability} must be in [0, 1], and above 0 needs an rng"
            )
        check(text, limit=None)
        if _BYPASS.search(text):
            raise ValueError(
                f"the mark {_BYPASS.search(text)[0]!r} is unknown to the built-in model; remove it"
            )
        symbols = [f"<{language}>"]
        for m in _PIECES.finditer(_normalize(text, language)):
            if m["mark"]:
                symbols.append(_MARK_OF.get(m[0], m[0]))
                continue
            if len(symbols) > 1:
                symbols.append(WORD_SEPARATOR)
            if m["zh"]:
                symbols += self._mandarin(m[0])
            else:
                spelled = bool(spell_probability) and rng.random() < spell_probability
                symbols += (None if spelled else pronounce(m[0])) or list(m[0].lower().strip("'"))
        return np.array([self._ids[s] for s in symbols], np.int32)

    def _mandarin(self, run: str) -> list[str]:
        parts = [pinyin_parts(s) for s in pinyin(run)]
        return [s for i, f, t in parts for s in (f"zh_{i}", f"zh_{f}{t}") if s != "zh_"]

    def decode_symbols(self, ids) -> list[str]:
        """Symbols of ids, padding left out, to read what the model was given.

        Raises:
            ValueError: on an id outside the vocabulary.
        """
        ids = [int(i) for i in np.asarray(ids).reshape(-1)]
        if bad := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"ids {bad[:5]} are outside the vocabulary of {self.vocab_size}")
        return [self.symbols[i] for i in ids if i]


# ids 151646..151662, in the order in which CosyVoice2 appends them after its three base marks
QWEN_MARKS = (
    "<|endofprompt|> [breath] <strong> </strong> [noise] [laughter] [cough] [clucking] [accent] "
    "[quick_breath] <laughter> </laughter> [hissing] [sigh] [vocalized-noise] [lipsmack] [mn]"
).split()
QWEN_END_OF_PROMPT = 151646
QWEN_VOCABULARY = 151936  # rows of the embedding table; ids above the marks are unused


class QwenTokenizer:
    """Byte-level BPE of Qwen2 with the marks of CosyVoice2, for models on the 0.5 B backbone.

    Args:
        folder: the tokenizer folder `CosyVoice-BlankEN` of CosyVoice2-0.5B (vocab.json, merges.txt,
            tokenizer_config.json). Read from disk only.

    Raises:
        ValueError: folder missing or unreadable, or one whose own special tokens take the ids of CosyVoice2's
            marks, as in the stock Qwen2.5 folder.

    Source: architectures of CosyVoice2: <|endofprompt|> is 151646 by a check in CosyVoice3.
    """

    def __init__(self, folder: str | Path) -> None:
        from transformers import AutoTokenizer

        if not Path(folder).is_dir():
            raise ValueError(f"{folder} is no folder; give CosyVoice2-0.5B's CosyVoice-BlankEN")
        try:
            self._bpe = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{folder} holds no Qwen2 tokenizer ({error}); give CosyVoice-BlankEN"
            ) from error
        self._bpe.add_special_tokens(
            {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *QWEN_MARKS]}
        )
        found = self._bpe.convert_tokens_to_ids(QWEN_MARKS)
        if found != list(range(QWEN_END_OF_PROMPT, QWEN_END_OF_PROMPT + len(QWEN_MARKS))):
            raise ValueError(
                f"<|endofprompt|> has id {found[0]} in {folder}, expected {QWEN_END_OF_PROMPT}: the stock "
                "Qwen2.5 tokenizer uses these ids for its own marks; give CosyVoice2-0.5B's CosyVoice-BlankEN"
            )

    @property
    def vocab_size(self) -> int:
        """Rows of the text embedding table."""
        return QWEN_VOCABULARY

    def encode(
        self, text: str, language: str | None = None, spell_probability: float = 0.0, rng=None
    ) -> np.ndarray:
        """Ids of a text, [N] int32, no begin or end mark; give normalised text.

        `language`, `spell_probability` and `rng` are ignored: bytes need neither. They are there so that both
        tokenizers can be called alike.
        """
        check(text, limit=None)
        return np.array(self._bpe.encode(text, add_special_tokens=False), np.int32)

    def decode_symbols(self, ids) -> list[str]:
        """The BPE pieces of ids."""
        return self._bpe.convert_ids_to_tokens([int(i) for i in np.asarray(ids).reshape(-1)])
