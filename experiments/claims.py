"""What a figure claims, in numbers: expected, measured, and whether they agree.

A claim about seeds is a test. Differences are paired: run i of one arm and run i of the other have
the same seed, so the same initial parameters and order of samples. A claim holds where the whole
90 % interval of the mean difference is where the claim says, which is a one-sided test at 5 %, and
for `equivalent` the two one-sided tests (TOST; Schuirmann 1987): absence of a difference is shown,
not inferred from too few seeds to see one. Of one seed there is no interval and no claim holds.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

TEST_LEVEL = 0.90  # of two-sided intervals, whose ends are one-sided tests at 5 %
PREDICTION_LEVEL = 0.95  # of slopes and ratios that theory predicts

Interval = tuple[float, float]


class Claim(NamedTuple):
    """One statement that a figure makes, checked.

    Attributes:
      claim: the statement in words.
      expected: what makes it true, with the tolerance, in words.
      measured: the number that this run gave.
      holds: whether the number is as expected; a NaN never is.
      interval: of the measured number, where it has one: the ends.
    """

    claim: str
    expected: str
    measured: float
    holds: bool
    interval: Interval | None = None


def outcome(claim: Claim, digits: int = 4) -> str:
    """Returns what a claim came to, in words.

    >>> outcome(Claim("time", "at most 1", math.nan, False))
    'time: not a number, expected at most 1'
    """
    known = claim.measured is not None and not math.isnan(claim.measured)  # JSON has no NaN
    number = f"{claim.measured:.{digits}g}" if known else "not a number"
    if claim.interval is not None:
        number += " [" + ", ".join(f"{end:.{digits}g}" for end in claim.interval) + "]"
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
    Claim(claim='the slope is 2/pi', expected='0.63662 within 1%', measured=0.64, holds=True,
          interval=None)
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
    Claim(claim='large', expected='at least 1', measured=2.0, holds=True, interval=None)
    """
    return Claim(claim, f"at least {bound:.6g}", float(measured), bool(measured >= bound))


class Estimate(NamedTuple):
    """A mean and its interval, None where one value says nothing of its error."""

    value: float
    interval: Interval | None


def estimate_mean(values: ArrayLike, level: float = TEST_LEVEL) -> Estimate:
    """Returns the mean and Student's interval of it, n - 1 degrees of freedom.

    >>> estimate_mean([1.0, 2.0, 3.0]).value, estimate_mean([1.0]).interval
    (2.0, None)
    """
    values = np.asarray(values, np.float64)
    mean, n = float(values.mean()), values.size
    if n < 2:
        return Estimate(mean, None)
    reach = float(stats.t.ppf(0.5 + level / 2.0, n - 1) * deviation(values) / math.sqrt(n))
    return Estimate(mean, (mean - reach, mean + reach))


def estimate_ratio(ratios: ArrayLike, level: float = PREDICTION_LEVEL) -> Estimate:
    """Returns the geometric mean of ratios and its interval: that of the mean of their logarithms.

    >>> estimate_ratio([0.5, 2.0]).value
    1.0
    """
    value, interval = estimate_mean(np.log(np.asarray(ratios, np.float64)), level)
    ends = None if interval is None else (math.exp(interval[0]), math.exp(interval[1]))
    return Estimate(math.exp(value), ends)


def estimate_slope(x: ArrayLike, y: ArrayLike, level: float = PREDICTION_LEVEL) -> Estimate:
    """Returns the slope of the least-squares line and its interval, n - 2 degrees of freedom.

    >>> estimate_slope([0, 1, 2, 3], [0, 1, 2, 3]).value
    1.0
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    line = fit_line(x, y)
    if x.size < 3:
        return Estimate(line.slope, None)
    rest = y - line.slope * x - line.intercept
    error = math.sqrt(float(rest @ rest) / (x.size - 2)) / float(np.linalg.norm(x - x.mean()))
    reach = float(stats.t.ppf(0.5 + level / 2.0, x.size - 2)) * error
    return Estimate(line.slope, (line.slope - reach, line.slope + reach))


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """Returns the estimate of a positive multiple.

    >>> scaled(Estimate(1.0, (0.5, 1.5)), 2.0)
    Estimate(value=2.0, interval=(1.0, 3.0))
    """
    value, interval = estimate
    ends = None if interval is None else (factor * interval[0], factor * interval[1])
    return Estimate(factor * value, ends)


def inside(claim: str, estimate: Estimate, low: float, high: float) -> Claim:
    """A claim that an estimate's whole interval lies between two numbers.

    >>> inside("about one", Estimate(1.0, (0.9, 1.3)), 0.8, 1.2).holds
    False
    """
    if math.isinf(low) or math.isinf(high):
        text = f"interval below {high:.6g}" if math.isinf(low) else f"interval above {low:.6g}"
    else:
        text = f"interval within {low:.5g} to {high:.5g}"
    value, interval = estimate
    holds = interval is not None and bool(low < interval[0] and interval[1] < high)
    return Claim(claim, text, value, holds, interval)


def equivalent(claim: str, first: ArrayLike, second: ArrayLike, margin: float) -> Claim:
    """A claim that two arms are the same to `margin` (TOST), over seeds that they share.

    Args:
      claim: in words.
      first, second: shape (num_seeds,), the same seeds in the same order.
      margin: > 0, the largest mean difference that counts as none.
    """
    return inside(claim, _difference(first, second), -margin, margin)


def less_by(claim: str, first: ArrayLike, second: ArrayLike, bound: float) -> Claim:
    """A claim that `first` exceeds `second` by less than `bound`, over seeds that they share."""
    return inside(claim, _difference(first, second), -math.inf, bound)


def more_by(claim: str, first: ArrayLike, second: ArrayLike, bound: float) -> Claim:
    """A claim that `first` exceeds `second` by more than `bound`, over seeds that they share."""
    return inside(claim, _difference(first, second), bound, math.inf)


def _difference(first: ArrayLike, second: ArrayLike) -> Estimate:
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired arms need equal seeds, got {first.shape} and {second.shape}")
    return estimate_mean(first - second)


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
