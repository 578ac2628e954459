"""Simulation of N asynchronous workers: who pushes when, and how stale each gradient is.

A worker pulls the parameters, computes a gradient and pushes it; the push is one update of the
server, after which the worker pulls again. All workers pull version 0 at the start. So the
staleness of an update is the number of updates since its worker pulled, which is the number of
*other* workers' pushes in between. The order of the workers decides everything; a *schedule* is
such an order.
"""

import heapq
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import log_ndtr

from asgd_jax.delays.processes import as_integer

ComputeTimeSampler = Callable[[np.random.Generator, int], float]

# Waiting times spread by this fraction of their mean in the "normal" schedule (fig. 9).
_NORMAL_SPREAD = 0.23
# Beyond this many multiples of N the weight of a waiting worker stays what it is: 8.7 standard
# deviations above the mean, never reached once there are enough updates to speak of.
_NORMAL_LONGEST_WAIT = 3


def simulate_workers(
    num_workers: int,
    num_updates: int,
    schedule: str | ComputeTimeSampler = "round_robin",
    seed: int = 0,
) -> np.ndarray:
    r"""Staleness of each update of a server that has `num_workers` asynchronous workers.

    Update $t$, pushed by a worker that pulled version $v$, has staleness $\tau_t = t - v$. Every
    worker has exactly one gradient under way, so under any schedule that forgets no worker the
    mean of $\tau$ is $N - 1$ after the ramp; schedules differ in its spread:

    * `"round_robin"`: worker $t \bmod N$ pushes; $\tau_t = \min(t, N - 1)$ exactly.
    * `"random"`: each push comes from a uniformly random worker; $\tau$ is geometric,
      $P(\tau = k) = (1/N)(1 - 1/N)^k$, of standard deviation $\sqrt{N (N - 1)}$.
    * `"normal"`, of fig. 9: a worker that has waited $w$ pushes, its own included, is picked with
      probability proportional to the hazard rate $P(W = w) / P(W \ge w)$ of $W$, a normal of mean
      $N$ and standard deviation $0.23 N$ rounded to integers. The hazards of all sum to about 1,
      so that waiting times are distributed about as $W$: $\tau = N - 1 \pm 0.23 N$. (Weights
      proportional to the normal *density* would starve a worker that has waited far too long.)
    * a callable `sampler(rng, worker) -> float`: the time that this worker takes for its next
      gradient, in any unit. Pushes happen in order of time, workers of lower index first when times
      are equal; the sampler is asked for worker 0, 1, ... at the start, then for each worker right
      after its push. Slow workers have stale gradients and push seldom.

    Args:
      num_workers: N >= 1.
      num_updates: number of pushes to simulate, >= 0.
      schedule: one of the above.
      seed: of `numpy.random.default_rng`; equal seeds give equal traces.

    Returns:
      int32 array of shape (num_updates,): the staleness of each update, in updates. It goes into
      `from_trace`.

    Raises:
      ValueError: for an unknown schedule, a count that is not a whole number, or a compute time
        that is not a finite number > 0.

    >>> simulate_workers(3, 6)
    array([0, 1, 2, 2, 2, 2], dtype=int32)
    >>> simulate_workers(2, 6, schedule=lambda rng, worker: [1.0, 3.5][worker])
    array([0, 0, 0, 3, 1, 0], dtype=int32)
    """
    num_workers = as_integer(num_workers, "num_workers")
    num_updates = as_integer(num_updates, "num_updates")
    if num_workers == 0:
        raise ValueError("num_workers must be >= 1, got 0: somebody has to push")
    rng = np.random.default_rng(as_integer(seed, "seed"))
    if callable(schedule):
        order = _event_order(num_workers, num_updates, schedule, rng)
    elif isinstance(schedule, str) and schedule in _ORDERS:
        order = _ORDERS[schedule](num_workers, num_updates, rng)
    else:
        raise ValueError(
            f"schedule must be one of {sorted(_ORDERS)} or a sampler of compute times, "
            f"got {schedule!r}"
        )
    return _staleness_of_order(order)


def _staleness_of_order(order: np.ndarray) -> np.ndarray:
    """Staleness of each push, given the worker of each push."""
    updates = np.arange(order.size)
    # Stable sorting puts each worker's pushes side by side and keeps them in time order.
    by_worker = np.argsort(order, kind="stable")
    pulled = np.zeros(order.size, np.int64)
    same_worker = order[by_worker[1:]] == order[by_worker[:-1]]
    pulled[by_worker[1:]] = np.where(same_worker, by_worker[:-1] + 1, 0)
    return (updates - pulled).astype(np.int32)


def _round_robin_order(num_workers: int, num_updates: int, rng: np.random.Generator) -> np.ndarray:
    return np.arange(num_updates) % num_workers


def _random_order(num_workers: int, num_updates: int, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(num_workers, size=num_updates)


def _normal_order(num_workers: int, num_updates: int, rng: np.random.Generator) -> np.ndarray:
    """Picks workers by the hazard rate of their waiting time: see `simulate_workers`."""
    hazard = _normal_hazard(num_workers)
    longest = hazard.size - 1
    pulled = np.zeros(num_workers, np.int64)
    order = np.empty(num_updates, np.int64)
    draws = rng.random(num_updates)
    for update in range(num_updates):
        waited = np.minimum(update + 1 - pulled, longest)
        cumulative = np.cumsum(hazard[waited])
        picked = np.searchsorted(cumulative, draws[update] * cumulative[-1], side="right")
        # Rounding can put the product at the very end, and the search one past it.
        order[update] = worker = min(int(picked), num_workers - 1)
        pulled[worker] = update + 1
    return order


def _normal_hazard(num_workers: int) -> np.ndarray:
    """P(W = w) / P(W >= w) for w = 0, 1, ..., of a normal W rounded to integers."""
    waited = np.arange(_NORMAL_LONGEST_WAIT * num_workers + 2)
    standard_deviation = _NORMAL_SPREAD * num_workers
    longer = log_ndtr((num_workers - waited - 0.5) / standard_deviation)
    at_least = log_ndtr((num_workers - waited + 0.5) / standard_deviation)
    # In logarithms, since both probabilities underflow where somebody has waited very long. At the
    # other end no wait is more than 1 / 0.23 deviations below the mean: no hazard is zero.
    return -np.expm1(longer - at_least)


def _event_order(
    num_workers: int, num_updates: int, sampler: ComputeTimeSampler, rng: np.random.Generator
) -> np.ndarray:
    """Order of the pushes when each gradient takes the time that `sampler` says."""
    events = [(_compute_time(sampler, rng, worker), worker) for worker in range(num_workers)]
    heapq.heapify(events)
    order = np.empty(num_updates, np.int64)
    for update in range(num_updates):
        now, worker = events[0]
        order[update] = worker
        heapq.heapreplace(events, (now + _compute_time(sampler, rng, worker), worker))
    return order


def _compute_time(sampler: ComputeTimeSampler, rng: np.random.Generator, worker: int) -> float:
    value: Any = sampler(rng, worker)
    try:
        time = float(value)
    except (TypeError, ValueError):
        time = math.nan
    # `not (time > 0)` also catches NaN.
    if not (time > 0 and math.isfinite(time)):
        raise ValueError(
            f"compute time of worker {worker} is {value!r}: "
            "the sampler must return a finite number > 0"
        )
    return time


_ORDERS: dict[str, Callable[[int, int, np.random.Generator], np.ndarray]] = {
    "round_robin": _round_robin_order,
    "random": _random_order,
    "normal": _normal_order,
}
