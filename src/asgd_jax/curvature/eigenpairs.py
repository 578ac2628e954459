r"""The top of the Hessian's spectrum: eigenvalues, with their vectors parameter by parameter."""

from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from asgd_jax.curvature.flat_hessian import FlatHessian, NotFinite, inverse_root, start_vector
from asgd_jax.curvature.hessian_vector import Batches, Loss, as_parameters, make_step

_ROOM = 2  # Lanczos vectors a wanted one, beside a few more: ARPACK's own choice
_FEWEST_VECTORS = 20


class Eigenpairs(NamedTuple):
    """The largest eigenvalues of a Hessian H.

    Attributes:
      values: float64 (k,), falling, in units of loss per squared unit of the parameters; NaN where
        the loss or its Hessian is not finite.
      vectors: pytree like `params` with an axis of k in front of every leaf, the orthonormal
        eigenvectors in float64.
      residuals: float64 (k,), the 2-norms of `H vector - value * vector`: some eigenvalue of H lies
        this near each value. None where they are not known.
      num_matvecs: products with the full Hessian, each one pass over all the batches.
    """

    values: np.ndarray
    vectors: Any
    residuals: np.ndarray | None = None
    num_matvecs: int = 0


def eigenpairs(
    loss_fn: Loss,
    params: Any,
    batches: Batches,
    k: int,
    *,
    tol: float = 1e-3,
    seed: int = 0,
    preconditioner: Any = None,
) -> Eigenpairs:
    r"""The k largest algebraic eigenvalues of the Hessian of the mean loss, and their vectors.

    $\nabla^2 L(\theta) = U \Lambda U^T$ by ARPACK's Lanczos iteration on Hessian-vector products.
    `stability.stages_max_learning_rate` takes the result where delays differ by parameter.

    Args:
      loss_fn, params, batches, preconditioner: as for `sharpness`; `loss_fn` may be a
        `GaussNewton`.
      k: int >= 1, at most the number of parameters.
      tol: relative accuracy of the eigenvalues, at which ARPACK stops.
      seed: of the random starting vector.

    Raises:
      ValueError: as `sharpness` does; for a k out of range; where ARPACK does not converge.

    >>> import jax.numpy as jnp
    >>> curvatures = jnp.array([3.0, 1.0, 7.0])
    >>> found = eigenpairs(lambda p, batch: jnp.sum(curvatures * p**2) / 2, jnp.ones(3), [None], 2)
    >>> found.values.round(4), abs(found.vectors).round(4)
    (array([7., 3.]), array([[0., 0., 1.],
           [1., 0., 0.]]))
    """
    params = as_parameters(params)
    start = start_vector(params, seed, None)
    size = start.size
    if not (isinstance(k, int) and 1 <= k <= size):
        raise ValueError(f"k must be an integer from 1 to the {size} parameters, got {k!r}")
    hessian = FlatHessian(make_step(loss_fn), params, batches, inverse_root(preconditioner, params))
    try:
        vectors = _top_vectors(hessian, start, k, tol)
        products = np.stack([hessian(vector) for vector in vectors])
    except NotFinite:
        vectors = products = np.full((k, size), np.nan)
    values = np.sum(vectors * products, axis=1)
    residuals = np.linalg.norm(products - values[:, None] * vectors, axis=1)
    return Eigenpairs(values, _in_leaves(vectors, params), residuals, hessian.num_matvecs)


def _top_vectors(hessian: FlatHessian, start: np.ndarray, k: int, tol: float) -> np.ndarray:
    """Orthonormal eigenvectors of the k largest eigenvalues, falling, shape (k, n)."""
    size = start.size
    room = max(_ROOM * k + 1, _FEWEST_VECTORS)
    if size <= room:
        dense = np.stack([hessian(row) for row in np.eye(size)])
        return np.linalg.eigh((dense + dense.T) / 2)[1][:, ::-1][:, :k].T
    operator = LinearOperator((size, size), matvec=hessian, dtype=np.float64)
    try:
        values, vectors = eigsh(operator, k=k, which="LA", v0=start, ncv=room, tol=tol)
    except ArpackNoConvergence as error:
        raise ValueError(
            f"of {k} eigenvalues {len(error.eigenvalues)} converged to tol={tol:g} in "
            f"{hessian.num_matvecs} products: ask for fewer, or raise tol"
        ) from error
    return vectors[:, np.argsort(values)[::-1]].T


def _in_leaves(vectors: np.ndarray, params: Any) -> Any:
    """Rows of all parameters as a pytree, the rows along the first axis of every leaf."""
    leaves, structure = jax.tree.flatten(params)
    parts = np.split(vectors, np.cumsum([leaf.size for leaf in leaves])[:-1], axis=1)
    shaped = [
        part.reshape(len(vectors), *leaf.shape) for part, leaf in zip(parts, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, shaped)
