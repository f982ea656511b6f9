"""Plan before you rent: memory, FLOPs, traffic and the time they allow, of a step on chips that are not there.

The true program is compiled ahead of time for a named TPU topology (the `libtpu` package brings the compiler; no
TPU is needed) or for this machine, of which GPUs have a bound too (`metrics.CHIPS`). What it does is counted from its
text (`hlo.py`), what it needs is given by the compiler, and what the model needs by the formulas of `lm` and `flow`.
The largest of FLOPs over peak, HBM bytes over bandwidth and received bytes over interconnect bandwidth is a bound: the
step takes at least that long. These are bounds from a compiler, not measurements; a chip reaches less.

Programs: the train step of a config, or (`sample`) one batch of sampling with its model: `decoding.generate` on a text
of 64 symbols, a prompt of 128 speech tokens and 512 new ones, `flow.sample` of 1024 tokens with 10 guided steps.
Letters: B rows, N positions, L layers, D width, F MLP width, H heads, K key/value heads, E head size, V speech rows.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import math
import os
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from deepasmr_jax import (
    audio,
    checkpoint,
    decoding,
    files,
    flow,
    hlo,
    input_pipeline,
    lm,
    metrics,
    sharding,
    train,
)
from deepasmr_jax import config as config_lib

SAMPLE_TEXT, SAMPLE_PROMPT, SAMPLE_NEW = 64, 128, 512  # LM: 20 s of speech after a prompt of 5 s
SAMPLE_TOKENS, SAMPLE_STEPS, SAMPLE_GUIDANCE = 1024, 10, 0.7  # flow: 41 s, prompt included
# share of speech in the positions of the language model, the rest being text: the estimate in configs/lm_asmr.py
LM_SPEECH = 9 / 11


@dataclasses.dataclass(frozen=True)
class Slices:
    """How slices of one kind of TPU are wired.

    kind: its name in JAX, as in `metrics.CHIPS`. shapes: topology of a slice by its number of chips. wraps: an axis
    closes to a ring if it is this long (2-d) or every axis is a multiple of it (3-d). options: for the topology.
    """

    kind: str
    shapes: dict[int, str]
    wraps: int
    options: dict = dataclasses.field(default_factory=dict)


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")


def _shapes(names: tuple[str, ...]) -> dict[int, str]:
    return {math.prod(map(int, name.split("x"))): name for name in names}


# Source: the pages named at `metrics.CHIPS`. A 2-d slice closes to a ring on an axis of 16, a 3-d one if it is made of
# whole cubes of 4x4x4
SLICES = {
    "v4": Slices("TPU v4", _shapes(_CUBES), 4, {"chip_config_name": "megacore"}),
    "v5e": Slices("TPU v5 lite", _shapes(_FLAT), 16),
    "v5p": Slices("TPU v5", _shapes(_CUBES), 4),
    "v6e": Slices("TPU v6 lite", _shapes(_FLAT), 16),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a program is to run.

    kind: the chips' name in JAX. slices: their name in SLICES; None is this machine. shape: how TPUs are wired.
    """

    name: str
    kind: str
    chips: int
    slices: str | None = None
    shape: str = ""

    @property
    def chip(self) -> metrics.Chip | None:
        """What one chip reaches; None if it is not in the table, such as a CPU."""
        return metrics.chip(self.kind)

    @property
    def links(self) -> int:
        """Interconnect links of the chip that has the fewest: one in the corner, where the slice is no torus."""
        if not self.shape:
            return 1  # a GPU: all of its links count as one (`target` gives every TPU a shape)
        sizes = [int(n) for n in self.shape.split("x")]
        wraps = next(s.wraps for s in SLICES.values() if s.kind == self.kind)
        if len(sizes) == 3:
            is_ring = [all(n % wraps == 0 for n in sizes)] * 3
        else:
            is_ring = [n == wraps for n in sizes]
        return sum(0 if n == 1 else 2 if ring else 1 for n, ring in zip(sizes, is_ring, strict=True))


