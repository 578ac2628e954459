"""DC-ASGD: a first-order correction of a gradient for the way that parameters have gone since."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from asgd_jax.compensate.gap import check_correction, gap_of


class DcAsgdState(NamedTuple):
    """State of `dc_asgd`: the mean of squared gradients; () where lambda is constant."""

    mean_square: Any


def dc_asgd(
    strength: float = 0.04, *, adaptive: bool = False, decay: float = 0.95, eps: float = 1e-7
) -> optax.GradientTransformationExtraArgs:
    r"""Delay compensation by the squared gradient in the place of the Hessian.

    $$g + \lambda\, g \odot g \odot (x - y)$$

    constant, or adaptive with $\lambda_0 / \sqrt{MS + \epsilon}$ and
    $MS \leftarrow d\, MS + (1 - d) g^2$. At a minimum it is of second order: no threshold changes.

    Args:
      strength: lambda >= 0; MXNet's default.
      adaptive: whether it is divided by the root mean square.
      decay, eps: d and epsilon of the adaptive kind.

    Raises:
      ValueError: for a negative strength or a decay outside [0, 1).

    >>> tx = dc_asgd(0.5)
    >>> x, y = jnp.array(3.0), jnp.array(1.0)
    >>> float(tx.update(jnp.array(2.0), tx.init(x), x, stale_params=y)[0])
    6.0

    References:
      Zheng et al., "Asynchronous Stochastic Gradient Descent with Delay Compensation", ICML 2017.
    """
    check_correction(strength, decay)

    def init(params: Any) -> DcAsgdState:
        return DcAsgdState(optax.tree.zeros_like(params) if adaptive else ())

    def update(
        updates: Any, state: DcAsgdState, params: Any = None, *, stale_params: Any, **_: Any
    ) -> tuple[Any, DcAsgdState]:
        gap = gap_of(params, stale_params, "dc_asgd")
        if not adaptive:
            made = jax.tree.map(lambda g, d: g + strength * g * g * d, updates, gap)
            return made, state
        mean = optax.tree.update_moment(updates, state.mean_square, decay, 2)
        made = jax.tree.map(
            lambda g, d, ms: g + strength / jnp.sqrt(ms + eps) * g * g * d, updates, gap, mean
        )
        return made, DcAsgdState(mean)

    return optax.GradientTransformationExtraArgs(init, update)
