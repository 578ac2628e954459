"""Through an epoch, whatever its data lies on and whatever devices it runs on."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from asgd_jax import data
from asgd_jax.training import mesh as devices
from asgd_jax.training.chunk import NOT_DIVERGED, ChunkTotals, add_step, make_run_chunk, zero_totals
from asgd_jax.training.feed import HostBatch
from asgd_jax.training.placement import Placed, Placement
from asgd_jax.training.setup import Setup
from asgd_jax.training.state import PyTree, TrainState
from asgd_jax.training.step import Batch, TrainStep
from asgd_jax.transforms.history import Ring

Advance = Callable[[Placed, int, int, int], tuple[Placed, ChunkTotals]]
StreamStep = Callable[[Placed, Batch, ChunkTotals], tuple[Placed, ChunkTotals]]


def make_advance(config: ConfigDict, setup: Setup) -> Advance:
    """Returns `advance(placed, epoch, start, stop)`: these updates of an epoch.

    It takes a placed state, which it donates, and returns the next one and the totals.
    """
    feed, placement, run = setup.feed, setup.placement, setup.run
    plan, max_delay = feed.facts.plan, run.process.max_delay
    if feed.samples is None:
        assert feed.stream is not None, "a feed has samples or a stream"
        shape = plan.workers_per_update, plan.worker_batch_size
        return follow_stream(
            feed.stream.train,
            stream_step(run.advance, config.divergence_loss, placement),
            lambda batch: placement.put_batch(batch, shape),
            plan.steps_per_epoch,
            max_delay,
        )
    order_of = jax.jit(
        lambda epoch: data.epoch_batches(config.seed, epoch, plan),
        out_shardings=devices.replicated(setup.mesh),
    )
    chunk = make_run_chunk(run.advance, max_delay, config.divergence_loss, place=placement.share)
    compiled = placement.compile(chunk, 2, 3)
    samples = placement.put((feed.samples.train_images, feed.samples.train_labels))
    return lambda placed, epoch, start, stop: compiled(
        placed, *samples, order_of(epoch), start, stop
    )


def stream_step(train_step: TrainStep, divergence_loss: float, placement: Placement) -> StreamStep:
    """Returns one compiled update that changes nothing once the run has diverged."""

    def step(
        state: TrainState, batch: Batch, totals: ChunkTotals
    ) -> tuple[TrainState, ChunkTotals]:
        new_state, metrics = train_step(state, batch)
        new_totals = add_step(totals, metrics, state.step, divergence_loss)
        diverged = totals.diverged_at != NOT_DIVERGED
        kept: tuple[TrainState, ChunkTotals] = _keep_if(
            diverged, (state, totals), (new_state, new_totals)
        )
        return kept

    return placement.compile(step, 1, 1)


def _keep_if(condition: jax.Array, old: PyTree, new: PyTree) -> PyTree:
    """Returns `old` under the condition, else `new`; but rings of past values of `new`.

    To keep them as well would copy them whole at every step (`lax.cond` copies even more), and of a
    run that has diverged nobody reads them.
    """

    def pick(old_node: Any, new_node: Any) -> Any:
        return new_node if isinstance(new_node, Ring) else jnp.where(condition, old_node, new_node)

    return jax.tree.map(pick, old, new, is_leaf=lambda node: isinstance(node, Ring))


class _Open(NamedTuple):
    """An open stream of batches, and the number of the step that it yields next."""

    batches: Iterator[HostBatch]
    next_step: int


def follow_stream(
    open_stream: Callable[[int], Iterator[Any]],
    step: StreamStep,
    put: Callable[[Any], Batch],
    steps_per_epoch: int,
    max_delay: int,
) -> Advance:
    """Returns `advance` over a stream: the host runs ahead of the devices by two updates."""
    stream = _Open(iter(()), -1)

    def advance(placed: Placed, epoch: int, start: int, stop: int) -> tuple[Placed, ChunkTotals]:
        nonlocal stream
        first = epoch * steps_per_epoch + start
        if stream.next_step != first:
            stream = _Open(open_stream(first), first)
        totals = zero_totals(max_delay)
        earlier = totals
        for number in range(first, first + stop - start):
            batch = put(next(stream.batches))  # on its way while the device still computes
            # Two steps behind: the last one may still run while this one is handed over, so the
            # device never waits for the host. A step after the divergence changes nothing.
            if int(_local(earlier.diverged_at)) != NOT_DIVERGED:
                break
            earlier, (placed, totals) = totals, step(placed, batch, totals)
            stream = stream._replace(next_step=number + 1)
        return placed, totals

    return advance


def _local(array: jax.Array) -> np.ndarray:
    return np.asarray(array.addressable_data(0))
