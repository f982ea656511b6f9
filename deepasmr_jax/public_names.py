"""Which tensor of a public weight file becomes which parameter of ours: one table a model, and the conversion by it.

A table is {parameter of ours: Source}. It is read in both directions: `to_ours` converts a file for us, `to_theirs`
writes ours under the public names. Every tensor of a file must be used or named as ignored, every parameter of ours
must be given. Some files are first brought into a plain form: norms of weights folded, tied copies left out.
Tables know nothing of files (`weight_files.py`) or of modules: they take a model's Config and give names.
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
    # (o, i, k) -> (k, i, o)
    "conv1d": Layout(lambda x: x.transpose(2, 1, 0), lambda x: x.transpose(2, 1, 0)),
    "conv2d": Layout(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),  # -> (h, w, i, o)
    # (in, out, k) -> (k, in, out), reversed along k: ours is run as a convolution of the input with zeros between
    "conv_transpose1d": Layout(lambda x: x.transpose(2, 0, 1)[::-1], lambda x: x[::-1].transpose(1, 2, 0)),
    "depthwise": Layout(lambda x: x[:, 0].T, lambda x: x.T[:, None]),  # (channels, 1, k) -> (k, channels)
    "conv1x1": Layout(lambda x: x[..., 0].T, lambda x: x.T[..., None]),  # (out, in, 1) -> (in, out)
    # (out, in, k, 1) -> (k, in, out): a two-dimensional convolution along one axis
    "column": Layout(lambda x: x[..., 0].transpose(2, 1, 0), lambda x: x.transpose(2, 1, 0)[..., None]),
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
    absent: Iterable[str] = (),
) -> Iterator[tuple[str, np.ndarray]]:
    """Converts the tensors of a file, one parameter at a time, after all names and shapes were checked.

    Args:
        table: the model's table.
        tensors: the file by name; arrays may be memory-mapped.
        shapes: shape of every parameter of ours, see `checkpoint.named_arrays`.
        source: where the tensors come from, for the message.
        ignored: regular expressions of whole names that the file may have and that we do not use.
        absent: parameters of ours that this kind of file never has; the caller keeps their initial values.

    Returns:
        An iterator of (parameter, array), in the order of `shapes`, without those that are absent.

    Raises:
        ValueError: one error that lists all missing, unexpected and reshaped tensors.
    """
    absent = set(absent)
    if absent - set(shapes) or absent & set(table):
        raise KeyError(f"{sorted(absent - set(shapes) | absent & set(table))} cannot be absent")
    shapes = {name: shape for name, shape in shapes.items() if name not in absent}
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


def fold_spectral_norm(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights of a spectral norm as evaluation uses them; other tensors stay as they are.

    `NAME.weight_orig` becomes `NAME.weight = W / (u . (W v))`, W flattened to (out, rest), with the stored
    vectors `weight_u` and `weight_v` and no further power iteration.
    """
    out = {}
    for name, x in tensors.items():
        stem, _, last = name.rpartition(".")
        if f"{stem}.weight_orig" not in tensors or last not in ("weight_orig", "weight_u", "weight_v"):
            out[name] = x
        elif last == "weight_orig":
            u, v = (np.asarray(tensors[f"{stem}.weight_{k}"], np.float64).reshape(-1) for k in "uv")
            w = np.asarray(x, np.float64)
            out[f"{stem}.weight"] = (w / (u @ (w.reshape(len(u), -1) @ v))).astype(np.float32)
    return out


def without_copy(tensors: Mapping[str, np.ndarray], copy: str, original: str) -> dict[str, np.ndarray]:
    """The tensors without `copy`, which must be absent or equal to `original` (a tied output matrix).

    Raises:
        ValueError: if the two differ: then the copy holds weights of its own, which we would lose.
    """
    if copy in tensors and original in tensors:
        x, y = tensors[copy], tensors[original]
        if x is not y and not (x.shape == y.shape and np.array_equal(x, y)):
            raise ValueError(
                f"{copy} differs from {original}; it should be a tied copy, so the file belongs to another model"
            )
    return {name: x for name, x in tensors.items() if name != copy}


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


