"""The server of a real run: parameters, optimizer and version, one gradient after another.

`Server` is a plain class whose methods are coroutines; `cluster.crew` makes a Ray actor of it. Its
event loop is one thread, so updates are made one at a time, in the order of arrival. Nothing is
donated: a version lives for as long as a worker is computing on it, so that the server holds as
many sets of parameters as there are workers, and one more.
"""

import asyncio
import contextlib
import os
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from asgd_jax.cluster.policy import BatchNumbers, policy_of
from asgd_jax.cluster.programs import (
    Pulled,
    Pushed,
    apply_update,
    first_fault,
    make_programs,
    pull_state,
)
from asgd_jax.data import Dataset
from asgd_jax.training.chunk import NOT_DIVERGED, ChunkTotals
from asgd_jax.training.command import use_compilation_cache
from asgd_jax.training.feed import feed_of
from asgd_jax.training.loop import is_checkpoint_due, is_evaluated
from asgd_jax.training.recorded import num_shards_of
from asgd_jax.training.state import PyTree, TrainState
from asgd_jax.transforms import distance_to_stale

# So many gradients of one worker refused in a row.
_MOST_REFUSALS = 10


class Task(NamedTuple):
    """What a worker is handed: parameters of a version, and the number of its next batch."""

    version: int
    number: int
    params: PyTree


class UpdateRow(NamedTuple):
    """A row of updates.csv: `training.recorded.UPDATE_COLUMNS`."""

    update: int
    worker: int
    version: int
    staleness: int
    batch: int
    seconds: float
    compute_seconds: float


class Wasted(NamedTuple):
    """Work that became no update.

    Attributes:
      dropped: gradients that were too stale, and the seconds that workers spent on them.
      waited_seconds: that gradients were held for slower workers.
      lost: gradients of workers that died, or were under way when the server did.
      refused: gradients that were not finite, or of other shapes.
    """

    dropped: int = 0
    dropped_seconds: float = 0.0
    waited_seconds: float = 0.0
    lost: int = 0
    refused: int = 0


class Saved(NamedTuple):
    """What a server can go on from, on the host.

    Attributes:
      state: the train state, `opt_state` being the server's own.
      numbers: of `BatchNumbers.save`.
      totals: of the updates since the last row.
      seconds: of the run so far.
      row_seconds: what that was at the last row.
      wasted: so far.
    """

    state: TrainState
    numbers: dict[str, Any]
    totals: ChunkTotals
    seconds: float
    row_seconds: float
    wasted: Wasted


class Snapshot(NamedTuple):
    """The run where a row is due, or where it ends.

    Attributes:
      totals: of the updates since the last row.
      gap: |x|, |x - x_stale| and their ratio; stale is where the last gradient was taken.
      seconds: from the last row to this one.
      saved: to go on from; None where neither evaluation nor checkpoint is due.
      step: updates made.
      is_row: False for a run that was asked to stop between two rows.
    """

    totals: ChunkTotals
    gap: tuple[float, float, float]
    seconds: float
    saved: Saved | None
    step: int
    is_row: bool


class Report(NamedTuple):
    """What happened since the last report; `complaints` name workers whose gradient was refused."""

    updates: list[UpdateRow]
    snapshots: list[Snapshot]
    complaints: list[str]
    finished: bool


class _Lease(NamedTuple):
    """A gradient under way: whose (of which life of the worker), on which batch, taken where."""

    life: int
    number: int
    pulled: Pulled


def host_totals(**fields: Any) -> ChunkTotals:
    """Returns totals that hold numbers and a NumPy histogram, which grows as it needs to."""
    return ChunkTotals(**fields)


def no_totals() -> ChunkTotals:
    """Returns the totals of no update, on the host."""
    return host_totals(
        steps=0,
        loss=0.0,
        error=0.0,
        gradient_norm=0.0,
        staleness=np.zeros(1, np.int64),
        diverged_at=NOT_DIVERGED,
    )


