r"""Mean-square stability under random delays: whether E[x^2] stays bounded.

The second moments S of the last few iterates follow $S \mapsto \sum_k p_k A_k S A_k^T$, where $A_k$
is the companion matrix of staleness k: a linear map on matrices of size max_delay. Its spectral
radius needs no matrix at all. Split the step into its mean and a rest of zero mean,

$$x_{n+1} = -\sum_i c_i x_{n-i} + \epsilon_{n+1},$$

so x is an autoregression with the characteristic polynomial F of the mean. Its noise is white,
because k is drawn afresh, and the variance of the noise is a linear function of the covariance of
x. Feeding unit noise through once gives the *noise gain*

$$\phi = \frac{1}{2\pi} \int \frac{|f|^2 (1 - |q|^2)}{|F|^2} d\omega, \quad
f = g h \text{ (heavy ball)}, \quad f = m - g h - m / z \text{ (shifted)},$$

and E[x^2] is bounded if and only if the mean is stable and $\phi < 1$ (J. L. Willems and
G. L. Blankenship, IEEE Transactions on Automatic Control, 1971). The integral is a combination of
autocovariances, which the Levinson recursion gives exactly, in O(max_delay^2).

Mini-batches are a second source of white noise: each update meets a curvature $a (1 + \xi_n)$ of
its own, with independent $\xi_n$ of mean 0 and variance c. The map gains
$c \sum_k p_k B_k S B_k^T$, where $B_k$ holds nothing but $g h$ at the entry that reads $x_{n-k}$;
the mean is what it was, and the noise gain is

$$\phi_c = \phi + c\, (g h)^2\, \frac{1}{2\pi} \int \frac{d\omega}{|F|^2}.$$

For a constant delay $\phi = 0$, and the edge is where c times the variance of an autoregression is
1: that of the curvature noise alone. `curvature_noise.py` has it in closed form without momentum.
"""

import math

import numpy as np

from asgd_jax.stability.arguments import Momentum
from asgd_jax.stability.characteristic import build_polynomial
from asgd_jax.stability.root_finding import first_root, increasing_root
from asgd_jax.stability.schur_cohn import autocovariance

_STEPS_PER_OCTAVE = 8
_TOLERANCE = 1e-12  # relative, of the threshold and of the logarithm of the radius
_LOWEST = -600.0  # logarithm of a radius that counts as zero; exp of it is still a normal float


def noise_gain(
    pmf: np.ndarray,
    step: float,
    momentum: Momentum,
    growth: float = 1.0,
    curvature_noise: float = 0.0,
) -> float:
    r"""The variance that unit noise feeds back into the noise of the next step.

    Args:
      pmf: float64 array of shape (max_delay + 1,), of sum 1.
      step: h = learning rate x sharpness >= 0.
      momentum: checked momentum.
      growth: measure $x_n / growth^n$ instead of x_n; the gain falls as it grows.
      curvature_noise: c >= 0, relative variance of the curvature that one update sees.

    Returns:
      The gain, inf where the mean grows at least as fast as growth^n.

    >>> round(noise_gain(np.array([0.5, 0.5]), 1.0, Momentum(0.0, False, 1.0)), 6)
    0.5
    """
    polynomial = build_polynomial(pmf, step, momentum)
    with np.errstate(over="ignore", invalid="ignore"):
        powers = growth ** -np.arange(pmf.size + 2.0)
        covariance = autocovariance(polynomial * powers[: polynomial.size])
    if covariance is None:
        return math.inf
    taps = pmf * powers[1:-1]
    correlation = np.correlate(taps, taps, "full")
    second_moment = float(pmf @ powers[1:-1] ** 2)

    def residual(lag: int) -> float:
        lags = abs(lag - np.arange(1 - pmf.size, pmf.size))
        return second_moment * float(covariance[lag]) - float(correlation @ covariance[lags])

    m, force = momentum.value, momentum.gain * step
    batches = curvature_noise * force**2 * second_moment * float(covariance[0])
    if not momentum.shifted:
        return force**2 * residual(0) + batches
    now, before = m - force, m / growth
    return (now**2 + before**2) * residual(0) - 2.0 * now * before * residual(1) + batches


def mean_square_radius(
    pmf: np.ndarray, step: float, momentum: Momentum, curvature_noise: float = 0.0
) -> float:
    r"""Growth of the root mean square of x in one step.

    It is $\sqrt{\rho}$, with the spectral radius of the map of second moments.
    The map keeps positive matrices positive, so its spectral radius is an eigenvalue, and it is the
    only value of growth^2 at which the noise gain is 1.

    >>> round(mean_square_radius(np.array([0.5, 0.5]), 0.1, Momentum(0.0, False, 1.0)), 5)
    0.8941
    """
    if step == 0.0:
        return 1.0

    def log_loss(log_growth: float) -> float:
        gain = noise_gain(pmf, step, momentum, math.exp(log_growth), curvature_noise)
        return -log_or_minus_inf(gain)

    width = 1.0 / pmf.size
    log_radius = increasing_root(log_loss, width, xtol=_TOLERANCE * width, lowest=_LOWEST)
    return math.exp(log_radius)


def mean_square_threshold(
    pmf: np.ndarray, momentum: Momentum, mean_threshold: float, curvature_noise: float = 0.0
) -> float:
    """The step at which the noise gain first reaches 1; at most the threshold of the mean.

    Brackets the first crossing on a geometric grid of eight steps an octave, from a step at which
    even the most stale gradient is harmless, and closes the bracket to a relative 1e-12.

    >>> round(mean_square_threshold(np.array([0, 0.5, 0.5]), Momentum(0.0, False, 1.0), 0.8284), 4)
    0.7639
    """

    def log_gain(step: float) -> float:
        gain = noise_gain(pmf, step, momentum, curvature_noise=curvature_noise)
        return log_or_minus_inf(gain)

    low = min(mean_threshold, (1.0 - momentum.value) / (2.0 * pmf.size * momentum.gain)) / 2.0
    while log_gain(low) >= 0.0:
        low /= 2.0
    edge = mean_threshold * (1.0 - 1e-9)
    cells = max(1, math.ceil(_STEPS_PER_OCTAVE * math.log2(edge / low)))
    grid = np.minimum(np.geomspace(low, edge, cells + 1), edge).tolist()
    return first_root(log_gain, grid, rtol=_TOLERANCE) or mean_threshold


def log_or_minus_inf(gain: float) -> float:
    """The logarithm, -inf at zero."""
    return math.log(gain) if gain > 0.0 else -math.inf
