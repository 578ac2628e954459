"""How far a run has come, and what its rows and its summary say of the updates made."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from asgd_jax.training.chunk import NOT_DIVERGED, ChunkTotals
from asgd_jax.training.folder.metrics import Row


class Progress(NamedTuple):
    """What a run has left behind up to a step, apart from its state; values that JSON holds.

    Attributes:
      step: updates made.
      staleness: how many of their gradients had staleness 0, ..., max_delay.
      last_row: the last row of metrics.csv.
      best_error: the smallest validation error so far; None before the first.
      metrics_bytes: length of metrics.csv.
      train_seconds: time spent in updates, wall_seconds: in all, by all processes of the run.
      diverged_at: the update at which the run diverged, or None.
    """

    step: int
    staleness: list[int]
    last_row: Row
    best_error: float | None
    metrics_bytes: int
    train_seconds: float
    wall_seconds: float
    diverged_at: int | None


def no_progress(max_delay: int) -> Progress:
    """Returns the progress of a run that has made no update."""
    return Progress(0, [0] * (max_delay + 1), {}, None, 0, 0.0, 0.0, None)


def add_chunk(
    progress: Progress, totals: ChunkTotals, row: Row, seconds: float, wall_seconds: float
) -> Progress:
    """Returns the progress after a chunk whose updates took `seconds` and whose row is `row`."""
    errors = [progress.best_error, row.get("validation_error")]
    diverged = totals.diverged_at != NOT_DIVERGED
    return progress._replace(
        step=int(row["step"] or 0),
        staleness=np.add(progress.staleness, totals.staleness, dtype=np.int64).tolist(),
        last_row=row,
        best_error=min((error for error in errors if error is not None), default=None),
        train_seconds=progress.train_seconds + seconds,
        wall_seconds=wall_seconds,
        diverged_at=int(totals.diverged_at) if diverged else None,
    )


def describe_row(row: Row) -> str:
    """Returns what the progress bar says of a row, beside how far the run is and how long it takes.

    >>> describe_row({"train_loss": 0.31, "train_error": 0.082, "staleness_mean": 31.0})
    'loss 0.31, error 8.2%, staleness 31'
    """
    error = f"error {row['train_error']:.1%}"
    if row.get("validation_error") is not None:
        error += f" (validation {row['validation_error']:.1%})"
    return f"loss {row['train_loss']:.3g}, {error}, staleness {row['staleness_mean']:.3g}"


def staleness_summary(histogram: Sequence[int] | np.ndarray) -> tuple[float, int]:
    """Returns the mean and the largest staleness of a histogram of counts.

    >>> staleness_summary([1, 0, 3])
    (1.5, 2)
    """
    counts = np.asarray(histogram)
    ages = np.arange(counts.size)
    return float(counts @ ages / max(counts.sum(), 1)), int(ages[counts > 0].max(initial=0))


def chunk_row(
    step: int,
    steps_per_epoch: int,
    learning_rate: float,
    totals: ChunkTotals,
    gap: Sequence[float],
    seconds: float,
) -> Row:
    """Returns the row of a chunk of updates, without evaluation.

    Args:
      step: updates made by its end.
      steps_per_epoch: of the run.
      learning_rate: at that step.
      totals: of the chunk.
      gap: what `distance_to_stale` measures there.
      seconds: that the chunk took.
    """
    steps = max(int(totals.steps), 1)
    mean, largest = staleness_summary(np.asarray(totals.staleness))
    norm, distance, relative = (float(value) for value in gap)
    return {
        "step": step,
        "epoch": round(step / steps_per_epoch, 6),
        "learning_rate": learning_rate,
        "parameter_norm": norm,
        "gap": distance,
        "relative_gap": relative,
        "steps_per_second": int(totals.steps) / max(seconds, 1e-9),
        "train_loss": float(totals.loss) / steps,
        "train_error": float(totals.error) / steps,
        "gradient_norm": float(totals.gradient_norm) / steps,
        "staleness_mean": mean,
        "staleness_max": largest,
    }
