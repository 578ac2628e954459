"""The Schur-Cohn recursion: whether all roots lie inside a circle, without finding any."""

import math

import numpy as np

from asgd_jax.stability.root_finding import increasing_root


def roots_inside(polynomial: np.ndarray, radius: float = 1.0) -> bool:
    r"""Whether all roots of a monic real polynomial have modulus < radius.

    The step-down (Levinson) recursion takes the last coefficient as $k_n$ and lowers the degree:
    $a_j \leftarrow (a_j - k_n a_{n-j}) / (1 - k_n^2)$. All roots lie inside the unit circle if and
    only if every |k| < 1. The work is O(n^2).

    >>> roots_inside(np.array([1.0, -0.5])), roots_inside(np.array([1.0, -0.5]), radius=0.4)
    (True, False)
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return _step_down(_rescale(polynomial, radius)) is not None


def autocovariance(polynomial: np.ndarray) -> np.ndarray | None:
    r"""Autocovariance of the autoregression that a monic polynomial defines, driven by unit noise.

    $x_n + \sum_i a_i x_{n-i} = \epsilon_n$ with white noise of variance 1. Levinson's recursion,
    run upwards from the reflection coefficients: exact up to rounding, however close to the unit
    circle the roots are, where a quadrature over frequencies would need ever more points.

    Args:
      polynomial: float64 array of shape (n + 1,), first entry 1.

    Returns:
      float64 array of shape (n + 1,), entry j is E[x_t x_{t-j}]; None for an unstable process.

    >>> autocovariance(np.array([1.0, -0.5]))
    array([1.33333333, 0.66666667])
    """
    lower = _step_down(polynomial)
    if lower is None:
        return None
    error = 1.0 / math.prod((1.0 - row[-1]) * (1.0 + row[-1]) for row in lower)
    covariance = np.zeros(len(polynomial))
    covariance[0] = error
    previous = np.zeros(0)
    for j, row in enumerate(lower, start=1):
        past = covariance[j - 1 : 0 : -1]
        covariance[j] = -float(previous @ past) - row[-1] * error
        error *= (1.0 - row[-1]) * (1.0 + row[-1])
        previous = row
    return covariance


def largest_modulus(polynomial: np.ndarray) -> float:
    """Modulus of the largest root of a monic real polynomial, by bisection of `roots_inside`.

    Relative accuracy 1e-13 while the roots are simple; O(n^2) for each of some fifty bisections,
    where the eigenvalues of the companion matrix would take O(n^3).

    >>> round(largest_modulus(np.array([1.0, -0.5, 0.25])), 9)
    0.5
    """
    degree = len(polynomial) - 1
    # Large polynomials of delays have nearly all roots within a few 1/degree of the unit circle.
    return math.exp(
        increasing_root(
            lambda log_radius: 1.0 if roots_inside(polynomial, math.exp(log_radius)) else -1.0,
            1.0 / degree,
            xtol=1e-13,
            lowest=-700.0,
        )
    )


def _step_down(polynomial: np.ndarray) -> list[np.ndarray] | None:
    """The tails of the polynomials of degree 1, ..., n, or None as soon as one |k| >= 1."""
    rows = []
    row = np.asarray(polynomial, dtype=np.float64)[1:]
    while row.size:
        k = float(row[-1])
        if not abs(k) < 1.0:
            return None
        rows.append(row)
        inner = row[:-1]
        row = (inner - k * inner[::-1]) / ((1.0 - k) * (1.0 + k))
    return rows[::-1]


def _rescale(polynomial: np.ndarray, radius: float) -> np.ndarray:
    """The monic polynomial whose roots are those of `polynomial` divided by `radius`."""
    return polynomial * np.exp(-math.log(radius) * np.arange(len(polynomial)))
