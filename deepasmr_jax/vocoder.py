"""HiFi-GAN vocoder: generator V1, V2, V3, multi-period and multi-scale discriminators, losses, train step.

Source: HiFi-GAN (Kong et al., 2020) and its public configurations. Differences on purpose: weights are
plain arrays, that is, weight norm is folded and the first scale discriminator has no spectral norm; stored
gains and directions have to be folded by whoever reads public files. Channels last throughout.
Batch: wav [B, W] float32 in [-1, 1] at the profile's rate; the mel is computed inside the loss. lengths [B] int32:
0 of an empty row, which counts nowhere; may be left out.
Letters: B rows, T mel frames, M mel bins, W samples, C channels, P period.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec

from deepasmr_jax import audio, nn, vocoder_parts
from deepasmr_jax.vocoder_parts import Conv, Gan, Upsample, mean_of_rows, row_weights

SLOPE = 0.1  # of every leaky ReLU but the last of the generator
LAST_SLOPE = 0.01  # the public code leaves the library's default there
# the convolutions of a scale discriminator before its output; channels and groups are in Config
SCALE_KERNELS = (15, 41, 41, 41, 41, 41, 5)
SCALE_STRIDES = (1, 2, 2, 4, 4, 1, 1)
# in bfloat16 a CPU takes residual blocks from this many channels on in tiles of so many positions, as products
TILED_CHANNELS, TILE = 64, 2048


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of both players and weights of the losses; the defaults are V1."""

    mel_profile: str = "hifigan"
    initial_channels: int = 512
    upsample_rates: tuple[int, ...] = (8, 8, 2, 2)
    upsample_kernels: tuple[int, ...] = (16, 16, 4, 4)
    residual_kernels: tuple[int, ...] = (3, 7, 11)
    residual_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    is_paired: bool = True  # residual type 1: each dilated convolution is followed by one of dilation 1
    dtype: str = "float32"  # operands of the convolutions
    # discriminators and losses
    adversarial: bool = True
    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    period_channels: tuple[int, ...] = (32, 128, 512, 1024, 1024)
    num_scales: int = 3
    scale_channels: tuple[int, ...] = (128, 128, 256, 512, 1024, 1024, 1024)
    scale_groups: tuple[int, ...] = (1, 4, 16, 16, 16, 16, 1)
    mel_weight: float = 45.0
    feature_weight: float = 2.0

    def __post_init__(self):
        nn.check_dtype(self.dtype)
        hop = audio.mel_profile(self.mel_profile).hop_samples
        if math.prod(self.upsample_rates) != hop:
            raise ValueError(
                f"upsample_rates {self.upsample_rates} multiply to {math.prod(self.upsample_rates)}; "
                f"profile {self.mel_profile!r} needs {hop}"
            )
        if len(self.upsample_kernels) != len(self.upsample_rates):
            raise ValueError(
                f"{len(self.upsample_kernels)} upsample_kernels for {len(self.upsample_rates)} rates"
            )
        for rate, kernel in zip(self.upsample_rates, self.upsample_kernels, strict=True):
            if kernel < rate or (kernel - rate) % 2:
                raise ValueError(
                    f"upsample kernel {kernel} for rate {rate}: the difference must be even, not below 0"
                )
        if len(self.residual_dilations) != len(self.residual_kernels):
            raise ValueError(
                f"{len(self.residual_dilations)} dilation lists for kernels {self.residual_kernels}"
            )
        if self.initial_channels % 2 ** len(self.upsample_rates):
            raise ValueError(
                f"initial_channels {self.initial_channels} must halve {len(self.upsample_rates)} times; "
                f"use a multiple of {2 ** len(self.upsample_rates)}"
            )
        if not len(self.scale_channels) == len(self.scale_groups) == len(SCALE_KERNELS):
            raise ValueError(f"scale_channels and scale_groups must have {len(SCALE_KERNELS)} entries each")

    @property
    def mel(self) -> audio.MelConfig:
        """The mel recipe of the input."""
        return audio.mel_profile(self.mel_profile)


