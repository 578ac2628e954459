"""The dominant root of a constant delay against dense companion eigenvalues."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgd_jax.stability.arguments import as_momentum, as_pmf
from asgd_jax.stability.characteristic import build_polynomial
from asgd_jax.stability.closed_form import constant_threshold
from asgd_jax.stability.dominant_root import dominant_exponent

momenta = st.builds(
    as_momentum,
    st.sampled_from([0.0, 0.5, 0.9, 0.99]) | st.floats(0.0, 0.999),
    st.sampled_from(["heavy_ball", "shifted"]),
    st.booleans(),
)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 40), st.floats(-5.0, 2.0), momenta)
def test_against_dense_roots(delay, log_step, momentum):
    step = 10.0**log_step / (2 * delay + 1)
    roots = np.roots(build_polynomial(as_pmf(delay), step, momentum))
    found = np.exp(dominant_exponent(delay, step, momentum))
    assert abs(found) == pytest.approx(abs(roots).max(), abs=1e-6)
    assert abs(roots - found).min() < 1e-5


@pytest.mark.parametrize("delay", [150, 300])
@pytest.mark.parametrize("kind", ["heavy_ball", "shifted"])
@pytest.mark.parametrize("factor", [0.1, 0.9, 1.1, 10.0])
def test_against_dense_roots_at_hundreds(delay, kind, factor):
    momentum = as_momentum(0.9, kind, True)
    step = factor * constant_threshold(delay, momentum)
    roots = np.roots(build_polynomial(as_pmf(delay), step, momentum))
    exponent = dominant_exponent(delay, step, momentum)
    assert exponent.real == pytest.approx(math.log(abs(roots).max()), abs=1e-11)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 10**9), st.floats(0.5, 4.0), momenta)
def test_solves_the_equation_and_changes_sign_at_the_threshold(delay, factor, momentum):
    threshold = constant_threshold(delay, momentum)
    exponent = dominant_exponent(delay, factor * threshold, momentum)
    if abs(factor - 1) > 1e-6:
        assert (exponent.real > 0) == (factor > 1)
    late = delay if momentum.shifted else 0
    z_power = np.exp(delay * exponent) * np.expm1(exponent)
    left = z_power * (1 - momentum.value * np.exp(-(late + 1) * exponent))
    force = momentum.gain * factor * threshold
    assert abs(left + force) < 1e-7 * force


def test_no_step_and_dead_beat():
    plain = as_momentum(0.0, "heavy_ball", True)
    assert dominant_exponent(5, 0.0, plain) == 0
    assert dominant_exponent(0, 1.0, plain).real == -math.inf
