"""The driver of a real run: it starts server and workers, and alone writes the run's folder."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from asgd_jax.cluster.crew import Crew, ServerLost
from asgd_jax.cluster.log import UpdateLog, open_updates
from asgd_jax.cluster.real_run import (
    RealRun,
    add_snapshot,
    fresh_progress,
    from_json,
    make_row_of,
    open_real_run,
    real_config,
    to_json,
)
from asgd_jax.cluster.server import Report, Saved, Snapshot, Wasted
from asgd_jax.cluster.session import open_ray, require_ray
from asgd_jax.cluster.summary import summarize_run
from asgd_jax.training.command import Preempted, catch_signals, progress_bar
from asgd_jax.training.folder import metrics, provenance, rerun
from asgd_jax.training.folder.checkpoint import Checkpoints, last_step, open_checkpoints
from asgd_jax.training.folder.metrics import Row
from asgd_jax.training.loop import is_checkpoint_due, open_folder
from asgd_jax.training.progress import Progress

_PATIENCE = 0.5  # seconds between two reports of a run without rows
_MOST_SERVER_DEATHS = 3  # with no checkpoint between them


def train_async(
    config: ConfigDict,
    workdir: str | Path,
    *,
    num_workers: int | None = None,
    address: str | None = None,
    gpus_per_worker: float = 0.0,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains with real asynchronous workers and returns the summary; an interrupted run goes on.

    The server applies every gradient as soon as it arrives. `workdir` receives what `train` writes
    (config.json, metrics.csv, events, checkpoints, summary.json) and updates.csv, which replays the
    run. A worker that dies is restarted and its gradient lost; a server that dies is restarted from
    the last checkpoint. Called again with the same folder, a run resumes.

    Args:
      config: see `default_config`; `real_config` says what workers make of it.
      workdir: folder of this run, on the driver's machine.
      num_workers: N, in the place of the configuration's.
      address: of a Ray cluster; without it one is started here and stopped at the end.
      gpus_per_worker: that each worker has to itself; without any, gradients are taken on CPUs.
      progress: show a progress bar on a terminal.

    Raises:
      ValueError: for a bad configuration, a folder that holds another run, a cluster that is not
        there or has no room; where Ray is not installed.
      DatasetNotFoundError: when the data is neither prepared nor downloadable.
      OSError: when the folder cannot be written to, or server or worker die again and again.
      Preempted: after SIGTERM or SIGINT, once the state is saved.
    """
    started = time.perf_counter()
    workdir, config = Path(workdir), real_config(config, num_workers)
    summary = rerun.finished_summary(workdir, config)
    if summary is not None:
        return summary
    require_ray()
    with contextlib.ExitStack() as stack:
        stack.enter_context(rerun.hold_folder(workdir))
        # Before anything is computed: Ray forks, which JAX's threads do not bear.
        ray = stack.enter_context(
            open_ray(address, num_cpus=config.num_workers + 1, store_bytes=_store_bytes(config))
        )
        # After Ray, which takes SIGTERM for itself.
        stop_requested = stack.enter_context(catch_signals())
        run = open_real_run(config)
        crew = Crew(ray, config, ray.put(run.feed.samples), gpus_per_worker)
        stack.callback(crew.dismiss)
        follow = partial(_follow, run, workdir, ray, crew, stop_requested, started, progress)
        reached, wasted = _outlive_servers(follow, workdir, crew)
    summary = summarize_run(run, workdir, reached, wasted, crew.deaths)
    provenance.write_json(workdir / "summary.json", summary)
    return summary


def _outlive_servers(
    follow: Callable[[], tuple[Progress, Wasted]], workdir: Path, crew: Crew
) -> tuple[Progress, Wasted]:
    """Calls `follow` again whenever the server is lost: it goes on from the last checkpoint.

    Raises:
      OSError: when that leads nowhere.
    """
    deaths, saved_at = 0, -1
    while True:
        try:
            return follow()
        except ServerLost as lost:
            step = last_step(workdir) or 0
            deaths = deaths + 1 if step == saved_at else 1
            saved_at = step
            if deaths > _MOST_SERVER_DEATHS:
                raise OSError(f"the server died {deaths} times at step {step}: {lost}") from lost
            print(f"the server died and is restarted from step {step}", file=sys.stderr)
            crew.gather()


def _store_bytes(config: ConfigDict) -> int:
    """Memory for objects under way: the data set, and gradients and parameters of every worker.

    A bound, and no more than is used is taken: of the largest data set of this kind, and of sets of
    parameters of 40 MB; what is larger Ray keeps on disk.
    """
    return 2**29 + (config.num_workers + 4) * 2 * 40 * 2**20


class _Open(NamedTuple):
    """The folder of a run, ready to go on."""

    saved: Saved | None
    reached: Progress
    writer: metrics.Writer
    log: UpdateLog
    checkpoints: Checkpoints
    bar: Any


