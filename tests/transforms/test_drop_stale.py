"""Gradients that are too old are dropped: against a plain server that counts arrivals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asgd_jax
from asgd_jax import delays

PARAMS = {"w": jnp.array([1.0, -0.5]), "b": jnp.array([0.25])}
NUM_ARRIVALS, LIMIT = 60, 3


def gradient(params, arrival):
    return jax.tree.map(lambda leaf: jnp.tanh(leaf) - 0.3 * np.float32(np.cos(arrival)), params)


def serve(inner, trace):
    """Parameters after every arrival, and which arrivals made an update."""
    past, state, made = [PARAMS], inner.init(PARAMS), []
    for arrival in range(NUM_ARRIVALS):
        version = len(past) - 1
        age = min(trace[arrival], version)
        made.append(age < LIMIT)
        if made[-1]:
            grads = gradient(past[version - age], arrival)
            updates, state = inner.update(grads, state, past[-1])
            past.append(optax.apply_updates(past[-1], updates))
    return past, made


@pytest.mark.parametrize(
    "trace",
    [
        np.random.default_rng(0).integers(0, 7, NUM_ARRIVALS),
        np.random.default_rng(1).integers(2, 5, NUM_ARRIVALS),
    ],
    ids=["uniform", "mostly dropped"],
)
def test_a_dropped_gradient_advances_nothing(trace):
    inner = optax.sgd(0.1, momentum=0.9)
    past, made = serve(inner, trace)
    assert 0 < sum(made) < NUM_ARRIVALS
    tx = asgd_jax.delayed(inner, delays.from_trace(trace), drop_stale=LIMIT)
    params, state, update = PARAMS, tx.init(PARAMS), jax.jit(tx.update)
    for arrival in range(NUM_ARRIVALS):
        before = state
        grads = gradient(asgd_jax.stale_params(state, params), arrival)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        version = sum(made[: arrival + 1])
        assert int(state.num_updates) == version
        assert int(state.accumulated.num_dropped) == arrival + 1 - version
        for left, right in zip(
            jax.tree.leaves(params), jax.tree.leaves(past[version]), strict=True
        ):
            np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)
        if not made[arrival]:
            kept = before.inner_state, before.history
            for left, right in zip(
                jax.tree.leaves(kept),
                jax.tree.leaves((state.inner_state, state.history)),
                strict=True,
            ):
                np.testing.assert_array_equal(left, right)
    assert update._cache_size() == 1


def test_what_is_applied_has_the_distribution_below_the_limit():
    tx = asgd_jax.delayed(optax.sgd(0.0), delays.uniform(0, 7), drop_stale=4, seed=3)

    def step(state, _):
        applied, age = state.num_updates, state.staleness
        _, state = tx.update(jnp.zeros(()), state, jnp.zeros(()))
        return state, (age, state.num_updates > applied)

    _, (ages, made) = jax.lax.scan(step, tx.init(jnp.zeros(())), length=8000)
    counts = np.bincount(np.asarray(ages)[np.asarray(made)])
    assert len(counts) == 4
    # Five standard errors of a quarter of 4,000 draws.
    assert np.abs(counts / counts.sum() - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 4000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delay": 4, "drop_stale": 4}, r"drop_stale=4 drops every gradient of this delay"),
        ({"delay": 4, "drop_stale": 0}, r"drop_stale must be >= 1, got 0"),
        ({"delay": 4, "drop_stale": 2.5}, r"drop_stale must be an integer >= 0, got 2.5"),
        ({"delay": {"w": 1, "b": 0}, "drop_stale": 1}, r"needs one delay for all leaves"),
        (
            {"delay": delays.uniform(0, 4), "drop_stale": 2, "every": 2},
            r"drop_stale=2 with every=2: drop or accumulate",
        ),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        asgd_jax.delayed(optax.sgd(0.1), **options)


def test_a_trace_that_leaves_nothing_is_refused():
    process = asgd_jax.delays.from_trace(np.full(5, 5))
    with pytest.raises(ValueError, match="drop_stale=3 drops every gradient of this delay"):
        asgd_jax.delayed(optax.sgd(0.1), process, drop_stale=3)
