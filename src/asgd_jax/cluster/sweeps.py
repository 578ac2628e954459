"""Sweeps on a cluster: groups of runs become Ray tasks, whose rows land in the same records.csv.

The process that calls `sweep` alone writes to its folder, so a killed sweep goes on like any other.
A task that dies with its process or its node is repeated by Ray. On a CPU every task has a core to
itself: XLA's threads wait for one another, and two processes that share cores can each be several
times slower.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from ml_collections import ConfigDict

from asgd_jax.cluster.session import open_ray, worker_environment
from asgd_jax.training.command import use_compilation_cache
from asgd_jax.training.single_runs import Finished
from asgd_jax.training.state import PyTree
from asgd_jax.training.sweep import MAKE_BLOCKS, group_by_data, make_blocks

_TASKS_PER_SLOT = 2  # a program is compiled once a task; what a lost task repeats is as long
_PASSED_ON = ("TFDS_DATA_DIR", "JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME")
_own_core: list[FileLock] = []  # of this process, held until it ends


@contextmanager
def on_cluster(address: str | None, *, gpus_per_task: float = 0.0) -> Iterator[Any]:
    """Within it every `sweep` of data in memory spreads its runs over a Ray cluster.

    Data sets are read where tasks run: on another node from that node's folder. Sweeps of streamed
    data stay in this process.

    Args:
      address: "auto", HOST:PORT; None or "local" start a cluster on this machine, a slot a core.
      gpus_per_task: that each task has to itself; without any, runs are made on CPUs.

    Raises:
      ValueError: where Ray is not installed, or no cluster answers.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    where = None if address == "local" else address
    with open_ray(where, num_cpus=cores or 1) as ray:

        def spread(
            configs: Sequence[ConfigDict],
            indices: Sequence[int],
            initial: PyTree | None,
            leave_loss: float,
            runs_at_once: int | None,
        ) -> Iterator[Finished]:
            task = _make_task(ray, gpus_per_task)
            slots = max(1, int(ray.cluster_resources().get("CPU", 1)))
            start = ray.put(initial)
            full_train = leave_loss < float("inf")
            waiting = [
                task.remote([configs[k] for k in part], part, start, leave_loss, at_once)
                for part, at_once in _parts(configs, indices, runs_at_once, full_train, slots)
            ]
            while waiting:
                done, waiting = ray.wait(waiting)
                yield from (ray.get(reference) for reference in done)

        token = MAKE_BLOCKS.set(spread)
        try:
            yield ray
        finally:
            MAKE_BLOCKS.reset(token)


def _parts(
    configs: Sequence[ConfigDict],
    indices: Sequence[int],
    runs_at_once: int | None,
    full_train: bool,
    slots: int,
) -> Iterator[tuple[list[int], int]]:
    """Runs for one task each, and how many of them share a `vmap`: all of one program."""
    groups = group_by_data(configs, indices, runs_at_once, full_train)
    for runs in (runs for _, group in groups for runs in group):
        fair = -(-len(runs.indices) // (_TASKS_PER_SLOT * slots))
        size = max(fair, min(runs.at_once, -(-len(runs.indices) // slots)))
        for first in range(0, len(runs.indices), size):
            yield runs.indices[first : first + size], runs.at_once


def _make_task(ray: Any, gpus: float) -> Any:
    environment = worker_environment(accelerator=gpus > 0)
    environment |= {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    options = {"num_cpus": 1, "num_gpus": gpus, "runtime_env": {"env_vars": environment}}
    # The node may go, and come back, as often as it likes.
    return ray.remote(run_part).options(max_retries=-1, **options)


def run_part(
    configs: Sequence[ConfigDict],
    indices: Sequence[int],
    initial: PyTree | None,
    leave_loss: float,
    runs_at_once: int,
) -> Finished:
    """Makes some runs of a sweep in this process, which it gives a core of its own.

    Args:
      configs: of these runs.
      indices: which of the sweep's points they are.
      initial, leave_loss, runs_at_once: see `sweep`.
    """
    hold_core()
    use_compilation_cache()
    own = [config.copy_and_resolve_references() for config in configs]
    for config in own:
        with config.unlocked():
            config.num_devices = 1  # as JAX sees them here
    blocks = make_blocks(own, range(len(own)), initial, leave_loss, runs_at_once)
    return [(indices[place], rows) for block in blocks for place, rows in block]


def hold_core() -> int | None:
    """Binds this process to a core that no other task of this machine has; returns it.

    None where there is none left, or the system cannot bind.
    """
    if _own_core or not hasattr(os, "sched_setaffinity"):
        return None
    folder = Path(tempfile.gettempdir())
    for core in sorted(os.sched_getaffinity(0)):
        lock = FileLock(folder / f"asgd_jax_core_{core}.lock", fallback_to_soft=False)
        try:
            lock.acquire(blocking=False)
        except (Timeout, OSError):
            continue
        _own_core.append(lock)
        os.sched_setaffinity(0, {core})
        return core
    return None
