"""Normalisation against float64 numpy."""

import jax
import numpy as np
import pytest

from asgd_jax import data
from asgd_jax.data.normalize import IMAGENET_MEAN, IMAGENET_STD, channel_statistics, normalize_with


@pytest.mark.parametrize("count", [1, 999, 1000, 2001])
def test_statistics_are_numpys(count):
    images = np.random.default_rng(count).integers(0, 256, (count, 3, 2, 3), np.uint8)
    mean, std = channel_statistics(images)
    assert (mean.dtype, std.dtype) == (np.float32, np.float32)
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, (images / 255).std((0, 1, 2)), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float16])
def test_normalisation_is_float32_of_any_input(dtype):
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3)).astype(dtype)
    normalized = jax.jit(data.imagenet_normalizer())(images)
    assert normalized.dtype == np.float32
    want = (images.astype(np.float64) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    np.testing.assert_allclose(normalized, want, atol=1e-5)


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan")])
def test_a_constant_channel_is_refused(std):
    with pytest.raises(ValueError, match="std must be > 0 in every channel"):
        normalize_with([0.5, 0.5], [1.0, std])
