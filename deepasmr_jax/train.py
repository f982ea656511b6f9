"""Training of any model of the package: config, state, the jitted step, the loop, and `main`.

`python -m deepasmr_jax.train --config=configs/tiny.py:lm --workdir=RUN --set=data.data_dirs=FOLDER`
A run starts from, first match wins: the newest checkpoint in the working directory, `init_from`, random
weights. It ends at `steps`, after `max_seconds`, at SIGTERM or Ctrl-C, from the first step on with a
checkpoint; the same command goes on from there, bit for bit on as many hosts and chips. After a signal only the
checkpoint is written.
A model file brings `Config`, `init(cfg, key)` and `loss(model, cfg, batch, key) -> (sum, count, aux)`; one with two
players brings `init_opt` and `train_step` too. Sums and counts are divided here, once.
"""

import argparse
import atexit
import contextlib
import dataclasses
import functools
import importlib
import json
import math
import signal
import sys
import time
import typing
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from deepasmr_jax import checkpoint, input_pipeline, metrics, samples, sharding, shards
from deepasmr_jax import config as config_lib

# last names of parameters that weight decay leaves alone: norms and biases; tables go by `is_decayed`
NO_DECAY = ("scale", "gain", "mean", "var")
COMPONENTS = ("speech_tokenizer", "speaker", "lm", "flow", "vocoder", "recognizer")  # that can be trained
HOPELESS_EXIT = 2  # exit code of a run that would fail in the same way again
STARTED_FROM = "started_from.json"  # in a run's folder: `origin` of its first weights
_CALIBRATION = 20  # training batches from which batch-norm statistics are taken
# settings of model and data that may differ when a run is resumed. Other folders with other records do change the
# order from there on; they are allowed because a corpus may be moved.
_FREE_ON_RESUME = ("data.data_dirs", "data.num_threads", "data.num_prefetch", "model.remat", "model.unroll")


