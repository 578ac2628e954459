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
from asgd_jax.data.in_memory import Dataset
from asgd_jax.training.config import validate_config
from asgd_jax.training.feed import load_dataset, plan_of
from asgd_jax.training.folder import rerun
from asgd_jax.training.folder.provenance import write_json
from asgd_jax.training.folder.table import Record, holds_fingerprint
from asgd_jax.training.program import make_model
from asgd_jax.training.state import PyTree
from asgd_jax.training.step import cross_entropy
from asgd_jax.training.sweep import Point, sweep, train_params
from experiments.along import batch_mean
from experiments.edges.leaving import E_FOLDS, bracket, e_fold, has_left, next_index

RESOLUTION = 0.08  # learning rates lie on a geometric grid of this step, as in the paper
_ROWS = 48  # measurements of a run: four in the growth time of one grid step above the edge
_STRIDE = 8  # grid steps by which the search goes until it is past the edge


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
    params = _trained(config, dataset, work / "minimum.npz")
    batches = _training_batches(config, dataset)
    loss, error = (
        float(np.mean([measure(params, batch) for batch in batches]))
        for measure in (
            jax.jit(batch_mean(config, dataset, each)) for each in (cross_entropy, _is_wrong)
        )
    )
    if not math.isfinite(loss):
        raise ValueError(f"S-SGD diverged at learning rate {config.learning_rate}: lower it")
    smoothed = partial(cross_entropy, smoothing=config.label_smoothing)
    loss_fn = batch_mean(config, dataset, smoothed)
    top = curvature.sharpness(loss_fn, params, batches, tol=1e-3)
    return Start(params, loss, float(top.value), error)


def _trained(config: ConfigDict, dataset: Dataset, file: Path) -> PyTree:
    """The parameters at the end of a run: those in the file, or else trained and written there.

    Beside them lies what they were trained from: `refuse_mismatch` names what differs from it.
    """
    model = make_model(config, dataset.num_classes)
    images = np.zeros((1, *dataset.train_images.shape[1:]), np.float32)
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))["params"]
    fingerprint = {
        **rerun.fingerprint(config),
        **rerun.data_fingerprint(config, plan_of(config, len(dataset.train_labels))),
        "epochs": config.epochs,
    }
    # Parameters without it may be anybody's: they are trained anew.
    if holds_fingerprint(file.with_suffix(".json"), fingerprint):
        with np.load(file) as saved:
            leaves = [saved[name] for name in saved.files]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)
    params = jax.device_get(train_params(config, dataset))
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


def grid_rate(sharpness: float, index: int) -> float:
    """Returns a learning rate of the grid: 2 / sharpness, S-SGD's edge, has index 0.

    >>> grid_rate(2.0, 0), grid_rate(2.0, 1)
    (1.0, 1.08)
    """
    return float(f"{2.0 / sharpness * (1.0 + RESOLUTION) ** index:.6g}")


def num_epochs(delay: int, steps_per_epoch: int) -> tuple[int, int]:
    """Returns the epochs of a run at a delay, and those between two of its measurements.

    Together they leave time for twelve e-folds of growth one grid step above the edge.

    >>> num_epochs(0, steps_per_epoch=8)
    (48, 1)
    """
    between = math.ceil(E_FOLDS * e_fold(delay, RESOLUTION) / (_ROWS * steps_per_epoch))
    return _ROWS * between, between


def find_edges(
    config: ConfigDict,
    start: Start,
    delays: Sequence[int],
    seeds: Sequence[int],
    work: Path,
    *,
    above: Sequence[int] = (),
) -> list[Record]:
    """Searches, for each delay and seed, the two neighbouring rates of which one stays, one leaves.

    From S-SGD's edge it goes eight grid steps at a time until it is past this one, then bisects:
    the prediction is not used. All runs of a round are one sweep.

    Args:
      config: of the runs, one worker's batch an update; delay + 1 workers each.
      start: where they start.
      delays: to measure at.
      seeds: of the order of the samples.
      work: folder that keeps finished runs.
      above: further rates to run, in grid steps above the smallest that left.

    Returns:
      The records of `sweep` with the columns left (0 or 1), index (of the rate) and, the same in
      every row: minimum_loss, minimum_error and sharpness.

    Raises:
      ValueError: when every rate leaves, or every one stays.
    """
    pairs = [(delay, seed) for delay in delays for seed in seeds]
    found: dict[tuple[int, int], dict[int, list[Record]]] = {pair: {} for pair in pairs}
    steps = len(load_dataset(config).train_labels) // config.worker_batch_size

    def run(wanted: Sequence[tuple[tuple[int, int], int]]) -> None:
        points = [_point(start, steps, pair, index) for pair, index in wanted]
        # A finite one, so that the loss is measured: runs go on after they have left.
        rows = sweep(
            config,
            points,
            work=work,
            initial=start.params,
            leave_loss=config.divergence_loss,
        )
        for point, (pair, index) in zip(points, wanted, strict=True):
            mine = [row for row in rows if all(row[name] == point[name] for name in point)]
            found[pair][index] = mine

    def left(pair: tuple[int, int]) -> dict[int, bool]:
        runs = found[pair].items()
        return {index: has_left(rows, start.loss, start.error) for index, rows in runs}

    while wanted := [
        (pair, index) for pair in pairs if (index := next_index(left(pair), _STRIDE)) is not None
    ]:
        run(wanted)
    extra = [
        (pair, index)
        for pair in pairs
        for index in ((bracket(left(pair))[1] or 0) + offset for offset in above)
        if index not in found[pair]
    ]
    if extra:
        run(extra)
    return [row for pair in pairs for row in _marked(found[pair], start)]


def _marked(runs: dict[int, list[Record]], start: Start) -> list[Record]:
    """The rows of runs, in the order of their indices, with what became of each run."""
    same = {
        "minimum_loss": start.loss,
        "minimum_error": start.error,
        "sharpness": start.sharpness,
    }
    return [
        {**row, "index": index, "left": int(has_left(rows, start.loss, start.error)), **same}
        for index, rows in sorted(runs.items())
        for row in rows
    ]


def _point(start: Start, steps: int, pair: tuple[int, int], index: int) -> Point:
    delay, seed = pair
    epochs, between = num_epochs(delay, steps)
    return {
        "delay": delay,
        "num_workers": delay + 1,
        "learning_rate": grid_rate(start.sharpness, index),
        "seed": seed,
        "epochs": epochs,
        "eval_every_epochs": between,
    }
