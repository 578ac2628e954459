"""Figure 5: with the rate divided by the delay, shifted or no momentum does as well as can be."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from asgd_jax import stability
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
    "in so short a training a large effective rate wins where it is stable. Undamped momentum has "
    "ten times that of the other arms: S-SGD gains by it (64 % against 72 and 73 % without "
    "momentum and damped), A-SGD with standard momentum does not, which can by theory only stay "
    "where sharpness is below .20 (S-SGD: 6.3), and cannot be told from the slow arms instead of "
    "being worse. These would be limited by their rate: with no or shifted momentum A-SGD is "
    "within 1.2 % of S-SGD with no or damped momentum; damped standard momentum to 2.7 %, its runs "
    "differ more. The exact rates are lower still: all end at 77 to 79 %, far from S-SGD of the "
    "same largest stable sharpness."
)

SSGD = "S-SGD, large batch"
SSGD_DAMPED = "S-SGD, damped"
SSGD_NONE = "S-SGD, no momentum"
STANDARD = "standard momentum"
DAMPED = "standard momentum, damped"
SQRT = "standard momentum, rate / √τ"
NONE = "no momentum"
SHIFTED = "shifted momentum"
NORMAL = "shifted momentum, Gaussian delay"
EXACT = ", exact rate"  # of these arms: as sharp minima are stable as under S-SGD
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
    "learning_rate_rule", "learning_rate",
)  # fmt: skip
_COLOURS = {  # of a momentum, by its kind and whether it is damped
    ("heavy_ball", False): style.RED,
    ("heavy_ball", True): style.PURPLE,
    ("shifted", True): style.BLUE,
}
_MARKERS = {SQRT: "v", NORMAL: "D"}  # exact rates ^, S-SGD s, all others o

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
    "cpu": _preset(range(5), **_SMALL, **_CIFAR, epochs=15),
    "paper": _preset((0,), ramp_from=0.1),
}


def run(config: ConfigDict, work: Path) -> list[Record]:
    """Returns the curves of every arm and seed, with the arm's name."""
    arms = _arms(config)
    points = run_points(arms.values(), config.seeds)
    records = sweep(config.train, points, work=work / "resnet_arms")
    return with_chance(with_arm(records, arms), config.train)


def _arms(config: ConfigDict) -> dict[str, dict[str, Any]]:
    """The paper's arms, S-SGD with the others' momentum, and rates of exactly S-SGD's stability."""
    arms = take_arms(imagenet_resnet50.get_config, _ARMS, _FIELDS)
    arms[SSGD_DAMPED] = arms[SSGD] | {"dampening": True}
    arms[SSGD_NONE] = arms[SSGD] | {"momentum": 0.0}
    delay, rate = config.train.num_workers - 1, float(config.train.learning_rate)
    for arm in arms.values():
        arm |= {"learning_rate": rate, "delay": delay if arm["delay"] else 0}
    sharpest = stability.max_sharpness(rate, 0, **_method(arms[SSGD]))
    for name in (DAMPED, NONE, SHIFTED):
        exact = stability.max_learning_rate(delay, sharpness=sharpest, **_method(arms[name]))
        changes = {"learning_rate": float(f"{exact:.6g}"), "learning_rate_rule": "none"}
        arms[name + EXACT] = arms[name] | changes
    if config.ramp_from:
        for arm in arms.values():
            peak = effective_learning_rate(point_config(config.train, arm))
            arm["warmup_from"] = float(f"{config.ramp_from / peak:.6g}")
    return arms


def _method(arm: Mapping[str, Any] | pd.Series) -> dict[str, Any]:
    """The momentum of an arm, or of a row of its records, as `stability` takes it."""
    kind, dampening = str(arm["momentum_kind"]), bool(arm["dampening"])
    return {"momentum": float(arm["momentum"]), "kind": kind, "dampening": dampening}


def stable_sharpness(row: pd.Series) -> float:
    """Returns the largest sharpness that is stable at the full learning rate of an arm's row."""
    delay, rule = int(row.delay), str(row.learning_rate_rule)
    rate = stability.rescale_learning_rate(float(row.learning_rate), delay, rule=rule)
    return stability.max_sharpness(rate, delay, **_method(row))


