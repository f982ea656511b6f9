"""Shared layers against plain NumPy, and on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from deepasmr_jax import (
    flow,
    nn,
    recognizer,
    sharding,
    speaker,
    speech_tokenizer,
    vocoder,
    vocoder_istft,
)

MESHES = [(1, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2)]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def test_linear_is_the_affine_map_of_the_last_axis():
    linear = nn.Linear(6, 4, rngs=nnx.Rngs(params=0))
    linear.bias[...] = jnp.arange(4.0)
    x = normal(2, 3, 6)
    np.testing.assert_allclose(
        linear(x, "float32"), x @ np.asarray(linear.kernel[...]) + np.arange(4.0), atol=1e-6
    )


def test_linear_without_bias_has_one_weight():
    linear = nn.Linear(6, 4, rngs=nnx.Rngs(params=0), use_bias=False)
    assert [x.shape for x in jax.tree.leaves(linear)] == [(6, 4)]


def test_mixed_precision_rounds_the_operands_and_nothing_else():
    linear = nn.Linear(64, 4, rngs=nnx.Rngs(params=0), use_bias=False)
    x = normal(8, 64)
    rounded = [np.asarray(jnp.bfloat16(a).astype(jnp.float32)) for a in (x, linear.kernel[...])]
    y = linear(x, "bfloat16")
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, rounded[0] @ rounded[1], atol=1e-5)
    assert not np.allclose(y, x @ np.asarray(linear.kernel[...]), atol=1e-5)


def test_mixed_precision_gradients_are_backward_products_of_rounded_operands():
    x, kernel, gradient = normal(8, 5, 64), normal(64, 4, seed=1), normal(8, 5, 4, seed=2)
    rounded = [np.asarray(jnp.bfloat16(a).astype(jnp.float32)) for a in (x, kernel, gradient)]
    out = jax.sharding.PartitionSpec(None, None, None)

    def total(x, kernel):
        return jnp.sum(nn.product("...i,io->...o", x, kernel, "bfloat16", out) * gradient)

    for_x, for_kernel = jax.jit(jax.grad(total, argnums=(0, 1)))(x, kernel)
    assert for_x.dtype == for_kernel.dtype == jnp.float32
    np.testing.assert_allclose(for_x, rounded[2] @ rounded[1].T, atol=1e-4)
    np.testing.assert_allclose(for_kernel, np.einsum("bni,bno->io", rounded[0], rounded[2]), atol=1e-4)


def test_rms_norm_is_float32_and_matches_its_formula():
    norm = nn.RMSNorm(8, eps=1e-6)
    norm.scale[...] = jnp.arange(1.0, 9.0)
    x = normal(3, 8)
    expected = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * np.arange(1, 9)
    np.testing.assert_allclose(norm(x), expected, rtol=1e-5)
    assert norm(jnp.bfloat16(x)).dtype == jnp.float32


def test_swiglu_matches_its_formula():
    mlp = nn.SwiGLU(6, 10, rngs=nnx.Rngs(params=0))
    x = normal(2, 3, 6)
    gate, up, down = (np.asarray(m.kernel[...]) for m in (mlp.gate, mlp.up, mlp.down))
    a = x @ gate
    np.testing.assert_allclose(mlp(x, "float32"), (a / (1 + np.exp(-a)) * (x @ up)) @ down, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_turns_each_pair_by_its_angle(interleaved):
    x, positions = normal(2, 5, 3, 8), np.array([[0, 1, 2, 3, 4], [7, 300, 1023, 4001, 32000]])
    angles = positions[..., None] * 1e4 ** (-np.arange(0, 8, 2) / 8)
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + 4) for i in range(4)]
    expected = np.empty_like(x)
    for i, (a, b) in enumerate(pairs):
        cos, sin = np.cos(angles[..., i])[..., None], np.sin(angles[..., i])[..., None]
        expected[..., a] = x[..., a] * cos - x[..., b] * sin
        expected[..., b] = x[..., b] * cos + x[..., a] * sin
    # angle rounding in float32 at position 32000 is 1e-3 radians
    np.testing.assert_allclose(nn.rotary(x, positions, 1e4, interleaved), expected, atol=5e-3)
    np.testing.assert_allclose(nn.rotary(x, positions, 1e4, interleaved)[0], expected[0], atol=1e-5)


@pytest.mark.parametrize("module", [flow, recognizer, speaker, speech_tokenizer, vocoder, vocoder_istft])
def test_no_config_takes_a_type_that_products_do_not_have(module):
    with pytest.raises(ValueError, match="dtype 'float61' is unknown; use float32 or bfloat16"):
        module.Config(dtype="float61")


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_of_bfloat16_is_rounded_once_and_keeps_exact_angles(interleaved):
    x = jnp.bfloat16(normal(2, 3, 2, 64))
    positions = np.array([[0, 17, 1001]])  # 1000 in bfloat16
    exact = nn.rotary(x.astype(jnp.float32), positions, 1e4, interleaved)
    found = nn.rotary(x, positions, 1e4, interleaved)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


def test_rotary_refuses_an_odd_head():
    with pytest.raises(ValueError, match="found 7"):
        nn.rotary(normal(1, 2, 1, 7), np.zeros((1, 2)), 1e4)


@pytest.mark.parametrize("is_causal, heads, length", [(True, (2, 1), 640), (False, (1, 1), 200)])
def test_the_tpu_kernel_is_the_plain_attention_forward_and_backward(is_causal, heads, length):
    q, k, v = (normal(1, length, n, 64, seed=i) for i, n in enumerate((heads[0], heads[1], heads[1])))
    ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 3, (1, length))), jnp.int32)
    mask = ids[:, :, None] == ids[:, None]
    if is_causal:
        mask = mask & jnp.tri(length, dtype=bool)
    by_kernel = lambda q, k, v: nn._attend_by_kernel(q / 8, k, v, ids, ids, is_causal, interpret=True)
    plain = lambda q, k, v: nn.attention(q, k, v, mask)
    rounding = 2e-2  # of bfloat16 operands
    np.testing.assert_allclose(by_kernel(q, k, v), plain(q, k, v), atol=rounding)
    found = jax.grad(lambda *x: jnp.sum(jnp.sin(by_kernel(*x))), (0, 1, 2))(q, k, v)
    wanted = jax.grad(lambda *x: jnp.sum(jnp.sin(plain(*x))), (0, 1, 2))(q, k, v)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=2 * rounding, rtol=1e-2)


def test_attention_matches_numpy_with_grouped_heads_and_mask():
    q, k, v = normal(2, 5, 6, 4), normal(2, 7, 2, 4, seed=1), normal(2, 7, 2, 4, seed=2)
    mask = np.random.default_rng(3).random((2, 5, 7)) < 0.6
    mask[:, :, 0] = True
    out = nn.attention(q, k, v, mask)
    for h in range(6):
        scores = np.where(mask, np.einsum("bne,bse->bns", q[:, :, h], k[:, :, h // 3]) / 2, -np.inf)
        expected = np.einsum("bns,bse->bne", softmax(scores), v[:, :, h // 3])
        np.testing.assert_allclose(out[:, :, h], expected, atol=1e-5)


def test_causal_chunks_change_nothing():
    q, k, v = normal(2, 11, 4, 8), normal(2, 11, 2, 8, seed=1), normal(2, 11, 2, 8, seed=2)
    mask = np.tril(np.ones((1, 11, 11), bool))
    whole = nn.attention(q, k, v, mask)
    np.testing.assert_allclose(nn.attention(q, k, v, mask, causal_chunk=4), whole, atol=1e-6)


def test_attention_of_a_row_without_allowed_keys_is_finite_also_in_the_gradient():
    q, k, v = normal(1, 2, 2, 4), normal(1, 3, 2, 4, seed=1), normal(1, 3, 2, 4, seed=2)
    mask = np.array([[[True, True, True], [False, False, False]]])
    grads = jax.grad(lambda q: nn.attention(q, k, v, mask).sum())(q)
    assert np.isfinite(grads).all()


def test_attention_refuses_heads_that_do_not_group():
    with pytest.raises(ValueError, match="4 key/value heads do not divide 6 query heads; use a divisor of 6"):
        nn.attention(normal(1, 2, 6, 4), normal(1, 2, 4, 4), normal(1, 2, 4, 4))


@pytest.mark.parametrize(
    "length, stride, shapes",
    [(11, 1, MESHES), (12, 2, [(2, 2, 2)]), (11, 4, [(1, 2, 2)]), (12, 4, [(1, 2, 2)])],
)
def test_grouped_convolution_has_value_and_gradient_of_a_dense_one_on_every_mesh(length, stride, shapes):
    x, kernel = normal(8, length, 16), normal(5, 4, 16, seed=1)

    def dense(x, kernel):  # the groups as blocks of a full kernel
        full = (jnp.eye(4)[:, None, :, None] * kernel.reshape(5, 1, 4, 4, 4)).reshape(5, 16, 16)
        numbers = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(x, full, (stride,), [(2, 2)], dimension_numbers=numbers)

    def run(f, shape):
        sharding.make_mesh(*shape)
        value = lambda x, kernel: jnp.sum(jnp.sin(f(x, kernel)))
        split = sharding.put({"x": x})["x"], sharding.replicate(kernel)
        out = jax.block_until_ready(jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(*split))
        return jax.tree.leaves(jax.device_get(out))

    want = run(dense, (1, 1, 1))
    for shape in shapes:
        for a, b in zip(run(lambda x, k: nn.grouped_conv(x, k, 4, stride), shape), want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


class Block(nnx.Module):
    """One layer of everything."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm = nn.RMSNorm(16)
        self.q = nn.Linear(16, 32, ("embed", "heads"), rngs=rngs)
        self.kv = nn.Linear(16, 16, ("embed", "kv_heads"), rngs=rngs)
        self.o = nn.Linear(32, 16, ("heads", "embed"), rngs=rngs)
        self.mlp = nn.SwiGLU(16, 32, rngs=rngs)

    def __call__(self, x, positions, dtype):
        y = self.norm(x)
        q = nn.rotary(nn.split_heads(self.q(y, dtype), 4), positions, 1e4, interleaved=True)
        kv = nn.split_heads(self.kv(y, dtype), 2, "kv_heads")
        mask = positions[:, :, None] >= positions[:, None, :]
        x = x + self.o(nn.merge_heads(nn.attention(q, kv, kv, mask)), dtype)
        return x + self.mlp(x, dtype)


