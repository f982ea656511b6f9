"""A corpus of any known layout as TFDS ArrayRecord files that every stage reads, and the check of one before that.

    python data/build.py build LAYOUT SOURCE --out corpora/NAME/1.0.0 --workers 2
    python data/build.py check LAYOUT SOURCE --out report.jsonl

LAYOUTS names the layouts; each is a file here that knows its folders and fields only. A unit is a piece of the source
that can be read alone; consecutive units make a shard. A shard that is finished has a line file in OUT/.parts, so that
a build that was stopped goes on, and makes a shard again whose recordings, lists or archives have changed; processes of
one build (--process I/N) share nothing but OUT. The last step joins the shards, takes duplicates out and writes
OUT/report.jsonl with every utterance that was left out, and why.
Records: id, pair_id, text, language, speaker, style and audio, int16 [W], 16 kHz or at the field sample_rate, which
records of another --record-rate have.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import stat
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import asmr_parquet  # noqa: E402
import emilia  # noqa: E402
import kaldi  # noqa: E402
import manifest  # noqa: E402
import speech_folders  # noqa: E402
import tfds_files  # noqa: E402
import whisper_pairs  # noqa: E402

from deepasmr_jax import audio, data_check, files  # noqa: E402

# layout -> (its file, labels of utterances that have none of their own)
LAYOUTS = {
    "manifest": (manifest, {}),
    "folders": (speech_folders, {"style": "normal"}),
    "kaldi": (kaldi, {"style": "normal"}),
    "emilia": (emilia, {"style": "normal"}),
    "asmr": (asmr_parquet, {"style": "asmr"}),
    "chains": (whisper_pairs, {"language": "en"}),
    "whisper40": (whisper_pairs, {"language": "zh"}),
}
COLUMNS = ("manifest", "emilia", "asmr")  # layouts whose utterances are rows with named fields
SPLITS = ("train", "valid")
LABELS = ("speaker", "language", "style")


@dataclasses.dataclass(frozen=True)
class Options:
    """How a source is read and split.

    Attributes:
        labels: speaker, language or style of utterances that have none; before those of `LAYOUTS`.
        fields: columns or keys of this corpus, such as {"text": "caption"}; see `data_check.from_fields`.
        texts: text by name, for layouts without texts.
        rules: what is left out.
        valid_share: of the speakers (or sentences), for the split valid.
        valid_speakers: these and no others, if any is given.
        split_by: "speaker", or "sentence" where a corpus has too few speakers.
        shards: most files of a split.
    """

    labels: dict[str, str] = dataclasses.field(default_factory=dict)
    fields: dict[str, str] = dataclasses.field(default_factory=dict)
    texts: dict[str, str] = dataclasses.field(default_factory=dict)
    rules: data_check.Rules = data_check.Rules()
    valid_share: float = 0.05
    valid_speakers: tuple[str, ...] = ()
    split_by: str = "speaker"
    shards: int = 256

    def __post_init__(self):
        if not 0 <= self.valid_share < 1:
            raise ValueError(f"valid share {self.valid_share:g} is not in 0..1; give such as 0.05")
        if self.shards < 1:
            raise ValueError(f"{self.shards} shards are not possible; give 1 or more")
        unknown = sorted(set(self.fields) - set(data_check.ALIASES))
        if unknown:
            raise ValueError(f"unknown field {unknown[0]!r}; known are {', '.join(data_check.ALIASES)}")


def split_of(item: data_check.Item, options: Options) -> str:
    """The split of an utterance: its corpus's own, else by a hash of its speaker (or pair) that no run changes."""
    if item.split:
        return item.split
    if options.valid_speakers:
        return "valid" if item.speaker in options.valid_speakers else "train"
    return "valid" if _place(_key(item, options)) < options.valid_share else "train"


def _key(item: data_check.Item, options: Options) -> str:
    """What an utterance is split by; empty where that is settled without a hash."""
    if item.split or options.valid_speakers or not options.valid_share:
        return ""
    return item.speaker if options.split_by == "speaker" else item.pair_id or item.id


