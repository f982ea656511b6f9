"""The built-in model's corpus: synthesised normal/whisper pairs, English and Mandarin, as ArrayRecord files.

    python data/synthetic.py make --out workdir/corpus/raw --workers 2        # resumable shards of 100 pairs
    python data/synthetic.py build --raw workdir/corpus/raw --out workdir/corpus/records
    python data/synthetic.py report --raw workdir/corpus/raw

`make` needs the speech programs (`synthetic_voice.INSTALL`), pyworld, pypinyin and pocketsphinx; `build`
needs tensorflow-datasets and no TensorFlow. All speech is synthetic. Splits: train; valid (train speakers,
new sentences); test (new speakers and sentences); hts (new engine and sentences). Record fields: `FEATURES`
in this file.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import sys
import time
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import synthetic_text  # noqa: E402
import synthetic_voice  # noqa: E402

from deepasmr_jax import files  # noqa: E402
from deepasmr_jax.text import PHONES  # noqa: E402

VERSION = "1.0.0"
PLAN = "plan.json"  # what the raw shards are of; a copy stands in the data set
SHARD_PAIRS = 100
SPLITS = ("train", "valid", "test", "hts")
# pairs of each kind; test: 16 English speakers x (18, 6, 6), 8 Mandarin x (20, 5, 5); hts: 3 x (20, 10, 10)
COUNTS = {
    "en": {
        "train": {"matrix": 6000, "asmr": 5300, "open": 6000},
        "valid": {"matrix": 120, "asmr": 90, "open": 90},
        "test": {"matrix": 288, "asmr": 96, "open": 96},
        "hts": {"matrix": 60, "asmr": 30, "open": 30},
    },
    "zh": {
        "train": {"matrix": 1900, "asmr": 1700, "open": 2000},
        "valid": {"matrix": 60, "asmr": 45, "open": 45},
        "test": {"matrix": 160, "asmr": 40, "open": 40},
    },
}
ESPEAK_EVERY = 15  # every 15th English training sentence (6.7 %) is read by a bilingual espeak speaker
FEATURES = {
    "id": "pair_id and style", "pair_id": "one sentence by one speaker", "audio": "int16 [W], 16 kHz",
    "text": "as written", "language": "en or zh", "speaker": "virtual speaker", "style": "normal or asmr",
    "engine": "flite, espeak or festival", "kind": "matrix, asmr or open",
    "phones": "int32 [W // 320], index in text.PHONES",
    "f0_class": "int32 [W // 320], 0 unvoiced, 1..5 pitch level",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Pair:
    """One sentence read by one virtual speaker; becomes two records."""

    pair_id: str
    split: str
    language: str
    kind: str
    text: str
    speaker: str


def _scaled(counts, limit):
    total = sum(n for by_split in counts.values() for kinds in by_split.values() for n in kinds.values())
    if not limit or limit >= total:
        return counts
    return {
        language: {
            split: {kind: max(1, round(n * limit / total)) for kind, n in kinds.items()}
            for split, kinds in by_split.items()
        }
        for language, by_split in counts.items()
    }


def plan(
    limit: int | None = None, seed: int = 0, languages: tuple[str, ...] = ("en", "zh")
) -> list[list[Pair]]:
    """Every shard as a list of pairs: held-out splits first, then training with everything mixed evenly.

    Args:
        limit: about how many pairs in all (counts are scaled, at least one of a kind); None: everything.
        seed: of sentences and of who reads what.
        languages: which of "en", "zh".

    Returns:
        Shards of at most SHARD_PAIRS pairs; all pairs of a shard belong to one split.
    """
    counts = {k: v for k, v in _scaled(COUNTS, limit).items() if k in languages}
    everyone = synthetic_voice.speakers()
    pairs = defaultdict(list)
    for language, by_split in counts.items():
        for split, items in synthetic_text.sentences(language, by_split, seed).items():
            pool = "train" if split == "valid" else split
            own = [s.name for s in everyone if s.split == pool and s.languages[0] == language]
            guests = [s.name for s in everyone if s.split == pool and "en" in s.languages[1:]]
            rng = random.Random(f"{seed}-{language}-{split}")
            queues = {}

            def reader(kind, names, rng=rng, queues=queues):
                queue = queues.setdefault((kind, names[0]), [])
                if not queue:  # a new round: everybody once, in a new order
                    queue.extend(rng.sample(names, len(names)))
                return queue.pop()

            for i, (kind, text) in enumerate(items):
                use_guest = language == "en" and guests and i % ESPEAK_EVERY == 7
                speaker = reader(kind, guests if use_guest else own)
                pair = Pair(f"{split}-{language}-{i:05d}", split, language, kind, text, speaker)
                pairs[split].append(((i + 0.5) / len(items), pair))
    shards = []
    for split in ("valid", "test", "hts", "train"):
        ordered = [pair for _, pair in sorted(pairs[split], key=lambda x: (x[0], x[1].pair_id))]
        shards += [ordered[i : i + SHARD_PAIRS] for i in range(0, len(ordered), SHARD_PAIRS)]
    return shards


def _write_shard(path, pairs):
    """Speak, convert and write the pairs of a shard (temporary name, then rename). Returns a summary."""
    by_name = {s.name: s for s in synthetic_voice.speakers()}
    festival = [p for p in pairs if by_name[p.speaker].engine == "festival"]
    readings = {}
    if festival:
        spoken = synthetic_voice.festival_say([p.text for p in festival])
        readings = {p.pair_id: r for p, r in zip(festival, spoken, strict=True)}
    records, audio, phones, f0_class, failed = [], [], [], [], []
    for pair in pairs:
        speaker = by_name[pair.speaker]
        try:
            reading = readings.get(pair.pair_id) or synthetic_voice.read_aloud(
                pair.text, pair.language, speaker
            )
            made = synthetic_voice.make_pair(*reading, speaker, zlib.crc32(pair.pair_id.encode()))
        except ValueError as error:
            failed.append((pair.pair_id, pair.text, str(error)))
            continue
        for style, r in made.items():
            records.append(
                dataclasses.asdict(pair)
                | {"id": f"{pair.pair_id}-{style}", "style": style, "engine": speaker.engine}
                | {"num_samples": len(r["audio"]), "num_frames": len(r["phones"])}
            )
            audio.append(r["audio"])
            phones.append(r["phones"].astype(np.int16))
            f0_class.append(r["f0_class"].astype(np.int8))
    if not records:
        raise ValueError(f"no pair of {path.name} could be made; first reason: {failed[0]}")
    with files.atomic_path(path) as part:
        np.savez(
            part,
            records=json.dumps(records, ensure_ascii=False),
            phone_names=np.asarray(PHONES),
            audio=np.concatenate(audio),
            phones=np.concatenate(phones),
            f0_class=np.concatenate(f0_class),
        )
    return path.name, len(records) // 2, sum(map(len, audio)) / synthetic_voice.SAMPLE_RATE, failed


def _work(job):
    return _write_shard(*job)


def make(out: str | Path, workers: int = 2, limit: int | None = None, seed: int = 0) -> None:
    """Write the raw shards; shards that are there already are left alone, so an interrupted run goes on.

    Args:
        out: folder of the shards and of plan.json.
        workers: processes.
        limit: about how many pairs (see `plan`).
        seed: of the corpus.

    Raises:
        RuntimeError: if a speech program is missing. ValueError: if the folder holds another plan.
    """
    for engine in ("flite", "espeak", "festival"):
        synthetic_voice.require(engine)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    shards = plan(limit, seed)
    identity = {"version": VERSION, "seed": seed, "limit": limit, "shards": len(shards)}
    identity["crc"] = zlib.crc32(json.dumps([[dataclasses.astuple(p) for p in s] for s in shards]).encode())
    plan_path = out / PLAN
    if plan_path.exists() and json.loads(plan_path.read_text()) != identity:
        raise ValueError(
            f"{out} holds shards of another plan, {plan_path.read_text()} and not {identity}; "
            "use a new folder"
        )
    files.write_text(plan_path, json.dumps(identity))
    jobs = []
    for i, pairs in enumerate(shards):
        path = out / f"{pairs[0].split}-{i:05d}.npz"
        if not path.exists():
            jobs.append((path, pairs))
    print(f"{sum(map(len, shards))} pairs in {len(shards)} shards, {len(jobs)} shards to make", flush=True)
    start, num_pairs, seconds, num_failed = time.perf_counter(), 0, 0.0, 0
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for done, (name, n, s, failed) in enumerate(pool.imap_unordered(_work, jobs), 1):
            num_pairs, seconds, num_failed = num_pairs + n, seconds + s, num_failed + len(failed)
            for pair_id, text, reason in failed:
                print(f"  left out {pair_id} {text!r}: {reason}", flush=True)
            spent = time.perf_counter() - start
            print(
                f"{done}/{len(jobs)} {name}: {num_pairs} pairs, {seconds / 3600:.2f} h, "
                f"{num_failed} left out, {seconds / spent:.1f} x real time, {spent:.0f} s, "
                f"{spent / done * (len(jobs) - done):.0f} s left",
                flush=True,
            )


def read_shard(path: str | Path):
    """Yield the records of one raw shard as dicts of `FEATURES` (phones in the current order of text.PHONES).

    Raises:
        ValueError: if a label of the shard is no longer in text.PHONES.
    """
    with np.load(path) as shard:
        names = [str(n) for n in shard["phone_names"]]
        missing = sorted(set(names) - set(PHONES))
        used = {names[i] for i in np.unique(shard["phones"])}
        if used & set(missing):
            raise ValueError(
                f"{path} has phones {sorted(used & set(missing))} that text.PHONES lacks; make it anew"
            )
        table = np.asarray([PHONES.index(n) if n in PHONES else -1 for n in names], np.int32)
        audio, phones, f0_class = shard["audio"], table[shard["phones"]], shard["f0_class"].astype(np.int32)
        a = t = 0
        for r in json.loads(str(shard["records"])):
            w, n = r.pop("num_samples"), r.pop("num_frames")
            r.pop("split")
            yield r | {
                "audio": audio[a : a + w],
                "phones": phones[t : t + n],
                "f0_class": f0_class[t : t + n],
            }
            a, t = a + w, t + n


def build(raw: str | Path, out: str | Path):
    """Write the shards as a TFDS data set "synthetic" of ArrayRecord files under `out`/synthetic/VERSION.

    Records keep the order of the shards: every prefix of train is a balanced corpus. A builder with
    download_and_prepare would shuffle them, for which TFDS needs TensorFlow once a split passes 1 GB; its
    sequential writer does not.

    A data set that is there already, of the same plan and with the same number of records in each split, is left
    alone: it took its name when it was whole, and whoever called was killed before noting so.

    Returns:
        A read-only builder: `builder.as_data_source("train")` reads it.

    Raises:
        FileNotFoundError: if `raw` has no training shards. ValueError: if the data set exists already with another
            plan or number of records, or a record has no audio or labels of another length.
    """
    import tensorflow_datasets as tfds

    raw, target = Path(raw), Path(out) / "synthetic" / VERSION
    paths = {split: sorted(raw.glob(f"{split}-*.npz")) for split in SPLITS}
    if not paths["train"]:
        raise FileNotFoundError(
            f"no train-*.npz in {raw}: run `python data/synthetic.py make --out {raw}` first"
        )
    splits = [split for split in SPLITS if paths[split]]
    if target.exists():
        made = tfds.builder_from_directory(target)
        held = {split: info.num_examples for split, info in made.info.splits.items()}
        same_plan = _plan_text(raw) == _plan_text(target)
        if not same_plan or held != {split: sum(map(_num_records, paths[split])) for split in splits}:
            raise ValueError(
                f"{target} is there already with other records ({held if same_plan else 'of another plan'}): remove "
                "it, or give another --out"
            )
        print(f"{target} is there already, made of the same plan; it is left as it is", flush=True)
        return made
    unfinished = target.with_name(f"incomplete.{VERSION}.{os.getpid()}")  # two builds never share their files
    unfinished.mkdir(parents=True)
    try:
        _write(unfinished, paths, splits)
        files.write_text(unfinished / PLAN, _plan_text(raw))
        if target.exists():
            raise ValueError(f"another build wrote {target} meanwhile; it is kept, and this one is removed")
        os.replace(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return tfds.builder_from_directory(target)


def _plan_text(folder):
    """What `make` wrote of its plan; "" where there is none."""
    path = Path(folder) / PLAN
    return path.read_text() if path.exists() else ""


def _num_records(path):
    with np.load(path) as shard:
        return len(json.loads(str(shard["records"])))


def _write(folder, paths, splits):
    """Write the shards of each split into a folder of ArrayRecord files."""
    import tensorflow_datasets as tfds

    labels = tfds.features.Tensor(shape=(None,), dtype=np.int32, encoding="bytes")
    audio = tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding="bytes")
    special = {"audio": audio, "phones": labels, "f0_class": labels}
    features = tfds.features.FeaturesDict({k: special.get(k) or tfds.features.Text() for k in FEATURES})
    identity = tfds.core.dataset_info.DatasetIdentity(
        name="synthetic", version=tfds.core.Version(VERSION), data_dir=str(folder), module_name=__name__
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        description="Synthesised normal and whispered speech in pairs, English and Mandarin; all synthetic.",
        features=features,
    )
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=4000, file_format="array_record")
    writer.initialize_splits(splits)
    for split in splits:
        for path in paths[split]:
            records = list(read_shard(path))
            for r in records:
                if not len(r["audio"]) or len(r["phones"]) != len(r["audio"]) // synthetic_voice.LABEL_HOP:
                    raise ValueError(f"{path}: record {r['id']} has no audio or labels of another length")
            writer.add_examples({split: records})
    writer.close_all()


def report(raw: str | Path) -> dict:
    """Count what a raw folder holds.

    Returns:
        {"split language style": {"records", "hours", "speakers", "sentences"}} plus "shared_sentences",
        the number of held-out sentences that also occur in train (must be 0), and pairs by kind and engine.
    """
    hours, count = Counter(), Counter()
    names, texts = defaultdict(set), defaultdict(set)
    kinds, engines = Counter(), Counter()
    for path in sorted(Path(raw).glob("*.npz")):
        split = path.name.split("-")[0]
        with np.load(path) as shard:
            for r in json.loads(str(shard["records"])):
                key = f"{split} {r['language']} {r['style']}"
                hours[key] += r["num_samples"] / synthetic_voice.SAMPLE_RATE / 3600
                count[key] += 1
                names[key].add(r["speaker"])
                texts[key].add(synthetic_text.normalize(r["text"]))
                kinds[f"{split} {r['language']} {r['kind']}"] += r["style"] == "normal"
                engines[f"{split} {r['language']} {r['engine']}"] += r["style"] == "normal"
    result = {
        key: {"records": count[key], "hours": round(hours[key], 3), "speakers": len(names[key]),
              "sentences": len(texts[key])}
        for key in sorted(count)
    }  # fmt: skip
    train = {t for k, v in texts.items() if k.startswith("train ") for t in v}
    held_out = {t for k, v in texts.items() if not k.startswith("train ") for t in v}
    result["shared_sentences"] = len(train & held_out)
    result["pairs_by_kind"] = dict(sorted(kinds.items()))
    result["pairs_by_engine"] = dict(sorted(engines.items()))
    return result


def main(argv: list[str] | None = None) -> int:
    """Command line: make, build, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("make", help="speak and convert: raw shards")
    p.add_argument("--out", required=True)
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--limit", type=int, help="about how many pairs; without it the whole corpus")
    p.add_argument("--seed", type=int, default=0)
    p = commands.add_parser("build", help="raw shards to ArrayRecord")
    p.add_argument("--raw", required=True)
    p.add_argument("--out", required=True)
    p = commands.add_parser("report", help="hours, speakers, sentences")
    p.add_argument("--raw", required=True)
    args = parser.parse_args(argv)
    try:
        if args.command == "make":
            make(args.out, args.workers, args.limit, args.seed)
        elif args.command == "build":
            builder = build(args.raw, args.out)
            for split, info in builder.info.splits.items():
                print(f"{split}: {info.num_examples} records")
        else:
            for key, value in report(args.raw).items():
                print(f"{key}: {value}")
    except (RuntimeError, ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
