"""Spectral radius and growth time."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import asgd_jax.stability as stability

pmfs = st.lists(st.floats(0.0, 1.0), min_size=2, max_size=10).filter(lambda p: sum(p) > 0.1)


@pytest.mark.parametrize(
    ("delay", "method", "expected"),
    [
        (0, {}, 6.738),
        (8, {}, 154.7),
        (32, {}, 592.4),
        (32, {"momentum": 0.9, "kind": "shifted"}, 7973.7),
    ],
)
def test_table(delay, method, expected):
    step = 1.08 * stability.max_learning_rate(delay, **method)
    assert stability.growth_time(delay, step=step, **method) == pytest.approx(expected, rel=2e-4)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.floats(0.0, 5.0), st.floats(0.0, 0.99))
def test_never_negative_and_inf_when_stable(delay, factor, momentum):
    threshold = stability.max_learning_rate(delay, momentum=momentum)
    time = stability.growth_time(delay, step=factor * threshold, momentum=momentum)
    assert time > 0
    if factor < 1 - 1e-6:
        assert time == math.inf
    if factor > 1 + 1e-6:
        radius = stability.spectral_radius(delay, step=factor * threshold, momentum=momentum)
        assert math.isfinite(time)
        assert time * math.log(radius) == pytest.approx(1.0, rel=1e-3)


@settings(deadline=None, max_examples=50)
@given(pmfs, st.floats(0.01, 3.0), st.floats(0.0, 0.95), st.sampled_from(["heavy_ball", "shifted"]))
def test_random_delays_against_dense_roots(weights, step, momentum, kind):
    pmf = np.array(weights) / sum(weights)
    method = {"momentum": momentum, "kind": kind}
    roots = np.roots(stability.characteristic_polynomial(pmf, step=step, **method))
    radius = stability.spectral_radius(pmf, step=step, **method)
    assert radius == pytest.approx(abs(roots).max(), rel=1e-6)


@pytest.mark.parametrize("support", [140, 160])
def test_both_routes_agree(support):
    """Dense eigenvalues up to degree 150, Schur-Cohn bisection beyond."""
    pmf = np.random.default_rng(0).dirichlet(np.ones(support))
    step = 1.05 * stability.max_learning_rate(pmf)
    roots = np.roots(stability.characteristic_polynomial(pmf, step=step))
    time = stability.growth_time(pmf, step=step)
    assert time == pytest.approx(1 / math.log(abs(roots).max()), rel=1e-6)


def test_mean_square_grows_no_slower_than_the_mean():
    pmf = np.full(8, 1 / 8)
    step = 1.2 * stability.max_learning_rate(pmf)
    mean = stability.growth_time(pmf, step=step)
    assert stability.growth_time(pmf, step=step, criterion="mean_square") < mean


def test_at_rest():
    assert stability.spectral_radius(3, step=0.0) == 1.0
    assert stability.spectral_radius([0.5, 0.5], step=0.0) == pytest.approx(1.0)
    assert stability.spectral_radius([0.5, 0.5], step=0.0, criterion="mean_square") == 1.0
    assert stability.spectral_radius(0, step=1.0) == 0.0
    assert stability.growth_time(3, step=0.0) == math.inf
