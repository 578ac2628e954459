"""Figure 3: for every delay the best validation error lies at the learning rate of eq. 8."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from asgd_jax import stability
from asgd_jax.training.folder.table import Record
from asgd_jax.training.sweep import sweep
from configs import cifar10_vgg11, mnist_cnn
from experiments import style
from experiments.claims import Claim, at_most, less_by
from experiments.figures.training_runs import (
    final_errors,
    last_epoch,
    plot_seeds,
    run_points,
    select,
    with_chance,
    with_overrides,
)

CAPTION = (
    "The best validation error is obtained near the stability threshold: for each delay at the "
    "learning rate of eq. 8, where it equals that of S-SGD."
)
PROXY = (
    "VGG-11 with an eighth of the channels, 8 workers and 10,000 images of CIFAR-10; beside it "
    "LeNet with half of the channels, 32 workers of 16 and 6,000 images of MNIST, at delays 3 to 31"
)
WHY = (
    "below its cliff, which begins at 1.4 to 1.7 times eq. 8's rate for every delay, LeNet's error "
    "is flat to .7 %, so that which of these rates is best is chance (at tau = 3 the lowest, by "
    "less than .01 %). At eq. 8's rate A-SGD is .1 to .8 % behind S-SGD at its best, by intervals "
    "that are .6 to 1.5 % wide: that it is less than half a percent is shown at no delay. VGG-11, "
    "twelve epochs old, errs by 54 to 57 % at every rate, seeds by up to 6 % from each other: it "
    "shows neither the rule nor its failure, and S-SGD's own best rate is a step above the one "
    "that is divided."
)

VGG, LENET = "VGG-11 on CIFAR-10", "LeNet on MNIST"
# By name in the configuration.
_PANELS = {"vgg": VGG, "lenet": LENET}
_LAST_ROWS = 3  # measurements at the end, over which an error is averaged
_CLOSE = 0.005  # of validation error: a smaller difference counts as none
_NEXT = 1.2  # factor between rates that are next to each other on the grid, 2^(1/4), rounded up
_GRID = tuple(2.0 ** (k / 4) for k in range(-4, 5))  # of eq. 8's rate
_SSGD_GRID = tuple(2.0 ** (k / 2) for k in range(-2, 3))  # of S-SGD's own


def _panel(train: ConfigDict, delays: Sequence[int], seeds: Sequence[int]) -> ConfigDict:
    return ConfigDict({"train": train, "delays": tuple(delays), "seeds": tuple(seeds)})


def _preset(
    panels: Mapping[str, ConfigDict],
    factors: Sequence[float] = _GRID,
    ssgd_factors: Sequence[float] = _SSGD_GRID,
) -> ConfigDict:
    """Panels by name, of `_PANELS`, and the rates of all.

    Learning rates are those of eq. 8, the baseline's over the delay, times `factors`; those of
    S-SGD the baseline's times `ssgd_factors`.
    """
    grids = {"factors": tuple(factors), "ssgd_factors": tuple(ssgd_factors)}
    return ConfigDict({**panels, **grids})


_DIGITS: dict[str, Any] = {
    "dataset": "digits",
    "model": "mlp",
    "augment": False,
    "num_workers": 8,
    "worker_batch_size": 8,
    "learning_rate": 0.3,
    "num_devices": 1,
    "epochs": 4,
}
_MNIST: dict[str, Any] = {
    "width": 0.5,
    "num_train": 6000,
    "num_validation": 5000,
    "worker_batch_size": 16,
    "eval_every_epochs": 2,
    "epochs": 12,
}
_CIFAR: dict[str, Any] = {
    "width": 0.125,
    "augment": False,
    "num_train": 10_000,
    "num_validation": 2000,
    "num_workers": 8,
    "worker_batch_size": 16,
    "eval_batch_size": 500,
    "learning_rate": 0.1,
    "eval_every_epochs": 2,
    "epochs": 12,
}


def _vgg(**overrides: Any) -> ConfigDict:
    return with_overrides(cifar10_vgg11.get_config(), **overrides)


def _lenet(**overrides: Any) -> ConfigDict:
    return with_overrides(mnist_cnn.get_config(), **overrides)


_LENET_DELAYS = (3, 7, 15, 31)
PRESETS = {
    "smoke": _preset(
        {
            "vgg": _panel(_vgg(**_DIGITS), (3, 7), (0, 1)),
            "lenet": _panel(_vgg(**_DIGITS), (3,), (2, 3)),
        },
        factors=(0.5, 1.0, 2.0),
        ssgd_factors=(1.0,),
    ),
    "cpu": _preset(
        {
            "vgg": _panel(_vgg(**_CIFAR), (7,), range(5)),
            "lenet": _panel(_lenet(**_MNIST), _LENET_DELAYS, range(5)),
        }
    ),
    "paper": _preset(
        {
            "vgg": _panel(_vgg(), (1, 3, 7, 15, 31), range(5)),
            "lenet": _panel(_lenet(epochs=50), _LENET_DELAYS, range(5)),
        }
    ),
}


def run(config: ConfigDict, work: Path) -> list[Record]:
    """Returns the curves of S-SGD and of A-SGD, at every learning rate, panel by panel."""
    records = []
    for panel, name in _PANELS.items():
        rows = _run_panel(config[panel], config, work / f"rates_{panel}")
        records += [{"panel": name, **row} for row in with_chance(rows, config[panel].train)]
    return records


def _run_panel(panel: ConfigDict, config: ConfigDict, work: Path) -> list[Record]:
    baseline = float(panel.train.learning_rate)
    arms = [(0, baseline * factor) for factor in config.ssgd_factors]
    arms += [
        (delay, baseline / delay * factor) for delay in panel.delays for factor in config.factors
    ]
    points = [{"delay": delay, "learning_rate": float(f"{rate:.6g}")} for delay, rate in arms]
    return sweep(panel.train, run_points(points, panel.seeds), work=work)


def claims(records: pd.DataFrame) -> list[Claim]:
    """Checks, for each delay, the error at eq. 8's rate and where the best rate lies."""
    return [
        claim._replace(claim=f"{name}, {claim.claim}")
        for name, rows in _panels(records)
        for claim in _claims(rows)
    ]


