"""How far the parameters have gone since a gradient's own, and what corrects for it."""

import jax.numpy as jnp

from asgd_jax.by_leaf import PyTree, map_unmasked


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
    return map_unmasked(jnp.subtract, params, stale)


def check_correction(strength: float, decay: float) -> None:
    """Checks lambda and the d of a running mean, as `dc_asgd` and `dc_ema` take them.

    Raises:
      ValueError: for a negative strength or a decay outside [0, 1).

    >>> check_correction(0.04, 0.95)
    """
    if not strength >= 0.0:
        raise ValueError(f"strength (lambda) must be a number >= 0, got {strength!r}")
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay must be in [0, 1), got {decay!r}")
