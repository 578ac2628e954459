"""`jax.pmap`, half-precision gradients and a dynamic loss scale; steps that overflow are skipped.

Delays count updates: a skipped step is none.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from held import Held

import asgd_jax

DELAY, NUM_STEPS, NUM_DEVICES = 3, 16, 4
PARAMS = {"w": np.float32([[0.5, -1.0], [1.5, 0.25]]), "b": np.float32([1.0, -0.5])}


class LossScale(NamedTuple):
    """Halves at an overflow, doubles after three steps without one."""

    scale: jax.Array
    fine_steps: jax.Array

    def adjust(self, finite):
        fine_steps = jnp.where(finite, self.fine_steps + 1, 0)
        doubled = jnp.where(fine_steps == 3, self.scale * 2, self.scale)
        return LossScale(jnp.where(finite, doubled, self.scale / 2), fine_steps % 3)


class State(NamedTuple):
    params: dict
    opt_state: optax.OptState
    loss_scale: LossScale


def batch(step):
    """(devices, examples, features)"""
    random = np.random.default_rng(step)
    return tuple(random.normal(size=(NUM_DEVICES, 4, 2)).astype(np.float32) for _ in range(2))


def scaled_gradient(params, batch, scale):
    """Float32 gradient by way of a float16 backward pass, which overflows beyond 65504 / scale."""

    def loss(params):
        x, y, params = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), (*batch, params))
        return jnp.mean((x @ params["w"] + params["b"] - y) ** 2) * scale.astype(jnp.float16)

    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) / scale, jax.grad(loss)(params))


def select(finite, new, old):
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)


def make_step(tx, select_state):
    def step(state, batch):
        params, opt_state, loss_scale = state
        stale = asgd_jax.stale_params(opt_state, params)
        grads = jax.lax.pmean(scaled_gradient(stale, batch, loss_scale.scale), "batch")
        finite = jnp.isfinite(optax.tree.norm(grads))
        updates, new_state = tx.update(grads, opt_state, params)
        new_params = optax.apply_updates(params, updates)
        if select_state:
            new_params, new_state = select(finite, (new_params, new_state), (params, opt_state))
        return State(new_params, new_state, loss_scale.adjust(finite)), stale, finite

    return jax.pmap(step, axis_name="batch", devices=jax.devices()[:NUM_DEVICES])


@pytest.mark.parametrize("skipped_by", ["skip_nonfinite", "selection of the whole state"])
def test_skipped_steps_leave_no_trace(skipped_by):
    inner = optax.adam(0.1)
    tx = asgd_jax.delayed(inner, DELAY, skip_nonfinite=skipped_by == "skip_nonfinite")
    scale = LossScale(jnp.float32(2.0**14), jnp.int32(0))
    state = State(PARAMS, tx.init(PARAMS), scale)
    state = jax.tree.map(lambda leaf: jnp.stack([leaf] * NUM_DEVICES), state)
    step = make_step(tx, skipped_by != "skip_nonfinite")

    held, made_of = Held(DELAY), []
    for index in range(NUM_STEPS):
        before = state
        state, stale, finite = step(state, batch(index))
        for device in range(NUM_DEVICES):
            pick = lambda leaf: leaf[device]  # noqa: E731
            held.check(*jax.tree.map(pick, (stale, before.params)), update=len(made_of))
        if finite[0]:
            made_of.append((index, before.loss_scale.scale[0]))
        else:
            jax.tree.map(np.testing.assert_array_equal, state.params, before.params)
    assert 8 < len(made_of) < NUM_STEPS - 2
    assert list(state.opt_state.num_updates) == [len(made_of)] * NUM_DEVICES

    @jax.jit
    def mean_gradient(params, batch, scale):
        grads = jax.vmap(scaled_gradient, in_axes=(None, 0, None))(params, batch, scale)
        return jax.tree.map(lambda leaf: leaf.mean(0), grads)

    def gradient(params, update):
        index, scale = made_of[update]
        return mean_gradient(params, batch(index), scale)

    # Float16: sums in another order differ in the third digit.
    held.check_trajectory(inner, gradient, rtol=0.02)
