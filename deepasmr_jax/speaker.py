"""Speech to a speaker embedding: the WeSpeaker ResNets over a Kaldi filter bank, with statistics pooling.

Source: r-vectors (Zeinali et al., 2019) as released by WeSpeaker (Wang et al., 2023). `mini()` is the same
code with 8 base channels, trained here with the additive angular margin loss (Deng et al., 2019).
Batch norm: the loss uses the statistics of the valid frames of the whole batch. `mean` and `var` of a norm
are read by `embed` alone, receive no gradient, and are set once after training by `calibrate`; until then
they are 0 and 1 and embeddings mean nothing. Keep leaves named mean, var and scale out of weight decay.
Batch: wav [B, W] float32 16 kHz, lengths [B] int32 samples, speaker_index [B] int32 (-1: unknown, no loss).
Letters: B rows, T frames (100 Hz), F frequency rows of the image, C channels, E embedding size.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from deepasmr_jax import audio, nn

NUM_BANDS = 80
POOLING_EPS = 1e-7


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape and loss of a speaker encoder; the defaults are WeSpeaker's ResNet34 without a training head."""

    base_channels: int = 32
    repeats: tuple[int, ...] = (3, 4, 6, 3)  # blocks of the four stages
    bottleneck: bool = False
    embedding_size: int = 256
    dtype: str = "float32"  # of the convolutions
    unroll: bool = True  # of equal blocks; in a loop, convolutions are 5 to 30 times slower on CPU
    # training only
    num_speakers: int = 0  # rows of the classification head; 0: no head
    margin: float = 0.2  # radians added to the angle of the right speaker
    scale: float = 32.0

    def __post_init__(self):
        nn.check_dtype(self.dtype)
        object.__setattr__(self, "repeats", tuple(self.repeats))  # a list after a round trip through JSON
        if len(self.repeats) != 4 or min(self.repeats) < 1:
            raise ValueError(
                f"repeats {self.repeats} must be four positive block counts, such as (3, 4, 6, 3)"
            )
        if not 0 <= self.margin < math.pi / 2:
            raise ValueError(f"margin {self.margin} rad is outside 0..pi/2; 0.2 is usual")

    @property
    def channels(self) -> tuple[int, ...]:
        """Inner channels of the four stages."""
        return tuple(self.base_channels * 2**i for i in range(4))

    @property
    def expansion(self) -> int:
        """Output channels of a block over its inner channels."""
        return 4 if self.bottleneck else 1


def resnet34() -> Config:
    """WeSpeaker ResNet34: 6.63 M parameters."""
    return Config()


def resnet221() -> Config:
    """WeSpeaker ResNet221: 23.79 M parameters."""
    return Config(repeats=(6, 16, 48, 3), bottleneck=True)


def resnet293() -> Config:
    """WeSpeaker ResNet293: 28.62 M parameters."""
    return Config(repeats=(10, 20, 64, 3), bottleneck=True)


def mini(num_speakers: int = 0) -> Config:
    """The built-in model's encoder: 0.46 M parameters, and 96 for each speaker of the training head."""
    return Config(base_channels=8, embedding_size=96, num_speakers=num_speakers)


# ---------------------------------------------------------------- modules