def campplus(cfg) -> Table:
    """CAM++ in the names of its PyTorch release (`campplus_cn_common.bin`); `cfg` is a speaker_campplus.Config.

    The file also has a `num_batches_tracked` for every norm: see NO_COUNTS.
    """
    table = {}

    def conv(ours: str, theirs: str, layout: str) -> None:
        table[f"{ours}.kernel"] = Source(f"{theirs}.weight", layout)

    def norm(ours: str, theirs: str, is_affine: bool = True) -> None:
        for name, statistic in (("mean", "running_mean"), ("var", "running_var")):
            table[f"{ours}.{name}"] = Source(f"{theirs}.{statistic}")
        if is_affine:
            table[f"{ours}.scale"], table[f"{ours}.bias"] = (
                Source(f"{theirs}.weight"),
                Source(f"{theirs}.bias"),
            )

    blocks = [f"layer{i}.{j}" for i in (1, 2) for j in (0, 1)]
    for place in ("", *(f"{block}." for block in blocks)):
        for i in (1, 2):
            conv(f"head.{place}conv{i}", f"head.{place}conv{i}", "conv2d")
            norm(f"head.{place}bn{i}", f"head.{place}bn{i}")
    for block in blocks[::2]:
        conv(f"head.{block}.shortcut_conv", f"head.{block}.shortcut.0", "conv2d")
        norm(f"head.{block}.shortcut_bn", f"head.{block}.shortcut.1")
    conv("tdnn", "xvector.tdnn.linear", "conv1d")
    norm("tdnn_norm", "xvector.tdnn.nonlinear.batchnorm")
    for b, count in enumerate(cfg.repeats):
        for i in range(count):
            ours, theirs = f"blocks.{b}.{i}", f"xvector.block{b + 1}.tdnnd{i + 1}"
            norm(f"{ours}.norm1", f"{theirs}.nonlinear1.batchnorm")
            conv(f"{ours}.linear1", f"{theirs}.linear1", "conv1x1")
            norm(f"{ours}.norm2", f"{theirs}.nonlinear2.batchnorm")
            conv(f"{ours}.local", f"{theirs}.cam_layer.linear_local", "conv1d")
            for j in (1, 2):
                conv(f"{ours}.context{j}", f"{theirs}.cam_layer.linear{j}", "conv1x1")
                table[f"{ours}.context{j}.bias"] = Source(f"{theirs}.cam_layer.linear{j}.bias")
        norm(f"transit_norms.{b}", f"xvector.transit{b + 1}.nonlinear.batchnorm")
        conv(f"transits.{b}", f"xvector.transit{b + 1}.linear", "conv1x1")
    norm("out_norm", "xvector.out_nonlinear.batchnorm")
    conv("dense", "xvector.dense.linear", "conv1x1")
    norm("dense_norm", "xvector.dense.nonlinear.batchnorm", is_affine=False)
    return table


NO_COUNTS = (r".*\.num_batches_tracked",)  # to be ignored in files of models with batch norm


