"""Real workers, a real Ray, real SIGKILLs. One cluster for the runs of this process."""

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed: pip install 'asgd-jax[ray]'", allow_module_level=True)

from watched import descendants, num_updates, processes, wait_until

from asgd_jax.cluster.log import UPDATES_FILE
from asgd_jax.cluster.session import open_ray
from asgd_jax.cluster.sweeps import on_cluster
from asgd_jax.cluster.train import train_async
from asgd_jax.training.folder.metrics import read_rows
from asgd_jax.training.recorded import read_updates
from asgd_jax.training.sweep import sweep

# All in one process of the suite: one cluster, and its workers beside one another.
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.xdist_group("ray")]

ROOT = Path(__file__).parents[2]
RUN = [
    "--config=configs/digits.py", "--config.model=mlp", "--config.num_train=256",
    "--config.num_validation=100", "--config.worker_batch_size=16", "--config.learning_rate=0.05",
    "--config.epochs=8", "--num_workers=2", "--config.worker_times=constant .02",
]  # fmt: skip


@pytest.fixture(scope="module")
def ray():
    with open_ray(None, num_cpus=3) as module:  # two workers and a server
        yield module
    assert wait_until(lambda: not descendants(os.getpid(), "ray"))


def still_there(pids, but=None):
    return [
        line
        for pid, _, line in processes()
        if pid in pids and "ray" in line and not (but and but in line)
    ]


def replay_of(workdir):
    return subprocess.run(
        [sys.executable, "-m", "asgd_jax.cluster.replay", str(workdir)],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "XLA_FLAGS": ""},
    )  # fmt: skip


def assert_whole(workdir, summary):
    """The record and the rows are those of one run without gaps."""
    updates = read_updates(workdir / UPDATES_FILE)  # refuses gaps, and staleness that is not
    assert updates.update.size == summary["steps"]
    assert len(set(updates.batch.tolist())) == updates.batch.size
    assert (updates.seconds[1:] >= updates.seconds[:-1]).all()
    steps = [int(row["step"]) for row in read_rows(workdir)]
    assert steps == list(range(16, summary["steps"] + 1, 16))
    assert sum(summary["staleness"]["histogram"]) == summary["steps"]


