r"""The largest stable learning rate where every parameter has a delay of its own.

In an asynchronous pipeline the leaf l of the parameters is read $\tau_l$ updates old. Near a
minimum with Hessian H the linearised recursion has the modes $z^t$ with

$$\det\left(\frac{z - 1}{F(z)} I + \eta H D(z)\right) = 0, \qquad D(z) = diag(z^{-\tau_l}),$$

where $F(z) = (1 - d) z / (z - m)$ is heavy ball and F = 1 no momentum. The minimum is at its edge
where a root lies on the unit circle: $\eta \mu = (1 - z) / F(z)$ with $\mu$ an eigenvalue of
$H D(z)$.
"""

import itertools
import math
from typing import Any

import jax
import numpy as np
from scipy.optimize import brentq, linear_sum_assignment

from asgd_jax.stability.arguments import as_momentum, positive
from asgd_jax.transforms.leaf_delays import check_integers

_POINTS = 1024  # on half the unit circle, at least; and so many a turn of the largest delay
_POINTS_PER_TURN = 64
_NEGLIGIBLE = 1e-12  # of the largest eigenvalue
_SYMMETRIC = 1e-6  # of the largest entry
_TOUCHING = 1e-9  # relative imaginary part at which a branch counts as real


def stages_max_learning_rate(
    hessian: Any, delays: Any, *, momentum: float = 0.0, dampening: bool = True
) -> float:
    r"""The largest learning rate that keeps a minimum stable under delays that differ by parameter.

    $$\eta_{max} = \min \{\eta > 0 : \eta \mu_i(z) = (1 - z) / F(z),\ z = e^{i w},\
      0 < w \le \pi\}$$

    over the eigenvalues $\mu_i$ of $H D(z)$. With the eigenpairs $U \Lambda U^T$ of H, those are
    the eigenvalues of $\Lambda \sum_l z^{-\tau_l} U_l^T U_l$, a small matrix for the top few. With
    equal delays it is $h^*(\tau) / a$; otherwise it is no function of the sharpness a alone.

    Args:
      hessian: a dense symmetric array of shape (n, n); or `curvature.Eigenpairs` (values of shape
        (k,), vectors a pytree with an axis of k first) of the largest eigenvalues. Directions
        without curvature, or of negative one, are left out: no rate keeps the latter.
      delays: for an array n integers >= 0; for eigenpairs a pytree of them like `vectors`, or a
        prefix of one (an int for a whole subtree).
      momentum: m in [0, 1), of heavy ball.
      dampening: whether gradients are scaled by 1 - m, as in `max_learning_rate`.

    Returns:
      The learning rate, a float.

    Raises:
      ValueError: naming the bad argument; for a Hessian without positive curvature.

    >>> hessian = [[2.0, 0.5], [0.5, 1.0]]
    >>> round(stages_max_learning_rate(hessian, [3, 0]), 6)
    0.234648
    >>> from asgd_jax.stability import max_learning_rate
    >>> equal = stages_max_learning_rate(hessian, [3, 3])
    >>> round(equal * float(np.linalg.eigvalsh(hessian)[-1]) / max_learning_rate(3), 6)
    1.0

    References:
      The scalar case: Giladi et al., "At Stability's Edge", ICLR 2020, eq. 5 and 6.
    """
    checked = as_momentum(momentum=momentum, kind="heavy_ball", dampening=dampening)
    values, groups = _by_delay(hessian, delays)
    longest = max(groups)

    def quotients(w: float) -> np.ndarray:
        """(1 - z) / (F(z) mu_i): a learning rate where it is real and positive."""
        z = np.exp(1j * w)
        matrix = values[:, None] * sum(z**-delay * gram for delay, gram in groups.items())
        mu = np.linalg.eigvals(matrix)
        mu = mu[np.abs(mu) > _NEGLIGIBLE * values.max()]
        return (1.0 - z) * (z - checked.value) / (checked.gain * z * mu)

    count = max(_POINTS, math.ceil(_POINTS_PER_TURN * (longest + 1)))
    # Denser near 0, where large delays with momentum have their edge.
    places = math.pi * (np.arange(1, count + 1) / count) ** 2
    return _first_real(quotients, places)


