"""The points of a sweep one after another, by `train`: for data that is streamed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from asgd_jax.training import train
from asgd_jax.training.folder.metrics import read_rows
from asgd_jax.training.folder.table import Record

Finished = list[tuple[int, list[Record]]]  # runs by their index, with their rows


def train_each(
    configs: Sequence[ConfigDict], folders: Mapping[int, Path], *, progress: bool
) -> Iterator[Finished]:
    """Yields the rows of each run as it finishes; one that was interrupted goes on.

    Args:
      configs: of all runs.
      folders: of those to make, by their index.
      progress: show a progress bar on a terminal.

    The columns are those of a compiled sweep. train_loss and train_error are of the updates since
    the last row of the run's metrics: the epoch's, unless `log_every_steps` is set.
    """
    for index, folder in folders.items():
        summary = train(configs[index], folder, progress=progress)
        diverged_at = summary["diverged_at_step"]
        rows = [
            {
                "epoch": row["epoch"],
                "steps": int(row["step"]),
                "train_loss": row["train_loss"],
                "train_error": row["train_error"],
                "full_train_loss": math.nan,
                "full_train_error": math.nan,
                "validation_loss": row["validation_loss"],
                "validation_error": row["validation_error"],
                "diverged_at": -1,
            }
            for row in read_rows(folder)
            if not math.isnan(row["validation_error"])
        ]
        if diverged_at is not None:
            rows[-1]["diverged_at"] = diverged_at
        yield [(index, rows)]


def refuse_options(initial: Any, leave_loss: float) -> None:
    """Refuses what only a compiled sweep can do.

    Raises:
      ValueError: for initial parameters or a loss at which runs end.
    """
    if initial is not None or math.isfinite(leave_loss):
        raise ValueError("initial and leave_loss need a data set that lives in memory, not streams")


def with_epochs(rows: Sequence[Record], steps_per_epoch: int) -> list[Record]:
    """Returns the rows with the epoch before them.

    >>> with_epochs([{"steps": 6}], 4)
    [{'epoch': 1.5, 'steps': 6}]
    """
    return [{"epoch": round(row["steps"] / steps_per_epoch, 6)} | row for row in rows]
