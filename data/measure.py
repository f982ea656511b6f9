"""How fast a large corpus is built, checked and read: a manifest of pieces of noise, and the reading of its records.

    python data/measure.py make DIR --lines 1000000      # DIR/all.jsonl over 100 recordings of a minute, 190 MB
    python data/measure.py read NAME/1.0.0               # records, index and batches: rates and peak memory

Between them `data/build.py build manifest DIR/all.jsonl`. Each line is another tenth of a second.
"""

import argparse
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


def read(folder: str, seconds: float, num_batches: int = 200) -> None:
    """Prints how many records a second are read in order, put into the index, and made into rows of batches."""
    cfg = input_pipeline.Config("vocoder", 64, (folder,), num_samples=1600)
    records, start, count = input_pipeline.Records(cfg, ("audio", "text", "speaker", "style")), time.time(), 0
    while count < len(records) and time.time() - start < seconds:
        records[count]
        count += 1
    _tell(f"records ({count} of {len(records)})", count, start)
    start = time.time()
    _tell("index", len(input_pipeline.read_index(cfg)), start)
    start, batches = time.time(), iter(input_pipeline.make(cfg))
    for _ in range(num_batches):
        next(batches)
    _tell("rows of batches", num_batches * cfg.batch_size, start)


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
    parser.add_argument("--seconds", type=float, default=300.0, help="of the reading in order")
    args = parser.parse_args()
    absl.flags.FLAGS.mark_as_parsed()  # Grain reads absl flags
    try:
        if args.command == "make":
            make(Path(args.folder), args.lines)
        else:
            read(args.folder, args.seconds)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
