"""The runs of the edge-of-stability figure: full-batch delayed descent, sharpness along the way."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from asgd_jax import data, stability
from asgd_jax.delays import DelayProcess, categorical, constant, uniform
from asgd_jax.stability.arguments import Kind
from asgd_jax.training.folder.table import Record, add_runs, open_table, run_key
from asgd_jax.transforms import delayed, delayed_sgd
from experiments.edges.minimum import Problem, tanh_problem
from experiments.sharpness_track import Sample, make_track, measuring_steps

SAME_RATE, RESCALED, MOMENTUM = "same_rate", "rescaled", "momentum"
CROSS_ENTROPY, RANDOM = "cross_entropy", "random"

_INPUT_NORM = 8.0  # root mean square over the images; that of 64 standardised pixels


class TrainingSet(NamedTuple):
    """A training set and the network for it.

    Attributes:
      name: of the data set, as in `asgd_jax.data.load`.
      num_train: images, all of them in one batch.
      hidden: widths of the hidden layers.
      initial_scale: multiplies the initial weights. Small ones are in a flat place, so that there
        is room below the edge for sharpness to rise in.
      label_smoothing: None for squared loss on one-hot targets, else cross-entropy with so much.
    """

    name: str
    num_train: int
    hidden: tuple[int, ...]
    initial_scale: float = 0.3
    label_smoothing: float | None = None


class Config(NamedTuple):
    """The panels: one rate at several delays; rates in proportion to h*; kinds of momentum;
    cross-entropy; random delays.

    Attributes:
      same_rate_data, same_rate, same_rate_delays: of the first panel, with its learning rate.
      data: of the second, third and last panel.
      common_edge: the sharpness h*(tau) / eta that the rates of the second panel are chosen for.
      rescaled_delays: its delays.
      momentum_rate, momentum_delay: of the third panel.
      momenta: (momentum, kind) of its runs, all dampened.
      cross_entropy_data, cross_entropy_edge, cross_entropy_delays: of the fourth panel, with rates
        in proportion to h* too.
      random_edges: of the last one, the sharpness of a typical run (`Edges.typical`) that the rate
        is chosen for, by the delays' name; see `delay_processes`.
      random_longest: its largest delay, twice the mean.
      time, same_rate_time, cross_entropy_time, random_time: learning rate x steps of each run.
      num_samples: measurements of the sharpness in a run, after the one at the start.
      seeds: of the initial parameters and of random delays.
    """

    same_rate_data: TrainingSet
    data: TrainingSet
    cross_entropy_data: TrainingSet
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
    cross_entropy_edge: float = 3.0
    cross_entropy_delays: tuple[int, ...] = (0, 2, 8)
    random_edges: tuple[tuple[str, float], ...] = (
        ("constant", 10.0),
        ("uniform", 10.0),
        ("none or all", 6.5),
    )
    random_longest: int = 16
    time: float = 800.0
    same_rate_time: float = 1000.0
    cross_entropy_time: float = 300.0
    random_time: float = 1600.0
    num_samples: int = 40
    seeds: tuple[int, ...] = (0,)


_TINY = TrainingSet("digits", 64, (16, 16))
_TINY_CROSS = _TINY._replace(label_smoothing=0.0)
PRESETS = {
    "smoke": Config(
        _TINY,
        _TINY,
        _TINY_CROSS,
        same_rate=0.16,
        same_rate_delays=(0, 2),
        rescaled_delays=(0, 4),
        momentum_rate=0.1,
        momentum_delay=2,
        momenta=((0.9, "heavy_ball"), (0.5, "shifted")),
        cross_entropy_delays=(0, 2),
        random_longest=4,
        time=200.0,
        same_rate_time=300.0,
        cross_entropy_time=50.0,
        random_time=200.0,
        num_samples=8,
    ),
    "cpu": Config(
        TrainingSet("mnist", 512, (32, 32)),
        TrainingSet("digits", 256, (32, 32, 32)),
        TrainingSet("mnist", 1024, (32, 32), label_smoothing=0.0),
        seeds=(0, 1, 2, 3, 4),
    ),
    "paper": Config(
        TrainingSet("mnist", 5000, (64, 64)),
        TrainingSet("digits", 1437, (64, 64, 64)),
        TrainingSet("mnist", 5000, (64, 64), label_smoothing=0.0),
        rescaled_delays=(0, 2, 8, 16, 32),
        time=2000.0,
        same_rate_time=3000.0,
        cross_entropy_time=600.0,
        random_time=3000.0,
        num_samples=80,
        seeds=(0, 1, 2, 3, 4),
    ),
}


class Trajectory(NamedTuple):
    """One line of the figure: which data, and the optimizer; `delays` is the mean one's name."""

    panel: str
    data: TrainingSet
    time: float
    learning_rate: float
    delay: int
    momentum: float = 0.0
    kind: Kind = "heavy_ball"
    delays: str = "constant"


