"""DC-EMA: delay compensation with a running mean of squared gradients for the curvature."""

from typing import Any, NamedTuple

import jax
import optax

from asgd_jax.compensate.gap import check_correction, gap_of


class DcEmaState(NamedTuple):
    """State of `dc_ema`: the running mean of squared gradients, a pytree like the parameters."""

    square_mean: Any


def dc_ema(strength: float = 1.0, *, decay: float = 0.99) -> optax.GradientTransformationExtraArgs:
    r"""Corrects a gradient by a mean of squared gradients times the gap.

    $$v \leftarrow d\, v + (1 - d) g^2, \qquad g + \lambda v \odot (x - y)$$

    For a held v it is linear: as $\lambda v$ approaches the curvature, the threshold rises, and at
    $\lambda v = a$ no delay is left.

    Args:
      strength: lambda >= 0.
      decay: d in [0, 1).

    Raises:
      ValueError: for a negative strength or a decay outside [0, 1).

    >>> import jax.numpy as jnp
    >>> tx = dc_ema(decay=0.5)
    >>> x, y = jnp.array(3.0), jnp.array(1.0)
    >>> float(tx.update(jnp.array(2.0), tx.init(x), x, stale_params=y)[0])  # v = 2
    6.0

    References:
      Delay compensation as in Zheng et al., ICML 2017, the diagonal of the Fisher matrix as a
      running mean, as Adam keeps it.
    """
    check_correction(strength, decay)

    def update(
        updates: Any, state: DcEmaState, params: Any = None, *, stale_params: Any, **_: Any
    ) -> tuple[Any, DcEmaState]:
        gap = gap_of(params, stale_params, "dc_ema")
        mean = optax.tree.update_moment(updates, state.square_mean, decay, 2)
        made = jax.tree.map(lambda g, v, d: g + strength * v * d, updates, mean, gap)
        return made, DcEmaState(mean)

    return optax.GradientTransformationExtraArgs(
        lambda params: DcEmaState(optax.tree.zeros_like(params)), update
    )
