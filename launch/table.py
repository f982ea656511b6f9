"""The built-in model's results table, in one command: held-out voices, unseen sentences, every row judged alike.

    python launch/table.py --data WORK/corpus/records/synthetic/1.0.0 --judge WORK/judge --out WORK/table

Everything it hears is synthetic speech. Rows: the recordings, their copy through the vocoder, the flow on their true
tokens, and text to the four tasks; then pool retrieval against one static prompt (the paper's Table III), one to
three refinement passes (Table V), and A2A and N2N without the clip's transcript, all with a proxy of the style score.
Judges and measures: judges.py, evaluate.py.
A finished row is kept and not made again; `--rows` picks some. Needs the extras eval and zh. The Markdown table is
printed and written to OUT/table.md, with the date, the code's revision, the model and the command under it.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))

from deepasmr_jax import (  # noqa: E402
    __version__,
    audio,
    batch,
    evaluate,
    files,
    input_pipeline,
    judges,
    request,
    results,
    shards,
    synthesis,
)

STYLES = {"N": "normal", "A": "asmr"}
TASKS = ("N2A", "A2A", "N2N", "A2N")
CROSS = ("N2A", "A2N")  # the tasks whose task prompt always comes from the pool
STATIC = "one static prompt"
WITHIN = ("A2A", "N2N")  # the tasks whose task prompt is the clip, if its transcript is given
UNKNOWN = "no transcript"
PARTS = {  # option, title -> whether a row of that name belongs there
    ("main", ""): lambda name: not any(x in name for x in (STATIC, "passes", UNKNOWN)),
    ("pool", "Pool retrieval against one static prompt (the paper's Table III)"): lambda name: (
        name.endswith(CROSS) and name.startswith("text") or STATIC in name
    ),
    ("passes", "Refinement passes (the paper's Table V)"): lambda name: (
        name in ("text to N2A", "text to A2N") or "passes" in name
    ),
    (
        "transcript",
        "The clip as task prompt against the nearest pool entry, for want of its transcript",
    ): lambda name: name in ("text to A2A", "text to N2N") or UNKNOWN in name,
}
COLUMNS = (  # title, language (None: all clips), measure of evaluate.evaluate_folder
    ("English words", "en", "matrix_wer"),
    ("Mandarin symbols", "zh", "mandarin_ser"),
    ("unvoiced, English", "en", "unvoiced"),
    ("unvoiced, Mandarin", "zh", "unvoiced"),
    ("unvoiced, both", None, "unvoiced"),
    ("voice first", "en", "retrieval_first"),
    ("token's voice first", "en", "token_speaker_first"),
    ("cosine", "en", "speaker_cosine"),
    ("style (proxy)", "en", "style_proxy"),  # not in the main table
)
MADE = "made.txt"  # date and revision of the sounds of a row
FIELDS = ("pair_id", "audio", "text", "language", "speaker", "style", "kind")
ENROLMENT = 5  # true matrix sentences of each English speaker and style on which the judge of words is set
GALLERY_CLIPS = 6  # clips of each held-out speaker and style from which the judge knows the voice


@dataclasses.dataclass(frozen=True)
class Item:
    """One sentence of a held-out speaker, and another one of the same speaker as the voice clip; by style."""

    language: str
    speaker: str
    text: str
    clip_text: str
    target: dict[str, np.ndarray]
    clip: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Known:
    """What the judges may know of the English speakers: recordings that are no item's target; by style."""

    gallery: dict[str, list[tuple[str, np.ndarray]]]  # (speaker, wav)
    enrolment: dict[str, dict[str, list[tuple[np.ndarray, str]]]]  # speaker -> (wav, matrix sentence)


