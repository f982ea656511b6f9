"""How fast a large corpus is built, checked and read: a manifest of pieces of noise, and the reading of its records.

    python data/measure.py make DIR --lines 1000000      # DIR/all.jsonl over 100 recordings of a minute, 190 MB
    python data/measure.py read NAME/1.0.0               # index, records, plan, batches: rates and peak memory

Between them `data/build.py build manifest DIR/all.jsonl`. Each line is another tenth of a second. Or, with features of
noise for the language model or the flow:

    python data/measure.py features NAME/1.0.0 --for lm --lines 1000000
"""

import argparse
import json
import resource
import shutil
import sys
import time
from pathlib import Path

import absl.flags
import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import add_features  # noqa: E402
import tfds_files  # noqa: E402

from deepasmr_jax import audio, files, input_pipeline, shards  # noqa: E402

RECORDINGS, SECONDS, PIECE_S, STEP_S = 100, 60, 0.1, 0.005
STEPS = ("index", "records", "plan", "batches")


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


def features(folder: Path, stage: str, count: int, shard: int = 5000) -> None:
    """Writes records as data/add_features.py --for STAGE does, of noise: shards of `shard`, all with the same content.

    Speech tokens, text ids and mel are random numbers. For the language model an utterance has 25 to 500 tokens and a
    quarter as many text ids, for the flow five tokens and ten mel frames (0.2 s).

    Raises:
        ValueError: if `count` is no number of whole shards, or the folder has records.
    """
    import tensorflow_datasets as tfds

    if count <= 0 or count % shard or list(folder.glob("*.array_record-*")):
        raise ValueError(
            f"{count} records in {folder} cannot be made; give a multiple of {shard}, and a new folder"
        )
    tensor = tfds.features.Tensor
    kept = {name: tfds.features.Text() for name in ("id", "pair_id", "language", "speaker", "style", "text")}
    kept |= {name: tensor(shape=(None,), dtype=np.int32) for name in ("speech_tokens", "text_ids")}
    kept |= {"mel": tensor(shape=(None, 80), dtype=np.float16, encoding="bytes")}
    kept |= {"num_samples": tfds.features.Scalar(np.int32), "duration_s": tfds.features.Scalar(np.float32)}
    spec = tfds.features.FeaturesDict({k: v for k, v in kept.items() if k in add_features.KEPT[stage]})
    rng = np.random.default_rng(0)

    def record(i: int) -> dict:
        tokens = rng.integers(0, 6561, 5 if stage == "flow" else rng.integers(25, 501))
        row = {
            "id": f"u_{i}", "pair_id": f"p_{i // 2}", "language": "en", "speaker": f"speaker_{i % 100 // 2}",
            "style": ("normal", "asmr")[i % 2], "text": "rain " * (len(tokens) // 20), "speech_tokens": tokens,
            "text_ids": rng.integers(1, 60, len(tokens) // 4), "mel": rng.normal(-5, 2, (2 * len(tokens), 80)),
            "num_samples": 640 * len(tokens), "duration_s": len(tokens) / audio.TOKEN_RATE,
        }  # fmt: skip
        return {
            name: np.asarray(row[name], kept[name].np_dtype) if kept[name].shape else row[name]
            for name in spec
        }

    num_shards = count // shard
    first, *others = (
        folder / tfds_files.shard_name(folder.parent.name, "train", i, num_shards) for i in range(num_shards)
    )
    tfds_files.write_shard(first, spec, map(record, range(shard)))
    for path in others:
        shutil.copy2(first, path)
        shutil.copy2(shards.piece_path(first), shards.piece_path(path))
    made = {"name": "mini", "vocab_size": 313, "mel_profile": "mini", "corpus": "none: noise", "for": stage}
    files.write_text(folder / shards.MADE_WITH_FILE, json.dumps(made))
    tfds_files.write_metadata(folder, spec, {"train": [shard] * num_shards}, "Noise of data/measure.py.")


def _config(folder: str) -> input_pipeline.Config:
    """Of the stage that the records are for."""
    stage = shards.made_with(folder).get("for", "vocoder")
    sizes = {
        "vocoder": dict(batch_size=64, num_samples=1600),
        "lm": dict(batch_size=128, num_tokens=2048),  # as configs/lm_pretrain.py
        "flow": dict(batch_size=64, num_tokens=16, min_prompt_tokens=2, max_prompt_tokens=5),
    }
    return input_pipeline.Config(stage, data_dirs=(folder,), **sizes[stage])


def read(folder: str, steps: tuple[str, ...] = STEPS, seconds: float = float("inf")) -> None:
    """Prints how many records a second go through each step, and the process's peak memory when it has ended.

    Args:
        folder: the records.
        steps: of `STEPS`: index, made or mapped; records, all in order; plan, the rows of an epoch (of the language
            model) or its order (of the flow); batches, an epoch of them.
        seconds: after which records and batches stop.
    """
    cfg = _config(folder)
    start = _now()
    if "index" in steps:
        _tell("index", len(shards.read_index(cfg)), start)
    if "records" in steps:
        start, count, records = _now(), 0, shards.Records(cfg)
        while count < len(records) and time.time() - start[0] < seconds:
            records[count]
            count += 1
        _tell(f"records ({count} of {len(records)})", count, start)
    if "plan" in steps and cfg.stage != "vocoder":
        index, start = shards.read_index(cfg), _now()
        rows = {"lm": input_pipeline._Lm, "flow": input_pipeline._Flow}[cfg.stage](cfg, index)
        _tell("start of the stage, with its first plan", len(index), start)
        start = _now()
        rows._plan(1) if cfg.stage == "lm" else rows.mixture.order(1)
        _tell(f"plan of an epoch of {rows.num_rows} rows", len(index), start)
    if "batches" in steps:
        batches = iter(input_pipeline.make(cfg))
        next(batches)
        start, count, total = _now(), 0, len(shards.read_index(cfg))
        while count < total and time.time() - start[0] < seconds:
            count += len(next(iter(next(batches).values())))
        _tell(f"rows of batches ({count})", count, start)


def _now() -> tuple[float, float]:
    return time.time(), time.process_time()


def _tell(what: str, count: int, start: tuple[float, float]) -> None:
    spent, busy = (now - then for now, then in zip(_now(), start, strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    rate = f"{count / spent:.0f} a second, {spent:.0f} s, {busy:.1f} of the processor"
    print(f"{what}: {rate}, peak memory so far {peak} MiB", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("make", "features", "read"))
    parser.add_argument("folder")
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument(
        "--for", dest="stage", choices=(*add_features.KEPT,), default="lm", help="of features"
    )
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="of read; default: all")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of records and batches each")
    args = parser.parse_args()
    absl.flags.FLAGS.mark_as_parsed()  # Grain reads absl flags
    try:
        if args.command == "make":
            make(Path(args.folder), args.lines)
        elif args.command == "features":
            features(Path(args.folder), args.stage, args.lines)
        else:
            read(args.folder, tuple(args.steps), args.seconds)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
