"""Sentences of the synthetic corpus, three kinds in two languages, and the split of each by a hash of it.

"matrix": closed-set sentences, five slots of ten words (10^5 a language), for judges with a grammar. "asmr":
own templates in the manner of spoken relaxation. "open": short word strings in simple frames, drawn from the
commoner words of the CMU pronouncing dictionary (English; the pocketsphinx wheel carries the dictionary and
the unigram model that ranks it) and from pypinyin's phrase table (Mandarin; half of the draws favour rare
syllables).

A sentence belongs to one split for ever: `split_of` hashes its normalised text, so no held-out set can share
a sentence with training, whatever is drawn. Everything here is deterministic.
"""

import functools
import hashlib
import random
import re

KINDS = ("matrix", "asmr", "open")

# name, verb, number, adjective, noun
MATRIX_EN = (
    ("alan", "barry", "hannah", "kathy", "lucy", "nina", "peter", "rachel", "steven", "william"),
    ("bought", "gives", "got", "has", "kept", "ordered", "prefers", "sees", "sold", "wants"),
    ("two", "three", "four", "five", "six", "seven", "eight", "nine", "twelve", "twenty"),
    ("big", "cheap", "green", "heavy", "large", "old", "pretty", "red", "thin", "yellow"),
    ("beds", "chairs", "desks", "flowers", "houses", "mugs", "rings", "ships", "spoons", "toys"),
)
# name, verb, number, measure word, noun; written without spaces
MATRIX_ZH = (
    ("小明", "王红", "李强", "张丽", "陈刚", "刘洋", "周杰", "赵云", "孙悦", "何梅"),
    ("买了", "看见", "拿走", "送来", "想要", "卖掉", "找到", "留下", "带着", "弄丢"),
    ("一", "两", "三", "四", "五", "六", "七", "八", "九", "十"),
    ("个", "张", "本", "条", "件", "把", "块", "杯", "盒", "包"),
    ("桌子", "苹果", "书签", "毛巾", "雨伞", "铅笔", "蛋糕", "茶叶", "手机", "香皂"),
)

# ---------------------------------------------------------------- English: ASMR-like templates

