"""Delay processes: probability masses in closed form, sampled frequencies, every refusal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import asgd_jax.delays as delays


def frequencies(process, num_samples=20_000, seed=0):
    """Samples of steps 0, 1, ... under one key, and their counts over 0, ..., max_delay."""
    key = jax.random.key(seed)
    sampled = jax.jit(jax.vmap(process.sample, in_axes=(None, 0)))(
        key, jnp.arange(num_samples, dtype=jnp.int32)
    )
    assert sampled.dtype == jnp.int32
    values = np.asarray(sampled)
    assert values.min() >= 0
    assert values.max() <= process.max_delay
    return np.bincount(values, minlength=process.max_delay + 1)


def assert_frequencies(process, **kwargs):
    """Pearson's chi-square at a level that a right sampler fails once in a million runs."""
    counts = frequencies(process, **kwargs)
    possible = process.pmf > 0
    assert counts[~possible].sum() == 0
    expected = counts.sum() * process.pmf
    # Cells of few expected samples are pooled, as the chi-square law asks.
    common = expected >= 5
    cells = np.append(counts[common], counts[~common].sum()).astype(float)
    means = np.append(expected[common], expected[~common].sum())
    cells, means = cells[means > 0], means[means > 0]
    statistic = np.sum((cells - means) ** 2 / means)
    assert statistic <= stats.chi2.isf(1e-6, max(cells.size - 1, 1))


@given(delay=st.integers(0, 200))
def test_constant_is_a_unit_mass(delay):
    process = delays.constant(delay)
    assert process.max_delay == delay
    np.testing.assert_array_equal(process.pmf, np.eye(delay + 1)[delay])
    sample = process.sample(jax.random.key(0), jnp.int32(7))
    assert sample.dtype == jnp.int32
    assert sample.shape == ()
    assert int(sample) == delay


@given(low=st.integers(0, 40), width=st.integers(0, 40))
def test_uniform_pmf(low, width):
    high = low + width
    process = delays.uniform(low, high)
    assert process.max_delay == high
    np.testing.assert_allclose(
        process.pmf, stats.randint.pmf(np.arange(high + 1), low, high + 1), atol=1e-15
    )


@given(mean=st.integers(1, 40), std=st.floats(0.3, 20))
def test_discretized_normal_pmf(mean, std):
    process = delays.discretized_normal(mean, std)
    support = np.arange(1, 2 * mean + 1)
    masses = stats.norm.cdf(support + 0.5, mean, std) - stats.norm.cdf(support - 0.5, mean, std)
    expected = np.concatenate([[0.0], masses / masses.sum()])
    # Masses far in the tail underflow to zero, and trailing zeros go.
    np.testing.assert_allclose(process.pmf, expected[: process.pmf.size], atol=1e-12)
    assert expected[process.pmf.size :].sum() < 1e-12
    assert process.pmf.sum() == pytest.approx(1.0, abs=1e-12)
    assert process.max_delay == process.pmf.size - 1


@pytest.mark.parametrize(("mean", "total"), [(1, 0.6247), (2, 0.927)])
def test_discretized_normal_normalises_the_masses_of_the_caption(mean, total):
    support = np.arange(1, 2 * mean + 1)
    masses = stats.norm.cdf(support + 0.5 - mean) - stats.norm.cdf(support - 0.5 - mean)
    assert masses.sum() == pytest.approx(total, abs=1e-3)
    np.testing.assert_allclose(
        delays.discretized_normal(mean).pmf[1:], masses / masses.sum(), rtol=1e-12
    )


_WEIGHTS = st.lists(st.integers(0, 1000), min_size=1, max_size=12).filter(any)


@given(weights=_WEIGHTS)
def test_categorical_keeps_the_pmf_without_trailing_zeros(weights):
    pmf = np.array(weights) / np.sum(weights)
    process = delays.categorical(pmf)
    last = np.flatnonzero(pmf)[-1]
    assert process.max_delay == last
    np.testing.assert_allclose(process.pmf, pmf[: last + 1], rtol=1e-12)
    assert process.pmf.dtype == np.float64


@pytest.mark.parametrize(
    "process",
    [
        delays.uniform(0, 3),
        delays.uniform(1, 64),
        delays.discretized_normal(8),
        delays.discretized_normal(3, 5.0),
        delays.categorical([0.7, 0.0, 0.0, 0.3]),
        delays.categorical([0.0, 1.0]),
        delays.constant(4),
    ],
    ids=["uniform_0_3", "uniform_1_64", "normal_8", "normal_3_5", "gap", "sure", "constant"],
)
def test_sampled_frequencies(process):
    assert_frequencies(process)


@settings(max_examples=5, deadline=None)
@given(weights=_WEIGHTS, seed=st.integers(0, 2**31 - 1))
def test_sampled_frequencies_of_any_pmf(weights, seed):
    process = delays.categorical(np.array(weights) / np.sum(weights))
    assert_frequencies(process, num_samples=4_000, seed=seed)


@pytest.mark.parametrize("process", [delays.uniform(0, 1000), delays.discretized_normal(500, 90.0)])
def test_samples_are_a_function_of_key_and_step(process):
    key, other = jax.random.split(jax.random.key(1))
    steps = jnp.arange(20, dtype=jnp.int32)
    one_by_one = np.array([process.sample(key, step) for step in steps])
    np.testing.assert_array_equal(one_by_one, jax.vmap(process.sample, (None, 0))(key, steps))
    assert (one_by_one != jax.vmap(process.sample, (None, 0))(other, steps)).any()
    # A resumed run asks for step 7 first.
    assert int(process.sample(key, jnp.int32(7))) == one_by_one[7]
    assert len(set(one_by_one.tolist())) > 10


