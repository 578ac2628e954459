"""A small problem with a different batch at every step."""

import jax
import jax.numpy as jnp
import numpy as np

PARAMS = {
    "w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "b": np.float32([0.3, -0.2, 0.1]),
}
PARAMS = jax.tree.map(jnp.asarray, PARAMS)
_RANDOM = np.random.default_rng(7)
_INPUTS = _RANDOM.normal(size=(64, 4, 2)).astype(np.float32)
_TARGETS = _RANDOM.normal(size=(64, 4, 3)).astype(np.float32)


def loss(params, batch):
    """A smooth, nonlinear loss of a two-layer map; `batch` is (x of shape (4, 2), y of (4, 3))."""
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["w"] + params["b"][None, :]) - y) ** 2)


def batch(step):
    return jnp.asarray(_INPUTS)[step], jnp.asarray(_TARGETS)[step]


def gradient(params, step):
    return jax.grad(loss)(params, batch(step))
