"""simulate_workers against plain simulations, the geometric law and the bookkeeping of versions."""

import heapq
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import asgd_jax.delays as delays

SCHEDULES = ["round_robin", "random", "normal", lambda rng, worker: rng.exponential() + 0.1]


def plain_staleness(order, num_workers):
    """A parameter server in plain Python: every worker remembers the version that it pulled."""
    pulled = [0] * num_workers
    staleness = []
    for version, worker in enumerate(order):
        staleness.append(version - pulled[worker])
        pulled[worker] = version + 1
    return staleness


def plain_event_order(times, num_updates):
    """Worker of each push when worker w's k-th gradient takes times[w][k]: scans, keeps no heap."""
    ready = [row[0] for row in times]
    taken = [1] * len(times)
    order = []
    for _ in range(num_updates):
        worker = min(range(len(times)), key=lambda w: (ready[w], w))
        ready[worker] += times[worker][taken[worker] % len(times[worker])]
        taken[worker] += 1
        order.append(worker)
    return order


@given(num_workers=st.integers(1, 40), num_updates=st.integers(0, 120))
def test_round_robin_ramps_up_to_one_less_than_the_workers(num_workers, num_updates):
    staleness = delays.simulate_workers(num_workers, num_updates)
    assert staleness.dtype == np.int32
    np.testing.assert_array_equal(staleness, np.minimum(np.arange(num_updates), num_workers - 1))
    order = [t % num_workers for t in range(num_updates)]
    assert staleness.tolist() == plain_staleness(order, num_workers)


@given(num_workers=st.integers(1, 12), num_updates=st.integers(0, 80), seed=st.integers(0, 99))
def test_random_is_a_uniform_choice_of_worker(num_workers, num_updates, seed):
    order = np.random.default_rng(seed).integers(num_workers, size=num_updates)
    staleness = delays.simulate_workers(num_workers, num_updates, "random", seed)
    assert staleness.tolist() == plain_staleness(order, num_workers)


# Few distinct times, so that ties are common.
_TIMES = st.lists(
    st.lists(st.sampled_from([0.5, 1.0, 1.5, 4.0]), min_size=1, max_size=5), min_size=1, max_size=6
)


@given(times=_TIMES, num_updates=st.integers(0, 60))
def test_event_simulation_agrees_with_a_plain_scan(times, num_updates):
    taken = Counter()

    def sampler(rng, worker):
        taken[worker] += 1
        return times[worker][(taken[worker] - 1) % len(times[worker])]

    staleness = delays.simulate_workers(len(times), num_updates, sampler)
    order = plain_event_order(times, num_updates)
    assert staleness.tolist() == plain_staleness(order, len(times))


def test_equal_compute_times_are_round_robin():
    staleness = delays.simulate_workers(5, 30, lambda rng, worker: 2)
    np.testing.assert_array_equal(staleness, delays.simulate_workers(5, 30))


