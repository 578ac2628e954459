"""The queue of gradients is `delayed` seen from the worker: the same path, tau updates later."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import PARAMS, gradient
from test_delayed import INNER, NUM_STEPS, run

import asgd_jax
from asgd_jax import delays


@pytest.mark.parametrize("delay", [0, 1, 4, 7])
@pytest.mark.parametrize("inner", ["sgd", "heavy_ball", "nesterov", "clipped"])
def test_is_delayed_shifted_by_the_delay(inner, delay):
    tx = optax.chain(asgd_jax.delay_gradients(delay), INNER[inner]())

    def step(carry, index):
        params, state = carry
        updates, state = tx.update(gradient(params, index), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    steps = jnp.arange(NUM_STEPS)
    scan = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), steps))
    _, queued = jax.device_get(scan(PARAMS))
    direct, _ = run(inner, "constant", delay)
    for name in PARAMS:
        np.testing.assert_allclose(
            queued[name][delay:], direct[name][: NUM_STEPS - delay], rtol=1e-4, atol=1e-6
        )
        np.testing.assert_array_equal(
            queued[name][:delay], np.broadcast_to(PARAMS[name], (delay, *PARAMS[name].shape))
        )


def test_random_delays_hand_on_the_gradient_of_that_age():
    process = delays.uniform(1, 5)
    tx = asgd_jax.delay_gradients(process, seed=9)
    state = tx.init(jnp.zeros(()))
    for step in range(30):
        age = int(process.sample(state.key, jnp.asarray(step)))
        update, state = tx.update(jnp.asarray(step + 1.0), state)
        assert float(update) == (step - age + 1.0 if step >= age else 0.0)


def test_chains_anywhere():
    tx = optax.chain(optax.clip(0.5), asgd_jax.delay_gradients(1), optax.trace(0.5))
    state = tx.init(jnp.zeros(()))
    out = []
    for value in (1.0, -1.0, 0.0, 0.0):
        update, state = tx.update(jnp.asarray(value), state)
        out.append(float(update))
    assert out == [0.0, 0.5, -0.25, -0.125]
