r"""At which learning rate does mini-batch A-SGD leave a minimum? The protocol of figs. 2 and 12.

S-SGD trains to a minimum, whose sharpness $a$ is measured. From there, the history full of that
point, A-SGD continues at one delay and learning rate after another, also after it has left
(`leaving.py` says when it has). The largest learning rate that stays should be $h^*(\tau)/a$.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from asgd_jax import curvature
from asgd_jax.checksum import checksum
from asgd_jax.data.in_memory import Dataset
from asgd_jax.training.config import validate_config
from asgd_jax.training.feed import load_dataset, plan_of
from asgd_jax.training.folder import rerun
from asgd_jax.training.folder.provenance import write_json
from asgd_jax.training.folder.table import Record, holds_fingerprint
from asgd_jax.training.program import make_model
from asgd_jax.training.state import PyTree
from asgd_jax.training.step import cross_entropy
from asgd_jax.training.sweep import Point, point_config, sweep
from asgd_jax.training.sweep_groups import train_params
from experiments.along import batch_mean
from experiments.edges.leaving import (
    E_FOLDS,
    bracket,
    e_fold,
    has_left,
    most_loss,
    next_index,
)

_ROWS = 48  # measurements of a run: four or more in the growth time of a grid step above the edge
_STRIDE = math.log(1.8)  # of a learning rate: so far the search goes until it is past the edge


class Grid(NamedTuple):
    """Which learning rates are run, and for how long.

    Attributes:
      resolution: they lie on a geometric grid of this step; 8 % in the paper.
      e_folds: of growth one step above the edge, for which a run has time.
      above: further rates to run, in steps above the smallest that left; these runs go on after
        they have left.
      above_seeds: for how many of the first seeds.
    """

    resolution: float = 0.08
    e_folds: int = E_FOLDS
    above: tuple[int, ...] = ()
    above_seeds: int = 1


_Pair = tuple[int, int]  # delay, seed


class Start(NamedTuple):
    """A minimum that S-SGD has reached.

    Attributes:
      params: pytree of arrays.
      loss: mean cross-entropy over the training set, in evaluation mode, without label smoothing.
      sharpness: largest eigenvalue of the Hessian of the mean loss that is trained, with it.
      error: share of the training set that is told wrongly, in evaluation mode.
    """

    params: PyTree
    loss: float
    sharpness: float
    error: float = 0.0


def reach_minimum(config: ConfigDict, work: Path) -> Start:
    """Trains a configuration and measures where it ends; the parameters are kept in `work`.

    Raises:
      ValueError: when the loss there is not finite, or `work` holds another run's minimum.
    """
    validate_config(config)
    dataset = load_dataset(config)
    params = trained_params(config, dataset, work / "minimum.npz")
    batches = _training_batches(config, dataset)
    loss, error = (
        float(np.mean([measure(params, batch) for batch in batches]))
        for measure in (
            jax.jit(batch_mean(config, dataset, each)) for each in (cross_entropy, _is_wrong)
        )
    )
    if not math.isfinite(loss):
        raise ValueError(f"S-SGD diverged at learning rate {config.learning_rate}: lower it")
    loss_fn = loss_at_minimum(config, dataset)
    top = curvature.sharpness(loss_fn, params, batches, tol=1e-3)
    return Start(params, loss, float(top.value), error)


def loss_at_minimum(config: ConfigDict, dataset: Dataset) -> curvature.LossFn:
    """Returns the loss that is trained, of (raw images, labels), in evaluation mode."""
    smoothed = partial(cross_entropy, smoothing=config.label_smoothing)
    return batch_mean(config, dataset, smoothed)


def trained_params(
    config: ConfigDict, dataset: Dataset, file: Path, initial: PyTree | None = None
) -> PyTree:
    """The parameters at the end of a run: those in the file, or else trained and written there.

    Beside them lies what they were trained from, `initial` parameters or the seed's:
    `refuse_mismatch` names what differs from it.
    """
    model = make_model(config, dataset.num_classes)
    images = np.zeros((1, *dataset.train_images.shape[1:]), np.float32)
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))["params"]
    fingerprint = {
        **rerun.fingerprint(config),
        **rerun.data_fingerprint(config, plan_of(config, len(dataset.train_labels))),
        "epochs": config.epochs,
    }
    if initial is not None:
        fingerprint["initial"] = int(checksum(initial))
    # Parameters without it may be anybody's: they are trained anew.
    if holds_fingerprint(file.with_suffix(".json"), fingerprint):
        with np.load(file) as saved:
            leaves = [saved[name] for name in saved.files]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)
    params = jax.device_get(train_params(config, dataset, initial))
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".partial.npz")
    np.savez(unfinished, *jax.tree.leaves(params))
    unfinished.replace(file)
    write_json(file.with_suffix(".json"), fingerprint)
    return params


def _is_wrong(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """1 for every sample whose largest logit is another class's."""
    return (logits.argmax(axis=-1) != labels).astype(np.float32)


def _training_batches(config: ConfigDict, dataset: Dataset) -> list[tuple[Any, Any]]:
    """The training set in batches of equal size."""
    images, labels = dataset.train_images, dataset.train_labels
    size = max(n for n in range(1, config.eval_batch_size + 1) if len(labels) % n == 0)
    return [(images[k : k + size], labels[k : k + size]) for k in range(0, len(labels), size)]


