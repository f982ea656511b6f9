"""An ASMR speech corpus from one's own recordings, in the steps of DeepASMR-DB (the paper's section IV).

    python data/asmr_db.py index recordings.jsonl --out WORK       # which recordings, by topic
    python data/asmr_db.py vet WORK                                # ten clips a creator; write yes or no into the sheet
    python data/asmr_db.py make WORK --recognizer whisper --model MODEL       # or fast: the service the paper used
    python data/asmr_db.py make WORK --recognizer fast --beam --runner=...    # the same on Apache Beam

WORK/corpus is the result: manifest.jsonl, audio, README.md (the dataset card). Every step may be run again: what is
finished stays, what failed is listed with its reason and tried again. See docs/corpus_pipeline.md.
"""

import argparse
import concurrent.futures
import csv
import dataclasses
import io
import json
import random
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import asmr_db_card  # noqa: E402
import asmr_db_pieces  # noqa: E402
import asmr_db_recognizers  # noqa: E402
import asmr_db_segments  # noqa: E402
import asmr_db_topics  # noqa: E402
from asmr_db_pieces import Folder, Piece, Recording, Settings, safe_name  # noqa: E402

from deepasmr_jax import audio, clip, files, request  # noqa: E402
from deepasmr_jax import text as text_lib  # noqa: E402

CLIPS, CLIP_S, SHARE = 10, 10.0, 0.8  # of the paper: ten segments a creator, 80 % of them good; our length
INDEX, SHEET = "index.jsonl", "vetting.csv"
COLUMNS = ("speaker", "clip", "recording", "start_s", "voiced", "verdict", "note")
YES, NO = ("yes", "y", "1", "true"), ("no", "n", "0", "false")


# ---------------------------------------------------------------- index: which recordings


def index_row(row: dict, folder: Path, topics: asmr_db_topics.Topics) -> dict:
    """One line of the index: the recording's facts, whether it is accepted, and why not.

    Args:
        row: of the user's list: audio, speaker, title; optional tags (list), id, topic, language, style, gender,
            rights.
        folder: what `audio` is relative to.

    Raises:
        ValueError: if a value is missing or of the wrong kind; the caller records it.
    """
    for key in ("audio", "speaker"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(f"{key} is {row.get(key)!r}; write a string")
    tags = row.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(t, str) for t in [*tags, row.get("title", "")]):
        raise ValueError(f"title {row.get('title')!r} or tags {tags!r} are no string and list of strings")
    request.check_choice(row.get("style", "asmr"), request.STYLES, "style")
    if row.get("language"):
        request.check_choice(row["language"], text_lib.LANGUAGES, "language")
    path = row["audio"] if "://" in row["audio"] else str((folder / row["audio"]).resolve())
    if "://" not in path and not Path(path).is_file():
        raise ValueError(f"{path} does not exist; correct the path")
    topic, keyword, is_kept = asmr_db_topics.classify([row.get("title", ""), *tags], topics)
    if row.get("topic"):
        topic, keyword, is_kept = row["topic"], "", row["topic"] in topics.kept
    reason = ""
    if not is_kept:
        shown = f", for its keyword {keyword!r}" if keyword else ""
        reason = (
            f"the topic {topic} is left out{shown}" if topic else "no keyword of a topic in title and tags"
        )
    facts = Recording(
        safe_name(str(row.get("id") or Path(path).stem)), path, safe_name(row["speaker"].strip()), topic,
        row.get("language") or "", row.get("style", "asmr"), str(row.get("gender", "")), str(row.get("rights", "")),
    )  # fmt: skip
    return {"accepted": is_kept, "reason": reason, "keyword": keyword} | dataclasses.asdict(facts)


def index(source: str | Path, out: str | Path, topics: asmr_db_topics.Topics) -> Counter:
    """Writes WORK/index.jsonl: every recording of the list with its topic, accepted or with the reason why not.

    Args:
        source: JSON lines, see `index_row`.
        out: the work folder.

    Returns:
        How many of each topic are accepted; under "left out", how many are not, and under "unusable", bad lines.
    """
    source, rows, seen = Path(source), [], set()
    if not source.is_file():
        raise ValueError(
            f"there is no list {source}; give a file of JSON lines with audio, speaker and title"
        )
    for i, row in request.read_json_lines(source):
        try:
            found = index_row(row, source.parent, topics)
            if found["id"] in seen:
                raise ValueError(f"its id {found['id']!r} is that of an earlier line; give each its own id")
            seen.add(found["id"])
        except ValueError as e:
            found = {"accepted": False, "reason": f"line {i} of {source.name}: {e}", "line": row}
        rows.append(found)
    Folder(out).write(INDEX, asmr_db_pieces.json_lines(rows))
    return Counter(
        row["topic"] if row["accepted"] else "unusable" if "line" in row else "left out" for row in rows
    )


