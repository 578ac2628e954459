"""The largest stable learning rate, sharpness and delay."""

import bisect
import sys
from typing import Unpack

from asgd_jax.stability.arguments import (
    CRITERIA,
    Criterion,
    Delay,
    Kind,
    MethodOptions,
    Options,
    as_curvature_noise,
    as_delay,
    as_momentum,
    as_pmf,
    choose,
    is_trace,
    positive,
)
from asgd_jax.stability.boundary import random_delay_threshold
from asgd_jax.stability.closed_form import constant_threshold
from asgd_jax.stability.curvature_noise import noisy_constant_threshold
from asgd_jax.stability.lyapunov import lyapunov_max_learning_rate
from asgd_jax.stability.mean_square import mean_square_threshold


def max_learning_rate(
    delay: Delay,
    *,
    sharpness: float = 1.0,
    momentum: float = 0.0,
    kind: Kind = "heavy_ball",
    dampening: bool = True,
    criterion: Criterion = "mean",
    curvature_noise: float = 0.0,
) -> float:
    r"""The largest learning rate at which a minimum of this sharpness is stable under delay.

    $\eta_{max} = h^* / a$, where $h^*$ ends the interval of h, starting at 0, in which no root of
    the characteristic equation leaves the unit disc. A constant delay $\tau$ has closed forms:
    without momentum $h^* = 2 \sin(\pi / (2(2\tau + 1)))$, and with momentum m one scalar equation
    in the angle $\omega$ of the critical root,

    $$\cos((\tau + 1/2)\omega) = m \cos((\tau - 1/2)\omega) \quad \text{(heavy ball)},$$
    $$\cos((\tau + 1/2)\omega) = m \cos(\omega / 2) \quad \text{(shifted)}.$$

    With mini-batches every update meets a curvature $a (1 + \xi)$ of its own, with independent
    $\xi$ of mean 0 and variance c, the curvature noise; the mean does not see it, the mean square
    does: without momentum the edge of a constant delay is $h = 2 \sin(\omega/2)$ where
    $\tan((\pi - (2\tau + 1)\omega)/4) = c \tan(\omega/2)$ (derived in `curvature_noise.py`).

    Args:
      delay: int >= 0; or a mass function of shape (max_delay + 1,), for staleness drawn afresh at
        every update; or a DelayProcess. For a recorded trace there is nothing to average: the
        threshold is where the trajectory itself stops shrinking, whatever the criterion
        (`lyapunov_max_learning_rate` with its default settings, a Monte-Carlo estimate).
      sharpness: largest eigenvalue of the Hessian, > 0.
      momentum: coefficient m in [0, 1).
      kind: "heavy_ball" (standard momentum) or "shifted" (momentum as stale as the gradient).
      dampening: whether the gradient enters the momentum with the factor 1 - m.
      criterion: "mean": E[x] stays bounded; "mean_square": E[x^2] does, the stricter one and the
        one to act on when delays are random. They agree for a constant delay, unless the
        curvature is noisy.
      curvature_noise: c >= 0, the variance of the curvature along the eigenvector that one update
        sees, in units of its mean squared: that of single samples divided by the batch size. It
        needs criterion "mean_square", and no recorded trace. With momentum or random delays the
        work is O(max_delay^2).

    Returns:
      The learning rate, a float.

    Raises:
      ValueError: naming the bad argument.

    >>> round(max_learning_rate(32), 7)
    0.0483275
    >>> round(max_learning_rate(32, sharpness=20.0, momentum=0.9, kind="shifted"), 6)
    0.003069
    >>> round(max_learning_rate([0, 0.5, 0.5], criterion="mean_square"), 4)
    0.7639
    >>> round(max_learning_rate(1, criterion="mean_square", curvature_noise=1.0), 4)
    0.618

    References:
      Giladi, Nacson, Hoffer, Soudry, "At Stability's Edge", ICLR 2020, eqs. 5, 11, 19, 25.
    """
    sharpness = positive(sharpness, "sharpness")
    checked = as_momentum(momentum, kind, dampening)
    choose(criterion, CRITERIA, "criterion")
    noise = as_curvature_noise(curvature_noise, criterion)
    if is_trace(delay):
        if noise:
            raise ValueError(
                f"curvature_noise={curvature_noise!r} is not known for a recorded trace: "
                "pass the pmf of its values"
            )
        method = MethodOptions(momentum=momentum, kind=kind, dampening=dampening)
        return lyapunov_max_learning_rate(delay, sharpness=sharpness, **method).value
    where = as_delay(delay)
    if isinstance(where, int):
        if noise and not checked.value:
            return noisy_constant_threshold(where, noise) / sharpness
        threshold = constant_threshold(where, checked)
    else:
        threshold = random_delay_threshold(where, checked)
    if noise or (criterion == "mean_square" and not isinstance(where, int)):
        threshold = mean_square_threshold(as_pmf(where), checked, threshold, noise)
    return threshold / sharpness


def max_sharpness(
    learning_rate: float,
    delay: Delay,
    **options: Unpack[Options],
) -> float:
    r"""The sharpest minimum that is stable at this learning rate, $h^* / \eta$.

    Args:
      learning_rate: > 0.
      delay: as in `max_learning_rate`.
      **options: momentum, kind, dampening, criterion and curvature_noise, as in
        `max_learning_rate`.

    Raises:
      ValueError: naming the bad argument.

    >>> max_sharpness(0.1, 0), round(max_sharpness(0.1, 8), 4)
    (20.0, 1.8454)
    """
    return max_learning_rate(delay, sharpness=positive(learning_rate, "learning_rate"), **options)


def max_delay(
    learning_rate: float,
    *,
    sharpness: float = 1.0,
    **method: Unpack[MethodOptions],
) -> int | None:
    """The largest constant delay at which this learning rate is stable.

    The threshold falls with the delay, so a bisection over integers finds it.

    Args:
      learning_rate: > 0.
      sharpness: as in `max_learning_rate`.
      **method: momentum, kind and dampening, as in `max_learning_rate`.

    Returns:
      The delay, or None where the learning rate is too large even without delay.

    Raises:
      ValueError: naming the bad argument.

    >>> max_delay(0.05), max_delay(0.04), max_delay(3.0)
    (30, 38, None)
    """
    step = positive(learning_rate, "learning_rate") * positive(sharpness, "sharpness")
    checked = as_momentum(**method)

    def ascending(delay: int) -> float:
        return -constant_threshold(delay, checked)

    number_stable = bisect.bisect_right(range(sys.maxsize), -step, key=ascending)
    return number_stable - 1 if number_stable else None