def stages_spectral_radius(
    hessian: Any,
    delays: Any,
    *,
    learning_rate: float,
    momentum: float = 0.0,
    dampening: bool = True,
) -> float:
    r"""Factor by which the distance to a minimum grows in an update, under delays by parameter.

    The largest eigenvalue of the companion matrix of $s_d \leftarrow s_d - \eta v_d$,
    $v_d \leftarrow m v_d + g B_d^T \sum_{d'} B_{d'} s_{d'}$ with $s_{d'}$ of d' updates ago, a
    block for each delay d and each of its past values, where $B_d B_d^T = \Lambda^{1/2} U_d^T U_d
    \Lambda^{1/2}$: the parameters in as many coordinates as the curvature moves.

    Args:
      learning_rate: > 0.
      hessian, delays, momentum, dampening: as of `stages_max_learning_rate`.

    Returns:
      The factor, >= 0; above 1 the minimum is unstable.

    Raises:
      ValueError: as `stages_max_learning_rate` does.

    >>> hessian = [[2.0, 0.5], [0.5, 1.0]]
    >>> edge = stages_max_learning_rate(hessian, [3, 0])
    >>> round(stages_spectral_radius(hessian, [3, 0], learning_rate=edge), 6)
    1.0
    """
    rate = positive(learning_rate, "learning_rate")
    checked = as_momentum(momentum=momentum, kind="heavy_ball", dampening=dampening)
    values, groups = _by_delay(hessian, delays)
    root = np.sqrt(values)
    factors = {delay: _factor(root[:, None] * gram * root) for delay, gram in groups.items()}
    # For each delay: the velocity, then s of now, of one update ago, ... as many as it needs.
    starts, total = {}, 0
    for delay, factor in factors.items():
        starts[delay] = total
        total += (delay + 2) * factor.shape[1]
    matrix = np.zeros((total, total))

    def block(delay: int, number: int) -> slice:
        size = factors[delay].shape[1]
        return slice(starts[delay] + number * size, starts[delay] + (number + 1) * size)

    for delay, factor in factors.items():
        eye = np.eye(factor.shape[1])
        velocity, now = block(delay, 0), block(delay, 1)
        matrix[velocity, velocity] = checked.value * eye
        for other, its_factor in factors.items():
            matrix[velocity, block(other, 1 + other)] += checked.gain * factor.T @ its_factor
        matrix[now] = -rate * matrix[velocity]
        matrix[now, now] += eye
        for age in range(delay):
            matrix[block(delay, 2 + age), block(delay, 1 + age)] = eye
    return float(np.abs(np.linalg.eigvals(matrix)).max())


def _factor(gram: np.ndarray) -> np.ndarray:
    """Returns B with B B^T the matrix, of as many columns as its rank."""
    values, vectors = np.linalg.eigh(gram)
    kept = values > _NEGLIGIBLE * max(values.max(), 0.0)
    factor: np.ndarray = vectors[:, kept] * np.sqrt(values[kept])
    return factor


def _first_real(quotients: Any, places: np.ndarray) -> float:
    """The smallest positive real value on the branches of a set of complex functions of w."""
    smallest = math.inf
    before = quotients(places[0])
    for left, right in itertools.pairwise(places):
        after = quotients(right)
        if len(after) != len(before):  # a branch comes from infinity
            before = after
            continue
        # Branches are told apart by how far they move, in the logarithm: sizes differ widely.
        distance = np.abs(np.log(after[None, :] / before[:, None]))
        rows, columns = linear_sum_assignment(distance)
        after = after[columns[np.argsort(rows)]]
        crosses = (before.imag * after.imag <= 0.0) & ((before.real > 0.0) | (after.real > 0.0))
        for start, end in zip(before[crosses], after[crosses], strict=True):
            # Beyond the smallest so far it does not matter; nor does a branch that jumps.
            if min(abs(start), abs(end)) < smallest:
                smallest = min(smallest, _crossing(quotients, left, right, start, end))
        before = after
    last = before[(np.abs(before.imag) <= _TOUCHING * np.abs(before)) & (before.real > 0.0)]
    return float(min(smallest, last.real.min(initial=math.inf)))