def campplus_onnx(cfg, graph) -> dict[str, np.ndarray]:
    """Tensors of CAM++ under the names of `campplus`, out of its ONNX export (`campplus.onnx`).

    An exporter numbers initialisers anew and folds some norms into the convolution before them. So tensors are
    found by what their node is: convolutions of one shape of weight lie behind one another on the way from input
    to output, and nodes are in an order in which data can flow; so the n-th node of a shape is the n-th
    layer of that shape. A folded norm comes back as one that only adds the convolution's bias.

    Args:
        cfg: speaker_campplus.Config.
        graph: `initializers`, {name: array}, and `nodes`, a list of (operator, name, inputs, outputs).

    Raises:
        ValueError: if the graph is not that of a CAM++ of this config.
    """
    aliases = {outputs[0]: inputs[0] for op, _, inputs, outputs in graph.nodes if op == "Identity"}

    def array(name: str) -> np.ndarray | None:
        while name in aliases:
            name = aliases[name]
        return graph.initializers.get(name)

    kinds = {"Conv": [], "BatchNormalization": []}
    for op, name, inputs, outputs in graph.nodes:
        if op in kinds:
            kinds[op].append((name, inputs, outputs))
    convs, out = {}, {}
    for name, inputs, outputs in kinds["Conv"]:
        weight = array(inputs[1])
        if weight is None:
            raise ValueError(f"convolution {name} of the graph has no stored weight {inputs[1]!r}")
        bias = array(inputs[2]) if len(inputs) > 2 and inputs[2] else None
        convs.setdefault(weight.shape, []).append((weight, bias, outputs[0]))
    found = {}  # convolution -> (bias, output)
    for name, shape in _campplus_convs(cfg):
        if not convs.get(shape):
            raise ValueError(f"the graph has no further convolution of shape {shape} for {name}")
        out[f"{name}.weight"], *found[name] = convs[shape].pop(0)
        if name.endswith(("cam_layer.linear1", "cam_layer.linear2")) and found[name][0] is not None:
            out[f"{name}.bias"] = found[name][0]
    left = [shape for shape, rest in convs.items() for _ in rest]
    if left:
        raise ValueError(
            f"the graph has {len(left)} convolutions more than this config, the first of shape {left[0]}"
        )

    sources = {outputs[0]: (op, inputs[0]) for op, _, inputs, outputs in graph.nodes if inputs}
    users = {}
    for _, _, inputs, _ in graph.nodes:
        for name in inputs:
            users[name] = users.get(name, 0) + 1

    def only_input(name: str) -> str:
        """The tensor that comes to a norm, followed back over changes of shape that have no other user."""
        while users[name] == 1 and sources.get(name, ("",))[0] in (
            "Squeeze",
            "Unsqueeze",
            "Gather",
            "Reshape",
        ):
            name = sources[name][1]
        return name if users[name] == 1 else ""

    owned, free = {}, []  # norms that are a convolution's only user; norms behind a concatenation or a ReLU
    outputs_of_convs = {output for _, output in found.values()}
    for _, inputs, _ in kinds["BatchNormalization"]:
        before = only_input(inputs[0])
        if before in outputs_of_convs:
            owned[before] = inputs[1:]
        else:
            free.append(inputs[1:])
    for conv, norm in _campplus_norms(cfg):
        bias, output = found.get(conv, (None, ""))
        is_affine = norm != "xvector.dense.nonlinear.batchnorm"
        if conv and output in owned and bias is None:
            values = [array(name) for name in owned.pop(output)]
        elif conv and bias is not None:
            one = np.ones_like(bias)
            values = [one, bias, 0 * bias, one * np.float32(1 - 1e-5)]  # the norm's eps is added again
            if not is_affine:
                values = [None, None, -bias, values[3]]
        elif conv:
            raise ValueError(f"convolution {conv} of the graph has neither a bias nor a norm behind it")
        elif free:
            values = [array(name) for name in free.pop(0)]
        else:
            raise ValueError(f"the graph has no further norm for {norm}")
        for name, value in zip(("weight", "bias", "running_mean", "running_var"), values, strict=True):
            if name in ("weight", "bias") and not is_affine:
                if value is not None and np.any(value != (name == "weight")):
                    raise ValueError(f"{norm} of the graph has a {name}; that of CAM++ has none")
            elif value is None:
                raise ValueError(f"the graph has no stored {name} for {norm}")
            else:
                out[f"{norm}.{name}"] = value
    if owned or free:
        raise ValueError(f"the graph has {len(owned) + len(free)} norms more than this config")
    return out


