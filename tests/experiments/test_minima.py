"""Measured learning rates against closed forms, on quadratics and on a network at a minimum."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.edges import minimum as minima
from experiments.edges.fullbatch import bisect, measure_max_learning_rate

TARGET = jnp.array([1.0, -2.0])


def quadratic(x, batch):
    return jnp.mean(batch) * (4.0 * (x[0] - TARGET[0]) ** 2 + (x[1] - TARGET[1]) ** 2) / 2


@pytest.fixture(scope="module")
def bowl():
    return minima.find_minimum(quadratic, jnp.zeros(2), [jnp.ones(1)], optax.sgd(0.2))


@pytest.fixture(scope="module")
def digits():
    problem = minima.digits_problem(num_train=128)
    return problem, minima.find_minimum(*problem, optax.sgd(0.05, momentum=0.98))


@pytest.mark.parametrize(
    "optimizer",
    [optax.sgd(0.2), optax.sgd(0.1, momentum=0.5), optax.lbfgs()],
    ids=["plain", "momentum", "lbfgs"],
)
def test_find_minimum_of_a_quadratic(optimizer):
    minimum = minima.find_minimum(quadratic, jnp.zeros(2), [jnp.ones(1)], optimizer)
    np.testing.assert_allclose(minimum.params, TARGET, atol=2e-5)
    assert minimum.gradient_norm <= 1e-5
    assert minimum.loss == pytest.approx(0.0, abs=1e-9)
    assert minimum.sharpness == pytest.approx(4.0, rel=1e-5)
    np.testing.assert_allclose(abs(minimum.direction), [1.0, 0.0], atol=1e-5)


def test_find_minimum_takes_the_mean_over_batches():
    def loss_fn(x, batch):
        return jnp.mean((x - batch) ** 2)

    batches = [jnp.array([0.0, 1.0]), jnp.array([2.0, 5.0])]
    minimum = minima.find_minimum(loss_fn, jnp.zeros(()), batches, optax.sgd(0.3))
    assert float(minimum.params) == pytest.approx(2.0, abs=1e-4)
    assert minimum.loss == pytest.approx(np.var([0.0, 1.0, 2.0, 5.0]), rel=1e-5)
    assert minimum.sharpness == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("learning_rate", "remedy"), [(10.0, "lower the learning rate"), (1e-6, "raise max_steps")]
)
def test_find_minimum_says_when_there_is_none(learning_rate, remedy):
    with pytest.raises(ValueError, match=remedy):
        minima.find_minimum(
            quadratic, jnp.zeros(2), [jnp.ones(1)], optax.sgd(learning_rate), max_steps=200
        )


@pytest.mark.parametrize("delay", [0, 1, 3])
@pytest.mark.parametrize(
    "method",
    [
        {},
        {"momentum": 0.5},
        {"momentum": 0.5, "dampening": False},
        {"momentum": 0.5, "kind": "shifted"},
        {"momentum": 0.5, "kind": "shifted", "dampening": False},
    ],
    ids=str,
)
def test_quadratic_is_measured_to_the_resolution(bowl, delay, method):
    found = measure_max_learning_rate(
        bowl, delay, quadratic, [jnp.ones(1)], resolution=0.01, **method
    )
    assert found.lower < found.value < found.upper <= 1.01 * found.lower
    assert found.value == pytest.approx(found.predicted, rel=0.01)


def test_batches_take_turns(bowl):
    # Two steps multiply the distance by (1 - 4 eta / 2)(1 - 12 eta / 2): -1 < it < 1 up to 2/3.
    batches = [jnp.array([0.5]), jnp.array([1.5])]
    found = measure_max_learning_rate(bowl, 0, quadratic, batches)
    assert found.predicted == pytest.approx(0.5)
    assert found.value == pytest.approx(2.0 / 3.0, rel=0.02)


def test_a_minimum_at_zero_is_left_too():
    def loss_fn(x, batch):
        return jnp.mean(batch) * jnp.sum(x**2)

    zero = minima.Minimum(jnp.zeros(3), 0.0, 0.0, 2.0, jnp.array([0.0, 1.0, 0.0]))
    found = measure_max_learning_rate(zero, 1, loss_fn, [jnp.ones(1)])
    assert found.value == pytest.approx(0.5, rel=0.02)


def test_only_the_loss_tells_when_distances_may_grow(bowl):
    found = measure_max_learning_rate(
        bowl, 0, quadratic, [jnp.ones(1)], growth_limit=float("inf"), perturbation=0.01
    )
    assert found.value == pytest.approx(found.predicted, rel=0.02)


@pytest.mark.parametrize("edge", [1e-4, 0.3, 1.0, 77.0])
def test_bisect(edge):
    tried = []

    def leaves(learning_rate):
        tried.append(learning_rate)
        return learning_rate > edge

    lower, upper, calls = bisect(leaves, 1.0, 0.05)
    assert lower <= edge < upper <= 1.05 * lower
    assert calls == len(tried)


@pytest.mark.parametrize("verdict", [True, False])
def test_bisect_gives_up(verdict):
    with pytest.raises(ValueError, match="leaves" if verdict else "stays"):
        bisect(lambda _: verdict, 1.0, 0.01)


def test_bad_arguments(bowl):
    with pytest.raises(ValueError, match="delay must be an integer >= 0, got -1"):
        measure_max_learning_rate(bowl, -1, quadratic, [jnp.ones(1)])
    with pytest.raises(ValueError, match="resolution must be a finite number > 0, got 0"):
        measure_max_learning_rate(bowl, 1, quadratic, [jnp.ones(1)], resolution=0.0)
    with pytest.raises(ValueError, match="there are no batches"):
        measure_max_learning_rate(bowl, 1, quadratic, [])
    with pytest.raises(ValueError, match="sharpness must be a finite number > 0"):
        measure_max_learning_rate(bowl._replace(sharpness=-1.0), 1, quadratic, [0])


@pytest.mark.optimised
def test_digits_start_at_a_true_minimum(digits):
    problem, minimum = digits
    gradient = jax.jit(jax.grad(problem.loss_fn))(minimum.params, problem.batches[0])
    assert float(optax.tree.norm(gradient)) <= 1.1e-5
    assert float(optax.tree.norm(minimum.params)) > 1.0
    assert problem.params["Dense_0"]["kernel"].shape == (64, 64)


@pytest.mark.optimised
@pytest.mark.parametrize("delay", [0, 1, 2, 4, 8, 16])
def test_digits_leave_where_the_theory_says(digits, delay):
    problem, minimum = digits
    found = measure_max_learning_rate(minimum, delay, problem.loss_fn, problem.batches)
    assert found.value == pytest.approx(found.predicted, rel=0.03)


@pytest.mark.optimised
@pytest.mark.parametrize(
    "method",
    [
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": False},
        {"momentum": 0.5, "kind": "shifted"},
    ],
    ids=str,
)
def test_digits_leave_where_the_theory_says_with_momentum(digits, method):
    problem, minimum = digits
    found = measure_max_learning_rate(minimum, 2, problem.loss_fn, problem.batches, **method)
    assert found.value == pytest.approx(found.predicted, rel=0.03)
