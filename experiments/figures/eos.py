r"""Edge of stability under delay: sharpness rises and then hovers at h*(tau) / eta.

Full-batch gradient descent raises the sharpness of the loss until it stands at 2 / eta, the
largest at which its own steps are stable, and then hovers there (Cohen, Kaur, Li, Kolter and
Talwalkar, "Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability", ICLR
2021). With gradients tau updates old the largest stable sharpness is `stability.max_sharpness`, and
another one with momentum. This figure looks whether sharpness goes there.

A small tanh network, neither weight decay nor batch noise, starts from small weights in a flat
place. Time is eta x steps: in it all runs follow one curve, that of gradient flow, until they reach
their edges. Undamped heavy-ball momentum m at the rate (1 - m) eta makes the very same updates as
the damped at eta, so it isn't run. Random delays have three edges, of the mean, of the mean square
and of a typical run (`Edges`); which one is it?
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiments import style
from experiments.claims import Claim, at_most, deviation, estimate_ratio, inside
from experiments.figures import eos_runs
from experiments.figures.eos_runs import CROSS_ENTROPY, MOMENTUM, RANDOM, RESCALED, SAME_RATE

CAPTION = (
    "Without batch noise, sharpness rises until delayed gradient descent is at the edge of its "
    "stability, and hovers there: at h*(tau)/eta, for every delay, loss and kind of momentum, as "
    "it does at 2/eta without delay."
)
PRESETS = eos_runs.PRESETS
run = eos_runs.run

WHY = (
    "with cross-entropy sharpness is above the edge for as long as it rises faster than unstable "
    "steps can lower it, and below once the loss is gone; between the two it swings, by seed, from "
    ".9 to 1.3 of the edge. When a delay is either none or 16, four of five runs end within 10 % "
    "of the edge of a typical run and one, still rising, 14 % below."
)

_TOLERANCE = 0.10  # of the ratio of sharpness to the edge
_START = 0.75  # of the edge: where the rise must begin to be called one
_MISSES = 0.90  # of an edge of random delays that is not the one: the ratio is below, or 1 / above
_WHILE_LEARNING = (0.15, 0.35)  # of the time; cross-entropy's sharpness falls when its loss is gone
_PALETTE = (*style.COLOURS, style.BLACK)
_RUN = ["panel", "data", "delay", "momentum", "kind", "delays"]
EDGES = {"edge": "mean", "mean_square_edge": "mean-square", "typical_edge": "Lyapunov"}


def claims(records: pd.DataFrame) -> list[Claim]:
    """Checks start and end of every run, and the effect of the delay on where it ends."""
    runs = _runs(records)
    regular = [rows for rows in runs if _first(rows).delays == "constant"]
    at_rate = {_first(rows).delay: rows for rows in _runs(records, SAME_RATE)}
    least, most = min(at_rate), max(at_rate)
    ends = [_ends(rows, "sharpness").mean() for rows in _runs(records, RESCALED)]
    swings = [
        deviation(_thirds(alone, "ratio")[1])
        for rows in regular
        if _first(rows).panel != CROSS_ENTROPY
        for alone in _seeds(rows)
    ]
    shares = _ends(at_rate[most], "sharpness") / _ends(at_rate[least], "sharpness")
    predicted = _first(at_rate[most]).edge / _first(at_rate[least]).edge
    return [
        # Unlike Python's max, NumPy's keeps a NaN.
        at_most(
            "every run starts well below its edge, highest ratio",
            np.max([_first(alone).ratio for rows in runs for alone in _seeds(rows)]),
            _START,
        ),
        *(_hover_claim(rows) for rows in regular),
        *(
            claim
            for rows in runs
            if _first(rows).delays != "constant"
            for claim in _random_claims(rows)
        ),
        at_most(
            "squared loss: sharpness hovers, standard deviation in the last third over the edge, "
            "widest run",
            np.max(swings),
            _TOLERANCE,
        ),
        inside(
            f"{_data(at_rate[most])}, one learning rate: sharpness at tau = {most} over that at "
            f"tau = {least}, over the ratio of their h*",
            estimate_ratio(shares / predicted),
            1.0 - _TOLERANCE,
            1.0 + _TOLERANCE,
        ),
        at_most(
            "rates in proportion to h*: all delays end at one sharpness, largest over smallest",
            np.max(ends) / np.min(ends),
            1.0 + _TOLERANCE,
        ),
    ]


def notes(records: pd.DataFrame) -> dict[str, Any]:
    """Returns, of random delays, sharpness at the end over each of the three edges."""
    found = {}
    for rows in _runs(records, RANDOM):
        ends = _ends(rows, "sharpness")
        found[_first(rows).delays] = {
            name: round(float(np.mean(ends)) / float(getattr(_first(rows), column)), 4)
            for column, name in EDGES.items()
        }
    return {"random delays: sharpness at the end over the edge of": found} if found else {}


def plot(records: pd.DataFrame) -> Any:
    """Returns the figure: sharpness against time and each run's edge, dashed; a panel an idea."""
    names = (SAME_RATE, RESCALED, MOMENTUM, CROSS_ENTROPY, RANDOM)
    panels = [_runs(records, name) for name in names]
    figure, axes = style.new_figure(len(panels), width=3.9, height=5.0)
    figure.suptitle(
        "Edge of stability under delay: sharpness rises to h*(τ)/η (dashed) and hovers there "
        "(a line a seed)",
        fontsize=15,
    )
    rates = [_first(lines[0]).learning_rate for lines in panels]
    sets = [_data(lines[0]) for lines in panels]
    titles = (
        f"{sets[0]}, one rate η = {rates[0]:.3g}:\nevery delay has its own edge",
        f"{sets[1]}, η in proportion to h*(τ):\nevery delay has the same edge",
        f"{sets[2]}, one rate, delay τ = {_first(panels[2][0]).delay}:\nmomentum moves the edge",
        f"{sets[3]}, cross-entropy: at the edge\nwhile it learns (shaded)",
        f"{sets[4]}, delays of mean {_first(panels[4][0]).delay}:\n"
        "edges of mean - -, square -·, typical run ··",
    )
    constant = [rows for lines in (*panels[:2], panels[3]) for rows in lines]
    delays = sorted({_first(rows).delay for rows in constant})
    # A delay has one colour in all of its panels.
    colours = dict(zip((f"τ = {delay}" for delay in delays), _PALETTE, strict=False))
    for lines in (panels[2], panels[4]):
        colours |= dict(zip(map(_label, lines), _PALETTE, strict=False))
    end = max(rows.time.max() for rows in panels[3])
    axes[3].axvspan(*(share * end for share in _WHILE_LEARNING), color="0.92", zorder=0)
    for axis, lines, title in zip(axes, panels, titles, strict=True):
        axis.set_title(title, fontsize=11)
        _draw(axis, lines, colours)
    axes[0].set_ylabel("sharpness\n(largest curvature of the training loss)")
    return figure


