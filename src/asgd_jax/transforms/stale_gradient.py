"""What a loop asks at every update: loss and gradient at the stale parameters, and how stale."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from asgd_jax.transforms.history import PyTree
from asgd_jax.transforms.stale import delayed_states, stale_params


def value_and_grad(
    loss: Callable[..., Any],
    state: optax.OptState,
    params: PyTree,
    *args: Any,
    has_aux: bool = False,
    **kwargs: Any,
) -> tuple[Any, PyTree]:
    r"""Returns the loss and its gradient at the parameters that the next update is to use.

    $$\bigl(f(x_{t - s_t}), \; \nabla f(x_{t - s_t})\bigr)$$

    It is `jax.value_and_grad(loss, has_aux=has_aux)(stale_params(state, params), *args, **kwargs)`.
    The gradient goes into `tx.update(grads, state, params)` with the *live* parameters. The value
    is that of the stale ones, too: it lags behind the loss that an evaluation would give.

    Args:
      loss: `loss(params, *args, **kwargs)`, a float scalar; (scalar, anything) with `has_aux`.
      state: of an optimizer that holds a `delayed`, at any depth.
      params: the live parameters, the tree that `tx.init` was given.
      *args: the loss' further arguments, usually a batch.
      has_aux: whether the loss returns a pair whose second member is handed through.
      **kwargs: the loss' keyword arguments.

    Returns:
      (value, gradients), or ((value, aux), gradients) with `has_aux`; gradients like `params`.

    Raises:
      ValueError: from `stale_params`, for a state without `delayed` or of other parameters.
      TypeError: from `jax.value_and_grad`, for a loss that is no float scalar.

    >>> from asgd_jax import delayed
    >>> tx = delayed(optax.sgd(0.5), delay=1)
    >>> params = jnp.array(1.0)
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...     value, grads = value_and_grad(lambda x, a: a * x**2 / 2, state, params, 1.0)
    ...     updates, state = tx.update(grads, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> float(value), float(grads), float(params)
    (0.125, 0.5, -0.25)
    """
    function = jax.value_and_grad(loss, has_aux=has_aux)
    found: tuple[Any, PyTree] = function(stale_params(state, params), *args, **kwargs)
    return found


class DelayMetrics(NamedTuple):
    """How stale the next gradient is.

    Attributes:
      staleness: int32 scalar, in updates; where leaves have delays of their own, the oldest leaf's.
      parameter_norm: |x_t|, a float scalar.
      gap: |x_t - x_stale|, Euclidean, over all parameters.
      relative_gap: gap / parameter_norm; 0 where the gap is.
    """

    staleness: jax.Array
    parameter_norm: jax.Array
    gap: jax.Array
    relative_gap: jax.Array


def metrics(state: optax.OptState, params: PyTree) -> DelayMetrics:
    r"""Returns the staleness of the next gradient and how far its parameters are from the live.

    $$s_t, \quad \|x_t\|, \quad \|x_t - x_{t - s_t}\|, \quad \|x_t - x_{t - s_t}\| / \|x_t\|$$

    Pure, to be logged from inside a jitted step or between steps. It reads all parameters twice,
    so every hundredth step is often enough. Runs that are stacked take `jax.vmap(metrics)`.

    Args:
      state: of an optimizer that holds a `delayed`, at any depth.
      params: the live parameters, the tree that `tx.init` was given.

    Raises:
      ValueError: from `stale_params`, for a state without `delayed` or of other parameters.

    >>> from asgd_jax import delayed
    >>> tx = delayed(optax.sgd(1.0), delay=2)
    >>> state = tx.init(jnp.array([3.0, 4.0]))
    >>> _, state = tx.update(jnp.array([3.0, 4.0]), state, jnp.array([3.0, 4.0]))
    >>> [float(value) for value in metrics(state, jnp.array([0.0, 8.0]))]
    [1.0, 8.0, 5.0, 0.625]
    """
    stale = stale_params(state, params)
    ages = [node.staleness for node in delayed_states(state)]
    staleness = ages[0]
    for age in ages[1:]:
        staleness = jnp.maximum(staleness, age)
    return DelayMetrics(staleness, *distance_to_stale(params, stale))


def distance_to_stale(params: PyTree, stale: PyTree) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""Returns $\|x\|$, $\|x - y\|$ and the latter over the former, Euclidean norms.

    Sums have float32 at least, whatever the parameters'. Leaves that are no arrays (the activations
    of an Equinox model) are left out.

    >>> [float(value) for value in distance_to_stale(jnp.array([3.0, 4.0]), jnp.array([3.0, 3.0]))]
    [5.0, 1.0, 0.20000000298023224]
    """
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(stale), strict=True)
    wide = [(_widen(live), _widen(old)) for live, old in pairs if hasattr(live, "dtype")]
    norm = optax.tree.norm([live for live, _ in wide])
    distance = optax.tree.norm([live - old for live, old in wide])
    return norm, distance, jnp.where(distance == 0, jnp.zeros_like(distance), distance / norm)


def _widen(leaf: Any) -> jax.Array:
    leaf = jnp.asarray(leaf)
    wide = jnp.issubdtype(leaf.dtype, jnp.inexact) and leaf.dtype.itemsize >= 4
    return leaf if wide else leaf.astype(jnp.float32)
