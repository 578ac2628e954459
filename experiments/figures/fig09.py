"""Figure 9: Gaussian delays do as well as the constant delay of the same mean."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from asgd_jax.training.folder.table import Record
from experiments import style
from experiments.claims import Claim, at_most, deviation
from experiments.figures import resnet_arms
from experiments.figures.resnet_arms import NORMAL, SHIFTED, errors_of
from experiments.figures.training_runs import last_epoch, over_seeds, plot_curve, select

CAPTION = (
    "Workers whose delay is Gaussian reach the same validation error as round-robin workers, "
    "whose delay is constant."
)
PROXY = resnet_arms.PROXY
PRESETS = resnet_arms.PRESETS
run = resnet_arms.run

_CLOSE = 0.01  # of validation error, in which two arms agree at the least


def claims(records: Sequence[Record]) -> list[Claim]:
    """Checks that the two final errors differ by no more than seeds do."""
    constant, normal = errors_of(records, SHIFTED), errors_of(records, NORMAL)
    spread = 2 * np.hypot(deviation(constant), deviation(normal))
    return [
        at_most(
            f"final errors of constant and Gaussian delays differ by (bound: {_CLOSE} or two "
            "standard deviations over seeds)",
            abs(constant.mean() - normal.mean()),
            float(np.fmax(_CLOSE, spread)),
        )
    ]


def plot(records: Sequence[Record]) -> Any:
    """Returns the figure: both errors against epochs."""
    epochs = range(1, last_epoch(records) + 1)
    figure, (axis,) = style.new_figure(1, width=7, height=4.6)
    for arm, name, colour in (
        (SHIFTED, "constant", style.ORANGE),
        (NORMAL, "Gaussian", style.BLUE),
    ):
        rows = select(records, arm=arm)
        final = 100 * errors_of(records, arm).mean()
        curve = over_seeds(rows, epochs, "validation_error")
        plot_curve(axis, curve, color=colour, label=f"{name} delay: {final:.1f} %")
        train = over_seeds(rows, epochs, "train_error")
        axis.plot(train.epochs, 100 * train.mean, color=colour, linestyle="--", linewidth=1)
    axis.set(xlabel="epoch", ylabel="error (%); solid validation, dashed train")
    axis.set_title(
        f"Constant or Gaussian delays of mean {resnet_arms.delay_of(records)}: no difference"
    )
    axis.legend()
    return figure
