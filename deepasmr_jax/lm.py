"""Speech language model: text ids and a speech prompt in, 25 Hz speech tokens out.

A Qwen2.5-style decoder (RMS norm, grouped-query attention with q/k/v bias, rotary positions, SwiGLU) with the
backbone's text table, a speech table and a speech head, in the sequence layout of CosyVoice2:
`[sos] text_1..text_m [task] s_1..s_n [end]`, targets on speech and end only.
Sources: Qwen2.5 (Yang et al., 2024); CosyVoice 2 (Du et al., 2024), sections 2.3 and 2.4; the layout, the ids
and repetition-aware sampling match the public CosyVoice2 release.

Letters: B rows, N positions, S cache length, H query heads, K key/value heads, E head size, D width,
F MLP width, V speech rows (codes and special ids), L layers.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from deepasmr_jax import audio, nn, programs, sharding
from deepasmr_jax.sharding import spec

# queries per part of the training attention; on CPU 512 positions take 0.6 of the time of one part
CAUSAL_CHUNK = 128
FEW_ROWS = 32  # float32 rows up to which a CPU has the weights on the left: faster at 1 to 32, slower at 150

NUM_ALIGNED = 2  # heads that `alignment_loss` teaches, one for each half of the token to come

# kinds of a position in a packed row
PAD, SOS, TEXT, TASK, SPEECH = range(5)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and training choices of the speech language model.

    Ids of the speech table: 0..num_codes-1 codes, then `num_special` others, of which `end_id` alone is a target
    here. CosyVoice2 has three; CosyVoice3 has 200 and ends at the second.

    Raises:
        ValueError: on sizes that do not fit together.
    """

    text_vocab: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    num_codes: int = audio.NUM_CODES
    num_special: int = 3  # rows of the speech table and of the head after the codes; each stops a row
    end_offset: int = 0  # which of them is `end_id`
    rope_base: float = 1e6
    norm_eps: float = 1e-6
    init_std: float = 0.02
    dtype: str = "float32"  # operands of matrix products: float32 or bfloat16
    activation_dtype: str = "float32"  # of what training keeps between them in the layers: likewise
    remat: str = "full"  # what the backward pass keeps of a layer: none (all), dots, full (see nn.REMAT)
    z_loss: float = 0.0  # weight of logsumexp(logits)^2
    alignment_weight: float = 0.0  # of the supervised attention in `alignment_loss`; 0: none, needs no labels
    alignment_layers: tuple[int, ...] = ()  # layers whose first two heads it teaches
    label_smoothing: float = 0.0

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_kv_heads} key/value heads do not divide {self.num_heads} query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions need an even one")
        if not 0 <= self.end_offset < self.num_special:
            raise ValueError(f"end_offset {self.end_offset} is outside 0..{self.num_special - 1}")
        nn.check_dtype(self.dtype)
        nn.check_dtype(self.activation_dtype, "activation_dtype")
        if self.remat not in nn.REMAT:
            raise ValueError(f"remat {self.remat!r} is unknown; use one of {', '.join(nn.REMAT)}")
        if self.alignment_weight and not (
            self.alignment_layers
            and all(0 <= i < self.num_layers for i in self.alignment_layers)
            and self.num_heads >= NUM_ALIGNED
        ):
            raise ValueError(
                f"alignment_weight {self.alignment_weight} needs alignment_layers in 0..{self.num_layers - 1} "
                f"and {NUM_ALIGNED} heads, found {self.alignment_layers} and {self.num_heads}"
            )
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing {self.label_smoothing} is outside [0, 1)")

    @property
    def num_speech_rows(self) -> int:
        """Rows of the speech table and of the head: codes, then end, reserved and filler ids of the public models."""
        return self.num_codes + self.num_special

    @property
    def end_id(self) -> int:
        """Id that ends the speech (6561 for 6561 codes)."""
        return self.num_codes + self.end_offset


def qwen2_0p5b(**changes) -> Config:
    """Speech model on the Qwen2.5-0.5B backbone (494,032,768 parameters without the speech parts)."""
    sizes = dict(text_vocab=151936, width=896, num_layers=24, num_heads=14, num_kv_heads=2, head_dim=64)
    return Config(**(sizes | dict(mlp_width=4864, dtype="bfloat16") | changes))


def cosyvoice2(**changes) -> Config:
    """The language model of CosyVoice2-0.5B: the same backbone, 6561 codes; 505,803,812 parameters."""
    return qwen2_0p5b(**(dict(num_codes=audio.NUM_CODES) | changes))


def cosyvoice3(**changes) -> Config:
    """The language model of CosyVoice3: 200 special ids, end 6562; 506,157,033 parameters.

    The file has 8553 fewer: its head has no bias, and its two markers are rows of the speech table
    (`public_cosyvoice2.lm_cosyvoice3_tensors`).
    """
    return qwen2_0p5b(**(dict(num_codes=audio.NUM_CODES, num_special=200, end_offset=1) | changes))


