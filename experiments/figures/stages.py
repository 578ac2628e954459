r"""Delays that differ by layer: where is the edge, and how wrong is the guess of the mean delay?

A deep tanh network on digits descends to a minimum. Layer l of L is then read as old as its stage
of a pipeline (`delays.pipeline`), and full-batch descent at one learning rate after another stays
there or leaves. Predicted is `stability.stages_max_learning_rate`, from the top of the Hessian's
spectrum and from how its vectors lie in the layers.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pandas as pd

from asgd_jax import curvature, data, delays, stability
from asgd_jax.training.folder.table import Record, add_runs, open_table, run_key
from asgd_jax.transforms import delayed
from experiments import style
from experiments.claims import Claim, at_least, at_most
from experiments.edges.fullbatch import measure_edge
from experiments.edges.minimum import find_minimum, tanh_problem

CAPTION = (
    "Where delays differ by layer, a minimum is left at the rate that follows from how its sharp "
    "directions lie in the layers: between that of the largest and that of the smallest delay, and "
    "not at that of the mean delay."
)


class Config(NamedTuple):
    """Networks by their number of layers, stages by layers in each, and the data.

    Attributes:
      num_layers: of the networks.
      layers_per_stage: a pipeline of num_layers / this many stages each; 1 is the longest.
      num_train: images of digits, in one batch.
      hidden: width of every hidden layer.
      weight_decay: factor of |params|^2 / 2, without which descent creeps along valleys for ever.
      num_pairs: eigenpairs that the prediction uses.
      seeds: of the initial parameters.
    """

    num_layers: tuple[int, ...]
    layers_per_stage: tuple[int, ...]
    num_train: int = 256
    hidden: int = 32
    weight_decay: float = 0.003
    num_pairs: int = 10
    seeds: tuple[int, ...] = (0, 1, 2)


PRESETS = {
    "smoke": Config((3,), (1,), num_train=64, hidden=8, num_pairs=4, seeds=(0,)),
    "cpu": Config((4, 8), (1, 2)),
    "paper": Config((4, 8), (1, 2, 4), num_train=1437, hidden=64, seeds=(0, 1, 2, 3, 4)),
}

_CLOSE = 0.05  # of measured over predicted
_RESOLUTION = 0.02


def run(config: Config, work: Path) -> list[Record]:
    """Returns a row for every network, pipeline and seed; finished ones are kept in `work`."""
    table = open_table(work / "stages", config._asdict())
    keys = []
    for layers in config.num_layers:
        for seed in config.seeds:
            minimum = None
            for width in config.layers_per_stage:
                keys.append(run_key({"layers": layers, "seed": seed, "layers_per_stage": width}))
                if keys[-1] in table.runs:
                    continue
                minimum = minimum or _minimum(config, layers, seed)
                row = {"layers": layers, "layers_per_stage": width, "seed": seed}
                row |= _edge(*minimum, config.num_pairs, layers, width)
                table = add_runs(table, {keys[-1]: [row]})
    return [record for key in keys for record in table.runs[key]]


def _minimum(config: Config, layers: int, seed: int) -> tuple[Any, Any]:
    digits = data.load("digits", num_train=config.num_train)
    images = data.normalizer(digits)(digits.train_images)
    problem = tanh_problem(
        digits,
        images,
        hidden=(config.hidden,) * (layers - 1),
        weight_decay=config.weight_decay,
        seed=seed,
    )
    return problem, find_minimum(*problem, optax.sgd(0.05, momentum=0.98), max_steps=200_000)


def delays_by_layer(params: Any, layers: int, layers_per_stage: int) -> Any:
    """Returns each leaf's delay: consecutive layers in stages, the first one the oldest."""
    names = sorted(params, key=_layer)
    profile = delays.pipeline(-(-layers // layers_per_stage))
    stage = {name: number // layers_per_stage for number, name in enumerate(names)}
    return delays.by_stage(params, lambda path: stage[path[0].key], profile)


def _layer(name: str) -> tuple[bool, int]:
    """Flax's names in the order of the layers: Dense_0, Dense_1, ..., then the last one's."""
    number = name.rpartition("_")[2]
    return (not number.isdigit(), int(number) if number.isdigit() else 0)


def _edge(problem: Any, minimum: Any, num_pairs: int, layers: int, width: int) -> Record:
    """Predicted and measured edge of a pipeline, and the guesses that ignore the layers."""
    ages = delays_by_layer(minimum.params, layers, width)
    top = curvature.eigenpairs(
        problem.loss_fn, minimum.params, problem.batches, num_pairs, tol=1e-4
    )
    predicted = stability.stages_max_learning_rate(top, ages)
    above = (1.0 + _RESOLUTION) * predicted
    growth = stability.stages_spectral_radius(top, ages, learning_rate=above)
    lower, upper = measure_edge(
        minimum,
        lambda rate: delayed(optax.sgd(rate), ages),
        problem.loss_fn,
        problem.batches,
        steps=math.ceil(1.0 / math.log(growth)),
        resolution=_RESOLUTION,
    )
    sharpness = float(top.values[0])
    every = jax.tree.leaves(ages)
    sizes = [leaf.size for leaf in jax.tree.leaves(minimum.params)]
    mean = round(float(np.average(every, weights=sizes)))
    named = {"largest": max(every), "smallest": min(every), "mean": mean}
    guesses = {
        f"by_{name}": stability.max_learning_rate(delay, sharpness=sharpness)
        for name, delay in named.items()
    }
    return {
        "stages": max(every) + 1,
        "sharpness": sharpness,
        "loss": minimum.loss,
        "predicted": predicted,
        "measured": math.sqrt(lower * upper),
        **guesses,
    }


def claims(records: pd.DataFrame) -> list[Claim]:
    """Checks prediction, bounds, and by how much the guess of the mean delay is off."""
    off = np.abs(records.measured / records.predicted - 1.0)
    wrong = np.abs(np.log(records.by_mean / records.measured))
    return [
        at_most(
            f"measured over predicted, furthest of {len(off)} from 1",
            float(np.max(off.to_numpy())),
            _CLOSE,
        ),
        at_least(
            "measured over the edge of the largest delay, least",
            float(np.min((records.measured / records.by_largest).to_numpy())),
            1.0 - _CLOSE,
        ),
        at_most(
            "measured over the edge of the smallest delay, most",
            float(np.max((records.measured / records.by_smallest).to_numpy())),
            1.0 + _CLOSE,
        ),
        at_least(
            "the guess of the mean delay is off by a factor of, on average",
            float(np.exp(np.mean(wrong.to_numpy()))),
            1.0 + 2.0 * _CLOSE,
        ),
    ]


def plot(records: pd.DataFrame) -> Any:
    """Returns the figure: edges of every pipeline over the measured one."""
    figure, (axis,) = style.new_figure(1, width=8.5, height=4.8)
    groups = list(records.groupby(["layers", "stages"]))
    series = (
        ("by_smallest", "edge of the smallest delay", style.SKY, "v"),
        ("by_mean", "edge of the mean delay", style.RED, "s"),
        ("predicted", "predicted, by layer", style.BLUE, "o"),
        ("by_largest", "edge of the largest delay", style.ORANGE, "^"),
    )
    for place, (_, rows) in enumerate(groups):
        spread = np.linspace(-0.15, 0.15, len(rows)) if len(rows) > 1 else [0.0]
        for column, label, colour, marker in series:
            axis.plot(
                place + np.asarray(spread),
                rows[column] / rows.measured,
                linestyle="",
                marker=marker,
                color=colour,
                label=None if place else label,
            )
    axis.axhline(1.0, color=style.BLACK, linewidth=1.0, label="measured")
    axis.axhspan(1.0 - _CLOSE, 1.0 + _CLOSE, color="0.9", zorder=0, label=f"within {_CLOSE:.0%}")
    names = [f"{layers} layers,\n{stages} stages" for (layers, stages), _ in groups]
    axis.set_xticks(range(len(groups)), names)
    axis.set(ylabel="largest stable rate over the measured one")
    style.plain_log(axis, "y")
    axis.set_title("Delays by pipeline stage: the edge follows from the layers (a point a seed)")
    axis.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