_EN_SLOTS = {
    "calm": "calm quiet gentle soft slow peaceful tender warm drowsy still mellow soothing cozy light easy "
    "patient serene mild hushed delicate",
    "object": "brush|soft brush|wooden comb|silk scarf|feather|glass jar|paper bag|velvet cloth|little bell|"
    "tea cup|bar of soap|makeup sponge|cotton pad|old book|leather glove|candle|pine cone|seashell|"
    "rain stick|typewriter|metal tray|cork board|bottle of oil|pencil|zipper|hair clip|towel|spray bottle|"
    "wooden box|bubble wrap|singing bowl|tuning fork|pillow|blanket|crystal|marble|sponge|fan|key ring|"
    "sheet of foil|deck of cards|jar of beads|hourglass|notebook|fountain pen|bamboo whisk|music box",
    "place": "forest|beach|garden|cabin|library|bakery|meadow|train|greenhouse|harbor|attic|spa|bookshop|"
    "kitchen|mountain lodge|lake house|tea room|barber shop|cottage|observatory|tent|castle|orchard|"
    "hammock|cave|lighthouse|museum|studio|balcony|barn",
    "body": "shoulders|neck|forehead|jaw|hands|fingers|eyelids|scalp|temples|feet|toes|cheeks|back|arms|"
    "knees|ankles|wrists|spine|chest|hips|elbows|ears|brow|lips|legs",
    "nature": "rain|wind|river|ocean waves|falling snow|birds|crickets|fireplace|leaves|thunder far away|"
    "frogs|stream|fountain|wheat field|owls|waterfall|campfire|pine trees|dripping water|moonlight|"
    "clouds|stars|bees|tide|hail on the roof",
    "verb": "tap|brush|scratch|stroke|trace|squeeze|shake|open|close|touch|rub|fold|turn|hold|lift|press|"
    "smooth|unwrap|polish|roll|spin|crinkle|stir|wipe|inspect",
    "gerund": "tapping|brushing|scratching|stroking|tracing|squeezing|shaking|opening|whispering to|touching|"
    "rubbing|folding|turning|holding|polishing|rolling|crinkling|stirring|wiping|dusting|measuring|painting",
    "adverb": "slowly|gently|softly|quietly|carefully|lightly|smoothly|patiently|tenderly|calmly|lazily|"
    "warmly|deeply|freely|steadily|kindly|gradually|sweetly|evenly|loosely",
    "time": "tonight|this evening|right now|for a while|one more time|before bed|after a long day|"
    "this morning|in a moment|at midnight|all night|today|for a minute|once again|until you sleep|"
    "on this rainy day|by the window|while you rest|as the sun goes down|in the dark",
    "feel": "relaxed|sleepy|safe|tingly|comfortable|weightless|at ease|loved|cared for|rested|drowsy|free|"
    "warm|cozy|grateful|content|floating|balanced|refreshed|clear",
    "person": "my friend|darling|dear|sweetheart|sleepy head|traveler|little one|everyone|"
    "my dear guest|buddy",
    "drink": "chamomile tea|warm milk|hot cocoa|green tea|lemon water|honey tea|jasmine tea|spiced cider|"
    "peppermint tea|a little broth|ginger tea|vanilla milk",
    "color": "blue|golden|violet|silver|amber|rose|emerald|ivory|copper|lavender|turquoise|"
    "peach|gray|crimson",
    "thing": "worries|thoughts|troubles|plans|chores|doubts|deadlines|messages|noises|tensions|questions|"
    "fears|lists|memories|schedules|problems",
    "count": "two three four five six seven eight nine ten",
    "job": "hairdresser|doctor|librarian|painter|tailor|gardener|baker|pharmacist|teacher|watchmaker|florist|"
    "cartographer|shopkeeper|nurse|jeweler|potter|optician|receptionist|astronomer|herbalist",
}
_EN_TEMPLATES = """
just close your eyes and listen to the {nature}
let your {body} become {calm} and heavy
i am going to {verb} this {object} very {adverb}
can you hear me {gerund} the {object} {time}
take a {calm} breath in and let it go {adverb}
welcome back {person} let us get you {feel} {time}
breathe in for {count} and breathe out for {count}
i brought you some {drink} and a {object}
imagine a {calm} {place} near the {nature}
there is no need to hurry {time}
you are doing so well {person}
feel the {color} light on your {body}
let me {verb} your {body} {adverb} {time}
your {thing} can wait until tomorrow
now i will {verb} the {object} right beside your ear
this {object} makes such a {calm} sound
hello {person} i will be your {job} {time}
let all of your {thing} drift away like {nature}
the {place} is {calm} and {color} {time}
relax your {body} then your {body}
you feel {feel} and completely {feel}
here is a {color} {object} from the {place}
look {adverb} at the {color} {object}
i keep a {object} for {calm} moments like this
tell me if the {gerund} is too loud for you
we can sit in the {place} and sip {drink}
first your {body} and now your {body}
follow the {color} light with your eyes {adverb}
sink {adverb} into your {calm} pillow
the {nature} will keep you company {time}
i found this {object} in an old {place}
let me put this {object} on your {body}
it is time to rest your {body} {person}
do you like the sound of the {object}
stay with me {person} and feel {feel}
a {calm} whisper from the {place}
the {job} will {verb} your {body} with a {object}
now the other side {adverb} {gerund} your {body}
picture {color} clouds above the {place}
thank you for visiting the {place} {time}
notice the {nature} and forget your {thing}
every breath makes your {body} more {calm}
good night {person} sleep {adverb}
i love the {gerund} of this {calm} {object}
""".strip().splitlines()

# ---------------------------------------------------------------- English: open vocabulary

_EN_FRAMES = """
the {w} was {w} and {w}
we {w} a {w} near the {w}
{w} and {w} came with the {w}
she said {w} before {w}
every {w} has a {w}
my {w} is {w} {w}
please bring the {w} {w} to the {w}
{w} {w} {w} {w}
{w} {w} {w} {w} {w}
{w} {w} {w} {w} {w} {w}
it was a {w} {w} of {w}
they found {w} under the {w} {w}
do you remember the {w} {w}
i heard about {w} and {w} {w}
when the {w} stopped he {w} the {w}
no {w} without {w}
this {w} needs more {w} than {w}
a {w} {w} on the {w}
her {w} looked {w} in the {w}
both {w} and {w} are {w} now
could we try {w} or {w}
our {w} {w} again at {w}
not {w} but {w}
after {w} the {w} seemed {w}
some {w} {w} for the {w} {w}
""".strip().splitlines()
_EN_BLOCKED = re.compile(
    "porn|sex|fuck|shit|bitch|nazi|rape|cunt|dick|slut|whore|nigg|fag|kill|murder|suicid|terror|hitler|penis|"
    "vagin|cock|nude|drug|gun|damn|hell$|bastard|jew|muslim|arab|islam|isis|incest|genocid|abus|tits|boob|crap"
)


