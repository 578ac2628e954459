"""Random crops and flips on the device, inside the train step."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from asgd_jax.data.in_memory import DATASETS
from asgd_jax.delays.processes import as_integer

Augmenter = Callable[[jax.Array, jax.Array], jax.Array]


class Crops(NamedTuple):
    """Where every image is cut from its padded self.

    Attributes:
      rows: int32 array, an entry an image: first row kept, 0, ..., 2 padding.
      columns: int32 array of the same shape, first column kept, 0, ..., 2 padding.
      mirrored: bool array of the same shape, whether the crop is flipped left to right.
    """

    rows: jax.Array
    columns: jax.Array
    mirrored: jax.Array


def draw_crops(
    key: jax.Array, shape: tuple[int, ...], *, padding: int = 4, flip: bool = True
) -> Crops:
    """Draws uniform offsets and, with `flip`, fair coins, independently for every image.

    How many images there are decides the draws, not how `shape` arranges them.

    >>> crops = draw_crops(jax.random.key(0), (3,), padding=0, flip=False)
    >>> crops.rows.tolist(), crops.mirrored.tolist()
    ([0, 0, 0], [False, False, False])
    """
    row_key, column_key, flip_key = jax.random.split(key, 3)
    bound = 2 * as_integer(padding, "padding") + 1
    rows = jax.random.randint(row_key, shape, 0, bound, jnp.int32)
    columns = jax.random.randint(column_key, shape, 0, bound, jnp.int32)
    coins = jax.random.bernoulli(flip_key, 0.5, shape)
    return Crops(rows, columns, coins if flip else jnp.zeros_like(coins))


def apply_crops(images: jax.Array, crops: Crops, *, padding: int = 4) -> jax.Array:
    """Pads with zeros, cuts and mirrors every image as told; dtype and shape are kept.

    Args:
      images: array of shape (..., height, width, channels), of any dtype. Zeros are black before
        the normalisation, which is where this belongs.
      crops: as `draw_crops` returns.
      padding: pixels added on each side.

    >>> image = jnp.arange(1, 5, dtype=jnp.uint8).reshape(1, 2, 2, 1)
    >>> crop = Crops(jnp.array([0]), jnp.array([1]), jnp.array([True]))
    >>> apply_crops(image, crop, padding=1)[0, :, :, 0].tolist()
    [[0, 0], [2, 1]]
    """
    *leading, height, width, _ = images.shape
    row, column = jnp.arange(height, dtype=jnp.int32), jnp.arange(width, dtype=jnp.int32)

    def cut(image: jax.Array, crop: Crops) -> jax.Array:
        padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        columns = crop.columns + jnp.where(crop.mirrored, width - 1 - column, column)
        # One gather for crop and flip. A dynamic slice under vmap costs as much alone, and seven to
        # thirteen times more inside a scan on XLA:CPU.
        return padded[(crop.rows + row)[:, None], columns]

    # vmap tells XLA that images don't mix: indexed by number, split images would be gathered.
    for _ in leading:
        cut = jax.vmap(cut)
    return cut(images, crops)


def random_crop_flip(
    key: jax.Array, images: jax.Array, *, padding: int = 4, flip: bool = True
) -> jax.Array:
    """Cuts every image at random from its zero-padded self and mirrors every other one, on average.

    Args:
      key: of this batch; fold the step in.
      images: array of shape (..., height, width, channels), uint8 or floating; static shape.
      padding: pixels on each side, static; 4 is the usual value for CIFAR.
      flip: static; False where left and right differ in meaning.

    Returns:
      Array of the shape and dtype of `images`.

    Raises:
      ValueError: when `images` is a single one or `padding` is negative.

    >>> images = jnp.ones((2, 8, 8, 3), jnp.uint8)
    >>> random_crop_flip(jax.random.key(0), images).shape
    (2, 8, 8, 3)
    """
    if images.ndim < 4:
        raise ValueError(
            f"images must have shape (n, height, width, channels), got {images.shape}: add the axis"
        )
    crops = draw_crops(key, images.shape[:-3], padding=padding, flip=flip)
    return apply_crops(images, crops, padding=padding)


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
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: use one of {', '.join(DATASETS)}")
    return random_crop_flip if name.startswith("cifar") else identity
