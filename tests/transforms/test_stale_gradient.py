"""`value_and_grad` and `metrics` against lists of the parameters that a loop held."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parameter_server import simulate
from problems import PARAMS, batch, gradient, loss

import asgd_jax
from asgd_jax.transforms import distance_to_stale

NUM_STEPS = 9


def run(tx, step):
    """Returns what `step(state, params, index)` gave at every update; the last parameters."""
    params, state, seen = PARAMS, tx.init(PARAMS), []
    for index in range(NUM_STEPS):
        (grads, found) = step(state, params, index)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(found)
    return seen, params


@pytest.mark.parametrize("delay", [0, 3])
def test_value_and_gradient_are_those_of_the_parameters_then(delay):
    inner = optax.sgd(0.3, momentum=0.5)

    def step(state, params, index):
        value, grads = asgd_jax.value_and_grad(loss, state, params, batch(index))
        return grads, value

    values, params = run(asgd_jax.delayed(inner, delay), step)
    ages = [min(delay, index) for index in range(NUM_STEPS)]
    held = simulate(inner, ages, PARAMS, gradient)
    for index, (value, age) in enumerate(zip(values, ages, strict=True)):
        np.testing.assert_allclose(value, loss(held[index - age], batch(index)), rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, held[-1])


def test_aux_and_keyword_arguments_are_handed_through_under_jit():
    tx = asgd_jax.delayed(optax.sgd(0.1), 2)

    def scaled(params, batch, *, scale):
        value = loss(params, batch) * scale
        return value, {"twice": 2 * value}

    @jax.jit
    def step(state, params, batch):
        return asgd_jax.value_and_grad(scaled, state, params, batch, has_aux=True, scale=3.0)

    (value, aux), grads = step(tx.init(PARAMS), PARAMS, batch(0))
    np.testing.assert_allclose(value, 3 * loss(PARAMS, batch(0)), rtol=1e-6)
    np.testing.assert_allclose(aux["twice"], 2 * value)
    expected = gradient(PARAMS, 0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 3 * b, rtol=1e-5), grads, expected)


def test_a_state_without_delay_is_refused():
    with pytest.raises(ValueError, match=r"^no DelayedState .*wrap the optimizer in asgd_jax\.del"):
        asgd_jax.value_and_grad(loss, optax.sgd(0.1).init(PARAMS), PARAMS, batch(0))
    with pytest.raises(ValueError, match=r"^no DelayedState "):
        asgd_jax.metrics(optax.sgd(0.1).init(PARAMS), PARAMS)


def flat(params):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)]).astype(np.float64)


def test_metrics_are_distances_between_what_the_loop_held():
    inner = optax.sgd(0.5)
    measure = jax.jit(asgd_jax.metrics)

    def step(state, params, index):
        _, grads = asgd_jax.value_and_grad(loss, state, params, batch(index))
        return grads, measure(state, params)

    seen, _ = run(asgd_jax.delayed(inner, 3), step)
    held = simulate(inner, [min(3, index) for index in range(NUM_STEPS)], PARAMS, gradient)
    assert [int(each.staleness) for each in seen] == [0, 1, 2, *[3] * (NUM_STEPS - 3)]
    assert float(seen[0].gap) == float(seen[0].relative_gap) == 0
    for index, each in enumerate(seen):
        live, old = flat(held[index]), flat(held[index - int(each.staleness)])
        np.testing.assert_allclose(each.parameter_norm, np.linalg.norm(live), rtol=1e-5)
        np.testing.assert_allclose(each.gap, np.linalg.norm(live - old), rtol=1e-4)
        np.testing.assert_allclose(each.relative_gap, each.gap / each.parameter_norm, rtol=1e-6)


def test_metrics_of_delays_by_leaf_and_of_two_optimizers_name_the_oldest():
    by_leaf = asgd_jax.delayed(optax.sgd(0.1), {"w": 3, "b": 1})
    labels = {"w": "slow", "b": "fast"}
    two = optax.partition(
        {"slow": asgd_jax.delayed(optax.sgd(0.1), 3), "fast": asgd_jax.delayed(optax.sgd(0.1), 1)},
        labels,
    )

    def step(state, params, index):
        _, grads = asgd_jax.value_and_grad(loss, state, params, batch(index))
        return grads, asgd_jax.metrics(state, params)

    (mine, _), (others, _) = run(by_leaf, step), run(two, step)
    assert [int(each.staleness) for each in mine] == [0, 1, 2, *[3] * (NUM_STEPS - 3)]
    assert [int(each.staleness) for each in others] == [0, 1, 2, *[3] * (NUM_STEPS - 3)]
    np.testing.assert_allclose(mine[-1].gap, others[-1].gap, rtol=1e-5)


def test_stacked_runs_are_measured_one_by_one():
    tx = asgd_jax.delayed(optax.sgd(0.1), 2)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), PARAMS)
    measured = jax.vmap(asgd_jax.metrics)(jax.vmap(tx.init)(stacked), stacked)
    norm = np.linalg.norm(flat(PARAMS))
    np.testing.assert_allclose(measured.parameter_norm, [norm, 2 * norm], rtol=1e-6)


def test_half_precision_is_summed_in_single():
    """4097 ones: a sum in bfloat16 stops at 256."""
    ones = jnp.ones(4097, jnp.bfloat16)
    norm, distance, relative = distance_to_stale(ones, 0 * ones)
    assert norm.dtype == jnp.float32
    np.testing.assert_allclose([norm, distance, relative], [4097**0.5, 4097**0.5, 1], rtol=1e-6)


def test_no_gap_is_no_division():
    norm, distance, relative = distance_to_stale(jnp.zeros(2), jnp.zeros(2))
    assert (float(norm), float(distance), float(relative)) == (0, 0, 0)
    assert np.isnan(distance_to_stale(jnp.array([np.nan]), jnp.zeros(1))[2])
