"""The Schur-Cohn recursion against dense roots and a dense Lyapunov equation."""

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from asgd_jax.stability.schur_cohn import (
    autocovariance,
    largest_modulus,
    roots_inside,
)

polynomials = st.lists(st.floats(-1.5, 1.5), min_size=1, max_size=9).map(
    lambda tail: np.array([1.0, *tail])
)


@settings(deadline=None, max_examples=150)
@given(polynomials, st.floats(0.3, 2.0))
def test_roots_inside(polynomial, radius):
    largest = abs(np.roots(polynomial)).max(initial=0.0)
    if abs(largest - radius) > 1e-4:
        assert roots_inside(polynomial, radius) == (largest < radius)


@settings(deadline=None, max_examples=60)
@given(polynomials)
def test_autocovariance(polynomial):
    largest = abs(np.roots(polynomial)).max(initial=0.0)
    covariance = autocovariance(polynomial)
    if largest > 0.98:
        return
    companion = scipy.linalg.companion(polynomial)
    noise = np.zeros_like(companion)
    noise[0, 0] = 1.0
    dense = scipy.linalg.solve_discrete_lyapunov(companion, noise)
    np.testing.assert_allclose(covariance[:-1], dense[0], rtol=1e-6, atol=1e-6)
    # The last one follows from the recursion of the process itself.
    assert covariance[-1] == pytest.approx(-polynomial[1:] @ covariance[-2::-1], abs=1e-6)


@pytest.mark.parametrize("degree", [5, 40, 200])
def test_largest_modulus(degree):
    rng = np.random.default_rng(degree)
    for scale in (0.1, 1.0):
        polynomial = np.r_[1.0, -1.0, scale * rng.dirichlet(np.ones(degree - 1))]
        expected = abs(np.roots(polynomial)).max()
        assert largest_modulus(polynomial) == pytest.approx(expected, rel=1e-9)


def test_unstable_is_none():
    assert autocovariance(np.array([1.0, -1.5])) is None
    assert autocovariance(np.array([1.0, 0.0, 1.0])) is None
