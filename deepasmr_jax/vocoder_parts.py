"""Parts that vocoders share: convolutions as PyTorch initialises them, upsampling, and the two players of a GAN.

Letters: B rows, W samples or frames, C channels, P period.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from deepasmr_jax import nn


def draw(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> tuple[nnx.Param, nnx.Param]:
    """Kernel of this shape and bias of its last axis, uniform within 1 / sqrt(fan_in).

    That is the library default from which the public models were trained. One draw for both: with over a
    hundred convolutions, the generators of random numbers make most of the compile time.
    """
    limit, size = fan_in**-0.5, math.prod(shape)
    x = jax.random.uniform(key, (size + shape[-1],), jnp.float32, -limit, limit)
    return nnx.Param(x[:size].reshape(shape)), nnx.Param(x[size:])


class Conv(nnx.Module):
    """Convolution along axis 1 of [B, W, C] or [B, W, P, C]: kernel [k, in / groups, out], bias [out]."""

    def __init__(self, key: jax.Array, size: int, num_in: int, num_out: int, groups: int = 1):
        shape = (size, num_in // groups, num_out)
        self.kernel, self.bias = draw(key, shape, size * num_in // groups)

    def __call__(
        self, x: jax.Array, dtype: str, stride: int = 1, dilation: int = 1, precision=None
    ) -> jax.Array:
        """Zero padding of (k - 1) / 2 * dilation on each side; float32 out."""
        kernel = self.kernel[...].astype(dtype)
        pad = (kernel.shape[0] - 1) // 2 * dilation
        if (groups := x.shape[-1] // kernel.shape[1]) > 1:
            plain = x.ndim == 3 and dilation == 1 and precision is None
            assert plain, "only the scale discriminators have groups"
            y = nn.grouped_conv(x.astype(dtype), kernel, groups, stride)
            return y.astype(jnp.float32) + self.bias[...]
        if x.ndim == 3:
            layout, pads = ("NWC", "WIO", "NWC"), [(pad, pad)]
            strides, dilations = (stride,), (dilation,)
        else:  # a second axis that is left alone
            layout, pads = ("NHWC", "HWIO", "NHWC"), [(pad, pad), (0, 0)]
            strides, dilations, kernel = (stride, 1), (dilation, 1), kernel[:, None]
        y = jax.lax.conv_general_dilated(
            x.astype(dtype), kernel, strides, pads, None, dilations, layout, precision=precision
        )
        return y.astype(jnp.float32) + self.bias[...]


def conv_by_products(x: jax.Array, kernel: jax.Array, dilation: int = 1) -> tuple[jax.Array, jax.Array]:
    """Convolution of one row without padding, as two matrix products over taps and channels.

    For a CPU, which has bfloat16 products but no bfloat16 convolution. The windows of a half should fit in the
    cache. They come from a gather, which reads a window of all taps as one stretch; two of them, because XLA
    would compute what makes `x` anew for every tap if there were a single reader.

    Args:
        x: [W, in] bfloat16.
        kernel: [k, in, out] bfloat16.
        dilation: distance of the taps.

    Returns:
        The first and the second half of [W - (k - 1) * dilation, out] float32.
    """
    size, channels, num_out = kernel.shape
    num = x.shape[0] - (size - 1) * dilation
    x = jnp.pad(x, ((0, -x.shape[0] % dilation), (0, 0)))
    # as integers: XLA would turn bfloat16 into float32 and back around the gather
    x = jax.lax.bitcast_convert_type(x, jnp.uint16).reshape(-1, dilation * channels)

    def products(start: int, end: int) -> jax.Array:
        at = np.arange(start, end)
        starts = jnp.asarray(np.stack([at // dilation, at % dilation * channels], 1).astype(np.int32))
        numbers = jax.lax.GatherDimensionNumbers((1, 2), (), (0, 1))
        windows = jax.lax.gather(x, starts, numbers, (size, channels), mode="promise_in_bounds")
        windows = jax.lax.bitcast_convert_type(windows.reshape(end - start, size * channels), kernel.dtype)
        flat = kernel.reshape(size * channels, num_out)
        return jnp.dot(windows, flat, preferred_element_type=jnp.float32)

    return products(0, num // 2), products(num // 2, num)


class Upsample(nnx.Module):
    """Transposed convolution as an input-dilated one: kernel [k, in, out] (flipped along k), bias [out]."""

    def __init__(self, key: jax.Array, size: int, num_in: int, num_out: int):
        self.kernel, self.bias = draw(key, (size, num_in, num_out), size * num_out)

    def __call__(self, x: jax.Array, dtype: str, rate: int) -> jax.Array:
        """[B, W, in] to [B, rate * W, out] float32."""
        kernel = self.kernel[...].astype(dtype)
        size = kernel.shape[0]
        pad = size - 1 - (size - rate) // 2
        y = jax.lax.conv_general_dilated(
            x.astype(dtype), kernel, (1,), [(pad, pad)], (rate,), None, ("NWC", "WIO", "NWC")
        )
        return y.astype(jnp.float32) + self.bias[...]


class Gan(nnx.Module):
    """Both players: generator, and discriminators (None unless cfg.adversarial)."""

    def __init__(self, generator: nnx.Module, discriminators: nnx.Module | None):
        self.generator = generator
        self.discriminators = discriminators


def row_weights(batch: dict[str, jax.Array]) -> jax.Array:
    """[B] float32: 1, and 0 of an empty row, whose `lengths` is 0; a batch without `lengths` has none."""
    if "lengths" not in batch:
        return jnp.ones(batch["wav"].shape[0])
    return (batch["lengths"] > 0).astype(jnp.float32)


def mean_of_rows(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean over equally long rows [B, ...] with weights [B]; scalar."""
    means = jnp.mean(x, axis=tuple(range(1, x.ndim)))
    return jnp.sum(means * weights) / jnp.maximum(jnp.sum(weights), 1.0)


def init_opt(tx: optax.GradientTransformation, model: Gan) -> dict:
    """Optimizer states of both players: {"generator", "discriminators"} (the second None without them)."""
    discriminators = model.discriminators
    return {
        "generator": tx.init(model.generator),
        "discriminators": None if discriminators is None else tx.init(discriminators),
    }
