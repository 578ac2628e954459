"""A grid of training runs, one compiled program for all that share their shapes; resumable."""

import hashlib
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from asgd_jax.checksum import checksum
from asgd_jax.data.in_memory import Dataset
from asgd_jax.training import mesh as devices
from asgd_jax.training.command import progress_bar
from asgd_jax.training.config import STREAMED, validate_config
from asgd_jax.training.feed import load_dataset
from asgd_jax.training.folder import rerun
from asgd_jax.training.folder.table import Record, RunTable, add_runs, open_table, run_key
from asgd_jax.training.optimizer import make_delay_process
from asgd_jax.training.program import make_model
from asgd_jax.training.recorded import is_recorded, refuse_real_workers
from asgd_jax.training.single_runs import Finished, refuse_options, train_each, with_epochs
from asgd_jax.training.state import PyTree
from asgd_jax.training.sweep_groups import ROWS, Runs, group_runs, run_blocks, split_alike
from asgd_jax.training.sweep_program import put_samples

Point = Mapping[str, Any]

# What the samples on the device depend on.
_DATA = (
    *("dataset", "data_dir", "num_train", "num_validation", "normalize"),
    "eval_batch_size",
)
# A run of `train` may be prolonged and report anew; one of a sweep is its rows.
_REPORTED = (*ROWS, "log_every_steps")


BlockMaker = Callable[
    [Sequence[ConfigDict], Sequence[int], PyTree | None, float, int | None], Iterator[Finished]
]


def sweep(
    config: ConfigDict,
    points: Sequence[Point],
    *,
    work: str | Path | None = None,
    runs_at_once: int | None = None,
    initial: PyTree | None = None,
    leave_loss: float = np.inf,
    progress: bool = True,
) -> list[Record]:
    """Trains a run for every point, as `train` would, and returns their curves as flat records.

    Runs that differ in learning rate, delay (constant or random), momentum or seed are one compiled
    program: the ring has the depth of the largest delay, the rest is data. Points that change
    shapes (samples of an update, kind of momentum, model, ...) make a program for each shape. A run
    that diverges is recorded and stops none of the others.

    Args:
      config: what all points share; see `training.default_config`. Data that is streamed is no part
        of a compiled program: `train` makes these runs one after another.
      points: for each run, the fields that it changes; all points name the same fields.
      work: folder of records.csv. Runs found there are not repeated, so that a killed sweep goes
        on where it was. A temporary one by default.
      runs_at_once: runs of one `vmap`; the rest follow by `lax.map`. By default 8; on a CPU 1 for
        models with convolutions or above 20,000 parameters. Runs are divided over the devices of
        `config.num_devices` besides: on a CPU, a device a core makes a sweep 1.5 to 2 times as fast
        on two cores (`command.use_a_device_a_core`).
      initial: parameters to start every run from, with a history full of them; those of the run's
        seed by default.
      leave_loss: a run ends when its loss on the whole training set, in evaluation mode, exceeds
        this (or is not finite) at two rows in a row; the column full_train_loss has that loss,
        full_train_error the share of that set that is told wrongly.
      progress: show a progress bar on a terminal.

    Returns:
      Records in the order of points, one for each `eval_every_epochs`: the point's fields, epoch,
      steps, train_loss, train_error, full_train_loss, full_train_error, validation_loss,
      validation_error, diverged_at (the update, or -1). A run that diverges or leaves ends with
      that row.

    Raises:
      ValueError: for a bad configuration or point, or a folder that holds another sweep.
      DatasetNotFoundError: when the data is neither prepared nor downloadable.
    """
    if runs_at_once is not None and runs_at_once < 1:
        raise ValueError(f"runs_at_once must be >= 1, got {runs_at_once}: 1 runs them one by one")
    if not points:
        return []
    configs = [point_config(config, point) for point in points]
    if any(map(_is_streamed, configs)):
        refuse_options(initial, leave_loss)
    points = _resolved(points, configs)
    keys = [run_key(_identity(point, each)) for point, each in zip(points, configs, strict=True)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch if work is None else work)
        table = open_table(folder, _fingerprint(config, points, initial, leave_loss))
        last = {key: k for k, key in enumerate(keys)}  # of points that are equal one is run
        missing = sorted(k for key, k in last.items() if key not in table.runs)
        names = [hashlib.sha256(key.encode()).hexdigest()[:16] for key in keys]
        folders = {k: folder / "runs" / names[k] for k in missing if _is_streamed(configs[k])}
        in_memory = [k for k in missing if k not in folders]
        blocks = itertools.chain(
            MAKE_BLOCKS.get()(configs, in_memory, initial, leave_loss, runs_at_once),
            train_each(configs, folders, progress=progress),
        )
        total = sum(configs[k].epochs for k in missing)
        with progress_bar(total, unit="epoch", show=progress) as bar:
            for finished in blocks:
                rows = {keys[k]: [{**points[k], **row} for row in found] for k, found in finished}
                table = add_runs(table, rows)
                bar.update(sum(configs[k].epochs for k, _ in finished))
    return _in_order(table, keys, points)


