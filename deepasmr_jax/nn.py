"""Layers shared by models of the package: linear, norms, SwiGLU, rotary positions, attention, grouped convolution, CTC.

Mixed precision, in one place: weights are float32; a product casts only its two operands to `dtype`, forward and
backward, and accumulates in float32. What lies between products is float32, or, where a layer is called with
`result` bfloat16, rounded to that: half the memory traffic, which bounds the large models on a TPU (docs/plan.md).
Norms, softmax and rotary angles are computed in float32 whatever the types are. No layer stores a type: the caller
passes those of its config, or "float32" where a product stays exact, so one loaded model runs in either.
Sharding: kernels are split as their axis names say (`sharding.AXES`); an activation keeps the split of its
leading axes and has its last axis split only where the kernel's output axis is on `model`.

Letters: B rows, N query positions, S key positions, H query heads, K key/value heads, E head size,
D width, F MLP width; of convolutions T positions, C channels, G groups.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from deepasmr_jax.sharding import AXES, spec

# from this many scores of a row on, a CPU takes one head after the other; of a row, so that a batch computes as
# its rows alone do
BY_HEAD_SCORES = 2**18
MASKED = -1e30  # score of a forbidden pair: finite, so that a row with no allowed key gives no NaN
# what the backward pass computes anew of a layer: nothing, all but what `Linear` and the attention kernel of a TPU gave
# (named after the rounding, so that bfloat16 is kept as such), all but what that kernel gave
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names("product", "attention"),
    "full": jax.checkpoint_policies.save_only_these_names("attention"),
}


def check_dtype(dtype: str, name: str = "dtype") -> None:
    """Checks the type of the operands of products, as a config names it.

    Raises:
        ValueError: if it is neither float32 nor bfloat16.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"{name} {dtype!r} is unknown; use float32 or bfloat16")


def axes_of(x: jax.Array) -> tuple:
    """Mesh axes of each axis of `x` (None: not split), as known at trace time."""
    parts = tuple(jax.typeof(x).sharding.spec)
    return parts + (None,) * (x.ndim - len(parts))


def like(x: jax.Array, *names: str | None) -> PartitionSpec:
    """Split of an array that has all axes of `x` but the last, then axes with these logical names.

    Only `model` names split an activation: a width named "embed" is split in weights and whole here.
    """
    tail = spec(*(name if name and AXES[name] == ("model",) else None for name in names))
    return PartitionSpec(*axes_of(x)[:-1], *tail)


def like_vector(name: str | None) -> PartitionSpec:
    """Split of a bias or gain along an activation axis of this name: over `model` or not at all."""
    return spec(name if name and AXES[name] == ("model",) else None)


