"""Second pass over a corpus: speech tokens, mel, text ids, duration and speaker embedding, as a new dataset.

`python data/add_features.py --data CORPUS/1.0.0 --model MODEL --out FEATURES/1.0.0`
MODEL is an exported folder with the component `speech_tokenizer` and, if embeddings are wanted, `speaker`.
Records are sorted by length into few padded lengths, so that few programs are compiled. Every output shard is
written under a temporary name and then renamed: started again, the pass goes on with the first shard that is
absent. A process uses all accelerators of its host; `--process I/N` makes every N-th shard, a process per host, and
once all have ended, the command without it writes what makes the folder a dataset. A record that cannot be encoded is
left out and named in OUT/report.jsonl. `--for lm` or `--for flow` keeps of each record what that stage of the training
reads. Without `--model`, CORPUS is a folder of this pass with all features, of which the kept ones are copied.
"""

import argparse
import functools
import json
import sys
from collections.abc import Container, Iterable
from pathlib import Path

import jax
import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import tfds_files  # noqa: E402

from deepasmr_jax import (  # noqa: E402
    audio,
    checkpoint,
    config,
    data_check,
    files,
    input_pipeline,
    sharding,
    shards,
    synthesis,
    text,
)

_NAMES = ("id", "pair_id", "language", "speaker", "style", "speech_tokens", "num_samples", "duration_s")
# what is kept of a record for a stage, if it is there; num_samples tells the length of the audio that is not kept
KEPT = {
    "lm": (*_NAMES, "text", "text_ids", "phones", "speaker_embedding"),
    "flow": (*_NAMES, "mel"),
}

# ---------------------------------------------------------------- features


