"""The polynomial against the update rules themselves, written with an explicit momentum buffer."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import asgd_jax.stability as stability
from asgd_jax import delays

MOMENTA = [
    {},
    {"momentum": 0.5},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": False},
    {"momentum": 0.5, "kind": "shifted"},
    {"momentum": 0.9, "kind": "shifted", "dampening": False},
]


def mean_of_runs(pmf, step, momentum=0.0, kind="heavy_ball", dampening=True, num_steps=7):
    """E[x_t] by enumeration: every sequence of staleness, weighted with its probability."""
    start = len(pmf)  # history before the first update, so that no ramp is in the way
    runs = [(1.0, np.linspace(1.0, 2.0, start).tolist(), np.linspace(0.3, 0.1, start).tolist())]
    gain = 1.0 - momentum if dampening else 1.0
    # With v_n = x_{n-1} - x_n, as the buffers of a real past are.
    _, x, v = runs[0]
    v[1:] = [before - after for before, after in itertools.pairwise(x)]
    for _ in range(num_steps):
        following = []
        for weight, x, v in runs:
            for k, probability in enumerate(pmf):
                if probability:
                    old = v[-1 - k] if kind == "shifted" else v[-1]
                    velocity = momentum * old + gain * step * x[-1 - k]
                    following.append((weight * probability, [*x, x[-1] - velocity], [*v, velocity]))
        runs = following
    return np.sum([weight * np.array(x) for weight, x, _ in runs], axis=0)


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("pmf", [[1.0], [0, 1.0], [0.5, 0.5], [0.2, 0, 0.8], [0, 0.3, 0, 0.7]])
def test_mean_follows_the_polynomial(pmf, momentum):
    polynomial = stability.characteristic_polynomial(pmf, step=0.3, **momentum)
    mean = mean_of_runs(pmf, 0.3, **momentum)
    first = max(len(pmf) + 1, polynomial.size - 1)  # v[0] is arbitrary, so skip what it touches
    for t in range(first, mean.size):
        window = mean[t - polynomial.size + 1 : t + 1][::-1]
        if t - polynomial.size + 1 >= 1:
            assert polynomial @ window == pytest.approx(0.0, abs=1e-12)


def test_textbook_forms():
    one = stability.characteristic_polynomial
    np.testing.assert_allclose(one(0, step=0.3), [1, -0.7])
    np.testing.assert_allclose(one(3, step=0.3), [1, -1, 0, 0, 0.3])
    np.testing.assert_allclose(one(0, step=0.3, momentum=0.5), [1, -1.5 + 0.15, 0.5])
    np.testing.assert_allclose(one(1, step=0.3, momentum=0.5), [1, -1.5, 0.5 + 0.15])
    np.testing.assert_allclose(
        one(3, step=0.3, momentum=0.5, dampening=False), [1, -1.5, 0.5, 0, 0.3]
    )
    # (z - 1)(z^(t+1) - m) + (1 - m) h z
    np.testing.assert_allclose(
        one(2, step=0.3, momentum=0.5, kind="shifted"), [1, -1, 0, -0.5 + 0.15, 0.5]
    )


def test_processes_and_arrays_agree():
    process = delays.uniform(1, 4)
    np.testing.assert_array_equal(
        stability.characteristic_polynomial(process, step=0.2, momentum=0.3),
        stability.characteristic_polynomial(process.pmf, step=0.2, momentum=0.3),
    )


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 20), st.floats(0, 3), st.floats(0, 0.99))
def test_shifted_and_heavy_ball_agree_without_delay(delay, step, momentum):
    np.testing.assert_allclose(
        stability.characteristic_polynomial(0, step=step, momentum=momentum, kind="shifted"),
        stability.characteristic_polynomial(0, step=step, momentum=momentum),
        atol=1e-14,
    )
    plain = stability.characteristic_polynomial(delay, step=step)
    shifted = stability.characteristic_polynomial(delay, step=step, kind="shifted")
    np.testing.assert_array_equal(plain, shifted)
