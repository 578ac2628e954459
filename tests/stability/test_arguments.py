"""Bad input is named, in every public function."""

import numpy as np
import pytest

import asgd_jax.stability as stability
from asgd_jax import delays
from asgd_jax.stability.arguments import as_delay, as_momentum

NAN = float("nan")
FUNCTIONS = {
    "max_learning_rate": lambda delay, **more: stability.max_learning_rate(delay, **more),
    "max_sharpness": lambda delay, **more: stability.max_sharpness(0.1, delay, **more),
    "characteristic_polynomial": lambda delay, **more: stability.characteristic_polynomial(
        delay, step=0.1, **more
    ),
    "spectral_radius": lambda delay, **more: stability.spectral_radius(delay, step=0.1, **more),
    "growth_time": lambda delay, **more: stability.growth_time(delay, step=0.1, **more),
    "rescale_learning_rate": lambda delay, **more: stability.rescale_learning_rate(
        0.1, delay, **more
    ),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize(
    ("delay", "more", "message"),
    [
        (-1, {}, "delay must be an integer >= 0, got -1"),
        (1.5, {}, "delay must be an integer >= 0, got 1.5"),
        ("x", {}, "delay must be an integer >= 0, got 'x'"),
        (None, {}, "delay must be an integer >= 0, got None"),
        (True, {}, "delay must be an integer >= 0, got True"),
        ([0.5, -0.5, 1.0], {}, r"pmf\[1\] is -0.5"),
        ([0.5, NAN], {}, r"pmf\[1\] is nan"),
        ([0.5, 0.4], {}, "pmf sums to 0.9, not 1"),
        ([], {}, "pmf must be a non-empty vector"),
        (1, {"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0"),
        (1, {"momentum": -0.1}, r"momentum must lie in \[0, 1\), got -0.1"),
        (1, {"momentum": NAN}, r"momentum must lie in \[0, 1\), got nan"),
        (1, {"momentum": "x"}, "momentum must be a number, got 'x'"),
        (1, {"kind": "nesterov"}, "kind must be one of heavy_ball, shifted, got 'nesterov'"),
    ],
)
def test_bad_delay_or_momentum(function, delay, more, message):
    with pytest.raises(ValueError, match=message):
        function(delay, **more)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stability.max_learning_rate(1, sharpness=0.0), "sharpness must be .* got 0.0"),
        (lambda: stability.max_learning_rate(1, sharpness=NAN), "sharpness must be .* got nan"),
        (lambda: stability.max_learning_rate(1, criterion="x"), "criterion must be one of mean, m"),
        (lambda: stability.max_sharpness(-1.0, 1), "learning_rate must be .* got -1.0"),
        (lambda: stability.max_delay(NAN), "learning_rate must be .* got nan"),
        (lambda: stability.max_delay(0.1, sharpness=-1), "sharpness must be .* got -1"),
        (lambda: stability.max_delay(0.1, momentum=2), "momentum must lie in"),
        (lambda: stability.growth_time(1, step=-0.1), "step must be .* got -0.1"),
        (lambda: stability.spectral_radius(1, step=NAN), "step must be .* got nan"),
        (lambda: stability.spectral_radius(1, step=1, criterion="x"), "criterion must be one of"),
        (lambda: stability.rescale_learning_rate(0.1, 2, rule="linear"), "rule must be one of"),
        (lambda: stability.rescale_learning_rate(0.0, 2), "learning_rate must be .* got 0.0"),
        (lambda: stability.lyapunov_exponent([0, -1], step=1), r"trace\[1\] is -1"),
        (lambda: stability.lyapunov_exponent([0.5], step=1), "trace must hold integers"),
        (lambda: stability.lyapunov_exponent(3, step=1), "trace must be a non-empty vector"),
        (
            lambda: stability.lyapunov_exponent([0], step=1, num_steps=9),
            "num_steps must be >= 1000",
        ),
        (lambda: stability.lyapunov_max_learning_rate([0], sharpness=0), "sharpness must be"),
    ],
)
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["characteristic_polynomial", "spectral_radius", "growth_time"])
def test_a_trace_has_no_characteristic_equation(name):
    with pytest.raises(
        ValueError, match=r"without a distribution.*recorded trace.*lyapunov_exponent.*the int"
    ):
        FUNCTIONS[name](delays.from_trace([1, 2]))


def test_every_form_of_a_constant_delay_is_the_same():
    pmf = np.array([0, 0, 0, 1.0])
    for delay in (3, np.int64(3), pmf, list(pmf), delays.constant(3), delays.categorical(pmf)):
        assert as_delay(delay) == 3


def test_without_momentum_kind_and_dampening_do_not_matter():
    assert as_momentum(0, "shifted", False) == as_momentum(0, "heavy_ball", True)
