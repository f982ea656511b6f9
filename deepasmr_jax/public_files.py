"""Public weight files: the list of those that are known, what a file is, whether it is whole, and its sizes.

`KINDS` is the one list of what is known. A file is recognised by the names of its tensors, never by its own name.
Sizes are read off the shapes, so that a file of another width converts as well; what shapes do not tell is as in the
released models (heads of 64), or stands in a config.json beside the file (rates and mel of HiFi-GAN). Nothing is
executed (`weight_files.py`), and nothing but names and shapes is read (`public_names.py`) before `Found.arrays`.
"""

import dataclasses
import functools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from deepasmr_jax import (
    audio,
    checkpoint,
    flow,
    flow_cosyvoice2,
    lm,
    public_cosyvoice2,
    public_models,
    public_names,
    speaker,
    speaker_campplus,
    speaker_wavlm,
    speech_tokenizer,
    vocoder,
    vocoder_hift,
    weight_files,
    weight_tensors,
)

E2_TTS = "E2 TTS, start of a flow decoder"
HEAD_DIM = 64
NAMED = 40  # names of each kind in the error of a file that is not whole

# fields of a Config that are read off the numbers in names, where a lost last layer looks like a shallower network
_COUNTS = ("num_layers", "num_up_layers", "num_blocks", "num_mid_levels", "blocks_per_level", "repeats")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A public weight file that we can read.

    Attributes:
        name: as a reader knows it.
        component: its place in a model folder.
        marks: tensors that only such a file has, after `prepare`'s renaming of prefixes.
        config: shapes by name -> our Config; takes the values of a config.json beside the file too if `has_settings`.
        table: Config -> `public_names.Table`.
        licence: of the released weights, one of `checkpoint.LICENCES`.
        init: `init(cfg, key)` of the module; the shape of what is written.
        prepare: tensors of the file -> tensors in the names of the table.
        ignored: names that the file may have and we do not use, as regular expressions.
        absent: parameters that such a file never has; they start at random.
        mel_profile: of a flow or vocoder whose Config has none.
        released: file name and size in bytes of the released file, and its sha256 where it is known.
        has_settings: whether a config.json beside the file says what its shapes do not.
        sampling: settings of such a component, in `sampling` of a model's config.json.
        preset: the released Config, where there is one: a file of its widths must have its layers too.
    """

    name: str
    component: str
    marks: tuple[str, ...]
    config: Callable
    table: Callable
    licence: str
    init: Callable
    prepare: Callable = dict
    ignored: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    mel_profile: str | None = None
    released: tuple[tuple[str, int, str | None], ...] = ()
    has_settings: bool = False
    sampling: Mapping[str, object] = dataclasses.field(default_factory=dict)
    preset: Callable | None = None

    def config_of(self, tensors: Mapping, *settings) -> object:
        """The Config of these tensors; the preset where only numbers of layers differ, so that these are missed."""
        cfg = self.config(tensors, *settings)
        preset = self.preset() if self.preset else cfg
        counts = {k: getattr(preset, k) for k in _COUNTS if hasattr(cfg, k)}
        return preset if dataclasses.replace(cfg, **counts) == preset else cfg


@dataclasses.dataclass(frozen=True)
class Found:
    """A recognised file: its kind, its tensors (memory-mapped) in the names of the table, our Config."""

    path: Path
    kind: Kind
    tensors: Mapping[str, np.ndarray]
    config: object

    @property
    def mel_profile(self) -> str | None:
        """Of a flow or vocoder: the profile of its Config, else that of its kind."""
        return getattr(self.config, "mel_profile", self.kind.mel_profile)

    @functools.cached_property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Parameters of ours that the file becomes, without memory."""
        return _shapes(self.kind.init, self.config)

    def num_bytes(self, dtype: str) -> int:
        """Of its component in a model folder, in that type."""
        shapes = self.shapes
        if self.kind.name == E2_TTS:
            shapes = _shapes(flow.init, decoder_around(self.config, self.mel_profile))
        return {"float32": 4}.get(dtype, 2) * sum(int(np.prod(x.shape)) for x in shapes.values())

    def problems(self, most: int | None = None) -> str:
        """Missing, unexpected and reshaped tensors in one sentence, `most` of each named; empty if it is whole."""
        try:
            shapes = {k: x.shape for k, x in self.shapes.items() if k not in self.kind.absent}
        except _BENT as e:
            return f"no network has the shapes of its tensors ({e})"
        table = self.kind.table(self.config)
        return public_names.differences(table, self.tensors, shapes, self.kind.ignored, most)

    def check_whole(self) -> None:
        """ValueError if the file is not whole: up to `NAMED` names of each kind, and how to see more."""
        if problems := self.problems(NAMED):
            rest = f"; `deepasmr doctor {self.path.parent}` names all" if " more" in problems else ""
            raise ValueError(f"{self.path} is not whole: {problems}; fetch it again{rest}")

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """(parameter, array) in the order of `shapes`; ValueError if the file does not fit."""
        kind, shapes = self.kind, {k: x.shape for k, x in self.shapes.items()}
        read = public_names.to_ours(
            kind.table(self.config), self.tensors, shapes, str(self.path), kind.ignored, kind.absent
        )
        return ((k, _start(k, x)) if k in kind.absent else next(read) for k, x in shapes.items())


