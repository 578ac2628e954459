"""What a run reports: rows of numbers, to a CSV file and to TensorBoard."""

import csv
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

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


def open_writer(workdir: Path, *, step: int, num_bytes: int) -> Writer:
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
    write_event, close_events = _open_events(workdir, step)

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
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size

    def close() -> None:
        file.close()
        close_events()

    return Writer(write, count, close)


def _open_events(workdir: Path, step: int) -> tuple[Callable[..., None], Callable[[], None]]:
    """Opens an event file of a run that has made `step` updates.

    Written in the calling thread: what was written is in the file. tensorboardX's SummaryWriter
    hands events to a thread; when the disk is full that thread dies, and the run waits forever.
    TensorBoard shows nothing of earlier files of the folder beyond that step.

    Returns:
      `write(step, scalars, staleness_histogram)` and `close()`.
    """
    from tensorboardX import RecordWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.summary import histogram_raw, scalar

    # The step keeps two files apart that are opened within a second.
    name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{step}"
    records = RecordWriter(str(workdir / name))

    def put(**fields: object) -> None:
        records.write(Event(wall_time=time.time(), **fields).SerializeToString())

    put(file_version="brain.Event:2")
    put(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(step: int, scalars: Mapping[str, float], histogram: np.ndarray) -> None:
        counts = np.asarray(histogram)
        ages = np.arange(counts.size)
        staleness = histogram_raw(
            "staleness",
            min=0.0,
            max=float(counts.size - 1),
            num=int(counts.sum()),
            sum=float(counts @ ages),
            sum_squares=float(counts @ ages**2),
            bucket_limits=[age + 0.5 for age in ages.tolist()],
            bucket_counts=counts.tolist(),
        )
        parts = [*(scalar(name, value) for name, value in scalars.items()), staleness]
        put(step=step, summary=Summary(value=[part.value[0] for part in parts]))
        records.flush()

    return write, records.close


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
