"""What a figure claims, in numbers: expected, measured, and whether they agree."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Claim(NamedTuple):
    """One statement that a figure makes, checked.

    Attributes:
      claim: the statement in words.
      expected: what makes it true, with the tolerance, in words.
      measured: the number that this run gave.
      holds: whether the number is as expected; a NaN never is.
    """

    claim: str
    expected: str
    measured: float
    holds: bool


def outcome(claim: Claim, digits: int = 4) -> str:
    """Returns what a claim came to, in words.

    >>> outcome(Claim("time", "at most 1", math.nan, False))
    'time: not a number, expected at most 1'
    """
    known = claim.measured is not None and not math.isnan(claim.measured)  # JSON has no NaN
    number = f"{claim.measured:.{digits}g}" if known else "not a number"
    return f"{claim.claim}: {number}, expected {claim.expected}"


def verdict(claim: Claim, digits: int = 4) -> str:
    """Returns whether a claim holds, and its outcome."""
    return f"{'holds' if claim.holds else 'FAILS'}  {outcome(claim, digits)}"


def count_held(claims: Sequence[Claim]) -> str:
    """Returns how many of the claims hold, such as "2 of 3"."""
    return f"{sum(claim.holds for claim in claims)} of {len(claims)}"


def near(claim: str, measured: float, target: float, tolerance: float) -> Claim:
    """A claim that a number is `target`, to a relative `tolerance`.

    >>> near("the slope is 2/pi", 0.64, 2 / math.pi, 0.01)
    Claim(claim='the slope is 2/pi', expected='0.63662 within 1%', measured=0.64, holds=True)
    """
    holds = abs(measured - target) <= tolerance * abs(target)
    return Claim(claim, f"{target:.5g} within {100 * tolerance:.3g}%", float(measured), bool(holds))


def at_most(claim: str, measured: float, bound: float) -> Claim:
    """A claim that a number is `bound` or less.

    >>> at_most("small", float("nan"), 1.0).holds
    False
    """
    return Claim(claim, f"at most {bound:.6g}", float(measured), bool(measured <= bound))


def at_least(claim: str, measured: float, bound: float) -> Claim:
    """A claim that a number is `bound` or more.

    >>> at_least("large", 2.0, 1.0)
    Claim(claim='large', expected='at least 1', measured=2.0, holds=True)
    """
    return Claim(claim, f"at least {bound:.6g}", float(measured), bool(measured >= bound))


def deviation(values: ArrayLike) -> np.ndarray:
    """Returns the standard deviation along the first axis, n - 1 in its denominator.

    It is NaN for a single value: one seed says nothing of how far seeds differ.

    >>> float(deviation([1.0, 3.0])), float(deviation([1.0]))
    (1.4142135623730951, nan)
    """
    values = np.asarray(values, np.float64)
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.full(values.shape[1:], np.nan)


class Line(NamedTuple):
    """A least-squares line; `r_squared` is the share of the variance of y that it explains."""

    slope: float
    intercept: float
    r_squared: float


def fit_line(x: ArrayLike, y: ArrayLike) -> Line:
    """Fits y = slope x + intercept.

    Args:
      x: shape (n,), with at least two different values.
      y: shape (n,).

    Raises:
      ValueError: when x does not determine a slope.

    >>> fit_line([0, 1, 2], [1, 3, 5])
    Line(slope=2.0, intercept=1.0, r_squared=1.0)
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.size < 2 or x.min() == x.max():
        raise ValueError(f"a line needs two different values of x, got {x.tolist()}")
    dx, dy = x - x.mean(), y - y.mean()
    slope = float(dx @ dy / (dx @ dx))
    rest = dy - slope * dx
    explained = 1.0 - float(rest @ rest) / float(dy @ dy) if dy.any() else math.nan
    return Line(slope, float(y.mean() - slope * x.mean()), explained)
