"""WavLM for speaker verification: the numbers of another implementation, padding, the public names, meshes."""

import functools
import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepasmr_jax import checkpoint, public_models, public_names, sharding, speaker_wavlm

GOLDEN = Path(__file__).parent / "golden" / "speaker_wavlm.npz"
CONFIG = speaker_wavlm.Config(
    conv_channels=8,
    conv_kernels=(10, 3, 2),
    conv_strides=(5, 2, 2),
    width=16,
    mlp_width=24,
    num_layers=3,
    num_heads=2,
    position_kernel=8,
    position_groups=4,
    num_buckets=16,
    max_distance=20,
    head_channels=12,
    res2_scale=4,
    bottleneck=6,
    embedding_size=8,
)
embed = jax.jit(speaker_wavlm.embed, static_argnums=1)
POSITION = "model.feature_extract.model.encoder.pos_conv.0"
# of the reference at full size: WavLM-large with one mask embedding and 128 gains, and the head
BACKBONE_PARAMETERS, HEAD_PARAMETERS = 315_453_120, 8_410_841


def tensor_values(name: str, shape) -> np.ndarray:
    """Reproducible numbers for one tensor of the state dict."""
    rng = np.random.Generator(np.random.Philox([4, zlib.crc32(name.encode())]))
    x = rng.standard_normal(tuple(shape)).astype(np.float32)
    if name.endswith("num_batches_tracked"):
        return np.int64(7)
    if name.endswith(("running_var", "grep_a", "weight_g")) or (len(shape) == 1 and name.endswith(".weight")):
        return 1 + 0.3 * np.abs(x)
    if len(shape) == 1 or name.endswith("relative_attention_bias.weight"):
        return (1.0 if "attention_bias" in name or name.endswith("feature_weight") else 0.2) * x
    return x * np.float32(1.4 / np.sqrt(np.prod(shape[1:])))


def abstract(cfg):
    """Shapes of a model, without memory."""
    return checkpoint.abstract(functools.partial(speaker_wavlm.init, cfg), jax.random.key(0))


def load(cfg, tensors):
    """A model with the tensors of a state dict."""
    like = abstract(cfg)
    shapes = {name: x.shape for name, x in checkpoint.named_arrays(like).items()}
    tensors = public_names.fold_weight_norm(tensors, public_models.wavlm_kept_axis)
    found = public_names.to_ours(
        public_models.wavlm(cfg), tensors, shapes, "test", public_models.WAVLM_IGNORED
    )
    return checkpoint.fill(like, dict(found), "test")


def toy_tensors():
    """The toy's state dict, from the names of our table, its position convolution with a weight norm."""
    zeros = {n: np.zeros(x.shape, np.int8) for n, x in checkpoint.named_arrays(abstract(CONFIG)).items()}
    theirs = public_names.to_theirs(public_models.wavlm(CONFIG), zeros)
    shapes = {name: x.shape for name, x in theirs.items()}
    shapes[f"{POSITION}.weight_v"] = shapes.pop(f"{POSITION}.weight")
    shapes[f"{POSITION}.weight_g"] = (1, 1, CONFIG.position_kernel)
    return {name: tensor_values(name, shape) for name, shape in shapes.items()}


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
    return abstract(speaker_wavlm.large_sv())


def close(found, expected, name=""):
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), err_msg=name)


def test_layer_groups_and_embeddings_of_a_padded_batch_equal_those_of_lone_clips_in_pytorch(golden, model):
    wav, lengths = golden["wav"].astype(np.float32), golden["lengths"]
    groups = jax.jit(speaker_wavlm.layer_groups, static_argnums=1)(model, CONFIG, wav, lengths)
    num = speaker_wavlm.num_frames(int(lengths[1]), CONFIG)
    assert len(golden["states"]) == CONFIG.num_layers + 1 and golden["states"].shape[1] == num == 40
    for i, expected in enumerate(golden["states"]):
        close(groups["states"][i, 1, :num], expected, f"hidden state {i}")
    for name in ("features", "mixed", *(f"layer{i}" for i in range(1, 5))):
        close(groups[name][1, :num], golden[name], name)
    close(groups["pooled"][1], golden["pooled"], "pooled")
    close(groups["embedding"], golden["embedding"], "embedding")
    cos = np.sum(groups["embedding"] * golden["embedding"], axis=1)
    cos = cos / np.linalg.norm(groups["embedding"], axis=1) / np.linalg.norm(golden["embedding"], axis=1)
    assert cos.min() > 0.999999


def test_padding_neighbours_and_level_do_not_change_an_embedding(model):
    wav = np.random.default_rng(0).standard_normal((2, 900)).astype(np.float32)
    lengths = np.asarray([500, 800], np.int32)
    together = embed(model, CONFIG, wav, lengths)
    for row, length in enumerate(lengths):
        alone = embed(model, CONFIG, 3 * wav[row : row + 1, :length], lengths[row : row + 1])
        np.testing.assert_allclose(together[row], alone[0], rtol=1e-3, atol=2e-5)


