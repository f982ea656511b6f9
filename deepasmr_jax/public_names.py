"""Which tensor of a public weight file becomes which parameter of ours: one table a model, and the conversion by it.

A table is {parameter of ours: Source}. It is read in both directions: `to_ours` converts a file for us, `to_theirs`
writes ours under the public names. Every tensor of a file must be used or named as ignored, every parameter of ours
must be given. Tables know nothing of files (`weight_files.py`) or of modules: they take a Config and give names.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an array of the file is turned into ours and back; views, nothing is copied."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


LAYOUTS = {  # what PyTorch stores -> what ours is
    "same": Layout(lambda x: x, lambda x: x),
    "linear": Layout(lambda x: x.T, lambda x: x.T),  # (out, in) -> (in, out)
    "conv1d": Layout(
        lambda x: x.transpose(2, 1, 0), lambda x: x.transpose(2, 1, 0)
    ),  # (o, i, k) -> (k, i, o)
    "conv2d": Layout(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),  # -> (h, w, i, o)
    # (in, out, k) -> (k, in, out), reversed along k: ours is run as a convolution of the input with zeros between
    "conv_transpose1d": Layout(lambda x: x.transpose(2, 0, 1)[::-1], lambda x: x[::-1].transpose(1, 2, 0)),
    "depthwise": Layout(lambda x: x[:, 0].T, lambda x: x.T[:, None]),  # (channels, 1, k) -> (k, channels)
    "conv1x1": Layout(lambda x: x[..., 0].T, lambda x: x.T[..., None]),  # (out, in, 1) -> (in, out)
}


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a parameter comes from.

    Attributes:
        names: one tensor; or several of one shape, which are stacked as the first axis of the parameter.
        layout: key of `LAYOUTS`.
    """

    names: str | tuple[str, ...]
    layout: str = "same"


Table = dict[str, Source]


def to_ours(
    table: Table,
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    source: str,
    ignored: Iterable[str] = (),
) -> Iterator[tuple[str, np.ndarray]]:
    """Converts the tensors of a file, one parameter at a time, after all names and shapes were checked.

    Args:
        table: the model's table.
        tensors: the file by name; arrays may be memory-mapped.
        shapes: shape of every parameter of ours, see `checkpoint.named_arrays`.
        source: where the tensors come from, for the message.
        ignored: regular expressions of whole names that the file may have and that we do not use.

    Returns:
        An iterator of (parameter, array), in the order of `shapes`.

    Raises:
        ValueError: one error that lists all missing, unexpected and reshaped tensors.
    """
    problems = differences(table, tensors, shapes, ignored)
    if problems:
        raise ValueError(f"{source} does not fit: {problems}; the file belongs to another model or version")
    return _converted(table, tensors, shapes)


def differences(
    table: Table,
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    ignored: Iterable[str] = (),
) -> str:
    """All missing, unexpected and reshaped tensors in one sentence; empty if the file fits.

    Raises:
        KeyError: if table and module do not name the same parameters, which is our own mistake.
    """
    if set(table) != set(shapes):
        raise KeyError(f"the table and the module differ in {sorted(set(table) ^ set(shapes))[:8]}")
    used = {name for s in table.values() for name in _all(s)}
    missing = sorted(used - set(tensors))
    unexpected = sorted(
        name for name in set(tensors) - used if not any(re.fullmatch(p, name) for p in ignored)
    )
    reshaped = []
    for parameter, s in table.items():
        names = _all(s)
        wanted = tuple(shapes[parameter])
        wanted = wanted if isinstance(s.names, str) else wanted[1:]
        if not isinstance(s.names, str) and len(names) != shapes[parameter][0]:
            raise KeyError(f"{parameter} has {shapes[parameter][0]} layers, its table {len(names)}")
        theirs = tuple(LAYOUTS[s.layout].to_theirs(np.broadcast_to(np.int8(0), wanted)).shape)
        for name in names:
            if name in tensors and tuple(tensors[name].shape) != theirs:
                reshaped.append(f"{name} {tuple(tensors[name].shape)} instead of {theirs}")
    parts = [("missing", missing), ("unexpected", unexpected), ("reshaped", reshaped)]
    return ", ".join(
        f"{len(found)} {what} ({', '.join(found[:6])}{', ...' if len(found) > 6 else ''})"
        for what, found in parts
        if found
    )


