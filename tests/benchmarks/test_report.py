"""The files of the benchmark: merged by item, and a table generated from them."""

import json

import pytest

from benchmarks.report import format_readme, merge_item, read_report
from benchmarks.result import Result, Table, goal, result_to_json
from experiments.claims import at_least, at_most
from experiments.tables import markdown_table

ORDER = ["first", "second"]


def an_item(measured, title="a title"):
    result = Result(
        tables=[Table("some rows", [{"delay": 1, "ratio": measured}])],
        goals=[goal(at_most("time", measured, 1.05), "the cache is cold")],
        notes=["one note"],
    )
    return result_to_json(result) | {"title": title, "wall_time_s": 0.1}


def test_items_join_one_report_in_their_order_and_replace_their_own(tmp_path):
    merge_item(tmp_path, "second", an_item(1.0), quick=False, order=ORDER)
    merge_item(tmp_path, "first", an_item(1.2), quick=False, order=ORDER)
    merge_item(tmp_path, "second", an_item(1.1), quick=False, order=ORDER)
    report = json.loads((tmp_path / "bench.json").read_text())
    assert list(report["items"]) == ORDER
    assert report["items"]["second"]["goals"][0]["measured"] == 1.1
    assert report["items"]["first"]["machine"]["cores"] >= 1
    assert report["items"]["first"]["versions"]["jax"]
    assert not list(tmp_path.glob("*.partial"))


def test_the_readme_says_what_holds_and_why_the_rest_does_not(tmp_path):
    merge_item(tmp_path, "first", an_item(1.2), quick=False, order=ORDER)
    merge_item(tmp_path, "second", an_item(1.0), quick=False, order=ORDER)
    text = (tmp_path / "README.md").read_text()
    assert "1 of 2 hold." in text
    assert "| first | time | at most 1.05 | 1.2 | **no** |" in text
    assert "| second | time | at most 1.05 | 1 | yes |" in text
    assert text.count("the cache is cold") == 1
    assert text == format_readme(read_report(tmp_path))


def test_a_skipped_item_is_reported_with_its_reason(tmp_path):
    skipped = {"status": "skipped", "reason": "no torch", "title": "a title"}
    merge_item(tmp_path, "first", skipped, quick=False, order=ORDER)
    text = (tmp_path / "README.md").read_text()
    assert "Skipped: no torch" in text
    assert "None measured." in text


def test_a_quick_run_never_joins_measurements(tmp_path):
    merge_item(tmp_path, "first", an_item(1.0), quick=False, order=ORDER)
    before = (tmp_path / "bench.json").read_bytes()
    with pytest.raises(ValueError, match="a quick run must not join"):
        merge_item(tmp_path, "second", an_item(1.0), quick=True, order=ORDER)
    assert (tmp_path / "bench.json").read_bytes() == before


def test_a_foreign_file_is_refused_and_kept(tmp_path):
    (tmp_path / "bench.json").write_text("[]")
    with pytest.raises(ValueError, match="is no benchmark report"):
        merge_item(tmp_path, "first", an_item(1.0), quick=False, order=ORDER)
    assert (tmp_path / "bench.json").read_text() == "[]"


def test_what_is_no_number_becomes_a_dash(tmp_path):
    merge_item(tmp_path, "first", an_item(float("nan")), quick=False, order=ORDER)
    assert json.loads((tmp_path / "bench.json").read_text())["items"]["first"]["goals"]
    assert "| first | time | at most 1.05 | - | **no** |" in (tmp_path / "README.md").read_text()


def test_cells_are_short_and_keep_their_column():
    row = {"n": 1234567, "x": 12345.6, "y": 0.00012345, "ok": True, "text": "a|b"}
    assert (
        markdown_table([row]).splitlines()[-1] == "| 1,234,567 | 12,346 | 0.0001234 | yes | a\\|b |"
    )


def test_a_goal_keeps_its_reason_only_where_it_misses():
    assert goal(at_least("speed", 2.0, 1.0), "why").reason == ""
    assert goal(at_least("speed", 0.5, 1.0), "why").reason == "why"
    assert goal(at_least("speed", float("nan"), 1.0)).reason == "no reason found yet"