def read_items(data: str, split: str, per_row: int) -> tuple[dict[str, list[Item]], Known]:
    """Items of each language: matrix sentences first; in Mandarin, whose judge hears anything, others too."""
    records = shards.Records(
        input_pipeline.Config(stage="vocoder", batch_size=1, data_dirs=(data,), split=split), FIELDS
    )
    pairs: dict[tuple, dict] = {}
    for i in range(len(records)):
        record = {k: v.decode() if isinstance(v, bytes) else v for k, v in records[i].items()}
        style = record["style"]
        pair = pairs.setdefault(
            (record["language"], record["speaker"], record["pair_id"]), record | {"wavs": {}}
        )
        pair["wavs"][style] = np.asarray(record["audio"], np.float32) / 32768
    by_speaker: dict[tuple, list] = {}
    for (language, speaker, _), pair in sorted(pairs.items()):
        by_speaker.setdefault((language, speaker), []).append(pair)
    items: dict[str, list[Item]] = {}
    gallery: dict[str, list] = {"normal": [], "asmr": []}
    enrolment: dict[str, dict[str, list]] = {"normal": {}, "asmr": {}}
    for (language, speaker), own in by_speaker.items():
        matrix = [p for p in own if p["kind"] == "matrix"]
        others = [p for p in own if p["kind"] != "matrix"] or matrix
        clips = others[GALLERY_CLIPS:] or matrix
        if language == "en":
            for p in others[:GALLERY_CLIPS]:
                for style in gallery:
                    gallery[style].append((speaker, p["wavs"][style]))
            for style in enrolment:
                enrolment[style][speaker] = [(p["wavs"][style], p["text"]) for p in matrix[-ENROLMENT:]]
            targets = [p for p in matrix[:-ENROLMENT] if not any(p is o for o in others[:GALLERY_CLIPS])]
        else:
            targets = matrix + [p for p in others[:GALLERY_CLIPS] if not any(p is m for m in matrix)]
        for i, p in enumerate(targets):
            clip = next(c for c in (clips[(i + k) % len(clips)] for k in (0, 1)) if c is not p)
            items.setdefault(language, []).append(
                Item(language, speaker, p["text"], clip["text"], p["wavs"], clip["wavs"])
            )
    return {k: _spread(v, per_row) for k, v in items.items()}, Known(gallery, enrolment)


def _spread(items: list[Item], count: int) -> list[Item]:
    """`count` items, taken from all speakers in turn."""
    queues: dict[str, list[Item]] = {}
    for item in items:
        queues.setdefault(item.speaker, []).append(item)
    turn = [q[i] for i in range(max(map(len, queues.values()))) for q in queues.values() if i < len(q)]
    return turn[:count]


def voices_of_others(items: list[Item]) -> list[Item]:
    """For each item, an item of another speaker that lends its voice.

    Raises:
        ValueError: if there is only one speaker.
    """
    lent = []
    for i, item in enumerate(items):
        others = (items[(i + k) % len(items)] for k in range(1, len(items)))
        other = next((o for o in others if o.speaker != item.speaker), None)
        if other is None:
            raise ValueError(
                f"only the speaker {item.speaker!r}: another speaker's voice needs two; leave the row out"
            )
        lent.append(other)
    return lent


class Rows:
    """Makes the sounds of a row: a folder with wavs and results.jsonl."""

    def __init__(self, synthesizer: synthesis.Synthesizer):
        self.synthesizer = synthesizer

    def truth(self, items: list[Item], style: str) -> list[np.ndarray]:
        """The recordings."""
        return [item.target[style] for item in items]

    def copy(self, items: list[Item], style: str) -> list[np.ndarray]:
        """Mel of the recordings through the vocoder."""
        return [self.synthesizer.copy(item.target[style]) for item in items]

    def from_tokens(
        self, items: list[Item], task: str, voices: list[Item] | None = None
    ) -> list[np.ndarray | None]:
        """The flow and the vocoder on the recordings' own tokens, in the voice of the clip (of `voices`)."""
        s, target = self.synthesizer, STYLES[task[2]]
        requests = [self._request(item, task, seed=i) for i, item in enumerate(voices or items)]
        tokens = [s.read_clip(x.target[target], s.sample_rate, voice_style=target).tokens for x in items]
        return [_wav(result) for result in s.speak_tokens(requests, tokens)]

    def from_other_tokens(self, items: list[Item], task: str) -> list[np.ndarray | None]:
        """Tokens of each recording in the voice of another speaker: whose voice is heard?"""
        return self.from_tokens(items, task, voices_of_others(items))

    def _request(self, item: Item, task: str, **options) -> request.Request:
        source, target = STYLES[task[0]], STYLES[task[2]]
        if source == target:
            options = {"voice_text": item.clip_text} | options
        return request.Request(
            text=item.text, voice=item.clip[source], voice_rate=self.synthesizer.sample_rate, style=target,
            voice_style=source, language=item.language, **options,
        )  # fmt: skip

    def speak(self, items: list[Item], task: str, **options) -> list[np.ndarray | None]:
        """Text to speech; None where a request failed."""
        requests = [self._request(item, task, seed=i, **options) for i, item in enumerate(items)]
        made = []
        for start in range(0, len(requests), 32):
            for result in self.synthesizer.batch(requests[start : start + 32]):
                made.append(_wav(result))
        return made


