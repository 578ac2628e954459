"""Normalisation of images, done on the device so that uint8 is what travels and is kept."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

# Measured on the ImageNet training set, of intensities in [0, 1]; torchvision's constants.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# numpy counts bytes as 64-bit integers: a thousand images at a time bound the copy.
_CHUNK = 1000

Normalizer = Callable[[jax.Array | np.ndarray], jax.Array]


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean and the standard deviation of every channel, of intensities in [0, 1].

    The sums are of integers, hence exact and the same on every machine.

    Args:
      images: uint8 array of shape (n, height, width, channels), n >= 1.

    Returns:
      Two float32 arrays of shape (channels,).

    >>> mean, std = channel_statistics(np.array([[[[0], [255]]]], np.uint8))
    >>> float(mean[0]), float(std[0])
    (0.5, 0.5)
    """
    histogram = np.zeros((images.shape[-1], 256), np.int64)
    for start in range(0, len(images), _CHUNK):
        for channel, counts in enumerate(histogram):
            chunk = images[start : start + _CHUNK, ..., channel]
            counts += np.bincount(chunk.ravel(), minlength=256)
    levels, count = np.arange(256), images.size // images.shape[-1]
    mean = histogram @ levels / count
    std = np.sqrt(histogram @ levels**2 / count - mean**2)
    return (mean / 255).astype(np.float32), (std / 255).astype(np.float32)


def normalize_with(
    mean: Sequence[float] | np.ndarray, std: Sequence[float] | np.ndarray
) -> Normalizer:
    r"""Returns the function that normalises every channel.

    $x \mapsto (x / 255 - \mathrm{mean}) / \mathrm{std}$.

    Args:
      mean: shape (channels,), of intensities in [0, 1].
      std: shape (channels,), > 0, of intensities in [0, 1].

    Returns:
      A jittable function of an array (..., channels) in 0, ..., 255, uint8 or floating, to float32.

    Raises:
      ValueError: when a standard deviation is not a number > 0.

    >>> normalize_with([0.5], [0.5])(np.array([0, 255], np.uint8)[:, None]).ravel().tolist()
    [-1.0, 1.0]
    """
    centre, scale = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    if not np.all(scale > 0):
        raise ValueError(
            f"std must be > 0 in every channel, got {scale.tolist()}: use normalize='half'"
        )

    def normalize(images: jax.Array | np.ndarray) -> jax.Array:
        return (jnp.asarray(images).astype(jnp.float32) / 255 - centre) / scale

    return normalize


def imagenet_normalizer() -> Normalizer:
    """Returns the normalisation with ImageNet's mean and standard deviation, for 3 channels."""
    return normalize_with(IMAGENET_MEAN, IMAGENET_STD)
