"""Figure 5: with the rate divided by the delay, shifted or no momentum does as well as can be."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from asgd_jax.training.folder.table import Record
from asgd_jax.training.optimizer import effective_learning_rate
from asgd_jax.training.sweep import point_config, sweep
from configs import imagenet_resnet50
from experiments import style
from experiments.claims import Claim, equivalent, less_by, more_by
from experiments.figures.training_runs import (
    did_diverge,
    final_errors,
    last_epoch,
    plot_both_errors,
    run_points,
    select,
    take_arms,
    with_arm,
    with_chance,
    with_overrides,
)

CAPTION = (
    "With the learning rate divided by the delay, A-SGD with standard momentum is worst; turning "
    "momentum off, or shifting it, comes close to S-SGD; a rate over sqrt(tau) does not converge."
)
PROXY = (
    "16 workers (tau = 15) of 16 samples, a ResNet-8 of a quarter of the width and 5,000 images "
    "of CIFAR-10 in the place of ResNet-50 on ImageNet"
)
WHY = (
    "two seeds leave every difference but the largest open. Beyond that, an undamped rate "
    "divided by the delay does not keep the arms comparable: the largest stable sharpness "
    "h*/eta is 6.3 for S-SGD, 3.3 shifted, 2.5 without momentum, 2.0 damped and .20 undamped, "
    "and without momentum the effective rate is a tenth of the undamped arms', for a few "
    "thousand updates only."
)

SSGD = "S-SGD, large batch"
STANDARD = "standard momentum"
DAMPED = "standard momentum, damped"
SQRT = "standard momentum, rate / √τ"
NONE = "no momentum"
SHIFTED = "shifted momentum"
NORMAL = "shifted momentum, Gaussian delay"
_ARMS = {
    SSGD: "ssgd",
    STANDARD: "standard",
    DAMPED: "standard_damped",
    SQRT: "standard_sqrt",
    NONE: "no_momentum",
    SHIFTED: "shifted",
    NORMAL: "shifted_normal",
}
_FIELDS = (
    "momentum_kind", "dampening", "momentum", "delay_distribution", "worker_schedule", "delay",
    "learning_rate_rule",
)  # fmt: skip

_CLOSE = 0.02  # of validation error
_DROPS = (1 / 3, 2 / 3, 8 / 9)  # of the rate, shares of the epochs


def _preset(seeds: Sequence[int], *, ramp_from: float = 0.0, **overrides: Any) -> ConfigDict:
    """The recipe's decay, at 1/3, 2/3 and 8/9 of the epochs; rows are an epoch's.

    The ramp begins at the learning rate `ramp_from`, the same for every arm.
    """
    train = with_overrides(
        imagenet_resnet50.get_config(), log_every_steps=None, warmup_from=0.0, **overrides
    )
    train.decay_epochs = tuple(round(train.epochs * share, 3) for share in _DROPS)
    return ConfigDict({"train": train, "ramp_from": ramp_from, "seeds": tuple(seeds)})


_SMALL: dict[str, Any] = {"momentum": 0.0, "eval_batch_size": 500}
_DIGITS: dict[str, Any] = {
    "dataset": "digits",
    "model": "mlp",
    "worker_batch_size": 4,
    "learning_rate": 0.5,
    "warmup_epochs": 0.0,
    "num_devices": 1,
}
_CIFAR: dict[str, Any] = {
    "dataset": "cifar10",
    "augment": True,
    "num_train": 5000,
    "num_validation": 2000,
    "model": "resnet20",
    "model_options": {"stage_sizes": (1, 1, 1)},
    "width": 0.25,
    "num_workers": 16,
    "worker_batch_size": 16,
    "learning_rate": 0.6,
    "warmup_epochs": 1.0,
}
PRESETS = {
    "smoke": _preset((0, 1), **_SMALL, **_DIGITS, epochs=3),
    "cpu": _preset((0, 1), **_SMALL, **_CIFAR, epochs=15),
    "paper": _preset((0,), ramp_from=0.1),
}


def run(config: ConfigDict, work: Path) -> list[Record]:
    """Returns the curves of every arm and seed, with the arm's name."""
    arms = take_arms(imagenet_resnet50.get_config, _ARMS, _FIELDS)
    for arm in arms.values():
        if arm["delay"]:
            arm["delay"] = config.train.num_workers - 1
        if config.ramp_from:
            peak = effective_learning_rate(point_config(config.train, arm))
            arm["warmup_from"] = float(f"{config.ramp_from / peak:.6g}")
    points = run_points(arms.values(), config.seeds)
    records = sweep(config.train, points, work=work / "resnet_arms")
    return with_chance(with_arm(records, arms), config.train)


