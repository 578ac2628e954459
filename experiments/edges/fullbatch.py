"""Does delayed descent without batch noise leave a minimum? Measured, and predicted."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from asgd_jax import stability
from asgd_jax.curvature import LossFn
from asgd_jax.delays import as_integer
from asgd_jax.stability.arguments import Kind
from asgd_jax.transforms import delayed_sgd, update_params
from experiments.edges.leaving import E_FOLDS, bracket, e_fold, most_loss, next_index
from experiments.edges.minimum import Minimum, stack

_RETURNED = math.exp(-4.0)  # of the starting distance: a run that comes so near has stayed


class MaxLearningRate(NamedTuple):
    """The measured edge of stability.

    Attributes:
      value: geometric mean of `lower` and `upper`.
      lower: the largest learning rate that stayed.
      upper: the smallest that left.
      predicted: of the theory, from the minimum's sharpness.
    """

    value: float
    lower: float
    upper: float
    predicted: float


def measure_max_learning_rate(
    minimum: Minimum,
    delay: int,
    loss_fn: LossFn,
    batches: Sequence[Any],
    *,
    momentum: float = 0.0,
    kind: Kind = "heavy_ball",
    dampening: bool = True,
    resolution: float = 0.02,
    perturbation: float = 1e-5,
    growth_limit: float = 30.0,
) -> MaxLearningRate:
    r"""Measures the largest learning rate at which delayed descent stays at a minimum.

    Every run starts `perturbation` from the minimum, along its sharpest direction, with a history
    full of that point. It has left when its distance along that direction has grown `growth_limit`
    times, when the loss exceeds max(10 L, L + 0.1), L the minimum's, or when that is not finite.
    It has stayed when the distance has shrunk $e^4$ times, or when it hasn't left within 12 times
    the steps in which the distance grows e-fold at a learning rate `resolution` above the threshold
    (`stability.growth_time`): fewer would call unstable runs stable. Learning rates start at
    1 / sharpness, are halved or doubled past the edge, then bisected geometrically.

    Args:
      minimum: from `find_minimum`.
      delay: int >= 0.
      loss_fn: `loss_fn(params, batch)`, as in `find_minimum`.
      batches: as in `find_minimum`; update t uses batch t modulo their number.
      momentum, kind, dampening: the optimizer, as in `stability.max_learning_rate`.
      resolution: the relative width of the bracket to stop at, > 0.
      perturbation: relative to the norm of the parameters. Where it is larger, the sharpness falls
        while the run moves away, and the edge looks up to a few percent higher than it is; where it
        is much smaller, float32 rounds it off.
      growth_limit: inf with several batches, whose gradients at the minimum are noise.

    Returns:
      A `MaxLearningRate`.

    Raises:
      ValueError: for a bad argument, a sharpness that isn't positive, or when no learning rate
        within a factor of a million of 1 / sharpness tells staying from leaving.

    References:
      Giladi, Nacson, Hoffer, Soudry, "At Stability's Edge", ICLR 2020, fig. 2.
    """
    delay = as_integer(delay, "delay")
    method: dict[str, Any] = {"momentum": momentum, "kind": kind, "dampening": dampening}
    predicted = stability.max_learning_rate(delay, sharpness=minimum.sharpness, **method)
    lower, upper = measure_edge(
        minimum,
        partial(delayed_sgd, delay=delay, **method),
        loss_fn,
        batches,
        steps=math.ceil(e_fold(delay, resolution, **method)),
        resolution=resolution,
        perturbation=perturbation,
        growth_limit=growth_limit,
    )
    return MaxLearningRate(math.sqrt(lower * upper), lower, upper, predicted)


def measure_edge(
    minimum: Minimum,
    make_optimizer: Callable[[jax.Array], optax.GradientTransformation],
    loss_fn: LossFn,
    batches: Sequence[Any],
    *,
    steps: int,
    resolution: float = 0.02,
    perturbation: float = 1e-5,
    growth_limit: float = 30.0,
) -> tuple[float, float]:
    """Measures between which two learning rates an optimizer begins to leave a minimum.

    Args:
      make_optimizer: of the learning rate, a traced scalar; `delayed` is its outermost transform.
      steps: in which the distance grows e-fold `resolution` above the edge.
      minimum, loss_fn, batches, resolution, perturbation, growth_limit: as of
        `measure_max_learning_rate`, which says when a run has left.

    Returns:
      The largest rate that stayed, and the smallest that left.
    """
    run = _make_leaves(loss_fn, make_optimizer, steps, perturbation, growth_limit)
    stacked, limit = stack(batches), jnp.float32(most_loss(minimum.loss))

    def leaves(learning_rate: float) -> bool:
        rate = jnp.float32(learning_rate)
        return bool(run(rate, minimum.params, limit, minimum.direction, stacked))

    # From a step of 1, not from the prediction: it is to be tested.
    lower, upper, _ = bisect(leaves, 1.0 / minimum.sharpness, resolution)
    return lower, upper


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
    # A power of two of grid steps to a doubling, so that every half is on the grid.
    stride = 2 ** max(0, math.ceil(math.log2(math.log(2.0) / math.log1p(resolution))))
    left: dict[int, bool] = {}
    while (index := next_index(left, stride)) is not None:
        left[index] = leaves(guess * 2.0 ** (index / stride))
    lower, upper = (guess * 2.0 ** (index / stride) for index in bracket(left) if index is not None)
    return lower, upper, len(left)


def _make_leaves(
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
      `leaves(learning_rate, params, limit, direction, stacked)`, a boolean scalar: the minimum's
      params, the loss that is too much, the sharpest direction, and the batches on a leading axis.
    """

    @jax.jit
    def leaves(
        learning_rate: jax.Array, minimum: Any, limit: jax.Array, direction: Any, stacked: Any
    ) -> jax.Array:
        tx = make_optimizer(learning_rate)
        num_batches = jax.tree.leaves(stacked)[0].shape[0]
        norm = optax.tree.norm(minimum)
        radius = perturbation * jnp.where(norm > 0, norm, 1.0)

        def step(_: int, carry: Any) -> Any:
            params, state, farthest, highest = carry
            batch = jax.tree.map(lambda leaf: leaf[state.num_updates % num_batches], stacked)

            def gradient(where: Any) -> tuple[Any, jax.Array]:
                return jax.value_and_grad(loss_fn)(where, batch)[::-1]

            params, state, height = update_params(tx, gradient, params, state)
            away = optax.tree.vdot(optax.tree.sub(params, minimum), direction)
            # jnp.maximum keeps a NaN.
            return params, state, jnp.maximum(farthest, abs(away)), jnp.maximum(highest, height)

        def near(farthest: jax.Array, highest: jax.Array) -> jax.Array:
            return (farthest <= growth_limit * radius) & (highest <= limit)

        def undecided(carry: Any) -> jax.Array:
            _, _, farthest, highest, e_folds = carry
            return near(farthest, highest) & (farthest > _RETURNED * radius) & (e_folds < E_FOLDS)

        def advance(carry: Any) -> Any:
            # The peak over an e-fold: a single distance swings through zero.
            start = *carry[:2], jnp.zeros_like(radius), jnp.zeros_like(radius)
            return *jax.lax.fori_loop(0, e_fold, step, start), carry[4] + 1

        params = optax.tree.add_scale(minimum, radius, direction)
        first = params, tx.init(params), radius, jnp.zeros_like(radius), 0
        _, _, farthest, highest, _ = jax.lax.while_loop(undecided, advance, first)
        return ~near(farthest, highest)

    return leaves