def recordings_of(work: str | Path) -> list[Recording]:
    """The accepted recordings of WORK/index.jsonl.

    Raises:
        ValueError: if there is no index or nothing is accepted in it.
    """
    path = Path(work) / INDEX
    if not path.is_file():
        raise ValueError(f"there is no {path}; run `python data/asmr_db.py index LIST --out {work}` first")
    names = [f.name for f in dataclasses.fields(Recording)]
    rows = [row for _, row in request.read_json_lines(path)]
    out = [Recording(**{k: row[k] for k in names}) for row in rows if row["accepted"]]
    if not out:
        raise ValueError(f"{path} accepts no recording; read the reasons in it")
    return out


# ---------------------------------------------------------------- vet: which creators


def draw_clips(recordings: Sequence[Recording], lengths_s: dict[str, float], seed: int = 0) -> list[Piece]:
    """Every window of `CLIP_S` of one creator's recordings, in random order: the sheet takes the first ten that sound.

    Args:
        recordings: of one creator.
        lengths_s: recording id -> seconds.
        seed: the same one gives the same order.
    """
    windows = [
        Piece(r, k, k * CLIP_S, (k + 1) * CLIP_S)
        for r in recordings
        for k in range(int(lengths_s[r.id] / CLIP_S))
    ]
    random.Random(f"{seed}-{recordings[0].speaker}").shuffle(windows)
    return windows


def vet(work: str | Path, seed: int = 0) -> list[dict]:
    """Writes ten random clips a creator into WORK/vetting and the sheet WORK/vetting.csv.

    Creators that the sheet has already keep their rows and verdicts. `voiced` is `clip.voiced_share`, a hint only:
    low in whispers.

    Returns:
        The rows of the sheet.
    """
    work = Path(work)
    rows = read_sheet(work / SHEET) if (work / SHEET).is_file() else []
    known = {row["speaker"] for row in rows}
    by_speaker = defaultdict(list)
    for r in recordings_of(work):
        by_speaker[r.speaker].append(r)
    for speaker in sorted(set(by_speaker) - known):
        usable, lengths_s = [], {}
        for r in by_speaker[speaker]:
            try:
                with Folder(work).open(r.audio) as file:
                    lengths_s[r.id] = asmr_db_pieces.cut(r, file)[-1].end_s
                usable.append(r)
            except (ValueError, OSError) as e:
                print(f"note: {r.id} is not vetted: {e}", file=sys.stderr)
        number = 0
        for window in draw_clips(usable, lengths_s, seed) if usable else ():
            try:
                with Folder(work).open(window.recording.audio) as file:
                    wav, rate = asmr_db_pieces.read(window.recording, file, window.start_s, window.end_s)
            except (ValueError, OSError) as e:
                print(f"note: no clip of {window.recording.id}: {e}", file=sys.stderr)
                continue
            if audio.is_silent(wav):
                continue
            number += 1
            name = f"vetting/{speaker}/{number:02d}.wav"
            audio.save(work / name, wav, rate)
            voiced = f"{clip.voiced_share(wav, rate):.2f}"
            facts = (speaker, name, window.recording.id, f"{window.start_s:.1f}", voiced, "", "")
            rows.append(dict(zip(COLUMNS, facts, strict=True)))
            if number == CLIPS:
                break
        if not number:
            print(f"note: {speaker} has no {CLIP_S:g} s of sound to vet", file=sys.stderr)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(work / SHEET, text.getvalue())
    return rows


def read_sheet(path: str | Path) -> list[dict]:
    """Rows of a vetting sheet; ValueError if its columns are not those of `COLUMNS`."""
    text = request.read_text(path).removeprefix("\ufeff")  # spreadsheets put it in front
    rows = list(csv.DictReader(io.StringIO(text), delimiter=";" if ";" in text.split("\n")[0] else ","))
    if rows and not {"speaker", "verdict"} <= set(rows[0]):
        raise ValueError(f"{path} has the columns {', '.join(map(str, rows[0]))}; keep {', '.join(COLUMNS)}")
    return rows


