"""A run from its configuration to its summary: train in chunks, evaluate, report."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from asgd_jax import stability
from asgd_jax.delays import DelayProcess
from asgd_jax.training import metrics, optimizer, report
from asgd_jax.training.chunk import NOT_DIVERGED, ChunkTotals, merge_totals
from asgd_jax.training.setup import Setup, make_validation, server_state, set_up
from asgd_jax.training.state import num_params
from asgd_jax.training.step import gap


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

    plan, state = setup.feed.plan, setup.state
    advance = setup.feed.make_advance(
        setup.train_step,
        setup.process.max_delay,
        setup.mesh,
        jax.tree.map(lambda leaf: leaf.sharding, state),
    )
    validate = make_validation(config, setup)
    measure_gap = jax.jit(lambda state: gap(server_state(config, state)))
    learning_rate = _learning_rate_of(config, setup)

    rows: list[metrics.Row] = []
    overall: ChunkTotals | None = None
    train_seconds = 0.0
    show = progress and sys.stderr.isatty()
    with tqdm(total=plan.steps_per_epoch * config.epochs, unit="step", disable=not show) as bar:
        for epoch, start, stop in _chunks(config, plan.steps_per_epoch):
            before = time.perf_counter()
            state, totals = advance(state, epoch, start, stop)
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
                **metrics.summarize(totals),
            }
            diverged = totals.diverged_at != NOT_DIVERGED
            if _is_evaluated(config, plan.steps_per_epoch, epoch, stop) or diverged:
                loss, error = validate(state)
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


def _learning_rate_of(config: ConfigDict, setup: Setup) -> Callable[[int], float]:
    """Returns the learning rate of the last of `step` updates, regime included."""
    peak = optimizer.effective_learning_rate(config)
    multiplier = jax.jit(optimizer.make_multiplier(config, setup.feed.plan.steps_per_epoch))
    return lambda step: peak * float(multiplier(np.int32(max(step - 1, 0))))


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
        "batches": setup.feed.plan._asdict(),
        "num_params": num_params(setup.state.params)
        // (setup.mesh.size if config.parallelism == "pmap" else 1),
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