def target(name: str) -> Target:
    """The target of a name: KIND-CHIPS, such as v5e-8 (chips are counted, also where a cloud counts cores), or local.

    Raises:
        ValueError: on an unknown kind or a number of chips that no slice has.
    """
    if name == "local":
        kind, count = jax.local_devices()[0].device_kind, jax.local_device_count()
        shapes = next((s.shapes for s in SLICES.values() if s.kind == kind), {count: ""})
        if count not in shapes:
            raise ValueError(
                f"this machine has {count} chips of {kind}, which is no slice; name one, such as v5e-8"
            )
        return Target(name, kind, count, shape=shapes[count])
    kind, _, count = name.partition("-")
    if kind not in SLICES:
        raise ValueError(
            f"target {name!r} is unknown; use local, or one of {', '.join(SLICES)} with chips: v5e-8"
        )
    shapes = SLICES[kind].shapes
    if not count.isdigit() or int(count) not in shapes:
        raise ValueError(
            f"target {name!r}: a {kind} slice has {', '.join(map(str, shapes))} chips; write {kind}-8"
        )
    return Target(name, SLICES[kind].kind, int(count), kind, shapes[int(count)])


def devices(where: Target) -> list:
    """The devices of a target, for the compiler only unless it is this machine.

    Raises:
        ValueError: if libtpu is not installed or does not know the topology.
    """
    if where.slices is None:
        return jax.devices()
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"a plan for {where.name} needs the TPU compiler: pip install 'deepasmr_jax[plan]', or plan for local"
        ) from None
    # no TPU is looked for, and two plans may run at a time
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    from jax.experimental import topologies

    options = dict(SLICES[where.slices].options)
    if where.chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{where.slices}:{where.shape}", **options
        )
    except Exception as error:  # of the plug-in, of several types
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"libtpu has no topology {where.slices}:{where.shape}: {first}") from error
    return list(found.devices)


# ---------------------------------------------------------------- what a model needs


def needed_flops(cfg, num_rows: int, num_tokens: int, sample: bool) -> float:
    """FLOPs that a train step needs (as `train.step_flops`), or a batch of sampling.

    Args:
        cfg: Config of lm or flow.
        num_rows: B.
        num_tokens: positions of a row (lm), speech tokens (flow); of a train step.
        sample: whether it is sampling.

    Raises:
        ValueError: on the Config of another model.
    """
    if not isinstance(cfg, lm.Config | flow.Config):
        raise ValueError(f"no formula for a {type(cfg).__module__} model; plan the configs of lm and flow")
    forward = lm.forward_flops if isinstance(cfg, lm.Config) else flow.forward_flops
    if not sample:
        return 3 * forward(cfg, num_rows, num_tokens)
    if isinstance(cfg, flow.Config):
        return 2 * SAMPLE_STEPS * forward(cfg, num_rows, SAMPLE_TOKENS)
    heads = cfg.num_heads * cfg.head_dim
    prompt = SAMPLE_TEXT + SAMPLE_PROMPT + 2
    head = 2.0 * num_rows * cfg.width * cfg.num_speech_rows
    start = forward(cfg, num_rows, prompt) - (prompt - 1) * head
    one = (forward(cfg, num_rows, 1) - 4.0 * num_rows * cfg.num_layers * heads) * SAMPLE_NEW
    pairs = SAMPLE_NEW * prompt + SAMPLE_NEW * (SAMPLE_NEW + 1) / 2
    return start + one + 4.0 * num_rows * cfg.num_layers * heads * pairs


# ---------------------------------------------------------------- programs


def _abstract(shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """An array split over its first axis, on the current mesh."""
    split = sharding.spec("batch", *[None] * (len(shape) - 1))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(sharding.ensure_mesh(), split))


