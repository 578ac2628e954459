"""How far a run has come: all that its summary needs, apart from the state."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from asgd_jax.training.chunk import NOT_DIVERGED, ChunkTotals, merge_totals, zero_totals
from asgd_jax.training.metrics import Row


class Progress(NamedTuple):
    """What a run has left behind up to a step, apart from its state.

    Attributes:
      step: updates made.
      totals: sums over all of them, on the host.
      last_row: the last row of metrics.csv.
      best_error: the smallest validation error so far; None before the first.
      metrics_bytes: length of metrics.csv.
      train_seconds: time spent in updates, wall_seconds: in all, by all processes of the run.
    """

    step: int
    totals: ChunkTotals
    last_row: Row
    best_error: float | None
    metrics_bytes: int
    train_seconds: float
    wall_seconds: float


def no_progress(max_delay: int) -> Progress:
    """Returns the progress of a run that has made no update."""
    return Progress(0, jax.device_get(zero_totals(max_delay)), {}, None, 0, 0.0, 0.0)


def add_chunk(
    progress: Progress, totals: ChunkTotals, row: Row, seconds: float, wall_seconds: float
) -> Progress:
    """Returns the progress after a chunk whose updates took `seconds` and whose row is `row`."""
    errors = [progress.best_error, row.get("validation_error")]
    return progress._replace(
        step=int(row["step"] or 0),
        totals=merge_totals(progress.totals, totals),
        last_row=row,
        best_error=min((error for error in errors if error is not None), default=None),
        train_seconds=progress.train_seconds + seconds,
        wall_seconds=wall_seconds,
    )


def diverged_at(progress: Progress) -> int | None:
    """Returns the update at which the run diverged, or None."""
    step = int(progress.totals.diverged_at)
    return None if step == NOT_DIVERGED else step


def progress_to_json(progress: Progress) -> dict[str, Any]:
    """Returns the progress as JSON; floats keep all their bits."""
    totals = {name: np.asarray(value).tolist() for name, value in progress.totals._asdict().items()}
    return progress._asdict() | {"totals": totals}


def progress_from_json(content: Mapping[str, Any], max_delay: int) -> Progress:
    """Returns the progress that `progress_to_json` wrote.

    >>> progress_from_json(progress_to_json(no_progress(3)), 3).totals.staleness
    array([0, 0, 0, 0], dtype=int32)
    """
    like = no_progress(max_delay).totals
    totals: dict[str, Any] = {
        name: np.asarray(content["totals"][name], value.dtype)
        for name, value in like._asdict().items()
    }
    return Progress(**{**content, "totals": ChunkTotals(**totals)})
