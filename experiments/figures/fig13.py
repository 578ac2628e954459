"""Figure 13: the learning rate that is best in the end is best throughout training."""

from typing import Any

import numpy as np
import pandas as pd

from asgd_jax import stability
from experiments import style
from experiments.claims import Claim, at_most
from experiments.figures import fig01
from experiments.figures.fig01 import (
    DELAY,
    EARLY,
    SHARPNESS,
    STARTS,
    eq_8_of,
    rates_of,
    whole_runs,
)
from experiments.figures.training_runs import NEXT_RATE, by_seed, last_epoch, select

CAPTION = (
    "The best learning rate under delay, the one of the scaling rule (eq. 8), is the best "
    "at every epoch, also before the algorithm has converged."
)
WHY = (
    "within the first epoch sharpness leaps far above the edge and the run is thrown back: at eq. "
    "8's rate, from the authors' initialisation, it is 33 after a quarter of an epoch and 2.8 "
    "after half, with the edge at 4.8; from Flax's it starts at 105. A smaller rate is thrown back "
    "less. From epoch 2 on the best rate is within a step of the grid, from both."
)
PRESETS = fig01.PRESETS
run = fig01.run

_DRAWN_EPOCHS = (1, 2, 5, 10, 20, 50)  # and those within the first


def claims(records: pd.DataFrame) -> list[Claim]:
    """Checks the best rate at every epoch drawn, against eq. 8's."""
    return [
        at_most(
            f"{STARTS[name]}: distance of the best rate from eq. 8's at epoch {epoch:g}, as "
            "a factor",
            factor,
            NEXT_RATE,
        )
        for name in whole_runs(records)
        for epoch, factor in _distances(records, name).items()
    ]


def notes(records: pd.DataFrame) -> dict[str, Any]:
    """Returns from which of the epochs drawn the best rate stays within a grid step of eq. 8's."""
    since = {}
    for name in whole_runs(records):
        far = [epoch for epoch, factor in _distances(records, name).items() if factor > NEXT_RATE]
        epochs = list(_distances(records, name))
        later = [epoch for epoch in epochs if not far or epoch > max(far)]
        since[STARTS[name]] = min(later) if later else None
    return {"epoch from which the best rate is within a grid step of eq. 8's": since}


def _distances(records: pd.DataFrame, name: str) -> dict[float, float]:
    """For every epoch drawn, the factor between the best rate and eq. 8's."""
    epochs, rates, errors = _table(records, name)
    best = rates[np.argmin(errors, axis=0)]
    factors = np.exp(np.abs(np.log(best / eq_8_of(list(rates)))))
    return {epoch: float(factor) for epoch, factor in zip(epochs, factors, strict=True)}


def plot(records: pd.DataFrame) -> Any:
    """Returns the figure: error against the rate, a line an epoch; sharpness along the runs."""
    names = list(whole_runs(records))
    figure, axes = style.new_figure(len(names) + 1, width=5.4, height=4.8)
    figure.suptitle(f"Delay {DELAY}: the best learning rate (ringed), epoch by epoch", fontsize=14)
    for axis, name in zip(axes, names, strict=False):
        _plot_errors(axis, records, name)
    low = min(axis.get_ylim()[0] for axis in axes[:-1])
    for axis in axes[:-1]:
        axis.set_ylim(low, 100)
        style.plain_log(axis, "y")
    _plot_sharpness(axes[-1], select(records, series=SHARPNESS))
    return figure


def _plot_errors(axis: Any, records: pd.DataFrame, name: str) -> None:
    epochs, rates, errors = _table(records, name)
    axis.axvline(eq_8_of(list(rates)), color=style.BLACK, linestyle=":", linewidth=1.6)
    axis.text(eq_8_of(list(rates)), 95, " eq. 8", va="top", fontsize=11)
    for index, epoch in enumerate(epochs):
        colour = (*style.COLOURS, "0.4")[index % (len(style.COLOURS) + 1)]
        values = 100 * errors[:, index]
        marker = style.MARKERS[index % len(style.MARKERS)]
        axis.plot(rates, values, color=colour, marker=marker, label=f"epoch {epoch:g}")
        best = int(np.argmin(values))
        axis.plot(rates[best], values[best], "o", markersize=14, fillstyle="none", color=colour)
    axis.set(xlabel="learning rate", ylabel="validation error (%)")
    style.plain_log(axis, "x", "y")
    axis.set_title(f"from {STARTS[name]}")
    axis.legend(fontsize=9)


def _plot_sharpness(axis: Any, records: pd.DataFrame) -> None:
    """Sharpness along S-SGD and along A-SGD at eq. 8's rate, and the edge of either."""
    colours = dict(zip(STARTS, (style.BLUE, style.ORANGE), strict=True))
    for (name, delay), rows in records.groupby(["initializer", "delay"], sort=False):
        axis.plot(
            rows.epoch,
            rows.sharpness,
            color=colours[name],
            linestyle="--" if delay == 0 else "-",
            marker="o",
            markersize=4,
            label=f"{'S-SGD' if delay == 0 else 'A-SGD, eq. 8'}, {STARTS[name]}",
        )
    for (delay, rate), _ in records.groupby(["delay", "learning_rate"]):
        edge = stability.max_learning_rate(int(delay)) / rate
        name = "S-SGD's edge" if delay == 0 else "edge at eq. 8's rate"
        axis.axhline(
            edge,
            color=style.BLACK,
            linestyle="--" if delay == 0 else ":",
            linewidth=1.2,
            label=f"{name}, {edge:.3g}",
        )
    axis.set_xscale("symlog", linthresh=0.25)
    axis.set_xlim(left=-0.02)
    ticks = sorted(records.epoch.unique())
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set(xlabel="epoch", ylabel="sharpness")
    style.plain_log(axis, "y")
    axis.set_title("sharpness along the runs (one seed)")
    axis.legend(fontsize=9)


def _table(records: pd.DataFrame, name: str) -> tuple[list[float], np.ndarray, np.ndarray]:
    """Epochs, all rates, and the mean error over seeds (rate, epoch)."""
    whole = whole_runs(records)[name]
    early = select(records, series=EARLY, initializer=name)
    last = last_epoch(whole)
    within = sorted(float(epoch) for epoch in early.epoch[early.diverged_at < 0].unique())
    later = {float(epoch) for epoch in _DRAWN_EPOCHS if 1 <= epoch < last} | {float(last)}
    rates = np.array(rates_of(whole))

    def errors_at(rows: pd.DataFrame, epochs: list[float]) -> np.ndarray:
        arms = [select(rows, delay=DELAY, learning_rate=rate) for rate in rates]
        return np.stack([by_seed(arm, epochs, "validation_error").mean(axis=0) for arm in arms])

    errors = [errors_at(early, within), errors_at(whole, sorted(later))]
    return [*within, *sorted(later)], rates, np.concatenate(errors, axis=1)
