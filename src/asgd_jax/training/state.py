"""The state of a run: everything that a checkpoint must hold, and nothing else."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

PyTree = Any


class TrainState(NamedTuple):
    """What one update turns into the next.

    Attributes:
      step: int32 scalar, number of updates made.
      params: the server's live parameters, float32.
      batch_stats: running statistics of BatchNorm; an empty dict for models without.
      opt_state: state of the optimizer, the history of parameters included.
      key: random key of the run, raw uint32 data; updates fold the step in and never change it.
    """

    step: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: optax.OptState
    key: jax.Array


def init_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    seed: int,
    *,
    keep_stats: Callable[[PyTree], PyTree] = lambda stats: stats,
) -> TrainState:
    """Returns the state before the first update.

    Args:
      model: a Linen module called as `model.apply(variables, images, train=...)`.
      tx: the optimizer.
      image_shape: (height, width, channels).
      seed: of the parameters and of all that is random in the run.
      keep_stats: what is kept of the initial batch statistics, see `BatchStatsChains.init`.
    """
    return jax.jit(make_init(model, tx.init, image_shape, keep_stats))(jax.random.PRNGKey(seed))


def make_init(
    model: nn.Module,
    init_optimizer: Callable[[PyTree], optax.OptState],
    image_shape: tuple[int, ...],
    keep_stats: Callable[[PyTree], PyTree],
) -> Callable[[jax.Array], TrainState]:
    """Returns `init(key)`, the pure function that `init_state` runs; see there."""

    def init(key: jax.Array) -> TrainState:
        images = jnp.zeros((1, *image_shape), jnp.float32)
        variables = model.init(key, images, train=False)
        params = variables["params"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=keep_stats(variables.get("batch_stats", {})),
            opt_state=init_optimizer(params),
            key=key,
        )

    return init


def num_params(params: PyTree) -> int:
    """Returns the number of scalars in a pytree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