def test_workers_and_server_are_killed_and_the_replay_has_the_same_bits(
    ray, small_config, tmp_path, capfd
):
    small_config.update(
        num_workers=2, epochs=18, momentum=0.5, momentum_kind="shifted",
        learning_rate_rule="inverse", learning_rate=0.1, worker_times="constant .03",
        checkpoint_every_steps=8,
    )  # fmt: skip
    killed = []

    def kill():
        for at, name in (
            (20, "ray::RealWorker"),
            (60, "ray::ServerActor"),
            (100, "ray::RealWorker"),
        ):
            assert wait_until(lambda at=at: num_updates(tmp_path) >= at)
            (pid, *_) = descendants(os.getpid(), name)
            os.kill(pid, signal.SIGKILL)
            killed.append(name)

    killer = threading.Thread(target=kill)
    killer.start()
    summary = train_async(small_config, tmp_path, progress=False)
    killer.join()
    assert killed == ["ray::RealWorker", "ray::ServerActor", "ray::RealWorker"]
    assert summary["status"] == "completed"
    assert summary["steps"] == 288
    assert summary["worker_restarts"] >= 2
    assert summary["wasted"]["lost"] >= 1
    assert_whole(tmp_path, summary)
    said = capfd.readouterr().err
    assert said.count("died and is restarted\n") >= 2
    assert "the server died and is restarted from step" in said
    assert summary["final"]["validation_error"] < 0.5

    done = replay_of(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "replay by the same programs: equal bit by bit" in done.stdout
    assert "replay in the compiled loop: equal to rounding" in done.stdout
    assert "mean square" in done.stdout


def test_a_straggler_is_dropped_or_waited_for(ray, small_config, tmp_path):
    """With a worker 15 times as slow: no update beyond the limit, the rest is counted as wasted."""
    small_config.update(epochs=3, learning_rate=0.05, worker_times="straggler .02 15")
    small_config.num_workers = 2
    small_config.update(max_staleness=4)
    summary = train_async(small_config, tmp_path / "drop", progress=False)
    assert_whole(tmp_path / "drop", summary)
    assert summary["staleness"]["max"] <= 4
    assert summary["wasted"]["dropped"] >= 1
    assert summary["wasted"]["dropped_seconds"] >= 0.3
    assert summary["wasted"]["waited_seconds"] == 0

    small_config.update(staleness_policy="wait", epochs=2)
    summary = train_async(small_config, tmp_path / "wait", progress=False)
    assert_whole(tmp_path / "wait", summary)
    assert summary["staleness"]["max"] <= 4
    assert summary["wasted"]["dropped"] == 0
    assert summary["wasted"]["waited_seconds"] > 0.3
    assert summary["workers"]["updates"][0] >= 1


def test_a_sweep_on_the_cluster_survives_its_processes(ray, small_config, tmp_path):
    """The same rows as here, while a process that makes them is killed; what is done stays done."""
    small_config.update(delay=2, epochs=2, num_workers=3)
    points = [{"learning_rate": rate, "seed": seed} for rate in (0.05, 0.1) for seed in range(3)]
    expected = sweep(small_config, points, progress=False)

    def kill():
        name = "ray::run_part"
        assert wait_until(lambda: descendants(os.getpid(), name))
        os.kill(descendants(os.getpid(), name)[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    with on_cluster(None):
        killer.start()
        found = sweep(small_config, points, work=tmp_path, progress=False)
        killer.join()
        again = sweep(small_config, points, work=tmp_path, progress=False)
    assert [row["train_loss"] for row in again] == [row["train_loss"] for row in found]
    assert len(found) == len(expected) == 12
    for row, other in zip(found, expected, strict=True):
        assert row["seed"] == other["seed"]
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
    assert len((tmp_path / "records.csv").read_text().splitlines()) == 13


def start(workdir, *arguments):
    return subprocess.Popen(
        [sys.executable, "scripts/train_async.py", *RUN, f"--workdir={workdir}", *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def listening(pids):
    """Addresses beyond the loopback that some of the processes listen at, as /proc has them."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes.add(os.readlink(link))
            except OSError:
                continue
    loopback = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            cells = line.split()
            address = cells[1].split(":")[0]
            ours = f"socket:[{cells[9]}]" in inodes
            if ours and cells[3] == "0A" and address not in loopback:
                found.append(cells[1])
    return found


@pytest.mark.long
def test_driver_killed_then_stopped_then_finished_and_no_process_stays(tmp_path):
    """Three commands: one is killed, one gets Ctrl-C as from a terminal, the last one finishes."""
    process = start(tmp_path)
    assert wait_until(lambda: num_updates(tmp_path) >= 24), process.communicate(timeout=5)
    started = descendants(process.pid, "ray")
    assert len(started) >= 5
    assert listening([process.pid, *started]) == []
    assert all(
        b"RAY_AUTH_MODE=token" in Path(f"/proc/{pid}/environ").read_bytes()
        for pid in descendants(process.pid, "raylet")
    )
    process.kill()
    process.communicate()
    # Ray's own two agents try for a minute to tell their dead head of it.
    assert wait_until(lambda: not still_there(started, but="Agent"))

    process = start(tmp_path)
    before = num_updates(tmp_path)
    assert wait_until(lambda: num_updates(tmp_path) > max(before, 40))
    started = descendants(process.pid, "ray")
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all of them
    out, err = process.communicate(timeout=240)
    assert process.returncode == 75, err
    assert err.startswith("train_async.py: stopped at step ")
    assert wait_until(lambda: not still_there(started))
    stopped_at = num_updates(tmp_path)
    assert f"stopped at step {stopped_at}," in err

    process = start(tmp_path)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert err == ""
    assert "completed after 128 updates" in out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert_whole(tmp_path, summary)
    for name in ("config.json", "metrics.csv", "checkpoints", UPDATES_FILE):
        assert (tmp_path / name).exists()
    with (tmp_path / UPDATES_FILE).open(newline="") as lines:
        assert len(list(csv.DictReader(lines))) == 128
    assert wait_until(lambda: not descendants(os.getpid(), "scripts/train_async.py"))
    done = replay_of(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