@contextlib.contextmanager
def _open_run(run: RealRun, workdir: Path, progress: bool) -> Iterator[_Open]:
    """Opens a folder at its last checkpoint, or its start; metrics and log are cut to it."""
    config, plan = run.config, run.feed.facts.plan
    fingerprint = rerun.fingerprint(config) | rerun.data_fingerprint(config, plan)
    with contextlib.ExitStack() as stack:
        checkpoints = open_checkpoints(workdir, fingerprint, keep=config.keep_checkpoints)
        stack.callback(checkpoints.close)
        restored = checkpoints.restore(run.programs.init())
        saved, reached = None, fresh_progress()
        if restored is not None:
            reached, saved = from_json(restored[1], restored[0])
        if reached.step > plan.steps_per_epoch * config.epochs:
            raise ValueError(
                f"epochs={config.epochs} is less than this run has made already, "
                f"{reached.step / plan.steps_per_epoch:g}: ask for more, or name another workdir"
            )
        writer = open_folder(config, workdir, reached)
        stack.callback(writer.close)
        log = open_updates(workdir, reached.step)
        stack.callback(log.close)
        bar = progress_bar(
            plan.steps_per_epoch * config.epochs,
            unit="update",
            initial=reached.step,
            show=progress,
        )
        yield _Open(saved, reached, writer, log, checkpoints, stack.enter_context(bar))


def _follow(
    run: RealRun,
    workdir: Path,
    ray: Any,
    crew: Crew,
    stop_requested: Callable[[], bool],
    started: float,
    progress: bool,
) -> tuple[Progress, Wasted]:
    """Follows one server from the last checkpoint to the end of the run.

    Raises:
      ServerLost: when it dies.
      Preempted: when the run was asked to stop, and has.
    """
    with _open_run(run, workdir, progress) as opened:
        started -= opened.reached.wall_seconds
        keep = _make_keep(run, opened, started)
        server = crew.hire_server(opened.saved)
        try:
            crew.start(server)
            reached, last = opened.reached, None
            for report in _reports(ray, server, crew, stop_requested):
                opened.log.write(report.updates)
                opened.bar.update(len(report.updates))
                for complaint in report.complaints:
                    print(complaint, file=sys.stderr)
                for snapshot in report.snapshots:
                    reached, last = keep(reached, snapshot), snapshot
        finally:
            with contextlib.suppress(Exception):  # it may be gone
                ray.kill(server)
        if last is None:  # the folder was that of a run whose last file was missing
            assert opened.saved is not None, "a run without updates has no end"
            return reached, opened.saved.wasted
        assert last.saved is not None, "the last snapshot has its state"
        if not last.is_row:
            raise Preempted(reached.step)
        return reached, last.saved.wasted


def _reports(
    ray: Any, server: Any, crew: Crew, stop_requested: Callable[[], bool]
) -> Iterator[Report]:
    """Yields what the server reports until the run has ended; replaces workers meanwhile."""
    asked = False
    productive: set[int] = set()
    waiting = server.report.remote(_PATIENCE)
    while True:
        if stop_requested() and not asked:
            server.stop.remote()
            asked = True
        done, _ = ray.wait([waiting, *crew.references()], num_returns=1, timeout=_PATIENCE)
        for reference in done:
            if reference != waiting:
                crew.settle(reference, server, productive)
                continue
            try:
                report: Report = ray.get(waiting)
            except ray.exceptions.RayActorError as error:
                raise ServerLost(str(error).splitlines()[0]) from error
            productive |= {update.worker for update in report.updates}
            yield report
            if report.finished:
                return
            waiting = server.report.remote(_PATIENCE)


def _make_keep(
    run: RealRun, opened: _Open, started: float
) -> Callable[[Progress, Snapshot], Progress]:
    """Returns `keep(reached, snapshot)`: writes a row and a checkpoint where they are due."""
    row_of = make_row_of(run)
    config, plan = run.config, run.feed.facts.plan
    last_saved = opened.reached.step if opened.saved is not None else -1

    def keep(reached: Progress, snapshot: Snapshot) -> Progress:
        nonlocal last_saved
        row: Row = {}
        if snapshot.is_row:
            row = row_of(snapshot)
            opened.writer.write(row, np.asarray(snapshot.totals.staleness))
            reached = add_snapshot(reached, snapshot, row, time.perf_counter() - started)
        reached = reached._replace(step=snapshot.step)
        due = not snapshot.is_row or is_checkpoint_due(config, plan, snapshot.step, snapshot.totals)
        diverged = reached.diverged_at is not None  # ends the run: there is nothing to go on from
        if due and not diverged and snapshot.step > last_saved:
            assert snapshot.saved is not None, "a checkpoint is due where there is a state"
            opened.log.sync()
            reached = reached._replace(metrics_bytes=opened.writer.num_bytes())
            state = jax.tree.map(jax.numpy.array, snapshot.saved.state)
            error = row.get("validation_error")
            opened.checkpoints.save(snapshot.step, state, to_json(reached, snapshot.saved), error)
            last_saved = snapshot.step
        return reached

    return keep
