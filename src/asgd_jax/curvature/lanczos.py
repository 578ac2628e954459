r"""Sharpness: the largest eigenvalue of the Hessian of the mean loss over a fixed set of batches.

Along a Hessian eigenvector of curvature $a$, SGD of learning rate $\eta$ near a minimum depends on
$h = \eta a$ alone, so the largest $a$ decides whether the minimum is stable. The Hessian is never
formed: jitted Hessian-vector products, summed over the batches, feed ARPACK's Lanczos iteration.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

from asgd_jax.curvature.flat_hessian import (
    FlatHessian,
    NotFinite,
    OutOfProducts,
    inverse_root,
    start_vector,
    unflatten,
)
from asgd_jax.curvature.hessian_vector import Batches, Loss, as_parameters, make_step

# ARPACK first looks at convergence after this many products + 1, and holds as many float64 vectors.
# SciPy's default of 20 costs 21 products where outlying eigenvalues, the rule in neural networks,
# have converged to 1e-8 after 13.
_LANCZOS_VECTORS = 12
_LAST_LANCZOS_VECTORS = 32


class Sharpness(NamedTuple):
    """The top of the Hessian's spectrum, and how far to trust it.

    Attributes:
      value: largest algebraic eigenvalue (negative when every curvature is), in units of loss per
        squared unit of the parameters; NaN where the loss or its Hessian is not finite.
      residual: absolute, the 2-norm of `H vector - value * vector`. Some eigenvalue of H lies this
        near `value`; the error is usually closer to residual**2 / (gap to the next eigenvalue).
      num_matvecs: products with the full Hessian, each one pass over all the batches.
      vector: the unit eigenvector, a pytree of the shapes and dtypes of `params`.
    """

    value: float
    residual: float
    num_matvecs: int
    vector: Any


def sharpness(
    loss_fn: Loss,
    params: Any,
    batches: Batches,
    *,
    tol: float = 1e-3,
    seed: int = 0,
    max_matvecs: int = 300,
    initial_vector: Any = None,
    preconditioner: Any = None,
) -> Sharpness:
    r"""Largest algebraic eigenvalue of the Hessian of the mean loss over a fixed set of batches.

    $\lambda_{\max}(\nabla^2 L(\theta))$ of $L(\theta) = \sum_i n_i L_i(\theta) / \sum_i n_i$, where
    $L_i$ is `loss_fn` on batch i and $n_i$ its number of examples: the exact mean over the data,
    also when the last batch is shorter.

    It compiles anew on every call; `make_sharpness` is for measuring again and again.

    Args:
      loss_fn: `loss_fn(params, batch)`, the scalar mean loss of one batch, pure.
      params: pytree of floating-point arrays. The loss sees exactly these dtypes: bfloat16
        leaves bring their rounding along (0.2 % of the value in a small network; float16 can
        underflow), so cast to float32 where that matters.
      batches: the batches, each any pytree whose first leaf has the examples along its leading axis
        (a batch without leaves counts as one example): a list, anything else that can be iterated
        many times, or a function of no arguments that returns a fresh iterator. Every pass must
        give the same batches in the same order; a checksum of every batch holds it to that.
      tol: relative accuracy of the eigenvalue, at which ARPACK stops. Not a bound on `residual`.
      seed: of the random starting vector.
      max_matvecs: at least 14. When so many products do not reach `tol`, the best estimate comes
        back all the same; `residual` says how good it is.
      initial_vector: pytree like `params` to start from, such as an earlier result's `vector`. One
        that is zero or not finite (a diverged result's) is ignored.
      preconditioner: pytree like `params`, the positive diagonal D of an adaptive optimizer
        (`adam_preconditioner`). The matrix is then $D^{-1/2} H D^{-1/2}$, whose largest eigenvalue
        takes the place of sharpness in every threshold while D stands still.

    Returns:
      A `Sharpness`. Divergence is a result, not an exception: where the loss or a product is not
      finite, `value`, `residual` and `vector` are NaN.

    Raises:
      ValueError: for batches that changed between passes or are a one-shot iterator, no batches, a
        parameter that is not floating point, or an option out of range.

    >>> import jax.numpy as jnp
    >>> curvatures = jnp.array([3.0, 1.0, -7.0])
    >>> result = sharpness(lambda p, batch: jnp.sum(curvatures * p**2) / 2, jnp.ones(3), [None])
    >>> round(result.value, 5), result.residual < 1e-5
    (3.0, True)

    Host memory: about fifteen float64 vectors of the parameters' size. Source: the paper's
    curvature $a$, for which eq. 5 and its kin state stability in terms of $h = \eta a$.
    """
    measure = make_sharpness(loss_fn, tol=tol, max_matvecs=max_matvecs)
    return measure(
        params, batches, seed=seed, initial_vector=initial_vector, preconditioner=preconditioner
    )


def make_sharpness(
    loss_fn: Loss, *, tol: float = 1e-3, max_matvecs: int = 300
) -> Callable[..., Sharpness]:
    """The function `measure(params, batches, *, seed=0, initial_vector=None, preconditioner=None)`.

    It compiles once for each shape of batch and never for new parameters, so it is the form for
    measuring along a training run, each time from the last `vector`:

    >>> import jax.numpy as jnp
    >>> measure = make_sharpness(lambda p, batch: jnp.mean(batch * jnp.cos(p["angle"])))
    >>> batches, vector = [jnp.ones(4), jnp.ones(2)], None
    >>> for angle in (3.0, 2.0):
    ...     result = measure({"angle": jnp.array(angle)}, batches, initial_vector=vector)
    ...     vector = result.vector
    ...     print(round(result.value, 3))
    0.99
    0.416

    Args, Returns, Raises: as for `sharpness`.
    """
    if not (math.isfinite(tol) and tol > 0):
        raise ValueError(f"tol must be a finite number > 0, got {tol!r}: 1e-3 is the default")
    if not max_matvecs >= _LANCZOS_VECTORS + 2:
        raise ValueError(f"max_matvecs is {max_matvecs}: pass at least {_LANCZOS_VECTORS + 2}")
    step = make_step(loss_fn)

    def measure(
        params: Any,
        batches: Batches,
        *,
        seed: int = 0,
        initial_vector: Any = None,
        preconditioner: Any = None,
    ) -> Sharpness:
        params = as_parameters(params)
        start = start_vector(params, seed, initial_vector)
        hessian = FlatHessian(step, params, batches, inverse_root(preconditioner, params))
        try:
            vector = _largest_eigenvector(hessian, start, tol, max_matvecs)
            product = hessian(vector)
        except NotFinite:
            vector = product = np.full_like(start, np.nan)
        value = float(vector @ product)
        residual = float(np.linalg.norm(product - value * vector))
        return Sharpness(value, residual, hessian.num_matvecs, unflatten(vector, params))

    return measure


def _largest_eigenvector(
    hessian: FlatHessian, start: np.ndarray, tol: float, max_matvecs: int
) -> np.ndarray:
    """ARPACK's unit vector; the last of `max_matvecs` products is left to the caller."""
    size = start.size
    if size <= _LANCZOS_VECTORS:
        # ARPACK wants more room than that, and the whole Hessian costs no more than its start.
        dense = np.stack([hessian(row) for row in np.eye(size)])
        return np.linalg.eigh((dense + dense.T) / 2)[1][:, -1]
    # ARPACK hands out no vector before it has converged, so a part of the budget stays back for a
    # second run, without restarts, that counts as converged whatever its accuracy.
    last = min(size, _LAST_LANCZOS_VECTORS, max(_LANCZOS_VECTORS, max_matvecs // 3))
    runs = (_LANCZOS_VECTORS, tol, max_matvecs - last - 2), (last, 1e30, max_matvecs - 1)
    operator = LinearOperator((size, size), matvec=hessian, dtype=np.float64)
    vector = start
    for num_vectors, tolerance, limit in runs:
        hessian.limit = limit
        options = {"ncv": num_vectors, "tol": tolerance, "maxiter": max_matvecs}
        # ARPACK refuses a Hessian of zero too, but any vector, hence `start`, is its eigenvector.
        with contextlib.suppress(OutOfProducts, ArpackError):
            vector = eigsh(operator, k=1, which="LA", v0=start, **options)[1][:, 0]
            break
    hessian.limit = max_matvecs
    return vector / np.linalg.norm(vector)
