"""What a rerun of a command finds in its folder: whose run it is, and whether it is finished."""

import json
import math
import zlib
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from asgd_jax.data import BatchPlan
from asgd_jax.training.checkpoint import last_step, refuse_mismatch, refuse_pattern

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
    return json.loads(json.dumps(fields, sort_keys=True))


def data_fingerprint(config: ConfigDict, plan: BatchPlan) -> dict[str, Any]:
    """Returns what the configuration only points at: the number of samples, the recorded trace."""
    trace = config.delay_trace if config.delay_distribution == "trace" else None
    return {
        "number of samples": plan.num_samples,
        "checksum of delay_trace": zlib.crc32(Path(trace).read_bytes()) if trace else None,
    }


def finished_summary(workdir: Path, config: ConfigDict) -> dict[str, Any] | None:
    """Returns the summary of the run in `workdir` if it is finished, or None if it is to go on.

    Raises:
      ValueError: when the folder holds another run, or files of the same names that are no run's,
        or could keep no checkpoints.
    """
    refuse_pattern(workdir)
    saved, summary = _read(workdir / "config.json"), _read(workdir / "summary.json")
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


def _read(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None where there is no file."""
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object, so is no run's: name another workdir")
    return content
