"""From JPEG bytes to a training or a validation image, in TensorFlow graph operations on the host.

Only the rectangle that is kept is decoded. Randomness comes in as an argument, so an image is a
function of its bytes and its draws, whatever thread makes it and in whatever order.
"""

import math
from typing import Any

from asgd_jax.data.prepared import tensorflow_modules

_ATTEMPTS = 10
_ASPECT_RATIOS = (3 / 4, 4 / 3)
_MIN_AREA = 0.08
_CENTRE = 224 / 256

# Area and aspect ratio of every attempt, then top, left and flip.
NUM_DRAWS = 2 * _ATTEMPTS + 3


def crop_window(height: Any, width: Any, draws: Any) -> Any:
    r"""Returns the rectangle of the random-resized crop, as [top, left, height, width].

    Area uniform in [0.08, 1] of the image's, log aspect ratio uniform in $\log [3/4, 4/3]$; the
    first of ten attempts that fits, placed uniformly; else the largest centred rectangle of an
    admissible ratio. These are torchvision's rules, which the paper's runs used, and not those of
    TensorFlow's `sample_distorted_bounding_box`, whose crops are smaller (uniform in the height).

    Args:
      height: int32 scalar, of the whole image.
      width: int32 scalar.
      draws: float32 of shape (NUM_DRAWS,), uniform in [0, 1).

    Returns:
      int32 tensor of shape (4,).
    """
    tf, _ = tensorflow_modules()
    low, high = (math.log(ratio) for ratio in _ASPECT_RATIOS)
    full_height, full_width = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
    area = full_height * full_width * (_MIN_AREA + (1 - _MIN_AREA) * draws[:_ATTEMPTS])
    root = tf.exp(0.5 * (low + (high - low) * draws[_ATTEMPTS : 2 * _ATTEMPTS]))
    side = tf.sqrt(area)
    # An image of a few pixels may round to nothing.
    widths, heights = tf.maximum(tf.round(side * root), 1), tf.maximum(tf.round(side / root), 1)
    fits = (widths <= full_width) & (heights <= full_height)
    first = tf.argmax(tf.cast(fits, tf.int32))
    # The largest rectangle of admissible ratio: at least one side is the image's own.
    largest = tf.stack(
        [
            tf.minimum(full_height, tf.round(full_width / _ASPECT_RATIOS[0])),
            tf.minimum(full_width, tf.round(full_height * _ASPECT_RATIOS[1])),
        ]
    )
    any_fits = fits[first]
    size = tf.where(any_fits, tf.stack([heights[first], widths[first]]), largest)
    room = tf.stack([full_height, full_width]) - size
    offset = tf.where(any_fits, tf.floor(draws[-3:-1] * (room + 1)), tf.floor(room / 2))
    # A draw just below 1 rounds up to it in float32.
    return tf.cast(tf.concat([tf.minimum(offset, room), size], axis=0), tf.int32)


def _decode(encoded: Any, window: Any, image_size: int) -> Any:
    """The rectangle at `image_size`, as uint8."""
    tf, _ = tensorflow_modules()
    # TensorFlow's default cosine transform darkens red and blue by 0.005 of the range on average;
    # the accurate one takes no longer and gives the bytes of Pillow, which the paper's runs read.
    method = "INTEGER_ACCURATE"
    image = tf.image.decode_and_crop_jpeg(encoded, window, channels=3, dct_method=method)
    resized = tf.image.resize(image, [image_size, image_size], "bilinear")
    # Weighted means stay within 0, ..., 255: adding a half and truncating is rounding, three times
    # cheaper than round, clip and cast.
    return tf.cast(resized + 0.5, tf.uint8)


def decode_train(encoded: Any, draws: Any, image_size: int) -> Any:
    """Decodes the random-resized crop and flips it with probability 1/2.

    Args:
      encoded: string scalar, a JPEG image.
      draws: float32 of shape (NUM_DRAWS,), uniform in [0, 1).
      image_size: pixels of a side of the result.

    Returns:
      uint8 tensor of shape (image_size, image_size, 3).
    """
    tf, _ = tensorflow_modules()
    shape = tf.io.extract_jpeg_shape(encoded)
    image = _decode(encoded, crop_window(shape[0], shape[1], draws), image_size)
    # A branch: `where` computes both and merges them, for a third of the image's whole cost.
    return tf.cond(draws[-1] < 0.5, lambda: tf.reverse(image, axis=[1]), lambda: image)


def decode_validation(encoded: Any, image_size: int) -> Any:
    """Decodes the centre square whose side is 224/256 of the short side, at `image_size`.

    Up to the rounding of the square to whole pixels this is the image resized to a short side of
    256/224 image_size with its centre cut out; the margin is neither decoded nor resized.

    Args:
      encoded: string scalar, a JPEG image.
      image_size: pixels of a side of the result.

    Returns:
      uint8 tensor of shape (image_size, image_size, 3).
    """
    tf, _ = tensorflow_modules()
    shape = tf.io.extract_jpeg_shape(encoded)[:2]
    short = tf.cast(tf.reduce_min(shape), tf.float32)
    side = tf.maximum(tf.cast(tf.round(short * _CENTRE), tf.int32), 1)
    offset = (shape - side) // 2
    window = tf.stack([offset[0], offset[1], side, side])
    return _decode(encoded, window, image_size)