def mini(text_vocab: int, **changes) -> Config:
    """The built-in model: 4.7 M parameters in the layers, 8.1 M with the speech table and head."""
    sizes = dict(width=256, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=64, mlp_width=768)
    training = dict(remat="none", alignment_layers=(2, 3))
    return Config(**(dict(text_vocab=text_vocab, rope_base=1e4) | sizes | training | changes))


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a speech token is drawn; the defaults are those of CosyVoice2.

    Raises:
        ValueError: on a value outside its range.
    """

    top_p: float = 0.8  # tokens are kept while the mass before them is below this
    top_k: int = 25  # and at most this many
    window: int = 10  # generated tokens looked back on for repetitions
    tau: float = 0.1  # share of the window at which a token counts as repeated
    temperature: float = 1.0
    greedy: bool = False  # each draw takes the most probable token instead
    min_ratio: float = 2.0  # least speech tokens per target text token
    max_ratio: float = 20.0  # most speech tokens per target text token
    repetition_aware: bool = True  # redraw a repeated token; usually switched off together with greedy

    def __post_init__(self):
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p {self.top_p} is outside (0, 1]")
        if self.top_k < 1 or self.window < 1:
            raise ValueError(f"top_k {self.top_k} and window {self.window} must be at least 1")
        if self.tau <= 0.0 or self.temperature <= 0.0:
            raise ValueError(f"tau {self.tau} and temperature {self.temperature} must be above 0")
        if not 0.0 <= self.min_ratio <= self.max_ratio:
            raise ValueError(
                f"min_ratio {self.min_ratio} and max_ratio {self.max_ratio}: need 0 <= min <= max"
            )

    @property
    def repeat_limit(self) -> int:
        """Least number of occurrences in the window at which a token is redrawn."""
        return math.ceil(self.window * self.tau - 1e-6)  # 10 * 0.7 is above 7 in floating point

    def limits(self, num_text_tokens: int) -> tuple[int, int]:
        """(least, most) number of speech tokens for a target text of this many tokens."""
        return math.floor(self.min_ratio * num_text_tokens), math.floor(self.max_ratio * num_text_tokens)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["keys", "values"], meta_fields=[])
@dataclasses.dataclass
class Cache:
    """Keys (after rotary) and values of positions, of those before the new tokens or of the new ones.

    The two are kept apart, so that what came before is only read, and a new token of every row goes into one column,
    whatever the length of what came before it: with a place of its own for each row, XLA writes row after row on a TPU.

    keys, values: one [B, K, E, S] float32 array per layer. Separate arrays, because a slice of one stacked
    array would be copied at every token; positions last, because XLA's CPU products want them there and would
    copy the whole cache into that order at every token.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]

    @property
    def size(self) -> int:
        """S, the positions that there is room for."""
        return self.keys[0].shape[3]

    def of_layer(self, index: int) -> tuple[jax.Array, jax.Array]:
        """Keys and values of one layer, [B, K, E, S] each."""
        return self.keys[index], self.values[index]


def filled(kept: Cache) -> Cache:
    """The cache, [B, K, E, N], of keys and values as `layers` gives them for whole rows, [B, N, K, E]."""
    return jax.tree.map(lambda x: jnp.transpose(x, (0, 2, 3, 1)), kept)


def empty(past: Cache, size: int) -> Cache:
    """A cache of zeros, [B, K, E, size], for new tokens after the positions of `past`."""

    def one(x: jax.Array) -> jax.Array:
        return jnp.zeros((*x.shape[:3], size), x.dtype, out_sharding=PartitionSpec(*nn.axes_of(x)))

    return jax.tree.map(one, past)


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions; q, k, v have biases, o has none."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        options = dict(rngs=rngs, init=jax.nn.initializers.normal(cfg.init_std))
        inner, kv_inner = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        self.q = nn.Linear(cfg.width, inner, ("embed", "heads"), **options)
        self.k = nn.Linear(cfg.width, kv_inner, ("embed", "kv_heads"), **options)
        self.v = nn.Linear(cfg.width, kv_inner, ("embed", "kv_heads"), **options)
        self.o = nn.Linear(inner, cfg.width, ("heads", "embed"), use_bias=False, **options)

    def __call__(self, x, positions, mask, cfg: Config, segments=None) -> jax.Array:
        """[B, N, D], positions [B, N], mask [B, N, N] (True = allowed), segments [B, N] or None -> [B, N, D]."""
        types = cfg.dtype, cfg.activation_dtype
        q, k, v = (f(x, *types) for f in (self.q, self.k, self.v))
        q = nn.rotary(nn.split_heads(q, cfg.num_heads), positions, cfg.rope_base)
        k = nn.rotary(nn.split_heads(k, cfg.num_kv_heads, "kv_heads"), positions, cfg.rope_base)
        v = nn.split_heads(v, cfg.num_kv_heads, "kv_heads")
        y = nn.attention(q, k, v, mask, dtype=cfg.dtype, causal_chunk=CAUSAL_CHUNK, segments=segments)
        return self.o(nn.merge_heads(y), *types)


class Block(nnx.Module):
    """One decoder layer: attention and gated MLP, each after an RMS norm and added to its input.

    `x` and the result are of type cfg.activation_dtype.
    """

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(cfg.init_std)
        self.attn_norm = nn.RMSNorm(cfg.width, eps=cfg.norm_eps)
        self.attn = Attention(cfg, rngs=rngs)
        self.mlp_norm = nn.RMSNorm(cfg.width, eps=cfg.norm_eps)
        self.mlp = nn.SwiGLU(cfg.width, cfg.mlp_width, rngs=rngs, init=init)

    def __call__(self, x, positions, mask, cfg: Config, segments=None) -> jax.Array:
        """[B, N, D], positions [B, N], mask [B, N, N], segments [B, N] or None -> [B, N, D]."""
        result = cfg.activation_dtype
        x = x + self.attn(self.attn_norm(x).astype(result), positions, mask, cfg, segments)
        return x + self.mlp(self.mlp_norm(x).astype(result), cfg.dtype, result)


class SpeechLM(nnx.Module):
    """Tables, stacked layers (first axis L), final norm and speech head.

    text_table [text_vocab, D], marker_table [2, D] (start, task), speech_table [V, D]: float32.
    """

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(cfg.init_std)

        def table(rows: int) -> nnx.Param:
            shape = (rows, cfg.width)
            return nnx.Param(init(rngs.params(), shape, jnp.float32, out_sharding=spec(None, "embed")))

        self.text_table = table(cfg.text_vocab)
        self.marker_table = table(2)
        self.speech_table = table(cfg.num_speech_rows)
        self.layers = jax.vmap(lambda r: Block(cfg, rngs=r))(rngs.split(cfg.num_layers))
        self.norm = nn.RMSNorm(cfg.width, eps=cfg.norm_eps)
        # rows are whole on every chip: codes + 3 has few divisors and the head is 1 % of the true-size model
        self.head = nn.Linear(cfg.width, cfg.num_speech_rows, ("embed", None), rngs=rngs, init=init)


def init(cfg: Config, key: jax.Array) -> SpeechLM:
    """Random model, split over the current mesh.

    Raises:
        ValueError: if the mesh does not divide the heads, the width or the MLP.
    """
    sharding.check_fits(
        ("key/value heads", cfg.num_kv_heads, "model"),
        ("MLP width", cfg.mlp_width, "model"),
        ("width", cfg.width, "data"),
    )
    return SpeechLM(cfg, rngs=nnx.Rngs(params=key))


