"""Methods that adapt to random staleness, by every criterion, against plain NumPy."""

import functools
import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import brentq

import asgd_jax.stability as stability
from asgd_jax import compensate, delays
from asgd_jax.stability.product_growth import log_growth

max_rate = stability.optimizer_max_learning_rate
radius = stability.optimizer_spectral_radius


def before_sgd(transform):
    return lambda rate: optax.chain(transform, optax.sgd(rate))


# With what each multiplies a gradient of staleness 0, 1, 2, 3.
FACTORS = {
    "delay-adaptive": (compensate.delay_adaptive(2), [1.0, 1.0, 1.0, 2 / 3]),
    "power": (compensate.power_scaling(), [1.0, 2**-0.5, 3**-0.5, 0.5]),
    "staleness": (compensate.staleness_scaling(), [1.0, 1.0, 0.5, 1 / 3]),
}
PMF = np.array([0.2, 0.1, 0.3, 0.4])


def matrices(factors, rate):
    """Of (x_t, x_{t-1}, x_{t-2}, x_{t-3}), one for each staleness."""
    made = np.zeros((4, 4, 4))
    for k in range(4):
        made[k, 0, 0] = 1.0
        made[k, 0, k] -= rate * factors[k]
        made[k, [1, 2, 3], [0, 1, 2]] = 1.0
    return made


def largest(matrix):
    return abs(np.linalg.eigvals(matrix)).max()


@pytest.mark.parametrize("name", FACTORS)
def test_mean_and_mean_square(name):
    transform, factors = FACTORS[name]

    def mean(rate):
        return largest(np.tensordot(PMF, matrices(factors, rate), 1)) - 1.0

    def square(rate):
        return largest(np.tensordot(PMF, [np.kron(a, a) for a in matrices(factors, rate)], 1)) - 1.0

    for criterion, excess in (("mean", mean), ("mean_square", square)):
        found = max_rate(before_sgd(transform), PMF, sharpness=4.0, criterion=criterion)
        assert 4.0 * found == pytest.approx(brentq(excess, 0.3, 4.0), rel=1e-6)


def test_the_second_moment_grows_just_above_and_decays_just_below():
    transform, factors = FACTORS["delay-adaptive"]
    found = max_rate(before_sgd(transform), PMF, criterion="mean_square")
    traces = []
    for rate in (0.99 * found, 1.01 * found):
        moments = np.ones((4, 4))
        for _ in range(3000):
            moments = sum(p * a @ moments @ a.T for p, a in zip(PMF, matrices(factors, rate)))  # noqa: B905
        traces.append(np.trace(moments))
    assert traces[0] < 1e-6
    assert traces[1] > 1e6


def simulate(factors, rate, num_updates, momentum=0.0):
    """Growth of log|x| an update, of damped heavy ball whose gradients are multiplied."""
    staleness = np.random.default_rng(5).choice(4, size=num_updates, p=PMF)
    x, velocity, growth = [1.0] * 4, 0.0, 0.0
    for k in staleness:
        velocity = momentum * velocity + (1.0 - momentum) * factors[k] * x[k]
        x = [x[0] - rate * velocity, *x[:3]]
        norm = max(map(abs, x))
        x, velocity, growth = [each / norm for each in x], velocity / norm, growth + math.log(norm)
    return growth / num_updates


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_typical_run_grows_above_the_lyapunov_edge_and_shrinks_below(momentum):
    transform, factors = FACTORS["delay-adaptive"]

    def make(rate):
        direction = optax.ema(momentum, debias=False) if momentum else optax.identity()
        return optax.chain(transform, direction, optax.scale(-rate))

    found = max_rate(make, PMF, criterion="lyapunov")
    assert simulate(factors, 0.97 * found, 60_000, momentum) < 0.0
    assert simulate(factors, 1.03 * found, 60_000, momentum) > 0.0
    if momentum == 0.0:  # a rare run breaks out first
        assert found > 1.05 * max_rate(make, PMF, criterion="mean_square")


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_lyapunov_of_heavy_ball_is_that_of_its_formula(momentum):
    def make(rate):
        direction = optax.ema(momentum, debias=False) if momentum else optax.identity()
        return optax.chain(direction, optax.scale(-rate))

    process = delays.uniform(1, 4)
    expected = stability.lyapunov_max_learning_rate(process, sharpness=8.0, momentum=momentum)
    found = max_rate(make, process, sharpness=8.0, criterion="lyapunov")
    assert found == pytest.approx(expected.value, abs=expected.standard_error)
    growth = math.log(radius(make, process, learning_rate=0.05, criterion="lyapunov"))
    formula = stability.lyapunov_exponent(process, step=0.05, momentum=momentum)
    assert growth == pytest.approx(formula.value, rel=0.01)


