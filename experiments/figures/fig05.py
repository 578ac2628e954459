"""Figure 5: with the rate divided by the delay, shifted or no momentum does as well as can be."""

from collections.abc import Sequence
from typing import Any

from asgd_jax.training.folder.table import Record
from experiments import style
from experiments.claims import Claim, at_least, at_most
from experiments.figures import resnet_arms
from experiments.figures.resnet_arms import (
    DAMPED,
    NONE,
    SHIFTED,
    SQRT,
    SSGD,
    STANDARD,
    errors_of,
)
from experiments.figures.training_runs import (
    did_diverge,
    last_epoch,
    over_seeds,
    plot_curve,
    select,
)

CAPTION = (
    "With the learning rate divided by the delay, A-SGD with standard momentum is worst; turning "
    "momentum off, or shifting it, comes close to S-SGD; a rate over sqrt(tau) does not converge."
)
PROXY = resnet_arms.PROXY
PRESETS = resnet_arms.PRESETS
run = resnet_arms.run

_CLOSE = 0.02  # of validation error


def claims(records: Sequence[Record]) -> list[Claim]:
    """Checks the order of the arms."""
    error = {
        arm: errors_of(records, arm).mean() for arm in (SSGD, STANDARD, DAMPED, NONE, SHIFTED, SQRT)
    }
    others = max(error[arm] for arm in (DAMPED, NONE, SHIFTED))
    return [
        at_least(
            "standard momentum's error less that of the next worst", error[STANDARD] - others, 0.0
        ),
        at_most(
            "no momentum and shifted momentum differ by", abs(error[NONE] - error[SHIFTED]), _CLOSE
        ),
        at_most(
            "shifted momentum's error less S-SGD's (its momentum is not damped: its effective rate "
            "is ten times as large, which a short training favours)",
            error[SHIFTED] - error[SSGD],
            _CLOSE,
        ),
        at_least(
            "the rate over sqrt(tau): error less that of the rate over tau",
            error[SQRT] - error[STANDARD],
            0.05,
        ),
    ]


def plot(records: Sequence[Record]) -> Any:
    """Returns the figure: error against epochs, a panel for each kind of momentum."""
    last = last_epoch(records)
    epochs = range(1, last + 1)
    panels = (
        ("standard momentum", (STANDARD, DAMPED)),
        ("no momentum", (NONE,)),
        ("shifted", (SHIFTED,)),
    )
    figure, axes = style.new_figure(len(panels), width=4.8, height=4.2)
    figure.suptitle(
        f"A-SGD, delay {resnet_arms.delay_of(records)}, learning rate / τ, against S-SGD",
        fontsize=14,
    )
    for axis, (title, arms) in zip(axes, panels, strict=True):
        for arm, colour in zip((SSGD, *arms), (style.BLUE, style.ORANGE, style.RED), strict=False):
            rows = select(records, arm=arm)
            final = 100 * errors_of(records, arm).mean()
            note = ", diverges" if did_diverge(rows) else ""
            curve = over_seeds(rows, epochs, "validation_error")
            plot_curve(axis, curve, color=colour, label=f"{arm}: {final:.1f} %{note}")
            train = over_seeds(rows, epochs, "train_error")
            axis.plot(train.epochs, 100 * train.mean, color=colour, linestyle="--", linewidth=1)
        axis.set_title(title)
        axis.set(xlabel="epoch")
        axis.legend(fontsize=9, loc="upper right")
    lowest = min(axis.get_ylim()[0] for axis in axes)
    for axis in axes:
        axis.set_ylim(lowest, 100)
    axes[0].set_ylabel("error (%); solid validation, dashed train")
    return figure
