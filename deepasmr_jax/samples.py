"""Sounds and pictures during training: what a model makes of held-out rows, beside what was recorded.

A vocoder makes the waveform of a recording's mel, a flow the mel of a row's tokens behind its prompt, a language model
the speech tokens of a text. Mel and tokens are heard where a model folder lends the parts behind them; of a flow there
is a picture of the mel without one. Other models make nothing.
Rows are the first ones of every host, so that all hosts run the same programs; B rows over all hosts.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from deepasmr_jax import audio, checkpoint, decoding, flow, input_pipeline, lm, page, sharding

NUM_SOUNDS = 2  # of each evaluation
SOLVER = dict(num_steps=10, guidance=0.7)  # CosyVoice2's: quick


@dataclasses.dataclass(frozen=True)
class Sample:
    """One picture, with its sound where there is one: PNG and WAV files in memory."""

    name: str
    png: bytes
    wav: bytes | None = None
    sample_rate: int = audio.SAMPLE_RATE
    duration_s: float = 0.0


class Sampler:
    """What a model of one config makes of the same held-out rows, every time.

    Args:
        model_config: of the model that is trained.
        data: how its batches are made.
        batch: one of this host's held-out batches.
        folder: model folder with the parts behind the model (a flow and a vocoder behind an LM, a vocoder behind a
            flow); None: a flow gives pictures, an LM nothing.
        seed: of the random draws.

    Raises:
        ValueError: if the folder lacks a part, or its mel profile is not that of the model before it.
    """

    def __init__(self, model_config, data: input_pipeline.Config, batch: dict, folder: str | None, seed: int):
        self.cfg, self._data = model_config, data
        kind = type(model_config).__module__.rsplit(".", 1)[-1]
        makers = {"lm": self._speak, "flow": self._draw, "vocoder": self._copy, "vocoder_istft": self._copy}
        self._make = makers.get(kind)
        self._flow = self._vocoder = None
        if folder is not None and kind in ("lm", "flow"):
            profile, own = data.mel_profile, checkpoint.read_config(folder).get("mel_profile")
            if kind == "lm":
                profile, self._flow = own, checkpoint.load_component(folder, "flow")
                if not isinstance(self._flow[1], flow.Config):
                    raise ValueError(
                        f"the flow of listen_with {folder} is not of flow.py; name another model folder"
                    )
            if own != profile:
                raise ValueError(
                    f"listen_with {folder} has the mel profile {own!r}, not {profile!r}; name another model folder"
                )
            self._vocoder = checkpoint.load_component(folder, "vocoder")
        elif kind == "lm":
            self._make = None
        mesh = sharding.ensure_mesh().shape
        parts, hosts = mesh["slice"] * mesh["data"], jax.process_count()
        rows = max(parts, NUM_SOUNDS) // hosts
        self._batch = {k: v[:rows] for k, v in batch.items()}
        self._keys = jax.random.split(jax.random.key(seed), hosts * len(next(iter(self._batch.values()))))
        self._count = min(NUM_SOUNDS, len(self._keys))
        self._wanted = ("made", "recorded")  # what was recorded does not change: it is given once

    def __call__(self, model) -> list[Sample]:
        """Samples of the model; the first call adds what was recorded. Every host has to call it."""
        found = [] if self._make is None else self._make(model)
        self._wanted = ("made",)
        return found

    def _copy(self, gan) -> list[Sample]:
        """Waveforms of a vocoder from the mel of recordings."""
        file = checkpoint.model_file(type(self.cfg).__module__.rsplit(".", 1)[-1])
        wav = sharding.put({"wav": self._batch["wav"]})["wav"]
        mel = jax.jit(audio.log_mel, static_argnums=2)(wav, None, self.cfg.mel)
        made = jax.jit(file.apply, static_argnums=1)(gan.generator, self.cfg, mel)
        wavs = {"made": _whole(made), "recorded": _whole(wav)}
        rate = self.cfg.mel.sample_rate
        return [
            _sound(f"{i}/{name}", wavs[name][i], rate) for name in self._wanted for i in range(self._count)
        ]

    def _draw(self, model) -> list[Sample]:
        """Mels of a flow: tokens and prompt of the row, and the sound of them."""
        # a prompt of `flow.sample` is float32
        batch = sharding.put(self._batch | {"mel": self._batch["mel"].astype(np.float32)})
        inputs = [batch[k] for k in ("speech_tokens", "num_tokens", "mel", "prompt_frames")]
        made = flow.sample(model, self.cfg, *inputs, self._keys, **SOLVER)
        lengths = flow.num_frames(self.cfg, _whole(batch["num_tokens"]))
        mels = {"made": made, "recorded": batch["mel"]}
        return [s for name in self._wanted for s in self._heard(name, mels[name], lengths, self.cfg)]

    def _speak(self, model) -> list[Sample]:
        """Speech tokens of a language model for the shortest text of each row, by the lent flow and vocoder."""
        size = self._data.num_tokens // 2
        rows = [
            _shortest({k: v[i] for k, v in self._batch.items()}) for i in range(len(self._batch["tokens"]))
        ]
        text, speech = (_pad([row[j] for row in rows], size) for j in (0, 1))
        num_text, num_speech = (np.int32([min(len(row[j]), size) for row in rows]) for j in (0, 1))
        inputs = sharding.put(
            dict(
                text_ids=text, text_lengths=num_text, prompt_tokens=text[:, :0], prompt_lengths=0 * num_text,
                min_lengths=num_speech // 2, max_lengths=np.minimum(2 * num_speech, size),
            )
        )  # fmt: skip
        made, num_made = decoding.generate(
            model, self.cfg, decoding.Sampling(), **inputs, keys=self._keys, max_new=size
        )
        recorded = tuple(sharding.put({"tokens": speech, "count": num_speech}).values())
        said, (decoder, cfg), found = {"made": (made, num_made), "recorded": recorded}, self._flow, []
        for name in self._wanted:
            tokens, count = said[name][0], jnp.maximum(said[name][1], 1)
            empty = jnp.zeros((len(self._keys), flow.num_frames(cfg, size), cfg.mel_bins))
            mel = flow.sample(decoder, cfg, tokens, count, empty, 0 * count, self._keys, **SOLVER)
            found += self._heard(name, mel, flow.num_frames(cfg, _whole(count)), cfg)
        return found

    def _heard(self, name: str, mel: jax.Array, lengths: np.ndarray, cfg) -> list[Sample]:
        """Samples of a mel [B, T, M] of `lengths` frames: the sound if there is a vocoder, else a picture."""
        if self._vocoder is None:
            mel = (_whole(mel) - cfg.mel_mean) / cfg.mel_std / 4 + 0.5  # two deviations to each side
            return [Sample(f"{i}/{name}", page.image(mel[i, : lengths[i]].T)) for i in range(self._count)]
        module, own = self._vocoder
        file = checkpoint.model_file(type(own).__module__.rsplit(".", 1)[-1])
        wavs, hop = _whole(jax.jit(file.apply, static_argnums=1)(module, own, mel)), own.mel.hop_samples
        return [
            _sound(f"{i}/{name}", wavs[i, : lengths[i] * hop], own.mel.sample_rate)
            for i in range(self._count)
        ]


def _whole(x: jax.Array) -> np.ndarray:
    """All rows of a global array, on every host."""
    return np.asarray(jax.jit(lambda x: jax.sharding.reshard(x, PartitionSpec()))(x))


def _shortest(row: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(text ids, speech tokens) of the shortest segment of a packed row of the language model; none of an empty row."""
    ids, sizes = np.unique(row["segment_ids"][row["segment_ids"] > 0], return_counts=True)
    own = row["segment_ids"] == ids[np.argmin(sizes)] if len(ids) else np.zeros_like(row["kinds"], bool)
    return tuple(row["tokens"][own & (row["kinds"] == kind)] for kind in (lm.TEXT, lm.SPEECH))


def _pad(rows: list[np.ndarray], size: int) -> np.ndarray:
    return np.stack([np.pad(row[:size], (0, size - len(row[:size]))) for row in rows])


def _sound(name: str, wav: np.ndarray, sample_rate: int) -> Sample:
    wav = np.nan_to_num(wav)
    return Sample(
        name,
        page.picture(wav, sample_rate),
        page.wav_bytes(wav, sample_rate),
        sample_rate,
        len(wav) / sample_rate,
    )
