"""The boundary search: hard mass functions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import asgd_jax.stability as stability
from asgd_jax.stability.arguments import as_momentum
from asgd_jax.stability.boundary import random_delay_threshold
from asgd_jax.stability.schur_cohn import roots_inside

NONE = as_momentum(0.0, "heavy_ball", True)
METHODS = [{}, {"momentum": 0.9}, {"momentum": 0.9, "kind": "shifted"}]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 200), st.floats(0, 0.99), st.sampled_from(["heavy_ball", "shifted"]))
def test_one_atom_is_the_constant_delay(delay, momentum, kind):
    pmf = np.zeros(delay + 1)
    pmf[delay] = 1.0
    searched = random_delay_threshold(pmf, as_momentum(momentum, kind, True))
    closed = stability.max_learning_rate(delay, momentum=momentum, kind=kind)
    assert searched == pytest.approx(closed, rel=1e-9)


def shapes(support):
    index = np.arange(support)
    rng = np.random.default_rng(support)
    yield "rough", rng.dirichlet(np.full(support, 0.3))
    yield "uniform", np.ones(support)
    yield "bell", np.exp(-0.5 * ((index - support / 2) / (support / 10)) ** 2)
    yield "geometric", (1 - 8 / support) ** index
    yield "comb", (index % 13 == 3).astype(float)
    yield "two ends", np.isin(index, [1, support - 1]).astype(float)


@pytest.mark.parametrize("support", [17, 300, 1024])
@pytest.mark.parametrize("method", METHODS)
def test_certified_by_schur_cohn(support, method):
    """An independent test of both sides of the threshold, at sizes where dense roots are slow."""
    for name, weights in shapes(support):
        pmf = weights / weights.sum()
        threshold = stability.max_learning_rate(pmf, **method)
        for factor in (0.3, 0.9, 1 - 1e-5, 1 + 1e-5):
            polynomial = stability.characteristic_polynomial(pmf, step=factor * threshold, **method)
            assert roots_inside(polynomial) == (factor < 1), (name, factor)


def test_stable_set_of_two_intervals():
    """The end of the first interval, not of the last one."""
    pmf = np.zeros(8)
    pmf[[1, 7]] = 0.677, 0.323
    method = {"momentum": 0.9, "kind": "shifted"}
    threshold = stability.max_learning_rate(pmf, **method)
    radii = [
        stability.spectral_radius(pmf, step=factor * threshold, **method)
        for factor in (0.5, 0.99, 1.2, 1.936, 4.0)
    ]
    assert [radius < 1 for radius in radii] == [True, True, False, True, False]


def test_tangency():
    """A root that touches the circle and turns back is no threshold; one that leaves briefly is."""
    method = {"momentum": 0.9, "kind": "shifted"}

    def pmf(weight):
        return np.array([0, 1 - weight, 0, 0, 0, 0, 0, weight])

    def threshold(weight):
        return stability.max_learning_rate(pmf(weight), **method)

    low, high = 0.31, 0.32
    assert threshold(low) > 2 * threshold(high)
    for _ in range(45):
        middle = (low + high) / 2
        low, high = (middle, high) if threshold(middle) > 7.0 else (low, middle)
    touching = threshold(high)
    # Just above the critical weight the root is outside for a short interval of steps.
    leaves = threshold(high + 1e-9)
    assert leaves == pytest.approx(touching, rel=1e-3)
    assert leaves < touching
    outside = [
        stability.spectral_radius(pmf(high + 1e-9), step=leaves * (1 + excess), **method)
        for excess in np.geomspace(1e-6, 1e-2, 60)
    ]
    assert max(outside) > 1 > outside[-1]
    inside = [
        stability.spectral_radius(pmf(low - 1e-9), step=touching * factor, **method)
        for factor in 1 + np.linspace(-1e-3, 1e-3, 101)
    ]
    assert 1 - 1e-6 < max(inside) < 1


def test_zero_of_the_delay_polynomial_on_the_circle():
    """There T vanishes but no root passes: q(z) = 0 at z = -1 and elsewhere on the circle."""
    pmf = np.zeros(8)
    pmf[[2, 7]] = 0.5
    threshold = random_delay_threshold(pmf, NONE)
    assert threshold == pytest.approx(0.4424634842, abs=1e-9)
    assert stability.spectral_radius(pmf, step=threshold * 0.999) < 1
    assert stability.spectral_radius(pmf, step=threshold * 1.001) > 1
