"""Speech to a 192-number speaker embedding: CAM++ over a Kaldi filter bank, as the public CosyVoice releases use it.

Source: CAM++ (Wang et al., 2023): a small residual network over frequency and time halves the frequencies three
times, a densely connected time-delay network follows in which every layer masks its output by the context of its
segment and of the whole clip, then mean and deviation over time. For inference; batch norms use stored statistics.
Batch: fbank [B, T, 80] float32 of `audio.fbank(wav, lengths, **FBANK)`, lengths [B] int32 frames.
Letters: B rows, T frames (100 Hz, after `tdnn` 50 Hz), F frequency rows of the image, C channels, E embedding size.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepasmr_jax import nn, sharding

NUM_BANDS = 80
FBANK = dict(window="povey", scale=1.0)  # arguments of audio.fbank; the mean over time is removed there


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of a CAM++; the defaults are the public 192-number encoder."""

    head_channels: int = 32  # of the residual network over frequency and time
    initial_channels: int = 128  # between it and the dense blocks
    growth: int = 32  # channels that every dense layer adds
    bottleneck: int = 128  # inner channels of a dense layer
    repeats: tuple[int, ...] = (12, 24, 16)  # layers of the dense blocks; each block's width is then halved
    dilations: tuple[int, ...] = (1, 2, 2)
    segment_frames: int = 100  # frames of 20 ms that share one context mask
    embedding_size: int = 192
    dtype: str = "float32"  # of the products

    def __post_init__(self):
        nn.check_dtype(self.dtype)
        for name in ("repeats", "dilations"):  # lists after a round trip through JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.repeats or len(self.repeats) != len(self.dilations) or min(self.repeats) < 1:
            raise ValueError(
                f"repeats {self.repeats} and dilations {self.dilations} must give one number for every block"
            )
        if self.bottleneck % 2 or any(w % 2 for w in self.block_widths):
            raise ValueError(
                f"bottleneck {self.bottleneck} and block widths {self.block_widths} are halved: use even numbers"
            )

    @property
    def block_widths(self) -> tuple[int, ...]:
        """Channels at the end of every dense block, before they are halved."""
        widths, width = [], self.initial_channels
        for count in self.repeats:
            widths.append(width + count * self.growth)
            width = widths[-1] // 2
        return tuple(widths)


def cosyvoice() -> Config:
    """The encoder of CosyVoice 1 to 3: 6.85 M parameters, 192 numbers."""
    return Config()


# ---------------------------------------------------------------- modules


class _Keys:
    """In the place of nnx.Rngs, whose counter makes tracing 225 draws slow: `params` gives key after key."""

    def __init__(self, key: jax.Array, count: int):
        self.keys = iter(jax.random.split(key, count))

    def params(self) -> jax.Array:
        return next(self.keys)