@functools.cache
def words_en(count: int = 12000) -> tuple[str, ...]:
    """The `count` commonest dictionary words of 2 to 11 letters, most common first.

    Ranked by the unigram model of the pocketsphinx wheel (en-us). Initialisms (no vowel letter), a short list
    of unpleasant words and words with more than one pronunciation are left out.

    Raises:
        ModuleNotFoundError: without pocketsphinx (`pip install pocketsphinx`).
    """
    import pocketsphinx

    folder = f"{pocketsphinx.get_model_path()}/en-us"
    words, ambiguous = set(), set()
    with open(f"{folder}/cmudict-en-us.dict", encoding="utf-8") as lines:
        for line in lines:
            word = line.split()[0]
            if "(" in word:
                ambiguous.add(word.split("(")[0])
            elif re.fullmatch("[a-z]{2,11}", word) and re.search("[aeiouy]", word):
                words.add(word)
    words = [w for w in words - ambiguous if not _EN_BLOCKED.search(w)]
    model = pocketsphinx.NGramModel(pocketsphinx.Config(), pocketsphinx.LogMath(), f"{folder}/en-us.lm.bin")
    return tuple(sorted(words, key=lambda w: (-model.prob([w]), w))[:count])


# ---------------------------------------------------------------- Mandarin

_ZH_SLOTS = {
    "calm": "安静 温柔 缓慢 轻柔 平静 舒服 柔软 温暖 宁静 放松 清凉 细腻",
    "object": "刷子 木梳 丝巾 羽毛 玻璃瓶 纸袋 铃铛 茶杯 肥皂 旧书 蜡烛 贝壳 毛毯 枕头 铅笔 海绵 钥匙 扇子 "
    "水晶 毛线 竹筷 瓷碗 雨伞 布娃娃 音乐盒 木鱼 沙漏 棉签 化妆棉 气泡纸",
    "place": "森林 海边 花园 木屋 图书馆 面包店 草地 茶馆 书店 厨房 湖边 山谷 帐篷 果园 阳台 小巷 "
    "竹林 温泉 寺庙 画室",
    "body": "肩膀 脖子 额头 下巴 双手 手指 眼皮 头皮 双脚 脚趾 脸颊 后背 膝盖 "
    "手腕 胸口 耳朵 嘴唇 眉毛 腰部 大腿",
    "nature": "雨声 风声 流水 海浪 落雪 鸟叫 虫鸣 炉火 树叶 远处的雷声 蛙声 小溪 喷泉 "
    "麦田 瀑布 松林 月光 白云 星空 潮汐",
    "verb": "敲一敲 刷一刷 摸一摸 摇一摇 捏一捏 擦一擦 挠一挠 按一按 拍一拍 翻一翻 滚一滚 吹一吹",
    "time": "今晚 现在 今天晚上 睡觉以前 这个下午 下雨的时候 深夜里 每天早晨 黄昏时分 忙完以后",
    "feel": "放松 困倦 安全 舒适 轻盈 自在 满足 温暖 踏实 清爽",
    "person": "朋友 亲爱的 宝贝 小懒虫 各位 客人 旅行者 同学",
    "drink": "菊花茶 热牛奶 热可可 绿茶 柠檬水 蜂蜜水 茉莉花茶 姜茶 酸梅汤 豆浆",
    "color": "蓝色 金色 紫色 银色 琥珀色 粉红色 翠绿色 白色 橙色 灰色",
    "thing": "烦恼 心事 压力 计划 疲劳 疑问 工作 噪音 回忆 忧愁",
    "count": "二 三 四 五 六 七 八 九 十",
    "job": "理发师 医生 图书管理员 画家 裁缝 园丁 面包师 药剂师 老师 钟表匠 花店老板 护士",
}
_ZH_TEMPLATES = """
闭上眼睛，听一听{nature}
让你的{body}慢慢放松
我用{object}轻轻地{verb}
你听见{object}的声音了吗
深深地吸气，再{calm}地呼气
{person}，{time}好好休息吧
吸气数到{count}，呼气数到{count}
我给你准备了{drink}和{object}
想象一个{calm}的{place}
不用着急，{time}只要{feel}就好
你做得很好，{person}
感觉{color}的光照在{body}上
我来{verb}你的{body}
{thing}可以留到明天再说
现在我在你耳边{verb}这个{object}
这个{object}的声音很{calm}
你好，{person}，我是你的{job}
让所有的{thing}都随着{nature}飘走
{place}里又{calm}又{feel}
先放松{body}，再放松{body}
{time}，你会觉得很{feel}
这是从{place}带来的{color}{object}
请看着{color}的{object}
我们坐在{place}，喝一点{drink}
晚安，{person}，做个{calm}的梦
{nature}会一直陪着你
我在{place}找到了这个{object}
把{object}放在你的{body}旁边
{person}，该让{body}休息了
你喜欢{nature}还是{nature}
每一次呼吸都让{body}更{feel}
{job}轻轻地碰了碰你的{body}
忘掉{thing}，只听{nature}
{color}的云飘过{place}
""".strip().splitlines()
_ZH_FRAMES = """
{w}和{w}
他说{w}很{w}
我们{w}，他们{w}
{w}的{w}
没有{w}就没有{w}
这里的{w}比{w}多
她在{w}看{w}
{w}，{w}
{w}、{w}、{w}
你知道{w}吗
因为{w}，所以{w}
{w}也是一种{w}
昨天的{w}让我{w}
不要{w}，要{w}
从{w}到{w}
请把{w}写在{w}上
{w}以后再{w}
谁的{w}更{w}
""".strip().splitlines()
_ZH_BLOCKED = re.compile("[死杀奸淫尸毒血妓嫖屎尿屁贼党军枪炮战刑葬鬼癌辱暴]")
# espeak-ng's pinyin reader has no entry for these (it spells them in English): see synthetic_voice.py
_ZH_UNSPEAKABLE = {
    "jiong",
    "qiong",
    "xiong",
    "weng",
    "yo",
    "o",
    "lo",
    "ei",
    "ng",
    "m",
    "n",
    "hm",
    "hng",
    "fiao",
}