@pytest.mark.parametrize("delay", [2, [0.0, 0.0, 1.0], delays.from_trace([2, 2])])
def test_lyapunov_of_a_constant_delay_is_exact(delay):
    found = max_rate(optax.sgd, delay, criterion="lyapunov")
    assert found == pytest.approx(stability.max_learning_rate(2), rel=1e-7)


def test_a_trace_is_taken_in_its_order():
    """Damped heavy ball: the spectral radius of the product of one period."""
    trace, m = [0, 3, 1, 1, 4, 2], 0.9

    def excess(rate):
        total = np.eye(6)
        for lag in trace:  # of (x_t, ..., x_{t-4}, v)
            velocity = m * np.eye(6)[5] + (1.0 - m) * np.eye(6)[lag]
            step = np.vstack([np.eye(6)[0] - rate * velocity, np.eye(6)[:4], velocity])
            total = step @ total
        return largest(total) - 1.0

    damped = lambda rate: optax.chain(optax.ema(m, debias=False), optax.scale(-rate))  # noqa: E731
    found = max_rate(damped, delays.from_trace(trace), criterion="lyapunov")
    assert found == pytest.approx(brentq(excess, 0.5, 0.7), rel=1e-3)


def test_seed_and_length_choose_the_sample():
    rates = [
        radius(optax.sgd, PMF, learning_rate=0.9, criterion="lyapunov", num_steps=4000, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert rates[0] == rates[1] != rates[2]
    assert rates[0] == pytest.approx(rates[2], abs=0.02)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("criterion", ["mean", "mean_square", "lyapunov"])
def test_held_methods_under_random_delays(criterion):
    """Adam is damped heavy ball at the preconditioned curvature, Gap-Aware leaves SGD alone."""
    adam = functools.partial(optax.adam, b2=0.9, eps=0.0)
    process = delays.uniform(0, 2)
    adams = optax.tree.set(adam(1.0).init(jnp.zeros(())), nu=jnp.asarray(4.0))

    def gap_aware(rate):
        return optax.chain(compensate.gap_aware(rate, decay=0.9), optax.sgd(rate))

    gaps = optax.tree.set(gap_aware(1.0).init(jnp.zeros(())), square_mean=jnp.array(1.0))
    for make, state, rate, method in (
        (adam, adams, 2.6, {"momentum": 0.9, "step": 1.3}),
        (gap_aware, gaps, 1.1, {"step": 1.1}),
    ):
        found = radius(
            make, process, learning_rate=rate, optimizer_state=state, criterion=criterion
        )
        if criterion == "lyapunov":
            typical = stability.lyapunov_exponent(process, **method)
            error = 3 * typical.standard_error  # of the same staleness, but not the same part of it
            assert math.log(found) == pytest.approx(typical.value, abs=error)
        else:
            expected = stability.spectral_radius(process, criterion=criterion, **method)
            assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("size", [4, 14])  # all eigenvalues, and the largest only
def test_growth_of_products_of_a_period_of_two(size):
    """Random matrices of which three rows differ, against the Kronecker product and a long run."""
    rng = np.random.default_rng(size)
    weights = np.array([0.5, 0.2, 0.3])
    jacobians = np.broadcast_to(rng.normal(size=(2, 1, size, size + 1)), (2, 3, size, size + 1))
    jacobians = jacobians / np.sqrt(size)
    jacobians[:, :, :3] += rng.normal(size=(2, 3, 3, size + 1)) / np.sqrt(size)
    both = np.eye(size**2)
    for alternatives in jacobians[..., :-1]:
        moment = sum(p * np.kron(a, a) for p, a in zip(weights, alternatives, strict=True))
        both = moment @ both
    expected = math.log(largest(both)) / 4.0
    assert log_growth(jacobians, weights) == pytest.approx(expected, abs=1e-9)

    sequence = rng.choice(3, size=20_000, p=weights)
    state, growth = np.ones(size), 0.0
    for update, choice in enumerate(sequence):
        state = jacobians[update % 2, choice, :, :-1] @ state
        growth, state = growth + math.log(abs(state).max()), state / abs(state).max()
    found = log_growth(jacobians, weights, sequence)
    assert found == pytest.approx(growth / sequence.size, abs=0.01)
    assert found < expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 10}, r"num_steps must be >= 1000, got 10"),
        ({"seed": -1}, r"seed must be an integer >= 0, got -1"),
    ],
)
def test_lyapunov_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        max_rate(optax.sgd, PMF, criterion="lyapunov", **options)
