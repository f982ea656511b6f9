"""Solver, schedules, noise and guidance of flow matching against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepasmr_jax import ode, sharding


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2)])
def test_solver_meets_the_closed_form_of_a_linear_field_at_its_order(method, order):
    # dx/dt = -2 x + t has x(1) = (x0 + 1/4) e^-2 + 1/4
    exact = 1.25 * np.exp(-2.0) + 0.25
    errors = []
    for num_steps in (8, 16, 32):
        x = ode.integrate(lambda x, t: -2 * x + t, jnp.ones(()), ode.time_grid(num_steps, "uniform"), method)
        errors.append(abs(float(x) - exact))
    rates = np.log2(np.array(errors[:-1]) / errors[1:])
    assert errors[-1] > 1e-5  # still far above float32 rounding
    np.testing.assert_allclose(rates, order, atol=0.15)


def test_solver_is_exact_on_a_straight_path_at_any_schedule():
    for schedule in ("uniform", "cosine", "pruned", 0.5):
        x = ode.integrate(lambda x, t: jnp.full_like(x, 3.0), jnp.ones(4), ode.time_grid(10, schedule))
        np.testing.assert_allclose(x, 4.0, rtol=1e-6)


def test_schedules_are_the_published_formulas():
    t = np.linspace(0, 1, 33)
    np.testing.assert_allclose(ode.time_grid(32, "cosine"), 1 - np.cos(np.pi / 2 * t), atol=1e-7)
    np.testing.assert_allclose(ode.time_grid(32, "uniform"), t, atol=1e-7)
    np.testing.assert_array_equal(ode.time_grid(32, -1.0), ode.time_grid(32, "cosine"))
    np.testing.assert_allclose(ode.time_grid(2, 0.4)[1], 0.5 + 0.4 * (np.cos(np.pi / 4) - 0.5), atol=1e-7)
    fine = ode.time_grid(32, "cosine")
    np.testing.assert_allclose(ode.time_grid(5, "pruned"), fine[[0, 2, 4, 8, 16, 32]], atol=1e-7)
    for num_steps in ode.PRUNED_STEPS:
        grid = ode.time_grid(num_steps, "pruned")
        assert len(grid) == num_steps + 1 and grid[0] == 0 and grid[-1] == 1 and (np.diff(grid) > 0).all()


@pytest.mark.parametrize(
    ("num_steps", "schedule", "found"),
    [(0, "cosine", "0"), (9, "pruned", "9"), (4, "linear", "linear"), (4, -1.5, "-1.5"), (4, 2.0, "2.0")],
)
def test_a_schedule_that_cannot_be_is_refused_with_its_value(num_steps, schedule, found):
    with pytest.raises(ValueError, match=found):
        ode.time_grid(num_steps, schedule)


def test_the_noise_of_a_frame_depends_on_its_key_and_place_alone():
    keys = jax.random.split(jax.random.key(1), 3)
    noise = np.asarray(ode.frame_noise(keys, 500, 4))
    np.testing.assert_array_equal(ode.frame_noise(keys, 7, 4), noise[:, :7])
    np.testing.assert_array_equal(ode.frame_noise(keys[1:2], 7, 4), noise[1:2, :7])
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert len(np.unique(noise)) == noise.size


def test_guidance_moves_away_from_the_unconditional_velocity_row_by_row():
    rng = np.random.default_rng(0)
    batch = {name: rng.standard_normal((8, 5, 4)).astype(np.float32) for name in ("x", "given", "null")}
    placed = sharding.put(batch)

    def velocity(x, t, given):
        return x * given + t[:, None, None]

    def run(null, guidance):
        return ode.guided(velocity, (placed["given"],), null, guidance)(placed["x"], 0.25)

    with_inputs, without = (batch["x"] * batch[name] + 0.25 for name in ("given", "null"))
    np.testing.assert_allclose(run(None, 2.0), with_inputs, atol=1e-6)
    wanted = with_inputs + 2.0 * (with_inputs - without)
    np.testing.assert_allclose(run((placed["null"],), 2.0), wanted, atol=1e-5)
    assert ode.is_guided(0.7) and ode.is_guided(jnp.float32(0)) and not ode.is_guided(0)
