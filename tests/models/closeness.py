"""What the tests of layers call equal."""

import jax
import numpy as np


def assert_close(actual, desired, ulps=64):
    """Equal to float32 rounding, relative to the largest entry of each array."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        scale = max(float(np.abs(np.asarray(b)).max()), 1e-30)
        np.testing.assert_allclose(
            np.asarray(a) / scale, np.asarray(b) / scale, rtol=0, atol=ulps * 2**-24
        )
