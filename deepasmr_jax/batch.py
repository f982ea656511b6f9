"""Many requests into a folder: wavs, and a JSON line for each; what is finished is not made again."""

import json
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from deepasmr_jax.evaluate import RESULTS
from deepasmr_jax.request import Request, check_file_name, from_row
from deepasmr_jax.synthesis import Failure, Synthesizer

FAILURES = "failures.jsonl"


def to_folder(
    synthesizer: Synthesizer,
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
        rows: fields of `Request`, and anything else ("group", "speaker", ...); all but arrays is copied into the
            line. "file" names the wav in the folder, else it is row number and task. A row that cannot be used
            is a failure like any other; one with an array is always made again.
        folder: made if absent; files of the same name are replaced.
        progress: called with a sentence now and then.
        at_once: requests held in memory together; results do not depend on it.

    Returns:
        (number made, number failed, number that was finished before).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = _fingerprint(synthesizer)
    finished = _finished(folder, rows, model)
    part = folder / (RESULTS + ".part")
    part.write_text("".join(map(_json_line, finished.values())), "utf-8")
    part.replace(folder / RESULTS)
    left = [i for i in range(len(rows)) if i not in finished]
    counts = [0, 0]
    with (
        (folder / RESULTS).open("a", encoding="utf-8") as made,
        (folder / FAILURES).open("w", encoding="utf-8") as failed,
    ):
        for start in range(0, len(left), at_once):
            now = left[start : start + at_once]
            asked = [_asked(rows[i]) for i in now]
            spoken = iter(synthesizer.batch([r for r in asked if isinstance(r, Request)]))
            for i, request in zip(now, asked, strict=True):
                result = next(spoken) if isinstance(request, Request) else request
                line = _plain(rows[i]) | {"row": i}
                if isinstance(result, Failure):
                    failed.write(_json_line(line | {"error": result.error}))
                    counts[1] += 1
                    continue
                line |= {"file": rows[i].get("file", f"{i:05d}_{result.task}.wav"), "model": model}
                result.save(folder / line["file"])
                made.write(_json_line(line | result.facts()))
                counts[0] += 1
            made.flush()
            failed.flush()
            if progress:
                progress(f"{sum(counts)} of {len(left)} done, {counts[1]} failed")
    return counts[0], counts[1], len(finished)


def _finished(folder: Path, rows: Sequence[dict], model: str) -> dict[int, dict]:
    """Number of each row that need not be made again -> its line."""
    path, finished = folder / RESULTS, {}
    for text in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
            number, wav = line["row"], folder / line["file"]
            row = rows[number]
        except (ValueError, KeyError, IndexError, TypeError):  # cut short, or of another list
            continue
        same = _plain(row) == row and line.get("model") == model
        same = same and json.loads(_json_line(row)).items() <= line.items()
        if same and wav.is_file() and not _is_newer(row.get("voice"), wav):
            finished[number] = line
    return finished


def _is_newer(clip, wav: Path) -> bool:
    try:
        return os.stat(clip).st_mtime > wav.stat().st_mtime
    except (OSError, TypeError):
        return True


def _fingerprint(synthesizer: Synthesizer) -> str:
    """Name and checksum of the model's settings, provenance and pool."""
    content = json.dumps(synthesizer.config, sort_keys=True, default=str).encode()
    for entry in synthesizer.pool.entries:
        content += entry.name.encode() + entry.speech_tokens.tobytes()
    return f"{synthesizer.config.get('name', synthesizer.folder.name)} {zlib.crc32(content):08x}"


def _asked(row: dict) -> Request | Failure:
    """The request of a row of a list, checked before any work."""
    try:
        check_file_name(row.get("file", "unnamed.wav"))
        return from_row(row, extras=True)
    except (ValueError, TypeError) as e:
        return Failure(row, str(e))


def _plain(row: dict) -> dict:
    """The row without arrays."""
    return {k: v for k, v in row.items() if not hasattr(v, "__array__")}


def _json_line(line: dict) -> str:
    return json.dumps(line, ensure_ascii=False, default=str) + "\n"  # paths and the like as text