def errors_of(records: pd.DataFrame, arm: str) -> np.ndarray:
    """Returns an arm's final validation error, of every seed: a mean over the last two epochs."""
    return final_errors(select(records, arm=arm), last_epoch(records), rows=2)


def delay_of(records: pd.DataFrame) -> int:
    """Returns the delay of A-SGD."""
    return int(records.delay.max())


def claims(records: pd.DataFrame) -> list[Claim]:
    """Checks the order of the arms."""
    error = {arm: errors_of(records, arm) for arm in records.arm.unique()}
    alike = (
        (STANDARD, SSGD),
        (NONE, SSGD_NONE),
        (DAMPED, SSGD_DAMPED),
        (SHIFTED, SSGD_DAMPED),
    )
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
        *(
            less_by(
                f"{arm}: error less that of S-SGD with such momentum ({ssgd})",
                error[arm],
                error[ssgd],
                _CLOSE,
            )
            for arm, ssgd in alike
        ),
        *(
            less_by(
                f"{arm}: error less S-SGD's, of the same largest stable sharpness",
                error[arm],
                error[SSGD],
                _CLOSE,
            )
            for arm in (DAMPED + EXACT, NONE + EXACT, SHIFTED + EXACT)
        ),
    ]


def notes(records: pd.DataFrame) -> dict[str, Any]:
    """Returns, for every arm, the largest stable sharpness h*/rate and the final error."""
    return {
        "largest stable sharpness, and final error": {
            str(arm): [
                round(stable_sharpness(rows.iloc[0]), 4),
                float(errors_of(records, str(arm)).mean()),
            ]
            for arm, rows in records.groupby("arm", sort=False)
        },
        "claims added after these runs": "standard momentum and S-SGD; the exact rates",
    }


def plot(records: pd.DataFrame) -> Any:
    """Returns the figure: error against epochs, a panel for each kind of momentum."""
    last = last_epoch(records)
    epochs = range(1, last + 1)
    panels = (
        ("standard momentum", (SSGD, STANDARD, DAMPED, SQRT)),
        ("no momentum", (SSGD, SSGD_NONE, NONE)),
        ("shifted", (SSGD, SSGD_DAMPED, SHIFTED)),
    )
    figure, axes = style.new_figure(len(panels) + 1, width=4.8, height=4.4)
    _plot_final(axes.pop(), records)
    figure.suptitle(
        f"A-SGD, delay {delay_of(records)}, learning rate / τ, against S-SGD: "
        "solid validation, dashed training error, grey the drops of the rate",
        fontsize=14,
    )
    colours = (style.BLUE, style.ORANGE, style.RED, style.PURPLE)
    for axis, (title, arms) in zip(axes, panels, strict=True):
        for share in _DROPS:
            axis.axvline(share * last, color="0.6", linewidth=1.0, zorder=0)
        for arm, colour in zip(arms, colours, strict=False):
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
        axis.set_yticks(range(0, 101, 20))
        axis.set_ylim(lowest, 106)  # room for the legend
    axes[0].set_ylabel("error (%)")
    return figure


def _plot_final(axis: Any, records: pd.DataFrame) -> None:
    """Final error against the largest stable sharpness: a colour a momentum, a marker a rate."""
    for name, rows in records.groupby("arm", sort=False):
        arm, row = str(name), rows.iloc[0]
        errors = 100 * errors_of(records, arm)
        places = np.full(len(errors), stable_sharpness(row))
        plain = "o" if row.delay else "s"
        colour = _COLOURS[row.momentum_kind, bool(row.dampening)] if row.momentum else style.ORANGE
        axis.plot(
            places,
            errors,
            "^" if arm.endswith(EXACT) else _MARKERS.get(arm, plain),
            color=colour,
            markersize=5,
            alpha=0.7,
            label=arm,
        )
    axis.set(xlabel="largest stable sharpness, h*/rate", ylabel="final validation error (%)")
    axis.set_title("squares S-SGD; a point a seed")
    style.plain_log(axis, "x", "y")
    axis.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.02))
