"""Figure 12: above the threshold, which falls as 1/tau, A-SGD diverges from the minimum."""

from typing import Any

import pandas as pd

from experiments import style
from experiments.claims import Claim, at_least, at_most
from experiments.figures import fig02
from experiments.figures.fig02 import MINI_BATCH, edge_runs
from experiments.figures.training_runs import select

CAPTION = (
    "For every delay, learning rates above the threshold, which is inversely proportional to the "
    "delay, diverge from the minimum; those below stay."
)
PROXY = fig02.PROXY
PRESETS = fig02.PRESETS
run = fig02.run


def claims(records: pd.DataFrame) -> list[Claim]:
    """Checks every run, at every delay, against that delay's threshold."""
    found = []
    products = []
    for delay, mine in edge_runs(records).groupby("delay"):
        above = mine[mine.learning_rate >= 0.999 * mine.upper].left
        below = mine[mine.learning_rate <= 1.001 * mine.lower].left
        found += [
            at_least(
                f"tau = {delay}: share of rates 8 % or more above the threshold that leave "
                f"({len(above)} runs)",
                above.mean(),
                1.0,
            ),
            at_most(
                f"tau = {delay}: share of rates below it that leave ({len(below)} runs)",
                below.mean(),
                0.0,
            ),
        ]
        products.append((2 * mine.delay.iloc[0] + 1) * mine.lower.mean())
    text = "threshold times (2 tau + 1), largest over smallest of all delays"
    return [*found, at_most(text, max(products) / min(products), 1.35)]


def plot(records: pd.DataFrame) -> Any:
    """Returns the figure: validation error against updates, a panel a delay."""
    rows = select(records, series=MINI_BATCH)
    delays = sorted(rows.delay.unique())
    shown = delays if len(delays) <= 3 else [delays[0], delays[len(delays) // 2], delays[-1]]
    figure, axes = style.new_figure(len(shown), width=4.8, height=4.2)
    figure.suptitle("Above the threshold the minimum is left; just below it is not", fontsize=14)
    seed = rows.seed.min()
    for axis, delay in zip(axes, shown, strict=True):
        mine = select(rows, delay=delay, seed=seed)
        _plot_delay(axis, mine)
        axis.set_title(f"τ = {delay}: threshold {mine.lower.iloc[0]:.3g}")
        axis.set(xlabel="updates since the minimum", ylim=(0, 100))
    axes[0].set_ylabel("validation error (%)")
    return figure


def _plot_delay(axis: Any, rows: pd.DataFrame) -> None:
    for rate, mine in rows.groupby("learning_rate"):
        last = mine.iloc[-1]
        ratio = last.learning_rate / last.lower
        if not 0.5 < ratio < 2.5:
            continue
        axis.plot(
            mine.steps,
            100 * mine.validation_error,
            color=style.RED if last.left else style.BLUE,
            linestyle="-" if last.left else "--",
            marker="x" if last.left else None,
            markevery=[len(mine) - 1],
            linewidth=1.3,
            label=f"{rate:.3g} ({ratio:.2f} ×)",
        )
    axis.legend(fontsize=8, title="learning rate (× threshold)", title_fontsize=8)
