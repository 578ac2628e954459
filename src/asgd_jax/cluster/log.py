"""updates.csv: every update of a real run, a row each, flushed, cut back when a run goes on."""

import csv
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from asgd_jax.training.recorded import UPDATE_COLUMNS

UPDATES_FILE = "updates.csv"


class UpdateLog(NamedTuple):
    """Where updates go.

    Attributes:
      write: `write(rows)`: appends and flushes them.
      sync: `sync()`: what was written is on the disk when it returns.
      close: `close()`.
    """

    write: Callable[[Iterable[Sequence[float | int]]], None]
    sync: Callable[[], None]
    close: Callable[[], None]


def open_updates(workdir: Path, num_updates: int) -> UpdateLog:
    """Opens `workdir`/updates.csv with its first `num_updates` rows; later ones are cut off.

    Raises:
      ValueError: where the file has fewer, naming both numbers.
      OSError: where it cannot be written.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> log = open_updates(folder, 0)
    >>> log.write([(0, 1, 0, 0, 7, 0.25, 0.125), (1, 0, 0, 1, 8, 0.5, 0.125)])
    >>> log.close()
    >>> open_updates(folder, 1).close()
    >>> print((folder / UPDATES_FILE).read_text())
    update,worker,version,staleness,batch,seconds,compute_seconds
    0,1,0,0,7,0.250000,0.125000
    <BLANKLINE>
    """
    path = workdir / UPDATES_FILE
    kept = _kept_bytes(path, num_updates)
    file = path.open("a", newline="")
    file.truncate(kept)
    table = csv.writer(file, lineterminator="\n")
    if kept == 0:
        table.writerow(UPDATE_COLUMNS)
        file.flush()

    def write(rows: Iterable[Sequence[float | int]]) -> None:
        table.writerows([_text(cell) for cell in row] for row in rows)
        file.flush()

    return UpdateLog(write, lambda: os.fsync(file.fileno()), file.close)


def _kept_bytes(path: Path, num_updates: int) -> int:
    """The length of the header and so many rows."""
    if not num_updates:
        return 0
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    # The last line may have been cut by whatever ended the process.
    whole = [line for line in lines if line.endswith(b"\n")]
    if len(whole) - 1 < num_updates:
        raise ValueError(
            f"{path} has {max(len(whole) - 1, 0)} updates and its checkpoint was written after "
            f"{num_updates}: restore the file, or name another workdir"
        )
    return sum(map(len, whole[: num_updates + 1]))


def _text(cell: float | int) -> str:
    return f"{cell:.6f}" if isinstance(cell, float) else str(cell)
