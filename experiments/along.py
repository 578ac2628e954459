"""Validation error and sharpness along a training run, also within an epoch."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from asgd_jax import curvature, data
from asgd_jax.data.in_memory import Dataset
from asgd_jax.training.chunk import NOT_DIVERGED, make_run_chunk
from asgd_jax.training.feed import feed_of, load_dataset
from asgd_jax.training.folder import rerun
from asgd_jax.training.folder.table import Record, add_runs, open_table, run_key
from asgd_jax.training.optimizer import Values, effective_learning_rate, make_delay_process
from asgd_jax.training.program import Run, build_run, make_model
from asgd_jax.training.state import PyTree
from asgd_jax.training.step import cross_entropy
from asgd_jax.training.sweep import Point, point_config
from asgd_jax.training.sweep_program import Samples, put_samples

_TOLERANCE = 1e-2  # relative, of the sharpness: a picture does not show less


class _Programs(NamedTuple):
    """What runs of one delay share, compiled once: rates and seeds are data."""

    steps_per_epoch: int
    start: Callable[[Values], Any]
    advance: Callable[..., tuple[Any, Any]]  # values, samples, state, epoch, first step, last step
    measure: Callable[..., Any]  # values, samples, state -> mean loss and error of validation


def measure_along(
    config: ConfigDict,
    points: Sequence[Point],
    marks: Sequence[float],
    work: Path,
    *,
    num_sharpness: int = 0,
) -> list[Record]:
    """Trains a run for every point, the same as a sweep's, and measures at fractions of epochs.

    Args:
      config: what all points share; of data that lives in memory.
      points: for each run, the fields that it changes: delay, learning_rate, seed.
      marks: epochs >= 0 after which to measure, rising, to the nearest update.
      work: folder that keeps finished runs.
      num_sharpness: so many of the first training images are what sharpness is measured on, the
        largest eigenvalue of the Hessian of their mean loss, without augmentation; 0 measures none.

    Returns:
      For every point a row a mark: the point's fields, epoch (the mark), steps, validation_loss,
      validation_error, sharpness (NaN where not measured) and diverged_at. A run that diverges ends
      with the row in which it did, whose epoch is where.

    Raises:
      ValueError: for a bad configuration, or a folder that holds other runs.
    """
    configs = [point_config(config, point) for point in points]
    table = open_table(
        work,
        {
            **rerun.fingerprint(config),
            "eval_batch_size": config.eval_batch_size,
            "marks": list(marks),
            "num_sharpness": num_sharpness,
        },
    )
    dataset = load_dataset(config)
    samples = put_samples(dataset, config.eval_batch_size, full_train=False)
    sharpness = _make_sharpness(config, dataset, num_sharpness) if num_sharpness else None
    programs: dict[int, _Programs] = {}
    for point, each in zip(points, configs, strict=True):
        if run_key(point) in table.runs:
            continue
        if each.delay not in programs:
            programs[each.delay] = _make_programs(each, dataset)
        rows = _measure_run(programs[each.delay], each, samples, marks, sharpness)
        table = add_runs(table, {run_key(point): [{**point, **row} for row in rows]})
    return [{**row, **point} for point in points for row in table.runs[run_key(point)]]


def _make_programs(config: ConfigDict, dataset: Dataset) -> _Programs:
    facts = feed_of(config, dataset).facts
    process = make_delay_process(config, 1)

    def run_of(values: Values) -> Run:
        return build_run(config, facts, process=process, values=values)

    def start(values: Values) -> Any:
        return run_of(values).init(jax.random.PRNGKey(values.seed))

    @partial(jax.jit, donate_argnums=2)
    def advance(values: Values, samples: Samples, state: Any, epoch: Any, *steps: Any) -> Any:
        order = data.epoch_batches(values.seed, epoch, facts.plan)
        chunk = make_run_chunk(run_of(values).advance, process.max_delay, config.divergence_loss)
        state, totals = chunk(state, samples.images, samples.labels, order, *steps)
        return state, totals.diverged_at

    def measure(values: Values, samples: Samples, state: Any) -> Any:
        run = run_of(values)
        batches = samples.validation_batches
        return run.measure(state.params, run.statistics(state), batches).means()

    return _Programs(facts.plan.steps_per_epoch, jax.jit(start), advance, jax.jit(measure))


def _measure_run(
    programs: _Programs,
    config: ConfigDict,
    samples: Samples,
    marks: Sequence[float],
    sharpness: Callable[[PyTree], float] | None,
) -> list[Record]:
    per_epoch = programs.steps_per_epoch
    values = Values(
        np.float32(effective_learning_rate(config)),
        np.float32(config.momentum),
        np.int32(config.seed),
    )
    state, diverged_at, done, rows = programs.start(values), NOT_DIVERGED, 0, list[Record]()
    for mark in marks:
        wanted = round(mark * per_epoch)
        while done < wanted and diverged_at == NOT_DIVERGED:
            epoch, first = divmod(done, per_epoch)
            last = min(wanted - epoch * per_epoch, per_epoch)
            state, diverged = programs.advance(values, samples, state, epoch, first, last)
            diverged_at, done = int(diverged), epoch * per_epoch + last
        if diverged_at != NOT_DIVERGED:
            done = diverged_at + 1
        loss, error = programs.measure(values, samples, state)
        fine = diverged_at == NOT_DIVERGED and sharpness is not None
        rows.append(
            {
                "epoch": mark if done == wanted else round(done / per_epoch, 6),
                "steps": done,
                "validation_loss": float(loss),
                "validation_error": float(error),
                "sharpness": sharpness(state.params) if fine and sharpness else float("nan"),
                "diverged_at": diverged_at,
            }
        )
        if diverged_at != NOT_DIVERGED:
            break
    return rows


def _make_sharpness(
    config: ConfigDict, dataset: Dataset, num_samples: int
) -> Callable[[PyTree], float]:
    """The sharpness of the loss of the first training samples; compiled once."""
    smoothed = partial(cross_entropy, smoothing=config.label_smoothing)
    measure = curvature.make_sharpness(batch_mean(config, dataset, smoothed), tol=_TOLERANCE)
    batch = dataset.train_images[:num_samples], dataset.train_labels[:num_samples]
    return lambda params: float(measure(params, [batch]).value)


def batch_mean(
    config: ConfigDict, dataset: Dataset, measure: Callable[[jax.Array, jax.Array], jax.Array]
) -> Callable[[PyTree, tuple[Any, Any]], jax.Array]:
    """Returns `mean(params, (images, labels))`: of `measure(logits, labels)` in evaluation mode.

    Args:
      config: of the model, which must have no BatchNorm.
      dataset: whose images and classes they are.
      measure: a number for every sample.
    """
    model, normalize = make_model(config, dataset.num_classes), data.normalizer(dataset)

    def mean(params: PyTree, batch: tuple[Any, Any]) -> jax.Array:
        logits = model.apply({"params": params}, normalize(batch[0]), train=False)
        return measure(logits, batch[1]).mean()

    return mean