def stack(key):
    return jax.vmap(lambda r: Block(rngs=r))(nnx.Rngs(params=key).split(2))


def energy(layers, x, positions, dtype):
    out, _ = jax.lax.scan(lambda x, layer: (layer(x, positions, dtype), None), x, layers)
    return jnp.mean(out**2)


@pytest.mark.parametrize(
    "num_rows, dtype, meshes",
    [
        (8, "float32", MESHES),
        (3, "float32", [MESHES[0], MESHES[3]]),
        (8, "bfloat16", [MESHES[0], MESHES[3]]),
    ],
)
def test_scanned_layers_give_the_same_loss_and_gradient_on_every_mesh(num_rows, dtype, meshes):
    x, positions = normal(num_rows, 6, 16), np.tile(np.arange(6, dtype=np.int32), (num_rows, 1))
    place = sharding.put if num_rows == 8 else sharding.replicate  # 3 rows are repeated on every device
    results = []
    for shape in meshes:
        sharding.make_mesh(*shape)
        layers = jax.block_until_ready(jax.jit(stack)(jax.random.key(0)))
        batch = place(dict(x=x, positions=positions))
        run = jax.jit(jax.value_and_grad(energy), static_argnums=3)
        value, grads = run(layers, batch["x"], batch["positions"], dtype)
        results.append((float(value), jax.tree.map(np.asarray, jax.device_get(grads))))
    tolerance = (
        1e-5 if dtype == "float32" else 1e-2
    )  # a split sum may round an operand of the next product anew
    for value, grads in results[1:]:
        assert value == pytest.approx(results[0][0], rel=tolerance)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(results[0][1]), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=3 * tolerance * np.abs(b).max())


