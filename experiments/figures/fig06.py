"""Figure 6: the stable learning rate falls as one over the delay (eq. 5), without momentum."""

import math
from typing import Any, NamedTuple

import pandas as pd

from asgd_jax.training.folder.table import Record
from experiments import style
from experiments.claims import Claim, at_most, near
from experiments.figures import threshold_curves as curves

CAPTION = (
    "To keep a minimum stable, the learning rate must be inversely proportional to the delay: "
    "1/h* follows the line (2 tau + 1) / pi."
)


class Config(NamedTuple):
    """Delays 0, `stride`, 2 `stride`, ..., `max_delay`."""

    max_delay: int = 64
    stride: int = 1


PRESETS = {"smoke": Config(stride=8), "cpu": Config(), "paper": Config()}

_EXACT = "exact"
_ACCURATE_FROM = 3  # the line's error is about pi^2 / (24 (2 tau + 1)^2), below 1 % from here on


def run(config: Config) -> list[Record]:
    """Returns the exact threshold and the approximation's at every delay."""
    return [
        {
            "delay": delay,
            **curves.threshold_record(_EXACT, delay),
            "approximate_inverse": (2 * delay + 1) / math.pi,
        }
        for delay in range(0, config.max_delay + 1, config.stride)
    ]


def claims(records: pd.DataFrame) -> list[Claim]:
    """Checks the line, its slope, its accuracy, and what doubling the delay does."""
    line = curves.fit_series(records, _EXACT)
    threshold, error = records.set_index("delay").threshold, _error(records)
    largest = int(records.delay.max())
    return [
        curves.root_claim(records),
        curves.linear_claim(records, _EXACT),
        near("the slope of 1/h* is 2/pi", line.slope, 2 / math.pi, 0.01),
        at_most(
            f"from tau = {_ACCURATE_FROM} on the line (2 tau + 1)/pi is exact to 1 %, worst error",
            error[records.delay >= _ACCURATE_FROM].max(),
            0.01,
        ),
        near(
            f"doubling the delay to {largest} halves the stable learning rate",
            threshold[largest] / threshold[largest // 2],
            0.5,
            0.01,
        ),
    ]


def plot(records: pd.DataFrame) -> Any:
    """Returns the figure: 1/h* against the delay, and the error of the straight line."""
    figure, (left, right) = style.new_figure(2, width=6, height=4.4)
    figure.suptitle("Stable learning rates are inversely proportional to the delay", fontsize=14)
    delays, line = (
        curves.column(records, _EXACT, name) for name in ("mean_delay", "approximate_inverse")
    )
    left.plot(delays, line, color=style.ORANGE, linewidth=2.5)
    look = {"color": style.BLUE, "linestyle": "", "marker": "o"}
    curves.plot_series(
        left, records, _EXACT, **look, **style.sparse_markers(len(delays), wanted=17)
    )
    curves.finish(left, "1/h* is a straight line in τ", curves.DELAY_LABEL, curves.INVERSE_LABEL)
    left.set_ylim(bottom=0)
    left.text(
        0.55,
        0.28,
        "exact: the largest root of\neq. 5 is on the unit circle",
        color=style.BLUE,
        fontsize=11,
        transform=left.transAxes,
    )
    left.text(
        0.28, 0.72, "line (2τ + 1) / π", color=style.ORANGE, fontsize=11, transform=left.transAxes
    )
    right.plot(
        delays,
        100 * _error(records),
        color=style.ORANGE,
        marker="o",
        markersize=4,
        linewidth=1.5,
    )
    right.axhline(1, color=style.BLACK, linewidth=1, linestyle="--")
    right.set_yscale("log")
    right.set_yticks([0.01, 0.1, 1, 10], labels=["0.01", "0.1", "1", "10"])
    title = f"the line (2τ + 1) / π is exact to 1 % from τ = {_ACCURATE_FROM} on"
    curves.finish(right, title, curves.DELAY_LABEL, "error of the line (%)", left=-1.0)
    return figure


def _error(records: pd.DataFrame) -> pd.Series:
    return (records.approximate_inverse / records.inverse_threshold - 1.0).abs()
