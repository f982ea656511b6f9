"""Metric writer, step timer, and the arithmetic of FLOPs and model FLOP utilisation (MFU).

Metrics go to `workdir/metrics.jsonl`, one JSON object per line, written by process 0 only. Names are
`area/quantity_unit`: `train/loss`, `perf/step_s`, `data/wait_s`. Step time is measured between finished
steps; the first two are dropped, because they hold compilation, and the seconds of the first are kept apart
as `compile_s`.
"""

import json
import math
import time
from pathlib import Path

import jax

# dense bfloat16 peak of one chip in FLOP/s, from the makers' data sheets; matched as a substring of
# device_kind
PEAK_FLOPS = {
    "v5 lite": 197e12,
    "v5e": 197e12,
    "v5p": 459e12,
    "v6 lite": 918e12,
    "v6e": 918e12,
    "v4": 275e12,
    "h200": 989e12,
    "h100": 989e12,
    "a100": 312e12,
}


class Writer:
    """Appends lines to `folder/metrics.jsonl`; on a resumed run the lines after `step` are dropped first.

    Args:
        folder: the run's working directory, made if absent.
        step: the step that the run starts from; lines of later steps belong to work that was lost.
    """

    def __init__(self, folder: str | Path, step: int = 0):
        self.path = Path(folder) / "metrics.jsonl"
        self.is_writer = jax.process_index() == 0
        if self.is_writer:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                kept = [line for line in read(self.path) if line["step"] <= step]
                self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one line; values are rounded to 6 digits, numbers that are not finite become strings."""
        if self.is_writer:
            line = {"step": int(step)} | {k: _plain(v) for k, v in values.items()}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


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


def transformer_flops(
    num_params: int, num_layers: int, attention_width: int, length: int, causal: bool
) -> int:
    """Matrix-product FLOPs per position of a forward pass.

    Two FLOPs per weight of the matrices that every position passes (embedding tables left out), plus scores
    and weighted values over `length` positions. With `causal`, only the half that is needed is counted.
    """
    attention = 4 * num_layers * attention_width * length
    return 2 * num_params + (attention // 2 if causal else attention)


def train_flops(forward_flops: float) -> float:
    """FLOPs of a training step: the backward pass costs two forward passes; recomputation is not counted."""
    return 3 * forward_flops


def mfu(flops_per_step: float, step_s: float, device_kind: str, num_devices: int) -> float | None:
    """Share of the peak that the counted FLOPs reach; None for a device whose peak is not in `PEAK_FLOPS`."""
    for name, peak in PEAK_FLOPS.items():
        if name in device_kind.lower():
            return flops_per_step / (step_s * peak * num_devices)
    return None
