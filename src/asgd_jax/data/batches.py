"""Batch arithmetic of N workers, and the order of the samples as a function of (seed, epoch)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from asgd_jax.delays.processes import as_integer


class BatchPlan(NamedTuple):
    """How many samples make an update and how many updates an epoch.

    Attributes:
      num_samples: size of the training set.
      num_workers: N.
      worker_batch_size: b, samples of one gradient.
      delay: tau, in updates; (tau + 1) divides N.
      workers_per_update: consecutive worker batches averaged into one update, N / (tau + 1).
      update_batch_size: samples of one update, b N / (tau + 1).
      steps_per_epoch: updates of one epoch; the incomplete last update is dropped.
    """

    num_samples: int
    num_workers: int
    worker_batch_size: int
    delay: int
    workers_per_update: int
    update_batch_size: int
    steps_per_epoch: int


def _positive(value: int, name: str) -> int:
    if as_integer(value, name) == 0:
        raise ValueError(f"{name} must be >= 1, got 0: pass a positive whole number")
    return int(value)


def _refuse_delay(num_workers: int, delay: int) -> None:
    """Raises the error that names the delays and the worker counts that would do."""
    valid = [d for d in range(num_workers) if num_workers % (d + 1) == 0]
    delays = [max((d for d in valid if d < delay), default=0)]
    delays += [min((d for d in valid if d > delay), default=delays[0])]
    below = num_workers - num_workers % (delay + 1)
    workers = [n for n in (below, below + delay + 1) if n > 0]
    raise ValueError(
        f"delay={delay} with num_workers={num_workers}: delay + 1 must divide num_workers; use "
        f"delay={' or '.join(map(str, sorted(set(delays))))}, "
        f"or num_workers={' or '.join(map(str, workers))}"
    )


def plan_batches(
    num_samples: int, *, num_workers: int, worker_batch_size: int, delay: int
) -> BatchPlan:
    r"""Plans the batches of N workers whose gradients are applied with a delay of tau updates.

    Between S-SGD (tau = 0: the N gradients are averaged, batch N b) and A-SGD (tau = N - 1: each is
    applied on its own, batch b) lies any tau with $(\tau + 1) | N$: the server averages
    $N / (\tau + 1)$ consecutive worker batches into one update. The N batches of a round are then
    the same work at every tau: the captions' "equivalent large batch" is the one at tau = 0.

    Args:
      num_samples: size of the training set.
      num_workers: N >= 1.
      worker_batch_size: b >= 1, samples.
      delay: tau >= 0, updates.

    Returns:
      A `BatchPlan`.

    Raises:
      ValueError: when (delay + 1) doesn't divide num_workers, naming the nearest values that do, or
        when the set is smaller than one update.

    >>> plan = plan_batches(60_000, num_workers=32, worker_batch_size=64, delay=7)
    >>> plan.workers_per_update, plan.update_batch_size, plan.steps_per_epoch
    (4, 256, 234)

    References: Giladi et al., ICLR 2020, caption of fig. 1.
    """
    num_samples, num_workers = (
        _positive(num_samples, "num_samples"),
        _positive(num_workers, "num_workers"),
    )
    worker_batch_size = _positive(worker_batch_size, "worker_batch_size")
    delay = as_integer(delay, "delay")
    if num_workers % (delay + 1):
        _refuse_delay(num_workers, delay)
    workers_per_update = num_workers // (delay + 1)
    update_batch_size = worker_batch_size * workers_per_update
    if num_samples < update_batch_size:
        raise ValueError(
            f"one update takes {update_batch_size} samples and there are {num_samples}: use a "
            f"smaller worker_batch_size (now {worker_batch_size}), fewer workers or a larger delay"
        )
    return BatchPlan(
        num_samples=num_samples,
        num_workers=num_workers,
        worker_batch_size=worker_batch_size,
        delay=delay,
        workers_per_update=workers_per_update,
        update_batch_size=update_batch_size,
        steps_per_epoch=num_samples // update_batch_size,
    )


def epoch_permutation(seed: int | jax.Array, epoch: int | jax.Array, num_samples: int) -> jax.Array:
    """Returns the order of the samples in an epoch; equal arguments give equal orders.

    Args:
      seed: of the run; may be traced.
      epoch: 0, 1, ...; may be traced.
      num_samples: static.

    Returns:
      int32 array of shape (num_samples,), a permutation of 0, ..., num_samples - 1.

    >>> sorted(epoch_permutation(0, 3, 4).tolist())
    [0, 1, 2, 3]
    """
    key = jax.random.fold_in(jax.random.key(seed), epoch)
    return jax.random.permutation(key, jnp.arange(num_samples, dtype=jnp.int32))


def epoch_batches(seed: int | jax.Array, epoch: int | jax.Array, plan: BatchPlan) -> jax.Array:
    """Returns the samples of every update of an epoch, in the shape a scan over it wants.

    Update `step` of a run is row `step % steps_per_epoch` of epoch `step // steps_per_epoch`, so a
    resumed run needs nothing but the step.

    Args:
      seed: of the run; may be traced.
      epoch: 0, 1, ...; may be traced.
      plan: static.

    Returns:
      int32 array of shape (steps_per_epoch, workers_per_update, worker_batch_size), indices of
      samples, none twice.

    >>> plan = plan_batches(10, num_workers=4, worker_batch_size=2, delay=1)
    >>> epoch_batches(0, 0, plan).shape
    (2, 2, 2)
    """
    order = epoch_permutation(seed, epoch, plan.num_samples)
    used = order[: plan.steps_per_epoch * plan.update_batch_size]
    return used.reshape(plan.steps_per_epoch, plan.workers_per_update, plan.worker_batch_size)
