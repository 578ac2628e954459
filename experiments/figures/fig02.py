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
from experiments.claims import (
    Claim,
    at_most,
    estimate_ratio,
    estimate_slope,
    fit_line,
    inside,
    near,
    scaled,
)
from experiments.edges.fullbatch import measure_max_learning_rate
from experiments.edges.judge import brackets, by_delay, judge_runs
from experiments.edges.leaving import ERROR_LEVEL, LOSS_FACTOR
from experiments.edges.minibatch import Grid, find_edges, reach_minimum
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
EDGE_TOLERANCE = 0.12  # of an edge over h*/sharpness


def _preset(
    delays: Sequence[int],
    seeds: Sequence[int],
    full_batch_delays: Sequence[int],
    *,
    worker_batch_size: int,
    resolution: float = 0.08,
    pilot_seeds: Sequence[int] = (),
    **overrides: Any,
) -> ConfigDict:
    """Overrides are of S-SGD's run to the minimum; each A-SGD update has one worker's batch.

    Rates lie `resolution` apart. Of the pilots' runs every one that left had done so within 6.2
    e-folds of growth at its own rate; here all have time for eight one step above the edge.
    """
    return ConfigDict(
        {
            "start": with_overrides(cifar10_vgg11.get_config(), **overrides),
            "worker_batch_size": worker_batch_size,
            "delays": tuple(delays),
            "full_batch_delays": tuple(full_batch_delays),
            "seeds": tuple(seeds),
            "pilot_seeds": tuple(pilot_seeds),  # run before, to find the settings
            "resolution": resolution,
            "e_folds": 8,
            # Further rates, in steps above the first that left; for so many of the first seeds.
            "above": (1, 4, 8),
            "above_seeds": 1,
        }
    )


_SMALL: dict[str, Any] = {
    "augment": False,
    "num_workers": 1,
    "label_smoothing": 0.1,
}
_DIGITS: dict[str, Any] = {
    "num_devices": 1,
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
        _DELAYS,
        range(2, 7),
        _DELAYS[:-1],
        pilot_seeds=(0, 1),
        worker_batch_size=32,
        resolution=0.04,
        **_SMALL,
        **_CIFAR,
        epochs=120,
    ),
    "paper": _preset((1, 3, 7, 15, 31), range(5), _DELAYS, worker_batch_size=128, resolution=0.04),
}


def run(config: ConfigDict, work: Path) -> list[Record]:
    """Returns a row per measurement of every mini-batch run, and one per full-batch edge."""
    folder = work / "edges"
    start = reach_minimum(config.start, folder)
    branch = config.start.copy_and_resolve_references()
    branch.worker_batch_size = config.worker_batch_size
    branch.augment = False  # the minimum is one of fixed images
    grid = Grid(config.resolution, config.e_folds, tuple(config.above), config.above_seeds)
    edges = find_edges(branch, start, config.delays, config.seeds, folder / "runs", grid)
    mini = pd.DataFrame(edges)
    mini.insert(0, "series", MINI_BATCH)
    mini["start_learning_rate"] = float(config.start.learning_rate)
    predicted = {
        delay: stability.max_learning_rate(delay, sharpness=start.sharpness)
        for delay in config.delays
    }
    mini["predicted"] = mini.delay.map(predicted)
    mini[["lower", "upper"]] = np.nan  # of the full batch; here they follow from the rows
    return mini.to_dict("records") + _full_batch(config.full_batch_delays, list(mini.columns))


def edge_runs(records: pd.DataFrame) -> pd.DataFrame:
    """Returns a row for every mini-batch run: `judge_runs`."""
    return judge_runs(select(records, series=MINI_BATCH))


