"""Names of the tensors of E2 TTS, HiFi-GAN, WeSpeaker and WavLM beside ours; see `public_names`.

Also the warm start of our flow from E2 TTS.
"""

from collections.abc import Mapping

import numpy as np

from deepasmr_jax.public_names import (
    NO_COUNTS,
    Source,
    Table,
    affine,
    fold_spectral_norm,
    fold_weight_norm,
    source_names,
    to_ours,
)


def wavlm(cfg, prefix="model.") -> Table:
    """WavLM with its ECAPA head in the names of `wavlm_large_finetune.pth`; `cfg` is a speaker_wavlm.Config.

    The weight norm of the position convolution is to be folded first: fold_weight_norm(tensors, wavlm_kept_axis).
    WAVLM_IGNORED names what else is in the file.
    """
    table, backbone = {}, f"{prefix}feature_extract.model."

    def layers(ours: str, theirs: str, layout: str = "same") -> None:
        names = tuple(f"{backbone}encoder.layers.{i}.{theirs}" for i in range(cfg.num_layers))
        table[f"layers.{ours}"] = Source(names, layout)

    for i in range(len(cfg.conv_kernels)):
        conv = f"{backbone}feature_extractor.conv_layers.{i}"
        table[f"features.{i}.conv.kernel"] = Source(f"{conv}.0.weight", "conv1d")
        affine(table, f"features.{i}.norm", f"{conv}.2.1", "same", "scale")
    affine(table, "feature_norm", f"{backbone}layer_norm", "same", "scale")
    affine(table, "projection", f"{backbone}post_extract_proj", "linear")
    affine(table, "position", f"{backbone}encoder.pos_conv.0", "conv1d")
    attention = "self_attn"
    table["distance_table"] = Source(f"{backbone}encoder.layers.0.{attention}.relative_attention_bias.weight")
    maps = {name: f"{attention}.{name}_proj" for name in "qkv"} | {"o": f"{attention}.out_proj"}
    maps |= {"gate": f"{attention}.grep_linear", "up": "fc1", "down": "fc2"}
    for ours, theirs in maps.items():
        layers(f"{ours}.kernel", f"{theirs}.weight", "linear")
        layers(f"{ours}.bias", f"{theirs}.bias")
    layers("gate_scale", f"{attention}.grep_a")
    for ours, theirs in (("attn_norm", "self_attn_layer_norm"), ("mlp_norm", "final_layer_norm")):
        layers(f"{ours}.scale", f"{theirs}.weight")
        layers(f"{ours}.bias", f"{theirs}.bias")
    affine(table, "norm", f"{backbone}encoder.layer_norm", "same", "scale")
    table["state_weights"] = Source(f"{prefix}feature_weight")

    norm_names = dict(scale="weight", bias="bias", mean="running_mean", var="running_var")

    def norm(ours: str, theirs: str) -> None:
        for name, public in norm_names.items():
            table[f"head.{ours}.{name}"] = Source(f"{prefix}{theirs}.{public}")

    affine(table, "head.layer1.conv", f"{prefix}layer1.conv", "conv1d")
    norm("layer1.bn", "layer1.bn")
    for i in range(3):
        ours, theirs = f"blocks.{i}", f"layer{i + 2}"
        for unit, public in (("first", "Conv1dReluBn1"), ("last", "Conv1dReluBn2")):
            affine(table, f"head.{ours}.{unit}.conv", f"{prefix}{theirs}.{public}.conv", "conv1d")
            norm(f"{ours}.{unit}.bn", f"{theirs}.{public}.bn")

        def parts(ours: str, theirs: str, layout: str = "same") -> None:
            names = tuple(f"{prefix}{theirs % j}" for j in range(cfg.res2_scale - 1))
            table[f"head.{ours}"] = Source(names, layout)

        parts(f"{ours}.parts.conv.kernel", f"{theirs}.Res2Conv1dReluBn.convs.%d.weight", "conv1d")
        parts(f"{ours}.parts.conv.bias", f"{theirs}.Res2Conv1dReluBn.convs.%d.bias")
        for name, public in norm_names.items():
            parts(f"{ours}.parts.bn.{name}", f"{theirs}.Res2Conv1dReluBn.bns.%d.{public}")
        for j in (1, 2):
            affine(table, f"head.{ours}.gate{j}", f"{prefix}{theirs}.SE_Connect.linear{j}", "linear")
    affine(table, "head.conv", f"{prefix}conv", "conv1x1")
    affine(table, "head.pool1", f"{prefix}pooling.linear1", "conv1x1")
    affine(table, "head.pool2", f"{prefix}pooling.linear2", "conv1x1")
    norm("bn", "bn")
    affine(table, "head.linear", f"{prefix}linear", "linear")
    return table


WAVLM_IGNORED = (
    *NO_COUNTS,
    r"(model\.)?loss_calculator\..*",  # of the training as a classifier
    r"model\.feature_extract\.model\.mask_emb",  # of the pre-training
)