def _in_order(table: RunTable, keys: Sequence[str], points: Sequence[Point]) -> list[Record]:
    """The records of all points, with their own values: a table rounds, or turns into text."""
    return [
        {**record, **point}
        for key, point in zip(keys, points, strict=True)
        for record in table.runs[key]
    ]


def _is_streamed(config: ConfigDict) -> bool:
    return config.dataset in STREAMED


def make_blocks(
    configs: Sequence[ConfigDict],
    indices: Sequence[int],
    initial: PyTree | None,
    leave_loss: float,
    runs_at_once: int | None,
) -> Iterator[Finished]:
    """Yields finished runs of data that lives in memory, a block at a time.

    Args:
      configs: of all runs.
      indices: of those to make.
      initial, leave_loss, runs_at_once: see `sweep`.
    """
    full_train = bool(np.isfinite(leave_loss))
    for dataset, group in group_by_data(configs, indices, runs_at_once, full_train):
        batch_size = group[0].shared.config.eval_batch_size
        samples = put_samples(dataset, batch_size, full_train=full_train)
        for runs in group:
            steps = runs.shared.facts.plan.steps_per_epoch
            for finished in run_blocks(runs, samples, initial, leave_loss):
                yield [(index, with_epochs(rows, steps)) for index, rows in finished]


# Who makes the blocks of a sweep: this process, or a cluster (`cluster.sweeps`).
MAKE_BLOCKS: ContextVar[BlockMaker] = ContextVar("make_blocks", default=make_blocks)


def group_by_data(
    configs: Sequence[ConfigDict],
    indices: Sequence[int],
    runs_at_once: int | None,
    full_train: bool,
) -> list[tuple[Dataset, list[Runs]]]:
    """Returns the data sets of these runs, each with the programs that need it.

    All data sets and batch plans are looked at before the first run.
    """
    groups = []
    for alike in split_alike(indices, [tuple(configs[k][name] for name in _DATA) for k in indices]):
        dataset = load_dataset(configs[alike[0]])
        groups.append((dataset, group_runs(configs, alike, dataset, runs_at_once, full_train)))
    return groups


def point_config(config: ConfigDict, point: Point) -> ConfigDict:
    """Returns the configuration of a point, checked.

    Raises:
      ValueError: for a field or value that is refused, or one that a sweep cannot do.
    """
    changed = config.copy_and_resolve_references()
    for field, value in point.items():
        if field not in changed:
            raise ValueError(f"points change {field!r}, which is no field of a configuration")
        try:
            changed[field] = jax.tree.map(_plain, value)
        except TypeError as error:
            kind = config.get_type(field).__name__
            raise ValueError(f"a point has {field}={value!r}: it must be of type {kind}") from error
    validate_config(changed)
    refuse_real_workers(changed)
    if is_recorded(changed):
        raise ValueError(
            f"delay_trace={changed.delay_trace!r} has batches of its own, which a sweep does not "
            "replay: use training.train, or a trace of staleness alone"
        )
    make_model(changed, num_classes=1)  # a bad name or option
    devices.make_mesh(changed.num_devices)
    make_delay_process(changed, 1)  # a bad trace
    if not _is_streamed(changed):
        if changed.epochs % changed.eval_every_epochs:
            raise ValueError(
                f"epochs={changed.epochs} is no multiple of "
                f"eval_every_epochs={changed.eval_every_epochs}, which a sweep needs: change either"
            )
        refused = {"batch_stats": ("recalibrate",), "parallelism": ("pmap", "workers")}
        for field, values in refused.items():
            if changed[field] in values:
                raise ValueError(
                    f"{field}={changed[field]!r} is not done in a sweep: use the default"
                )
    return changed


def _plain(value: Any) -> Any:
    """A number of NumPy's or JAX's as one of Python's."""
    return value.tolist() if hasattr(value, "tolist") else value


def _resolved(points: Sequence[Point], configs: Sequence[ConfigDict]) -> list[dict[str, Any]]:
    """The points as their configurations hold them: 1 is 1.0 for a float, no value is an array's.

    Raises:
      ValueError: when a point names other fields than the first.
    """
    for point in points:
        if set(point) != set(points[0]):
            raise ValueError(
                f"all points must name the same fields: {sorted(points[0])} and {sorted(point)}"
            )
    held = [config.to_dict() for config in configs]
    return [
        {field: values[field] for field in point}
        for point, values in zip(points, held, strict=True)
    ]


def _identity(point: Point, config: ConfigDict) -> dict[str, Any]:
    """What a run's key holds: the point, and the content of the trace that it names."""
    trace = rerun.trace_checksum(config)
    return dict(point) if trace is None else {**point, "trace": trace}


def _fingerprint(
    config: ConfigDict, points: Sequence[Point], initial: PyTree | None, leave_loss: float
) -> dict[str, Any]:
    start = None if initial is None else int(checksum(initial))
    return rerun.fingerprint(config) | {
        **{field: config[field] for field in _REPORTED},
        "fields of a point": sorted(points[0]),
        "initial": start,
        "leave_loss": f"{leave_loss:.6g}",
    }
