"""A run from its configuration to its summary: train in chunks, evaluate, save, report."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from asgd_jax import stability
from asgd_jax.data import BatchPlan
from asgd_jax.delays import DelayProcess
from asgd_jax.training import optimizer
from asgd_jax.training.advance import make_advance
from asgd_jax.training.chunk import NOT_DIVERGED, ChunkTotals
from asgd_jax.training.command import Preempted, catch_signals, progress_bar
from asgd_jax.training.folder import metrics, provenance, rerun
from asgd_jax.training.folder.checkpoint import Checkpoints, open_checkpoints
from asgd_jax.training.placement import Placed
from asgd_jax.training.progress import (
    Progress,
    add_chunk,
    chunk_row,
    describe_row,
    no_progress,
    staleness_summary,
)
from asgd_jax.training.setup import Setup, make_validation, set_up
from asgd_jax.training.staleness import is_pipeline
from asgd_jax.training.state import TrainState, num_params
from asgd_jax.transforms import distance_to_stale


def train(config: ConfigDict, workdir: str | Path, *, progress: bool = True) -> dict[str, Any]:
    """Runs a configuration and returns its summary; a run that was interrupted goes on.

    `workdir` receives config.json, metrics.csv, TensorBoard events, checkpoints and, at the end,
    summary.json. A run that diverges ends there: its summary says `"status": "diverged"` and at
    which step. Called again with the same folder, it resumes from the last checkpoint, on the CPU
    bit by bit as if it had never stopped; `epochs` may have grown. A run that has made its epochs,
    or has diverged, is not repeated.

    Args:
      config: see `default_config`.
      workdir: folder of this run, made if it does not exist.
      progress: show a progress bar on a terminal.

    Raises:
      ValueError: for a bad configuration, or a folder that holds another run or a damaged one, or
        that another process is writing to.
      DatasetNotFoundError: when the data is neither prepared nor downloadable.
      OSError: when the folder cannot be written to.
      Preempted: after SIGTERM or SIGINT, once the state is saved.
    """
    started = time.perf_counter()
    workdir = Path(workdir)
    summary = rerun.finished_summary(workdir, config)
    if summary is not None:
        return summary
    setup = set_up(config)
    plan = setup.feed.facts.plan
    advance, row_of = make_advance(config, setup), _make_row(config, setup)
    with rerun.hold_folder(workdir):
        with _open_run(config, setup, workdir, progress) as opened:
            placed, reached = opened.placed, opened.reached
            started -= reached.wall_seconds
            # A chunk ends where a row is due; the run ends with its epochs, or where it diverges.
            for epoch, start, stop in chunk_bounds(config, plan.steps_per_epoch, reached.step):
                before = time.perf_counter()
                placed, totals = advance(placed, epoch, start, stop)
                totals = jax.device_get(totals)
                seconds = time.perf_counter() - before
                row = row_of(placed, totals, epoch, start, stop, seconds)
                opened.writer.write(row, np.asarray(totals.staleness))
                reached = add_chunk(reached, totals, row, seconds, time.perf_counter() - started)
                opened.bar.set_postfix_str(describe_row(row), refresh=False)
                opened.bar.update(int(totals.steps))
                if reached.diverged_at is not None:
                    break
                more = reached.step < plan.steps_per_epoch * config.epochs
                stopping = opened.stop_requested() and more
                if stopping or is_checkpoint_due(config, plan, reached.step, totals):
                    reached = reached._replace(metrics_bytes=opened.writer.num_bytes())
                    error = row.get("validation_error")
                    state = setup.placement.get(placed)
                    opened.checkpoints.save(reached.step, state, reached._asdict(), error)
                    del state  # of pmap, a copy
                if stopping:
                    raise Preempted(reached.step)
        summary = _summarize(config, setup, reached)
        if jax.process_index() == 0:
            provenance.write_json(workdir / "summary.json", summary)
    return summary


class _Opened(NamedTuple):
    """The folder of a run, ready to go on: its last state, and where what comes next is written."""

    placed: Placed
    reached: Progress
    writer: metrics.Writer
    checkpoints: Checkpoints
    stop_requested: Callable[[], bool]
    bar: Any


@contextlib.contextmanager
def _open_run(config: ConfigDict, setup: Setup, workdir: Path, progress: bool) -> Iterator[_Opened]:
    """Opens a run's folder at its last checkpoint, or its start; all is saved when it closes."""
    plan = setup.feed.facts.plan
    fingerprint = rerun.fingerprint(config) | rerun.data_fingerprint(config, plan)
    with contextlib.ExitStack() as stack:
        stop_requested = stack.enter_context(catch_signals())
        checkpoints = open_checkpoints(workdir, fingerprint, keep=config.keep_checkpoints)
        stack.callback(checkpoints.close)
        state, reached = _resume(config, setup, checkpoints)
        placed = setup.placement.put(state)
        if placed is not state:  # under pmap a copy a device: two states may not fit
            jax.tree.map(lambda leaf: leaf.delete(), state)
        writer = open_folder(config, workdir, reached)
        stack.callback(writer.close)
        total = plan.steps_per_epoch * config.epochs
        bar = progress_bar(total, unit="step", initial=reached.step, show=progress)
        stack.enter_context(bar)
        yield _Opened(placed, reached, writer, checkpoints, stop_requested, bar)


