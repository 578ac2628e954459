"""Updates that are made only now and then: after k gradients, or when all is finite."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from asgd_jax.transforms.history import PyTree, is_none


class Accumulation(NamedTuple):
    """Gradients of an update that is not due yet: how many (int32), and their sum over `every`."""

    num_accumulated: jax.Array
    mean_so_far: PyTree


def init_accumulation(params: PyTree, every: int) -> PyTree:
    """Returns an `Accumulation` of no gradients; an empty tuple when every gradient is due.

    >>> init_accumulation(jnp.ones(2), 1)
    ()
    """
    if every == 1:
        return ()
    return Accumulation(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params))


def accumulate(
    gradients: PyTree, accumulated: PyTree, every: int, skip_nonfinite: bool
) -> tuple[bool | jax.Array, PyTree, PyTree]:
    """Takes one more gradient in.

    Args:
      gradients: the new gradient.
      accumulated: as `init_accumulation` or the last call returned it.
      every: gradients of one update.
      skip_nonfinite: leave a gradient out that is not finite.

    Returns:
      Whether an update is due (True, or a bool scalar array), the gradient for it, and what is
      accumulated afterwards.

    >>> due, mean, kept = accumulate(jnp.array(4.0), init_accumulation(jnp.array(0.0), 2), 2, False)
    >>> bool(due), float(mean), int(kept.num_accumulated)
    (False, 2.0, 1)
    """
    if every == 1:
        return _all_finite(gradients) if skip_nonfinite else True, gradients, accumulated

    def add(gradient: Any, mean: Any) -> Any:
        if gradient is None or gradient.dtype == jax.dtypes.float0:  # a frozen or an integer leaf
            return gradient
        return mean + (gradient / every).astype(mean.dtype)

    so_far = accumulated.mean_so_far
    mean = jax.tree.map(add, gradients, so_far, is_leaf=is_none)
    fine = _all_finite(mean) if skip_nonfinite else True  # a sum can overflow too
    number = accumulated.num_accumulated + jnp.asarray(fine, jnp.int32)
    due = fine & (number == every)

    def keep(new: Any, old: Any) -> Any:
        if new is None or new.dtype == jax.dtypes.float0:
            return old
        # A gradient left out is not added, and zero times infinity is not zero.
        return jnp.where(due, 0, jnp.where(fine, new, old)).astype(old.dtype)

    kept = jax.tree.map(keep, mean, so_far, is_leaf=is_none)
    return due, mean, Accumulation(jnp.where(due, 0, number), kept)


def update_if(
    due: bool | jax.Array,
    update: Callable[[PyTree, optax.OptState], tuple[PyTree, optax.OptState]],
    gradients: PyTree,
    state: optax.OptState,
) -> tuple[PyTree, optax.OptState]:
    """Returns `update(gradients, state)` when due, else zero updates and the state as it is.

    >>> update_if(jnp.array(False), lambda g, s: (-g, s + 1), jnp.array(2.0), 5)
    (Array(0., dtype=float32), Array(5, dtype=int32, weak_type=True))
    """
    if due is True:
        return update(gradients, state)
    shapes, _ = jax.eval_shape(update, gradients, state)

    def skip(gradients: PyTree, state: optax.OptState) -> tuple[PyTree, optax.OptState]:
        # Of shapes, and not of their sizes: these carry shardings and mapped axes too.
        return jax.tree.map(jnp.zeros_like, shapes), state

    return jax.lax.cond(due, update, skip, gradients, state)


def _all_finite(tree: PyTree) -> bool | jax.Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all() if leaves else True
