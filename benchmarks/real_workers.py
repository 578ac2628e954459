"""A real server: updates a second where workers return a constant gradient; needs Ray."""

import importlib.util
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from asgd_jax.cluster.crew import Crew
from asgd_jax.cluster.real_run import open_real_run, real_config
from asgd_jax.cluster.session import open_ray
from asgd_jax.training import default_config
from asgd_jax.training.state import num_params
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
    if importlib.util.find_spec("ray") is None:
        raise Skipped("Ray is not installed: pip install 'asgd-jax[ray]'")
    count, epochs = (1, 1) if options.quick else (7, 5)
    with open_ray(None, num_cpus=_WORKERS + 1, store_bytes=2**29) as ray:
        rows = [measure(ray, epochs) for _ in range(count)]
    rates = np.array([row["updates/s"] for row in rows])
    low, median, high = np.quantile(rates, (0.25, 0.5, 0.75))
    server = float(np.median([row["server (ms CPU an update)"] for row in rows]))
    claim = at_least("updates a second, LeNet-sized gradients", float(median), _WANTED)
    reason = (
        f"quartiles {low:.0f} to {high:.0f}; the server's process takes {server:.2f} ms of CPU an "
        "update, a third of it the update, the rest Ray's calls, its channels and their copies"
    )
    notes = [
        "Workers push one gradient of LeNet (1.72 MB) again and again; heavy ball on the server.",
        f"Bytes copied an update: {_COPIES} sets of parameters. Nothing is sent over a network.",
    ]
    return Result([Table("runs, one after the other", rows)], [goal(claim, reason)], notes)


def measure(ray: Any, epochs: int) -> TableRow:
    """Returns one run's updates a second, from the first report of the server to the last."""
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
    config = real_config(config, _WORKERS)
    run = open_real_run(config)
    size = 4 * num_params(jax.eval_shape(run.programs.init).params)
    crew = Crew(ray, config, ray.put(run.feed.samples), constant=True)
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