def embed(model: "SpeechLM | DecodeWeights", tokens: jax.Array, kinds: jax.Array) -> jax.Array:
    """Input vectors of a sequence that mixes markers, text and speech.

    Args:
        model: the module or its decode weights.
        tokens: [B, N] int32, text id or speech id by kind; ignored for markers and padding.
        kinds: [B, N] int32, one of PAD, SOS, TEXT, TASK, SPEECH; padding gives zeros.

    Returns:
        [B, N, D] float32.
    """
    x = jnp.zeros((), jnp.float32)
    for table, ids, is_kind in (
        (model.text_table, tokens, kinds == TEXT),
        (model.speech_table, tokens, kinds == SPEECH),
        (model.marker_table, (kinds == TASK).astype(jnp.int32), (kinds == SOS) | (kinds == TASK)),
    ):
        x = jnp.where(is_kind[..., None], _rows(table[...], ids), x)
    return x


def _rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows `ids` [B, N] of a table [V, D], split like `ids`: [B, N, D] float32.

    Of a table whose width is split over `data`, a chip looks up its columns for the ids of all chips that share the
    table, and they exchange the columns they found. To gather the table, and to sum up its gradient, moved the
    1.6 GB of a text table at every step; left to itself XLA replicates the activations.
    """
    split, batch = nn.axes_of(table)[1], nn.axes_of(ids)
    if split != "data" or "data" not in (batch[0] or ()):
        table = jax.sharding.reshard(table, PartitionSpec(None, None))
        return table.at[ids].get(mode="clip", out_sharding=PartitionSpec(*batch, None))

    def local(table, ids):
        found = table.at[jax.lax.all_gather(ids, "data", axis=0, tiled=True)].get(mode="clip")
        return jax.lax.all_to_all(found, "data", split_axis=0, concat_axis=2, tiled=True)

    rows, out = PartitionSpec(batch[0], None), PartitionSpec(batch[0], None, None)
    look_up = jax.shard_map(local, in_specs=(PartitionSpec(None, "data"), rows), out_specs=out)
    return look_up(table, jax.sharding.reshard(ids, rows))


def hidden(model: SpeechLM, cfg: Config, batch: dict[str, jax.Array]) -> jax.Array:
    """Final hidden states of packed rows; segments of a row do not see each other.

    Args:
        model: the module.
        cfg: its settings.
        batch: `tokens`, `kinds`, `segment_ids`, `positions`, each [B, N] int32 (see `loss`).

    Returns:
        [B, N, D] float32, after the final norm.
    """
    return _run(model, cfg, batch, keep=False)[0]


def _run(
    model: SpeechLM, cfg: Config, batch: dict[str, jax.Array], keep: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Final hidden states [B, N, D] and, if `keep`, the input of every layer [L, B, N, D]."""
    positions, mask = batch["positions"], _mask(batch)

    def body(x, layer):
        return layer(x, positions, mask, cfg, batch["segment_ids"]), x if keep else None

    if cfg.remat != "none":
        body = jax.checkpoint(body, policy=nn.REMAT[cfg.remat])
    x = embed(model, batch["tokens"], batch["kinds"]).astype(cfg.activation_dtype)
    x, inputs = jax.lax.scan(body, x, model.layers)
    return model.norm(x), inputs


def _mask(batch: dict[str, jax.Array]) -> jax.Array:
    """[B, N, N], True where a position sees another one: earlier or the same, of its own segment."""
    positions, segments = batch["positions"], batch["segment_ids"]
    return (segments[:, :, None] == segments[:, None, :]) & (positions[:, :, None] >= positions[:, None, :])


def forward_flops(cfg: Config, num_rows: int, num_tokens: int) -> float:
    """FLOPs of the products of one forward pass over full rows of `num_tokens` positions, head included.

    Of attention the causal half counts, whatever is computed: scores that the mask forbids are not needed.
    """
    heads = cfg.num_heads * cfg.head_dim
    layer = cfg.width * (2 * heads + 2 * cfg.num_kv_heads * cfg.head_dim + 3 * cfg.mlp_width)
    each = cfg.num_layers * layer + cfg.width * cfg.num_speech_rows
    pairs = num_tokens * (num_tokens + 1) / 2
    return 2.0 * num_rows * (num_tokens * each + cfg.num_layers * 2 * heads * pairs)


def logits(model: SpeechLM, cfg: Config, batch: dict[str, jax.Array]) -> jax.Array:
    """Speech logits [B, N, V] float32 of packed rows; arguments as in `hidden`."""
    return model.head(hidden(model, cfg, batch), cfg.dtype)