def notes(records: pd.DataFrame) -> dict[str, Any]:
    """Returns both readings of the runs, for summary.json: by the rule, and by the one before."""
    runs = edge_runs(records)
    readings = {}
    for rule, name in (("left", "rule"), ("left_for_good", "rule_before")):
        edges = brackets(runs, rule)
        delays = [*by_delay(edges, "edge").index]
        readings[name] = {
            "edge_over_predicted": {str(d): by_delay(edges, "ratio")[d] for d in delays},
            "slope": fit_line(delays, 1.0 / by_delay(edges, "edge")).slope,
            "r_squared": fit_line(delays, 1.0 / by_delay(edges, "edge")).r_squared,
        }
    predicted = by_delay(brackets(runs), "predicted")
    return {
        "rule": f"left: diverged, a row's training error above {ERROR_LEVEL:.0%} more than the "
        f"minimum's, or a loss above {LOSS_FACTOR:g} L, once",
        "rule_before": "left: diverged, or a loss above max(10 L, L + 0.1) at two rows in a row",
        "why_changed": "the rule was changed after the data had been seen: above the edge some "
        "runs leap out, to a training error of 30 to 50 %, and settle in a flatter minimum before "
        "two rows in a row have a large loss; they had been counted as runs that stayed",
        "catapults": int(runs.catapult.sum()),
        "stayed_by_rule_before": int((runs.left_for_good == 0).sum()),
        "predicted_slope": fit_line([*predicted.index], 1.0 / predicted).slope,
        "readings": readings,
        **_flattened(records),
    }


def _flattened(records: pd.DataFrame) -> dict[str, Any]:
    """How sharp it is where the smallest rate that left has ended."""
    ended = select(records, series=MINI_BATCH).dropna(subset="end_sharpness")
    ended = ended.drop_duplicates(["delay", "seed", "index"])
    limits = [stability.max_learning_rate(int(delay)) for delay in ended.delay]
    ratios = (ended.end_sharpness * ended.learning_rate / limits).groupby(ended.delay).mean()
    return {
        "sharpness at the end of the smallest rate that left, over h*/rate": {
            str(delay): float(ratio) for delay, ratio in ratios.items()
        }
    }


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
            "end_sharpness": np.nan,
        }
        rows.append(row)
    return rows


def claims(records: pd.DataFrame) -> list[Claim]:
    """Checks edges, their line and the full-batch prediction against theory, nothing fitted."""
    edges = brackets(edge_runs(records))
    delays = [*by_delay(edges, "edge").index]
    found = [
        near(
            f"tau = {delay}: edge over h*/sharpness (interval: lowest and highest bracket of "
            f"{len(mine)} seeds)",
            by_delay(mine, "ratio")[delay],
            1.0,
            EDGE_TOLERANCE,
        )._replace(
            interval=((mine.lower / mine.predicted).min(), (mine.upper / mine.predicted).max())
        )
        for delay, mine in edges.groupby("delay")
    ]
    # A mean over delays, each with the seeds' mean: seeds of one delay share the minimum.
    ratio = estimate_ratio(by_delay(edges, "ratio"))
    slope = estimate_slope(delays, 1.0 / by_delay(edges, "edge"))
    predicted = fit_line(delays, 1.0 / by_delay(edges, "predicted")).slope
    full = select(records, series=FULL_BATCH)
    return [
        *found,
        inside(
            "edge over h*/sharpness, mean over the delays",
            ratio,
            1.0 - EDGE_TOLERANCE,
            1.0 + EDGE_TOLERANCE,
        ),
        inside(
            f"slope of 1/edge against the delay, over the predicted {predicted:.4g}",
            scaled(slope, 1.0 / predicted),
            1.0 - EDGE_TOLERANCE,
            1.0 + EDGE_TOLERANCE,
        ),
        at_most(
            "full batch: measured and predicted edge differ by at most, relative",
            np.abs(np.sqrt(full.lower * full.upper) / full.predicted - 1).max(),
            0.02,
        ),
    ]


