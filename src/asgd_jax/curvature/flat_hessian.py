"""The Hessian of the mean loss as a function of flat vectors, and where iterations start."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from asgd_jax.curvature.hessian_vector import Batches, Step, one_pass

# A warm start inside an invariant subspace would never see the rest of the spectrum.
_WARM_START_NOISE = 0.01


class NotFinite(Exception):
    """The loss or the Hessian is not finite."""


class OutOfProducts(Exception):
    """The budget of products is spent."""


def flatten(tree: Any) -> np.ndarray:
    """Returns all entries of a pytree as one float64 vector."""
    return np.concatenate([np.asarray(x).astype(np.float64).ravel() for x in jax.tree.leaves(tree)])


def unflatten(flat: np.ndarray, params: Any) -> Any:
    """The float64 vector as a pytree like `params`: shapes, dtypes, and placement on devices."""
    leaves, structure = jax.tree.flatten(params)
    parts = np.split(flat, np.cumsum([leaf.size for leaf in leaves])[:-1])

    def place(part: np.ndarray, leaf: jax.Array) -> jax.Array:
        part = part.reshape(leaf.shape).astype(leaf.dtype)
        return jax.device_put(part, leaf.sharding if leaf.committed else None)

    return jax.tree.unflatten(structure, [place(*pair) for pair in zip(parts, leaves, strict=True)])


def start_vector(params: Any, seed: int, initial_vector: Any) -> np.ndarray:
    """A random unit vector, or the unit initial vector with a little of the random one."""
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    random = np.random.default_rng(seed).standard_normal(size)
    random /= np.linalg.norm(random)
    if initial_vector is None:
        return random
    shapes, needed = (jax.tree.map(np.shape, tree) for tree in (initial_vector, params))
    if shapes != needed:
        raise ValueError(f"initial_vector has the shapes {shapes}, params {needed}: pass None")
    initial = flatten(initial_vector)
    norm = np.linalg.norm(initial)
    if not (np.isfinite(norm) and norm > 0):
        return random
    return initial / norm + _WARM_START_NOISE * random


def inverse_root(preconditioner: Any, params: Any) -> np.ndarray | None:
    """Returns $D^{-1/2}$ as a flat vector, of the diagonal D of a preconditioner.

    Raises:
      ValueError: for entries that are not positive, or shapes unlike the parameters'.
    """
    if preconditioner is None:
        return None
    shapes, needed = (jax.tree.map(np.shape, tree) for tree in (preconditioner, params))
    if shapes != needed:
        raise ValueError(f"preconditioner has the shapes {shapes}, params {needed}: one entry each")
    diagonal = flatten(preconditioner)
    if not (diagonal > 0).all():
        raise ValueError(
            f"preconditioner has an entry {diagonal[~(diagonal > 0)][0]:g}: all must be > 0 (of "
            "Adam sqrt(nu) + eps, curvature.adam_preconditioner)"
        )
    return 1.0 / np.sqrt(diagonal)


class FlatHessian:
    """The Hessian as a function of flat float64 vectors, which counts and limits its products.

    Args:
      step: of `make_step`.
      params: where.
      batches: of the mean loss.
      scale: $D^{-1/2}$ of a preconditioner; the products are then those of
        $D^{-1/2} H D^{-1/2}$.

    Raises, from a product: `NotFinite`; `OutOfProducts`; ValueError for batches that changed.
    """

    def __init__(
        self, step: Step, params: Any, batches: Batches, scale: np.ndarray | None = None
    ) -> None:
        if isinstance(batches, Iterator):
            raise ValueError(
                f"batches is a one-shot {type(batches).__name__}, and curvature passes over the "
                "batches many times: pass a list, or a function that returns a fresh iterator"
            )
        self.num_matvecs = 0
        self.limit = math.inf
        self._arguments = step, params, batches
        self._scale = 1.0 if scale is None else scale
        self._checksums: list[int] | None = None

    def __call__(self, flat: np.ndarray) -> np.ndarray:
        if self.num_matvecs >= self.limit:
            raise OutOfProducts
        self.num_matvecs += 1
        step, params, batches = self._arguments
        vector = unflatten(self._scale * np.ravel(flat), params)
        total, examples, checksums = one_pass(step, params, vector, batches, self._checksums)
        self._checksums = self._checksums or [int(checksum) for checksum in checksums]
        product = self._scale * flatten(total[1]) / examples
        if not (np.isfinite(total[0]) and np.isfinite(product).all()):
            raise NotFinite
        return product