class ImageConv(nnx.Module):
    """Convolution without bias, kernel [k, k, in, out] over (frequency, time), zero padding k // 2."""

    def __init__(self, size: int, num_in: int, num_out: int, rngs: _Keys):
        normal = jax.nn.initializers.he_normal()
        self.kernel = nnx.Param(normal(rngs.params(), (size, size, num_in, num_out), jnp.float32))

    def __call__(self, x: jax.Array, dtype: str, stride: int = 1) -> jax.Array:
        """[B, F, T, in] to [B, F / stride, T, out] float32."""
        kernel = self.kernel[...].astype(dtype)
        pad = (kernel.shape[0] // 2,) * 2
        y = jax.lax.conv_general_dilated(
            x.astype(dtype), kernel, (stride, 1), (pad, pad), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y.astype(jnp.float32)


class TimeConv(nnx.Module):
    """Convolution without bias along time, kernel [k, in, out], zero padding of dilation (k - 1) / 2."""

    def __init__(self, size: int, num_in: int, num_out: int, rngs: _Keys):
        normal = jax.nn.initializers.lecun_normal()
        self.kernel = nnx.Param(normal(rngs.params(), (size, num_in, num_out), jnp.float32))

    def __call__(self, x: jax.Array, dtype: str, stride: int = 1, dilation: int = 1) -> jax.Array:
        """[B, T, in] to [B, T / stride rounded up, out] float32, as one product over taps and channels."""
        size, num_in, num_out = self.kernel.shape
        pad, num_out_frames = dilation * (size - 1) // 2, -(-x.shape[1] // stride)
        padded = jnp.pad(x, ((0, 0), (pad, pad + stride), (0, 0)))
        taps = [padded[:, i * dilation :][:, : num_out_frames * stride : stride] for i in range(size)]
        kernel = self.kernel[...].reshape(size * num_in, num_out)
        return nn.product("btc,cd->btd", jnp.concatenate(taps, -1), kernel, dtype, nn.like(x, None))


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions; the first may halve the frequencies, and then a 1x1 convolution is the shortcut."""

    def __init__(self, channels: int, stride: int, rngs: _Keys):
        self.conv1, self.bn1 = ImageConv(3, channels, channels, rngs), nn.BatchNorm(channels)
        self.conv2, self.bn2 = ImageConv(3, channels, channels, rngs), nn.BatchNorm(channels)
        if stride > 1:
            self.shortcut_conv = ImageConv(1, channels, channels, rngs)
            self.shortcut_bn = nn.BatchNorm(channels)
        self.stride = stride

    def __call__(self, x: jax.Array, mask: jax.Array, dtype: str) -> jax.Array:
        y = nn.zero_padding(jax.nn.relu(self.bn1(self.conv1(x, dtype, self.stride))), mask)
        y = self.bn2(self.conv2(y, dtype))
        if self.stride > 1:
            x = self.shortcut_bn(self.shortcut_conv(x, dtype, self.stride))
        return nn.zero_padding(jax.nn.relu(x + y), mask)


class Head(nnx.Module):
    """Filter bank as an image of one channel to frames of 10 rows of `head_channels`."""

    def __init__(self, cfg: Config, rngs: _Keys):
        c = cfg.head_channels
        self.conv1, self.bn1 = ImageConv(3, 1, c, rngs), nn.BatchNorm(c)
        self.layer1 = nnx.List([ResidualBlock(c, 2, rngs), ResidualBlock(c, 1, rngs)])
        self.layer2 = nnx.List([ResidualBlock(c, 2, rngs), ResidualBlock(c, 1, rngs)])
        self.conv2, self.bn2 = ImageConv(3, c, c, rngs), nn.BatchNorm(c)

    def __call__(self, fbank: jax.Array, mask: jax.Array, dtype: str) -> jax.Array:
        """[B, T, 80] and mask [B, T] to [B, T, 10 * C] float32, channel-major."""
        x = nn.zero_padding(jnp.swapaxes(fbank, 1, 2)[..., None], mask)
        x = nn.zero_padding(jax.nn.relu(self.bn1(self.conv1(x, dtype))), mask)
        for block in (*self.layer1, *self.layer2):
            x = block(x, mask, dtype)
        x = nn.zero_padding(jax.nn.relu(self.bn2(self.conv2(x, dtype, 2))), mask)
        x = jnp.einsum("bftc->btcf", x)
        return x.reshape(*x.shape[:2], -1, out_sharding=jax.P(*nn.axes_of(x)[:2], None))


class DenseLayer(nnx.Module):
    """Bottleneck, then a convolution whose output is scaled by a mask computed from the context."""

    def __init__(self, cfg: Config, num_in: int, rngs: _Keys):
        inner, options = cfg.bottleneck, dict(rngs=rngs)
        self.norm1, self.linear1 = nn.BatchNorm(num_in), nn.Linear(num_in, inner, use_bias=False, **options)
        self.norm2, self.local = nn.BatchNorm(inner), TimeConv(3, inner, cfg.growth, rngs)
        self.context1 = nn.Linear(inner, inner // 2, **options)
        self.context2 = nn.Linear(inner // 2, cfg.growth, **options)

    def __call__(self, cfg: Config, dilation: int, x: jax.Array, mask: jax.Array) -> jax.Array:
        """[B, T, C] and mask [B, T] to the layer's own [B, T, growth] float32."""
        x = self.linear1(jax.nn.relu(self.norm1(x)), cfg.dtype)
        x = jnp.where(mask[..., None], jax.nn.relu(self.norm2(x)), 0.0)
        context = jax.nn.relu(self.context1(_context(x, mask, cfg.segment_frames), cfg.dtype))
        gate = jax.nn.sigmoid(self.context2(context, cfg.dtype))  # one for each segment
        y = self.local(x, cfg.dtype, dilation=dilation)
        return y * _to_frames(gate, cfg.segment_frames, y.shape[1])


class Encoder(nnx.Module):
    """head, tdnn, for every dense block its layers and its transit, and the map of the pooled statistics."""

    def __init__(self, cfg: Config, rngs: _Keys):
        self.head = Head(cfg, rngs)
        num_rows, width = NUM_BANDS // 8, cfg.initial_channels
        self.tdnn = TimeConv(5, num_rows * cfg.head_channels, width, rngs)
        self.tdnn_norm = nn.BatchNorm(width)
        blocks, transits, transit_norms = [], [], []
        for count, full in zip(cfg.repeats, cfg.block_widths, strict=True):
            widths = [width + i * cfg.growth for i in range(count)]
            blocks.append(nnx.List([DenseLayer(cfg, w, rngs) for w in widths]))
            width = full // 2
            transits.append(nn.Linear(full, width, rngs=rngs, use_bias=False))
            transit_norms.append(nn.BatchNorm(full))
        self.blocks, self.transits = nnx.List(blocks), nnx.List(transits)
        self.transit_norms = nnx.List(transit_norms)
        self.out_norm = nn.BatchNorm(width)
        self.dense = nn.Linear(2 * width, cfg.embedding_size, rngs=rngs, use_bias=False)
        self.dense_norm = nn.BatchNorm(cfg.embedding_size, is_affine=False)


def init(cfg: Config, key: jax.Array) -> Encoder:
    """An encoder with random weights on the current mesh, copied whole to every device."""
    return Encoder(cfg, _Keys(key, 14 + 4 * sum(cfg.repeats) + len(cfg.repeats)))


# ---------------------------------------------------------------- functions


def _context(x: jax.Array, mask: jax.Array, size: int) -> jax.Array:
    """Mean of the whole clip plus mean of each segment: [B, T, C], zero beyond the mask, to [B, T / size, C]."""
    missing = -x.shape[1] % size
    x, mask = jnp.pad(x, ((0, 0), (0, missing), (0, 0))), jnp.pad(mask, ((0, 0), (0, missing)))
    batch, num = nn.axes_of(x)[0], x.shape[1] // size
    x = x.reshape(x.shape[0], num, size, -1, out_sharding=jax.P(batch, None, None, None))
    counts = mask.reshape(mask.shape[0], num, size, 1, out_sharding=jax.P(batch, None, None, None))
    counts = jnp.sum(counts.astype(jnp.float32), axis=2)
    sums = jnp.sum(x, axis=2)
    whole = jnp.sum(sums, axis=1, keepdims=True) / jnp.maximum(jnp.sum(counts, axis=1, keepdims=True), 1.0)
    return whole + sums / jnp.maximum(counts, 1.0)


def _to_frames(x: jax.Array, size: int, num_frames: int) -> jax.Array:
    """[B, S, C], one for each segment, to [B, T, C]."""
    shape = (x.shape[0], x.shape[1] * size, x.shape[2])
    x = jnp.broadcast_to(x[:, :, None], (*x.shape[:2], size, x.shape[2]))
    return x.reshape(shape, out_sharding=jax.P(nn.axes_of(x)[0], None, None))[:, :num_frames]


def stacked(model: Encoder, xp=np) -> Encoder:
    """The encoder with each dense block as one `DenseLayer` of stacked weights, for a program that compiles sooner.

    A layer reads the channels before it: weights are filled up with zeros to the width of the block's last layer.
    `xp` makes the copy: NumPy on the host, outside of jit only, or jax.numpy.
    """
    model = jax.tree.map(lambda x: x, model)  # another module of the same arrays
    model.blocks = nnx.List([_stack(block, xp) for block in model.blocks])
    return model


def _stack(layers: nnx.List, xp) -> DenseLayer:
    """Layers of one dense block as one of stacked weights."""

    def one(*each):
        size, rest = max(w.shape[0] for w in each), [(0, 0)] * (each[0].ndim - 1)
        stack = xp.stack([xp.pad(w, [(0, size - w.shape[0]), *rest]) for w in each])
        return stack if xp is jnp else sharding.replicate(stack)

    return jax.tree.map(one, *layers)


def _dense(layers: DenseLayer, cfg: Config, dilation: int, x: jax.Array, mask: jax.Array) -> jax.Array:
    """A stacked dense block: [B, T, C] to [B, T, C + layers * growth], each layer's channels behind those before.

    One loop over layers as wide as the last one: channels that a layer does not read are still zero, and so are
    their weights.
    """
    count, width = layers.context1.kernel.shape[0], x.shape[-1]
    full = width + count * cfg.growth
    starts = width + cfg.growth * jnp.arange(count)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, full - width)))

    def step(x, layer_and_start):
        layer, start = layer_and_start
        y = layer(cfg, dilation, x[..., : full - cfg.growth], mask)
        return jax.lax.dynamic_update_slice_in_dim(x, y, start, axis=2), None

    return jax.lax.scan(step, x, (layers, starts))[0]


