"""Random crops and flips on the device, inside the train step."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from asgd_jax.data.facts import in_memory_facts

Augmenter = Callable[[jax.Array, jax.Array], jax.Array]

PADDING = 4  # pixels of black on each side, as is usual for CIFAR


class Crops(NamedTuple):
    """Where every image is cut from its padded self.

    Attributes:
      rows: int32 array, an entry an image: first row kept, 0, ..., 2 PADDING.
      columns: int32 array of the same shape, first column kept, 0, ..., 2 PADDING.
      mirrored: bool array of the same shape, whether the crop is flipped left to right.
    """

    rows: jax.Array
    columns: jax.Array
    mirrored: jax.Array


def draw_crops(key: jax.Array, shape: tuple[int, ...]) -> Crops:
    """Draws uniform offsets and fair coins, independently for every image.

    How many images there are decides the draws, not how `shape` arranges them.
    """
    row_key, column_key, flip_key = jax.random.split(key, 3)
    rows = jax.random.randint(row_key, shape, 0, 2 * PADDING + 1, jnp.int32)
    columns = jax.random.randint(column_key, shape, 0, 2 * PADDING + 1, jnp.int32)
    return Crops(rows, columns, jax.random.bernoulli(flip_key, 0.5, shape))


def apply_crops(images: jax.Array, crops: Crops) -> jax.Array:
    """Pads with zeros, cuts and mirrors every image as told; dtype and shape are kept.

    Args:
      images: array of shape (..., height, width, channels), of any dtype. Zeros are black before
        the normalisation, which is where this belongs.
      crops: as `draw_crops` returns.

    >>> image = jnp.arange(1, 5, dtype=jnp.uint8).reshape(1, 2, 2, 1)
    >>> crop = Crops(jnp.array([3]), jnp.array([4]), jnp.array([True]))
    >>> apply_crops(image, crop)[0, :, :, 0].tolist()
    [[0, 0], [2, 1]]
    """
    *leading, height, width, _ = images.shape
    row, column = jnp.arange(height, dtype=jnp.int32), jnp.arange(width, dtype=jnp.int32)

    def cut(image: jax.Array, crop: Crops) -> jax.Array:
        padded = jnp.pad(image, ((PADDING, PADDING), (PADDING, PADDING), (0, 0)))
        columns = crop.columns + jnp.where(crop.mirrored, width - 1 - column, column)
        # One gather for crop and flip. A dynamic slice under vmap costs as much alone, and seven to
        # thirteen times more inside a scan on XLA:CPU.
        return padded[(crop.rows + row)[:, None], columns]

    # vmap tells XLA that images don't mix: indexed by number, split images would be gathered.
    for _ in leading:
        cut = jax.vmap(cut)
    return cut(images, crops)


def random_crop_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Cuts every image at random from its zero-padded self and mirrors every other one, on average.

    Args:
      key: of this batch; fold the step in.
      images: array of shape (..., height, width, channels), uint8 or floating; static shape.

    Returns:
      Array of the shape and dtype of `images`.

    Raises:
      ValueError: when `images` is a single one.

    >>> images = jnp.ones((2, 8, 8, 3), jnp.uint8)
    >>> random_crop_flip(jax.random.key(0), images).shape
    (2, 8, 8, 3)
    """
    if images.ndim < 4:
        raise ValueError(
            f"images must have shape (n, height, width, channels), got {images.shape}: add the axis"
        )
    return apply_crops(images, draw_crops(key, images.shape[:-3]))


def identity(key: jax.Array, images: jax.Array) -> jax.Array:
    """Returns the images as they are."""
    return images


def augmenter(name: str) -> Augmenter:
    """Returns a data set's augmentation, `(key, images) -> images`.

    CIFAR is cropped (padding 4) and flipped. digits and MNIST are left alone: a mirrored digit is
    no digit.

    Raises:
      ValueError: for an unknown data set.

    >>> augmenter("mnist") is identity
    True
    """
    return random_crop_flip if in_memory_facts(name).crop_flip else identity