def judge(rows: Iterable[dict]) -> dict[str, str]:
    """Speaker -> "" if the creator is accepted, else why not: at least 80 % of the clips have the verdict yes.

    Raises:
        ValueError: on a verdict that is neither yes nor no.
    """
    verdicts = defaultdict(list)
    for row in rows:
        verdict = (row["verdict"] or "").strip().lower()
        if verdict and verdict not in YES + NO:
            raise ValueError(f"{row.get('clip')} has the verdict {row['verdict']!r}; write yes or no")
        verdicts[row["speaker"]].append(verdict)
    out = {}
    for speaker, marks in verdicts.items():
        good, open_ = sum(m in YES for m in marks), sum(not m for m in marks)
        if open_:
            out[speaker] = f"{open_} of {len(marks)} clips have no verdict in {SHEET}"
        elif good < SHARE * len(marks) - 1e-9:
            out[speaker] = f"{good} of {len(marks)} clips are good, fewer than {100 * SHARE:.0f} %"
        else:
            out[speaker] = ""
    return out


def vetted(work: str | Path, recordings: Sequence[Recording]) -> tuple[list[Recording], dict[str, str]]:
    """(recordings of accepted creators, creator -> why the others are not).

    Raises:
        ValueError: if there is no sheet or it accepts nobody.
    """
    path = Path(work) / SHEET
    if not path.is_file():
        raise ValueError(f"there is no {path}; run `python data/asmr_db.py vet {work}`, or give --no-vetting")
    judged = judge(read_sheet(path))
    refused = {s: judged.get(s, f"not in {SHEET}") for s in sorted({r.speaker for r in recordings})}
    refused = {s: reason for s, reason in refused.items() if reason}
    chosen = [r for r in recordings if r.speaker not in refused]
    if not chosen:
        raise ValueError(f"{path} accepts no creator: " + "; ".join(f"{s}: {r}" for s, r in refused.items()))
    return chosen, refused


# ---------------------------------------------------------------- make: pieces, transcripts, segments, card


def check_settings(work: str | Path, settings: dict) -> bool:
    """Writes WORK/settings.json, or refuses a work folder whose segments were begun with other settings.

    Returns:
        Whether it was written now.
    """
    store = Folder(work)
    if not store.exists("settings.json"):
        store.write("settings.json", json.dumps(settings).encode())
        return True
    if (before := json.loads(store.read("settings.json"))) != settings:
        changed = [
            f"{k} {before.get(k)!r}, not {settings.get(k)!r}"
            for k in settings
            if before.get(k) != settings[k]
        ]
        raise ValueError(
            f"{work} was begun with {', '.join(changed)}; give the same options, or delete its segments, corpus and "
            "settings.json (and transcripts, for another recogniser)"
        )
    return False


def make(
    work: str | Path, recordings: Sequence[Recording], recognizer, settings: Settings, workers: int = 1
) -> Counter:
    """Cuts, transcribes and segments on this machine; goes on where an earlier run stopped.

    Args:
        recognizer: see `asmr_db_recognizers`.
        workers: pieces at a time; they wait for a service together, but share one local model.

    Returns:
        How many pieces were "made", "before" or "failed".

    Raises:
        Unusable: if the recogniser itself cannot work; what was finished stays.
    """
    store, counts, stop = Folder(work), Counter(), threading.Event()
    todo = [p for r in recordings for p in asmr_db_pieces.pieces(r, store)]

    def one(piece: Piece) -> str:
        try:
            return "" if stop.is_set() else asmr_db_pieces.make_piece(piece, store, recognizer, settings)
        except BaseException:  # the recogniser cannot work: the others need not begin
            stop.set()
            raise

    with concurrent.futures.ThreadPoolExecutor(max(workers, 1)) as pool:
        jobs = [pool.submit(one, p) for p in todo]
        try:
            for i, job in enumerate(concurrent.futures.as_completed(jobs), 1):
                counts[job.result()] += 1
                print(f"\r{i} of {len(todo)} pieces", end="", file=sys.stderr, flush=True)
        finally:  # also after Ctrl-C
            stop.set()
            print(file=sys.stderr)
    return counts


