"""Batch arithmetic and the order of the samples."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgd_jax import data


@pytest.mark.parametrize(
    ("delay", "workers", "batch", "steps"),
    [(31, 1, 64, 937), (0, 32, 2048, 29), (15, 2, 128, 468), (7, 4, 256, 234), (1, 16, 1024, 58)],
)
def test_figure_1_between_asynchronous_and_synchronous(delay, workers, batch, steps):
    plan = data.plan_batches(60_000, num_workers=32, worker_batch_size=64, delay=delay)
    assert (plan.workers_per_update, plan.update_batch_size, plan.steps_per_epoch) == (
        workers,
        batch,
        steps,
    )


@settings(max_examples=100, deadline=None)
@given(
    rounds=st.integers(1, 20),
    delay=st.integers(0, 40),
    per_update=st.integers(1, 8),
    batch=st.integers(1, 64),
    extra=st.integers(0, 500),
)
def test_a_round_of_updates_uses_every_worker_once(rounds, delay, per_update, batch, extra):
    num_workers = per_update * (delay + 1)
    samples = rounds * num_workers * batch + extra
    plan = data.plan_batches(samples, num_workers=num_workers, worker_batch_size=batch, delay=delay)
    assert plan.workers_per_update * (plan.delay + 1) == num_workers
    assert plan.update_batch_size * (plan.delay + 1) == num_workers * batch
    used = plan.steps_per_epoch * plan.update_batch_size
    assert 0 <= samples - used < plan.update_batch_size


@pytest.mark.parametrize(
    ("num_workers", "delay", "message"),
    [
        (32, 5, "use delay=3 or 7, or num_workers=30 or 36"),
        (32, 32, "use delay=31, or num_workers=33"),
        (7, 2, "use delay=0 or 6, or num_workers=6 or 9"),
        (4, 100, "use delay=3, or num_workers=101"),
    ],
)
def test_indivisible_workers_are_refused_with_the_nearest_values(num_workers, delay, message):
    with pytest.raises(ValueError, match=f"delay={delay} with num_workers={num_workers}") as caught:
        data.plan_batches(10_000, num_workers=num_workers, worker_batch_size=2, delay=delay)
    assert str(caught.value).endswith(message)


@settings(max_examples=200, deadline=None)
@given(num_workers=st.integers(1, 60), delay=st.integers(0, 80))
def test_the_values_that_the_refusal_names_are_accepted(num_workers, delay):
    def plan(workers: int, tau: int):
        return data.plan_batches(100, num_workers=workers, worker_batch_size=1, delay=tau)

    if num_workers % (delay + 1) == 0:
        plan(num_workers, delay)
        return
    with pytest.raises(ValueError, match="must divide") as caught:
        plan(num_workers, delay)
    delays, workers = str(caught.value).split("use delay=")[1].split(", or num_workers=")
    for tau in delays.split(" or "):
        plan(num_workers, int(tau))
    for count in workers.split(" or "):
        assert int(count) % (delay + 1) == 0


@pytest.mark.parametrize("name", ["num_samples", "num_workers", "worker_batch_size"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_sizes_must_be_positive_integers(name, value):
    options = {"num_samples": 100, "num_workers": 4, "worker_batch_size": 2, "delay": 0}
    with pytest.raises(ValueError, match=name):
        data.plan_batches(**{**options, name: value})


def test_a_set_smaller_than_one_update_is_refused():
    with pytest.raises(ValueError, match="one update takes 2048 samples and there are 2047"):
        data.plan_batches(2047, num_workers=32, worker_batch_size=64, delay=0)


def test_permutation_depends_on_seed_and_epoch_only():
    orders = {
        (seed, epoch): data.epoch_permutation(seed, epoch, 50)
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    for order in orders.values():
        assert order.dtype == np.int32
        assert sorted(order.tolist()) == list(range(50))
    assert len({tuple(order.tolist()) for order in orders.values()}) == 4
    traced = jax.jit(lambda epoch: data.epoch_permutation(1, epoch, 50))(1)
    np.testing.assert_array_equal(traced, orders[1, 1])


def test_permutation_stays_32_bit_under_x64():
    with jax.enable_x64(True):
        order = data.epoch_permutation(0, 0, 20)
        assert order.dtype == np.int32


def test_epoch_batches_are_the_permutation_in_updates():
    plan = data.plan_batches(103, num_workers=6, worker_batch_size=4, delay=2)
    batches = data.epoch_batches(5, 2, plan)
    assert batches.shape == (12, 2, 4)
    np.testing.assert_array_equal(batches.ravel(), data.epoch_permutation(5, 2, 103)[:96])


def test_every_delay_sees_the_same_rounds():
    """The samples of N consecutive worker batches don't depend on the delay."""
    plans = [
        data.plan_batches(96, num_workers=8, worker_batch_size=3, delay=delay)
        for delay in (0, 1, 3, 7)
    ]
    rounds = [data.epoch_batches(0, 0, plan).reshape(4, 8, 3) for plan in plans]
    for other in rounds[1:]:
        np.testing.assert_array_equal(other, rounds[0])
