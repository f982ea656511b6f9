"""CAM++: a PyTorch network's numbers, padding, the names of its two public files, meshes."""

import functools
import json
import zlib
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepasmr_jax import audio, checkpoint, public_cosyvoice2, public_names, sharding, speaker_campplus

GOLDEN = Path(__file__).parent / "golden" / "speaker_campplus.npz"
CONFIG = speaker_campplus.Config(
    head_channels=4,
    initial_channels=8,
    growth=4,
    bottleneck=8,
    repeats=(2, 3, 1),
    segment_frames=6,
    embedding_size=8,
)
embed = jax.jit(speaker_campplus.embed, static_argnums=1)
NUM_PARAMETERS, NUM_TENSORS = 6_848_544, 937  # of the public state dict


def tensor_values(name: str, shape) -> np.ndarray:
    """Reproducible numbers for one tensor of the state dict."""
    rng = np.random.Generator(np.random.Philox([3, zlib.crc32(name.encode())]))
    x = rng.standard_normal(tuple(shape)).astype(np.float32)
    if name.endswith("num_batches_tracked"):
        return np.int64(7)
    if name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
        return 1 + 0.3 * np.abs(x)
    if len(shape) == 1:
        return 0.2 * x
    return x * np.float32(1.4 / np.sqrt(np.prod(shape[1:])))


def abstract(cfg):
    """Shapes of a model, without memory."""
    return checkpoint.abstract(functools.partial(speaker_campplus.init, cfg), jax.random.key(0))


def load(cfg, tensors):
    """A model with the tensors of a state dict."""
    like = abstract(cfg)
    shapes = {name: x.shape for name, x in checkpoint.named_arrays(like).items()}
    table = public_cosyvoice2.campplus(cfg)
    arrays = dict(public_names.to_ours(table, tensors, shapes, "test", public_names.NO_COUNTS))
    return checkpoint.fill(like, arrays, "test")


def toy_tensors():
    """The toy's state dict, from the names of our table."""
    like = abstract(CONFIG)
    zeros = {name: np.zeros(x.shape, np.int8) for name, x in checkpoint.named_arrays(like).items()}
    theirs = public_names.to_theirs(public_cosyvoice2.campplus(CONFIG), zeros)
    return {name: tensor_values(name, x.shape) for name, x in theirs.items()}


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


@pytest.fixture(scope="module")
def model():
    sharding.make_mesh()
    return load(CONFIG, toy_tensors())


@pytest.fixture(scope="module")
def full_size():
    sharding.make_mesh()
    return abstract(speaker_campplus.cosyvoice())


def graph_of(golden, squeezed: bool) -> SimpleNamespace:
    """The graph that torch.onnx wrote, with the norm of the last layer behind a change of shape or not."""
    text = json.loads(str(golden[f"graph_{squeezed}_text"]))
    initializers, numbers = {}, golden[f"graph_{squeezed}_numbers"]
    for name, shape in text["shapes"].items():
        size = int(np.prod(shape))
        initializers[name], numbers = numbers[:size].reshape(shape), numbers[size:]
    return SimpleNamespace(initializers=initializers, nodes=[tuple(node) for node in text["nodes"]])


def close(found, expected, name=""):
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), err_msg=name)


def test_layer_groups_and_embeddings_of_a_padded_batch_equal_those_of_lone_clips_in_pytorch(golden, model):
    fbank, lengths = golden["fbank"].astype(np.float32), golden["lengths"]
    groups = jax.jit(speaker_campplus.layer_groups, static_argnums=1)(model, CONFIG, fbank, lengths)
    names = ("head", "tdnn", *(f"{part}{b}" for b in (1, 2, 3) for part in ("block", "transit")))
    for name in names:
        close(groups[name][1][: len(golden[name])], golden[name], name)
    close(groups["pooled"][1], golden["stats"], "pooled")
    close(groups["embedding"], golden["embedding"], "embedding")
    cos = np.sum(groups["embedding"] * golden["embedding"], axis=1)
    cos = cos / np.linalg.norm(groups["embedding"], axis=1) / np.linalg.norm(golden["embedding"], axis=1)
    assert cos.min() > 0.999999


def test_padding_and_neighbours_do_not_change_an_embedding(model):
    fbank = np.random.default_rng(0).standard_normal((2, 50, 80)).astype(np.float32)
    lengths = np.asarray([31, 12], np.int32)
    together = embed(model, CONFIG, fbank, lengths)
    for row, length in enumerate(lengths):
        alone = embed(model, CONFIG, fbank[row : row + 1, :length], lengths[row : row + 1])
        np.testing.assert_allclose(together[row], alone[0], rtol=1e-4, atol=1e-5)


