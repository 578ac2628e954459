"""Whole training runs as one compiled program: rates, delays, momenta and seeds are its data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from asgd_jax import data
from asgd_jax.data.in_memory import Dataset
from asgd_jax.delays import DelayProcess
from asgd_jax.training import mesh as devices
from asgd_jax.training.chunk import (
    NOT_DIVERGED,
    ChunkTotals,
    make_run_chunk,
    merge_totals,
    zero_totals,
)
from asgd_jax.training.evaluate import pad_to_batches
from asgd_jax.training.optimizer import Values
from asgd_jax.training.program import DataSpec, Run, build_run
from asgd_jax.training.state import PyTree, TrainState


class RunValues(NamedTuple):
    """The data of one run; stacked along a leading axis, those of many.

    Attributes:
      optimizer: learning rate, momentum (float32) and seed (int32).
      staleness: int32 array; that of update t is entry t modulo its length.
      expected_staleness: int32, its mean, by which predictions look ahead.
      epochs_per_row: int32, epochs between two measurements.
      leave_loss: float32; a run ends when its loss on the whole training set, in evaluation mode,
        exceeds it at two measurements in a row. Infinity measures no such loss.
    """

    optimizer: Values
    staleness: Any
    expected_staleness: Any
    epochs_per_row: Any
    leave_loss: Any


class Curve(NamedTuple):
    """What a run measured, a row per `epochs_per_row` epochs; rows after its end are not written.

    Attributes:
      steps: int32, updates made since the start; 0 marks a row that is not written.
      train_loss, train_error: means over the updates of the row, at the stale parameters.
      full_train_loss, full_train_error: over the whole training set, live parameters; NaN when
        not asked for.
      validation_loss, validation_error: over the whole validation set, live parameters.
      diverged_at: int32, the update at which the loss was not finite or too large, or -1.
    """

    steps: Any
    train_loss: Any
    train_error: Any
    full_train_loss: Any
    full_train_error: Any
    validation_loss: Any
    validation_error: Any
    diverged_at: Any


class Samples(NamedTuple):
    """The data set on the device: training samples, and both sets cut into evaluation batches."""

    images: Any
    labels: Any
    train_batches: tuple[Any, Any]
    validation_batches: tuple[Any, Any]


def put_samples(dataset: Dataset, batch_size: int, *, full_train: bool) -> Samples:
    """Returns a data set on the device; `full_train` adds what measuring `leave_loss` needs."""
    kept = slice(None) if full_train else slice(0, 1)
    train = pad_to_batches(dataset.train_images[kept], dataset.train_labels[kept], batch_size)
    validation = pad_to_batches(dataset.validation_images, dataset.validation_labels, batch_size)
    return jax.device_put(
        Samples(dataset.train_images, dataset.train_labels, train, validation),
    )


WholeRun = Callable[[RunValues, Samples, PyTree | None], tuple[Curve, PyTree]]
Program = Callable[[RunValues, Samples, PyTree | None], Curve]  # of a block of runs


class Shared(NamedTuple):
    """What the runs of one program share.

    Attributes:
      config: its `epochs` and `eval_every_epochs` give the number of rows; fields that are in
        `RunValues` are not read, but for whether there is any momentum.
      facts: of the data set.
      max_delay: the largest staleness of all runs; sizes the ring.
      stop_early: whether a run ends when it diverges or leaves. Not under `vmap`: `make_run_chunk`
        says why.
      full_train: whether the loss over the training set is measured.
    """

    config: ConfigDict
    facts: DataSpec
    max_delay: int
    stop_early: bool
    full_train: bool


class _Carry(NamedTuple):
    row: jax.Array
    epoch: jax.Array
    state: TrainState
    above: jax.Array  # whether the last measurement exceeded leave_loss
    ended: jax.Array
    curve: Curve


def make_whole_run(shared: Shared) -> WholeRun:
    """Returns `run(values, samples, initial)`: a run from its first update to its last, pure.

    It gives the curve and the final live parameters. `initial` parameters take the place of the
    seed's where given, and fill the history.
    """
    config, facts = shared.config, shared.facts
    num_rows = -(-config.epochs // config.eval_every_epochs)

    def unfinished(carry: _Carry) -> jax.Array:
        more = carry.row < num_rows
        return more & ~carry.ended if shared.stop_early else more

    def whole(values: RunValues, samples: Samples, initial: PyTree | None) -> tuple[Curve, PyTree]:
        process = _delay_process(values, shared.max_delay)
        run = build_run(config, facts, process=process, values=values.optimizer)
        train_row = _make_train_row(shared, run)
        state = run.init(jax.random.PRNGKey(values.optimizer.seed), initial)

        def next_row(carry: _Carry) -> _Carry:
            state, totals = train_row(values, samples, carry.state, carry.epoch)
            full, (loss, error) = _measure(shared, run, samples, state)
            means = totals.loss / totals.steps, totals.error / totals.steps
            # Runs of one `vmap` go on together: one that has ended writes no more rows.
            steps = jnp.where(carry.ended, 0, state.step)
            row = Curve(steps, *means, *full, loss, error, totals.diverged_at)
            above = ~(full[0] <= values.leave_loss) & shared.full_train  # NaN is above
            diverged = totals.diverged_at != NOT_DIVERGED
            return _Carry(
                row=carry.row + 1,
                epoch=carry.epoch + values.epochs_per_row,
                state=state,
                above=above,
                ended=carry.ended | diverged | (above & carry.above),
                curve=jax.tree.map(lambda old, new: old.at[carry.row].set(new), carry.curve, row),
            )

        zero, no = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
        first = _Carry(zero, zero, state, no, no, _empty_curve(num_rows))
        last = jax.lax.while_loop(unfinished, next_row, first)
        return last.curve, last.state.params

    return whole


def _delay_process(values: RunValues, max_delay: int) -> DelayProcess:
    """The recorded staleness, whose length is the program's and whose values are the run's."""
    length = values.staleness.shape[0]
    return DelayProcess(
        max_delay,
        None,
        lambda key, step: values.staleness[step % length],
        mean=values.expected_staleness,
    )


def _make_train_row(
    shared: Shared, run: Run
) -> Callable[[RunValues, Samples, TrainState, jax.Array], tuple[TrainState, ChunkTotals]]:
    """Returns `train_row(values, samples, state, epoch)`: the epochs from one row to the next."""
    config, plan, early = shared.config, shared.facts.plan, shared.stop_early
    run_chunk = make_run_chunk(
        run.advance, shared.max_delay, config.divergence_loss, stop_early=early
    )

    def train_row(
        values: RunValues, samples: Samples, state: TrainState, epoch: jax.Array
    ) -> tuple[TrainState, ChunkTotals]:
        def train_epoch(index: jax.Array, carry: Any) -> Any:
            state, totals = carry
            order = data.epoch_batches(values.optimizer.seed, epoch + index, plan)
            fine = totals.diverged_at == NOT_DIVERGED
            stop = jnp.where(fine, plan.steps_per_epoch, 0) if early else len(order)
            state, more = run_chunk(state, samples.images, samples.labels, order, 0, stop)
            return state, merge_totals(totals, more)

        # Under vmap a number of epochs that differs between runs would batch the whole state.
        count = values.epochs_per_row if early else config.eval_every_epochs
        first = state, zero_totals(shared.max_delay)
        return jax.lax.fori_loop(0, count, train_epoch, first)

    return train_row


def _measure(
    shared: Shared, run: Run, samples: Samples, state: TrainState
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Loss and error over the training set (NaN if not asked for), and over the validation set."""
    stats = run.statistics(state)
    unseen = run.measure(state.params, stats, samples.validation_batches).means()
    if not shared.full_train:
        return (jnp.full((), jnp.nan), jnp.full((), jnp.nan)), unseen
    return run.measure(state.params, stats, samples.train_batches).means(), unseen


