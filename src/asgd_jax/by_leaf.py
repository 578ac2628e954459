"""Staleness is one number, or one of every leaf; both are mapped over leaves."""

from collections.abc import Callable
from typing import Any

import jax

PyTree = Any


def map_staleness(function: Callable[..., Any], staleness: Any, *trees: PyTree) -> PyTree:
    """Returns `function(leaf, ..., s)` of every leaf of the trees, s everybody's or the leaf's own.

    >>> map_staleness(lambda g, s: g * s, {"a": 2, "b": 3}, {"a": 6, "b": 6})
    {'a': 12, 'b': 18}
    """
    structures: tuple[Any, Any] = jax.tree.structure(staleness), jax.tree.structure(trees[0])
    if structures[0] == structures[1]:
        return jax.tree.map(function, *trees, staleness)
    return jax.tree.map(lambda *leaves: function(*leaves, staleness), *trees)