def errors_of(records: pd.DataFrame, arm: str) -> np.ndarray:
    """Returns an arm's final validation error, of every seed: a mean over the last two epochs."""
    return final_errors(select(records, arm=arm), last_epoch(records), rows=2)


def delay_of(records: pd.DataFrame) -> int:
    """Returns the delay of A-SGD."""
    return int(records.delay.max())


def claims(records: pd.DataFrame) -> list[Claim]:
    """Checks the order of the arms."""
    error = {arm: errors_of(records, arm) for arm in (SSGD, STANDARD, DAMPED, NONE, SHIFTED, SQRT)}
    next_worst = max((DAMPED, NONE, SHIFTED), key=lambda arm: error[arm].mean())
    return [
        more_by(
            f"standard momentum's error less that of the next worst ({next_worst})",
            error[STANDARD],
            error[next_worst],
            0.0,
        ),
        equivalent(
            "no momentum's error less shifted momentum's", error[NONE], error[SHIFTED], _CLOSE
        ),
        less_by(
            "shifted momentum's error less S-SGD's (its momentum is not damped: its effective rate "
            "is ten times as large, which a short training favours)",
            error[SHIFTED],
            error[SSGD],
            _CLOSE,
        ),
        more_by(
            "the rate over sqrt(tau): error less that of the rate over tau",
            error[SQRT],
            error[STANDARD],
            0.05,
        ),
    ]


def plot(records: pd.DataFrame) -> Any:
    """Returns the figure: error against epochs, a panel for each kind of momentum."""
    last = last_epoch(records)
    epochs = range(1, last + 1)
    panels = (
        ("standard momentum", (STANDARD, DAMPED, SQRT)),
        ("no momentum", (NONE,)),
        ("shifted", (SHIFTED,)),
    )
    figure, axes = style.new_figure(len(panels), width=4.8, height=4.4)
    figure.suptitle(
        f"A-SGD, delay {delay_of(records)}, learning rate / τ, against S-SGD: "
        "solid validation, dashed training error, grey the drops of the rate",
        fontsize=14,
    )
    colours = (style.BLUE, style.ORANGE, style.RED, style.PURPLE)
    for axis, (title, arms) in zip(axes, panels, strict=True):
        for share in _DROPS:
            axis.axvline(share * last, color="0.6", linewidth=1.0, zorder=0)
        for arm, colour in zip((SSGD, *arms), colours, strict=False):
            rows = select(records, arm=arm)
            final = 100 * errors_of(records, arm).mean()
            note = ", diverges" if did_diverge(rows) else ""
            label = f"{arm}: {final:.1f} %{note}"
            plot_both_errors(axis, rows, epochs, label=label, color=colour)
        axis.set_title(title)
        axis.set(xlabel="epoch")
        axis.legend(fontsize=8, loc="upper right")
    lowest = min(axis.get_ylim()[0] for axis in axes)
    for axis in axes:
        axis.set_yticks([tick for tick in axis.get_yticks() if lowest <= tick <= 100])
        axis.set_ylim(lowest, 106)  # room for the legend
    axes[0].set_ylabel("error (%)")
    return figure
