"""A run goes on where no terminal can show how far it is."""

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from asgd_jax.training.progress_bar import progress_bar

ROOT = Path(__file__).parents[2]


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize(
    "stream", [None, SimpleNamespace(), closed()], ids=["none", "no", "closed"]
)
def test_no_bar_without_a_terminal(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(3, unit="step") as bar:
        bar.update(2)
        assert bar.disable


def test_a_terminal_shows_it_unless_told_not_to(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar(4, unit="epoch", initial=1, show=False):
        assert terminal.getvalue() == ""
    with progress_bar(4, unit="epoch", initial=1) as bar:
        bar.update(3)
    assert "4/4" in terminal.getvalue()
    assert "epoch" in terminal.getvalue()


def test_train_with_standard_error_closed(tmp_path):
    arguments = [
        "--config=configs/digits.py", "--config.model=mlp", "--config.num_train=64",
        "--config.num_workers=1", "--config.worker_batch_size=32", "--config.epochs=1",
        f"--workdir={tmp_path}",
    ]  # fmt: skip
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "scripts/train.py", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout[:23]) == (0, "completed after 2 steps")
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "completed"
