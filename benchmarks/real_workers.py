"""A real server: updates a second where workers return a constant gradient; needs Ray."""

import os
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from asgd_jax.cluster.crew import Crew
from asgd_jax.cluster.real_run import RealRun, open_real_run, real_config
from asgd_jax.cluster.session import open_ray, require_ray
from asgd_jax.training import default_config
from asgd_jax.training.state import num_params
from benchmarks.harness import spread
from benchmarks.result import BenchOptions, Result, Skipped, Table, TableRow, goal
from experiments.claims import at_least

TITLE = "a real server on Ray: updates a second with 4 workers, on this machine"

_WORKERS = 4
_WANTED = 300.0  # updates a second
_COPIES = 4  # of a set of parameters an update: into and out of the channel, each way


def run(options: BenchOptions) -> Result:
    """Measures a few runs, each with processes of its own; see the module.

    Raises:
      Skipped: where Ray is not installed.
    """
    try:
        require_ray()
    except ValueError as error:
        raise Skipped(str(error)) from error
    # From the first epoch's end on.
    count, epochs = (1, 2) if options.quick else (7, 5)
    with open_ray(None, num_cpus=_WORKERS + 1, store_bytes=2**29) as ray:
        real = open_real_run(_config(epochs))
        rows = [measure(ray, real) for _ in range(count)]
    rates = spread([row["updates/s"] for row in rows])
    server = spread([row["server (ms CPU an update)"] for row in rows]).median
    claim = at_least("updates a second, LeNet-sized gradients", rates.median, _WANTED)
    reason = (
        f"quartiles {rates.low:.0f} to {rates.high:.0f}; the server's process takes {server:.2f} "
        "ms of CPU an update, a third of it the update, the rest Ray's calls, its channels and "
        "their copies"
    )
    notes = [
        "Workers push one gradient of LeNet (1.72 MB) again and again; heavy ball on the server.",
        f"Bytes copied an update: {_COPIES} sets of parameters. Nothing is sent over a network.",
    ]
    return Result([Table("runs, one after the other", rows)], [goal(claim, reason)], notes)


def _config(epochs: int) -> ConfigDict:
    config = default_config()
    config.update(
        dataset="mnist",
        model="mnist_cnn",
        num_train=1600,
        num_validation=100,
        worker_batch_size=8,
        epochs=epochs,
        momentum=0.9,
    )
    return real_config(config, _WORKERS)


def measure(ray: Any, run: RealRun) -> TableRow:
    """Returns one run's updates a second, from the first report of the server to the last."""
    size = 4 * num_params(jax.eval_shape(run.programs.init).params)
    crew = Crew(ray, run.config, ray.put(run.feed.samples), constant=True)
    server = crew.hire_server(None)
    pid = ray.get(server.ready.remote())
    crew.start(server)
    first = ray.get(server.report.remote(60.0))
    began, before = time.perf_counter(), _cpu_seconds(pid)
    updates, finished = 0, first.finished
    while not finished:
        report = ray.get(server.report.remote(1.0))
        updates, finished = updates + len(report.updates), report.finished
    seconds, busy = time.perf_counter() - began, _cpu_seconds(pid) - before
    crew.dismiss(server)
    return {
        "updates": updates,
        "updates/s": updates / seconds,
        "server (ms CPU an update)": 1e3 * busy / max(1, updates),
        "copied (MB an update)": _COPIES * size / 1e6,
    }


def _cpu_seconds(pid: int) -> float:
    cells = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(cells[11]) + int(cells[12])) / os.sysconf("SC_CLK_TCK")
