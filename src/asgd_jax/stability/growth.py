"""How fast delayed gradient descent leaves, or approaches, a minimum."""

import math
from typing import Unpack

import numpy as np

from asgd_jax.stability.arguments import (
    CRITERIA,
    Criterion,
    Delay,
    MethodOptions,
    Options,
    as_curvature_noise,
    as_delay,
    as_momentum,
    as_pmf,
    as_step,
    choose,
)
from asgd_jax.stability.characteristic import build_polynomial
from asgd_jax.stability.dominant_root import dominant_exponent
from asgd_jax.stability.mean_square import log_or_minus_inf, mean_square_radius
from asgd_jax.stability.schur_cohn import largest_modulus

# Above this degree the O(n^3) eigenvalues of the companion matrix take longer than fifty O(n^2)
# Schur-Cohn tests.
_DENSE_DEGREE = 150
_NO_GROWTH = 1e-14  # a growth a step that rounding of the roots can produce


def spectral_radius(delay: Delay, *, step: float, **options: Unpack[Options]) -> float:
    r"""Factor by which x grows in one step in the long run: the largest characteristic root.

    Constant delays (tested to $10^9$): a bracketed search along the branch of the dominant root,
    whose work does not depend on the delay. Random delays: eigenvalues of the companion matrix up
    to degree 150, beyond that a bisection of the Schur-Cohn test (a tenth of a second at a support
    of 1,024).

    Args:
      delay: int >= 0; or a mass function of shape (max_delay + 1,); or a DelayProcess with a pmf.
      step: h = learning rate x sharpness, >= 0.
      **options: momentum, kind and dampening, as in `max_learning_rate`; and criterion, "mean" for
        the growth of E[x], "mean_square" for that of the root mean square $\sqrt{E[x^2]}$. They
        agree for a constant delay without curvature_noise, which is as in `max_learning_rate`.

    Returns:
      The factor, >= 0; above 1 the minimum is unstable.

    Raises:
      ValueError: naming the bad argument.

    >>> spectral_radius(0, step=3.0), round(spectral_radius(1, step=1.0), 9)
    (2.0, 1.0)

    References:
      Giladi, Nacson, Hoffer, Soudry, "At Stability's Edge", ICLR 2020, eqs. 5, 11, 19, 25.
    """
    return math.exp(_log_radius(delay, step, **options))


def growth_time(delay: Delay, *, step: float, **options: Unpack[Options]) -> float:
    r"""Steps in which x grows by a factor e, $1 / \log \max |z|$.

    Just above the threshold this is long and grows with the delay: a run that looks for divergence
    needs a budget of several growth times, or it calls an unstable minimum stable.

    Args:
      delay, step, **options: as in `spectral_radius`.

    Returns:
      Steps (updates of the server) > 0; inf where the minimum is stable.

    Raises:
      ValueError: naming the bad argument.

    >>> from asgd_jax.stability.thresholds import max_learning_rate
    >>> [round(growth_time(delay, step=1.08 * max_learning_rate(delay)), 1) for delay in (0, 8, 32)]
    [6.7, 154.7, 592.4]
    >>> growth_time(0, step=1.0)
    inf
    """
    log_radius = _log_radius(delay, step, **options)
    return 1.0 / log_radius if log_radius > _NO_GROWTH else math.inf


def _log_radius(
    delay: Delay,
    step: float,
    criterion: Criterion = "mean",
    curvature_noise: float = 0.0,
    **method: Unpack[MethodOptions],
) -> float:
    """Logarithm of the spectral radius, accurate for the slow growth of large delays."""
    checked = as_momentum(**method)
    step = as_step(step)
    choose(criterion, CRITERIA, "criterion")
    noise = as_curvature_noise(curvature_noise, criterion)
    where = as_delay(delay)
    if isinstance(where, int) and not noise:
        return dominant_exponent(where, step, checked).real
    if criterion == "mean_square":
        return log_or_minus_inf(mean_square_radius(as_pmf(where), step, checked, noise))
    polynomial = build_polynomial(as_pmf(where), step, checked)
    if polynomial.size > _DENSE_DEGREE:
        return log_or_minus_inf(largest_modulus(polynomial))
    return log_or_minus_inf(float(abs(np.roots(polynomial)).max(initial=0.0)))
