"""What figures 7 and 8 share: a family of random delays against constant ones of equal mean."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from asgd_jax.delays import DelayProcess
from asgd_jax.stability.arguments import Criterion, Delay
from asgd_jax.training.folder.table import Record
from experiments import style
from experiments.figures import threshold_curves as curves

MEAN, MEAN_SQUARE, CONSTANT = "mean", "mean square", "constant"


def gain_record(
    series: str, parameter: str, value: int, delay: Delay, criterion: Criterion = "mean"
) -> Record:
    r"""Returns a threshold's row, with `gain`: h* over that of a constant delay of equal mean.

    The constant delay's threshold is $2 \sin(\pi / (2(2\tau + 1)))$, eq. 5's closed form, and
    interpolated by it where the mean is no integer.

    >>> gain_record(CONSTANT, "mu", 3, 3)["gain"]
    1.0
    """
    record = curves.threshold_record(series, delay, criterion=criterion)
    mean = float(record["mean_delay"])
    constant = 2.0 * math.sin(math.pi / (2.0 * (2.0 * mean + 1.0)))
    return {parameter: value, **record, "gain": float(record["threshold"]) / constant}


def random_delay_records(
    parameter: str, family: Sequence[tuple[int, DelayProcess]], constant_delays: Iterable[int]
) -> list[Record]:
    """Returns thresholds in the mean and in mean square, and those of constant delays.

    Args:
      parameter: name of the column that tells the members of the family apart.
      family: (value of the parameter, delays).
      constant_delays: delays to compare with; their rows hold the delay in the parameter's column.
    """
    return [
        *(gain_record(MEAN, parameter, value, delay) for value, delay in family),
        *(gain_record(MEAN_SQUARE, parameter, *member, "mean_square") for member in family),
        *(gain_record(CONSTANT, parameter, delay, delay) for delay in constant_delays),
    ]


def gains(records: pd.DataFrame, series: str, parameter: str, least: int) -> pd.Series:
    """Returns the gains of a series where `parameter` is `least` or more."""
    return records[(records.series == series) & (records[parameter] >= least)].gain


def plot_random_delay(
    records: pd.DataFrame, title: str, left_title: str, right_title: str, x_label: str
) -> tuple[Any, list[Any]]:
    """Returns (figure, [axes]): 1/h* and the gain against the mean delay, three curves each."""
    figure, (left, right) = style.new_figure(2, width=6, height=4.4)
    figure.suptitle(title, fontsize=14)
    looks: dict[str, dict[str, Any]] = {
        CONSTANT: {
            "label": "constant delay",
            "color": style.BLACK,
            "linewidth": 1.5,
            "linestyle": "--",
        },
        MEAN_SQUARE: {"label": "E[x²] stable", "color": style.ORANGE, "linewidth": 3.5},
        MEAN: {"label": "E[x] stable", "color": style.BLUE, "linewidth": 1.5},
    }
    for series, look in looks.items():
        curves.plot_series(left, records, series, **look)
        delays, gains = (curves.column(records, series, name) for name in ("mean_delay", "gain"))
        right.plot(delays, gains, **look)
    curves.finish(left, left_title, x_label, curves.INVERSE_LABEL)
    curves.finish(right, right_title, x_label, "h* / h* of a constant delay of equal mean")
    left.set_ylim(bottom=0)
    return figure, [left, right]
