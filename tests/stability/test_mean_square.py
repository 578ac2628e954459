"""Mean-square stability against the dense map on second moments, and against many runs."""

import math

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

import asgd_jax.stability as stability
from asgd_jax.stability.arguments import as_momentum
from asgd_jax.stability.mean_square import noise_gain
from asgd_jax.stability.schur_cohn import autocovariance

methods = st.builds(
    lambda momentum, kind, dampening: {"momentum": momentum, "kind": kind, "dampening": dampening},
    st.sampled_from([0.0, 0.3, 0.9]),
    st.sampled_from(["heavy_ball", "shifted"]),
    st.booleans(),
)
pmfs = st.lists(st.floats(0.01, 1.0), min_size=2, max_size=6).map(lambda p: np.array(p) / sum(p))


def companions(pmf, step, momentum=0.0, kind="heavy_ball", dampening=True):
    """A_k: the step with staleness k, on (x_n, x_{n-1}, ...)."""
    gain, size = (1 - momentum if dampening else 1.0), len(pmf) + 1
    for k in range(len(pmf)):
        matrix = np.eye(size, k=-1)
        matrix[0, 0] = 1.0
        late = k if kind == "shifted" else 0
        matrix[0, late] += momentum
        matrix[0, late + 1] -= momentum
        matrix[0, k] -= gain * step
        yield matrix


def dense_radius(pmf, step, **method):
    """Root of the spectral radius of S -> sum_k p_k A_k S A_k^T, as one Kronecker matrix."""
    matrices = companions(pmf, step, **method)
    total = sum(p * np.kron(a, a) for p, a in zip(pmf, matrices, strict=True))
    return math.sqrt(abs(np.linalg.eigvals(total)).max())


@settings(deadline=None, max_examples=40)
@given(pmfs, methods, st.floats(-2.0, 0.7))
def test_radius_against_the_dense_map(pmf, method, log_factor):
    step = 10.0**log_factor * stability.max_learning_rate(pmf, **method)
    found = stability.spectral_radius(pmf, step=step, criterion="mean_square", **method)
    assert found == pytest.approx(dense_radius(pmf, step, **method), abs=1e-6)
    assert found >= stability.spectral_radius(pmf, step=step, **method) - 1e-6


@settings(deadline=None, max_examples=25)
@given(pmfs, methods)
def test_threshold_against_the_dense_map(pmf, method):
    threshold = stability.max_learning_rate(pmf, criterion="mean_square", **method)
    assert threshold <= stability.max_learning_rate(pmf, **method)
    assert dense_radius(pmf, threshold, **method) == pytest.approx(1.0, abs=1e-7)
    for fraction in (0.1, 0.4, 0.7, 0.95):
        assert dense_radius(pmf, fraction * threshold, **method) < 1.0
    assert dense_radius(pmf, 1.02 * threshold, **method) > 1.0


@pytest.mark.parametrize("method", [{}, {"momentum": 0.9}, {"momentum": 0.9, "kind": "shifted"}])
def test_support_64_is_certified(method):
    """A positive definite S that the map returns unchanged proves a spectral radius of 1."""
    pmf = np.full(64, 1 / 64)
    threshold = stability.max_learning_rate(pmf, criterion="mean_square", **method)
    polynomial = stability.characteristic_polynomial(pmf, step=threshold, **method)
    matrices = list(companions(pmf, threshold, **method))
    covariance = np.r_[autocovariance(polynomial), np.zeros(2)][: len(matrices[0])]
    if not method:  # the state of companions() is one longer than the polynomial without momentum
        covariance[-1] = -polynomial[1:] @ covariance[-2::-1]
    moments = scipy.linalg.toeplitz(covariance / covariance[0])
    assert np.linalg.eigvalsh(moments).min() > 0
    image = sum(p * a @ moments @ a.T for p, a in zip(pmf, matrices, strict=True))
    np.testing.assert_allclose(image, moments, atol=1e-9)


def test_many_runs():
    """The mean of x^2 over many runs settles below the threshold and not above."""
    rng = np.random.default_rng(0)
    pmf = np.array([0.5, 0.0, 0.0, 0.5])
    threshold = stability.max_learning_rate(pmf, criterion="mean_square")
    ends = []
    for factor in (0.7, 1.3):
        x = np.ones((20000, 4))
        squares = []
        for _ in range(40):
            lag = rng.choice(4, size=len(x), p=pmf)
            new = x[:, 0] - factor * threshold * np.take_along_axis(x, lag[:, None], 1)[:, 0]
            x = np.concatenate([new[:, None], x[:, :-1]], axis=1)
            squares.append(np.mean(x**2))
        ends.append(np.log(squares[-1] / squares[15]))
    assert ends[0] < -0.5
    assert ends[1] > 0.5


def test_constant_delay_needs_no_other_criterion():
    for delay in (0, 1, 7):
        mean = stability.max_learning_rate(delay, momentum=0.5)
        square = stability.max_learning_rate(delay, momentum=0.5, criterion="mean_square")
        assert mean == square
        radii = [
            stability.spectral_radius(delay, step=0.2, criterion=criterion)
            for criterion in ("mean", "mean_square")
        ]
        assert radii[0] == radii[1]
    one_atom = np.array([0.0, 0.0, 1.0])
    assert noise_gain(one_atom, 0.3, as_momentum(0, "heavy_ball", True)) == pytest.approx(
        0, abs=1e-12
    )


def test_delays_that_make_no_noise_at_the_edge():
    """At z = -1 staleness 0 and 2 see the same x, so nothing random is left there."""
    pmf = np.array([0.995, 0.0, 0.005])
    mean = stability.max_learning_rate(pmf)
    square = stability.max_learning_rate(pmf, criterion="mean_square")
    assert mean == pytest.approx(2.0)
    assert dense_radius(pmf, square * 0.999) < 1
    assert square <= mean