def _place(key: str) -> float:
    """A number in 0..1 that no run changes."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64


def _moved(counts: dict[str, Counter]) -> tuple[str, str, str] | None:
    """(from, to, key): what a split that the hash left without any gets, where another can spare it."""
    for giver, taker in (SPLITS, SPLITS[::-1]):
        keys = sorted((key for key in counts[giver] if key), key=_place)
        if not counts[taker] and len(keys) > 1:
            return giver, taker, keys[0] if taker == "valid" else keys[-1]
    return None


def units_of(layout: str, source: str | Path, options: Options) -> list[tuple]:
    """The units of a source; ValueError if it has none, or `fields` are named of a layout that has no columns."""
    if options.fields and layout not in COLUMNS:
        raise ValueError(f"layout {layout} has no columns to name; --field is for {', '.join(COLUMNS)}")
    units = LAYOUTS[layout][0].units(Path(source), options)
    if not units:
        raise ValueError(f"{source} holds no utterance: its lists or tables are empty")
    return units


def rest_of(layout: str, source: str | Path, units: list[tuple]) -> dict:
    """Arguments of `data_check.Rest`: the source, and the lists, archives and tables that its units are read from."""
    paths = dict.fromkeys(path for unit in units for path in _lists(layout, unit))
    return {"root": source, "lists": [path for path in paths if os.path.isfile(path)]}


def _lists(layout: str, unit: tuple) -> list[str]:
    """What a unit is read from, beside the recordings that it names: a list, an archive or a folder."""
    lists = getattr(LAYOUTS[layout][0], "lists", None)
    return lists(unit) if lists else [unit[0]]


def items(layout: str, unit: tuple, options: Options) -> Iterator[data_check.Item | data_check.Problem]:
    """The utterances of a unit with their labels; what stops its reading is a problem too."""
    module, defaults = LAYOUTS[layout]
    labels = defaults | options.labels
    found = iter(module.read(unit, options))
    while True:
        try:
            item = next(found)
        except StopIteration:
            return
        except (OSError, ValueError, EOFError) as error:
            why = f"the rest of it cannot be read ({' '.join(str(error).split())})"
            yield data_check.Problem(str(unit[0]), "", "unreadable", why)
            return
        if isinstance(item, data_check.Item):
            missing = {k: v for k, v in labels.items() if not getattr(item, k)}
            item = dataclasses.replace(item, **missing) if missing else item
        yield item


# ---------------------------------------------------------------- the build


def build(
    layout: str, source: str | Path, out: str | Path, options: Options, process: str = "0/1", workers: int = 1
) -> dict | None:
    """Writes a corpus as a TFDS dataset; the same call goes on where one was stopped.

    Args:
        layout: of `LAYOUTS`.
        source: the corpus.
        out: version folder to write, NAME/1.0.0.
        options: how.
        process: "I/N": only the shards of process I of N; when all have ended, "0/1" joins them.
        workers: processes of this call.

    Returns:
        {"records": by split, "hours": by split, "left_out", and the number of each kind of problem}; None if shards of
        other processes are still to come.

    Raises:
        ValueError: if the source is not of this layout, `out` is complete or was begun otherwise, or no utterance
            is fit.
    """
    out, index, count = Path(out), *tfds_files.process_of(process)
    if (out / "dataset_info.json").exists():
        raise ValueError(f"{out} is complete already: remove it, or give another --out")
    units = units_of(layout, source, options)
    num_shards = min(options.shards, len(units))
    limits = [len(units) * i // num_shards for i in range(num_shards + 1)]
    _note_plan(out, layout, source, options, units)
    jobs = [
        (out, layout, options, units[limits[shard] : limits[shard + 1]], shard, num_shards)
        for shard in range(num_shards)
        if shard % count == index and not _is_made(out, shard)
    ]
    start, num_items = time.perf_counter(), 0
    print(f"shards: {num_shards}, to write here: {len(jobs)}", flush=True)
    context = multiprocessing.get_context("spawn")
    with (
        context.Pool(min(workers, len(jobs)), signal.signal, (signal.SIGINT, signal.SIG_IGN))
        if workers > 1 and jobs
        else contextlib.nullcontext() as pool
    ):
        for done, n in enumerate((pool.imap_unordered if pool else map)(_write_shard, jobs), 1):
            num_items += n
            spent = time.perf_counter() - start
            print(
                f"{done}/{len(jobs)} shards: {num_items} utterances, {num_items / spent:.0f} a second",
                flush=True,
            )
    absent = [shard for shard in range(num_shards) if not _part(out, shard).exists()]
    if absent or count > 1:
        print(
            f"{len(absent)} shards are left; once none is, the command without --process joins them",
            flush=True,
        )
        return None
    return _join(out, num_shards, options, data_check.Rest(**rest_of(layout, source, units)))


def _note_plan(out: Path, layout: str, source: str | Path, options: Options, units: list[tuple]) -> None:
    """Keeps what a build was begun with, or compares it with what is there."""
    given = dataclasses.asdict(options)
    rate = given["rules"].pop("record_rate")  # has its own place: the mark is that of older versions
    mark = hashlib.sha256(json.dumps([units, given], sort_keys=True).encode()).hexdigest()
    plan = {"layout": layout, "source": str(source), "mark": mark, "record_rate": rate}
    path = out / tfds_files.PARTS / "plan.json"
    found = {"record_rate": audio.SAMPLE_RATE} | (json.loads(path.read_text()) if path.exists() else plan)
    if found != plan:
        same = all(found.get(key) == plan[key] for key in ("layout", "source"))
        told = "another source or other options" if same else f"{found.get('layout')} {found.get('source')}"
        if found["record_rate"] != rate:
            told = f"records of {found['record_rate']} Hz, not {rate}"
        raise ValueError(f"{out} was begun with {told}; go on with those, or give another --out")
    files.write_text(path, json.dumps(plan))


def _part(out: Path, shard: int) -> Path:
    return out / tfds_files.PARTS / f"{shard:05d}.json"


def _stamp(path: str) -> list[int] | None:
    """Bytes and time of the last change of a file; None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns] if stat.S_ISREG(found.st_mode) else None


