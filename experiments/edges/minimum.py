"""Minima of small problems: found by descent, with their sharpness."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from asgd_jax import curvature, data
from asgd_jax.curvature import LossFn
from asgd_jax.data.in_memory import Dataset
from asgd_jax.models import create
from asgd_jax.transforms import update_params


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


def tanh_problem(
    dataset: Dataset,
    images: jax.Array,
    *,
    hidden: tuple[int, ...],
    weight_decay: float = 0.0,
    label_smoothing: float | None = None,
    seed: int = 0,
) -> Problem:
    """Returns a tanh network in one full batch, with squared loss on one-hot targets.

    Args:
      dataset: whose training labels are to be told.
      images: its training images, normalised.
      hidden: widths of the hidden layers.
      weight_decay: factor of |params|^2 / 2 in the loss.
      label_smoothing: where given, the loss is cross-entropy with so much of it instead.
      seed: of the initial parameters.
    """
    targets = jax.nn.one_hot(dataset.train_labels, dataset.num_classes)
    model = create("mlp", num_classes=dataset.num_classes, hidden=hidden, activation="tanh")
    params = model.init(jax.random.key(seed), images[:1], train=False)["params"]

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        images, targets = batch
        outputs = model.apply({"params": params}, images, train=False)
        if label_smoothing is None:
            losses = jnp.sum((outputs - targets) ** 2, axis=-1) / 2.0
        else:
            smoothed = optax.smooth_labels(targets, label_smoothing)
            losses = optax.softmax_cross_entropy(outputs, smoothed)
        decay = weight_decay * optax.tree.norm(params, squared=True) if weight_decay else 0.0
        return jnp.mean(losses) + decay / 2.0

    return Problem(loss_fn, params, [(images, targets)])


def digits_problem(
    *, num_train: int = 256, hidden: int = 64, weight_decay: float = 0.01, seed: int = 0
) -> Problem:
    """Returns `tanh_problem` on scikit-learn's digits, with one hidden layer.

    Without weight decay the loss has valleys with next to no curvature, along which descent creeps
    for ever; with it there is a minimum to arrive at. `num_train` samples are in class proportions.
    """
    digits = data.load("digits", num_train=num_train)
    images = data.normalizer(digits)(digits.train_images)
    return tanh_problem(digits, images, hidden=(hidden,), weight_decay=weight_decay, seed=seed)


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
        known = {"value": loss, "grad": gradient, "value_fn": mean_loss}
        params, state, _ = update_params(tx, lambda _: (gradient, None), params, state, **known)
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