def loss(
    model: SpeechLM, cfg: Config, batch: dict[str, jax.Array], key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """Cross-entropy of speech and end tokens, summed.

    Args:
        model: the module.
        cfg: its settings.
        batch: each [B, N] int32: `tokens` (text or speech id), `kinds` (0 padding, 1 start, 2 text, 3 task,
            4 speech), `segment_ids` (0 padding), `positions` (from 0 in each segment), `targets` (speech id
            or end id; -1 ignored). Position i predicts `targets[i]`, which is the token at i + 1. With
            cfg.alignment_weight also `aligned` [B, N, 2], see `alignment_loss`.
        key: not used; the loss is deterministic.

    Returns:
        (sum in nats, count of targets, aux); aux holds (sum, count) of `nll_nats` (without smoothing and
        z-loss), `accuracy` (most probable token is the target) and `end_nll_nats` (end targets only); with
        cfg.alignment_weight also those of `alignment_loss`, whose sum is added with that weight.
    """
    del key
    targets = batch["targets"]
    states, inputs = _run(model, cfg, batch, keep=bool(cfg.alignment_weight))
    scores = model.head(states, cfg.dtype)
    valid = (targets >= 0).astype(jnp.float32)
    is_end = (targets == cfg.end_id).astype(jnp.float32)
    log_total = jax.nn.logsumexp(scores, axis=-1)
    target_scores = _pick(scores, targets)
    nll = log_total - target_scores
    total = nll
    if cfg.label_smoothing:
        uniform = log_total - jnp.mean(scores, axis=-1)
        total = (1.0 - cfg.label_smoothing) * nll + cfg.label_smoothing * uniform
    if cfg.z_loss:
        total = total + cfg.z_loss * jnp.square(log_total)
    # no argmax: on CPU it costs more than the logsumexp
    is_right = (target_scores >= jnp.max(scores, axis=-1)).astype(jnp.float32)
    count = jnp.sum(valid)
    aux = {
        "nll_nats": (jnp.sum(nll * valid), count),
        "accuracy": (jnp.sum(is_right * valid), count),
        "end_nll_nats": (jnp.sum(nll * is_end), jnp.sum(is_end)),
    }
    total = jnp.sum(total * valid)
    if cfg.alignment_weight:
        alignment, more = alignment_loss(model, cfg, batch, inputs)
        total, aux = total + cfg.alignment_weight * alignment, aux | more
    return total, count, aux


def alignment_loss(
    model: SpeechLM, cfg: Config, batch: dict[str, jax.Array], inputs: jax.Array
) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """Cross-entropy of where two heads look: at the text symbol that is heard in the token to come.

    A small model that sees each sentence a few times does not find the way from speech back to its text by
    itself; recordings whose phones are known in time can show it (for sources without such labels, leave the
    weight at 0). Only training is concerned: the network is the same.

    Args:
        model: the module.
        cfg: its settings; the layers `alignment_layers`, heads 0 and 1.
        batch: as in `loss`, and `aligned` [B, N, 2] int32: for a position that predicts a speech token, the
            row positions of the text symbols heard in the first and the second half of that token; -1
            elsewhere.
        inputs: [L, B, N, D] input of every layer.

    Returns:
        (sum in nats, a mean over heads and layers; aux with (sum, count) of `alignment_nll_nats` and
        `alignment_accuracy`, the share of heads that look there most).

    Raises:
        ValueError: if the batch has no `aligned`.

    Source: the idea of guided attention (Tachibana et al., 2018), with known positions in place of a diagonal.
    """
    if "aligned" not in batch:
        raise ValueError(
            f"alignment_weight {cfg.alignment_weight} needs batches with `aligned`: set data.align=true, or "
            "model.alignment_weight=0 for a corpus without phone labels"
        )
    aligned = jnp.moveaxis(batch["aligned"], 2, 1)  # [B, 2, N]
    mask, positions = _mask(batch), batch["positions"]
    valid = (aligned >= 0).astype(jnp.float32)
    nll = right = 0.0
    for number in cfg.alignment_layers:
        block = jax.tree.map(lambda x: x[number], model.layers)  # noqa: B023
        attn, x = block.attn, block.attn_norm(inputs[number])
        rows = nn.axes_of(x)[0]

        def heads(linear, count, rows=rows, x=x):
            flat = jax.sharding.reshard(linear(x, cfg.dtype), PartitionSpec(rows, None, None))
            split = flat.reshape(*flat.shape[:2], count, cfg.head_dim)
            return nn.rotary(split, positions, cfg.rope_base)

        q = heads(attn.q, cfg.num_heads)[:, :, :NUM_ALIGNED]
        k = heads(attn.k, cfg.num_kv_heads)
        k = jnp.stack([k[:, :, h * cfg.num_kv_heads // cfg.num_heads] for h in range(NUM_ALIGNED)], axis=2)
        # float32: XLA:CPU has no bfloat16 product of this layout
        scores = nn.product("bnhe,bshe->bhns", q, k, "float32", PartitionSpec(rows, None, None, None))
        scores = jnp.where(mask[:, None], scores * cfg.head_dim**-0.5, nn.MASKED)
        found = _pick(scores, aligned)
        nll += jnp.sum((jax.nn.logsumexp(scores, axis=-1) - found) * valid)
        right += jnp.sum((found >= jnp.max(scores, axis=-1)) * valid)
    share, count = 1 / (NUM_ALIGNED * len(cfg.alignment_layers)), jnp.sum(valid) / NUM_ALIGNED
    nll, right = nll * share, right * share
    return nll, {"alignment_nll_nats": (nll, count), "alignment_accuracy": (right, count)}


def _pick(scores: jax.Array, ids: jax.Array) -> jax.Array:
    """Entry `ids` [...] of the last axis of `scores` [..., V]; 0 where the id is out of range."""
    is_id = jnp.arange(scores.shape[-1]) == ids[..., None]
    return jnp.sum(jnp.where(is_id, scores, 0.0), axis=-1)


def log_probs(model: SpeechLM, cfg: Config, batch: dict[str, jax.Array]) -> jax.Array:
    """Mean log-probability of each row's targets. Used by `dpo_loss` alone: no stage of training calls it yet.

    Args:
        model: the module.
        cfg: its settings.
        batch: as in `loss`, with one sequence per row. Only positions with a target (>= 0) count.

    Returns:
        [B] float32, nats per target; 0 for a row without targets.
    """
    targets = batch["targets"]
    scores = logits(model, cfg, batch)
    valid = (targets >= 0).astype(jnp.float32)
    log_p = (_pick(scores, targets) - jax.nn.logsumexp(scores, axis=-1)) * valid
    return jnp.sum(log_p, axis=-1) / jnp.maximum(jnp.sum(valid, axis=-1), 1.0)


def dpo_loss(
    model: SpeechLM,
    reference: SpeechLM,
    cfg: Config,
    batch: dict[str, dict[str, jax.Array]],
    key: jax.Array | None = None,
    beta: float = 0.01,
    sft_weight: float = 1.0,
) -> tuple[jax.Array, jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """Preference loss on pairs of sequences, joined with the cross-entropy of the chosen one.

    Per pair: `-log sigmoid(beta * ((c - c_ref) - (r - r_ref))) + sft_weight * (-c)` with `c`, `r` the mean
    log-probabilities (`log_probs`) of the chosen and the rejected sequence.
    Meant for a third stage, preference tuning, which is not built yet: no config reaches this function and the
    data pipeline makes no pairs.

    Args:
        model: the module in training.
        reference: the frozen copy of its start.
        cfg: settings of both.
        batch: {"chosen": rows, "rejected": rows}, each as in `log_probs`; row i of both is one pair.
        key: not used.
        beta: sharpness of the preference.
        sft_weight: weight of the chosen sequence's cross-entropy; 0 gives plain DPO.

    Returns:
        (sum over pairs, number of pairs, aux); aux holds (sum, count) of `dpo_nats`, `chosen_nll_nats`,
        `margin_nats` (difference of the two log-ratios) and `preferred` (share of pairs with margin > 0).

    Source: Rafailov et al. (2023), equation 7; lengths averaged, beta 0.01 and joint form as in CosyVoice2.
    """
    del key
    chosen = log_probs(model, cfg, batch["chosen"])
    rejected = log_probs(model, cfg, batch["rejected"])
    chosen_ref = jax.lax.stop_gradient(log_probs(reference, cfg, batch["chosen"]))
    rejected_ref = jax.lax.stop_gradient(log_probs(reference, cfg, batch["rejected"]))
    margin = (chosen - chosen_ref) - (rejected - rejected_ref)
    dpo = -jax.nn.log_sigmoid(beta * margin)
    count = jnp.float32(chosen.shape[0])
    aux = {
        "dpo_nats": (jnp.sum(dpo), count),
        "chosen_nll_nats": (jnp.sum(-chosen), count),
        "margin_nats": (jnp.sum(margin), count),
        "preferred": (jnp.sum((margin > 0).astype(jnp.float32)), count),
    }
    return jnp.sum(dpo - sft_weight * chosen), count, aux


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["text_table", "marker_table", "speech_table", "layers", "norm", "head", "head_bias"],
    meta_fields=[],
)
@dataclasses.dataclass
class DecodeWeights:
    """The weights in the form decoding wants: one buffer per layer and product, not split over `data`.

    A matrix is [out, in] and has two axes always: of more, XLA copies it into another order at every product.

    text_table, marker_table, speech_table: as in `SpeechLM`, float32.
    layers: per layer a dict of attn_norm [D], qkv [K*(H/K + 2)*E, D] (query heads of a group, then its key and
        value), qkv_bias [K*(H/K + 2)*E], o [D, H*E], mlp_norm [D], gate_up [2*F, D] (per part of the mesh's
        `model` axis the gate's rows, then the other's), down [D, F]; matrices in `cfg.dtype`, the rest float32.
    norm: [D]; head: [V, D] in `cfg.dtype`; head_bias: [V].
    """

    text_table: jax.Array
    marker_table: jax.Array
    speech_table: jax.Array
    layers: tuple[dict[str, jax.Array], ...]
    norm: jax.Array
    head: jax.Array
    head_bias: jax.Array


def unstack(model: SpeechLM, cfg: Config) -> DecodeWeights:
    """Decode weights of a model; make them once when many requests follow.

    Args:
        model: the module.
        cfg: its settings.
    """
    tables, norm, head, head_bias = _unstack_ends(model, cfg)
    # one small program for every layer: one for all of them took as long to compile as the decoding itself
    layers = tuple(_unstack_layer(model.layers, index, cfg) for index in range(cfg.num_layers))
    return DecodeWeights(*tables, layers=layers, norm=norm, head=head, head_bias=head_bias)


@programs.kept("cfg")
def _unstack_layer(layers: Block, index: jax.Array, cfg: Config) -> dict[str, jax.Array]:
    """The weights of one layer, as an entry of `DecodeWeights.layers`."""

    def joined(parts: list[jax.Array], num: int) -> jax.Array:
        """Arrays [..., num*n] side by side, interleaved in `num` runs that stay on their parts of the mesh."""
        lead, split = parts[0].shape[:-1], [None] * (parts[0].ndim - 1)
        runs = [x.reshape(*lead, num, -1, out_sharding=PartitionSpec(*split, "model", None)) for x in parts]
        x = jnp.concatenate(runs, axis=-1)
        return x.reshape(*lead, -1, out_sharding=PartitionSpec(*split, "model"))

    def taken(x: jax.Array) -> jax.Array:
        one = jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)
        return jax.sharding.reshard(one, _without_data(x, 1))

    block = jax.tree.map(taken, layers)
    attn, mlp = block.attn, block.mlp
    heads, ups = (attn.q, attn.k, attn.v), (mlp.gate, mlp.up)
    num_parts = jax.sharding.get_abstract_mesh().shape["model"]
    return {
        "attn_norm": block.attn_norm.scale[...],
        "qkv": _stored(joined([m.kernel[...] for m in heads], cfg.num_kv_heads), cfg),
        "qkv_bias": joined([m.bias[...] for m in heads], cfg.num_kv_heads),
        "o": _stored(attn.o.kernel[...], cfg),
        "mlp_norm": block.mlp_norm.scale[...],
        "gate_up": _stored(joined([m.kernel[...] for m in ups], num_parts), cfg),
        "down": _stored(mlp.down.kernel[...], cfg),
    }


@programs.kept("cfg")
def _unstack_ends(model: SpeechLM, cfg: Config):
    """((text, marker and speech table), norm, head, bias of the head), as in `DecodeWeights`."""

    def whole(param: nnx.Param) -> jax.Array:
        return jax.sharding.reshard(param[...], _without_data(param[...], 0))

    tables = tuple(map(whole, (model.text_table, model.marker_table, model.speech_table)))
    head = _stored(whole(model.head.kernel), cfg)
    return tables, whole(model.norm.scale), head, whole(model.head.bias)


def _stored(kernel: jax.Array, cfg: Config) -> jax.Array:
    """A kernel [in, out] as decoding reads it: [out, in] in `cfg.dtype`."""
    return kernel.T.astype(cfg.dtype)


def _product(x: jax.Array, kernel: jax.Array, cfg: Config, out_sharding: PartitionSpec) -> jax.Array:
    """[B, N, in] times a `_stored` kernel: [B, N, out] float32.

    Rows and positions are one axis in between: with two, XLA turns the kernel back before the product. On a
    CPU the kernel is the left operand of up to `FEW_ROWS` float32 rows: faster by up to 2.5 times (docs/speed.md).
    """
    rows, _, last = nn.axes_of(x)
    if x.shape[0] * x.shape[1] == 1:
        rows = None  # a single row is on one device: said so, `nn.product` may repeat it
    x = jax.sharding.reshard(x, PartitionSpec(rows, None, last))
    flat = x.reshape(-1, x.shape[2], out_sharding=PartitionSpec(rows, last))
    columns = out_sharding[2]

    def kernel_right(flat, kernel):
        return nn.product("ni,oi->no", flat, kernel, cfg.dtype, PartitionSpec(rows, columns))

    def kernel_left(flat, kernel):
        y = nn.product("oi,ni->on", kernel, flat, cfg.dtype, PartitionSpec(columns, rows))
        return jax.lax.optimization_barrier(y).T  # without the barrier XLA folds .T into the product

    if cfg.dtype == "float32" and flat.shape[0] <= FEW_ROWS:
        y = jax.lax.platform_dependent(flat, kernel, cpu=kernel_left, default=kernel_right)
    else:
        y = kernel_right(flat, kernel)
    y = y.reshape(*x.shape[:2], -1, out_sharding=PartitionSpec(rows, None, columns))
    return jax.sharding.reshard(y, out_sharding)


def _without_data(x: jax.Array, first: int) -> PartitionSpec:
    """Split of `x` from axis `first` on, with `data` taken out."""
    return PartitionSpec(*("model" if axis == "model" else None for axis in nn.axes_of(x)[first:]))


@programs.kept("cfg")
def _layer(
    w: dict[str, jax.Array], cfg: Config, x: jax.Array, positions: jax.Array, mask: jax.Array, past=None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """One layer on the fused weights: x [B, N, D] to (x, its keys and values); `past` as in `layers`, of one layer.

    Under jit, so that a program of all layers is traced from one, and one program can serve all layers.
    """
    group, size = cfg.num_heads // cfg.num_kv_heads, cfg.head_dim
    rows = nn.axes_of(x)[0]
    whole, split = PartitionSpec(rows, None, None), PartitionSpec(rows, None, "model")
    heads, grouped = PartitionSpec(*split, None), PartitionSpec(*split, None, None)
    lead, num_parts = x.shape[:2], jax.sharding.get_abstract_mesh().shape["model"]
    y = nn.rms_norm(x, w["attn_norm"], cfg.norm_eps)
    qkv = _product(y, w["qkv"], cfg, split) + w["qkv_bias"]
    qkv = qkv.reshape((*lead, cfg.num_kv_heads, group + 2, size), out_sharding=grouped)
    q = qkv[:, :, :, :group].reshape((*lead, cfg.num_heads, size), out_sharding=heads)
    q = nn.rotary(q, positions, cfg.rope_base)
    kept = nn.rotary(qkv[:, :, :, group], positions, cfg.rope_base), qkv[:, :, :, group + 1]
    if past is None:
        y = nn.attention(q, *kept, mask)
    else:
        before, new, step = past
        columns = (jnp.transpose(x, (0, 2, 3, 1)) for x in kept)
        at = (0, 0, 0, step)
        kept = tuple(jax.lax.dynamic_update_slice(x, y, at) for x, y in zip(new, columns, strict=True))
        y = _look_back(q, *zip(before, kept, strict=True), mask)
    x = x + _product(nn.merge_heads(y), w["o"], cfg, whole)
    y = nn.rms_norm(x, w["mlp_norm"], cfg.norm_eps)
    y = _product(y, w["gate_up"], cfg, split)
    y = y.reshape((*lead, num_parts, 2, cfg.mlp_width // num_parts), out_sharding=grouped)
    y = jax.nn.silu(y[:, :, :, 0]) * y[:, :, :, 1]
    y = y.reshape((*lead, cfg.mlp_width), out_sharding=split)
    return x + _product(y, w["down"], cfg, whole), kept


def _look_back(
    q: jax.Array,
    keys: tuple[jax.Array, jax.Array],
    values: tuple[jax.Array, jax.Array],
    mask: jax.Array,
) -> jax.Array:
    """Attention of one position a row, [B, 1, H, E], to two caches [B, K, E, S] side by side; mask [B, 1, both S]."""
    rows, _, heads, _ = nn.axes_of(q)
    split = PartitionSpec(rows, heads, None, None)
    group = q.shape[2] // keys[0].shape[1]
    q = q[:, 0].reshape(q.shape[0], -1, group, q.shape[3], out_sharding=split) * q.shape[3] ** -0.5
    scores = [nn.product("bkge,bkes->bkgs", q, x, "float32", split) for x in keys]
    scores = jnp.where(mask[:, None], jnp.concatenate(scores, axis=-1), nn.MASKED)
    weights = jnp.split(jax.nn.softmax(scores, axis=-1), [keys[0].shape[3]], axis=-1)
    parts = zip(weights, values, strict=True)
    y = sum(nn.product("bkgs,bkes->bkge", w, x, "float32", split) for w, x in parts)
    return y.reshape(y.shape[0], 1, -1, y.shape[3], out_sharding=PartitionSpec(rows, None, heads, None))


def layers(
    weights: DecodeWeights,
    cfg: Config,
    x: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
    past: tuple[Cache, Cache, jax.Array] | None = None,
) -> tuple[jax.Array, Cache]:
    """All layers, unrolled, on the fused weights; outside of jit they are one program that runs once a layer.

    Args:
        weights: from `unstack`.
        cfg: settings of the model.
        x: [B, N, D] float32 input vectors.
        positions: [B or 1, N] int32.
        mask: [B or 1, N, S] bool, True where attention is allowed.
        past: (cache of what came before the new tokens, cache of these, the column in it that x is written to); N is
            then 1, and x looks at both, S columns in all. None: S is N, and x looks at itself.

    Returns:
        ([B, N, D] float32 before the final norm, the cache of the new tokens; without `past` the keys and values of
        x, [B, N, K, E], for `filled`).
    """
    kept = []
    for index, w in enumerate(weights.layers):
        own = None if past is None else (past[0].of_layer(index), past[1].of_layer(index), past[2])
        x, own = _layer(w, cfg, x, positions, mask, own)
        kept.append(own)
        if jax.default_backend() == "cpu" and not isinstance(x, jax.core.Tracer):
            x.block_until_ready()  # queued programs of several CPU devices deadlock
    return x, Cache(*zip(*kept, strict=True))


def prefill(
    weights: DecodeWeights, cfg: Config, tokens: jax.Array, kinds: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, Cache]:
    """Runs the sequence so far.

    Args:
        weights: from `unstack`.
        cfg: settings of the model.
        tokens: [B, N] int32, each row's sequence at the left.
        kinds: [B, N] int32, PAD after the end of a row.
        lengths: [B] int32, number of valid positions, at least 1.

    Returns:
        (logits [B, V] float32 after the last valid position of each row, its cache).
    """
    x, kept = layers(weights, cfg, embed(weights, tokens, kinds), *_causal(tokens.shape[1]))
    return _last_scores(weights, cfg, x, lengths), filled(kept)


def _causal(num: int) -> tuple[jax.Array, jax.Array]:
    """Positions [1, N] and mask [1, N, N] of a prefill; padding on the right is hidden from all before it already."""
    order = jnp.arange(num)
    return order[None], (order[:, None] >= order)[None]


def _last_scores(weights: DecodeWeights, cfg: Config, x: jax.Array, lengths: jax.Array) -> jax.Array:
    """Logits [B, V] after the last valid position of each row of x [B, N, D]."""
    last = jax.vmap(lambda row, n: jax.lax.dynamic_index_in_dim(row, n - 1, 0, keepdims=False))(x, lengths)
    return _head(weights, cfg, last)


def decode_step(
    weights: DecodeWeights,
    cfg: Config,
    tokens: jax.Array,
    lengths: jax.Array,
    before: Cache,
    new: Cache,
    step: jax.Array,
) -> tuple[jax.Array, Cache]:
    """One speech token per row through the model.

    Args:
        weights: from `unstack`.
        cfg: settings of the model.
        tokens: [B] int32 speech ids.
        lengths: [B] int32, valid positions of each row before the new tokens.
        before: their cache.
        new: cache of the new tokens before this one, from `empty`; it is replaced by the result.
        step: int32 scalar, number of these.

    Returns:
        (logits [B, V] float32 for the next token, cache of the new tokens).
    """
    kinds = jnp.full_like(tokens, SPEECH)
    column = jnp.arange(before.size + new.size)
    mask = (column < lengths[:, None]) | ((column >= before.size) & (column <= before.size + step))
    x = embed(weights, tokens[:, None], kinds[:, None])
    x, new = layers(weights, cfg, x, (lengths + step)[:, None], mask[:, None], (before, new, step))
    return _head(weights, cfg, x[:, 0]), new


def _head(weights: DecodeWeights, cfg: Config, x: jax.Array) -> jax.Array:
    """Speech logits [B, V] of the last layer's states [B, D]."""
    x = nn.rms_norm(x[:, None], weights.norm, cfg.norm_eps)
    return _product(x, weights.head, cfg, nn.like(x, None))[:, 0] + weights.head_bias


def sample_token(scores: jax.Array, recent: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws one token, avoiding repetition.

    A token is drawn from the `top_k` most probable, cut where the mass before a token reaches `top_p` (the
    token that crosses it is kept). If it stands at least `repeat_limit` times in `recent`, it is excluded and
    the draw is repeated from the whole distribution.

    Args:
        scores: [V] float32 logits, -inf where forbidden.
        recent: [window] int32, the last generated tokens in any order, -1 where there is none.
        key: one key.
        sampling: settings.

    Returns:
        int32 scalar.

    Source: VALL-E 2 (Chen et al., 2024), section 4.1; excluding the repeated token is the public CosyVoice
    code since February 2026.
    """
    scores = scores / sampling.temperature
    first_key, second_key = jax.random.split(key)

    def draw(x: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.argmax(x) if sampling.greedy else jax.random.categorical(key, x)

    best, ids = jax.lax.top_k(scores, min(sampling.top_k, scores.shape[0]))
    mass = jnp.exp(best - jax.nn.logsumexp(scores))
    before = jnp.concatenate([jnp.zeros(1), jnp.cumsum(mass)[:-1]])
    token = ids[draw(jnp.where(before < sampling.top_p, best, -jnp.inf), first_key)]
    if not sampling.repetition_aware:
        return token
    is_repeated = jnp.sum(recent == token) >= sampling.repeat_limit
    other = draw(jnp.where(jnp.arange(scores.shape[0]) == token, -jnp.inf, scores), second_key)
    return jnp.where(is_repeated, other.astype(token.dtype), token)


def layout(
    text_ids: jax.Array, text_length: jax.Array, prompt_tokens: jax.Array, prompt_length: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`[sos] text [task] prompt` of one row without the gaps that padding leaves between them.

    Args:
        text_ids: [N] int32, valid up to `text_length`.
        text_length: int32 scalar.
        prompt_tokens: [N'] int32, valid up to `prompt_length`.
        prompt_length: int32 scalar.

    Returns:
        (tokens [2 + N + N'], kinds of the same shape, number of valid positions).
    """
    at = jnp.arange(2 + text_ids.shape[0] + prompt_tokens.shape[0])
    task = text_length + 1
    length = task + 1 + prompt_length
    kinds = jnp.where(at < task, TEXT, SPEECH)
    kinds = jnp.where(at == 0, SOS, jnp.where(at == task, TASK, kinds))
    kinds = jnp.where(at < length, kinds, PAD)
    tokens = jnp.zeros_like(at)
    for source, start, kind in ((text_ids, 1, TEXT), (prompt_tokens, task + 1, SPEECH)):
        if source.shape[0]:
            tokens = jnp.where(kinds == kind, source.at[at - start].get(mode="clip"), tokens)
    return tokens, kinds, length


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "tokens", "lengths", "is_done", "recent", "scores", "cache"],
    meta_fields=[],
)
@dataclasses.dataclass
class State:
    """What the decoding loop carries.

    step: int32 scalar, tokens drawn so far per row.
    tokens: [B, max_new] int32, result; 0 after a row's end.
    lengths: [B] int32, valid tokens of each row.
    is_done: [B] bool, the row met its end token or its limit.
    recent: [B, window] int32, ring of the last drawn tokens, -1 where empty.
    scores: [B, V] float32, logits for the next token.
    cache: keys and values of the tokens drawn so far.
    """

    step: jax.Array
    tokens: jax.Array
    lengths: jax.Array
    is_done: jax.Array
    recent: jax.Array
    scores: jax.Array
    cache: Cache


def generate(
    model: SpeechLM | DecodeWeights,
    cfg: Config,
    sampling: Sampling,
    text_ids: jax.Array,
    text_lengths: jax.Array,
    prompt_tokens: jax.Array,
    prompt_lengths: jax.Array,
    min_lengths: jax.Array,
    max_lengths: jax.Array,
    keys: jax.Array,
    max_new: int,
) -> tuple[jax.Array, jax.Array]:
    """Speech tokens for a batch of texts, each continuing a speech prompt.

    Three compiled programs: the input vectors, one layer over them (run once for each layer), the loop over new
    tokens. One program, with all layers in it twice, took 6.1 s to trace and compile at CosyVoice2's size, these
    three 3.2 s: docs/speed.md, "Programs of a request".

    A row depends on its own arguments and key only: not on padding, on its neighbours or on the batch size.
    The rows are split over the mesh if it divides them and repeated on every chip otherwise.

    Args:
        model: the module, or its `unstack`ed weights (saves the copy at each call).
        cfg: settings of the model.
        sampling: how tokens are drawn; its ratios are not used here (see `Sampling.limits`).
        text_ids: [B, N] int32, prompt text then target text, padded with anything.
        text_lengths: [B] int32.
        prompt_tokens: [B, N'] int32 speech tokens of the prompt, padded with anything; N' may be 0.
        prompt_lengths: [B] int32.
        min_lengths: [B] int32; all special ids are forbidden before this many tokens.
        max_lengths: [B] int32; a row stops after this many tokens, and after `max_new` at the latest.
        keys: [B] random keys, one per row.
        max_new: columns of the result, static.

    Returns:
        (tokens [B, max_new] int32, codes below `num_codes` and 0 after the end of a row; lengths [B] int32).

    Raises:
        ValueError: if the arguments do not have the same number of rows, or max_new is below 1.

    The public code forbids only the end id before the minimum; here all ids that stop a row are, so
    that the minimum holds.
    """
    if jax.sharding.get_abstract_mesh().empty:  # inside another program the mesh is set
        sharding.ensure_mesh()
    rows = text_ids.shape[0]
    named = dict(text_lengths=text_lengths, prompt_tokens=prompt_tokens, prompt_lengths=prompt_lengths)
    named |= dict(min_lengths=min_lengths, max_lengths=max_lengths, keys=keys)
    for name, x in named.items():
        if x.shape[0] != rows:
            raise ValueError(f"{name} has {x.shape[0]} rows, text_ids has {rows}; give one entry per row")
    if max_new < 1:
        raise ValueError(f"max_new is {max_new}; at least 1 is needed")
    weights = model if isinstance(model, DecodeWeights) else unstack(model, cfg)
    ends = dataclasses.replace(weights, layers=())
    x, lengths, *where = _begin(ends, cfg, text_ids, text_lengths, prompt_tokens, prompt_lengths)
    x, kept = layers(weights, cfg, x, *where)
    limits = min_lengths, max_lengths, keys
    return _continue(weights, cfg, sampling, x, lengths, kept, *limits, max_new)


def _place(x: jax.Array) -> jax.Array:
    """Rows split over the mesh if it divides them, else whole."""
    shape = jax.sharding.get_abstract_mesh().shape
    split = spec("batch") if x.shape[0] % (shape["slice"] * shape["data"]) == 0 else PartitionSpec(None)
    return jax.sharding.reshard(x, PartitionSpec(*split, *(None,) * (x.ndim - 1)))


@programs.kept("cfg")
def _begin(
    weights: DecodeWeights,
    cfg: Config,
    text_ids: jax.Array,
    text_lengths: jax.Array,
    prompt_tokens: jax.Array,
    prompt_lengths: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """First program of `generate`: input vectors [B, N, D] and valid positions [B]; positions and mask for `layers`."""
    given = map(_place, (text_ids, text_lengths, prompt_tokens, prompt_lengths))
    tokens, kinds, lengths = jax.vmap(layout)(*given)
    return embed(weights, tokens, kinds), lengths, *_causal(tokens.shape[1])


@programs.kept("cfg", "sampling", "max_new")
def _continue(
    weights: DecodeWeights,
    cfg: Config,
    sampling: Sampling,
    x: jax.Array,
    lengths: jax.Array,
    kept: Cache,
    min_lengths: jax.Array,
    max_lengths: jax.Array,
    keys: jax.Array,
    max_new: int,
) -> tuple[jax.Array, jax.Array]:
    """Last program of `generate`: the loop over new tokens, from what `layers` gave for the sequence so far."""
    num_rows = x.shape[0]
    keys, min_lengths = _place(keys), _place(min_lengths)
    max_lengths = jnp.minimum(_place(max_lengths), max_new)
    scores, before = _last_scores(weights, cfg, x, lengths), filled(kept)
    is_stop = jnp.arange(cfg.num_speech_rows) >= cfg.num_codes

    def draw(scores, recent, key, least, step):
        scores = jnp.where(is_stop & (step < least), -jnp.inf, scores)
        return sample_token(scores, recent, jax.random.fold_in(key, step), sampling)

    def body(state: State) -> State:
        step = state.step
        draw_rows = jax.vmap(draw, in_axes=(0, 0, 0, 0, None))
        token = draw_rows(state.scores, state.recent, keys, min_lengths, step)
        is_done = state.is_done | (token >= cfg.num_codes)
        token = jnp.where(is_done, 0, token)
        new_lengths = jnp.where(is_done, state.lengths, step + 1)
        place_in_ring = step % sampling.window
        scores, cache = decode_step(weights, cfg, token, lengths, before, state.cache, step)
        return State(
            step=step + 1,
            tokens=jax.lax.dynamic_update_slice(state.tokens, token[:, None], (0, step)),
            lengths=new_lengths,
            is_done=is_done | (step + 1 >= max_lengths),
            recent=jax.lax.dynamic_update_slice(state.recent, token[:, None], (0, place_in_ring)),
            scores=scores,
            cache=cache,
        )

    start = State(
        step=jnp.int32(0),
        tokens=_place(jnp.zeros((num_rows, max_new), jnp.int32)),
        lengths=_place(jnp.zeros(num_rows, jnp.int32)),
        is_done=max_lengths <= 0,
        recent=_place(jnp.full((num_rows, sampling.window), -1, jnp.int32)),
        scores=scores,
        cache=empty(before, max_new),
    )
    end = jax.lax.while_loop(lambda s: (s.step < max_new) & jnp.any(~s.is_done), body, start)
    return end.tokens, end.lengths
