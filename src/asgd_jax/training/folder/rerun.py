"""What a command finds in a run's folder: whose run it is, if it is finished, who writes there."""

import math
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
from filelock import FileLock, Timeout
from ml_collections import ConfigDict

from asgd_jax.data import BatchPlan
from asgd_jax.training.folder.checkpoint import last_step, refuse_pattern
from asgd_jax.training.folder.provenance import plain, read_json, refuse_mismatch

LOCK = ".lock"
# Fields that a resumed run may change: they decide how long it is, what it reports and where it
# runs, not the path of its parameters.
FREE_FIELDS = (
    "epochs",
    "data_dir",
    "log_every_steps",
    "eval_every_epochs",
    "eval_batch_size",
    "checkpoint_every_epochs",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "num_devices",
    "shard_history",
    "multihost",
    "coordinator",
    "coordinator_timeout",
    "num_processes",
    "process_id",
)


def fingerprint(config: ConfigDict) -> dict[str, Any]:
    """Returns the entries of a configuration that a resumed run must share, as JSON.

    >>> fingerprint(ConfigDict({"delay": 3, "epochs": 10, "decay_epochs": (5, 8)}))
    {'decay_epochs': [5, 8], 'delay': 3}
    """
    fields = {name: value for name, value in config.to_dict().items() if name not in FREE_FIELDS}
    return plain(dict(sorted(fields.items())))


def data_fingerprint(config: ConfigDict, plan: BatchPlan) -> dict[str, Any]:
    """Returns what the configuration only points at: the number of samples, the recorded trace."""
    return {
        "number of samples": plan.num_samples,
        "checksum of delay_trace": trace_checksum(config),
    }


def trace_checksum(config: ConfigDict) -> int | None:
    """Returns the checksum of the recorded trace that a configuration names, or None."""
    if config.delay_distribution != "trace":
        return None
    return zlib.crc32(Path(config.delay_trace).read_bytes())


def finished_summary(workdir: Path, config: ConfigDict) -> dict[str, Any] | None:
    """Returns the summary of the run in `workdir` if it is finished, or None if it is to go on.

    Raises:
      ValueError: when the folder holds another run, or files of the same names that are no run's,
        or could keep no checkpoints.
    """
    refuse_pattern(workdir)
    saved, summary = read_json(workdir / "config.json"), read_json(workdir / "summary.json")
    if saved is None:
        if summary is not None or (workdir / "metrics.csv").exists():
            raise ValueError(f"{workdir} has no config.json, so is no run: name another workdir")
        return None
    refuse_mismatch(fingerprint(ConfigDict(saved)), fingerprint(config), workdir)
    if summary is None:
        return None
    # config.json may already be that of a longer run which was killed before it began.
    epochs = summary["config"]["epochs"]
    if summary["status"] == "completed" and epochs < config.epochs:
        if last_step(workdir) is None:
            raise ValueError(
                f"{workdir} holds {epochs} epochs and no checkpoint to go on from: "
                f"name another workdir, or set epochs={epochs}"
            )
        return None
    if summary["status"] == "completed" and epochs > config.epochs:
        raise ValueError(
            f"epochs={config.epochs} is less than the {epochs} of the run in {workdir}: "
            "ask for more, or name another workdir"
        )
    # JSON has no NaN, in which a diverged run ends.
    last = {name: math.nan if cell is None else cell for name, cell in summary["final"].items()}
    return summary | {"final": last}


@contextmanager
def hold_folder(workdir: Path) -> Iterator[None]:
    """Within it, no other run can hold `workdir`, which is made if it does not exist.

    An advisory lock on `workdir`/.lock that the system gives up when the process ends, in whatever
    way, so a file that was left behind locks nobody out. Of several processes of one run the first
    holds it for all. Where nothing can be locked (a file system without locks, a folder that is
    read-only) nothing is.

    Raises:
      ValueError: when another process holds the folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, hold_folder(Path(folder)):
    ...     (Path(folder) / LOCK).exists()
    True
    """
    with ExitStack() as stack:
        if jax.process_index() == 0:
            # No soft lock, a file that a killed process would leave behind for good.
            lock = FileLock(workdir / LOCK, blocking=False, fallback_to_soft=False)
            try:
                workdir.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock)
            except Timeout:
                raise ValueError(
                    f"{workdir} is in use by another process that trains there: "
                    "wait for it, stop it, or name another workdir"
                ) from None
            except OSError:  # what the run writes first says it better
                pass
        yield
