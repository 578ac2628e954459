"""`stale_params`: what a loop asks for before it takes a gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from asgd_jax.transforms.history import PyTree

DELAYED_STATE = "DelayedState"


def stale_params(state: optax.OptState, params: PyTree) -> PyTree:
    """Returns the parameters at which the next gradient is to be taken.

    Args:
      state: an optimizer state that holds one or more `DelayedState`s at any depth (inside
        `optax.chain`, `inject_hyperparams`, `masked`, `multi_transform`, ...). They are recognised
        by their class name, so a restored or rebuilt state works too.
      params: the live parameters, the tree that `init` was given.

    Returns:
      A pytree like `params` with the same dtypes. A leaf without a history (no delay, or masked
      out) is the live leaf itself, and so is every leaf while the staleness is 0.

    Raises:
      ValueError: when there is no `DelayedState` in `state`; when a leaf has a history and no place
        in `params`, or one of another shape; when two histories are of the same leaf.

    >>> from asgd_jax import delayed
    >>> stale_params(delayed(optax.sgd(0.1), delay=2).init(jnp.ones(2)), jnp.ones(2))
    Array([1., 1.], dtype=float32)
    """
    found = delayed_states(state)
    if not found:
        raise ValueError(
            f"no DelayedState in an optimizer state of type {type(state).__name__}: "
            "wrap the optimizer in asgd_jax.delayed(optimizer, delay), and restore a checkpoint "
            "into a template of its structure, tx.init(params)"
        )
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    live = dict(leaves)
    chosen: dict[Any, jax.Array] = {}
    for node in found:
        for path, leaf in jax.tree_util.tree_leaves_with_path(node.stale):
            _refuse_misplaced(path, leaf, live, chosen)
            chosen[path] = _choose(node.staleness, live[path], leaf)
    return jax.tree.unflatten(structure, [chosen.get(path, leaf) for path, leaf in leaves])


def _choose(staleness: jax.Array, live: Any, stale: jax.Array) -> jax.Array:
    """The live leaf where the staleness is 0; states of several runs may be stacked."""
    live = jnp.asarray(live)
    fresh = jnp.expand_dims(staleness == 0, range(jnp.ndim(staleness), live.ndim))
    return jnp.where(fresh, live, stale if stale.dtype == live.dtype else stale.astype(live.dtype))


def has_history(state: optax.OptState) -> bool:
    """Whether an optimizer state holds that of `delayed`, so that gradients are to be stale.

    >>> has_history(optax.sgd(0.1).init(jnp.ones(2)))
    False
    """
    return bool(delayed_states(state))


def delayed_states(state: optax.OptState) -> list[Any]:
    """Returns every state of `delayed` in an optimizer state, at whatever depth.

    >>> delayed_states(optax.sgd(0.1).init(jnp.ones(2)))
    []
    """
    nodes = jax.tree.leaves(state, is_leaf=_is_delayed_state)
    return [node for node in nodes if _is_delayed_state(node)]


def _refuse_misplaced(path: Any, leaf: Any, live: dict[Any, Any], chosen: dict[Any, Any]) -> None:
    name = jax.tree_util.keystr(path) or "the parameter"
    if path not in live:
        there = ", ".join(jax.tree_util.keystr(place) or "a single array" for place in live)
        raise ValueError(
            f"{name} has a history and no place in params, which hold {there[:200]}: pass "
            "the tree that the optimizer was initialised with (params and not {'params': params}; "
            "of Flax NNX, nnx.as_pure of the state and of nnx.state(model, wrt))"
        )
    if path in chosen:
        raise ValueError(
            f"{name} has two histories in this optimizer state: call stale_params with one "
            "optimizer's state and its own params at a time"
        )
    if jnp.shape(leaf) != jnp.shape(live[path]):
        raise ValueError(
            f"{name} has shape {jnp.shape(live[path])} in params and {jnp.shape(leaf)} in its "
            "history: pass the tree that the optimizer was initialised with"
        )


def _is_delayed_state(node: Any) -> bool:
    return type(node).__name__ == DELAYED_STATE
