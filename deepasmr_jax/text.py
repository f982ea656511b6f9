"""Text of the two languages, English and Mandarin: language, sentences, phones, tokenizers.

`normalize` (from text_normalize.py) turns digits and symbols into words, `split_sentences` makes chunks for one
generation each, and a tokenizer turns a chunk into `text_ids` [N] int32: `MiniTokenizer` (phones) for the
built-in model, `QwenTokenizer` for models on the 0.5 B backbone. `pinyin_parts` and `PHONES` are the one place
that knows the phone inventory.
"""

import functools
import gzip
import re
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from deepasmr_jax.text_normalize import (
    BYPASS,
    CJK,
    NORMALIZERS,
    check,
    check_language,
    spoken_form,
    wetext_normalizer,
)
from deepasmr_jax.text_normalize import LANGUAGES as LANGUAGES  # these three are given on to callers
from deepasmr_jax.text_normalize import MAX_CHARACTERS as MAX_CHARACTERS
from deepasmr_jax.text_normalize import normalize as normalize

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

TONES = "12345"  # 5 = neutral
WORD_SEPARATOR = "|"
PUNCTUATION = [",", ".", "?", "!", ";", ":", "…"]  # "…" is the long pause

LEXICON = Path(__file__).parent / "mini" / "lexicon_en.txt.gz"
_STRESSED = frozenset("AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW".split())


# ----------------------------------------------------------------------------- language


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
    chinese = len(re.findall(f"[{CJK}]", text))
    for c in text:
        if not c.isalpha() or re.match(f"[{CJK}]", c) or c in "µμΩπ":  # symbols of science are tolerated
            continue
        script = unicodedata.name(c, "unknown").split()[0].split("-")[0]
        if script in ("HIRAGANA", "KATAKANA"):
            script = f"Japanese ({script.lower()})"
        if script not in ("LATIN", "MODIFIER", "FEMININE", "MASCULINE"):
            raise ValueError(
                f"text contains the {script.capitalize()} letter {c!r}; only English (en) and Mandarin (zh) "
                "are supported: write it in Latin letters or Chinese characters"
            )
    latin = len(re.findall(r"[^\W\d_]+", re.sub(f"[{CJK}]", " ", text)))
    if not chinese and not latin:
        raise ValueError(
            f"text {text[:40]!r} has digits only, its language is unknown; give the language, en or zh"
        )
    return "zh" if chinese >= max(latin, 1) else "en"


# ----------------------------------------------------------------------------- sentences

_PROTECTED = re.compile(
    r"\b(?:Mr|Mrs|Ms|Dr|Prof|Jr|Sr|St|Mt|Capt|Gen|Lt|Sgt|Ave|Blvd|vs|etc|approx|dept|Inc|Ltd|Co|Corp|No|[ei]\.?g|i\.e"
    r"|[ap]\.m|Jan|Feb|Aug|Sept?|Oct|Nov|Dec|(?:[A-Z]\.)*[A-Z])\.$"
)


def _sentences(text: str) -> list[str]:
    """Cuts after sentence marks and at empty lines; a period needs a following blank and no abbreviation before it."""
    pieces, start = [], 0
    for m in re.finditer(r"(?:[。？！；…]+|[.?!;:]+(?=[\s\"'”’)]|$)|：)[\"'”’)」』]*\s*|\n\s*\n\s*", text):
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
    parts = _clauses(piece)
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


def _clauses(sentence: str) -> list[str]:
    """The parts of a sentence between commas, each with its comma."""
    return [p.strip() for p in re.split(r"(?<=[，、])|(?<=,)(?=\s)", sentence) if p.strip()]


def rough_length(text: str) -> int:
    """Chinese characters plus Latin words plus marks: near the BPE count the split rules were made for."""
    return len(re.findall(f"[{CJK}]|[^\\W_{CJK}]+|[^\\w\\s]", text))