def grid_rate(sharpness: float, index: int, resolution: float) -> float:
    """Returns a learning rate of the grid: 2 / sharpness, S-SGD's edge, has index 0.

    >>> grid_rate(2.0, 0, 0.08), grid_rate(2.0, 1, 0.08)
    (1.0, 1.08)
    """
    return float(f"{2.0 / sharpness * (1.0 + resolution) ** index:.6g}")


def num_epochs(delay: int, steps_per_epoch: int, grid: Grid) -> tuple[int, int]:
    """Returns the epochs of a run at a delay, and those between two of its measurements.

    Together they leave time for the grid's e-folds of growth one step above the edge.

    >>> num_epochs(0, 8, Grid())
    (48, 1)
    """
    growth = grid.e_folds * e_fold(delay, grid.resolution)
    between = math.ceil(growth / (_ROWS * steps_per_epoch))
    return _ROWS * between, between


def find_edges(
    config: ConfigDict,
    start: Start,
    delays: Sequence[int],
    seeds: Sequence[int],
    work: Path,
    grid: Grid,
) -> list[Record]:
    """Searches, for each delay and seed, the two neighbouring rates of which one stays, one leaves.

    From S-SGD's edge it goes by factors of about 1.8 until it is past this one, then bisects: the
    prediction is not used. All runs of a round are one sweep; they end when they have left for
    good, those of `grid.above` go on.

    Args:
      config: of the runs, one worker's batch an update; delay + 1 workers each.
      start: where they start.
      delays: to measure at.
      seeds: of the order of the samples.
      work: folder that keeps finished runs.
      grid: of the learning rates.

    Returns:
      The records of `sweep` with the columns left (0 or 1), index (of the rate), end_sharpness
      (where the first seed's smallest rate that left ended, else NaN) and, the same in every row:
      minimum_loss, minimum_error and sharpness.

    Raises:
      ValueError: when every rate leaves, or every one stays.
    """
    pairs = [(delay, seed) for delay in delays for seed in seeds]
    found: dict[_Pair, dict[int, list[Record]]] = {pair: {} for pair in pairs}
    steps = len(load_dataset(config).train_labels) // config.worker_batch_size

    def run(wanted: Sequence[tuple[_Pair, int]], folder: str, leave_loss: float) -> None:
        points = [_point(start, steps, pair, index, grid) for pair, index in wanted]
        rows = sweep(
            config, points, work=work / folder, initial=start.params, leave_loss=leave_loss
        )
        for point, (pair, index) in zip(points, wanted, strict=True):
            mine = [row for row in rows if all(row[name] == point[name] for name in point)]
            found[pair][index] = mine

    def left(pair: _Pair) -> dict[int, bool]:
        runs = found[pair].items()
        return {index: has_left(rows, start.loss, start.error) for index, rows in runs}

    stride = max(1, round(_STRIDE / math.log1p(grid.resolution)))
    while wanted := [
        (pair, index) for pair in pairs if (index := next_index(left(pair), stride)) is not None
    ]:
        run(wanted, "search", most_loss(start.loss))
    first = [
        ((delay, seed), upper)
        for delay in delays
        for seed in seeds[: grid.above_seeds]
        if (upper := bracket(left((delay, seed)))[1]) is not None
    ]
    if grid.above:
        # A finite one, so that the loss is measured: these runs go on after they have left.
        above = [(pair, upper + offset) for pair, upper in first for offset in (0, *grid.above)]
        run(above, "above", config.divergence_loss)
    points = {pair: _point(start, steps, pair, upper, grid) for pair, upper in first}
    ends = {
        (pair, upper): _end_sharpness(config, points[pair], start, work / "ends")
        for pair, upper in first
        if grid.above
    }
    return [row for pair in pairs for row in _marked(pair, found[pair], start, ends)]


def _end_sharpness(config: ConfigDict, point: Point, start: Start, work: Path) -> float:
    """Sharpness where a run ends that has left: it is made once more, and measured; NaN of none."""
    config = point_config(config, point)
    dataset = load_dataset(config)
    file = work / f"delay{config.delay}_seed{config.seed}.npz"
    params = trained_params(config, dataset, file, start.params)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
        return math.nan
    batches = _training_batches(config, dataset)
    top = curvature.sharpness(loss_at_minimum(config, dataset), params, batches, tol=1e-2)
    return float(top.value)


def _marked(
    pair: _Pair,
    runs: dict[int, list[Record]],
    start: Start,
    ends: dict[tuple[_Pair, int], float],
) -> list[Record]:
    """The rows of runs, in the order of their indices, with what became of each run."""
    same = {
        "minimum_loss": start.loss,
        "minimum_error": start.error,
        "sharpness": start.sharpness,
    }
    return [
        {
            **row,
            "index": index,
            "left": int(has_left(rows, start.loss, start.error)),
            "end_sharpness": ends.get((pair, index), math.nan),
            **same,
        }
        for index, rows in sorted(runs.items())
        for row in rows
    ]


def _point(start: Start, steps: int, pair: _Pair, index: int, grid: Grid) -> Point:
    delay, seed = pair
    epochs, between = num_epochs(delay, steps, grid)
    return {
        "delay": delay,
        "num_workers": delay + 1,
        "learning_rate": grid_rate(start.sharpness, index, grid.resolution),
        "seed": seed,
        "epochs": epochs,
        "eval_every_epochs": between,
    }
