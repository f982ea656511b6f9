"""Speech language model: the network over text ids and 25 Hz speech tokens, and its losses; `decoding.py` draws tokens.

A Qwen2.5-style decoder (RMS norm, grouped-query attention with q/k/v bias, rotary positions, SwiGLU) with the
backbone's text table, a speech table and a speech head, in the sequence layout of CosyVoice2:
`[sos] text_1..text_m [task] s_1..s_n [end]`, targets on speech and end only.
Sources: Qwen2.5 (Yang et al., 2024); CosyVoice 2 (Du et al., 2024), sections 2.3 and 2.4; the layout and the ids
match the public CosyVoice2 release.

Letters: B rows, N positions, D width, V speech rows (codes and special ids), L layers.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from deepasmr_jax import audio, nn, sharding
from deepasmr_jax.sharding import spec

# queries per part of the training attention; on CPU 512 positions take 0.6 of the time of one part
CAUSAL_CHUNK = 128
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


def embed(model: SpeechLM, tokens: jax.Array, kinds: jax.Array) -> jax.Array:
    """Input vectors of a sequence that mixes markers, text and speech.

    Args:
        model: the module, or its `decoding.DecodeWeights`.
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
