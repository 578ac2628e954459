"""Many updates in one compiled loop, with their metrics summed on the device."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from asgd_jax.training.state import TrainState
from asgd_jax.training.step import Batch, StepMetrics, TrainStep

NOT_DIVERGED = -1


class ChunkTotals(NamedTuple):
    """Sums over the updates of a chunk.

    Attributes:
      steps: int32, updates made.
      loss, error, gradient_norm: float32 sums; divide by `steps`.
      staleness: int32 array (max_delay + 1,), how many gradients had each staleness.
      diverged_at: int32, the first update whose loss was not finite or too large, or -1.
    """

    steps: jax.Array
    loss: jax.Array
    error: jax.Array
    gradient_norm: jax.Array
    staleness: jax.Array
    diverged_at: jax.Array


def zero_totals(max_delay: int) -> ChunkTotals:
    """Returns the totals of no update."""
    zero = jnp.zeros((), jnp.float32)
    return ChunkTotals(
        steps=jnp.zeros((), jnp.int32),
        loss=zero,
        error=zero,
        gradient_norm=zero,
        staleness=jnp.zeros(max_delay + 1, jnp.int32),
        diverged_at=jnp.full((), NOT_DIVERGED, jnp.int32),
    )


def add_step(
    totals: ChunkTotals, metrics: StepMetrics, step: jax.Array, divergence_loss: float
) -> ChunkTotals:
    """Returns the totals with one more update."""
    fine = metrics.loss <= divergence_loss  # False for NaN too
    return ChunkTotals(
        steps=totals.steps + 1,
        loss=totals.loss + metrics.loss,
        error=totals.error + metrics.error,
        gradient_norm=totals.gradient_norm + metrics.gradient_norm,
        staleness=totals.staleness.at[metrics.staleness].add(1),
        diverged_at=jnp.where(
            (totals.diverged_at == NOT_DIVERGED) & ~fine, step, totals.diverged_at
        ),
    )


def make_run_chunk(
    train_step: TrainStep,
    max_delay: int,
    divergence_loss: float,
    *,
    place: Callable[[Batch], Batch] = lambda batch: batch,
    stop_early: bool = True,
) -> Callable[..., tuple[TrainState, ChunkTotals]]:
    """Returns `run_chunk(state, images, labels, order, start, stop) -> (state, totals)`.

    It makes updates `start`, ..., `stop` - 1 of the epoch whose samples `order` lists, in one
    `while` loop: chunks of any length share one program, and a run that diverges stops at that
    update. To be jitted, or mapped over devices, with the state donated.

    Args:
      train_step: see `make_train_step`.
      max_delay: largest staleness, sizes the histogram.
      divergence_loss: a train loss above it, or not finite, ends the chunk.
      place: applied to every batch: constrains its sharding, or takes this device's share.
      stop_early: whether a diverged run stops. Under `vmap` it must not: the loop's condition, and
        with it the slot that is written, would differ between runs, and every step would copy the
        history.

    The returned function takes the data set on the device (`images` uint8, `labels` int32) and
    `order`, int32 (steps_per_epoch, workers_per_update, worker_batch_size), indices of samples.
    """
    Carry = tuple[jax.Array, TrainState, ChunkTotals]

    def run_chunk(
        state: TrainState,
        images: jax.Array,
        labels: jax.Array,
        order: jax.Array,
        start: jax.Array | int,
        stop: jax.Array | int,
    ) -> tuple[TrainState, ChunkTotals]:
        def unfinished(carry: Carry) -> jax.Array:
            index, _, totals = carry
            fine = totals.diverged_at == NOT_DIVERGED
            return (index < stop) & fine if stop_early else index < stop

        def update(carry: Carry) -> Carry:
            index, state, totals = carry
            samples = order[index]
            new_state, metrics = train_step(state, place(Batch(images[samples], labels[samples])))
            totals = add_step(totals, metrics, state.step, divergence_loss)
            return index + 1, new_state, totals

        first = jnp.asarray(start, jnp.int32)
        _, state, totals = jax.lax.while_loop(
            unfinished, update, (first, state, zero_totals(max_delay))
        )
        return state, totals

    return run_chunk


def merge_totals(left: ChunkTotals, right: ChunkTotals) -> ChunkTotals:
    """Returns the totals of two chunks, the second following the first."""
    fine = left.diverged_at == NOT_DIVERGED
    return jax.tree.map(lambda a, b: a + b, left, right)._replace(
        diverged_at=jnp.where(fine, right.diverged_at, left.diverged_at)
    )