def _empty_curve(num_rows: int) -> Curve:
    numbers, counts = jnp.full(num_rows, jnp.nan), jnp.zeros(num_rows, jnp.int32)
    return Curve(counts, *(numbers,) * 6, counts + NOT_DIVERGED)


def compile_runs(run: WholeRun, runs_at_once: int, num_devices: int | None) -> Program:
    """Returns the program for a block of runs, split over the devices.

    Each device takes its share of the leading axis, `runs_at_once` at a time by `vmap` and the
    next ones after them.
    """
    mesh = devices.make_mesh(num_devices)
    split, whole = PartitionSpec(devices.AXIS), PartitionSpec()

    def block(values: RunValues, samples: Samples, initial: PyTree | None) -> Curve:
        def one(values: RunValues) -> Curve:
            return run(values, samples, initial)[0]

        if runs_at_once == 1:
            return jax.lax.map(one, values)
        return jax.lax.map(one, values, batch_size=runs_at_once)

    return jax.jit(
        jax.shard_map(
            block,
            mesh=mesh,
            in_specs=(split, whole, whole),
            out_specs=split,
            check_vma=False,
        )
    )


def rows_of(curve: Curve) -> list[dict[str, float | int]]:
    """Returns the rows of one run up to its end, from its curve on the host."""
    kept = int((np.asarray(curve.steps) > 0).sum())
    columns = {name: np.asarray(column) for name, column in curve._asdict().items()}
    return [{name: column[row].item() for name, column in columns.items()} for row in range(kept)]
