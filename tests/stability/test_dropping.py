"""Dropping what is too old, in theory, against the very transform that drops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asgd_jax
import asgd_jax.stability as stability
from asgd_jax import delays
from asgd_jax.stability.mitigations import mitigated_max_learning_rate

PROCESS, LIMIT = delays.categorical([0.3, 0.2, 0.05, 0.05, 0.0, 0.4]), 4
LEFT = delays.below(PROCESS, LIMIT)


def run(rate, num_arrivals, seed=0):
    """Descends x^2 / 2 from 1; returns x, staleness and whether it was applied, by arrival."""
    tx = asgd_jax.delayed(optax.sgd(rate), PROCESS, drop_stale=LIMIT, seed=seed)

    def step(carry, _):
        x, state = carry
        gradient = asgd_jax.stale_params(state, x)
        updates, new = tx.update(gradient, state, x)
        x = optax.apply_updates(x, updates)
        return (x, new), (x, state.staleness, new.num_updates > state.num_updates)

    start = jnp.ones((), jnp.float64)
    return jax.lax.scan(step, (start, tx.init(start)), length=num_arrivals)[1]


def test_what_is_applied_has_the_distribution_that_below_says():
    with jax.enable_x64(True):
        _, ages, applied = jax.jit(lambda: run(0.1, 20_000))()
    ages = np.asarray(ages)[np.asarray(applied)][8:]
    counts = np.bincount(ages, minlength=LIMIT)
    assert counts.size == LIMIT
    share = np.mean(np.asarray(applied))
    assert share == pytest.approx(0.6, abs=5 * np.sqrt(0.24 / 20_000))
    errors = np.sqrt(LEFT.pmf * (1.0 - LEFT.pmf) / ages.size)
    assert (abs(counts / ages.size - LEFT.pmf) < 5 * errors).all()


def test_a_run_grows_above_the_lyapunov_edge_of_what_is_left_and_shrinks_below():
    edge = stability.optimizer_max_learning_rate(optax.sgd, LEFT, criterion="lyapunov")
    with jax.enable_x64(True):
        paths = jax.jit(jax.vmap(lambda rate: run(rate, 12_000)[0]))(
            edge * jnp.array([0.9, 1.1], jnp.float64)
        )
    below, above = np.log(abs(np.asarray(paths)[:, -8:])).max(1)
    assert below < -50.0
    assert above > 50.0
    # And not at that of all gradients, which is far lower.
    assert stability.lyapunov_max_learning_rate(PROCESS).value < 0.8 * edge


def test_the_mean_square_of_an_ensemble_grows_above_its_edge_and_shrinks_below():
    edge = stability.optimizer_max_learning_rate(optax.sgd, LEFT, criterion="mean_square")
    assert edge == pytest.approx(stability.max_learning_rate(LEFT, criterion="mean_square"))
    factors = np.array([0.85, 1.15])
    with jax.enable_x64(True):
        rates, seeds = jnp.asarray(edge * factors), jnp.arange(60_000)
        ensemble = jax.vmap(lambda rate: jax.vmap(lambda seed: run(rate, 30, seed)[0])(seeds))
        squares = np.asarray((jax.jit(ensemble)(rates) ** 2).mean(1))
    # Over few arrivals: later on the moment is carried by runs too rare for any sample.
    growth = np.log(squares[:, 29] / squares[:, 9]) / 20.0
    # Dropped gradients change nothing: the moments of an arrival grow by 1 - p + p rho^2.
    radii = [
        stability.spectral_radius(LEFT, step=edge * factor, criterion="mean_square")
        for factor in factors
    ]
    np.testing.assert_allclose(growth, np.log(0.4 + 0.6 * np.square(radii)), atol=0.01)
    assert growth[0] < 0.0 < growth[1]


def test_an_adaptive_method_that_drops_too():
    """Both at once: what is left is scaled, here by 1, 1, 1/2, 1/3."""
    heavy_ball = {"sharpness": 1.0, "momentum": 0.0, "dampening": True}
    found = mitigated_max_learning_rate("staleness-scaling", LEFT, **heavy_ball)

    def radius(rate):
        matrix = np.eye(4, k=-1)
        matrix[0] = np.eye(4)[0] - rate * LEFT.pmf / np.maximum(1, np.arange(4))
        return abs(np.linalg.eigvals(matrix)).max()

    assert radius(0.999 * found) < 1.0 < radius(1.001 * found)
