"""Figure 2: minima are left above a learning rate that is inversely proportional to the delay."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from asgd_jax.training.folder.table import Record
from experiments import style
from experiments.claims import Claim, at_least, at_most, fit_line
from experiments.figures import vgg_escape
from experiments.figures.training_runs import select
from experiments.figures.vgg_escape import FULL_BATCH, MINI_BATCH, edge_runs

CAPTION = (
    "A minimum is left only above a threshold of the learning rate, and one over that threshold "
    "is linear in the delay."
)
PROXY = vgg_escape.PROXY
PRESETS = vgg_escape.PRESETS
run = vgg_escape.run


def claims(records: Sequence[Record]) -> list[Claim]:
    """Checks the line, the full-batch prediction, and how far mini-batches are from it."""
    delays, edges, ratios = _edges(records)
    line = fit_line(delays, [1.0 / edge.mean() for edge in edges])
    full = select(records, series=FULL_BATCH)
    return [
        at_least("delays that the line is fitted to", len(delays), 5),
        at_least("1/eta_max is linear in the delay, mini-batch runs: R^2", line.r_squared, 0.98),
        at_most(
            "full batch: measured and predicted edge differ by at most, relative",
            max(abs(math.sqrt(row["lower"] * row["upper"]) / row["predicted"] - 1) for row in full),
            0.05,
        ),
        at_most(
            "mini-batch: edge over h*/sharpness, largest over smallest of all delays",
            max(ratio.mean() for ratio in ratios) / min(ratio.mean() for ratio in ratios),
            1.25,
        ),
    ]


def plot(records: Sequence[Record]) -> Any:
    """Returns the figure: updates until it left, by rate; one over the edge, by delay."""
    figure, (left, right) = style.new_figure(2, width=6.2, height=4.6)
    figure.suptitle("Which learning rates leave a minimum? The edge falls as 1/τ", fontsize=14)
    runs = edge_runs(records)
    delays = sorted({delay for delay, _ in runs})
    for index, delay in enumerate(delays):
        colour = style.COLOURS[index % len(style.COLOURS)]
        mine = [run for (d, _), found in runs.items() if d == delay for run in found]
        for seed in sorted({run["seed"] for run in mine}):
            gone = sorted(
                (run["learning_rate"], run["steps"]) for run in select(mine, seed=seed, left=1)
            )
            label = f"τ = {delay}" if seed == mine[0]["seed"] else None
            look = {"color": colour, "markersize": 4, "linewidth": 1.0, "label": label}
            left.plot(*zip(*gone, strict=True), "o-", **look)
        edge = np.mean([run["lower"] for run in mine])
        left.axvline(edge, color=colour, linestyle=":", linewidth=1.2)
        left.plot([edge], [0.02], "o", color=style.BLACK, transform=left.get_xaxis_transform())
    left.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="updates until it has left")
    left.set_title("black: the largest rate that stays")
    left.legend(fontsize=9, ncols=2)
    _plot_line(right, records)
    return figure


def _plot_line(axis: Any, records: Sequence[Record]) -> None:
    delays, edges, _ = _edges(records)
    inverse = [1.0 / edge.mean() for edge in edges]
    bars = [
        (1 / edge.mean() - 1 / (edge.mean() * 1.08), 1 / edge.mean() * 1.08 - 1 / edge.mean())
        for edge in edges
    ]
    line = fit_line(delays, inverse)
    span = np.linspace(0, max(delays), 2)
    axis.plot(span, line.slope * span + line.intercept, color=style.ORANGE)
    axis.errorbar(
        delays, inverse, np.transpose(bars), fmt="o", color=style.BLUE, capsize=3, zorder=3
    )
    mini = select(records, series=MINI_BATCH)
    predicted = {row["delay"]: row["predicted"] for row in mini}
    axis.plot(delays, [1 / predicted[delay] for delay in delays], color=style.BLACK, linestyle="--")
    axis.text(0.04, 0.93, f"measured (R² = {line.r_squared:.4f})", color=style.BLUE,
              transform=axis.transAxes)  # fmt: skip
    axis.text(0.04, 0.86, "dashed: sharpness / h*, nothing fitted", transform=axis.transAxes)
    axis.set(xlabel="delay τ (updates)", ylabel="1 / largest stable learning rate", ylim=(0, None))
    axis.set_title("one over the edge is linear in τ")


def _edges(
    records: Sequence[Record],
) -> tuple[list[int], list[np.ndarray], list[np.ndarray]]:
    """Delays, and over seeds: the edge (geometric mean of its bracket) and edge over prediction."""
    runs = edge_runs(records)
    delays = sorted({delay for delay, _ in runs})
    edges, ratios = [], []
    for delay in delays:
        brackets = [found[0] for (d, _), found in sorted(runs.items()) if d == delay]
        edges.append(np.array([math.sqrt(row["lower"] * row["upper"]) for row in brackets]))
        ratios.append(edges[-1] / brackets[0]["predicted"])
    return delays, edges, ratios