def _is_made(out: Path, shard: int) -> bool:
    """Whether a shard is finished; one whose files have changed since is not any more. Files may be gone."""
    path = _part(out, shard)
    if not path.exists():
        return False
    stamps = json.loads(path.read_text("utf-8")).get("files", {})  # none in a build of an older version
    changed = next((name for name, old in stamps.items() if _stamp(name) not in (None, old)), None)
    if changed is not None:
        print(f"shard {shard} is made again: {changed} has changed", flush=True)
        path.unlink()
    return changed is None


@functools.cache
def _features(record_rate: int = audio.SAMPLE_RATE):
    import tensorflow_datasets as tfds

    names = ("id", "pair_id", "text", "language", "speaker", "style")
    sound = tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding="bytes")
    known = {name: tfds.features.Text() for name in names} | {"audio": sound}
    if record_rate != audio.SAMPLE_RATE:
        known["sample_rate"] = tfds.features.Scalar(np.int32)
    return tfds.features.FeaturesDict(known)


def _write_shard(job: tuple) -> int:
    """Writes one shard of each split, then what it holds and what it left out. Returns the number of utterances."""
    out, layout, options, units, shard, num_shards = job
    problems, num_items, held = [], 0, {s: [] for s in SPLITS}
    stamps = {path: _stamp(path) for unit in units for path in _lists(layout, unit)}
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                tfds_files.open_shard(
                    out / tfds_files.shard_name(out.parent.name, split, shard, num_shards),
                    _features(options.rules.record_rate),
                )
            )
            for split in SPLITS
        }
        for item in (item for unit in units for item in items(layout, unit, options)):
            num_items += 1
            if isinstance(item, data_check.Problem):
                problems.append(item)
                continue
            if isinstance(item.audio, str | os.PathLike) and str(item.audio) not in stamps:
                stamps[str(item.audio)] = _stamp(item.audio)
            record, found = data_check.examine(item, options.rules)
            problems += found
            if record is not None:
                split = split_of(item, options)
                writers[split].write(record)
                mark = data_check.digest(record["audio"]).hex()
                held[split].append((mark, len(record["audio"]), item.where, item.id, _key(item, options)))
    part = {"items": num_items, "held": held, "problems": [dataclasses.asdict(p) for p in problems]}
    part["files"] = stamps
    files.write_text(_part(out, shard), json.dumps(part))
    return num_items


