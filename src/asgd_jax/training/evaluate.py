"""Loss and error over a whole data set, with the live parameters."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from asgd_jax.training.state import PyTree
from asgd_jax.training.step import cross_entropy

Evaluate = Callable[[PyTree, PyTree], tuple[jax.Array, jax.Array]]


def pad_to_batches(
    images: np.ndarray, labels: np.ndarray, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a data set into equal batches; the last one is filled up with label -1.

    Returns:
      images (num_batches, batch_size, ...) and labels (num_batches, batch_size).

    >>> pad_to_batches(np.zeros((5, 2)), np.arange(5), 3)[1].tolist()
    [[0, 1, 2], [3, 4, -1]]
    """
    batch_size = min(batch_size, len(labels))
    missing = -len(labels) % batch_size
    images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)])
    labels = np.concatenate([labels, np.full(missing, -1, labels.dtype)])
    return images.reshape(-1, batch_size, *images.shape[1:]), labels.reshape(-1, batch_size)


def make_sum_batch(
    model: nn.Module, normalize: Callable[[jax.Array], jax.Array]
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Returns `sum_batch(params, batch_stats, images, labels)`: summed loss, number of errors.

    Samples with a negative label are padding and count nowhere. BatchNorm uses its running
    statistics.
    """

    def sum_batch(
        params: PyTree, batch_stats: PyTree, images: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        variables = {"params": params, "batch_stats": batch_stats}
        logits = model.apply(variables, normalize(images), train=False)
        real = labels >= 0
        losses = cross_entropy(logits, jnp.maximum(labels, 0))
        wrong = jnp.argmax(logits, axis=-1) != labels
        return jnp.sum(jnp.where(real, losses, 0)), jnp.sum(real & wrong)

    return sum_batch


def make_mean(
    model: nn.Module, normalize: Callable[[jax.Array], jax.Array]
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Returns `mean(params, batch_stats, batches, num_samples)`: loss and error, pure.

    `batches` is the pair that `pad_to_batches` returns; its padding counts nowhere.
    """
    sum_batch = make_sum_batch(model, normalize)

    def mean(
        params: PyTree, batch_stats: PyTree, batches: tuple[jax.Array, jax.Array], num_samples: int
    ) -> tuple[jax.Array, jax.Array]:
        losses, wrong = jax.lax.map(lambda pair: sum_batch(params, batch_stats, *pair), batches)
        return losses.sum() / num_samples, wrong.sum() / num_samples

    return mean


def make_evaluate(
    model: nn.Module,
    normalize: Callable[[jax.Array], jax.Array],
    images: np.ndarray,
    labels: np.ndarray,
    batch_size: int,
    sharding: jax.sharding.Sharding | None = None,
) -> Evaluate:
    """Returns `evaluate(params, batch_stats) -> (loss, error)` over every sample of a data set.

    The mean is exact: padding carries the label -1. One compiled program runs all batches.

    Args:
      model: a Linen module.
      normalize: raw images to the model's input.
      images: (n, height, width, channels); labels: int32 (n,).
      batch_size: samples at once.
      sharding: where the data set is put; JAX's default device by default.
    """
    num_samples = len(labels)
    batches = jax.device_put(pad_to_batches(images, labels, batch_size), sharding)
    mean = jax.jit(make_mean(model, normalize), static_argnums=3)
    # The arrays are an argument: closed over, they would be compiled into the program.
    return lambda params, batch_stats: mean(params, batch_stats, batches, num_samples)
