"""Metric writer and step timer.

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

from deepasmr_jax import files


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
                files.write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

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
