"""Through an epoch, whatever its data lies on and whatever devices it runs on."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import repeat
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
from asgd_jax.training.recorded import is_recorded, make_recorded_order
from asgd_jax.training.rounds_step import (
    RoundBatch,
    add_round,
    make_cut,
    make_run_rounds,
    updates_of_round,
)
from asgd_jax.training.setup import Setup
from asgd_jax.training.state import PyTree, TrainState
from asgd_jax.training.step import Batch
from asgd_jax.transforms.history import Ring

Advance = Callable[[Placed, int, int, int], tuple[Placed, ChunkTotals]]
StreamStep = Callable[[Placed, Any, ChunkTotals], tuple[Placed, ChunkTotals]]


def make_advance(config: ConfigDict, setup: Setup) -> Advance:
    """Returns `advance(placed, epoch, start, stop)`: these updates of an epoch.

    It takes a placed state, which it donates, and returns the next one and the totals.
    """
    feed, placement, run = setup.feed, setup.placement, setup.run
    plan, max_delay = feed.facts.plan, run.process.max_delay
    in_rounds = config.parallelism == "workers"
    if in_rounds:
        num_updates = updates_of_round(run.process, plan, setup.mesh.size)
        cut = make_cut(run.process, config.seed, num_updates)
    if feed.samples is None:
        assert feed.stream is not None, "a feed has samples or a stream"
        add = add_round if in_rounds else add_step
        put = partial(_put_round, num_updates=num_updates) if in_rounds else _put_update
        return follow_stream(
            feed.stream.train,
            stream_step(run.advance, config.divergence_loss, placement, add),
            partial(put, placement, plan),
            plan.steps_per_epoch,
            max_delay,
            lengths=cut if in_rounds else _one_by_one,
        )
    order_of: Callable[[int], Any] = jax.jit(
        lambda epoch: data.epoch_batches(config.seed, epoch, plan),
        out_shardings=devices.replicated(setup.mesh),
    )
    if is_recorded(config):
        order_of = make_recorded_order(config, plan)
    samples = placement.put((feed.samples.train_images, feed.samples.train_labels))
    if in_rounds:
        run_rounds = make_run_rounds(
            run.advance, num_updates, max_delay, config.divergence_loss, placement.share
        )
        compiled = placement.compile(run_rounds, 2, 3)
        longest = min(config.log_every_steps or plan.steps_per_epoch, plan.steps_per_epoch)

        def advance(placed: Placed, epoch: int, start: int, stop: int) -> Any:
            lengths = cut(epoch * plan.steps_per_epoch + start, stop - start)
            edges = np.full(longest + 1, stop, np.int32)
            edges[: lengths.size + 1] = start + np.cumsum([0, *lengths])
            return compiled(placed, *samples, order_of(epoch), edges, np.int32(lengths.size))

        return advance
    chunk = make_run_chunk(run.advance, max_delay, config.divergence_loss, place=placement.share)
    compiled = placement.compile(chunk, 2, 3)
    return lambda placed, epoch, start, stop: compiled(
        placed, *samples, order_of(epoch), start, stop
    )


def _one_by_one(first: int, count: int) -> Iterable[int]:
    """Of so many updates, each on its own."""
    del first
    return repeat(1, count)


def _put_update(placement: Placement, plan: data.BatchPlan, batches: list[HostBatch]) -> Batch:
    return placement.put_batch(batches[0], (plan.workers_per_update, plan.worker_batch_size))


def _put_round(
    placement: Placement, plan: data.BatchPlan, batches: list[HostBatch], num_updates: int
) -> RoundBatch:
    """The batches of a round, the last one repeated where it is short."""
    padded = [*batches, *[batches[-1]] * (num_updates - len(batches))]
    images, labels = (np.concatenate(arrays) for arrays in zip(*padded, strict=True))
    shape = num_updates * plan.workers_per_update, plan.worker_batch_size
    placed = placement.put_batch((images, labels), shape)
    return RoundBatch(*placed, jnp.int32(len(batches)))


def stream_step(
    train_step: Callable[[TrainState, Any], tuple[TrainState, Any]],
    divergence_loss: float,
    placement: Placement,
    add: Callable[[ChunkTotals, Any, jax.Array, float], ChunkTotals] = add_step,
) -> StreamStep:
    """Returns one compiled update that changes nothing once the run has diverged."""

    def step(
        state: TrainState, batch: Batch, totals: ChunkTotals
    ) -> tuple[TrainState, ChunkTotals]:
        new_state, metrics = train_step(state, batch)
        new_totals = add(totals, metrics, state.step, divergence_loss)
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
    put: Callable[[list[Any]], Any],
    steps_per_epoch: int,
    max_delay: int,
    *,
    lengths: Callable[[int, int], Iterable[int]] = _one_by_one,
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
        for length in lengths(first, stop - start):
            # On its way while the device still computes.
            batch = put([next(stream.batches) for _ in range(length)])
            # Two steps behind: the last one may still run while this one is handed over, so the
            # device never waits for the host. A step after the divergence changes nothing.
            if int(_local(earlier.diverged_at)) != NOT_DIVERGED:
                break
            earlier, (placed, totals) = totals, step(placed, batch, totals)
            stream = stream._replace(next_step=stream.next_step + length)
        return placed, totals

    return advance


def _local(array: jax.Array) -> np.ndarray:
    return np.asarray(array.addressable_data(0))
