"""Figure 8: Gaussian delays N(mu, 1), rounded, act like a constant delay of the same mean.

The caption takes the mean delay to be mu. On k = 1, ..., 2 mu, where its mass function lives, the
mean is a little more: 1.39 at mu = 1, 2.13 at mu = 2, mu to 1e-3 from mu = 4 on. The horizontal
axis here is that mean.
"""

import math
from typing import Any, NamedTuple

import pandas as pd

from asgd_jax import delays
from asgd_jax.training.folder.table import Record
from experiments import style
from experiments.claims import Claim, at_most, near
from experiments.figures import random_delay
from experiments.figures import threshold_curves as curves

CAPTION = (
    "For Gaussian delays, too, the learning rate must be inversely proportional to the mean delay."
)


class Config(NamedTuple):
    """mu = 1, 1 + `stride`, ..., up to `max_mean`."""

    max_mean: int = 30
    stride: int = 1


PRESETS = {"smoke": Config(stride=7), "cpu": Config(), "paper": Config()}

_ALIKE_FROM = 8


def run(config: Config) -> list[Record]:
    """Returns the thresholds of every mu, and of a constant delay of mu."""
    values = range(1, config.max_mean + 1, config.stride)
    return random_delay.random_delay_records(
        "mu", [(mu, delays.discretized_normal(mu)) for mu in values], values
    )


def claims(records: pd.DataFrame) -> list[Claim]:
    """Checks the lines, their slope and the comparison with constant delays."""
    series = random_delay.MEAN, random_delay.MEAN_SQUARE
    line = curves.fit_series(records, random_delay.MEAN)
    return [
        curves.root_claim(records),
        curves.linear_claim(records, *series),
        near("mean: the slope of 1/h* is 2/pi", line.slope, 2 / math.pi, 0.01),
        *(
            at_most(
                f"{name}: from mu = {_ALIKE_FROM} on h* is a constant delay's to 2 %, worst error",
                (random_delay.gains(records, name, "mu", _ALIKE_FROM) - 1.0).abs().max(),
                0.02,
            )
            for name in series
        ),
    ]


def plot(records: pd.DataFrame) -> Any:
    """Returns the figure: 1/h* against the mean delay, and h* over a constant delay's."""
    figure, (left, right) = random_delay.plot_random_delay(
        records,
        "Gaussian delays N(μ, 1) act like a constant delay of the same mean",
        "1/h* is linear in the mean delay",
        f"within 2 % of a constant delay's from μ = {_ALIKE_FROM} on",
        "mean delay E[τ] (updates)",
    )
    right.axhspan(0.98, 1.02, color=style.BLACK, alpha=0.12, linewidth=0)
    right.text(20, 0.984, "± 2 %", fontsize=11)
    left.text(0.05, 0.9, "three lines that coincide", transform=left.transAxes, fontsize=11)
    return figure
