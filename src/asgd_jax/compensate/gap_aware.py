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
    max_learning_rate: float | jax.Array,
    *,
    momentum: float = 0.0,
    dampening: bool = False,
    direction: optax.GradientTransformation | None = None,
    decay: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    r"""Divides a gradient by how far, in typical steps, its parameters have moved since.

    $$\frac{g}{1 + |x - y| / C}, \qquad
      C = \eta_{max} \left(\sqrt{\hat{E}[v^2]} + \epsilon\right)$$

    elementwise, with $\hat{E}$ a running mean with correction of its start and v the step of the
    optimizer behind it in units of the learning rate, of which this keeps a copy for itself: the
    momentum of the gradients, or of Adam its normalised direction. An L2 term, if the gradient has
    one, is divided alike. At a minimum the gap vanishes, and with it the effect: it changes no
    threshold.

    Args:
      max_learning_rate: eta_max > 0, the largest of the schedule; a traced one is not checked.
      momentum: in [0, 1), of v; that of the optimizer.
      dampening: whether its gradients are scaled by 1 - momentum.
      direction: what makes v of the gradients where that is no momentum; `optax.scale_by_adam()`
        before Adam, with whose momentum left out.
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
    if not isinstance(max_learning_rate, jax.core.Tracer) and not max_learning_rate > 0.0:
        raise ValueError(f"max_learning_rate must be a number > 0, got {max_learning_rate!r}")
    for name, value in (("momentum", momentum), ("decay", decay)):
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name} must be in [0, 1), got {value!r}")

    if direction is not None and momentum:
        raise ValueError(f"momentum={momentum} with a direction=: leave it out, v is the latter's")
    if direction is None:
        gain = 1.0 - momentum if dampening else 1.0
        trace = optax.trace(momentum) if momentum else optax.identity()
        direction = optax.chain(optax.scale(gain), trace) if momentum else trace
    of_gradients = optax.with_extra_args_support(direction)

    def init(params: Any) -> tuple[Any, GapAwareState]:
        # Without its names: a prediction looks for those of the optimizer itself.
        hidden = tuple(jax.tree.leaves(of_gradients.init(params)))
        zeros = optax.tree.zeros_like(params)
        return hidden, GapAwareState(jnp.zeros((), jnp.int32), zeros)

    def update(
        updates: Any,
        state: tuple[Any, GapAwareState],
        params: Any = None,
        *,
        stale_params: Any,
        **_: Any,
    ) -> tuple[Any, tuple[Any, GapAwareState]]:
        hidden, (number, mean) = state
        gap = gap_of(params, stale_params, "gap_aware")
        structure = jax.tree.structure(jax.eval_shape(of_gradients.init, params))
        steps, kept = of_gradients.update(updates, jax.tree.unflatten(structure, hidden), params)
        number = number + 1
        correction = 1.0 - decay ** number.astype(jnp.float32)
        mean = optax.tree.update_moment(steps, mean, decay, 2)

        def shrink(g: jax.Array, d: jax.Array, m: jax.Array) -> jax.Array:
            typical = max_learning_rate * (jnp.sqrt(m / correction) + eps)
            # Parameters that never moved have no typical step, and no gap.
            away = jnp.where(d == 0, 0.0, jnp.abs(d) / jnp.where(d == 0, 1.0, typical))
            return (g / (1.0 + away)).astype(g.dtype)

        made = jax.tree.map(shrink, updates, gap, mean)
        return made, (tuple(jax.tree.leaves(kept)), GapAwareState(number, mean))

    return optax.GradientTransformationExtraArgs(init, update)
