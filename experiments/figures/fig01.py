"""Figure 1: under delay, a learning rate that is not lowered generalises worse, or diverges."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from asgd_jax import stability
from asgd_jax.training.folder.table import Record
from asgd_jax.training.sweep import sweep
from configs import mnist_cnn
from experiments import style
from experiments.along import measure_along
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
DELAY = int(mnist_cnn.get_config("asgd").delay)

# The authors' framework starts weights and biases uniform within 1/sqrt(fan in), Flax with LeCun's
# normal weights, whose variance is three times as large, and no bias.
TORCH, FLAX = "torch", "flax"
STARTS = {TORCH: "the authors' initialisation", FLAX: "Flax's initialisation"}

WHOLE, EARLY, SHARPNESS = "whole run", "within an epoch", "sharpness"  # the column series


def _preset(
    factors: Sequence[float],
    seeds: Sequence[int],
    flax_seeds: Sequence[int],
    sharpness_epochs: Sequence[float],
    num_sharpness: int,
    starts: Sequence[str] = tuple(STARTS),
    **overrides: Any,
) -> ConfigDict:
    """Learning rates are those of eq. 8 times `factors`, the exact one and the baseline's own.

    `flax_seeds` are of Flax's initialisation; at `early_epochs` every arm is measured besides whole
    epochs; sharpness is measured on so many training images, for the first seed of S-SGD and eq. 8.
    """
    train = with_overrides(mnist_cnn.get_config(), **overrides)
    return ConfigDict(
        {
            "train": train,
            "factors": tuple(factors),
            "seeds": tuple(seeds),
            "flax_seeds": tuple(flax_seeds),
            "initializers": tuple(starts),
            "early_epochs": (0.25, 0.5),
            "sharpness_epochs": tuple(sharpness_epochs),
            "num_sharpness": num_sharpness,
        }
    )


_SCAN = (*(2 ** (k / 2) for k in range(-2, 3)), 4.0, 8.0)
_DIGITS: dict[str, Any] = {"dataset": "digits", "model": "digits_cnn", "worker_batch_size": 4}
_MARKS = (0, 0.25, 0.5, 1, 2, 5, 10)
PRESETS = {
    "smoke": _preset(
        (0.5, 1.0, 2.0), (0, 1), (), (0, 1), 64, (TORCH,), **_DIGITS, epochs=3, num_devices=1
    ),
    "cpu": _preset(_SCAN, range(5), range(3), _MARKS, 1000, epochs=10),
    "paper": _preset(_SCAN, range(5), range(5), (*_MARKS, 20, 50), 10_000, epochs=50),
}

_DIVERGES_ABOVE = 0.05  # of the caption
_CLOSE = 0.005  # of validation error: a smaller difference counts as none


def run(config: ConfigDict, work: Path) -> list[Record]:
    """Returns the curves of S-SGD, and of A-SGD at every learning rate, from both starts."""
    baseline = float(config.train.learning_rate)
    eq_8 = float(f"{baseline / DELAY:.6g}")
    exact = float(f"{baseline * stability.max_learning_rate(DELAY) / 2.0:.6g}")
    rates = sorted({*(float(f"{eq_8 * factor:.6g}") for factor in config.factors), exact})
    ssgd = {"delay": 0, "learning_rate": baseline}
    asgd = [{"delay": DELAY, "learning_rate": rate} for rate in [*rates, baseline]]
    scaled = {"delay": DELAY, "learning_rate": eq_8}
    whole, early, sharp = list[Record](), list[Record](), list[Record]()
    for name in config.initializers:
        train = config.train.copy_and_resolve_references()
        train.model_options.initializer = name
        seeds = config.seeds if name == TORCH else config.flax_seeds
        here, folder = {"initializer": name}, work / f"mnist_rates_{name}"
        whole += _named(sweep(train, run_points([ssgd, *asgd], seeds), work=folder), here)
        points = run_points(asgd, seeds)
        rows = measure_along(train, points, config.early_epochs, folder / "early")
        early += _named(rows, here)
        points = run_points([ssgd, scaled], seeds[:1])
        rows = measure_along(
            train,
            points,
            config.sharpness_epochs,
            folder / "sharpness",
            num_sharpness=config.num_sharpness,
        )
        sharp += _named(rows, here)
    columns = dict.fromkeys(whole[0], float("nan")) | dict.fromkeys(sharp[0], float("nan"))
    table = [
        {"series": series, **columns, **row}
        for series, rows in ((WHOLE, whole), (EARLY, early), (SHARPNESS, sharp))
        for row in rows
    ]
    return with_chance(table, config.train)


def _named(records: Sequence[Record], names: Record) -> list[Record]:
    return [{**names, **record} for record in records]


def rates_of(records: pd.DataFrame) -> list[float]:
    """Returns the learning rates of A-SGD, in order; the last one is the baseline's."""
    return sorted(float(rate) for rate in select(records, delay=DELAY).learning_rate.unique())


