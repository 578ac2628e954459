"""Delayed gradients in Flax: a Linen `TrainState` and the stale copy of an NNX model.

Importing it needs Flax (`pip install flax`); nothing else of the core does.
"""

from collections.abc import Callable
from typing import Any, Self

import jax
import optax

try:
    from flax import nnx
    from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
    from flax.training import train_state
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("asgd_jax.flax needs Flax: pip install flax", name="flax") from error

from asgd_jax.transforms import DelayMetrics, has_history, metrics, stale_params

PyTree = Any


class DelayedTrainState(train_state.TrainState):
    """Flax's `TrainState`, which also says where to take the gradient.

    `apply_gradients(grads=...)` is Flax's own and works with `asgd_jax.delayed` as it is: it hands
    the live parameters to `update`. What a loop needs besides is below. A subclass adds fields
    (batch statistics, keys) as with Flax's.

    >>> import jax.numpy as jnp, optax, asgd_jax
    >>> state = DelayedTrainState.create(
    ...     apply_fn=lambda params, x: params["w"] * x,
    ...     params={"w": jnp.array(1.0)},
    ...     tx=asgd_jax.delayed(optax.sgd(0.5), delay=1),
    ... )
    >>> for _ in range(3):
    ...     loss, grads = state.value_and_grad(lambda p, x: state.apply_fn(p, x) ** 2 / 2, 1.0)
    ...     state = state.apply_gradients(grads=grads)
    >>> float(state.params["w"]), float(state.stale_params["w"])
    (-0.25, 0.0)
    """

    @classmethod
    def create(
        cls,
        *,
        apply_fn: Callable[..., Any],
        params: PyTree,
        tx: optax.GradientTransformation,
        **kwargs: Any,
    ) -> Self:
        """Returns the state before the first update, as Flax's `create`.

        Args:
          apply_fn: usually `model.apply`; kept for convenience.
          params: the live parameters, `variables["params"]`.
          tx: an optimizer with an `asgd_jax.delayed` in it, `delay=0` for none.
          **kwargs: fields of a subclass.

        Raises:
          ValueError: for an optimizer without `delayed`.
        """
        state: Self = super().create(apply_fn=apply_fn, params=params, tx=tx, **kwargs)
        if not has_history(state.opt_state):
            raise ValueError(
                f"{cls.__name__} needs an optimizer with a delay, and its state is a "
                f"{type(state.opt_state).__name__}: wrap it in asgd_jax.delayed(tx, delay), with "
                "delay=0 for none"
            )
        return state

    @property
    def stale_params(self) -> PyTree:
        """The parameters at which the next gradient is to be taken; see `asgd_jax.stale_params`.

        What Flax overwrites with its gradient (the scales of float8) has no history and is live.
        """
        if self.optimized is self.params:
            return stale_params(self.opt_state, self.params)
        return {**self.params, "params": stale_params(self.opt_state, self.optimized)}

    def value_and_grad(
        self, loss: Callable[..., Any], *args: Any, has_aux: bool = False, **kwargs: Any
    ) -> tuple[Any, PyTree]:
        """Returns loss and gradient at `stale_params`; see `asgd_jax.value_and_grad`."""
        function = jax.value_and_grad(loss, has_aux=has_aux)
        found: tuple[Any, PyTree] = function(self.stale_params, *args, **kwargs)
        return found

    def metrics(self) -> DelayMetrics:
        """Returns staleness, norm and gap of the next gradient; see `asgd_jax.metrics`."""
        return metrics(self.opt_state, self.optimized)

    @property
    def optimized(self) -> PyTree:
        """The part of `params` that the optimizer's state is of: all, but for float8."""
        if OVERWRITE_WITH_GRADIENT in self.params:
            return self.params["params"]
        return self.params


def stale_model(optimizer: nnx.Optimizer, model: nnx.Module) -> nnx.Module:
    """Returns the model as the worker sees it, to be given to `nnx.value_and_grad`.

    The parameters are stale and its own: the gradient is that at the stale parameters, and nothing
    writes into the live model's. All other variables are the live model's themselves, so that what
    the loss does to them (BatchNorm's averages, a dropout's counter) is kept.

    ```python
    loss, grads = nnx.value_and_grad(loss_fn)(stale_model(optimizer, model), batch)
    optimizer.update(model, grads)
    ```

    Args:
      optimizer: `nnx.Optimizer(model, asgd_jax.delayed(...), wrt=nnx.Param)`.
      model: the live model.

    Returns:
      A module of the model's class.

    Raises:
      ValueError: from `asgd_jax.stale_params`, for an optimizer without `delayed` or of another
        model.

    >>> import asgd_jax, jax.numpy as jnp
    >>> model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, asgd_jax.delayed(optax.sgd(0.1), 2), wrt=nnx.Param)
    >>> stale_model(optimizer, model)(jnp.ones((3, 1))).shape
    (3, 1)
    """
    graphdef, params, rest = nnx.split(model, optimizer.wrt, ...)
    # Unflattening makes variables of its own; those of `rest` are the model's, by reference.
    stale: nnx.Module = nnx.merge(graphdef, stale_params(optimizer.opt_state, params), rest)
    return stale
