"""Growth along a recorded sequence of staleness."""

import math

import numpy as np
import pytest

import asgd_jax.stability as stability
from asgd_jax import delays


@pytest.mark.parametrize("delay", [0, 1, 3, 8])
@pytest.mark.parametrize(
    "method",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.5, "dampening": False},
        {"momentum": 0.5, "kind": "shifted"},
    ],
)
def test_constant_trace_is_the_closed_form(delay, method):
    threshold = stability.max_learning_rate(delay, **method)
    estimate = stability.lyapunov_max_learning_rate([delay], num_steps=20_000, **method)
    assert estimate.value == pytest.approx(threshold, rel=2e-3)
    step = 1.3 * threshold
    exponent = stability.lyapunov_exponent([delay], step=step, num_steps=20_000, **method)
    expected = math.log(stability.spectral_radius(delay, step=step, **method))
    assert exponent.value == pytest.approx(expected, rel=3e-2)


def product_exponent(trace, step, momentum=0.0, kind="heavy_ball", dampening=True):
    """Log of the spectral radius of the dense product over one period, a step."""
    gain, size = (1 - momentum if dampening else 1.0), max(trace) + 2
    total = np.eye(size)
    for lag in trace:
        matrix = np.eye(size, k=-1)
        matrix[0, 0] = 1.0
        late = lag if kind == "shifted" else 0
        matrix[0, late] += momentum
        matrix[0, late + 1] -= momentum
        matrix[0, lag] -= gain * step
        total = matrix @ total
    return math.log(abs(np.linalg.eigvals(total)).max()) / len(trace)


@pytest.mark.parametrize("method", [{}, {"momentum": 0.7}, {"momentum": 0.7, "kind": "shifted"}])
@pytest.mark.parametrize("step", [0.2, 1.5])
def test_periodic_trace_is_a_matrix_product(method, step):
    trace = [0, 3, 1, 1, 4, 2]
    exponent = stability.lyapunov_exponent(trace, step=step, num_steps=20_000, **method)
    expected = product_exponent(trace, step, **method)
    assert exponent.value == pytest.approx(expected, abs=2e-3 * max(1, abs(expected)))


def test_standard_error_covers_independent_runs():
    """Estimates from independent staleness scatter by about what each says of itself."""
    process = delays.uniform(1, 4)
    estimates = [
        stability.lyapunov_exponent(process, step=0.7, num_steps=4000, seed=seed)
        for seed in range(24)
    ]
    values = np.array([estimate.value for estimate in estimates])
    stated = np.mean([estimate.standard_error for estimate in estimates])
    assert 0.5 < values.std(ddof=1) / stated < 2.0


def test_typical_runs_outlive_the_mean_square():
    """The mean square diverges first, carried by rare runs; the typical run shrinks beyond it."""
    process = delays.categorical([0.75, 0.0, 0.0, 0.25])
    square = stability.max_learning_rate(process, criterion="mean_square")
    typical = stability.lyapunov_max_learning_rate(process, num_steps=20_000)
    assert typical.value - 4 * typical.standard_error > square


def test_simulated_workers():
    trace = delays.simulate_workers(8, 20_000, schedule="round_robin")
    estimate = stability.max_learning_rate(delays.from_trace(trace))
    assert estimate == pytest.approx(stability.max_learning_rate(7), rel=2e-3)


def test_array_and_process_agree_and_sharpness_scales():
    trace = np.array([2, 0, 1])
    of_array = stability.lyapunov_max_learning_rate(trace, num_steps=3000)
    of_process = stability.lyapunov_max_learning_rate(
        delays.from_trace(trace), num_steps=3000, sharpness=4.0
    )
    assert of_process.value == pytest.approx(of_array.value / 4)
    assert of_process.standard_error == pytest.approx(of_array.standard_error / 4)


def test_x_reaches_zero():
    assert stability.lyapunov_exponent([0], step=1.0, num_steps=1000).value == -math.inf
    assert stability.lyapunov_exponent([0], step=1e300, num_steps=1000).value == pytest.approx(
        300 * math.log(10)
    )