def _crossing(quotients: Any, left: float, right: float, start: complex, end: complex) -> float:
    """Where a branch between two places is real, its value there; infinity if it is negative."""

    def on_branch(w: float) -> complex:
        share = (w - left) / (right - left)
        guess = start * (end / start) ** share
        found = quotients(w)
        return complex(found[np.argmin(np.abs(np.log(found / guess)))])

    if start.imag == 0.0 or end.imag == 0.0:
        value = start if start.imag == 0.0 else end
        return value.real if value.real > 0.0 else math.inf
    try:
        w = brentq(lambda w: on_branch(w).imag, left, right, xtol=1e-15, rtol=1e-14)
    except ValueError:  # the ends are of different branches: no crossing between them
        return math.inf
    value = on_branch(w)
    real = abs(value.imag) <= 1e-6 * abs(value)
    return value.real if real and value.real > 0.0 else math.inf


def _by_delay(hessian: Any, delays: Any) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Positive eigenvalues (k,), and for each delay the Gram matrix (k, k) of its parameters."""
    if hasattr(hessian, "values") and hasattr(hessian, "vectors"):
        values = np.asarray(hessian.values, np.float64)
        leaves = jax.tree.leaves(hessian.vectors)
        each = _broadcast(delays, hessian.vectors)
        rows = [np.asarray(leaf, np.float64).reshape(len(values), -1) for leaf in leaves]
    else:
        values, each, rows = _of_dense(hessian, delays)
    if not np.isfinite(values).all():
        raise ValueError("hessian holds an entry that is not finite: a diverged run has no minimum")
    kept = values > _NEGLIGIBLE * np.abs(values).max(initial=0.0)
    if not kept.any():
        raise ValueError("hessian has no positive eigenvalue: every learning rate is stable")
    groups: dict[int, np.ndarray] = {}
    for delay, row in zip(each, rows, strict=True):
        gram = row[kept] @ row[kept].T
        groups[delay] = groups.get(delay, 0.0) + gram
    return values[kept], groups


def _of_dense(hessian: Any, delays: Any) -> tuple[np.ndarray, list[int], list[np.ndarray]]:
    matrix = np.asarray(hessian, np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(
            f"hessian must be a square array or curvature.Eigenpairs, got shape {matrix.shape}"
        )
    if not np.isfinite(matrix).all():
        raise ValueError("hessian holds an entry that is not finite: a diverged run has no minimum")
    off = np.abs(matrix - matrix.T).max(initial=0.0)
    if off > _SYMMETRIC * np.abs(matrix).max(initial=0.0):
        raise ValueError(f"hessian must be symmetric: it differs from its transpose by {off:.3g}")
    given = delays.tolist() if isinstance(delays, np.ndarray) else list(delays)
    each: list[int] = check_integers(given, "delays")
    if len(each) != len(matrix):
        raise ValueError(
            f"delays must have an integer for each of the {len(matrix)} rows of hessian, got "
            f"{len(each)}"
        )
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2.0)
    return values, each, [row[:, None] for row in vectors]


def _broadcast(delays: Any, tree: Any) -> list[int]:
    """A delay for each leaf, of a pytree of integers that may be a prefix."""
    try:
        spread = jax.tree.broadcast(delays, tree)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"delays must be a pytree like hessian.vectors, or a prefix of it: {reason}"
        ) from error
    each: list[int] = jax.tree.leaves(check_integers(spread, "delays"))
    return each
