"""How fast a large corpus is built, checked and read: a manifest of pieces of noise, and the reading of its records.

    python data/measure.py make DIR --lines 1000000      # DIR/all.jsonl over 100 recordings of a minute, 190 MB
    python data/measure.py read NAME/1.0.0               # index, records, batches, plan: rates and peak memory

Between them `data/build.py build manifest DIR/all.jsonl`. Each line is another tenth of a second.
"""

import argparse
import dataclasses
import json
import resource
import sys
import time
from pathlib import Path

import absl.flags
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from deepasmr_jax import audio, files, input_pipeline  # noqa: E402

RECORDINGS, SECONDS, PIECE_S, STEP_S = 100, 60, 0.1, 0.005
STEPS = ("index", "records", "batches", "plan")


def make(folder: Path, lines: int) -> None:
    """Writes the recordings and DIR/all.jsonl.

    Raises:
        ValueError: if the recordings do not have so many pieces.
    """
    most = RECORDINGS * int((SECONDS - PIECE_S) / STEP_S)
    if not 0 < lines <= most:
        raise ValueError(f"{lines} lines cannot be made; give 1 to {most}")
    rng = np.random.default_rng(0)
    for k in range(RECORDINGS):
        noise = 0.1 * rng.standard_normal(SECONDS * audio.SAMPLE_RATE)
        audio.save(folder / f"{k:03d}.wav", noise, audio.SAMPLE_RATE)
    with files.atomic_path(folder / "all.jsonl") as part, part.open("w") as file:
        for i in range(lines):
            k, start = i % RECORDINGS, round(i // RECORDINGS * STEP_S, 3)
            row = {
                "audio": f"{k:03d}.wav", "id": f"piece_{i:07d}", "text": "Close your eyes, and listen to the rain.",
                "speaker": f"speaker_{k // 2}", "language": "en", "style": ("normal", "asmr")[k % 2],
                "from_s": start, "to_s": round(start + PIECE_S, 3),
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")


class _Planned(input_pipeline._Lm):
    """Rows of the language model that are only planned: the records need no features."""

    fields = ("text",)


def read(folder: str, steps: tuple[str, ...] = STEPS, seconds: float = float("inf")) -> None:
    """Prints how many records a second go through each step, and the process's peak memory when it has ended.

    Args:
        folder: the records.
        steps: of `STEPS`: index, made or mapped; records, all in order; batches, an epoch of the vocoder's; plan, two
            epochs of the language model's rows, with lengths drawn at random as if the records had features.
        seconds: after which records and batches stop.
    """
    cfg = input_pipeline.Config("vocoder", 64, (folder,), num_samples=1600)
    start = time.time()
    if "index" in steps:
        _tell("index", len(input_pipeline.read_index(cfg)), start)
    if "records" in steps:
        start, count = time.time(), 0
        records = input_pipeline.Records(cfg, ("audio", "text", "speaker", "style"))
        while count < len(records) and time.time() - start < seconds:
            records[count]
            count += 1
        _tell(f"records ({count} of {len(records)})", count, start)
    if "batches" in steps:
        start, count, total = time.time(), 0, len(input_pipeline.read_index(cfg))
        batches = iter(input_pipeline.make(cfg))
        while count < total and time.time() - start < seconds:
            count += len(next(batches)["wav"])
        _tell(f"rows of batches ({count} of {total})", count, start)
    if "plan" in steps:
        start, index = time.time(), input_pipeline.read_index(cfg)
        lengths = np.random.default_rng(0).integers(25, 500, (2, len(index)), np.int32)
        index = dataclasses.replace(index, num_tokens=lengths[0], num_text=lengths[1] // 4)
        rows = _Planned(dataclasses.replace(cfg, stage="lm", num_tokens=2048), index)
        rows._plan(1)
        _tell(f"plan of 2 epochs of {rows.num_rows} rows", 2 * len(index), start)


def _tell(what: str, count: int, start: float) -> None:
    spent = time.time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{what}: {count / spent:.0f} a second, {spent:.0f} s, peak memory so far {peak} MiB", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("make", "read"))
    parser.add_argument("folder")
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="of read; default: all")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of records and batches each")
    args = parser.parse_args()
    absl.flags.FLAGS.mark_as_parsed()  # Grain reads absl flags
    try:
        if args.command == "make":
            make(Path(args.folder), args.lines)
        else:
            read(args.folder, tuple(args.steps), args.seconds)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
