"""Which recordings belong into an ASMR speech corpus: topics and the keywords of titles and tags that show them.

The paper keeps nine topics and leaves out eating and ear-spa, which are sounds and little speech. It was not at hand
with its own word lists: names and keywords here are this project's, and another list is one JSON file (`read`).
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from deepasmr_jax import request


@dataclasses.dataclass(frozen=True)
class Topics:
    """Topic -> keywords, of those that are kept and those that are not.

    A keyword of Latin letters matches whole words in any case, also with an ending -s, -es or -ing; one with Chinese
    characters matches anywhere.
    """

    kept: Mapping[str, Sequence[str]]
    excluded: Mapping[str, Sequence[str]]


def _words(*lists: str) -> tuple[str, ...]:
    return tuple(word.strip() for line in lists for word in line.split(","))


BUILT_IN = Topics(
    kept={
        "sleep": _words(
            "sleep, insomnia, bedtime, tuck you in, lullaby, goodnight",
            "助眠, 哄睡, 睡前, 晚安, 失眠",
        ),
        "meditation": _words(
            "meditation, meditate, hypnosis, reiki, body scan, breathing exercise",
            "冥想, 催眠, 呼吸练习, 正念",
        ),
        "personal_attention": _words(
            "personal attention, massage, hair, haircut, makeup, skincare, facial, spa treatment",
            "按摩, 化妆, 护肤, 梳头, 理发, 洗头",
        ),
        "role_play": _words(
            "role play, roleplay, rp, doctor, cranial nerve exam, teacher, nurse, girlfriend, boyfriend",
            "角色扮演, 情景剧, 医生, 女友, 男友",
        ),
        "reading": _words(
            "read, story, stories, storytelling, book, poem, poetry, fairy tale",
            "故事, 读书, 朗读, 念诗, 童话",
        ),
        "talk": _words(
            "ramble, chat, chatting, q&a, whispered talk, soft spoken, life update",
            "闲聊, 聊天, 碎碎念, 耳语",
        ),
        "comfort": _words(
            "affirmation, comfort, reassurance, anxiety, stress relief, you are safe",
            "安慰, 陪伴, 鼓励, 治愈, 减压, 焦虑",
        ),
        "trigger_words": _words(
            "trigger word, repeating, counting, inaudible, unintelligible, tongue twister, alphabet",
            "触发词, 数数, 口播, 绕口令",
        ),
        "show_and_tell": _words(
            "show and tell, haul, unboxing, review, collection, tutorial, drawing, painting",
            "开箱, 分享, 测评, 教程, 画画",
        ),
    },
    excluded={
        "eating": _words(
            "eat, mukbang, chew, crunchy, food",
            "吃播, 吃东西, 咀嚼, 进食, 美食",
        ),
        "ear_spa": _words(
            "ear spa, ear clean, ear massage, ear pick, ear lick, ear eat, ear attention, earwax",
            "采耳, 掏耳, 挖耳, 耳搔, 舔耳, 耳部, 耳朵",
        ),
    },
)


def read(path: str | Path) -> Topics:
    """Topics of a JSON file: {"kept": {topic: [keyword, ...]}, "excluded": {...}}.

    Raises:
        ValueError: if the file is not of this form or keeps no topic.
    """
    try:
        both = json.loads(request.read_text(path))
        lists = {
            part: {str(k): tuple(v) for k, v in both.get(part, {}).items()} for part in ("kept", "excluded")
        }
        if not all(isinstance(w, str) and w for part in lists.values() for ws in part.values() for w in ws):
            raise TypeError("a keyword is empty or no string")
    except (ValueError, TypeError, AttributeError) as e:
        raise ValueError(
            f'{path} is no list of topics ({e}); write {{"kept": {{"topic": ["keyword"]}}, "excluded": {{...}}}}'
        ) from None
    if not lists["kept"]:
        raise ValueError(f'{path} keeps no topic; name some under "kept"')
    return Topics(**lists)


def classify(texts: Sequence[str], topics: Topics = BUILT_IN) -> tuple[str, str, bool]:
    """(topic, the keyword that shows it, whether it is kept) of a recording by its title and tags.

    A topic that is left out wins over any that is kept. Of several kept ones the one with most keywords wins, then
    the first. ("", "", False) if no keyword occurs.
    """
    text = " \n ".join(texts).casefold()
    for is_kept, lists in ((False, topics.excluded), (True, topics.kept)):
        found = {topic: [w for w in words if _occurs(w.casefold(), text)] for topic, words in lists.items()}
        best = max(found, key=lambda topic: len(found[topic]), default=None)
        if best is not None and found[best]:
            return best, found[best][0], is_kept
    return "", "", False


def _occurs(keyword: str, text: str) -> bool:
    if not keyword.isascii():
        return keyword in text
    return re.search(rf"(?<![a-z0-9]){re.escape(keyword)}(s|es|ing)?(?![a-z0-9])", text) is not None
