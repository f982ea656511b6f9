"""Text of the two languages: normalisation, sentence splitting, phones, tokenizers (work in progress)."""

ARPABET = (
    "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"
).split()
ZH_INITIALS = "b p m f d t n l g k h j q x zh ch sh r z c s".split()
# finals of standard pinyin without tone; "v" stands for u-umlaut, "ii" for the vowel of zhi/chi/shi/ri/zi/ci/si
ZH_FINALS = (
    "a o e ai ei ao ou an en ang eng er i ia ie iao iu ian in iang ing iong io "
    "u ua uo uai ui uan un uang ong v ve van vn ii"
).split()
# frame labels of the tokenizer's recognition loss; id 0 is silence
PHONES = ["sil", *ARPABET, *(f"zh_{p}" for p in ZH_INITIALS), *(f"zh_{p}" for p in ZH_FINALS)]