def test_blocks_stacked_at_loading_give_the_same_embedding(model):
    fbank = np.random.default_rng(2).standard_normal((1, 20, 80)).astype(np.float32)
    lengths = np.asarray([18], np.int32)
    kept = len(model.blocks[1])
    stacked = speaker_campplus.stacked(model)
    assert stacked.blocks[1].local.kernel.shape[0] == kept == len(model.blocks[1])
    expected = embed(model, CONFIG, fbank, lengths)
    np.testing.assert_allclose(embed(stacked, CONFIG, fbank, lengths), expected, rtol=1e-5, atol=1e-6)


def test_two_devices_give_the_embeddings_of_one():
    fbank = np.random.default_rng(1).standard_normal((2, 20, 80)).astype(np.float32)
    found = []
    for data in (1, 2):
        sharding.make_mesh(1, data, 1)
        rows = sharding.put({"fbank": fbank, "lengths": np.asarray([20, 13], np.int32)})
        found.append(np.asarray(embed(load(CONFIG, toy_tensors()), CONFIG, rows["fbank"], rows["lengths"])))
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5)


def test_the_stated_front_end_makes_embeddings_independent_of_level(model):
    rng = np.random.default_rng(2)
    wav = (0.1 * rng.standard_normal((1, 6000)) * (1.5 + np.sin(np.arange(6000) / 900))).astype(np.float32)
    wav, lengths = np.concatenate([wav, 0.5 * wav]), np.full(2, 6000)
    fbank = audio.fbank(wav, lengths, **speaker_campplus.FBANK)
    assert np.abs(fbank - audio.fbank(wav, lengths)).max() > 0.1  # not the front end of the other encoders
    one, half = np.asarray(embed(model, CONFIG, fbank, audio.fbank_frames(lengths)))
    assert np.isfinite(one).all()
    np.testing.assert_allclose(one, half, atol=1e-3 * np.abs(one).max())


def test_the_full_size_has_the_public_number_of_parameters(full_size):
    arrays = checkpoint.named_arrays(full_size)
    statistics = {name for name in arrays if name.rsplit(".", 1)[1] in ("mean", "var")}
    assert sum(x.size for name, x in arrays.items() if name not in statistics) == NUM_PARAMETERS
    norms = len(statistics) // 2
    assert len(arrays) + norms == NUM_TENSORS  # the file counts batches for each norm


def test_the_table_names_every_tensor_of_the_public_file_with_its_shape(golden, full_size):
    public = {name: tuple(shape) for name, shape in json.loads(str(golden["shapes"])).items()}
    assert len(public) == NUM_TENSORS
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in public.items()}
    shapes = {name: x.shape for name, x in checkpoint.named_arrays(full_size).items()}
    table = public_cosyvoice2.campplus(speaker_campplus.cosyvoice())
    assert public_names.differences(table, tensors, shapes, public_names.NO_COUNTS) == ""
    ours = {name: np.broadcast_to(np.int8(0), shape) for name, shape in shapes.items()}
    theirs = {name: x.shape for name, x in public_names.to_theirs(table, ours).items()}
    assert theirs == {name: s for name, s in public.items() if not name.endswith("num_batches_tracked")}
    tensors["xvector.tdnn.linear.weight"] = np.zeros((128, 320, 3), np.int8)
    tensors["classifier.weight"] = tensors.pop("head.conv1.weight")
    with pytest.raises(ValueError, match="1 missing.*head.conv1.*1 unexpected.*classifier.*1 reshaped.*tdnn"):
        list(public_names.to_ours(table, tensors, shapes, "test", public_names.NO_COUNTS))


def test_the_table_gives_back_the_state_dict_that_was_loaded(model):
    given = toy_tensors()
    back = public_names.to_theirs(public_cosyvoice2.campplus(CONFIG), checkpoint.named_arrays(model))
    assert set(back) == set(given)
    assert all(np.array_equal(back[name], given[name]) for name in given)


# ---------------------------------------------------------------- ONNX


@pytest.mark.parametrize("squeezed", [True, False])
def test_the_tensors_of_an_exported_graph_give_the_numbers_of_the_network(golden, squeezed):
    graph, given = graph_of(golden, squeezed), toy_tensors()
    tensors = public_cosyvoice2.campplus_onnx(CONFIG, graph)
    assert set(tensors) == set(given)
    differ = {name.rsplit(".", 1)[0] for name in given if not np.array_equal(tensors[name], given[name])}
    kept = {f"xvector.transit{b}.{part}" for b in (1, 2) for part in ("nonlinear.batchnorm", "linear")}
    kept |= {f"xvector.block{b}.tdnnd1.cam_layer.{n}" for b in (1, 2, 3) for n in ("linear1", "linear_local")}
    assert not kept & differ and "head.conv1" in differ  # some norms are in the graph, some are folded
    assert ("xvector.dense.linear" in differ) == (not squeezed)
    fbank = golden["fbank"].astype(np.float32)
    close(embed(load(CONFIG, tensors), CONFIG, fbank, golden["lengths"]), golden["embedding"])