def padded_length(num_samples: int, step_s: float = 1.0) -> int:
    """The static length a waveform is padded to: the next multiple of `step_s` seconds."""
    step = int(step_s * audio.SAMPLE_RATE)
    return -(-max(num_samples, 1) // step) * step


class Extractor:
    """Speech tokens, mel and speaker embeddings of waveforms, in padded batches of few static shapes.

    The rows of a batch are shared out among the devices, each with all weights; they become the mesh of this process.

    Args:
        model_folder: exported folder with `speech_tokenizer`, and `speaker` if embeddings are wanted.
        mel_profile: name of the mel recipe of the features.
        batch_size: rows of one compiled call; rounded up to a multiple of the devices.
        stage: mel or embedding are not made where `KEPT` has them not for it.
        devices: that are used; all of this host if None.
    """

    def __init__(
        self, model_folder: str, mel_profile: str, batch_size: int, stage: str = "all", devices=None
    ):
        devices = jax.local_devices() if devices is None else devices
        sharding.make_mesh(data=len(devices), devices=devices)
        self.batch_size = input_pipeline.padded(batch_size, len(devices))
        self.profile = audio.mel_profile(mel_profile)
        components = checkpoint.read_config(model_folder)["components"]
        tokenizer, cfg = checkpoint.load_component(model_folder, "speech_tokenizer")
        file = checkpoint.model_file(components["speech_tokenizer"]["module"])

        def on_devices(function):
            compiled = jax.jit(function)
            return lambda wav, lengths: compiled(*sharding.put({"wav": wav, "lengths": lengths}).values())

        def encode(wav, lengths):
            mel = audio.s3_log_mel(wav, lengths)
            return file.encode(tokenizer, cfg, mel, lengths // audio.S3_HOP_SAMPLES)

        self._encode = on_devices(encode)
        self._s3_log_mel = on_devices(audio.s3_log_mel)
        self._encode_long = functools.partial(file.encode_long, tokenizer, cfg)
        self._window_samples = file.WINDOW_FRAMES * audio.S3_HOP_SAMPLES
        self._embed = None
        self.embedding_size = 0
        kept = KEPT.get(stage, ("mel", "speaker_embedding"))
        if "speaker" in components and "speaker_embedding" in kept:
            speaker, speaker_cfg = checkpoint.load_component(model_folder, "speaker")
            speaker_file = checkpoint.model_file(components["speaker"]["module"])

            def embed(wav, lengths):
                return synthesis.embed_speaker(speaker_file, speaker, speaker_cfg, wav, lengths)

            self._embed = on_devices(embed)
            row = jax.ShapeDtypeStruct((1, 2 * audio.SAMPLE_RATE), np.float32)
            self.embedding_size = jax.eval_shape(embed, row, jax.ShapeDtypeStruct((1,), np.int32)).shape[-1]
        self._mel = None
        if "mel" in kept:
            self._mel = on_devices(lambda wav, lengths: audio.log_mel(wav, lengths, self.profile))

    def __call__(self, wavs: list[np.ndarray], rates: list[int]) -> list[dict[str, np.ndarray]]:
        """Features of each waveform (float32 [W] at its rate in Hz), in the order given."""
        out: list[dict[str, np.ndarray]] = [{} for _ in wavs]
        heard = [-(-len(wav) * audio.SAMPLE_RATE // rate) for wav, rate in zip(wavs, rates, strict=True)]
        order = sorted(range(len(wavs)), key=lambda i: heard[i])
        while order:
            width = padded_length(heard[order[0]])
            rows = [i for i in order if padded_length(heard[i]) == width][: self.batch_size]
            order = [i for i in order if i not in set(rows)]
            pieces = [audio.resample(wavs[i], rates[i], audio.SAMPLE_RATE) for i in rows]
            wav, lengths = _pad(pieces, width, self.batch_size)
            for i, tokens in zip(rows, self._tokens(wav, lengths, len(rows)), strict=True):
                out[i]["speech_tokens"] = tokens
            if self._mel is not None:
                to = self.profile.sample_rate
                if to != audio.SAMPLE_RATE:  # not by way of 16 kHz: the record may have more
                    pieces = [audio.resample(wavs[i], rates[i], to) for i in rows]
                for i, mel in zip(rows, self._mels(pieces, width), strict=True):
                    out[i]["mel"] = mel
            if self._embed is not None:
                for i, embedding in zip(rows, np.asarray(self._embed(wav, lengths)), strict=False):
                    out[i]["speaker_embedding"] = np.asarray(embedding, np.float32)
        return out

    def _mels(self, wavs: list[np.ndarray], width: int) -> list[np.ndarray]:
        """Mel of waveforms at the rate of the profile, padded to what `width` samples at 16 kHz last."""
        width = -(-width * self.profile.sample_rate // audio.SAMPLE_RATE)
        wav, lengths = _pad(wavs, width, self.batch_size)
        mel = np.asarray(self._mel(wav, lengths))
        frames = [int(audio.num_frames(int(n), self.profile)) for n in lengths[: len(wavs)]]
        return [np.asarray(mel[row, :count], np.float16) for row, count in enumerate(frames)]

    def _tokens(self, wav: np.ndarray, lengths: np.ndarray, num_rows: int) -> list[np.ndarray]:
        """Speech tokens of the first rows; those beyond the tokenizer's window (30 s) are read in several."""
        if wav.shape[1] <= self._window_samples:
            tokens, counts = jax.device_get(self._encode(wav, lengths))
            return [np.asarray(tokens[i, : counts[i]], np.int32) for i in range(num_rows)]
        log_mel = np.asarray(self._s3_log_mel(wav, lengths))
        frames = lengths // audio.S3_HOP_SAMPLES
        return [self._encode_long(log_mel[i, : frames[i]]) for i in range(num_rows)]


def _pad(wavs: list[np.ndarray], width: int, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows [num_rows, width] and their lengths; rows that are not needed repeat a second of silence."""
    wav = np.zeros((num_rows, width), np.float32)
    lengths = np.full(num_rows, min(width, audio.SAMPLE_RATE), np.int32)
    for row, x in enumerate(wavs):
        wav[row, : len(x)], lengths[row] = x, len(x)
    return wav, lengths


_ORIGIN = {
    "name": "the text tokenizer",
    "vocab_size": "a text vocabulary of size",
    "speech_tokenizer": "the speech tokenizer of sha256",
    "mel_profile": "the mel profile",
    "speaker": "the speaker encoder of sha256",
    "corpus": "the corpus",
    "corpus_size": "a corpus of",
    "corpus_files": "files of the corpus with names, sizes and times of checksum",
    "shard_size": "the shard size",
    "for": "records for",
}


def add_features(
    data: str,
    model: str | None,
    out: str,
    text_tokenizer: str = "mini",
    mel_profile: str = "mini",
    batch_size: int = 16,
    shard_size: int = 512,
    process: str = "0/1",
    stage: str = "all",
) -> int | None:
    """Writes the feature dataset of every split of a corpus; goes on where an interrupted pass ended.

    Args:
        data: TFDS version folder of the corpus. Tokens and embeddings are made of its audio at 16 kHz, the mel at the
            rate of its profile.
        model: exported model folder; None: `data` is what this function wrote for all stages, of the same corpus, and
            the next three arguments are as they were then.
        out: version folder to write, e.g. `FEATURES/1.0.0`.
        text_tokenizer: "mini", or the folder of a Qwen tokenizer; its name and vocabulary size are written beside
            the features (shards.MADE_WITH_FILE), for the language model to compare; so is all else that an
            interrupted pass must go on with (`_ORIGIN`).
        mel_profile: name of the mel recipe; a flow refuses features of another one.
        batch_size: rows per compiled call.
        shard_size: records per output file.
        process: "I/N": only the shards of process I of N; when all have ended, "0/1" completes the folder.
        stage: "all" keeps every field of the corpus beside the features; "lm" or "flow" what `KEPT` says. The same
            records are left out.

    Returns:
        Number of records left out, which the report names: shorter than one token, or a text that cannot be encoded.
        None if shards of other processes are still to come.

    Raises:
        ValueError: if a folder or the speech tokenizer is missing, `out` was begun with something else of `_ORIGIN`, or
            no record is left.
    """
    import tensorflow_datasets as tfds

    index, count = tfds_files.process_of(process)
    if stage not in ("all", *KEPT):
        raise ValueError(f"records for {stage!r} are unknown; give one of all, {', '.join(KEPT)}")
    folder = Path(out)
    source = shards.builder(str(data))
    size = (f"{name} {i.num_examples} records {i.num_bytes}" for name, i in source.info.splits.items())
    corpus = {
        "corpus": str(Path(data).resolve()),
        "corpus_size": ", ".join(size),
        "corpus_files": shards.files_mark(data, source.info.splits),
        "shard_size": shard_size,
        "for": stage,
    }
    known = dict(source.info.features.items())
    if model is None:
        _note_origin(folder, _origin_of_features(data, known) | corpus)
        with_features = lambda rows: (rows, [])
    else:
        if "audio" not in known:
            raise ValueError(f"{data} has no audio to make features of; give the corpus as --data")
        tokenizer = text.MiniTokenizer() if text_tokenizer == "mini" else text.QwenTokenizer(text_tokenizer)
        checkpoint.component_config(model, "speech_tokenizer")  # refuses a model without one
        components = checkpoint.read_config(model)["components"]
        made = {
            "name": "mini" if text_tokenizer == "mini" else "qwen",
            "vocab_size": tokenizer.vocab_size,
            "speech_tokenizer": components["speech_tokenizer"]["sha256"],
            "mel_profile": mel_profile,
            "speaker": components.get("speaker", {"sha256": "none"})["sha256"],
        }
        _note_origin(folder, made | corpus)
        extract = Extractor(model, mel_profile, batch_size, stage)
        known |= _features_of(extract)
        with_features = functools.partial(_with_features, tokenizer=tokenizer, extract=extract)
    if stage != "all":
        known["num_samples"] = tfds.features.Scalar(np.int32)
    features = tfds.features.FeaturesDict({k: v for k, v in known.items() if k in KEPT.get(stage, known)})
    read = {"audio", "text", "language", "id", *features} & set(source.info.features)
    paths: dict[str, list[Path]] = {}
    for split, info in source.info.splits.items():
        records = shards.Records(input_pipeline.Config("lm", 1, (str(data),), split), tuple(read))
        num_shards = -(-info.num_examples // shard_size)
        names = [tfds_files.shard_name(folder.parent.name, split, i, num_shards) for i in range(num_shards)]
        paths[split] = [folder / name for name in names]
        for shard, path in enumerate(paths[split]):
            if shard % count != index or path.exists():
                continue
            places = range(shard * shard_size, info.num_examples)[:shard_size]
            rows, problems = with_features(_plain(records[i]) for i in places)
            files.write_text(_problems_file(path), "".join(problems))
            rows = (row | {"num_samples": shards.num_samples(row)} for row in rows)
            tfds_files.write_shard(path, features, ({name: row[name] for name in features} for row in rows))
            print(f"{split}: shard {shard + 1} of {num_shards}", flush=True)
    absent = [path.name for of_split in paths.values() for path in of_split if not path.exists()]
    if absent or count > 1:
        print(
            f"{len(absent)} shards are left; once none is, the command without --process completes the folder"
        )
        return None
    return _complete(folder, paths, features, source.info.description or "")


def _features_of(extract: Extractor) -> dict:
    """Specifications of all fields that the pass may add."""
    import tensorflow_datasets as tfds

    tensor = tfds.features.Tensor
    added = {
        "speech_tokens": tensor(shape=(None,), dtype=np.int32),
        "mel": tensor(shape=(None, extract.profile.num_mels), dtype=np.float16, encoding="bytes"),
        "text_ids": tensor(shape=(None,), dtype=np.int32),
        "duration_s": tfds.features.Scalar(np.float32),
    }
    if extract.embedding_size:
        added["speaker_embedding"] = tensor(shape=(extract.embedding_size,), dtype=np.float32)
    return added


def _origin_of_features(data: str, known: Container[str]) -> dict:
    """What made the features of a folder that are to be copied; ValueError if it has not all of them."""
    made = shards.made_with(data)
    absent = sorted(name for name in (*shards.FEATURES, "audio", "duration_s") if name not in known)
    if absent or not made:
        missing = absent or shards.MADE_WITH_FILE
        raise ValueError(f"{data} has no {missing} to copy; give --model, or a folder made --for all")
    return made


def _with_features(rows: Iterable[dict], tokenizer, extract: Extractor) -> tuple[list[dict], list[str]]:
    """The records that can have features, with them; and a line of the report for each other."""
    rows, problems = _fit(rows, tokenizer)
    wavs = [row["audio"].astype(np.float32) / 32768.0 for row in rows]
    found = extract(wavs, [shards.sample_rate(row) for row in rows])
    return [row | more for row, more in zip(rows, found, strict=True)], problems


def _fit(rows: Iterable[dict], tokenizer) -> tuple[list[dict], list[str]]:
    """The records that can have features, with text ids and duration; and a line of the report for each other."""
    fit, problems = [], []
    for row in rows:
        try:
            if (count := shards.num_samples(row)) < audio.TOKEN_SAMPLES:
                raise ValueError(
                    f"it has {count} samples at 16 kHz, fewer than a token, {audio.TOKEN_SAMPLES}"
                )
            ids = tokenizer.encode(row["text"], row["language"])
        except ValueError as error:
            if (sample := {"en": "a", "zh": "一"}.get(row["language"])) is not None:
                tokenizer.encode(
                    sample, row["language"]
                )  # refuses if a package or a file is missing, not the text
            problems.append(data_check.Problem(row["id"], row["id"], "no_features", str(error)).line())
            continue
        fit.append(row | {"text_ids": ids, "duration_s": len(row["audio"]) / shards.sample_rate(row)})
    return fit, problems


def _problems_file(path: Path) -> Path:
    return path.parent / tfds_files.PARTS / f"{path.name}.jsonl"


def _complete(folder: Path, paths: dict[str, list[Path]], features, description: str) -> int:
    """Joins the reports and writes what makes the folder a dataset. Returns the number of records left out."""
    left_out = 0
    with (
        files.atomic_path(folder / data_check.BUILD_REPORT) as part,
        part.open("w", encoding="utf-8") as report,
    ):
        for path in (path for of_split in paths.values() for path in of_split):
            found = _problems_file(path)  # a shard of an older version of this pass has none
            lines = found.read_text("utf-8") if found.exists() else ""
            left_out += lines.count("\n")
            report.write(lines)
    lengths = {
        split: [tfds_files.num_records(path) for path in of_split] for split, of_split in paths.items()
    }
    lengths = {split: counts for split, counts in lengths.items() if sum(counts)}
    if not lengths:
        raise ValueError(f"no record is left, see {folder / data_check.BUILD_REPORT}")
    tfds_files.remove_left_overs(folder)
    tfds_files.write_metadata(folder, features, lengths, description)
    tfds_files.write_index(folder, lengths)
    return left_out


def _note_origin(folder: Path, made: dict) -> None:
    """Writes what the features are made with, or compares it with what is there; older files say less."""
    path = shards.made_with_file(folder)
    if not path.exists():
        config.write_json(path, made)
        return
    # as older passes were, which wrote "1.38 MiB bytes"
    found = {"for": "all"} | json.loads(path.read_text().replace("iB bytes", "iB"))
    for key, what in _ORIGIN.items():
        if key in found and found[key] != made.get(key, found[key]):
            raise ValueError(
                f"{folder} was begun with {what} {found[key]}, not {made[key]}; choose another --out"
            )


def _plain(record: dict) -> dict:
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in record.items()}


def main(argv: list[str] | None = None) -> int:
    """Command line; 0, 1 if a record was left out, 2 for bad input."""
    parser = argparse.ArgumentParser(
        description="Add speech tokens, mel, text ids, durations and speaker embeddings to a corpus."
    )
    parser.add_argument("--data", required=True, help="TFDS version folder of the corpus")
    parser.add_argument(
        "--model",
        help="exported folder with speech_tokenizer (and speaker); without it, features of --data are copied",
    )
    parser.add_argument("--out", required=True, help="version folder to write, e.g. FEATURES/1.0.0")
    parser.add_argument("--text-tokenizer", default="mini", help="mini, or the folder of a Qwen tokenizer")
    parser.add_argument("--mel-profile", default="mini", choices=sorted(audio.MEL_PROFILES))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--shard-size", type=int, default=512)
    parser.add_argument("--process", default="0/1", help="I/N: the share of process I of N")
    parser.add_argument(
        "--for", dest="stage", default="all", choices=("all", *KEPT), help="stage whose fields alone are kept"
    )
    o = parser.parse_args(argv)
    try:
        left_out = add_features(
            o.data,
            o.model,
            o.out,
            o.text_tokenizer,
            o.mel_profile,
            o.batch_size,
            o.shard_size,
            o.process,
            o.stage,
        )
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    if left_out:
        print(f"records left out: {left_out}, see {Path(o.out) / data_check.BUILD_REPORT}")
    return 1 if left_out else 0


if __name__ == "__main__":
    sys.exit(main())
