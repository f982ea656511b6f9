"""Many requests into a folder: wavs, and a JSON line for each; what is finished is not made again.

`to_folder` speaks the rows of a list, some at a time, and writes each wav and its line as soon as it is there, so a
run may be stopped at any time and goes on with the same call. A row that cannot be spoken is a line of
failures.jsonl and stops nothing. A row is made again if it, the model or its clip has changed. `deepasmr batch` is
this function; `evaluate.py` reads the folder.
"""

import json
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from deepasmr_jax import evaluate, files, request, results, synthesis


def to_folder(
    synthesizer: synthesis.Synthesizer,
    rows: Sequence[dict],
    folder: str | os.PathLike,
    progress: Callable[[str], None] | None = None,
    at_once: int = 32,
) -> tuple[int, int, int]:
    """Speaks many requests into a folder: wavs, and a JSON line each in results.jsonl or failures.jsonl.

    A row is finished if the folder has its line, made from the same row by the same model, and its wav, and the
    clip is not newer than the wav. Finished rows are left alone, so the same call goes on where one was stopped;
    failures are tried again.

    Args:
        synthesizer: the model.
        rows: fields of `Request`, and anything else ("group", "speaker", ...). A line holds all of the row but
            arrays, then facts of the result in place of fields of the same name, the absolute path of the voice
            as "clip" (a voice that is an array has none, unless the row gives "clip"), and the row as it was under
            "asked". "file" names the wav in the folder, else it is row number and task. A row that cannot be used,
            or names a file that an earlier one has, is a failure; one with an array is always made again.
        folder: made if absent; files of the same name are replaced.
        progress: called with a sentence now and then.
        at_once: requests held in memory together; results do not depend on it.

    Returns:
        (number made, number failed, number that was finished before).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = fingerprint(synthesizer)
    finished = _finished(folder, rows, model)
    files.write_text(folder / evaluate.RESULTS, "".join(map(_json_line, finished.values())))
    owners = {row.get("file"): i for i, row in reversed(list(enumerate(rows)))}
    left = [i for i in range(len(rows)) if i not in finished]
    counts = [0, 0]
    with (
        (folder / evaluate.RESULTS).open("a", encoding="utf-8") as made,
        (folder / evaluate.FAILURES).open("w", encoding="utf-8") as failed,
    ):
        for start in range(0, len(left), at_once):
            now = left[start : start + at_once]
            asked = [_asked(i, rows[i], owners) for i in now]
            spoken = iter(synthesizer.batch([r for r in asked if isinstance(r, request.Request)]))
            for i, one in zip(now, asked, strict=True):
                result = next(spoken) if isinstance(one, request.Request) else one
                row = {k: v for k, v in rows[i].items() if not hasattr(v, "__array__")}
                line = row | {"row": i, "asked": row}
                if isinstance(row.get("voice"), str | os.PathLike):  # relative to where this was called
                    line["clip"] = str(Path(row["voice"]).absolute())
                if isinstance(result, results.Failure):
                    failed.write(_json_line(line | {"error": result.error}))
                    counts[1] += 1
                    continue
                line |= {"file": row.get("file", f"{i:05d}_{result.task}.wav"), "model": model}
                result.save(folder / line["file"])
                made.write(_json_line(line | result.facts()))
                counts[0] += 1
            made.flush()
            failed.flush()
            if progress:
                progress(f"{sum(counts)} of {len(left)} done: {counts[0]} made, {counts[1]} failed")
    return counts[0], counts[1], len(finished)


def _finished(folder: Path, rows: Sequence[dict], model: str) -> dict[int, dict]:
    """Number of each row that need not be made again -> its line."""
    path, finished = folder / evaluate.RESULTS, {}
    content = path.read_text("utf-8", errors="replace") if path.exists() else ""
    for text in content.split("\n"):
        try:
            line = json.loads(text)
            number, asked, wav = line["row"], line["asked"], folder / line["file"]
            row = rows[number]
        except (ValueError, KeyError, IndexError, TypeError):  # cut short, or of another list
            continue
        has_array = any(hasattr(v, "__array__") for v in row.values())
        same = not has_array and asked == json.loads(_json_line(row)) and line.get("model") == model
        if same and wav.is_file() and not _is_newer(row.get("voice"), wav):
            finished[number] = line
    return finished


def _is_newer(clip, wav: Path) -> bool:
    try:
        return os.stat(clip).st_mtime > wav.stat().st_mtime
    except (OSError, TypeError):
        return True


def fingerprint(synthesizer: synthesis.Synthesizer) -> str:
    """Name and checksum of the model: settings, checksums of the weights, and pool."""
    content = zlib.crc32(json.dumps(synthesizer.config, sort_keys=True, default=str).encode())
    for e in synthesizer.pool:
        for part in (e.name.encode(), e.transcript.encode(), e.speech_tokens, e.mel, e.speaker_embedding):
            content = zlib.crc32(part, content)
    return f"{synthesizer.name} {content:08x}"


def _asked(number: int, row: dict, owners: dict[str, int]) -> request.Request | results.Failure:
    """The request of a row of a list, checked before any work."""
    try:
        file = request.check_file_name(row.get("file", "unnamed.wav"))
        if owners.get(file, number) != number:
            raise ValueError(f"the file name {file!r} is that of row {owners[file]} too; give another")
        return request.from_row(row, extras=True)
    except (ValueError, TypeError) as e:
        return results.Failure(row, str(e))


def _json_line(line: dict) -> str:
    return json.dumps(line, ensure_ascii=False, default=str) + "\n"  # paths and the like as text
