"""Staleness is one number, or one of every leaf; both are mapped over leaves."""

from collections.abc import Callable
from typing import Any

import jax
import optax

PyTree = Any


def map_staleness(function: Callable[..., Any], staleness: Any, *trees: PyTree) -> PyTree:
    """Returns `function(leaf, ..., s)` of every leaf of the trees, s everybody's or the leaf's own.

    >>> map_staleness(lambda g, s: g * s, {"a": 2, "b": 3}, {"a": 6, "b": 6})
    {'a': 12, 'b': 18}
    """
    if jax.tree_util.treedef_is_leaf(jax.tree.structure(staleness)):
        return jax.tree.map(lambda *leaves: function(*leaves, staleness), *trees)
    return map_unmasked(function, *trees, staleness)


def map_unmasked(function: Callable[..., Any], first: PyTree, *trees: PyTree) -> PyTree:
    """Returns `function` of every leaf that the first tree has; the others may have more.

    `optax.masked` and `optax.partition` mask gradients, parameters and states, but no extra
    arguments.

    >>> map_unmasked(lambda x, y: x + y, {"a": 1, "b": optax.MaskedNode()}, {"a": 2, "b": 3})
    {'a': 3, 'b': MaskedNode()}
    """
    return jax.tree.map(
        lambda leaf, *rest: leaf if is_masked(leaf) else function(leaf, *rest),
        first,
        *trees,
        is_leaf=is_masked,
    )


def is_masked(node: Any) -> bool:
    """Whether a node stands for what a mask has left out."""
    return isinstance(node, optax.MaskedNode)
