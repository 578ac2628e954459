"""Runs beside one another: python -m asgd_jax.training.compare RUN RUN ... [--out=compare.png].

A table on the terminal and a picture: losses, errors, and the sharpest minimum that each run can
stay in, h*(delay) over its learning rate. Where a run's is below the sharpness of the minimum that
another found, it cannot stay there.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from asgd_jax.command_line import OneLineParser
from asgd_jax.training.command import named_folder, run_command
from asgd_jax.training.curves import (
    FinishedRun,
    draw_runs,
    has_matplotlib,
    read_run,
    save_picture,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares runs from the command line; returns the exit code."""
    parser = OneLineParser(
        prog="python -m asgd_jax.training.compare", description=__doc__.splitlines()[0]
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--out", default="compare.png", help="the picture; its ending picks how")
    options = parser.parse_args(arguments)
    return run_command(
        "compare", lambda: _compare([named_folder(run, "RUN") for run in options.runs], options.out)
    )


def _compare(folders: Sequence[Path], out: str) -> None:
    names = shortest_names(folders)
    runs = [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
    print(format_runs(runs))
    if has_matplotlib():
        print(f"\npicture: {save_picture(draw_runs(runs, thresholds=True), Path(out))}")
    else:
        print("\nno picture: it needs matplotlib, pip install matplotlib")


def shortest_names(folders: Sequence[Path]) -> list[str]:
    """Returns names of folders, of as many of their last parts as tell them apart.

    >>> shortest_names([Path("runs/a/seed0"), Path("runs/b/seed0")])
    ['a/seed0', 'b/seed0']
    """
    parts = [folder.absolute().parts for folder in folders]
    depth = 1
    while depth < max(map(len, parts)) and len({each[-depth:] for each in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(each[-depth:]) for each in parts]


def format_runs(runs: Sequence[FinishedRun]) -> str:
    """Returns the table of runs, a line each."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        summary = run.summary
        final, sharpest = summary["final"], summary["sharpest_stable_minimum"]
        diverged = summary["diverged_at_step"]
        rows.append(
            {
                "run": run.name,
                "delay": summary["batches"]["delay"],
                "learning rate": f"{summary['learning_rate']:.4g}",
                "sharpest minimum": f"{sharpest:.4g}" if sharpest else "-",
                "train loss": f"{final['train_loss']:.3g}",
                "best error": _percent(summary["best_validation_error"]),
                "outcome": "completed" if diverged is None else f"diverged at step {diverged}",
            }
        )
    sides = ("left", *["right"] * 5, "left")
    return tabulate(rows, headers="keys", tablefmt="plain", colalign=sides, disable_numparse=True)


def _percent(error: float | None) -> str:
    return "-" if error is None else f"{error:.2%}"


if __name__ == "__main__":
    sys.exit(main())
