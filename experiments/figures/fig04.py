"""Figure 4: shifted momentum (eq. 11) keeps minima stable at larger learning rates."""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import pandas as pd

from asgd_jax.training.folder.table import Record
from experiments import style
from experiments.claims import Claim, at_least, at_most, near
from experiments.figures import threshold_curves as curves

CAPTION = "With shifted momentum, the larger m, the larger the stable learning rate at any delay."


class Config(NamedTuple):
    """Delays 0, `stride`, ..., `max_delay`, and `far_delays`, where the gain has settled."""

    max_delay: int = 64
    stride: int = 1
    momenta: tuple[float, ...] = (0.0, 0.5, 0.9, 0.99)
    far_delays: tuple[int, ...] = (128, 256, 512, 1024)


PRESETS = {"smoke": Config(stride=8), "cpu": Config(), "paper": Config()}

_LIMIT = 4.0 / math.pi


def run(config: Config) -> list[Record]:
    """Returns the thresholds for every momentum at every delay, and their gain over m = 0."""
    delays = {False: range(0, config.max_delay + 1, config.stride), True: config.far_delays}
    records = []
    for momentum in config.momenta:
        for far, chosen in delays.items():
            for delay in chosen:
                record = curves.threshold_record(
                    _name(momentum, far), delay, momentum=momentum, kind="shifted"
                )
                plain = curves.threshold_record("", delay)
                gain = float(record["threshold"]) / float(plain["threshold"])
                records.append({"momentum": momentum, **record, "gain": gain})
    return records


def claims(records: pd.DataFrame) -> list[Claim]:
    """Checks that momentum helps at every delay, the lines, and how far the gain goes."""
    momenta = curves.momenta(records)
    names = [_name(momentum) for momentum in momenta]
    gains = {m: _curve(records, m)[1] for m in momenta}
    ratio = min(
        high / low
        for lower, higher in pairwise(momenta)
        for low, high in zip(gains[lower], gains[higher], strict=True)
    )
    m, top = momenta[-1], gains[momenta[-1]]
    # The critical angle at large delays solves cos(theta) = m, and h* follows from it.
    settled = [2.0 / math.pi * math.acos(m) * math.sqrt((1 + m) / (1 - m)) for m in momenta]
    error = max(abs(gains[m][-1] / gain - 1.0) for m, gain in zip(momenta, settled, strict=True))
    return [
        curves.root_claim(records),
        curves.linear_claim(records, *names),
        at_least(
            "a larger m has a larger h* at every delay, least ratio of neighbours", ratio, 1.0
        ),
        at_most(f"m = {m:g}: the gain over m = 0 under delay, at most 2", max(top[1:]), 2.0),
        near(f"m = {m:g}: at large delays the gain nears 4/pi", top[-1], _LIMIT, 0.01),
        at_most(
            "at large delays the gain is (2/pi) acos(m) sqrt((1+m)/(1-m)), worst error",
            error,
            0.01,
        ),
    ]


def plot(records: pd.DataFrame) -> Any:
    """Returns the figure: 1/h* against the delay for each m, and the gain over m = 0."""
    figure, (left, right) = style.new_figure(2, width=6, height=4.4)
    figure.suptitle("Shifted momentum m raises the largest stable learning rate", fontsize=14)
    for momentum, color in zip(curves.momenta(records), style.COLOURS, strict=False):
        look: dict[str, Any] = {"color": color, "label": f"m = {momentum:g}", "linewidth": 2}
        curves.plot_series(left, records, _name(momentum), **look)
        delays, gains = _curve(records, momentum)
        right.plot(delays[1:], gains[1:], **look)  # without tau = 0: a gain of (1 + m) / (1 - m)
    title = "1/h* is linear in τ, with a lower slope for larger m"
    curves.finish(left, title, curves.DELAY_LABEL, curves.INVERSE_LABEL)
    left.set_ylim(bottom=0)
    right.axhline(_LIMIT, color=style.BLACK, linewidth=1, linestyle="--")
    right.text(1.05, _LIMIT + 0.015, "4 / π", fontsize=11)
    right.set_xscale("log", base=2)
    right.set_xticks([4**power for power in range(6)], labels=[str(4**power) for power in range(6)])
    title = "the gain over m = 0 settles, at 4 / π for m → 1"
    curves.finish(right, title, curves.DELAY_LABEL, "gain h*(m) / h*(0)", left=1.0)
    return figure


def _name(momentum: float, far: bool = False) -> str:
    return f"m={momentum:g}" + (" far" if far else "")


def _curve(records: pd.DataFrame, momentum: float) -> tuple[list[float], list[float]]:
    """All delays of one momentum, and the gains."""
    delays, gains = (
        curves.column(records, _name(momentum), name)
        + curves.column(records, _name(momentum, far=True), name)
        for name in ("mean_delay", "gain")
    )
    return delays, gains
