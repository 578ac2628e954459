r"""The stability threshold of random delays: where a root first leaves the unit disc.

The characteristic equation is $a(z) + g h q(z) = 0$, so a root sits at $z = e^{i\omega}$ exactly at
the step $h(\omega) = -a / (g q)$ where that is real and positive. Its imaginary part vanishes with

$$T(\omega) = \operatorname{Im}[a(z) \overline{q(z)}] = \sum_{j=1}^{n} b_j \sin j\omega,
\quad n = \text{max\_delay} + 1.$$

At small h every root is inside. A root that touches the circle and turns back is a zero of T
without a change of sign, a root that crosses is one with; so the threshold is the least positive
h over the sign changes of T in $(0, \pi)$ and the point $z = -1$.

No sign change is missed: each cell of a grid is either proved to hold no zero, or proved to hold at
most one (T is monotone there), by its Taylor polynomial of degree two and
$|T'''| \le \sum_j j^3 |b_j|$; or it is proved to hold only steps above the best found; or it is
halved. T has at most n - 1 zeros inside, so few cells need halving.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq

from asgd_jax.stability.arguments import Momentum

_CELLS_PER_DEGREE = 32
_OVERLAP = 1.0 + 1e-9  # of neighbouring cells, so that no zero falls between two rounded edges
_NARROWEST = 1e-10  # below this half width the terms of T cannot be told from their rounding
_ROWS = 256  # cells evaluated at once without the FFT; bounds the memory


class _Series(NamedTuple):
    """The sine coefficients of T and what the bounds over a cell need."""

    pmf: np.ndarray
    momentum: Momentum
    coefficients: np.ndarray
    third: float  # bound of |T'''|
    slope: float  # bound of |da/domega|
    mean_delay: float  # bound of |dq/domega|

    def table(self) -> np.ndarray:
        """Columns whose sums with exp(i j omega) are T, its first two derivatives, and conj(q)."""
        index = np.arange(self.coefficients.size + 1, dtype=np.float64)
        b = np.append(0.0, self.coefficients)
        return np.stack([b, b * index, b * index**2, np.append(self.pmf, 0.0)], axis=1)


class _Cells(NamedTuple):
    """Cells of equal half width: centres, T and its two derivatives, a and q there."""

    centre: np.ndarray
    half: float
    value: np.ndarray
    first: np.ndarray
    second: np.ndarray
    drift: np.ndarray
    delayed: np.ndarray


def random_delay_threshold(pmf: np.ndarray, momentum: Momentum) -> float:
    """Largest h up to which the mean is stable, for independent delays with this mass function.

    Args:
      pmf: float64 array of shape (max_delay + 1,), of sum 1.
      momentum: checked momentum.

    Returns:
      The end of the interval of stable h that starts at 0.

    >>> from asgd_jax.stability.arguments import as_momentum
    >>> round(
    ...     random_delay_threshold(np.array([0, 0.5, 0.5]), as_momentum(0, "heavy_ball", True)), 4
    ... )
    0.8284
    """
    series = _sine_series(pmf, momentum)
    best = _step_at(series, math.pi)
    cells = _grid(series, _CELLS_PER_DEGREE * (pmf.size + 1))
    while cells.centre.size:
        half = cells.half
        value, first, second = abs(cells.value), abs(cells.first), abs(cells.second)
        # A zero is possible where the Taylor bound reaches 0, and single where T' keeps its sign.
        possible = value <= half * (first + half * (second / 2.0 + half * series.third / 6.0))
        single = first > half * (second + half * series.third / 2.0)
        bound = _least_step(series, cells)
        single |= half < _NARROWEST
        for i in sorted(np.flatnonzero(possible & single), key=lambda i: bound[i]):
            if bound[i] >= best:
                break
            best = min(best, _crossing(series, cells.centre[i], half))
        split = cells.centre[possible & ~single & (bound < best)]
        cells = _evaluate(series, np.concatenate([split - half / 2, split + half / 2]), half / 2)
    return best


def _sine_series(pmf: np.ndarray, momentum: Momentum) -> _Series:
    m, taps = momentum.value, pmf.size
    padded = np.concatenate([pmf, np.zeros(2)])
    here, later = padded[1:-1], padded[2:]  # p_j and p_{j+1} for j = 1, ..., taps
    coefficients = pmf - here
    mean = float(pmf @ np.arange(taps))
    if momentum.shifted:
        # a conj(q) = (z - 1) conj(q) - m (1 - 1/z) |q|^2, and |q|^2 is the autocorrelation of p.
        correlation = np.concatenate([np.correlate(pmf, pmf, "full")[taps - 1 :], np.zeros(2)])
        coefficients = coefficients + m * (correlation[2:] - correlation[:-2])
        slope = 1.0 + m + 2.0 * m * mean
    else:
        coefficients = coefficients + m * (later - here)
        coefficients[0] -= m * pmf[0]  # the power -1 of z folds onto the power 1
        slope = 1.0 + m
    third = float(np.arange(1, taps + 1, dtype=np.float64) ** 3 @ abs(coefficients))
    return _Series(pmf, momentum, coefficients, third, slope, mean)


def _grid(series: _Series, number: int) -> _Cells:
    """Cells that cover [0, pi], through the FFT."""
    half = math.pi / (2 * number)
    table = series.table()
    shifts = np.exp(-1j * half * np.arange(len(table)))
    sums = np.fft.fft(table * shifts[:, None], 2 * number, axis=0)[:number].conj()
    return _as_cells(series, half * (2.0 * np.arange(number) + 1.0), half, sums)


def _evaluate(series: _Series, centre: np.ndarray, half: float) -> _Cells:
    """The same for given centres, by direct sums."""
    table = series.table()
    sums = [np.zeros((0, 4), complex)]
    for start in range(0, centre.size, _ROWS):
        block = centre[start : start + _ROWS]
        sums.append(np.exp(1j * np.outer(block, np.arange(len(table)))) @ table)
    return _as_cells(series, centre, half, np.concatenate(sums))


def _as_cells(series: _Series, centre: np.ndarray, half: float, sums: np.ndarray) -> _Cells:
    value, first, second, delayed = sums[:, 0].imag, sums[:, 1].real, -sums[:, 2].imag, sums[:, 3]
    delayed = delayed.conj()
    drift = _drift(np.exp(1j * centre), delayed, series.momentum)
    return _Cells(centre, half * _OVERLAP, value, first, second, drift, delayed)


def _drift(z: np.ndarray, delayed: np.ndarray, momentum: Momentum) -> np.ndarray:
    """a(z), the characteristic function at h = 0."""
    late = delayed if momentum.shifted else 1.0
    return (z - 1.0) * (1.0 - momentum.value * late / z)


def _least_step(series: _Series, cells: _Cells) -> np.ndarray:
    """A lower bound of |h(omega)| over each cell, from Lipschitz bounds of a and q."""
    upper = abs(cells.delayed) + cells.half * series.mean_delay
    lower = abs(cells.drift) - cells.half * series.slope
    return np.maximum(lower, 0.0) / (series.momentum.gain * upper)


def _crossing(series: _Series, centre: float, half: float) -> float:
    """The step at the sign change of T inside a cell; inf if there is none, or h is negative."""
    index = np.arange(1.0, series.coefficients.size + 1.0)

    def imaginary(omega: float) -> float:
        return float(series.coefficients @ np.sin(index * omega))

    low, high = max(centre - half, 0.0), min(centre + half, math.pi)
    if not imaginary(low) * imaginary(high) < 0.0:
        return math.inf
    return _step_at(series, brentq(imaginary, low, high, xtol=1e-16))


def _step_at(series: _Series, omega: float) -> float:
    """h = -a / (g q) at z = exp(i omega), inf where that is negative.

    Taken as a modulus: at a zero of q, where T vanishes too, the rounding error of q has any phase.
    """
    z = np.exp(np.array([1j * omega]))
    delayed = np.exp(-1j * omega * np.arange(series.pmf.size)) @ series.pmf
    drift = _drift(z, delayed, series.momentum)[0]
    if delayed == 0.0 or (drift * delayed.conjugate()).real >= 0.0:
        return math.inf
    return float(abs(drift) / (series.momentum.gain * abs(delayed)))