def syllables_zh(text: str) -> list[str]:
    """Pinyin syllables of a Mandarin text as spoken, with tone digit 1 to 5 and "v" for u-umlaut.

    Tone changes of yi, bu and third tones are applied as far as pypinyin knows them.
    Punctuation stands as "," between syllables.
    """
    from pypinyin import Style, lazy_pinyin

    text = re.sub("[，。、！？,.!?；：]+", ",", text).strip(",")
    parts = lazy_pinyin(
        text, style=Style.TONE3, neutral_tone_with_five=True, tone_sandhi=True, v_to_u=False,
        errors=lambda s: list(s),
    )  # fmt: skip
    return [p for p in parts if p.strip()]


def _are_speakable(syllables):
    return bool(syllables) and all(
        re.fullmatch("[a-zv]+[1-5]", s) and s[:-1] not in _ZH_UNSPEAKABLE for s in syllables
    )


def is_speakable_zh(text: str) -> bool:
    """Whether every syllable of the text is one that the Mandarin engine reads from pinyin."""
    return _are_speakable([s for s in syllables_zh(text) if s != ","])


@functools.cache
def _phrases_zh() -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Phrases of two to four common characters (GB 2312 level 1), and the same by toneless syllable."""
    from pypinyin.phrases_dict import phrases_dict

    def is_common(char):
        try:
            code = char.encode("gb2312")
        except UnicodeEncodeError:
            return False
        return len(code) == 2 and 0xB0 <= code[0] <= 0xD7

    phrases, by_syllable = [], {}
    for phrase in sorted(phrases_dict):
        if not (2 <= len(phrase) <= 4 and all(map(is_common, phrase))) or _ZH_BLOCKED.search(phrase):
            continue
        syllables = syllables_zh(phrase)
        if not _are_speakable(syllables):
            continue
        phrases.append(phrase)
        for syllable in set(syllables):
            by_syllable.setdefault(syllable[:-1], []).append(phrase)
    # four-character idioms are half of the table and archaic in wording: keep every third of them
    phrases = [p for i, p in enumerate(phrases) if len(p) < 4 or i % 3 == 0]
    return tuple(phrases), {k: tuple(v) for k, v in sorted(by_syllable.items())}


# ---------------------------------------------------------------- drawing


def normalize(text: str) -> str:
    """Lower case, letters and characters only: the form that is hashed and counted as one sentence."""
    return " ".join(re.findall(r"[a-z']+|[一-鿿]", text.lower()))


def split_of(text: str, language: str) -> str:
    """The split a sentence belongs to for ever: "train" (87 %), "valid", "test" or "hts" (English only)."""
    digest = hashlib.sha256(f"{language}:{normalize(text)}".encode()).digest()
    u = int.from_bytes(digest[:8], "big") / 2**64
    if u < 0.06:
        return "test"
    if u < 0.10:
        return "valid"
    if u < 0.13 and language == "en":
        return "hts"
    return "train"


def _fill(template, slots, rng):
    used = set()

    def pick(match):
        choices = slots[match.group(1)]
        word = rng.choice(choices)
        while word in used and len(choices) > 1:
            word = rng.choice(choices)
        used.add(word)
        return word

    return re.sub(r"\{(\w+)\}", pick, template)


@functools.cache
def _slots(language):
    table = _EN_SLOTS if language == "en" else _ZH_SLOTS
    return {k: v.split("|") if "|" in v else v.split() for k, v in table.items()}


def draw(language: str, kind: str, rng: random.Random) -> str:
    """One random sentence, ready to be read: capital and full stop in English, characters in Mandarin.

    Args:
        language: "en" or "zh".
        kind: one of `KINDS`.
        rng: the only source of randomness.

    Raises:
        ValueError: on an unknown language or kind.
    """
    if language not in ("en", "zh") or kind not in KINDS:
        raise ValueError(f"no sentences of kind {kind!r} in {language!r}; kinds {KINDS}, languages en and zh")
    if kind == "matrix":
        slots = MATRIX_EN if language == "en" else MATRIX_ZH
        words = [rng.choice(s) for s in slots]
        text = " ".join(words) if language == "en" else "".join(words)
    elif kind == "asmr":
        templates = _EN_TEMPLATES if language == "en" else _ZH_TEMPLATES
        text = _fill(rng.choice(templates), _slots(language), rng)
        text = re.sub(r"\ba (?=[aeio])", "an ", text)
    elif language == "en":
        vocabulary = words_en()

        def word():  # a third from the commonest 2,000, the rest from the whole list
            return vocabulary[rng.randrange(2000 if rng.random() < 0.33 else len(vocabulary))]

        text = re.sub(r"\{w\}", lambda _: word(), rng.choice(_EN_FRAMES))
        text = re.sub(r"\ba (?=[aeio])", "an ", text)
    else:
        phrases, by_syllable = _phrases_zh()
        syllables = list(by_syllable)

        def word():
            if rng.random() < 0.5:
                return rng.choice(phrases)
            options = [p for p in by_syllable[rng.choice(syllables)] if len(p) < 4]
            return rng.choice(options) if options else rng.choice(phrases)

        text = re.sub(r"\{w\}", lambda _: word(), rng.choice(_ZH_FRAMES))
    return text[0].upper() + text[1:] + "." if language == "en" else text + "。"


def sentences(
    language: str, counts: dict[str, dict[str, int]], seed: int = 0
) -> dict[str, list[tuple[str, str]]]:
    """Distinct sentences for every split.

    Args:
        language: "en" or "zh".
        counts: split -> kind -> how many sentences.
        seed: of the draw.

    Returns:
        split -> list of (kind, text), all distinct within and across splits; in every prefix of a
        list each kind has about its share.

    Raises:
        ValueError: if a kind cannot give that many distinct sentences.
    """
    result = {split: [] for split in counts}
    for kind in KINDS:
        missing = {split: c.get(kind, 0) for split, c in counts.items() if c.get(kind, 0)}
        rng = random.Random(f"{seed}-{language}-{kind}")
        seen, tries, limit = set(), 0, 2000 + 60 * max(missing.values(), default=0) * max(len(missing), 1)
        while missing:
            tries += 1
            if tries > limit:
                raise ValueError(f"{kind} sentences in {language!r} ran out: {missing} more are wanted")
            text = draw(language, kind, rng)
            key, split = normalize(text), split_of(text, language)
            if key in seen or split not in missing:
                continue
            if language == "zh" and not is_speakable_zh(text):
                continue
            seen.add(key)
            result[split].append((kind, text))
            missing[split] -= 1
            if not missing[split]:
                del missing[split]
    for split, items in result.items():
        total = {kind: sum(k == kind for k, _ in items) for kind in KINDS}
        position = dict.fromkeys(KINDS, 0)

        def rank(item, total=total, position=position):
            position[item[0]] += 1
            return (position[item[0]] - 0.5) / total[item[0]]

        order = [rank(item) for item in items]
        result[split] = [items[i] for i in sorted(range(len(items)), key=lambda i: (order[i], i))]
    return result
