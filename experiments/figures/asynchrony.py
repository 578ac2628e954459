"""Four real workers, their replay in the simulator, and what is done about a straggler.

Compute times are injected (`worker_times`), far above what a gradient takes: the staleness is that
of workers on machines of their own, whatever else this one does. The replay is the simulator's
compiled loop on the recorded updates.csv; whether the two programs of the run end with the same
bits is asked of `python -m asgd_jax.cluster.replay`.
"""

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from asgd_jax import delays
from asgd_jax.cluster.log import UPDATES_FILE
from asgd_jax.cluster.real_run import load_real_config
from asgd_jax.cluster.replay import replay_config
from asgd_jax.cluster.summary import simulate_measured
from asgd_jax.cluster.train import train_async
from asgd_jax.training import train
from asgd_jax.training.folder.metrics import read_rows
from asgd_jax.training.folder.table import Record
from asgd_jax.training.recorded import read_updates
from configs import digits, mnist_cnn
from experiments import style
from experiments.claims import Claim, at_least, at_most, near

CAPTION = (
    "A run of real asynchronous workers and its replay in the simulator are one curve; their "
    "staleness is that of simulated workers with the measured compute times, of mean N - 1; and "
    "where one worker lags behind, dropping its gradients costs less time than waiting for it."
)
PROXY = "a cluster: its workers are processes of one machine, with injected compute times"

WHY = (
    "the last bits in which the compiled loop sums otherwise grow along a run of a "
    "convolutional network until its train loss differs by two parts in a thousand, while the same "
    "two programs end with the same bits."
)

REAL, REPLAY = "real", "replay"
MEASURED_STALENESS, SIMULATED, GEOMETRIC = "measured", "simulated", "random order"
EVERYBODY, DROPPING, WAITING = "no limit", "drop", "wait"
NUM_WORKERS = 4


class Config(NamedTuple):
    """Epochs on digits and on MNIST, MNIST's samples, compute times in seconds, the limit."""

    digits_epochs: int = 8
    mnist_epochs: int = 3
    mnist_samples: int = 8_000
    width: float = 0.5
    seconds: float = 0.08
    straggler_factor: float = 15.0
    max_staleness: int = 8


PRESETS = {
    "smoke": Config(2, 0, 1_000, 0.25, 0.04, 8.0, 6),
    "cpu": Config(),
    "paper": Config(40, 20, 60_000, 1.0),
}


def _digits(config: Config) -> ConfigDict:
    train_config = digits.get_config("asgd")
    train_config.update(worker_batch_size=32, epochs=config.digits_epochs, log_every_steps=11)
    train_config.learning_rate_rule = "none"
    train_config.learning_rate = 0.05
    train_config.worker_times = f"lognormal {config.seconds} .3"
    return train_config


def _mnist(config: Config) -> ConfigDict:
    train_config = mnist_cnn.get_config("asgd_same")
    train_config.update(
        width=config.width,
        num_train=config.mnist_samples,
        num_validation=1_000,
        epochs=config.mnist_epochs,
        learning_rate=0.05,
        log_every_steps=25,
    )
    train_config.worker_times = f"lognormal {config.seconds} .3"
    return train_config


def _runs(config: Config) -> dict[tuple[str, str], ConfigDict]:
    """The configuration of every run, by data set and policy."""
    found = {("digits", EVERYBODY): _digits(config)}
    if config.mnist_epochs:
        found["mnist", EVERYBODY] = _mnist(config)
    for policy in (EVERYBODY, DROPPING, WAITING):
        lagging = _digits(config)
        lagging.worker_times = f"straggler {config.seconds / 2} {config.straggler_factor}"
        if policy != EVERYBODY:
            lagging.update(max_staleness=config.max_staleness, staleness_policy=policy)
        found["straggler", policy] = lagging
    return found


def run(config: Config, work: Path) -> list[Record]:
    """Returns loss curves, staleness and wasted work; runs that are finished are not repeated."""
    records = []
    for (data, policy), train_config in _runs(config).items():
        folder = work / "async" / f"{data}_{policy.replace(' ', '_')}"
        summary = train_async(train_config, folder, num_workers=NUM_WORKERS)
        same = {"data": data, "policy": policy}
        records += [{**same, **row} for row in _curve(folder, REAL)]
        if data == "straggler":
            wasted = summary["wasted"]
            values = {
                "seconds": float(read_updates(folder / UPDATES_FILE).seconds[-1]),
                "dropped seconds": wasted["dropped_seconds"],
                "waited seconds": wasted["waited_seconds"],
                "largest staleness": summary["staleness"]["max"],
                "limit": config.max_staleness,
            }
            records += [{**same, **_row(name, REAL, 0, value)} for name, value in values.items()]
            continue
        records += [{**same, **row} for row in (*_replay(folder), *_staleness(folder))]
    return records


def _row(kind: str, source: str, at: float, value: float, seconds: float = math.nan) -> Record:
    return {"kind": kind, "source": source, "at": at, "value": value, "seconds": seconds}


def _curve(folder: Path, source: str) -> list[Record]:
    """Loss against updates, and the seconds of the real run."""
    rows = read_rows(folder)
    times = read_updates(folder / UPDATES_FILE).seconds if source == REAL else None
    return [
        _row(
            "train loss",
            source,
            row["step"],
            row["train_loss"],
            math.nan if times is None else float(times[int(row["step"]) - 1]),
        )
        for row in rows
    ]


