"""The records of many runs in one CSV file that a killed program can be continued from."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from asgd_jax.training.checkpoint import refuse_mismatch
from asgd_jax.training.report import write_json

Cell = float | int | str | bool
Record = dict[str, Any]
Key = tuple[str, ...]


class RunTable(NamedTuple):
    """The finished runs of a folder.

    Attributes:
      file: records.csv, rewritten whole at each `add_runs`: it never holds half a run.
      runs: the records of each run, by the run's key.
    """

    file: Path
    runs: dict[Key, list[Record]]


def run_key(point: Mapping[str, Cell]) -> Key:
    """Returns what identifies a run: its fields and their values, as they are written.

    >>> run_key({"delay": 3, "learning_rate": 0.5})
    ('delay=3', 'learning_rate=0.5')
    """
    return tuple(f"{field}={point[field]}" for field in sorted(point))


def open_table(work: Path, fingerprint: Mapping[str, Any]) -> RunTable:
    """Opens a folder's table, empty in a new folder.

    Args:
      work: folder of records.csv and of fingerprint.json, made when missing.
      fingerprint: what all runs share, JSON values.

    Raises:
      ValueError: when the folder's runs were made under another fingerprint.
    """
    work.mkdir(parents=True, exist_ok=True)
    wanted = json.loads(json.dumps(fingerprint, sort_keys=True, default=str))
    saved = work / "fingerprint.json"
    if saved.exists():
        refuse_mismatch(json.loads(saved.read_text()), wanted, work)
    else:
        write_json(saved, wanted)
    table = RunTable(work / "records.csv", {})
    if table.file.exists():
        for record in read_records(table.file):
            key = tuple(str(record.pop("run")).split(" "))
            table.runs.setdefault(key, []).append(record)
    return table


def add_runs(
    table: RunTable, runs: Iterable[tuple[Mapping[str, Cell], Sequence[Record]]]
) -> RunTable:
    """Returns the table with more runs, written to its file, all or nothing.

    Args:
      table: to be replaced by the result.
      runs: pairs of a run's fields and its records, which have the columns of all others.
    """
    # Through text, so that a table is the same whether its runs were read or just made.
    new = {
        run_key(point): [
            {name: stored(cell) for name, cell in record.items()} for record in records
        ]
        for point, records in runs
    }
    table = table._replace(runs=table.runs | new)
    partial = table.file.with_suffix(".partial")
    rows = [
        {"run": " ".join(key)} | record for key, records in table.runs.items() for record in records
    ]
    write_records(partial, rows)
    partial.replace(table.file)
    return table


def write_records(file: Path, records: Sequence[Mapping[str, Cell]]) -> None:
    """Writes the rows as CSV; numbers with nine significant digits.

    Nine digits identify a float32, and hide the last bits in which two machines may differ.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_records(Path(folder) / "r.csv", [{"delay": 2, "h": 2 / 3}])
    ...     print((Path(folder) / "r.csv").read_text(), read_records(Path(folder) / "r.csv"))
    delay,h
    2,0.666666667
     [{'delay': 2, 'h': 0.666666667}]
    """
    with file.open("w", newline="") as lines:
        table = csv.DictWriter(lines, list(records[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(
            {name: _format(cell) for name, cell in record.items()} for record in records
        )


def read_records(file: Path) -> list[Record]:
    """Returns the rows of a CSV file; cells that are numbers as int or float, others as str."""
    with file.open(newline="") as lines:
        return [{name: _parse(cell) for name, cell in row.items()} for row in csv.DictReader(lines)]


def stored(cell: Cell) -> Cell:
    """Returns a cell as it comes back from a file.

    >>> stored(1 / 3), stored(0.0), stored(False)
    (0.333333333, 0, 'False')
    """
    return _parse(_format(cell))


def _format(cell: Cell) -> str:
    return f"{cell:.9g}" if isinstance(cell, float) else str(cell)


def _parse(cell: str) -> Cell:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell
