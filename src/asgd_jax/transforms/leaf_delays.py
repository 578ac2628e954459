"""A delay for every leaf of the parameters: a pytree of them, a prefix of one, or a rule."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from asgd_jax.delays.processes import DelayProcess, as_integer
from asgd_jax.transforms.history import PyTree

KeyPath = tuple[Any, ...]
LeafDelays = Mapping[str, Any] | list[Any] | tuple[Any, ...] | Callable[[KeyPath], int]


def is_leafwise(delay: Any) -> bool:
    """Returns whether this gives leaves delays of their own, and is not one delay for all.

    >>> is_leafwise({"w": 1, "b": 0}), is_leafwise(lambda path: 1), is_leafwise(3)
    (True, True, False)
    """
    if isinstance(delay, DelayProcess):
        return False
    if callable(delay):
        return True
    leaves = jax.tree.leaves(delay)
    return bool(leaves) and leaves[0] is not delay


def delays_of_leaves(delay: LeafDelays, params: PyTree) -> PyTree:
    """Returns a tree like the parameters, of ints >= 0.

    Args:
      delay: a pytree of ints like `params`, or a prefix of one, whose ints stand for all leaves
        below; or a function from a leaf's path (as in `jax.tree_util.tree_map_with_path`) to int.
      params: the parameters.

    Raises:
      ValueError: naming the path of the leaf, and the value.

    >>> delays_of_leaves({"a": 2, "b": 0}, {"a": [0.0, 0.0], "b": 0.0})
    {'a': [2, 2], 'b': 0}
    """
    if callable(delay):
        found = jax.tree_util.tree_map_with_path(lambda path, _: delay(path), params)
    else:
        try:
            found = jax.tree.broadcast(delay, params)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                "delay must be an int, a DelayProcess, a pytree of ints like the parameters, a "
                f"prefix of one, or a function of a leaf's path: {reason}"
            ) from error

    return check_integers(found)


def check_integers(delays: PyTree, owner: str = "delay") -> PyTree:
    """Returns the tree with ints >= 0 for leaves; `owner` is what messages call it.

    Raises:
      ValueError: naming the path of the first that is none, and its value.
    """

    def check(path: KeyPath, value: Any) -> int:
        value = value.item() if isinstance(value, np.generic) else value
        return as_integer(value, f"{owner}{jax.tree_util.keystr(path)}")

    return jax.tree_util.tree_map_with_path(check, delays)


def only_delayed(params: PyTree, delays: PyTree) -> PyTree:
    """Returns the parameters, `optax.MaskedNode` in the place of leaves that have no delay.

    >>> only_delayed({"a": 1.0, "b": 2.0}, {"a": 3, "b": 0})
    {'a': 1.0, 'b': MaskedNode()}
    """
    return jax.tree.map(lambda leaf, delay: leaf if delay else optax.MaskedNode(), params, delays)


def longest(delays: PyTree) -> int:
    """Returns the largest delay, 0 of no leaves."""
    return max(jax.tree.leaves(delays), default=0)


def staleness_of_leaves(delays: PyTree, staleness: jax.Array) -> PyTree:
    """Returns each leaf's staleness, int32 scalars, where that of the oldest is `staleness`."""
    return jax.tree.map(lambda delay: jnp.minimum(staleness, delay), delays)
