"""Many updates in one compiled loop with a donated state, as training makes them, ready to time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from asgd_jax import models
from asgd_jax.training.step import Batch, make_gradient
from asgd_jax.transforms import update_params
from asgd_jax.transforms.history import Ring
from benchmarks.harness import tree_bytes

NUM_BATCHES = 4


class Workload(NamedTuple):
    """A model with batches to train it on.

    Attributes:
      model: a Linen module.
      variables: its initial parameters and batch statistics.
      images: uint8, (NUM_BATCHES, batch, height, width, channels); random, as no time depends on
        what they show.
      labels: int32, (NUM_BATCHES, batch).
    """

    model: nn.Module
    variables: dict[str, Any]
    images: jax.Array
    labels: jax.Array


class Loop(NamedTuple):
    """A compiled loop and its state.

    Attributes:
      run: makes the next updates and returns their last parameters; the state moves on.
      parameter_bytes: of one parameter set.
      history_bytes: of all rings of past parameters, gradients or momenta.
      temp_bytes: temporary memory of the compiled loop.
    """

    run: Callable[[], Any]
    parameter_bytes: int
    history_bytes: int
    temp_bytes: int


def make_workload(
    name: str, batch_size: int, image_shape: tuple[int, ...] = (28, 28, 1), **options: Any
) -> Workload:
    """Returns `models.create(name, num_classes=10, **options)` with random images of this shape."""
    model = models.create(name, num_classes=10, **options)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (NUM_BATCHES, batch_size, *image_shape), np.uint8)
    labels = random.integers(0, 10, (NUM_BATCHES, batch_size), np.int32)
    variables = model.init(jax.random.key(0), jnp.zeros((1, *image_shape)), train=False)
    return Workload(model, variables, jnp.asarray(images), jnp.asarray(labels))


def ring_bytes(state: optax.OptState) -> int:
    """Returns the bytes of the rings in an optimizer state: slots, not counters or read copies."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Ring))
    return sum(tree_bytes(node) for node in nodes if isinstance(node, Ring))


def make_loop(workload: Workload, tx: optax.GradientTransformation, num_updates: int) -> Loop:
    """Compiles `num_updates` updates by `tx` as one loop; gradients are stale where `tx` delays.

    Args:
      workload: see `make_workload`.
      tx: any optax transformation; a plain one makes the loop that delays are compared with.
      num_updates: of one call.
    """
    gradient = make_gradient(workload.model, lambda key, x: x.astype(jnp.float32) / 255)
    params = workload.variables["params"]
    stats = workload.variables.get("batch_stats", {})
    key = jax.random.PRNGKey(0)

    def run_updates(carry: Any, images: jax.Array, labels: jax.Array) -> Any:
        def update(number: int, carry: Any) -> Any:
            del number  # the loop starts at 0 every time; the updates are counted on
            step, params, stats, opt_state = carry
            index = step % NUM_BATCHES
            batch = Batch(images[index][None], labels[index][None])
            params, opt_state, (stats, _, _) = update_params(
                tx, lambda where: gradient(where, stats, batch, key), params, opt_state
            )
            return step + 1, params, stats, opt_state

        return jax.lax.fori_loop(0, num_updates, update, carry)

    carry: Any = jax.jit(
        lambda params, stats: (jnp.zeros((), jnp.int32), params, stats, tx.init(params))
    )(params, stats)
    data = (workload.images, workload.labels)
    compiled = jax.jit(run_updates, donate_argnums=0).lower(carry, *data).compile()
    analysis = compiled.memory_analysis()

    def run() -> Any:
        nonlocal carry
        carry = compiled(carry, *data)
        return carry[1]

    return Loop(
        run=run,
        parameter_bytes=tree_bytes(params),
        history_bytes=ring_bytes(carry[3]),
        temp_bytes=0 if analysis is None else int(analysis.temp_size_in_bytes),
    )