def v1() -> Config:
    """V1: 13,926,017 parameters."""
    return Config()


def v2() -> Config:
    """V2: V1 at a quarter of its channels, 925,985 parameters."""
    return Config(initial_channels=128)


def v3() -> Config:
    """V3: three stages and single residual convolutions, 1,462,273 parameters."""
    return Config(
        initial_channels=256,
        upsample_rates=(8, 8, 4),
        upsample_kernels=(16, 16, 8),
        residual_kernels=(3, 5, 7),
        residual_dilations=((1, 2), (2, 6), (3, 12)),
        is_paired=False,
    )


# ------------------------------------------------------------------------------------------------ generator


class ResidualBlock(nnx.Module):
    """Dilated convolutions, one after the other, each added to its input; convs2 only when paired."""

    def __init__(self, key: jax.Array, size: int, channels: int, num_dilations: int, is_paired: bool):
        keys = jax.random.split(key, 2 * num_dilations)
        self.convs1 = nnx.List([Conv(k, size, channels, channels) for k in keys[:num_dilations]])
        self.convs2 = (
            nnx.List([Conv(k, size, channels, channels) for k in keys[num_dilations:]]) if is_paired else None
        )

    def __call__(
        self, x: jax.Array, dtype: str, dilations: tuple[int, ...], ends: jax.Array | None
    ) -> jax.Array:
        """[B, W, C] to [B, W, C] float32; rows end at `ends` [B] (None: at W) and are zero from there on."""
        if dtype == "bfloat16" and x.shape[-1] >= TILED_CHANNELS:
            return _residual_low(self, x, ends, dilations)
        return _residual_whole(self, x, ends, dilations, dtype)


def _keep(x: jax.Array, ends: jax.Array | None) -> jax.Array:
    """`x` [B, W, C] with zeros beyond a row's end, as a convolution's padding is."""
    if ends is None:
        return x
    return jnp.where(nn.length_mask(ends, x.shape[1])[..., None], x, 0.0)


def _residual_whole(
    block: ResidualBlock, x: jax.Array, ends: jax.Array | None, dilations: tuple[int, ...], dtype: str
) -> jax.Array:
    """The block by convolutions over whole rows."""
    for i, dilation in enumerate(dilations):
        y = block.convs1[i](jax.nn.leaky_relu(x, SLOPE), dtype, dilation=dilation)
        if block.convs2 is not None:
            y = block.convs2[i](_keep(jax.nn.leaky_relu(y, SLOPE), ends), dtype)
        x = x + _keep(y, ends)
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _residual_low(
    block: ResidualBlock, x: jax.Array, ends: jax.Array | None, dilations: tuple[int, ...]
) -> jax.Array:
    """The block in bfloat16 by the form that is faster on the platform; for gradients by convolutions.

    XLA has no bfloat16 convolution on a CPU and would compute in float32.
    """
    tiled = functools.partial(_residual_tiled, dilations=dilations)
    whole = functools.partial(_residual_whole, dilations=dilations, dtype="bfloat16")
    return jax.lax.platform_dependent(block, x, ends, cpu=tiled, default=whole)


def _residual_forward(block, x, ends, dilations):
    """Result of `_residual_whole`, and its backward pass."""
    return jax.vjp(lambda block, x: _residual_whole(block, x, ends, dilations, "bfloat16"), block, x)


def _residual_backward(dilations, backward, gradient):
    """Gradients of the weights and the input; none of the ends."""
    return (*backward(gradient), None)


_residual_low.defvjp(_residual_forward, _residual_backward)


