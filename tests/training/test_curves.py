"""Pictures of runs, `python -m asgd_jax.training.compare`, and what the progress bar says."""

import builtins
import io
import json
import logging
import sys

import numpy as np
import pytest

from asgd_jax.training import train
from asgd_jax.training.compare import main, shortest_names
from asgd_jax.training.curves import draw_runs, read_run, save_curves
from asgd_jax.training.folder.metrics import read_rows

PNG = b"\x89PNG"


@pytest.fixture(scope="module", name="folders")
def _folders(tmp_path_factory):
    """Three runs: without delay, with one, and one that diverges; as files, not trained."""
    root = tmp_path_factory.mktemp("runs")
    for name, delay, rate, diverged in (("s", 0, 0.4, None), ("a", 3, 0.1, None), ("d", 3, 9.0, 7)):
        folder = root / name / "seed0"
        folder.mkdir(parents=True)
        lines = ["epoch,train_loss,train_error,validation_loss,validation_error"]
        for step in range(1, 5):
            loss = 2.0 / step if diverged is None else 10.0**step
            evaluated = f"{loss * 1.1},{min(0.9, loss / 3)}" if step % 2 == 0 else ","
            lines.append(f"{step / 2},{loss},{min(0.9, loss / 4)},{evaluated}")
        if diverged is not None:
            lines.append("2.5,inf,0.9,nan,0.9")
        (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
        summary = {
            "status": "completed" if diverged is None else "diverged",
            "diverged_at_step": diverged,
            "learning_rate": rate,
            "sharpest_stable_minimum": None if name == "a" else 2.0 / rate,
            "best_validation_error": 0.125,
            "batches": {"delay": delay},
            "final": {"train_loss": 0.5, "validation_error": 0.125},
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return [root / name / "seed0" for name in "sad"]


def test_the_lines_are_the_columns_of_the_tables(folders):
    figure = draw_runs([read_run(folder) for folder in folders], thresholds=True)
    losses, errors, thresholds = figure.axes
    rows = read_rows(folders[0])
    for axes, scale, name in ((losses, 1, "loss"), (errors, 100, "error")):
        train_line, validation_line = axes.get_lines()[:2]
        np.testing.assert_allclose(train_line.get_xdata(), [0.5, 1.0, 1.5, 2.0])
        expected = [scale * row[f"train_{name}"] for row in rows]
        np.testing.assert_allclose(train_line.get_ydata(), expected)
        expected = [scale * rows[index][f"validation_{name}"] for index in (1, 3)]
        np.testing.assert_allclose(validation_line.get_xdata(), [1.0, 2.0])
        np.testing.assert_allclose(validation_line.get_ydata(), expected)
    *_, cross, _ = losses.get_lines()
    assert cross.get_marker() == "x"  # at the last finite loss of the run that diverged
    np.testing.assert_allclose(cross.get_xydata(), [[2.0, 1e4]])
    widths = [bar.get_width() for bar in thresholds.patches]
    np.testing.assert_allclose(widths, [5.0, np.nan, 2 / 9.0])
    assert [text.get_text() for text in thresholds.texts] == ["5", "no exact formula", "0.222"]


def test_compare_prints_a_table_and_draws(folders, tmp_path, capsys):
    out = tmp_path / "compare.png"
    assert main([*map(str, folders), f"--out={out}"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said[1:4]] == ["s/seed0", "a/seed0", "d/seed0"]
    assert said[1].split()[1:] == ["0", "0.4", "5", "0.5", "12.50%", "completed"]
    assert said[3].endswith("diverged at step 7")
    assert out.read_bytes()[:4] == PNG


def test_a_folder_without_a_run_is_one_line(folders, tmp_path, capsys):
    assert main([str(folders[0]), str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"compare: {tmp_path} holds no finished run: ")
    assert said.count("\n") == 1


def test_a_file_ending_that_is_unknown_is_one_line(folders, tmp_path, capsys):
    assert main([str(folders[0]), f"--out={tmp_path / 'x.nothing'}"]) == 2
    assert "nothing" in capsys.readouterr().err.splitlines()[-1]


def test_names_tell_folders_apart(folders):
    assert shortest_names(folders[:1]) == ["seed0"]
    assert shortest_names([*folders, folders[0]]) == ["s/seed0", "a/seed0", "d/seed0", "s/seed0"]


def test_the_picture_of_a_run_is_the_same_every_time(folders):
    path = save_curves(folders[2])
    assert path == folders[2] / "curves.png"
    first = path.read_bytes()
    assert first[:4] == PNG
    assert save_curves(folders[2]).read_bytes() == first
    path.unlink()


def test_without_matplotlib_there_is_no_picture_and_no_error(
    folders, tmp_path, capsys, monkeypatch
):
    genuine = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return genuine(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert save_curves(folders[0]) is None
    assert main([str(folders[0]), f"--out={tmp_path / 'x.png'}"]) == 0
    assert "pip install matplotlib" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert logging.getLogger("matplotlib").level == logging.ERROR


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_says_loss_error_staleness_and_the_time_left(tiny_config, tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    tiny_config.update(delay=3, learning_rate=0.05, checkpoint_every_epochs=0)
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    train(tiny_config, tmp_path / "run")
    last = terminal.getvalue().split("\r")[-1]
    rows = read_rows(tmp_path / "run")
    assert f"loss {rows[-1]['train_loss']:.3g}" in last
    assert f"error {rows[-1]['train_error']:.1%} (validation " in last
    assert "staleness 3" in last
    assert "00:00" in last  # time left
