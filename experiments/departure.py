"""Does delayed descent leave a minimum? One compiled run for all learning rates; bisection."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from asgd_jax.curvature import LossFn
from asgd_jax.transforms import delayed, shifted_sgd, stale_params

_E_FOLDS = 12  # of growth just above the threshold, which the step budget leaves room for
_RETURNED = math.exp(-4.0)  # of the starting distance: a run that comes so near has stayed
_MOST_DOUBLINGS = 20


def make_optimizer(
    learning_rate: jax.Array, *, delay: int, momentum: float, kind: str, dampening: bool
) -> optax.GradientTransformationExtraArgs:
    """Returns delayed SGD with the momentum that `stability.max_learning_rate` calls so."""
    if momentum == 0.0:
        server = optax.sgd(learning_rate)
    elif kind == "shifted":
        server = shifted_sgd(learning_rate, momentum, delay, dampening=dampening)
    elif dampening:
        average = optax.ema(momentum, debias=False)
        server = optax.chain(average, optax.scale_by_learning_rate(learning_rate))
    else:
        server = optax.sgd(learning_rate, momentum=momentum)
    return delayed(server, delay)


def make_run(
    loss_fn: LossFn,
    make_optimizer: Callable[[jax.Array], optax.GradientTransformation],
    e_fold: int,
    perturbation: float,
    growth_limit: float,
) -> Callable[..., jax.Array]:
    """Returns the function that runs one learning rate; it compiles once for all of them.

    Args:
      loss_fn: `loss_fn(params, batch)`, the mean loss of a batch.
      make_optimizer: of the learning rate, a traced scalar; `delayed` is its outermost transform.
      e_fold: steps; the run ends after twelve times as many.
      perturbation: of the start, relative to the norm of the minimum's parameters (if not 0).
      growth_limit: how many times the distance may grow.

    Returns:
      `leaves(learning_rate, params, loss, direction, stacked)`, a boolean scalar: the minimum's
      params and loss, its sharpest direction, and the batches on a leading axis.
    """

    @jax.jit
    def leaves(
        learning_rate: jax.Array, minimum: Any, loss: jax.Array, direction: Any, stacked: Any
    ) -> jax.Array:
        tx = make_optimizer(learning_rate)
        num_batches = jax.tree.leaves(stacked)[0].shape[0]
        norm = optax.tree.norm(minimum)
        radius = perturbation * jnp.where(norm > 0, norm, 1.0)
        most_loss = jnp.maximum(10.0 * loss, loss + 0.1)

        def step(_: int, carry: Any) -> Any:
            params, state, farthest, highest = carry
            batch = jax.tree.map(lambda leaf: leaf[state.num_updates % num_batches], stacked)
            height, gradient = jax.value_and_grad(loss_fn)(stale_params(state, params), batch)
            updates, state = tx.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            away = optax.tree.vdot(optax.tree.sub(params, minimum), direction)
            # jnp.maximum keeps a NaN.
            return params, state, jnp.maximum(farthest, abs(away)), jnp.maximum(highest, height)

        def near(farthest: jax.Array, highest: jax.Array) -> jax.Array:
            return (farthest <= growth_limit * radius) & (highest <= most_loss)

        def undecided(carry: Any) -> jax.Array:
            _, _, farthest, highest, e_folds = carry
            return near(farthest, highest) & (farthest > _RETURNED * radius) & (e_folds < _E_FOLDS)

        def advance(carry: Any) -> Any:
            # The peak over an e-fold: a single distance swings through zero.
            start = *carry[:2], jnp.zeros_like(radius), jnp.zeros_like(radius)
            return *jax.lax.fori_loop(0, e_fold, step, start), carry[4] + 1

        params = optax.tree.add_scale(minimum, radius, direction)
        first = params, tx.init(params), radius, jnp.zeros_like(radius), 0
        _, _, farthest, highest, _ = jax.lax.while_loop(undecided, advance, first)
        return ~near(farthest, highest)

    return leaves


def bisect(
    leaves: Callable[[float], bool], guess: float, resolution: float
) -> tuple[float, float, int]:
    """Finds where `leaves` turns true, geometrically.

    Args:
      leaves: of a learning rate.
      guess: where to start, > 0: halved until it stays, or doubled until it leaves.
      resolution: stop when upper <= lower (1 + resolution).

    Returns:
      (lower, upper, number of calls): `leaves(lower)` is false and `leaves(upper)` true.

    Raises:
      ValueError: when the two cannot be found within a factor of a million of the guess.

    >>> lower, upper, _ = bisect(lambda learning_rate: learning_rate > 0.3, 1.0, 0.01)
    >>> lower <= 0.3 < upper <= 1.01 * lower
    True
    """
    first = leaves(guess)
    factor, calls = 0.5 if first else 2.0, 1
    here = guess
    while leaves(here * factor) == first:
        here, calls = here * factor, calls + 1
        if calls > _MOST_DOUBLINGS:
            raise ValueError(
                f"every learning rate from {guess:.3g} to {here:.3g} "
                f"{'leaves' if first else 'stays'}: "
                "is this a minimum, and are perturbation and growth_limit right?"
            )
    lower, upper = sorted((here, here * factor))
    calls += 1
    while upper > lower * (1.0 + resolution):
        middle, calls = math.sqrt(lower * upper), calls + 1
        if leaves(middle):
            upper = middle
        else:
            lower = middle
    return lower, upper, calls
