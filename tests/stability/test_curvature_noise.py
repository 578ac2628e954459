"""Noise of the curvature against the dense map on second moments, closed forms and many runs."""

import math

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

import asgd_jax.stability as stability
from asgd_jax.stability.arguments import as_momentum
from asgd_jax.stability.curvature_noise import noisy_constant_threshold
from asgd_jax.stability.mean_square import mean_square_threshold, noise_gain

SQUARE = {"criterion": "mean_square"}
methods = st.builds(
    lambda momentum, kind, dampening: {"momentum": momentum, "kind": kind, "dampening": dampening},
    st.sampled_from([0.0, 0.3, 0.9]),
    st.sampled_from(["heavy_ball", "shifted"]),
    st.booleans(),
)
constants = st.integers(0, 5).map(lambda delay: np.eye(delay + 1)[delay])
random_delays = st.lists(st.floats(0.01, 1.0), min_size=2, max_size=6)
pmfs = st.one_of(constants, random_delays.map(lambda p: np.array(p) / sum(p)))
noises = st.floats(-2.0, 1.0).map(lambda power: 10.0**power)


def steps(pmf, step, momentum=0.0, kind="heavy_ball", dampening=True):
    """(p_k, A_k, B_k): the step with staleness k on (x_n, x_{n-1}, ...), and what noise adds."""
    gain, size = (1 - momentum if dampening else 1.0), len(pmf) + 1
    for k, p in enumerate(pmf):
        matrix, noisy = np.eye(size, k=-1), np.zeros((size, size))
        noisy[0, k] = gain * step
        late = k if kind == "shifted" else 0
        matrix[0, 0] = 1.0
        matrix[0, late] += momentum
        matrix[0, late + 1] -= momentum
        yield p, matrix - noisy, noisy


def dense_map(pmf, step, noise, **method):
    """S -> E[(A_k + xi B_k) S (A_k + xi B_k)^T] as one Kronecker matrix."""
    return sum(
        p * (np.kron(a, a) + noise * np.kron(b, b)) for p, a, b in steps(pmf, step, **method)
    )


def largest_eigenvalue(pmf, step, noise, **method):
    return abs(np.linalg.eigvals(dense_map(pmf, step, noise, **method))).max()


@settings(deadline=None, max_examples=60)
@given(pmfs, methods, noises)
def test_threshold_against_the_dense_map(pmf, method, noise):
    found = stability.max_learning_rate(pmf, curvature_noise=noise, **SQUARE, **method)

    def above(step):
        return largest_eigenvalue(pmf, step, noise, **method) - 1.0

    assert found == pytest.approx(brentq(above, 0.9 * found, 1.1 * found, xtol=1e-14), rel=1e-9)
    # No edge before it was passed over.
    assert all(above(share * found) < 0 for share in (1e-3, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99))


@settings(deadline=None, max_examples=40)
@given(pmfs, methods, noises, st.floats(-2.0, 0.5))
def test_radius_against_the_dense_map(pmf, method, noise, log_factor):
    step = 10.0**log_factor * stability.max_learning_rate(pmf, **method)
    found = stability.spectral_radius(pmf, step=step, curvature_noise=noise, **SQUARE, **method)
    dense = largest_eigenvalue(pmf, step, noise, **method)
    assert found**2 == pytest.approx(dense, rel=1e-6)  # eigenvalues of a nearly defective matrix


@settings(deadline=None, max_examples=40)
@given(pmfs, methods, noises, st.floats(0.05, 0.95))
def test_gain_against_the_covariance_of_the_mean(pmf, method, noise, share):
    """One pass of unit noise: the covariance it makes, and the noise that this makes."""
    step = share * stability.max_learning_rate(pmf, **method)
    parts = list(steps(pmf, step, **method))
    mean = sum(p * a for p, a, _ in parts)
    unit = np.zeros_like(mean)
    unit[0, 0] = 1.0
    covariance = scipy.linalg.solve_discrete_lyapunov(mean, unit)
    image = sum(p * (a @ covariance @ a.T + noise * b @ covariance @ b.T) for p, a, b in parts)
    expected = (image - mean @ covariance @ mean.T)[0, 0]
    found = noise_gain(pmf, step, as_momentum(**method), curvature_noise=noise)
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("delay", [0, 1, 2, 7, 31])
@pytest.mark.parametrize("noise", [1e-6, 0.1, 1.0, 30.0])
def test_the_closed_form_is_the_gain_of_one(delay, noise):
    plain = as_momentum()
    mean = stability.max_learning_rate(delay)
    by_gain = mean_square_threshold(np.eye(delay + 1)[delay], plain, mean, noise)
    assert noisy_constant_threshold(delay, noise) == pytest.approx(by_gain, rel=1e-10)


