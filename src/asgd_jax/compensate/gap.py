"""How far the parameters have gone since a gradient's own."""

import jax
import jax.numpy as jnp

from asgd_jax.by_leaf import PyTree


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
