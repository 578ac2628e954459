"""The driver of the reduced runs, on digits; and the commands that it lists."""

import csv
import json
import runpy
import shlex
from pathlib import Path

import pytest

from asgd_jax.training.command import Preempted
from asgd_jax.training.config import validate_config
from experiments import reduced

ROOT = Path(__file__).parents[2]

TINY = {
    "model": "mlp",
    "num_train": 264,
    "num_validation": 100,
    "log_every_steps": 5,
    "checkpoint_every_epochs": 0,
    "num_devices": 1,
}
RUNS = {
    "learns": reduced.ReducedRun("digits", "ssgd", TINY | {"epochs": 40}, True),
    "falls": reduced.ReducedRun(
        "digits", "asgd", TINY | {"epochs": 2, "learning_rate": 1.0}, False
    ),
    "diverges": reduced.ReducedRun(
        "digits", "asgd_same", TINY | {"epochs": 2, "learning_rate": 1e6}, True
    ),
}


@pytest.mark.parametrize("name", list(reduced.REDUCED_RUNS))
def test_every_command_makes_the_same_run(name, monkeypatch):
    """The command line, read as scripts/train.py reads it, gives the configuration that is run."""
    monkeypatch.chdir(ROOT)
    run = reduced.REDUCED_RUNS[name]
    python, script, *arguments = shlex.split(reduced.command(name, run))
    assert (python, script) == ("python", "scripts/train.py")
    command = runpy.run_path(script)["parse"](arguments)
    config = reduced.load_config(run)
    assert command.config.to_dict() == config.to_dict()
    assert command.workdir == Path(f"runs/reduced/{name}")
    validate_config(config)


def test_the_runs_are_those_that_are_to_be_shown():
    delays = {name: reduced.load_config(run).delay for name, run in reduced.REDUCED_RUNS.items()}
    assert delays.pop("resnet50_ssgd") == 0
    assert set(delays.values()) == {31}
    arms = {run.arm for run in reduced.REDUCED_RUNS.values() if run.config == "imagenet_resnet50"}
    momenta = {"standard", "standard_damped", "no_momentum", "shifted", "shifted_normal"}
    assert arms >= momenta


def test_runs_leave_a_table_and_are_not_repeated(tmp_path, monkeypatch):
    content = reduced.make_runs(tmp_path / "out", tmp_path / "work", RUNS)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "README.md", "records.csv", "summary.json",
    ]  # fmt: skip
    assert not list((tmp_path / "work").glob("*/checkpoints"))
    assert [claim["holds"] for claim in content["claims"]] == [True, True, False]
    assert content["runs"]["diverges"]["status"] == "diverged"
    with (tmp_path / "out" / "records.csv").open(newline="") as lines:
        rows = {row["run"]: row for row in csv.DictReader(lines)}
    assert list(rows) == list(RUNS)
    assert rows["learns"]["updates"] == "40"
    assert rows["falls"]["updates"] == "66"
    assert rows["falls"]["max_staleness"] == "32"
    assert float(rows["learns"]["validation_error"]) < 0.5
    assert (rows["learns"]["beats_chance"], rows["falls"]["beats_chance"]) == ("yes", "not asked")
    assert float(rows["falls"]["last_train_loss"]) < float(rows["falls"]["first_train_loss"])
    saved = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert saved["runs"]["learns"]["command"].startswith("python scripts/train.py --config=")
    readme = (tmp_path / "out" / "README.md").read_text()
    assert all(row["command"] in readme for row in rows.values())
    assert "FAILS  diverges" in readme
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*.csv")}
    again = reduced.make_runs(tmp_path / "out", tmp_path / "work", RUNS)
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*.csv")}
    assert again == content


def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert reduced.main(["--only=resnet"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "unknown run 'resnet': use some of resnet20_no_momentum, " in line
    assert not list(tmp_path.iterdir())


def test_a_stopped_run_is_one_line_and_goes_on(tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise Preempted(7)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(reduced, "train", stop)
    assert reduced.main([f"--out={tmp_path / 'out'}", f"--workdir={tmp_path / 'work'}"]) == 75
    line = "reduced: stopped at step 7, which is saved: run the same command to resume\n"
    assert capsys.readouterr().err == line