def eq_8_of(rates: Sequence[float]) -> float:
    """Returns the rate among these that is eq. 8's."""
    return min(rates, key=lambda rate: abs(np.log(rate * DELAY / rates[-1])))


def exact_of(rates: Sequence[float]) -> float:
    """Returns the rate among these under which as sharp minima are stable as under S-SGD."""
    exact = rates[-1] * stability.max_learning_rate(DELAY) / 2.0
    return min(rates, key=lambda rate: abs(np.log(rate / exact)))


def whole_runs(records: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Returns the rows of whole runs, from each initialisation."""
    rows = select(records, series=WHOLE)
    return {name: select(rows, initializer=name) for name in rows.initializer.unique()}


def claims(records: pd.DataFrame) -> list[Claim]:
    """Checks the gap at the baseline's rate, what diverges, and where the best rate lies."""
    return [
        claim._replace(claim=f"{STARTS[name]}: {claim.claim}")
        for name, rows in whole_runs(records).items()
        for claim in _claims(rows)
    ]


def _claims(records: pd.DataFrame) -> list[Claim]:
    last, rates = last_epoch(records), rates_of(records)
    baseline = rates[-1]
    errors = {rate: final_errors(_asgd(records, rate), last) for rate in rates}
    ssgd = final_errors(select(records, delay=0), last)
    best = min(rates, key=lambda rate: errors[rate].mean())
    eq_8, exact = eq_8_of(rates), exact_of(rates)
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
        less_by(
            "at the exact rate, validation error exceeds S-SGD's by",
            errors[exact],
            ssgd,
            _CLOSE,
        ),
    ]


def plot(records: pd.DataFrame) -> Any:
    """Returns the figure: training curves, and the final error against the learning rate."""
    runs = whole_runs(records)
    last, rates = last_epoch(records), rates_of(records)
    figure, axes = style.new_figure(1 + len(runs), width=5.4, height=4.8)
    figure.suptitle(
        f"Delay {DELAY}: above S-SGD's rate divided by the delay, error grows; at S-SGD's own "
        "rate every run diverges",
        fontsize=14,
    )
    first = next(iter(runs))
    _plot_curves(axes[0], runs[first], range(1, last + 1))
    axes[0].set_title(f"training from {STARTS[first]}\na line a seed")
    for axis, (name, rows) in zip(axes[1:], runs.items(), strict=True):
        _plot_final(axis, rows, last, rates)
        axis.set_title(f"after {last} epochs, from\n{STARTS[name]}")
    # One range for all: from the best seed to the error of a guess.
    low = 80 * min(rows.validation_error.min() for rows in runs.values())
    for axis in axes:
        axis.set_ylim(low, 100)
        style.plain_log(axis, "y")
    return figure


def _plot_curves(axis: Any, records: pd.DataFrame, epochs: Sequence[int]) -> None:
    """S-SGD, and A-SGD at eq. 8's rate, at those within a factor of 4, and at S-SGD's own."""
    rates = rates_of(records)
    eq_8, exact = eq_8_of(rates), exact_of(rates)
    shown = [eq_8 * factor for factor in (0.25, 1.0, 2.0, 4.0)]
    near = sorted({min(rates, key=lambda rate: abs(np.log(rate / each))) for each in shown})
    drawn = [rate for rate in near if rate != exact]
    _plot_training(axis, select(records, delay=0), epochs, f"S-SGD, {rates[-1]:g}", style.BLACK)
    for rate, colour in zip([*drawn, rates[-1]], (*style.COLOURS, "0.5"), strict=False):
        label = f"A-SGD, {rate:.2g}" + (" (eq. 8)" if rate == eq_8 else "")
        _plot_training(axis, _asgd(records, rate), epochs, label, colour)
    axis.set(xlabel="epoch", ylabel="validation error (%)")
    axis.legend(fontsize=9)


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
        exact_of(rates), color=style.PURPLE, linestyle="-.", label="as stable as S-SGD, exactly"
    )
    axis.axvline(
        _DIVERGES_ABOVE, color=style.RED, linestyle=":", label=f"{_DIVERGES_ABOVE}: diverges above"
    )
    look = {"color": style.BLUE, "linewidth": 1.3, "label": "A-SGD: mean, and each seed"}
    plot_seeds(axis, rates, finals, **look)
    axis.set(xlabel="learning rate", ylabel="validation error (%)")
    style.plain_log(axis, "x")
    axis.legend(fontsize=9, loc="center right")


def _asgd(records: pd.DataFrame, rate: float) -> pd.DataFrame:
    return select(records, delay=DELAY, learning_rate=rate)
