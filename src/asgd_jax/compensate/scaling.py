"""Gradients scaled by their staleness."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from asgd_jax.by_leaf import map_staleness


def staleness_scaling() -> optax.GradientTransformationExtraArgs:
    r"""Divides a gradient by its staleness: $g / \max(1, s)$.

    Under a constant delay it is the learning rate over tau, and wins nothing over that rule.

    >>> tx = staleness_scaling()
    >>> tx.update(jnp.array(6.0), tx.init(None), staleness=3)[0]
    Array(2., dtype=float32)

    References:
      Zhang, Gupta, Lian, Liu, "Staleness-aware Async-SGD for Distributed Deep Learning", IJCAI
      2016.
    """
    return _scaled(lambda s: 1.0 / jnp.maximum(s, 1.0))


def delay_adaptive(num_workers: int) -> optax.GradientTransformationExtraArgs:
    r"""Shrinks gradients that are older than there are workers: $g\, n / \max(n, s)$.

    Args:
      num_workers: n >= 1.

    Raises:
      ValueError: for fewer.

    >>> tx = delay_adaptive(2)
    >>> [float(tx.update(jnp.array(6.0), tx.init(None), staleness=s)[0]) for s in (1, 2, 6)]
    [6.0, 6.0, 2.0]

    References:
      Mishchenko, Bach, Even, Woodworth, "Asynchronous SGD Beats Minibatch SGD Under Arbitrary
      Delays", NeurIPS 2022.
    """
    if not (isinstance(num_workers, int) and num_workers >= 1):
        raise ValueError(f"num_workers must be an integer >= 1, got {num_workers!r}")
    return _scaled(lambda s: num_workers / jnp.maximum(s, float(num_workers)))


def power_scaling(exponent: float = 0.5) -> optax.GradientTransformationExtraArgs:
    r"""Shrinks a gradient by a power of its staleness: $g\, (1 + s)^{-\alpha}$.

    Args:
      exponent: alpha >= 0.

    Raises:
      ValueError: for a negative one.

    >>> tx = power_scaling()
    >>> tx.update(jnp.array(6.0), tx.init(None), staleness=3)[0]
    Array(3., dtype=float32)

    References:
      Xie, Koyejo, Gupta, "Asynchronous Federated Optimization" (FedAsync), 2019.
    """
    if not exponent >= 0.0:
        raise ValueError(f"exponent must be a number >= 0, got {exponent!r}")
    return _scaled(lambda s: (1.0 + s) ** -exponent)


def _scaled(factor: Callable[[jax.Array], jax.Array]) -> optax.GradientTransformationExtraArgs:
    def update(
        updates: Any, state: optax.EmptyState, params: Any = None, *, staleness: Any, **_: Any
    ) -> tuple[Any, optax.EmptyState]:
        del params

        def scale(g: jax.Array, s: Any) -> jax.Array:
            return g * factor(jnp.asarray(s, jnp.float32)).astype(g.dtype)

        return map_staleness(scale, staleness, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
