"""The last step of the corpus tool: the lines of all finished pieces become one manifest and a dataset card.

`finish` reads and writes through a store, so that it ends a local run and a Beam run alike; `card` is a pure function
from manifest lines to Markdown.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from asmr_db_pieces import Recording, Store, json_lines

# DeepASMR-DB as the paper gives it: hours and speakers of each language, and of all
PAPER = {"en": (532.8, 13), "zh": (141.7, 22), "all": (674.5, 35)}


def finish(store: Store, recordings: Sequence[Recording], is_vetted: bool, settings: Mapping) -> dict:
    """Writes corpus/manifest.jsonl, corpus/README.md and failures.jsonl out of what the pieces left.

    Speaker, style, topic and a language that is given are those of `recordings`, also where the index was corrected
    after a piece was finished. Only pieces of `recordings` count: files of a recording that was refused later stay
    where they are and are not listed.

    Args:
        is_vetted: whether somebody listened to every creator.
        settings: name -> value, for the card.

    Returns:
        {"segments", "hours", "failed"}.
    """
    wanted = {r.id: r for r in recordings}
    lines, left_out, failures = [], defaultdict(float), []
    for name in store.names("segments"):
        for row in _rows(store.read(name)):
            if (r := wanted.get(row["recording"])) is not None:
                facts = {"speaker": r.speaker, "language": r.language or row["language"]}
                lines.append(row | facts | {"style": r.style, "topic": r.topic})
    for name in store.names("left_out"):
        if _recording_of(name) in wanted:
            for row in _rows(store.read(name)):
                left_out[row["reason"]] += row["seconds"]
    for name in store.names("failures"):
        row = json.loads(store.read(name))
        if row["recording"] in wanted:
            failures.append(row)
    store.write("corpus/manifest.jsonl", json_lines(lines))
    text = card(lines, recordings, left_out, len(failures), is_vetted, settings)
    store.write("corpus/README.md", text.encode())
    store.write("failures.jsonl", json_lines(failures))
    hours = sum(row["duration_s"] for row in lines) / 3600
    return {"segments": len(lines), "hours": hours, "failed": len(failures)}


def card(
    lines: Sequence[Mapping],
    recordings: Iterable[Recording],
    left_out: Mapping[str, float],
    num_failed: int,
    is_vetted: bool,
    settings: Mapping,
) -> str:
    """The dataset card in Markdown, with hours by language, speaker and topic beside the paper's.

    Args:
        lines: of the manifest.
        recordings: for gender and rights of the speakers.
        left_out: reason -> seconds in no segment.
        num_failed: recordings and pieces that failed.
        is_vetted: whether somebody listened to every creator.
        settings: name -> value, how it was made.
    """
    people = {r.speaker: r for r in recordings}
    hours, counts, who = Counter(), Counter(), defaultdict(set)
    for row in lines:
        for key in (
            "all",
            ("language", row["language"]),
            ("topic", row["topic"]),
            ("speaker", row["speaker"]),
        ):
            hours[key] += row["duration_s"] / 3600
            counts[key] += 1
            who[key].add(row["speaker"])
    genders = Counter(people[s].gender for s in who["all"] if s in people and people[s].gender)
    vetting = "creators vetted by ear" if is_vetted else "creators not vetted"
    languages = sorted(key[1] for key in hours if key[0] == "language")
    out = [
        "---",
        "license: other",
        f"language: [{', '.join(languages)}]",
        "task_categories: [text-to-speech]",
        "tags: [asmr, whisper]",
        "---",
        "# ASMR speech corpus",
        "",
        f"{hours['all']:.2f} hours, {counts['all']} segments, {len(who['all'])} speakers"
        + (f" ({', '.join(f'{n} {g}' for g, n in sorted(genders.items()))})" if genders else "")
        + f"; mean segment {3600 * hours['all'] / max(counts['all'], 1):.1f} s.",
        "",
        "Made from recordings in the way of DeepASMR-DB (arXiv 2601.15596, section IV): chosen by topic, "
        f"{vetting}, cut into pieces of at most 10 minutes, transcribed by machine, segmented so that breath stays "
        "and long silence goes. **Transcripts are the recogniser's and were not corrected by hand.**",
        "",
        "| language | hours | segments | speakers | DeepASMR-DB, hours | speakers |",
        "|---|---|---|---|---|---|",
    ]
    for language in [*languages, "all"]:
        key = language if language == "all" else ("language", language)
        paper = PAPER.get(language, ("", ""))
        out.append(
            f"| {language} | {hours[key]:.2f} | {counts[key]} | {len(who[key])} | {paper[0]} | {paper[1]} |"
        )
    for part in ("topic", "speaker"):
        extra = " | gender | rights" if part == "speaker" else ""
        out += ["", f"| {part} | hours | segments{extra} |", "|---" * (5 if extra else 3) + "|"]
        for key in sorted((k for k in hours if k[0] == part), key=lambda k: (-hours[k], k[1])):
            r = people.get(key[1])
            facts = f" | {r.gender if r else ''} | {r.rights if r else ''}" if extra else ""
            out.append(f"| {key[1]} | {hours[key]:.2f} | {counts[key]}{facts} |")
    out += [
        "",
        "`manifest.jsonl` has a JSON object a line: `audio` (path, relative to it), `text`, `speaker`, `language` "
        "(en, zh), `style` (asmr, normal), `topic`, `name`, `duration_s`, and where it was cut: `recording`, "
        "`start_s`, `end_s`. Audio is FLAC, 16 bit, mono, at the recording's own level.",
        "",
        f"Left out: {num_failed} recordings or pieces that failed"
        + "".join(f"; {reason}: {s / 3600:.2f} h" for reason, s in sorted(left_out.items()))
        + ".",
        "",
        "Made with: " + ", ".join(f"{k} {v}" for k, v in settings.items()) + ".",
        "",
        "The rights in every recording stay with its speaker. Use it only for what the speakers agreed to.",
        "",
    ]
    return "\n".join(out)


def _rows(content: bytes) -> list[dict]:
    return [json.loads(line) for line in content.decode().split("\n") if line]


def _recording_of(name: str) -> str:
    """The recording's id out of `folder/ID-000.jsonl`."""
    return name.rsplit("/", 1)[-1].rsplit(".", 1)[0].rsplit("-", 1)[0]