def _resume(
    config: ConfigDict, setup: Setup, checkpoints: Checkpoints
) -> tuple[TrainState, Progress]:
    restored = checkpoints.restore(setup.state)
    if restored is None:
        return setup.state, no_progress(setup.run.process.max_delay)
    state, content = restored
    reached = Progress(**content)
    epochs = reached.step / setup.feed.facts.plan.steps_per_epoch
    if epochs > config.epochs:
        raise ValueError(
            f"epochs={config.epochs} is less than the {epochs:g} that this run has made already: "
            "ask for more, or name another workdir"
        )
    return state, reached


def open_folder(config: ConfigDict, workdir: Path, reached: Progress) -> metrics.Writer:
    """Makes the run's folder ready to go on from `reached`; only the first process writes files."""
    if jax.process_index() != 0:
        return metrics.silent_writer()
    workdir.mkdir(parents=True, exist_ok=True)
    metrics.check_table(workdir, reached.step, reached.metrics_bytes)
    provenance.write_json(workdir / "config.json", config.to_dict())  # first: whose table it is
    writer = metrics.open_writer(workdir, step=reached.step, num_bytes=reached.metrics_bytes)
    (workdir / "summary.json").unlink(missing_ok=True)  # of a run of fewer epochs
    return writer


def _make_row(config: ConfigDict, setup: Setup) -> Callable[..., metrics.Row]:
    """Returns `row_of(placed, totals, epoch, start, stop, seconds)`: the row of a chunk."""
    steps_per_epoch = setup.feed.facts.plan.steps_per_epoch
    get = setup.placement.get
    validate = make_validation(config, setup)
    stale = setup.run.stale
    measure_gap = jax.jit(lambda placed: distance_to_stale(get(placed).params, stale(get(placed))))
    learning_rate = learning_rate_of(config, steps_per_epoch)

    def row_of(
        placed: Placed, totals: ChunkTotals, epoch: int, start: int, stop: int, seconds: float
    ) -> metrics.Row:
        step = epoch * steps_per_epoch + start + int(totals.steps)
        gap, rate = measure_gap(placed), learning_rate(step)
        row = chunk_row(step, steps_per_epoch, rate, totals, gap, seconds)
        diverged = totals.diverged_at != NOT_DIVERGED
        if is_evaluated(config, steps_per_epoch, epoch, stop) or diverged:
            loss, error = validate(get(placed._replace(opt_state=())))
            row |= {"validation_loss": float(loss), "validation_error": float(error)}
        return row

    return row_of


