"""Thresholds: tabulated values, bisection over dense roots, time-domain runs, invariants."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import asgd_jax.stability as stability
from asgd_jax import delays

NONE = {}
DAMPED_5 = {"momentum": 0.5}
DAMPED_9 = {"momentum": 0.9}
UNDAMPED_9 = {"momentum": 0.9, "dampening": False}
SHIFTED_5 = {"momentum": 0.5, "kind": "shifted"}
SHIFTED_9 = {"momentum": 0.9, "kind": "shifted"}
METHODS = [NONE, DAMPED_5, DAMPED_9, UNDAMPED_9, SHIFTED_5, SHIFTED_9]
TABLE = {
    0: [2, 6, 38, 3.8, 6, 38],
    1: [1, 1, 1, 0.1, 1.5, 1.9],
    2: [0.6180340, 0.5615528, 0.5124922, 0.0512492, 0.8228757, 0.9662878],
    4: [0.3472964, 0.3117027, 0.2649769, 0.0264977, 0.4317289, 0.4872946],
    8: [0.1845367, 0.1701035, 0.1394199, 0.0139420, 0.2212068, 0.2446945],
    16: [0.0951638, 0.0904911, 0.0748802, 0.0074880, 0.1119722, 0.1226101],
    32: [0.0483275, 0.0469912, 0.0406353, 0.0040635, 0.0563323, 0.0613709],
}

momenta = st.sampled_from([0.0, 0.3, 0.9, 0.99]) | st.floats(0.0, 0.995)
methods = st.builds(
    lambda momentum, kind, dampening: {"momentum": momentum, "kind": kind, "dampening": dampening},
    momenta,
    st.sampled_from(["heavy_ball", "shifted"]),
    st.booleans(),
)
pmfs = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12).filter(lambda p: sum(p) > 0.1)


def normalised(weights):
    return np.array(weights) / math.fsum(weights)


def dense_radius(delay, step, **method):
    roots = np.roots(stability.characteristic_polynomial(delay, step=step, **method))
    return float(abs(roots).max())


def dense_threshold(delay, **method):
    """The first step, on a fine grid from 0, at which a dense root leaves; then bisection."""
    grid = np.geomspace(1e-4, 50.0, 2500)
    high = next(h for h in grid if dense_radius(delay, h, **method) > 1.0 + 1e-10)
    low = high * grid[0] / grid[1]
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if dense_radius(delay, middle, **method) > 1.0 else (middle, high)
    return low


@pytest.mark.parametrize("delay", TABLE)
def test_table(delay):
    computed = [stability.max_learning_rate(delay, **method) for method in METHODS]
    np.testing.assert_allclose(computed, TABLE[delay], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("process", "mean", "mean_square"),
    [
        (delays.uniform(1, 2), 0.82842712, 0.7639),
        (delays.uniform(1, 8), 0.41169779, 0.3621),
        (delays.uniform(1, 32), 0.13709117, 0.1284),
        (delays.discretized_normal(2), 0.68021687, 0.6073),
        (delays.discretized_normal(8), 0.18798220, 0.1872),
        (delays.discretized_normal(16), 0.09563215, 0.0956),
    ],
)
def test_random_table(process, mean, mean_square):
    assert stability.max_learning_rate(process) == pytest.approx(mean, abs=1e-8)
    assert dense_radius(process, mean) == pytest.approx(1.0, abs=1e-7)
    computed = stability.max_learning_rate(process, criterion="mean_square")
    assert computed == pytest.approx(mean_square, abs=1e-4)


@pytest.mark.parametrize("delay", [3, 7, [0.25, 0.5, 0.25], [0, 0, 0, 0.6, 0, 0, 0.4]])
@pytest.mark.parametrize("method", [NONE, {"momentum": 0.8}, {"momentum": 0.8, "kind": "shifted"}])
def test_against_dense_roots(delay, method):
    expected = dense_threshold(delay, **method)
    assert stability.max_learning_rate(delay, **method) == pytest.approx(expected, rel=1e-7)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 60) | pmfs.map(normalised), methods)
def test_edge_of_the_unit_disc(delay, method):
    threshold = stability.max_learning_rate(delay, **method)
    assert stability.spectral_radius(delay, step=threshold * (1 - 1e-4), **method) <= 1.0
    assert stability.spectral_radius(delay, step=threshold * (1 + 1e-4), **method) > 1.0


@settings(deadline=None, max_examples=25)
@given(pmfs.map(normalised), methods)
def test_stable_all_the_way_from_zero(pmf, method):
    threshold = stability.max_learning_rate(pmf, **method)
    for fraction in np.linspace(0.02, 0.99, 25):
        assert dense_radius(pmf, fraction * threshold, **method) < 1.0 + 1e-9


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), methods)
def test_falls_with_the_delay(delay, method):
    longer = stability.max_learning_rate(delay + 1, **method)
    assert longer <= stability.max_learning_rate(delay, **method) * (1 + 1e-12)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 50), methods, st.floats(1e-3, 1e3))
def test_scales_with_sharpness_and_inverts(delay, method, sharpness):
    unit = stability.max_learning_rate(delay, **method)
    rate = stability.max_learning_rate(delay, sharpness=sharpness, **method)
    assert rate == pytest.approx(unit / sharpness, rel=1e-12)
    assert stability.max_sharpness(rate, delay, **method) == pytest.approx(sharpness, rel=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.9, 0.999])
def test_closed_forms(momentum):
    rate = stability.max_learning_rate
    assert rate(0, momentum=momentum) == pytest.approx(2 * (1 + momentum) / (1 - momentum))
    assert rate(0, momentum=momentum, dampening=False) == pytest.approx(2 * (1 + momentum))
    assert rate(0, momentum=momentum, kind="shifted") == rate(0, momentum=momentum)
    assert rate(1, momentum=momentum) == pytest.approx(1.0, rel=1e-12)
    assert rate(1, momentum=momentum, kind="shifted") == pytest.approx(1 + momentum, rel=1e-12)


def test_laws_of_large_delays():
    delay = 10**6
    rate = stability.max_learning_rate
    assert 1 / rate(delay) == pytest.approx((2 * delay + 1) / math.pi, rel=1e-9)
    for m in (0.5, 0.9, 0.99):
        damped = (2 * delay + (1 + m) / (1 - m)) / math.pi
        assert 1 / rate(delay, momentum=m) == pytest.approx(damped, rel=1e-7)
        undamped = rate(delay, momentum=m, dampening=False)
        assert undamped == pytest.approx((1 - m) * rate(delay, momentum=m), rel=1e-12)
    assert rate(delay, momentum=1 - 1e-9, kind="shifted") / rate(delay) == pytest.approx(
        4 / math.pi
    )
    assert rate(1, momentum=1 - 1e-9, kind="shifted") / rate(1) == pytest.approx(2.0)
    worse = rate(1000, momentum=0.9, kind="shifted", dampening=False)
    assert worse < 0.2 * rate(1000)


@pytest.mark.parametrize("largest", [64, 1024])
def test_uniform_delays_tolerate_half_pi_more(largest):
    threshold = stability.max_learning_rate(np.r_[0.0, np.full(largest, 1 / largest)])
    assert threshold * 2 * largest / math.pi**2 == pytest.approx(1.0, abs=5 / largest)
    constant = stability.max_learning_rate((largest + 1) // 2)
    assert threshold / constant == pytest.approx(math.pi / 2, rel=5 / largest)


def test_random_workers():
    """Geometric delays are damped heavy ball with m = 1 - 1/N in the mean, far from the truth."""
    mean_squares = []
    for workers in (4, 8, 16, 32):
        m = 1 - 1 / workers
        pmf = normalised(m ** np.arange(32 * workers) / workers)
        threshold = stability.max_learning_rate(pmf)
        assert threshold == pytest.approx(2 * (2 * workers - 1), rel=1e-9)
        assert threshold == pytest.approx(stability.max_learning_rate(0, momentum=m), rel=1e-9)
        for step in (0.3, 2.0) if workers < 16 else ():
            geometric = stability.spectral_radius(pmf, step=step)
            heavy_ball = stability.spectral_radius(0, step=step, momentum=m)
            assert geometric == pytest.approx(heavy_ball, rel=1e-6)
        mean_squares.append(stability.max_learning_rate(pmf, criterion="mean_square"))
    slopes = np.diff(np.log2(mean_squares))
    np.testing.assert_allclose(slopes, -0.5, atol=0.04)


def run(delay, step, momentum=0.0, kind="heavy_ball", dampening=True, num_steps=1000):
    """Log norm of the last delay + 2 iterates, by the update rule with its momentum buffer."""
    gain = 1.0 - momentum if dampening else 1.0
    x, v = [1.0] * (delay + 2), [0.0] * (delay + 1)
    logs, scale = [], 0.0
    for _ in range(num_steps):
        old = v[-1 - delay] if kind == "shifted" else v[-1]
        v.append(momentum * old + gain * x[-1 - delay])
        x.append(x[-1] - step * v[-1])
        x, v = x[-delay - 2 :], v[-delay - 1 :]
        norm = math.hypot(*x)
        logs.append(scale + math.log(norm))
        if not 1e-100 < norm < 1e100:
            x, v, scale = [y / norm for y in x], [y / norm for y in v], logs[-1]
    return np.array(logs)


@pytest.mark.parametrize("delay", [0, 1, 5, 8])
@pytest.mark.parametrize("method", [NONE, DAMPED_9, UNDAMPED_9, SHIFTED_5])
def test_time_domain(delay, method):
    threshold = stability.max_learning_rate(delay, **method)
    growth = stability.growth_time(delay, step=1.01 * threshold, **method)
    num_steps = int(8 * growth) + 2000
    logs = run(delay, 1.01 * threshold, **method, num_steps=num_steps)
    # The start holds decaying modes; the slope of the second half is free of them and of the beat.
    half = np.arange(num_steps // 2, num_steps)
    slope = np.polyfit(half, logs[half], 1)[0]
    assert slope > 0
    assert 1 / slope == pytest.approx(growth, rel=0.05)
    decaying = run(delay, 0.99 * threshold, **method, num_steps=num_steps)
    assert np.polyfit(half, decaying[half], 1)[0] < 0


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**5), methods)
def test_max_delay_is_the_last_stable_one(delay, method):
    threshold = stability.max_learning_rate(delay, **method)
    found = stability.max_delay(threshold * (1 - 1e-9), **method)
    assert found >= delay
    assert stability.max_learning_rate(found, **method) >= threshold * (1 - 1e-9)
    assert stability.max_learning_rate(found + 1, **method) < threshold * (1 - 1e-9)


def test_max_delay_edges():
    assert stability.max_delay(2.0) == 0
    assert stability.max_delay(0.0483, sharpness=1.0) == 32
    assert stability.max_delay(0.00483, sharpness=10.0) == 32
    assert stability.max_delay(2.1) is None
    assert stability.max_delay(1e-12) == pytest.approx(math.pi / 2 * 1e12, rel=1e-6)


def test_a_trace_uses_its_own_growth():
    trace = delays.from_trace([0, 1, 2, 1])
    expected = stability.lyapunov_max_learning_rate(trace, sharpness=2.0).value
    assert stability.max_learning_rate(trace, sharpness=2.0) == expected
    mean_square = stability.max_learning_rate(trace, sharpness=2.0, criterion="mean_square")
    assert mean_square == expected
