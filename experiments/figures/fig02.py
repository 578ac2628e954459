"""Figure 2: minima are left above a learning rate that is inversely proportional to the delay."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pandas as pd
from ml_collections import ConfigDict

from asgd_jax import stability
from asgd_jax.training.folder.table import Record
from configs import cifar10_vgg11
from experiments import style
from experiments.claims import Claim, at_least, at_most, fit_line
from experiments.edges.fullbatch import measure_max_learning_rate
from experiments.edges.minibatch import RESOLUTION, find_edges, reach_minimum
from experiments.edges.minimum import digits_problem, find_minimum
from experiments.figures.training_runs import select, with_overrides

CAPTION = (
    "A minimum is left only above a threshold of the learning rate, and one over that threshold "
    "is linear in the delay."
)
PROXY = (
    "VGG-11 with an eighth of the channels, 1,024 images of CIFAR-10, label smoothing 0.1 "
    "(so that the minimum keeps its sharpness); full-batch line: an MLP on digits"
)
MINI_BATCH = "mini-batch"
FULL_BATCH = "full batch"


def _preset(
    delays: Sequence[int],
    seeds: Sequence[int],
    full_batch_delays: Sequence[int],
    *,
    worker_batch_size: int,
    **overrides: Any,
) -> ConfigDict:
    """Overrides are of S-SGD's run to the minimum; each A-SGD update has one worker's batch."""
    return ConfigDict(
        {
            "start": with_overrides(cifar10_vgg11.get_config(), **overrides),
            "worker_batch_size": worker_batch_size,
            "delays": tuple(delays),
            "full_batch_delays": tuple(full_batch_delays),
            "seeds": tuple(seeds),
            "above": (1, 2, 4, 8, 16),  # further rates, in 8 % steps above the first that left
        }
    )


_SMALL: dict[str, Any] = {
    "augment": False,
    "num_workers": 1,
    "label_smoothing": 0.1,
    "num_devices": 1,
}
_DIGITS: dict[str, Any] = {
    "dataset": "digits",
    "model": "mlp",
    "num_train": 256,
    "num_validation": 100,
}
_CIFAR: dict[str, Any] = {
    "width": 0.125,
    "num_train": 1024,
    "num_validation": 512,
    "learning_rate": 0.1,
    "eval_batch_size": 512,
}
_DELAYS = (1, 2, 4, 8, 16, 32)
PRESETS = {
    "smoke": _preset((1, 2, 4), (0,), (1,), worker_batch_size=64, **_SMALL, **_DIGITS, epochs=30),
    "cpu": _preset(
        _DELAYS, (0, 1), _DELAYS[:-1], worker_batch_size=32, **_SMALL, **_CIFAR, epochs=120
    ),
    "paper": _preset((1, 3, 7, 15, 31), (0, 1, 2), _DELAYS, worker_batch_size=128),
}


def run(config: ConfigDict, work: Path) -> list[Record]:
    """Returns a row per measurement of every mini-batch run, and one per full-batch edge."""
    folder = work / "edges"
    start = reach_minimum(config.start, folder)
    branch = config.start.copy_and_resolve_references()
    branch.worker_batch_size = config.worker_batch_size
    branch.augment = False  # the minimum is one of fixed images
    edges = find_edges(
        branch, start, config.delays, config.seeds, folder / "runs", above=config.above
    )
    mini = pd.DataFrame(edges)
    mini.insert(0, "series", MINI_BATCH)
    mini["start_learning_rate"] = float(config.start.learning_rate)
    predicted = {
        delay: stability.max_learning_rate(delay, sharpness=start.sharpness)
        for delay in config.delays
    }
    mini["predicted"] = mini.delay.map(predicted)
    upper = mini.learning_rate.where(mini.left == 1).groupby([mini.delay, mini.seed])
    mini["upper"] = upper.transform("min")
    lower = mini.learning_rate.where(mini.learning_rate < mini.upper)
    lower = lower.groupby([mini.delay, mini.seed]).transform("max")
    mini.insert(len(mini.columns) - 1, "lower", lower)
    return mini.to_dict("records") + _full_batch(config.full_batch_delays, list(mini.columns))


def edge_runs(records: pd.DataFrame) -> pd.DataFrame:
    """Returns the last row of every mini-batch run."""
    rows = select(records, series=MINI_BATCH)
    return rows.drop_duplicates(["delay", "seed", "index"], keep="last")


def _full_batch(delays: Sequence[int], columns: Sequence[str]) -> list[Record]:
    """A row per delay: edges of a full-batch minimum on digits, bisected to 2 %."""
    problem = digits_problem()
    minimum = find_minimum(*problem, optax.sgd(0.05, momentum=0.98))
    rows = []
    for delay in delays:
        found = measure_max_learning_rate(minimum, delay, problem.loss_fn, problem.batches)
        row: Record = dict.fromkeys(columns, 0)
        row |= {
            "series": FULL_BATCH,
            "delay": delay,
            "learning_rate": found.value,
            "minimum_loss": minimum.loss,
            "sharpness": minimum.sharpness,
            "predicted": found.predicted,
            "lower": found.lower,
            "upper": found.upper,
        }
        rows.append(row)
    return rows


def claims(records: pd.DataFrame) -> list[Claim]:
    """Checks the line, the full-batch prediction, and how far mini-batches are from it."""
    delays, edges, ratios = _edges(records)
    line = fit_line(delays, [1.0 / edge.mean() for edge in edges])
    full = select(records, series=FULL_BATCH)
    return [
        at_least("delays that the line is fitted to", len(delays), 5),
        at_least("1/eta_max is linear in the delay, mini-batch runs: R^2", line.r_squared, 0.98),
        at_most(
            "full batch: measured and predicted edge differ by at most, relative",
            np.abs(np.sqrt(full.lower * full.upper) / full.predicted - 1).max(),
            0.05,
        ),
        at_most(
            "mini-batch: edge over h*/sharpness, largest over smallest of all delays",
            max(ratio.mean() for ratio in ratios) / min(ratio.mean() for ratio in ratios),
            1.25,
        ),
    ]


def plot(records: pd.DataFrame) -> Any:
    """Returns the figure: updates until it left, by rate; one over the edge, by delay."""
    figure, (left, right) = style.new_figure(2, width=6.2, height=4.6)
    figure.suptitle("Which learning rates leave a minimum? The edge falls as 1/τ", fontsize=14)
    for index, (delay, mine) in enumerate(edge_runs(records).groupby("delay")):
        colour = style.COLOURS[index % len(style.COLOURS)]
        for number, (_, runs) in enumerate(mine.groupby("seed")):
            gone = runs[runs.left == 1].sort_values("learning_rate")
            label = None if number else f"τ = {delay}"
            look = {"color": colour, "markersize": 4, "linewidth": 1.0, "label": label}
            left.plot(gone.learning_rate, gone.steps, "o-", **look)
        edge = mine.lower.mean()
        left.axvline(edge, color=colour, linestyle=":", linewidth=1.2)
        left.plot([edge], [0.02], "o", color=style.BLACK, transform=left.get_xaxis_transform())
    left.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="updates until it has left")
    left.set_title("black: the largest rate that stays")
    left.legend(fontsize=9, ncols=2)
    _plot_line(right, records)
    return figure


def _plot_line(axis: Any, records: pd.DataFrame) -> None:
    delays, edges, _ = _edges(records)
    inverse = np.array([1.0 / edge.mean() for edge in edges])
    bars = inverse - inverse / (1 + RESOLUTION), inverse * (1 + RESOLUTION) - inverse
    line = fit_line(delays, inverse)
    span = np.linspace(0, max(delays), 2)
    axis.plot(span, line.slope * span + line.intercept, color=style.ORANGE)
    axis.errorbar(delays, inverse, bars, fmt="o", color=style.BLUE, capsize=3, zorder=3)
    predicted = select(records, series=MINI_BATCH).groupby("delay").predicted.first()
    axis.plot(delays, 1 / predicted, color=style.BLACK, linestyle="--")
    axis.text(0.04, 0.93, f"measured (R² = {line.r_squared:.4f})", color=style.BLUE,
              transform=axis.transAxes)  # fmt: skip
    axis.text(0.04, 0.86, "dashed: sharpness / h*, nothing fitted", transform=axis.transAxes)
    axis.set(xlabel="delay τ (updates)", ylabel="1 / largest stable learning rate", ylim=(0, None))
    axis.set_title("one over the edge is linear in τ")


def _edges(
    records: pd.DataFrame,
) -> tuple[list[int], list[np.ndarray], list[np.ndarray]]:
    """Delays, and over seeds: the edge (geometric mean of its bracket) and edge over prediction."""
    delays, edges, ratios = [], [], []
    for delay, runs in edge_runs(records).groupby("delay"):
        brackets = runs.drop_duplicates("seed")
        delays.append(int(str(delay)))
        edges.append(np.sqrt(brackets.lower * brackets.upper).to_numpy())
        ratios.append(edges[-1] / brackets.predicted.iloc[0])
    return delays, edges, ratios
