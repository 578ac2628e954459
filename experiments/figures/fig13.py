"""Figure 13: the learning rate that is best in the end is best throughout training."""

from typing import Any

import numpy as np
import pandas as pd

from experiments import style
from experiments.claims import Claim, at_most
from experiments.figures import fig01
from experiments.figures.fig01 import DELAY, rates_of
from experiments.figures.training_runs import NEXT_RATE, by_seed, last_epoch, select

CAPTION = (
    "The best learning rate under delay, the one of the scaling rule (eq. 8), is the best "
    "at every epoch, also before the algorithm has converged."
)
WHY = (
    "early on, Flax's LeCun initialisation starts at a sharpness of 100 and more, where eq. "
    "8's rate is stable up to 4.8, so that smaller rates are ahead until the minimum is "
    "flatter (PyTorch's default starts at 3.3). At epoch 5 the two best rates differ by .02 "
    "%, and the two seeds of one rate by 1.2 %."
)
PRESETS = fig01.PRESETS
run = fig01.run


def claims(records: pd.DataFrame) -> list[Claim]:
    """Checks the best rate at every epoch shown, against eq. 8's."""
    epochs, rates, errors = _table(records)
    eq_8 = rates[-1] / DELAY
    best = rates[np.argmin(errors, axis=0)]
    factors = np.exp(np.abs(np.log(best / eq_8)))
    return [
        at_most(
            f"distance of the best rate from eq. 8's at epoch {epoch}, as a factor",
            float(factor),
            NEXT_RATE,
        )
        for epoch, factor in zip(epochs, factors, strict=True)
    ]


def plot(records: pd.DataFrame) -> Any:
    """Returns the figure: validation error against the learning rate, a line an epoch."""
    epochs, rates, errors = _table(records)
    figure, (axis,) = style.new_figure(1, width=7, height=4.8)
    axis.axvline(rates[-1] / DELAY, color=style.BLACK, linestyle=":", linewidth=1.6)
    axis.text(rates[-1] / DELAY, 95, " eq. 8", va="top", fontsize=11)
    for index, epoch in enumerate(epochs):
        colour = style.COLOURS[index % len(style.COLOURS)]
        values = 100 * errors[:, index]
        marker = style.MARKERS[index % len(style.MARKERS)]
        axis.plot(rates, values, color=colour, marker=marker, label=f"epoch {epoch}")
        best = int(np.argmin(values))
        axis.plot(rates[best], values[best], "o", markersize=14, fillstyle="none", color=colour)
    axis.set(xlabel="learning rate", ylabel="validation error (%)")
    style.plain_log(axis, "x", "y")
    axis.set_title(f"Delay {DELAY}: the best learning rate (ringed), epoch by epoch")
    axis.legend()
    return figure


def _table(records: pd.DataFrame) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Up to six epochs, all rates, and the mean error over seeds (rate, epoch)."""
    last = last_epoch(records)
    epochs = sorted({round(epoch) for epoch in np.linspace(1, last, min(last, 6))})
    rates = np.array(rates_of(records))
    arms = [select(records, delay=DELAY, learning_rate=rate) for rate in rates]
    errors = [by_seed(rows, epochs, "validation_error").mean(axis=0) for rows in arms]
    return epochs, rates, np.stack(errors)
