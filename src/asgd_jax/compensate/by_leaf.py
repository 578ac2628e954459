"""Staleness is one number, or one of every leaf; both are mapped over the gradient's leaves."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def map_staleness(function: Callable[..., Any], gradients: PyTree, staleness: Any) -> PyTree:
    """Returns `function(g, s)` of every leaf, s its staleness as float32.

    >>> float(map_staleness(lambda g, s: g / s, {"a": 6.0, "b": 6.0}, {"a": 2, "b": 3})["b"])
    2.0
    """
    if _is_by_leaf(staleness, gradients):
        return jax.tree.map(
            lambda g, s: function(g, jnp.asarray(s, jnp.float32)), gradients, staleness
        )
    age = jnp.asarray(staleness, jnp.float32)
    return jax.tree.map(lambda g: function(g, age), gradients)


def _is_by_leaf(staleness: Any, gradients: PyTree) -> bool:
    structures: tuple[Any, Any] = jax.tree.structure(staleness), jax.tree.structure(gradients)
    return bool(structures[0] == structures[1])


def gap_of(params: PyTree | None, stale: PyTree, owner: str) -> PyTree:
    """Returns x - y.

    Raises:
      ValueError: without live parameters.
    """
    if params is None:
        raise ValueError(
            f"{owner} needs params, got None: call update(grads, state, params) of the delayed "
            "around it"
        )
    return jax.tree.map(jnp.subtract, params, stale)