def _residual_tiled(
    block: ResidualBlock, x: jax.Array, ends: jax.Array | None, dilations: tuple[int, ...], tile: int = TILE
) -> jax.Array:
    """The same, one tile of a row after the other on each device, so that what lies between stays in the cache.

    A tile is read with the margin that all convolutions together need, and every one shortens it.
    """
    rows = nn.axes_of(x)[0]
    width, channels = x.shape[1:]
    pairs = [[c[i] for c in (block.convs1, block.convs2) if c is not None] for i in range(len(dilations))]
    low = [[(c.kernel[...].astype(jnp.bfloat16), c.bias[...]) for c in pair] for pair in pairs]
    half = low[0][0][0].shape[0] // 2
    steps = [(d, 1)[: len(pair)] for d, pair in zip(dilations, low, strict=True)]
    margin = half * sum(map(sum, steps))
    num_tiles = -(-width // tile)
    tile = -(-width // num_tiles)
    ends = jnp.full(x.shape[0], width) if ends is None else ends

    def local(x, ends, low):
        num_rows = x.shape[0]
        x = jnp.pad(x, ((0, 0), (margin, margin + num_tiles * tile - width), (0, 0)))

        def one(at):
            row, start = at
            y = jax.lax.dynamic_slice(x, (row, start, 0), (1, tile + 2 * margin, channels))[0]
            places = start - margin + jnp.arange(len(y))
            inside = ((places >= 0) & (places < ends[row])).astype(jnp.float32)[:, None]
            for pair, spread in zip(low, steps, strict=True):
                z = y
                for (kernel, bias), dilation in zip(pair, spread, strict=True):
                    z = jax.nn.leaky_relu(z, SLOPE).astype(kernel.dtype)
                    cut = half * dilation
                    inside = inside[cut : len(inside) - cut]
                    parts = vocoder_parts.conv_by_products(z, kernel, dilation)
                    places = inside[: len(parts[0])], inside[len(parts[0]) :]
                    z = jnp.concatenate([(p + bias) * i for p, i in zip(parts, places, strict=True)])
                cut = half * sum(spread)
                y = y[cut : len(y) - cut] + z
            return y

        order = jnp.arange(num_rows * num_tiles)
        y = jax.lax.map(one, (order // num_tiles, order % num_tiles * tile))
        return y.reshape(num_rows, num_tiles * tile, channels)[:, :width]

    if jax.sharding.get_abstract_mesh().empty:
        return local(x, ends, low)
    whole_rows = PartitionSpec(rows, None, None)
    specs = whole_rows, PartitionSpec(rows), PartitionSpec()
    ends = jax.sharding.reshard(ends, specs[1])
    return jax.shard_map(local, in_specs=specs, out_specs=whole_rows)(
        jax.sharding.reshard(x, whole_rows), ends, low
    )


class Generator(nnx.Module):
    """first, ups (one per rate), blocks (rates x residual kernels, stage by stage), last."""

    def __init__(self, cfg: Config, key: jax.Array):
        num_stages, num_kernels = len(cfg.upsample_rates), len(cfg.residual_kernels)
        keys = iter(jax.random.split(key, 2 + num_stages * (1 + num_kernels)))
        channels = cfg.initial_channels
        self.first = Conv(next(keys), 7, cfg.mel.num_mels, channels)
        ups, blocks = [], []
        for kernel in cfg.upsample_kernels:
            ups.append(Upsample(next(keys), kernel, channels, channels // 2))
            channels //= 2
            for size, dilations in zip(cfg.residual_kernels, cfg.residual_dilations, strict=True):
                blocks.append(ResidualBlock(next(keys), size, channels, len(dilations), cfg.is_paired))
        self.ups, self.blocks = nnx.List(ups), nnx.List(blocks)
        self.last = Conv(next(keys), 7, channels, 1)


def apply(model: Generator, cfg: Config, mel: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
    """Waveform of a log-mel spectrogram.

    Args:
        model: the generator (`Gan.generator`).
        cfg: its config; static under jit.
        mel: [B, T, M] float, of the recipe cfg.mel_profile.
        lengths: [B] int, valid frames of each row; None: all T.

    Returns:
        [B, T * hop] float32 in [-1, 1]. With `lengths` a row is zero from its lengths * hop samples on, and
        the samples before are those of a single run: they depend neither on T nor on other rows.

    Raises:
        ValueError: if `mel` does not have the recipe's number of bins.
    """
    if mel.ndim != 3 or mel.shape[-1] != cfg.mel.num_mels:
        raise ValueError(
            f"mel has shape {mel.shape}; profile {cfg.mel_profile!r} needs [B, T, {cfg.mel.num_mels}]"
        )
    num_frames = mel.shape[1]

    def ends(width: int) -> jax.Array | None:
        return None if lengths is None else jnp.asarray(lengths) * (width // num_frames)

    x = _keep(mel.astype(jnp.float32), ends(num_frames))
    x = _keep(model.first(x, cfg.dtype), ends(num_frames))
    num_kernels = len(cfg.residual_kernels)
    for i, rate in enumerate(cfg.upsample_rates):
        x = model.ups[i](jax.nn.leaky_relu(x, SLOPE), cfg.dtype, rate)
        end = ends(x.shape[1])
        x = _keep(x, end)
        stage = model.blocks[i * num_kernels : (i + 1) * num_kernels]
        outputs = [b(x, cfg.dtype, d, end) for b, d in zip(stage, cfg.residual_dilations, strict=True)]
        x = sum(outputs) / num_kernels
    x = model.last(jax.nn.leaky_relu(x, LAST_SLOPE), cfg.dtype)
    return jnp.tanh(_keep(x, ends(x.shape[1])))[..., 0]


# ------------------------------------------------------------------------------------------- discriminators


class PeriodDiscriminator(nnx.Module):
    """Convolutions (kernel 5, stride 3, the last stride 1) along samples one period apart, and an output."""

    def __init__(self, cfg: Config, key: jax.Array):
        keys = jax.random.split(key, len(cfg.period_channels) + 1)
        sizes = (1, *cfg.period_channels)
        pairs = zip(keys[:-1], sizes[:-1], cfg.period_channels, strict=True)
        self.convs = nnx.List([Conv(k, 5, i, o) for k, i, o in pairs])
        self.last = Conv(keys[-1], 3, sizes[-1], 1)

    def __call__(self, wav: jax.Array, period: int, dtype: str) -> list[jax.Array]:
        """[B, W] to the outputs of all layers [B, W / P / stride, P, C]; the last is the score."""
        x = jnp.pad(wav, ((0, 0), (0, -wav.shape[1] % period)), mode="reflect")
        x = x.reshape(x.shape[0], -1, period, 1)
        outputs = []
        for i, conv in enumerate(self.convs):
            x = jax.nn.leaky_relu(conv(x, dtype, stride=3 if i < len(self.convs) - 1 else 1), SLOPE)
            outputs.append(x)
        return [*outputs, self.last(x, dtype)]


class ScaleDiscriminator(nnx.Module):
    """Strided, grouped convolutions over samples, and an output."""

    def __init__(self, cfg: Config, key: jax.Array):
        keys = jax.random.split(key, len(SCALE_KERNELS) + 1)
        sizes = (1, *cfg.scale_channels)
        rows = zip(keys[:-1], SCALE_KERNELS, sizes[:-1], cfg.scale_channels, cfg.scale_groups, strict=True)
        self.convs = nnx.List([Conv(*row) for row in rows])
        self.last = Conv(keys[-1], 3, sizes[-1], 1)

    def __call__(self, wav: jax.Array, dtype: str) -> list[jax.Array]:
        """[B, W] to the outputs of all layers [B, W / stride, C]; the last is the score."""
        x, outputs = wav[..., None], []
        for conv, stride in zip(self.convs, SCALE_STRIDES, strict=True):
            x = jax.nn.leaky_relu(conv(x, dtype, stride=stride), SLOPE)
            outputs.append(x)
        return [*outputs, self.last(x, dtype)]


def halve(wav: jax.Array) -> jax.Array:
    """[B, W] to [B, W // 2 + 1]: means of four samples every two; the two zeros at each end are counted."""
    num = wav.shape[1] // 2 + 1
    x = jnp.pad(wav, ((0, 0), (2, 3)))
    return sum(x[:, i : i + 2 * num - 1 : 2] for i in range(4)) / 4.0


class Discriminators(nnx.Module):
    """by_period and by_scale: 41,092,165 and 29,610,627 parameters at full size.

    The public files hold 13,605 and 8,194 more: the gains of weight norm.
    """

    def __init__(self, cfg: Config, key: jax.Array):
        keys = jax.random.split(key, len(cfg.periods) + cfg.num_scales)
        self.by_period = nnx.List([PeriodDiscriminator(cfg, k) for k in keys[: len(cfg.periods)]])
        self.by_scale = nnx.List([ScaleDiscriminator(cfg, k) for k in keys[len(cfg.periods) :]])

    def __call__(self, cfg: Config, wav: jax.Array) -> list[list[jax.Array]]:
        """[B, W] to one list of layer outputs per discriminator, periods first."""
        outputs = [d(wav, p, cfg.dtype) for d, p in zip(self.by_period, cfg.periods, strict=True)]
        for discriminator in self.by_scale:
            outputs.append(discriminator(wav, cfg.dtype))
            wav = halve(wav)
        return outputs


def init(cfg: Config, key: jax.Array) -> Gan:
    """New weights for training."""
    generator_key, discriminator_key = jax.random.split(key)
    discriminators = Discriminators(cfg, discriminator_key) if cfg.adversarial else None
    return Gan(Generator(cfg, generator_key), discriminators)


def init_generator(cfg: Config, key: jax.Array) -> Generator:
    """New weights of the generator alone: what is exported and what `apply` takes."""
    return Generator(cfg, key)


# --------------------------------------------------------------------------------------------------- losses


def _inputs(cfg: Config, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """wav [B, W'] cut to whole frames, and its mel [B, T, M]."""
    hop = cfg.mel.hop_samples
    wav = batch["wav"][:, : batch["wav"].shape[1] // hop * hop]
    if wav.shape[1] < cfg.mel.n_fft:
        raise ValueError(
            f"training crop of {wav.shape[1]} samples; give at least {cfg.mel.n_fft}, one mel window"
        )
    return wav, jax.lax.stop_gradient(audio.log_mel(wav, None, cfg.mel))


def _mel_loss(cfg: Config, real: jax.Array, fake: jax.Array) -> jax.Array:
    """Mean absolute difference of the log-mels up to Nyquist of waveforms [B, W]: [B]."""
    recipe = cfg.mel.full_band()
    return jnp.mean(jnp.abs(audio.log_mel(real, None, recipe) - audio.log_mel(fake, None, recipe)), (1, 2))


def loss(model: Gan, cfg: Config, batch: dict[str, jax.Array], key: jax.Array | None = None):
    """Mel loss of the copy synthesis of a batch; the adversarial terms are only in `train_step`.

    Args:
        model: `init(cfg, key)`.
        cfg: its config.
        batch: see the file docstring.
        key: not used.

    Returns:
        (sum over rows, number of rows, aux) with aux "loss" (cfg.mel_weight times the mel loss) and "mel"
        (mean absolute difference of natural-log mel up to Nyquist), each (sum, count).

    Raises:
        ValueError: if W is shorter than one mel window.
    """
    wav, mel = _inputs(cfg, batch)
    weights = row_weights(batch)
    distance = jnp.sum(_mel_loss(cfg, wav, apply(model.generator, cfg, mel)[:, : wav.shape[1]]) * weights)
    count = jnp.sum(weights)
    total = cfg.mel_weight * distance
    return total, count, {"loss": (total, count), "mel": (distance, count)}


def discriminator_loss(
    real: list[list[jax.Array]], fake: list[list[jax.Array]], weights: jax.Array
) -> jax.Array:
    """Least squares, real to 1 and fake to 0: sum over discriminators of means; weights of rows [B]; scalar."""
    return sum(
        mean_of_rows((r[-1] - 1.0) ** 2 + f[-1] ** 2, weights) for r, f in zip(real, fake, strict=True)
    )


def adversarial_loss(fake: list[list[jax.Array]], weights: jax.Array) -> jax.Array:
    """Least squares, fake to 1: sum over discriminators of means; weights of rows [B]; scalar."""
    return sum(mean_of_rows((f[-1] - 1.0) ** 2, weights) for f in fake)


def feature_loss(real: list[list[jax.Array]], fake: list[list[jax.Array]], weights: jax.Array) -> jax.Array:
    """Sum over discriminators and layers (the score included) of mean absolute differences; scalar."""
    pairs = ((x, y) for r, f in zip(real, fake, strict=True) for x, y in zip(r, f, strict=True))
    return sum(mean_of_rows(jnp.abs(x - y), weights) for x, y in pairs)


init_opt = vocoder_parts.init_opt  # where train.py looks for it


def train_step(
    model: Gan,
    opt_state: dict,
    tx: optax.GradientTransformation,
    cfg: Config,
    batch: dict[str, jax.Array],
    key: jax.Array | None,
    step: jax.Array,
):
    """One update: discriminators first, then the generator against the new discriminators.

    Args:
        model, opt_state: `init` and `init_opt`, or the results of the step before.
        tx: optimizer of each player (HiFi-GAN: AdamW 2e-4, betas 0.8 and 0.99).
        cfg: static under jit.
        batch: see the file docstring (HiFi-GAN: 16 rows of 8192 samples).
        key, step: not used.

    Returns:
        (model, opt_state, aux): aux as in `loss`, and "adversarial", "feature", "discriminator" if
        cfg.adversarial, each (sum, count); "generator_grad_norm" and "discriminators_grad_norm" (norm, 1), before
        clipping.
    """
    wav, mel = _inputs(cfg, batch)
    weights = row_weights(batch)
    count = jnp.sum(weights)
    discriminators, state = model.discriminators, opt_state["discriminators"]

    def synthesize(generator):
        return apply(generator, cfg, mel)[:, : wav.shape[1]]

    def update(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    # the waveform is made once; both players read it, and the generator's gradient is pulled back from it
    fake, pull_back = jax.vjp(synthesize, model.generator)
    terms, norms = {}, {}
    if cfg.adversarial:

        def judge(d):
            return discriminator_loss(d(cfg, wav), d(cfg, fake), weights)

        terms["discriminator"], grads = jax.value_and_grad(judge)(discriminators)
        norms["discriminators_grad_norm"] = (optax.tree.norm(grads), jnp.float32(1.0))
        discriminators, state = update(grads, state, discriminators)
        real = discriminators(cfg, wav)

    def total(fake):
        parts = {"mel": mean_of_rows(_mel_loss(cfg, wav, fake), weights)}
        mean = cfg.mel_weight * parts["mel"]
        if cfg.adversarial:
            judged = discriminators(cfg, fake)
            parts["adversarial"] = adversarial_loss(judged, weights)
            parts["feature"] = feature_loss(real, judged, weights)
            mean = mean + parts["adversarial"] + cfg.feature_weight * parts["feature"]
        return mean, parts | {"loss": mean}

    grad, parts = jax.grad(total, has_aux=True)(fake)
    (grads,) = pull_back(grad)
    norms["generator_grad_norm"] = (optax.tree.norm(grads), jnp.float32(1.0))
    generator, generator_state = update(grads, opt_state["generator"], model.generator)
    aux = norms | {name: (value * count, count) for name, value in (terms | parts).items()}
    return Gan(generator, discriminators), {"generator": generator_state, "discriminators": state}, aux
