"""The picture of the stability thresholds: 1 / h* is nearly linear in the delay."""

import math
import os
from typing import Any

import numpy as np

from asgd_jax.stability.report import Question, methods
from asgd_jax.stability.thresholds import max_learning_rate

# The colour-blind-safe palette of Okabe and Ito, each with a dash pattern of its own.
_STYLES: dict[str, dict[str, Any]] = {
    "no momentum": {"color": "#000000", "linestyle": "-"},
    "heavy ball, damped": {"color": "#0072B2", "linestyle": "--"},
    "heavy ball, undamped": {"color": "#D55E00", "linestyle": ":"},
    "shifted": {"color": "#009E73", "linestyle": "-."},
    "shifted, undamped": {"color": "#CC79A7", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
}
_MOST_DELAYS = 100


def import_matplotlib() -> Any:
    """Returns matplotlib, whatever backend MPLBACKEND names: pictures are drawn into files.

    A notebook's backend is in the environment of all commands that are started there, and where it
    is not installed matplotlib refuses to be imported.
    """
    asked = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib as mpl
    finally:
        if asked is not None:
            os.environ["MPLBACKEND"] = asked
    return mpl


def plot_thresholds(question: Question, answered: dict[str, Any], path: str) -> None:
    """Writes a picture of 1 / h* against a constant delay, with the asker's own delay marked.

    Undamped methods have a panel of their own, for their slope is 1 / (1 - m) times larger.

    Args:
      question: what was asked.
      answered: what `report.answer` said.
      path: of the picture; its ending picks the format.

    Raises:
      ValueError: where matplotlib is missing or does not know the format.
      OSError: where the file cannot be written.
    """
    try:
        import_matplotlib()
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "--plot needs matplotlib: pip install matplotlib, or leave --plot away"
        ) from None
    shown = [row["name"] for row in answered["methods"]]
    undamped = [name for name in shown if "undamped" in name]
    damped = [name for name in shown if name not in undamped]
    panels = [damped, [shown[0], *undamped]] if undamped else [damped]
    longest = max(16, math.ceil(2.0 * answered["mean_delay"]))
    delays = np.unique(np.linspace(0, longest, min(longest, _MOST_DELAYS) + 1).astype(int))
    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    for axes, names in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name in names:
            _draw_method(axes, name, delays, answered)
        _decorate(axes, answered)
    figure.suptitle(f"Stability under delay: {question.description}")
    figure.savefig(path, dpi=150)


def _draw_method(axes: Any, name: str, delays: np.ndarray, answered: dict[str, Any]) -> None:
    style, options = _STYLES[name], methods(answered["momentum"])[name]
    inverse = [1.0 / max_learning_rate(int(delay), **options) for delay in delays]
    label = name + (f", m = {options['momentum']:g}" if options["momentum"] else "")
    axes.plot(delays, inverse, label=label, **style)
    if answered["staleness"] == "constant" and not answered["curvature_noise"]:
        return
    row = next(row for row in answered["methods"] if row["name"] == name)
    rate = row.get("max_learning_rate_mean_square", row["max_learning_rate"])
    point = 1.0 / (rate * answered["sharpness"])
    axes.plot(answered["mean_delay"], point, "o", color=style["color"], markerfacecolor="none")


def _decorate(axes: Any, answered: dict[str, Any]) -> None:
    label = "your mean delay (circles: your delays)"
    if answered["staleness"] == "constant":
        label = "your delay" + (" (circles: with noise)" if answered["curvature_noise"] else "")
    axes.axvline(answered["mean_delay"], color="0.6", linewidth=1, label=label)
    if answered["learning_rate"] is not None:
        height = 1.0 / (answered["learning_rate"] * answered["sharpness"])
        text = "your learning rate: stable below"
        axes.axhline(height, color="#E69F00", linewidth=1, label=text)
    axes.set_xlabel("delay (updates)")
    axes.set_ylabel("1 / h*   (h* = learning rate x sharpness)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, edgecolor="none")
