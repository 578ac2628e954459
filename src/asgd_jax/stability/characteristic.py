"""The characteristic polynomial of delayed gradient descent on a quadratic."""

from typing import Unpack

import numpy as np

from asgd_jax.stability.arguments import (
    Delay,
    MethodOptions,
    Momentum,
    as_delay,
    as_momentum,
    as_pmf,
    as_step,
)


def characteristic_polynomial(
    delay: Delay, *, step: float, **method: Unpack[MethodOptions]
) -> np.ndarray:
    r"""Coefficients of the characteristic polynomial, highest degree first.

    On the quadratic $a x^2 / 2$, with $h = \eta a$, staleness k of probability $p_k$ (independent
    from step to step), $q(z) = \sum_k p_k z^{-k}$ and $g = 1 - m$ with dampening, else 1, the
    expectation of x grows like $z^n$ where

    $$(z - 1)(1 - m / z) + g h q(z) = 0 \quad \text{(heavy ball)},$$
    $$(z - 1)(1 - m q(z) / z) + g h q(z) = 0 \quad \text{(shifted)}.$$

    Shifted momentum reads its buffer as late as its gradient, $v_{n+1} = m v_{n-k} + g a x_{n-k}$
    with one k for both. As k is independent of the past and $\eta v_n = x_{n-1} - x_n$, the mean
    of x alone is a closed linear recursion for random k too. For a constant delay this is eq. 5
    (m = 0), 25 (heavy ball) and 11 (shifted), for random delays and m = 0 eq. 19 of the paper.

    Args:
      delay: int >= 0; or a mass function of shape (max_delay + 1,); or a DelayProcess with a pmf.
      step: h = learning rate x sharpness, >= 0.
      **method: momentum, kind and dampening, as in `max_learning_rate`.

    Returns:
      float64 array, as `numpy.roots` takes it: shape (max_delay + 2,) without momentum;
      (max(max_delay, 1) + 2,) for heavy ball; (max_delay + 3,) for shifted momentum.

    Raises:
      ValueError: naming the bad argument.

    >>> characteristic_polynomial(2, step=0.5)
    array([ 1. , -1. ,  0. ,  0.5])
    >>> characteristic_polynomial([0.5, 0.5], step=0.5)
    array([ 1.  , -0.75,  0.25])

    References:
      Giladi, Nacson, Hoffer, Soudry, "At Stability's Edge", ICLR 2020, eqs. 5, 11, 19, 25.
    """
    checked = as_momentum(**method)
    return build_polynomial(as_pmf(as_delay(delay)), as_step(step), checked)


def build_polynomial(pmf: np.ndarray, step: float, momentum: Momentum) -> np.ndarray:
    """The polynomial of checked arguments: its tail -c_i is the mean recursion of x_{n+1}."""
    m, taps = momentum.value, pmf.size
    if momentum.shifted:
        polynomial = np.zeros(taps + 2)
        polynomial[:2] = 1.0, -1.0
        polynomial[1 : taps + 1] -= m * pmf
        polynomial[2 : taps + 2] += m * pmf
    else:
        polynomial = np.zeros(max(taps + 1, 3 if m else 2))
        polynomial[:2] = 1.0, -(1.0 + m)
        polynomial[2:3] = m
    polynomial[1 : taps + 1] += momentum.gain * step * pmf
    return polynomial
