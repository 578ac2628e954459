"""Thresholds under delays that differ by parameter, against companion matrices and in time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgd_jax import curvature, stability
from asgd_jax.stability import stages_max_learning_rate, stages_spectral_radius

PROFILES = {
    "pipeline": (5, 5, 4, 4, 2, 2, 0, 0),
    "two stages": (0, 0, 0, 0, 3, 3, 3, 3),
    "equal": (4,) * 8,
    "one late": (9, 0, 0, 0, 0, 0, 0, 0),
}


def random_hessian(size, seed):
    roots = np.random.default_rng(seed).standard_normal((size, size))
    return roots @ roots.T / size


def companion_radius(hessian, delays, rate, momentum=0.0, dampening=True):
    """Largest eigenvalue of the update of (v, x_t, x_{t-1}, ...), written from the update rule."""
    size, longest = len(hessian), max(delays)
    blocks = np.zeros((longest + 2, longest + 2, size, size))
    eye = np.eye(size)
    gain = 1.0 - momentum if dampening else 1.0
    # Block 0 is the momentum, block 1 + s the parameters of s updates ago.
    for at, delay in enumerate(delays):
        blocks[0, 1 + delay][:, at] += gain * hessian[:, at]
    blocks[0, 0] = momentum * eye
    blocks[1] = -rate * blocks[0]
    blocks[1, 1] += eye
    for age in range(longest):
        blocks[2 + age, 1 + age] = eye
    matrix = blocks.transpose(0, 2, 1, 3).reshape((longest + 2) * size, -1)
    return np.abs(np.linalg.eigvals(matrix)).max()


def by_companion(hessian, delays, **method):
    low, high = 0.0, 1.0
    while companion_radius(hessian, delays, high, **method) <= 1.0 + 1e-12:
        low, high = high, 2.0 * high
    # The first crossing, on a grid: a second window of stability is none.
    grid = np.linspace(0.0, high, 200)[1:]
    first = next(
        k for k, rate in enumerate(grid)
        if companion_radius(hessian, delays, rate, **method) > 1.0 + 1e-10
    )  # fmt: skip
    low, high = (0.0 if first == 0 else grid[first - 1]), grid[first]
    for _ in range(45):
        middle = (low + high) / 2.0
        unstable = companion_radius(hessian, delays, middle, **method) > 1.0 + 1e-12
        low, high = (low, middle) if unstable else (middle, high)
    return (low + high) / 2.0


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    "method", [{}, {"momentum": 0.9}, {"momentum": 0.5, "dampening": False}], ids=str
)
def test_against_the_companion_matrix(profile, method):
    delays = PROFILES[profile]
    for seed in range(3):
        hessian = random_hessian(len(delays), seed)
        found = stages_max_learning_rate(hessian, delays, **method)
        assert found == pytest.approx(by_companion(hessian, delays, **method), rel=1e-6)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("method", [{}, {"momentum": 0.9}], ids=str)
def test_growth_is_the_companion_matrix_s(profile, method):
    delays, hessian = PROFILES[profile], random_hessian(8, 2)
    for factor in (0.5, 1.0, 1.3):
        rate = factor * stages_max_learning_rate(hessian, delays, **method)
        found = stages_spectral_radius(hessian, delays, learning_rate=rate, **method)
        expected = companion_radius(hessian, delays, rate, **method)
        assert found == pytest.approx(expected, abs=1e-7)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    delays=st.lists(st.integers(0, 6), min_size=3, max_size=3),
    momentum=st.sampled_from([0.0, 0.6]),
)
def test_any_three_delays(seed, delays, momentum):
    hessian = random_hessian(3, seed)
    found = stages_max_learning_rate(hessian, delays, momentum=momentum)
    assert found == pytest.approx(by_companion(hessian, delays, momentum=momentum), rel=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("delay", [0, 1, 7, 40])
def test_equal_delays_are_one_delay(delay, momentum):
    hessian = random_hessian(5, 1)
    top = np.linalg.eigvalsh(hessian)[-1]
    expected = stability.max_learning_rate(delay, momentum=momentum, sharpness=top)
    found = stages_max_learning_rate(hessian, [delay] * 5, momentum=momentum)
    assert found == pytest.approx(expected, rel=1e-7)


def test_the_bounds_hold_and_the_mean_delay_is_another_number():
    hessian = random_hessian(8, 3)
    top = np.linalg.eigvalsh(hessian)[-1]
    delays = PROFILES["pipeline"]
    found = stages_max_learning_rate(hessian, delays)
    low, high = (stability.max_learning_rate(d, sharpness=top) for d in (max(delays), min(delays)))
    assert low < found < high


@pytest.mark.parametrize("profile", ["pipeline", "two stages", "one late"])
def test_in_time_one_percent_decides(profile):
    hessian, delays = random_hessian(8, 5), PROFILES[profile]
    for factor, grows in ((0.99, False), (1.01, True)):
        rate = factor * stages_max_learning_rate(hessian, delays)
        past = [np.random.default_rng(0).standard_normal(8)] * (max(delays) + 1)
        norms = []
        for _ in range(6000):
            mixed = np.array([past[-1 - delay][at] for at, delay in enumerate(delays)])
            past = [*past[1:], past[-1] - rate * hessian @ mixed]
            norms.append(np.linalg.norm(past[-1]))
        assert (max(norms[-300:]) > max(norms[2000:2300])) == grows


def test_eigenpairs_of_a_tree_are_the_dense_hessian():
    weights = {"first": jnp.ones((2, 2)), "second": {"w": jnp.ones(3), "b": jnp.ones(1)}}
    hessian = jnp.asarray(random_hessian(8, 7), jnp.float32)

    def loss(params, batch):
        flat, _ = jax.flatten_util.ravel_pytree(params)
        return flat @ hessian @ flat / 2.0

    found = curvature.eigenpairs(loss, weights, [None], 8)
    # The leaves in JAX's order: first (4), second.b (1), second.w (3).
    for delays, dense in (
        ({"first": 5, "second": {"w": 1, "b": 0}}, [5] * 4 + [0] + [1] * 3),
        ({"first": 2, "second": 4}, [2] * 4 + [4] * 4),
        (3, [3] * 8),
    ):
        expected = stages_max_learning_rate(np.asarray(hessian, np.float64), dense)
        assert stages_max_learning_rate(found, delays) == pytest.approx(expected, rel=1e-4)
    top = curvature.Eigenpairs(found.values[:4], jax.tree.map(lambda leaf: leaf[:4], found.vectors))
    few = stages_max_learning_rate(top, {"first": 5, "second": 1})
    all_of_them = stages_max_learning_rate(found, {"first": 5, "second": 1})
    assert few == pytest.approx(all_of_them, rel=0.1)


@pytest.mark.parametrize(
    ("hessian", "delays", "message"),
    [
        (np.eye(2), [1], r"delays must have an integer for each of the 2 rows"),
        (np.eye(2), [1, -1], r"delays\[1\] must be an integer >= 0, got -1"),
        (np.eye(2), [1, 0.5], r"delays\[1\] must be an integer >= 0, got 0.5"),
        (np.ones((2, 3)), [1, 1], r"square array or curvature.Eigenpairs, got shape \(2, 3\)"),
        ([[1.0, 2.0], [0.0, 1.0]], [1, 1], r"must be symmetric: it differs .* by 2"),
        (-np.eye(2), [1, 1], r"no positive eigenvalue"),
        ([[np.nan]], [1], r"not finite"),
        (
            curvature.Eigenpairs(np.ones(1), {"a": np.ones((1, 2))}),
            {"b": 1},
            r"delays must be a pytree like hessian.vectors, or a prefix of it",
        ),
        (
            curvature.Eigenpairs(np.ones(1), {"a": np.ones((1, 2))}),
            {"a": 1.5},
            r"delays\['a'\] must be an integer >= 0, got 1.5",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(hessian, delays, message):
    with pytest.raises(ValueError, match=message) as error:
        stages_max_learning_rate(hessian, delays)
    assert "\n" not in str(error.value)