def wavlm_kept_axis(name: str) -> int:
    """Axis of the gain of a weight norm of WavLM: that of the taps in the position convolution, else the first."""
    return 2 if name.endswith("pos_conv.0") else 0


# what an F5-TTS file has besides the network: the mel's buffers, counters, and positions that follow from the sizes
FLOW_E2_IGNORED = (r"(ema_model\.)?mel_spec\..*", "initted", "step", "update", r".*rotary_embed\.inv_freq")


def flow_e2(cfg, prefix: str = "ema_model.transformer.") -> Table:
    """E2TTS_Base of F5-TTS; `cfg` is a flow.Config, see `flow.e2tts_base`. Give `FLOW_E2_IGNORED` to `to_ours`."""
    table = {"token_table": Source(f"{prefix}text_embed.text_embed.weight")}

    def linear(ours: str, theirs: str | tuple[str, ...], has_bias: bool = True) -> None:
        def each(end: str):
            return theirs + end if isinstance(theirs, str) else tuple(name + end for name in theirs)

        table[f"{ours}kernel"] = Source(each(".weight"), "linear")
        if has_bias:
            table[f"{ours}bias"] = Source(each(".bias"))

    linear("time_in.", f"{prefix}time_embed.time_mlp.0")
    linear("time_out.", f"{prefix}time_embed.time_mlp.2")
    linear("input.", f"{prefix}input_embed.proj")
    linear("output.", f"{prefix}proj_out")
    table["norm.scale"] = Source(f"{prefix}norm_out.g")
    for ours, i in (("conv_first", 0), ("conv_second", 2)):
        theirs = f"{prefix}input_embed.conv_pos_embed.conv1d.{i}"
        affine(table, ours, theirs)
    half = cfg.num_layers // 2
    # our upper half is stacked from the last layer to the middle: up[i] merges the input of down[i]
    for stack, numbers in (("down", range(half)), ("up", range(cfg.num_layers - 1, half - 1, -1))):
        layers = [f"{prefix}layers.{i}" for i in numbers]
        if stack == "up":
            linear("up.skip.", tuple(f"{name}.0" for name in layers), has_bias=False)
        # attention.kernel is that of the values, see `s3_v2`
        for ours, theirs in (
            ("attention.query.", "2.to_q"),
            ("attention.key.", "2.to_k"),
            ("attention.", "2.to_v"),
            ("attention.out.", "2.to_out.0"),
            ("mlp_in.", "4.ff.0.0"),
            ("mlp_out.", "4.ff.2"),
        ):
            linear(f"{stack}.{ours}", tuple(f"{name}.{theirs}" for name in layers))
        table[f"{stack}.attention_norm.scale"] = Source(tuple(f"{name}.1.g" for name in layers))
        table[f"{stack}.mlp_norm.scale"] = Source(tuple(f"{name}.3.g" for name in layers))
    return table


_TOKEN_COLUMNS_GAIN = (
    0.1  # the new columns start small, so that the first velocity is that of E2 without text
)


def warm_start_flow(
    cfg,
    tensors: Mapping[str, np.ndarray],
    initial: Mapping[str, np.ndarray],
    mel_profile: str,
    source: str,
    prefix: str = "ema_model.transformer.",
) -> tuple[dict[str, np.ndarray], list[str]]:
    """A speech-token decoder that starts from E2TTS_Base.

    Always copied: layers, skip projections, time MLP, convolutional position term and last norm. On the mel of
    E2 ("f5", mel not normalised) also the output, and of the input projection the rows of noisy mel and
    condition; its rows of tokens are a tenth of their initial values. The token table stays.

    Args:
        cfg: flow.Config of ours: width, layers and heads of E2TTS_Base and `rotary_heads=1`.
        tensors: the file of E2TTS_Base by name.
        initial: every parameter of ours by name at its initial value, see `checkpoint.named_arrays`.
        mel_profile: name of the mel that the decoder makes, see `audio.mel_profile`.
        source: where the tensors come from, for the message.
        prefix: of the network's tensors in the file.

    Returns:
        (every parameter of ours by name, the names of those that were copied; a part as `input.kernel[:200]`).

    Raises:
        ValueError: if the shapes of the file do not fit, the rotary positions are on other heads, or the mel
            is "f5" but normalised, patched or not of E2's bands.
    """
    if cfg.rotary_heads != 1:
        raise ValueError(
            f"rotary_heads is {cfg.rotary_heads}; E2TTS_Base turns its first head only, set rotary_heads=1"
        )
    table = flow_e2(cfg, prefix)
    mel = ("input.kernel", "input.bias", "output.kernel", "output.bias")
    has_mel = mel_profile == "f5"
    if has_mel and (cfg.mel_mean, cfg.mel_std, cfg.patch_frames) != (0.0, 1.0, 1):
        raise ValueError(
            f"mel_mean {cfg.mel_mean}, mel_std {cfg.mel_std}, patch_frames {cfg.patch_frames}: E2TTS_Base "
            "works on the plain mel frame by frame, set 0, 1 and 1"
        )
    left = {"token_table", *(() if has_mel else mel)}
    trunk = {name: s for name, s in table.items() if name not in left}
    shapes = {name: np.shape(initial[name]) for name in trunk}
    rows = 2 * cfg.mel_bins
    if has_mel:  # the file has its own number of token columns: only the rows of the two mels must be there
        weight = tensors.get(f"{prefix}input_embed.proj.weight")
        columns = rows if weight is None else max(rows, np.shape(weight)[-1])
        shapes["input.kernel"] = (columns, *shapes["input.kernel"][1:])
    used = {name for s in trunk.values() for name in source_names(s)}
    arrays = dict(initial)
    copied = []
    found = {name: x for name, x in tensors.items() if name in used}
    for name, x in to_ours(trunk, found, shapes, source):
        if name == "input.kernel":
            x = np.concatenate([x[:rows], _TOKEN_COLUMNS_GAIN * np.asarray(initial[name])[rows:]])
            name_copied = f"{name}[:{rows}]"
        else:
            name_copied = name
        arrays[name] = x
        copied.append(name_copied)
    return arrays, copied