def _campplus_convs(cfg) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Convolutions of CAM++ from input to output, with the shapes of their weights."""
    c, width, inner = cfg.head_channels, cfg.initial_channels, cfg.bottleneck
    yield "head.conv1", (c, 1, 3, 3)
    for block in ("layer1.0", "layer1.1", "layer2.0", "layer2.1"):
        yield f"head.{block}.conv1", (c, c, 3, 3)
        yield f"head.{block}.conv2", (c, c, 3, 3)
        if block.endswith(".0"):
            yield f"head.{block}.shortcut.0", (c, c, 1, 1)
    yield "head.conv2", (c, c, 3, 3)
    yield "xvector.tdnn.linear", (width, 10 * c, 5)
    for b, (count, full) in enumerate(zip(cfg.repeats, cfg.block_widths, strict=True), 1):
        for i in range(count):
            layer = f"xvector.block{b}.tdnnd{i + 1}"
            yield f"{layer}.linear1", (inner, width + i * cfg.growth, 1)
            yield f"{layer}.cam_layer.linear_local", (cfg.growth, inner, 3)
            yield f"{layer}.cam_layer.linear1", (inner // 2, inner, 1)
            yield f"{layer}.cam_layer.linear2", (cfg.growth, inner // 2, 1)
        width = full // 2
        yield f"xvector.transit{b}.linear", (width, full, 1)
    yield "xvector.dense.linear", (cfg.embedding_size, 2 * width, 1)


def _campplus_norms(cfg) -> Iterator[tuple[str, str]]:
    """Norms of CAM++ from input to output, each with the convolution it alone follows, or ""."""
    for i in (1, 2):
        yield f"head.conv{i}", f"head.bn{i}"
    for block in ("layer1.0", "layer1.1", "layer2.0", "layer2.1"):
        for i in (1, 2):
            yield f"head.{block}.conv{i}", f"head.{block}.bn{i}"
        if block.endswith(".0"):
            yield f"head.{block}.shortcut.0", f"head.{block}.shortcut.1"
    yield "xvector.tdnn.linear", "xvector.tdnn.nonlinear.batchnorm"
    for b, count in enumerate(cfg.repeats, 1):
        for i in range(1, count + 1):
            layer = f"xvector.block{b}.tdnnd{i}"
            yield "", f"{layer}.nonlinear1.batchnorm"
            yield f"{layer}.linear1", f"{layer}.nonlinear2.batchnorm"
        yield "", f"xvector.transit{b}.nonlinear.batchnorm"
    yield f"xvector.transit{len(cfg.repeats)}.linear", "xvector.out_nonlinear.batchnorm"
    yield "xvector.dense.linear", "xvector.dense.nonlinear.batchnorm"


def wavlm(cfg, prefix="model.") -> Table:
    """WavLM with its ECAPA head in the names of `wavlm_large_finetune.pth`; `cfg` is a speaker_wavlm.Config.

    The weight norm of the position convolution is to be folded first: fold_weight_norm(tensors, wavlm_kept_axis).
    WAVLM_IGNORED names what else is in the file.
    """
    table, backbone = {}, f"{prefix}feature_extract.model."

    def affine(ours: str, theirs: str, layout: str, weight: str = "kernel") -> None:
        table[f"{ours}.{weight}"] = Source(f"{theirs}.weight", layout)
        table[f"{ours}.bias"] = Source(f"{theirs}.bias")

    def layers(ours: str, theirs: str, layout: str = "same") -> None:
        names = tuple(f"{backbone}encoder.layers.{i}.{theirs}" for i in range(cfg.num_layers))
        table[f"layers.{ours}"] = Source(names, layout)

    for i in range(len(cfg.conv_kernels)):
        conv = f"{backbone}feature_extractor.conv_layers.{i}"
        table[f"features.{i}.conv.kernel"] = Source(f"{conv}.0.weight", "conv1d")
        affine(f"features.{i}.norm", f"{conv}.2.1", "same", "scale")
    affine("feature_norm", f"{backbone}layer_norm", "same", "scale")
    affine("projection", f"{backbone}post_extract_proj", "linear")
    affine("position", f"{backbone}encoder.pos_conv.0", "conv1d")
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
    affine("norm", f"{backbone}encoder.layer_norm", "same", "scale")
    table["state_weights"] = Source(f"{prefix}feature_weight")

    norm_names = dict(scale="weight", bias="bias", mean="running_mean", var="running_var")

    def norm(ours: str, theirs: str) -> None:
        for name, public in norm_names.items():
            table[f"head.{ours}.{name}"] = Source(f"{prefix}{theirs}.{public}")

    affine("head.layer1.conv", f"{prefix}layer1.conv", "conv1d")
    norm("layer1.bn", "layer1.bn")
    for i in range(3):
        ours, theirs = f"blocks.{i}", f"layer{i + 2}"
        for unit, public in (("first", "Conv1dReluBn1"), ("last", "Conv1dReluBn2")):
            affine(f"head.{ours}.{unit}.conv", f"{prefix}{theirs}.{public}.conv", "conv1d")
            norm(f"{ours}.{unit}.bn", f"{theirs}.{public}.bn")

        def parts(ours: str, theirs: str, layout: str = "same") -> None:
            names = tuple(f"{prefix}{theirs % j}" for j in range(cfg.res2_scale - 1))
            table[f"head.{ours}"] = Source(names, layout)

        parts(f"{ours}.parts.conv.kernel", f"{theirs}.Res2Conv1dReluBn.convs.%d.weight", "conv1d")
        parts(f"{ours}.parts.conv.bias", f"{theirs}.Res2Conv1dReluBn.convs.%d.bias")
        for name, public in norm_names.items():
            parts(f"{ours}.parts.bn.{name}", f"{theirs}.Res2Conv1dReluBn.bns.%d.{public}")
        for j in (1, 2):
            affine(f"head.{ours}.gate{j}", f"{prefix}{theirs}.SE_Connect.linear{j}", "linear")
    affine("head.conv", f"{prefix}conv", "conv1x1")
    affine("head.pool1", f"{prefix}pooling.linear1", "conv1x1")
    affine("head.pool2", f"{prefix}pooling.linear2", "conv1x1")
    norm("bn", "bn")
    affine("head.linear", f"{prefix}linear", "linear")
    return table


WAVLM_IGNORED = (
    *NO_COUNTS,
    r"(model\.)?loss_calculator\..*",  # of the training as a classifier
    r"model\.feature_extract\.model\.mask_emb",  # of the pre-training
)


def wavlm_kept_axis(name: str) -> int:
    """Axis of the gain of a weight norm of WavLM: that of the taps in the position convolution, else the first."""
    return 2 if name.endswith("pos_conv.0") else 0


# a plain Qwen2.5 file starts the speech model with its backbone; these keep their random start
QWEN2_ABSENT = ("marker_table", "speech_table", "head.kernel", "head.bias")


def lm_cosyvoice2(cfg) -> Table:
    """`llm.pt` of CosyVoice2; `cfg` is an lm.Config. 294 of its 295 tensors, see `lm_cosyvoice2_tensors`."""
    return qwen2(cfg, "llm.model.model.") | {
        "marker_table": Source("llm_embedding.weight"),
        "speech_table": Source("speech_embedding.weight"),
        "head.kernel": Source("llm_decoder.weight", "linear"),
        "head.bias": Source("llm_decoder.bias"),
    }


def lm_cosyvoice2_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The file without its text head, which CosyVoice2 stores and never uses.

    Raises:
        ValueError: if that head is no tied copy of the text table.
    """
    return without_copy(tensors, "llm.model.lm_head.weight", "llm.model.model.embed_tokens.weight")


