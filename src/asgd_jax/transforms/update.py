"""One update as everybody makes it, and the optimizer that the theory speaks of."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from asgd_jax.delays.processes import DelayProcess
from asgd_jax.transforms.delayed import delayed
from asgd_jax.transforms.history import PyTree
from asgd_jax.transforms.momentum import shifted_trace
from asgd_jax.transforms.stale import has_history, stale_params


def update_params(
    tx: optax.GradientTransformation,
    gradient: Callable[[PyTree], tuple[PyTree, Any]],
    params: PyTree,
    state: optax.OptState,
    *,
    live: PyTree | None = None,
    **extra_args: Any,
) -> tuple[PyTree, optax.OptState, Any]:
    r"""Makes one update: gradient at the stale parameters, optimizer, new parameters.

    $$x_{t+1} = x_t + \mathrm{tx}(\nabla f(x_{t - s_t}))$$

    Args:
      tx: any optax optimizer; without a `delayed` in it gradients are taken at the live parameters.
      gradient: from parameters to (gradients, anything else).
      params: the live parameters.
      state: of `tx`.
      live: what the gradient is taken at without delay, where that is not `params` itself (the fast
        parameters of `optax.lookahead`).
      **extra_args: for `tx.update`.

    Returns:
      The new parameters, the new state, and what else `gradient` returned.

    >>> tx, params = delayed(optax.sgd(0.5), 1), jax.numpy.array(1.0)
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...     params, state, _ = update_params(tx, lambda x: (x, None), params, state)
    >>> float(params)
    -0.25
    """
    where = params if live is None else live
    if has_history(state):
        where = stale_params(state, where)
    gradients, rest = gradient(where)
    update = optax.with_extra_args_support(tx).update
    updates, state = update(gradients, state, params, **extra_args)
    return optax.apply_updates(params, updates), state, rest


def momentum_of(
    momentum: float | jax.Array,
    delay: int | DelayProcess,
    *,
    kind: str = "heavy_ball",
    dampening: bool = False,
) -> optax.GradientTransformation:
    r"""The momentum that `asgd_jax.stability` calls so, without a learning rate.

    heavy_ball: $v \leftarrow m v + (1 - d) g$; nesterov: $m v + (1 - d) g$ with that new v;
    shifted: `shifted_trace`. d is m when `dampening`, else 0.

    Args:
      momentum: m in [0, 1); a float 0 stands for no momentum of any kind.
      delay: the one given to `delayed`.
      kind: heavy_ball, nesterov or shifted.
      dampening: whether gradients are scaled by 1 - m.

    Raises:
      ValueError: for another kind.
    """
    if kind not in ("heavy_ball", "nesterov", "shifted"):
        raise ValueError(f"kind must be heavy_ball, nesterov or shifted, got {kind!r}")
    if isinstance(momentum, (int, float)) and momentum == 0:
        return optax.identity()
    if kind == "shifted":
        return shifted_trace(momentum, delay, dampening=dampening)
    if kind == "heavy_ball" and dampening:
        return optax.ema(momentum, debias=False)
    trace = optax.trace(momentum, nesterov=kind == "nesterov")
    return optax.chain(trace, optax.scale(1 - momentum)) if dampening else trace


def delayed_sgd(
    learning_rate: optax.ScalarOrSchedule,
    delay: int | DelayProcess,
    *,
    momentum: float | jax.Array = 0.0,
    kind: str = "heavy_ball",
    dampening: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Delayed SGD with the arguments of `stability.max_learning_rate`, whose threshold it has.

    >>> tx = delayed_sgd(0.1, 4, momentum=0.9, kind="shifted")
    """
    direction = momentum_of(momentum, delay, kind=kind, dampening=dampening)
    return delayed(optax.chain(direction, optax.scale_by_learning_rate(learning_rate)), delay)
