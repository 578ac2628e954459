"""The runs of figures 2 and 12: A-SGD leaves, or stays at, a minimum that S-SGD has found."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optax
from ml_collections import ConfigDict

from asgd_jax import stability
from asgd_jax.training import default_config
from asgd_jax.training.folder.table import Record
from experiments.escape import find_edges, reach_minimum
from experiments.figures.training_runs import select
from experiments.minima import digits_problem, find_minimum, measure_max_learning_rate

MINI_BATCH = "mini-batch"
FULL_BATCH = "full batch"
PROXY = (
    "VGG-11 with an eighth of the channels, 1,024 images of CIFAR-10, label smoothing 0.1 "
    "(so that the minimum keeps its sharpness); full-batch line: an MLP on digits"
)


def _config(
    delays: Sequence[int],
    seeds: Sequence[int],
    full_batch_delays: Sequence[int],
    *,
    worker_batch_size: int,
    **training: Any,
) -> ConfigDict:
    """`training` changes S-SGD's run to the minimum; each A-SGD update has one worker's batch."""
    start = default_config()
    start.dataset, start.model = "cifar10", "vgg11"
    start.num_workers, start.worker_batch_size = 32, 128
    start.learning_rate, start.num_devices = 0.8, 1
    start.update(training)
    config = ConfigDict()
    config.start = start
    config.worker_batch_size = worker_batch_size
    config.delays = tuple(delays)
    config.full_batch_delays = tuple(full_batch_delays)
    config.seeds = tuple(seeds)
    config.above = (1, 2, 4, 8, 16)  # further rates, in 8 % steps above the first that left
    return config


_REDUCED: dict[str, Any] = {
    "width": 0.125,
    "num_train": 1024,
    "num_validation": 512,
    "num_workers": 1,
    "label_smoothing": 0.1,
    "learning_rate": 0.1,
    "eval_batch_size": 512,
}
PRESETS = {
    "smoke": _config(
        (1, 2, 4),
        (0,),
        (1,),
        worker_batch_size=64,
        dataset="digits",
        model="mlp",
        num_train=256,
        num_validation=100,
        num_workers=1,
        label_smoothing=0.1,
        epochs=30,
    ),
    "cpu": _config(
        (1, 2, 4, 8, 16, 32), (0, 1), (1, 2, 4, 8, 16), worker_batch_size=32, epochs=120, **_REDUCED
    ),
    "paper": _config(
        (1, 3, 7, 15, 31), (0, 1, 2), (1, 2, 4, 8, 16, 32), worker_batch_size=128, epochs=200,
        augment=True, num_devices=None,
    ),
}  # fmt: skip


def run(config: ConfigDict, work: Path) -> list[Record]:
    """Returns a row per measurement of every mini-batch run, and one per full-batch edge."""
    folder = work / "vgg_escape"
    start = reach_minimum(config.start, folder)
    branch = config.start.copy_and_resolve_references()
    branch.worker_batch_size = config.worker_batch_size
    branch.augment = False  # the minimum is one of fixed images
    edges = find_edges(
        branch, start, config.delays, config.seeds, folder / "runs", above=config.above
    )
    same = {
        "start_learning_rate": float(config.start.learning_rate),
        "predicted": 0.0,
        "lower": 0.0,
        "upper": 0.0,
    }
    rows = [{"series": MINI_BATCH, **row, **same} for row in edges]
    for row in rows:
        row["predicted"] = stability.max_learning_rate(row["delay"], sharpness=start.sharpness)
    for (delay, seed), runs in edge_runs(rows).items():
        lower, upper = edge_of(runs)
        for row in select(rows, delay=delay, seed=seed):
            row["lower"], row["upper"] = lower, upper
    return rows + _full_batch(config.full_batch_delays, list(rows[0]))


def edge_runs(records: Sequence[Record]) -> dict[tuple[int, int], list[Record]]:
    """Returns the last row of every mini-batch run, by (delay, seed)."""
    last: dict[tuple[int, int, int], Record] = {}
    for row in select(records, series=MINI_BATCH):
        last[row["delay"], row["seed"], row["index"]] = row
    runs: dict[tuple[int, int], list[Record]] = {}
    for (delay, seed, _), row in last.items():
        runs.setdefault((delay, seed), []).append(row)
    return runs


def edge_of(runs: Sequence[Record]) -> tuple[float, float]:
    """Returns the largest rate that stayed below all that left, and the smallest that left."""
    upper = min(run["learning_rate"] for run in runs if run["left"])
    lower = max(run["learning_rate"] for run in runs if run["learning_rate"] < upper)
    return lower, upper


def _full_batch(delays: Sequence[int], columns: Sequence[str]) -> list[Record]:
    """A row per delay: edges of a full-batch minimum on digits, bisected to 2 %."""
    problem = digits_problem()
    minimum = find_minimum(*problem, optax.sgd(0.05, momentum=0.98))
    rows = []
    for delay in delays:
        found = measure_max_learning_rate(minimum, delay, problem.loss_fn, problem.batches)
        row: Record = dict.fromkeys(columns, 0)
        row |= {
            "series": FULL_BATCH,
            "delay": delay,
            "learning_rate": found.value,
            "minimum_loss": minimum.loss,
            "sharpness": minimum.sharpness,
            "predicted": found.predicted,
            "lower": found.lower,
            "upper": found.upper,
        }
        rows.append(row)
    return rows
