"""Figure 7: delays uniform on {1, ..., b} obey the same inverse law (eq. 19), milder.

A constant delay's threshold at a half-integer mean is interpolated; at b = 2 the random delay's in
mean square is 0.2 % below it, at every other b above.
"""

import math
from typing import Any, NamedTuple

import pandas as pd

from asgd_jax import delays
from asgd_jax.training.folder.table import Record
from experiments import style
from experiments.claims import Claim, at_least, near
from experiments.figures import random_delay
from experiments.figures import threshold_curves as curves

CAPTION = (
    "For delays uniform on {1, ..., b}, too, the learning rate must be inversely proportional to "
    "the mean delay."
)


class Config(NamedTuple):
    """b = 1, 1 + `stride`, ..., `max_b`, and `far_b`, where the asymptote is checked."""

    max_b: int = 64
    stride: int = 1
    far_b: int = 1024


PRESETS = {"smoke": Config(stride=7), "cpu": Config(), "paper": Config()}

_FAR = "mean far"
_MILDER_FROM = 3


def run(config: Config) -> list[Record]:
    """Returns the thresholds of every b, and of constant delays of equal mean."""
    values = range(1, config.max_b + 1, config.stride)
    means = [(b + 1) // 2 for b in values if b % 2]
    family = [(b, delays.uniform(1, b)) for b in values]
    far = random_delay.gain_record(_FAR, "b", config.far_b, delays.uniform(1, config.far_b))
    return [*random_delay.random_delay_records("b", family, means), far]


def claims(records: pd.DataFrame) -> list[Claim]:
    """Checks the lines, the asymptote and the comparison with constant delays."""
    line = curves.fit_series(records, random_delay.MEAN)
    b, far = (curves.column(records, _FAR, name)[0] for name in ("b", "threshold"))
    series = random_delay.MEAN, random_delay.MEAN_SQUARE
    return [
        curves.root_claim(records),
        curves.linear_claim(records, *series),
        near("mean: the slope of 1/h* is 4/pi^2", line.slope, 4 / math.pi**2, 0.01),
        near(f"mean: h* nears pi^2/(2b), at b = {b:g}", far, math.pi**2 / (2 * b), 0.01),
        *(
            at_least(
                f"{name}: from b = {_MILDER_FROM} on h* is above that of a constant delay of equal "
                "mean, least ratio",
                min(random_delay.gains(records, name, "b", _MILDER_FROM)),
                1.0,
            )
            for name in series
        ),
        near(
            f"mean: that ratio nears pi/2, at b = {b:g}",
            curves.column(records, _FAR, "gain")[0],
            math.pi / 2,
            0.01,
        ),
    ]


def plot(records: pd.DataFrame) -> Any:
    """Returns the figure: 1/h* against the mean delay, and h* over a constant delay's."""
    figure, (left, right) = random_delay.plot_random_delay(
        records,
        "Delays uniform on {1, ..., b}: the same law, and up to π/2 times more tolerant",
        "1/h* is linear in the mean delay",
        "stable learning rate nears π/2 times a constant delay's",
        "mean delay E[τ] = (1 + b) / 2 (updates)",
    )
    means = curves.column(records, random_delay.MEAN, "mean_delay")
    right.axhline(math.pi / 2, color=style.SKY, linewidth=2, linestyle=":")
    right.text(means[-1] / 2, math.pi / 2 - 0.035, "π / 2", color=style.SKY, fontsize=11)
    middle = 0.6 * means[-1]
    left.plot(means, [2 * (2 * mean - 1) / math.pi**2 for mean in means], ":", color=style.SKY)
    left.text(
        middle, 2 * (2 * middle - 1) / math.pi**2 - 2.2, "2b / π²", color=style.SKY, fontsize=11
    )
    return figure
