r"""The whole of the Hessian's spectrum, by random vectors: its trace and its density."""

import math
from typing import Any, NamedTuple

import numpy as np
from scipy.linalg import eigh_tridiagonal

from asgd_jax.curvature.flat_hessian import FlatHessian, NotFinite, start_vector
from asgd_jax.curvature.hessian_vector import Batches, Loss, as_parameters, make_step

# What is left of a Lanczos vector, over the largest seen, when all of its space has been; products
# have the parameters' precision, float32 as a rule.
_GONE = 1e-6


class Trace(NamedTuple):
    """An estimate of the trace of the Hessian.

    Attributes:
      value: mean over the random vectors; NaN where the loss or its Hessian is not finite.
      standard_error: of `value`, from the spread over the vectors; NaN for a single one.
      num_matvecs: products with the full Hessian.
    """

    value: float
    standard_error: float
    num_matvecs: int


def trace(
    loss_fn: Loss, params: Any, batches: Batches, *, num_vectors: int = 16, seed: int = 0
) -> Trace:
    r"""Hutchinson's estimate of the trace of the Hessian of the mean loss.

    $\mathrm{tr} H = E[v^T H v]$ over vectors of independent signs. A diagonal Hessian makes it
    exact.

    Args:
      loss_fn, params, batches: as for `sharpness`; `loss_fn` may be a `GaussNewton`.
      num_vectors: int >= 1, products with the Hessian.
      seed: of the vectors.

    Raises:
      ValueError: as `sharpness` does, and for num_vectors below 1.

    >>> import jax.numpy as jnp
    >>> trace(lambda p, batch: jnp.sum(jnp.array([3.0, 1.0]) * p**2) / 2, jnp.ones(2), [None])
    Trace(value=4.0, standard_error=0.0, num_matvecs=16)

    References:
      Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1990.
    """
    _at_least_one(num_vectors, "num_vectors")
    params = as_parameters(params)
    hessian = FlatHessian(make_step(loss_fn), params, batches)
    random = np.random.default_rng(seed)
    size = start_vector(params, 0, None).size
    samples = []
    try:
        for _ in range(num_vectors):
            signs = random.choice([-1.0, 1.0], size)
            samples.append(float(signs @ hessian(signs)))
    except NotFinite:
        samples = [math.nan] * num_vectors
    error = np.std(samples, ddof=1) / math.sqrt(num_vectors) if num_vectors > 1 else math.nan
    return Trace(float(np.mean(samples)), float(error), hessian.num_matvecs)


class Density(NamedTuple):
    """The density of the eigenvalues, as point masses.

    Attributes:
      nodes: float64 (num_vectors, num_steps), places; NaN where the loss is not finite.
      weights: of the same shape, masses; those of a row, one random vector, add up to 1. Rows that
        saw the whole spectrum in fewer steps end with masses of 0.
      num_matvecs: products with the full Hessian.
    """

    nodes: np.ndarray
    weights: np.ndarray
    num_matvecs: int

    def share_above(self, value: float) -> float:
        """Returns the share of the eigenvalues that is above `value`, averaged over the vectors."""
        return float(np.sum(self.weights * (self.nodes > value)) / len(self.weights))


def spectral_density(
    loss_fn: Loss,
    params: Any,
    batches: Batches,
    *,
    num_vectors: int = 4,
    num_steps: int = 40,
    seed: int = 0,
) -> Density:
    r"""Stochastic Lanczos quadrature of the density of the Hessian's eigenvalues.

    For a random unit vector v, $E[v^T f(H) v] = \frac{1}{n} \sum_i f(\lambda_i)$, and the Gauss
    rule of `num_steps` Lanczos steps from v is exact for polynomials f up to degree
    2 num_steps - 1. Vectors are orthogonalised against all before them.

    Args:
      loss_fn, params, batches: as for `sharpness`; `loss_fn` may be a `GaussNewton`.
      num_vectors: int >= 1, random starts.
      num_steps: int >= 1, Lanczos steps, and so products, a start.
      seed: of the starts.

    Raises:
      ValueError: as `sharpness` does, and for numbers below 1.

    >>> import jax.numpy as jnp
    >>> loss = lambda p, batch: jnp.sum(jnp.array([3.0, 1.0, 1.0, 1.0]) * p**2) / 2
    >>> density = spectral_density(loss, jnp.ones(4), [None], num_vectors=1)
    >>> density.nodes[0, :2].round(4), density.num_matvecs
    (array([1., 3.]), 2)

    References:
      Ghorbani, Krishnan, Xiao, "An Investigation into Neural Net Optimization via Hessian
      Eigenvalue Density", ICML 2019.
    """
    _at_least_one(num_vectors, "num_vectors")
    _at_least_one(num_steps, "num_steps")
    params = as_parameters(params)
    hessian = FlatHessian(make_step(loss_fn), params, batches)
    nodes, weights = np.zeros((2, num_vectors, num_steps))
    try:
        for row in range(num_vectors):
            start = start_vector(params, seed + row, None)
            found = _gauss_rule(hessian, start, num_steps)
            nodes[row, : len(found[0])], weights[row, : len(found[0])] = found
    except NotFinite:
        nodes, weights = np.full((2, num_vectors, num_steps), np.nan)
    return Density(nodes, weights, hessian.num_matvecs)


def _gauss_rule(
    hessian: FlatHessian, start: np.ndarray, num_steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the measure that H and the start define, at most num_steps of them."""
    basis = [start / np.linalg.norm(start)]
    diagonal, beside = list[float](), list[float]()
    for _ in range(min(num_steps, start.size)):
        product = hessian(basis[-1])
        diagonal.append(float(basis[-1] @ product))
        known = np.stack(basis)
        for _ in range(2):  # once loses digits where the rest is small
            product = product - known.T @ (known @ product)
        norm = float(np.linalg.norm(product))
        if norm <= _GONE * max(np.abs([*diagonal, *beside])):
            break
        beside.append(norm)
        basis.append(product / norm)
    values, vectors = eigh_tridiagonal(np.array(diagonal), np.array(beside[: len(diagonal) - 1]))
    return values, vectors[0] ** 2


def _at_least_one(value: int, name: str) -> None:
    if not (isinstance(value, int) and value >= 1):
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