def _shapes(init: Callable, cfg) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter of `init(cfg, key)`, without memory."""
    module = checkpoint.abstract(lambda key: init(cfg, key), jax.random.key(0))
    return {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in checkpoint.named_arrays(module).items()}


def _start(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Initial value of a parameter of the speech model that a file does not have: normal of 0.02, zero biases."""
    if name.endswith("bias"):
        return np.zeros(shape, np.float32)
    rng = np.random.Generator(np.random.Philox([0, zlib.crc32(name.encode())]))
    return np.float32(0.02) * rng.standard_normal(shape, dtype=np.float32)


# ---------------------------------------------------------------- sizes, read off the shapes


def _count(tensors: Mapping, pattern: str) -> int:
    """One more than the greatest number where the names have `{}` in `pattern`."""
    prefix, _, rest = pattern.partition("{}")
    found = [n[len(prefix) :].split(".")[0] for n in tensors if n.startswith(prefix) and rest in n]
    count = 1 + max((int(x) for x in found if re.fullmatch("[0-9]{1,6}", x)), default=-1)
    if count > len(tensors):
        raise ValueError(f"a layer has the number {count - 1}")
    return count


def _lm_config(t: Mapping, prefix: str = "llm.model.model.", **more) -> lm.Config:
    layer = f"{prefix}layers.0."
    return lm.cosyvoice2(
        text_vocab=t[f"{prefix}embed_tokens.weight"].shape[0],
        width=t[f"{prefix}embed_tokens.weight"].shape[1],
        num_layers=_count(t, f"{prefix}layers.{{}}.mlp.up_proj.weight"),
        num_heads=t[f"{layer}self_attn.q_proj.weight"].shape[0] // HEAD_DIM,
        num_kv_heads=t[f"{layer}self_attn.k_proj.weight"].shape[0] // HEAD_DIM,
        mlp_width=t[f"{layer}mlp.up_proj.weight"].shape[0],
        **more,
    )


def _e2_config(t: Mapping) -> flow.Config:
    """The network of the file itself, by which it is checked; `decoder_around` makes ours of it."""
    prefix = "ema_model.transformer."
    rows, token_width = t[f"{prefix}text_embed.text_embed.weight"].shape
    width = t[f"{prefix}norm_out.g"].shape[0]
    return flow.e2tts_base(
        mel_bins=t[f"{prefix}proj_out.weight"].shape[0],
        num_codes=rows - 1,
        token_width=token_width,
        width=width,
        num_layers=_count(t, f"{prefix}layers.{{}}.1.g"),
        num_heads=width // HEAD_DIM,
    )


def decoder_around(e2: flow.Config, profile: str) -> flow.Config:
    """Our decoder with the Transformer of E2 TTS; mel is normalised as in `flow.deepasmr`, except E2's own ("f5")."""
    normalised = {} if profile != "f5" else dict(mel_mean=0.0, mel_std=1.0)
    return flow.deepasmr(
        mel_bins=audio.mel_profile(profile).num_mels,
        frames_per_token=audio.mel_profile(profile).frames_per_token,
        width=e2.width,
        num_layers=e2.num_layers,
        num_heads=e2.num_heads,
        rotary_heads=e2.rotary_heads,
        **normalised,
    )