def _wav(result: results.Result | results.Failure) -> np.ndarray | None:
    return None if isinstance(result, results.Failure) else result.audio


def row_table() -> dict[str, tuple]:
    """Name of each row -> (method of Rows, its arguments, its options, style of its output)."""
    rows: dict[str, tuple] = {}
    for method, name in (("truth", "recordings"), ("copy", "vocoder copy")):
        rows[f"{name}, normal"] = (method, ("normal",), {}, "normal")
        rows[f"{name}, whispered"] = (method, ("asmr",), {}, "asmr")
    for method, name in (("from_tokens", "true tokens"), ("from_other_tokens", "another speaker's tokens")):
        for task in ("N2A", "N2N"):
            rows[f"{name} to {task}"] = (method, (task,), {}, STYLES[task[2]])
    for task in TASKS:
        rows[f"text to {task}"] = ("speak", (task,), {}, STYLES[task[2]])
    for task in CROSS:
        rows[f"text to {task}, {STATIC}"] = ("speak", (task,), {"pool_strategy": "static"}, STYLES[task[2]])
    for task in CROSS:
        for passes in (2, 3):
            rows[f"text to {task}, {passes} passes"] = ("speak", (task,), {"refine": passes}, STYLES[task[2]])
    for task in WITHIN:
        rows[f"text to {task}, {UNKNOWN}"] = ("speak", (task,), {"voice_text": None}, STYLES[task[2]])
    return rows


def enrol(judge: judges.MatrixJudge, known: Known, path: Path) -> dict[str, dict[str, float]]:
    """Style -> speaker -> speed at which the judge hears them; kept in a file."""
    if not path.exists():
        found = {
            style: {speaker: judge.enrol(clips, audio.SAMPLE_RATE) for speaker, clips in own.items()}
            for style, own in known.enrolment.items()
        }
        files.write_text(path, json.dumps(found, indent=1))
    return json.loads(path.read_text())


def style_references(known: Known, path: Path, workers: int) -> dict[str, list[evaluate.StyleFeatures]]:
    """Style -> what the style proxy looks at, of each true matrix sentence that is no target; kept in a file."""
    if not path.exists():
        found = {}
        for style, own in known.enrolment.items():
            clips = [clip for of_speaker in own.values() for clip in of_speaker]
            counts = evaluate.unvoiced_ratio([w for w, _ in clips], audio.SAMPLE_RATE, workers=workers)
            found[style] = [
                dataclasses.astuple(evaluate.style_features(w, audio.SAMPLE_RATE, text, "en", u / a))
                for (w, text), u, a in zip(clips, counts.unvoiced, counts.active, strict=True)
            ]
        files.write_text(path, json.dumps(found, indent=1))
    return {k: [evaluate.StyleFeatures(*x) for x in v] for k, v in json.loads(path.read_text()).items()}


def describe_style(references: tuple, others: dict[str, list[evaluate.StyleFeatures]]) -> str:
    """What the style proxy compares with, and its mean over recordings that it has not seen."""
    means = {k: np.mean([evaluate.style_proxy(x, *references) for x in v]) for k, v in others.items()}
    return (
        f"Style (proxy): from -1, the mean of {len(references[0])} normal recordings of these speakers, to +1, that "
        f"of {len(references[1])} whispered ones, by voicing, spectral tilt and pace, no listener; other recordings "
        f"of them have {means['normal']:.2f} (normal) and {means['asmr']:.2f} (whispered)."
    )


