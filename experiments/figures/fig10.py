"""Figure 10: with standard momentum 1/h* is still linear in the delay (eq. 25), only steeper.

The caption does not say whether the gradient enters the momentum with the factor 1 - m (damped) or
without it (undamped, the default of torch and optax); both are drawn. Below
tau = m / (1 - m) the curves bend a little: there the momentum remembers longer than the delay.
"""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import pandas as pd

from asgd_jax.training.folder.table import Record
from experiments import style
from experiments.claims import Claim, at_least, near
from experiments.figures import threshold_curves as curves

CAPTION = (
    "With standard momentum, too, the learning rate must be inversely proportional to the delay: "
    "1/h* is linear in it for every m, with a higher slope."
)


class Config(NamedTuple):
    """Delays 0, `stride`, ..., `max_delay`, and `far_delays`, which only the asymptotes need."""

    max_delay: int = 64
    stride: int = 1
    momenta: tuple[float, ...] = (0.0, 0.5, 0.8, 0.9)
    far_delays: tuple[int, ...] = (1024, 2048)


PRESETS = {"smoke": Config(stride=8), "cpu": Config(), "paper": Config()}

_TITLES = {
    "damped": "damped: as a delay longer by m / (1 − m)",
    "undamped": "undamped: slope × 1 / (1 − m) as well",
}


def run(config: Config) -> list[Record]:
    """Returns the thresholds for every momentum, damped and undamped, at every delay."""
    delays = {False: range(0, config.max_delay + 1, config.stride), True: config.far_delays}
    return [
        {
            "momentum": momentum,
            "damping": damping,
            **curves.threshold_record(
                _name(damping, momentum, far),
                delay,
                momentum=momentum,
                dampening=damping == "damped",
            ),
        }
        for damping in _TITLES
        for momentum in config.momenta
        for far, chosen in delays.items()
        for delay in chosen
    ]


def claims(records: pd.DataFrame) -> list[Claim]:
    """Checks the lines and their slopes over the plotted delays, the asymptotes far beyond."""
    momenta = curves.momenta(records)
    names = [_name(damping, momentum) for damping in _TITLES for momentum in momenta]
    checked = [curves.root_claim(records), curves.linear_claim(records, *names)]
    for damping in _TITLES:
        slopes = [curves.fit_series(records, _name(damping, m)).slope for m in momenta]
        ratio = min(high / low for low, high in pairwise(slopes))
        checked.append(
            at_least(f"{damping}: the slope grows with m, least ratio of neighbours", ratio, 1.0)
        )
    m = momenta[-1]
    for damping, gain in (("damped", 1.0), ("undamped", 1.0 / (1.0 - m))):
        slope = curves.fit_series(records, _name(damping, m, far=True)).slope
        text = f"{damping}, m = {m:g}: at large delays the slope is {gain:.3g} x 2/pi"
        checked.append(near(text, slope, gain * 2.0 / math.pi, 0.01))
    text = f"damped, m = {m:g}: acts as a delay longer by m / (1 - m) updates"
    return [*checked, near(text, _extra_delay(records, m), m / (1.0 - m), 0.02)]


def plot(records: pd.DataFrame) -> Any:
    """Returns the figure: 1/h* against the delay for each m, a panel damped, a panel undamped."""
    figure, axes = style.new_figure(2, width=6, height=4.4)
    figure.suptitle(
        "With momentum m, 1/h* is still linear in the delay, with a higher slope", fontsize=14
    )
    for axis, (damping, title) in zip(axes, _TITLES.items(), strict=True):
        for momentum, color in zip(curves.momenta(records), style.COLOURS, strict=False):
            label = f"m = {momentum:g}"
            curves.plot_series(axis, records, _name(damping, momentum), color=color, label=label)
        curves.finish(axis, title, curves.DELAY_LABEL, curves.INVERSE_LABEL)
        axis.set_ylim(bottom=0)
    return figure


def _name(damping: str, momentum: float, far: bool = False) -> str:
    return f"{damping} m={momentum:g}" + (" far" if far else "")


def _extra_delay(records: pd.DataFrame, momentum: float) -> float:
    """Beyond tau, at the largest delay: (2 (tau + extra) + 1) / pi is the damped 1/h*."""
    delay, inverse = (
        curves.column(records, _name("damped", momentum, far=True), name)[-1]
        for name in ("mean_delay", "inverse_threshold")
    )
    return (math.pi * inverse - 1.0) / 2.0 - delay
