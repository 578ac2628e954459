"""What needs no Ray, and the line that says what to install where it is needed."""

import subprocess
import sys
from pathlib import Path

import pytest

from asgd_jax.cluster.sweeps import on_cluster
from asgd_jax.cluster.train import train_async

ROOT = Path(__file__).parents[2]


@pytest.fixture
def no_ray(monkeypatch):
    find_spec = __import__("importlib.util", fromlist=["find_spec"]).find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "ray" else find_spec(name)
    )


def test_a_run_says_what_to_install_and_makes_nothing(no_ray, small_config, tmp_path):
    with pytest.raises(ValueError, match="Ray is not installed: pip install") as caught:
        train_async(small_config, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="Ray is not installed"), on_cluster(None):
        pass


def test_nothing_else_imports_ray():
    """The library, the cluster's modules and the scripts: none loads it before it runs."""
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "import asgd_jax, asgd_jax.training, asgd_jax.cluster.train, asgd_jax.cluster.replay\n"
        "import asgd_jax.cluster.sweeps, scripts.train, scripts.train_async, scripts.reproduce\n"
        "import experiments.demo, experiments.reproduce\n"
        "print('ray' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs --config=configs/X.py and --workdir=DIR"),
        (["--num_workers=two"], "argument --num_workers: invalid int value: 'two'"),
        (["--num_workers=0"], "num_workers must be >= 1, got 0"),
        (["--config.lr=1"], "unknown field lr: did you mean learning_rate?"),
        (["--config.max_staleness=1", "--config.staleness_policy=wait"], "use max_staleness=32"),
        (["--config.worker_times=slow"], "worker_times='slow': use"),
        (["--config.parallelism=pmap"], "parallelism='pmap' is for simulated workers"),
        (["--plan"], "--plan is for train.py"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path, capsys):
    sys.path.insert(0, str(ROOT))
    try:
        from scripts.train_async import main
    finally:
        sys.path.remove(str(ROOT))
    base = [f"--config={ROOT}/configs/digits.py", f"--workdir={tmp_path / 'run'}"]
    assert main([*(base if arguments else []), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train_async.py: ")
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_folder_of_a_simulation_is_no_real_run(small_config, tmp_path):
    from asgd_jax.cluster.replay import main

    assert main([str(tmp_path)]) == 2
