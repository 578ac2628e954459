r"""A transformer in an asynchronous pipeline: what staleness costs, and what is won by whom.

The character transformer of `configs/char_transformer.py`, a block a stage, is trained with each
of five methods without delay, with every parameter as old as the first stage's, and with the
pipeline's own profile. A pilot of one seed tries several learning rates for each; the other seeds
run at its best one and are what is reported: validation loss at the end, as one gets who tunes.

Theory says of each method how far the delay lowers its largest stable rate, while its
preconditioner stands still (`stability.optimizer_max_learning_rate`). Does that order of methods
predict the order of their losses?
"""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pandas as pd
from ml_collections import ConfigDict

from asgd_jax import delayed, predict, stability
from asgd_jax.training.folder.table import Record
from asgd_jax.training.sweep import sweep
from configs import char_transformer
from experiments import style
from experiments.claims import Claim, at_least, less_by
from experiments.figures.training_runs import run_points, select, with_overrides

CAPTION = (
    "A pipeline's profile of delays costs a transformer less than the delay of its first stage "
    "everywhere, with every method; of two methods of the Adam family with different stability "
    "limits under delay the one with the larger limit ends at the lower loss."
)
WHY = (
    "with undamped momentum of .9 the rates that the pilot's seed found best are next to where "
    "others diverge or stall: SGD in the pipeline ends between 2.8 and 3.3 by seed, NAdamW with "
    "beta1 = .99 between 2.9 and 3.2, so that five seeds do not tell the profiles apart."
)
SYNC, EVERYWHERE, PROFILE = "sync", "uniform", "pipeline"
METHOD_NAMES = {
    "sgd": "SGD, momentum .9",
    "adamw": "AdamW",
    "prediction": "AdamW, prediction",
    "dc_ema": "AdamW, DC-EMA",
    "nesterov": "NAdamW, β₁ = .99",
}


def _preset(
    seeds: Any, rates: Mapping[str, tuple[float, ...]], stages: int = 8, **overrides: Any
) -> ConfigDict:
    """Learning rates by method, and a block a stage; other overrides are of all runs."""
    train = with_overrides(char_transformer.get_config(), **overrides)
    train.num_workers = stages
    train.model_options.num_blocks = stages
    return ConfigDict({"train": train, "seeds": tuple(seeds), "rates": dict(rates)})


# Around what a first look at one seed found without delay.
_ADAM_RATES = (0.0003, 0.001, 0.003, 0.01)
_RATES = {
    "sgd": (0.01, 0.03, 0.1, 0.3),
    "adamw": _ADAM_RATES,
    "prediction": _ADAM_RATES,
    "dc_ema": _ADAM_RATES,
    "nesterov": _ADAM_RATES,
}
PRESETS = {
    "smoke": _preset(
        (0, 1),
        {"adamw": (0.001,)},
        stages=2,
        width=0.125,
        num_train=256,
        num_validation=32,
        num_devices=1,
    ),
    "cpu": _preset(range(5), _RATES, width=0.5, num_train=3200, epochs=2),
    "paper": _preset(range(5), _RATES, epochs=20),
}
PROXY = "half the width and 400 updates, for a transformer that is trained to the end"

_APART = 1.1  # of two limits: closer ones say nothing of the losses
PILOT, SEEDS = "pilot", "seeds"
_PILOT_SEED = 100
_SHARED = ("num_train", "num_validation", "width", "epochs", "num_devices", "model_options")


def run(config: ConfigDict, work: Path) -> list[Record]:
    """Returns the curves of every delay and method at every rate."""
    found: list[Record] = []
    stages = config.train.num_workers
    for profile in char_transformer.DELAYS:
        for method, rates in config.rates.items():
            train = char_transformer.get_config(f"{profile}_{method}")
            train.update({name: config.train[name] for name in _SHARED})
            if profile != SYNC:
                train.update(num_workers=stages, delay=stages - 1)
            names = {"profile": profile, "method": method, "delay": train.delay}
            names["limit"] = stability_limit(method, profile, train.delay)
            folder = work / "pipeline" / f"{profile}_{method}"
            arms = [{"learning_rate": float(rate)} for rate in rates]
            pilot = sweep(train, run_points(arms, [_PILOT_SEED]), work=folder / "pilot")
            best = {"learning_rate": best_rate(pd.DataFrame(pilot))}
            reported = sweep(train, run_points([best], config.seeds), work=folder / "seeds")
            for series, records in ((PILOT, pilot), (SEEDS, reported)):
                found += [{"series": series, **names, **record} for record in records]
    return found


def _ends(rows: pd.DataFrame) -> pd.DataFrame:
    """The last rows of runs that have not diverged."""
    return rows[(rows.steps == rows.steps.max()) & (rows.diverged_at < 0)]


def best_rate(pilot: pd.DataFrame) -> float:
    """Returns the learning rate of the least validation loss at the end; of no diverged run."""
    ends = _ends(pilot)
    return float(ends.loc[ends.validation_loss.idxmin()].learning_rate)


def stability_limit(method: str, profile: str, delay: int) -> float:
    """Returns h* of a method, its preconditioner held: learning rate x preconditioned sharpness.

    At a held preconditioner Adam is a damped heavy ball, and its prediction that of momentum. The
    correction of DC-EMA vanishes at a minimum, with the squared gradients. NaN for a pipeline,
    whose limit depends on how the curvature lies in the stages.
    """
    if profile == PROFILE:
        return float("nan")
    if method == "sgd":
        return stability.max_learning_rate(delay, momentum=0.9, dampening=False)
    return stability.optimizer_max_learning_rate(lambda rate: _HELD[method](rate, delay), 0)


def _heavy_ball(rate: Any) -> optax.GradientTransformation:
    return optax.sgd(0.1 * rate, momentum=0.9)