@functools.cache
def stamp() -> str:
    """Date and revision of the code at the start; without git, the version of the package."""
    asked = ["git", "describe", "--always", "--dirty"]
    try:
        revision = subprocess.run(
            asked, cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        revision = f"of version {__version__}"
    return f"{datetime.date.today()}, revision {revision}"


def describe_run(stamps: dict[str, str], model: str, argv: list[str]) -> str:
    """When, by which code, model and command the tables were made; `stamps`: row -> when its sounds were made."""
    now = stamp()
    line = f"Measured {now}, model {model}: `python launch/table.py {shlex.join(argv)}`."
    for old in sorted(set(stamps.values()) - {now}):
        names = ", ".join(f"*{name}*" for name, made in stamps.items() if made == old)
        line += f" Sounds made {old}: {names}."
    return line


def check_settings(path: Path, settings: dict, refuse) -> None:
    """Keeps what the rows of a folder are made with; a folder of other rows is refused."""
    if not path.exists():
        files.write_text(path, json.dumps(settings, indent=1) + "\n")
    before = json.loads(path.read_text())
    if changed := [key for key in settings if settings[key] != before.get(key)]:
        key = changed[0]
        refuse(
            f"{path.parent} holds rows with {key} {before.get(key)!r}, not {settings[key]!r}; name another --out"
        )


def make_row(rows: Rows, spec: tuple, items: dict[str, list[Item]], folder: Path) -> None:
    """Writes the sounds of one row and their results.jsonl; a row that is whole is left alone."""
    if (folder / evaluate.RESULTS).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    method, args, options, _ = spec
    lines = []
    for language, own in items.items():
        lent = voices_of_others(own) if method == "from_other_tokens" else own
        for i, (item, wav) in enumerate(zip(own, getattr(rows, method)(own, *args, **options), strict=True)):
            if wav is None:
                wav = np.zeros(audio.SAMPLE_RATE // 2, np.float32)  # failed: all its words are lost
            file = f"{language}_{i:04d}.wav"
            audio.save(folder / file, wav, rows.synthesizer.sample_rate)
            line = {"file": file, "text": item.text, "language": language, "group": language}
            line["speaker"] = lent[i].speaker
            if lent is not own:
                line["token_speaker"] = item.speaker
            lines.append(line)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    files.write_text(folder / MADE, stamp())
    files.write_text(folder / evaluate.RESULTS, text)


def is_judged(report_file: Path, judging: dict) -> bool:
    """Whether a row has been measured by just these judges."""
    if not report_file.exists():
        return False
    present = sorted(name for name, judge in judging.items() if judge is not None)
    return json.loads(report_file.read_text())["settings"].get("judges") == present


def cell(report: dict, language: str | None, measure: str) -> str:
    """A rate in percent, a cosine or a score with its interval, as `12.3 [10.1, 14.9]`; a dash if not measured."""
    value = (report["groups"].get(language, {}) if language else report).get(measure)
    if not value:
        return "-"
    middle = value["value" if "value" in value else "rate"]
    low, high = value["low"], value["high"]
    if measure in ("speaker_cosine", "style_proxy"):
        return f"{middle:.2f} [{low:.2f}, {high:.2f}]"
    scale = 100 if "value" in value else 1
    return f"{scale * middle:.1f} [{scale * low:.1f}, {scale * high:.1f}]"


def markdown(reports: dict[str, dict], parts: list[str], notes: tuple[str, ...] = ()) -> str:
    """The reports of the rows as Markdown tables, one for each of `parts` that has rows, and `notes` under them.

    Left out are empty columns, the style proxy of the main table, and the column of both languages if only one ran.
    """
    tables = []
    languages = {language for report in reports.values() for language in report["groups"]}
    for (part, title), belongs in PARTS.items():
        own = {name: report for name, report in reports.items() if belongs(name)}
        if part not in parts or not own or (title and not any("," in name for name in own)):
            continue
        table = {name: [cell(report, *column[1:]) for column in COLUMNS] for name, report in own.items()}
        kept = [
            i
            for i, (_, language, measure) in enumerate(COLUMNS)
            if any(cells[i] != "-" for cells in table.values())
            and (language or len(languages) > 1)
            and (title or measure != "style_proxy")
        ]
        heads = ["row", *(COLUMNS[i][0] for i in kept)]
        lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        lines += [
            "| " + " | ".join([name, *(cells[i] for i in kept)]) + " |" for name, cells in table.items()
        ]
        tables.append((f"{title}\n\n" if title else "") + "\n".join(lines) + "\n")
    counts = {
        " / ".join(f"{group['clips']} {language}" for language, group in sorted(report["groups"].items()))
        for report in reports.values()
    }
    size = f"Utterances a row: {', '.join(sorted(counts))}. Unvoiced ratio: {evaluate.PitchSettings().describe()}."
    return "\n".join([*tables, size, *notes, ""])


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="corpus with the held-out splits (TFDS version folder)")
    parser.add_argument(
        "--split", default="test", help="test: held-out speakers; hts: an engine new to the model"
    )
    parser.add_argument("--model", help="model folder; the built-in one if absent")
    parser.add_argument("--judge", help="folder with the Mandarin recogniser")
    parser.add_argument("--out", required=True)
    parser.add_argument("--per-row", type=int, default=208, help="utterances per row and language")
    parser.add_argument("--rows", nargs="+", default=[""], help="only rows whose name contains one of these")
    parser.add_argument("--parts", nargs="+", choices=[part for part, _ in PARTS], help="all if absent")
    parser.add_argument("--languages", help="such as en; without it all of the split")
    parser.add_argument(
        "--no-enrolment",
        action="store_true",
        help="hear each voice as it comes, without 25 decodings per voice and style first: more word errors",
    )
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args(argv)

    stamp()  # before anything is changed in the checkout
    argv = sys.argv[1:] if argv is None else argv
    parts = args.parts or [part for part, _ in PARTS]
    wanted = [belongs for (part, _), belongs in PARTS.items() if part in parts]
    table = {name: spec for name, spec in row_table().items() if any(x in name for x in args.rows)}
    table = {name: spec for name, spec in table.items() if any(belongs(name) for belongs in wanted)}
    if not table:
        parser.error(f"no row's name contains {args.rows[0]!r}; the rows are {'; '.join(row_table())}")
    items, known = read_items(args.data, args.split, args.per_row)
    languages = args.languages.split(",") if args.languages else list(items)
    if unknown := [x for x in languages if x not in items]:
        parser.error(f"the split has no sentence in language {unknown[0]!r}; it has {', '.join(items)}")
    items = {k: v for k, v in items.items() if k in languages}
    rows = Rows(synthesis.load(args.model))
    if rows.synthesizer.sample_rate != audio.SAMPLE_RATE:
        parser.error(
            f"the model works at {rows.synthesizer.sample_rate} Hz, the corpus is at "
            f"{audio.SAMPLE_RATE} Hz; give a model of that rate"
        )
    out = Path(args.out)
    model = batch.fingerprint(rows.synthesizer)
    settings = {key: getattr(args, key) for key in ("data", "split", "per_row", "languages")}
    enrolled = known
    if args.no_enrolment:  # older folders do not say that they were enrolled
        settings["no_enrolment"] = True
        enrolled = dataclasses.replace(known, enrolment={style: {} for style in STYLES.values()})
    check_settings(out / "settings.json", settings | {"model": model}, parser.error)
    matrix = judges.MatrixJudge()
    mandarin = judges.MandarinJudge(args.judge) if args.judge else None
    speaker = judges.SpeakerJudge()
    gallery = {
        style: (np.stack([speaker.embed(w, audio.SAMPLE_RATE) for _, w in clips]), [s for s, _ in clips])
        for style, clips in known.gallery.items()
        if "en" in items
    }
    factors = enrol(matrix, enrolled, out / "factors.json") if "en" in items else {}
    style, notes = None, []
    if "en" in items and set(parts) - {"main"}:
        heard = style_references(known, out / "style.json", args.workers)
        style = heard["normal"][::2], heard["asmr"][::2]
        notes.append(describe_style(style, {name: own[1::2] for name, own in heard.items()}))
    reports, stamps = {}, {}
    judging = dict(matrix=matrix, mandarin=mandarin, speaker=speaker, style=style)
    for name, spec in table.items():
        folder = out / re.sub("[^A-Za-z0-9]+", "_", name)
        make_row(rows, spec, items, folder)
        report_file = folder / "evaluation.json"
        if not is_judged(report_file, judging):
            evaluate.evaluate_folder(
                folder, **judging, gallery=gallery.get(spec[3]),
                factors=factors.get(spec[3]), workers=args.workers,
            )  # fmt: skip
        reports[name] = json.loads(report_file.read_text())
        made = folder / MADE
        stamps[name] = made.read_text() if made.exists() else "at an unknown revision"
        print(name, *(cell(reports[name], *column[1:]) for column in COLUMNS), sep=" | ", flush=True)
    tables = markdown(reports, parts, (*notes, describe_run(stamps, model, argv)))
    files.write_text(out / "table.md", tables)
    print("\n" + tables)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(f"table.py: {error}", file=sys.stderr)
        sys.exit(2)