_COSYVOICE3_SPECIAL = 200  # rows of the speech table after the codes
_COSYVOICE3_MARKERS = (0, 2)  # of them: start of the sequence, task


def lm_cosyvoice3(cfg) -> Table:
    """`llm.pt` of CosyVoice3 after `lm_cosyvoice3_tensors`: the names of CosyVoice2; for `lm.cosyvoice3()`."""
    return lm_cosyvoice2(cfg)


def lm_cosyvoice3_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A CosyVoice3 file in the form of CosyVoice2.

    The start and task vectors are rows 6561 and 6563 of the speech table there; they are copied to the table
    of markers. The head has no bias there; it gets zeros. Both are exact: those rows are never looked up as
    speech. So one network serves both models; only training sees a difference, a bias more to learn.

    Raises:
        ValueError: if the text head is no tied copy of the text table, or the file has tensors of CosyVoice2 alone.
    """
    for name in ("llm_embedding.weight", "llm_decoder.bias"):
        if name in tensors:
            raise ValueError(f"{name} is a tensor of CosyVoice2, which CosyVoice3 does not have")
    out = lm_cosyvoice2_tensors(tensors)
    table = out.get("speech_embedding.weight")
    if table is not None and table.ndim == 2 and len(table) > _COSYVOICE3_SPECIAL:
        first = len(table) - _COSYVOICE3_SPECIAL
        out["llm_embedding.weight"] = np.stack([np.asarray(table[first + i]) for i in _COSYVOICE3_MARKERS])
        out["llm_decoder.bias"] = np.zeros(len(table), np.float32)
    return out


def lm_cosyvoice3_theirs(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `lm_cosyvoice3_tensors`, after `to_theirs`: markers back in the speech table, no bias.

    Raises:
        ValueError: if the bias of the head is not zero: CosyVoice3 has no place for it.
    """
    out = dict(tensors)
    if np.any(out.pop("llm_decoder.bias")):
        raise ValueError("head.bias is not zero; a head of CosyVoice3 has no bias, train without it")
    table, markers = np.array(out["speech_embedding.weight"]), out.pop("llm_embedding.weight")
    for i, x in zip(_COSYVOICE3_MARKERS, markers, strict=True):
        table[len(table) - _COSYVOICE3_SPECIAL + i] = x
    return out | {"speech_embedding.weight": table}