def _predicted(rate: Any, delay: int) -> optax.GradientTransformation:
    return delayed(_heavy_ball(rate), delay, predict=predict.momentum(0.1 * rate, decay=0.9))


_HELD: dict[str, Callable[[Any, int], optax.GradientTransformation]] = {
    "adamw": lambda rate, delay: delayed(_heavy_ball(rate), delay),
    "dc_ema": lambda rate, delay: delayed(_heavy_ball(rate), delay),
    "prediction": _predicted,
    "nesterov": lambda rate, delay: delayed(
        optax.sgd(0.01 * rate, momentum=0.99, nesterov=True), delay
    ),
}


def _methods(records: pd.DataFrame) -> list[str]:
    return [name for name in METHOD_NAMES if (records.method == name).any()]


def final_losses(records: pd.DataFrame, profile: str, method: str) -> np.ndarray:
    """Returns each seed's validation loss at the end, infinite where it diverged."""
    rows = select(records, series=SEEDS, profile=profile, method=method)
    losses = _ends(rows).set_index("seed").validation_loss
    return losses.reindex(sorted(rows.seed.unique()), fill_value=np.inf).to_numpy(float)


def claims(records: pd.DataFrame) -> list[Claim]:
    """Checks what the profile costs, and whether the limits order the losses."""
    methods, delay = _methods(records), int(records.delay.max())
    cost = {
        (profile, method): final_losses(records, profile, method)
        for profile in (SYNC, EVERYWHERE, PROFILE)
        for method in methods
    }
    found = [
        less_by(
            f"{METHOD_NAMES[method]}: validation loss of the pipeline's profile minus that of its "
            f"largest delay everywhere",
            cost[PROFILE, method],
            cost[EVERYWHERE, method],
            0.0,
        )
        for method in methods
    ]
    limits = records[records.profile == EVERYWHERE].groupby("method").limit.first()
    adaptive = [method for method in methods if method != "sgd"]  # one unit for all their rates
    for better, worse in itertools.permutations(adaptive, 2):
        if limits[better] > _APART * limits[worse]:
            found.append(
                less_by(
                    f"delay {delay} everywhere: loss of {METHOD_NAMES[better]} minus that of "
                    f"{METHOD_NAMES[worse]}, whose limit is the lower one",
                    cost[EVERYWHERE, better],
                    cost[EVERYWHERE, worse],
                    0.0,
                )
            )
    rates = [
        best_rate(select(records, series=PILOT, profile=profile, method="adamw"))
        for profile in (SYNC, EVERYWHERE)
    ]
    found.append(
        at_least(
            "AdamW: best learning rate without delay over that with it everywhere",
            rates[0] / rates[1],
            2.0,
        )
    )
    return found


def notes(records: pd.DataFrame) -> dict[str, Any]:
    """Returns limits, best rates and losses by method and delay."""
    table = {}
    for profile in (SYNC, EVERYWHERE, PROFILE):
        for method in _methods(records):
            rows = select(records, profile=profile, method=method)
            rate = best_rate(rows[rows.series == PILOT])
            losses = final_losses(records, profile, method)
            table[f"{profile}, {METHOD_NAMES[method]}"] = {
                "limit of rate x preconditioned sharpness": round(float(rows.limit.iloc[0]), 4)
                if profile != PROFILE
                else None,
                "best learning rate": rate,
                "validation loss": round(float(losses.mean()), 4),
            }
    return {"at the best rate": table}


def plot(records: pd.DataFrame) -> Any:
    """Returns the figure: loss over rate, a panel a delay; and the best losses side by side."""
    delay = int(records.delay.max())
    titles = {
        SYNC: "no delay",
        PROFILE: f"pipeline: delays {delay} to 0",
        EVERYWHERE: f"delay {delay} everywhere",
    }
    figure, axes = style.new_figure(4, width=4.1, height=4.4)
    figure.suptitle(
        "A transformer in a pipeline: what staleness costs (left: a pilot; right: a point a seed)",
        fontsize=14,
    )
    top = 1.02 * records.validation_loss[records.steps == records.steps.max()].quantile(0.95)
    bottom = 0.98 * records.validation_loss.min()
    for axis, (profile, title) in zip(axes, titles.items(), strict=False):
        for method, colour in zip(_methods(records), style.COLOURS, strict=False):
            rows = select(records, series=PILOT, profile=profile, method=method)
            ends = _ends(rows)
            look = {"color": colour, "marker": "o", "markersize": 3.5}
            axis.plot(ends.learning_rate, ends.validation_loss, label=METHOD_NAMES[method], **look)
        axis.set_xscale("log")
        axis.set(title=title, xlabel="learning rate", ylim=(bottom, top), xlim=(2e-4, 0.5))
    axes[0].set_ylabel("validation loss [nats a character]")
    axes[0].legend(fontsize=9)
    _draw_best(axes[3], records, titles)
    axes[3].set_ylim(bottom, top)
    return figure


def _draw_best(axis: Any, records: pd.DataFrame, titles: dict[str, str]) -> None:
    marks = {SYNC: ("o", style.BLACK), PROFILE: ("s", style.BLUE), EVERYWHERE: ("^", style.ORANGE)}
    methods = _methods(records)
    for profile, (marker, colour) in marks.items():
        for place, method in enumerate(methods):
            losses = final_losses(records, profile, method)
            axis.plot(
                np.full(len(losses), place),
                losses,
                marker,
                color=colour,
                label=titles[profile] if place == 0 else None,
            )
    names = [METHOD_NAMES[method] for method in methods]
    axis.set_xticks(range(len(methods)), names, rotation=30, ha="right")
    axis.set_title("at the best rate of each")
    axis.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
