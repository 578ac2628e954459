"""What every function here accepts: a delay in any of its forms, a momentum of either kind."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict, TypeGuard

import numpy as np

from asgd_jax.delays import DelayProcess, as_integer, validate_pmf

Delay: TypeAlias = int | Sequence[float] | np.ndarray | DelayProcess
Kind: TypeAlias = Literal["heavy_ball", "shifted"]
Criterion: TypeAlias = Literal["mean", "mean_square"]
OptimizerCriterion: TypeAlias = Literal["mean", "mean_square", "lyapunov"]

KINDS = ("heavy_ball", "shifted")
CRITERIA = ("mean", "mean_square")
# Of the methods that have a formula, `lyapunov_max_learning_rate` is the third: it is an estimate,
# which comes with its error.
OPTIMIZER_CRITERIA: tuple[OptimizerCriterion, ...] = ("mean", "mean_square", "lyapunov")


class MethodOptions(TypedDict, total=False):
    """The method, as `max_learning_rate` documents it: what `as_momentum` takes."""

    momentum: float
    kind: Kind
    dampening: bool


class Options(MethodOptions, total=False):
    """The method and what stability means, as `max_learning_rate` documents it."""

    criterion: Criterion
    curvature_noise: float


class Momentum(NamedTuple):
    """A momentum method near a minimum.

    Attributes:
      value: the coefficient m, in [0, 1).
      shifted: whether the momentum buffer is read as late as the gradient (only where value > 0).
      gain: the factor of the gradient, 1 - m with dampening and 1 without.
    """

    value: float
    shifted: bool
    gain: float


def as_momentum(
    momentum: float = 0.0, kind: str = "heavy_ball", dampening: bool = True
) -> Momentum:
    """Returns the checked momentum; at m = 0 every kind is plain gradient descent.

    Raises:
      ValueError: naming the momentum outside [0, 1) or the unknown kind.

    >>> as_momentum(0.5, "shifted", True)
    Momentum(value=0.5, shifted=True, gain=0.5)
    """
    choose(kind, KINDS, "kind")
    value = as_number(momentum, "momentum")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"momentum must lie in [0, 1), got {momentum!r}: 0.9 is the usual choice")
    return Momentum(value, kind == "shifted" and value > 0.0, 1.0 - value if dampening else 1.0)


def as_delay(delay: Delay) -> int | np.ndarray:
    """Returns a constant delay as an int, random delays as a probability mass function.

    A mass function with a single atom is that constant delay.

    Raises:
      ValueError: naming what is wrong with the delay; not every process has a distribution.

    >>> as_delay([0.0, 0.0, 1.0]), as_delay([0.5, 0.5])
    (2, array([0.5, 0.5]))
    """
    if isinstance(delay, DelayProcess):
        if delay.pmf is None:
            raise ValueError(
                "this delay is a process without a distribution (pmf=None: a recorded trace, or a "
                "value that is only known when it runs): use lyapunov_exponent, which draws from "
                "it (of any optimizer criterion='lyapunov'), or pass the pmf of its values or, of "
                "a constant delay, the int"
            )
        delay = delay.pmf
    elif np.ndim(delay) == 0:  # type: ignore[arg-type]
        return as_integer(delay, "delay")
    pmf = validate_pmf(delay)
    return pmf.size - 1 if pmf[-1] == 1.0 else pmf


def is_trace(delay: Delay) -> TypeGuard[DelayProcess]:
    """Whether `delay` is a recorded trace, whose distribution is not known."""
    return isinstance(delay, DelayProcess) and delay.pmf is None


def as_pmf(delay: int | np.ndarray) -> np.ndarray:
    """Returns the mass function of what `as_delay` returns."""
    if isinstance(delay, np.ndarray):
        return delay
    pmf = np.zeros(delay + 1)
    pmf[delay] = 1.0
    return pmf


def as_number(value: Any, name: str) -> float:
    """Returns a real number as a float, or raises a ValueError that names it."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, got {value!r}") from None


def positive(value: float, name: str) -> float:
    """Returns a finite number > 0 as a float, or raises a ValueError that names it."""
    number = as_number(value, name)
    if not (math.isfinite(number) and number > 0.0):
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
    return number


def as_curvature_noise(value: float, criterion: str) -> float:
    """Returns the relative variance of the curvature as a float >= 0.

    Raises:
      ValueError: naming a negative one, or the criterion that does not see it.

    >>> as_curvature_noise(0, "mean"), as_curvature_noise(0.5, "mean_square")
    (0.0, 0.5)
    """
    number = as_number(value, "curvature_noise")
    if not (math.isfinite(number) and number >= 0.0):
        raise ValueError(f"curvature_noise must be a finite number >= 0, got {value!r}")
    if number > 0.0 and criterion != "mean_square":
        raise ValueError(
            f"curvature_noise={value!r} does not change criterion={criterion!r}: "
            "pass criterion='mean_square'"
        )
    return number


def as_step(step: float) -> float:
    """Returns the step h = learning rate x sharpness, a finite number >= 0."""
    number = as_number(step, "step")
    if not (math.isfinite(number) and number >= 0.0):
        raise ValueError(
            f"step must be a finite number >= 0, got {step!r}: it is learning rate x sharpness"
        )
    return number


def choose(value: str, options: Sequence[str], name: str) -> str:
    """Returns `value` if it is one of `options`, else raises a ValueError that lists them."""
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r}")
    return value
