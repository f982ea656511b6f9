"""Tables of public tensor names against the state dicts of other networks: full size by name, toy size by number."""

import dataclasses
import json
import types
from pathlib import Path

import jax
import make_public_names as golden_script
import numpy as np
import public_weights
import pytest

from deepasmr_jax import (
    checkpoint,
    flow,
    lm,
    public_cosyvoice2,
    public_models,
    public_names,
    sharding,
    speaker,
    speech_tokenizer,
    vocoder,
)

GOLDEN = np.load(Path(__file__).parent / "golden" / "public_names.npz")
CONFIGS = golden_script.configs()
INPUTS = golden_script.inputs()


def read_names(key):
    return json.loads(GOLDEN[key].tobytes())


NAMES = {"full": read_names("names"), "toy": read_names("toy_names")}


def same(tensors):
    return tensors


@dataclasses.dataclass(frozen=True)
class Model:
    """How the files of one model are read: their plain form, table, what is ignored, and our `init`."""

    table: object
    init: object
    plain: object = same
    ignored: tuple[str, ...] = ()


MODELS = {
    "lm2": Model(public_cosyvoice2.lm_cosyvoice2, lm.init, public_cosyvoice2.lm_cosyvoice2_tensors),
    "lm3": Model(public_cosyvoice2.lm_cosyvoice3, lm.init, public_cosyvoice2.lm_cosyvoice3_tensors),
    "s3": Model(public_cosyvoice2.s3_v2, speech_tokenizer.init),
    "e2": Model(lambda cfg: public_models.flow_e2(cfg, ""), flow.init, ignored=public_models.FLOW_E2_IGNORED),
    "hifigan": Model(public_models.hifigan, vocoder.init_generator, public_models.hifigan_folded),
    "discriminators": Model(
        public_models.hifigan_discriminators, vocoder.Discriminators, public_models.hifigan_folded
    ),
    "resnet": Model(public_models.wespeaker, speaker.init, ignored=public_models.WESPEAKER_IGNORED),
}


def model_of(name):
    return next(m for start, m in MODELS.items() if name.startswith(start))


def abstract(model, cfg):
    return checkpoint.abstract(lambda key: model.init(cfg, key), jax.random.key(0))


def shapes_of(module):
    return {name: tuple(x.shape) for name, x in checkpoint.named_arrays(module).items()}


