"""Equinox: a model is its own parameters, and leaves without a gradient are None."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from held import Held

import asgd_jax

DELAY, NUM_STEPS = 3, 9
MODEL = eqx.nn.MLP(2, 3, 4, depth=1, key=jax.random.key(0))  # its activations are leaves, too
# Fine-tuning: all but the last layer is frozen.
TRAINABLE = eqx.tree_at(
    lambda model: (model.layers[-1].weight, model.layers[-1].bias),
    jax.tree.map(lambda leaf: False, MODEL),
    replace=(True, True),
)


def batch(step):
    random = np.random.default_rng(step)
    return tuple(random.normal(size=(8, size)).astype(np.float32) for size in (2, 3))


def loss(trained, frozen, batch):
    x, y = batch
    return jnp.mean((jax.vmap(eqx.combine(trained, frozen))(x) - y) ** 2)


@eqx.filter_jit
def gradient(model, batch):
    """None for every leaf that is frozen, an activation or the like."""
    return eqx.filter_grad(loss)(*eqx.partition(model, TRAINABLE), batch)


def arrays(model):
    return eqx.filter(model, eqx.is_array)


@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True}])
def test_the_optimizer_sees_the_whole_model(options):
    """The state is of all arrays; only some of them ever have a gradient."""
    tx = asgd_jax.delayed(optax.sgd(0.3), DELAY, **options)
    model, state, held = MODEL, tx.init(arrays(MODEL)), Held(DELAY)

    @eqx.filter_jit
    def step(model, state, batch):
        stale = asgd_jax.stale_params(state, model)  # a model that can be called
        updates, state = tx.update(gradient(stale, batch), state, arrays(model))
        return eqx.apply_updates(model, updates), state, stale

    for index in range(NUM_STEPS):
        before = model
        model, state, stale = step(model, state, batch(index))
        held.check(arrays(stale), arrays(before))
    frozen = lambda model: model.layers[0].weight  # noqa: E731
    np.testing.assert_array_equal(frozen(model), frozen(MODEL))
    zeros = jax.tree.map(jnp.zeros_like, arrays(MODEL))
    held.check_trajectory(
        optax.sgd(0.3),
        lambda params, step: eqx.combine(gradient(whole(params), batch(step)), zeros),
    )


def whole(params):
    return eqx.combine(params, MODEL)


def test_the_optimizer_sees_what_is_trained():
    """The state is of the trainable half of `eqx.partition`; momentum in the inner optimizer."""
    inner = optax.adam(0.05)
    tx = asgd_jax.delayed(inner, DELAY)
    trained, frozen = eqx.partition(MODEL, TRAINABLE)
    state, held = tx.init(trained), Held(DELAY)

    @eqx.filter_jit
    def step(trained, state, batch):
        stale = asgd_jax.stale_params(state, trained)
        grads = eqx.filter_grad(loss)(stale, frozen, batch)
        updates, state = tx.update(grads, state, trained)
        return eqx.apply_updates(trained, updates), state, stale

    for index in range(NUM_STEPS):
        before = trained
        trained, state, stale = step(trained, state, batch(index))
        held.check(stale, before)
    held.check_trajectory(inner, lambda params, step: gradient(whole(params), batch(step)))


def test_a_whole_model_is_measured_by_its_arrays():
    tx = asgd_jax.delayed(optax.sgd(0.3), DELAY)
    state = tx.init(arrays(MODEL))
    _, state = tx.update(jax.tree.map(jnp.ones_like, arrays(MODEL)), state, arrays(MODEL))
    moved = jax.tree.map(lambda leaf: 2 * leaf if eqx.is_array(leaf) else leaf, MODEL)
    measured = asgd_jax.metrics(state, moved)
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(arrays(MODEL))))
    np.testing.assert_allclose(measured, [1, 2 * norm, norm, 0.5], rtol=1e-5)


def test_gradients_in_a_queue():
    tx = asgd_jax.delay_gradients(DELAY)
    state, seen, update = tx.init(arrays(MODEL)), [], eqx.filter_jit(tx.update)
    for index in range(NUM_STEPS):
        seen.append(gradient(MODEL, batch(index)))
        handed_on, state = update(seen[-1], state)
        expected = seen[index - DELAY] if index >= DELAY else jax.tree.map(jnp.zeros_like, seen[0])
        assert eqx.tree_equal(handed_on, expected)
    assert handed_on.layers[0].weight is None


def test_shifted_momentum():
    """As one momentum buffer per worker, round robin, in plain Python."""
    tx = asgd_jax.delayed(asgd_jax.shifted_sgd(0.3, 0.5, DELAY), DELAY)
    model, state = MODEL, tx.init(arrays(MODEL))
    held = [model]
    buffers = [jax.tree.map(jnp.zeros_like, eqx.filter(MODEL, TRAINABLE))] * (DELAY + 1)

    @eqx.filter_jit
    def step(model, state, batch):
        grads = gradient(asgd_jax.stale_params(state, model), batch)
        updates, state = tx.update(grads, state, arrays(model))
        return eqx.apply_updates(model, updates), state

    for index in range(NUM_STEPS):
        model, state = step(model, state, batch(index))
        worker, version = index % (DELAY + 1), max(index - DELAY, 0)
        grads = gradient(held[version], batch(index))
        buffers[worker] = jax.tree.map(lambda v, g: 0.5 * v + 0.5 * g, buffers[worker], grads)
        updates = jax.tree.map(lambda v: -0.3 * v, buffers[worker])
        held.append(eqx.apply_updates(held[-1], updates))
        assert eqx.tree_equal(model, held[-1], rtol=1e-5, atol=1e-6)
