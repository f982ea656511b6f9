"""Names of CosyVoice2's tensors (LM on Qwen2.5, S3 tokenizer, flow, HiFT, CAM++) beside ours; see `public_names`.

Also the plain form of files that need one: ONNX graphs whose tensors have no fixed names, folded
weight norm, CosyVoice3's table.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from deepasmr_jax.public_names import (
    Source,
    Table,
    affine,
    fold_weight_norm,
    without_copy,
)

COSYVOICE3_SPECIAL = 200  # rows of the speech table after the codes
_COSYVOICE3_MARKERS = (0, 2)  # of them: start of the sequence, task
# initialisers of the released graph whose node does not tell what they are
_S3_FIXED = {
    "onnx::Conv_2216": "encoder.conv1.weight",
    "onnx::Conv_2217": "encoder.conv1.bias",
    "onnx::Conv_2218": "encoder.conv2.weight",
    "onnx::Conv_2219": "encoder.conv2.bias",
    "onnx::MatMul_2536": "quantizer._codebook.project_down.weight",
    "quantizer.project_in.bias": "quantizer._codebook.project_down.bias",
}


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
        affine(table, ours, f"{prefix}{theirs}", layout)

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
    if table is not None and table.ndim == 2 and len(table) > COSYVOICE3_SPECIAL:
        first = len(table) - COSYVOICE3_SPECIAL
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
        table[len(table) - COSYVOICE3_SPECIAL + i] = x
    return out | {"speech_embedding.weight": table}


def s3_v2(cfg) -> Table:
    """State dict of the S3 tokenizer V2, as `s3_v2_onnx` gives it; `cfg` is a speech_tokenizer.Config."""
    table = {}

    def layers(ours: str, theirs: str, layout: str = "same") -> None:
        names = tuple(f"encoder.blocks.{i}.{theirs}" for i in range(cfg.num_blocks))
        table[f"encoder.blocks.{ours}"] = Source(names, layout)

    for name in ("conv1", "conv2"):
        affine(table, f"encoder.{name}", f"encoder.{name}")
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
    affine(table, "quantizer.project_down", down, "linear")
    return table


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
