"""Gap-Aware: gradients shrunk where parameters have moved far, in units of their usual steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from asgd_jax.compensate.gap import gap_of


class GapAwareState(NamedTuple):
    """State of `gap_aware`.

    Attributes:
      num_gradients: int32 scalar.
      square_mean: running mean of the squared updates, in units of the learning rate.
    """

    num_gradients: jax.Array
    square_mean: Any


def gap_aware(
    max_learning_rate: float,
    *,
    momentum: float = 0.0,
    decay: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    r"""Divides a gradient by how far, in typical steps, its parameters have moved since.

    $$\frac{g}{1 + |x - y| / C}, \qquad
      C = \eta_{max} \left(\sqrt{\hat{E}[v^2]} + \epsilon\right)$$

    elementwise, with $\hat{E}$ a running mean with correction of its start and v the momentum of
    the gradients, which this keeps for itself. An L2 term, if the gradient has one, is divided
    alike. At a minimum the gap vanishes, and with it the effect: it changes no threshold.

    Args:
      max_learning_rate: eta_max > 0, the largest of the schedule.
      momentum: in [0, 1), of v; that of the optimizer.
      decay, eps: of the running mean.

    Raises:
      ValueError: naming the number that is out of range.

    >>> tx = gap_aware(0.5, eps=0.0)
    >>> x, y = jnp.array(3.0), jnp.array(2.0)
    >>> made, _ = tx.update(jnp.array(2.0), tx.init(x), x, stale_params=y)  # C = 1
    >>> round(float(made), 5)
    1.0

    References:
      Barkai, Hakimi, Schuster, "Gap Aware Mitigation of Gradient Staleness", ICLR 2020; as in
      Eliad et al. (FTPipe), USENIX ATC 2021.
    """
    if not max_learning_rate > 0.0:
        raise ValueError(f"max_learning_rate must be a number > 0, got {max_learning_rate!r}")
    for name, value in (("momentum", momentum), ("decay", decay)):
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name} must be in [0, 1), got {value!r}")

    def init(params: Any) -> tuple[Any, GapAwareState]:
        zeros = optax.tree.zeros_like(params)
        velocity = optax.tree.zeros_like(params) if momentum else ()
        return velocity, GapAwareState(jnp.zeros((), jnp.int32), zeros)

    def update(
        updates: Any,
        state: tuple[Any, GapAwareState],
        params: Any = None,
        *,
        stale_params: Any,
        **_: Any,
    ) -> tuple[Any, tuple[Any, GapAwareState]]:
        velocity, (number, mean) = state
        gap = gap_of(params, stale_params, "gap_aware")
        if momentum:
            velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, updates)
        number = number + 1
        correction = 1.0 - decay ** number.astype(jnp.float32)
        mean = optax.tree.update_moment(velocity if momentum else updates, mean, decay, 2)

        def shrink(g: jax.Array, d: jax.Array, m: jax.Array) -> jax.Array:
            typical = max_learning_rate * (jnp.sqrt(m / correction) + eps)
            # Parameters that never moved have no typical step, and no gap.
            steps = jnp.where(d == 0, 0.0, jnp.abs(d) / jnp.where(d == 0, 1.0, typical))
            return (g / (1.0 + steps)).astype(g.dtype)

        return jax.tree.map(shrink, updates, gap, mean), (velocity, GapAwareState(number, mean))

    return optax.GradientTransformationExtraArgs(init, update)
