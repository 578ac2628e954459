"""The runs of figures 1 and 13: LeNet on MNIST, learning rates times seeds under one delay."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from asgd_jax.training import default_config
from asgd_jax.training.folder.table import Record
from asgd_jax.training.sweep import sweep
from experiments.figures.training_runs import run_points, select, with_chance

BASELINE = 0.32  # learning rate of S-SGD, batch 2048
DELAY = 31


def _config(factors: Sequence[float], seeds: Sequence[int], **training: Any) -> ConfigDict:
    """Learning rates are those of eq. 8 times `factors`, and the baseline's own, un-rescaled."""
    train = default_config()
    train.dataset, train.normalize, train.model = "mnist", "half", "mnist_cnn"
    train.num_workers, train.worker_batch_size = DELAY + 1, 64
    train.learning_rate, train.num_devices = BASELINE, 1
    train.update(training)
    config = ConfigDict()
    config.train = train
    config.factors = tuple(factors)
    config.seeds = tuple(seeds)
    return config


_SCAN = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
PRESETS = {
    "smoke": _config(
        (0.5, 1.0, 2.0),
        (0, 1),
        dataset="digits",
        model="digits_cnn",
        worker_batch_size=4,
        epochs=3,
    ),
    "cpu": _config(_SCAN, (0, 1), epochs=6),
    "paper": _config(_SCAN, range(5), epochs=50, num_devices=None),
}


def eq_8(config: ConfigDict) -> float:
    """Returns the baseline's learning rate divided by the delay."""
    return float(f"{config.train.learning_rate / DELAY:.6g}")


def run(config: ConfigDict, work: Path) -> list[Record]:
    """Returns the curves of S-SGD, and of A-SGD at every learning rate."""
    rates = [float(f"{eq_8(config) * factor:.6g}") for factor in config.factors]
    baseline = float(config.train.learning_rate)
    arms = {"ssgd": {"delay": 0, "learning_rate": baseline}}
    arms |= {str(rate): {"delay": DELAY, "learning_rate": rate} for rate in [*rates, baseline]}
    records = sweep(config.train, run_points(arms, config.seeds), work=work / "mnist_rates")
    return with_chance(records, config.train)


def rates_of(records: Sequence[Record]) -> list[float]:
    """Returns the learning rates of A-SGD, in order; the last one is the baseline's."""
    return sorted({float(record["learning_rate"]) for record in select(records, delay=DELAY)})
