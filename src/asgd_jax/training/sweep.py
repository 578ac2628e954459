"""A grid of training runs, one compiled program for all that share their shapes; resumable."""

import hashlib
import itertools
import tempfile
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from asgd_jax.checksum import checksum
from asgd_jax.data.in_memory import Dataset
from asgd_jax.delays import DelayProcess
from asgd_jax.training import mesh as devices
from asgd_jax.training.command import progress_bar
from asgd_jax.training.config import STREAMED, validate_config
from asgd_jax.training.feed import feed_of, load_dataset, plan_of
from asgd_jax.training.folder import rerun
from asgd_jax.training.folder.table import Record, RunTable, add_runs, open_table, run_key
from asgd_jax.training.optimizer import Values, effective_learning_rate, make_delay_process
from asgd_jax.training.program import make_model, shape_of_params
from asgd_jax.training.single_runs import Finished, refuse_options, train_each, with_epochs
from asgd_jax.training.state import PyTree, num_params
from asgd_jax.training.sweep_program import (
    RunValues,
    Samples,
    Shared,
    compile_runs,
    make_whole_run,
    put_samples,
    rows_of,
)

Point = Mapping[str, Any]

# Fields that are data of a program; whether there is any momentum is its structure.
_VALUES = ("learning_rate", "learning_rate_rule", "momentum", "seed")
_DELAYS = (
    *("delay", "num_workers", "delay_distribution", "delay_std", "worker_schedule"),
    "delay_trace",
)
_ROWS = ("epochs", "eval_every_epochs")  # only how many of the latter the former are is structure
# What the samples on the device depend on.
_DATA = (
    *("dataset", "data_dir", "num_train", "num_validation", "normalize"),
    "eval_batch_size",
)
# A run of `train` may be prolonged and report anew; one of a sweep is its rows.
_REPORTED = (*_ROWS, "log_every_steps")
# How many runs are quickest in one `vmap`, as `make bench` measures: on a CPU convolutions lose by
# it, and of large dense layers the weights of several runs don't fit the caches.
_SMALL_MODEL = 20_000  # parameters
_RUNS_AT_ONCE = 8


class Runs(NamedTuple):
    """Runs of one program.

    Attributes:
      shared: what they share.
      indices: which of the points they are.
      configs: of each.
      at_once: how many of them share a `vmap`.
    """

    shared: Shared
    indices: list[int]
    configs: list[ConfigDict]
    at_once: int


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
            _compiled(configs, in_memory, initial, leave_loss, runs_at_once),
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


def _compiled(
    configs: Sequence[ConfigDict],
    indices: Sequence[int],
    initial: PyTree | None,
    leave_loss: float,
    runs_at_once: int | None,
) -> Iterator[Finished]:
    """Yields finished runs of data that lives in memory, a block at a time."""
    full_train = bool(np.isfinite(leave_loss))
    # All data sets and batch plans are looked at before the first run.
    groups = []
    for alike in _split(indices, [tuple(configs[k][name] for name in _DATA) for k in indices]):
        dataset = load_dataset(configs[alike[0]])
        groups.append((dataset, group_runs(configs, alike, dataset, runs_at_once, full_train)))
    for dataset, group in groups:
        batch_size = group[0].shared.config.eval_batch_size
        samples = put_samples(dataset, batch_size, full_train=full_train)
        for runs in group:
            steps = runs.shared.facts.plan.steps_per_epoch
            for finished in run_blocks(runs, samples, initial, leave_loss):
                yield [(index, with_epochs(rows, steps)) for index, rows in finished]


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


def group_runs(
    configs: Sequence[ConfigDict],
    indices: Sequence[int],
    dataset: Dataset,
    runs_at_once: int | None,
    full_train: bool,
) -> list[Runs]:
    """Returns the runs, those together that one program can do."""
    found = []
    for alike in _split(indices, [_program_key(configs[k], dataset) for k in indices]):
        at_once = runs_at_once or default_runs_at_once(configs[alike[0]], dataset)
        # Runs of one `vmap` measure at the same epochs; others may each have their own.
        fields = _ROWS if at_once > 1 else ()
        for members in _split(alike, [tuple(configs[k][name] for name in fields) for k in alike]):
            mine = [configs[index] for index in members]
            facts = feed_of(mine[0], dataset).facts
            steps_per_epoch = facts.plan.steps_per_epoch
            depth = max(_process(config, steps_per_epoch).max_delay for config in mine)
            early = at_once == 1
            shared = Shared(mine[0], facts, depth, stop_early=early, full_train=full_train)
            found.append(Runs(shared, members, mine, at_once))
    return found


