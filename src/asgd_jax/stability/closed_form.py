"""The exact threshold of a constant delay, with and without momentum."""

import math

from scipy.optimize import brentq

from asgd_jax.stability.arguments import Momentum


def constant_threshold(delay: int, momentum: Momentum) -> float:
    r"""h* of a constant delay, from one bracketed scalar root.

    With $\theta = (\tau + 1/2)\omega$ both equations read $\cos\theta = m \cos\rho\theta$, where
    $\rho$ is $(2\tau - 1)/(2\tau + 1)$ for heavy ball and $1/(2\tau + 1)$ for shifted momentum. The
    ratio of the cosines falls from 1 to 0 on $(0, \pi/2]$, so there is exactly one root.
    Differences of cosines are written as products of sines, so that nothing cancels at a delay of a
    million or at m near 1.

    Args:
      delay: constant delay >= 0.
      momentum: checked momentum.

    Returns:
      h*, learning rate x sharpness at the edge.

    >>> round(constant_threshold(10**6, Momentum(0.0, False, 1.0)) * 10**6, 5)
    1.5708
    """
    m = momentum.value
    if delay == 0:
        return 2.0 * (1.0 + m) / momentum.gain
    width = 2.0 / (2 * delay + 1)
    ratio, gap = (width / 2.0, 1.0 - width / 2.0) if momentum.shifted else (1.0 - width, width)

    def excess(theta: float) -> float:
        product = math.sin((1.0 + ratio) * theta / 2.0) * math.sin(gap * theta / 2.0)
        return (1.0 - m) * math.cos(ratio * theta) - 2.0 * product

    theta = math.pi / 2.0
    if m > 0.0 and excess(theta) < 0.0:
        theta = brentq(excess, 0.0, theta, xtol=1e-16)
    if momentum.shifted:
        force = math.sin(theta) + m * math.sin(ratio * theta)
    else:
        difference = math.cos((1.0 + ratio) * theta / 2.0) * math.sin(gap * theta / 2.0)
        force = (1.0 - m) * math.sin(ratio * theta) + 2.0 * difference
    return 2.0 * math.sin(width * theta / 2.0) * force / momentum.gain