def s3_v2(cfg) -> Table:
    """State dict of the S3 tokenizer V2, as `s3_v2_onnx` gives it; `cfg` is a speech_tokenizer.Config."""
    table = {}

    def layers(ours: str, theirs: str, layout: str = "same") -> None:
        names = tuple(f"encoder.blocks.{i}.{theirs}" for i in range(cfg.num_blocks))
        table[f"encoder.blocks.{ours}"] = Source(names, layout)

    for name in ("conv1", "conv2"):
        table[f"encoder.{name}.kernel"] = Source(f"encoder.{name}.weight", "conv1d")
        table[f"encoder.{name}.bias"] = Source(f"encoder.{name}.bias")
    # a dotted path drops the word "value" (checkpoint.path_name): attn.kernel is that of the values
    for ours, theirs in (("query.", "query"), ("key.", "key"), ("", "value"), ("out.", "out")):
        layers(f"attn.{ours}kernel", f"attn.{theirs}.weight", "linear")
        if theirs != "key":
            layers(f"attn.{ours}bias", f"attn.{theirs}.bias")
    layers("attn.fsmn", "attn.fsmn_block.weight", "depthwise")
    for ours, theirs in (("mlp_in", "mlp.0"), ("mlp_out", "mlp.2")):
        layers(f"{ours}.kernel", f"{theirs}.weight", "linear")
        layers(f"{ours}.bias", f"{theirs}.bias")
    for name in ("attn_ln", "mlp_ln"):
        layers(f"{name}.scale", f"{name}.weight")
        layers(f"{name}.bias", f"{name}.bias")
    down = "quantizer._codebook.project_down"
    table["quantizer.project_down.kernel"] = Source(f"{down}.weight", "linear")
    table["quantizer.project_down.bias"] = Source(f"{down}.bias")
    return table


