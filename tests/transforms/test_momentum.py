"""Shifted momentum against one buffer per worker in plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parameter_server import simulate_worker_momentum

import asgd_jax
from asgd_jax import delays

CURVATURE = jnp.array([0.5, 2.0, 7.0])


def gradient(params, step):
    return CURVATURE * params + jnp.sin(jnp.float32(step) + jnp.arange(3.0))


def run(tx, num_steps, params):
    state, trajectory = tx.init(params), [params]
    for step in range(num_steps):
        grads = gradient(asgd_jax.stale_params(state, params), step)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
    return trajectory


@pytest.mark.parametrize("dampening", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_round_robin_matches_a_buffer_per_worker(num_workers, momentum, dampening):
    delay, num_steps = num_workers - 1, 40
    sgd = asgd_jax.shifted_sgd(0.01, momentum, delay, dampening=dampening)
    schedule = [step % num_workers for step in range(num_steps)]
    start = jnp.array([1.0, -1.0, 0.5])
    expected, _ = simulate_worker_momentum(schedule, start, gradient, 0.01, momentum, dampening)
    measured = run(asgd_jax.delayed(sgd, delay), num_steps, start)
    np.testing.assert_allclose(measured, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_random_workers_match_a_buffer_per_worker(momentum):
    """The ring finds each worker's buffer by staleness alone, for any schedule."""
    num_steps, start = 60, jnp.array([1.0, -1.0, 0.5])
    schedule = np.random.default_rng(0).integers(0, 4, num_steps).tolist()
    expected, ages = simulate_worker_momentum(schedule, start, gradient, 0.02, momentum, True)
    process = delays.from_trace(np.array(ages))
    tx = asgd_jax.delayed(asgd_jax.shifted_sgd(0.02, momentum, process), process)
    np.testing.assert_allclose(run(tx, num_steps, start), expected, rtol=1e-5, atol=1e-6)


def test_alone_it_follows_its_own_delay_with_the_same_ramp():
    alone, inside = asgd_jax.shifted_trace(0.9, 3), asgd_jax.shifted_trace(0.9, 3)
    state, handed = alone.init(jnp.zeros(2)), inside.init(jnp.zeros(2))
    for step in range(12):
        grads = jnp.full(2, jnp.cos(jnp.float32(step)))
        update, state = alone.update(grads, state)
        other, handed = inside.update(grads, handed, staleness=jnp.asarray(min(step, 3)))
        np.testing.assert_array_equal(update, other)


def test_without_delay_it_is_optax_momentum():
    grads = jax.random.normal(jax.random.PRNGKey(0), (10, 3))
    for ours, theirs in (
        (asgd_jax.shifted_trace(0.9, 0, dampening=False), optax.trace(0.9)),
        (asgd_jax.shifted_trace(0.9, 0), optax.ema(0.9, debias=False)),
    ):
        state, other = ours.init(grads[0]), theirs.init(grads[0])
        for grad in grads:
            update, state = ours.update(grad, state)
            expected, other = theirs.update(grad, other)
            np.testing.assert_allclose(update, expected, rtol=1e-5)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 1.0"):
        asgd_jax.shifted_trace(1.0, 2)
    tx = asgd_jax.shifted_trace(0.9, delays.uniform(0, 2))
    with pytest.raises(ValueError, match=r"needs staleness=: wrap the optimizer in asgd_jax.del"):
        tx.update(jnp.zeros(()), tx.init(jnp.zeros(())))