class Linear(nnx.Module):
    """Affine map of the last axis: `x @ kernel + bias`.

    Weights: kernel [in, out] float32, bias [out] float32 (only with `use_bias`).

    Args:
        in_features: size of the last axis of the input.
        out_features: size of the last axis of the output.
        axes: logical names of the kernel's two axes, such as ("embed", "mlp"); None is an unsplit axis.
        rngs: source of the initial weights; the stream `params` is used.
        use_bias: adds a bias that starts at zero.
        init: initializer of the kernel.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axes: tuple[str | None, str | None] = (None, None),
        *,
        rngs: nnx.Rngs,
        use_bias: bool = True,
        init=jax.nn.initializers.lecun_normal(),
    ):
        shape = (in_features, out_features)
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32, out_sharding=spec(*axes)))
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(out_features, jnp.float32, out_sharding=like_vector(axes[1])))
        self.use_bias = use_bias
        self.out_axis = axes[1]

    def __call__(self, x: jax.Array, dtype: str, result: str = "float32") -> jax.Array:
        """[..., in] any float type -> [..., out] in `result` by a product in `dtype`; leading axes keep their split."""
        out = like(x, self.out_axis)
        y = product("...i,io->...o", x, self.kernel[...], dtype, out, result)
        y = y + self.bias[...] if self.use_bias else y
        return checkpoint_name(y.astype(result), "product")


def product(
    equation: str,
    x: jax.Array,
    y: jax.Array,
    dtype: str,
    out_sharding: PartitionSpec,
    result: str = "float32",
) -> jax.Array:
    """Einsum of two arrays with operands in `dtype`, accumulated in float32.

    The two products of the backward pass have their operands in `dtype` as well; left to itself, JAX would
    multiply the float32 gradient and run at float32 speed.

    Args:
        equation: einsum subscripts without sums inside one operand; "..." only in `x` and the result.
        x: left operand, any float type.
        y: right operand, any float type.
        dtype: float32 or bfloat16.
        out_sharding: split of the result.
        result: type of the result. Rounded here and not by the caller, as XLA would then go on with float32.
    """
    if "..." in equation:
        equation = equation.replace("...", "ABCDEFG"[: x.ndim - len(equation.split(",")[0]) + 3])
    if dtype == "float32":
        return _einsum(equation, x, y, dtype, out_sharding).astype(result)
    return _low_product(equation, x, y, dtype, out_sharding, result)


def _einsum(
    equation: str, x: jax.Array, y: jax.Array, dtype: str, out_sharding: PartitionSpec, result=jnp.float32
) -> jax.Array:
    """Einsum with operands cast to `dtype`, result float32 unless another type is given."""
    x, y = x.astype(dtype), y.astype(dtype)

    def once(x, y):
        return jnp.einsum(equation, x, y, preferred_element_type=result, out_sharding=out_sharding)

    at = None if dtype == "float32" else _single_row(equation, x)
    if at is None:
        return once(x, y)
    row = equation.split("->")[1].index(equation[at])

    def twice(x, y):
        return jax.lax.slice_in_dim(once(jnp.concatenate([x, x], axis=at), y), 0, 1, axis=row)

    # XLA's CPU backend has fast bfloat16 products from two rows on: one row took ten times as long as two
    return jax.lax.platform_dependent(x, y, cpu=twice, default=once)


def _single_row(equation: str, x: jax.Array) -> int | None:
    """An unsplit axis of `x` along which it may be repeated, if it is one vector times a matrix; else None."""
    inputs, out = equation.split("->")
    left, right = inputs.split(",")
    rows = [i for i, letter in enumerate(left) if letter not in right]
    is_batched = any(letter in right and letter in out for letter in left)
    if is_batched or any(x.shape[i] != 1 for i in rows):
        return None
    return next((i for i in reversed(rows) if axes_of(x)[i] is None), None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4, 5))
def _low_product(equation, x, y, dtype, out_sharding, result):
    """`_einsum` whose backward pass has its operands in `dtype` too."""
    return _einsum(equation, x, y, dtype, out_sharding, result)


def _low_product_forward(equation, x, y, dtype, out_sharding, result):
    """Result, and what the backward pass needs: the rounded operands and empty arrays of their own types."""
    out = _einsum(equation, x, y, dtype, out_sharding, result)
    return out, (x.astype(dtype), y.astype(dtype), jnp.zeros(0, x.dtype), jnp.zeros(0, y.dtype))


def _low_product_backward(equation, dtype, out_sharding, result, saved, gradient):
    """Gradients of both operands; each keeps the split of its operand."""
    x, y, x_type, y_type = saved
    inputs, out = equation.split("->")
    left, right = inputs.split(",")
    x_split, y_split = PartitionSpec(*axes_of(x)), PartitionSpec(*axes_of(y))
    # rounded in the product: where several gradients are summed up, XLA would store each in float32
    x_gradient = _einsum(f"{out},{right}->{left}", gradient, y, dtype, x_split, x_type.dtype)
    y_gradient = _einsum(f"{left},{out}->{right}", x, gradient, dtype, y_split, y_type.dtype)
    return x_gradient, y_gradient


_low_product.defvjp(_low_product_forward, _low_product_backward)


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, in float32.

    Weights: scale [D] float32, starts at one.
    """

    def __init__(self, width: int, *, eps: float = 1e-6):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32, out_sharding=spec(None)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] any float type -> [..., D] float32."""
        return rms_norm(x, self.scale[...], self.eps)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMS norm of the last axis with a given gain [D]; float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale


class LayerNorm(nnx.Module):
    """Layer norm of the last axis, in float32.

    Weights: scale [D] float32, starts at one; bias [D] float32, starts at zero.
    """

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: jax.Array, eps: float = 1e-6) -> jax.Array:
        """[..., D] float32 -> [..., D] float32."""
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
        return x * self.scale[...] + self.bias[...]


class BatchNorm(nnx.Module):
    """Batch norm of the last axis by stored statistics: `(x - mean) / sqrt(var + eps) * scale + bias`, in float32.

    Weights, all [C] float32: mean, var; and scale, bias if `is_affine`. They start as the identity.
    """

    def __init__(self, num_channels: int, is_affine: bool = True, eps: float = 1e-5):
        self.mean, self.var = nnx.Param(jnp.zeros(num_channels)), nnx.Param(jnp.ones(num_channels))
        if is_affine:
            self.scale, self.bias = nnx.Param(jnp.ones(num_channels)), nnx.Param(jnp.zeros(num_channels))
        self.is_affine = is_affine
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] float32 -> [..., C] float32."""
        gain = jax.lax.rsqrt(self.var[...] + self.eps)
        gain = gain * self.scale[...] if self.is_affine else gain
        x = (x - self.mean[...]) * gain
        return x + self.bias[...] if self.is_affine else x


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """`x` with this share of its values at zero and the others raised to keep the mean; without a key `x` itself."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape, out_sharding=PartitionSpec(*axes_of(x)))
    return jnp.where(kept, x / (1 - rate), 0.0)


class SwiGLU(nnx.Module):
    """Gated MLP `down(silu(gate(x)) * up(x))` without biases; the hidden axis is split over `model`."""

    def __init__(
        self,
        width: int,
        mlp_width: int,
        *,
        rngs: nnx.Rngs,
        init=jax.nn.initializers.lecun_normal(),
    ):
        options = dict(rngs=rngs, use_bias=False, init=init)
        self.gate = Linear(width, mlp_width, ("embed", "mlp"), **options)
        self.up = Linear(width, mlp_width, ("embed", "mlp"), **options)
        self.down = Linear(mlp_width, width, ("mlp", "embed"), **options)

    def __call__(self, x: jax.Array, dtype: str, result: str = "float32") -> jax.Array:
        """[..., D] -> [..., D] in `result`; products in `dtype`."""
        gate, up = (f(x, dtype, result) for f in (self.gate, self.up))
        gated = _gated if result == "float32" else _gated_once
        return self.down(gated(gate, up), dtype, result)


def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`silu(gate) * up` in float32, rounded to the type of `gate`."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


@jax.custom_vjp
def _gated_once(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`_gated`, whose two gradients are stored: XLA would make each anew, from two arrays, where it is used."""
    return _gated(gate, up)