@dataclasses.dataclass(frozen=True)
class Optim:
    """Optimizer and learning-rate schedule; each schedule first rises from 0 over `warmup_steps`.

    Raises:
        ValueError: on an unknown name or schedule, no warm-up, an exponential schedule without an end, or weight decay
            with adam.
    """

    name: Literal["adam", "adamw", "sgd"] = "adam"  # sgd: with Nesterov's momentum, betas[0]
    lr: float = 1e-3  # peak
    schedule: Literal["constant", "noam", "cosine", "wsd", "exponential"] = "cosine"
    warmup_steps: int = 100
    final_lr_ratio: float = 0.0  # cosine, wsd and exponential end at this share of the peak
    decay_ratio: float = 0.2  # wsd: last share of the steps, over which the rate falls linearly
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0  # of adamw, and of sgd as part of the gradient; never on NO_DECAY nor on tables
    clip_norm: float | None = 1.0

    def __post_init__(self):
        for name in ("name", "schedule"):
            known = typing.get_args(typing.get_type_hints(Optim)[name])
            if getattr(self, name) not in known:
                raise ValueError(f"optim.{name} {getattr(self, name)!r} is unknown; use {' or '.join(known)}")
        if self.warmup_steps < 1:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be at least 1")
        if self.schedule == "exponential" and self.final_lr_ratio <= 0:
            raise ValueError("the exponential schedule needs optim.final_lr_ratio above 0, such as 0.05")
        if self.weight_decay and self.name == "adam":
            raise ValueError(f"weight_decay {self.weight_decay} needs optim.name=adamw or sgd, found 'adam'")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Sizes of the three mesh axes of sharding.py; `fitted_mesh` says what slice -1 becomes."""

    slice: int = 1  # -1: what there is
    data: int = 1
    model: int = 1


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run. `model` is the Config of a model file and decides which file is trained.

    Raises:
        ValueError: on an unknown component or export dtype, a count below 1, data whose end id, mel profile or labels
            are not the model's, accumulation with a model file that makes its own step, or CosyVoice2's flow, for
            which no stage of the data gives a speaker.
    """

    component: str  # name in the exported folder, one of COMPONENTS
    model: Any
    data: input_pipeline.Config
    optim: Optim
    steps: int
    accumulation: int = 1  # parts of a batch that are computed one after the other, as far as a chip has rows
    ema_decay: float | None = None  # averaged weights, used for evaluation and export
    seed: int = 0
    mesh: Mesh = Mesh()
    init_from: str | None = None  # exported model folder, or the working directory of another run
    max_seconds: float | None = (
        None  # stop with a checkpoint after this wall time; 0: only evaluate and export
    )
    log_every: int = 10
    save_every: int = 200
    save_minutes: float = 10.0  # a checkpoint at least this often
    keep: int = 2
    keep_every: int = 0
    eval_every: int = 200
    eval_batches: int = 4
    eval_split: str = "valid"
    tensorboard: bool = False  # RUN/tensorboard too, with sounds and pictures, if tensorboardX is there
    listen_with: str | None = None  # model folder whose flow and vocoder make LM and flow heard there
    peak_tflops: float | None = None  # bfloat16, of one device, for the MFU; None: metrics.CHIPS
    export_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    data_note: str = ""  # what the training data is, for the provenance of the exported model

    def __post_init__(self):
        for name, known in (("component", COMPONENTS), ("export_dtype", checkpoint.DTYPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; use one of {', '.join(known)}")
        if self.module == "flow_cosyvoice2":
            raise ValueError(
                "no stage of the data gives flow_cosyvoice2 its speaker embedding; train the decoder of flow.py, which "
                "can start from E2TTS_Base (docs/public_weights.md)"
            )
        sizes = dataclasses.asdict(self.mesh).items()
        counts = {f"mesh.{axis}": size for axis, size in sizes if (axis, size) != ("slice", -1)}
        counts |= {k: getattr(self, k) for k in ("accumulation", "log_every", "save_every", "eval_every")}
        for name, count in counts.items():
            if count < 1:
                way_out = "; eval_batches=0 turns the evaluation off" if name == "eval_every" else ""
                raise ValueError(f"{name} {count} must be at least 1{way_out}")
        end_id = getattr(self.model, "end_id", self.data.end_id)
        if end_id != self.data.end_id:
            raise ValueError(
                f"data.end_id {self.data.end_id} is not the model's end id {end_id}; set it to that"
            )
        profile = getattr(self.model, "mel_profile", self.data.mel_profile)
        if profile != self.data.mel_profile:
            raise ValueError(
                f"data.mel_profile {self.data.mel_profile!r} is not the model's {profile!r}; set it to that"
            )
        labels = getattr(self.model, "labels", self.data.labels)
        if labels != self.data.labels:
            raise ValueError(
                f"data.labels {self.data.labels!r} are not the model's {labels!r}; set them to those"
            )
        if self.accumulation > 1 and hasattr(_file(self.model), "train_step"):
            raise ValueError(f"{_file(self.model).__name__} makes its own step; use accumulation=1")

    @property
    def module(self) -> str:
        """Name of the model file: `lm`, `flow`, ..."""
        return type(self.model).__module__.rsplit(".", 1)[-1]


def fitted_mesh(mesh: Mesh, num_devices: int, num_slices: int = 1) -> Mesh:
    """The mesh on devices that are there.

    With slice -1, `model` is kept, `data` as far as it divides the devices of a TPU slice, and `slice` takes the rest.

    Args:
        mesh: of a config.
        num_devices: of all hosts.
        num_slices: TPU slices that they are of.

    Raises:
        ValueError: if it does not fit, with the setting that does.
    """
    if mesh.slice > 0:
        sizes = dataclasses.astuple(mesh)
        if math.prod(sizes) > num_devices:
            raise ValueError(
                f"mesh {'x'.join(map(str, sizes))} needs {math.prod(sizes)} devices, found {num_devices}; add "
                "--set=mesh.slice=-1, which fits it to what there is"
            )
        return mesh
    in_slice = num_devices // num_slices
    if in_slice % mesh.model:
        raise ValueError(
            f"mesh.model {mesh.model} does not divide {in_slice} devices; add --set=mesh.model="
            f"{math.gcd(mesh.model, in_slice)}"
        )
    data = math.gcd(mesh.data, in_slice // mesh.model)
    return Mesh(num_devices // mesh.model // data, data, mesh.model)


def fitted(cfg: TrainConfig, num_devices: int, num_slices: int = 1) -> TrainConfig:
    """The config with its `fitted_mesh`, and no more parts of a batch than a chip has rows.

    Args:
        cfg: the run.
        num_devices, num_slices: as of `fitted_mesh`, whose errors it has.
    """
    mesh = fitted_mesh(cfg.mesh, num_devices, num_slices)
    parts = min(cfg.accumulation, -(-cfg.data.batch_size // (mesh.slice * mesh.data)))
    return dataclasses.replace(cfg, mesh=mesh, accumulation=parts)


def row_shares(cfg: TrainConfig) -> int:
    """Chips times parts that share a batch of a `fitted` config: its rows are padded to a multiple of them."""
    return cfg.mesh.slice * cfg.mesh.data * cfg.accumulation


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything that a checkpoint holds beside the data position.

    step: int32 scalar, updates done. model: the module, float32. opt_state: of Optax. key: PRNG key of the
    run, never changed; the key of a step is folded from the step number. ema: averaged weights of the
    exported part, or None.
    """

    step: jax.Array
    model: Any
    opt_state: Any
    key: jax.Array
    ema: Any


def _file(model_config):
    """The Python module that defines a model's Config, init and loss."""
    return importlib.import_module(type(model_config).__module__)


# ---------------------------------------------------------------- optimizer


def make_schedule(cfg: Optim, steps: int):
    """Learning rate as a function of the number of updates done.

    Noam is scaled to its peak: lr * warmup^0.5 * min(step^-0.5, step * warmup^-1.5).
    """

    def rate(count):
        step = jnp.asarray(count, jnp.float32) + 1.0
        warmup = jnp.minimum(step / cfg.warmup_steps, 1.0)
        if cfg.schedule == "noam":
            shape = jnp.minimum(jnp.sqrt(cfg.warmup_steps / step), 1.0)
        elif cfg.schedule == "cosine":
            done = jnp.clip((step - cfg.warmup_steps) / max(steps - cfg.warmup_steps, 1), 0.0, 1.0)
            shape = cfg.final_lr_ratio + (1.0 - cfg.final_lr_ratio) * 0.5 * (1.0 + jnp.cos(math.pi * done))
        elif cfg.schedule == "wsd":
            left = jnp.clip((steps - step) / max(steps * cfg.decay_ratio, 1.0), 0.0, 1.0)
            shape = cfg.final_lr_ratio + (1.0 - cfg.final_lr_ratio) * left
        elif cfg.schedule == "exponential":
            shape = cfg.final_lr_ratio ** jnp.clip(step / steps, 0.0, 1.0)
        else:
            shape = 1.0
        return cfg.lr * warmup * shape

    return rate


def is_decayed(name: str) -> bool:
    """Whether weight decay applies to a parameter, by its dotted path (ranks mislead: layers are stacked)."""
    parts = name.split(".")
    if parts[-1] in NO_DECAY or parts[-1].endswith("bias"):
        return False
    return not any(p.endswith(("norm", "table", "embedding")) for p in parts)


def _weight_decay(amount: float) -> optax.GradientTransformation:
    def update(updates, state, params):
        def one(path, u, p):
            return u + amount * p if is_decayed(checkpoint.path_name(path)) else u

        return jax.tree_util.tree_map_with_path(one, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(cfg: Optim, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled weight decay, schedule; of sgd the decay comes before the momentum."""
    clip = [optax.clip_by_global_norm(cfg.clip_norm)] if cfg.clip_norm else []
    decay = [_weight_decay(cfg.weight_decay)] if cfg.weight_decay else []
    if cfg.name == "sgd":
        parts = [*decay, optax.trace(cfg.betas[0], nesterov=True)]
    else:
        parts = [optax.scale_by_adam(b1=cfg.betas[0], b2=cfg.betas[1], eps=cfg.eps), *decay]
    return optax.chain(*clip, *parts, optax.scale_by_learning_rate(make_schedule(cfg, steps)))


# ---------------------------------------------------------------- state and step


def init(cfg: TrainConfig, key: jax.Array) -> TrainState:
    """The state of a new run: the single description of what a checkpoint holds."""
    file = _file(cfg.model)
    model_key, run_key = jax.random.split(key)
    # astype drops JAX's weak types, which would be gone after the first step and make the second compile anew
    model = jax.tree.map(lambda x: x.astype(x.dtype), file.init(cfg.model, model_key))
    tx = make_optimizer(cfg.optim, cfg.steps)
    opt_state = file.init_opt(tx, model) if hasattr(file, "init_opt") else tx.init(model)
    ema = None if cfg.ema_decay is None else jax.tree.map(jnp.copy, averaged_part(model))
    return TrainState(jnp.zeros((), jnp.int32), model, opt_state, run_key, ema)


def averaged_part(model):
    """What the moving average covers: the generator of a two-player model, else the model."""
    return getattr(model, "generator", model)


def with_averaged(model, ema):
    """The model with its averaged part replaced by `ema`; the model itself if `ema` is None."""
    if ema is None:
        return model
    if not hasattr(model, "generator"):
        return ema
    leaves, tree = jax.tree.flatten(model)
    model = jax.tree.unflatten(tree, leaves)
    model.generator = ema
    return model


def make_step(cfg: TrainConfig):
    """The compiled update `step(state, batches) -> (state, metrics)`; the state is donated.

    `batches` is a tuple of `cfg.accumulation` dicts of global arrays. Metrics are float32 scalars: loss, lr,
    grad_norm (before clipping; two-player models have one of each player in their aux), weight_norm (of all weights
    after the update) and the means of the model's aux sums.
    """
    file = _file(cfg.model)
    tx = make_optimizer(cfg.optim, cfg.steps)
    schedule = make_schedule(cfg.optim, cfg.steps)

    def part(model, batch, key):
        def total(model):
            loss, count, aux = file.loss(model, cfg.model, batch, key)
            return loss, (count, aux)

        (loss, (count, aux)), grads = jax.value_and_grad(total, has_aux=True)(model)
        return grads, (loss, count, aux)

    def gradients(model, batches, key):
        if len(batches) == 1:
            return part(model, batches[0], key)
        stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *batches)
        keys = jax.random.split(key, len(batches))
        first = jax.eval_shape(part, model, batches[0], key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=_spec(x)), first)

        def body(sums, inputs):
            return jax.tree.map(jnp.add, sums, part(model, *inputs)), None

        return jax.lax.scan(body, zeros, (stacked, keys))[0]

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batches: tuple[dict[str, jax.Array], ...]):
        key = jax.random.fold_in(state.key, state.step)
        out = {"lr": jnp.asarray(schedule(state.step), jnp.float32)}
        if hasattr(file, "train_step"):
            model, opt_state, aux = file.train_step(
                state.model, state.opt_state, tx, cfg.model, batches[0], key, state.step
            )
        else:
            grads, (loss, count, aux) = gradients(state.model, batches, key)
            scale = 1.0 / jnp.maximum(count, 1.0)
            grads = jax.tree.map(lambda g: g * scale, grads)
            updates, opt_state = tx.update(grads, state.opt_state, state.model)
            model = optax.apply_updates(state.model, updates)
            out |= {"loss": loss * scale, "grad_norm": optax.tree.norm(grads)}
        out |= _means(aux) | {"weight_norm": optax.tree.norm(model)}
        ema = state.ema
        if ema is not None:
            done = state.step.astype(jnp.float32)
            decay = jnp.minimum(cfg.ema_decay, (1.0 + done) / (10.0 + done))  # follows closely at the start
            ema = jax.tree.map(lambda e, x: e + (1.0 - decay) * (x - e), ema, averaged_part(model))
        return TrainState(state.step + 1, model, opt_state, state.key, ema), out

    return step


def _spec(x) -> jax.sharding.PartitionSpec:
    found = getattr(x, "sharding", None)
    return jax.sharding.PartitionSpec() if found is None else found.spec


def _means(aux: dict) -> dict[str, jax.Array]:
    return {name: total / jnp.maximum(count, 1e-9) for name, (total, count) in aux.items()}


def make_eval(cfg: TrainConfig):
    """The compiled evaluation `(model, ema, batch, key) -> {name: (sum, count)}`, of `ema` if any."""
    file = _file(cfg.model)

    @jax.jit
    def evaluate(model, ema, batch, key):
        loss, count, aux = file.loss(with_averaged(model, ema), cfg.model, batch, key)
        return {"loss": (loss, count)} | aux

    return evaluate


def step_flops(cfg: TrainConfig, state: TrainState, batches: tuple[dict[str, jax.Array], ...]) -> float:
    """Floating-point operations that a step needs on all devices: the numerator of the MFU; nothing is run.

    Three times the forward pass, for its products and the two of the backward pass of each; what rematerialisation
    computes again is not counted. The forward pass is `forward_flops` of the model file, which counts full rows and of
    causal attention the allowed half; of a model file without one it is the traced loss (`metrics.flops`), and of a
    two-player model the step as it is.
    """
    file = _file(cfg.model)
    if hasattr(file, "forward_flops"):
        return 3 * file.forward_flops(cfg.model, cfg.data.batch_size, cfg.data.num_tokens)
    if hasattr(file, "train_step"):
        return metrics.flops(make_step(cfg), state, batches)
    forward = lambda model, batch: file.loss(model, cfg.model, batch, state.key)[0]
    return 3 * len(batches) * metrics.flops(forward, state.model, batches[0])


def _split(batch: dict, parts: int) -> tuple[dict, ...]:
    """A host batch as `parts` batches of every parts-th row, each put on the mesh."""
    return tuple(sharding.put({k: v[i::parts] for k, v in batch.items()}) for i in range(parts))


# ---------------------------------------------------------------- start


def start(cfg: TrainConfig, checkpoints: checkpoint.Checkpoints, data) -> tuple[int, TrainState]:
    """The state to begin with, and its step; says in one line where it comes from.

    Args:
        cfg: the run.
        checkpoints: of its working directory.
        data: the Grain iterator, moved to the position of the checkpoint if there is one.

    Raises:
        ValueError: if no checkpoint can be read though some exist, or `cfg.init_from` does not fit (`initialized`).
    """
    make = functools.partial(init, cfg)
    key = jax.random.key(cfg.seed)
    restored = checkpoints.restore(checkpoint.abstract(make, key), data)
    if restored is not None:
        _say(f"start: checkpoint of step {restored[0]}")
        return restored
    state = jax.jit(make)(key)
    if jax.process_index() == 0:
        config_lib.write_json(checkpoints.folder.parent / STARTED_FROM, origin(cfg))
    if cfg.init_from is None:
        _say("start: random weights")
        return 0, state
    model = initialized(state.model, cfg)
    ema = None if state.ema is None else jax.tree.map(jnp.copy, averaged_part(model))
    return 0, dataclasses.replace(state, model=model, ema=ema)


def origin(cfg: TrainConfig) -> dict:
    """Source, checksum and licence of the public weights behind `cfg.init_from`, as far as it states them."""
    if cfg.init_from is None:
        return {}
    folder = Path(cfg.init_from)
    if _is_model(folder):
        stated = checkpoint.read_config(folder).get("provenance", {})
        own = stated.get(cfg.component)
        found = stated | (own if isinstance(own, dict) else {})
    else:
        path = folder / STARTED_FROM
        found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return {key: found[key] for key in ("source", "sha256", "is", "licence", "licences") if key in found}


def _is_model(folder: Path) -> bool:
    path = folder / "config.json"
    return path.exists() and "components" in json.loads(path.read_text())


def initialized(model, cfg: TrainConfig):
    """The model with the weights of `cfg.init_from`; parts that are not there keep their random start. Says so.

    A model folder gives its component, and to a two-player vocoder also the component "discriminators" of converted
    public weights, if it is of the same model file.

    Raises:
        ValueError: if the folder is neither a model folder nor a run, or its weights do not fit `cfg.model`.
    """
    folder, own, second = Path(cfg.init_from), checkpoint.named_arrays(model), {}
    is_second = lambda name: name.startswith("discriminators.")  # of the second player
    has_second = any(map(is_second, own))
    if _is_model(folder):
        values = checkpoint.read_config(folder)["components"]
        if cfg.component not in values:
            raise ValueError(
                f"{folder} has no component {cfg.component!r}; it has {', '.join(sorted(values))}"
            )
        if (theirs := values[cfg.component]["module"]) != cfg.module:
            raise ValueError(
                f"the {cfg.component} in {folder} is a {theirs}, this run trains a {cfg.module}: two networks, whose "
                "weights do not fit each other; start from a folder with the same one (docs/public_weights.md)"
            )
        arrays = checkpoint.component_arrays(folder, values[cfg.component])
        entry = values.get("discriminators", {})
        if has_second and entry.get("module") == cfg.module:
            read = checkpoint.component_arrays(folder, entry)
            second = {f"discriminators.{name}": x for name, x in read.items()}
    else:
        arrays = checkpoint.load_weights(folder)
    prefix = "generator." if hasattr(model, "generator") else ""
    if set(arrays) != set(own):
        arrays = {k.removeprefix(prefix): x for k, x in arrays.items() if not is_second(k)}
        public = jax.eval_shape(lambda m: checkpoint.public_part(m, cfg.model)[0], model)
        wanted = checkpoint.named_arrays(public)
        arrays = {k: x for k, x in arrays.items() if k in wanted or prefix + k not in own}
        checkpoint.fill(public, arrays, str(folder))  # one error with all names, before anything is replaced
        arrays = {prefix + k: x for k, x in arrays.items()} | second
    model = checkpoint.fill(model, own | arrays, str(folder))
    players = ""
    if has_second:
        players = ", both players" if any(map(is_second, arrays)) else "; the discriminators start at random"
    _say(f"start: weights of {folder}{players}")
    return model


def check_same_run(cfg: TrainConfig, workdir: Path) -> None:
    """Writes `workdir/config.json`, or compares with the one there.

    Raises:
        ValueError: naming the fields that differ from the run in `workdir` and must not: those of model and data,
            the component, the seed, and whether weights are averaged (ema_decay set or None).
    """
    path = workdir / "config.json"
    new = {"module": cfg.module} | config_lib.to_dict(cfg)
    if path.exists() and checkpoint.steps(workdir / "checkpoints"):
        lines = config_lib.differences(json.loads(path.read_text()), new)
        fixed = ("model.", "data.", "module:", "component:", "ema_decay:", "seed:")
        # one end of ema_decay being null changes the tree of the state; other values are free
        wrong = [x for x in lines if x.startswith(fixed) and not x.split(":")[0].startswith(_FREE_ON_RESUME)]
        wrong = [x for x in wrong if not (x.startswith("ema_decay:") and "None" not in x)]
        wrong = [x for x in wrong if ": (absent) -> " not in x]  # a setting that is newer than the run
        if wrong:
            raise ValueError(
                f"{workdir} holds a run with another config: {'; '.join(wrong)}; use another --workdir"
            )
        if lines:
            _say(f"changed since the run began: {'; '.join(lines)}")
    if jax.process_index() == 0:
        config_lib.write_json(path, new)


def check_text_ids(cfg: TrainConfig) -> None:
    """Compares the text ids of the features with the text table of a language model.

    Features say which tokenizer made them; of sets that do not, the first 100 records are read, which shows ids
    that are too large and nothing else.

    Raises:
        ValueError: if the recorded vocabulary is not the table's size, or an id is beyond the table.
    """
    rows = cfg.model.text_vocab
    way_out = (
        "make them again with data/add_features.py --text-tokenizer (mini, or the folder of a Qwen tokenizer)"
    )
    for folder in cfg.data.data_dirs:
        if made := shards.made_with(folder):
            if made["vocab_size"] != rows:
                raise ValueError(
                    f"text ids of {folder} are of the tokenizer {made['name']!r} with {made['vocab_size']} symbols, "
                    f"model.text_vocab is {rows}; {way_out}"
                )
            continue
        own = dataclasses.replace(cfg.data, data_dirs=(folder,))
        records = shards.Records(own, ("text_ids",))
        greatest = max(
            (int(records[i]["text_ids"].max(initial=0)) for i in range(min(100, len(records)))), default=0
        )
        if greatest >= rows:
            raise ValueError(
                f"{folder} has the text id {greatest}, model.text_vocab is {rows}: the ids are of another tokenizer; "
                f"{way_out}"
            )


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)


# ---------------------------------------------------------------- the loop


class _Stop:
    """Why the run should end, set by SIGTERM, Ctrl-C or the clock; a Ctrl-C after a signal ends it at once.

    A second SIGTERM changes nothing: where a machine is taken away it may come from the system and from a launcher.
    """

    def __init__(self, max_seconds: float | None):
        self.reason: str | None = None
        self.is_signal = False  # on some host: there may be no time for more than a checkpoint
        self._end = None if max_seconds is None else time.monotonic() + max_seconds
        self.saves = False
        self._signal, self._gathered, self._old = None, None, {}

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._old[number] = signal.signal(number, self._handle)
            except ValueError:  # not in the main thread: the caller handles signals
                pass
        return self

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number, _frame):
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = self._signal or signal.Signals(number).name

    def due(self, step: int, is_old: bool = False) -> bool:
        """Whether to end before step `step + 1`; `saves` is set where the checkpoint is too old on some host.

        The same answers on every host, which several give one step late: they then wait for a gathering that the
        devices did before the last step, and not for that step.
        """
        is_late = self._end is not None and time.monotonic() > self._end
        self.reason = self.reason or self._signal or ("max_seconds" if is_late else None)
        wish = 3 if self._signal else 2 if is_late else int(is_old)
        if jax.process_count() > 1:
            before, self._gathered = self._gathered, sharding.greatest(wish)
            if jax.default_backend() == "cpu":
                jax.block_until_ready(self._gathered)
            wish = int(self._gathered if before is None else before)
            if wish >= 2 and self.reason is None:
                self.reason = "another host stopped"
        self.saves, self.is_signal = wish == 1, wish == 3
        return wish >= 2

    def saved(self) -> None:
        """Call after a save, which all hosts do at the same step: what was gathered before it no longer holds."""
        self._gathered = None


def train(cfg: TrainConfig, workdir: str | Path, export: str | Path | None = None) -> TrainState:
    """Runs or resumes a training and exports the weights at its end; after a signal only a checkpoint is written.

    Args:
        cfg: the run.
        workdir: its folder: config.json, metrics.jsonl, checkpoints/.
        export: model folder to write the (averaged) weights into; `workdir/export` if None.

    Returns:
        The last state.

    Raises:
        ValueError: if the folder holds another run, or the data or `listen_with` does not fit.
        OSError: if a checkpoint cannot be written; those before it stay.
        FloatingPointError: if the loss, a gradient or a weight is not finite; the last good checkpoint stays.
    """
    if "://" in str(workdir):
        raise ValueError(
            f"--workdir {workdir} is no folder: mount the bucket (launch/README.md) and name a folder in it"
        )
    workdir = Path(workdir)
    fit = fitted(cfg, jax.device_count(), sharding.num_slices(jax.devices()))
    sharding.make_mesh(fit.mesh.slice, fit.mesh.data, fit.mesh.model)
    check_same_run(cfg, workdir)
    cfg = fit
    hosts = (jax.process_index(), jax.process_count(), row_shares(cfg))
    if cfg.data.stage == "speaker":
        found = len(input_pipeline.speakers(cfg.data))
        if found > cfg.model.num_speakers:
            raise ValueError(
                f"the training split has {found} speakers, model.num_speakers is {cfg.model.num_speakers}; "
                f"add --set model.num_speakers={found}"
            )
    if cfg.data.stage == "lm":
        check_text_ids(cfg)
    data = iter(input_pipeline.make(cfg.data, *hosts))
    atexit.register(data.close)  # after an error too
    held_out = []
    if cfg.eval_batches:
        own = input_pipeline.held_out(cfg.data, cfg.eval_split)
        held_out = input_pipeline.first_batches(own, cfg.eval_batches, *hosts)
    checkpoints = checkpoint.Checkpoints(workdir, cfg.keep, cfg.keep_every)
    step, state = start(cfg, checkpoints, data)
    # all hosts make the samples or none, wherever the package is missing
    has_events = cfg.tensorboard and not int(sharding.greatest(int(not metrics.has_tensorboard())))
    writer = metrics.Writer(workdir, step, has_events)
    sampler = None
    if has_events and held_out:
        sampler = samples.Sampler(cfg.model, cfg.data, held_out[0], cfg.listen_with, cfg.seed)
    num_params = sum(x.size for x in jax.tree.leaves(state.model))
    mesh, rows = "x".join(map(str, dataclasses.astuple(cfg.mesh))), cfg.data.batch_size
    more = f" and {empty} empty ones" if (empty := -rows % row_shares(cfg)) else ""
    more += f" in {cfg.accumulation} parts" if cfg.accumulation > 1 else ""
    _say(
        f"{cfg.component} ({cfg.module}): {num_params / 1e6:.2f} M parameters, {jax.device_count()} devices, "
        f"mesh {mesh}, {rows} rows{more}"
    )
    update, evaluate = make_step(cfg), make_eval(cfg)
    timer, waited_s, previous = metrics.StepTimer(), [], None
    is_cpu = jax.default_backend() == "cpu"
    peak = 1e12 * cfg.peak_tflops if cfg.peak_tflops else metrics.peak_flops(jax.devices()[0])
    flops = 0.0  # of a step, where the peak is known
    saved_step, saved_at = step, time.monotonic()

    def finish(number: int, out: dict, wait_s: float) -> None:
        """Waits for a step, checks it, and writes it if due; `wait_s` is how long it waited for its batch."""
        waited_s.append(wait_s)
        values = {k: float(v) for k, v in jax.device_get(out).items()}
        timer.tick()
        # the norms too: an update may break weights that the loss of its own step has not met
        norms = {k: v for k, v in values.items() if k.endswith("norm")}
        if not all(map(math.isfinite, (values["loss"], *norms.values()))):
            told = "".join(f", {k} {v:.6g}" for k, v in norms.items())
            raise FloatingPointError(
                f"step {number}: loss {values['loss']}, learning rate {values['lr']:.3g}{told}: not finite; "
                f"lower optim.lr or optim.clip_norm; the checkpoint of step {saved_step} is kept"
            )
        if number % cfg.log_every and number != cfg.steps:
            return
        line = {f"train/{k}": v for k, v in values.items()}
        line["data/wait_s"] = sum(waited_s) / len(waited_s)
        waited_s.clear()
        step_s, speed = timer.take(), ""
        if step_s:
            line |= {"perf/step_s": step_s, f"perf/{cfg.data.item}_per_s": cfg.data.items_per_batch / step_s}
            left_h = (cfg.steps - number) * step_s / 3600
            speed = f", {cfg.data.items_per_batch / step_s:.0f} {cfg.data.item}/s"
            if flops:
                line["perf/mfu"] = flops / (step_s * peak * sharding.ensure_mesh().size)
                speed += f", MFU {100 * line['perf/mfu']:.3g} %"
            speed += f", {left_h:.2f} h left"
        elif timer.compile_s:
            line["perf/compile_s"] = timer.compile_s
        writer.write(number, line)
        _say(f"step {number}/{cfg.steps}, loss {values['loss']:.4f}{speed}")

    def flush() -> None:
        nonlocal previous
        if previous is not None:
            finish(*previous)
        previous = None

    def measure(number: int) -> None:
        """Held-out loss and aux of the averaged weights, same batches and keys every time."""
        sums: dict[str, list[float]] = {}
        for i, batch in enumerate(held_out):
            key = jax.random.fold_in(jax.random.key(cfg.seed), i)
            parts = _split(batch, cfg.accumulation)  # what fits into a step fits here
            keys = [key] if len(parts) == 1 else jax.random.split(key, len(parts))
            for part, own in zip(parts, keys, strict=True):
                out = jax.device_get(evaluate(state.model, state.ema, part, own))
                for name, (total, count) in out.items():
                    old = sums.get(name, [0.0, 0.0])
                    sums[name] = [old[0] + float(total), old[1] + float(count)]
        # a mean over nothing, as of rows with a prompt where none has one, is left out
        means = {f"eval/{name}": total / count for name, (total, count) in sums.items() if count}
        writer.write(number, means)
        _say(f"step {number}, held out: " + ", ".join(f"{k[5:]} {v:.4f}" for k, v in means.items()))
        for sample in sampler(with_averaged(state.model, state.ema)) if sampler is not None else ():
            writer.show(number, sample.name, sample.png, sample.wav, sample.sample_rate, sample.duration_s)
        timer.pause()

    def save(wait: bool = False) -> None:
        nonlocal saved_step, saved_at
        checkpoints.save(step, state, data, wait)
        saved_step, saved_at = step, time.monotonic()
        timer.pause()

    # Order, not to be changed: save, next batch, step, metrics of the step before, evaluation. The data
    # iterator moves only after the save, so that its saved position belongs to the saved state.
    measured_step = -1
    with _Stop(cfg.max_seconds) as stop:
        while step < cfg.steps and not stop.due(step, time.monotonic() - saved_at > 60 * cfg.save_minutes):
            if step > saved_step and (step % cfg.save_every == 0 or stop.saves):
                flush()  # never save what has not been seen to be finite
                save()
                stop.saved()
            before = time.perf_counter()
            batch = next(data)
            wait_s = time.perf_counter() - before
            batches = _split(batch, cfg.accumulation)
            if peak and not flops:
                flops = step_flops(cfg, state, batches)
            state, out = update(state, batches)
            step += 1
            if previous is not None:
                finish(*previous)
            previous = (step, out, wait_s)
            # queued programs of fake CPU devices deadlock, so one step is in flight there, elsewhere two
            if is_cpu:
                jax.block_until_ready((state, out))
            if held_out and step % cfg.eval_every == 0:
                flush()
                measure(step)
                measured_step = step
        flush()
        if step > saved_step:
            save(wait=True)
        checkpoints.close()
        folder = Path(export) if export is not None else workdir / "export"
        if stop.is_signal:
            ending = "the same command goes on; with --set=max_seconds=0 it evaluates and exports"
        else:
            if held_out and measured_step != step:
                measure(step)
            begun = workdir / STARTED_FROM
            # runs of older versions have no such file
            made_from = json.loads(begun.read_text("utf-8")) if begun.is_file() else origin(cfg)
            export_state(cfg, state, folder, step, made_from)
            ending = f"weights in {folder}"
        writer.close()
        data.close()
        atexit.unregister(data.close)
        _say(f"stopped at step {step} ({stop.reason or 'all steps done'}); {ending}")
    return state


def export_state(cfg: TrainConfig, state: TrainState, folder: Path, step: int, made_from: dict) -> Path:
    """Writes the (averaged) weights of a state as one component of a model folder.

    A model file with `calibrate` (batch-norm statistics) first sees the first training batches once more.

    Args:
        cfg: the run.
        state: its last state.
        folder: model folder, made if absent; other components in it stay.
        step: updates done, for the provenance.
        made_from: `origin` of the run's first weights, for the provenance.

    Returns:
        The path of the weight file.

    Raises:
        ValueError: if a weight is not finite in `cfg.export_dtype`.
    """
    file, model = _file(cfg.model), with_averaged(state.model, state.ema)
    if hasattr(file, "calibrate"):
        batches = input_pipeline.first_batches(
            cfg.data, _CALIBRATION, jax.process_index(), jax.process_count(), row_shares(cfg)
        )
        model = file.calibrate(model, cfg.model, map(sharding.put, batches))
    profile = {"mel_profile": cfg.data.mel_profile} if cfg.component in ("flow", "vocoder") else {}
    made = {"steps": step, "data": cfg.data_note, "averaged": state.ema is not None} | made_from
    return checkpoint.export_component(
        folder, cfg.component, model, cfg.model, cfg.export_dtype, **profile, provenance={cfg.component: made}
    )  # fmt: skip


def parse(arguments: list[str] | None = None) -> tuple[TrainConfig, argparse.Namespace]:
    """Command line to config.

    Raises:
        ValueError: as `config.load` and `config.override`.
        SystemExit: of argparse, on an unknown option.
    """
    parser = argparse.ArgumentParser(prog="python -m deepasmr_jax.train", description="Train one model.")
    parser.add_argument("--config", required=True, help="configs/NAME.py or configs/NAME.py:STAGE")
    parser.add_argument("--workdir", required=True, help="folder of the run; the same folder resumes it")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="change one field")
    parser.add_argument("--export", help="model folder for the weights at the end (default: WORKDIR/export)")
    parser.add_argument(
        "--stopped-exit", type=int, default=0, metavar="CODE",
        help="exit code of a run that was stopped before its last step, for schedulers that then start it again",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    return config_lib.override(config_lib.load(options.config), *options.set), options


def main(arguments: list[str] | None = None) -> None:
    """Entry point: joins the hosts, reads the config, trains.

    Raises:
        SystemExit: after one sentence, with HOPELESS_EXIT on a ValueError or a loss that is not finite, with 1 on an
            OSError; with `--stopped-exit` after a run that was stopped, without it 130 if that was before the first
            step, or by a second Ctrl-C.
    """
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads absl flags
    options, before = None, signal.getsignal(signal.SIGTERM)
    try:
        cfg, options = parse(arguments)
        _end_at_sigterm()
        sharding.start_hosts()
        _end_at_sigterm()  # where hosts were joined, JAX has a handler that only notes it
        state = train(cfg, options.workdir, options.export)
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # Ctrl-C has ended a program that reads the lines, too
            print(
                "stopped at once; the same command goes on from the newest checkpoint, if there is one",
                flush=True,
            )
        raise SystemExit((options and options.stopped_exit) or 130) from None
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1 if isinstance(error, OSError) else HOPELESS_EXIT) from error
    finally:
        with contextlib.suppress(
            ValueError, TypeError
        ):  # not in the main thread; a handler that is not Python's
            signal.signal(signal.SIGTERM, before)
    if int(state.step) < cfg.steps and options.stopped_exit:
        raise SystemExit(options.stopped_exit)


def _end_at_sigterm() -> None:
    """Until the loop has its own handler, SIGTERM is a Ctrl-C: there is nothing to save."""
    with contextlib.suppress(ValueError):  # not in the main thread: the caller handles signals
        signal.signal(signal.SIGTERM, signal.default_int_handler)


if __name__ == "__main__":
    main()
