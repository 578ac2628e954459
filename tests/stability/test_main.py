"""The command line: its numbers, its picture, its errors."""

import builtins
import json
import os
import subprocess
import sys

import pytest

import asgd_jax.stability as stability
from asgd_jax import delays
from asgd_jax.stability.__main__ import main


def tell(capsys, line):
    """What the program prints."""
    assert main(line.split()) == 0
    return capsys.readouterr().out


def ask(capsys, line):
    return json.loads(tell(capsys, line + " --json"))


def test_table_of_a_constant_delay(capsys):
    text = tell(capsys, "--delay 32 --momentum 0.9 --kind shifted --sharpness 20")
    lines = text.splitlines()
    assert lines[0].split(maxsplit=1) == ["delay", "32 updates (constant)"]
    assert lines[1].split() == ["sharpness", "20", "(given)"]
    rows = {line[2:24].strip(): line.split()[-1] for line in lines[6:10]}
    expected = {
        "no momentum": stability.max_learning_rate(32, sharpness=20),
        "heavy ball, damped": stability.max_learning_rate(32, sharpness=20, momentum=0.9),
        "heavy ball, undamped": stability.max_learning_rate(
            32, sharpness=20, momentum=0.9, dampening=False
        ),
        "shifted": stability.max_learning_rate(32, sharpness=20, momentum=0.9, kind="shifted"),
    }
    assert rows == {name: f"{rate:.5g}" for name, rate in expected.items()}
    assert next(line for line in lines if line.startswith("* ")).startswith("* shifted")
    assert len({len(line) for line in lines[4:10]}) == 1  # aligned to the right


def test_own_learning_rate(capsys):
    answer = ask(capsys, "--delay 32 --momentum 0 --sharpness 20 --learning-rate 0.0026")
    row = answer["methods"][0]
    assert not row["stable"]
    assert row["growth_time"] == pytest.approx(stability.growth_time(32, step=0.052))
    assert row["max_constant_delay"] == stability.max_delay(0.0026, sharpness=20)
    answer = ask(capsys, "--delay 2 --momentum 0 --sharpness 20 --learning-rate 0.0026")
    assert answer["methods"][0]["stable"]
    assert answer["methods"][0]["growth_time"] is None
    text = tell(capsys, "--delay 32 --sharpness 20 --learning-rate 0.3")
    assert "steps per" in text
    assert "none: this learning rate is unstable even without delay." in text


def test_baseline_gives_sharpness_and_rules(capsys):
    answer = ask(capsys, "--delay 32 --momentum 0 --baseline-learning-rate 0.8")
    assert answer["sharpness"] == pytest.approx(2 / 0.8)
    assert answer["rules"]["inverse"] == pytest.approx(0.025)
    exact = stability.rescale_learning_rate(0.8, 32, rule="exact")
    assert answer["rules"]["exact"] == pytest.approx(exact)
    text = tell(capsys, "--delay 32 --momentum 0 --baseline-learning-rate 0.8")
    assert "inverse 0.025, exact 0.019331" in text


@pytest.mark.parametrize(
    ("line", "process"),
    [
        ("--uniform 1 8", delays.uniform(1, 8)),
        ("--normal 4", delays.discretized_normal(4)),
        ("--normal 4 2.5", delays.discretized_normal(4, 2.5)),
        ("--pmf 0,0.5,0.5", delays.categorical([0, 0.5, 0.5])),
    ],
)
def test_random_delays_report_both_criteria(capsys, line, process):
    row = ask(capsys, f"{line} --momentum 0.5 --kind shifted --no-dampening")["methods"][-1]
    method = {"momentum": 0.5, "kind": "shifted", "dampening": False}
    assert row["used"]
    assert row["max_learning_rate"] == stability.max_learning_rate(process, **method)
    square = stability.max_learning_rate(process, criterion="mean_square", **method)
    assert row["max_learning_rate_mean_square"] == square
    assert "Act on the mean square" in tell(capsys, line)


