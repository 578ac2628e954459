"""How every picture of the project looks: colours that colour-blind readers tell apart, units."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression

from asgd_jax.stability.plot import import_matplotlib

# Okabe and Ito's palette, in an order in which neighbours differ in lightness too.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000",
)  # fmt: skip
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P")

_SETTINGS = {
    "figure.dpi": 120,
    "savefig.dpi": 150,
    "savefig.bbox": "tight",
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def require_matplotlib() -> None:
    """Refuses to begin, before hours of training, where no picture can be drawn at the end.

    Raises:
      ValueError: naming the remedy.
    """
    try:
        new_figure()
    except ImportError as error:
        raise ValueError("the picture needs matplotlib: pip install matplotlib") from error


def new_figure(num_panels: int = 1, *, width: float = 5.4, height: float = 3.9) -> Any:
    """Returns (figure, [axes]) with `num_panels` panels side by side; sizes in inches a panel.

    Raises:
      ImportError: when matplotlib is missing: install the `plot` extra.
    """
    mpl = import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(width * num_panels, height), layout="constrained")
        FigureCanvasAgg(figure)  # no display and no global state
        axes = figure.subplots(1, num_panels, squeeze=False)[0]
    return figure, list(axes)


def plain_log(axis: Any, *sides: str) -> None:
    """Makes sides ("x", "y") of an axis logarithmic, with ticks 1, 2, 5, 10, ... as plain numbers.

    Call it when everything is drawn: over more than 500 times only powers of ten are named.
    """
    import_matplotlib()
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for side in sides:
        axis.set(**{f"{side}scale": "log"})
        low, high = getattr(axis, f"get_{side}lim")()
        subs = (1.0, 2.0, 5.0) if high / low < 500 else (1.0,)
        one = axis.xaxis if side == "x" else axis.yaxis
        one.set_major_locator(LogLocator(subs=subs))
        one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        one.set_minor_locator(NullLocator())


def sparse_markers(num_points: int, wanted: int = 8) -> dict[str, Any]:
    """Returns plot arguments that mark about `wanted` of the points.

    >>> sparse_markers(80)["markevery"]
    10
    """
    return {"markevery": max(1, num_points // wanted), "markersize": 5}


def name_line(
    axis: Any, name: str, place: tuple[float, float], colour: str, fontsize: int = 11
) -> None:
    """Writes a line's name right of `place`: a share of the axis' width, and a value on its y."""
    axis.annotate(
        name,
        place,
        (5, 0),
        xycoords=axis.get_yaxis_transform(),
        textcoords="offset points",
        color=colour,
        fontsize=fontsize,
        va="center",
    )


def move_apart(heights: Sequence[float], gap: float) -> list[float]:
    """Moves sorted heights as little as possible, in least squares, to be `gap` or more apart.

    >>> move_apart([0.0, 5.0, 5.0], 2.0)
    [0.0, 4.0, 6.0]
    """
    steps = gap * np.arange(len(heights))
    moved = isotonic_regression(np.asarray(heights, np.float64) - steps).x + steps
    return [float(height) for height in moved]


def save(figure: Any, file: Path) -> None:
    """Writes a picture; equal figures give equal bytes."""
    mpl = import_matplotlib()
    file.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(_SETTINGS):
        figure.savefig(file, metadata={"Software": None})