def hollow(shapes):
    """Zeros of these shapes that take no memory."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def plain_shapes(model, shapes):
    """Shapes after the plain form, found without its arithmetic on full-size arrays."""
    if model.plain is not public_models.hifigan_folded:
        return hollow(shapes) if model.plain is same else model.plain(hollow(shapes))
    out = {}
    for name, shape in shapes.items():
        if name.endswith(("weight_v", "weight_orig")) and not (
            name.endswith("_v") and name.replace("weight_v", "weight_orig") in shapes
        ):
            out[name.replace("weight_v", "weight").replace("weight_orig", "weight")] = shape
        elif not name.endswith(("weight_g", "weight_u", "weight_v")):
            out[name] = shape
    return hollow(out)


def load(name, cfg, state):
    """Our module on a public state dict."""
    model = model_of(name)
    empty = abstract(model, cfg)
    arrays = public_names.to_ours(model.table(cfg), model.plain(state), shapes_of(empty), name, model.ignored)
    return checkpoint.fill(empty, dict(arrays), name)


def toy_state(name):
    return public_weights.state(NAMES["toy"][name], golden_script.SEED)


# ---------------------------------------------------------------- full size, by name


@pytest.mark.parametrize("name", NAMES["full"])
def test_the_table_covers_every_tensor_of_the_full_size_state_dict_both_ways(name):
    model, cfg = model_of(name), CONFIGS["full"][name]
    ours = shapes_of(abstract(model, cfg))
    tensors = plain_shapes(model, {k: tuple(v) for k, v in NAMES["full"][name].items()})
    assert public_names.differences(model.table(cfg), tensors, ours, model.ignored) == ""
    theirs = {}
    for parameter, source in model.table(cfg).items():
        one = isinstance(source.names, str)
        x = np.broadcast_to(np.int8(0), ours[parameter] if one else ours[parameter][1:])
        shape = public_names.LAYOUTS[source.layout].to_theirs(x).shape
        theirs |= dict.fromkeys([source.names] if one else source.names, shape)
    ignored = {n for n in tensors if n.startswith("projection.") or "num_batches" in n or "inv_freq" in n}
    assert theirs == {n: x.shape for n, x in tensors.items() if n not in ignored}


@pytest.mark.parametrize(
    "name, count, total",
    [
        ("lm2", 294, 505_803_812),  # and the tied copy
        ("lm3", 292, 494_032_768 + 2 * 6761 * 896),
        ("s3", 102, 123_714_568),
        ("e2", 363, 333_470_444 + 32),  # and the buffer of 32
        ("hifigan_v1", 234, 13_936_130),
        ("hifigan_v2", 234, 928_514),
        ("hifigan_v3", 69, 1_464_322),
    ],
)
def test_state_dicts_have_the_published_counts_and_totals(name, count, total):
    shapes = NAMES["full"][name]
    assert (len(shapes), sum(int(np.prod(s)) for s in shapes.values())) == (count, total)


def test_discriminators_and_speaker_networks_have_the_published_counts_and_totals():
    both = NAMES["full"]["discriminators"]
    vectors = {
        n.replace("weight_orig", f"weight_{k}") for n in both if n.endswith("weight_orig") for k in "uv"
    }
    trained = {n: s for n, s in both.items() if n not in vectors}
    for part, count, total in (("mpd", 90, 41_105_770), ("msd", 80, 29_618_821)):
        # 80 = 16 convolutions of g, v, bias and 8 of orig, u, v, bias; the vectors u and v are not trained
        assert sum(n.startswith(part) for n in both) == count
        assert sum(int(np.prod(s)) for n, s in trained.items() if n.startswith(part)) == total
    for name, count, millions in (
        ("resnet34", 218, 6.63),
        ("resnet221", 1346, 23.79),
        ("resnet293", 1778, 28.62),
    ):
        shapes = {n: s for n, s in NAMES["full"][name].items() if not n.startswith("projection.")}
        trained = sum(
            int(np.prod(s)) for n, s in shapes.items() if "running" not in n and "num_batches" not in n
        )
        assert len(shapes) == count and abs(trained / 1e6 - millions) < 0.01  # given to two digits


def test_presets_of_the_speech_model_have_the_parameters_of_their_files():
    for cfg, total in ((lm.cosyvoice2(), 505_803_812), (lm.cosyvoice3(), 506_157_033)):
        assert sum(x.size for x in jax.tree.leaves(abstract(MODELS["lm2"], cfg))) == total
    cfg = lm.cosyvoice3()
    assert (cfg.num_speech_rows, cfg.end_id) == (6761, 6562)


# ---------------------------------------------------------------- toy size, by number


@pytest.mark.parametrize("name", ["lm2", "lm3"])
def test_the_speech_model_on_a_public_state_dict_gives_the_reference_logits(name):
    cfg = CONFIGS["toy"][name]
    text, speech = INPUTS["text"], INPUTS["speech"]
    size = 2 + len(text) + len(speech)
    kinds = [lm.SOS, *[lm.TEXT] * len(text), lm.TASK, *[lm.SPEECH] * len(speech)]
    batch = dict(tokens=[0, *text, 0, *speech], kinds=kinds, segment_ids=[1] * size, positions=range(size))
    batch = {k: np.asarray([list(v)], np.int32) for k, v in batch.items()}
    logits = jax.jit(lm.logits, static_argnums=1)(load(name, cfg, toy_state(name)), cfg, batch)
    np.testing.assert_allclose(logits[0], GOLDEN[name], atol=2e-5)


def test_the_tokenizer_on_a_public_state_dict_gives_the_reference_projection():
    cfg = CONFIGS["toy"]["s3"]
    model = load("s3", cfg, toy_state("s3"))
    log_mel = INPUTS["log_mel"].transpose(0, 2, 1)
    found = jax.jit(speech_tokenizer.hidden, static_argnums=1)(
        model, cfg, log_mel, np.asarray([log_mel.shape[1]])
    )
    np.testing.assert_allclose(found[1], GOLDEN["s3"], atol=2e-4)


def test_the_flow_on_a_public_state_dict_gives_the_reference_velocity():
    cfg = CONFIGS["toy"]["e2"]
    model = load("e2", cfg, toy_state("e2"))
    tokens = np.pad(INPUTS["characters"], ((0, 0), (0, 5)), constant_values=-1).astype(np.int32)
    batch = {k: INPUTS[k] for k in ("x", "condition", "t")} | {
        "tokens": tokens,
        "mask": np.ones((2, 12), bool),
    }

    def run(model, x, condition, t, tokens, mask):
        return model(x, condition, flow.embed_tokens(model, cfg, tokens, tokens >= 0), t, mask, cfg)

    found = jax.jit(run)(model, **sharding.put(batch))
    np.testing.assert_allclose(found, GOLDEN["e2"], atol=5e-5)


@pytest.mark.parametrize("name", ["hifigan_paired", "hifigan_single"])
def test_the_vocoder_on_a_public_state_dict_gives_the_reference_waveform(name):
    cfg = CONFIGS["toy"][name]
    mel = INPUTS["mel"].transpose(0, 2, 1)
    wav = jax.jit(vocoder.apply, static_argnums=1)(load(name, cfg, toy_state(name)), cfg, mel)
    np.testing.assert_allclose(wav, GOLDEN[name], atol=2e-5)


def test_the_discriminators_on_a_public_state_dict_give_the_reference_scores():
    cfg = CONFIGS["toy"]["discriminators"]
    model = load("discriminators", cfg, toy_state("discriminators"))
    outputs = jax.jit(lambda d, wav: d(cfg, wav))(model, INPUTS["wav"])
    assert len(outputs) == 8
    for i, layers in enumerate(outputs):
        np.testing.assert_allclose(np.moveaxis(layers[-1], -1, 1), GOLDEN[f"discriminators.{i}"], atol=2e-5)


@pytest.mark.parametrize("name", ["resnet_basic", "resnet_bottleneck"])
def test_the_speaker_encoder_on_a_public_state_dict_gives_the_reference_embedding(name):
    cfg = CONFIGS["toy"][name]
    fbank = INPUTS["fbank"]
    model = load(name, cfg, toy_state(name))
    found = jax.jit(speaker.embed, static_argnums=1)(model, cfg, fbank, np.asarray([fbank.shape[1]]))
    np.testing.assert_allclose(found, GOLDEN[name], atol=2e-5)


# ---------------------------------------------------------------- both directions


@pytest.mark.parametrize("name", NAMES["toy"])
def test_written_back_under_public_names_every_tensor_is_the_one_that_was_read(name):
    model, cfg, state = model_of(name), CONFIGS["toy"][name], toy_state(name)
    arrays = {k: np.asarray(x) for k, x in checkpoint.named_arrays(load(name, cfg, state)).items()}
    back = public_names.to_theirs(model.table(cfg), arrays)
    read = model.plain(state)
    if name == "lm3":
        back, read = public_cosyvoice2.lm_cosyvoice3_theirs(back), state
    assert set(back) <= set(read)
    for tensor, x in back.items():
        assert x.flags.c_contiguous
        np.testing.assert_array_equal(x, read[tensor], tensor)


def test_a_plain_qwen2_file_gives_the_backbone_and_leaves_the_speech_parts():
    cfg = CONFIGS["toy"]["lm2"]
    prefix = "llm.model."
    state = {n.removeprefix(prefix): x for n, x in toy_state("lm2").items() if n.startswith(prefix)}
    assert "model.layers.2.self_attn.q_proj.bias" in state
    shapes = shapes_of(abstract(MODELS["lm2"], cfg))
    arrays = dict(
        public_names.to_ours(
            public_cosyvoice2.qwen2(cfg), state, shapes, "file", absent=public_cosyvoice2.QWEN2_ABSENT
        )
    )
    assert set(shapes) - set(arrays) == set(public_cosyvoice2.QWEN2_ABSENT)
    back = public_names.to_theirs(public_cosyvoice2.qwen2(cfg), arrays)
    assert set(back) == set(state)
    for name, x in state.items():
        np.testing.assert_array_equal(back[name], x, name)


def test_a_parameter_cannot_be_absent_and_in_the_table():
    cfg = CONFIGS["toy"]["lm2"]
    shapes = shapes_of(abstract(MODELS["lm2"], cfg))
    with pytest.raises(KeyError, match="norm.scale"):
        public_names.to_ours(public_cosyvoice2.lm_cosyvoice2(cfg), {}, shapes, "file", absent=["norm.scale"])
    with pytest.raises(KeyError, match="nothing"):
        public_names.to_ours(public_cosyvoice2.lm_cosyvoice2(cfg), {}, shapes, "file", absent=["nothing"])


@pytest.mark.parametrize("name", NAMES["toy"])
def test_missing_unexpected_and_reshaped_tensors_are_told_in_one_error(name):
    state = toy_state(name)
    plain = model_of(name).plain(state)
    used = sorted(
        n for s in model_of(name).table(CONFIGS["toy"][name]).values() for n in public_names.source_names(s)
    )
    gone, turned = used[0], next(n for n in used[1:] if n in state and plain[n].ndim == 1)
    state[turned] = state[turned][:-1]
    for end in ("", "_g", "_v", "_orig"):
        state.pop(gone + end, None)
    state["stranger.weight"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError) as error:
        load(name, CONFIGS["toy"][name], state)
    message = str(error.value)
    for part in (name, "missing", gone, "unexpected", "stranger.weight", "reshaped", turned):
        assert part in message


# ---------------------------------------------------------------- plain forms


def test_a_text_head_is_dropped_only_if_it_is_a_copy_of_the_table():
    head = "llm.model.lm_head.weight"
    state = toy_state("lm2")
    table = state["llm.model.model.embed_tokens.weight"]
    assert head not in public_cosyvoice2.lm_cosyvoice2_tensors(state | {head: table.copy()})
    assert head not in public_cosyvoice2.lm_cosyvoice3_tensors(toy_state("lm3") | {head: table.copy()})
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        public_cosyvoice2.lm_cosyvoice2_tensors(state | {head: table + np.float32(1e-6)})


def test_markers_of_cosyvoice3_are_rows_of_its_speech_table():
    state = toy_state("lm3")
    model = load("lm3", CONFIGS["toy"]["lm3"], state)
    table = state["speech_embedding.weight"]
    np.testing.assert_array_equal(model.marker_table[...], table[[27, 29]])
    assert not np.any(model.head.bias[...])


def test_a_trained_head_bias_has_no_place_in_a_cosyvoice3_file():
    cfg = CONFIGS["toy"]["lm3"]
    arrays = dict(checkpoint.named_arrays(load("lm3", cfg, toy_state("lm3"))))
    arrays["head.bias"] = np.full(227, 0.1, np.float32)
    with pytest.raises(ValueError, match="bias is not zero"):
        public_cosyvoice2.lm_cosyvoice3_theirs(
            public_names.to_theirs(public_cosyvoice2.lm_cosyvoice3(cfg), arrays)
        )


def test_weight_norm_in_its_newer_form_folds_to_the_same_weights():
    state = toy_state("hifigan_paired")
    ends = (
        ("weight_g", "parametrizations.weight.original0"),
        ("weight_v", "parametrizations.weight.original1"),
    )
    newer = {}
    for name, x in state.items():
        for old, new in ends:
            name = name.replace(old, new)
        newer[name] = x
    one, other = public_names.fold_weight_norm(state), public_names.fold_weight_norm(newer)
    assert set(one) == set(other) and not any("original" in n for n in other)
    for name, x in one.items():
        np.testing.assert_array_equal(x, other[name])


def test_spectral_norm_divides_by_the_largest_singular_value_once_its_vectors_have_converged():
    w = np.random.default_rng(0).standard_normal((6, 4, 3)).astype(np.float32)
    u, s, v = np.linalg.svd(w.reshape(6, 12), full_matrices=False)
    tensors = {"a.weight_orig": w, "a.weight_u": u[:, 0], "a.weight_v": v[0], "a.bias": w[:, 0, 0]}
    folded = public_names.fold_spectral_norm(tensors)
    assert set(folded) == {"a.weight", "a.bias"}
    np.testing.assert_allclose(folded["a.weight"], w / s[0], rtol=1e-5)


# ---------------------------------------------------------------- the tokenizer's ONNX file


def onnx_graph(state, num_blocks):
    """The graph of the released file as far as parameters go: numbered tensors, told by the nodes that use them."""
    initializers, nodes = {}, []
    count = iter(range(3000, 9000))

    def node(op, name, *inputs):
        nodes.append(
            types.SimpleNamespace(op_type=op, name=name, inputs=list(inputs), outputs=[f"{name}_out"])
        )

    def linear(path, name, has_bias=True):
        key = f"onnx::MatMul_{next(count)}"
        initializers[key] = state[f"{name}.weight"].T
        node("MatMul", f"{path}/MatMul", "x", key)
        if has_bias:
            key = f"onnx::Add_{next(count)}"
            initializers[key] = state[f"{name}.bias"]
            node("Add", f"{path}/Add", key, f"{path}/MatMul_out")

    for i, first in ((1, 2216), (2, 2218)):
        initializers[f"onnx::Conv_{first}"] = state[f"encoder.conv{i}.weight"]
        initializers[f"onnx::Conv_{first + 1}"] = state[f"encoder.conv{i}.bias"]
        node("Conv", f"/conv{i}/Conv", "x", f"onnx::Conv_{first}", f"onnx::Conv_{first + 1}")
    for i in range(num_blocks):
        block, path = f"encoder.blocks.{i}", f"/blocks.{i}"
        for norm in ("attn_ln", "mlp_ln"):
            for leaf in ("weight", "bias"):
                initializers[f"blocks.{i}.{norm}.{leaf}"] = state[f"{block}.{norm}.{leaf}"]
            scale = [f"blocks.{i}.{norm}.{leaf}" for leaf in ("weight", "bias")]
            node("LayerNormalization", f"{path}/{norm}/LayerNormalization", "x", *scale)
        for name in ("query", "key", "value", "out"):
            linear(f"{path}/attn/{name}", f"{block}.attn.{name}", name != "key")
        initializers[f"blocks.{i}.attn.fsmn_block.weight"] = state[f"{block}.attn.fsmn_block.weight"]
        node("Conv", f"{path}/attn/fsmn_block/Conv", "x", f"blocks.{i}.attn.fsmn_block.weight")
        node("Add", f"{path}/Add", "x", "y")  # a residual sum, no parameter
        for j in (0, 2):
            linear(f"{path}/mlp/mlp.{j}", f"{block}.mlp.{j}")
    down = "quantizer._codebook.project_down"
    initializers["onnx::MatMul_2536"] = state[f"{down}.weight"].T
    initializers["quantizer.project_in.bias"] = state[f"{down}.bias"]
    node("MatMul", "/quantizer/project_in/MatMul", "x", "onnx::MatMul_2536")
    node("Add", "/quantizer/project_in/Add", "quantizer.project_in.bias", "y")
    return types.SimpleNamespace(initializers=initializers, nodes=nodes)


def test_the_onnx_file_gives_the_state_dict():
    state = toy_state("s3")
    graph = onnx_graph(state, 2)
    graph.initializers["a_scalar"] = np.float32(3)
    graph.initializers["a_shape"] = np.asarray([1, 2])
    found = public_cosyvoice2.s3_v2_onnx(graph)
    assert set(found) == set(state)
    for name, x in found.items():
        np.testing.assert_array_equal(x, state[name], name)


def test_all_102_tensors_of_the_full_size_graph_have_their_place():
    state = hollow({k: tuple(v) for k, v in NAMES["full"]["s3"].items()})
    graph = onnx_graph(state, 6)
    assert len(graph.initializers) == 102
    cfg = speech_tokenizer.s3_v2()
    shapes = shapes_of(abstract(MODELS["s3"], cfg))
    assert (
        public_names.differences(public_cosyvoice2.s3_v2(cfg), public_cosyvoice2.s3_v2_onnx(graph), shapes)
        == ""
    )


def test_tensors_of_a_graph_that_have_no_or_one_place_too_often_are_named():
    graph = onnx_graph(toy_state("s3"), 2)
    graph.initializers["onnx::Mul_1"] = np.ones(3, np.float32)
    with pytest.raises(ValueError, match="onnx::Mul_1"):
        public_cosyvoice2.s3_v2_onnx(graph)
    graph = onnx_graph(toy_state("s3"), 2)
    graph.initializers["again"] = np.ones((3, 3), np.float32)
    graph.nodes.append(
        types.SimpleNamespace(op_type="MatMul", name="/blocks.0/attn/key/MatMul", inputs=["x", "again"])
    )
    with pytest.raises(ValueError, match=r"two tensors for encoder\.blocks\.0\.attn\.key\.weight"):
        public_cosyvoice2.s3_v2_onnx(graph)


# ---------------------------------------------------------------- warm start of the flow


def warm(profile, **changes):
    """A small decoder on the toy E2 file: (config, its initial arrays, the result)."""
    sizes = {f: getattr(CONFIGS["toy"]["e2"], f) for f in ("width", "num_layers", "num_heads", "head_dim")}
    base = dict(mel_bins=8, token_width=10, num_codes=27, rotary_heads=1, mel_mean=0.0, mel_std=1.0)
    cfg = flow.deepasmr(**(sizes | base | changes))
    initial = {
        k: public_weights.values(k, shape, 5) for k, shape in shapes_of(abstract(MODELS["e2"], cfg)).items()
    }
    state = {f"ema_model.transformer.{k}": x for k, x in toy_state("e2").items()}
    state |= {"initted": np.asarray(True), "step": np.asarray(7)}
    return cfg, initial, public_models.warm_start_flow(cfg, state, initial, profile, "file")


def test_warm_start_on_the_mel_of_e2_copies_all_but_the_tokens():
    cfg, initial, (arrays, copied) = warm("f5")
    state = toy_state("e2")
    assert set(arrays) == set(initial)
    assert set(initial) - set(copied) == {"token_table", "input.kernel"} and "input.kernel[:16]" in copied
    weight = state["input_embed.proj.weight"]
    np.testing.assert_array_equal(arrays["input.kernel"][:16], weight.T[:16])
    np.testing.assert_allclose(arrays["input.kernel"][16:], 0.1 * initial["input.kernel"][16:], rtol=1e-6)
    np.testing.assert_array_equal(arrays["token_table"], initial["token_table"])
    np.testing.assert_array_equal(arrays["output.kernel"], state["proj_out.weight"].T)
    # the layer after the middle merges the input of the one before it: index half - 1 of our upper half
    np.testing.assert_array_equal(arrays["up.skip.kernel"][2], state["layers.3.0.weight"].T)
    np.testing.assert_array_equal(arrays["up.mlp_norm.scale"][0], state["layers.5.3.g"])
    module = checkpoint.fill(abstract(MODELS["e2"], cfg), arrays, "warm start")
    np.testing.assert_array_equal(
        module.down.attention.value.kernel[...][1], state["layers.1.2.to_v.weight"].T
    )


def test_warm_start_on_another_mel_copies_the_trunk_alone():
    _, initial, (arrays, copied) = warm("cv2", mel_bins=80, mel_mean=-5.5, mel_std=2.1)
    left = {"token_table", "input.kernel", "input.bias", "output.kernel", "output.bias"}
    assert set(initial) - set(copied) == left
    for name in left:
        np.testing.assert_array_equal(arrays[name], initial[name])
    np.testing.assert_array_equal(
        arrays["conv_first.bias"], toy_state("e2")["input_embed.conv_pos_embed.conv1d.0.bias"]
    )


@pytest.mark.parametrize(
    "profile, changes, found",
    [
        ("f5", dict(rotary_heads=None), "rotary_heads is None"),
        ("f5", dict(mel_std=2.1), "mel_std 2.1"),
        ("f5", dict(patch_frames=2), "patch_frames 2"),
        ("f5", dict(mel_bins=80), r"proj_out.weight \(8, 32\) instead of \(80, 32\)"),
        ("cv2", dict(width=64), "reshaped"),
        ("cv2", dict(num_layers=4), "does not fit"),
    ],
)
def test_a_warm_start_that_cannot_work_is_refused(profile, changes, found):
    with pytest.raises(ValueError, match=found):
        warm(profile, **changes)


def test_the_trunk_of_the_paper_decoder_has_the_shapes_of_the_full_size_file():
    ours = shapes_of(abstract(MODELS["e2"], flow.deepasmr(rotary_heads=1)))
    theirs = shapes_of(abstract(MODELS["e2"], flow.e2tts_base()))
    differing = {name for name in ours if ours[name] != theirs[name]}
    assert set(ours) == set(theirs)
    assert differing == {"token_table", "input.kernel", "output.kernel", "output.bias"}
