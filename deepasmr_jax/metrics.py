"""Metric writer, step timer, and the arithmetic of model FLOPs utilisation (MFU).

Metrics go to `workdir/metrics.jsonl`, one JSON object per line, written by process 0 only, and where it is asked for
also to TensorBoard, with sounds and pictures. Names are `area/quantity_unit`: `train/loss`, `perf/step_s`,
`data/wait_s`. Step time is measured between finished steps; the first two are dropped, because they hold compilation,
and the seconds of the first are kept apart as `compile_s`.
"""

import dataclasses
import json
import math
import re
import time
from pathlib import Path

import jax
from jax.extend import core

from deepasmr_jax import files


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one accelerator reaches at most.

    flops: bfloat16 FLOP/s of dense products. memory_gb, memory_gb_per_s: HBM, in 1e9 bytes; of TPUs the page's
    number of GB (v4: GiB), the lower limit where GiB are meant. link_gb_per_s: of one interconnect link of a TPU in one
    direction; of all NVLinks (or the PCIe slot) of a GPU together.
    """

    flops: float
    memory_gb: float
    memory_gb_per_s: float
    link_gb_per_s: float


# By the device's name in JAX, of GPUs by its first words.
# TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, tables of the chips as of 2026: peak, HBM, "bidirectional
# interconnect bandwidth per chip" (400, 1200, 800 GB/s for v5e, v5p, v6e), which is links x 2 directions: 4 links in
# a 2-d torus, 6 in a 3-d one. The links of v4: Jouppi et al. (2023), "TPU v4", table 4, six of 50 GB/s.
# GPUs: NVIDIA's data sheets "A100 Tensor Core GPU" (40 and 80 GB; 600 GB/s of NVLink in both directions), "H100" (SXM;
# 900), "H200" (SXM and NVL; 900), "DGX B200" (an eighth of 1,440 GB and 64 TB/s; 1,800), "L4" (PCIe gen 4; 64). Of a
# peak that a sheet states with sparsity, a half.
CHIPS = {
    "TPU v4": Chip(275e12, 32, 1200, 50),
    "TPU v5 lite": Chip(197e12, 16, 819, 50),
    "TPU v5": Chip(459e12, 95, 2765, 100),
    "TPU v6 lite": Chip(918e12, 32, 1638, 100),
    "NVIDIA A100": Chip(312e12, 40, 1555, 300),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80, 2039, 300),
    "NVIDIA A100 80GB PCIe": Chip(312e12, 80, 1935, 300),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80, 3350, 450),
    "NVIDIA H200": Chip(989e12, 141, 4800, 450),
    "NVIDIA H200 NVL": Chip(835e12, 141, 4800, 450),
    "NVIDIA B200": Chip(2250e12, 180, 8000, 900),
    "NVIDIA L4": Chip(121e12, 24, 300, 32),
}
_SAME = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}
CHIPS |= {name: CHIPS[same] for name, same in _SAME.items()}


class Writer:
    """Appends lines to `folder/metrics.jsonl`; on a resumed run the lines after `step` are dropped first.

    Args:
        folder: the run's working directory, made if absent.
        step: the step that the run starts from; lines of later steps belong to work that was lost.
        tensorboard: write `folder/tensorboard` too (`has_tensorboard`); what is there of later steps is hidden.
    """

    def __init__(self, folder: str | Path, step: int = 0, tensorboard: bool = False):
        self.path = Path(folder) / "metrics.jsonl"
        self.is_writer = jax.process_index() == 0
        self._events = None
        if self.is_writer:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                kept = [line for line in read(self.path) if line["step"] <= step]
                files.write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
            if tensorboard:
                self._events = _event_writer(self.path.with_name("tensorboard"), step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one line; values are rounded to 6 digits, numbers that are not finite become strings."""
        if self.is_writer:
            line = {"step": int(step)} | {k: _plain(v) for k, v in values.items()}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, float(value), int(step))

    def show(
        self, step: int, name: str, png: bytes, wav: bytes | None, sample_rate: int, duration_s: float
    ) -> None:
        """A picture and, if there is one, the sound that it shows, for TensorBoard alone.

        Args:
            step: updates done.
            name: the heading under which later ones of the same name replace it.
            png: a PNG file.
            wav: a WAV file, or None.
            sample_rate: of the sound, in Hz.
            duration_s: of the sound.
        """
        if self._events is None:
            return
        from tensorboardX.proto.summary_pb2 import Summary

        width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))  # of the header chunk
        image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=png)
        values = [Summary.Value(tag=f"picture/{name}", image=image)]
        if wav is not None:
            audio = Summary.Audio(
                sample_rate=sample_rate, num_channels=1, length_frames=round(duration_s * sample_rate),
                encoded_audio_string=wav, content_type="audio/wav",
            )  # fmt: skip
            values.append(Summary.Value(tag=f"sound/{name}", audio=audio))
        self._events.file_writer.add_summary(Summary(value=values), int(step))
        self._events.flush()

    def close(self) -> None:
        """Writes out what TensorBoard's file has not got yet."""
        if self._events is not None:
            self._events.close()