def _gated_backward(saved, gradient):
    """Gradients of gate and up."""
    return jax.lax.optimization_barrier(jax.vjp(_gated, *saved)[1](gradient))


_gated_once.defvjp(lambda gate, up: (_gated(gate, up), (gate, up)), _gated_backward)


def rotary(x: jax.Array, positions: jax.Array, base: float, interleaved: bool = False) -> jax.Array:
    """Rotates pairs of channels of every head by an angle that grows with the position.

    Pair i turns by `positions * base^(-2i/E)`. Angles are float32: positions above 256 are not exact in
    bfloat16.

    Args:
        x: [B, N, H, E], E even.
        positions: [B, N] (or [1, N]) int32 or float32.
        base: wavelength base, such as 10000 or 1000000.
        interleaved: pairs are (2i, 2i+1) instead of (i, i + E/2).

    Returns:
        [B, N, H, E], type of `x`.

    Raises:
        ValueError: if E is odd.

    Source: RoFormer (Su et al., 2021), section 3.2; the half-split pairing is that of Llama and Qwen.
    """
    size = x.shape[-1]
    if size % 2:
        raise ValueError(f"rotary positions need an even head size, found {size}")
    frequencies = base ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies  # [B, N, 1, E/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if x.dtype == jnp.bfloat16:
        return _rotary_by_product(x, cos, sin, interleaved)
    full = x.astype(jnp.float32)
    first, second = (full[..., ::2], full[..., 1::2]) if interleaved else jnp.split(full, 2, axis=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    if interleaved:
        pairs = jnp.stack(turned, axis=-1)
        return jnp.reshape(pairs, x.shape, out_sharding=PartitionSpec(*axes_of(x))).astype(x.dtype)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _rotary_by_product(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool) -> jax.Array:
    """`rotary` of bfloat16 heads, whose partners are fetched by a product with a matrix of 0, 1 and -1: exact.

    A TPU moves values between the channels of a vector slowly; slices of half a head were padded to four times
    their size and took as long as an MLP (docs/plan.md).
    """
    size = x.shape[-1]
    channels = np.arange(size)
    first, second = (
        (channels[::2], channels[1::2]) if interleaved else (channels[: size // 2], channels[size // 2 :])
    )
    partner = np.zeros((size, size), np.float32)
    partner[second, first], partner[first, second] = -1.0, 1.0
    # heads first, as the attention kernel wants them, and once: else XLA reorders the heads also as float32
    x, cos, sin = (jnp.moveaxis(y, 2, 1) for y in (x, cos, sin))
    x = jax.lax.optimization_barrier(x)
    split = PartitionSpec(*axes_of(x))
    turned = jnp.einsum("bhne,ef->bhnf", x, jnp.asarray(partner, x.dtype), out_sharding=split)
    cos, sin = (jnp.repeat(y, 2, -1) if interleaved else jnp.concatenate([y, y], -1) for y in (cos, sin))
    y = x.astype(jnp.float32) * cos + turned.astype(jnp.float32) * sin
    return jnp.moveaxis(y.astype(x.dtype), 1, 2)


def split_heads(x: jax.Array, num_heads: int, name: str = "heads") -> jax.Array:
    """[..., H*E] -> [..., H, E]; the head axis takes over the split over `model`.

    Raises:
        ValueError: if the last axis is not a multiple of `num_heads`.
    """
    if x.shape[-1] % num_heads:
        raise ValueError(f"{num_heads} heads do not divide a width of {x.shape[-1]}; use a divisor of it")
    shape = (*x.shape[:-1], num_heads, x.shape[-1] // num_heads)
    return jnp.reshape(x, shape, out_sharding=like(x, name, None))


def merge_heads(x: jax.Array, name: str = "heads") -> jax.Array:
    """[..., H, E] -> [..., H*E], split over `model` as whole heads."""
    out = PartitionSpec(*axes_of(x)[:-2], *spec(name))
    return jnp.reshape(x, (*x.shape[:-2], x.shape[-2] * x.shape[-1]), out_sharding=out)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None = None,
    *,
    scale: float | None = None,
    dtype: str = "float32",
    causal_chunk: int | None = None,
    segments: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention with grouped query heads; query head h reads key head h // (H/K).

    Products take operands in `dtype` (float32 by default: on CPU bfloat16 is slower here, and a TPU rounds
    the operands itself); the softmax is float32. A query whose keys are all forbidden gets their plain
    average; such rows are padding.

    Args:
        q: [B, N, H, E].
        k: [B, S, K, E], K divides H.
        v: [B, S, K, E].
        mask: [B, N, S], [B, 1, S] or [1, N, S] bool, True where attention is allowed; None allows all.
        scale: factor of the scores; 1/sqrt(E) if None.
        dtype: type of the operands of both products.
        causal_chunk: promise that N = S and that the mask, [B or 1, N, S], allows no key after its query.
            Queries are then taken in chunks of this many, each with the keys up to its end only.
        segments: with causal_chunk, [B, N] int32: promise that of the keys not after a query the mask allows those
            with the query's id, all others being padding. A TPU kernel needs no more than that.

    Returns:
        [B, N, H, E] in the type of `q`.

    Raises:
        ValueError: if K does not divide H.
    """
    if _has_kernel(q, k, mask, causal_chunk, segments):
        own = None if mask is None else mask[:, 0].astype(jnp.int32)
        ids = (segments, segments) if causal_chunk else (None if own is None else jnp.ones_like(own), own)
        q = q * (q.shape[3] ** -0.5 if scale is None else scale)
        return _attend_by_kernel(q, k, v, *ids, is_causal=bool(causal_chunk))
    if causal_chunk and q.shape[1] > causal_chunk:
        chunks = []
        for start in range(0, q.shape[1], causal_chunk):
            end = start + causal_chunk
            part = mask[:, start:end, :end]
            chunks.append(attention(q[:, start:end], k[:, :end], v[:, :end], part, scale=scale, dtype=dtype))
        return jnp.concatenate(chunks, axis=1)
    num_heads, num_kv_heads, size = q.shape[2], k.shape[2], q.shape[3]
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{num_kv_heads} key/value heads do not divide {num_heads} query heads; use a divisor of {num_heads}"
        )
    q = q * (size**-0.5 if scale is None else scale)
    tokens = axes_of(q)[1]
    num_scores = q.shape[1] * q.shape[2] * k.shape[1]
    attend = _attend_at_once if tokens or num_scores < BY_HEAD_SCORES else _attend
    return attend(q, k, v, mask, dtype).astype(q.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, dtype: str) -> jax.Array:
    """Attention of scaled queries by the form that is faster on the platform; for gradients always at once.

    On two CPU cores the form by head took 0.3 to 0.6 of the time for 250 to 500 positions, but its gradient up to
    2.5 times as long.
    """
    by_head = functools.partial(_attend_by_head, dtype=dtype)
    at_once = functools.partial(_attend_at_once, dtype=dtype)
    return jax.lax.platform_dependent(q, k, v, mask, cpu=by_head, default=at_once)


def _attend_forward(q, k, v, mask, dtype):
    """Result of `_attend_at_once`, and its backward pass."""
    return jax.vjp(lambda q, k, v: _attend_at_once(q, k, v, mask, dtype), q, k, v)


def _attend_backward(dtype, backward, gradient):
    """Gradients of queries, keys and values; none of the mask."""
    return (*backward(gradient), None)


_attend.defvjp(_attend_forward, _attend_backward)


def _attend_at_once(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, dtype: str
) -> jax.Array:
    """Attention of scaled queries with the scores of all heads in memory."""
    batch, tokens, heads, _ = axes_of(q)
    grouped = PartitionSpec(batch, tokens, heads, None, None)
    num_kv_heads = k.shape[2]
    group = q.shape[2] // num_kv_heads
    q = jnp.reshape(q, (*q.shape[:2], num_kv_heads, group, q.shape[3]), out_sharding=grouped)
    # the order bkngs is the one in which the product comes out: any other copies the scores
    scores = product("bnkge,bske->bkngs", q, k, dtype, PartitionSpec(batch, heads, tokens, None, None))
    if mask is not None:
        scores = jnp.where(mask[:, None, :, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1)
    out = product("bkngs,bske->bnkge", weights, v, dtype, grouped)
    shape = (*out.shape[:2], num_kv_heads * group, out.shape[4])
    return out.reshape(shape, out_sharding=PartitionSpec(batch, tokens, heads, None))


def _attend_by_head(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, dtype: str
) -> jax.Array:
    """The same, one row and key head after the other on each device: their scores stay in the cache of a CPU core."""
    rows = PartitionSpec(*axes_of(q))
    if mask is None:
        mask = jnp.ones((1, 1, k.shape[1]), bool)

    def local(q, k, v, mask):
        (num_rows, length, num_heads, size), num_kv_heads = q.shape, k.shape[2]
        group = num_heads // num_kv_heads
        q = jnp.moveaxis(q.reshape(num_rows, length, num_kv_heads, group, size), 1, 3)
        q = q.reshape(num_rows * num_kv_heads, group * length, size)
        k, v = (jnp.moveaxis(x, 1, 2).reshape(num_rows * num_kv_heads, -1, size) for x in (k, v))

        def one(head):
            q, k, v, row = head
            scores = product("ne,se->ns", q, k, dtype, None).reshape(group, length, -1)
            scores = jnp.where(mask[row], scores, MASKED).reshape(group * length, -1)
            weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
            total = jnp.sum(weights, axis=-1, keepdims=True)
            return product("ns,se->ne", weights, v, dtype, None) / total

        row = jnp.arange(num_rows * num_kv_heads) // num_kv_heads * (mask.shape[0] > 1)
        y = jax.lax.map(one, (q, k, v, row)).reshape(num_rows, num_kv_heads, group, length, size)
        return jnp.moveaxis(y, 3, 1).reshape(num_rows, length, num_heads, size)

    keys = PartitionSpec(rows[0], None, rows[2], None)
    masks = PartitionSpec(rows[0] if mask.shape[0] == q.shape[0] else None, None, None)
    specs = rows, keys, keys, masks
    return jax.shard_map(local, in_specs=specs, out_specs=rows)(
        *(jax.sharding.reshard(x, s) for x, s in zip((q, k, v, mask), specs, strict=True))
    )


def _has_kernel(q, k, mask, causal_chunk, segments) -> bool:
    """Whether the TPU kernel computes this attention: self-attention over many positions whose mask it can express.

    By the platform of the current mesh, and not by `platform_dependent`: its gradient would keep what the forms of
    all platforms keep, and so the scores. Where products are asked for in full float32, the plain form stays.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if getattr(device, "platform", None) != "tpu" or axes_of(q)[1]:
        return False
    if jax.config.jax_default_matmul_precision not in (None, "default", "bfloat16", "fastest"):
        return False
    fits = segments is not None if causal_chunk else mask is None or mask.shape[:2] == (q.shape[0], 1)
    return fits and q.shape[1] == k.shape[1] and q.shape[1] >= 256


def kernel_blocks(length: int) -> tuple[int, int]:
    """(padded length, size of a block) of the TPU kernel for `length` positions.

    Many positions are padded rather than cut into blocks of 128: 2,049 become six of 384, not seventeen.
    """
    size = min(-(-length // n) * n for n in ((128,) if length < 1024 else (256, 384)))
    return size, next(n for n in (512, 384, 256, 128) if size % n == 0)


def _attend_by_kernel(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_ids: jax.Array | None,
    key_ids: jax.Array | None,
    is_causal: bool,
    interpret: bool = False,
) -> jax.Array:
    """Attention of scaled queries by JAX's splash kernel, which keeps the scores on the chip; operands bfloat16.

    A query sees the keys with its id, and with `is_causal` none after it. The length is padded to whole blocks.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    rows, out_type = PartitionSpec(*axes_of(q)), q.dtype
    length = q.shape[1]
    size, block = kernel_blocks(length)
    extra = size - length
    if query_ids is None:
        query_ids = key_ids = jnp.ones(
            (q.shape[0], length), jnp.int32, out_sharding=PartitionSpec(rows[0], None)
        )
    # one block of queries at a time; a causal kernel skips blocks of keys, the other keeps all keys on the chip
    keys = block if is_causal or size > 2048 else size
    # one backward kernel for all gradients gives a part of that of the queries for each block of keys; summing these
    # up took longer than a kernel of its own
    own = {} if keys == size else dict(block_q_dq=block, block_kv_dq=keys)
    blocks = splash.splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=keys,
        block_q_dkv=block,
        block_kv_dkv=keys,
        use_fused_bwd_kernel=not own,
        **own,
    )

    def local(q, k, v, query_ids, key_ids):
        q, k, v = (jnp.moveaxis(x.astype(jnp.bfloat16), 2, 1) for x in (q, k, v))
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0))) for x in (q, k, v))
        ids = (jnp.pad(x, ((0, 0), (0, extra)), constant_values=-1) for x in (query_ids, key_ids))
        one = (
            splash.splash_attention_mask.CausalMask if is_causal else splash.splash_attention_mask.FullMask
        )((size, size))
        mask = splash.splash_attention_mask.MultiHeadMask([one] * q.shape[1])
        kernel = splash.splash_attention_kernel.make_splash_mha(
            mask, head_shards=1, q_seq_shards=1, block_sizes=blocks, interpret=interpret,
            residual_checkpoint_name="attention",
        )  # fmt: skip
        y = jax.vmap(kernel)(q, k, v, splash.splash_attention_kernel.SegmentIds(*ids))
        return jnp.moveaxis(y[:, :, :length], 1, 2).astype(out_type)

    ids = PartitionSpec(rows[0], None)
    heads = PartitionSpec(rows[0], None, rows[2], None)
    specs = heads, heads, heads, ids, ids
    operands = zip((q, k, v, query_ids, key_ids), specs, strict=True)
    run = jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=False)
    return run(*(jax.sharding.reshard(x, s) for x, s in operands))


def grouped_conv(x: jax.Array, kernel: jax.Array, groups: int, stride: int = 1) -> jax.Array:
    """Grouped convolution along the second axis, zero padding of (taps - 1) / 2; each device does its own rows.

    Left to the partitioner, XLA gathers the whole batch on every device (openxla/xla issue 47945), and with
    the model axis above 1 the gradient of the kernel is wrong (seen with jax 0.10.2).

    Args:
        x: [B, T, C] float, split over `batch`.
        kernel: [taps, C/G, D], an odd number of taps, type of `x`; replicated.
        groups: G.
        stride: a result for every `stride`-th position.

    Returns:
        [B, T / stride rounded up, D], type of `x`, split over `batch`.
    """
    rows = spec("batch", None, None)

    def local(x, kernel):
        return _local_conv(x, jax.lax.pcast(kernel, AXES["batch"], to="varying"), groups, stride)

    local = jax.shard_map(local, in_specs=(rows, PartitionSpec()), out_specs=rows)
    return local(jax.sharding.reshard(x, rows), kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _local_conv(x, kernel, groups, stride):
    """`_conv` with its own kernel gradient on CPU, where XLA's is 13 x slower than the forward pass."""
    return _conv(x, kernel, groups, stride)


def _conv(x, kernel, groups, stride):
    pad = kernel.shape[0] // 2
    numbers = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride,), [(pad, pad)], dimension_numbers=numbers, feature_group_count=groups
    )


def _local_conv_forward(x, kernel, groups, stride):
    return _conv(x, kernel, groups, stride), (x, kernel)


def _local_conv_backward(groups, stride, saved, dy):
    x, kernel = saved
    (dx,) = jax.linear_transpose(lambda x: _conv(x, kernel, groups, stride), x)(dy)

    def by_transpose(x, dy):
        return jax.linear_transpose(lambda kernel: _conv(x, kernel, groups, stride), kernel)(dy)[0]

    def by_convolution(x, dy):  # rows and channels change places, and dy is a kernel, its taps `stride` apart
        num_rows, length, _ = x.shape
        x = jnp.einsum("btgc->ctgb", x.reshape(num_rows, length, groups, -1))
        pad = kernel.shape[0] // 2
        unread = (length - 1) % stride  # positions behind the last one that a result is centred on
        dkernel = jax.lax.conv_general_dilated(
            x.reshape(-1, length, groups * num_rows),
            jnp.einsum("btd->tbd", dy),
            (1,),
            [(pad, pad - unread)],
            rhs_dilation=(stride,),
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=groups,
        )
        return jnp.einsum("ctd->tcd", dkernel)

    return dx, jax.lax.platform_dependent(x, dy, cpu=by_convolution, default=by_transpose)


_local_conv.defvjp(_local_conv_forward, _local_conv_backward)


def length_mask(lengths: jax.Array, size: int) -> jax.Array:
    """[B] lengths -> [B, size] bool, True before each row's length."""
    return jnp.arange(size) < lengths[:, None]


def zero_padding(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Image [B, F, T, C] with padded frames (False in the mask [B, T]) at zero, as a convolution sees a clip's end."""
    return jnp.where(mask[:, None, :, None], x, 0.0)


def ctc(logits: jax.Array, lengths: jax.Array, labels: jax.Array, label_lengths: jax.Array) -> jax.Array:
    """Connectionist temporal classification.

    Args:
        logits: [B, T, V] float32, or log-probabilities; class 0 is the blank.
        lengths: [B] int32, valid positions of each row.
        labels: [B, N] int32 in 1..V-1.
        label_lengths: [B] int32.

    Returns:
        [B] nats of the label sequences.
    """
    import optax

    def rows(logits, lengths, labels, label_lengths):
        beyond = 1.0 - length_mask(lengths, logits.shape[1])
        return optax.ctc_loss(logits, beyond, labels, 1.0 - length_mask(label_lengths, labels.shape[1]))

    # each device takes its own rows: the scan in Optax starts from unsplit states, which explicit axes refuse
    axis = axes_of(logits)[0]
    given = [jnp.asarray(x) for x in (logits, lengths, labels, label_lengths)]
    given = [jax.sharding.reshard(x, PartitionSpec(axis, *[None] * (x.ndim - 1))) for x in given]
    return jax.shard_map(rows, out_specs=PartitionSpec(axis), check_vma=False)(*given)


def ctc_fits(lengths: jax.Array, labels: jax.Array, label_lengths: jax.Array) -> jax.Array:
    """[B] bool: rows with labels that `ctc` can align: a position for each, and a blank between two equal ones.

    Args: as of `ctc`; `lengths` are those of the logits.
    """
    inside = length_mask(label_lengths, labels.shape[1])[:, 1:]
    repeats = jnp.sum((labels[:, 1:] == labels[:, :-1]) & inside, axis=1)
    is_whole = (label_lengths > 0) & (label_lengths <= labels.shape[1])
    return is_whole & (label_lengths + repeats <= lengths)
