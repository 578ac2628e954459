"""Figure 1: under delay, a learning rate that is not lowered generalises worse, or diverges."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from asgd_jax.training.folder.table import Record
from asgd_jax.training.sweep import sweep
from configs import mnist_cnn
from experiments import style
from experiments.claims import Claim, at_least, at_most, less_by, more_by
from experiments.figures.training_runs import (
    NEXT_RATE,
    by_seed,
    chance_error,
    did_diverge,
    final_errors,
    last_epoch,
    plot_seeds,
    run_points,
    select,
    with_chance,
    with_overrides,
)

CAPTION = (
    "Unless the learning rate is lowered in proportion to 1/tau, validation error under a delay "
    "is worse than that of the equivalent large batch (S-SGD); large learning rates diverge."
)
WHY = (
    "two seeds, for which a difference must be six standard errors to be seen: the point "
    "estimate is on the right side, its interval reaches 1.5 % to each side. It takes five "
    "seeds or more."
)
DELAY = int(mnist_cnn.get_config("asgd").delay)


def _preset(factors: Sequence[float], seeds: Sequence[int], **overrides: Any) -> ConfigDict:
    """Learning rates are those of eq. 8 times `factors`, and the baseline's own, un-rescaled."""
    train = with_overrides(mnist_cnn.get_config(), **overrides)
    return ConfigDict({"train": train, "factors": tuple(factors), "seeds": tuple(seeds)})


_SCAN = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_DIGITS: dict[str, Any] = {"dataset": "digits", "model": "digits_cnn", "worker_batch_size": 4}
PRESETS = {
    "smoke": _preset((0.5, 1.0, 2.0), (0, 1), **_DIGITS, epochs=3, num_devices=1),
    "cpu": _preset(_SCAN, (0, 1), epochs=6),
    "paper": _preset(_SCAN, range(5), epochs=50),
}

_DIVERGES_ABOVE = 0.05  # of the caption
_CLOSE = 0.005  # of validation error: a smaller difference counts as none


def run(config: ConfigDict, work: Path) -> list[Record]:
    """Returns the curves of S-SGD, and of A-SGD at every learning rate."""
    baseline = float(config.train.learning_rate)
    eq_8 = float(f"{baseline / DELAY:.6g}")
    rates = [float(f"{eq_8 * factor:.6g}") for factor in config.factors]
    arms = [{"delay": 0, "learning_rate": baseline}]
    arms += [{"delay": DELAY, "learning_rate": rate} for rate in [*rates, baseline]]
    records = sweep(config.train, run_points(arms, config.seeds), work=work / "mnist_rates")
    return with_chance(records, config.train)


def rates_of(records: pd.DataFrame) -> list[float]:
    """Returns the learning rates of A-SGD, in order; the last one is the baseline's."""
    return sorted(float(rate) for rate in select(records, delay=DELAY).learning_rate.unique())


def claims(records: pd.DataFrame) -> list[Claim]:
    """Checks the gap at the baseline's rate, what diverges, and where the best rate lies."""
    last, rates = last_epoch(records), rates_of(records)
    baseline = rates[-1]
    errors = {rate: final_errors(_asgd(records, rate), last) for rate in rates}
    ssgd = final_errors(select(records, delay=0), last)
    best = min(rates, key=lambda rate: errors[rate].mean())
    eq_8 = min(rates, key=lambda rate: abs(np.log(rate * DELAY / baseline)))
    chance = chance_error(records)
    too_large = [rate for rate in rates if rate > _DIVERGES_ABOVE]
    return [
        more_by(
            f"un-rescaled ({baseline:g}), A-SGD's validation error exceeds S-SGD's by",
            errors[baseline],
            ssgd,
            0.02,
        ),
        at_least(
            f"share of the runs at rates above {_DIVERGES_ABOVE} that end above half of chance's "
            "error",
            float(np.mean([errors[rate] > chance / 2 for rate in too_large])),
            1.0,
        ),
        at_most(
            "the best rate's distance from eq. 8's, as a factor",
            float(np.exp(abs(np.log(best / eq_8)))),
            NEXT_RATE,
        ),
        less_by(
            "at eq. 8's rate, validation error exceeds S-SGD's by",
            errors[eq_8],
            ssgd,
            _CLOSE,
        ),
    ]


def plot(records: pd.DataFrame) -> Any:
    """Returns the figure: training curves, and the final error against the learning rate."""
    last, rates = last_epoch(records), rates_of(records)
    epochs = range(1, last + 1)
    figure, (left, right) = style.new_figure(2, width=6, height=4.6)
    figure.suptitle(
        f"Delay {DELAY}: above S-SGD's rate divided by the delay, error grows; at S-SGD's own "
        "rate every run diverges",
        fontsize=14,
    )
    _plot_training(left, select(records, delay=0), epochs, f"S-SGD, {rates[-1]:g}", style.BLACK)
    for rate, colour in zip(rates, (*style.COLOURS, "0.5"), strict=False):
        _plot_training(left, _asgd(records, rate), epochs, f"A-SGD, {rate:.2g}", colour)
    left.set(xlabel="epoch", ylabel="validation error (%)")
    style.plain_log(left, "y")
    left.set_title("training: a line a seed")
    left.legend(fontsize=9)
    _plot_final(right, records, last, rates)
    right.set_ylim(left.get_ylim())
    return figure


def _plot_training(
    axis: Any, records: pd.DataFrame, epochs: Sequence[int], label: str, colour: str
) -> None:
    """A line a seed; of a run that diverged, chance's error from then on."""
    note = " (diverges)" if did_diverge(records) else ""
    for number, errors in enumerate(by_seed(records, epochs, "validation_error")):
        axis.plot(
            epochs,
            100 * errors,
            color=colour,
            linewidth=1.3,
            linestyle="--" if colour == style.BLACK else "-",
            label=None if number else label + note,
        )


def _plot_final(axis: Any, records: pd.DataFrame, last: int, rates: Sequence[float]) -> None:
    finals = [100 * final_errors(_asgd(records, rate), last) for rate in rates]
    ssgd = 100 * final_errors(select(records, delay=0), last)
    for number, error in enumerate(ssgd):
        label = None if number else "S-SGD, a line a seed"
        axis.axhline(error, color=style.BLACK, linestyle="--", linewidth=1.0, label=label)
    axis.axvline(
        rates[-1] / DELAY, color=style.GREEN, linestyle=":", label="eq. 8: S-SGD's rate / τ"
    )
    axis.axvline(
        _DIVERGES_ABOVE, color=style.RED, linestyle=":", label=f"{_DIVERGES_ABOVE}: diverges above"
    )
    look = {"color": style.BLUE, "linewidth": 1.3, "label": "A-SGD: mean, and each seed"}
    plot_seeds(axis, rates, finals, **look)
    axis.set(xlabel="learning rate", ylabel="validation error (%)")
    style.plain_log(axis, "x", "y")
    axis.set_title(f"after {last} epochs")
    axis.legend(fontsize=9, loc="center right")


def _asgd(records: pd.DataFrame, rate: float) -> pd.DataFrame:
    return select(records, delay=DELAY, learning_rate=rate)