def batch(data: input_pipeline.Config, num_rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch of the stages lm and flow, on the current mesh; keys as in input_pipeline.py.

    Raises:
        ValueError: on another stage.
    """
    if data.stage not in ("lm", "flow"):
        raise ValueError(f"no plan for the stage {data.stage!r}; plan the configs of lm and flow")
    spec = input_pipeline.row_spec(data)
    return {name: _abstract((num_rows, *shape), dtype) for name, (shape, dtype) in spec.items()}


def _lower(cfg: train.TrainConfig, num_rows: int, sample: bool):
    """The traced program, for the devices of the current mesh."""
    # the key is made inside: an array cannot be made on devices that are not there
    if not sample:
        # the rate is a few scalars: with one of one kind, fine-tuning is the program of pre-training
        rate = dataclasses.replace(cfg.optim, lr=1e-4, schedule="constant", warmup_steps=1)
        cfg = dataclasses.replace(cfg, optim=rate)
        state = checkpoint.abstract(lambda: train.init(cfg, jax.random.key(cfg.seed)))
        parts = cfg.accumulation
        return train.make_step(cfg).lower(state, (batch(cfg.data, num_rows // parts),) * parts)
    model_cfg = cfg.model
    file = checkpoint.model_file(cfg.module)
    model = checkpoint.abstract(lambda: file.init(model_cfg, jax.random.key(0)))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_rows))
    keys = _abstract(keys.shape, keys.dtype)
    count = _abstract((num_rows,), jnp.int32)
    if isinstance(model_cfg, lm.Config):
        weights = checkpoint.abstract(lambda m: decoding.unstack(m, model_cfg), model)
        text, prompt = (_abstract((num_rows, n), jnp.int32) for n in (SAMPLE_TEXT, SAMPLE_PROMPT))
        call = lambda weights, *x: decoding.generate(weights, model_cfg, decoding.Sampling(), *x, SAMPLE_NEW)
        return jax.jit(call).lower(weights, text, count, prompt, count, count, count, keys)
    frames = flow.num_frames(model_cfg, SAMPLE_TOKENS)
    mel = _abstract((num_rows, frames, model_cfg.mel_bins), jnp.float32)
    tokens = _abstract((num_rows, SAMPLE_TOKENS), jnp.int32)
    call = lambda model, *x: flow.sample(model, model_cfg, *x, SAMPLE_STEPS, SAMPLE_GUIDANCE)
    return jax.jit(call).lower(model, tokens, count, mel, count, keys)


def fitted(
    cfg: train.TrainConfig, where: Target, rows: int | None, sample: bool, accumulation: int = 1
) -> train.TrainConfig:
    """The config on the mesh of a target, as `train.fitted` fits one with mesh.slice -1.

    For sampling the weights are whole on every chip.

    Args:
        cfg: the run.
        where: the target.
        rows: rows of a chip; None shares out the config's batch.
        sample: whether it is for sampling.
        accumulation: parts of a batch.

    Raises:
        ValueError: if the chips are not divided.
    """
    mesh = train.Mesh(slice=-1, data=1 if sample else cfg.mesh.data, model=cfg.mesh.model)
    total = cfg.data.batch_size if rows is None else rows * (where.chips // mesh.model)
    data = dataclasses.replace(cfg.data, batch_size=total)
    cfg = dataclasses.replace(cfg, accumulation=1 if sample else accumulation, mesh=mesh, data=data)
    return train.fitted(cfg, where.chips)


def settings(fit: train.TrainConfig) -> str:
    """The options of training that make it the planned step."""
    sizes = [f"mesh.{axis}={size}" for axis, size in dataclasses.asdict(fit.mesh).items()]
    sizes += [f"data.batch_size={fit.data.batch_size}", f"accumulation={fit.accumulation}"]
    return " ".join(f"--set={size}" for size in sizes)


# ---------------------------------------------------------------- the plan


def make(
    cfg: train.TrainConfig,
    where: Target,
    rows: int | None = None,
    sample: bool = False,
    folder: str | os.PathLike | None = None,
    accumulation: int = 1,
) -> dict:
    """Compiles one program for one target and counts what it does.

    Args:
        cfg: the run whose step, or whose model's sampling, is planned.
        where: the target.
        rows: rows of a chip; None shares out the config's batch.
        sample: plan sampling in place of training.
        folder: keeps the text of what was compiled, so that it is compiled once; None keeps nothing.
        accumulation: parts of a batch of a train step.

    Returns:
        facts of one chip as plain numbers; see `HEAD` for what is printed. Where a program does not fit into the
        memory, `error` says so in place of the facts.

    Raises:
        ValueError: as `devices`, `fitted` and `batch`.
    """
    fit = fitted(cfg, where, rows, sample, accumulation)
    num_rows = fit.data.batch_size
    out = {
        "target": where.name,
        "kind": where.kind,
        "chips": where.chips,
        "mesh": "x".join(map(str, dataclasses.astuple(fit.mesh))),
    }
    out["rows"] = num_rows / (where.chips // fit.mesh.model)
    if not sample:
        out["settings"] = settings(fit)
    needed = needed_flops(fit.model, num_rows, fit.data.num_tokens, sample) / where.chips
    program = _program(fit, where, sample, folder)
    if "error" in program:
        return out | {"error": program["error"]}
    is_decoding = sample and isinstance(fit.model, lm.Config)  # its one open loop runs to the last token
    cost = hlo.count(program["hlo"], SAMPLE_NEW if is_decoding else 1)
    out |= facts(fit, where, cost, needed, program, sample)
    if "bound_s" in out and not sample:
        out |= days(cfg, num_rows, out["bound_s"])
    return out


def days(cfg: train.TrainConfig, num_rows: int, step_s: float) -> dict[str, float]:
    """How long a run takes if a step takes `step_s`.

    Args:
        cfg: the run, with its own batch.
        num_rows: rows of a planned step.
        step_s: seconds of a planned step.

    Returns:
        `steps_days`, the config's steps at the planned batch; `data_days`, as many steps as hold the config's data, the
        same where the batch is; `hours` of speech in that data, prompts and padding included.
    """
    speech = cfg.steps * cfg.data.items_per_batch * (LM_SPEECH if cfg.data.stage == "lm" else 1.0)
    steps_days = cfg.steps * step_s / 86400
    return {
        "steps_days": steps_days,
        "data_days": steps_days * cfg.data.batch_size / num_rows,
        "hours": speech / audio.TOKEN_RATE / 3600,
    }


def _program(fit: train.TrainConfig, where: Target, sample: bool, folder) -> dict:
    """What the compiler made: its text `hlo`, `memory` in bytes, `optimal_s`, `compile_s`; or an `error`."""
    with _mesh(fit.mesh, devices(where)):
        lowered = _lower(fit, input_pipeline.padded(fit.data.batch_size, train.row_shares(fit)), sample)
        path = None if folder is None else Path(folder) / "programs" / f"{_key(lowered, where)}.json.gz"
        if path is not None and path.exists():
            return json.loads(gzip.decompress(path.read_bytes()))
        start = time.perf_counter()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            out = {"error": _memory_error(str(error))}
        else:
            names = ("argument", "temp", "output", "alias")
            memory = compiled.memory_analysis()
            out = {
                "hlo": compiled.as_text(),
                "memory": {name: getattr(memory, f"{name}_size_in_bytes") for name in names},
                "optimal_s": (compiled.cost_analysis() or {}).get("optimal_seconds"),
            }
        out["compile_s"] = time.perf_counter() - start
    if path is not None:
        with files.atomic_path(path) as part:
            part.write_bytes(gzip.compress(json.dumps(out).encode()))
    return out


def _key(lowered, where: Target) -> str:
    """Digest of what the compiler is given: the program's text, the target, its versions, flags and effort.

    Not the code or the settings that made the text: only what changes the program compiles it anew.
    """
    text = lowered.as_text()
    told = [where.name, where.kind, where.shape, where.slices and SLICES[where.slices].options]
    effort = "jax_exec_time_optimization_effort"  # gone in 0.11, where jax_optimization_level is what is left
    told += [getattr(jax.config, effort if hasattr(jax.config, effort) else "jax_optimization_level")]
    told += [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    for package in ("jax", "jaxlib", "libtpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            told.append(f"{package} {importlib.metadata.version(package)}")
    return hashlib.sha256((json.dumps(told) + text).encode()).hexdigest()[:16]


def facts(cfg, where: Target, cost: hlo.Cost, needed: float, program: dict, sample: bool) -> dict:
    """Bounds from what was counted.

    Args:
        cfg: the run on the target's mesh.
        where: the target.
        cost: what the compiled program does.
        needed: FLOPs that the model needs of a chip.
        program: with `memory`, bytes of argument, temp, output and alias, and `optimal_s`, XLA's own estimate or None,
            which is shown where it is at least the bound.
        sample: whether it is sampling.
    """
    memory, optimal_s = program["memory"], program["optimal_s"]
    out = {
        "arguments_gb": memory["argument"] / 1e9,
        "temporaries_gb": memory["temp"] / 1e9,
        "flops": cost.flops,
        "needed_flops": needed,
        "flops_ratio": cost.flops / needed,
        "hbm_gb": cost.hbm_bytes / 1e9,
        "received_gb": {k: v / 1e9 for k, v in cost.received.items()},
        "unknown_loops": cost.unknown_loops,
    }
    results = memory["output"] - memory["alias"]
    out["memory_gb"] = out["arguments_gb"] + out["temporaries_gb"] + results / 1e9
    chip = where.chip
    if chip is None:
        return out
    received = sum(out["received_gb"].values())
    times = {
        "compute_s": cost.flops / chip.flops,
        "hbm_s": out["hbm_gb"] / chip.memory_gb_per_s,
        "network_s": received / (where.links * chip.link_gb_per_s) if received else 0.0,
    }
    bound = max(times.values())
    out |= times | {
        "memory_share": out["memory_gb"] / chip.memory_gb,
        "bound_s": bound,
        "limit": max(times, key=times.get).removesuffix("_s"),
        "utilisation": needed / chip.flops / bound,
    }
    if optimal_s is not None and optimal_s >= bound:
        out["xla_s"] = float(optimal_s)
    rows = cfg.data.batch_size
    if sample:
        tokens = SAMPLE_NEW if isinstance(cfg.model, lm.Config) else SAMPLE_TOKENS
        out["speech_s_per_s"] = rows * tokens / audio.TOKEN_RATE / bound
    else:
        out["items_per_s"] = cfg.data.items_per_batch / bound
    return out


@contextlib.contextmanager
def _mesh(sizes: train.Mesh, found: list):
    """A mesh on these devices for a while; then the one before, or one local device."""
    before = jax.sharding.get_mesh()
    try:
        yield sharding.make_mesh(sizes.slice, sizes.data, sizes.model, devices=found)
    finally:
        if before.empty:
            sharding.make_mesh()
        else:
            jax.set_mesh(before)


def _memory_error(message: str) -> str:
    """One sentence for a program that the compiler refused."""
    used = re.search(r"[Uu]sed ([\d.]+[KMGT]) of ([\d.]+[KMGT])", message)
    if used:
        return f"needs {used.group(1)} of {used.group(2)} HBM; fewer rows, more remat or more chips"
    return " ".join(message.split())[:300]


# ---------------------------------------------------------------- sweeps


def sweep(
    configs: list[str],
    targets: list[str],
    rows: list[int | None],
    sample: bool = False,
    overrides: tuple[str, ...] = (),
    out: str | os.PathLike | None = None,
    say=print,
    accumulation: int = 1,
) -> list[dict]:
    """Plans of every config on every target with every number of rows; a killed sweep goes on where it was.

    Args:
        configs: paths, as `config.load` takes them.
        targets: names, as `target` takes them.
        rows: rows of a chip; None for the config's batch.
        sample: plan sampling in place of training.
        overrides: of the configs, such as `model.remat=dots`.
        out: folder for programs/, what is compiled, rows.jsonl, plan.md and plan.svg; None writes nothing. Rows that
            are there already stay, but for those that are made again.
        say: called with a line per row.
        accumulation: parts of a batch of a train step.

    Returns:
        the rows, in this order; one that cannot be planned has an `error`.

    Raises:
        ValueError: on a config, an override or a target; of a single row on anything.
    """
    loaded = {path: config_lib.override(config_lib.load(path), *overrides) for path in configs}
    wanted = [(path, target(name), n) for path in configs for name in targets for n in rows]
    made = []
    for path, where, n in wanted:
        name, _, stage = Path(path).name.partition(":")
        program = " ".join([Path(name).stem, *filter(None, [stage]), *["sampling"] * sample])
        row = {
            "program": program,
            "changes": " ".join(overrides),
            "accumulation": 1 if sample else accumulation,
        }
        try:
            row |= make(loaded[path], where, n, sample, out, accumulation)
        except ValueError as error:
            if len(wanted) == 1:
                raise
            row |= {"target": where.name, "chips": where.chips, "rows": n, "error": str(error)}
        made.append(row)
        say(sentence(row))
    if out is not None:
        rows_file = Path(out) / "rows.jsonl"
        before = map(json.loads, rows_file.read_text("utf-8").splitlines()) if rows_file.exists() else ()
        every = [row for row in before if _asked(row) not in map(_asked, made)] + made
        files.write_text(rows_file, "".join(json.dumps(row) + "\n" for row in every))
        files.write_text(Path(out) / "plan.md", table(every) + "\n")
        files.write_text(Path(out) / "plan.svg", plot(every))
    return made


def _asked(row: dict) -> tuple:
    """What a row answers: two rows alike in it are one."""
    return tuple(row.get(name) for name in ("program", "changes", "target", "rows")) + (
        row.get("accumulation", 1),
    )


# ---------------------------------------------------------------- what is printed

HEAD = {
    "program": "program",
    "changes": "changes",
    "target": "chips",
    "mesh": "mesh",
    "rows": "rows a chip",
    "memory": "memory GB (arguments + temporaries)",
    "ratio": "TFLOPs, x needed",
    "traffic": "HBM GB",
    "received": "received GB",
    "times": "ms compute / HBM / network",
    "utilisation": "utilisation at most",
    "speed": "at best: days of the steps / of their data",
}


def cells(row: dict) -> dict[str, str]:
    """The printable cells of a row, by the names of HEAD."""
    out = {name: str(row.get(name, "")) for name in ("program", "changes", "target", "mesh")}
    out["rows"] = f"{row['rows']:g}" if row.get("rows") else ""
    if "error" in row:
        return out | {"memory": row["error"]}
    share = f", {100 * row['memory_share']:.0f} %" if "memory_share" in row else ""
    out["memory"] = f"{row['memory_gb']:.1f} ({row['arguments_gb']:.1f} + {row['temporaries_gb']:.1f}){share}"
    out["ratio"] = f"{row['flops'] / 1e12:.3g}, x {row['flops_ratio']:.2f}"
    out["traffic"] = f"{row['hbm_gb']:.3g}"
    kinds = [f"{kind} {size:.3g}" for kind, size in row["received_gb"].items() if size >= 5e-4]
    out["received"] = ", ".join(kinds) or "none"
    if "bound_s" in row:
        out["times"] = " / ".join(f"{1000 * row[name]:.3g}" for name in ("compute_s", "hbm_s", "network_s"))
        out["utilisation"] = f"{100 * row['utilisation']:.0f} % ({row['limit']})"
        if "hours" in row:
            out["speed"] = f"{row['steps_days']:.3g} / {row['data_days']:.3g} ({row['hours']:,.0f} h)"
        elif "speech_s_per_s" in row:
            out["speed"] = f"{row['speech_s_per_s']:.3g} s of speech a s"
    return out


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table; columns that are empty everywhere are left out."""
    lines = [cells(row) for row in rows]
    names = [name for name in HEAD if any(line.get(name) for line in lines)]
    head = [" | ".join(HEAD[n] for n in names), " | ".join("---" for _ in names)]
    body = [" | ".join(line.get(n) or "–" for n in names) for line in lines]
    return "\n".join(f"| {line} |" for line in head + body)


def sentence(row: dict) -> str:
    """A row as one line."""
    c = cells(row)
    changes = f", {c['changes']}" if c["changes"] else ""
    start = f"{c['program']} on {c['target']}, {c['rows'] or '?'} rows a chip{changes}: "
    if "error" in row:
        return start + row["error"]
    text = f"memory {c['memory']} GB, TFLOPs {c['ratio']} needed, HBM {c['traffic']} GB, received GB: {c['received']}"
    if "bound_s" in row:
        text += f"; at least {1000 * row['bound_s']:.3g} ms ({c['times']}), utilisation at most {c['utilisation']}"
        if "hours" in row:
            text += f", {row['steps_days']:.3g} days for the config's steps at this batch, {row['data_days']:.3g} for "
            text += f"the config's data ({row['hours']:,.0f} h of speech)"
        elif c.get("speed"):
            text += f", {c['speed']}"
        text += f"; XLA's estimate {1000 * row['xla_s']:.3g} ms" if "xla_s" in row else ""
    else:
        text += f"; no bound, as the peaks of {row['kind']!r} are not known"
    if row["unknown_loops"]:
        text += f"; loops of unknown length: {row['unknown_loops']}"
    if "settings" in row:
        text += f"; it is training with {row['settings']}"
    return start + text


def plot(rows: list[dict]) -> str:
    """An SVG picture of the bounded utilisation: over rows of a chip, and over chips where their number varies."""
    over_rows: dict[str, list[tuple[float, float]]] = {}
    over_chips: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if "utilisation" in row:
            kind = row["target"].rpartition("-")[0] or row["target"]
            name = f"{row['program']}, {kind}, {row['rows']:g} rows a chip"
            over_chips.setdefault(name, []).append((row["chips"], row["utilisation"]))
            name = f"{row['program']}, {row['target']}"
            over_rows.setdefault(name, []).append((row["rows"], row["utilisation"]))
    over_chips = {name: points for name, points in over_chips.items() if len(points) > 1}
    panels, y = [], 0
    for title, lines in (("rows a chip", over_rows), ("chips", over_chips)):
        if lines or title == "rows a chip":
            panel, height = _panel(title, lines, y)
            panels, y = panels + panel, y + height
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 780 {y}" font-family="sans-serif" font-size="12">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *panels, "</svg>\n"])


def _panel(title: str, lines: dict[str, list[tuple[float, float]]], y: int) -> tuple[list[str], int]:
    """SVG elements of lines over a logarithmic axis, `y` below the top of the picture; and their height."""
    left, top, width, height = 60, y + 20, 420, 280
    values = sorted({x for points in lines.values() for x, _ in points}) or [1]
    span = math.log2(values[-1] / values[0])

    def place(x: float, share: float) -> tuple[float, float]:
        return left + width * (math.log2(x / values[0]) / span if span else 0.5), top + height * (1 - share)

    out = []
    for i in range(0, 6):
        line = top + height * (1 - i / 5)
        out.append(f'<path d="M{left} {line:.1f}h{width}" stroke="#ddd"/>')
        out.append(f'<text x="20" y="{line + 4:.1f}">{20 * i} %</text>')
    middle = 'text-anchor="middle"'
    out += [f'<text x="{place(x, 0)[0]:.1f}" y="{top + height + 18}" {middle}>{x:g}</text>' for x in values]
    out.append(f'<text x="{left + width / 2}" y="{top + height + 38}" {middle}>{title}</text>')
    for i, (name, points) in enumerate(lines.items()):
        colour = f"hsl({360 * i // len(lines)},70%,40%)"
        spots = [place(*point) for point in sorted(points)]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        out.append(f'<polyline fill="none" stroke="{colour}" points="{joined}"/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in spots]
        out.append(f'<text x="{left + width + 15}" y="{top + 20 * i + 12}" fill="{colour}">{name}</text>')
    return out, max(height + 70, 20 * len(lines) + 40)
