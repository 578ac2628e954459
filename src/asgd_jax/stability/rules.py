"""Learning rates for a delayed run, from one that works without delay (eq. 8 of the paper)."""

import math
from typing import Unpack

import numpy as np

from asgd_jax.stability.arguments import (
    Delay,
    Options,
    as_delay,
    choose,
    is_trace,
    positive,
)
from asgd_jax.stability.lyapunov import draw_staleness
from asgd_jax.stability.thresholds import max_learning_rate

RULES = ("inverse", "exact", "sqrt", "none")


def rescale_learning_rate(
    learning_rate: float,
    delay: Delay,
    *,
    rule: str = "inverse",
    **options: Unpack[Options],
) -> float:
    r"""The learning rate under delay that corresponds to `learning_rate` without delay.

    With mean delay $\tau$ and thresholds $h^*$ of `max_learning_rate`:

    * inverse: $\eta_0 / \tau$, and $\eta_0$ at $\tau \le 1$, the rule of the paper's experiments;
    * exact: $\eta_0 h^*(\tau) / h^*(0)$, which keeps exactly the same minima stable; without
      momentum it is $\eta_0 \sin(\pi / (2(2\tau + 1)))$, at large delays 21 % below `inverse`;
    * sqrt: $\eta_0 / \sqrt\tau$, which is too large (fig. 5 of the paper: does not converge);
    * none: $\eta_0$.

    Args:
      learning_rate: $\eta_0 > 0$, of the synchronous run with the equivalent large batch.
      delay: int >= 0; or a mass function; or a DelayProcess.
      rule: one of the four.
      **options: momentum, kind, dampening, criterion and curvature_noise of the delayed run and of
        the synchronous one, as in `max_learning_rate`; only `exact` uses them. The synchronous run
        averages $1 + \tau$ batches an update, so its curvature noise is divided by that.

    Returns:
      The learning rate, a float.

    Raises:
      ValueError: naming the bad argument.

    >>> rescale_learning_rate(0.8, 32), round(rescale_learning_rate(0.8, 32, rule="exact"), 4)
    (0.025, 0.0193)

    References:
      Giladi, Nacson, Hoffer, Soudry, "At Stability's Edge", ICLR 2020, eq. 8.
    """
    learning_rate = positive(learning_rate, "learning_rate")
    choose(rule, RULES, "rule")
    synchronous = synchronous_max_learning_rate(delay, **options)
    if rule == "exact":
        return learning_rate * max_learning_rate(delay, **options) / synchronous
    tau = max(1.0, mean_delay(delay))
    return learning_rate / {"inverse": tau, "sqrt": math.sqrt(tau), "none": 1.0}[rule]


def synchronous_max_learning_rate(
    delay: Delay, *, sharpness: float = 1.0, **options: Unpack[Options]
) -> float:
    r"""The largest stable rate of the equivalent large batch: no delay, noise over $1 + \tau$.

    >>> synchronous_max_learning_rate(3, criterion="mean_square", curvature_noise=1.0)
    1.6
    """
    if options.get("curvature_noise"):
        options["curvature_noise"] /= 1.0 + mean_delay(delay)
    return max_learning_rate(0, sharpness=sharpness, **options)


def mean_delay(delay: Delay) -> float:
    """Mean staleness; of a recorded trace, over the run that the Lyapunov estimate uses.

    Raises:
      ValueError: naming what is wrong with the delay.

    >>> mean_delay(3), mean_delay([0.5, 0.0, 0.5])
    (3.0, 1.0)
    """
    if is_trace(delay):
        return float(draw_staleness(delay).mean())
    where = as_delay(delay)
    return float(where) if isinstance(where, int) else float(where @ np.arange(where.size))
