"""What the numeric figures share: thresholds as records, curves of 1/h* against delay, claims.

h* is the largest stable h = learning rate x sharpness. A learning rate that must be inversely
proportional to the delay shows as a straight line of 1/h* against the delay.
"""

from typing import Any

import numpy as np
import pandas as pd

from asgd_jax.stability import max_learning_rate, spectral_radius
from asgd_jax.stability.arguments import Delay
from asgd_jax.stability.rules import mean_delay
from asgd_jax.training.folder.table import Record
from experiments import style
from experiments.claims import Claim, Line, at_least, at_most, fit_line

INVERSE_LABEL = "1 / h*\n(h*: largest stable learning rate × sharpness)"
DELAY_LABEL = "delay τ (updates)"
_ROUNDING = 1e-9  # how far from 1 the modulus of a root may lie that is on the unit circle
_LINEAR = 0.995  # the least share of the variance that a straight line must explain
_LABEL_GAP = 0.065  # least distance between the labels of lines, of the height of the axis


def threshold_record(series: str, delay: Delay, **method: Any) -> Record:
    """Returns one row: a series' threshold at a delay; `method` as in `max_learning_rate`.

    `largest_root` is the modulus of the largest characteristic root at the threshold, or, in mean
    square, the growth of the root mean square; neither is computed on the way to the threshold, and
    both must be 1.

    >>> threshold_record("no momentum", 0)
    {'series': 'no momentum', 'mean_delay': 0.0, 'threshold': 2.0, 'inverse_threshold': 0.5,
     'largest_root': 1.0}
    """
    threshold = max_learning_rate(delay, **method)
    radius = spectral_radius(delay, step=threshold, **method)
    return {
        "series": series,
        "mean_delay": mean_delay(delay),
        "threshold": threshold,
        "inverse_threshold": 1.0 / threshold,
        "largest_root": radius,
    }


def column(records: pd.DataFrame, series: str, name: str) -> list[float]:
    """Returns a column of one series.

    >>> column(pd.DataFrame({"series": ["a", "b"], "x": [5, 6]}), "a", "x")
    [5.0]
    """
    return records.loc[records.series == series, name].astype(float).tolist()


def momenta(records: pd.DataFrame) -> list[float]:
    """Returns the momenta of a table, in order."""
    return sorted(float(momentum) for momentum in records.momentum.unique())


def fit_series(records: pd.DataFrame, series: str) -> Line:
    """Returns the least-squares line of 1/h* against the mean delay."""
    delays = column(records, series, "mean_delay")
    return fit_line(delays, column(records, series, "inverse_threshold"))


def root_claim(records: pd.DataFrame) -> Claim:
    """The claim that every threshold is one: at h*, the largest root lies on the unit circle."""
    worst = np.max(np.abs(records.largest_root.to_numpy() - 1.0))  # a NaN stays one
    return at_most("at h* the largest root is on the unit circle, worst distance", worst, _ROUNDING)


def linear_claim(records: pd.DataFrame, *series: str) -> Claim:
    """The claim that 1/h* is linear in the mean delay, in the worst of these series (R^2)."""
    worst = min(fit_series(records, name).r_squared for name in series)
    return at_least("1/h* is linear in the delay, R^2 of the worst series", worst, _LINEAR)


def plot_series(axis: Any, records: pd.DataFrame, series: str, **look: Any) -> None:
    """Draws 1/h* against the mean delay; `label` in `look` is written by `finish`."""
    delays = column(records, series, "mean_delay")
    inverse = column(records, series, "inverse_threshold")
    axis.plot(delays, inverse, **{"linewidth": 2, **look})


def finish(axis: Any, title: str, x_label: str, y_label: str, *, left: float = 0.0) -> None:
    """Sets title and labels, fits the axis to its lines, and writes their labels at their ends.

    Labels stand right of the axis in the colour of their line, as near to its end as a least
    distance between them allows.
    """
    axis.set_title(title)
    axis.set(xlabel=x_label, ylabel=y_label)
    lines = axis.get_lines()
    axis.set_xlim(left, max(max(line.get_xdata()) for line in lines))
    labelled = [line for line in lines if not line.get_label().startswith("_")]
    labelled.sort(key=lambda line: line.get_ydata()[-1])
    low, high = axis.get_ylim()
    ends = [float(line.get_ydata()[-1]) for line in labelled]
    for line, height in zip(
        labelled, style.move_apart(ends, _LABEL_GAP * (high - low)), strict=True
    ):
        style.name_line(axis, line.get_label(), (1.0, height), line.get_color())
