"""Trains with real asynchronous workers, processes on Ray:

  python scripts/train_async.py --config=configs/X.py[:arm] --workdir=DIR --num_workers=4

The folder is that of train.py, and has updates.csv besides: who pushed what, when and how stale.
The same command again resumes an interrupted run; --config.FIELD=VALUE overrides a field. Without
--address Ray is started on this machine, for this run alone, and listens on the loopback only. Exit
codes are those of train.py: 0, 2, 75 (stopped by SIGTERM or SIGINT with everything saved), 130.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

# The configuration is read as train.py reads it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_collections import ConfigDict


class Order(NamedTuple):
    """What the command line asks for."""

    config: ConfigDict
    workdir: Path
    options: dict[str, Any]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse_order(arguments: Sequence[str]) -> Order:
    """Reads the command line, the config file included, and makes nothing.

    Raises:
      ValueError: one line about the first mistake.
    """
    from scripts.train import parse

    parser = _Parser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE[:ARM]", help="configs/X.py or configs/X.py:arm")
    parser.add_argument("--workdir", metavar="DIR", help="folder that the run is written to")
    parser.add_argument("--num_workers", type=int, metavar="N", help="default: the config's")
    parser.add_argument("--address", help="of a Ray cluster: HOST:PORT, or auto")
    parser.add_argument("--gpus_per_worker", type=float, default=0.0, help="default: 0, CPUs")
    options, rest = parser.parse_known_args(arguments)
    if not options.config or not options.workdir:
        raise ValueError("needs --config=configs/X.py and --workdir=DIR")
    command = parse([f"--config={options.config}", f"--workdir={options.workdir}", *rest])
    if command.workdir is None:
        raise ValueError("--plan is for train.py: workers are processes here")
    names = ("num_workers", "address", "gpus_per_worker")
    return Order(command.config, command.workdir, {name: getattr(options, name) for name in names})


def main(arguments: Sequence[str]) -> int:
    """Runs what the command line asks for; returns the exit code, see `exit_code`."""
    from asgd_jax.cluster.train import train_async
    from asgd_jax.training.command import exit_code

    with exit_code("train_async.py") as code:
        config, workdir, options = parse_order(arguments)
        summary = train_async(config, workdir, **options)
        final, staleness = summary["final"], summary["staleness"]
        print(
            f"{summary['status']} after {summary['steps']} updates, "
            f"{summary['steps_per_second']:.3g} a second: train loss {final['train_loss']:.4g}, "
            f"validation error {final['validation_error']:.2%}, "
            f"staleness {staleness['mean']:.3g} (at most {staleness['max']}); see {workdir}"
        )
    return code[0]


if __name__ == "__main__":
    from asgd_jax.training.command import use_compilation_cache
    from scripts.train import quiet

    quiet()
    use_compilation_cache()
    sys.exit(main(sys.argv[1:]))