def test_an_exported_graph_is_read_without_names_and_with_branches_in_another_order(golden):
    graph = graph_of(golden, True)
    expected = public_cosyvoice2.campplus_onnx(CONFIG, graph)
    numbers = {name: f"onnx::{i}" for i, name in enumerate(graph.initializers)}
    nodes = [(op, "", [numbers.get(n, n) for n in given], made) for op, _, given, made in graph.nodes]
    shortcut = next(i for i, node in enumerate(graph.nodes) if "shortcut" in node[1])
    first = next(i for i, node in enumerate(graph.nodes) if node[1] == "/head/layer1/layer1.0/conv1/Conv")
    nodes.insert(first, nodes.pop(shortcut))
    stored = {numbers[name]: x for name, x in graph.initializers.items()}
    taken = nodes[first][2][1]  # one weight behind an Identity, as exporters write equal tensors
    stored["shared"] = stored.pop(taken)
    nodes.insert(0, ("Identity", "", ["shared"], [taken]))
    found = public_cosyvoice2.campplus_onnx(CONFIG, SimpleNamespace(initializers=stored, nodes=nodes))
    assert set(found) == set(expected)
    assert all(np.array_equal(found[name], expected[name]) for name in found)


def test_a_graph_in_which_no_norm_is_folded_gives_the_very_tensors_of_the_network(golden):
    graph, given, nodes = graph_of(golden, False), toy_tensors(), []
    norms = dict(public_cosyvoice2._campplus_norms(CONFIG))
    for op, path, inputs, outputs in graph.nodes:
        conv = path.strip("/").removesuffix("/Conv").replace("/", ".")
        conv = conv.replace("layer1.layer1", "layer1").replace("layer2.layer2", "layer2")
        conv = conv.replace("shortcut.shortcut", "shortcut")
        if op == "Conv" and conv in norms:
            stored = [f"{norms[conv]}.{n}" for n in ("weight", "bias", "running_mean", "running_var")]
            nodes.append((op, path, [inputs[0], f"{conv}.weight"], [conv]))
            nodes.append(("BatchNormalization", "", [conv, *stored], outputs))
        else:
            nodes.append((op, path, inputs, outputs))
    assert len(nodes) == len(graph.nodes) + len(norms) - 1  # all but those without a convolution of their own
    initializers = graph.initializers | given
    found = public_cosyvoice2.campplus_onnx(CONFIG, SimpleNamespace(initializers=initializers, nodes=nodes))
    assert set(found) == set(given)
    assert all(np.array_equal(found[name], given[name]) for name in given)


def test_a_graph_of_another_network_is_refused_with_what_does_not_fit(golden):
    graph = graph_of(golden, True)
    with pytest.raises(ValueError, match=r"no further convolution of shape \(8, 1, 3, 3\) for head.conv1"):
        public_cosyvoice2.campplus_onnx(
            speaker_campplus.Config(**{**vars(CONFIG), "head_channels": 8}), graph
        )
    conv = next(node for node in graph.nodes if node[0] == "Conv")
    longer = SimpleNamespace(initializers=graph.initializers, nodes=[*graph.nodes, conv])
    with pytest.raises(ValueError, match="1 convolutions more"):
        public_cosyvoice2.campplus_onnx(CONFIG, longer)
    nodes = [node for node in graph.nodes if "transit1/nonlinear/batchnorm" not in node[1]]
    with pytest.raises(ValueError, match="norm"):
        public_cosyvoice2.campplus_onnx(CONFIG, SimpleNamespace(initializers=graph.initializers, nodes=nodes))
    del graph.initializers["xvector.transit1.linear.weight"]
    with pytest.raises(ValueError, match="/xvector/transit1/linear/Conv"):
        public_cosyvoice2.campplus_onnx(CONFIG, graph)


def test_wrong_settings_and_inputs_are_refused_with_the_number_that_is_wrong(model):
    with pytest.raises(ValueError, match="128"):
        speaker_campplus.embed(model, CONFIG, jnp.zeros((1, 20, 128)), jnp.asarray([20]))
    with pytest.raises(ValueError, match=r"\(12, 24\)"):
        speaker_campplus.Config(repeats=(12, 24))
    with pytest.raises(ValueError, match="33"):
        speaker_campplus.Config(bottleneck=33)
    assert speaker_campplus.Config(repeats=[1, 1, 1]).repeats == (1, 1, 1)