def _split(indices: Sequence[int], keys: Sequence[Hashable]) -> list[list[int]]:
    """The indices, those with equal keys together."""
    groups: dict[Hashable, list[int]] = {}
    for index, key in zip(indices, keys, strict=True):
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def run_blocks(
    runs: Runs, samples: Samples, initial: PyTree | None, leave_loss: float
) -> Iterator[Finished]:
    """Yields finished runs, (index, rows), a block at a time."""
    num_devices = runs.shared.config.num_devices or jax.device_count()
    at_once = min(runs.at_once, -(-len(runs.indices) // num_devices))
    size = at_once * num_devices
    program = compile_runs(make_whole_run(runs.shared), at_once, num_devices)
    stacked = stack_values(runs, leave_loss)
    for start in range(0, len(runs.indices), size):
        members = np.minimum(np.arange(start, start + size), len(runs.indices) - 1)
        block = _take(stacked, members)
        curves = jax.device_get(program(block, samples, initial))
        yield [
            (index, rows_of(_take(curves, offset)))
            for offset, index in enumerate(runs.indices[start : start + size])
        ]


def train_params(config: ConfigDict, dataset: Dataset) -> PyTree:
    """Returns the live parameters at the end of one run."""
    (runs,) = group_runs([config], [0], dataset, 1, False)
    samples = put_samples(dataset, config.eval_batch_size, full_train=False)
    values = _take(stack_values(runs, np.inf), 0)
    return jax.jit(make_whole_run(runs.shared))(values, samples, None)[1]


def _take(tree: PyTree, index: Any) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _program_key(config: ConfigDict, dataset: Dataset) -> str:
    """What decides the shapes and the structure of a run's program, as text."""
    fields = {
        field: value
        for field, value in config.to_dict().items()
        if field not in (*_VALUES, *_DELAYS, *_ROWS)
    }
    if not config.momentum:
        fields |= {"momentum_kind": None, "dampening": None}
    plan = plan_of(config, len(dataset.train_labels))
    fields["samples of an update"] = plan.workers_per_update, plan.worker_batch_size
    fields["rows"] = -(-config.epochs // config.eval_every_epochs)
    return str(sorted(fields.items()))


def default_runs_at_once(config: ConfigDict, dataset: Dataset) -> int:
    """Returns how many runs of a configuration are quickest in one `vmap` on JAX's backend."""
    if jax.default_backend() != "cpu":
        return _RUNS_AT_ONCE
    params = shape_of_params(config, feed_of(config, dataset).facts)
    convolutional = any(leaf.ndim > 2 for leaf in jax.tree.leaves(params))
    return 1 if convolutional or num_params(params) >= _SMALL_MODEL else _RUNS_AT_ONCE


def _process(config: ConfigDict, steps_per_epoch: int) -> DelayProcess:
    return make_delay_process(config, steps_per_epoch * config.epochs)


def stack_values(runs: Runs, leave_loss: float) -> RunValues:
    """Returns the data of all runs, on the host, along a leading axis."""
    steps_per_epoch = runs.shared.facts.plan.steps_per_epoch
    constant = all(config.delay_distribution == "constant" for config in runs.configs)
    num_updates = max(config.epochs for config in runs.configs) * steps_per_epoch
    length = 1 if constant else num_updates + 1
    values = [
        RunValues(
            Values(
                np.float32(effective_learning_rate(config)),
                np.float32(config.momentum),
                np.int64(config.seed).astype(np.int32),  # as `PRNGKey` takes large ones
            ),
            _staleness(config, steps_per_epoch, length),
            np.int32(config.eval_every_epochs),
            np.float32(leave_loss),
        )
        for config in runs.configs
    ]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *values)


def _staleness(config: ConfigDict, steps_per_epoch: int, length: int) -> np.ndarray:
    """What `delayed` would draw for updates 0, 1, ..., in the run of this configuration."""
    process = _process(config, steps_per_epoch)
    key = jax.random.PRNGKey(config.seed)
    draw = jax.vmap(lambda step: process.sample(key, step))
    return np.asarray(draw(jnp.arange(length, dtype=jnp.int32)), np.int32)


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