def _claims(records: pd.DataFrame) -> list[Claim]:
    baseline = _baseline(records)
    ssgd = _errors(records, 0, baseline)
    found = []
    for delay, rates in _rates(records).items():
        if delay == 0:
            continue
        errors = {rate: _errors(records, delay, rate) for rate in rates}
        eq_8 = min(rates, key=lambda rate: abs(np.log(rate * delay / baseline)))
        best = min(rates, key=lambda rate: errors[rate].mean())
        found += [
            less_by(
                f"tau = {delay}: error at eq. 8's rate less S-SGD's", errors[eq_8], ssgd, _CLOSE
            ),
            at_most(
                f"tau = {delay}: the best rate's distance from eq. 8's, as a factor",
                float(np.exp(abs(np.log(best / eq_8)))),
                _NEXT,
            ),
        ]
    return found


def notes(records: pd.DataFrame) -> dict[str, Any]:
    """Returns S-SGD's best rate over the one whose eq. 8 is drawn."""
    best = {}
    for name, rows in _panels(records):
        rates = _rates(rows)[0]
        least = min(rates, key=lambda rate: _errors(rows, 0, rate).mean())
        best[name] = least / _baseline(rows)
    return {
        "S-SGD's best rate over the one that is divided by the delay": best,
        "pilots": "S-SGD of VGG-11, seed 100, at .05, .1, .2 and .4: its batch and its rate",
    }


def plot(records: pd.DataFrame) -> Any:
    """Returns the figure: final error against the learning rate, a colour a delay."""
    panels = _panels(records)
    figure, axes = style.new_figure(len(panels), width=7.5, height=5)
    for axis, (name, rows) in zip(axes, panels, strict=True):
        _plot_panel(axis, rows)
        axis.set_title(name)
    figure.suptitle(
        "Final error by rate, a point a seed; vertical: dashed eq. 8, dotted the exact rule",
        fontsize=13,
    )
    return figure


def _plot_panel(axis: Any, records: pd.DataFrame) -> None:
    baseline = _baseline(records)
    ssgd = 100 * _errors(records, 0, baseline)
    label = "S-SGD at its rate, range of seeds"
    axis.axhspan(ssgd.min(), ssgd.max(), color=style.BLACK, alpha=0.15, linewidth=0, label=label)
    for index, (delay, rates) in enumerate(_rates(records).items()):
        colour = style.COLOURS[(index - 1) % len(style.COLOURS)] if delay else style.BLACK
        errors = [100 * _errors(records, delay, rate) for rate in rates]
        label = f"τ = {delay}" if delay else "S-SGD"
        plot_seeds(axis, rates, errors, color=colour, label=label)
        axis.axvline(baseline / max(delay, 1), color=colour, linestyle="--", linewidth=1.2)
        if delay:
            exact = stability.rescale_learning_rate(baseline, delay, rule="exact")
            axis.axvline(exact, color=colour, linestyle=":", linewidth=1.2)
    axis.set(xlabel="learning rate", ylabel="final validation error (%)")
    style.plain_log(axis, "x", "y")
    axis.legend(fontsize=10, ncol=3, loc="upper center", bbox_to_anchor=(0.5, -0.13))


def _panels(records: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(name, select(records, panel=name)) for name in records.panel.unique()]


def _baseline(records: pd.DataFrame) -> float:
    """S-SGD's own learning rate: the middle one of its scan."""
    return float(np.median(select(records, delay=0).learning_rate.unique()))


def _rates(records: pd.DataFrame) -> dict[int, list[float]]:
    return {
        int(str(delay)): sorted(rows.learning_rate.unique().tolist())
        for delay, rows in records.groupby("delay")
    }


def _errors(records: pd.DataFrame, delay: int, rate: float) -> np.ndarray:
    rows = select(records, delay=delay, learning_rate=rate)
    return final_errors(rows, last_epoch(records), rows=_LAST_ROWS)
