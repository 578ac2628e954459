"""Rounds of any schedule: blocks of updates, at versions gathered from a ring."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from asgd_jax.delays.blocks import Blocks
from asgd_jax.transforms.history import PyTree, Ring, check_ring, init_ring, read_slot, write_slot
from asgd_jax.transforms.round_server import (
    Rounds,
    RoundState,
    WorkerGradient,
    apply_gradient,
    gradients_of,
    init_rounds,
    place_server,
)
from asgd_jax.transforms.worker_axis import WorkerLayout, piece_specs, place, stacked, whole_specs


class Block(NamedTuple):
    """A block of updates, as data; it is padded to the updates of a round.

    Attributes:
      start: int32 scalar, number of its first update.
      length: int32 scalar, updates that are made.
      versions: int32 (updates of a round,), what each gradient is taken at: x_v, 0 <= v <= start.
    """

    start: jax.Array
    length: jax.Array
    versions: jax.Array


class BlockRounds(NamedTuple):
    """What `block_rounds` returns.

    Attributes:
      init: `init(params) -> RoundState`, in fresh buffers.
      round: `round(gradient, state, batches, block, stop) -> (state, aux, gradients)`: aux of all
        workers, and the gradient of every update, stacked, in pieces. `stop(aux)` may end the
        round before the block's length: how many updates to make at most.
    """

    init: Callable[[PyTree], RoundState]
    round: Callable[..., tuple[RoundState, Any, PyTree]]


def block_rounds(
    inner: optax.GradientTransformation,
    layout: WorkerLayout,
    *,
    num_updates: int,
    depth: int,
    max_delay: int,
    workers_per_update: int = 1,
) -> BlockRounds:
    """Returns the engine of rounds whose blocks are data: one program for all of them.

    Args:
      inner: the server's optimizer, which takes extra arguments.
      layout: of the devices, which divide the workers of a round.
      num_updates: of a round; shorter blocks are padded, and what pads them is not applied.
      depth: versions that are kept, the live one among them.
      max_delay: what `inner` is told of its `delayed`.
      workers_per_update: consecutive gradients whose mean makes an update. Batches of a round have
        a first axis of `num_updates * workers_per_update`.
    """
    num_batches = num_updates * workers_per_update
    # Workers of one update share a version; each device needs at least one.
    copies = math.lcm(num_updates, layout.num_devices) // num_updates

    def init_fn(params: PyTree) -> RoundState:
        ring_specs = Ring(stacked(piece_specs(layout, params)))
        return init_rounds(
            inner, layout, params, lambda params, _: init_ring(params, depth), ring_specs
        )

    def round_fn(
        gradient: WorkerGradient,
        state: RoundState,
        batches: PyTree,
        block: Block,
        stop: Callable[[Any], jax.Array] | None = None,
    ) -> tuple[RoundState, Any, PyTree]:
        pieces = stacked(piece_specs(layout, state.params))
        state = place_server(layout, state)
        read = jax.vmap(lambda version: read_slot(state.pulled, version, state.params))
        stale = place(layout, read(block.versions), pieces)
        pulled = place(
            layout,
            _repeat(layout, stale, copies, pieces),
            stacked(whole_specs(layout, state.params), layout.axis),
        )
        gradients, aux = gradients_of(layout, gradient, pulled, batches, num_batches)
        gradients = _means(place(layout, gradients, pieces), copies)

        def update(at: jax.Array, carry: Any) -> Any:
            params, inner_state, ring = carry
            version = block.start + at
            params, inner_state = apply_gradient(
                inner,
                jax.tree.map(lambda leaf: leaf[at], gradients),
                inner_state,
                params,
                version - block.versions[at],
                jax.tree.map(lambda leaf: leaf[at], stale),
                max_delay,
            )
            return params, inner_state, write_slot(ring, version + 1, params)

        carry = (state.params, state.inner_state, state.pulled)
        # The bound is the mask: what pads the block is computed and never applied.
        length = block.length if stop is None else jnp.minimum(block.length, stop(aux))
        params, inner_state, ring = jax.lax.fori_loop(0, length, update, carry)
        ring = Ring(place(layout, ring.slots, pieces))
        made = place_server(layout, RoundState(state.count + length, params, ring, inner_state))
        return made, aux, gradients

    return BlockRounds(init_fn, round_fn)


def _repeat(layout: WorkerLayout, stack: PyTree, copies: int, specs: PyTree) -> PyTree:
    if copies == 1:
        return stack
    # In pieces once more: else the compiler moves whole sets about.
    return place(layout, jax.tree.map(lambda leaf: jnp.repeat(leaf, copies, axis=0), stack), specs)


def _means(stack: PyTree, copies: int) -> PyTree:
    if copies == 1:
        return stack
    return jax.tree.map(lambda leaf: leaf.reshape(-1, copies, *leaf.shape[1:]).mean(1), stack)


def recorded_rounds(
    inner: optax.GradientTransformation, blocks: Blocks, layout: WorkerLayout
) -> Rounds:
    """Returns the engine that makes a block of a recorded schedule a round; see `rounds`."""
    updates = blocks.updates(layout.num_devices)
    num_batches = updates.shape[1]
    # Versions are told by their age at the block's start; a padded place has that of the last.
    ages = blocks.starts[:, None] - updates + blocks.trace[updates]
    depth = int(ages.max()) + 1
    engine = block_rounds(
        inner,
        layout,
        num_updates=num_batches,
        depth=depth,
        max_delay=int(blocks.trace.max()),
    )

    def round_fn(
        gradient: WorkerGradient, state: RoundState, batches: PyTree
    ) -> tuple[RoundState, Any]:
        if not isinstance(state.pulled, Ring):
            raise ValueError(
                "the state of rounds of a recorded schedule has no ring of versions: it is the "
                "state of a number of workers; make it by init(params)"
            )
        check_ring(
            state.pulled,
            depth,
            f"rounds(..., Blocks of depth {depth})",
            state.params,
            otherwise="it is the state of other blocks; go on with those, or make it by "
            "init(params)",
        )
        start, place_in_trace = state.count, state.count % blocks.trace.size
        number = jnp.searchsorted(jnp.asarray(blocks.starts), place_in_trace, side="right") - 1
        # The state of another cut may stand within a block, whose batches these are not: of that
        # nothing can be said under jit, so that its parameters say it.
        begins = jnp.asarray(blocks.starts)[number] == place_in_trace
        versions = jnp.maximum(start - jnp.asarray(ages, np.int32)[number], 0)
        block = Block(start, jnp.asarray(blocks.lengths)[number], versions)
        state, aux, _ = engine.round(gradient, state, batches, block)
        lost = jax.tree.map(lambda leaf: jnp.where(begins, leaf, jnp.nan), state.params)
        return state._replace(params=lost), aux

    return Rounds(engine.init, round_fn, num_batches)
