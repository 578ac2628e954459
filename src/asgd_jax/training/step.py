"""One update: the gradient at stale parameters, then the server's step. Both are pure functions."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from asgd_jax.models.layers import batch_split_over
from asgd_jax.training.batch_stats import BatchStatsChains, make_chains
from asgd_jax.training.state import PyTree, TrainState
from asgd_jax.transforms import update_params


class Batch(NamedTuple):
    """The samples of one update, by worker.

    Attributes:
      images: (workers_per_update, worker_batch_size, height, width, channels), uint8 or float.
      labels: int32, (workers_per_update, worker_batch_size).
    """

    images: jax.Array
    labels: jax.Array


class StepMetrics(NamedTuple):
    """Scalars of one update: loss and error of its batch at the stale parameters, and more."""

    loss: jax.Array
    error: jax.Array
    gradient_norm: jax.Array
    staleness: jax.Array


Preprocess = Callable[[jax.Array, jax.Array], jax.Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Returns the softmax cross-entropy of every sample, in nats.

    Args:
      logits: float32, (..., num_classes).
      labels: int32, (...).
      smoothing: share of the target spread evenly over all classes.

    >>> round(float(cross_entropy(jnp.zeros((1, 10)), jnp.array([3]))[0]), 4)
    2.3026
    """
    if not smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, targets)


Gradient = Callable[
    [PyTree, PyTree, Batch, jax.Array], tuple[PyTree, tuple[PyTree, jax.Array, jax.Array]]
]


def make_gradient(
    model: nn.Module,
    preprocess: Preprocess,
    label_smoothing: float = 0.0,
    *,
    mesh: Mesh | None = None,
) -> Gradient:
    """Returns `gradient(params, batch_stats, batch, key)`: what a worker computes, at any params.

    The gradient is that of the mean loss over all workers of the update. BatchNorm sees each
    worker's own batch, as on a real worker; `batch_stats` advance by one step of their running
    average, with the mean of the workers' statistics.

    Args:
      model: a Linen module.
      preprocess: see `make_train_step`.
      label_smoothing: see `cross_entropy`.
      mesh: devices of one axis that share every worker's samples; values are those of one device.

    Returns:
      A function giving (gradients, (new batch_stats, loss, error)).
    """
    split = mesh is not None and mesh.size > 1
    axis_name = mesh.axis_names[0] if mesh is not None and split else None

    def worker_loss(
        params: PyTree, batch_stats: PyTree, images: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, jax.Array, PyTree]:
        variables = {"params": params, "batch_stats": batch_stats}
        with nullcontext() if axis_name is None else batch_split_over(axis_name):
            logits, new = model.apply(variables, images, train=True, mutable=["batch_stats"])
        loss = cross_entropy(logits, labels, label_smoothing).mean()
        error = jnp.mean(jnp.argmax(logits, axis=-1) != labels, dtype=jnp.float32)
        return loss, error, new.get("batch_stats", batch_stats)

    def loss_fn(
        params: PyTree, batch_stats: PyTree, images: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, tuple[PyTree, jax.Array, jax.Array]]:
        if len(labels) == 1 or not jax.tree.leaves(batch_stats):
            # One worker, or samples that nothing couples: one batch is the same and quicker.
            images = images.reshape(-1, *images.shape[2:])
            labels = labels.reshape(-1, *labels.shape[2:])
            loss, error, new_stats = worker_loss(params, batch_stats, images, labels)
            return loss, (new_stats, loss, error)
        losses, errors, new_stats = jax.vmap(worker_loss, in_axes=(None, None, 0, 0))(
            params, batch_stats, images, labels
        )
        new_stats = jax.tree.map(lambda leaf: leaf.mean(axis=0), new_stats)
        return losses.mean(), (new_stats, losses.mean(), errors.mean())

    of_images = jax.grad(loss_fn, has_aux=True)
    if mesh is not None and split:
        of_images = _on_shares(of_images, mesh)

    def gradient(
        params: PyTree, batch_stats: PyTree, batch: Batch, key: jax.Array
    ) -> tuple[PyTree, tuple[PyTree, jax.Array, jax.Array]]:
        return of_images(params, batch_stats, preprocess(key, batch.images), batch.labels)

    return gradient


def _on_shares(gradient: Callable[..., PyTree], mesh: Mesh) -> Callable[..., PyTree]:
    """The mean of what the devices compute, each on its share of every worker's samples.

    Left to itself XLA gathers the batch on every device wherever two axes are merged of which only
    the second is split: workers and samples here, rows and samples in a convolution.
    """
    whole, split = PartitionSpec(), PartitionSpec(None, *mesh.axis_names)
    return jax.shard_map(
        lambda *arguments: jax.lax.pmean(gradient(*arguments), mesh.axis_names),
        mesh=mesh,
        in_specs=(whole, whole, split, split),
        out_specs=whole,
        check_vma=False,
    )


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    preprocess: Preprocess,
    label_smoothing: float = 0.0,
    *,
    chains: BatchStatsChains | None = None,
    axis_name: str | None = None,
    mesh: Mesh | None = None,
    number_of: Callable[[jax.Array], jax.Array] = lambda update: update,
) -> TrainStep:
    """Returns `train_step(state, batch) -> (state, metrics)`, pure, to be jitted, scanned, vmapped.

    Args:
      model: a Linen module.
      tx: the optimizer, `asgd_jax.delayed` around all of it.
      preprocess: `preprocess(key, images)`: raw images (workers, samples, height, width, channels)
        to the model's float32 input, augmentation included; `key` differs at every update.
      label_smoothing: see `cross_entropy`.
      chains: how BatchNorm's running statistics are kept; one chain on the server by default.
      axis_name: under `pmap`, the axis whose members average gradients and running statistics.
      mesh: under `jit`, the devices that share every worker's samples.
      number_of: `number_of(update)`: the number of its batch, which names its random key.
    """
    gradient = make_gradient(model, preprocess, label_smoothing, mesh=mesh)
    chains = make_chains("server", 0) if chains is None else chains

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        staleness = state.opt_state.staleness  # of this gradient: read before the update
        stats = chains.read(state.batch_stats, state.step, staleness)
        key = jax.random.fold_in(state.key, number_of(state.step))
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))

        def compute(params: PyTree) -> tuple[PyTree, tuple[PyTree, jax.Array, jax.Array]]:
            found = gradient(params, stats, batch, key)
            return found if axis_name is None else jax.lax.pmean(found, axis_name)

        params, opt_state, (stats, loss, error, norm) = update_params(
            tx, lambda params: _with_norm(compute(params)), state.params, state.opt_state
        )
        kept = chains.write(state.batch_stats, state.step, stats)
        state = TrainState(state.step + 1, params, kept, opt_state, state.key)
        return state, StepMetrics(loss, error, norm, staleness)

    return train_step


def _with_norm(found: tuple[PyTree, tuple[Any, ...]]) -> tuple[PyTree, tuple[Any, ...]]:
    gradients, rest = found
    return gradients, (*rest, optax.tree.norm(gradients))