def chunk_bounds(
    config: ConfigDict, steps_per_epoch: int, step: int
) -> Iterator[tuple[int, int, int]]:
    """Yields (epoch, start, stop) from `step` on; chunks end at rows and never cross an epoch."""
    length = min(config.log_every_steps or steps_per_epoch, steps_per_epoch)
    for epoch in range(step // steps_per_epoch, config.epochs):
        for start in range(0, steps_per_epoch, length):
            first = max(start, step - epoch * steps_per_epoch)
            stop = min(start + length, steps_per_epoch)
            if first < stop:
                yield epoch, first, stop


def is_checkpoint_due(config: ConfigDict, plan: BatchPlan, step: int, totals: ChunkTotals) -> bool:
    """Whether the chunk that ended at `step` ended the run, an epoch or so many steps."""
    before = step - int(totals.steps)
    periods = (
        config.checkpoint_every_epochs * plan.steps_per_epoch,
        config.checkpoint_every_steps,
        plan.steps_per_epoch * config.epochs,
    )
    return any(period and step // period > before // period for period in periods)


def is_evaluated(config: ConfigDict, steps_per_epoch: int, epoch: int, stop: int) -> bool:
    due = (epoch + 1) % config.eval_every_epochs == 0 or epoch + 1 == config.epochs
    return stop == steps_per_epoch and due


def learning_rate_of(config: ConfigDict, steps_per_epoch: int) -> Callable[[int], float]:
    """Returns the learning rate of the last of `step` updates, regime included."""
    peak = optimizer.effective_learning_rate(config)
    multiplier = jax.jit(optimizer.make_multiplier(config, steps_per_epoch))
    return lambda step: peak * float(multiplier(np.int32(max(step - 1, 0))))


def _summarize(config: ConfigDict, setup: Setup, reached: Progress) -> dict[str, Any]:
    mean, largest = staleness_summary(reached.staleness)
    return {
        "status": "completed" if reached.diverged_at is None else "diverged",
        "diverged_at_step": reached.diverged_at,
        "steps": reached.step,
        "learning_rate": optimizer.effective_learning_rate(config),
        **_sharpest_stable_minimum(config, setup.run.process),
        "final": reached.last_row,
        "best_validation_error": reached.best_error,
        "staleness": {
            "mean": mean,
            "max": largest,
            "histogram": reached.staleness,
            "num_clipped": optimizer.count_clipped(config, reached.step),
        },
        "batches": setup.feed.facts.plan._asdict(),
        "num_params": num_params(setup.state.params),
        "steps_per_second": reached.step / reached.train_seconds,
        "wall_time_s": round(reached.wall_seconds, 3),
        "config": config.to_dict(),
        **provenance.environment(),
    }


def _sharpest_stable_minimum(config: ConfigDict, process: DelayProcess) -> dict[str, Any]:
    """Largest Hessian eigenvalue at which this run can stay; where no formula is exact, why not."""
    reasons = {
        "optimizer": config.optimizer != "sgd",
        "momentum_kind": bool(config.momentum) and config.momentum_kind == "nesterov",
        "delay_distribution": process.pmf is None or is_pipeline(config),
        "predict": config.predict != "none",
        "compensate": config.compensate != "none",
        "weight_decay": config.weight_decay > 0,
        "clip_norm": config.clip_norm is not None,
        "warmup_epochs": config.warmup_epochs > 0,
        "decay_epochs": len(config.decay_epochs) > 0,
    }
    for field, inexact in reasons.items():
        if inexact:
            reason = f"no exact formula with {field}={config[field]!r}"
            return {"sharpest_stable_minimum": None, "why_no_stable_minimum": reason}
    return {
        "sharpest_stable_minimum": stability.max_sharpness(
            optimizer.effective_learning_rate(config),
            process,
            momentum=config.momentum,
            kind="heavy_ball" if config.momentum_kind == "nesterov" else config.momentum_kind,
            dampening=config.dampening,
        )
    }