def test_the_sampler_draws_from_the_seeded_generator_in_a_documented_order():
    rng = np.random.default_rng(3)
    events = [(rng.exponential(1 + w), w) for w in range(4)]
    heapq.heapify(events)
    order = []
    for _ in range(50):
        time, worker = heapq.heappop(events)
        order.append(worker)
        heapq.heappush(events, (time + rng.exponential(1 + worker), worker))
    staleness = delays.simulate_workers(4, 50, lambda r, w: r.exponential(1 + w), seed=3)
    assert staleness.tolist() == plain_staleness(order, 4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@settings(max_examples=25)
@given(num_workers=st.integers(1, 20), num_updates=st.integers(1, 150), seed=st.integers(0, 999))
def test_every_version_is_pulled_by_one_worker(schedule, num_workers, num_updates, seed):
    staleness = delays.simulate_workers(num_workers, num_updates, schedule, seed)
    assert staleness.shape == (num_updates,)
    pulled = Counter((np.arange(num_updates) - staleness).tolist())
    # Version 0 went to all workers; version t + 1 only to the worker that pushed update t.
    assert min(pulled) >= 0
    assert pulled.pop(0, 0) <= num_workers
    assert all(times == 1 for times in pulled.values())
    again = delays.simulate_workers(num_workers, num_updates, schedule, seed)
    np.testing.assert_array_equal(staleness, again)


@pytest.mark.parametrize("schedule", SCHEDULES[1:])
def test_another_seed_is_another_trace(schedule):
    first, second = (delays.simulate_workers(8, 200, schedule, seed) for seed in (0, 1))
    assert (first != second).any()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_workers", [2, 8, 32])
def test_mean_staleness_is_one_less_than_the_workers(schedule, num_workers):
    # Over a long run the sum of waits is T pushes per worker, whatever the schedule.
    staleness = delays.simulate_workers(num_workers, 20_000, schedule, seed=4)
    late = staleness[20 * num_workers :]
    assert late.mean() == pytest.approx(num_workers - 1, rel=0.03)


def test_random_staleness_is_geometric():
    num_workers, num_updates = 6, 40_000
    late = delays.simulate_workers(num_workers, num_updates, "random", seed=5)[1_000:]
    support = np.arange(20)
    pmf = (1 / num_workers) * (1 - 1 / num_workers) ** support
    counts = np.bincount(late, minlength=20)[:20]
    deviation = np.sqrt(late.size * pmf * (1 - pmf))
    assert np.abs(counts - late.size * pmf).max() < 5 * deviation.max()
    assert (np.abs(counts - late.size * pmf) < 5 * deviation).all()


@pytest.mark.parametrize(
    ("num_workers", "spread"), [(8, 0.25), (16, 0.24), (32, 0.235), (64, 0.232)]
)
def test_normal_staleness_spreads_by_about_a_quarter_of_the_workers(num_workers, spread):
    late = delays.simulate_workers(num_workers, 30_000, "normal", seed=6)[10 * num_workers :]
    assert late.std() / num_workers == pytest.approx(spread, rel=0.04)
    assert abs(np.mean(((late - late.mean()) / late.std()) ** 3)) < 0.5
    # Nobody is starved, and hardly anybody pushes twice in a row.
    assert late.max() < 3 * num_workers
    assert np.mean(late < num_workers // 4) < 0.01


def test_slow_workers_are_stale_and_rare():
    # Worker 1 takes 10 times longer: its gradients see ten pushes of worker 0, then there is one 1.
    staleness = delays.simulate_workers(2, 400, lambda rng, worker: [1.0, 10.5][worker])
    assert np.isin(staleness, [0, 1, 10, 11]).all()
    assert np.mean(staleness >= 10) == pytest.approx(1 / 11.5, abs=0.01)


def test_a_trace_goes_into_from_trace():
    staleness = delays.simulate_workers(4, 50, "random", seed=1)
    process = delays.from_trace(staleness)
    assert process.max_delay == staleness.max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5), "num_workers must be >= 1, got 0"),
        ((-1, 5), "num_workers must be an integer >= 0, got -1"),
        ((2.5, 5), "num_workers must be an integer >= 0, got 2.5"),
        ((2, -5), "num_updates must be an integer >= 0, got -5"),
        ((2, 5, "fifo"), r"schedule must be one of \['normal', 'random', 'round_robin'\].*'fifo'"),
        ((2, 5, None), "schedule must be one of .* got None"),
        ((2, 5, ["random"]), r"schedule must be one of .* got \['random'\]"),
        ((2, 5, "random", -1), "seed must be an integer >= 0, got -1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        delays.simulate_workers(*arguments)


@pytest.mark.parametrize("time", [0.0, -1.0, float("nan"), float("inf"), None, "soon"])
def test_bad_compute_times_are_refused_at_the_start_and_later(time):
    message = r"compute time of worker 1 is .*: the sampler must return a finite number > 0"
    with pytest.raises(ValueError, match=message):
        delays.simulate_workers(2, 5, lambda rng, worker: [1.0, time][worker])
    calls = Counter()

    def later(rng, worker):
        calls[worker] += 1
        return time if worker == 1 and calls[worker] == 3 else 1.0

    with pytest.raises(ValueError, match=message):
        delays.simulate_workers(2, 50, later)
