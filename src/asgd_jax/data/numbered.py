"""Batches by number: what a worker that asks for work is handed, and what a replay asks for again.

A number names a batch for ever: it is a function of (seed, number) alone, whoever computes on it
and whenever. Of the whole set, number k is row k mod steps_per_epoch of epoch k // steps_per_epoch,
the batch of update k in a simulated run. Of S shards, number k is batch k // S of shard k mod S.
"""

from collections.abc import Callable
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from asgd_jax.data.batches import BatchPlan, epoch_batches

BatchOf = Callable[[int], np.ndarray]


def steps_per_shard(plan: BatchPlan, num_shards: int) -> int:
    """Returns the batches of a shard's epoch; the incomplete last one is dropped.

    Raises:
      ValueError: where a shard is smaller than a batch.

    >>> from asgd_jax.data.batches import plan_batches
    >>> steps_per_shard(plan_batches(100, num_workers=4, worker_batch_size=8, delay=3), 4)
    3
    """
    if num_shards == 1:
        return plan.steps_per_epoch
    steps = plan.num_samples // num_shards // plan.update_batch_size
    if steps == 0:
        raise ValueError(
            f"each of {num_shards} shards has {plan.num_samples // num_shards} samples and a batch "
            f"takes {plan.update_batch_size}: use a smaller worker_batch_size, fewer workers, or "
            "worker_data='whole'"
        )
    return steps


def shard_batches(
    seed: int | jax.Array,
    shard: int | jax.Array,
    epoch: int | jax.Array,
    plan: BatchPlan,
    num_shards: int,
) -> jax.Array:
    """Returns the samples of every batch of a shard's epoch; one shard of one is the whole set.

    Shard s holds samples s, s + S, s + 2 S, ...; each has floor(num_samples / S).

    Args:
      seed: of the run.
      shard: 0, ..., num_shards - 1.
      epoch: of the shard: how often all its batches have been handed out.
      plan: static.
      num_shards: S, static.

    Returns:
      int32 array of shape (steps, workers_per_update, worker_batch_size), none of its samples twice
      and none in another shard.
    """
    if num_shards == 1:
        return epoch_batches(seed, epoch, plan)
    size, steps = plan.num_samples // num_shards, steps_per_shard(plan, num_shards)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), epoch), shard + 1)
    order = jax.random.permutation(key, jnp.arange(size, dtype=jnp.int32)) * num_shards + shard
    used = order[: steps * plan.update_batch_size]
    return used.reshape(steps, plan.workers_per_update, plan.worker_batch_size)


def make_batch_of(seed: int, plan: BatchPlan, num_shards: int = 1) -> BatchOf:
    """Returns `batch_of(number)`: the samples of a batch, on the host.

    It keeps the order of the epochs that it was asked for last, a few a shard.

    Args:
      seed: of the run.
      plan: its batch arithmetic.
      num_shards: 1 for batches of the whole set.

    Returns:
      A function to int32 arrays of shape (workers_per_update, worker_batch_size).

    >>> from asgd_jax.data.batches import plan_batches
    >>> plan = plan_batches(10, num_workers=2, worker_batch_size=2, delay=1)
    >>> batch_of = make_batch_of(0, plan, num_shards=2)
    >>> sorted(int(i) for k in (0, 2) for i in batch_of(k).ravel())  # the batches of shard 0
    [0, 2, 6, 8]
    """
    steps = steps_per_shard(plan, num_shards)
    compiled = jax.jit(partial(shard_batches, plan=plan, num_shards=num_shards))

    @lru_cache(maxsize=4 * num_shards)
    def order_of(shard: int, epoch: int) -> np.ndarray:
        return np.asarray(compiled(seed, shard, epoch))

    def batch_of(number: int) -> np.ndarray:
        position, shard = divmod(int(number), num_shards)
        return order_of(shard, position // steps)[position % steps]

    return batch_of