def plot(records: pd.DataFrame) -> Any:
    """Returns the figure: updates until it left, by rate; one over the edge, by delay."""
    figure, (left, middle, right) = style.new_figure(3, width=5.6, height=4.6)
    figure.suptitle("Which learning rates leave a minimum? The edge falls as 1/τ", fontsize=14)
    runs = edge_runs(records)
    found = by_delay(brackets(runs), "lower")
    for index, (delay, mine) in enumerate(runs.groupby("delay")):
        colour = style.COLOURS[index % len(style.COLOURS)]
        for number, (_, seed) in enumerate(mine.groupby("seed")):
            gone = seed[seed.left == 1].sort_values("learning_rate")
            label = None if number else f"τ = {delay}"
            look = {"color": colour, "markersize": 4, "linewidth": 1.0, "label": label}
            left.plot(gone.learning_rate, gone.left_step, "o-", **look)
        edge = found[delay]
        left.axvline(edge, color=colour, linestyle=":", linewidth=1.2)
        left.plot([edge], [0.02], "o", color=style.BLACK, transform=left.get_xaxis_transform())
    left.set(xlabel="learning rate", ylabel="updates until it has left")
    style.plain_log(left, "x", "y")
    left.set_title("a line a seed; black: the largest rate that stays")
    left.legend(fontsize=9, ncols=2)
    _plot_line(middle, records)
    _plot_ratios(right, records)
    return figure


def _plot_ratios(axis: Any, records: pd.DataFrame) -> None:
    """Edges over h*/sharpness, from the lowest to the highest end of their brackets."""
    edges = brackets(edge_runs(records))
    full = select(records, series=FULL_BATCH).sort_values("delay")
    full = full.assign(ratio=np.sqrt(full.lower * full.upper) / full.predicted)
    looks = ((MINI_BATCH, edges, style.BLUE, 0.96), (FULL_BATCH, full, style.ORANGE, 1.04))
    for name, rows, colour, aside in looks:
        by = rows.assign(low=rows.lower / rows.predicted, high=rows.upper / rows.predicted)
        by = by.groupby("delay").agg({"ratio": "mean", "low": "min", "high": "max"})
        bars = by.ratio - by.low, by.high - by.ratio
        look = {"fmt": "o", "capsize": 3, "color": colour, "label": name}
        axis.errorbar(np.array(by.index) * aside, by.ratio, bars, **look)
    axis.axhline(1.0, color=style.BLACK, linestyle="--", linewidth=1.2, label="prediction")
    axis.axhspan(
        1 - EDGE_TOLERANCE,
        1 + EDGE_TOLERANCE,
        color=style.BLACK,
        alpha=0.1,
        linewidth=0,
        label=f"± {EDGE_TOLERANCE:.0%}",
    )
    axis.set(xlabel="delay τ (updates)", ylabel="edge / (h* / sharpness)", ylim=(0.7, 1.3))
    style.plain_log(axis, "x")
    axis.set_title("measured over predicted, with brackets")
    axis.legend(fontsize=9)


def _plot_line(axis: Any, records: pd.DataFrame) -> None:
    edges = brackets(edge_runs(records))
    mean = by_delay(edges, "edge")
    delays, inverse = [*mean.index], 1.0 / mean
    # From the highest rate that left to the lowest that stayed, over seeds.
    ends = 1.0 / edges.groupby("delay").upper.max(), 1.0 / edges.groupby("delay").lower.min()
    line = fit_line(delays, inverse)
    span = np.linspace(0, max(delays), 2)
    axis.plot(span, line.slope * span + line.intercept, color=style.ORANGE)
    bars = inverse - ends[0], ends[1] - inverse
    axis.errorbar(delays, inverse, bars, fmt="o", color=style.BLUE, capsize=3, zorder=3)
    predicted = by_delay(edges, "predicted")
    axis.plot(delays, 1 / predicted, color=style.BLACK, linestyle="--")
    expected = fit_line(delays, 1 / predicted).slope
    axis.text(0.04, 0.93, f"measured, slope {line.slope:.3g}", color=style.BLUE,
              transform=axis.transAxes)  # fmt: skip
    axis.text(0.04, 0.86, f"dashed: sharpness / h*, nothing fitted, slope {expected:.3g}",
              transform=axis.transAxes)  # fmt: skip
    axis.set(xlabel="delay τ (updates)", ylabel="1 / largest stable learning rate", ylim=(0, None))
    axis.set_title("one over the edge is linear in τ")