def _s3_config(t: Mapping) -> speech_tokenizer.Config:
    width, num_mels, _ = t["encoder.conv1.weight"].shape
    return speech_tokenizer.Config(
        num_mels=num_mels,
        width=width,
        num_heads=width // HEAD_DIM,
        num_blocks=_count(t, "encoder.blocks.{}.attn.out.weight"),
        mlp_width=t["encoder.blocks.0.mlp.0.weight"].shape[0],
        fsmn_kernel=t["encoder.blocks.0.attn.fsmn_block.weight"].shape[2],
    )


def _flow_b_config(t: Mapping) -> flow_cosyvoice2.Config:
    level = "decoder.estimator.mid_blocks.0."
    num_heads, head_dim = t["encoder.encoders.0.self_attn.pos_bias_u"].shape
    return flow_cosyvoice2.cosyvoice2(
        mel_bins=t["encoder_proj.weight"].shape[0],
        num_codes=t["input_embedding.weight"].shape[0],
        speaker_size=t["spk_embed_affine_layer.weight"].shape[1],
        width=num_heads * head_dim,
        num_heads=num_heads,
        mlp_width=t["encoder.encoders.0.feed_forward.w_1.weight"].shape[0],
        num_layers=_count(t, "encoder.encoders.{}.norm_ff.weight"),
        num_up_layers=_count(t, "encoder.up_encoders.{}.norm_ff.weight"),
        channels=t[f"{level}0.res_conv.weight"].shape[0],
        time_width=t["decoder.estimator.time_mlp.linear_1.weight"].shape[0],
        num_mid_levels=_count(t, "decoder.estimator.mid_blocks.{}.0.res_conv.weight"),
        blocks_per_level=_count(t, f"{level}1.{{}}.norm1.weight"),
        block_heads=t[f"{level}1.0.attn1.to_q.weight"].shape[0] // HEAD_DIM,
        block_head_dim=HEAD_DIM,
        block_mlp_width=t[f"{level}1.0.ff.net.0.proj.weight"].shape[0],
    )


def _hift_config(t: Mapping) -> vocoder_hift.Config:
    return dataclasses.replace(
        vocoder_hift.cosyvoice2(),
        initial_channels=t["conv_pre.weight"].shape[0],
        f0_width=t["f0_predictor.classifier.weight"].shape[1],
    )


class SettingsError(ValueError):
    """A config.json beside a weight file that is damaged, not that file's, or of a network that is unknown here."""


_HIFIGAN_SIZES = {  # field of HiFi-GAN's config.json -> ours
    "upsample_rates": "upsample_rates",
    "upsample_kernel_sizes": "upsample_kernels",
    "upsample_initial_channel": "initial_channels",
    "resblock_kernel_sizes": "residual_kernels",
    "resblock_dilation_sizes": "residual_dilations",
}
_HIFIGAN_MEL = {
    "sampling_rate": "sample_rate",
    "n_fft": "n_fft",
    "win_size": "win_samples",
    "hop_size": "hop_samples",
    "num_mels": "num_mels",
    "fmin": "fmin_hz",
    "fmax": "fmax_hz",
}


def _hifigan_config(t: Mapping, settings: Mapping | None = None) -> vocoder.Config:
    """By the config.json beside the file; without one, V3 where the residual blocks are single, else V1 or V2."""
    channels = t["conv_pre.weight"].shape[0]
    if settings is None:
        cfg = vocoder.v3() if "resblocks.0.convs.0.weight" in t else vocoder.v1()
        return dataclasses.replace(cfg, initial_channels=channels)
    cfg = _hifigan_settings(settings)
    stages = _count(t, "ups.{}.weight")
    blocks = _count(t, "resblocks.{}.") // stages
    convs = "convs1" if "resblocks.0.convs1.0.weight" in t else "convs"
    read_off = {
        "resblock": "1" if convs == "convs1" else "2",
        "upsample_initial_channel": channels,
        "upsample_kernel_sizes": [t[f"ups.{i}.weight"].shape[2] for i in range(stages)],
        "resblock_kernel_sizes": [t[f"resblocks.{j}.{convs}.0.weight"].shape[2] for j in range(blocks)],
        "num_mels": t["conv_pre.weight"].shape[1],
    }
    depths = [_count(t, f"resblocks.{j}.{convs}.{{}}.weight") for j in range(blocks)]
    for name, found in read_off.items():
        if settings[name] != found:
            raise SettingsError(f"it has {name} {settings[name]!r}, the tensors {found!r}")
    if [len(x) for x in cfg.residual_dilations] != depths:
        raise SettingsError(
            f"it has resblock_dilation_sizes {settings['resblock_dilation_sizes']}, the tensors {depths} dilations"
        )
    return cfg


