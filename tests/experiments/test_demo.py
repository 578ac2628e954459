"""The demo as `make demo` runs it, shortened."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import demo


@pytest.fixture
def short(monkeypatch):
    recipe = demo.digits.get_config

    def shortened(arm):
        config = recipe(arm)
        config.epochs = 12
        return config

    monkeypatch.setattr(demo.digits, "get_config", shortened)


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


def test_no_training_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(demo, "train", None)
    assert demo.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "demo: the picture needs matplotlib: pip install matplotlib\n"


def test_a_stopped_demo_is_one_line_and_leaves_nothing(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.demo", f"--out={tmp_path / 'out'}"],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not list(tmp_path.glob(".out-*/demo/*/metrics.csv")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (75, "demo: stopped; start it again, it is short\n")
    assert not list(tmp_path.iterdir())
