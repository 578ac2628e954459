r"""At which learning rate does delayed gradient descent leave a minimum? Measured, and predicted.

The measurement behind fig. 2: find a minimum, start a little beside it, and let delayed descent run
at one learning rate after another. The largest at which it stays should be $h^* / a$, with $a$ the
sharpness of the minimum and $h^*$ of `stability.max_learning_rate`.

`python -m experiments.minima` does it for a small network on scikit-learn's digits.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from asgd_jax import curvature, stability
from asgd_jax.curvature import LossFn
from asgd_jax.delays import as_integer
from asgd_jax.stability.arguments import Kind
from experiments.departure import bisect, make_optimizer, make_run


class Problem(NamedTuple):
    """`loss_fn(params, batch)`, the mean loss of a batch; initial params; a list of batches."""

    loss_fn: LossFn
    params: Any
    batches: list[Any]


class Minimum(NamedTuple):
    """A minimum of the mean loss over all batches.

    Attributes:
      params: pytree of arrays.
      loss: mean over the batches.
      gradient_norm: Euclidean norm of the mean gradient; how nearly this is a minimum.
      sharpness: largest eigenvalue of the Hessian of the mean loss.
      direction: its unit eigenvector, a pytree like `params`.
    """

    params: Any
    loss: float
    gradient_norm: float
    sharpness: float
    direction: Any


class MaxLearningRate(NamedTuple):
    """The measured edge of stability.

    Attributes:
      value: geometric mean of `lower` and `upper`.
      lower: the largest learning rate that stayed.
      upper: the smallest that left.
      predicted: of the theory, from the minimum's sharpness.
      num_runs: how many learning rates were tried.
    """

    value: float
    lower: float
    upper: float
    predicted: float
    num_runs: int


def digits_problem(
    *, num_train: int = 256, hidden: int = 64, weight_decay: float = 0.01, seed: int = 0
) -> Problem:
    """Returns a tanh network with squared loss on scikit-learn's digits, in one full batch.

    Without weight decay the loss has valleys with next to no curvature, along which descent creeps
    for ever; with it there is a minimum to arrive at.

    Args:
      num_train: samples, in class proportions.
      hidden: width of the hidden layer.
      weight_decay: factor of |params|^2 / 2 in the loss.
      seed: of the initial parameters.
    """
    from asgd_jax.data import load, normalizer
    from asgd_jax.models import create

    digits = load("digits", num_train=num_train)
    images = normalizer(digits)(digits.train_images)
    targets = jax.nn.one_hot(digits.train_labels, digits.num_classes)
    model = create("mlp", num_classes=digits.num_classes, hidden=(hidden,), activation="tanh")
    params = model.init(jax.random.key(seed), images[:1], train=False)["params"]

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        images, targets = batch
        error = model.apply({"params": params}, images, train=False) - targets
        decay = weight_decay * optax.tree.norm(params, squared=True)
        return (jnp.mean(jnp.sum(error**2, axis=-1)) + decay) / 2.0

    return Problem(loss_fn, params, [(images, targets)])


def find_minimum(
    loss_fn: LossFn,
    params: Any,
    batches: Sequence[Any],
    optimizer: optax.GradientTransformation,
    *,
    tolerance: float = 1e-5,
    max_steps: int = 50_000,
) -> Minimum:
    """Descends on the mean loss over all batches until the gradient vanishes, and measures there.

    Args:
      loss_fn: `loss_fn(params, batch)`, the mean loss of one batch, a pure function.
      params: where to start, a pytree of floating-point arrays.
      batches: pytrees of arrays of equal shapes, on whose mean loss to descend.
      optimizer: any optax optimizer; plain or heavy-ball SGD prefers the minima that it keeps
        stable. It is handed the loss too, so `optax.lbfgs()` works.
      tolerance: on the norm of the gradient.
      max_steps: full-batch steps.

    Returns:
      A `Minimum`.

    Raises:
      ValueError: when the gradient has not vanished: it diverged, or it needs more steps.

    >>> loss_fn = lambda x, batch: jnp.mean(batch * (x - 1.0) ** 2)
    >>> minimum = find_minimum(loss_fn, jnp.zeros(1), [jnp.ones(1), jnp.ones(1)], optax.sgd(0.1))
    >>> round(float(minimum.params[0]), 4), minimum.sharpness
    (1.0, 2.0)
    """
    params, loss, norm, steps = _descend(
        loss_fn, params, stack(batches), optimizer, tolerance, max_steps
    )
    if not norm <= tolerance:
        remedy = "raise max_steps or tolerance" if jnp.isfinite(norm) else "lower the learning rate"
        raise ValueError(f"gradient norm is {norm:.3g} after {int(steps)} steps: {remedy}")
    top = curvature.sharpness(loss_fn, params, list(batches), tol=1e-4)
    return Minimum(params, float(loss), float(norm), top.value, top.vector)


@partial(jax.jit, static_argnames=("loss_fn", "optimizer"))
def _descend(
    loss_fn: LossFn, params: Any, stacked: Any, optimizer: Any, tolerance: float, max_steps: int
) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
    """Returns (params, loss, gradient norm, steps made)."""
    tx = optax.with_extra_args_support(optimizer)

    def mean_loss(params: Any) -> jax.Array:
        return jnp.mean(jax.lax.map(lambda batch: loss_fn(params, batch), stacked))

    def unfinished(carry: Any) -> jax.Array:
        _, _, _, gradient, steps = carry
        return (optax.tree.norm(gradient) > tolerance) & (steps < max_steps)

    def step(carry: Any) -> Any:
        params, state, loss, gradient, steps = carry
        updates, state = tx.update(
            gradient, state, params, value=loss, grad=gradient, value_fn=mean_loss
        )
        params = optax.apply_updates(params, updates)
        return params, state, *jax.value_and_grad(mean_loss)(params), steps + 1

    start = params, tx.init(params), *jax.value_and_grad(mean_loss)(params), jnp.int32(0)
    params, _, loss, gradient, steps = jax.lax.while_loop(unfinished, step, start)
    return params, loss, optax.tree.norm(gradient), steps


def stack(batches: Sequence[Any]) -> Any:
    """Returns the batches as one pytree with a new leading axis.

    Raises:
      ValueError: without batches.

    >>> stack([jnp.ones(3), jnp.zeros(3)]).shape
    (2, 3)
    """
    if not batches:
        raise ValueError("there are no batches: pass a list with at least one")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)


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
      loss_fn: as in `find_minimum`.
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
    if not (math.isfinite(resolution) and resolution > 0):
        raise ValueError(f"resolution must be a finite number > 0, got {resolution!r}: try 0.02")
    method: dict[str, Any] = {"momentum": momentum, "kind": kind, "dampening": dampening}
    predicted = stability.max_learning_rate(delay, sharpness=minimum.sharpness, **method)
    just_above = (1.0 + resolution) * stability.max_learning_rate(delay, **method)
    e_fold = math.ceil(stability.growth_time(delay, step=just_above, **method))
    optimizer = partial(make_optimizer, delay=delay, **method)
    run = make_run(loss_fn, optimizer, e_fold, perturbation, growth_limit)
    stacked = stack(batches)

    def leaves(learning_rate: float) -> bool:
        rate, loss = jnp.float32(learning_rate), jnp.float32(minimum.loss)
        return bool(run(rate, minimum.params, loss, minimum.direction, stacked))

    # From a step of 1, not from the prediction: it is to be tested.
    lower, upper, num_runs = bisect(leaves, 1.0 / minimum.sharpness, resolution)
    return MaxLearningRate(math.sqrt(lower * upper), lower, upper, predicted, num_runs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints measured and predicted learning rates on digits; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--delays", type=int, nargs="+", default=[0, 1, 2, 4, 8, 16])
    delays = parser.parse_args(arguments).delays
    problem = digits_problem()
    minimum = find_minimum(*problem, optax.sgd(0.05, momentum=0.98))
    print(
        f"minimum: loss {minimum.loss:.4g}, gradient norm {minimum.gradient_norm:.2g}, "
        f"sharpness {minimum.sharpness:.4g}\n\n delay   measured  predicted  difference"
    )
    try:
        for delay in delays:
            found = measure_max_learning_rate(minimum, delay, problem.loss_fn, problem.batches)
            difference = found.value / found.predicted - 1.0
            print(
                f"{delay:6}{found.value:11.5g}{found.predicted:11.5g}{difference:12.2%}", flush=True
            )
    except ValueError as error:
        print(f"minima: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