def hifigan(cfg, prefix: str = "") -> Table:
    """Generator of HiFi-GAN after `fold_weight_norm`; `cfg` is a vocoder.Config."""
    table = {}

    def conv(ours: str, theirs: str, layout: str = "conv1d") -> None:
        affine(table, ours, f"{prefix}{theirs}", layout)

    conv("first", "conv_pre")
    conv("last", "conv_post")
    dilations = cfg.residual_dilations * len(cfg.upsample_rates)  # of every block, stage by stage
    for i in range(len(cfg.upsample_rates)):
        conv(f"ups.{i}", f"ups.{i}", "conv_transpose1d")
    for i, block in enumerate(dilations):
        for j in range(len(block)):
            if cfg.is_paired:
                conv(f"blocks.{i}.convs1.{j}", f"resblocks.{i}.convs1.{j}")
                conv(f"blocks.{i}.convs2.{j}", f"resblocks.{i}.convs2.{j}")
            else:
                conv(f"blocks.{i}.convs1.{j}", f"resblocks.{i}.convs.{j}")
    return table


def hifigan_discriminators(cfg) -> Table:
    """`mpd` and `msd` of a HiFi-GAN `do_` file as "mpd.NAME" and "msd.NAME", after `hifigan_folded`."""
    table = {}
    groups = (
        ("by_period", "mpd", len(cfg.periods), len(cfg.period_channels), "column"),
        ("by_scale", "msd", cfg.num_scales, len(cfg.scale_channels), "conv1d"),
    )
    for ours, theirs, count, depth, layout in groups:
        for i in range(count):
            pairs = [(f"convs.{j}", f"convs.{j}") for j in range(depth)] + [("last", "conv_post")]
            for our, their in pairs:
                stem = f"{theirs}.discriminators.{i}.{their}"
                affine(table, f"{ours}.{i}.{our}", stem, layout)
    return table


def hifigan_folded(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Plain weights of a HiFi-GAN file: weight norm everywhere, spectral norm in the first scale discriminator."""
    return fold_spectral_norm(fold_weight_norm(tensors))


# the head of its training, and counters that batch norm keeps and never reads
WESPEAKER_IGNORED = (r"projection\..*", r".*\.num_batches_tracked")


def wespeaker(cfg) -> Table:
    """ResNets of WeSpeaker (`avg_model.pt`); `cfg` is a speaker.Config. Give `WESPEAKER_IGNORED` to `to_ours`."""
    table = {
        "conv1.kernel": Source("conv1.weight", "conv2d"),
        "seg_1.kernel": Source("seg_1.weight", "linear"),
        "seg_1.bias": Source("seg_1.bias"),
    }
    leaves = (("scale", "weight"), ("bias", "bias"), ("mean", "running_mean"), ("var", "running_var"))
    for ours, theirs in leaves:
        table[f"bn1.{ours}"] = Source(f"bn1.{theirs}")

    def block(ours: str, theirs: str | tuple[str, ...], has_shortcut: bool) -> None:
        def each(end: str):
            return theirs + end if isinstance(theirs, str) else tuple(name + end for name in theirs)

        pairs = [(f"{kind}{i}",) * 2 for i in range(1, 4 if cfg.bottleneck else 3) for kind in ("conv", "bn")]
        if has_shortcut:
            pairs += [("shortcut_conv", "shortcut.0"), ("shortcut_bn", "shortcut.1")]
        for our, their in pairs:
            if "conv" in our:
                table[f"{ours}.{our}.kernel"] = Source(each(f".{their}.weight"), "conv2d")
            else:
                for leaf, stored in leaves:
                    table[f"{ours}.{our}.{leaf}"] = Source(each(f".{their}.{stored}"))

    for stage, repeats in enumerate(cfg.repeats, 1):
        block(f"layer{stage}.first", f"layer{stage}.0", stage > 1 or cfg.expansion > 1)
        if repeats > 1:
            block(f"layer{stage}.rest", tuple(f"layer{stage}.{i}" for i in range(1, repeats)), False)
    return table
