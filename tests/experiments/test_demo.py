"""The demo as `make demo` runs it, shortened."""

import json

import pytest

from asgd_jax.experiments import demo


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(demo, "EPOCHS", 12)


def test_the_demo_shows_the_papers_point(short, tmp_path, capsys):
    assert demo.main(["--out", str(tmp_path / "out")]) == 0
    out = tmp_path / "out"
    printed = capsys.readouterr().out
    assert str(out / "table.txt") in printed
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "table.txt").read_text().splitlines()) == 4
    summaries = [
        json.loads(next(out.glob(f"{name}/summary.json")).read_text())
        for name in ("s-sgd_large_batch", "a-sgd_same_learning_rate", "a-sgd_eq_8")
    ]
    assert [run["status"] for run in summaries] == ["completed", "diverged", "completed"]
    assert summaries[2]["learning_rate"] == summaries[0]["learning_rate"] / 32
    assert not list(tmp_path.glob(".out-*"))


def test_an_unwritable_folder_is_one_line(capsys):
    assert demo.main(["--out", "/proc/demo"]) == 2
    assert capsys.readouterr().err.startswith("demo: ")
