r"""Adam at the edge of stability under delay, the same everywhere or by pipeline stage.

Without delay, full-batch Adam takes the largest eigenvalue of $D^{-1/2} H D^{-1/2}$, with the
preconditioner $D = \sqrt{\hat\nu} + \epsilon$, to $2 (1 + \beta_1) / ((1 - \beta_1) \eta)$ and
keeps it there (Cohen et al., "Adaptive Gradient Methods at the Edge of Stability", 2022). At a held
D Adam is a damped heavy ball of momentum $\beta_1$, so that under delay the edge should be
$h^*(\tau; \beta_1) / \eta$, and where layers have delays of their own the rate should stand at
`stages_max_learning_rate` of the preconditioned spectrum. Does it?

Tanh networks on digits in one full batch, squared loss. Drawn is the learning rate over the largest
stable one at the place where the run is: 1 is the edge.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd

from asgd_jax import curvature, delays, stability
from asgd_jax.training.folder.table import Record, add_runs, open_table, run_key
from asgd_jax.transforms import delayed
from experiments import style
from experiments.claims import Claim, at_least, at_most, estimate_ratio, inside
from experiments.edges.minimum import Problem
from experiments.figures.eos_runs import TrainingSet, network_problem
from experiments.figures.stages import delays_by_layer
from experiments.sharpness_track import make_full_batch_advance, measuring_steps

CAPTION = (
    "Under delay, full-batch Adam takes its preconditioned sharpness to the edge that theory has "
    "for a damped heavy ball of momentum beta1, and where layers have delays of their own to the "
    "edge of that pipeline; what the oldest stage's delay says is far off."
)

WHY = (
    "in the pipeline of eight stages the seeds end between 1.08 and 1.26 of the edge and two of "
    "them may still be rising, so that the interval of the mean, 1.09 to 1.30, reaches beyond the "
    "margin of 25 %; 12,000 updates do not tell whether they settle."
)

UNIFORM, PIPELINE = "uniform", "pipeline"


class Config(NamedTuple):
    """Networks, delays and rates.

    Attributes:
      num_train, hidden: of digits, and the widths of the network of the uniform delays.
      adam_b1: beta1 of its runs, each with every delay of `uniform_delays`.
      num_layers: of the pipelines' networks, a stage a layer, beta1 the first of `adam_b1`.
      common_edge: preconditioned sharpness that the rates are chosen for, of a pipeline at its mean
        delay.
      num_steps, num_samples: updates of a run, and measurements after the first one.
      num_pairs: eigenpairs of a pipeline's prediction.
      seeds: of the initial parameters. Those of the pilot were 100.
    """

    num_train: int = 256
    hidden: tuple[int, ...] = (32, 32, 32)
    adam_b1: tuple[float, ...] = (0.9, 0.0)
    uniform_delays: tuple[int, ...] = (0, 2, 8)
    num_layers: tuple[int, ...] = (4, 8)
    common_edge: float = 3800.0
    num_steps: int = 12_000
    num_samples: int = 24
    num_pairs: int = 10
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


PRESETS = {
    "smoke": Config(
        64, (8, 8), (0.9,), (0, 2), (3,), 1000.0, num_steps=400, num_samples=3, num_pairs=4,
        seeds=(0,),
    ),
    "cpu": Config(),
    "paper": Config(1437, (64, 64, 64), uniform_delays=(0, 2, 8, 16), num_steps=40_000),
}  # fmt: skip

_FIRST = 20  # updates before the first measurement: nu is no average of anything before
_TOLERANCE, _OF_PIPELINES = 0.15, 0.25
_BELOW = 0.8  # of the edge, where the rise must begin
_OFF = 1.5  # by so much the guess of the oldest stage is wrong, at least


class _Adam(NamedTuple):
    """A line of the figure; `delay` is the largest one."""

    profile: str
    layers: int
    b1: float
    delay: int


def _all_runs(config: Config) -> list[_Adam]:
    layers = len(config.hidden) + 1
    uniform = [
        _Adam(UNIFORM, layers, b1, delay)
        for b1 in config.adam_b1
        for delay in config.uniform_delays
    ]
    b1 = config.adam_b1[0]
    return uniform + [_Adam(PIPELINE, layers, b1, layers - 1) for layers in config.num_layers]


def run(config: Config, work: Path) -> list[Record]:
    """Returns the ratios to the edge at every sample of every run; finished ones are kept."""
    table = open_table(work / "eos_adam", config._asdict())
    keys = []
    for each in _all_runs(config):
        for seed in config.seeds:
            keys.append(run_key(each._asdict() | {"seed": seed}))
            if keys[-1] not in table.runs:
                rows = _measure(each, config, seed)
                table = add_runs(table, {keys[-1]: rows})
    return [record for key in keys for record in table.runs[key]]


def _measure(run: _Adam, config: Config, seed: int) -> list[Record]:
    width = config.hidden[0]
    chosen = TrainingSet("digits", config.num_train, (width,) * (run.layers - 1), 1.0)
    problem = network_problem(chosen, seed)
    ages: Any = run.delay
    if run.profile == PIPELINE:
        ages = delays_by_layer(problem.params, run.layers, 1)
    mean = round(np.mean(delays.pipeline(run.layers))) if run.profile == PIPELINE else run.delay
    rate = stability.max_learning_rate(mean, sharpness=config.common_edge, momentum=run.b1)
    tx = delayed(optax.adam(jnp.float32(rate), b1=run.b1), ages)
    advance = make_full_batch_advance(problem.loss_fn, tx)
    (batch,) = problem.batches
    params, state, done = problem.params, tx.init(problem.params), 0
    records = []
    for step in measuring_steps(config.num_steps - _FIRST, config.num_samples):
        params, state = advance(params, state, batch, step + _FIRST - done)
        done = step + _FIRST
        edges = _edges(problem, params, state, ages, run, config, mean)
        records.append(
            {
                **run._asdict(),
                "seed": seed,
                "learning_rate": rate,
                "step": done,
                "loss": float(problem.loss_fn(params, batch)),
                **{name: rate / edge for name, edge in edges.items()},
            }
        )
    return records


def _edges(
    problem: Problem, params: Any, state: Any, ages: Any, run: _Adam, config: Config, mean: int
) -> dict[str, float]:
    """Largest stable rates here: the prediction, and what one delay for all would say."""
    diagonal = curvature.adam_preconditioner(state)
    wanted = config.num_pairs if run.profile == PIPELINE else 1
    top = curvature.eigenpairs(
        problem.loss_fn, params, problem.batches, wanted, tol=1e-2, preconditioner=diagonal
    )
    sharpness = float(top.values[0])

    def of_one(delay: int) -> float:
        return stability.max_learning_rate(delay, sharpness=sharpness, momentum=run.b1)

    predicted = of_one(run.delay)
    if run.profile == PIPELINE:
        predicted = stability.stages_max_learning_rate(top, ages, momentum=run.b1)
    return {"ratio": predicted, "by_oldest": of_one(run.delay), "by_mean": of_one(mean)}


def claims(records: pd.DataFrame) -> list[Claim]:
    """Checks start and end of every run, and the guesses that ignore the layers."""
    found = []
    starts = [
        alone.ratio[alone.step <= alone.step.max() / 10].min()
        for _, rows in _lines(records)
        for alone in _seeds(rows)
    ]
    found.append(
        at_most(
            "every run begins below its edge: lowest ratio in the first tenth, highest of all runs",
            float(np.max(starts)),
            _BELOW,
        )
    )
    for name, rows in _lines(records):
        width = _OF_PIPELINES if rows.profile.iloc[0] == PIPELINE else _TOLERANCE
        found.append(
            inside(
                f"{name}: rate over the largest stable one, mean of the last third",
                estimate_ratio(_ends(rows, "ratio")),
                1.0 - width,
                1.0 + width,
            )
        )
    for name, rows in _lines(records):
        if rows.profile.iloc[0] == PIPELINE:
            found.append(
                at_least(
                    f"{name}: rate over the edge of the oldest stage's delay, least of the seeds",
                    float(np.min(_ends(rows, "by_oldest"))),
                    _OFF,
                )
            )
    return found


def notes(records: pd.DataFrame) -> dict[str, Any]:
    """Returns, of pipelines, the rate over three edges in the last third."""
    return {
        "pipelines: rate over the edge by": {
            name: {
                column: round(float(_ends(rows, column).mean()), 3)
                for column in ("ratio", "by_mean", "by_oldest")
            }
            for name, rows in _lines(records)
            if rows.profile.iloc[0] == PIPELINE
        }
    }


def _lines(records: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each line of the figure, with its name."""
    named = []
    for (profile, layers, b1, delay), rows in records.groupby(list(_Adam._fields), sort=False):
        name = f"beta1 = {b1:g}, delay {delay}"
        if profile == PIPELINE:
            name = f"{layers} layers with delays {delay} to 0"
        named.append((name, rows))
    return named


