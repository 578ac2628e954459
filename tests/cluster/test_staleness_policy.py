"""Who may push what: policies tried on simulated workers, with no cluster."""

import heapq

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from asgd_jax.cluster.policy import BatchNumbers, StalenessPolicy, policy_of
from asgd_jax.cluster.worker_times import measured_times, parse_worker_times
from asgd_jax.delays import simulate_workers


def run_workers(policy, times, num_updates):
    """A plain event simulation: the staleness of every update, and how many were dropped."""
    count = len(times)
    pulled = dict.fromkeys(range(count), 0)
    events = [(times[worker], worker) for worker in range(count)]
    heapq.heapify(events)
    held, staleness, dropped, version, now = [], [], 0, 0, 0.0
    while version < num_updates:
        free = [each for each in held if not policy.must_wait(each, version, pulled)]
        if free:
            worker = free[0]
            held.remove(worker)
        else:
            now, worker = heapq.heappop(events)  # nothing left to happen is a deadlock
            if policy.must_wait(worker, version, pulled):
                held.append(worker)
                continue
        age = version - pulled[worker]
        if policy.is_dropped(age):
            dropped += 1
        else:
            staleness.append(age)
            version += 1
        pulled[worker] = version
        heapq.heappush(events, (now + times[worker], worker))
    return staleness, dropped


@given(
    times=st.lists(st.floats(0.01, 50), min_size=1, max_size=6),
    more=st.integers(0, 4),
    wait=st.booleans(),
)
def test_no_update_is_beyond_the_limit_and_none_is_stuck(times, more, wait):
    limit = len(times) - 1 + more if wait else more
    policy = StalenessPolicy(limit, wait)
    staleness, dropped = run_workers(policy, times, 60)
    assert max(staleness) <= limit
    assert not (wait and dropped)


def test_without_a_limit_it_is_the_simulation():
    times = [1.0, 1.7, 0.31]
    staleness, dropped = run_workers(StalenessPolicy(None, False), times, 50)
    expected = simulate_workers(3, 50, schedule=lambda rng, worker: times[worker])
    np.testing.assert_array_equal(staleness, expected)
    assert dropped == 0


def test_a_straggler_is_dropped_or_waited_for():
    times = [20.0, 1.01, 1.02, 1.03]
    _, dropped = run_workers(StalenessPolicy(6, False), times, 200)
    assert dropped > 0
    staleness, dropped = run_workers(StalenessPolicy(6, True), times, 200)
    assert dropped == 0
    assert max(staleness) == 6


def test_waiting_needs_a_limit_that_can_be_kept():
    config = ConfigDict({"max_staleness": 2, "staleness_policy": "wait", "num_workers": 4})
    with pytest.raises(ValueError, match=r"max_staleness=2 .* use max_staleness=3 or more"):
        policy_of(config)
    config.staleness_policy = "drop"
    assert policy_of(config) == StalenessPolicy(2, False)
    config.max_staleness = -1
    with pytest.raises(ValueError, match=r"max_staleness must be >= 0, got -1"):
        policy_of(config)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=60), st.sampled_from([1, 4]))
def test_every_batch_is_handed_out_once(turns, num_shards):
    """Also across a restart: what was under way comes again, what was used does not."""
    numbers, used, under_way = BatchNumbers(num_shards), set(), {}
    for worker, lost in turns:
        if worker in under_way:
            number = under_way.pop(worker)
            if lost:
                numbers.give_back(number)
            else:
                assert number not in used
                used.add(number)
        number = numbers.take(worker)
        assert number % num_shards == worker % num_shards
        assert number not in under_way.values()
        under_way[worker] = number
    numbers = BatchNumbers(num_shards, numbers.save(under_way.values()))
    for worker in range(4):
        for _ in range(len(turns) + 4):
            number = numbers.take(worker)
            assert number not in used
            used.add(number)
    # None is left out.
    per_shard = {shard: [n for n in used if n % num_shards == shard] for shard in range(num_shards)}
    for shard, found in per_shard.items():
        assert sorted(found)[: len(turns)] == [k * num_shards + shard for k in range(len(turns))]


def test_worker_times_have_the_mean_that_they_name():
    rng = np.random.default_rng(0)
    sampler = parse_worker_times("lognormal .05 .5")
    drawn = np.array([sampler(rng, 0) for _ in range(20_000)])
    assert drawn.mean() == pytest.approx(0.05, rel=0.02)
    assert np.log(drawn).std() == pytest.approx(0.5, rel=0.02)
    straggler = parse_worker_times("straggler .1 5")
    assert [straggler(rng, worker) for worker in range(3)] == [0.5, 0.1, 0.1]


@pytest.mark.parametrize("text", ["", "constant", "constant 0", "constant nan", "normal 1 2",
                                  "lognormal 1", "straggler 1 2 3", "constant x"])  # fmt: skip
def test_bad_worker_times_are_refused(text):
    with pytest.raises(ValueError, match=r"^worker_times='.*': use 'constant SECONDS'"):
        parse_worker_times(text)


def test_measured_times_are_each_workers_own():
    sampler = measured_times(np.array([0, 0, 1]), np.array([1.0, 2.0, 5.0]))
    rng = np.random.default_rng(0)
    assert {sampler(rng, 0) for _ in range(30)} == {1.0, 2.0}
    assert sampler(rng, 1) == 5.0
    assert sampler(rng, 2) in (1.0, 2.0, 5.0)