# initialisers of the released graph whose node does not tell what they are
_S3_FIXED = {
    "onnx::Conv_2216": "encoder.conv1.weight",
    "onnx::Conv_2217": "encoder.conv1.bias",
    "onnx::Conv_2218": "encoder.conv2.weight",
    "onnx::Conv_2219": "encoder.conv2.bias",
    "onnx::MatMul_2536": "quantizer._codebook.project_down.weight",
    "quantizer.project_in.bias": "quantizer._codebook.project_down.bias",
}


def s3_v2_onnx(graph) -> dict[str, np.ndarray]:
    """The parameters of `speech_tokenizer_v2.onnx` under the names and in the layouts of the state dict.

    The exporter gave most tensors numbers for names; what they are is read off the nodes that use them, such
    as `/blocks.0/attn/query/MatMul` and `/blocks.0/mlp/mlp.0/Add`.

    Args:
        graph: with `initializers`, name -> array, and `nodes`, each with `op_type`, `name` and `inputs`.

    Returns:
        name -> array for `s3_v2`; views. The matrices of the graph are stored (in, out) and turned here.

    Raises:
        ValueError: if two tensors have one meaning, or a tensor has none (scalars and integers may).
    """
    found: dict[str, str] = {}  # name of ours in the state dict -> initialiser
    for node in graph.nodes:
        for place, initializer in enumerate(node.inputs):
            if initializer in graph.initializers:
                name = _S3_FIXED.get(initializer) or _s3_name(node, place)
                if name is not None and found.setdefault(name, initializer) != initializer:
                    raise ValueError(f"the graph has two tensors for {name}: {found[name]} and {initializer}")
    used = set(found.values())
    unread = sorted(
        name
        for name, x in graph.initializers.items()
        if name not in used and x.ndim and np.issubdtype(x.dtype, np.floating)
    )
    if unread:
        raise ValueError(
            f"{len(unread)} tensors of the graph have no known place ({', '.join(unread[:6])}); "
            "the file is no S3 tokenizer V2"
        )
    arrays = {name: graph.initializers[initializer] for name, initializer in found.items()}
    return {name: x.T if x.ndim == 2 else x for name, x in arrays.items()}


def _s3_name(node, place: int) -> str | None:
    """What the input at `place` of a node is, by the path of the node; None for what is no parameter."""
    kinds = {
        "MatMul": {0: "weight", 1: "weight"},
        "Add": {0: "bias", 1: "bias"},
        "Conv": {1: "weight", 2: "bias"},
        "LayerNormalization": {1: "weight", 2: "bias"},
    }
    kind = kinds.get(node.op_type, {}).get(place)
    path, _, last = node.name.lstrip("/").rpartition("/")
    if kind is None or not path or not last.startswith(node.op_type):
        return None
    stem = path.replace("/", ".").replace("mlp.mlp.", "mlp.").removeprefix("encoder.")
    return f"encoder.{stem}.{kind}"


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
        table[f"{ours}.kernel"] = Source(f"{theirs}.weight", "conv1d")
        table[f"{ours}.bias"] = Source(f"{theirs}.bias")
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
    used = {name for s in trunk.values() for name in _all(s)}
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
        table[f"{ours}.kernel"] = Source(f"{prefix}{theirs}.weight", layout)
        table[f"{ours}.bias"] = Source(f"{prefix}{theirs}.bias")

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
                table[f"{ours}.{i}.{our}.kernel"] = Source(f"{stem}.weight", layout)
                table[f"{ours}.{i}.{our}.bias"] = Source(f"{stem}.bias")
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


# ---- networks added later
