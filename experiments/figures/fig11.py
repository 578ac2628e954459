"""Figure 11: at a constant rate, spikes in the training error, and what momentum does to them."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from asgd_jax.training.folder.table import Record
from experiments import style
from experiments.claims import Claim
from experiments.figures import spikes, spikes_resnet
from experiments.figures.spikes import DELAY
from experiments.figures.training_runs import select

CAPTION = (
    "After many epochs at a constant learning rate the training error under delay shows spikes, "
    "with momentum and without; shifted momentum removes them."
)
PROXY = (
    "(a) an MLP on digits; (b) a ResNet-8 of a quarter of the width, from a minimum of S-SGD on "
    "256 images of CIFAR-10, in the place of ResNet-44 on all; both with label smoothing 0.1"
)
WHY = (
    "of the digits (a), one run of 30 had a spike 10 % or more below its arm's edge, no momentum "
    "at .03: the edge is that of the sharpness of a minimum that S-SGD found, and batches of 16 "
    "have curvatures of their own; in the order of the arms the theory is right, in the place "
    "where spikes begin it is not."
)

# Seventy thousand rows: no column that nothing reads.
_COLUMNS = (
    *("panel", "arm", "learning_rate", "seed", "epoch", "steps", "sharpness"),
    *("train_error", "full_train_error", "diverged_at"),
)
_RESNET: dict[str, Any] = {
    "model": "resnet20",
    "model_options": {"stage_sizes": (1, 1, 1), "zero_init_residual": True},
    "width": 0.25,
    "num_train": 256,
    "num_validation": 100,
    "eval_batch_size": 100,
    "worker_batch_size": 16,
    "augment": False,
    "label_smoothing": 0.1,
}
_DIGITS: dict[str, Any] = {
    "dataset": "digits",
    "model": "mlp",
    "model_options": {},
    "augment": False,
    "num_train": 256,
    "worker_batch_size": 8,
    "num_devices": 1,
}


def _preset(digits: ConfigDict, resnet: ConfigDict) -> ConfigDict:
    return ConfigDict({"digits": digits, "resnet": resnet})


def _start(learning_rate: float, epochs: int) -> dict[str, Any]:
    """S-SGD to the minimum, in one batch an update; seed 0 was the pilots'."""
    return {"momentum": 0.9, "learning_rate": learning_rate, "epochs": epochs, "seed": 1}


PRESETS = {
    "smoke": _preset(
        spikes.PRESETS["smoke"],
        spikes_resnet.resnet_preset(_start(0.03, 4), (0.03, 0.06), (0,), **_DIGITS, epochs=4),
    ),
    "cpu": _preset(
        spikes.PRESETS["cpu"],
        spikes_resnet.resnet_preset(
            _start(0.03, 200), (0.03, 0.06, 0.12), range(5), **_RESNET, epochs=120
        ),
    ),
    "paper": _preset(
        spikes.PRESETS["paper"],
        spikes_resnet.resnet_preset(_start(0.1, 200), (0.05, 0.1, 0.2), range(3), epochs=200),
    ),
}


def run(config: ConfigDict, work: Path) -> list[Record]:
    """Returns the curves of every arm, rate and seed of both panels."""
    counted = spikes.run(config.digits, work)
    resnet = spikes_resnet.run(config.resnet, work)
    known = {"panel": "b", "sharpness": np.nan, "full_train_error": np.nan}
    rows = [{"panel": "a", **each} for each in counted] + [{**each, **known} for each in resnet]
    return [{name: row[name] for name in _COLUMNS} for row in rows]


def _panels(records: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    return select(records, panel="a"), select(records, panel="b")


def claims(records: pd.DataFrame) -> list[Claim]:
    """Checks both panels, see `spikes.claims` and `spikes_resnet.claims`."""
    digits, resnet = _panels(records)
    return [*spikes.claims(digits), *spikes_resnet.claims(resnet)]


def notes(records: pd.DataFrame) -> dict[str, Any]:
    """Returns what both panels rest on."""
    digits, resnet = _panels(records)
    return {**spikes.notes(digits), **spikes_resnet.notes(resnet)}


def plot(records: pd.DataFrame) -> Any:
    """Returns the figure: spikes by rate, of digits and the ResNet; its training error by epoch."""
    digits, resnet = _panels(records)
    figure, axes = style.new_figure(3, width=5.4, height=4.4)
    spikes.plot(axes[0], digits)
    spikes_resnet.plot_rates(axes[1], resnet)
    spikes_resnet.plot_errors(axes[2], resnet)
    figure.suptitle(
        f"Constant rates, delay {DELAY}: shifted momentum spikes last, bars 95 % intervals",
        fontsize=14,
    )
    return figure
