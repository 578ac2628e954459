"""Tracks against a plain Python simulation of delayed descent on a loss whose curvature moves."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgd_jax import delayed
from experiments.edges.minimum import Problem
from experiments.sharpness_track import make_track, measuring_steps


def quartic(x, batch):
    """Gradient x^3 / 3; Hessian diag(x^2)."""
    return jnp.mean(batch) * jnp.sum(x**4) / 12.0


START = np.array([1.5, -2.0])
PROBLEM = Problem(quartic, jnp.asarray(START, jnp.float32), [jnp.ones(4)])


@pytest.mark.parametrize("delay", [0, 1, 5])
def test_a_track_is_delayed_descent_seen_at_the_live_parameters(delay):
    steps = [0, 1, 2, 7, 20]
    path = [START]
    for t in range(max(steps)):
        path.append(path[-1] - 0.1 * path[t - min(delay, t)] ** 3 / 3.0)
    samples = make_track(PROBLEM)(delayed(optax.sgd(0.1), delay), steps)
    assert [sample.step for sample in samples] == steps
    for sample in samples:
        live = path[sample.step]
        assert sample.sharpness == pytest.approx(max(live**2), rel=1e-4)
        assert sample.loss == pytest.approx(np.sum(live**4) / 12.0, rel=1e-4)


def test_measuring_does_not_change_the_run():
    track, tx = make_track(PROBLEM), delayed(optax.sgd(0.1), 3)
    often, once = track(tx, list(range(31))), track(tx, [30])
    assert often[-1].loss == once[0].loss


def test_a_diverging_run_gives_samples_that_are_not_finite():
    samples = make_track(PROBLEM)(delayed(optax.sgd(10.0), 2), [0, 5, 50, 60])
    assert np.isfinite(samples[0].sharpness)
    assert not np.isfinite([samples[-1].loss, samples[-1].sharpness]).any()


def test_what_cannot_be_tracked_is_refused():
    with pytest.raises(ValueError, match="2 batches"):
        make_track(PROBLEM._replace(batches=2 * PROBLEM.batches))
    for steps in ([], [2, 1], [0, 0], [-1, 3]):
        with pytest.raises(ValueError, match="steps must rise"):
            make_track(PROBLEM)(delayed(optax.sgd(0.1), 0), steps)
    with pytest.raises(ValueError, match="num_samples=0"):
        measuring_steps(10, 0)


@given(st.integers(1, 10**6), st.integers(1, 200))
def test_measuring_steps_rise_from_the_start_to_the_end(num_steps, num_samples):
    steps = measuring_steps(num_steps, num_samples)
    assert steps[0] == 0
    assert steps[-1] == num_steps
    assert len(steps) <= num_samples + 1
    assert (np.diff(steps) > 0).all()
