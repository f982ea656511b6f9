"""A small dataset of random noise for tests: same feature specification as the real one, no meaning."""

import importlib.util
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "data"))

import tfds_files  # noqa: E402

from deepasmr_jax import audio, shards  # noqa: E402


def script(path: str):
    """A script beside the package as a module, such as "launch/table.py"; executed once."""
    name = Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent.parent / path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def record(
    i: int, split: str, num_speakers: int, has_features: bool, seconds: float = 1.2, sample_rate: int = 16000
) -> dict:
    """Record i: speakers in turn, normal and ASMR alternating in pairs, noise of half to one and a half `seconds`.

    At another rate it has the same sound, and `sample_rate`.
    """
    rng = np.random.default_rng([i, len(split)])
    samples = int(rng.integers(round(8000 * seconds), round(24000 * seconds)))
    frames = samples // 320
    out = {
        "id": f"{split}_{i}",
        "pair_id": f"{split}_pair_{i // 2}",
        "audio": rng.integers(-3000, 3000, samples).astype(np.int16),
        "text": "the quiet rain falls",
        "language": "en",
        "speaker": f"speaker_{(i // 2) % num_speakers}",
        "style": ("normal", "asmr")[i % 2],
        "engine": "noise",
        "kind": "matrix",
        "phones": rng.integers(0, 30, frames).astype(np.int32),
        "f0_class": rng.integers(0, 6, frames).astype(np.int32),
    }
    if sample_rate != 16000:
        wav = audio.resample(out["audio"].astype(np.float32), 16000, sample_rate)
        out |= {"audio": np.round(wav).astype(np.int16), "sample_rate": sample_rate}
    if has_features:
        num_tokens = -(-(samples // 160) // 4)
        out |= {
            "speech_tokens": rng.integers(0, 6561, num_tokens).astype(np.int32),
            "mel": rng.normal(-5, 2, (frames, 80)).astype(np.float16),
            "text_ids": rng.integers(1, 60, int(rng.integers(8, 20))).astype(np.int32),
            "speaker_embedding": rng.normal(size=16).astype(np.float32),
        }
    return out


def write(
    folder: Path,
    counts: dict[str, int] | None = None,
    num_speakers: int = 3,
    has_features: bool = True,
    has_labels: bool = True,
    seconds: float = 1.2,
    sample_rate: int = 16000,
    stage: str = "all",
) -> str:
    """Writes the dataset into `folder/noise/1.0.0` and returns that path; two shards per split.

    With a stage of `add_features.KEPT`, what that keeps of the records.
    """
    import tensorflow_datasets as tfds

    tensor = tfds.features.Tensor
    names = ("id", "pair_id", "text", "language", "speaker", "style", "engine", "kind")
    features = {name: tfds.features.Text() for name in names}
    features["audio"] = tensor(shape=(None,), dtype=np.int16, encoding="bytes")
    if sample_rate != 16000:
        features["sample_rate"] = tfds.features.Scalar(np.int32)
    labels = ("phones", "f0_class") if has_labels else ()
    features |= {name: tensor(shape=(None,), dtype=np.int32) for name in labels}
    if has_features:
        features |= {name: tensor(shape=(None,), dtype=np.int32) for name in ("speech_tokens", "text_ids")}
        features["mel"] = tensor(shape=(None, 80), dtype=np.float16, encoding="bytes")
        features["speaker_embedding"] = tensor(shape=(16,), dtype=np.float32)
    if stage != "all":
        import add_features

        kept = add_features.KEPT[stage]
        features = {name: feature for name, feature in features.items() if name in kept}
        features["num_samples"] = tfds.features.Scalar(np.int32)
    features = tfds.features.FeaturesDict(features)
    root, lengths = Path(folder) / "noise" / "1.0.0", {}
    for split, count in (counts or {"train": 48, "valid": 12}).items():
        rows = [record(i, split, num_speakers, has_features, seconds, sample_rate) for i in range(count)]
        rows = [row | {"num_samples": shards.num_samples(row)} for row in rows]
        rows = [{k: v for k, v in row.items() if k in features} for row in rows]
        halves = [rows[: count // 2], rows[count // 2 :]]
        lengths[split] = [len(h) for h in halves]
        for i, half in enumerate(halves):
            tfds_files.write_shard(root / tfds_files.shard_name("noise", split, i, 2), features, half)
    tfds_files.write_metadata(root, features, lengths, "random noise")
    return str(root)