def _pool(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean and standard deviation (unbiased) over valid frames: [B, T, C] to [B, 2 * C]."""
    weight = mask[..., None].astype(jnp.float32)
    count = jnp.sum(weight, axis=1)
    mean = jnp.sum(x * weight, axis=1) / jnp.maximum(count, 1.0)
    squares = jnp.sum(jnp.square(x - mean[:, None]) * weight, axis=1)
    return jnp.concatenate([mean, jnp.sqrt(squares / jnp.maximum(count - 1.0, 1.0))], axis=-1)


def layer_groups(model: Encoder, cfg: Config, fbank: jax.Array, lengths: jax.Array) -> dict[str, jax.Array]:
    """What `embed` computes, group by group; under jit, what is not used costs nothing.

    Args:
        model: an encoder, `stacked` or not; cfg, fbank, lengths: as for `embed`.

    Returns:
        head [B, T, 10 * C], tdnn and, for b from 1, block{b} and transit{b} [B, T / 2, channels]; frames beyond
        a row's end hold no meaning; pooled [B, 2 * channels]; embedding [B, E]. All float32.
    """
    mask = nn.length_mask(lengths, fbank.shape[1])
    found = {"head": model.head(fbank.astype(jnp.float32), mask, cfg.dtype)}
    x = jax.nn.relu(model.tdnn_norm(model.tdnn(found["head"], cfg.dtype, stride=2)))
    found["tdnn"] = x
    mask = mask[:, ::2]
    if isinstance(model.blocks[0], nnx.List):
        model = stacked(model, jnp)
    each = zip(model.blocks, model.transit_norms, model.transits, cfg.dilations, strict=True)
    for b, (block, norm, transit, dilation) in enumerate(each, 1):
        x = _dense(block, cfg, dilation, x, mask)
        found[f"block{b}"] = x
        x = transit(jax.nn.relu(norm(x)), cfg.dtype)
        found[f"transit{b}"] = x
    found["pooled"] = _pool(jax.nn.relu(model.out_norm(x)), mask)
    found["embedding"] = model.dense_norm(model.dense(found["pooled"], cfg.dtype))
    return found


def embed(model: Encoder, cfg: Config, fbank: jax.Array, lengths: jax.Array) -> jax.Array:
    """Speaker embeddings; a row does not depend on its neighbours or its padding. Compare them by cosine.

    Args:
        model: encoder with loaded weights; `stacked` ones compile sooner.
        cfg: its config; static under jit.
        fbank: [B, T, 80] float32 of `audio.fbank(wav, lengths, **FBANK)`, 100 frames/s.
        lengths: [B] int32, valid frames of each row (`audio.fbank_frames`).

    Returns:
        [B, E] float32, not normalised.

    Raises:
        ValueError: if fbank does not have 80 bands.

    Source: CAM++ as released by 3D-Speaker; its deviation has no term under the root.
    """
    if fbank.ndim != 3 or fbank.shape[-1] != NUM_BANDS:
        raise ValueError(f"fbank has shape {fbank.shape}, expected [B, T, {NUM_BANDS}]; use audio.fbank")
    return layer_groups(model, cfg, fbank, lengths)["embedding"]
