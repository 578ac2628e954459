"""Pictures of runs: what metrics.csv and summary.json of their folders say, drawn."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from asgd_jax.stability.plot import import_matplotlib
from asgd_jax.training.folder.metrics import read_rows
from asgd_jax.training.folder.provenance import read_json

# Okabe and Ito's palette, which colour-blind readers tell apart; a dash pattern for each round.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":", "-.")
_MAX_IN_LEGEND = 12


class FinishedRun(NamedTuple):
    """What a run has left in its folder.

    Attributes:
      name: as a picture names it.
      rows: of metrics.csv, see `folder.metrics.COLUMNS`; an empty cell is NaN.
      summary: of summary.json.
    """

    name: str
    rows: list[dict[str, float]]
    summary: dict[str, Any]


def read_run(workdir: Path, name: str | None = None) -> FinishedRun:
    """Returns the run of a folder.

    Raises:
      ValueError: when the folder holds no finished run, or a damaged one.
    """
    rows, summary = read_rows(workdir), read_json(workdir / "summary.json")
    if summary is None or not rows:
        raise ValueError(
            f"{workdir} holds no finished run: it needs metrics.csv and summary.json, which "
            "scripts/train.py --workdir=DIR writes"
        )
    return FinishedRun(workdir.name if name is None else name, rows, summary)


def has_matplotlib() -> bool:
    """Whether pictures can be drawn here."""
    try:
        _matplotlib()
    except ImportError:
        return False
    return True


def save_curves(workdir: Path) -> Path | None:
    """Writes a run's curves.png into its folder; returns its path, None without matplotlib.

    Raises:
      ValueError: when the folder holds no finished run.
      OSError: when the folder cannot be written to.
    """
    if not has_matplotlib():
        return None
    return save_picture(draw_runs([read_run(workdir)]), workdir / "curves.png")


def save_picture(figure: Any, path: Path) -> Path:
    """Writes a figure; equal ones give equal bytes.

    Raises:
      ValueError: for a file ending that matplotlib does not know.
    """
    figure.savefig(path, dpi=100, metadata={"Software": None} if path.suffix == ".png" else None)
    return path


def draw_runs(runs: Sequence[FinishedRun], *, thresholds: bool = False) -> Any:
    """Returns a figure of losses and errors against epochs, a colour a run.

    Lines are of training, at stale parameters; circles of validation, at live ones. A run that
    diverged ends in a cross. What is not finite is not drawn.

    Args:
      runs: one or more, see `read_run`.
      thresholds: with a third panel, of the sharpest minimum that each run can stay in.
    """
    _matplotlib()
    from matplotlib.figure import Figure

    num_panels = 2 + thresholds
    figure = Figure(figsize=(4.6 * num_panels, 3.6), layout="constrained")
    panels = figure.subplots(1, num_panels, squeeze=False)[0]
    for index, run in enumerate(runs):
        look = {
            "color": _COLOURS[index % len(_COLOURS)],
            "linestyle": _DASHES[index // len(_COLOURS) % len(_DASHES)],
        }
        _draw_lines(panels[0], run, "train_loss", "validation_loss", 1.0, look)
        _draw_lines(panels[1], run, "train_error", "validation_error", 100.0, look)
    panels[0].set(xlabel="epoch", ylabel="loss (nats)", yscale="log")
    panels[1].set(xlabel="epoch", ylabel="error (%)", ylim=(0, None))
    if thresholds:
        _draw_thresholds(panels[2], runs)
    if 1 < len(runs) <= _MAX_IN_LEGEND and not thresholds:
        panels[0].legend(fontsize=8, frameon=False)
    figure.suptitle(
        _title(runs[0])
        if len(runs) == 1
        else "lines: training, at stale parameters; "
        "circles: validation, at live ones; cross: diverged",
        fontsize=10,
    )
    return figure


def _draw_lines(
    axes: Any, run: FinishedRun, train: str, validation: str, scale: float, look: dict[str, Any]
) -> None:
    epochs = np.array([row["epoch"] for row in run.rows])
    for column, marked in ((train, False), (validation, True)):
        values = scale * np.array([row[column] for row in run.rows])
        shown = np.isfinite(values)
        marks = {"marker": "o", "markersize": 3.5, "markerfacecolor": "none", "linewidth": 0.8}
        label = {"label": run.name} if not marked else {}
        axes.plot(epochs[shown], values[shown], **look, **(marks if marked else {}), **label)
        if not marked and run.summary["diverged_at_step"] is not None and shown.any():
            axes.plot(epochs[shown][-1], values[shown][-1], "x", color=look["color"])
    axes.grid(alpha=0.3)


def _draw_thresholds(axes: Any, runs: Sequence[FinishedRun]) -> None:
    """Bars of the sharpest stable minimum: h*(delay) over the learning rate."""
    for index, run in enumerate(runs):
        sharpest = run.summary["sharpest_stable_minimum"]
        colour = _COLOURS[index % len(_COLOURS)]
        axes.barh(index, sharpest or math.nan, color=colour, alpha=0.8)
        text = f"{sharpest:.3g}" if sharpest else "no exact formula"
        axes.annotate(text, (sharpest or 1.0, index), (3, 0), textcoords="offset points",
                      va="center", fontsize=8)  # fmt: skip
    axes.set_yticks(range(len(runs)), [run.name for run in runs], fontsize=8)
    axes.invert_yaxis()
    known = [each for run in runs if (each := run.summary["sharpest_stable_minimum"])]
    limits = (min(known) / 3, max(known) * 3) if known else (0.1, 10.0)
    axes.set(xscale="log", xlim=limits, xlabel="sharpest minimum it can stay in")


def _title(run: FinishedRun) -> str:
    summary = run.summary
    end = summary["status"]
    if summary["diverged_at_step"] is not None:
        end = f"diverged at step {summary['diverged_at_step']}"
    return (
        f"delay {summary['batches']['delay']}, learning rate {summary['learning_rate']:.4g}: {end} "
        "(circles: validation)"
    )


def _matplotlib() -> Any:
    """Matplotlib, which has nothing to say on the terminal of a run (where it keeps its fonts)."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    return import_matplotlib()