def test_weights_are_split_as_their_axis_names_say():
    sharding.make_mesh(2, 2, 2)
    block = Block(rngs=nnx.Rngs(params=0))
    assert nn.axes_of(block.q.kernel[...]) == ("data", "model")
    assert nn.axes_of(block.o.kernel[...]) == ("model", "data")
    assert nn.axes_of(block.q.bias[...]) == ("model",)
    assert nn.axes_of(block.o.bias[...]) == (None,)


@pytest.mark.parametrize("mask_shape", [None, (2, 1, 40), (1, 24, 40), (2, 24, 40)])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_attention_by_head_is_attention_at_once(mask_shape, num_kv_heads, monkeypatch):
    sharding.ensure_mesh()
    rng = np.random.default_rng(0)
    q, k, v = (np.float32(rng.standard_normal(s)) for s in ((2, 24, 4, 8), *[(2, 40, num_kv_heads, 8)] * 2))
    mask = None if mask_shape is None else jnp.asarray(rng.random(mask_shape) < 0.7).at[..., 0].set(True)

    def run(limit):
        monkeypatch.setattr(nn, "BY_HEAD_SCORES", limit)
        attend = lambda q, k, v: nn.attention(q, k, v, mask)
        text = str(jax.make_jaxpr(attend)(q, k, v))
        return text, attend(q, k, v), jax.grad(lambda *x: jnp.sum(jnp.sin(attend(*x))), (0, 1, 2))(q, k, v)

    (by_head, *found), (at_once, *wanted) = run(0), run(10**9)
    assert "shard_map" in by_head and "shard_map" not in at_once  # the two forms do differ
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


