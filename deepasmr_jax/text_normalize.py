"""Text as it is spoken: digits, dates, money, units, abbreviations and symbols in words, English and Mandarin.

The rules are regular expressions in a fixed order, the most specific first; `normalize` applies them. Also
what may be spoken at all (`check`). Callers reach both as `text.normalize` and `text.check`: text.py makes
sentences, phones and ids of what is returned here.
"""

import functools
import re
import unicodedata

LANGUAGES = ("en", "zh")
MAX_CHARACTERS = 10_000  # of one request; a page of speech is about 2,000
CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff\u3007"  # u3007: the zero of years
# what reads numbers: the rules of this file alone, or the package first and then these rules
NORMALIZERS = ("own", "wetext")
BYPASS = re.compile(r"<\|[^|<>]+\|>")


# ----------------------------------------------------------------------------- checks


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


def check_language(language: str) -> None:
    """Refuses a language other than those of LANGUAGES with a ValueError."""
    if language not in LANGUAGES:
        raise ValueError(f"language {language!r} is not supported; use one of {', '.join(LANGUAGES)}")


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
    check_language(language)
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
    text = re.sub(r"[^\S\n]*\r?\n[^\S\n]*", "\n", text)
    text = re.sub(
        r"([^\s.,?!;:])\n\n+", r"\1. ", text
    )  # an empty line ends a paragraph, a line's end is a blank
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
    text = re.sub(f"[^A-Za-z{CJK}' ,.?!;:，。？！；：、-]", " ", text)
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
    # quotes; 'tis and cats' keep theirs
    text = re.sub(rf"(?<!\w)'(?!{_CLIPPED})(\w[^']*\w)'(?!\w)", r"\1", text)
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
    text = re.sub(r"[\r\n]+", "", text) if re.search(f"[{CJK}]", text) else text
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
    text = re.sub(rf"(?:(?<=[^\w])|(?<=[{CJK}])|^)-(?=\d)", "负", text)
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
    text = re.sub(f"[^A-Za-z{CJK}' ，。？！；：、…-]", " ", text)
    text = re.sub(r"(?<![A-Za-z'])\s+|\s+(?![A-Za-z'])", "", text)
    text = re.sub(r"(?<![A-Za-z])-|-(?![A-Za-z])", "", text)
    return re.sub("[，、]+$", "。", _tidy(text, "…"))


def normalize(text: str, language: str) -> str:
    """Text as it is spoken: digits, dates, money, units, abbreviations in words; emoji and quotes away.

    Applying it twice changes nothing. Text that contains a mark of the form <|...|> is returned as it is.
    English keeps its case, the marks , . ? ! ; : ... and hyphens and apostrophes inside words. Chinese gets
    full-width marks, no blanks between characters, and its trailing commas become a full stop.

    Args:
        text: at most `MAX_CHARACTERS` characters.
        language: "en" or "zh": how digits and symbols are read. Words of the other language are kept.

    Raises:
        ValueError: if `check` refuses the text, nothing speakable is left, or the language is unknown.

    Source: clean-up of Chinese as in CosyVoice2's front-end; blanks around Latin words differ on purpose.
    """
    check(text)
    return spoken_form(text, language)


@functools.cache
def wetext_normalizer(language: str):
    """The normaliser of the package wetext (weighted transducers, as CosyVoice2's front-end uses), or None without it.

    Source: https://pypi.org/project/wetext (extra `normalize`).
    """
    try:
        from wetext import Normalizer
    except ImportError:
        return None
    return Normalizer(lang=language, operator="tn")


def spoken_form(text: str, language: str, normalizer: str = "own") -> str:
    """`normalize` without a limit on the length.

    With normalizer "wetext" that package reads numbers first, where it is installed; what it leaves is read by our
    rules.
    """
    check_language(language)
    if BYPASS.search(text):
        return text.strip()
    if normalizer == "wetext" and (library := wetext_normalizer(language)) is not None:
        text = library.normalize(text)
    spoken = _english(text) if language == "en" else _chinese(text)
    if not any(c.isalpha() or c == "〇" for c in spoken):
        raise ValueError(
            f"nothing speakable is left of text {text[:40]!r}; use Latin letters, digits or Chinese"
        )
    return spoken
