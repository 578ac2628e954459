"""Recorded runs: the updates of real workers as a trace that names its batches too.

`updates.csv` has a row an update (columns `UPDATE_COLUMNS`). As `delay_trace` it gives the
simulator the staleness of every gradient, like any trace, and besides the number of the batch that
it was taken on (`data.numbered`), which the random draws of that gradient follow as well. Without a
record, batches have the numbers of the updates.
"""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from asgd_jax import data
from asgd_jax.training.config import STREAMED

UPDATE_COLUMNS = (
    "update",  # its number, from 0: the version that it turned into the next
    "worker",  # that pushed
    "version",  # that it had pulled
    "staleness",  # update - version
    "batch",  # number of the batch of its gradient
    "seconds",  # when it was applied, since the start of the run, restarts taken out
    "compute_seconds",  # that its gradient took the worker, from the parameters to the push
)


class RecordedUpdates(NamedTuple):
    """Columns of updates.csv, each of shape (num_updates,)."""

    update: np.ndarray
    worker: np.ndarray
    version: np.ndarray
    staleness: np.ndarray
    batch: np.ndarray
    seconds: np.ndarray
    compute_seconds: np.ndarray


def is_recorded(config: ConfigDict) -> bool:
    """Returns whether a configuration replays a recorded run, batches included."""
    trace = config.delay_trace or ""
    return config.delay_distribution == "trace" and Path(trace).suffix == ".csv"


def read_updates(file: str | Path) -> RecordedUpdates:
    """Returns the recorded updates, checked.

    Raises:
      ValueError: one line, for a file that cannot be read or is no record of updates 0, 1, ...
    """
    try:
        with Path(file).open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        columns = {
            name: np.array(
                [row[name] for row in rows], float if name.endswith("seconds") else np.int64
            )
            for name in UPDATE_COLUMNS
        }
    except (OSError, ValueError, KeyError, TypeError, UnicodeDecodeError, csv.Error) as error:
        reason = f"no column {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"delay_trace={str(file)!r} cannot be read ({reason}): pass the updates.csv of "
            "real workers, a .npy file, or a text file with one integer a line"
        ) from error
    found = RecordedUpdates(**columns)
    _check(found, file)
    return found


def _check(found: RecordedUpdates, file: str | Path) -> None:
    count = np.arange(found.update.size)
    if not count.size:
        raise ValueError(f"delay_trace={str(file)!r} holds no update: there is nothing to replay")
    wrong = (
        (found.update != count)
        | (found.version + found.staleness != count)
        | (found.staleness < 0)
        | (found.version < 0)
        | (found.batch < 0)
    )
    if wrong.any():
        at = int(np.argmax(wrong))
        raise ValueError(
            f"delay_trace={str(file)!r} is no record of a run: row {at} is update "
            f"{found.update[at]} of version {found.version[at]}, staleness {found.staleness[at]}"
        )


def refuse_real_workers(config: ConfigDict) -> None:
    """Refuses what only real workers heed.

    Raises:
      ValueError: naming the field and its value.

    >>> refuse_real_workers(ConfigDict({"staleness_policy": "drop", "max_staleness": 4}))
    Traceback (most recent call last):
    ...
    ValueError: max_staleness=4 is for real workers (scripts/train_async.py): leave it out
    """
    defaults = {"staleness_policy": "drop", "max_staleness": None, "worker_times": None}
    for field, default in defaults.items():
        if config[field] != default:
            raise ValueError(
                f"{field}={config[field]!r} is for real workers (scripts/train_async.py): "
                "leave it out"
            )
    if config.worker_data != "whole" and not is_recorded(config):
        raise ValueError(
            f"worker_data={config.worker_data!r} is for real workers (scripts/train_async.py) and "
            "the replay of their updates.csv: leave it out"
        )


def num_shards_of(config: ConfigDict) -> int:
    """Returns into how many shards the workers of a configuration divide the training set."""
    return int(config.num_workers) if config.worker_data == "shard" else 1


def make_number_of(config: ConfigDict) -> Callable[[jax.Array], jax.Array]:
    """Returns `number_of(update)`: the number of the batch that an update takes; traced or not."""
    if not is_recorded(config):
        return lambda update: update
    numbers = read_updates(config.delay_trace).batch.astype(np.int32)
    return lambda update: jnp.asarray(numbers)[update % numbers.size]


def make_recorded_order(config: ConfigDict, plan: data.BatchPlan) -> Callable[[int], np.ndarray]:
    """Returns `order_of(epoch)`: the recorded samples of its updates, as `epoch_batches` has them.

    Raises:
      ValueError: for data that is streamed, which is read in its own order.
    """
    if config.dataset in STREAMED:
        raise ValueError(
            f"delay_trace={config.delay_trace!r} names batches of data in memory, and "
            f"dataset={config.dataset!r} is streamed: use a trace of staleness alone"
        )
    numbers = read_updates(config.delay_trace).batch
    batch_of = data.make_batch_of(config.seed, plan, num_shards_of(config))

    def order_of(epoch: int) -> np.ndarray:
        updates = epoch * plan.steps_per_epoch + np.arange(plan.steps_per_epoch)
        return np.stack([batch_of(number) for number in numbers[updates % numbers.size]])

    return order_of