def _seeds(rows: pd.DataFrame) -> list[pd.DataFrame]:
    return [alone for _, alone in rows.groupby("seed", sort=False)]


def _ends(rows: pd.DataFrame, column: str) -> np.ndarray:
    """Of every seed, the mean of a column over the last third of the updates."""
    return np.array(
        [alone[column][alone.step >= alone.step.max() * 2 / 3].mean() for alone in _seeds(rows)]
    )


def plot(records: pd.DataFrame) -> Any:
    """Returns the figure: ratios to the edge against updates; a panel a beta1 and a pipeline."""
    lines = _lines(records)
    groups: dict[str, list[tuple[str, pd.DataFrame]]] = {}
    for name, rows in lines:
        first = rows.iloc[0]
        title = f"one delay for all, β₁ = {first.b1:g}"
        if first.profile == PIPELINE:
            title = f"pipeline of {first.layers} stages, β₁ = {first.b1:g}"
        groups.setdefault(title, []).append((name, rows))
    figure, axes = style.new_figure(len(groups), width=4.2, height=4.4)
    figure.suptitle(
        "Delayed Adam goes to the edge of stability that theory has for it (a line a seed)",
        fontsize=14,
    )
    for axis, (title, members) in zip(axes, groups.items(), strict=True):
        axis.axhline(1.0, color=style.BLACK, linestyle="--", linewidth=1.2)
        for (_, rows), colour in zip(members, style.COLOURS, strict=False):
            if rows.profile.iloc[0] == PIPELINE:
                _draw(axis, rows, "by_oldest", style.ORANGE, "if all had the first stage's delay")
                _draw(axis, rows, "by_mean", style.RED, "if all had the mean delay")
                _draw(axis, rows, "ratio", style.BLUE, "predicted, by stage")
            else:
                _draw(axis, rows, "ratio", colour, f"τ = {rows.delay.iloc[0]}")
        axis.set_yscale("log")
        axis.set(title=title, xlabel="updates", ylim=(0.2, 10.0))
        axis.set_yticks([0.25, 0.5, 1, 2, 4, 8], labels=["0.25", "0.5", "1", "2", "4", "8"])
        axis.minorticks_off()
        axis.legend(fontsize=9, loc="upper right")
    axes[0].set_ylabel("learning rate over the largest stable one")
    return figure


def _draw(axis: Any, rows: pd.DataFrame, column: str, colour: str, label: str) -> None:
    for number, alone in enumerate(_seeds(rows)):
        axis.plot(
            alone.step,
            alone[column],
            color=colour,
            linewidth=1.0,
            label=None if number else label,
        )