def _join(out: Path, num_shards: int, options: Options, rest: data_check.Rest) -> dict:
    """Takes duplicates out, writes the report, then what makes the folder a dataset. A stopped one is called again."""
    seen, kinds, left_out = data_check.Seen(), Counter(), 0
    lengths, samples = {s: [] for s in SPLITS}, Counter()
    keep, rate = "duplicate" in options.rules.keep, options.rules.record_rate
    features = _features(rate)
    counts = {s: Counter() for s in SPLITS}
    knows_files = True
    for shard in range(num_shards):
        for split, rows in json.loads(_part(out, shard).read_text("utf-8"))["held"].items():
            counts[split].update("".join(row[4:]) for row in rows)  # a build of an older version has no key
    moved = _moved(counts)
    if moved is not None:
        told = f"{options.split_by} {moved[2]} is put into the split {moved[1]}, which would be empty"
        if options.split_by == "speaker":
            told += "; with few speakers, --split-by sentence keeps all voices in train"
        print(told, flush=True)
    with (
        files.atomic_path(out / data_check.BUILD_REPORT) as report_part,
        open(report_part, "w", encoding="utf-8", errors="backslashreplace") as report,
    ):
        for shard in range(num_shards):
            part = json.loads(_part(out, shard).read_text("utf-8"))
            if moved is not None:
                _move(out, shard, num_shards, features, part["held"], *moved)
            problems = [data_check.Problem(**p) for p in part["problems"]]
            num_records = 0
            for split in SPLITS:
                twice = set()
                for row, (digest, num_samples, where, name, *_) in enumerate(part["held"][split]):
                    first = seen.add(bytes.fromhex(digest), where)
                    if first is not None:
                        problems.append(
                            data_check.Problem(where, name, "duplicate", f"the same sound as {first}", keep)
                        )
                    if first is None or keep:
                        samples[split] += num_samples
                    else:
                        twice.add(row)
                path = out / tfds_files.shard_name(out.parent.name, split, shard, num_shards)
                _without(path, features, len(part["held"][split]), twice)
                lengths[split].append(len(part["held"][split]) - len(twice))
                num_records += lengths[split][-1]
            left_out += part["items"] - num_records
            kinds.update(p.problem for p in problems)
            report.writelines(p.line() for p in problems)
            knows_files &= "files" in part  # not in a build of an older version
            for path in (*part.get("files", ()), *(p["where"] for p in part["problems"])):
                rest.take(path)
        for problem in rest.problems() if knows_files else ():
            left_out += 1
            kinds[problem.problem] += 1
            report.write(problem.line())
    if not sum(map(sum, lengths.values())):
        raise ValueError(
            f"no utterance is fit, see {out / data_check.BUILD_REPORT}; --keep KIND keeps some kinds of problem"
        )
    for split in [s for s in SPLITS if not sum(lengths[s])]:
        for path in out.glob(f"*-{split}.array_record-*"):
            tfds_files.remove_shard(path)
        del lengths[split]
    tfds_files.write_metadata(
        out, features, lengths, f"Built by data/build.py; see {data_check.BUILD_REPORT}."
    )
    shutil.rmtree(out / tfds_files.PARTS)
    tfds_files.remove_left_overs(out)
    tfds_files.write_index(out, lengths)
    hours = {s: round(samples[s] / rate / 3600, 4) for s in lengths}
    return {"records": {s: sum(n) for s, n in lengths.items()}, "hours": hours, "left_out": left_out} | dict(
        kinds
    )


def _move(
    out: Path, shard: int, num_shards: int, features, held: dict, giver: str, taker: str, key: str
) -> None:
    """Moves the records of a key from a split of a shard to the other, which is empty, in files and in `held`."""
    old = held[giver]
    rows = {i for i, row in enumerate(old) if row[4:] == [key]}
    path, other = (out / tfds_files.shard_name(out.parent.name, s, shard, num_shards) for s in (giver, taker))
    if rows and tfds_files.num_records(path) == len(old):  # else a stopped call has done it
        with tfds_files.open_shard(other, features) as made:
            for i, data in enumerate(tfds_files.read_shard(path)):
                if i in rows:
                    made.write_raw(data)
        _without(path, features, len(old), rows)
    held[taker] = [old[i] for i in sorted(rows)]
    held[giver] = [row for i, row in enumerate(old) if i not in rows]