def _replay(folder: Path) -> list[Record]:
    """The same run in the compiled loop, and whether its two programs end with the same bits."""
    again = folder / "replay"
    train(replay_config(load_real_config(folder), folder / UPDATES_FILE), again)
    command = [sys.executable, "-m", "asgd_jax.cluster.replay", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    same = "same programs: equal bit by bit" in done.stdout
    return [*_curve(again, REPLAY), _row("equal bits", REPLAY, 0, float(same))]


def _staleness(folder: Path) -> list[Record]:
    """Shares of each staleness: measured, of simulated workers, and of a random order."""
    updates = read_updates(folder / UPDATES_FILE)
    count = updates.staleness.size
    found = {
        MEASURED_STALENESS: updates.staleness,
        SIMULATED: simulate_measured(updates, NUM_WORKERS),
        GEOMETRIC: delays.simulate_workers(NUM_WORKERS, count, "random"),
    }
    return [
        _row("staleness", source, age, float(np.mean(each == age)))
        for source, each in found.items()
        for age in range(int(each.max()) + 1)
    ]


def _select(records: pd.DataFrame, **fields: Any) -> pd.DataFrame:
    return records[np.all([records[name] == value for name, value in fields.items()], axis=0)]


def _data_sets(records: pd.DataFrame) -> list[str]:
    return [name for name in ("digits", "mnist") if name in set(records.data)]


def plot(records: pd.DataFrame) -> Any:
    """Curves of the runs and of their replays, staleness, and the straggler's loss against time."""
    names = _data_sets(records)
    figure, axes = style.new_figure(2 * len(names) + 1, width=4.2)
    for name, axis in zip(names, axes, strict=False):
        for source, dashes, colour in ((REAL, "-", style.BLUE), (REPLAY, "--", style.ORANGE)):
            rows = _select(records, data=name, kind="train loss", source=source)
            axis.plot(rows["at"], rows.value, dashes, color=colour, label=source)
        axis.set(xlabel="updates", ylabel="train loss", title=f"{name}, 4 workers")
        axis.legend()
    for name, axis in zip(names, axes[len(names) :], strict=False):
        for source, marker, colour in zip(
            (MEASURED_STALENESS, SIMULATED, GEOMETRIC), style.MARKERS, style.COLOURS, strict=False
        ):
            rows = _select(records, data=name, kind="staleness", source=source)
            rows = rows[rows["at"] <= 12]
            axis.plot(rows["at"], rows.value, marker=marker, color=colour, label=source)
        axis.set(xlabel="staleness", ylabel="share of the updates", title=f"{name}, staleness")
        axis.legend()
    for policy, colour in zip((EVERYBODY, DROPPING, WAITING), style.COLOURS, strict=False):
        rows = _select(records, data="straggler", policy=policy, kind="train loss")
        axes[-1].plot(rows.seconds, rows.value, color=colour, label=policy)
    axes[-1].set(xlabel="seconds", ylabel="train loss", title="digits, one straggler")
    axes[-1].legend()
    return figure


def claims(records: pd.DataFrame) -> list[Claim]:
    """The caption, in numbers."""
    found: list[Claim] = []
    for name in _data_sets(records):
        found += _of_replay(records, name)
    limit = _number(records, "limit", WAITING)
    waiting, dropping = (
        _number(records, "largest staleness", policy) for policy in (WAITING, DROPPING)
    )
    return [
        *found,
        at_most("straggler: the largest staleness where it is waited for", waiting, limit),
        at_most("straggler: and where it is dropped", dropping, limit),
        at_least(
            "straggler: time of waiting over that of dropping, for as many updates",
            _number(records, "seconds", WAITING) / _number(records, "seconds", DROPPING),
            1.5,
        ),
    ]


def _of_replay(records: pd.DataFrame, name: str) -> Sequence[Claim]:
    real, again = (
        _select(records, data=name, kind="train loss", source=source).value.to_numpy()
        for source in (REAL, REPLAY)
    )
    shares = {
        source: _select(records, data=name, kind="staleness", source=source)
        for source in (MEASURED_STALENESS, SIMULATED)
    }
    measured = shares[MEASURED_STALENESS]
    (same,) = _select(records, data=name, kind="equal bits").value
    return (
        at_least(f"{name}: replays by the same programs with equal bits", same, 1),
        at_most(
            f"{name}: largest relative difference of train loss, replay in the compiled loop",
            float(np.abs(again / real - 1).max()),
            1e-3,
        ),
        near(f"{name}: mean staleness is N - 1", measured["at"] @ measured.value,
             NUM_WORKERS - 1, 0.1),
        at_most(
            f"{name}: distance of measured and simulated staleness (total variation)",
            _distance(*shares.values()),
            0.2,
        ),
    )  # fmt: skip


def _distance(first: pd.DataFrame, second: pd.DataFrame) -> float:
    both = [dict(zip(each["at"], each.value, strict=True)) for each in (first, second)]
    ages = {age for each in both for age in each}
    return sum(abs(both[0].get(age, 0.0) - both[1].get(age, 0.0)) for age in ages) / 2


def _number(records: pd.DataFrame, kind: str, policy: str) -> float:
    (value,) = _select(records, data="straggler", policy=policy, kind=kind).value
    return float(value)
