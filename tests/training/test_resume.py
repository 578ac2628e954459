"""Interrupted runs go on as if nothing had happened: real processes, real signals, full disks."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from tensorboardX.proto.event_pb2 import Event

from asgd_jax.data import plan_batches
from asgd_jax.training import command, set_up, train
from asgd_jax.training.folder import metrics as metrics_module
from asgd_jax.training.folder import rerun
from asgd_jax.training.folder.checkpoint import last_step, open_checkpoints
from asgd_jax.training.folder.metrics import read_rows

ROOT = Path(__file__).parents[2]
# 16 updates and 8 rows an epoch; checkpoints at some of the rows, which are in mid-epoch.
RUN = [
    "--config=configs/digits.py", "--config.model=mlp", "--config.num_train=256",
    "--config.num_validation=100", "--config.num_workers=4", "--config.worker_batch_size=16",
    "--config.delay=3", "--config.delay_distribution=uniform", "--config.learning_rate=0.05",
    "--config.momentum=0.9", "--config.momentum_kind=shifted", "--config.epochs=12",
    "--config.log_every_steps=2", "--config.checkpoint_every_steps=11",
    "--config.checkpoint_every_epochs=3",
]  # fmt: skip
NUM_DEVICES = "--xla_force_host_platform_device_count"
TIMES = ("steps_per_second", "wall_time_s", "commit")  # the source may move on in between


def start(workdir, *arguments, launcher=(), devices=1, flags=None):
    """`flags` of XLA's: those of tests, which compile quickly, or "", those of users."""
    flags = os.environ["XLA_FLAGS"] if flags is None else flags
    return subprocess.Popen(
        [*launcher, sys.executable, "scripts/train.py", *RUN, f"--workdir={workdir}", *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{flags} {NUM_DEVICES}={devices}",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Exit code, standard output and the lines of standard error of a process."""
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err.strip().splitlines()


def interrupt(process, workdir, number, *, at_row):
    """Sends a signal once metrics.csv has so many rows; returns what `finish` does."""
    table = workdir / "metrics.csv"
    while process.poll() is None and not (
        table.exists() and table.read_bytes().count(b"\n") > at_row
    ):
        time.sleep(0.002)
    process.send_signal(number)
    return finish(process)


def saved_state(workdir):
    """The arrays of the last checkpoint by name, read with nothing of ours."""
    import orbax.checkpoint as ocp

    step = max(int(entry.name) for entry in (workdir / "checkpoints").iterdir())
    with ocp.StandardCheckpointer() as reader:
        tree = reader.restore(workdir / "checkpoints" / str(step) / "state")
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_run(workdir, other):
    """Bitwise: parameters, rings, momentum, keys, step; metrics.csv and summary, but for times."""
    left, right = saved_state(workdir), saved_state(other)
    assert left.keys() == right.keys()
    assert any("history" in name or "pulled" in name for name in left)
    for name, value in left.items():
        assert value.tobytes() == right[name].tobytes(), name
    assert_same_metrics(workdir, other)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (workdir, other)]
    for summary in summaries:
        for content in (summary, summary["final"]):
            for name in (*TIMES, "device"):
                content.pop(name, None)
    assert summaries[0] == summaries[1]


def assert_same_metrics(workdir, other):
    tables = []
    for folder in (workdir, other):
        with (folder / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [list(row) for row in rows] == [list(metrics_module.COLUMNS)] * len(rows)
        tables.append([[row[name] for name in row if name not in TIMES] for row in rows])
    assert tables[0] == tables[1]


def shown_events(workdir):
    """(step, train loss) as TensorBoard shows them: a later start purges what it repeats."""
    shown = {}
    for file in sorted(workdir.glob("events.*"), key=lambda file: file.stat().st_mtime_ns):
        content, at = file.read_bytes(), 0
        while at + 12 <= len(content):
            length = int.from_bytes(content[at : at + 8], "little")
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += length + 16
            if event.HasField("session_log"):
                shown = {step: loss for step, loss in shown.items() if step < event.step}
            for value in event.summary.value:
                if value.tag == "train_loss":
                    assert event.step not in shown
                    shown[event.step] = value.simple_value
    return shown


@pytest.fixture(scope="session")  # the optimised tests come first
def unstopped(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unstopped")
    code, out, err = finish(start(workdir, flags=""))
    assert (code, err) == (0, [])
    assert "completed after 192 steps" in out
    return workdir


def test_a_run_stopped_in_every_way_ends_as_one_never_stopped(unstopped, tmp_path):
    """SIGKILL, SIGTERM and SIGINT in turn, in mid-epoch, each after the run has been resumed."""
    code, _, _ = interrupt(start(tmp_path, flags=""), tmp_path, signal.SIGKILL, at_row=13)
    assert code == -signal.SIGKILL
    assert not (tmp_path / "summary.json").exists()
    before = last_step(tmp_path)
    assert before is not None
    for number, at_row in ((signal.SIGTERM, 27), (signal.SIGINT, 43)):
        code, _, err = interrupt(start(tmp_path, flags=""), tmp_path, number, at_row=at_row)
        step = last_step(tmp_path)
        assert code == command.EXIT_CODE == 75
        assert err == [
            f"train.py: stopped at step {step}, which is saved: run the same command to resume"
        ]
        assert before < step < 192
        assert read_rows(tmp_path)[-1]["step"] == step
        before = step
    code, out, err = finish(start(tmp_path, flags=""))
    assert (code, err) == (0, [])
    assert "completed after 192 steps" in out
    assert_same_run(tmp_path, unstopped)
    rows = {int(row["step"]): row["train_loss"] for row in read_rows(tmp_path)}
    assert shown_events(tmp_path) == pytest.approx(rows, rel=1e-6)


def test_a_run_in_rounds_is_killed_and_ends_as_one_never_stopped(tmp_path):
    """Two devices with two workers each; a round of random delays ends where a row is due."""
    rounds = ["--config.parallelism=workers", "--config.epochs=4", "--config.log_every_steps=4"]
    assert finish(start(tmp_path / "whole", *rounds, devices=2))[0] == 0
    process = start(tmp_path / "parts", *rounds, devices=2)
    code, _, _ = interrupt(process, tmp_path / "parts", signal.SIGKILL, at_row=7)
    assert code == -signal.SIGKILL
    code, _, lines = finish(start(tmp_path / "parts", *rounds, devices=2))
    assert (code, lines) == (0, [])
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(tmp_path):
    """A state of 80 MB: the second checkpoint is seen unfinished, then its writer is killed."""
    process = start(tmp_path, "--config.width=300", "--config.checkpoint_every_steps=2")
    folder = tmp_path / "checkpoints"
    while process.poll() is None:
        if last_step(tmp_path) and list(folder.glob("*.orbax-checkpoint-tmp")):
            break
        time.sleep(0.001)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    unfinished = [entry.name for entry in folder.glob("*.orbax-checkpoint-tmp")]
    step = last_step(tmp_path)
    assert len(unfinished) == 1
    assert int(unfinished[0].split(".")[0]) > step
    template = set_up(ConfigDict(json.loads((tmp_path / "config.json").read_text()))).state
    meta = json.loads((folder / str(step) / "meta" / "metadata").read_text())
    checkpoints = open_checkpoints(tmp_path, meta["fingerprint"])
    state, progress = checkpoints.restore(template)
    checkpoints.close()
    assert int(state.step) == progress["step"] == step
    assert not list(folder.glob("*.orbax-checkpoint-tmp"))


def test_a_disk_that_is_full_is_one_line_and_room_lets_the_run_go_on(tmp_path):
    """No file may grow beyond 100 kB: writing fails as on a full disk, with an error."""
    limit = ["bash", "-c", 'ulimit -f 100 && exec "$@"', "bash"]
    wide = ["--config.width=8", "--config.epochs=2"]
    code, _, err = finish(start(tmp_path, *wide, launcher=limit))
    assert code == 2
    assert len(err) == 1, err
    assert f"cannot write checkpoints to {tmp_path / 'checkpoints'}" in err[0]
    assert "File too large" in err[0]
    code, _, err = finish(start(tmp_path, *wide))
    assert (code, err) == (0, [])
    assert [row["step"] for row in read_rows(tmp_path)] == list(range(2, 33, 2))


def test_a_full_file_system_is_one_line(tmp_path):
    """A real one, of a megabyte, in a mount namespace of its own."""
    script = f'mount -t tmpfs -o size=1m none "{tmp_path}" && exec "$@"'
    mounted = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    try:
        subprocess.run([*mounted, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine mounts nothing in a user namespace")
    code, _, err = finish(start(tmp_path / "run", "--config.width=16", launcher=mounted))
    assert code == 2
    assert len(err) == 1, err
    assert "No space left" in err[0]


# Root writes where it may not: what runs behind this has given that capability up.
OBEY_PERMISSIONS = [
    sys.executable, "-c",
    "import ctypes, os, sys\n"
    "PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1\n"
    "ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)\n"
    "os.execv(sys.argv[1], sys.argv[1:])",
]  # fmt: skip


def test_a_finished_run_in_a_read_only_folder_can_be_read_and_not_continued(unstopped, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(unstopped, workdir)
    folders = [workdir, *(entry for entry in workdir.rglob("*") if entry.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        code, out, err = finish(start(workdir, launcher=OBEY_PERMISSIONS))
        assert (code, err) == (0, [])
        assert "completed after 192 steps" in out
        code, _, err = finish(start(workdir, "--config.epochs=13", launcher=OBEY_PERMISSIONS))
        assert code == 2
        assert len(err) == 1, err
        assert "Permission denied" in err[0]
        assert str(workdir) in err[0]
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert_same_run(workdir, unstopped)


def test_a_truncated_checkpoint_is_one_line_of_the_script(unstopped, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(unstopped, workdir)
    data = max((workdir / "checkpoints" / "192").rglob("*"), key=lambda file: file.stat().st_size)
    data.write_bytes(data.read_bytes()[:100])
    table = (workdir / "metrics.csv").read_bytes()
    code, _, err = finish(start(workdir, "--config.epochs=13"))
    assert code == 2
    assert len(err) == 1, err
    assert "checkpoints/192 is damaged" in err[0]
    assert (workdir / "metrics.csv").read_bytes() == table


def run(config, folder):
    return train(config, folder, progress=False)


def stop_at_row(monkeypatch, number):
    """Makes this process send itself a real SIGTERM when it writes its n-th row."""
    opened = metrics_module.open_writer

    def open_writer(*args, **options):
        writer = opened(*args, **options)
        rows = iter(range(1, 1_000_000))

        def write(row, histogram):
            writer.write(row, histogram)
            if next(rows) == number:
                os.kill(os.getpid(), signal.SIGTERM)

        return writer._replace(write=write)

    monkeypatch.setattr(metrics_module, "open_writer", open_writer)


@pytest.mark.optimised
def test_every_part_of_the_state_resumes_bit_for_bit(tiny_config, tmp_path, monkeypatch):
    """Adam's moments, a history in half precision, a simulated trace; stopped within an epoch."""
    tiny_config.update(delay=3, log_every_steps=5, checkpoint_every_steps=7)
    tiny_config.update(optimizer="adam", history_dtype="bfloat16", delay_distribution="workers")
    run(tiny_config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at_row(patch, 3)
        with pytest.raises(command.Preempted, match="stopped at step 15, which is saved"):
            run(tiny_config, tmp_path / "parts")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    run(tiny_config, tmp_path / "parts")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.optimised
def test_more_epochs_go_on_and_a_finished_run_is_not_repeated(tiny_config, tmp_path):
    tiny_config.update(delay=3, log_every_steps=5)
    run(tiny_config, tmp_path / "whole")
    tiny_config.epochs = 1
    short = run(tiny_config, tmp_path / "parts")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "parts").rglob("*")}
    again = run(tiny_config, tmp_path / "parts")
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "parts").rglob("*")}
    assert (again["steps"], again["final"]) == (short["steps"], short["final"])
    tiny_config.epochs = 2
    run(tiny_config, tmp_path / "parts")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert json.loads((tmp_path / "parts" / "config.json").read_text())["epochs"] == 2
    tiny_config.epochs = 1
    with pytest.raises(ValueError, match=r"epochs=1 is less than the 2 of the run"):
        run(tiny_config, tmp_path / "parts")
    (tmp_path / "parts" / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"epochs=1 is less than the 2 that this run has made"):
        run(tiny_config, tmp_path / "parts")


@pytest.mark.optimised
def test_a_run_of_simulated_workers_can_be_extended(tiny_config, tmp_path):
    tiny_config.update(delay=3, delay_distribution="workers", epochs=3)
    whole = run(tiny_config, tmp_path / "whole")
    tiny_config.epochs = 1
    run(tiny_config, tmp_path / "parts")
    tiny_config.epochs = 3
    run(tiny_config, tmp_path / "parts")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert whole["staleness"]["num_clipped"] == 0


def test_a_pmapped_run_goes_on_on_other_devices(tiny_config, tmp_path):
    tiny_config.update(delay=3, parallelism="pmap", num_devices=2, epochs=2)
    whole = run(tiny_config, tmp_path / "whole")
    tiny_config.epochs = 1
    run(tiny_config, tmp_path / "parts")
    tiny_config.update(num_devices=4, epochs=2)
    parts = run(tiny_config, tmp_path / "parts")
    assert parts["final"]["train_loss"] == pytest.approx(whole["final"]["train_loss"], rel=1e-4)


def copy_run(unstopped, workdir, **changes):
    """A copy of a finished run, and its configuration."""
    shutil.copytree(unstopped, workdir)
    config = ConfigDict(json.loads((workdir / "config.json").read_text()))
    config.update(changes)
    return config


@pytest.mark.optimised
def test_a_lost_summary_is_made_again_without_training(unstopped, tmp_path):
    config = copy_run(unstopped, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    run(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", unstopped)


def test_a_diverged_run_is_finished_and_its_checkpoints_are_those_of_before(tiny_config, tmp_path):
    tiny_config.update(delay=3, learning_rate=3.0, divergence_loss=4.0, log_every_steps=1)
    tiny_config.update(checkpoint_every_steps=1)
    first = run(tiny_config, tmp_path)
    assert first["status"] == "diverged"
    assert last_step(tmp_path) == first["diverged_at_step"] < 32
    tiny_config.epochs = 9
    again = run(tiny_config, tmp_path)
    assert (again["status"], again["steps"]) == ("diverged", first["steps"])
    assert again["final"]["step"] == first["final"]["step"]


def test_a_run_without_a_checkpoint_starts_over(tiny_config, tmp_path):
    run(tiny_config, tmp_path / "whole")
    run(tiny_config, tmp_path / "again")
    (tmp_path / "again" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "again" / "checkpoints")
    run(tiny_config, tmp_path / "again")
    assert_same_metrics(tmp_path / "again", tmp_path / "whole")
    assert len(shown_events(tmp_path / "again")) == 2


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "metrics.csv").write_text("step"), "metrics.csv has 4 bytes and its check"),
        (lambda f: (f / "config.json").unlink(), "has no config.json, so is no run"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json holds no JSON object"),
        (lambda f: (f / "summary.json").write_text("{"), "summary.json holds no JSON object"),
        (lambda f: shutil.rmtree(f / "checkpoints"), "holds 12 epochs and no checkpoint to go on"),
    ],
    ids=["short_table", "no_config", "foreign_config", "damaged_summary", "no_checkpoints"],
)
def test_a_folder_that_is_not_whole_is_refused_and_left_alone(
    unstopped, break_it, message, tmp_path
):
    workdir = tmp_path / "run"
    config = copy_run(unstopped, workdir, epochs=13)
    break_it(workdir)
    before = {file.name: file.read_bytes() for file in workdir.iterdir() if file.is_file()}
    with pytest.raises(ValueError, match=message):
        run(config, workdir)
    after = {file.name: file.read_bytes() for file in workdir.iterdir() if file.is_file()}
    assert after == before


def test_a_changed_delay_trace_and_other_data_are_another_run(tmp_path):
    config = ConfigDict({"delay_distribution": "trace", "delay_trace": str(tmp_path / "trace")})
    prints = []
    for trace, samples in (("0 1 2", 256), ("0 2 2", 256), ("0 2 2", 255)):
        (tmp_path / "trace").write_text(trace)
        plan = plan_batches(samples, num_workers=4, worker_batch_size=16, delay=3)
        prints.append(rerun.data_fingerprint(config, plan))
    assert prints[0] != prints[1] != prints[2]
