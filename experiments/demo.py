"""The paper's point in a minute: what a delay of 32 does, and what eq. 8 repairs.

`make demo`, or `python -m experiments.demo --out=DIR`: scikit-learn's digits, a small CNN,
33 workers. No download, no accelerator.
"""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from asgd_jax.command_line import OneLineParser
from asgd_jax.training import train
from asgd_jax.training.command import named_folder, run_command
from asgd_jax.training.folder.metrics import read_rows
from configs import digits
from experiments import style

# Arms of configs/digits.py, and what the demo changes in them.
_ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "S-SGD, large batch": ("ssgd", {}),
    # Logged more often than once an epoch: it does not last that long.
    "A-SGD, same learning rate": ("asgd_same", {"log_every_steps": 5}),
    "A-SGD, eq. 8 (learning rate / delay)": ("asgd", {}),
}


def run(out: Path) -> dict[str, dict[str, Any]]:
    """Trains every arm into a folder of its own; returns the summaries by arm."""
    summaries = {}
    for name, (arm, changes) in _ARMS.items():
        print(f"training: {name}", flush=True)
        config = digits.get_config(arm)
        config.update(checkpoint_every_epochs=0, **changes)  # too short to need any
        summaries[name] = train(config, out / _folder(name))
    return summaries


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """Returns the summaries as a table, a line an arm."""
    rows = [
        {
            "": name,
            "delay": summary["batches"]["delay"],
            "learning rate": f"{summary['learning_rate']:.4g}",
            "train loss": f"{summary['final']['train_loss']:.3g}",
            "validation error": f"{summary['final']['validation_error']:.1%}",
            "outcome": "converged"
            if summary["diverged_at_step"] is None
            else f"diverged at step {summary['diverged_at_step']}",
        }
        for name, summary in summaries.items()
    ]
    return tabulate(
        rows,
        headers="keys",
        tablefmt="plain",
        colalign=("left", *["right"] * 4, "left"),
        disable_numparse=True,
    )


def plot(out: Path) -> Any:
    """Returns the figure: validation error and train loss against epochs, a line an arm."""
    asgd = digits.get_config("asgd")
    figure, (left, right) = style.new_figure(2)
    for index, name in enumerate(_ARMS):
        rows = pd.DataFrame(read_rows(out / _folder(name))).set_index("epoch")
        look = {"color": style.COLOURS[index], "marker": style.MARKERS[index], "label": name}
        for axis, values in (
            (left, 100 * rows.validation_error.dropna()),
            (right, rows.train_loss),
        ):
            axis.plot(values.index, values, **style.sparse_markers(len(values)), **look)
            if rows.index[-1] < asgd.epochs:
                axis.annotate(
                    "diverged",
                    (values.index[-1], values.iloc[-1]),
                    (8, -4),
                    textcoords="offset points",
                    color=style.COLOURS[index],
                )
    left.set(xlabel="epoch", ylabel="validation error (%)", ylim=(0, 100))
    right.set(xlabel="epoch", ylabel="train loss (nats)", yscale="log")
    left.set_title(f"A delay of {asgd.delay} updates, with and without eq. 8")
    right.set_title("the same runs, train loss")
    left.legend(loc="center right")
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo from the command line; returns the exit code."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="demo", help="folder for all results")
    out = parser.parse_args(arguments).out
    return run_command("demo", lambda: _make(out), stopped="stopped; start it again, it is short")


def _make(folder: str) -> None:
    style.require_matplotlib()
    out = named_folder(folder, "out")
    # Made beside its place and moved there: a broken demo leaves the last good one alone.
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as beside:
        partial = Path(beside) / "demo"
        summaries = run(partial)
        style.save(plot(partial), partial / "demo.png")
        (partial / "table.txt").write_text(table(summaries) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    print(f"\n{table(summaries)}\n\ntable: {out / 'table.txt'}\npicture: {out / 'demo.png'}")


def _folder(name: str) -> str:
    words = name.partition("(")[0].replace(",", "").replace(".", "").lower().split()
    return "_".join(words)


if __name__ == "__main__":
    sys.exit(main())