def to_theirs(table: Table, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our parameters under their public names and layouts: the inverse of `to_ours`."""
    out = {}
    for parameter, s in table.items():
        each = [arrays[parameter]] if isinstance(s.names, str) else arrays[parameter]
        for name, x in zip(_all(s), each, strict=True):
            out[name] = np.ascontiguousarray(LAYOUTS[s.layout].to_theirs(np.asarray(x)))
    return out


def fold_weight_norm(
    tensors: Mapping[str, np.ndarray], kept_axis: Callable[[str], int] = lambda name: 0
) -> dict[str, np.ndarray]:
    """Gain and direction of a weight norm as one `weight`; other tensors stay as they are.

    Args:
        tensors: with `NAME.weight_g` and `.weight_v`, or `NAME.parametrizations.weight.original0` and `1`.
        kept_axis: for a NAME, the axis that the gain goes along; the norm is over all others.
    """
    out = {}
    for name, x in tensors.items():
        for gain, direction in (
            ("weight_g", "weight_v"),
            ("parametrizations.weight.original0", "parametrizations.weight.original1"),
        ):
            if name.endswith("." + direction):
                stem = name.removesuffix("." + direction)
                if f"{stem}.{gain}" in tensors:
                    v, g = np.asarray(x, np.float32), np.asarray(tensors[f"{stem}.{gain}"], np.float32)
                    axes = tuple(a for a in range(v.ndim) if a != kept_axis(stem))
                    norm = np.sqrt(np.sum(np.square(v, dtype=np.float64), axis=axes, keepdims=True))
                    out[f"{stem}.weight"] = (v * (g.reshape(norm.shape) / norm)).astype(np.float32)
                    break
            if name.endswith("." + gain) and f"{name.removesuffix(gain)}{direction}" in tensors:
                break
        else:
            out[name] = x
    return out


def _all(source: Source) -> tuple[str, ...]:
    return (source.names,) if isinstance(source.names, str) else source.names


def _converted(table: Table, tensors, shapes) -> Iterator[tuple[str, np.ndarray]]:
    for parameter in shapes:
        s = table[parameter]
        turn = LAYOUTS[s.layout].to_ours
        if isinstance(s.names, str):
            yield parameter, turn(np.asarray(tensors[s.names]))
        else:
            yield parameter, np.stack([turn(np.asarray(tensors[name])) for name in s.names])


# ---------------------------------------------------------------- one table a model


def qwen2(cfg, prefix: str = "model.") -> Table:
    """Backbone of Qwen2 in the names of the public safetensors; `cfg` is an lm.Config. Source: Qwen2.5-0.5B."""
    table = {
        "text_table": Source(f"{prefix}embed_tokens.weight"),
        "norm.scale": Source(f"{prefix}norm.weight"),
    }

    def layers(ours: str, theirs: str, layout: str = "same") -> None:
        names = tuple(f"{prefix}layers.{i}.{theirs}" for i in range(cfg.num_layers))
        table[f"layers.{ours}"] = Source(names, layout)

    layers("attn_norm.scale", "input_layernorm.weight")
    layers("mlp_norm.scale", "post_attention_layernorm.weight")
    for name in "qkvo":
        layers(f"attn.{name}.kernel", f"self_attn.{name}_proj.weight", "linear")
        if name != "o":
            layers(f"attn.{name}.bias", f"self_attn.{name}_proj.bias")
    for name in ("gate", "up", "down"):
        layers(f"mlp.{name}.kernel", f"mlp.{name}_proj.weight", "linear")
    return table


def hift(cfg, prefix: str = "") -> Table:
    """HiFT generator, weight norm folded (`hift_tensors`); `cfg` is a vocoder_hift.Config. Source: CosyVoice2."""
    table = {}

    def pair(ours: str, theirs: str, layout: str = "conv1d") -> None:
        table[f"{ours}.kernel"] = Source(f"{prefix}{theirs}.weight", layout)
        table[f"{ours}.bias"] = Source(f"{prefix}{theirs}.bias")

    def block(ours: str, theirs: str, num_dilations: int) -> None:
        for half in (1, 2):
            for d in range(num_dilations):
                pair(f"{ours}.convs{half}.{d}", f"{theirs}.convs{half}.{d}")
                alpha = Source(f"{prefix}{theirs}.activations{half}.{d}.alpha")
                table[f"{ours}.snakes{half}.{d}.alpha"] = alpha

    for i in range(cfg.num_f0_layers):  # between two convolutions lies an activation, which has a number too
        pair(f"f0_predictor.convs.{i}", f"f0_predictor.condnet.{2 * i}")
    pair("f0_predictor.head", "f0_predictor.classifier", "linear")
    pair("source_mix", "m_source.l_linear", "linear")
    pair("first", "conv_pre")
    for i, dilations in enumerate(cfg.source_dilations):
        pair(f"ups.{i}", f"ups.{i}", "conv_transpose1d")
        pair(f"source_downs.{i}", f"source_downs.{i}")
        block(f"source_blocks.{i}", f"source_resblocks.{i}", len(dilations))
    num_kernels = len(cfg.residual_dilations)
    for i in range(len(cfg.upsample_rates) * num_kernels):
        block(f"blocks.{i}", f"resblocks.{i}", len(cfg.residual_dilations[i % num_kernels]))
    pair("last", "conv_post")
    return table


def hift_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A HiFT file under the names of `hift`: weight norm folded, the `generator.` of training checkpoints left out.

    What else a training checkpoint holds (`discriminator.`) stays under its name and has to be ignored by name.
    """
    return fold_weight_norm({name.removeprefix("generator."): x for name, x in tensors.items()})
def flow_cosyvoice2(cfg) -> Table:
    """`flow.pt` of CosyVoice2: 1121 tensors, none ignored; `cfg` is a flow_cosyvoice2.Config."""
    table = {"encoder.token_table": Source("input_embedding.weight")}

    def put(ours: str, theirs: str, layout: str = "linear", bias: bool = True, stack=None) -> None:
        """A matrix or kernel and its bias; with `stack` one name for each entry in the place of {}."""
        for part, name, how in (("kernel", "weight", layout), ("bias", "bias", "same"))[: 1 + bias]:
            name = f"{theirs}.{name}"
            table[f"{ours}.{part}"] = Source(tuple(name.format(i) for i in stack) if stack else name, how)

    def norm(ours: str, theirs: str, stack=None) -> None:
        for part, name in (("scale", "weight"), ("bias", "bias")):
            name = f"{theirs}.{name}"
            table[f"{ours}.{part}"] = Source(tuple(name.format(i) for i in stack) if stack else name)

    put("speaker", "spk_embed_affine_layer")
    for ours in ("embed", "up_embed"):
        put(f"encoder.{ours}.linear", f"encoder.{ours}.out.0")
        norm(f"encoder.{ours}.norm", f"encoder.{ours}.out.1")
    put("encoder.ahead", "encoder.pre_lookahead_layer.conv1", "conv1d")
    put("encoder.ahead_back", "encoder.pre_lookahead_layer.conv2", "conv1d")
    put("encoder.upsample", "encoder.up_layer.conv", "conv1d")
    norm("encoder.norm", "encoder.after_norm")
    put("encoder.output", "encoder_proj")
    for ours, theirs, count in (
        ("encoder.layers", "encoder.encoders.{}", cfg.num_layers),
        ("encoder.up_layers", "encoder.up_encoders.{}", cfg.num_up_layers),
    ):
        stack = range(count)
        norm(f"{ours}.attention_norm", f"{theirs}.norm_mha", stack)
        norm(f"{ours}.mlp_norm", f"{theirs}.norm_ff", stack)
        for part in ("q", "k", "v", "out"):
            put(f"{ours}.attention.{part}", f"{theirs}.self_attn.linear_{part}", stack=stack)
        put(f"{ours}.attention.position", f"{theirs}.self_attn.linear_pos", bias=False, stack=stack)
        for part, name in (("content_bias", "pos_bias_u"), ("position_bias", "pos_bias_v")):
            table[f"{ours}.attention.{part}"] = Source(
                tuple(f"{theirs}.self_attn.{name}".format(i) for i in stack)
            )
        put(f"{ours}.mlp_in", f"{theirs}.feed_forward.w_1", stack=stack)
        put(f"{ours}.mlp_out", f"{theirs}.feed_forward.w_2", stack=stack)

    def resnet(ours: str, theirs: str, stack=None) -> None:
        put(f"{ours}.time", f"{theirs}.mlp.1", stack=stack)
        for part, name in (("first", "block1"), ("second", "block2")):
            put(f"{ours}.{part}", f"{theirs}.{name}.block.0", "conv1d", stack=stack)
            norm(f"{ours}.{part}_norm", f"{theirs}.{name}.block.2", stack)
        put(f"{ours}.skip", f"{theirs}.res_conv", "conv1x1", stack=stack)

    def blocks(ours: str, theirs: str, stack) -> None:
        norm(f"{ours}.attention_norm", f"{theirs}.norm1", stack)
        for part in "qkv":
            put(f"{ours}.{part}", f"{theirs}.attn1.to_{part}", bias=False, stack=stack)
        put(f"{ours}.out", f"{theirs}.attn1.to_out.0", stack=stack)
        norm(f"{ours}.mlp_norm", f"{theirs}.norm3", stack)
        put(f"{ours}.mlp_in", f"{theirs}.ff.net.0.proj", stack=stack)
        put(f"{ours}.mlp_out", f"{theirs}.ff.net.2", stack=stack)

    ours, theirs = "estimator", "decoder.estimator"
    put(f"{ours}.time_in", f"{theirs}.time_mlp.linear_1")
    put(f"{ours}.time_out", f"{theirs}.time_mlp.linear_2")
    each = range(cfg.blocks_per_level)
    for part in ("down", "up"):
        resnet(f"{ours}.{part}_resnet", f"{theirs}.{part}_blocks.0.0")
        blocks(f"{ours}.{part}_blocks", f"{theirs}.{part}_blocks.0.1.{{}}", each)
        put(f"{ours}.{part}_conv", f"{theirs}.{part}_blocks.0.2", "conv1d")
    levels = range(cfg.num_mid_levels)
    resnet(f"{ours}.mid_resnets", f"{theirs}.mid_blocks.{{}}.0", levels)
    blocks(f"{ours}.mid_blocks", f"{theirs}.mid_blocks.{{}}", [f"{i}.1.{j}" for i in levels for j in each])
    put(f"{ours}.last_conv", f"{theirs}.final_block.block.0", "conv1d")
    norm(f"{ours}.last_norm", f"{theirs}.final_block.block.2")
    put(f"{ours}.output", f"{theirs}.final_proj", "conv1x1")
    return table
