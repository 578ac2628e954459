"""`rounds`: the gradients of N asynchronous workers at once, exactly as one after another."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from asgd_jax.delays.blocks import Blocks
from asgd_jax.delays.processes import as_integer
from asgd_jax.transforms.history import PyTree
from asgd_jax.transforms.recorded_rounds import recorded_rounds
from asgd_jax.transforms.round_server import (
    Gradient,
    Predict,
    Rounds,
    RoundState,
    apply_gradient,
    gradients_of,
    init_state,
    place_server,
)
from asgd_jax.transforms.worker_axis import (
    Layout,
    make_layout,
    piece_specs,
    place,
    stacked,
    whole_specs,
)


def rounds(
    inner: optax.GradientTransformation,
    num_workers: int | Blocks,
    *,
    mesh: Mesh | None = None,
    axis: str = "workers",
    predict: Predict | None = None,
    delay: int | None = None,
    specs: PyTree = None,
) -> Rounds:
    """TODO."""
    if isinstance(num_workers, Blocks):
        if predict is not None or delay is not None:
            raise ValueError(
                "predict= and delay= are for a number of workers: in a recorded schedule the "
                "blocks say the delays, and one version may be pulled for several"
            )
        return recorded_rounds(inner, num_workers, make_layout(mesh, axis, specs))
    num_workers, delay = _check_workers(num_workers, delay)
    layout = make_layout(mesh, axis, specs)
    if num_workers % layout.num_devices:
        raise ValueError(
            f"num_workers={num_workers} cannot be divided over the {layout.num_devices} devices of "
            f"the mesh's axis {axis!r}: use a multiple of {layout.num_devices} workers"
        )
    return _round_robin(inner, num_workers, delay + 1, layout, predict)


def _round_robin(
    inner: optax.GradientTransformation,
    num_workers: int,
    num_updates: int,
    layout: Layout,
    predict: Predict | None,
) -> Rounds:
    """Rounds of `num_updates` updates, each of so many averaged gradients as there are workers."""
    # Workers of one update share a version; each device needs at least one.
    num_sets = math.lcm(num_updates, layout.num_devices)
    copies = num_sets // num_updates
    ages = jnp.arange(num_updates, dtype=jnp.int32)

    def foresee(params: PyTree, inner_state: optax.OptState, staleness: Any) -> PyTree:
        return params if predict is None else predict(params, inner_state, staleness)

    def init_fn(params: PyTree) -> RoundState:
        def pull(params: PyTree, inner_state: optax.OptState) -> PyTree:
            made = [foresee(params, inner_state, ages[at // copies]) for at in range(num_sets)]
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *made)

        specs = stacked(whole_specs(layout, params), layout.axis)
        return init_state(inner, layout, params, pull, specs)

    def round_fn(gradient: Gradient, state: RoundState, batches: PyTree) -> tuple[RoundState, Any]:
        pieces = stacked(piece_specs(layout, state.params))
        whole = stacked(whole_specs(layout, state.params), layout.axis)
        state = place_server(layout, state)
        pulled = place(layout, state.pulled, whole)
        gradients, aux = gradients_of(layout, gradient, pulled, batches, num_workers)
        gradients = place(layout, gradients, pieces)
        gradients = _averaged(gradients, copies)
        staleness = jnp.where(state.count == 0, ages, num_updates - 1)
        server = (state.params, state.inner_state)

        def update(server: Any, given: Any) -> tuple[Any, PyTree]:
            params, inner_state = server
            gradient, staleness, stale = given
            params, inner_state = apply_gradient(
                inner, gradient, inner_state, params, staleness, stale, num_updates - 1
            )
            version = foresee(params, inner_state, jnp.asarray(num_updates - 1, jnp.int32))
            return (params, inner_state), version

        if layout.num_devices == 1:
            server, versions = _scan_in_place(update, server, (gradients, staleness), pulled)
        else:
            # Nothing of this remains where the optimizer takes no stale_params.
            stale = jax.tree.map(lambda leaf: leaf[::copies], place(layout, pulled, pieces))
            server, versions = jax.lax.scan(update, server, (gradients, staleness, stale))
            # First in pieces: else the compiler moves the change of layout into every update.
            versions = place(layout, versions, pieces)
            versions = jax.tree.map(lambda leaf: jnp.repeat(leaf, copies, axis=0), versions)
            versions = place(layout, versions, pieces)
        versions = place(layout, versions, whole)
        params, inner_state = server
        return place_server(layout, RoundState(state.count + 1, params, versions, inner_state)), aux

    return Rounds(init_fn, round_fn, num_workers)


def _scan_in_place(
    update: Callable[[Any, Any], tuple[Any, PyTree]], carry: Any, given: tuple[Any, ...], stack: PyTree
) -> tuple[Any, PyTree]:
    """Like `lax.scan` over `(*given, stack)`, but what it returns is written over the stack.

    The new stack is the donated one: otherwise both are in memory, and one is copied at the end.
    """

    def step(place_in_stack: jax.Array, carries: tuple[Any, PyTree]) -> tuple[Any, PyTree]:
        carry, stack = carries
        here = jax.tree.map(lambda leaf: leaf[place_in_stack], (*given, stack))
        carry, new = update(carry, here)
        written = jax.tree.map(
            lambda leaf, value: jax.lax.dynamic_update_index_in_dim(leaf, value, place_in_stack, 0),
            stack,
            new,
        )
        return carry, written

    length = jax.tree.leaves(stack)[0].shape[0]
    made: tuple[Any, PyTree] = jax.lax.fori_loop(0, length, step, (carry, stack))
    return made


def _averaged(stack: PyTree, number: int) -> PyTree:
    """Means of `number` consecutive entries of a stack."""
    if number == 1:
        return stack
    return jax.tree.map(
        lambda leaf: leaf.reshape(-1, number, *leaf.shape[1:]).mean(1), stack
    )


def _check_workers(num_workers: Any, delay: Any) -> tuple[int, int]:
    """Returns the number of workers and the delay, N - 1 unless given."""
    num_workers = as_integer(num_workers, "num_workers")
    if num_workers == 0:
        raise ValueError("num_workers must be >= 1, got 0: somebody has to push")
    delay = num_workers - 1 if delay is None else as_integer(delay, "delay")
    if num_workers % (delay + 1):
        fits = [n - 1 for n in range(1, num_workers + 1) if num_workers % n == 0]
        raise ValueError(
            f"delay={delay} does not fit num_workers={num_workers}: delay + 1 must divide it, as "
            f"for {fits}"
        )
    return num_workers, delay
