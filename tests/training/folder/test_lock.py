"""One process a folder: a second one is refused, a killed one leaves nothing locked."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from asgd_jax.training import train
from asgd_jax.training.folder import rerun
from asgd_jax.training.folder.metrics import read_rows

ROOT = Path(__file__).parents[3]


def test_a_folder_in_which_a_process_trains_is_refused_until_it_is_killed(tmp_path):
    """A real run of the script, far from its end."""
    long = ["--config=configs/digits.py", "--config.model=mlp", "--config.epochs=100000"]
    process = subprocess.Popen(
        [sys.executable, "scripts/train.py", *long, f"--workdir={tmp_path}"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    try:
        while process.poll() is None and not (tmp_path / "metrics.csv").exists():
            time.sleep(0.01)
        assert process.poll() is None
        message = f"{tmp_path} is in use by another process that trains there"
        with pytest.raises(ValueError, match=message), rerun.hold_folder(tmp_path):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / rerun.LOCK).exists()
    with rerun.hold_folder(tmp_path):
        pass


def test_a_refused_run_touches_nothing_and_can_run_afterwards(tiny_config, tmp_path):
    with rerun.hold_folder(tmp_path):
        with pytest.raises(ValueError, match=r"is in use by another process") as refused:
            train(tiny_config, tmp_path, progress=False)
        assert "\n" not in str(refused.value)
        assert os.listdir(tmp_path) == [rerun.LOCK]
    train(tiny_config, tmp_path, progress=False)
    assert len(read_rows(tmp_path)) == 2


def test_only_the_first_process_of_a_run_locks(tmp_path, monkeypatch):
    with rerun.hold_folder(tmp_path):
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        with rerun.hold_folder(tmp_path):
            pass


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_locks_nothing(reason, tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(reason, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with rerun.hold_folder(tmp_path), rerun.hold_folder(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_left_to_the_run_to_complain_about(tmp_path):
    (tmp_path / "file").write_text("")
    with rerun.hold_folder(tmp_path / "file" / "run"):
        pass


def test_an_error_within_is_passed_on_and_unlocks(tmp_path):
    with pytest.raises(OSError, match="disk"), rerun.hold_folder(tmp_path):
        raise OSError("disk")
    with rerun.hold_folder(tmp_path):
        pass
