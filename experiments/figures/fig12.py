"""Figure 12: above the threshold, which falls as 1/tau, A-SGD diverges from the minimum."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from asgd_jax.training.folder.table import Record
from experiments import style
from experiments.claims import Claim, at_least, at_most
from experiments.figures import vgg_escape
from experiments.figures.training_runs import select
from experiments.figures.vgg_escape import MINI_BATCH, edge_runs

CAPTION = (
    "For every delay, learning rates above the threshold, which is inversely proportional to the "
    "delay, diverge from the minimum; those below stay."
)
PROXY = vgg_escape.PROXY
PRESETS = vgg_escape.PRESETS
run = vgg_escape.run


def claims(records: Sequence[Record]) -> list[Claim]:
    """Checks every run, at every delay, against that delay's threshold."""
    found = []
    runs = edge_runs(records)
    products = []
    for delay in sorted({delay for delay, _ in runs}):
        mine = [run for (d, _), each in runs.items() if d == delay for run in each]
        above = [run["left"] for run in mine if run["learning_rate"] >= 0.999 * run["upper"]]
        below = [run["left"] for run in mine if run["learning_rate"] <= 1.001 * run["lower"]]
        found.append(
            at_least(
                f"tau = {delay}: share of rates 8 % or more above the threshold that leave "
                f"({len(above)} runs)",
                float(np.mean(above)),
                1.0,
            )
        )
        found.append(
            at_most(
                f"tau = {delay}: share of rates below it that leave ({len(below)} runs)",
                float(np.mean(below)),
                0.0,
            )
        )
        products.append((2 * delay + 1) * np.mean([run["lower"] for run in mine]))
    spread = max(products) / min(products)
    found.append(
        at_most("threshold times (2 tau + 1), largest over smallest of all delays", spread, 1.35)
    )
    return found


def plot(records: Sequence[Record]) -> Any:
    """Returns the figure: validation error against updates, a panel a delay."""
    rows = select(records, series=MINI_BATCH)
    delays = sorted({row["delay"] for row in rows})
    shown = delays if len(delays) <= 3 else [delays[0], delays[len(delays) // 2], delays[-1]]
    figure, axes = style.new_figure(len(shown), width=4.8, height=4.2)
    figure.suptitle("Above the threshold the minimum is left; just below it is not", fontsize=14)
    seed = min(row["seed"] for row in rows)
    for axis, delay in zip(axes, shown, strict=True):
        mine = select(rows, delay=delay, seed=seed)
        _plot_delay(axis, mine)
        axis.set_title(f"τ = {delay}: threshold {mine[0]['lower']:.3g}")
        axis.set(xlabel="updates since the minimum", ylim=(0, 100))
    axes[0].set_ylabel("validation error (%)")
    return figure


def _plot_delay(axis: Any, rows: Sequence[Record]) -> None:
    edge = rows[0]["lower"]
    for rate in sorted({row["learning_rate"] for row in rows}):
        ratio = rate / edge
        if not 0.5 < ratio < 2.5:
            continue
        mine = select(rows, learning_rate=rate)
        left = mine[-1]["left"]
        axis.plot(
            [row["steps"] for row in mine],
            [100 * row["validation_error"] for row in mine],
            color=style.RED if left else style.BLUE,
            linestyle="-" if left else "--",
            marker="x" if left else None,
            markevery=[len(mine) - 1],
            linewidth=1.3,
            label=f"{rate:.3g} ({ratio:.2f} ×)",
        )
    axis.legend(fontsize=8, title="learning rate (× threshold)", title_fontsize=8)
