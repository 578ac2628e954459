"""Figure 11 (b): spikes of the training error of a ResNet at a constant rate, counted, by arm.

S-SGD trains to a minimum with a training error below 2 %. From there, the history full of that
point, every arm goes on at the same constant learning rate, as in the paper. Undamped momentum has
a step ten times as large; damped it has that of the other two.

A spike is what it is in (a), of the training error of an epoch's own updates: batch normalisation
makes the error on the whole set one of running averages, which lag.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from asgd_jax.training.feed import load_dataset
from asgd_jax.training.folder.table import Record
from asgd_jax.training.sweep import sweep
from configs import cifar10_resnet44
from experiments import style
from experiments.claims import Claim, at_most
from experiments.edges.minibatch import trained_params
from experiments.figures.spikes import (
    SPIKE,
    nearest_rate,
    order_claims,
    plot_spike_rates,
    spike_rate,
    spike_table,
)
from experiments.figures.training_runs import (
    run_points,
    select,
    take_arms,
    with_arm,
    with_overrides,
)

START = "S-SGD, to the minimum"
UNDAMPED, DAMPED = "standard momentum", "standard momentum, damped"
NONE, SHIFTED = "no momentum", "shifted momentum"
RESNET_COLOURS = {
    UNDAMPED: style.PURPLE,
    DAMPED: style.RED,
    NONE: style.ORANGE,
    SHIFTED: style.BLUE,
}
_FIELDS = ("momentum", "momentum_kind", "dampening")
_RECIPES = {
    UNDAMPED: "standard",
    DAMPED: "standard_damped",
    NONE: "no_momentum",
    SHIFTED: "shifted",
}
_ERROR = "train_error"
# Where the one arm left and the other stayed; of pilots, seed 200, from the minimum of seed 0.
_ORDER = ((UNDAMPED, NONE, 0.03), (DAMPED, SHIFTED, 0.06), (NONE, SHIFTED, 0.06))


def resnet_preset(
    start: dict[str, Any], rates: Sequence[float], seeds: Sequence[int], **overrides: Any
) -> ConfigDict:
    """Returns the configuration of the panel.

    Args:
      start: what S-SGD's run to the minimum has in the place of the arms' own.
      rates: constant learning rates of the arms.
      seeds: of the order of the samples; the minimum is one and the same.
      overrides: of both.
    """
    train = with_overrides(
        cifar10_resnet44.get_config("no_momentum"), learning_rate_rule="none", **overrides
    )
    to_minimum = with_overrides(
        train.copy_and_resolve_references(), delay=0, num_workers=1, **start
    )
    return ConfigDict(
        {"start": to_minimum, "train": train, "rates": tuple(rates), "seeds": tuple(seeds)}
    )


def run(config: ConfigDict, work: Path) -> list[Record]:
    """Returns the curve of S-SGD to the minimum, then those of every arm, rate and seed."""
    folder = work / "resnet_spikes"
    descent = sweep(config.start, [{"seed": config.start.seed}], work=folder / "start")
    minimum = trained_params(config.start, load_dataset(config.start), folder / "minimum.npz")
    arms = take_arms(cifar10_resnet44.get_config, _RECIPES, _FIELDS)
    points = [{**arm, "learning_rate": rate} for arm in arms.values() for rate in config.rates]
    records = sweep(
        config.train, run_points(points, config.seeds), work=folder / "arms", initial=minimum
    )
    rate = config.start.learning_rate
    first = [{**row, "arm": START, "learning_rate": rate} for row in descent]
    return first + with_arm(records, arms)


def claims(records: pd.DataFrame) -> list[Claim]:
    """Checks that the arms start at a minimum, and their order where one leaves it.

    An order is tested at the rate of the grid that is nearest to that of `_ORDER`.
    """
    start = at_most(
        "(b) training error at the minimum of S-SGD",
        float(select(records, arm=START)[_ERROR].iloc[-1]),
        SPIKE,
    )
    return [start, *order_claims(spike_table(_arms(records), _ERROR), _ORDER, "(b)")]


def notes(records: pd.DataFrame) -> dict[str, Any]:
    """Returns spikes per 1,000 updates of every arm and rate, and their 95 % intervals."""
    table = spike_table(_arms(records), _ERROR)
    found: dict[str, Any] = {
        f"(b) {arm}, {rate:g}: spikes per 1,000 updates": list(spike_rate(table, arm, float(rate)))
        for arm in RESNET_COLOURS
        for rate in np.sort(table.learning_rate.unique())
    }
    pilots = "seed 200, from the minimum of seed 0: smoothing, rates, and where arms are compared"
    return {**found, "(b) pilots": pilots}


def plot_rates(axis: Any, records: pd.DataFrame) -> None:
    """Draws spikes per 1,000 updates at risk against the learning rate, a colour an arm."""
    plot_spike_rates(axis, spike_table(_arms(records), _ERROR), RESNET_COLOURS, apart=0.02)
    style.plain_log(axis, "x")
    axis.set_yscale("symlog", linthresh=1.0)
    axis.set(xlabel="learning rate", ylabel="spikes per 1,000 updates at risk", ylim=(0, 300))
    axis.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
    axis.set_title("ResNet: spikes")
    axis.legend(fontsize=9)


def plot_errors(axis: Any, records: pd.DataFrame) -> None:
    """Draws the training error of every epoch where the arms part, a line a seed."""
    records = _arms(records)
    rate = nearest_rate(records, _ORDER[-1][2])
    lowest = records[_ERROR][records[_ERROR] > 0].min()
    for arm, colour in RESNET_COLOURS.items():
        for number, (_, rows) in enumerate(
            select(records, arm=arm, learning_rate=rate).groupby("seed")
        ):
            errors = 100 * rows[_ERROR].clip(lower=lowest)
            label = None if number else arm
            axis.plot(rows.epoch, errors, color=colour, linewidth=1.0, label=label)
    axis.axhline(100 * SPIKE, color="0.4", linestyle=":", linewidth=1.2)
    axis.set(xlabel="epochs since the minimum", ylabel="training error (%)")
    style.plain_log(axis, "y")
    axis.set_title(f"ResNet at {rate:g}, a line a seed; dotted: a spike")
    axis.legend(fontsize=9, loc="center right")


def _arms(records: pd.DataFrame) -> pd.DataFrame:
    return records[records.arm != START]