@given(trace=st.lists(st.integers(0, 30), min_size=1, max_size=20), step=st.integers(0, 200))
def test_from_trace_replays_and_repeats(trace, step):
    process = delays.from_trace(trace)
    assert process.max_delay == max(trace)
    assert process.pmf is None
    sample = process.sample(None, jnp.int32(step))
    assert sample.dtype == jnp.int32
    assert int(sample) == trace[step % len(trace)]


def test_from_trace_keeps_a_larger_history_on_request():
    assert delays.from_trace(np.array([0, 1]), max_delay=np.int64(5)).max_delay == 5


def test_from_trace_does_not_see_later_changes_of_the_callers_array():
    trace = np.array([1, 2], np.int32)
    process = delays.from_trace(trace)
    trace[:] = 9
    assert int(process.sample(None, jnp.int32(0))) == 1


def test_as_process():
    process = delays.uniform(1, 2)
    assert delays.as_process(process) is process
    assert delays.as_process(np.int32(4)).max_delay == 4
    assert delays.as_process(0).pmf.tolist() == [1.0]


@pytest.mark.parametrize("value", [-1, 1.0, 2.5, True, "3", None, float("nan"), [1]])
def test_whole_numbers_only(value):
    for make in (delays.constant, delays.as_process):
        with pytest.raises(ValueError, match="delay must be an integer >= 0"):
            make(value)
    with pytest.raises(ValueError, match="low must be an integer >= 0"):
        delays.uniform(value, 3)
    with pytest.raises(ValueError, match="high must be an integer >= 0"):
        delays.uniform(0, value)
    with pytest.raises(ValueError, match="mean must be an integer >= 0"):
        delays.discretized_normal(value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: delays.uniform(3, 2), "low must be <= high, got low=3, high=2"),
        (lambda: delays.discretized_normal(0), "mean must be >= 1, got 0: use constant"),
        (lambda: delays.discretized_normal(3, 0.0), "std must be a finite number > 0, got 0.0"),
        (lambda: delays.discretized_normal(3, float("nan")), "std must be a finite number > 0"),
        (lambda: delays.discretized_normal(3, float("inf")), "std must be a finite number > 0"),
        (lambda: delays.discretized_normal(3, -1.0), "std must be a finite number > 0, got -1.0"),
        (lambda: delays.categorical([]), "pmf must be a non-empty vector, got shape \\(0,\\)"),
        (lambda: delays.categorical([[1.0]]), "pmf must be a non-empty vector"),
        (lambda: delays.categorical(1.0), "pmf must be a non-empty vector, got shape \\(\\)"),
        (lambda: delays.categorical([0.5, 0.6, -0.1]), r"pmf\[2\] is -0.1"),
        (lambda: delays.categorical([float("nan"), 1.0]), r"pmf\[0\] is nan"),
        (lambda: delays.categorical([0.0, float("inf")]), r"pmf\[1\] is inf"),
        (lambda: delays.categorical([0.5, 0.25]), "pmf sums to 0.75, not 1"),
        (lambda: delays.categorical([0.0, 0.0]), "pmf sums to 0, not 1"),
        (lambda: delays.from_trace([]), "trace must be a non-empty vector of integers"),
        (lambda: delays.from_trace([[1, 2]]), r"trace .*, got shape \(1, 2\)"),
        (lambda: delays.from_trace([1.0, 2.0]), "trace must hold integers, got dtype float64"),
        (lambda: delays.from_trace([True, False]), "trace must hold integers, got dtype bool"),
        (lambda: delays.from_trace([0, 2**31]), r"trace\[1\] is 2147483648: .* below 2\*\*31"),
        (lambda: delays.from_trace([0, -2, 1]), r"trace\[1\] is -2: staleness must be >= 0"),
        (
            lambda: delays.from_trace([0, 3, 1], max_delay=2),
            r"trace\[1\] is 3, beyond the history of max_delay=2: pass max_delay=3",
        ),
        (lambda: delays.from_trace([0], max_delay=-1), "max_delay must be an integer >= 0"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_below_is_the_conditional_distribution():
    process = delays.below(delays.categorical([0.1, 0.2, 0.3, 0.4]), 3)
    assert process.max_delay == 2
    np.testing.assert_allclose(process.pmf, np.array([1, 2, 3]) / 6)
    assert_frequencies(process)
    np.testing.assert_array_equal(delays.below(2, 3).pmf, [0, 0, 1])  # nothing is that old
    assert delays.below(delays.uniform(1, 8), 6).max_delay == 5


@pytest.mark.parametrize(
    ("process", "limit", "message"),
    [
        (delays.uniform(2, 4), 2, r"limit=2 leaves nothing .* smallest staleness is 2"),
        (3, 0, r"limit=0 leaves nothing .* smallest staleness is 3"),
        (delays.from_trace([0, 4]), 3, r"no distribution .*from_trace\(trace\[trace < 3\]\)"),
        (3, 1.5, r"limit must be an integer >= 0, got 1.5"),
    ],
)
def test_below_refuses(process, limit, message):
    with pytest.raises(ValueError, match=message):
        delays.below(process, limit)
