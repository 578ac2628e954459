"""Loss and error over a whole data set, with the live parameters."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from asgd_jax.training.state import PyTree
from asgd_jax.training.step import cross_entropy


class Sums(NamedTuple):
    """Over samples: their losses in nats (float32), how many were wrong, how many (int32)."""

    loss: jax.Array
    num_wrong: jax.Array
    num_samples: jax.Array

    def means(self) -> tuple[jax.Array, jax.Array]:
        """Mean loss and error rate."""
        return self.loss / self.num_samples, self.num_wrong / self.num_samples


def round_up(number: int, multiple: int) -> int:
    """Returns the least multiple that is not below the number.

    >>> round_up(9, 8)
    16
    """
    return -(-number // multiple) * multiple


def pad_to_batches(
    images: np.ndarray, labels: np.ndarray, batch_size: int, multiple: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a data set into equal batches; the last one is filled up with label -1.

    Args:
      images: (n, ...); labels: (n,), or (n, characters) of text, where each of them is a sample.
      batch_size: samples of a batch, at most; a smaller data set is one batch.
      multiple: what the size of a batch must be a multiple of.

    Returns:
      images (num_batches, batch_size, ...) and labels (num_batches, batch_size, ...).

    >>> pad_to_batches(np.zeros((5, 2)), np.arange(5), 3)[1].tolist()
    [[0, 1, 2], [3, 4, -1]]
    """
    batch_size = round_up(min(batch_size, len(labels)), multiple)
    missing = -len(labels) % batch_size
    images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)])
    labels = np.concatenate([labels, np.full((missing, *labels.shape[1:]), -1, labels.dtype)])
    cut = (array.reshape(-1, batch_size, *array.shape[1:]) for array in (images, labels))
    return next(cut), next(cut)


def make_measure(
    model: nn.Module, normalize: Callable[[jax.Array], jax.Array]
) -> Callable[[PyTree, PyTree, tuple[jax.Array, jax.Array]], Sums]:
    """Returns `measure(params, batch_stats, batches)`: sums over batches, one after another; pure.

    `batches` is a pair as `pad_to_batches` returns it. Samples with a negative label are padding
    and count nowhere, so that means are exact. BatchNorm uses its running statistics.
    """

    def measure(params: PyTree, batch_stats: PyTree, batches: tuple[jax.Array, jax.Array]) -> Sums:
        def sum_batch(batch: tuple[jax.Array, jax.Array]) -> Sums:
            images, labels = batch
            variables = {"params": params, "batch_stats": batch_stats}
            logits = model.apply(variables, normalize(images), train=False)
            real = labels >= 0
            losses = cross_entropy(logits, jnp.maximum(labels, 0))
            wrong = jnp.argmax(logits, axis=-1) != labels
            return Sums(jnp.sum(jnp.where(real, losses, 0)), jnp.sum(real & wrong), jnp.sum(real))

        return jax.tree.map(jnp.sum, jax.lax.map(sum_batch, batches))

    return measure