class Conv(nnx.Module):
    """Convolution without bias, kernel [k, k, in, out] over (frequency, time), zero padding k // 2."""

    def __init__(self, size: int, num_in: int, num_out: int, rngs: nnx.Rngs):
        normal = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        self.kernel = nnx.Param(normal(rngs.params(), (size, size, num_in, num_out), jnp.float32))

    def __call__(self, x: jax.Array, dtype: str, stride: int = 1) -> jax.Array:
        kernel = self.kernel[...].astype(dtype)
        pad = (kernel.shape[0] // 2,) * 2
        y = jax.lax.conv_general_dilated(
            x.astype(dtype), kernel, (stride, stride), (pad, pad), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y.astype(jnp.float32)


def _normalise(
    norm: nn.BatchNorm, x: jax.Array, mask: jax.Array, use_batch: bool
) -> tuple[jax.Array, nn.BatchNorm]:
    """Normalises [B, F, T, C]; also gives the norm with the statistics that were used: stored, or of this batch."""
    mean, var = (jax.lax.stop_gradient(v[...]) for v in (norm.mean, norm.var))
    if use_batch:
        weight = mask[:, None, :, None].astype(jnp.float32)
        count = jnp.maximum(jnp.sum(weight) * x.shape[1], 1.0)
        mean = jnp.sum(x * weight, axis=(0, 1, 2)) / count
        var = jnp.sum(jnp.square(x - mean) * weight, axis=(0, 1, 2)) / count
    used = jax.tree.map(lambda v: v, norm)  # a copy: the module itself is never changed
    used.mean, used.var = nnx.Param(mean), nnx.Param(var)
    return used(x), used


class Block(nnx.Module):
    """Residual block: two 3x3 convolutions, or 1x1, 3x3, 1x1; the first 3x3 carries the stride."""

    def __init__(self, cfg: Config, num_in: int, num_inner: int, stride: int, rngs: nnx.Rngs):
        num_out = num_inner * cfg.expansion
        sizes = (1, 3, 1) if cfg.bottleneck else (3, 3)
        widths = (num_in, *(num_inner for _ in sizes[1:]), num_out)
        for i, size in enumerate(sizes):
            setattr(self, f"conv{i + 1}", Conv(size, widths[i], widths[i + 1], rngs))
            setattr(self, f"bn{i + 1}", nn.BatchNorm(widths[i + 1]))
        self.has_shortcut = stride != 1 or num_in != num_out
        if self.has_shortcut:
            self.shortcut_conv = Conv(1, num_in, num_out, rngs)
            self.shortcut_bn = nn.BatchNorm(num_out)
        self.stride = stride

    def __call__(self, cfg: Config, x: jax.Array, mask: jax.Array, use_batch: bool):
        """[B, F, T, C] and mask [B, T] to image, mask, and the block with the statistics used."""
        used = jax.tree.map(lambda v: v, self)
        count = 3 if cfg.bottleneck else 2
        out_mask = mask[:, :: self.stride]  # equals ceil(length / stride) valid frames
        y, y_mask = x, mask
        for i in range(1, count + 1):
            strided = i == (2 if cfg.bottleneck else 1)
            y_mask = out_mask if strided else y_mask
            y = getattr(self, f"conv{i}")(y, cfg.dtype, self.stride if strided else 1)
            y, stats = _normalise(getattr(self, f"bn{i}"), y, y_mask, use_batch)
            setattr(used, f"bn{i}", stats)
            if i < count:
                y = nn.zero_padding(jax.nn.relu(y), y_mask)
        if self.has_shortcut:
            x = self.shortcut_conv(x, cfg.dtype, self.stride)
            x, used.shortcut_bn = _normalise(self.shortcut_bn, x, out_mask, use_batch)
        return nn.zero_padding(jax.nn.relu(x + y), out_mask), out_mask, used


class Stage(nnx.Module):
    """One block that may stride and widen, then `repeats - 1` equal blocks, stacked."""

    def __init__(self, cfg: Config, num_in: int, num_inner: int, repeats: int, stride: int, rngs: nnx.Rngs):
        self.first = Block(cfg, num_in, num_inner, stride, rngs)
        width = num_inner * cfg.expansion
        self.has_rest = repeats > 1
        if self.has_rest:
            keys = jax.random.split(rngs.params(), repeats - 1)
            self.rest = jax.vmap(lambda key: Block(cfg, width, num_inner, 1, nnx.Rngs(key)))(keys)

    def __call__(self, cfg: Config, x: jax.Array, mask: jax.Array, use_batch: bool):
        used = jax.tree.map(lambda v: v, self)
        x, mask, used.first = self.first(cfg, x, mask, use_batch)
        if self.has_rest:

            def body(x: jax.Array, block: Block) -> tuple[jax.Array, Block]:
                x, _, stats = block(cfg, x, mask, use_batch)
                return x, stats

            x, used.rest = jax.lax.scan(body, x, self.rest, unroll=cfg.unroll)
        return x, mask, used


class Encoder(nnx.Module):
    """Stem, four stages, pooled statistics, one linear map; `head` [num_speakers, E] only for training."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        self.conv1 = Conv(3, 1, cfg.channels[0], rngs)
        self.bn1 = nn.BatchNorm(cfg.channels[0])
        num_in = cfg.channels[0]
        for i, (num_inner, repeats) in enumerate(zip(cfg.channels, cfg.repeats, strict=True)):
            stage = Stage(cfg, num_in, num_inner, repeats, 1 if i == 0 else 2, rngs)
            setattr(self, f"layer{i + 1}", stage)
            num_in = num_inner * cfg.expansion
        self.seg_1 = nn.Linear(2 * num_in * NUM_BANDS // 8, cfg.embedding_size, rngs=rngs)
        normal = jax.nn.initializers.xavier_normal()
        shape = (cfg.num_speakers, cfg.embedding_size)
        self.head = nnx.Param(normal(rngs.params(), shape, jnp.float32)) if cfg.num_speakers else None

    def __call__(self, cfg: Config, fbank: jax.Array, lengths: jax.Array, use_batch: bool):
        """[B, T, 80] to [B, E], and the encoder with the batch-norm statistics that were used."""
        used = jax.tree.map(lambda v: v, self)
        mask = jnp.arange(fbank.shape[1])[None] < lengths[:, None]
        x = nn.zero_padding(jnp.swapaxes(fbank, 1, 2)[..., None], mask)
        x, used.bn1 = _normalise(self.bn1, self.conv1(x, cfg.dtype), mask, use_batch)
        x = nn.zero_padding(jax.nn.relu(x), mask)
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x, mask, stage = getattr(self, name)(cfg, x, mask, use_batch)
            setattr(used, name, stage)
        return self.seg_1(pool(x, mask), "float32"), used


def init(cfg: Config, key: jax.Array) -> Encoder:
    """An encoder with random weights; its head is None unless cfg.num_speakers is set."""
    return Encoder(cfg, nnx.Rngs(key))


def without_head(model: Encoder, cfg: Config) -> tuple[Encoder, Config]:
    """The encoder and its config as they are exported: the same network, no classification head."""
    cfg = dataclasses.replace(cfg, num_speakers=0)
    bare = jax.eval_shape(functools.partial(init, cfg), jax.random.key(0))
    for name in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "seg_1"):
        setattr(bare, name, getattr(model, name))
    return bare, cfg


# ---------------------------------------------------------------- functions


def pool(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean and standard deviation over the valid frames, channel by channel.

    Args:
        x: [B, F, T, C] float32.
        mask: [B, T] bool.

    Returns:
        [B, 2 * C * F] float32: all means, channel-major, then all deviations; sqrt(unbiased variance + 1e-7).
    """
    weight = mask[:, None, :, None].astype(jnp.float32)
    count = jnp.sum(weight, axis=2)
    mean = jnp.sum(x * weight, axis=2) / jnp.maximum(count, 1.0)
    var = jnp.sum(jnp.square(x - mean[:, :, None]) * weight, axis=2) / jnp.maximum(count - 1.0, 1.0)
    both = jnp.stack([mean, jnp.sqrt(var + POOLING_EPS)], axis=1)  # [B, 2, F, C]
    both = jnp.swapaxes(both, 2, 3)
    return both.reshape(x.shape[0], -1, out_sharding=jax.P(nn.axes_of(x)[0], None))


def embed(model: Encoder, cfg: Config, fbank: jax.Array, lengths: jax.Array) -> jax.Array:
    """Speaker embeddings; a row does not depend on its neighbours or its padding. Compare them by cosine.

    Args:
        model: encoder, calibrated or loaded.
        cfg: its config.
        fbank: [B, T, 80] float32 of `audio.fbank` (Hamming window, 16-bit scale, mean removed), 100 frames/s.
        lengths: [B] int32, valid frames of each row.

    Returns:
        [B, E] float32, not normalised.

    Raises:
        ValueError: if fbank does not have 80 bands.
    """
    if fbank.ndim != 3 or fbank.shape[-1] != NUM_BANDS:
        raise ValueError(f"fbank has shape {fbank.shape}, expected [B, T, {NUM_BANDS}]; use audio.fbank")
    return model(cfg, fbank.astype(jnp.float32), lengths, use_batch=False)[0]


def calibrate(model: Encoder, cfg: Config, batches) -> Encoder:
    """Sets the batch-norm statistics that `embed` uses, from data, after training and before export.

    Means are averaged over the batches; variances too, plus the variance of the means.

    Args:
        model: trained encoder.
        cfg: its config.
        batches: iterable of training batches with `wav` and `lengths`; 20 or more give steady statistics.

    Returns:
        The encoder with `mean` and `var` of every norm replaced, all else unchanged.

    Raises:
        ValueError: if there is no batch.
    """
    statistics = jax.jit(functools.partial(_statistics, cfg))
    total, count = None, 0
    for batch in batches:
        new = jax.block_until_ready(statistics(model, {k: batch[k] for k in ("wav", "lengths")}))
        total = new if total is None else jax.tree.map(jnp.add, total, new)
        count += 1
    if not count:
        raise ValueError("calibrate was given 0 batches; pass at least one batch of training data")
    return _with_statistics(model, jax.tree.map(lambda v: v / count, total))


def _leaf_name(path) -> str:
    """Last attribute name of a leaf's path: 'mean', 'kernel', ..."""
    names = [getattr(key, "name", getattr(key, "key", None)) for key in path]
    return [str(name) for name in names if name not in (None, "value")][-1]


def _statistics(cfg: Config, model: Encoder, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Path -> mean, or mean square in the place of var, of every norm on one batch."""
    fbank, lengths = _front_end(batch)
    _, used = model(cfg, fbank, lengths, use_batch=True)
    leaves = {jax.tree_util.keystr(path): (path, x) for path, x in jax.tree_util.tree_leaves_with_path(used)}
    found = {}
    for name, (path, x) in leaves.items():
        if _leaf_name(path) == "mean":
            found[name] = x
        elif _leaf_name(path) == "var":  # E[x^2] adds up over batches, a variance does not
            found[name] = x + jnp.square(leaves[name.replace("var", "mean")][1])
    return found


def _with_statistics(model: Encoder, found: dict[str, jax.Array]) -> Encoder:
    def one(path, x):
        name = jax.tree_util.keystr(path)
        if name not in found:
            return x
        is_var = _leaf_name(path) == "var"
        return found[name] - jnp.square(found[name.replace("var", "mean")]) if is_var else found[name]

    return jax.tree_util.tree_map_with_path(one, model)


def _front_end(batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return audio.fbank(batch["wav"], batch["lengths"]), audio.fbank_frames(batch["lengths"])


# ---------------------------------------------------------------- training


def loss(model: Encoder, cfg: Config, batch: dict[str, jax.Array], key: jax.Array | None):
    """Additive angular margin softmax over the training speakers.

    The right speaker's logit is scale * cos(angle + margin), the others' scale * cos(angle); past the angle
    pi - margin the right one is scale * (cos(angle) - margin * sin(margin)), so that it never rises again.

    Args:
        model: encoder with a head.
        cfg: its config.
        batch: see the file docstring.
        key: unused; the loss draws nothing.

    Returns:
        (sum, count, aux): nats summed over rows whose speaker is known, their number, and {"accuracy": (right
        rows, rows)}, judged without the margin.

    Raises:
        ValueError: if the model has no head.

    Source: ArcFace (Deng et al., 2019), section 3.1, with the monotonic tail of its public code.
    """
    if model.head is None:
        raise ValueError(
            "the speaker encoder has no classification head; build it with Config(num_speakers=...)"
        )
    fbank, lengths = _front_end(batch)
    embedding, _ = model(cfg, fbank, lengths, use_batch=True)
    cos = jnp.einsum("be,se->bs", _unit(embedding), _unit(model.head[...]))
    sin = jnp.sqrt(jnp.maximum(1.0 - jnp.square(cos), 1e-12))
    moved = cos * math.cos(cfg.margin) - sin * math.sin(cfg.margin)
    moved = jnp.where(cos > -math.cos(cfg.margin), moved, cos - cfg.margin * math.sin(cfg.margin))
    right = jax.nn.one_hot(batch["speaker_index"], cfg.num_speakers)
    log_probs = jax.nn.log_softmax(cfg.scale * jnp.where(right > 0, moved, cos))
    is_right = jnp.argmax(cos, axis=-1) == batch["speaker_index"]
    count = jnp.sum(batch["speaker_index"] >= 0, dtype=jnp.float32)
    return -jnp.sum(right * log_probs), count, {"accuracy": (jnp.sum(is_right, dtype=jnp.float32), count)}


def _unit(x: jax.Array) -> jax.Array:
    """Rows at length 1."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)
