"""What a real run comes to: the trainer's summary, and what its workers did against theory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from asgd_jax.cluster.log import UPDATES_FILE
from asgd_jax.cluster.real_run import RealRun
from asgd_jax.cluster.server import Wasted
from asgd_jax.cluster.worker_times import measured_times
from asgd_jax.delays import simulate_workers
from asgd_jax.training.folder import provenance
from asgd_jax.training.optimizer import effective_learning_rate
from asgd_jax.training.progress import Progress, staleness_summary
from asgd_jax.training.recorded import RecordedUpdates, read_updates
from asgd_jax.training.state import num_params


def histogram_of(staleness: Sequence[int] | np.ndarray) -> list[int]:
    """Returns how many updates had staleness 0, 1, ...

    >>> histogram_of([0, 2, 2])
    [1, 0, 2]
    """
    return [int(count) for count in np.bincount(np.asarray(staleness, np.int64))]


def describe_staleness(staleness: Sequence[int] | np.ndarray) -> dict[str, Any]:
    """Returns mean, largest and histogram."""
    histogram = histogram_of(staleness)
    mean, largest = staleness_summary(histogram)
    return {"mean": mean, "max": largest, "histogram": histogram}


def simulate_measured(updates: RecordedUpdates, num_workers: int, seed: int = 0) -> np.ndarray:
    """Returns the staleness of simulated workers whose compute times are the measured ones.

    What it leaves out: the server's own time, messages, and workers that wait or are dropped.
    """
    sampler = measured_times(updates.worker, updates.compute_seconds)
    return simulate_workers(num_workers, updates.update.size, schedule=sampler, seed=seed)


def distance_of(first: Sequence[int], second: Sequence[int]) -> float:
    """Returns the total variation distance of two histograms: 0 for equal ones, at most 1.

    >>> distance_of([2, 2], [4]), distance_of([1], [0, 3])
    (0.5, 1.0)
    """
    size = max(len(first), len(second))
    left, right = (
        np.pad(np.asarray(each, float), (0, size - len(each))) / max(sum(each), 1)
        for each in (first, second)
    )
    return float(np.abs(left - right).sum() / 2)


def summarize_run(
    run: RealRun, workdir: Path, reached: Progress, wasted: Wasted, restarts: int
) -> dict[str, Any]:
    """Returns the content of summary.json.

    Args:
      run: see `RealRun`.
      workdir: with updates.csv.
      reached: the progress at the end.
      wasted: work that became no update.
      restarts: of workers, since this driver started.
    """
    config, count = run.config, run.config.num_workers
    made = num_params(jax.eval_shape(run.programs.init).params)
    return {
        "status": "completed" if reached.diverged_at is None else "diverged",
        "diverged_at_step": reached.diverged_at,
        "steps": reached.step,
        "learning_rate": effective_learning_rate(config),
        "sharpest_stable_minimum": None,
        "why_no_stable_minimum": "staleness is measured: python -m asgd_jax.cluster.replay RUN",
        "final": reached.last_row,
        "best_validation_error": reached.best_error,
        **_of_updates(workdir, reached, count),
        "wasted": wasted._asdict(),
        "worker_restarts": restarts,
        # A gradient and a parameter set, float32, each into a channel and out of it.
        "bytes_copied_per_update": 16 * made,
        "batches": run.feed.facts.plan._asdict(),
        "num_params": made,
        "steps_per_second": reached.step / max(reached.train_seconds, 1e-9),
        "wall_time_s": round(reached.wall_seconds, 3),
        "config": config.to_dict(),
        **provenance.environment(),
    }


def _of_updates(workdir: Path, reached: Progress, num_workers: int) -> dict[str, Any]:
    if not reached.step:
        return {"staleness": {"mean": 0.0, "max": 0, "histogram": [0]}}
    updates = read_updates(workdir / UPDATES_FILE)
    measured = describe_staleness(updates.staleness)
    simulated = describe_staleness(simulate_measured(updates, num_workers))
    ids = range(num_workers)
    return {
        "staleness": {**measured, "num_clipped": 0},
        "simulated_staleness": {
            **simulated,
            "distance": distance_of(measured["histogram"], simulated["histogram"]),
        },
        "workers": {
            "updates": [int((updates.worker == each).sum()) for each in ids],
            "mean_compute_seconds": [
                float(updates.compute_seconds[updates.worker == each].mean())
                if (updates.worker == each).any()
                else None
                for each in ids
            ],
        },
    }
