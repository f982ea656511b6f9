"""Sampling of flow-matching models: noise, solver times, guidance and the solver, whatever the network.

A model is a velocity: a function of the state and of the flow time that leads from noise (t = 0) to mel (t = 1).
Letters: B rows, T mel frames, M mel bins.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from deepasmr_jax import nn
from deepasmr_jax.sharding import pick, spec, split_rows

METHODS = ("euler", "midpoint")
# Steps kept for a small budget, in units of 1/32 and before the cosine warp (F5-TTS, "empirically pruned")
PRUNED_STEPS = {
    5: (0, 2, 4, 8, 16, 32),
    6: (0, 2, 4, 6, 8, 16, 32),
    7: (0, 2, 4, 6, 8, 16, 24, 32),
    10: (0, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32),
    12: (0, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32),
    16: (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32),
}


def time_grid(num_steps: int, schedule: str | float = "cosine") -> np.ndarray:
    """Solver times from 0 to 1.

    Args:
        num_steps: number of intervals.
        schedule: "uniform"; "cosine", t' = 1 - cos(pi t / 2); "pruned", the cosine of published step lists
            for 5, 6, 7, 10, 12 or 16 steps; or a sway coefficient c: t' = t + c (cos(pi t / 2) - 1 + t), of
            which 0 is "uniform" and -1 is "cosine".

    Returns:
        [num_steps + 1] float32, strictly increasing.

    Raises:
        ValueError: on an unknown schedule, a number of steps below 1 or without a pruned list, or a
            coefficient outside [-1, 2 / (pi - 2)], where time would run backwards.

    Source: F5-TTS (Chen et al., 2024), section 3.3, and its released step lists.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1")
    t = np.linspace(0.0, 1.0, num_steps + 1)
    if schedule == "pruned":
        if num_steps not in PRUNED_STEPS:
            known = ", ".join(map(str, PRUNED_STEPS))
            raise ValueError(f"no pruned schedule of {num_steps} steps; use one of {known}, or 'cosine'")
        t, sway = np.array(PRUNED_STEPS[num_steps]) / 32.0, -1.0
    elif isinstance(schedule, str):
        if schedule not in ("uniform", "cosine"):
            raise ValueError(f"schedule is {schedule!r}; use 'uniform', 'cosine', 'pruned' or a number")
        sway = {"uniform": 0.0, "cosine": -1.0}[schedule]
    else:
        sway = float(schedule)
        if not -1.0 <= sway <= 2 / (math.pi - 2):
            raise ValueError(
                f"sway coefficient {sway} makes time run backwards; use -1 to {2 / (math.pi - 2):.2f}"
            )
    return (t + sway * (np.cos(np.pi / 2 * t) - 1 + t)).astype(np.float32)


def integrate(velocity, x: jax.Array, grid: np.ndarray | jax.Array, method: str = "euler") -> jax.Array:
    """Solves dx/dt = velocity(x, t) over a fixed grid, in one `scan`.

    Args:
        velocity: function of the state and a float32 scalar time.
        x: state at grid[0], float32.
        grid: [num_steps + 1] times.
        method: "euler" (order 1, one evaluation a step) or "midpoint" (order 2, two evaluations).

    Returns:
        the state at grid[-1].

    Raises:
        ValueError: on an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; use one of {', '.join(METHODS)}")
    grid = jnp.asarray(grid, jnp.float32)

    def step(x, times):
        t, dt = times
        v = velocity(x, t)
        if method == "midpoint":
            v = velocity(x + 0.5 * dt * v, t + 0.5 * dt)
        return x + dt * v, None

    return jax.lax.scan(step, x, (grid[:-1], jnp.diff(grid)))[0]


def frame_noise(keys: jax.Array, num_frames: int, num_bins: int) -> jax.Array:
    """Gaussian noise with a key of its own for every frame: that of a frame does not depend on the padded length.

    Args:
        keys: [B] typed random keys, split over `batch` or not.
        num_frames: T.
        num_bins: M.

    Returns:
        [B, T, M] float32, split over `batch`.
    """

    def draw(keys):
        each = jax.vmap(lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num_frames)))
        return jax.vmap(jax.vmap(lambda key: jax.random.normal(key, (num_bins,))))(each(keys))

    # shard_map, because folding into split keys fails for a single row (jax 0.10.2)
    rows = spec("batch", "frames", "mel")
    return jax.shard_map(draw, in_specs=spec("batch"), out_specs=rows)(split_rows(keys))


def guided(velocity, given: tuple, null: tuple | None, guidance: jax.Array):
    """Velocity with classifier-free guidance, in the form that `integrate` takes.

    Args:
        velocity: function of a state [B, T, M], times [B] and the arrays of `given`; with `null` its rows are 2 B.
        given: arrays [B, ...], the inputs of the conditional branch.
        null: the same of the unconditional branch; None for no guidance, which halves the work.
        guidance: w in v = v_cond + w (v_cond - v_null).

    Returns:
        function of a state [B, T, M] and a scalar time that gives [B, T, M] float32.
    """
    if null is not None:
        given = tuple(_twins(x, other) for x, other in zip(given, null, strict=True))

    def step(x, t):
        t = jnp.zeros_like(jnp.sum(x, axis=(1, 2))) + t  # x[:, 0, 0]: see sharding.pick
        if null is None:
            return velocity(x, t, *given)
        v = velocity(_twins(x, x), _twins(t, t), *given)
        v = v.reshape(x.shape[0], 2, *x.shape[1:], out_sharding=spec("batch", None, "frames", "mel"))
        with_inputs, without = pick(v, 0, 1), pick(v, 1, 1)
        return with_inputs + guidance * (with_inputs - without)

    return step


def is_guided(guidance) -> bool:
    """Whether guidance of this strength (a number or an array) needs the unconditional branch: not if it is 0."""
    return not (isinstance(guidance, int | float) and guidance == 0)


def check_mel(mel: jax.Array, num_frames: int, num_bins: int, num_tokens: int, name: str) -> None:
    """Checks that a mel [B, T, M] has the frames of its speech tokens.

    Raises:
        ValueError: if it has not.
    """
    if mel.shape[1:] != (num_frames, num_bins):
        raise ValueError(
            f"{name} is {tuple(mel.shape[1:])}, but {num_tokens} tokens take "
            f"{(num_frames, num_bins)} frames and bands; pad or cut it"
        )


def _twins(x: jax.Array, other: jax.Array) -> jax.Array:
    """[B, ...] twice -> [2 B, ...]: each row followed by its twin, so that no data moves between devices."""
    pair = jnp.stack([x, other], axis=1)
    return pair.reshape(2 * x.shape[0], *x.shape[1:], out_sharding=PartitionSpec(*nn.axes_of(x)))