def _hifigan_settings(settings: Mapping) -> vocoder.Config:
    """The generator that a config.json of HiFi-GAN describes; SettingsError if there is none here."""
    for name in ("resblock", *_HIFIGAN_SIZES, *_HIFIGAN_MEL):
        if name not in settings:
            raise SettingsError(f"it has no {name}")
    mel = {ours: settings[name] for name, ours in _HIFIGAN_MEL.items()}
    if mel["fmax_hz"] is None and isinstance(mel["sample_rate"], int):
        mel["fmax_hz"] = mel["sample_rate"] / 2
    known = {p.name: p for p in audio.MEL_PROFILES.values() if p.kind == "hifigan"}
    profile = next((n for n, p in known.items() if all(getattr(p, k) == x for k, x in mel.items())), None)
    if profile is None:
        told = ", ".join(f"{name} {settings[name]}" for name in _HIFIGAN_MEL)
        raise SettingsError(f"its mel ({told}) is none of the profiles {', '.join(known)}")
    sizes = {ours: _tuples(settings[name]) for name, ours in _HIFIGAN_SIZES.items()}
    try:
        return vocoder.Config(mel_profile=profile, is_paired=settings["resblock"] == "1", **sizes)
    except TypeError:
        told = ", ".join(f"{name} {settings[name]!r}" for name in _HIFIGAN_SIZES)
        raise SettingsError(f"one of its sizes is of another kind ({told})") from None
    except ValueError as e:
        raise SettingsError(str(e)) from None


def _tuples(x):
    return tuple(map(_tuples, x)) if isinstance(x, list) else x


def _resnet_config(t: Mapping) -> speaker.Config:
    repeats = tuple(_count(t, f"layer{i}.{{}}.conv1.weight") for i in range(1, 5))
    return speaker.Config(
        base_channels=t["conv1.weight"].shape[0],
        repeats=repeats,
        bottleneck="layer1.0.conv3.weight" in t,
        embedding_size=t["seg_1.weight"].shape[0],
    )


def _campplus_config(t: Mapping) -> speaker_campplus.Config:
    blocks = _count(t, "xvector.block{}.tdnnd1.linear1.weight")
    return dataclasses.replace(
        speaker_campplus.cosyvoice(),
        head_channels=t["head.conv1.weight"].shape[0],
        initial_channels=t["xvector.tdnn.linear.weight"].shape[0],
        growth=t["xvector.block1.tdnnd1.cam_layer.linear_local.weight"].shape[0],
        bottleneck=t["xvector.block1.tdnnd1.linear1.weight"].shape[0],
        repeats=tuple(_count(t, f"xvector.block{b}.tdnnd{{}}.linear1.weight") - 1 for b in range(1, blocks)),
        embedding_size=t["xvector.dense.linear.weight"].shape[0],
    )


def _wavlm_config(t: Mapping) -> speaker_wavlm.Config:
    backbone = "model.feature_extract.model."
    position, layers = t[f"{backbone}encoder.pos_conv.0.weight"], f"{backbone}encoder.layers."
    table = t[f"{layers}0.self_attn.relative_attention_bias.weight"]
    convs = f"{backbone}feature_extractor.conv_layers."
    num_convs = _count(t, f"{convs}{{}}.0.weight")
    return dataclasses.replace(
        speaker_wavlm.large_sv(),
        conv_channels=t[f"{convs}0.0.weight"].shape[0],
        conv_kernels=tuple(t[f"{convs}{i}.0.weight"].shape[2] for i in range(num_convs)),
        width=position.shape[0],
        mlp_width=t[f"{layers}0.fc1.weight"].shape[0],
        num_layers=_count(t, f"{layers}{{}}.fc1.weight"),
        num_heads=table.shape[1],
        position_kernel=position.shape[2],
        position_groups=position.shape[0] // position.shape[1],
        num_buckets=table.shape[0],
        head_channels=t["model.layer1.conv.weight"].shape[0],
        res2_scale=1 + _count(t, "model.layer2.Res2Conv1dReluBn.convs.{}.weight"),
        bottleneck=t["model.layer2.SE_Connect.linear1.weight"].shape[0],
        embedding_size=t["model.linear.weight"].shape[0],
    )


