"""Learning-rate rules."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import asgd_jax.stability as stability
from asgd_jax import delays
from asgd_jax.stability.rules import mean_delay


def test_values():
    rescale = stability.rescale_learning_rate
    assert rescale(0.8, 32) == 0.025
    assert rescale(0.8, 32, rule="exact") == pytest.approx(0.0193, abs=5e-5)
    assert rescale(0.8, 16, rule="sqrt") == 0.2
    assert rescale(0.8, 16, rule="none") == 0.8


@pytest.mark.parametrize("rule", ["inverse", "exact", "sqrt", "none"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_no_delay_changes_nothing(rule, momentum):
    rate = stability.rescale_learning_rate(0.3, 0, rule=rule, momentum=momentum)
    assert rate == pytest.approx(0.3, rel=1e-15)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000))
def test_exact_is_the_sine(delay):
    exact = stability.rescale_learning_rate(1.0, delay, rule="exact")
    assert exact == pytest.approx(math.sin(math.pi / (2 * (2 * delay + 1))), rel=1e-12)


@pytest.mark.parametrize("method", [{}, {"momentum": 0.9}, {"momentum": 0.9, "kind": "shifted"}])
def test_exact_keeps_the_sharpest_stable_minimum(method):
    delayed = stability.rescale_learning_rate(0.3, 12, rule="exact", **method)
    before = stability.max_sharpness(0.3, 0, **method)
    assert stability.max_sharpness(delayed, 12, **method) == pytest.approx(before)


def test_large_delay_ratio():
    ratio = stability.rescale_learning_rate(1.0, 10**5, rule="exact") * 10**5
    assert ratio == pytest.approx(math.pi / 4, rel=1e-4)  # 21 % below 1 / delay


def test_random_delays_use_their_mean():
    process = delays.uniform(1, 7)
    assert stability.rescale_learning_rate(0.8, process) == pytest.approx(0.2)
    assert stability.rescale_learning_rate(0.8, process, rule="sqrt") == pytest.approx(0.4)
    assert stability.rescale_learning_rate(0.8, [0.5, 0.5]) == 0.8  # never above the start
    mean_square = stability.rescale_learning_rate(
        0.8, process, rule="exact", criterion="mean_square"
    )
    assert mean_square < stability.rescale_learning_rate(0.8, process, rule="exact")
    assert mean_delay(delays.from_trace([1, 2, 3])) == pytest.approx(2.0, abs=1e-3)
