"""Blocks of a trace: known when they begin, as few as can be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgd_jax import delays

TRACES = st.lists(st.integers(0, 9), min_size=1, max_size=40)


@given(TRACES, st.integers(1, 12))
def test_blocks_know_their_versions_and_are_the_longest(trace, longest):
    blocks = delays.rounds_of(trace, longest)
    assert blocks.starts[0] == 0
    assert list(blocks.starts[1:]) == list(np.cumsum(blocks.lengths)[:-1])
    assert blocks.lengths.sum() == len(trace)
    for start, length in zip(blocks.starts, blocks.lengths, strict=True):
        assert 1 <= length <= longest
        assert all(t - trace[t] <= start for t in range(start, start + length))
        after = start + length
        assert after == len(trace) or length == longest or after - trace[after] > start


@given(TRACES)
def test_no_other_cut_has_fewer_blocks(trace):
    """Dynamic programming over all cuts."""
    fewest = [0]
    for end in range(1, len(trace) + 1):
        starts = [
            start for start in range(end) if all(t - trace[t] <= start for t in range(start, end))
        ]
        fewest.append(1 + min(fewest[start] for start in starts))
    assert delays.rounds_of(trace).starts.size == fewest[-1]


@given(TRACES, st.integers(1, 5))
def test_padding_repeats_the_last_update(trace, multiple):
    blocks = delays.rounds_of(trace)
    updates = blocks.updates(multiple)
    assert updates.shape[1] % multiple == 0
    assert 0 <= updates.shape[1] - blocks.longest < multiple
    real = [row[:length] for row, length in zip(updates, blocks.lengths, strict=True)]
    assert list(np.concatenate(real)) == list(range(len(trace)))
    for row, length in zip(updates, blocks.lengths, strict=True):
        assert set(row[length:]) <= {row[length - 1]}


def test_parallelism_of_schedules():
    """Round robin N; random workers about the birthday problem's expectation."""
    for workers in (4, 16, 64):
        assert delays.rounds_of(delays.simulate_workers(workers, 10 * workers)).longest == workers
        assert (
            delays.rounds_of(delays.simulate_workers(workers, 10 * workers)).mean_length == workers
        )
        # Before the first repetition: sum over k of the probability that k pushes are all distinct.
        distinct = np.cumprod(1 - np.arange(workers) / workers).sum()
        found = delays.rounds_of(delays.simulate_workers(workers, 20_000, "random")).mean_length
        assert found == pytest.approx(distinct, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([],), "non-empty"),
        (([0.5],), "integers"),
        (([0, -1],), r"trace\[1\] is -1"),
        (([0, 1], 0), "longest must be >= 1"),
    ],
)
def test_bad_traces(arguments, said):
    with pytest.raises(ValueError, match=said):
        delays.rounds_of(*arguments)
