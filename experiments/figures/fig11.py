"""Figure 11: at a constant rate, spikes in the training error, and what momentum does to them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from asgd_jax.training.folder.table import Record
from asgd_jax.training.sweep import sweep
from configs import cifar10_resnet44
from experiments import style
from experiments.claims import Claim, at_least, at_most
from experiments.figures import spikes
from experiments.figures.training_runs import (
    did_diverge,
    run_points,
    select,
    take_arms,
    with_arm,
    with_overrides,
)

CAPTION = (
    "After many epochs at a constant learning rate the training error under delay shows spikes, "
    "with momentum and without; shifted momentum removes them."
)
PROXY = (
    "(a) an MLP on digits, label smoothing 0.1; (b) a ResNet-8 of half width on 1,000 images of "
    "CIFAR-10 in the place of ResNet-44 on all"
)
WHY = (
    "of the ResNet (b), the runs do not get to where spikes show: at this rate, this data and this "
    "width the training error is still above one half in the end. Of the digits (a), one run of 30 "
    "had a spike 10 % or more below its arm's edge, no momentum at .03: the edge is that of the "
    "sharpness of a minimum that S-SGD found, and batches of 16 have curvatures of their own; in "
    "the order of the arms the theory is right, in the place where spikes begin it is not."
)
DELAY = int(cifar10_resnet44.get_config("shifted").delay)

STANDARD, NONE, SHIFTED = "standard momentum", "no momentum", "shifted momentum"
_COLOURS = {STANDARD: style.RED, NONE: style.ORANGE, SHIFTED: style.BLUE}
_ARMS = take_arms(
    cifar10_resnet44.get_config,
    {STANDARD: "standard", NONE: "no_momentum", SHIFTED: "shifted"},
    ("momentum", "momentum_kind", "dampening"),
)

_WINDOW = 5  # epochs on each side, whose median an epoch is compared with
_FACTOR = 2.0  # a spike is an epoch above so many times that median ...
_LEAST = 0.02  # ... and at least so much of error above it


def _preset(digits: ConfigDict, seeds: Sequence[int], **overrides: Any) -> ConfigDict:
    train = with_overrides(cifar10_resnet44.get_config("no_momentum"), **overrides)
    return ConfigDict({"digits": digits, "train": train, "seeds": tuple(seeds)})


_DIGITS: dict[str, Any] = {
    "dataset": "digits",
    "model": "mlp",
    "model_options": {},
    "augment": False,
    "num_train": 256,
    "worker_batch_size": 8,
    "num_devices": 1,
}
_CIFAR: dict[str, Any] = {
    "model": "resnet20",
    "model_options": {"stage_sizes": (1, 1, 1), "zero_init_residual": True},
    "width": 0.5,
    "num_train": 1000,
    "num_validation": 500,
    "worker_batch_size": 32,
    "augment": False,
}
# Seventy thousand rows: no column that nothing reads.
_COLUMNS = (
    *("panel", "arm", "learning_rate", "seed", "epoch", "steps", "sharpness"),
    *("train_error", "full_train_error", "diverged_at"),
)
PRESETS = {
    "smoke": _preset(spikes.PRESETS["smoke"], (0,), **_DIGITS, epochs=4),
    "cpu": _preset(spikes.PRESETS["cpu"], (0,), **_CIFAR, epochs=120),
    "paper": _preset(spikes.PRESETS["paper"], range(3)),
}


def run(config: ConfigDict, work: Path) -> list[Record]:
    """Returns the curves of every arm and seed, with the arm's name."""
    counted = spikes.run(config.digits, work)
    points = run_points(_ARMS.values(), config.seeds)
    records = with_arm(sweep(config.train, points, work=work / "resnet_constant_rate"), _ARMS)
    known = {"panel": "b", "learning_rate": config.train.learning_rate, "sharpness": np.nan}
    rows = [{"panel": "a", **each} for each in counted] + [{**known, **each} for each in records]
    return [{name: row[name] for name in _COLUMNS} for row in rows]


def _panels(records: pd.DataFrame) -> tuple[pd.DataFrame | None, pd.DataFrame]:
    """The rows of (a), None in tables that are older than it, and those of (b)."""
    if "panel" not in records:
        return None, records
    return select(records, panel="a"), select(records, panel="b")


def notes(records: pd.DataFrame) -> dict[str, Any]:
    """Returns what (a) rests on."""
    counted, _ = _panels(records)
    return {} if counted is None else spikes.notes(counted)


def count_spikes(errors: np.ndarray) -> int:
    """Returns how many epochs of the second half have a training error that is a spike.

    A spike is an epoch whose error exceeds twice the median of the eleven epochs around it, and
    that median by .02; neighbouring ones count once.

    >>> calm = np.full(40, 0.01)
    >>> calm[[30, 31, 35]] = 0.2
    >>> count_spikes(calm)
    2
    """
    half = len(errors) // 2
    above = []
    for epoch in range(half, len(errors)):
        median = np.median(errors[max(0, epoch - _WINDOW) : epoch + _WINDOW + 1])
        above.append(errors[epoch] > max(_FACTOR * median, median + _LEAST))
    return int(np.sum(np.diff(np.array([False, *above]).astype(int)) == 1))


def claims(records: pd.DataFrame) -> list[Claim]:
    """Checks (a), see `spikes.claims`, and counts the spikes of (b), summed over seeds."""
    counted, records = _panels(records)
    found = {arm: sum(count_spikes(errors) for errors in _errors(records, arm)) for arm in _ARMS}
    return [
        *([] if counted is None else spikes.claims(counted)),
        at_most(
            "training error of the best arm at the end (spikes show where it is low)",
            min(float(errors[-1]) for arm in _ARMS for errors in _errors(records, arm)),
            0.2,
        ),
        at_least(f"spikes with {STANDARD}", found[STANDARD], 1),
        at_least(f"spikes with {NONE}", found[NONE], 1),
        at_most(f"spikes with {SHIFTED}", found[SHIFTED], 0),
        at_least(f"spikes with {NONE} less those with {SHIFTED}", found[NONE] - found[SHIFTED], 1),
    ]


def plot(records: pd.DataFrame) -> Any:
    """Returns the figure: (a) spikes by rate; (b) training error by epoch, a panel an arm."""
    counted, records = _panels(records)
    figure, axes = style.new_figure(len(_ARMS) + (counted is not None), width=4.6, height=4)
    if counted is not None:
        spikes.plot(axes.pop(0), counted)
    figure.suptitle(f"Training error at a constant learning rate, delay {DELAY}", fontsize=14)
    for axis, arm in zip(axes, _ARMS, strict=True):
        runs = _errors(records, arm)
        for errors in runs:
            epochs = np.arange(1, len(errors) + 1)
            axis.plot(epochs, 100 * errors, color=_COLOURS[arm], linewidth=1.2)
        number = sum(count_spikes(errors) for errors in runs)
        diverged = did_diverge(select(records, arm=arm))
        axis.set_title(f"{arm}: {number} spikes" + (", diverges" if diverged else ""))
        axis.set(xlabel="epoch")
        style.plain_log(axis, "y")
    axes[0].set_ylabel("training error (%)")
    limits = [limit for axis in axes for limit in axis.get_ylim()]
    for axis in axes:
        axis.set_ylim(min(limits), max(limits))
    return figure


def _errors(records: pd.DataFrame, arm: str) -> list[np.ndarray]:
    """The training error of every epoch, an array a seed."""
    rows = select(records, arm=arm)
    return [run.train_error.to_numpy() for _, run in rows.groupby("seed")]
