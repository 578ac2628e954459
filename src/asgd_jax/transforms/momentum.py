"""Shifted momentum: one momentum buffer per worker, kept as a ring."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from asgd_jax.delays.processes import DelayProcess, as_process
from asgd_jax.transforms.hand_down import MAX_DELAY_AROUND
from asgd_jax.transforms.history import (
    PyTree,
    Ring,
    check_ring,
    init_ring,
    is_none,
    read_slot,
    with_value_dtypes,
    write_then_read,
)


class ShiftedTraceState(NamedTuple):
    """State of `shifted_trace`: pushes made, and a ring of `max_delay + 1` momentum buffers."""

    num_pushes: jax.Array
    buffers: Ring


def shifted_trace(
    decay: float | jax.Array, delay: int | DelayProcess, *, dampening: bool = True
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum along the worker instead of along the server.

    $$v_{t+1} = m\, v_{t - s_t} + (1 - d)\, g_t, \qquad v_0 = 0,$$

    with d = m when `dampening`, else 0, and $s_t$ the staleness of the gradient $g_t$. Between a
    pull and its push the worker's own last buffer is exactly $v_{t - s_t}$, so this equals one
    buffer per worker that is read before and written after that worker's push (the paper's shifted
    momentum, eq. 11), whatever the schedule of the workers.

    Args:
      decay: the momentum m in [0, 1), a float or scalar array.
      delay: int >= 0 or a `DelayProcess`; sizes the ring. Inside `delayed` the ring follows the
        `staleness` that `delayed` hands down, and the two must have the same largest delay; without
        it an integer delay is used as it is.
      dampening: whether the gradient is scaled by 1 - m.

    Returns:
      A GradientTransformationExtraArgs with a `ShiftedTraceState`. Buffers, and the updates handed
      on, have the dtypes of the parameters; a gradient that is None (a frozen leaf) stays None.

    Raises:
      ValueError: for a bad delay or a momentum outside [0, 1); from `update`, for a random delay
        without `staleness`, inside a `delayed` of another delay, or for the state of one.

    >>> tx = shifted_trace(0.5, delay=1)
    >>> state = tx.init(jnp.array(0.0))
    >>> for _ in range(4):  # two workers: each buffer moves every second time
    ...     update, state = tx.update(jnp.array(1.0), state)
    ...     print(update)
    0.5
    0.5
    0.75
    0.75

    References:
      Giladi et al., "At Stability's Edge", ICLR 2020, section 2.2.2, eq. 11.
    """
    process = as_process(delay)
    if isinstance(decay, (int, float)) and not 0 <= decay < 1:
        raise ValueError(f"momentum must be in [0, 1), got {decay!r}")

    depth = process.max_delay + 1

    def init_fn(params: PyTree) -> ShiftedTraceState:
        buffers = init_ring(optax.tree.zeros_like(params), depth)
        return ShiftedTraceState(num_pushes=jnp.zeros((), jnp.int32), buffers=buffers)

    def accumulate(buffer: jax.Array, gradient: jax.Array | None) -> jax.Array | None:
        if gradient is None:
            return None
        momentum = jnp.asarray(decay, buffer.dtype)
        gain = 1 - momentum if dampening else jnp.ones_like(momentum)
        return momentum * buffer + gain * gradient.astype(buffer.dtype)

    def update_fn(
        updates: PyTree,
        state: ShiftedTraceState,
        params: PyTree | None = None,
        *,
        staleness: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, ShiftedTraceState]:
        del extra_args
        owner = f"shifted_trace(max_delay={depth - 1})"
        check_ring(state.buffers, depth, owner, params)
        _refuse_other_delay(delay, depth - 1, staleness)
        if staleness is None:
            staleness = jnp.minimum(depth - 1, state.num_pushes)
        like = with_value_dtypes(state.buffers, updates)
        own_buffer = read_slot(state.buffers, state.num_pushes - staleness, like)
        new = jax.tree.map(accumulate, own_buffer, updates, is_leaf=is_none)
        slot = state.num_pushes + 1
        # Read back what was written: otherwise XLA computes it a second time inside the parameter
        # update, from the old ring and after the write, and copies the whole ring to allow it.
        buffers, new_buffer = write_then_read(state.buffers, slot, new, slot)
        return new_buffer, ShiftedTraceState(slot, buffers)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _refuse_other_delay(delay: int | DelayProcess, own: int, staleness: jax.Array | None) -> None:
    """Refuses a random delay of nobody, or the delay of a `delayed` that is not its own."""
    around = MAX_DELAY_AROUND.get()
    if around is not None and around != own:
        raise ValueError(
            f"shifted momentum of max_delay={own} inside delayed of max_delay={around}: "
            "give both the same delay"
        )
    if staleness is None and around is not None:
        raise ValueError(
            "shifted momentum inside delayed needs staleness=, and a transform beside or around "
            "it takes no extra arguments, so that it cannot be handed down: move that one out of "
            "delayed"
        )
    if staleness is None and isinstance(delay, DelayProcess):
        raise ValueError(
            "shifted_trace with a delay process needs staleness=: "
            "wrap the optimizer in asgd_jax.delayed(optimizer, process)"
        )


def shifted_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float | jax.Array,
    delay: int | DelayProcess,
    *,
    dampening: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD with shifted momentum: $x_{t+1} = x_t - \eta\, v_{t+1}$, v from `shifted_trace`.

    The staleness of the gradients is not its business: wrap it in `delayed` with the same delay.

    Args:
      learning_rate: a float, scalar array or optax schedule.
      momentum: the momentum m in [0, 1).
      delay: int >= 0 or a `DelayProcess`, the one given to `delayed`.
      dampening: whether gradients are scaled by 1 - m (as the paper's eq. 11 does).

    Returns:
      A GradientTransformationExtraArgs.

    Raises:
      ValueError: for a bad delay or a momentum outside [0, 1).

    >>> from asgd_jax import delayed
    >>> tx = delayed(shifted_sgd(0.1, momentum=0.9, delay=4), delay=4)

    References:
      Giladi et al., "At Stability's Edge", ICLR 2020, eq. 11.
    """
    return optax.chain(
        shifted_trace(momentum, delay, dampening=dampening),
        optax.scale_by_learning_rate(learning_rate),
    )