def delay_processes(longest: int) -> dict[str, DelayProcess]:
    """Returns the delays of the last panel by name, all of mean `longest` / 2."""
    return {
        "constant": constant(longest // 2),
        "uniform": uniform(0, longest),
        "none or all": categorical([0.5, *[0.0] * (longest - 1), 0.5]),
    }


def all_runs(config: Config) -> Iterator[Trajectory]:
    """Yields the runs of the panels, each to be made with every seed."""
    first = SAME_RATE, config.same_rate_data, config.same_rate_time, config.same_rate
    for delay in config.same_rate_delays:
        yield Trajectory(*first, delay)
    for delay in config.rescaled_delays:
        rate = stability.max_learning_rate(delay, sharpness=config.common_edge)
        yield Trajectory(RESCALED, config.data, config.time, rate, delay)
    for momentum, kind in config.momenta:
        rate, delay = config.momentum_rate, config.momentum_delay
        yield Trajectory(MOMENTUM, config.data, config.time, rate, delay, momentum, kind)
    cross = CROSS_ENTROPY, config.cross_entropy_data, config.cross_entropy_time
    for delay in config.cross_entropy_delays:
        rate = stability.max_learning_rate(delay, sharpness=config.cross_entropy_edge)
        yield Trajectory(*cross, rate, delay)
    alike = RANDOM, config.data, config.random_time
    mean = config.random_longest // 2
    for name, edge in config.random_edges:
        process = delay_processes(config.random_longest)[name]
        rate = stability.lyapunov_max_learning_rate(process, sharpness=edge).value
        yield Trajectory(*alike, rate, mean, delays=name)


class Edges(NamedTuple):
    """The largest stable sharpness of a run, by what is to stay bounded; see `stability`."""

    mean: float
    mean_square: float
    typical: float  # the Lyapunov exponent is 0


def edges_of(run: Trajectory, longest: int) -> Edges:
    """Returns the edges of a run: one where its delay is constant."""
    if run.delays == "constant":
        method: dict[str, Any] = {"momentum": run.momentum, "kind": run.kind, "dampening": True}
        return Edges(*[stability.max_sharpness(run.learning_rate, run.delay, **method)] * 3)
    process = delay_processes(longest)[run.delays]
    return Edges(
        stability.max_sharpness(run.learning_rate, process),
        stability.max_sharpness(run.learning_rate, process, criterion="mean_square"),
        stability.lyapunov_max_learning_rate(process).value / run.learning_rate,
    )


def network_problem(chosen: TrainingSet, seed: int) -> Problem:
    """Returns the network, small in its initial weights, with its loss on one full batch."""
    dataset = data.load(chosen.name, num_train=chosen.num_train)
    images = data.normalizer(dataset)(dataset.train_images)
    # One scale for all data sets: curvature grows with the square of the inputs.
    images *= _INPUT_NORM / jnp.sqrt(jnp.mean(jnp.sum(images**2, axis=(1, 2, 3))))
    problem = tanh_problem(
        dataset, images, hidden=chosen.hidden, seed=seed, label_smoothing=chosen.label_smoothing
    )
    return problem._replace(params=optax.tree.scale(chosen.initial_scale, problem.params))


def run(config: Config, work: Path) -> list[Record]:
    """Returns loss, sharpness and its ratio to the edge at every sample of every run.

    Finished runs are kept in `work`/eos: a killed program goes on with the next one.
    """
    table = open_table(work / "eos", config._asdict())
    tracks: dict[TrainingSet, Any] = {}
    keys = []
    for each in all_runs(config):
        names = ("panel", "delay", "momentum", "kind", "delays")
        for seed in config.seeds:
            keys.append(run_key({name: getattr(each, name) for name in names} | {"seed": seed}))
            if keys[-1] in table.runs:
                continue
            if each.data not in tracks:
                tracks[each.data] = make_track(network_problem(each.data, seed))
            rows = _measure(each, tracks[each.data], config, seed)
            table = add_runs(table, {keys[-1]: rows})
    return [record for key in keys for record in table.runs[key]]


def _measure(
    run: Trajectory, track: Callable[..., list[Sample]], config: Config, seed: int
) -> list[Record]:
    """The records of one run."""
    edges = edges_of(run, config.random_longest)
    start = network_problem(run.data, seed).params
    steps = measuring_steps(round(run.time / run.learning_rate), config.num_samples)
    return [
        {
            "panel": run.panel,
            "data": run.data.name,
            "delay": run.delay,
            "momentum": run.momentum,
            "kind": run.kind,
            "delays": run.delays,
            "seed": seed,
            "learning_rate": run.learning_rate,
            "edge": edges.mean,
            "mean_square_edge": edges.mean_square,
            "typical_edge": edges.typical,
            "step": sample.step,
            "time": sample.step * run.learning_rate,
            "loss": sample.loss,
            "sharpness": sample.sharpness,
            "ratio": sample.sharpness / edges.mean,
        }
        for sample in track(_optimizer(run, config, seed), steps, start)
    ]


def _optimizer(run: Trajectory, config: Config, seed: int) -> optax.GradientTransformation:
    rate = jnp.float32(run.learning_rate)
    if run.delays == "constant":
        return delayed_sgd(rate, run.delay, momentum=run.momentum, kind=run.kind, dampening=True)
    process = delay_processes(config.random_longest)[run.delays]
    return delayed(optax.sgd(rate), process, seed=seed)
