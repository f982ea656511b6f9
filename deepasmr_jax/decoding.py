"""Speech tokens from the language model: its weights as decoding wants them, cache, sampling, and the loop over tokens.

The network and its sequence are those of `lm.py`; sampling and its defaults match the public CosyVoice2
release (CosyVoice 2, Du et al., 2024, section 2.3).

Letters: B rows, N positions, S cache length, H query heads, K key/value heads, E head size, D width,
F MLP width, V speech rows (codes and special ids).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from deepasmr_jax import lm, nn, programs, sharding
from deepasmr_jax.sharding import spec

FEW_ROWS = 32  # float32 rows up to which a CPU has the weights on the left: faster at 2 to 32, slower at 150


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


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["text_table", "marker_table", "speech_table", "layers", "norm", "head", "head_bias"],
    meta_fields=[],
)
@dataclasses.dataclass
class DecodeWeights:
    """The weights in the form decoding wants: one buffer per layer and product, not split over `data`.

    A matrix is [out, in] and has two axes always: of more, XLA copies it into another order at every product.

    text_table, marker_table, speech_table: as in `lm.SpeechLM`, float32.
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


def unstack(model: lm.SpeechLM, cfg: lm.Config) -> DecodeWeights:
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
def _unstack_layer(layers: lm.Block, index: jax.Array, cfg: lm.Config) -> dict[str, jax.Array]:
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
def _unstack_ends(model: lm.SpeechLM, cfg: lm.Config):
    """((text, marker and speech table), norm, head, bias of the head), as in `DecodeWeights`."""

    def whole(param: nnx.Param) -> jax.Array:
        return jax.sharding.reshard(param[...], _without_data(param[...], 0))

    tables = tuple(map(whole, (model.text_table, model.marker_table, model.speech_table)))
    head = _stored(whole(model.head.kernel), cfg)
    return tables, whole(model.norm.scale), head, whole(model.head.bias)


def _stored(kernel: jax.Array, cfg: lm.Config) -> jax.Array:
    """A kernel [in, out] as decoding reads it: [out, in] in `cfg.dtype`."""
    return kernel.T.astype(cfg.dtype)


def _product(x: jax.Array, kernel: jax.Array, cfg: lm.Config, out_sharding: PartitionSpec) -> jax.Array:
    """[B, N, in] times a `_stored` kernel: [B, N, out] float32.

    Rows and positions are one axis in between: with two, XLA turns the kernel back before the product. On a
    CPU the kernel is the left operand of up to `FEW_ROWS` float32 rows: up to twice as fast (docs/speed.md).
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
    w: dict[str, jax.Array], cfg: lm.Config, x: jax.Array, positions: jax.Array, mask: jax.Array, past=None
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
    cfg: lm.Config,
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
    weights: DecodeWeights, cfg: lm.Config, tokens: jax.Array, kinds: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, Cache]:
    """Runs the sequence so far.

    Args:
        weights: from `unstack`.
        cfg: settings of the model.
        tokens: [B, N] int32, each row's sequence at the left.
        kinds: [B, N] int32, lm.PAD after the end of a row.
        lengths: [B] int32, number of valid positions, at least 1.

    Returns:
        (logits [B, V] float32 after the last valid position of each row, its cache).
    """
    x, kept = layers(weights, cfg, lm.embed(weights, tokens, kinds), *_causal(tokens.shape[1]))
    return _last_scores(weights, cfg, x, lengths), filled(kept)


def _causal(num: int) -> tuple[jax.Array, jax.Array]:
    """Positions [1, N] and mask [1, N, N] of a prefill; padding on the right is hidden from all before it already."""
    order = jnp.arange(num)
    return order[None], (order[:, None] >= order)[None]


def _last_scores(weights: DecodeWeights, cfg: lm.Config, x: jax.Array, lengths: jax.Array) -> jax.Array:
    """Logits [B, V] after the last valid position of each row of x [B, N, D]."""
    last = jax.vmap(lambda row, n: jax.lax.dynamic_index_in_dim(row, n - 1, 0, keepdims=False))(x, lengths)
    return _head(weights, cfg, last)


def decode_step(
    weights: DecodeWeights,
    cfg: lm.Config,
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
    kinds = jnp.full_like(tokens, lm.SPEECH)
    column = jnp.arange(before.size + new.size)
    mask = (column < lengths[:, None]) | ((column >= before.size) & (column <= before.size + step))
    x = lm.embed(weights, tokens[:, None], kinds[:, None])
    x, new = layers(weights, cfg, x, (lengths + step)[:, None], mask[:, None], (before, new, step))
    return _head(weights, cfg, x[:, 0]), new


def _head(weights: DecodeWeights, cfg: lm.Config, x: jax.Array) -> jax.Array:
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
    kinds = jnp.where(at < task, lm.TEXT, lm.SPEECH)
    kinds = jnp.where(at == 0, lm.SOS, jnp.where(at == task, lm.TASK, kinds))
    kinds = jnp.where(at < length, kinds, lm.PAD)
    tokens = jnp.zeros_like(at)
    for source, start, kind in ((text_ids, 1, lm.TEXT), (prompt_tokens, task + 1, lm.SPEECH)):
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
    model: lm.SpeechLM | DecodeWeights,
    cfg: lm.Config,
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
    cfg: lm.Config,
    text_ids: jax.Array,
    text_lengths: jax.Array,
    prompt_tokens: jax.Array,
    prompt_lengths: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """First program of `generate`: input vectors [B, N, D] and valid positions [B]; positions and mask for `layers`."""
    given = map(_place, (text_ids, text_lengths, prompt_tokens, prompt_lengths))
    tokens, kinds, lengths = jax.vmap(layout)(*given)
    return lm.embed(weights, tokens, kinds), lengths, *_causal(tokens.shape[1])


@programs.kept("cfg", "sampling", "max_new")
def _continue(
    weights: DecodeWeights,
    cfg: lm.Config,
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
