"""A real run as its driver sees it: its configuration, its evaluation, and what it saves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from asgd_jax import delays
from asgd_jax.cluster.policy import policy_of
from asgd_jax.cluster.programs import Programs, make_programs
from asgd_jax.cluster.server import Saved, Snapshot, Wasted, host_totals
from asgd_jax.cluster.worker_times import parse_worker_times
from asgd_jax.data.numbered import steps_per_shard
from asgd_jax.training import mesh as devices
from asgd_jax.training.chunk import NOT_DIVERGED
from asgd_jax.training.config import STREAMED, default_config, validate_config
from asgd_jax.training.feed import Feed, open_feed
from asgd_jax.training.folder.metrics import Row
from asgd_jax.training.folder.provenance import plain, read_json
from asgd_jax.training.loop import is_evaluated, learning_rate_of
from asgd_jax.training.placement import jitted
from asgd_jax.training.program import build_run, make_model
from asgd_jax.training.progress import Progress, add_chunk, chunk_row, no_progress
from asgd_jax.training.recorded import num_shards_of
from asgd_jax.training.setup import Setup, make_validation
from asgd_jax.training.state import TrainState

# Ways of the simulator's to use devices; a worker is a process of its own.
_SIMULATED = ("shard_history", "history_dtype", "multihost")


class RealRun(NamedTuple):
    """Data, programs and evaluation of a run.

    Attributes:
      config: see `real_config`.
      feed: its data, in memory.
      programs: the two programs, and the first state.
      validate: `validate(state)`: loss and error on the validation set.
    """

    config: ConfigDict
    feed: Feed
    programs: Programs
    validate: Callable[[TrainState], tuple[jax.Array, jax.Array]]


def real_config(config: ConfigDict, num_workers: int | None = None) -> ConfigDict:
    """Returns what N real workers make of a configuration: delay N - 1, as they measure it.

    An update is one worker's batch. `learning_rate_rule` goes by the delay N - 1, the mean
    staleness of N workers.

    Args:
      config: any that `train` takes, of data in memory.
      num_workers: in the place of the configuration's.

    Raises:
      ValueError: for what only a simulation can do, or a bad value.

    >>> real_config(default_config(), 4).delay
    3
    """
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.num_workers = config.num_workers if num_workers is None else num_workers
        if config.num_workers < 1:
            raise ValueError(f"num_workers must be >= 1, got {config.num_workers}")
        config.delay = config.num_workers - 1
        config.delay_distribution, config.delay_trace = "measured", None
        config.num_devices = 1
    validate_config(config)
    for field in _SIMULATED:
        if config[field]:
            raise ValueError(
                f"{field}={config[field]!r} is for simulated workers: leave it out, real ones are "
                "processes of their own"
            )
    if config.parallelism != "jit":
        raise ValueError(
            f"parallelism={config.parallelism!r} is for simulated workers: use 'jit', with which "
            "every real one has its own process"
        )
    if config.dataset in STREAMED:
        raise ValueError(
            f"dataset={config.dataset!r} is streamed, and real workers share data in memory: use "
            "digits, mnist, cifar10 or cifar100"
        )
    policy_of(config)
    parse_worker_times(config.worker_times)
    return config


def open_real_run(config: ConfigDict) -> RealRun:
    """Reads the data of a configuration and builds what it needs.

    Raises:
      ValueError: for a bad configuration, or shards that are too small.
      DatasetNotFoundError: when the data is neither prepared nor downloadable.
    """
    make_model(config, num_classes=1)  # a bad name or option is refused before data is read
    feed = open_feed(config)
    steps_per_shard(feed.facts.plan, num_shards_of(config))
    programs, mesh = make_programs(config, feed.facts), devices.make_mesh(1)
    run = build_run(config, feed.facts, process=delays.constant(0), mesh=mesh)
    state = programs.init()
    setup = Setup(feed, run, mesh, jitted(mesh, devices.replicated(mesh)), state)
    return RealRun(config, feed, programs, make_validation(config, setup))


def load_real_config(workdir: Path) -> ConfigDict:
    """Returns the configuration of the real run in a folder.

    Raises:
      ValueError: where there is none.
    """
    saved = read_json(workdir / "config.json")
    if saved is None or saved.get("delay_distribution") != "measured":
        raise ValueError(
            f"{workdir} holds no run of real workers: name a workdir of train_async.py"
        )
    config = default_config()
    for name, value in saved.items():
        config[name] = tuple(value) if isinstance(value, list) else value
    return config


def make_row_of(run: RealRun) -> Callable[[Snapshot], Row]:
    """Returns `row_of(snapshot)`: the row of metrics.csv, as `train` writes it.

    The gap is that of the last gradient applied: which one will be next nobody knows.
    """
    config, steps_per_epoch = run.config, run.feed.facts.plan.steps_per_epoch
    learning_rate = learning_rate_of(config, steps_per_epoch)

    def row_of(snapshot: Snapshot) -> Row:
        step, totals = snapshot.step, snapshot.totals
        rate = learning_rate(step)
        row = chunk_row(step, steps_per_epoch, rate, totals, snapshot.gap, snapshot.seconds)
        epoch, place = divmod(step - 1, steps_per_epoch)
        evaluated = is_evaluated(config, steps_per_epoch, epoch, place + 1)
        if evaluated or totals.diverged_at != NOT_DIVERGED:
            assert snapshot.saved is not None, "a snapshot to be evaluated has its state"
            loss, error = run.validate(snapshot.saved.state)
            row |= {"validation_loss": float(loss), "validation_error": float(error)}
        return row

    return row_of


def add_snapshot(reached: Progress, snapshot: Snapshot, row: Row, wall_seconds: float) -> Progress:
    """Returns the progress after the updates of a snapshot, whose row is `row`."""
    size = max(len(reached.staleness), np.size(snapshot.totals.staleness))

    def grown(histogram: Any) -> np.ndarray:
        return np.pad(np.asarray(histogram), (0, size - np.size(histogram)))

    histogram = grown(snapshot.totals.staleness)
    totals = host_totals(**snapshot.totals._asdict() | {"staleness": histogram})
    reached = reached._replace(staleness=grown(reached.staleness).tolist())
    return add_chunk(reached, totals, row, snapshot.seconds, wall_seconds)


def to_json(reached: Progress, saved: Saved) -> dict[str, Any]:
    """Returns what a checkpoint keeps beside the state."""
    server = {name: value for name, value in saved._asdict().items() if name != "state"}
    server |= {"totals": saved.totals._asdict(), "wasted": saved.wasted._asdict()}
    content: dict[str, Any] = plain({**reached._asdict(), "server": server})
    return content


def from_json(content: dict[str, Any], state: TrainState) -> tuple[Progress, Saved]:
    """Returns what `to_json` was given, with the state that was saved beside it."""
    server = dict(content["server"])
    totals = dict(server.pop("totals"))
    totals["staleness"] = np.asarray(totals["staleness"], np.int64)
    server |= {
        "totals": host_totals(**totals),
        "wasted": Wasted(**server["wasted"]),
        "state": jax.device_get(state),
    }
    rest = {name: value for name, value in content.items() if name != "server"}
    return Progress(**rest), Saved(**server)


def fresh_progress() -> Progress:
    """Returns the progress of a run that has made no update."""
    return no_progress(0)
