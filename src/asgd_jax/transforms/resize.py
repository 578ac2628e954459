"""`resize_history`: the state of one delay made that of another."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from asgd_jax.delays.processes import DelayProcess, as_process
from asgd_jax.transforms.delay_gradients import DelayGradientsState
from asgd_jax.transforms.delayed import DelayedState
from asgd_jax.transforms.history import PyTree, Ring, init_ring, read_slot, resize_ring
from asgd_jax.transforms.leaf_delays import is_leafwise
from asgd_jax.transforms.momentum import ShiftedTraceState


def resize_history(
    state: optax.OptState,
    delay: int | DelayProcess,
    params: PyTree | None = None,
    *,
    history_dtype: DTypeLike | None = None,
) -> optax.OptState:
    """Returns an optimizer state for another delay, with everything of the past that it can keep.

    A run that goes on with a longer delay knows no older parameters than those of its old history:
    staleness then ramps up from there, as it does at the start of a run. With a shorter delay the
    next gradient is taken at the oldest parameters that the new history holds, if it would have
    been older. A longer queue of gradients hands on zeros where it used its gradients already, a
    shorter one drops its oldest; `shifted_trace` outside `delayed` takes its oldest buffer for
    those that it never had.

    Args:
      state: an optimizer state with the states of `delayed`, `shifted_trace` or `delay_gradients`
        at any depth; of Flax NNX, `nnx.as_pure` of it.
      delay: the new delay, int >= 0 or a `DelayProcess`: the one given to the new optimizer.
      params: the live parameters, as this `delayed` sees them; needed only where there was no delay
        before.
      history_dtype: as given to `delayed`; likewise.

    Raises:
      ValueError: for a bad delay, a state that holds none of these, and for one without a history
        when `params` is None.

    >>> from asgd_jax import delayed
    >>> state = delayed(optax.sgd(0.1), delay=3).init(jnp.zeros(2))
    >>> resize_history(state, 8).history.slots.shape
    (8, 2)
    """
    if is_leafwise(delay) or any(map(_is_by_leaf, jax.tree.leaves(state, is_leaf=_is_kept))):
        raise ValueError(
            "resize_history takes one delay for all leaves, and here leaves have delays of their "
            "own: start again by init(params), with histories full of these parameters"
        )
    depth = as_process(delay).max_delay

    def convert(node: Any) -> Any:
        if isinstance(node, DelayedState):
            inner_state = jax.tree.map(convert, node.inner_state, is_leaf=_is_kept)
            node = node._replace(inner_state=inner_state)
            return _resize_delayed(node, depth, params, history_dtype)
        if isinstance(node, ShiftedTraceState):
            return node._replace(buffers=resize_ring(node.buffers, node.num_pushes, depth + 1))
        if isinstance(node, DelayGradientsState):
            newest = node.num_gradients - 1
            return node._replace(gradients=resize_ring(node.gradients, newest, depth + 1, zeros=1))
        return node

    nodes = jax.tree.leaves(state, is_leaf=_is_kept)
    if not any(map(_is_kept, nodes)):
        raise ValueError(
            f"no history in an optimizer state of type {type(state).__name__}: restore a "
            "checkpoint into a template of its structure, tx.init(params), and then resize it"
        )
    if not all(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in jax.tree.leaves(state)):
        raise ValueError("resize_history takes a state of arrays: of Flax NNX, nnx.as_pure(state)")
    return jax.tree.map(convert, state, is_leaf=_is_kept)


def _is_kept(node: Any) -> bool:
    return isinstance(node, (DelayedState, ShiftedTraceState, DelayGradientsState))


def _is_by_leaf(node: Any) -> bool:
    """Whether it is the state of a `delayed` whose leaves have delays of their own."""
    if not (isinstance(node, DelayedState) and isinstance(node.history, Ring)):
        return False
    slots = jax.tree.leaves(
        node.history.slots, is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode)
    )
    masked = [leaf for leaf in slots if isinstance(leaf, optax.MaskedNode)]
    return bool(masked) or len({leaf.shape[0] for leaf in slots}) > 1


def _resize_delayed(
    state: DelayedState, depth: int, params: PyTree | None, history_dtype: DTypeLike | None
) -> DelayedState:
    if depth == 0:
        return state._replace(history=(), stale=(), staleness=jnp.zeros((), jnp.int32))
    if not isinstance(state.history, Ring):
        if params is None:
            raise ValueError(
                "a state of delay 0 has no history to resize: pass params, the live parameters"
            )
        return state._replace(
            history=init_ring(params, depth, history_dtype),
            stale=jax.tree.map(jnp.array, params),
            history_start=jnp.array(state.num_updates),
        )
    slots = jax.tree.leaves(state.history.slots)
    old_depth = slots[0].shape[0] if slots else depth
    history = resize_ring(state.history, state.num_updates - 1, depth)
    return state._replace(
        history=history,
        history_start=jnp.maximum(state.history_start, state.num_updates - old_depth),
        **_shorten(state, history, depth),
    )


def _shorten(state: DelayedState, history: Ring, depth: int) -> dict[str, Any]:
    """The next gradient's staleness and parameters, from within the new history."""
    oldest = read_slot(history, state.num_updates - depth, state.stale)
    keep = state.staleness <= depth
    return {
        "staleness": jnp.minimum(state.staleness, depth),
        "stale": jax.tree.map(lambda old, new: jnp.where(keep, old, new), state.stale, oldest),
    }
