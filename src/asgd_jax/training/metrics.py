"""What a run reports: rows of numbers, to a CSV file and to TensorBoard."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from asgd_jax.training.chunk import ChunkTotals

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
    """Where rows go: `write(row, staleness_histogram)` and, at the end, `close()`."""

    write: Callable[[Row, np.ndarray], None]
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


def open_writer(workdir: Path) -> Writer:
    """Opens `metrics.csv` and a TensorBoard event file in `workdir`; rows are flushed one by one.

    Raises:
      OSError: when the folder cannot be written to.
    """
    from tensorboardX import SummaryWriter

    # The writer lives as long as the run, and `close` ends it.
    file = (workdir / "metrics.csv").open("a", newline="")
    table = csv.DictWriter(file, COLUMNS, restval="")
    if file.tell() == 0:
        table.writeheader()
        file.flush()
    board = SummaryWriter(str(workdir))

    def write(row: Row, histogram: np.ndarray) -> None:
        table.writerow({name: _text(row.get(name)) for name in COLUMNS})
        file.flush()
        step = int(row["step"] or 0)
        for name, value in row.items():
            if value is not None and name != "step" and math.isfinite(value):
                board.add_scalar(name, value, step)
        _add_histogram(board, "staleness", histogram, step)
        board.flush()

    def close() -> None:
        file.close()
        board.close()

    return Writer(write, close)


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


def _add_histogram(board: object, name: str, counts: np.ndarray, step: int) -> None:
    counts = np.asarray(counts)
    ages = np.arange(counts.size)
    board.add_histogram_raw(  # type: ignore[attr-defined]
        name,
        min=0.0,
        max=float(counts.size - 1),
        num=int(counts.sum()),
        sum=float(counts @ ages),
        sum_squares=float(counts @ ages**2),
        bucket_limits=[age + 0.5 for age in ages.tolist()],
        bucket_counts=counts.tolist(),
        global_step=step,
    )
