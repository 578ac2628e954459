r"""Edge of stability under delay: sharpness rises and then hovers at h*(tau) / eta.

Full-batch gradient descent raises the sharpness of the loss until it stands at 2 / eta, the
largest at which its own steps are stable, and then hovers there (Cohen, Kaur, Li, Kolter and
Talwalkar, "Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability", ICLR
2021). With gradients tau updates old the largest stable sharpness is `stability.max_sharpness`, and
another one with momentum. This figure looks whether sharpness goes there.

A small tanh network with squared loss on one-hot targets, neither weight decay nor batch noise,
starts from small weights in a flat place. Time is eta x steps: in it all runs follow one curve,
that of gradient flow, until they reach their edges. Undamped heavy-ball momentum m at the rate
(1 - m) eta makes the very same updates as the damped at eta, so it isn't run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd

from asgd_jax import data, stability
from asgd_jax.stability.arguments import Kind
from asgd_jax.training.folder.table import Record, add_runs, open_table, run_key
from asgd_jax.transforms import delayed_sgd
from experiments import style
from experiments.claims import Claim, at_most, deviation, near
from experiments.edges.minimum import Problem, tanh_problem
from experiments.sharpness_track import Sample, make_track, measuring_steps

CAPTION = (
    "Without batch noise, sharpness rises until delayed gradient descent is at the edge of its "
    "stability, and hovers there: at h*(tau)/eta, for every delay and every kind of momentum, as "
    "it does at 2/eta without delay."
)


class TrainingSet(NamedTuple):
    """A training set and the network for it.

    Attributes:
      name: of the data set, as in `asgd_jax.data.load`.
      num_train: images, all of them in one batch.
      hidden: widths of the hidden layers.
      initial_scale: multiplies the initial weights. Small ones are in a flat place, so that there
        is room below the edge for sharpness to rise in.
    """

    name: str
    num_train: int
    hidden: tuple[int, ...]
    initial_scale: float = 0.3


class Config(NamedTuple):
    """Three panels: one rate at several delays; rates in proportion to h*; kinds of momentum.

    Attributes:
      same_rate_data, same_rate, same_rate_delays: of the first panel, with its learning rate.
      data: of the other two panels.
      common_edge: the sharpness h*(tau) / eta that the rates of the second panel are chosen for.
      rescaled_delays: its delays.
      momentum_rate, momentum_delay: of the third panel.
      momenta: (momentum, kind) of its runs, all dampened.
      time, same_rate_time: learning rate x steps of each run; the first panel has its own.
      num_samples: measurements of the sharpness in a run, after the one at the start.
      seed: of the initial parameters.
    """

    same_rate_data: TrainingSet
    data: TrainingSet
    same_rate: float = 0.06
    same_rate_delays: tuple[int, ...] = (0, 2, 4, 8)
    common_edge: float = 10.0
    rescaled_delays: tuple[int, ...] = (0, 2, 8, 16)
    momentum_rate: float = 0.04
    momentum_delay: int = 8
    momenta: tuple[tuple[float, Kind], ...] = (
        (0.9, "heavy_ball"),
        (0.0, "heavy_ball"),
        (0.5, "shifted"),
        (0.9, "shifted"),
    )
    time: float = 800.0
    same_rate_time: float = 1000.0
    num_samples: int = 40
    seed: int = 0


_TINY = TrainingSet("digits", 64, (16, 16))
PRESETS = {
    "smoke": Config(
        _TINY,
        _TINY,
        same_rate=0.16,
        same_rate_delays=(0, 2),
        rescaled_delays=(0, 4),
        momentum_rate=0.1,
        momentum_delay=2,
        momenta=((0.9, "heavy_ball"), (0.5, "shifted")),
        time=200.0,
        same_rate_time=300.0,
        num_samples=8,
    ),
    "cpu": Config(TrainingSet("mnist", 512, (32, 32)), TrainingSet("digits", 256, (32, 32, 32))),
    "paper": Config(
        TrainingSet("mnist", 5000, (64, 64)),
        TrainingSet("digits", 1437, (64, 64, 64)),
        rescaled_delays=(0, 2, 8, 16, 32),
        time=2000.0,
        same_rate_time=3000.0,
        num_samples=80,
    ),
}

SAME_RATE, RESCALED, MOMENTUM = "same_rate", "rescaled", "momentum"

_TOLERANCE = 0.10  # of the ratio of sharpness to the edge
_START = 0.75  # of the edge: where the rise must begin to be called one
_PALETTE = (*style.COLOURS, style.BLACK)
_INPUT_NORM = 8.0  # root mean square over the images; that of 64 standardised pixels


class Trajectory(NamedTuple):
    """One line of the figure: which data, and the optimizer."""

    panel: str
    data: TrainingSet
    time: float
    learning_rate: float
    delay: int
    momentum: float = 0.0
    kind: Kind = "heavy_ball"


def all_runs(config: Config) -> Iterator[Trajectory]:
    """Yields the runs of the three panels."""
    first = SAME_RATE, config.same_rate_data, config.same_rate_time, config.same_rate
    for delay in config.same_rate_delays:
        yield Trajectory(*first, delay)
    for delay in config.rescaled_delays:
        rate = stability.max_learning_rate(delay, sharpness=config.common_edge)
        yield Trajectory(RESCALED, config.data, config.time, rate, delay)
    for momentum, kind in config.momenta:
        rate, delay = config.momentum_rate, config.momentum_delay
        yield Trajectory(MOMENTUM, config.data, config.time, rate, delay, momentum, kind)


def network_problem(chosen: TrainingSet, seed: int) -> Problem:
    """Returns the network, small in its initial weights, with squared loss on one full batch."""
    dataset = data.load(chosen.name, num_train=chosen.num_train)
    images = data.normalizer(dataset)(dataset.train_images)
    # One scale for all data sets: curvature grows with the square of the inputs.
    images *= _INPUT_NORM / jnp.sqrt(jnp.mean(jnp.sum(images**2, axis=(1, 2, 3))))
    problem = tanh_problem(dataset, images, hidden=chosen.hidden, seed=seed)
    return problem._replace(params=optax.tree.scale(chosen.initial_scale, problem.params))


def run(config: Config, work: Path) -> list[Record]:
    """Returns loss, sharpness and its ratio to the edge at every sample of every run.

    Finished runs are kept in `work`/eos: a killed program goes on with the next one.
    """
    table = open_table(work / "eos", config._asdict())
    tracks: dict[TrainingSet, Any] = {}
    keys = []
    for each in all_runs(config):
        point = {name: getattr(each, name) for name in ("panel", "delay", "momentum", "kind")}
        keys.append(run_key(point))
        if keys[-1] not in table.runs:
            if each.data not in tracks:
                tracks[each.data] = make_track(network_problem(each.data, config.seed))
            table = add_runs(table, {keys[-1]: _measure(each, tracks[each.data], config)})
    return [record for key in keys for record in table.runs[key]]


def _measure(run: Trajectory, track: Callable[..., list[Sample]], config: Config) -> list[Record]:
    """The records of one run."""
    method: dict[str, Any] = {"momentum": run.momentum, "kind": run.kind, "dampening": True}
    edge = stability.max_sharpness(run.learning_rate, run.delay, **method)
    optimizer = delayed_sgd(jnp.float32(run.learning_rate), run.delay, **method)
    steps = measuring_steps(round(run.time / run.learning_rate), config.num_samples)
    return [
        {
            "panel": run.panel,
            "data": run.data.name,
            "delay": run.delay,
            "momentum": run.momentum,
            "kind": run.kind,
            "learning_rate": run.learning_rate,
            "edge": edge,
            "step": sample.step,
            "time": sample.step * run.learning_rate,
            "loss": sample.loss,
            "sharpness": sample.sharpness,
            "ratio": sample.sharpness / edge,
        }
        for sample in track(optimizer, steps)
    ]


def claims(records: pd.DataFrame) -> list[Claim]:
    """Checks start and end of every run, and the effect of the delay on where it ends."""
    series = _series(records)
    swings = [deviation(_thirds(rows, "ratio")[1]) for rows in series]
    at_rate = {_first(rows).delay: rows for rows in _series(records, SAME_RATE)}
    least, most = min(at_rate), max(at_rate)
    ends = [_end(rows, "sharpness") for rows in _series(records, RESCALED)]
    return [
        # Unlike Python's max, NumPy's keeps a NaN.
        at_most(
            "every run starts well below its edge, highest ratio",
            np.max([_first(rows).ratio for rows in series]),
            _START,
        ),
        *(_hover_claim(rows) for rows in series),
        at_most(
            "sharpness hovers: standard deviation in the last third over the edge, widest run",
            np.max(swings),
            _TOLERANCE,
        ),
        near(
            f"{_data(at_rate[most])}, one learning rate: sharpness at tau = {most} over that at "
            f"tau = {least} is the ratio of their h*",
            _end(at_rate[most], "sharpness") / _end(at_rate[least], "sharpness"),
            _first(at_rate[most]).edge / _first(at_rate[least]).edge,
            _TOLERANCE,
        ),
        at_most(
            "rates in proportion to h*: all delays end at one sharpness, largest over smallest",
            np.max(ends) / np.min(ends),
            1.0 + _TOLERANCE,
        ),
    ]


def plot(records: pd.DataFrame) -> Any:
    """Returns the figure: sharpness against time and each run's edge, dashed; a panel an idea."""
    figure, axes = style.new_figure(3, width=5.2, height=4.6)
    figure.suptitle(
        "Edge of stability under delay: sharpness rises to h*(τ)/η (dashed) and hovers there",
        fontsize=15,
    )
    panels = [_series(records, panel) for panel in (SAME_RATE, RESCALED, MOMENTUM)]
    rate, delay = _first(panels[0][0]).learning_rate, _first(panels[2][0]).delay
    sets = [_data(lines[0]) for lines in panels]
    titles = (
        f"{sets[0]}, one rate η = {rate:.3g}:\nevery delay has its own edge",
        f"{sets[1]}, η in proportion to h*(τ):\nevery delay has the same edge",
        f"{sets[2]}, one rate, delay τ = {delay}:\nmomentum moves the edge",
    )
    delays = sorted({_first(rows).delay for lines in panels[:2] for rows in lines})
    # A delay has one colour in both of its panels.
    by_delay = dict(zip((f"τ = {delay}" for delay in delays), _PALETTE, strict=False))
    by_momentum = dict(zip(map(_label, panels[2]), _PALETTE, strict=False))
    for axis, lines, title in zip(axes, panels, titles, strict=True):
        axis.set_title(title)
        _draw(axis, lines, by_momentum if lines is panels[2] else by_delay)
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
        width = 1.4 + 2.2 * (len(order) - 1 - number) if common else 1.7
        colour = colours[_label(rows)]
        look = {"color": colour, "linewidth": width, "solid_capstyle": "butt"}
        axis.plot(rows.time, rows.sharpness, **look)
        look = {"linestyle": "--", "linewidth": 1.4, "zorder": 3}
        axis.axhline(edge, color=style.BLACK if common else colour, **look)
    low, high = (float(np.log(limit)) for limit in axis.get_ylim())
    # Names stand at the edges; where the edge is a common one, well below it, in the empty part.
    heights = [np.log(edge) - (0.4 * (high - low) if common else 0.0) for edge in edges]
    apart = style.move_apart(heights, 0.065 * (high - low))
    for rows, height in zip(order, apart, strict=True):
        place = (0.75 if common else 1.0, np.exp(height))
        style.name_line(axis, _label(rows), place, colours[_label(rows)], fontsize=12)
    ticks = [tick for tick in (1, 2, 3, 5, 10, 20, 30, 50, 100) if low < np.log(tick) < high]
    axis.set_yticks(ticks, labels=[str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlim(left=0.0, right=max(rows.time.max() for rows in lines))
    axis.set_xlabel("training time (η × updates)")


def _series(records: pd.DataFrame, panel: str | None = None) -> list[pd.DataFrame]:
    """The rows of each run (of a panel), runs in the order of the table."""
    keys = ["panel", "data", "delay", "momentum", "kind"]
    runs = [rows for _, rows in records.groupby(keys, sort=False)]
    return [rows for rows in runs if panel in (None, _first(rows).panel)]


def _first(rows: pd.DataFrame) -> Any:
    """The first row of a run: what is the same in all of them, and where it starts."""
    return next(rows.itertuples())


def _thirds(rows: pd.DataFrame, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A column's values in the second and in the last third of the run's time."""
    share = (rows.time / rows.time.iloc[-1]).to_numpy()
    values = rows[name].to_numpy()
    return values[(share >= 1 / 3) & (share < 2 / 3)], values[share >= 2 / 3]


def _end(rows: pd.DataFrame, name: str) -> float:
    """The mean of a column over the last third of the run's time."""
    return float(np.mean(_thirds(rows, name)[1]))


def _hover_claim(rows: pd.DataFrame) -> Claim:
    """The claim that a run ends at its edge; where it does not, with the reason the rows show."""
    first = _first(rows)
    name = f"{_data(rows)}, {first.panel.replace('_', ' ')}, tau = {first.delay}"
    if first.panel == MOMENTUM:
        name += f", {_momentum(rows)}"
    found = near(
        f"{name}: sharpness over h*/eta, mean of the last third",
        _end(rows, "ratio"),
        1.0,
        _TOLERANCE,
    )
    return found if found.holds else found._replace(claim=f"{found.claim} ({_reason(rows)})")


def _reason(rows: pd.DataFrame) -> str:
    """Why a run isn't at its edge, as far as its own rows tell."""
    before, last = (float(np.mean(part)) for part in _thirds(rows, "ratio"))
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
    return _momentum(rows) if first.panel == MOMENTUM else f"τ = {first.delay}"