@pytest.mark.parametrize(
    ("workers", "delayed", "synchronous"),
    [(2, 0.618, 0.667), (8, 0.883, 0.889), (32, 0.969, 0.970)],
)
def test_large_batch_equivalence(workers, delayed, synchronous):
    """Shares of the full-batch edge that N workers of batch b keep, and S-SGD of batch N b."""
    noisy = stability.max_learning_rate(workers - 1, curvature_noise=1.0, **SQUARE)
    large = stability.max_learning_rate(0, curvature_noise=1.0 / workers, **SQUARE)
    assert noisy / stability.max_learning_rate(workers - 1) == pytest.approx(delayed, abs=5e-4)
    assert large / 2.0 == pytest.approx(synchronous, abs=5e-4)


@pytest.mark.parametrize("noise", [0.1, 1.0, 10.0])
def test_the_difference_is_of_second_order(noise):
    """A ten times larger N leaves a hundredth of it: both lose c/N to the first order."""
    differences = []
    for workers in (1000, 10_000):
        delayed = noisy_constant_threshold(workers - 1, noise)
        share = delayed / stability.max_learning_rate(workers - 1)
        assert (1.0 - share) * workers == pytest.approx(noise, rel=0.02)
        differences.append(abs(share - 1.0 / (1.0 + noise / workers)))
    assert differences[0] / differences[1] == pytest.approx(100, rel=0.1)


def test_a_delay_of_a_million():
    share = noisy_constant_threshold(10**6, 1.0) / stability.max_learning_rate(10**6)
    assert 1.0 - share == pytest.approx(2.0 / (2 * 10**6 + 1), rel=1e-5)


@pytest.mark.parametrize("method", [{}, {"momentum": 0.9}, {"momentum": 0.5, "kind": "shifted"}])
def test_many_runs(method):
    """Simulated updates, one draw of staleness and batch each, have the second moments of the map.

    Written from the update rule, not from the matrices: a velocity and a list of past iterates.
    """
    rng, runs = np.random.default_rng(0), 200_000
    pmf, noise, m = np.array([0.0, 0.5, 0.5]), 0.3, method.get("momentum", 0.0)
    step = stability.max_learning_rate(pmf, curvature_noise=noise, **SQUARE, **method)
    moments, iterates = np.ones(16), [np.ones(runs)] * 4
    velocities = [np.zeros(runs)] * 4
    for _ in range(12):
        moments = dense_map(pmf, step, noise, **method) @ moments
        lag = rng.choice(3, size=runs, p=pmf)
        curvature = 1.0 + math.sqrt(noise) * rng.choice([-1.0, 1.0], size=runs)
        stale = np.choose(lag, iterates[:3])
        kept = np.choose(lag, velocities[:3]) if "kind" in method else velocities[0]
        velocity = m * kept + (1.0 - m) * curvature * stale
        iterates = [iterates[0] - step * velocity, *iterates[:3]]
        velocities = [velocity, *velocities[:3]]
    square = iterates[0] ** 2
    error = square.std() / math.sqrt(runs)
    assert abs(square.mean() - moments[0]) < 4.0 * error
    assert error < 0.05 * moments[0]


def test_the_large_batch_of_a_rule_averages_the_noise():
    ratio = stability.rescale_learning_rate(
        0.8, 31, rule="exact", curvature_noise=1.0, **SQUARE
    ) / stability.rescale_learning_rate(0.8, 31, rule="exact")
    assert ratio == pytest.approx(0.9692 / 0.9697, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"curvature_noise": -1.0, **SQUARE}, "curvature_noise must be a finite number >= 0"),
        ({"curvature_noise": math.nan, **SQUARE}, "curvature_noise must be a finite number >= 0"),
        ({"curvature_noise": 1.0}, "pass criterion='mean_square'"),
    ],
)
def test_refusals(arguments, message):
    for function in (stability.max_learning_rate, stability.growth_time):
        step = {"step": 0.1} if function is stability.growth_time else {}
        with pytest.raises(ValueError, match=message):
            function(3, **step, **arguments)


def test_a_recorded_trace_has_no_known_noise():
    from asgd_jax import delays

    with pytest.raises(ValueError, match="not known for a recorded trace"):
        stability.max_learning_rate(delays.from_trace([1, 2]), curvature_noise=1.0, **SQUARE)
