"""Rounds of a recorded schedule: blocks of updates, at versions gathered from a ring."""

from typing import Any

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


def recorded_rounds(
    inner: optax.GradientTransformation, blocks: Blocks, layout: WorkerLayout
) -> Rounds:
    """Returns the engine that makes a block of updates a round; see `rounds`."""
    updates = blocks.updates(layout.num_devices)
    num_blocks, num_batches = updates.shape
    # Versions are told by their age at the block's start; a padded place has that of the last.
    ages = blocks.starts[:, None] - updates + blocks.trace[updates]
    depth = int(ages.max()) + 1
    max_delay = int(blocks.trace.max())

    def init_fn(params: PyTree) -> RoundState:
        ring_specs = Ring(stacked(piece_specs(layout, params)))
        return init_rounds(
            inner, layout, params, lambda params, _: init_ring(params, depth), ring_specs
        )

    def round_fn(
        gradient: WorkerGradient, state: RoundState, batches: PyTree
    ) -> tuple[RoundState, Any]:
        if not isinstance(state.pulled, Ring):
            raise ValueError(
                "the state of rounds of a recorded schedule has no ring of versions: it is the "
                "state of a number of workers; make it by init(params)"
            )
        check_ring(state.pulled, depth, f"rounds(..., Blocks of depth {depth})", state.params)
        pieces = piece_specs(layout, state.params)
        state = place_server(layout, state)
        block = state.count % num_blocks
        start = (state.count // num_blocks) * blocks.trace.size + jnp.asarray(blocks.starts)[block]
        versions = jnp.maximum(start - jnp.asarray(ages, np.int32)[block], 0)

        read = jax.vmap(lambda version: read_slot(state.pulled, version, state.params))
        stale = place(layout, read(versions), stacked(pieces))
        pulled = place(layout, stale, stacked(whole_specs(layout, state.params), layout.axis))
        gradients, aux = gradients_of(layout, gradient, pulled, batches, num_batches)
        gradients = place(layout, gradients, stacked(pieces))

        def update(place_in_block: jax.Array, carry: Any) -> Any:
            params, inner_state, ring = carry
            version = start + place_in_block
            params, inner_state = apply_gradient(
                inner,
                jax.tree.map(lambda leaf: leaf[place_in_block], gradients),
                inner_state,
                params,
                version - versions[place_in_block],
                jax.tree.map(lambda leaf: leaf[place_in_block], stale),
                max_delay,
            )
            return params, inner_state, write_slot(ring, version + 1, params)

        carry = (state.params, state.inner_state, state.pulled)
        # The bound is the mask: what pads the block is computed and never applied.
        length = jnp.asarray(blocks.lengths)[block]
        params, inner_state, ring = jax.lax.fori_loop(0, length, update, carry)
        ring = Ring(place(layout, ring.slots, stacked(pieces)))
        return place_server(layout, RoundState(state.count + 1, params, ring, inner_state)), aux

    return Rounds(init_fn, round_fn, num_batches)
