"""`delay_gradients`: a queue of gradients; delay without a change to the training loop."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from asgd_jax.delays.processes import DelayProcess, as_process
from asgd_jax.transforms.history import (
    PyTree,
    Ring,
    check_ring,
    init_ring,
    write_then_read,
)


class DelayGradientsState(NamedTuple):
    """State of `delay_gradients`: gradients seen, ring of `max_delay + 1` gradients, random key."""

    num_gradients: jax.Array
    gradients: Ring
    key: jax.Array


def delay_gradients(
    delay: int | DelayProcess, *, seed: int | jax.Array = 0
) -> optax.GradientTransformation:
    r"""Hands on the gradient that came in `delay` updates ago, and zero until there is one.

    $$u_t = g_{t - \tau_t} \;\text{ if } t \ge \tau_t, \text{ else } 0$$

    Chained before an optimizer, it delays the same recursion as `delayed` does, seen from the
    worker: with $y$ the parameters of this loop and $x$ those of `delayed`, $y_{t + \tau} = x_t$,
    batch for batch, for a constant delay and an `inner` that leaves the parameters alone while the
    gradients are zero and does not count updates (SGD and momentum; Adam's bias correction and
    schedules do count, and see the tau empty updates). With a random delay a gradient may be used
    several times, or never.

    Prefer it where the loop cannot be changed; prefer `delayed` otherwise: there every gradient is
    used at once, and staleness-aware transforms see the staleness.

    Args:
      delay: int >= 0, or a `DelayProcess`.
      seed: seed of the delay process.

    Returns:
      A GradientTransformation with a `DelayGradientsState`. Gradients are stored with the dtypes
      of the parameters and handed on with their own; a None (a frozen leaf) stays None.

    Raises:
      ValueError: for a delay that is neither an integer >= 0 nor a DelayProcess; from `update`, for
        gradients of other leaves than the parameters, or a state of another delay.

    >>> tx = delay_gradients(2)
    >>> state = tx.init(jnp.array(0.0))
    >>> for step in range(4):
    ...     update, state = tx.update(jnp.array(step + 1.0), state)
    ...     print(update)
    0.0
    0.0
    1.0
    2.0

    References:
      Giladi et al., "At Stability's Edge", ICLR 2020, eq. 5.
    """
    process = as_process(delay)

    depth = process.max_delay + 1

    def init_fn(params: PyTree) -> DelayGradientsState:
        return DelayGradientsState(
            num_gradients=jnp.zeros((), jnp.int32),
            gradients=init_ring(optax.tree.zeros_like(params), depth),
            key=jax.random.PRNGKey(seed),
        )

    def update_fn(
        updates: PyTree, state: DelayGradientsState, params: PyTree | None = None
    ) -> tuple[PyTree, DelayGradientsState]:
        owner = f"delay_gradients(max_delay={depth - 1})"
        check_ring(state.gradients, depth, owner, params)
        step = state.num_gradients
        staleness = jnp.clip(process.sample(state.key, step).astype(jnp.int32), 0, depth - 1)
        # The new gradient is stored first, which costs one slot more than a queue and saves a copy
        # of all slots: it does not depend on the gradient that it replaces.
        gradients, old = write_then_read(state.gradients, step, updates, step - staleness)
        return old, DelayGradientsState(step + 1, gradients, state.key)

    return optax.GradientTransformation(init_fn, update_fn)
