"""Zeros of functions of one variable that may be infinite: brackets, closed by Brent's method."""

import math
from collections.abc import Callable, Iterable

from scipy.optimize import brentq

_LARGEST = 50.0  # values are cut off there, because nothing can be interpolated with infinity


def bracketed_root(
    function: Callable[[float], float], low: float, high: float, *, xtol: float
) -> float:
    """The zero between two arguments at which the function has different signs.

    >>> round(bracketed_root(lambda x: x - 1.0 if x < 2.0 else math.inf, 0.0, 8.0, xtol=1e-12), 9)
    1.0
    """

    def cut_off(x: float) -> float:
        return min(max(function(x), -_LARGEST), _LARGEST)

    # The exponentials of a huge step or delay make Brent's method bisect for long.
    return brentq(cut_off, low, high, xtol=xtol, maxiter=1000)


def increasing_root(
    function: Callable[[float], float], width: float, *, xtol: float, lowest: float = -math.inf
) -> float:
    """The zero of an increasing function, sought from +-width outward; -inf if below `lowest`.

    >>> round(increasing_root(lambda x: x - 37.0, 1.0, xtol=1e-12), 9)
    37.0
    """
    low, high = -width, width
    while function(high) < 0.0:
        low, high = high, 2.0 * high
    while function(low) > 0.0:
        low, high = 2.0 * low, low
        if low < lowest:
            return -math.inf
    return bracketed_root(function, low, high, xtol=xtol)


def first_root(
    function: Callable[[float], float], grid: Iterable[float], *, rtol: float
) -> float | None:
    """The zero in the first cell of an ascending grid at whose upper end the function is >= 0.

    >>> first_root(lambda x: x - 3.0, [1.0, 2.0, 4.0, 8.0], rtol=1e-12)
    3.0
    """
    points = iter(grid)
    low = next(points)
    for high in points:
        if function(high) >= 0.0:
            return bracketed_root(function, low, high, xtol=rtol * high)
        low = high
    return None