def test_pmf_file(capsys, tmp_path):
    path = tmp_path / "pmf.txt"
    path.write_text("0\n0.5\n0.5\n")
    row = ask(capsys, f"--pmf {path} --momentum 0")["methods"][0]
    assert row["max_learning_rate"] == pytest.approx(0.8284, abs=1e-4)


def test_workers(capsys):
    answer = ask(
        capsys,
        "--workers 4 --updates 5000 --momentum 0 --learning-rate 0.6 --baseline-learning-rate 1",
    )
    row = answer["methods"][0]
    assert row["max_learning_rate"] * answer["sharpness"] == pytest.approx(0.445, rel=1e-2)
    assert row["standard_error"] < 0.01
    assert not row["stable"]
    assert "Monte-Carlo" in tell(capsys, "--workers 4 --updates 5000 --momentum 0")


@pytest.mark.parametrize("line", ["--delay 4 --momentum 0", "--uniform 1 4 --learning-rate 0.2"])
def test_picture(capsys, tmp_path, line):
    pytest.importorskip("matplotlib")
    path = tmp_path / "thresholds.png"
    assert main([*line.split(), "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_picture_under_a_notebooks_backend_that_is_not_installed(tmp_path):
    command = [sys.executable, "-m", "asgd_jax.stability", "--delay=4", "--momentum=0"]
    done = subprocess.run(
        [*command, f"--plot={tmp_path / 'p.png'}"],
        env=os.environ | {"MPLBACKEND": "no_such_backend"},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_picture_without_matplotlib(capsys, monkeypatch):
    imported = builtins.__import__

    def refuse(name, *arguments, **more):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(SystemExit) as stopped:
        main(["--delay", "4", "--plot", "x.png"])
    assert stopped.value.code == 2
    assert "--plot needs matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "",
            "one of the arguments --delay --uniform --normal --pmf --workers --stages is required",
        ),
        ("--delay x", "invalid int value: 'x'"),
        ("--delay -1", "delay must be an integer >= 0, got -1"),
        ("--delay 2 --momentum 1", "momentum must lie in [0, 1), got 1.0"),
        ("--delay 2 --kind nag", "invalid choice: 'nag'"),
        ("--delay 2 --sharpness nan", "sharpness must be a finite number > 0, got nan"),
        ("--delay 2 --learning-rate 0", "learning_rate must be a finite number > 0, got 0.0"),
        ("--uniform 3 1", "low must be <= high"),
        ("--normal 3 x", "--normal takes a whole MEAN"),
        ("--normal 3 1 1", "--normal takes MEAN and at most one STD"),
        ("--pmf 0.5,0.2", "pmf sums to 0.7, not 1"),
        ("--pmf nowhere.txt", "--pmf must be a file or numbers"),
        ("--workers 0", "num_workers must be >= 1"),
        ("--workers 2 --schedule fastest", "schedule must be one of"),
        ("--delay 2 --plot /no/such/folder/x.png", "No such file or directory"),
    ],
)
def test_bad_input_is_one_line(capsys, line, message):
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_as_a_program():
    command = [sys.executable, "-m", "asgd_jax.stability", "--delay", "-3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_curvature_noise(capsys):
    line = "--delay 7 --momentum 0.9 --sharpness 2 --learning-rate 0.1 --curvature-noise 0.5"
    answer = ask(capsys, line)
    noisy = {"criterion": "mean_square", "curvature_noise": 0.5}
    for row in answer["methods"]:
        method = {name: row[name] for name in ("momentum", "kind", "dampening")}
        square = stability.max_learning_rate(7, sharpness=2, **noisy, **method)
        assert row["max_learning_rate_mean_square"] == square < row["max_learning_rate"]
        time = stability.growth_time(7, step=0.2, **noisy, **method)
        assert (row["growth_time"] or float("inf")) == time
        assert "max_constant_delay" not in row
    text = tell(capsys, line + " --baseline-learning-rate 0.4")
    assert "in mean square" in text
    with pytest.raises(SystemExit):
        main(["--workers", "4", "--schedule", "random", "--curvature-noise", "1"])
    assert "--curvature-noise takes no simulated workers" in capsys.readouterr().err
