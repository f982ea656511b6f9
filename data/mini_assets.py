"""Picks the built-in model's pool recordings and demo clips out of the synthetic corpus.

    python data/mini_assets.py pool --data CORPUS/1.0.0 --out WORK/pool_sources
    python data/mini_assets.py demo --data CORPUS/1.0.0 --out MODEL/demo
    python data/mini_assets.py settings --out MODEL

`pool` writes one ordinary sentence of each of 50 training voices (32 English, 18 Mandarin) and one whispered sentence
per language (asmr_en, asmr_zh), as wavs with a manifest for `deepasmr pool build`; that synthesises the ASMR half with
our own model. `settings` writes name, sampling and licence into the model's config.json.
`demo` writes clips of two held-out voices, both styles, with demo.json: festival HTS slt (English; training had no
festival, but flite's slt) and espeak-ng's f1 with a formant factor that training never had (Mandarin). All of it is
synthetic speech.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from deepasmr_jax import audio, files, input_pipeline, shards  # noqa: E402

FIELDS = ("pair_id", "audio", "text", "language", "speaker", "style", "kind", "engine")
POOL_SIZE = {"en": 32, "zh": 18}  # 50, as in the paper
POOL_SECONDS = (2.0, 4.0)  # short prompts leak no words into the output
DEMO_SECONDS = (2.6, 5.0)
ENGINE_LICENCES = {"flite": "BSD-like", "espeak": "GPL-3.0"}  # of the programs that spoke the pool's voices
SENTENCES = {
    "en": ["Close your eyes, and listen to the rain.", "Lucy wants seven green chairs."],
    "zh": ["把眼睛闭上。", "慢慢地呼吸，让身体放松下来。"],
}


SETTINGS = {
    "name": "mini",
    "sample_rate": audio.SAMPLE_RATE,
    # the marks of the training sentences: a question mark made Mandarin unintelligible
    "text": {"tokenizer": "mini", "marks": {"en": ".", "zh": ".,"}},
    "sampling": {
        # a text token is a phone, a pause mark or a word boundary: 1.2 to 2.5 speech tokens each in English; a
        # Mandarin one is an initial or a final, up to 4 in a whisper, and a limit there cut half of the sentences
        # no repetition-aware draws: in 40 ms tokens of few codes a sustained sound repeats, and redrawing it made
        # speech 15 % too short and word errors 1.5 to 1.8 times as many (48 sentences)
        "lm": {"min_ratio": 0.8, "max_ratio": 4.0, "repetition_aware": False, "top_p": 0.6},
        "ratios": {"asmr": {"max_ratio": 8.0}},
        # at most 13 equal tokens in a row in 6,000 training utterances; beyond that a sound is held to the end
        "redraw": {"attempts": 2, "longest_run": 14},
        "flow": {"num_steps": 10, "guidance": 1.0, "method": "euler", "schedule": "cosine"},
        # mean level of N2N and A2A above the recordings with that guidance, on sentences of `valid`
        "output_gain_db": {"normal": -3.5, "asmr": -4.0},
        # the training sentences have 5 to 14 words and marks, in English never a comma, and 6 to 16 characters: more in
        # one go is read badly
        "chunks": {
            "en": {"longest": 14, "merge_below": 3, "apart": "clauses"},
            "zh": {"longest": 16, "merge_below": 3, "apart": "sentences"},
        },
    },
    "provenance": {
        "data": "synthetic speech only (data/synthetic.py): flite and espeak-ng read, WORLD whispers",
        "licences": "Apache-2.0; the Mandarin and 6.7 % of the English training speech come from espeak-ng (GPL-3)",
    },
}


def write_settings(model: str | Path) -> None:
    """Merges SETTINGS into the config.json of an exported model folder."""
    path = Path(model) / "config.json"
    values = json.loads(path.read_text("utf-8"))
    values |= SETTINGS | {"provenance": values.get("provenance", {}) | SETTINGS["provenance"]}
    files.write_text(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def read_records(data: str, split: str):
    """Yields the records of a split in their stored order: its fields, and "wav" [W] float32 at 16 kHz."""
    records = shards.Records(
        input_pipeline.Config(stage="vocoder", batch_size=1, data_dirs=(data,), split=split), FIELDS
    )
    for i in range(len(records)):
        record = {k: v.decode() if isinstance(v, bytes) else v for k, v in records[i].items()}
        yield record | {"wav": np.asarray(record.pop("audio"), np.float32) / 32768}


def _lasts(record: dict, limits: tuple[float, float]) -> bool:
    return limits[0] <= len(record["wav"]) / audio.SAMPLE_RATE <= limits[1]


def pool_sources(data: str, out: str | Path) -> int:
    """Writes the pool's recordings and manifest.jsonl; returns the number of normal ones.

    Raises:
        ValueError: if the corpus has too few voices.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    lines, prompts = [], {}
    chosen: dict[str, dict[str, dict]] = {language: {} for language in POOL_SIZE}
    for record in read_records(data, "train"):  # the order is shuffled: a few hundred hold every voice
        language, speaker = record["language"], record["speaker"]
        if record["kind"] == "matrix" or not _lasts(record, POOL_SECONDS):
            continue
        if language == "en" and record["engine"] != "flite":
            continue
        if record["style"] == "normal":
            chosen[language].setdefault(speaker, record)
        elif record["kind"] == "asmr" and (language == "zh" or "_a100_" in speaker):
            prompts.setdefault(language, record)  # an unwarped voice whispers most clearly
        if len(prompts) == 2 and len(chosen["en"]) >= 40 and len(chosen["zh"]) >= 20:
            break
    for language, size in POOL_SIZE.items():
        speakers = sorted(chosen[language])
        if len(speakers) < size or language not in prompts:
            raise ValueError(
                f"the corpus has {len(speakers)} usable {language} voices, the pool needs {size}"
            )
        for index in np.linspace(0, len(speakers) - 1, size).round().astype(int):
            pair = chosen[language][speakers[index]]
            audio.save(out / f"{pair['speaker']}.wav", pair["wav"], audio.SAMPLE_RATE)
            lines.append({
                "audio": f"{pair['speaker']}.wav", "name": pair["speaker"], "text": pair["text"], "style": "normal",
                "kind": "synthesis", "language": language, "attributes": {"engine": pair["engine"]},
                "licence": ENGINE_LICENCES[pair["engine"]],
            })  # fmt: skip
        audio.save(out / f"asmr_{language}.wav", prompts[language]["wav"], audio.SAMPLE_RATE)
        (out / f"asmr_{language}.txt").write_text(prompts[language]["text"], encoding="utf-8")
    manifest = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    files.write_text(out / "manifest.jsonl", manifest)
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
        ("en", "hts", "festival HTS slt (synthetic); training had flite's slt, not this engine"),
        ("zh", "test", "espeak-ng f1, held-out variant (synthetic); training had other variants"),
    ):
        pairs: dict[str, dict[str, dict]] = {}
        for record in read_records(data, split):
            is_base = language == "en" or "_f1_" in record["speaker"]
            if record["language"] == language and record["kind"] == "asmr" and is_base:
                pairs.setdefault(record["pair_id"], {})[record["style"]] = record
        usable = [
            pairs[k] for k in sorted(pairs) if len(pairs[k]) == 2 and _lasts(pairs[k]["normal"], DEMO_SECONDS)
        ]
        if not usable:
            raise ValueError(
                f"{split} has no {language} sentence of {DEMO_SECONDS[0]} to {DEMO_SECONDS[1]} s"
            )
        clips = {}
        for style, record in usable[0].items():
            file = f"{language}_{style}.wav"
            audio.save(out / file, record["wav"], audio.SAMPLE_RATE)
            clips[style] = {"file": file, "text": record["text"]}
        voices.append(
            {"voice": title, "language": language, "clips": clips, "sentences": SENTENCES[language]}
        )
    files.write_text(out / "demo.json", json.dumps({"voices": voices}, indent=1, ensure_ascii=False) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Command line: pool, demo, settings."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("pool", "demo", "settings"))
    parser.add_argument("--data", help="TFDS version folder of the corpus; not for settings")
    parser.add_argument("--out", required=True)
    args = parser.parse_args(argv)
    if args.what != "settings" and not args.data:
        parser.error(f"{args.what} needs --data, the corpus")
    if args.what == "settings":
        write_settings(args.out)
    elif args.what == "pool":
        print(f"{pool_sources(args.data, args.out)} normal recordings in {args.out}")
    else:
        demo_clips(args.data, args.out)
        print(f"demo clips in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