def test_one_row_in_bfloat16_equals_that_row_of_two():
    sharding.ensure_mesh()
    rng = np.random.default_rng(1)
    x, w = np.float32(rng.standard_normal((1, 2, 64))), np.float32(rng.standard_normal((64, 3, 16)))
    run = lambda x: nn.product("bnd,dgf->bngf", x, w, "bfloat16", PartitionSpec())
    assert nn._single_row("bnd,dgf->bngf", x[:, :1]) == 1 and nn._single_row("bnd,dgf->bngf", x) is None
    assert nn._single_row("bnkge,bske->bkngs", np.zeros((1, 1, 1, 1, 8))) is None  # heads are no rows
    one = run(x[:, :1])
    assert one.shape == (1, 1, 3, 16)
    np.testing.assert_allclose(one, run(x)[:, :1], atol=1e-5)


def test_attention_by_head_is_the_same_on_every_mesh(monkeypatch):
    monkeypatch.setattr(nn, "BY_HEAD_SCORES", 0)
    q, k, v = normal(8, 12, 4, 8), normal(8, 12, 2, 8, seed=1), normal(8, 12, 2, 8, seed=2)
    mask = np.arange(12)[None, None] < np.arange(5, 13)[:, None, None]
    found = []
    for shape in MESHES:
        sharding.make_mesh(*shape)
        placed = sharding.put({"q": q, "k": k, "v": v, "mask": mask})
        if shape[2] > 1:  # heads over `model`, as a split projection leaves them
            split = jax.jit(lambda x: jax.sharding.reshard(x, sharding.spec("batch", None, "heads", None)))
            placed |= {name: split(placed[name]) for name in ("q", "k", "v")}
        attend = jax.jit(lambda q, k, v, mask: nn.attention(q, k, v, mask))
        found.append(np.asarray(jax.block_until_ready(attend(**placed))))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=2e-6)


@pytest.mark.parametrize(
    "length, expected",
    [
        (300, (384, 384)),
        (1000, (1024, 512)),
        (1535, (1536, 512)),  # a row of configs/flow_pretrain.py
        (2048, (2048, 512)),  # and of lm_pretrain.py
        (2049, (2304, 384)),  # sampling of 1,024 tokens
        (1408, (1536, 512)),
        (8192, (8192, 512)),
    ],
)
def test_the_blocks_of_the_tpu_kernel_are_large_where_there_are_many_positions(length, expected):
    assert nn.kernel_blocks(length) == expected