def split_sentences(
    text: str,
    language: str,
    length: Callable[[str], int] | None = None,
    longest: int = 80,
    full: int = 60,
    merge_below: int = 20,
    apart: str | None = None,
) -> list[str]:
    """Chunks of whole sentences, each short enough for one generation.

    At most `longest` + `full` long, with `apart` at most `longest`.

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
        longest, full, merge_below: in units of `length`; `full` counts without `apart` only.
        apart: None: several sentences may share a chunk. For a model that was trained on single sentences:
            "sentences" makes every one a chunk, "clauses" every part between commas too, but joins one below
            `merge_below` to a neighbour in its sentence; what is above `longest` is cut as above.

    Raises:
        ValueError: text empty or without words; unknown language or `apart`; limits out of order.

    Source: CosyVoice2's paragraph split (80 / 60 / 20).
    """
    check(text, limit=None)
    check_language(language)
    if apart not in (None, "sentences", "clauses"):
        raise ValueError(f"unknown apart {apart!r}; choose sentences, clauses or None")
    full = longest if apart else full
    if not 0 <= merge_below <= full <= longest or longest < 1:
        raise ValueError(f"need merge_below <= full <= longest, found {merge_below}, {full}, {longest}")
    length = length or (len if language == "zh" else rough_length)
    join = "" if language == "zh" else " "
    chunks, current = [], ""
    for sentence in _sentences(text):
        clauses = _clauses(sentence) if apart == "clauses" else [sentence]
        for number, piece in enumerate(q for p in clauses for q in _cut(p, length, longest, join)):
            grown = f"{current}{join}{piece}" if current else piece
            if apart:
                is_whole = (
                    not number
                    or min(length(current), length(piece)) >= merge_below
                    or length(grown) > longest
                )
            else:
                is_whole = length(grown) > longest and length(current) > full
            if current and is_whole:
                chunks.append(current)
                current = piece
            else:
                current = grown
    if chunks and not apart and length(current) < merge_below:
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
        ValueError: if the package's lexicon file is missing or damaged.

    Source: the CMU Pronouncing Dictionary; licence at the head of the file, made by data/lexicon.py.
    """
    try:
        with gzip.open(LEXICON, "rt", encoding="utf-8") as file:
            return dict(line.rstrip("\n").split(" ", 1) for line in file if not line.startswith("#"))
    except FileNotFoundError:
        problem = "is missing"
    except (OSError, EOFError, zlib.error, ValueError) as e:
        problem = f"is damaged ({e})"
    raise ValueError(f"the English lexicon {LEXICON} {problem}; install the package again")


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
        raise ValueError(
            'Mandarin needs pypinyin: pip install -e ".[zh]" in the checkout of deepasmr_jax'
        ) from error
    result = []
    for run in re.findall(f"[{CJK}]+", text):
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
    rf"(?P<zh>[{CJK}]+)|(?P<en>'?[A-Za-z]+(?:'[A-Za-z]+)*'?)|(?P<mark>\.\.\.|[…,.?!;:，。？！；：、])"
)
_MARK_OF = {"...": "…", "，": ",", "。": ".", "？": "?", "！": "!", "；": ";", "：": ":", "、": ","}


class MiniTokenizer:
    """Phones of the built-in model: <en>/<zh>, then per word its phones, a separator between words, marks.

    English words are ARPAbet with stress digits; a word that `pronounce` does not know is spelled by letters.
    Chinese characters are an initial (if any) and a final with its tone. Id 0 is padding and never in a
    result.

    Args:
        marks: language -> the marks that a model was trained on, where it was not all of them. Another mark is
            then read as "." after the last word and as "," before it, or not at all if "," is none of them.
    """

    def __init__(self, marks: dict[str, str] | None = None) -> None:
        self._marks = marks or {}
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
        if BYPASS.search(text):
            raise ValueError(
                f"the mark {BYPASS.search(text)[0]!r} is unknown to the built-in model; remove it"
            )
        symbols = [f"<{language}>"]
        for m in _PIECES.finditer(spoken_form(text, language)):
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
        return np.array([self._ids[s] for s in self._known(symbols, language)], np.int32)

    def heard(self, text: str, language: str) -> np.ndarray:
        """`encode` without language mark, separators and punctuation: the sounds that a recording of the text has.

        [N] int32, empty if the text has none. The table of symbols begins with those that are no sounds. Raises as
        `encode`.
        """
        ids = self.encode(text, language)
        return ids[ids > self._ids[PUNCTUATION[-1]]]

    def _known(self, symbols: list[str], language: str) -> list[str]:
        """The symbols with marks that the model knows."""
        known = self._marks.get(language)
        if known is None:
            return symbols
        last_word = max((i for i, s in enumerate(symbols) if s not in PUNCTUATION), default=0)
        result = []
        for i, s in enumerate(symbols):
            if s in PUNCTUATION and s not in known:
                s = "." if i > last_word else ","
            if s not in PUNCTUATION or (s in known and result[-1:] != [s]):
                result.append(s)
        return result

    def spoken(self, text: str, language: str) -> str:
        """The text with numbers and symbols in words, as it is encoded."""
        return spoken_form(text, language)

    def note(self, text: str, language: str) -> str | None:
        """What a user should know of how this text is read: which words the lexicon does not know; or None."""
        words = (m["en"] for m in _PIECES.finditer(spoken_form(text, language)) if m["en"])
        unknown = list(dict.fromkeys(w for w in words if pronounce(w) is None))
        if not unknown:
            return None
        shown = ", ".join(map(repr, unknown[:3])) + (" ..." if unknown[3:] else "")
        return (
            f"read letter by letter, because the English lexicon does not know it: {shown}; "
            "write it as it sounds, in known words"
        )

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
            raise ValueError(
                f"ids {bad[:5]} are outside the vocabulary of {self.vocab_size}; use the tokenizer that made them"
            )
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
        normalizer: what reads numbers and symbols, one of `text_normalize.NORMALIZERS`.

    Raises:
        ValueError: folder missing or unreadable, or one whose own special tokens take the ids of CosyVoice2's
            marks, as in the stock Qwen2.5 folder.

    Source: architectures of CosyVoice2: <|endofprompt|> is 151646 by a check in CosyVoice3.
    """

    def __init__(self, folder: str | Path, normalizer: str = "own") -> None:
        from transformers import AutoTokenizer

        if normalizer not in NORMALIZERS:
            raise ValueError(f"normalizer {normalizer!r} is unknown; use one of {', '.join(NORMALIZERS)}")
        self.normalizer = normalizer

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
        """Ids of a text as `spoken` gives it, [N] int32, no begin or end mark.

        `spell_probability` and `rng` are ignored: bytes need neither. They are there so that both tokenizers
        can be called alike.
        """
        check(text, limit=None)
        spoken = self.spoken(text, language or detect_language(text))
        return np.array(self._bpe.encode(spoken, add_special_tokens=False), np.int32)

    def spoken(self, text: str, language: str) -> str:
        """The text with numbers and symbols in words, as it is encoded."""
        return spoken_form(text, language, self.normalizer)

    def note(self, text: str, language: str) -> str | None:
        """What a user should know of how this text is read, or None."""
        if self.normalizer == "wetext" and wetext_normalizer(language) is None:
            return "numbers are read by built-in rules, wetext is not installed: pip install wetext"
        return None

    def decode_symbols(self, ids) -> list[str]:
        """The BPE pieces of ids."""
        return self._bpe.convert_ids_to_tokens([int(i) for i in np.asarray(ids).reshape(-1)])