def _without(path: Path, features, count: int, rows: set[int]) -> None:
    """Takes rows out of a shard of `count` records, unless that is done already."""
    if not rows or tfds_files.num_records(path) == count - len(rows):
        return
    with tfds_files.open_shard(path, features) as shard:
        for row, data in enumerate(tfds_files.read_shard(path)):
            if row not in rows:
                shard.write_raw(data)


# ---------------------------------------------------------------- the command line


def _options(args) -> Options:
    labels = {name: getattr(args, name) for name in LABELS if getattr(args, name)}
    for pair in args.field:
        if "=" not in pair:
            raise ValueError(f"--field {pair} is not of the form NAME=COLUMN, such as text=caption")
    texts = {}
    if args.texts:
        for line in Path(args.texts).read_text("utf-8").splitlines():
            name, _, text = line.strip().partition("\t" if "\t" in line else " ")
            texts[name] = text.strip()
    rules = data_check.Rules(args.rate, args.max_seconds, tuple(args.keep), record_rate=args.record_rate)
    valid = tuple(filter(None, args.valid_speakers.split(",")))
    fields = dict(pair.split("=", 1) for pair in args.field)
    return Options(labels, fields, texts, rules, args.valid_share, valid, args.split_by, args.shards)


def main(argv: list[str] | None = None) -> int:
    """Command line; 0, 1 if an utterance was left out, 2 for bad input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("build", "check"))
    parser.add_argument("layout", choices=LAYOUTS)
    parser.add_argument("source", help="the corpus: a folder, or a file of it")
    parser.add_argument("--out", required=True, help="build: NAME/1.0.0 to write; check: the report, x.jsonl")
    for name in LABELS:
        parser.add_argument(f"--{name}", help="of all utterances that have none of their own")
    parser.add_argument(
        "--field",
        action="append",
        default=[],
        metavar="NAME=COLUMN",
        help="such as text=caption; no other column is looked at for it",
    )
    parser.add_argument("--texts", help="list of texts, `NAME TEXT` a line, for chains and whisper40")
    parser.add_argument(
        "--rate", type=int, default=0, help="Hz that every file must have (default: --record-rate or more)"
    )
    parser.add_argument(
        "--record-rate", type=int, default=audio.SAMPLE_RATE,
        help=f"Hz of the records (default 16000): {', '.join(map(str, data_check.RECORD_RATES))}",
    )  # fmt: skip
    parser.add_argument("--max-seconds", type=float, default=data_check.MAX_SECONDS)
    parser.add_argument("--keep", action="append", default=[], help="a kind of problem that is only reported")
    parser.add_argument("--valid-share", type=float, default=0.05, help="of the speakers (default 0.05)")
    parser.add_argument("--valid-speakers", default="", help="these instead, A,B,...")
    parser.add_argument("--split-by", choices=("speaker", "sentence"), default="speaker")
    parser.add_argument("--shards", type=int, default=256, help="most files of a split (default 256)")
    parser.add_argument("--process", default="0/1", help="I/N: the share of process I of N")
    parser.add_argument("--workers", type=int, default=1, help="processes of this one")
    args = parser.parse_args(argv)
    try:
        options = _options(args)
        if args.command == "check":
            units = units_of(args.layout, args.source, options)
            found = (item for unit in units for item in items(args.layout, unit, options))
            found = data_check.with_rest(found, **rest_of(args.layout, args.source, units))
            counts = data_check.check(found, args.out, options.rules, functools.partial(print, flush=True))
        else:
            counts = build(args.layout, args.source, args.out, options, args.process, args.workers)
            if counts is not None and len(counts["records"]) == 1:
                print(
                    f"note: all records are in {[*counts['records']][0]}; --valid-share, --valid-speakers or "
                    "--split-by sentence gives the other split some"
                )
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    for key, value in (counts or {}).items():
        print(f"{key}: {value}")
    return 1 if counts and counts["left_out"] else 0


if __name__ == "__main__":
    sys.exit(main())