def _make(args, beam_args: list[str]) -> int:
    recordings = recordings_of(args.work)
    refused = {}
    if not args.no_vetting:
        recordings, refused = vetted(args.work, recordings)
    for speaker, reason in refused.items():
        print(f"note: {speaker} is left out: {reason}", file=sys.stderr)
    settings = Settings(args.sample_rate, asmr_db_segments.Config(max_s=args.max_s, silence_s=args.silence_s))
    model = Path(args.model).name if args.model else ""
    facts = {"recogniser": " ".join(filter(None, (args.recognizer, model)))} | {
        "highest sample rate": settings.sample_rate, **dataclasses.asdict(settings.cut),
    }  # fmt: skip
    if args.beam:
        try:
            import asmr_db_beam
        except ImportError as e:
            raise ValueError(f"--beam needs {e.name}; pip install -e '.[beam]'") from None
        is_new = check_settings(args.work, facts)
        shared = args.store or args.work
        store = asmr_db_beam.Shared(shared)
        try:
            counts = asmr_db_beam.run(shared, recordings, args.recognizer, args.model, settings, beam_args)
        except ValueError:
            # only the workers can tell whether the recogniser works: what never did pins nothing
            if is_new and not store.names("transcripts"):
                Folder(args.work).remove("settings.json")
            raise
    else:
        if beam_args or args.store:
            raise ValueError(f"--store and options of a Beam runner ({' '.join(beam_args)}) need --beam")
        recognizer = asmr_db_recognizers.make(args.recognizer, args.model)
        check_settings(args.work, facts)
        counts = make(args.work, recordings, recognizer, settings, args.workers)
        store = Folder(args.work)
    total = asmr_db_card.finish(store, recordings, not args.no_vetting, facts)
    failed = f"; {total['failed']} failed: see failures.jsonl there" if total["failed"] else ""
    print(
        f"{args.store or args.work}/corpus: {total['segments']} segments, {total['hours']:.2f} h; "
        f"pieces: {counts['made']} made, {counts['before']} finished before{failed}"
    )
    return 1 if total["failed"] else 0


def main(argv: list[str] | None = None) -> int:
    """Command line: index, vet, make. Exit code 1 if something failed, 2 for bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("index", help="which recordings, by topic")
    p.add_argument(
        "list",
        help="JSON lines: audio, speaker, title; optional tags, id, topic, language, style, gender, rights",
    )
    p.add_argument("--out", required=True, help="the work folder")
    p.add_argument("--topics", help="JSON file of topics and keywords in place of the built-in ones")
    p = commands.add_parser("vet", help="ten random clips a creator, and a sheet for verdicts")
    p.add_argument("work")
    p.add_argument("--seed", type=int, default=0)
    p = commands.add_parser("make", help="transcribe and segment; with --beam also options of the runner")
    p.add_argument("work")
    p.add_argument("--recognizer", required=True, help="fast (Microsoft Fast Transcription) or whisper")
    p.add_argument("--model", help="folder of the Whisper model")
    p.add_argument("--no-vetting", action="store_true", help="take every creator, without a sheet")
    p.add_argument(
        "--workers", type=int, default=1, help="pieces at a time; more than 1 only helps with fast"
    )
    p.add_argument(
        "--sample-rate", type=int, default=24000, help="highest rate of the segments (default 24000 Hz)"
    )
    p.add_argument("--max-s", type=float, default=30.0, help="longest segment (default 30)")
    p.add_argument(
        "--silence-s", type=float, default=1.5, help="a silence is long from here on (default 1.5)"
    )
    p.add_argument("--beam", action="store_true", help="run on Apache Beam (extra beam)")
    p.add_argument(
        "--store", help="where Beam's workers put all files, if they do not see WORK: any Beam file system"
    )
    args, rest = parser.parse_known_args(argv)
    try:
        if args.command == "make":
            return _make(args, rest)
        if rest:
            raise ValueError(f"unknown options: {' '.join(rest)}")
        if args.command == "index":
            topics = asmr_db_topics.read(args.topics) if args.topics else asmr_db_topics.BUILT_IN
            counts = index(args.list, args.out, topics)
            for topic, number in sorted(counts.items()):
                print(f"{topic}: {number}")
            print(f"reasons are in {Path(args.out) / INDEX}")
            return 1 if counts["unusable"] else 0
        else:
            rows = vet(args.work, args.seed)
            speakers = len({row["speaker"] for row in rows})
            print(
                f"{len(rows)} clips of {speakers} creators in {Path(args.work) / 'vetting'}; "
                f"write yes or no into {Path(args.work) / SHEET}"
            )
        return 0
    except (ValueError, OSError) as e:
        print(f"asmr_db: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("asmr_db: stopped; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
