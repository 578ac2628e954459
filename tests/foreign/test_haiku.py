"""Haiku: `hk.transform`, parameters in nested dicts."""

from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from held import Held

import asgd_jax

DELAY, NUM_STEPS = 2, 8


class TrainingState(NamedTuple):
    """As in Haiku's own examples: live and averaged parameters, and the optimizer's state."""

    params: hk.Params
    avg_params: hk.Params
    opt_state: optax.OptState


network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([4, 2])(x)))


def batch(step):
    random = np.random.default_rng(step)
    return tuple(random.normal(size=(8, size)).astype(np.float32) for size in (3, 2))


@jax.jit
def gradient(params, batch):
    x, y = batch
    return jax.grad(lambda params: jnp.mean((network.apply(params, x) - y) ** 2))(params)


@pytest.mark.parametrize("inner", [optax.adam(0.05), optax.sgd(0.1, momentum=0.9)])
def test_stale_parameters_are_what_the_loop_held(inner):
    tx = asgd_jax.delayed(inner, DELAY)
    params = network.init(jax.random.key(0), batch(0)[0])
    state, held = TrainingState(params, params, tx.init(params)), Held(DELAY)

    @jax.jit
    def update(state, batch):
        stale = asgd_jax.stale_params(state.opt_state, state.params)
        updates, opt_state = tx.update(gradient(stale, batch), state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = optax.incremental_update(params, state.avg_params, step_size=0.1)
        return TrainingState(params, average, opt_state), stale

    for step in range(NUM_STEPS):
        before = state.params
        state, stale = update(state, batch(step))
        held.check(stale, before)
    held.check_trajectory(inner, lambda params, step: gradient(params, batch(step)))


def test_two_networks_of_one_loop_are_asked_for_one_at_a_time():
    """Generator and discriminator have leaves of the same names."""
    tx = asgd_jax.delayed(optax.sgd(0.1), DELAY)
    params = network.init(jax.random.key(0), batch(0)[0])
    states = tx.init(params), tx.init(params)
    with pytest.raises(ValueError, match=r"^\['mlp/~/linear_0'\]\['b'\] has two histories"):
        asgd_jax.stale_params(states, params)
