"""The runs of figures 5 and 9: S-SGD and the momentum arms of A-SGD, with a falling rate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from asgd_jax.training import default_config
from asgd_jax.training.folder.table import Record
from asgd_jax.training.optimizer import effective_learning_rate
from asgd_jax.training.sweep import point_config, sweep
from experiments.figures.training_runs import (
    final_errors,
    last_epoch,
    run_points,
    select,
    with_arm,
    with_chance,
)

PROXY = (
    "16 workers (tau = 15) of 16 samples, a ResNet-8 of a quarter of the width and 5,000 images "
    "of CIFAR-10 in the place of ResNet-50 on ImageNet"
)

_HEAVY: dict[str, Any] = {"momentum_kind": "heavy_ball", "dampening": False, "momentum": 0.9}
_CONSTANT = {"delay_distribution": "constant", "worker_schedule": "random"}
_NORMAL = {"delay_distribution": "workers", "worker_schedule": "normal"}
_SHIFTED = {"momentum_kind": "shifted", "dampening": True}

SSGD = "S-SGD, large batch"
STANDARD = "standard momentum"
DAMPED = "standard momentum, damped"
SQRT = "standard momentum, rate / √τ"
NONE = "no momentum"
SHIFTED = "shifted momentum"
NORMAL = "shifted momentum, Gaussian delay"


def make_arms(delay: int) -> dict[str, dict[str, Any]]:
    """Returns the fields of every arm, by its name; `delay` is that of A-SGD."""
    constant = _HEAVY | _CONSTANT
    asgd = constant | {"delay": delay, "learning_rate_rule": "inverse"}
    return {
        SSGD: constant | {"delay": 0, "learning_rate_rule": "none"},
        STANDARD: asgd,
        DAMPED: asgd | {"dampening": True},
        SQRT: asgd | {"learning_rate_rule": "sqrt"},
        NONE: asgd | {"momentum": 0.0},
        SHIFTED: asgd | _SHIFTED,
        NORMAL: asgd | _SHIFTED | _NORMAL,
    }


def _config(seeds: Sequence[int], *, ramp_from: float = 0.0, **training: Any) -> ConfigDict:
    """The recipe of Goyal et al. (2017): a ramp, then a tenth of the rate at 1/3, 2/3 and 8/9.

    The ramp begins at the learning rate `ramp_from`, the same for every arm.
    """
    train = default_config()
    train.dataset, train.model, train.augment = "cifar10", "resnet20", True
    train.num_workers, train.num_devices = 32, 1
    train.weight_decay, train.weight_decay_on = 1e-4, "kernels"
    train.update(training)
    train.decay_epochs = tuple(round(train.epochs * share, 3) for share in (1 / 3, 2 / 3, 8 / 9))
    config = ConfigDict()
    config.train = train
    config.ramp_from = ramp_from
    config.seeds = tuple(seeds)
    return config


PRESETS = {
    "smoke": _config(
        (0, 1),
        dataset="digits",
        model="mlp",
        augment=False,
        worker_batch_size=4,
        learning_rate=0.5,
        epochs=3,
    ),
    "cpu": _config(
        (0, 1),
        model_options={"stage_sizes": (1, 1, 1)},
        width=0.25,
        num_train=5000,
        num_validation=2000,
        num_workers=16,
        worker_batch_size=16,
        learning_rate=0.6,
        warmup_epochs=1.0,
        epochs=15,
    ),
    "paper": _config(
        (0,), ramp_from=0.1, dataset="imagenet2012", augment=False, model="resnet50",
        worker_batch_size=256, learning_rate=3.2, momentum=0.9, warmup_epochs=5.0, epochs=90,
        eval_batch_size=1024, num_devices=None,
    ),
}  # fmt: skip


def run(config: ConfigDict, work: Path) -> list[Record]:
    """Returns the curves of every arm and seed, with the arm's name."""
    arms = make_arms(config.train.num_workers - 1)
    if config.ramp_from:
        for arm in arms.values():
            peak = effective_learning_rate(point_config(config.train, arm))
            arm["warmup_from"] = float(f"{config.ramp_from / peak:.6g}")
    records = sweep(config.train, run_points(arms, config.seeds), work=work / "resnet_arms")
    return with_chance(with_arm(records, arms), config.train)


def errors_of(records: Sequence[Record], arm: str) -> np.ndarray:
    """Returns an arm's final validation error, of every seed: a mean over the last two epochs."""
    return final_errors(select(records, arm=arm), last_epoch(records), rows=2)


def delay_of(records: Sequence[Record]) -> int:
    """Returns the delay of A-SGD."""
    return int(max(record["delay"] for record in records))