def _wavlm_tensors(tensors: Mapping) -> dict[str, np.ndarray]:
    """The tensors under "model", named as in the file, without weight norm."""
    named = {f"model.{name}": x for name, x in tensors.items()}
    return public_names.fold_weight_norm(named, public_models.wavlm_kept_axis)


def _discriminators_config(t: Mapping, settings: Mapping | None = None) -> vocoder.Config:
    """Of the periods only the number can be read; the groups follow from the channels of each convolution.

    The generator beside them is as the config.json says, or V1.
    """
    period, scale = "mpd.discriminators.", "msd.discriminators."

    def weights(prefix: str) -> list:
        return [t[f"{prefix}0.convs.{j}.weight"] for j in range(_count(t, f"{prefix}0.convs.{{}}.weight"))]

    channels = tuple(w.shape[0] for w in weights(scale))
    inputs = (1, *channels[:-1])
    return dataclasses.replace(
        vocoder.v1() if settings is None else _hifigan_settings(settings),
        periods=vocoder.v1().periods[: _count(t, f"{period}{{}}.conv_post.weight")],
        period_channels=tuple(w.shape[0] for w in weights(period)),
        num_scales=_count(t, f"{scale}{{}}.conv_post.weight"),
        scale_channels=channels,
        scale_groups=tuple(i // w.shape[1] for i, w in zip(inputs, weights(scale), strict=True)),
    )


# ---------------------------------------------------------------- the list


KINDS = (
    Kind(
        "CosyVoice2 language model",
        "lm",
        ("llm_embedding.weight", "llm_decoder.weight", "speech_embedding.weight"),
        lambda t: _lm_config(t, num_codes=t["speech_embedding.weight"].shape[0] - 3),
        public_cosyvoice2.lm_cosyvoice2,
        "Apache-2.0",
        lm.init,
        public_cosyvoice2.lm_cosyvoice2_tensors,
        preset=lm.cosyvoice2,
        released=(("llm.pt", 2_023_316_821, None),),
        sampling={"max_ratio": 20.0},
    ),
    Kind(
        "CosyVoice3 language model",
        "lm",
        ("llm_decoder.weight", "speech_embedding.weight", "llm.model.model.norm.weight"),
        lambda t: _lm_config(
            t,
            num_codes=t["speech_embedding.weight"].shape[0] - public_cosyvoice2.COSYVOICE3_SPECIAL,
            num_special=public_cosyvoice2.COSYVOICE3_SPECIAL,
            end_offset=1,
        ),
        public_cosyvoice2.lm_cosyvoice3,
        "Apache-2.0",
        lm.init,
        public_cosyvoice2.lm_cosyvoice3_tensors,
        preset=lm.cosyvoice3,
        sampling={"max_ratio": 20.0},
    ),
    Kind(
        "Qwen2 language model, start of a speech model",
        "lm",
        ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"),
        lambda t: _lm_config(t, "model."),
        public_cosyvoice2.qwen2,
        "Apache-2.0",
        lm.init,
        ignored=(r"lm_head\.weight",),
        absent=public_cosyvoice2.QWEN2_ABSENT,
        preset=lm.cosyvoice2,
    ),
    Kind(
        E2_TTS,
        "flow",
        ("ema_model.transformer.input_embed.proj.weight", "ema_model.transformer.norm_out.g"),
        _e2_config,
        public_models.flow_e2,
        "CC BY-NC 4.0",
        flow.init,
        ignored=public_models.FLOW_E2_IGNORED,
        preset=flow.e2tts_base,
        mel_profile="f5",
    ),
    Kind(
        "CosyVoice2 flow",
        "flow",
        ("encoder.pre_lookahead_layer.conv1.weight", "decoder.estimator.final_proj.weight"),
        _flow_b_config,
        public_cosyvoice2.flow_cosyvoice2,
        "Apache-2.0",
        flow_cosyvoice2.init,
        mel_profile="cv2",
        released=(("flow.pt", 450_575_567, None),),
        preset=flow_cosyvoice2.cosyvoice2,
        sampling={"num_steps": 10, "guidance": 0.7, "method": "euler", "schedule": "cosine"},
    ),
    Kind(
        "CosyVoice2 HiFT vocoder",
        "vocoder",
        ("m_source.l_linear.weight", "f0_predictor.classifier.weight"),
        _hift_config,
        public_cosyvoice2.hift,
        "Apache-2.0",
        vocoder_hift.init,
        public_cosyvoice2.hift_tensors,
        mel_profile="cv2",
        released=(("hift.pt", 83_390_254, None),),
        sampling={"asmr": {"source": "unvoiced"}},  # its F0 predictor can hear a voice in a whisper
    ),
    Kind(
        "S3 speech tokenizer V2",
        "speech_tokenizer",
        ("encoder.conv1.weight", "quantizer._codebook.project_down.weight"),
        _s3_config,
        public_cosyvoice2.s3_v2,
        "Apache-2.0",
        speech_tokenizer.init,
        preset=speech_tokenizer.s3_v2,
        released=(
            (
                "speech_tokenizer_v2.onnx",
                496_082_973,
                "d43342aa12163a80bf07bffb94c9de2e120a8df2f9917cd2f642e7f4219c6f71",
            ),
        ),
    ),
    Kind(
        "CAM++ speaker encoder",
        "speaker",
        ("xvector.tdnn.linear.weight", "head.conv1.weight"),
        _campplus_config,
        public_cosyvoice2.campplus,
        "Apache-2.0",
        speaker_campplus.init,
        ignored=public_names.NO_COUNTS,
        preset=speaker_campplus.cosyvoice,
        released=(("campplus.onnx", 28_303_423, None), ("campplus_cn_common.bin", 28_036_335, None)),
    ),
    Kind(
        "WeSpeaker ResNet speaker encoder",
        "speaker",
        ("seg_1.weight", "layer1.0.conv1.weight"),
        _resnet_config,
        public_models.wespeaker,
        "CC BY 4.0",
        speaker.init,
        ignored=public_models.WESPEAKER_IGNORED,
    ),
    Kind(
        "HiFi-GAN generator",
        "vocoder",
        ("conv_pre.weight", "ups.0.weight", "resblocks.0.convs"),
        _hifigan_config,
        public_models.hifigan,
        "MIT",
        vocoder.init_generator,
        public_models.hifigan_folded,
        has_settings=True,
    ),
    Kind(
        "HiFi-GAN discriminators, for training on",
        "discriminators",
        ("mpd.discriminators.0.convs.0.", "msd.discriminators.0.convs.0."),
        _discriminators_config,
        public_models.hifigan_discriminators,
        "MIT",
        vocoder.Discriminators,
        public_models.hifigan_folded,
        has_settings=True,
    ),
    Kind(
        "WavLM speaker verification, judge of similarity",
        "speaker_judge",
        ("feature_extract.model.encoder.pos_conv.0.", "layer2.SE_Connect.linear1.weight"),
        _wavlm_config,
        public_models.wavlm,
        "CC BY-SA 3.0",
        speaker_wavlm.init,
        _wavlm_tensors,
        ignored=public_models.WAVLM_IGNORED,
        preset=speaker_wavlm.large_sv,
    ),
)
COSYVOICE2 = ("llm.pt", "flow.pt", "hift.pt", "speech_tokenizer_v2.onnx", "campplus.onnx")


# ---------------------------------------------------------------- what a file is


class UnknownModel(ValueError):
    """A readable weight file of a model that is not in `KINDS`."""


def recognise(path: str | os.PathLike) -> Found:
    """What a weight file is, by its tensors.

    Raises:
        UnknownModel: if it is none of `KINDS`.
        ValueError: if it cannot be read; with the file and the reason.
    """
    path = Path(path)
    what = weight_files.kind(path)
    weight_files.check_size(path)
    if what == "onnx":
        graph = weight_files.read_onnx(path)
        _check_memory(path, graph.initializers)
        campplus = None
        try:
            campplus = _campplus_graph_config(graph)
            tree: Mapping = (
                public_cosyvoice2.campplus_onnx(campplus, graph)
                if campplus
                else public_cosyvoice2.s3_v2_onnx(graph)
            )
        except _BENT as e:
            if campplus:
                raise ValueError(f"{path} looks like a CAM++, but is not whole ({e}); fetch it again") from e
            raise UnknownModel(f"{path} is no graph that is known here ({e}); give another file") from e
    else:
        tree = weight_files.read_tree(path)
        if not isinstance(tree, Mapping):
            raise UnknownModel(f"{path} holds no tensors by name; save the state dict of the model")
        tree = _weights(tree)
    tensors = {name: x for name, x in tree.items() if isinstance(name, str) and isinstance(x, np.ndarray)}
    _check_memory(path, tensors)
    kind = next((k for k in KINDS if _has_marks(k, tensors)), None)
    if kind is None:
        some = ", ".join(sorted(tensors)[:3]) or "no tensors"
        raise UnknownModel(
            f"{path} is no model that is known here: it has {len(tensors)} tensors ({some}); "
            f"known are {', '.join(dict.fromkeys(k.name for k in KINDS))}"
        )
    settings = (_settings_beside(path),) if kind.has_settings else ()
    try:
        prepared = kind.prepare(tensors)
        return Found(path, kind, prepared, kind.config_of(prepared, *settings))
    except SettingsError as e:
        raise SettingsError(
            f"the config.json beside {path} does not fit it: {e}; fetch both again, or move config.json "
            "away if it is another model's"
        ) from None
    except _BENT as e:
        raise ValueError(f"{path} looks like a {kind.name}, but is not whole ({e}); fetch it again") from e


def _settings_beside(path: Path) -> dict | None:
    """A HiFi-GAN's config.json in the folder of the file; None if there is none, or another program's."""
    beside = path.parent / "config.json"
    if not beside.is_file():
        return None
    values = json_object(beside)
    if not values:
        raise SettingsError(f"{beside}, which says the rates of {path.name}, is damaged; fetch it again")
    return values if len({*_HIFIGAN_SIZES, *_HIFIGAN_MEL} & set(values)) > 2 else None


def _weights(tree: Mapping) -> Mapping:
    """The part of a file that holds weights; states of optimizers, counters and options beside it are left out."""
    players = ("mpd", "msd")  # beside "optim_g", "optim_d", "steps" and "epoch"
    if all(isinstance(tree.get(key), Mapping) for key in players):
        return {f"{key}.{name}": x for key in players for name, x in tree[key].items()}
    for key in ("generator", "model", "state_dict", "ema_model_state_dict"):
        if isinstance(tree.get(key), Mapping):
            return tree[key]
    return tree


_BENT = (KeyError, ValueError, IndexError, TypeError, ArithmeticError)  # what tensors of odd shapes lead to


def _check_memory(path: Path, tensors: Mapping) -> None:
    """Refuses a tensor that does not fit into memory in float32; arrays are mapped here, none is read."""
    for name, x in tensors.items():
        if 4 * x.size > weight_tensors.memory_bytes():
            raise ValueError(
                f"{path} has {name} of {4 * x.size / 2**30:,.0f} GiB in float32, more than the memory of this machine "
                f"({weight_tensors.memory_bytes() / 2**30:,.0f} GiB); use a larger machine, or fetch the file again"
            )


def _campplus_graph_config(graph) -> speaker_campplus.Config | None:
    """Sizes of a CAM++ from the convolutions of its graph, in their order; None if it is none."""
    weights = [n.inputs[1] for n in graph.nodes if n.op_type == "Conv" and len(n.inputs) > 1]
    shapes = [graph.initializers[w].shape for w in weights if w in graph.initializers]
    flat = [s for s in shapes if len(s) == 3]
    if not shapes or shapes[0][1:] != (1, 3, 3) or len(flat) < 4:
        return None
    inner = flat[1][0]
    growth = next((s[0] for s in flat[1:] if s[2] == 3), 0)  # the local branch may stand behind the context's
    widths = [
        s[1] for s in flat if s[0] == inner and s[2] == 1
    ]  # inputs of the layers: they grow within a block
    starts = [i for i in range(len(widths)) if not i or widths[i] < widths[i - 1]]
    return dataclasses.replace(
        speaker_campplus.cosyvoice(),
        head_channels=shapes[0][0],
        initial_channels=flat[0][0],
        growth=growth,
        bottleneck=inner,
        repeats=tuple(b - a for a, b in zip(starts, [*starts[1:], len(widths)], strict=True)),
        embedding_size=flat[-1][0],
    )


def _has_marks(kind: Kind, tensors: Mapping) -> bool:
    """Whether the tensors have all marks of a kind, as beginnings of names."""

    def has(mark: str) -> bool:
        return any(n.removeprefix("generator.").startswith(mark.removesuffix("weight")) for n in tensors)

    return all(map(has, kind.marks))


def json_object(path: Path) -> dict:
    """The JSON object in a file; an empty one if there is none."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError):
        return {}
    return values if isinstance(values, dict) else {}
