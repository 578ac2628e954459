"""A run from its configuration to its summary: set up, train in chunks, evaluate, report."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from asgd_jax import data, models, stability
from asgd_jax.delays import DelayProcess
from asgd_jax.training import metrics, optimizer, report
from asgd_jax.training.chunk import NOT_DIVERGED, ChunkTotals, make_run_chunk, merge_totals
from asgd_jax.training.config import validate_config
from asgd_jax.training.evaluate import Evaluate, make_evaluate
from asgd_jax.training.state import TrainState, init_state, num_params
from asgd_jax.training.step import TrainStep, gap, make_train_step


class Setup(NamedTuple):
    """Everything that a configuration determines, before the first update."""

    dataset: data.Dataset
    plan: data.BatchPlan
    process: DelayProcess
    model: nn.Module
    tx: optax.GradientTransformationExtraArgs
    train_step: TrainStep
    state: TrainState


def set_up(config: ConfigDict) -> Setup:
    """Checks the configuration, loads the data and builds model, optimizer, step and first state.

    Raises:
      ValueError: one line that names the field, the value and the remedy.
      DatasetNotFoundError: when the data is neither prepared nor downloadable.
    """
    validate_config(config)
    model = models.create(
        config.model,
        num_classes=1,  # only the name and the options are checked before the data is read
        **_model_options(config),
    )
    dataset = data.load(
        config.dataset,
        data_dir=config.data_dir,
        num_train=config.num_train,
        num_validation=config.num_validation,
        normalize=config.normalize,
    )
    plan = data.plan_batches(
        len(dataset.train_labels),
        num_workers=config.num_workers,
        worker_batch_size=config.worker_batch_size,
        delay=config.delay,
    )
    model = models.create(config.model, num_classes=dataset.num_classes, **_model_options(config))
    process = optimizer.make_delay_process(config, plan.steps_per_epoch * config.epochs)
    tx = optimizer.make_optimizer(config, process, plan.steps_per_epoch)
    normalize = data.normalizer(dataset)
    augment = data.augmenter(config.dataset) if config.augment else lambda key, images: images
    train_step = make_train_step(
        model, tx, lambda key, images: normalize(augment(key, images)), config.label_smoothing
    )
    state = init_state(model, tx, dataset.train_images.shape[1:], config.seed)
    return Setup(dataset, plan, process, model, tx, train_step, state)


def train(config: ConfigDict, workdir: str | Path, *, progress: bool = True) -> dict[str, Any]:
    """Runs a configuration and returns its summary.

    `workdir` receives config.json, metrics.csv, TensorBoard events and, at the end, summary.json.
    A run that diverges ends there: its summary says `"status": "diverged"` and at which step.

    Args:
      config: see `default_config`.
      workdir: folder of this run, made if it does not exist.
      progress: show a progress bar on a terminal.

    Raises:
      ValueError: for a bad configuration, or a folder that holds a run already.
      DatasetNotFoundError: when the data is neither prepared nor downloadable.
      OSError: when the folder cannot be written to.
    """
    started = time.perf_counter()
    setup = set_up(config)
    workdir = Path(workdir)
    if (workdir / "metrics.csv").exists():
        raise ValueError(
            f"workdir={str(workdir)!r} holds a run already: name another, or delete it"
        )
    workdir.mkdir(parents=True, exist_ok=True)
    report.write_json(workdir / "config.json", config.to_dict())
    writer = metrics.open_writer(workdir)
    try:
        outcome = _run(config, setup, writer, progress)
    finally:
        writer.close()
    summary = _summarize(config, setup, outcome)
    summary["wall_time_s"] = round(time.perf_counter() - started, 3)
    report.write_json(workdir / "summary.json", summary)
    return summary


class _Outcome(NamedTuple):
    """What a run leaves behind: its rows, the totals of all updates and the time they took."""

    rows: list[metrics.Row]
    totals: ChunkTotals
    train_seconds: float


def _run(config: ConfigDict, setup: Setup, writer: metrics.Writer, progress: bool) -> _Outcome:
    from tqdm import tqdm

    dataset, plan, state = setup.dataset, setup.plan, setup.state
    images, labels = jax.device_put((dataset.train_images, dataset.train_labels))
    run_chunk = make_run_chunk(setup.train_step, setup.process.max_delay, config.divergence_loss)
    order_of = jax.jit(lambda epoch: data.epoch_batches(config.seed, epoch, plan))
    evaluate = _make_validation(config, setup)
    measure_gap = jax.jit(gap)
    learning_rate = _learning_rate_of(config, setup)

    rows: list[metrics.Row] = []
    overall: ChunkTotals | None = None
    train_seconds = 0.0
    show = progress and sys.stderr.isatty()
    with tqdm(total=plan.steps_per_epoch * config.epochs, unit="step", disable=not show) as bar:
        for epoch, start, stop in _chunks(config, plan.steps_per_epoch):
            before = time.perf_counter()
            state, totals = run_chunk(state, images, labels, order_of(epoch), start, stop)
            totals = jax.device_get(totals)
            seconds = time.perf_counter() - before
            train_seconds += seconds
            step = int(totals.steps) + epoch * plan.steps_per_epoch + start
            norm, distance, relative = (float(value) for value in measure_gap(state))
            row: metrics.Row = {
                "step": step,
                "epoch": round(step / plan.steps_per_epoch, 6),
                "learning_rate": learning_rate(step),
                "parameter_norm": norm,
                "gap": distance,
                "relative_gap": relative,
                "steps_per_second": int(totals.steps) / seconds,
            } | metrics.summarize(totals)
            diverged = totals.diverged_at != NOT_DIVERGED
            if _is_evaluated(config, plan.steps_per_epoch, epoch, stop) or diverged:
                loss, error = evaluate(state.params, state.batch_stats)
                row |= {"validation_loss": float(loss), "validation_error": float(error)}
                bar.set_postfix(validation_error=f"{float(error):.2%}")
            writer.write(row, totals.staleness)
            rows.append(row)
            overall = totals if overall is None else merge_totals(overall, totals)
            bar.update(int(totals.steps))
            if diverged:
                break
    assert overall is not None
    return _Outcome(rows, overall, train_seconds)


def _chunks(config: ConfigDict, steps_per_epoch: int) -> Iterator[tuple[int, int, int]]:
    """Yields (epoch, start, stop): chunks end where a row is due, and never cross an epoch."""
    length = min(config.log_every_steps or steps_per_epoch, steps_per_epoch)
    for epoch in range(config.epochs):
        for start in range(0, steps_per_epoch, length):
            yield epoch, start, min(start + length, steps_per_epoch)


def _is_evaluated(config: ConfigDict, steps_per_epoch: int, epoch: int, stop: int) -> bool:
    due = (epoch + 1) % config.eval_every_epochs == 0 or epoch + 1 == config.epochs
    return stop == steps_per_epoch and due


def _make_validation(config: ConfigDict, setup: Setup) -> Evaluate:
    return make_evaluate(
        setup.model,
        data.normalizer(setup.dataset),
        setup.dataset.validation_images,
        setup.dataset.validation_labels,
        config.eval_batch_size,
    )


def _learning_rate_of(config: ConfigDict, setup: Setup) -> Any:
    """Returns the learning rate of the last of `step` updates, regime included."""
    peak = optimizer.effective_learning_rate(config)
    multiplier = jax.jit(optimizer.make_multiplier(config, setup.plan.steps_per_epoch))
    return lambda step: peak * float(multiplier(np.int32(max(step - 1, 0))))


def _model_options(config: ConfigDict) -> dict[str, Any]:
    return {
        "width": config.width,
        "dtype": config.dtype,
        "conv_impl": config.conv_impl,
        **config.model_options.to_dict(),
    }


def _summarize(config: ConfigDict, setup: Setup, outcome: _Outcome) -> dict[str, Any]:
    diverged_at = int(outcome.totals.diverged_at)
    errors = [row.get("validation_error") for row in outcome.rows]
    mean, largest = metrics.staleness_summary(np.asarray(outcome.totals.staleness))
    return {
        "status": "completed" if diverged_at == NOT_DIVERGED else "diverged",
        "diverged_at_step": None if diverged_at == NOT_DIVERGED else diverged_at,
        "steps": int(outcome.totals.steps),
        "learning_rate": optimizer.effective_learning_rate(config),
        "sharpest_stable_minimum": _sharpest_stable_minimum(config, setup.process),
        "final": outcome.rows[-1],
        "best_validation_error": min(error for error in errors if error is not None),
        "staleness": {
            "mean": mean,
            "max": largest,
            "histogram": np.asarray(outcome.totals.staleness),
        },
        "batches": setup.plan._asdict(),
        "num_params": num_params(setup.state),
        "steps_per_second": int(outcome.totals.steps) / outcome.train_seconds,
        "config": config.to_dict(),
        **report.environment(),
    }


def _sharpest_stable_minimum(config: ConfigDict, process: DelayProcess) -> float | None:
    """Largest Hessian eigenvalue at which this run can stay; None where no formula is exact."""
    exact = config.optimizer == "sgd" and config.momentum_kind != "nesterov"
    if not exact or process.pmf is None:
        return None
    return stability.max_sharpness(
        optimizer.effective_learning_rate(config),
        process,
        momentum=config.momentum,
        kind=config.momentum_kind,
        dampening=config.dampening,
    )
