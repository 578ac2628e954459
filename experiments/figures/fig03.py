"""Figure 3: for every delay the best validation error lies at the learning rate of eq. 8."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from asgd_jax import stability
from asgd_jax.training import default_config
from asgd_jax.training.folder.table import Record
from asgd_jax.training.sweep import sweep
from experiments import style
from experiments.claims import Claim, at_most, deviation
from experiments.figures.training_runs import (
    final_errors,
    last_epoch,
    run_points,
    select,
    with_chance,
)

CAPTION = (
    "The best validation error is obtained near the stability threshold: for each delay at the "
    "learning rate of eq. 8, where it equals that of S-SGD."
)
PROXY = "LeNet on 6,000 images of MNIST in the place of VGG-11 on CIFAR-10"

_LAST_ROWS = 3  # measurements at the end, over which an error is averaged
_CLOSE = 0.002  # of validation error, in which two arms agree at the least


def _config(
    delays: Sequence[int], factors: Sequence[float], seeds: Sequence[int], **training: Any
) -> ConfigDict:
    """Learning rates are those of eq. 8, the baseline's over the delay, times `factors`."""
    train = default_config()
    train.dataset, train.model, train.augment = "cifar10", "vgg11", True
    train.num_workers, train.worker_batch_size = 32, 128
    train.learning_rate, train.num_devices = 0.8, 1
    train.update(training)
    config = ConfigDict()
    config.train = train
    config.delays = tuple(delays)
    config.factors = tuple(factors)
    config.seeds = tuple(seeds)
    return config


_SCAN = (0.25, 0.5, 0.79, 1.0, 2.0, 4.0)  # .79: the exact rule at large delays
PRESETS = {
    "smoke": _config(
        (3, 7),
        (0.5, 1.0, 2.0),
        (0, 1),
        dataset="digits",
        model="mlp",
        augment=False,
        num_workers=8,
        worker_batch_size=8,
        learning_rate=0.3,
        epochs=4,
    ),
    "cpu": _config(
        (3, 7, 15, 31),
        _SCAN,
        (0, 1, 2),
        dataset="mnist",
        normalize="half",
        model="mnist_cnn",
        width=0.5,
        augment=False,
        num_train=6000,
        num_validation=5000,
        num_workers=32,
        worker_batch_size=16,
        learning_rate=0.32,
        epochs=12,
        eval_every_epochs=2,
    ),
    "paper": _config((1, 3, 7, 15, 31), _SCAN, range(5), epochs=200, num_devices=None),
}


def run(config: ConfigDict, work: Path) -> list[Record]:
    """Returns the curves of S-SGD, and of A-SGD at every delay and learning rate."""
    baseline = float(config.train.learning_rate)
    arms = {"ssgd": {"delay": 0, "learning_rate": baseline}}
    for delay in config.delays:
        for factor in config.factors:
            rate = float(f"{baseline / delay * factor:.6g}")
            arms[f"{delay} {factor}"] = {"delay": delay, "learning_rate": rate}
    records = sweep(config.train, run_points(arms, config.seeds), work=work / "vgg_rates")
    return with_chance(records, config.train)


def claims(records: Sequence[Record]) -> list[Claim]:
    """Checks, for each delay, the error at eq. 8's rate and where the best rate lies."""
    ssgd, baseline = _ssgd(records)
    found = []
    for delay, rates in _rates(records).items():
        errors = {rate: _errors(records, delay, rate) for rate in rates}
        eq_8 = min(rates, key=lambda rate: abs(np.log(rate * delay / baseline)))
        best = min(rates, key=lambda rate: errors[rate].mean())
        spread = np.fmax(_CLOSE, deviation(ssgd))
        found += [
            at_most(
                f"tau = {delay}: error at eq. 8's rate less S-SGD's "
                f"(bound: S-SGD's standard deviation, or {_CLOSE})",
                errors[eq_8].mean() - ssgd.mean(),
                float(spread),
            ),
            at_most(
                f"tau = {delay}: the best rate's distance from eq. 8's, as a factor",
                float(np.exp(abs(np.log(best / eq_8)))),
                2.001,
            ),
        ]
    return found


def plot(records: Sequence[Record]) -> Any:
    """Returns the figure: final error against the learning rate, a colour a delay."""
    ssgd, baseline = _ssgd(records)
    figure, (axis,) = style.new_figure(1, width=8.5, height=5)
    axis.axhline(100 * ssgd.mean(), color=style.BLACK, linestyle="--", linewidth=1.3)
    axis.text(1.0, 100 * ssgd.mean(), " S-SGD", transform=axis.get_yaxis_transform(), va="center")
    for index, (delay, rates) in enumerate(_rates(records).items()):
        colour = style.COLOURS[index % len(style.COLOURS)]
        errors = np.stack([100 * _errors(records, delay, rate) for rate in rates])
        mean, std = errors.mean(axis=1), deviation(errors.T)
        axis.plot(rates, mean, color=colour, marker=style.MARKERS[index], label=f"τ = {delay}")
        # One standard deviation, within what the seeds gave: on this axis there is nothing below 0.
        low, high = np.fmax(mean - std, errors.min(axis=1)), np.fmin(mean + std, errors.max(axis=1))
        axis.fill_between(rates, low, high, color=colour, alpha=0.2, linewidth=0)
        axis.axvline(baseline / delay, color=colour, linestyle="--", linewidth=1.2)
        exact = stability.rescale_learning_rate(baseline, delay, rule="exact")
        axis.axvline(exact, color=colour, linestyle=":", linewidth=1.2)
    axis.set(
        xscale="log", yscale="log", xlabel="learning rate", ylabel="final validation error (%)"
    )
    axis.set_title(
        "Just above the rate of eq. 8 the error leaps up, for every delay\n"
        "vertical: eq. 8, dashed S-SGD's rate / τ, dotted the exact rule"
    )
    axis.legend()
    return figure


def _ssgd(records: Sequence[Record]) -> tuple[np.ndarray, float]:
    """S-SGD's final error of every seed, and its learning rate."""
    rows = select(records, delay=0)
    return final_errors(rows, last_epoch(records), rows=_LAST_ROWS), float(rows[0]["learning_rate"])


def _rates(records: Sequence[Record]) -> dict[int, list[float]]:
    delays = sorted({int(record["delay"]) for record in records} - {0})
    return {
        delay: sorted({float(row["learning_rate"]) for row in select(records, delay=delay)})
        for delay in delays
    }


def _errors(records: Sequence[Record], delay: int, rate: float) -> np.ndarray:
    rows = select(records, delay=delay, learning_rate=rate)
    return final_errors(rows, last_epoch(records), rows=_LAST_ROWS)
