"""Records in files: every byte of the committed ones, every value of a key."""

import math
from pathlib import Path

import pytest

from asgd_jax.training.folder.table import (
    add_runs,
    open_table,
    read_records,
    run_key,
    write_records,
)

COMMITTED = sorted((Path(__file__).parents[3] / "results").glob("*/records.csv"))


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.parent.name)
def test_committed_records_are_read_and_written_to_the_byte(file, tmp_path):
    write_records(tmp_path / "records.csv", read_records(file))
    assert (tmp_path / "records.csv").read_bytes() == file.read_bytes()


def test_a_table_is_found_again_whatever_its_keys_hold(tmp_path):
    values = ["a b", "a, b", 'a "b"', "a=1", "a\nb", "é", "", (1, 2), (1.0, 2), None, True, 1, "1"]
    points = [{"x": first, "y": second} for first in values for second in ("b", "b x=1")]
    keys = [run_key(point) for point in points]
    assert len(set(keys)) == len(points)
    table = open_table(tmp_path, {"a": 1})
    for number, key in enumerate(keys):
        table = add_runs(table, {key: [{"loss": number / 3}, {"loss": math.nan}]})
    again = open_table(tmp_path, {"a": 1})
    assert str(again) == str(table)
    assert list(again.runs) == keys
    assert [rows[0]["loss"] for rows in again.runs.values()] == [
        float(f"{number / 3:.9g}") for number in range(len(keys))
    ]


def test_a_folder_is_made_with_its_first_run_and_holds_its_fingerprint(tmp_path):
    table = open_table(tmp_path / "new", {"epochs": (1, 2)})
    assert not (tmp_path / "new").exists()  # a sweep that is refused leaves nothing behind
    add_runs(table, {"a": [{"loss": 1.0}]})
    assert open_table(tmp_path / "new", {"epochs": [1, 2]}).runs == {"a": [{"loss": 1}]}
    with pytest.raises(ValueError, match=r"has epochs=\[1, 2\] and this configuration epochs=3"):
        open_table(tmp_path / "new", {"epochs": 3})


def test_a_damaged_fingerprint_is_said_to_be_one(tmp_path):
    (tmp_path / "fingerprint.json").write_text("{")
    with pytest.raises(ValueError, match=r"fingerprint.json holds no JSON object"):
        open_table(tmp_path, {"a": 1})