def has_tensorboard() -> bool:
    """Whether tensorboardX is there; says so if not."""
    try:
        import tensorboardX  # noqa: F401
    except ModuleNotFoundError as error:
        print(
            f"no sounds and pictures: tensorboard=true needs {error.name}; pip install tensorboardX",
            flush=True,
        )
        return False
    return True


def _event_writer(folder: Path, first_step: int):
    from tensorboardX import SummaryWriter

    return SummaryWriter(logdir=str(folder), purge_step=first_step)


def _plain(value) -> float | str:
    value = float(value)
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)


def read(path: str | Path) -> list[dict]:
    """The lines of a `metrics.jsonl`; a last line cut off by a crash is left out."""
    lines = []
    for text in Path(path).read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


class StepTimer:
    """Mean seconds of a step since the last `take`, without the first two steps of the run."""

    def __init__(self, clock=time.perf_counter):
        self._clock = clock
        self._last = clock()
        self._ticks = 0
        self._sum_s = 0.0
        self._count = 0
        self.compile_s = 0.0

    def tick(self) -> None:
        """Call when the result of a step is there."""
        now = self._clock()
        if self._ticks == 0:
            self.compile_s = now - self._last
        elif self._ticks > 1:
            self._sum_s += now - self._last
            self._count += 1
        self._last = now
        self._ticks += 1

    def pause(self) -> None:
        """Call after work that is no step (evaluation, a save), so that its time is not counted."""
        self._last = self._clock()

    def take(self) -> float | None:
        """Mean seconds of a step since the last call; None if no step has been measured yet."""
        mean = self._sum_s / self._count if self._count else None
        self._sum_s, self._count = 0.0, 0
        return mean


# ---------------------------------------------------------------- FLOPs


def chip(device_kind: str) -> Chip | None:
    """The chip of `CHIPS` with this name in JAX; None for another, such as a CPU."""
    # of a GPU the first words, up to the end of one: an "NVIDIA L40" is no "NVIDIA L4"
    rest = lambda name: r"(?!\w).*" if name.startswith("NVIDIA") else ""
    found = [name for name in CHIPS if re.fullmatch(re.escape(name) + rest(name), device_kind)]
    return CHIPS[max(found, key=len)] if found else None


def peak_flops(device) -> float | None:
    """Greatest bfloat16 FLOP/s of a device; None if it is not in `CHIPS`, such as a CPU."""
    found = chip(device.device_kind)
    return None if found is None else found.flops


def flops(function, *args) -> float:
    """Floating-point operations of the matrix products and convolutions of a function; nothing is run.

    A multiplication with its addition counts as two, a scan as often as it runs, a `while` once, and of several
    branches the greatest; a `shard_map` as often as its work is split, a Pallas kernel as often as its grid has cells.
    Attention counts as it is computed, masked scores included: `train.step_flops` has formulas for the LM and the flow.

    Args:
        function: of arrays.
        args: its arguments, or their shapes.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        out = math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += 2 * out * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        elif eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape  # its output channels are those of the result
            total += 2 * out * math.prod(kernel) / kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        else:
            inner = [_count(j) for value in eqn.params.values() for j in _jaxprs(value)]
            times = _times(eqn)
            total += times * (max(inner, default=0) if eqn.primitive.name == "cond" else sum(inner))
    return total


def _times(eqn) -> int:
    """How often the body of an equation runs, on all devices together."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return params["length"]
    if name == "pallas_call":
        return math.prod(n for n in params["grid_mapping"].grid if isinstance(n, int))
    if name == "shard_map":  # axes that split nothing repeat the same work
        specs = (*params["in_specs"], *params["out_specs"])
        parts = [part for spec in specs for part in spec if part is not None]
        used = {axis for part in parts for axis in (part if isinstance(part, tuple) else (part,))}
        return math.prod(params["mesh"].shape[axis] for axis in used)
    return 1


def _jaxprs(value) -> list:
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    return [j for x in value for j in _jaxprs(x)] if isinstance(value, tuple | list) else []
