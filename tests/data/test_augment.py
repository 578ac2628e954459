"""Augmentation against a numpy loop that cuts at the same offsets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asgd_jax import data
from asgd_jax.data.augment import PADDING, Crops, apply_crops, draw_crops, identity


def plain_crops(images: np.ndarray, crops: Crops) -> np.ndarray:
    result = []
    for image, row, column, mirrored in zip(images, *map(np.asarray, crops), strict=True):
        padded = np.pad(image, ((PADDING, PADDING), (PADDING, PADDING), (0, 0)))
        height, width = image.shape[:2]
        cut = padded[row : row + height, column : column + width]
        result.append(cut[:, ::-1] if mirrored else cut)
    return np.stack(result)


def _images(dtype, shape=(64, 12, 10, 3)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_equals_cutting_one_by_one(dtype):
    images, key = _images(dtype), jax.random.key(7)
    crops = draw_crops(key, images.shape[:1])
    got = jax.jit(data.random_crop_flip)(key, images)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, plain_crops(images, crops))
    np.testing.assert_array_equal(got, apply_crops(jnp.asarray(images), crops))


def test_how_images_are_arranged_changes_no_draw():
    images, key = _images(np.uint8), jax.random.key(3)
    rows = images.reshape(4, 16, *images.shape[1:])
    np.testing.assert_array_equal(
        data.random_crop_flip(key, rows).reshape(images.shape), data.random_crop_flip(key, images)
    )


def test_works_inside_a_scan_and_under_strict_promotion():
    images, keys = jnp.asarray(_images(np.uint8)), jax.random.split(jax.random.key(1), 3)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        _, scanned = jax.lax.scan(lambda c, k: (c, data.random_crop_flip(k, images)), 0, keys)
    for key, got in zip(keys, scanned, strict=True):
        np.testing.assert_array_equal(got, data.random_crop_flip(key, images))


def test_offsets_are_uniform_and_flips_fair():
    rows, columns, mirrored = draw_crops(jax.random.key(0), (9000,))
    for offsets in (rows, columns):
        counts = np.bincount(offsets, minlength=9)
        assert counts.size == 9
        # Chi-squared with 8 degrees of freedom: 26 is passed once in a thousand.
        assert ((counts - 1000) ** 2 / 1000).sum() < 26
    assert abs(mirrored.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.05


def test_different_keys_cut_differently():
    images = jnp.asarray(_images(np.uint8))
    first, second = (data.random_crop_flip(jax.random.key(k), images) for k in (0, 1))
    assert (first != second).any()


def test_digits_are_never_mirrored():
    assert data.augmenter("digits") is identity
    assert data.augmenter("mnist") is identity
    assert data.augmenter("cifar10") is data.random_crop_flip
    assert data.augmenter("cifar100") is data.random_crop_flip
    images = jnp.asarray(_images(np.uint8, (4, 8, 8, 1)))
    np.testing.assert_array_equal(data.augmenter("mnist")(jax.random.key(0), images), images)
    with pytest.raises(ValueError, match="unknown data set 'svhn'"):
        data.augmenter("svhn")


def test_a_single_image_is_refused():
    with pytest.raises(ValueError, match=r"images must have shape .* got \(8, 8, 3\)"):
        data.random_crop_flip(jax.random.key(0), jnp.zeros((8, 8, 3)))
