"""Picks the built-in model's pool recordings and demo clips out of the synthetic corpus.

    python data/mini_assets.py pool --data CORPUS/1.0.0 --out WORK/pool_sources
    python data/mini_assets.py demo --data CORPUS/1.0.0 --out MODEL/demo

`pool` writes one ordinary sentence of each of 50 training voices (32 English, 18 Mandarin) and one whispered sentence
per language (asmr_en, asmr_zh), as wavs with a manifest for `deepasmr pool build`; that synthesises the ASMR half with
our own model.
`demo` writes clips of two voices that training never heard, the festival engine (English) and a held-out espeak voice
(Mandarin), both styles, with demo.json. All of it is synthetic speech.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from deepasmr_jax import audio, input_pipeline  # noqa: E402

SAMPLE_RATE = input_pipeline.SAMPLE_RATE
FIELDS = ("pair_id", "audio", "text", "language", "speaker", "style", "kind", "engine")
POOL_SIZE = {"en": 32, "zh": 18}  # 50, as in the paper
POOL_SECONDS = (2.0, 4.0)  # short prompts leak no words into the output
DEMO_SECONDS = (2.6, 5.0)
SENTENCES = {
    "en": ["Close your eyes, and listen to the rain.", "Lucy wants seven green chairs."],
    "zh": ["把眼睛闭上。", "慢慢地呼吸，让身体放松下来。"],
}


def read_pairs(data: str, split: str) -> list[dict]:
    """Sentences of a split, in a fixed order: the record's fields and "wavs", style -> [W] float32 at 16 kHz."""
    records = input_pipeline.Records(
        input_pipeline.Config(stage="vocoder", batch_size=1, data_dirs=(data,), split=split), FIELDS
    )
    pairs: dict[str, dict] = {}
    for i in range(len(records)):
        record = {k: v.decode() if isinstance(v, bytes) else v for k, v in records[i].items()}
        pair = pairs.setdefault(record["pair_id"], record | {"wavs": {}})
        pair["wavs"][record["style"]] = np.asarray(record["audio"], np.float32) / 32768
    return [pairs[k] for k in sorted(pairs) if len(pairs[k]["wavs"]) == 2]


def _seconds(pair: dict, style: str) -> float:
    return len(pair["wavs"][style]) / SAMPLE_RATE


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.rename(path)


def pool_sources(data: str, out: str | Path) -> int:
    """Writes the pool's recordings and manifest.jsonl; returns the number of normal ones.

    Raises:
        ValueError: if the corpus has too few voices.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    lines, prompts = [], {}
    chosen: dict[str, dict[str, dict]] = {language: {} for language in POOL_SIZE}
    for pair in read_pairs(data, "train"):
        language = pair["language"]
        if pair["kind"] == "matrix" or not POOL_SECONDS[0] <= _seconds(pair, "normal") <= POOL_SECONDS[1]:
            continue
        if language == "en" and pair["engine"] != "flite":
            continue
        chosen[language].setdefault(pair["speaker"], pair)
        is_plain = language == "zh" or "_a100_" in pair["speaker"]  # an unwarped voice whispers most clearly
        if language not in prompts and is_plain and pair["kind"] == "asmr":
            prompts[language] = pair
    for language, size in POOL_SIZE.items():
        speakers = sorted(chosen[language])
        if len(speakers) < size or language not in prompts:
            raise ValueError(f"the corpus has {len(speakers)} usable {language} voices, the pool needs {size}")
        for index in np.linspace(0, len(speakers) - 1, size).round().astype(int):
            pair = chosen[language][speakers[index]]
            audio.save(out / f"{pair['speaker']}.wav", pair["wavs"]["normal"], SAMPLE_RATE)
            lines.append({
                "audio": f"{pair['speaker']}.wav", "name": pair["speaker"], "text": pair["text"], "style": "normal",
                "kind": "synthesis", "language": language, "attributes": {"engine": pair["engine"]},
            })  # fmt: skip
        audio.save(out / f"asmr_{language}.wav", prompts[language]["wavs"]["asmr"], SAMPLE_RATE)
        (out / f"asmr_{language}.txt").write_text(prompts[language]["text"], encoding="utf-8")
    _write(out / "manifest.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return len(lines)


def demo_clips(data: str, out: str | Path) -> None:
    """Writes the demo's clips and demo.json.

    Raises:
        ValueError: if the held-out splits have no clip of the wanted length.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    voices = []
    for language, split, title in (
        ("en", "hts", "festival HTS slt, an engine that training never heard (synthetic)"),
        ("zh", "test", "an espeak-ng voice that training never heard (synthetic)"),
    ):
        for pair in read_pairs(data, split):
            is_base = language == "en" or "_marcelo_" in pair["speaker"] or "_steph_" in pair["speaker"]
            fits = DEMO_SECONDS[0] <= _seconds(pair, "normal") <= DEMO_SECONDS[1]
            if pair["language"] == language and pair["kind"] == "asmr" and fits and is_base:
                break
        else:
            raise ValueError(f"split {split} has no {language} sentence of {DEMO_SECONDS[0]} to {DEMO_SECONDS[1]} s")
        clips = {}
        for style in ("normal", "asmr"):
            file = f"{language}_{style}.wav"
            audio.save(out / file, pair["wavs"][style], SAMPLE_RATE)
            clips[style] = {"file": file, "text": pair["text"]}
        voices.append({"voice": title, "language": language, "clips": clips, "sentences": SENTENCES[language]})
    _write(out / "demo.json", json.dumps({"voices": voices}, indent=1, ensure_ascii=False) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Command line: pool, demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pool", "demo"))
    parser.add_argument("--data", required=True, help="TFDS version folder of the corpus")
    parser.add_argument("--out", required=True)
    args = parser.parse_args(argv)
    if args.what == "pool":
        print(f"{pool_sources(args.data, args.out)} normal recordings in {args.out}")
    else:
        demo_clips(args.data, args.out)
        print(f"demo clips in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
