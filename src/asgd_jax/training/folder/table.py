"""The records of many runs in one CSV file that a killed program can be continued from."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from asgd_jax.training.folder.provenance import plain, read_json, refuse_mismatch, write_json

Record = dict[str, Any]


class RunTable(NamedTuple):
    """The finished runs of a folder.

    Attributes:
      file: records.csv, rewritten whole at each `add_runs`: it never holds half a run.
      fingerprint: what all runs share; in fingerprint.json from the first run on.
      runs: the records of each run, by the run's key.
    """

    file: Path
    fingerprint: dict[str, Any]
    runs: dict[str, list[Record]]


def run_key(point: Mapping[str, Any]) -> str:
    """Returns what identifies a run: its fields and their values, as JSON.

    >>> run_key({"delay": 3, "decay_epochs": (1, 2)})
    '{"decay_epochs": [1, 2], "delay": 3}'
    """
    return json.dumps(point, sort_keys=True)


def holds_fingerprint(file: Path, fingerprint: Mapping[str, Any]) -> bool:
    """Returns whether a file holds this fingerprint, False where there is no file.

    Args:
      file: JSON, in a folder whose other files were made under this fingerprint.
      fingerprint: what they are to be made from, JSON values.

    Raises:
      ValueError: when the file holds another one, naming the first field that differs.
    """
    found = read_json(file)
    if found is not None:
        refuse_mismatch(found, fingerprint, file.parent)
    return found is not None


def open_table(work: Path, fingerprint: Mapping[str, Any]) -> RunTable:
    """Opens a folder's table, empty where there is none; nothing is written yet.

    Args:
      work: folder of records.csv and of fingerprint.json.
      fingerprint: what all runs share, JSON values.

    Raises:
      ValueError: when the folder's runs were made under another fingerprint.
    """
    wanted = plain(dict(sorted(fingerprint.items())))
    holds_fingerprint(work / "fingerprint.json", wanted)
    file = work / "records.csv"
    return RunTable(file, wanted, _read_runs(file) if file.exists() else {})


def add_runs(table: RunTable, runs: Mapping[str, Sequence[Record]]) -> RunTable:
    """Returns the table with more runs, written to its file, all or nothing; makes its folder.

    Args:
      table: to be replaced by the result.
      runs: records by the run's key; they have the columns of all others.
    """
    rows = [
        {"run": key} | record
        for key, records in {**table.runs, **runs}.items()
        for record in records
    ]
    table.file.parent.mkdir(parents=True, exist_ok=True)
    write_json(table.file.with_name("fingerprint.json"), table.fingerprint)
    partial = table.file.with_suffix(".partial")
    write_records(partial, rows)
    partial.replace(table.file)
    # Read back, so that a table is the same whether its runs were read or just made.
    return table._replace(runs=_read_runs(table.file))


def _read_runs(file: Path) -> dict[str, list[Record]]:
    runs: dict[str, list[Record]] = {}
    for record in read_records(file):
        runs.setdefault(record.pop("run"), []).append(record)
    return runs


def write_records(file: Path, records: Sequence[Mapping[str, Any]]) -> None:
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
    table = pd.DataFrame(list(records))
    table.to_csv(file, index=False, float_format="%.9g", na_rep="nan", lineterminator="\n")


def read_records(file: Path) -> list[Record]:
    """Returns the rows of a CSV file; columns of numbers or booleans as such, others as text."""
    table = pd.read_csv(file, keep_default_na=False, na_values=["nan"])
    return table.to_dict("records")
