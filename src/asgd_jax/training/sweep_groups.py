"""Which runs of a sweep share a program, how many run at once, and the programs themselves."""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from asgd_jax.data.in_memory import Dataset
from asgd_jax.delays import DelayProcess, expected_staleness
from asgd_jax.training.feed import feed_of, plan_of
from asgd_jax.training.optimizer import Values, effective_learning_rate, make_delay_process
from asgd_jax.training.program import shape_of_params
from asgd_jax.training.single_runs import Finished
from asgd_jax.training.state import PyTree, num_params
from asgd_jax.training.sweep_program import (
    Program,
    RunValues,
    Samples,
    Shared,
    compile_runs,
    make_whole_run,
    put_samples,
    rows_of,
)

# Fields that are data of a program; whether there is any momentum is its structure.
_VALUES = ("learning_rate", "learning_rate_rule", "momentum", "seed")
_DELAYS = (
    *("delay", "num_workers", "delay_distribution", "delay_std", "worker_schedule"),
    "delay_trace",
)
ROWS = ("epochs", "eval_every_epochs")  # only how many of the latter the former are is structure
# How many runs are quickest in one `vmap`, as `make bench` measures: on a CPU convolutions lose by
# it, and of large dense layers the weights of several runs don't fit the caches.
_SMALL_MODEL = 20_000  # parameters
_RUNS_AT_ONCE = 8

_KEPT = 16
_programs: OrderedDict[Hashable, Program] = OrderedDict()


class Runs(NamedTuple):
    """Runs of one program.

    Attributes:
      shared: what they share.
      indices: which of the points they are.
      configs: of each.
      at_once: how many of them share a `vmap`.
      key: what decides their program, but for `at_once` and the devices.
    """

    shared: Shared
    indices: list[int]
    configs: list[ConfigDict]
    at_once: int
    key: Hashable


def group_runs(
    configs: Sequence[ConfigDict],
    indices: Sequence[int],
    dataset: Dataset,
    runs_at_once: int | None,
    full_train: bool,
) -> list[Runs]:
    """Returns the runs, those together that one program can do."""
    found = []
    keys = [_program_key(configs[k], dataset) for k in indices]
    constants = [None if each is None else each.tobytes() for each in (dataset.mean, dataset.std)]
    for alike in split_alike(indices, keys):
        at_once = runs_at_once or default_runs_at_once(configs[alike[0]], dataset)
        # Runs of one `vmap` measure at the same epochs; others may each have their own.
        fields = ROWS if at_once > 1 else ()
        rows = [tuple(configs[k][name] for name in fields) for k in alike]
        for members in split_alike(alike, rows):
            mine = [configs[index] for index in members]
            facts = feed_of(mine[0], dataset).facts
            steps_per_epoch = facts.plan.steps_per_epoch
            depth = max(_process(config, steps_per_epoch).max_delay for config in mine)
            early = at_once == 1
            shared = Shared(mine[0], facts, depth, stop_early=early, full_train=full_train)
            key = (
                _program_key(mine[0], dataset),
                *(mine[0][name] for name in fields),
                *(facts.plan, facts.num_classes, facts.image_shape, *constants),
                *shared[2:],
            )
            found.append(Runs(shared, members, mine, at_once, key))
    return found


def split_alike(indices: Sequence[int], keys: Sequence[Hashable]) -> list[list[int]]:
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
    program = _program_of(runs, at_once, num_devices)
    stacked = stack_values(runs, leave_loss)
    for start in range(0, len(runs.indices), size):
        members = np.minimum(np.arange(start, start + size), len(runs.indices) - 1)
        block = take(stacked, members)
        curves = jax.device_get(program(block, samples, initial))
        yield [
            (index, rows_of(take(curves, offset)))
            for offset, index in enumerate(runs.indices[start : start + size])
        ]


def _program_of(runs: Runs, at_once: int, num_devices: int) -> Program:
    """The program of these runs; a search, which sweeps again and again, compiles it once."""
    key = runs.key, at_once, num_devices
    program = _programs.pop(key, None) or compile_runs(
        make_whole_run(runs.shared), at_once, num_devices
    )
    _programs[key] = program  # the last one used is the last one to be forgotten
    if len(_programs) > _KEPT:
        _programs.popitem(last=False)
    return program


def train_params(config: ConfigDict, dataset: Dataset, initial: PyTree | None = None) -> PyTree:
    """Returns the live parameters at the end of one run, from `initial` ones or the seed's."""
    (runs,) = group_runs([config], [0], dataset, 1, False)
    samples = put_samples(dataset, config.eval_batch_size, full_train=False)
    values = take(stack_values(runs, np.inf), 0)
    return jax.jit(make_whole_run(runs.shared))(values, samples, initial)[1]


def take(tree: PyTree, index: Any) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _program_key(config: ConfigDict, dataset: Dataset) -> str:
    """What decides the shapes and the structure of a run's program, as text."""
    fields = {
        field: value
        for field, value in config.to_dict().items()
        if field not in (*_VALUES, *_DELAYS, *ROWS)
    }
    if not config.momentum:
        fields |= {"momentum_kind": None, "dampening": None}
    if config.delay_distribution == "pipeline":
        fields["delays by stage"] = config.delay
    # What is done against staleness knows these when it is compiled.
    if config.compensate == "delay_adaptive":
        fields["delay of the compensation"] = config.delay
    if config.predict == "optimizer" or config.compensate == "gap_aware":
        fields["momentum of both"] = config.momentum
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
    constant = all(config.delay_distribution in ("constant", "pipeline") for config in runs.configs)
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
            np.int32(expected_staleness(_process(config, steps_per_epoch))),
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