class Server:
    """See the module. All that workers and driver call is a coroutine."""

    def __init__(self, config: ConfigDict, dataset: Dataset, saved: Saved | None = None):
        use_compilation_cache()
        self._config, self._facts = config, feed_of(config, dataset).facts
        self._programs, self._policy = make_programs(config, self._facts), policy_of(config)
        self._gap = jax.jit(distance_to_stale)
        numbers = None
        self._totals, self._wasted = no_totals(), Wasted()
        self._seconds = self._row_seconds = 0.0
        if saved is None:
            self._state = self._programs.init()
        else:
            self._state = jax.tree.map(jax.numpy.asarray, saved.state)
            numbers, self._totals = saved.numbers, saved.totals
            self._seconds, self._row_seconds = saved.seconds, saved.row_seconds
            self._wasted = saved.wasted
        self._numbers = BatchNumbers(num_shards_of(config), numbers)
        self._version = int(self._state.step)
        self._total = self._facts.plan.steps_per_epoch * config.epochs
        self._under_way: dict[int, _Lease] = {}
        self._changed = asyncio.Condition()
        self._news = asyncio.Event()
        self._updates: list[UpdateRow] = []
        self._snapshots: list[Snapshot] = []
        self._complaints: list[str] = []
        self._refused: dict[int, int] = {}  # gradients in a row, by worker
        self._ended = self._version >= self._total
        self._started: float | None = None
        self._last_stale = self._state.params  # where the last gradient was taken
        self._warm_up()

    def _warm_up(self) -> None:
        """Compiles the update before the first gradient is there."""
        pulled = pull_state(self._state, self._version)
        zeros = jax.tree.map(np.zeros_like, jax.device_get(self._state.params))
        stats = jax.tree.map(np.zeros_like, jax.device_get(self._state.batch_stats))
        pushed = Pushed(zeros, stats, 0.0, 0.0, 0.0)
        jax.block_until_ready(apply_update(self._programs, self._state, pulled, pushed, 0))
        self._gap(self._state.params, pulled.params)

    async def ready(self) -> int:
        """Returns the process id, once everything is compiled."""
        return os.getpid()

    async def pull(self, worker: int, life: int) -> Task | None:
        """Hands a worker its first task; None when there is nothing more to do.

        Args:
          worker: 0, ..., num_workers - 1.
          life: how often this worker was started before.
        """
        self._forget(worker)
        self._refused.pop(worker, None)
        if self._started is None:
            self._started = time.perf_counter()
        task = self._hand_out(worker, life)
        await self._tell()
        return task

    async def push(
        self, worker: int, life: int, number: int, pushed: Pushed, compute_seconds: float
    ) -> Task | None:
        """Makes an update of a gradient, or none, and hands out the next task.

        None when there is nothing more to do: the run has ended, another process has taken this
        worker's place, or so many of its gradients were refused that no more are wanted.
        """
        lease = self._under_way.get(worker)
        if self._ended or lease is None or lease.life != life or lease.number != number:
            return None
        if (fault := first_fault(pushed, self._state.params)) is not None:
            task = self._refuse(worker, life, fault)
            await self._tell()
            return task
        await self._wait_for_others(worker, lease)
        if self._ended or self._under_way.get(worker) is not lease:
            return None
        staleness = self._version - lease.pulled.version
        if self._policy.is_dropped(staleness):
            self._wasted = self._wasted._replace(
                dropped=self._wasted.dropped + 1,
                dropped_seconds=self._wasted.dropped_seconds + compute_seconds,
            )
            self._forget(worker)
        else:
            del self._under_way[worker]
            self._make_update(worker, lease, pushed, staleness, compute_seconds)
        task = self._hand_out(worker, life)
        await self._tell()
        return task

    async def lost(self, worker: int) -> None:
        """A worker has died: its gradient becomes no update, its batch is somebody else's."""
        if worker in self._under_way:
            self._wasted = self._wasted._replace(lost=self._wasted.lost + 1)
        self._forget(worker)
        await self._tell()

    async def report(self, patience: float) -> Report:
        """Returns the news; waits at most so many seconds for a snapshot."""
        if not self._snapshots and not self._ended:
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), patience)
        found = Report(self._updates, self._snapshots, self._complaints, self._ended)
        self._updates, self._snapshots, self._complaints = [], [], []
        return found

    async def stop(self) -> None:
        """Ends the run where it is; the next report has a snapshot to go on from."""
        if not self._ended:
            self._end(is_row=False)
            await self._tell()

    async def _tell(self) -> None:
        """Wakes those that wait for others."""
        async with self._changed:
            self._changed.notify_all()

    def _hand_out(self, worker: int, life: int) -> Task | None:
        if self._ended:
            return None
        number = self._numbers.take(worker)
        pulled = pull_state(self._state, self._version)
        self._under_way[worker] = _Lease(life, number, pulled)
        return Task(self._version, number, jax.tree.map(np.asarray, pulled.params))

    def _forget(self, worker: int) -> None:
        lease = self._under_way.pop(worker, None)
        if lease is not None:
            self._numbers.give_back(lease.number)

    def _refuse(self, worker: int, life: int, fault: str) -> Task | None:
        """Makes no update; sends home who is never right, and ends the run when all are."""
        self._wasted = self._wasted._replace(refused=self._wasted.refused + 1)
        count = self._refused[worker] = self._refused.get(worker, 0) + 1
        self._forget(worker)
        if count == 1:
            self._complaints.append(f"refused a gradient of worker {worker}: {fault}")
        if count < _MOST_REFUSALS:
            return self._hand_out(worker, life)
        self._complaints.append(f"worker {worker} is sent home: {count} gradients were refused")
        if (
            sum(each >= _MOST_REFUSALS for each in self._refused.values())
            == self._config.num_workers
        ):
            totals = self._totals._asdict() | {"diverged_at": self._version}
            if not self._totals.steps:
                totals |= {"loss": np.nan, "error": np.nan}
            self._totals = host_totals(**totals)
            self._end(is_row=True)
        return None

    async def _wait_for_others(self, worker: int, lease: _Lease) -> None:
        def may_go() -> bool:
            versions = {each: held.pulled.version for each, held in self._under_way.items()}
            gone = self._ended or self._under_way.get(worker) is not lease
            return gone or not self._policy.must_wait(worker, self._version, versions)

        if may_go():
            return
        began = time.perf_counter()
        async with self._changed:
            await self._changed.wait_for(may_go)
        waited = self._wasted.waited_seconds + time.perf_counter() - began
        self._wasted = self._wasted._replace(waited_seconds=waited)

    def _make_update(
        self, worker: int, lease: _Lease, pushed: Pushed, staleness: int, compute_seconds: float
    ) -> None:
        self._state = apply_update(self._programs, self._state, lease.pulled, pushed, staleness)
        jax.block_until_ready(self._state.params)
        seconds = self._now()
        pulled, number = lease.pulled, lease.number
        row = self._version, worker, pulled.version, staleness, number, seconds, compute_seconds
        self._updates.append(UpdateRow(*row))
        self._totals = _add(self._totals, pushed, staleness, self._version, self._config)
        self._version += 1
        self._refused.pop(worker, None)
        self._last_stale = pulled.params
        length = self._config.log_every_steps or self._facts.plan.steps_per_epoch
        place = self._version % self._facts.plan.steps_per_epoch
        if self._totals.diverged_at != NOT_DIVERGED or self._version >= self._total:
            self._end(is_row=True)
        elif place == 0 or place % length == 0:
            self._take_snapshot(is_row=True, end=False)

    def _end(self, *, is_row: bool) -> None:
        self._ended = True
        self._take_snapshot(is_row=is_row, end=True)

    def _take_snapshot(self, *, is_row: bool, end: bool) -> None:
        now, plan = self._now(), self._facts.plan
        totals, last_row = self._totals, self._row_seconds
        numbers = self._gap(self._state.params, self._last_stale)
        if is_row:
            self._totals, self._row_seconds = no_totals(), now
        due = end or is_checkpoint_due(self._config, plan, self._version, totals)
        epoch, place = divmod(self._version - 1, plan.steps_per_epoch)
        due = due or is_evaluated(self._config, plan.steps_per_epoch, epoch, place + 1)
        saved = None
        if due:
            saved = Saved(
                jax.device_get(self._state),
                self._numbers.save(lease.number for lease in self._under_way.values()),
                self._totals,
                now,
                self._row_seconds,
                self._wasted,
            )
        self._snapshots.append(
            Snapshot(
                totals,
                tuple(float(number) for number in numbers),  # type: ignore[arg-type]
                now - last_row,
                saved,
                self._version,
                is_row,
            )
        )
        self._news.set()

    def _now(self) -> float:
        """Seconds of the run so far, those of earlier servers included."""
        since = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._seconds + since


def _add(
    totals: ChunkTotals, pushed: Pushed, staleness: int, update: int, config: ConfigDict
) -> ChunkTotals:
    """The totals with one more update, see `training.chunk.add_step`."""
    before = np.asarray(totals.staleness)
    histogram = np.zeros(max(before.size, staleness + 1), before.dtype)
    histogram[: before.size] = before
    histogram[staleness] += 1
    loss = float(pushed.loss)
    fine = loss <= config.divergence_loss  # False for NaN too
    return host_totals(
        steps=totals.steps + 1,
        loss=totals.loss + loss,
        error=totals.error + float(pushed.error),
        gradient_norm=totals.gradient_norm + float(pushed.gradient_norm),
        staleness=histogram,
        diverged_at=totals.diverged_at if fine else np.int64(update),
    )
