"""What a run reports: rows of numbers, to a CSV file and to TensorBoard."""

import csv
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from asgd_jax.training.chunk import ChunkTotals
from asgd_jax.training.events import open_events

COLUMNS = (
    "step",  # updates made
    "epoch",
    "train_loss",  # nats; mean over the updates since the last row, at stale parameters
    "train_error",  # in [0, 1], likewise
    "validation_loss",  # the whole validation set, live parameters; empty between evaluations
    "validation_error",
    "learning_rate",
    "gradient_norm",  # mean over the updates since the last row
    "parameter_norm",  # |x_t| at this step
    "gap",  # |x_t - x_stale| at this step
    "relative_gap",  # gap / parameter_norm
    "staleness_mean",  # of the gradients since the last row
    "staleness_max",
    "steps_per_second",  # evaluation not counted
)

Row = dict[str, float | int | None]


class Writer(NamedTuple):
    """Where rows go: `write(row, staleness_histogram)` and, at the end, `close()`.

    `num_bytes()` is the length of metrics.csv, every row written so far safe on the disk.
    """

    write: Callable[[Row, np.ndarray], None]
    num_bytes: Callable[[], int]
    close: Callable[[], None]


def staleness_summary(histogram: np.ndarray) -> tuple[float, int]:
    """Returns the mean and the largest staleness of a histogram of counts.

    >>> staleness_summary(np.array([1, 0, 3]))
    (1.5, 2)
    """
    counts = np.asarray(histogram)
    ages = np.arange(counts.size)
    return float(counts @ ages / max(counts.sum(), 1)), int(ages[counts > 0].max(initial=0))


def summarize(totals: ChunkTotals) -> Row:
    """Returns the columns of a row that come from the updates of a chunk."""
    steps = max(int(totals.steps), 1)
    mean, largest = staleness_summary(np.asarray(totals.staleness))
    return {
        "train_loss": float(totals.loss) / steps,
        "train_error": float(totals.error) / steps,
        "gradient_norm": float(totals.gradient_norm) / steps,
        "staleness_mean": mean,
        "staleness_max": largest,
    }


def check_table(workdir: Path, step: int, num_bytes: int) -> None:
    """Refuses a metrics.csv that is shorter than it was when the checkpoint of `step` was written.

    Raises:
      ValueError: naming both lengths.
    """
    path = workdir / "metrics.csv"
    present = path.stat().st_size if path.exists() else 0
    if present < num_bytes:
        raise ValueError(
            f"{path} has {present} bytes and its checkpoint at step {step} was written after "
            f"{num_bytes}: restore the file, or name another workdir"
        )


def open_writer(workdir: Path, *, step: int = 0, num_bytes: int = 0) -> Writer:
    """Opens `metrics.csv` and a TensorBoard event file in `workdir`; rows are flushed one by one.

    A resumed run goes on where its checkpoint was written: later rows are cut off the table, and
    TensorBoard is told to forget them.

    Args:
      workdir: folder of the run.
      step: updates made so far.
      num_bytes: how much of an existing metrics.csv to keep; see `Writer.num_bytes`.

    Raises:
      OSError: when the folder cannot be written to.
    """
    # The writer lives as long as the run, and `close` ends it.
    file = (workdir / "metrics.csv").open("a", newline="")
    file.truncate(num_bytes)
    table = csv.DictWriter(file, COLUMNS, restval="")
    if num_bytes == 0:
        table.writeheader()
        file.flush()
    write_event, close_events = open_events(workdir, step)

    def write(row: Row, histogram: np.ndarray) -> None:
        table.writerow({name: _text(row.get(name)) for name in COLUMNS})
        file.flush()
        scalars = {
            name: value
            for name, value in row.items()
            if value is not None and name != "step" and math.isfinite(value)
        }
        write_event(int(row["step"] or 0), scalars, histogram)

    def count() -> int:
        file.flush()
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size

    def close() -> None:
        file.close()
        close_events()

    return Writer(write, count, close)


def silent_writer() -> Writer:
    """Returns a writer that writes nothing, for the processes of a run beside the first."""
    return Writer(lambda row, histogram: None, lambda: 0, lambda: None)


def read_rows(workdir: Path) -> list[dict[str, float]]:
    """Returns the rows of `metrics.csv`; an empty cell is NaN.

    >>> read_rows(Path("no such folder"))
    []
    """
    file = workdir / "metrics.csv"
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return [
            {name: float(cell) if cell else float("nan") for name, cell in row.items()}
            for row in csv.DictReader(lines)
        ]


def _text(value: float | int | None) -> str:
    if value is None:
        return ""
    # Nine significant digits identify a float32.
    return str(value) if isinstance(value, int) else f"{value:.9g}"