def _draw(axis: Any, lines: Sequence[pd.DataFrame], colours: Mapping[str, str]) -> None:
    """Draws sharpness and edges of one panel, and names the lines, lowest edge first."""
    axis.set_yscale("log")
    order = sorted(lines, key=lambda rows: (_first(rows).edge, -_first(rows).delay))
    edges = [_first(rows).edge for rows in order]
    common = np.ptp(edges) < 1e-6 * edges[0]
    for number, (rows, edge) in enumerate(zip(order, edges, strict=True)):
        # Lines that lie on each other: the lower ones wider, so that all can be seen.
        width = 0.8 + 1.2 * (len(order) - 1 - number) if common else 0.9
        colour = colours[_label(rows)]
        for alone in _seeds(rows):
            axis.plot(
                alone.time, alone.sharpness, color=colour, linewidth=width, solid_capstyle="butt"
            )
        look = {"linewidth": 1.4, "zorder": 3, "color": style.BLACK if common else colour}
        axis.axhline(edge, linestyle="--", **look)
        if _first(rows).delays != "constant":
            axis.axhline(_first(rows).mean_square_edge, linestyle="-.", **look)
            axis.axhline(_first(rows).typical_edge, linestyle=":", **look)
    low, high = (float(np.log(limit)) for limit in axis.get_ylim())
    # Names stand at the edges; where the edge is a common one, well below it, in the empty part.
    heights = [np.log(edge) - (0.4 * (high - low) if common else 0.0) for edge in edges]
    apart = style.move_apart(heights, 0.065 * (high - low))
    for rows, height in zip(order, apart, strict=True):
        place = (0.6 if common else 1.0, np.exp(height))
        style.name_line(axis, _label(rows), place, colours[_label(rows)], fontsize=11)
    ticks = [tick for tick in (1, 2, 3, 5, 10, 20, 30, 50, 100) if low < np.log(tick) < high]
    axis.set_yticks(ticks, labels=[str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlim(left=0.0, right=max(rows.time.max() for rows in lines))
    axis.set_xlabel("training time (η × updates)")


def _runs(records: pd.DataFrame, panel: str | None = None) -> list[pd.DataFrame]:
    """The rows of each run (of a panel), all seeds, runs in the order of the table."""
    runs = [rows for _, rows in records.groupby(_RUN, sort=False)]
    return [rows for rows in runs if panel in (None, _first(rows).panel)]


def _seeds(rows: pd.DataFrame) -> list[pd.DataFrame]:
    """The rows of a run, seed by seed."""
    return [alone for _, alone in rows.groupby("seed", sort=False)]


def _first(rows: pd.DataFrame) -> Any:
    """The first row of a run: what is the same in all of them, and where it starts."""
    return next(rows.itertuples())


def _thirds(rows: pd.DataFrame, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A column's values in the second and in the last third of the run's time.

    Of cross-entropy before and in the part of the time in which it learns.
    """
    share = (rows.time / rows.time.iloc[-1]).to_numpy()
    values = rows[name].to_numpy()
    if _first(rows).panel == CROSS_ENTROPY:
        low, high = _WHILE_LEARNING
        return values[share < low], values[(share >= low) & (share < high)]
    return values[(share >= 1 / 3) & (share < 2 / 3)], values[share >= 2 / 3]


def _ends(rows: pd.DataFrame, name: str) -> np.ndarray:
    """Of every seed, the mean of a column over the last third (see `_thirds`)."""
    return np.array([np.mean(_thirds(alone, name)[1]) for alone in _seeds(rows)])


def _name(rows: pd.DataFrame) -> str:
    first = _first(rows)
    name = f"{_data(rows)}, {first.panel.replace('_', ' ')}, tau = {first.delay}"
    return f"{name}, {_momentum(rows)}" if first.panel == MOMENTUM else name


def _hover_claim(rows: pd.DataFrame) -> Claim:
    """The claim that a run ends at its edge; where it does not, with the reason the rows show."""
    low, high = _WHILE_LEARNING
    while_learning = f"mean from {low:g} to {high:g} of the time"
    when = while_learning if _first(rows).panel == CROSS_ENTROPY else "mean of the last third"
    found = inside(
        f"{_name(rows)}: sharpness over h*/eta, {when}",
        estimate_ratio(_ends(rows, "ratio")),
        1.0 - _TOLERANCE,
        1.0 + _TOLERANCE,
    )
    if found.holds or _first(rows).panel == CROSS_ENTROPY:
        return found
    return found._replace(claim=f"{found.claim} ({_reason(rows)})")


def _random_claims(rows: pd.DataFrame) -> list[Claim]:
    """The claims that random delays end at the edge of a typical run, and at no other."""
    first, ends = _first(rows), _ends(rows, "sharpness")
    name = f"{_data(rows)}, random delays ({first.delays}): sharpness over the"
    found = [
        inside(
            f"{name} Lyapunov edge, mean of the last third",
            estimate_ratio(ends / first.typical_edge),
            1.0 - _TOLERANCE,
            1.0 + _TOLERANCE,
        )
    ]
    for column, edge in EDGES.items():
        if column == "typical_edge":
            continue
        other = getattr(first, column) / first.typical_edge
        ratio = estimate_ratio(ends / getattr(first, column))
        if other > 1.0 / _MISSES:
            found.append(inside(f"{name} {edge} edge", ratio, -math.inf, _MISSES))
        elif other < _MISSES:
            found.append(inside(f"{name} {edge} edge", ratio, 1.0 / _MISSES, math.inf))
    return found


def _reason(rows: pd.DataFrame) -> str:
    """Why a run isn't at its edge, as far as its own rows tell."""
    thirds = [_thirds(alone, "ratio") for alone in _seeds(rows)]
    before, last = (float(np.mean([pair[part] for pair in thirds])) for part in (0, 1))
    highest = float(np.max(rows.ratio.to_numpy()))
    if not np.isfinite(highest):
        return "the run diverged"
    if highest < 1.0:
        return f"the run ended before it reached the edge, highest {highest:.3g}"
    if last > 1.0 and before > last:
        return f"not settled: it was {before:.3g} in the third before, and is falling"
    return f"it was {before:.3g} in the third before: not on its way to the edge"


def _data(rows: pd.DataFrame) -> str:
    """The name of the data set, as one writes it."""
    name = _first(rows).data
    return name.upper() if name == "mnist" else name


def _momentum(rows: pd.DataFrame) -> str:
    """Kind and size of the momentum."""
    first = _first(rows)
    if first.momentum == 0.0:
        return "no momentum"
    return f"{'shifted' if first.kind == 'shifted' else 'damped'} {first.momentum:g}"


def _label(rows: pd.DataFrame) -> str:
    """A line's name in the picture."""
    first = _first(rows)
    if first.panel == RANDOM:
        return first.delays
    return _momentum(rows) if first.panel == MOMENTUM else f"τ = {first.delay}"
