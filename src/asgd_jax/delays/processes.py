"""Delay processes: the staleness of every gradient, as a function of a random key and the step.

The *staleness* of a gradient is the number of updates the server made between the pull of the
parameters and the push of their gradient. A process only proposes it: no gradient can be older
than the run, so whoever applies a process to update `t` uses `min(sample, t)` (the start-up ramp).
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_PMF_TOLERANCE = 1e-6


class DelayProcess(NamedTuple):
    """Where staleness comes from.

    Attributes:
      max_delay: largest staleness that `sample` can return; sizes the history (a static int).
      pmf: float64 array of shape (max_delay + 1,), the marginal probability of each staleness;
        None for a recorded trace, which has an order and not only a distribution, and for a
        constant that is only known when the program runs.
      sample: `sample(key, step) -> int32 scalar`, pure and jittable. `key` is the run's key and
        `step` the number of the update; the process folds the step in, so equal arguments give
        equal delays and a resumed run continues the same sequence. Whoever applies it clamps what
        it returns to 0, ..., max_delay.
      mean: expected staleness where there is no pmf, a number or a traced scalar; None: not known.
      min_delay: a staleness that `sample` never goes below, where there is no pmf.
    """

    max_delay: int
    pmf: np.ndarray | None
    sample: Callable[[jax.Array, jax.Array], jax.Array]
    mean: float | jax.Array | None = None
    min_delay: int = 0


def expected_staleness(process: DelayProcess) -> Any:
    """Returns the mean of a process rounded to whole updates, halves upwards; int or int32 scalar.

    Where nothing is known of it, `max_delay`.

    >>> expected_staleness(uniform(1, 4)), expected_staleness(from_trace([0, 1, 5]))
    (3, 2)
    """
    mean = process.mean
    if process.pmf is not None:
        mean = float(np.arange(len(process.pmf)) @ np.asarray(process.pmf))
    if mean is None:
        return process.max_delay
    if isinstance(mean, jax.Array):
        return jnp.floor(mean.astype(jnp.float32) + 0.5).astype(jnp.int32)
    # A sum of probabilities may fall short of a half by its rounding.
    return math.floor(mean + 0.5 + 1e-9)


def as_integer(value: Any, name: str) -> int:
    """Returns `value` as a non-negative int; booleans, fractions and negatives are refused.

    Raises:
      ValueError: naming the value and what to pass instead.

    >>> as_integer(np.int64(3), "delay")
    3
    """
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"{name} must be an integer that is known at compile time, got a traced value: with "
            f'optax.inject_hyperparams name it in static_args=("{name}",); for a delay that is '
            "data use asgd_jax.delays.constant(delay, max_delay=...)"
        )
    try:
        integer = operator.index(value)
    except TypeError:
        integer = -1
    if integer < 0 or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer >= 0, got {value!r}: pass a whole number")
    return integer


def validate_pmf(pmf: Any) -> np.ndarray:
    """Returns a probability mass function over staleness 0, 1, ... as float64, exactly normalised.

    Args:
      pmf: array-like of shape (n,), non-negative, of sum 1 (to 1e-6); entry k is P(staleness = k).

    Returns:
      float64 array without trailing zeros, of sum 1.

    Raises:
      ValueError: naming the entry or the sum that is wrong.

    >>> validate_pmf([0.5, 0.5, 0.0])
    array([0.5, 0.5])
    """
    values = np.asarray(pmf, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"pmf must be a non-empty vector, got shape {values.shape}")
    bad = ~(np.isfinite(values) & (values >= 0))
    if bad.any():
        k = int(np.argmax(bad))
        raise ValueError(f"pmf[{k}] is {values[k]}: probabilities must be finite and >= 0")
    total = math.fsum(values)
    if abs(total - 1.0) > _PMF_TOLERANCE:
        raise ValueError(f"pmf sums to {total:.6g}, not 1: divide it by its sum")
    return np.trim_zeros(values, "b") / total


def constant(delay: int | jax.Array, max_delay: int | None = None) -> DelayProcess:
    """Every gradient is `delay` updates old: round-robin workers, delay = num_workers - 1.

    Args:
      delay: int >= 0; with `max_delay` also an int32 scalar array, traced or not, so that one
        program (or one `vmap`) serves many delays.
      max_delay: sizes the history; `delay` by default. A traced delay beyond it is clamped to it.

    Raises:
      ValueError: for a delay that is no integer in 0, ..., max_delay; for a traced one without
        `max_delay`.

    >>> process = constant(3)
    >>> process.max_delay, process.pmf
    (3, array([0., 0., 0., 1.]))
    >>> longest = jax.jit(lambda delay: constant(delay, max_delay=8).sample(None, 0))
    >>> int(longest(5)), int(longest(50))
    (5, 8)
    """
    if isinstance(delay, jax.core.Tracer) and max_delay is not None:
        limit = as_integer(max_delay, "max_delay")
        if delay.ndim or not jnp.issubdtype(delay.dtype, jnp.integer):
            raise ValueError(f"delay must be an integer scalar, got {delay.aval.str_short()}")
        clamped = jnp.clip(delay.astype(jnp.int32), 0, limit)
        return DelayProcess(limit, None, lambda key, step: clamped, mean=clamped)
    delay = as_integer(delay, "delay")
    limit = delay if max_delay is None else as_integer(max_delay, "max_delay")
    if delay > limit:
        raise ValueError(f"delay={delay} is beyond max_delay={limit}: pass max_delay={delay}")
    pmf = np.zeros(limit + 1)
    pmf[delay] = 1.0
    return DelayProcess(limit, pmf, lambda key, step: jnp.asarray(delay, jnp.int32))


def uniform(low: int, high: int) -> DelayProcess:
    """Staleness uniform on the integers low, ..., high (both included): fig. 7 of the paper.

    >>> uniform(1, 2).pmf
    array([0. , 0.5, 0.5])
    """
    low, high = as_integer(low, "low"), as_integer(high, "high")
    if low > high:
        raise ValueError(f"low must be <= high, got low={low}, high={high}: swap them")
    pmf = np.zeros(high + 1)
    pmf[low:] = 1.0 / (high + 1 - low)

    def sample(key: jax.Array, step: jax.Array) -> jax.Array:
        return jax.random.randint(jax.random.fold_in(key, step), (), low, high + 1, jnp.int32)

    return DelayProcess(high, pmf, sample)


def discretized_normal(mean: int, std: float = 1.0) -> DelayProcess:
    r"""Gaussian staleness rounded to integers: figs. 8 and 9 of the paper.

    $P(\tau = k) \propto P(k - 1/2 \le Z \le k + 1/2)$ for k = 1, ..., 2 mean, with Z normal of the
    given mean and standard deviation. The caption's masses do not sum to 1 (0.625 at mean 1, 0.927
    at mean 2); here they are normalised.

    >>> float(discretized_normal(8).pmf.sum()), discretized_normal(8).max_delay
    (1.0, 16)
    """
    mean = as_integer(mean, "mean")
    if mean == 0:
        raise ValueError("mean must be >= 1, got 0: use constant(0) for no delay")
    if not (math.isfinite(std) and std > 0):
        raise ValueError(f"std must be a finite number > 0, got {std!r}: use constant({mean})")
    edges = np.arange(2 * mean + 1) + 0.5 - mean
    cumulative = np.array([math.erf(edge / (std * math.sqrt(2))) for edge in edges])
    pmf = np.concatenate([[0.0], np.diff(cumulative)])
    return categorical(pmf / pmf.sum())


def categorical(pmf: Any) -> DelayProcess:
    """I.i.d. staleness with any probability mass function; entry k is P(staleness = k).

    Raises:
      ValueError: for a negative or non-finite entry, or a sum that is not 1 (to 1e-6).

    >>> categorical([0.0, 0.25, 0.75]).max_delay
    2
    """
    pmf = validate_pmf(pmf)
    cumulative = jnp.asarray(np.cumsum(pmf)[:-1], jnp.float32)

    def sample(key: jax.Array, step: jax.Array) -> jax.Array:
        # The inverse of the distribution function: one uniform draw, whatever the support.
        draw = jax.random.uniform(jax.random.fold_in(key, step), (), jnp.float32)
        return jnp.searchsorted(cumulative, draw, side="right").astype(jnp.int32)

    return DelayProcess(pmf.size - 1, pmf, sample)


def below(process: "int | DelayProcess", limit: int) -> DelayProcess:
    r"""What is left of a process when gradients of staleness `limit` or more are dropped.

    $P(\tau = k \mid \tau < R)$, with R the limit: the staleness that
    `delayed(..., process, drop_stale=limit)` applies once the start-up ramp is over. A dropped
    gradient changes nothing and counts as no update, so every stability function answers for
    dropping when it is given this process. Of all gradients the share $P(\tau < R)$ is applied.

    Args:
      process: a process with a distribution; an int is the constant one.
      limit: R >= 1.

    Raises:
      ValueError: for a limit that leaves nothing, or a process without a distribution. Of a
        recorded trace what is left is `from_trace(trace[trace < limit])`, in its order.

    >>> below(uniform(1, 8), 3).pmf
    array([0. , 0.5, 0.5])
    """
    limit = as_integer(limit, "limit")
    process = as_process(process)
    if process.pmf is None:
        raise ValueError(
            "this process has no distribution (pmf=None): of a recorded trace pass what is left "
            f"of it, from_trace(trace[trace < {limit}])"
        )
    kept = process.pmf[:limit]
    if not kept.any():
        raise ValueError(
            f"limit={limit} leaves nothing of this process, whose smallest staleness is "
            f"{np.flatnonzero(process.pmf)[0]}: raise it above that"
        )
    return categorical(kept / kept.sum())


def check_trace(trace: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns recorded staleness as an int32 array of shape (num_updates,).

    Raises:
      ValueError: naming the entry that is negative, fractional or too large.

    >>> check_trace([0, 1, 1])
    array([0, 1, 1], dtype=int32)
    """
    values = np.asarray(trace)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"trace must be a non-empty vector of integers, got shape {values.shape}")
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"trace must hold integers, got dtype {values.dtype}: round it first")
    if values.min() < 0:
        at = int(np.argmin(values))
        raise ValueError(f"trace[{at}] is {values[at]}: staleness must be >= 0")
    largest = int(values.max())
    if largest > np.iinfo(np.int32).max:
        at = int(np.argmax(values))
        raise ValueError(f"trace[{at}] is {largest}: staleness must be below 2**31")
    return values.astype(np.int32)


