"""scripts/train.py as a user runs it: results, and one clear line for every mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BASE = "--config=configs/digits.py"
QUICK = [
    "--config.model=mlp", "--config.num_train=256", "--config.num_workers=4",
    "--config.worker_batch_size=16", "--config.epochs=1",
]  # fmt: skip


def run_train(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "scripts/train.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        timeout=240,
        check=False,
    )


def test_trains_with_overrides(tmp_path):
    done = run_train(
        f"{BASE}:asgd", *QUICK, "--config.delay=3", "--config.learning_rate=0.2",
        f"--workdir={tmp_path / 'run'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "completed after 16 steps" in done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["config"]["delay"] == 3
    assert summary["learning_rate"] == pytest.approx(0.2 / 3)


def test_a_diverged_run_exits_with_zero_and_says_so(tmp_path):
    done = run_train(BASE, *QUICK, "--config.learning_rate=1e9", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert "diverged after" in done.stdout


MISTAKES = {
    "negative delay": (["--config.delay=-1"], "delay must be an integer >= 0, got -1"),
    "fractional delay": (["--config.delay=1.5"], "delay"),
    "wrong divisibility": (["--config.delay=4"], "delay + 1 must divide num_workers; use delay=3"),
    "unknown dataset": (["--config.dataset=svhn"], "unknown data set 'svhn': use one of digits"),
    "unknown model": (["--config.model=lenet"], "unknown model 'lenet': choose one of"),
    "unknown option": (["--config.conv_impl=im2col"], "conv_impl must be one of"),
    "unknown optimizer": (["--config.optimizer=lion"], "unknown optimizer='lion': use one of sgd"),
    "unknown key": (["--config.lerning_rate=1"], "lerning_rate"),
    "unknown flag": (["--wrokdir=x"], "wrokdir"),
    "unknown arm": (["--config=configs/digits.py:adsg"], "unknown arm 'adsg'"),
    "unknown config": (["--config=configs/nothing.py"], "configs/nothing.py"),
    "bad number": (["--config.learning_rate=-1"], "learning_rate must be a number > 0, got -1"),
    "missing trace": (
        ["--config.delay_distribution=trace", "--config.delay_trace=none.npy"],
        "delay_trace='none.npy' cannot be read",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(mistake, tmp_path):
    arguments, message = MISTAKES[mistake]
    if not arguments[0].startswith("--config="):
        arguments = [BASE, *QUICK, *arguments]
    done = run_train(*arguments, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("train.py: ")
    assert message in lines[0]
    assert not (tmp_path / "run").exists()


def test_a_plan_is_printed_without_a_run(tmp_path):
    done = run_train(BASE, "--config.delay=32", "--plan")
    assert done.returncode == 0, done.stderr
    assert "memory a device, digits_cnn on digits, delay 32 (MiB)" in done.stdout
    assert "history" in done.stdout


def test_an_address_is_no_workdir():
    done = run_train(BASE, "--workdir=gs://bucket/run")
    assert done.returncode == 2
    assert "workdir='gs://bucket/run' must be a folder: mount the bucket" in done.stderr


def test_missing_arguments_are_named():
    done = run_train(BASE)
    assert done.returncode == 2
    assert done.stderr.strip() == "train.py: needs --config=configs/X.py and --workdir=DIR"


def test_missing_data_is_one_line_with_both_remedies(tmp_path):
    done = run_train(
        "--config=configs/mnist_cnn.py", f"--config.data_dir={tmp_path / 'none'}",
        f"--workdir={tmp_path / 'run'}", https_proxy="http://127.0.0.1:9",
    )  # fmt: skip
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert "mnist is not in" in line
    assert str(tmp_path / "none") in line
    assert "TFDS_DATA_DIR" in line
    assert "download" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc").is_dir(), reason="needs /proc as root")
def test_an_unwritable_folder_is_one_line():
    folder = "/proc/asgd_run"  # not writable, for root either
    done = run_train(BASE, *QUICK, f"--workdir={folder}")
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert folder in lines[0]
