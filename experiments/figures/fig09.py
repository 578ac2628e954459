"""Figure 9: Gaussian delays do as well as the constant delay of the same mean."""

from typing import Any

import pandas as pd

from experiments import style
from experiments.claims import Claim, equivalent
from experiments.figures import fig05
from experiments.figures.fig05 import NORMAL, SHIFTED, errors_of
from experiments.figures.training_runs import last_epoch, plot_both_errors, select

CAPTION = (
    "Workers whose delay is Gaussian reach the same validation error as round-robin workers, "
    "whose delay is constant."
)
PROXY = fig05.PROXY
PRESETS = fig05.PRESETS
run = fig05.run

_CLOSE = 0.01  # of validation error: a smaller difference counts as none


def claims(records: pd.DataFrame) -> list[Claim]:
    """Checks that the two final errors are equivalent."""
    text = "final error of Gaussian delays less that of constant ones"
    return [equivalent(text, errors_of(records, NORMAL), errors_of(records, SHIFTED), _CLOSE)]


def notes(records: pd.DataFrame) -> dict[str, Any]:
    """Returns how much room the test has: what no delay at all would change."""
    less = errors_of(records, SHIFTED) - errors_of(records, fig05.SSGD_DAMPED)
    return {"constant delays less none (S-SGD, damped), mean over seeds": float(less.mean())}


def plot(records: pd.DataFrame) -> Any:
    """Returns the figure: both errors against epochs."""
    epochs = range(1, last_epoch(records) + 1)
    figure, (axis,) = style.new_figure(1, width=7, height=4.6)
    for arm, name, colour in (
        (SHIFTED, "constant", style.ORANGE),
        (NORMAL, "Gaussian", style.BLUE),
    ):
        label = f"{name} delay: {100 * errors_of(records, arm).mean():.1f} %"
        plot_both_errors(axis, select(records, arm=arm), epochs, label=label, color=colour)
    axis.set(xlabel="epoch", ylabel="error (%); solid validation, dashed train")
    axis.set_title(f"Constant and Gaussian delays of mean {fig05.delay_of(records)}")
    axis.legend()
    return figure