def from_trace(trace: Sequence[int] | np.ndarray, max_delay: int | None = None) -> DelayProcess:
    """Replays recorded staleness: update `t` uses `trace[t % len(trace)]`.

    Args:
      trace: integers >= 0 of shape (num_updates,), for example from `simulate_workers` or from the
        log of a real parameter server. It repeats when the run is longer.
      max_delay: size of the history to keep; the largest entry by default.

    Raises:
      ValueError: naming the entry that is negative, fractional, too large or beyond `max_delay`.

    >>> int(from_trace([0, 1, 1]).sample(None, 4))
    1
    """
    replay = check_trace(trace)
    largest = int(replay.max())
    limit = largest if max_delay is None else as_integer(max_delay, "max_delay")
    if largest > limit:
        at = int(np.argmax(replay))
        raise ValueError(
            f"trace[{at}] is {largest}, beyond the history of max_delay={limit}: "
            f"pass max_delay={largest}"
        )

    def sample(key: jax.Array, step: jax.Array) -> jax.Array:
        return jnp.asarray(replay)[step % replay.size]

    return DelayProcess(limit, None, sample, mean=float(replay.mean()), min_delay=int(replay.min()))


def as_process(delay: "int | DelayProcess") -> DelayProcess:
    """Returns `delay` itself when it is a process, else the constant process of that delay.

    Raises:
      ValueError: when `delay` is neither an integer >= 0 nor a DelayProcess.

    >>> as_process(4).max_delay
    4
    """
    if isinstance(delay, DelayProcess):
        as_integer(delay.max_delay, "max_delay")
        return delay
    return constant(as_integer(delay, "delay"))