def test_two_devices_give_the_embeddings_of_one():
    wav = np.random.default_rng(1).standard_normal((2, 500)).astype(np.float32)
    found = []
    for shape in ((1, 1, 1), (1, 2, 2)):
        sharding.make_mesh(*shape)
        rows = sharding.put({"wav": wav, "lengths": np.asarray([500, 333], np.int32)})
        found.append(np.asarray(embed(load(CONFIG, toy_tensors()), CONFIG, rows["wav"], rows["lengths"])))
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5)


def test_the_distance_bias_is_exact_near_and_shared_far_and_knows_the_side():
    table = jnp.arange(320.0)[:, None]  # the bucket itself
    bias = np.asarray(speaker_wavlm.distance_bias(table, 1000, 800))[0]
    assert bias[5, 5] == 0 and bias[79, 0] == 79 and bias[0, 79] == 160 + 79
    assert bias[80, 0] == 80 and bias[81, 0] == 80  # log(81 / 80) / log(10) * 80 = 0.43
    assert bias[253, 0] == 80 + 40 and bias[252, 0] == 80 + 39  # 80 * sqrt(10) = 252.98
    assert bias[999, 0] == bias[799, 0] == 159 and bias[0, 999] == 319


def test_the_full_size_has_the_public_number_of_parameters(full_size):
    arrays = checkpoint.named_arrays(full_size)
    head = sum(
        x.size
        for name, x in arrays.items()
        if name.startswith(("head.", "state_weights")) and name.rsplit(".", 1)[-1] not in ("mean", "var")
    )
    backbone = sum(x.size for name, x in arrays.items() if not name.startswith(("head.", "state_weights")))
    assert head == HEAD_PARAMETERS
    assert backbone == BACKBONE_PARAMETERS - 1024 - 128
    assert speaker_wavlm.large_sv().min_samples == 400
    assert speaker_wavlm.num_frames(80000, speaker_wavlm.large_sv()) == 249


def test_the_table_names_every_tensor_of_the_public_file_with_its_shape(golden, full_size):
    public = {name: tuple(shape) for name, shape in json.loads(str(golden["shapes"])).items()}
    assert public[f"{POSITION}.weight_g"] == (1, 1, 128)
    position = public.pop(f"{POSITION}.weight_v")
    del public[f"{POSITION}.weight_g"]
    public[f"{POSITION}.weight"] = position  # as folded
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in public.items()}
    tensors["model.loss_calculator.projection.weight"] = np.zeros((5, 256), np.int8)
    shapes = {name: x.shape for name, x in checkpoint.named_arrays(full_size).items()}
    table = public_models.wavlm(speaker_wavlm.large_sv())
    assert public_names.differences(table, tensors, shapes, public_models.WAVLM_IGNORED) == ""
    ours = {name: np.broadcast_to(np.int8(0), shape) for name, shape in shapes.items()}
    names = {name for source in table.values() for name in public_names.source_names(source)}
    assert names == {n for n in public if not n.endswith(("num_batches_tracked", "mask_emb"))}
    assert set(ours) == set(table)
    tensors["model.linear.weight"] = np.zeros((192, 3072), np.int8)
    tensors["model.classifier.weight"] = tensors.pop("model.feature_weight")
    with pytest.raises(
        ValueError, match="1 missing.*feature_weight.*1 unexpected.*classifier.*1 reshaped.*192"
    ):
        list(public_names.to_ours(table, tensors, shapes, "test", public_models.WAVLM_IGNORED))


def test_the_table_gives_back_the_state_dict_that_was_loaded(model):
    given = public_names.fold_weight_norm(toy_tensors(), public_models.wavlm_kept_axis)
    back = public_names.to_theirs(public_models.wavlm(CONFIG), checkpoint.named_arrays(model))
    assert set(back) == set(given)
    assert all(np.array_equal(back[name], given[name]) for name in given)


def test_the_gain_of_the_position_convolution_goes_along_its_taps():
    v = np.random.default_rng(0).standard_normal((6, 3, 4)).astype(np.float32)
    tensors = {f"{POSITION}.weight_v": v, f"{POSITION}.weight_g": np.ones((1, 1, 4), np.float32)}
    folded = public_names.fold_weight_norm(tensors, public_models.wavlm_kept_axis)[f"{POSITION}.weight"]
    np.testing.assert_allclose(np.sum(folded**2, axis=(0, 1)), np.ones(4), rtol=1e-6)


def test_wrong_settings_and_inputs_are_refused_with_the_number_that_is_wrong(model):
    with pytest.raises(ValueError, match=r"\(1, 399\).*400"):
        speaker_wavlm.embed(model, speaker_wavlm.large_sv(), jnp.zeros((1, 399)), jnp.asarray([399]))
    with pytest.raises(ValueError, match="num_heads = 3 does not divide 1024"):
        speaker_wavlm.Config(num_heads=3)
    with pytest.raises(ValueError, match="differ in number"):
        speaker_wavlm.Config(conv_kernels=(10, 3))
    assert speaker_wavlm.Config(conv_kernels=[5], conv_strides=[2]).conv_kernels == (5,)
